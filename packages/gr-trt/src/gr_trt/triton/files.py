"""Files of version folders."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gr_core.errors import BundleError
from gr_core.repository import Bundle
from gr_core.repository.bundle import CONFIG as BUNDLE_CONFIG

_MODEL = '''"""Written by the exporter triton-repository of gr-trt, which has to be installed."""

from gr_trt.triton.serving import {name}

TritonPythonModel = {name}
'''


def write_model(folder: Path, name: str) -> None:
    """``model.py`` with a class of `gr_trt.triton.serving`."""
    (folder / "model.py").write_text(_MODEL.format(name=name))


def copy_bundle(bundle: Bundle, folder: Path) -> None:
    """What the bundle lists, and nothing else that may lie beside it."""
    for name in (BUNDLE_CONFIG, *bundle.files):
        copy(bundle.path / name, folder / name)


def copy(source: Path, target: Path) -> None:
    """A file's content, without its permissions, in a folder that is made."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def share(source: Path, target: Path) -> None:
    """The same tree once more: as hard links where the file system has them."""
    shutil.copytree(source, target, copy_function=_linked)


def _linked(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def copy_graph(source: Path, target: Path) -> None:
    """An ONNX graph with the files of weights beside it, which it names. Raises `BundleError`."""
    copy(source, target)
    for name in external_files(source):
        copy(source.parent / name, target.parent / name)


def external_files(graph: Path) -> list[str]:
    """Files of weights that a graph names, in its own folder."""
    import onnx
    from onnx.external_data_helper import ExternalDataInfo, uses_external_data

    def tensors(graph: Any) -> Iterator[Any]:
        yield from graph.initializer
        for node in graph.node:
            for attribute in node.attribute:
                yield from [attribute.t, *attribute.tensors]
                for inner in [attribute.g, *attribute.graphs]:
                    yield from tensors(inner)

    model = onnx.load(graph, load_external_data=False)
    names = {
        ExternalDataInfo(tensor).location
        for tensor in tensors(model.graph)
        if uses_external_data(tensor)
    }
    for name in names:
        if Path(name).name != name:
            raise BundleError(f"{graph}: names weights outside of its folder: {name!r}")
    return sorted(names)


def write_warm_up(folder: Path, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
    """One raw file for each input, of one row, as Triton reads them."""
    folder.mkdir(parents=True)
    for name, array in arrays.items():
        (folder / name).write_bytes(_raw(array))


def _raw(array: npt.NDArray[Any]) -> bytes:
    if array.dtype == np.object_:
        return b"".join(
            len(text).to_bytes(4, "little") + text for text in array.reshape(-1).tolist()
        )
    return np.ascontiguousarray(array).tobytes()
