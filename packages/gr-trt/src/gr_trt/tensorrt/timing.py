"""The timing cache: how long kernels took on a GPU, so that the next build need not measure."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from gr_core.artifacts import cache_folder
from gr_core.errors import GrError
from gr_trt.tensorrt.files import write_atomically
from gr_trt.tensorrt.library import Library

logger = logging.getLogger(__name__)

_MAX_BYTES = 256 * 2**20


@contextmanager
def cache(library: Library, config: Any, targets: Sequence[str]) -> Iterator[None]:
    """A build's timing cache: of the cache folder, by the library's version and the target.

    TensorRT for RTX has none: it measures nothing while it builds. A cache that is damaged or of
    another GPU is begun anew.
    """
    if not library.has_timing_cache:
        yield
        return
    name = "-".join((library.name, library.version, *targets))
    path = cache_folder() / "tensorrt" / "timing" / f"{name}.cache"
    known = b""
    if path.is_file() and path.stat().st_size <= _MAX_BYTES:
        known = path.read_bytes()
    if not config.set_timing_cache(config.create_timing_cache(known), ignore_mismatch=False):
        logger.info("%s is of another GPU or damaged; it is measured again", path)
        config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)
    yield
    measured = config.get_timing_cache()
    if measured is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, memoryview(measured.serialize()).cast("B"))
    except (GrError, OSError) as error:
        logger.warning("the timing cache is not kept: %s", error)
