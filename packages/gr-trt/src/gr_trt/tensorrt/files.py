"""Files that appear whole or not at all."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

from gr_core.errors import BundleError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_atomically(path: Path, data: bytes | memoryview) -> None:
    """Raises `BundleError` where it cannot be written; then nothing of it is left."""
    size = memoryview(data).nbytes
    temporary = None
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes files that only their owner can read; a server is another user.
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise BundleError(_why(path, size, error)) from None
        raise


def _why(path: Path, size: int, error: OSError) -> str:
    if error.errno in _FULL:
        return (
            f"{path}: no room for {size / 2**20:.1f} MiB ({error.strerror}); "
            "free some, or write to another disk"
        )
    return f"{path}: cannot be written: {error.strerror}"
