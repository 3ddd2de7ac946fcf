"""What tritonserver answers is what the platform answers: alone, together, under load."""

from __future__ import annotations

import json
import random
import shutil
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from gr_core.contracts import Artifact, ExportOptions
from gr_core.plugins.host import PluginHost
from gr_core.repository import Bundle, Catalogue, ModelRepository, write_bundle
from gr_core.types import Candidates, History, RecommendRequest
from gr_trt.ensemble import Ensemble
from gr_trt.triton.exporter import TritonExporter
from gr_trt.triton.requests import request_text

from .conftest import (
    BUNDLES,
    RANK,
    RANKING,
    RETRIEVAL,
    RETRIEVE,
    Asker,
    Gr,
    Recommend,
    assert_same,
)

NOW_MS = 1_652_000_000_000
LONG = 6
"""Place of a request with a history, and with candidates, among the mixed ones."""


@pytest.fixture(scope="module")
def repository(
    exported: Mapping[str, Path], gr: Gr, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Both bundles in one."""
    repository = tmp_path_factory.mktemp("served") / "repository"
    shutil.copytree(exported[RETRIEVAL], repository)
    added = gr("triton", "add", str(exported[RANKING]), str(repository)).stdout.split()
    assert added[-1] == f"{RANK}/1"
    return repository


@pytest.fixture(scope="module")
def asker(
    repository: Path, servers: ModuleType, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Asker]:
    """Of a server that looks every second for what is new; it must stop with exit code 0."""
    scratch = tmp_path_factory.mktemp("triton")
    options = ("--model-control-mode=poll", "--repository-poll-secs=1")
    with servers.tritonserver(repository, scratch, *options) as triton:
        yield Asker(triton.grpc)
        assert "Traceback" not in triton.log.read_text()


@pytest.fixture(scope="module")
def mixed(
    requests: Mapping[str, Sequence[RecommendRequest]],
) -> Mapping[str, list[RecommendRequest]]:
    """Requests of very different lengths, to both ensembles."""
    found: dict[str, list[RecommendRequest]] = {RETRIEVE: [], RANK: []}
    assert min(map(len, requests.values())) > LONG
    for place, request in enumerate(requests[RETRIEVAL]):
        history = first(request.history, (0, 1, 3, 8, 9, 17, 40)[place % 7])
        found[RETRIEVE].append(
            replace(
                request, history=history, model=RETRIEVAL, candidates=None, k=1 + 7 * place % 50
            )
        )
    for place, request in enumerate(requests[RANKING]):
        history = first(request.history, (40, 0, 12, 1, 33)[place % 5])
        found[RANK].append(replace(request, history=history, model=RANKING))
    return found


def first(history: History, count: int) -> History:
    signals = {name: column[:count] for name, column in history.signals.items()}
    return History(history.item_ids[:count], history.timestamps_ms[:count], signals)


@pytest.mark.parametrize("ensemble", [RETRIEVE, RANK])
def test_answers_are_those_of_the_platform(
    asker: Asker,
    mixed: Mapping[str, Sequence[RecommendRequest]],
    recommend: Recommend,
    ensemble: str,
) -> None:
    for request in mixed[ensemble]:
        (answer,) = asker.ask(ensemble, request_text(request))
        assert_same(answer, recommend(request))
        assert len(answer["items"]) == min(
            request.k, len(request.candidates) if request.candidates else request.k
        )


@pytest.mark.parametrize(
    ("ensemble", "fields"),
    [
        (RETRIEVE, {"include_seen": True, "k": 30}),
        (RETRIEVE, {"exclude_item_ids": np.arange(0, 7000, 2)}),
        (RETRIEVE, {"k": 1000}),
        (RETRIEVE, {"history": History(np.array([10**12, 5, 5, 17]), np.arange(4) + NOW_MS)}),
        (RANK, {"candidates": Candidates(np.array([3, 10**12, 7, 12]))}),
        (RANK, {"candidates": Candidates(np.array([10**12]))}),
        (RANK, {"head_weights": {"like": 2.5, "retention": -1.0}, "k": 3}),
        (RANK, {"candidates": Candidates(np.arange(1000)), "k": 1000}),
    ],
)
def test_what_a_request_may_ask_for(
    asker: Asker,
    mixed: Mapping[str, Sequence[RecommendRequest]],
    recommend: Recommend,
    ensemble: str,
    fields: dict[str, Any],
) -> None:
    request = replace(mixed[ensemble][LONG], **fields)
    (answer,) = asker.ask(ensemble, request_text(request))
    expected = recommend(request)
    assert expected["items"] or fields["candidates"].item_ids.tolist() == [10**12]
    assert_same(answer, expected)


@pytest.mark.parametrize(("ensemble", "model"), [(RETRIEVE, RETRIEVAL), (RANK, RANKING)])
def test_answers_are_those_of_the_command_line(
    asker: Asker,
    mixed: Mapping[str, Sequence[RecommendRequest]],
    gr: Gr,
    tmp_path: Path,
    ensemble: str,
    model: str,
) -> None:
    text = request_text(mixed[ensemble][LONG])
    (tmp_path / "request.json").write_bytes(text)
    said = gr(
        *("recommend", "--models", BUNDLES, "--model", model, "--strategy", "baseline", "--json"),
        *("--request", str(tmp_path / "request.json")),
    )
    (answer,) = asker.ask(ensemble, text)
    assert_same(answer, json.loads(said.stdout))


def test_several_requests_in_one_call(
    asker: Asker, mixed: Mapping[str, Sequence[RecommendRequest]]
) -> None:
    for ensemble, requests in mixed.items():
        texts = [request_text(replace(r, request_id=str(i))) for i, r in enumerate(requests)]
        together = asker.ask(ensemble, *texts)
        assert [answer["request_id"] for answer in together] == [str(i) for i in range(len(texts))]
        for text, answer in zip(texts, together, strict=True):
            assert_same(answer, asker.ask(ensemble, text)[0])


def test_under_load_answers_stay_the_same_and_batches_form(
    asker: Asker, mixed: Mapping[str, Sequence[RecommendRequest]]
) -> None:
    alone = {
        (ensemble, place): asker.ask(ensemble, request_text(request))[0]
        for ensemble, requests in mixed.items()
        for place, request in enumerate(requests)
    }
    work = [*alone] * 12
    random.Random(0).shuffle(work)

    def check(key: tuple[str, int]) -> None:
        ensemble, place = key
        (answer,) = asker.ask(ensemble, request_text(mixed[ensemble][place]))
        assert_same(answer, alone[key])

    engines = [f"{ensemble}-engine" for ensemble in (RETRIEVE, RANK)]
    before = {engine: asker.batches(engine) for engine in engines}
    with ThreadPoolExecutor(24) as pool:
        list(pool.map(check, work))
    for engine in engines:
        after = asker.batches(engine)
        new = {size: count - before[engine].get(size, 0) for size, count in after.items()}
        assert sum(count for size, count in new.items() if size > 1) > 10, new


BAD = {
    b"{": "request: is not JSON",
    b"\xff": "request: is not JSON",
    b"": "request: is not JSON",
    b"[1]": "[1], expected an object",
    b"[" * 100_000: "request: nested too deeply",
    b'{"colour": "red"}': "request.colour: unknown; there are: ",
    b'{"k": 0}': "k: 0, expected 1 to 1000",
    b'{"k": "ten"}': "request.k: 'ten': expected an integer",
    b'{"history": {"item_ids": [1]}}': "request.history: 'timestamps_ms' is missing",
    b'{"history": {"item_ids": [1], "timestamps_ms": []}}': "0 times for 1 item ids",
    b'{"history": [{"item_id": 1, "timestamp_ms": 1e99}]}': "expected an integer",
    b'{"request_time_ms": -5}': "request_time_ms: -5, expected 0 to",
    b'{"model": "another"}': "model: 'another', but this is ",
    b'{"version": "7"}': "version: '7', but this is '1'",
    b'{"task": "generate"}': "task: generate, but this model can ",
    b'{"head_weights": {"fame": 1}}': "head_weights['fame']: no such head; there are: ",
    b'{"history_handle": "AAAA"}': "history_handle: no histories are kept; send it whole",
}


@pytest.mark.parametrize("text", BAD, ids=lambda text: text[:24].decode(errors="replace"))
def test_a_mistake_gets_one_clear_message(asker: Asker, text: bytes) -> None:
    for ensemble in (RETRIEVE, RANK):
        status, message = asker.refused(ensemble, text)
        assert status == "StatusCode.INVALID_ARGUMENT"
        assert BAD[text] in message
        assert "Traceback" not in message
        assert "\n" not in message


def test_candidates_are_for_ranking_alone(asker: Asker) -> None:
    assert "leave them out" in asker.refused(RETRIEVE, b'{"candidates": [1, 2]}')[1]
    assert "nothing else to rank" in asker.refused(RANK, b"{}")[1]
    assert "same as candidates.item_ids[0]" in asker.refused(RANK, b'{"candidates": [1, 1]}')[1]


def test_one_bad_request_of_a_call_names_its_row(asker: Asker) -> None:
    good = b'{"k": 3, "request_id": "good"}'
    _, message = asker.refused(RETRIEVE, good, b'{"k": -1}')
    assert "request[1]: k: -1, expected 1 to 1000" in message
    assert asker.ask(RETRIEVE, good)[0]["request_id"] == "good"


def test_what_triton_refuses_by_itself(asker: Asker) -> None:
    assert "unknown model" in asker.refused("nothing", b"{}")[1]
    assert "version 7" in asker.refused(RETRIEVE, b"{}", version="7")[1]
    assert "batch-size must be <= 32" in asker.refused(RETRIEVE, *[b"{}"] * 33)[1]


# ── Versions ──────────────────────────────────────────────────────────────────────────────────


def second_version(first: Bundle, folder: Path) -> Bundle:
    """The same weights, but every item has another id."""
    catalogue = first.catalogue()
    return write_bundle(
        folder / first.name / "2",
        name=first.name,
        version="2",
        architecture=first.architecture,
        tasks=first.tasks,
        config=first.config,
        features=first.features,
        catalogue=Catalogue((catalogue.ids + 1_000_000).tolist(), catalogue.titles),
        weights=lambda path: path.write_bytes(first.weights_path.read_bytes()),
    )


def export_second(first: Bundle, graphs: Path, folder: Path, **options: Any) -> Path:
    """The second version for Triton, of the graphs of the first, which know no ids."""
    bundle = second_version(first, folder / "bundles")
    shutil.copytree(graphs, folder / "graphs")
    ensemble = Ensemble.read(graphs)
    replace(ensemble, version="2", identity=bundle.identity.hex()).write(folder / "graphs")
    model = PluginHost.discover().registry.models[bundle.architecture].resolve()(bundle)
    out = folder / "exported"
    out.mkdir()
    given = ExportOptions(extra={"engine_threads": 1, **options})
    TritonExporter().export(Artifact("onnx", folder / "graphs"), model, out, given)
    return out


def test_a_second_version_while_the_first_is_served(
    asker: Asker, repository: Path, gr: Gr, tmp_path: Path
) -> None:
    bundle = ModelRepository(BUNDLES).bundle(RETRIEVAL)
    graphs = repository / f"{RETRIEVE}-engine" / "1" / "artifact"
    other = export_second(bundle, graphs, tmp_path / "other", triton_batch=8)
    refused = gr("triton", "add", str(other), str(repository), status=2).stderr
    assert "says 'max_batch_size: 32' where the new version has 'max_batch_size: 8'" in refused
    exported = export_second(bundle, graphs, tmp_path / "same")

    text = b'{"k": 5, "history": [{"item_id": 5, "timestamp_ms": 1652000000000}]}'
    before = ids(asker, RETRIEVE, text)
    done, seen, failures = threading.Event(), set(), []

    def keep_asking() -> None:
        while not done.is_set():
            try:
                seen.add(tuple(ids(asker, RETRIEVE, text)))
            except Exception as error:
                failures.append(error)

    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(keep_asking)
        gr("triton", "add", str(exported), str(repository))
        wait_for(lambda: ids(asker, f"{RETRIEVE}-v2", text))
        wait_for(lambda: ids(asker, RETRIEVE, text) != before)
        done.set()
        asking.result()
    assert not failures
    unknown = ids(asker, f"{RETRIEVE}-v2", b'{"k": 5}')
    assert ids(asker, f"{RETRIEVE}-v1", text) == before
    assert ids(asker, RETRIEVE, b'{"k": 5}') == unknown
    assert all(item >= 1_000_000 for item in unknown)
    assert len(seen) == 2
    assert (
        "has version 2 already"
        in gr("triton", "add", str(exported), str(repository), status=2).stderr
    )


def ids(asker: Asker, ensemble: str, text: bytes) -> list[int]:
    return [item["item_id"] for item in asker.ask(ensemble, text)[0]["items"]]


def wait_for(condition: Any) -> None:
    for _ in range(120):
        try:
            if condition():
                return
        except Exception as error:
            if "unknown model" not in str(error) and "not ready" not in str(error):
                raise
        time.sleep(0.25)
    pytest.fail("nothing changed within 30 s")
