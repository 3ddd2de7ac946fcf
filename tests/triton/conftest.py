"""The shipped bundles, exported for Triton by the command line, in a real tritonserver."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from gr_core.config import Config
from gr_core.json_requests import answer_as_dict, read_requests
from gr_core.pipeline import Pipeline
from gr_core.plugins.host import PluginHost
from gr_core.repository import ModelRepository
from gr_core.samples import SAMPLES
from gr_core.types import Candidates, RecommendRequest

BUNDLES = "package:gr_hstu/bundles"
RETRIEVAL, RANKING = "kuairand-retrieval", "kuairand-ranking"
RETRIEVE, RANK = "kuairand-retrieval-retrieve", "kuairand-ranking-rank"
"""Their ensembles."""

Answer = Mapping[str, Any]
Recommend = Callable[[RecommendRequest], Answer]
Gr = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def servers() -> ModuleType:
    """The module that runs tritonserver."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
    import tritonserver

    return tritonserver


@pytest.fixture(scope="session")
def gr(environment: Mapping[str, str], tmp_path_factory: pytest.TempPathFactory) -> Gr:
    """Runs a `gr` command; fails unless it ends with the expected status."""
    folder = tmp_path_factory.mktemp("gr")

    def gr(*arguments: str, status: int = 0) -> subprocess.CompletedProcess[str]:
        result = subprocess.run(
            ["gr", *arguments], cwd=folder, env=environment, capture_output=True, text=True
        )
        assert result.returncode == status, f"{arguments}\n{result.stdout}\n{result.stderr}"
        return result

    return gr


@pytest.fixture(scope="session")
def exported(gr: Gr, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """A repository for each bundle."""
    folder = tmp_path_factory.mktemp("exported")
    for name, task in ((RETRIEVAL, "retrieve"), (RANKING, "rank")):
        gr(
            *("export", "--model", name, "--models", BUNDLES, "--format", "triton-repository"),
            *("--out", str(folder / name), "--task", task),
            *("--option", "engine_threads=1", "--option", "steps=false"),
        )
    return {name: folder / name for name in (RETRIEVAL, RANKING)}


@pytest.fixture(scope="session")
def requests() -> Mapping[str, Sequence[RecommendRequest]]:
    """Users of both bundles, as these bring them, with candidates to rank."""
    repository = ModelRepository(BUNDLES)
    found = {
        name: read_requests(repository.bundle(name).path / SAMPLES) for name in (RETRIEVAL, RANKING)
    }
    found[RANKING] = [
        replace(request, candidates=Candidates(np.arange(place, place + 1 + 11 * place % 90)))
        for place, request in enumerate(found[RANKING])
    ]
    return found


@pytest.fixture(scope="session")
def recommend() -> Iterator[Recommend]:
    """What `gr recommend --strategy baseline` answers, by the same pipeline."""
    models = [{"name": name, "strategy": "baseline"} for name in (RETRIEVAL, RANKING)]
    flags = {"repository": {"path": BUNDLES}, "models": models}
    with asyncio.Runner() as runner:
        config = Config.load(None, flags=flags, environ={})
        pipeline = Pipeline.from_config(config, PluginHost.discover().registry)
        runner.run(pipeline.start())

        def recommend(request: RecommendRequest) -> Answer:
            return answer_as_dict(runner.run(pipeline.recommend(request)))

        yield recommend
        runner.run(pipeline.close())


def assert_same(found: Answer, expected: Answer) -> None:
    """The same items in the same order with the same scores, and the same left out.

    Of items with equal scores, such as all of them without a history, any may come first.
    """
    for key in ("unknown_items", "unscored_item_ids"):
        assert found[key] == expected[key]
    assert len(found["items"]) == len(expected["items"])
    scores = np.array([item["score"] for item in expected["items"]])
    alone = [np.count_nonzero(np.abs(scores - score) < 1e-5) == 1 for score in scores]
    for ours, theirs, is_alone in zip(found["items"], expected["items"], alone, strict=True):
        assert_close(ours["score"], theirs["score"])
        if is_alone:
            assert (ours["item_id"], ours["title"]) == (theirs["item_id"], theirs["title"])
            assert list(ours["head_scores"]) == list(theirs["head_scores"])
            assert_close(list(ours["head_scores"].values()), list(theirs["head_scores"].values()))
    stages = [(s["task"], s["model"], s["version"]) for s in expected["stages"]]
    assert [(s["task"], s["model"], s["version"]) for s in found["stages"]] == stages or not stages


def assert_close(ours: Any, theirs: Any) -> None:
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


class Asker:
    """A client of Triton, as users have one."""

    def __init__(self, address: str) -> None:
        import tritonclient.grpc as triton

        self.triton = triton
        self.client = triton.InferenceServerClient(address)

    def ask(self, model: str, *texts: bytes, version: str = "", **options: Any) -> list[Answer]:
        """Answers to requests in JSON, sent as one batch."""
        rows = np.array([[text] for text in texts], np.object_)
        given = self.triton.InferInput("request", list(rows.shape), "BYTES")
        given.set_data_from_numpy(rows)
        result = self.client.infer(model, [given], model_version=version, **options)
        return [json.loads(text) for text in result.as_numpy("answer")[:, 0]]

    def refused(self, model: str, *texts: bytes, **options: Any) -> tuple[str, str]:
        """Status and message of a refusal."""
        with pytest.raises(self.triton.InferenceServerException) as caught:
            self.ask(model, *texts, **options)
        return str(caught.value.status()), str(caught.value.message())

    def batches(self, model: str) -> dict[int, int]:
        """How many batches of each size a model has computed."""
        (stats,) = self.client.get_inference_statistics(model, as_json=True)["model_stats"]
        rows = stats.get("batch_stats", ())
        return {int(r["batch_size"]): int(r["compute_infer"].get("count", 0)) for r in rows}
