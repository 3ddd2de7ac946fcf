"""Artifacts that exporters make: once, all or nothing, and never one made from something else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from gr_core import Task
from gr_core.artifacts import cache_folder, load_engine, materialize
from gr_core.contracts import Artifact, EngineOptions, ExportOptions, Model
from gr_core.errors import BundleError, GrError
from gr_core.planner import Plan, plan
from gr_core.plugins.registry import Registry
from gr_core.repository import Bundle

from .helpers import (
    Lab,
    MeanEngine,
    MeanModel,
    engine_descriptor,
    exporter_descriptor,
    model_descriptor,
    write_model,
)


class Press:
    """Exports by writing down what it was given."""

    def __init__(self, calls: list[Artifact], target: str) -> None:
        self.calls, self.target = calls, target
        self.fail = False

    def export(
        self, artifact: Artifact, model: Model, out_dir: Path, options: ExportOptions
    ) -> Artifact:
        assert not list(out_dir.iterdir())
        self.calls.append(artifact)
        (out_dir / "pressed").write_text(f"{artifact.format} {sorted(options.extra)}")
        if self.fail:
            raise GrError("both sides differ")
        return Artifact(self.target, out_dir)


class Chain:
    """numpy → pressed → baked → engine, with what its exporters were asked."""

    def __init__(self) -> None:
        self.calls: list[Artifact] = []
        self.pressing = Press(self.calls, "pressed")
        self.baking = Press(self.calls, "baked")
        self.registry = Registry.of(
            model_descriptor(),
            exporter_descriptor(lambda: self.pressing),
            exporter_descriptor(lambda: self.baking, name="bake", source="pressed", target="baked"),
            engine_descriptor(lambda: MeanEngine(Lab()), formats=("baked",)),
        )

    @property
    def plan(self) -> Plan:
        return plan(self.registry, "mean", Task.RANK)


@pytest.fixture
def chain() -> Chain:
    return Chain()


@pytest.fixture
def model(tmp_path: Path) -> MeanModel:
    return MeanModel(write_model(tmp_path / "repository"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "artifacts"


def test_without_exporters_the_bundle_is_the_artifact(model: MeanModel, folder: Path) -> None:
    registry = Registry.of(model_descriptor(), engine_descriptor(lambda: MeanEngine(Lab())))
    artifact = materialize(plan(registry, "mean", Task.RANK), model, folder, {})
    assert artifact == Artifact("numpy", model.bundle.path)
    assert not folder.exists()


def test_the_artifact_has_the_format_that_the_engine_loads(model: MeanModel, folder: Path) -> None:
    """A bundle may be of several formats at once, and the engine takes the second of them."""
    registry = Registry.of(
        model_descriptor(formats=("numpy", "flat")),
        engine_descriptor(lambda: MeanEngine(Lab()), formats=("flat",)),
    )
    artifact = materialize(plan(registry, "mean", Task.RANK), model, folder, {})
    assert artifact == Artifact("flat", model.bundle.path)


def test_each_step_gets_what_the_one_before_made(
    chain: Chain, model: MeanModel, folder: Path
) -> None:
    artifact = materialize(chain.plan, model, folder, {"opset": 17})
    assert artifact.format == "baked"
    assert [call.format for call in chain.calls] == ["numpy", "pressed"]
    assert chain.calls[0].path == model.bundle.path
    assert (chain.calls[1].path / "pressed").read_text() == "numpy ['opset']"
    assert (artifact.path / "pressed").read_text() == "pressed ['opset']"
    assert artifact.path.is_relative_to(folder / "mean")


def test_what_was_exported_is_not_exported_again(
    chain: Chain, model: MeanModel, folder: Path
) -> None:
    first = materialize(chain.plan, model, folder, {})
    assert materialize(chain.plan, model, folder, {}) == first
    assert len(chain.calls) == 2
    again = Chain()
    assert materialize(again.plan, MeanModel(model.bundle), folder, {}) == first
    assert again.calls == []


def test_a_failing_exporter_leaves_nothing(chain: Chain, model: MeanModel, folder: Path) -> None:
    chain.baking.fail = True
    for calls in (2, 3):  # the first step is kept, the second is tried again
        with pytest.raises(GrError, match="both sides differ"):
            materialize(chain.plan, model, folder, {})
        assert len(chain.calls) == calls
        assert len(list((folder / "mean").iterdir())) == 1
    chain.baking.fail = False
    assert materialize(chain.plan, model, folder, {}).format == "baked"


def test_an_unfinished_artifact_is_made_again(chain: Chain, model: MeanModel, folder: Path) -> None:
    """What a crash may leave behind is not taken for an artifact."""
    artifact = materialize(chain.plan, model, folder, {})
    (artifact.path / ".complete").unlink()
    (artifact.path / "pressed").write_text("half")
    assert materialize(chain.plan, model, folder, {}) == artifact
    assert (artifact.path / "pressed").read_text() == "pressed []"
    assert len(chain.calls) == 3


def test_whatever_an_artifact_depends_on_makes_another(
    chain: Chain, model: MeanModel, folder: Path, tmp_path: Path
) -> None:
    made = {materialize(chain.plan, model, folder, {}).path}
    made.add(materialize(chain.plan, model, folder, {"opset": 17}).path)
    made.add(materialize(chain.plan, model, folder, {"opset": 18}).path)

    made.add(materialize(replace(chain.plan, dtype="float16"), model, folder, {}).path)
    revised = tuple(replace(step, revision="2") for step in chain.plan.exporters)
    made.add(materialize(replace(chain.plan, exporters=revised), model, folder, {}).path)

    of_another = replace(chain.plan.model, revision="2")
    made.add(materialize(replace(chain.plan, model=of_another), model, folder, {}).path)

    newer = MeanModel(write_model(tmp_path / "repository", version="2"))
    made.add(materialize(chain.plan, newer, folder, {}).path)

    retrained: Bundle = write_model(tmp_path / "repository", seed=1, overwrite=True)
    made.add(materialize(chain.plan, MeanModel(retrained), folder, {}).path)

    imported = MeanModel(retrained)
    imported.notes = ("weights: the checkpoint open.pt",)
    made.add(materialize(chain.plan, imported, folder, {}).path)
    assert len(made) == 9
    assert len(chain.calls) == 18


class Reader(MeanEngine):
    """Refuses what is damaged."""

    def load(
        self, artifact: Artifact, model: Model, tasks: Sequence[Task], options: EngineOptions
    ) -> None:
        if not (artifact.path / "pressed").read_text().startswith("pressed"):
            raise BundleError(f"{artifact.path}: damaged")
        super().load(artifact, model, tasks, options)


def test_a_kept_artifact_that_cannot_be_loaded_is_made_again(
    chain: Chain, model: MeanModel, folder: Path
) -> None:
    artifact = materialize(chain.plan, model, folder, {})
    (artifact.path / "pressed").write_text("pre")
    engine = Reader(Lab())
    load_engine(engine, chain.plan, model, [Task.RANK], EngineOptions(), folder)
    assert engine.health().ok
    assert len(chain.calls) == 4
    load_engine(Reader(Lab()), chain.plan, model, [Task.RANK], EngineOptions(), folder)
    assert len(chain.calls) == 4


def test_an_artifact_that_is_wrong_when_made_is_not_made_again_and_again(
    chain: Chain, model: MeanModel, folder: Path
) -> None:
    chain.baking.export = lambda *_: (_[2] / "pressed").write_text("pre")  # type: ignore[assignment,func-returns-value]
    for calls in (1, 2):  # each start tries once what was kept, and once what is new
        with pytest.raises(BundleError, match="damaged"):
            load_engine(Reader(Lab()), chain.plan, model, [Task.RANK], EngineOptions(), folder)
        assert len(chain.calls) == calls


def test_where_artifacts_are_kept(
    chain: Chain, model: MeanModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("GR_CACHE_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder() == tmp_path / "home" / ".cache" / "gr"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "gr"
    monkeypatch.setenv("GR_CACHE_DIR", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"
    artifact = materialize(chain.plan, model, None, {})
    assert artifact.path.is_relative_to(tmp_path / "own")
