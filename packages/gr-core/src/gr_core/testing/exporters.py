"""What every exporter must do."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest

from gr_core.contracts import Artifact, Exporter, ExportOptions, Model
from gr_core.engines import Only
from gr_core.errors import GrError
from gr_core.parity import Parity, compare
from gr_core.planner import export_path
from gr_core.plugins.descriptors import ExporterDescriptor
from gr_core.plugins.registry import Registry
from gr_core.repository import Bundle
from gr_core.testing.suite import Suite


class ExporterSuite(Suite):
    """Subclass it with ``exporter``, its name, and a fixture ``bundle`` of a model for it."""

    exporter: ClassVar[str]
    options: ClassVar[Mapping[str, Any]] = {}
    """Options that only this exporter knows."""

    @pytest.fixture
    def bundle(self) -> Bundle:
        raise NotImplementedError("give a fixture `bundle`: a small model that can be exported")

    @pytest.fixture
    def model(self, registry: Registry, bundle: Bundle) -> Iterator[Model]:
        model: Model = registry.models[bundle.architecture].resolve()(bundle)
        yield model
        model.close()

    @pytest.fixture
    def descriptor(self, registry: Registry) -> ExporterDescriptor:
        return registry.exporters[self.exporter]

    @pytest.fixture
    def source(
        self, registry: Registry, descriptor: ExporterDescriptor, model: Model, tmp_path: Path
    ) -> Artifact:
        """What it exports: the bundle, or what other exporters make of it."""
        formats = registry.models[model.bundle.architecture].formats
        if descriptor.source in formats:
            return Artifact(descriptor.source, model.bundle.path)
        start, steps = export_path(registry, model.bundle.architecture, descriptor.source)
        artifact = Artifact(start, model.bundle.path)
        for step in steps:
            folder = tmp_path / f"source-{step.name}"
            folder.mkdir()
            artifact = step.resolve()().export(artifact, model, folder, ExportOptions())
        return artifact

    def test_it_makes_what_its_descriptor_says(
        self, descriptor: ExporterDescriptor, source: Artifact, model: Model, tmp_path: Path
    ) -> None:
        made = self._export(descriptor, source, model, tmp_path / "out")
        assert made.format == descriptor.target
        assert made.path.is_relative_to(tmp_path / "out")
        assert made.path.exists()
        assert any((tmp_path / "out").iterdir())

    def test_it_leaves_its_source_alone(
        self, descriptor: ExporterDescriptor, source: Artifact, model: Model, tmp_path: Path
    ) -> None:
        before = _digests(source.path)
        self._export(descriptor, source, model, tmp_path / "out")
        assert _digests(source.path) == before

    def test_what_it_makes_can_be_moved(
        self,
        registry: Registry,
        descriptor: ExporterDescriptor,
        source: Artifact,
        model: Model,
        tmp_path: Path,
    ) -> None:
        """Nothing in the folder names the folder that it was written to."""
        out = tmp_path / "a-place-that-will-be-left"
        self._export(descriptor, source, model, out)
        for file in (f for f in out.rglob("*") if f.is_file()):
            assert out.name.encode() not in file.read_bytes(), file

    def test_unknown_options_are_refused(
        self, descriptor: ExporterDescriptor, source: Artifact, model: Model, tmp_path: Path
    ) -> None:
        out = tmp_path / "out"
        out.mkdir()
        exporter: Exporter = descriptor.resolve()()
        unknown = ExportOptions(extra={**self.options, "no_such_option": 1})
        with pytest.raises(GrError, match="no_such_option"):
            exporter.export(source, model, out, unknown)

    def test_engines_that_run_it_agree_with_the_reference(
        self, registry: Registry, descriptor: ExporterDescriptor, model: Model
    ) -> None:
        compared: list[Parity] = []
        for engine in registry.engines.values():
            if descriptor.target in engine.formats:
                for task in model.tasks:
                    if task in engine.tasks and task in descriptor.tasks:
                        only = Only([engine.name])
                        compared += compare(registry, model, task, only, requests=8, k=5)
        if not compared:
            pytest.skip(f"no engine here runs {descriptor.target}")
        for parity in compared:
            assert parity.ok, f"{parity.task} on {parity.engine}: {parity.problem}"

    def _export(
        self, descriptor: ExporterDescriptor, source: Artifact, model: Model, out: Path
    ) -> Artifact:
        out.mkdir()
        exporter: Exporter = descriptor.resolve()()
        return exporter.export(source, model, out, ExportOptions(extra=self.options))


def _digests(path: Path) -> dict[str, str]:
    files = [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.is_file())
    return {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
