"""The exporter ``triton-repository``: graphs as a complete model repository for Triton."""

from __future__ import annotations

import logging
import tempfile
from dataclasses import asdict
from pathlib import Path

from gr_core.contracts import Artifact, ExportOptions, Model
from gr_core.errors import BundleError
from gr_trt.ensemble import Ensemble
from gr_trt.options import own_options
from gr_trt.triton.graphs import fitted
from gr_trt.triton.layout import graph_for
from gr_trt.triton.options import PYTHON, TENSORRT, RepositoryOptions
from gr_trt.triton.plans import build
from gr_trt.triton.repository import Source, version_of, write_report, write_repository
from gr_trt.triton.verify import verify

logger = logging.getLogger(__name__)

TARGET = "triton-repository"


class TritonExporter:
    """onnx → triton-repository; its options are those of `RepositoryOptions`.

    With the backend ``tensorrt`` the plans are built on the way, with the options of the exporter
    ``tensorrt``.
    """

    def export(
        self, artifact: Artifact, model: Model, out_dir: Path, options: ExportOptions
    ) -> Artifact:
        own = own_options(RepositoryOptions, options.extra, f"exporter {TARGET}")
        if any(out_dir.iterdir()):
            raise BundleError(f"{out_dir}: is not empty; export into a new folder")
        version = version_of(model, own)
        ensemble = Ensemble.read(artifact.path)
        tasks = [
            task for task in model.tasks if any(task in graph.tasks for graph in ensemble.graphs)
        ] or list(model.tasks)
        for task in tasks:
            graph_for(ensemble, task, f"exporter {TARGET}")
        with tempfile.TemporaryDirectory(prefix="gr-triton-") as scratch:
            graphs, plans = artifact.path, None
            if own.backend != PYTHON:
                graphs = Path(scratch) / "graphs"
                fitted(artifact.path, graphs, tasks)
            if own.backend == TENSORRT:
                plans = Path(scratch) / "plans"
                plans.mkdir()
                build(graphs, model, plans, options, own)
            source = Source(model, graphs, plans, options.device)
            for task in tasks:
                names = write_repository(out_dir, source, task, own)
                parity = verify(out_dir, names, version, source, task, own, artifact.path)
                report = {
                    "model": model.bundle.name,
                    "version": model.bundle.version,
                    "identity": ensemble.identity,
                    "dtype": ensemble.dtype,
                    "options": asdict(own),
                    "parity": asdict(parity),
                    "graphs": [asdict(graph) for graph in ensemble.graphs if task in graph.tasks],
                }
                write_report(out_dir, names, version, report)
                logger.info(
                    "%s: version %d, %s, differs from the graphs by %.2g (%g allowed)",
                    names.ensemble,
                    version,
                    own.backend,
                    parity.max_error,
                    parity.tolerance,
                )
        return Artifact(TARGET, out_dir)
