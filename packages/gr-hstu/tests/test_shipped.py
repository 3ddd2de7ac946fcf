"""The bundles that the package ships: complete, small, attributed, and usable."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from gr_core.json_requests import read_requests
from gr_core.labelled import cases, labelled_requests, quality
from gr_core.repository import Bundle, ModelRepository
from gr_core.types import Candidates, RecommendRequest, Task
from gr_hstu.model import HSTUModel, load_hstu, load_mtgr
from gr_hstu.testing import engine_of

NAMES = {"kuairand-retrieval": load_hstu, "kuairand-ranking": load_mtgr}


def opened(name: str) -> HSTUModel:
    return NAMES[name](ModelRepository("package:gr_hstu/bundles").bundle(name))


def samples(bundle: Bundle) -> list[RecommendRequest]:
    return list(read_requests(bundle.path / "samples.json"))


@pytest.mark.parametrize("name", NAMES)
def test_complete_and_attributed(name: str) -> None:
    bundle = ModelRepository("package:gr_hstu/bundles").bundle(name)
    bundle.check_files()
    brought = {"ATTRIBUTION.txt", "LICENSE", "MODEL_CARD.md", "evaluation.jsonl", "samples.json"}
    assert brought <= set(bundle.files)
    assert "CIKM 2022" in (bundle.path / "ATTRIBUTION.txt").read_text(encoding="utf-8")
    assert "ShareAlike 4.0" in (bundle.path / "LICENSE").read_text(encoding="utf-8")
    card = (bundle.path / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert "gr hstu train --data kuairand-pure" in card
    assert "CC BY-SA 4.0" in bundle.license


def test_six_megabytes_hold_all() -> None:
    root = Path(ModelRepository("package:gr_hstu/bundles").path)
    assert sum(f.stat().st_size for f in root.rglob("*") if f.is_file()) <= 6_000_000


@pytest.mark.parametrize("name", NAMES)
def test_samples_are_known_to_the_model(name: str) -> None:
    model = opened(name)
    requests = samples(model.bundle)
    assert len(requests) >= 5
    for request in requests:
        task = model.tasks[0]
        candidates = Candidates(request.history.item_ids[:3])
        request = RecommendRequest(
            request.history,
            candidates,
            user_features=request.user_features,
            context_features=request.context_features,
            request_time_ms=request.request_time_ms,
        )
        encoding = model.encode(request, task)
        assert encoding.unknown_items == 0
        arrays = encoding.request.arrays
        if name == "kuairand-ranking":
            assert (arrays["user_features"] > 0).all()
            assert (arrays["context_features"] > 0).all()
        assert arrays["history_items"].min() > 0


def test_the_retrieval_models_state_is_reusable_and_reads_no_times() -> None:
    model = opened("kuairand-retrieval")
    assert model.prefix_stability.reusable == "growing"
    assert model.prefix_stability.recompute_last == 0
    request = samples(model.bundle)[0]
    assert request.request_time_ms is not None
    module = model.module(Task.RETRIEVE)
    answers = []
    for shift in (0, 86_400_000):
        later = RecommendRequest(request.history, request_time_ms=request.request_time_ms + shift)
        arrays = model.encode(later, Task.RETRIEVE).request.arrays
        batch = {name: torch.from_numpy(np.array(array)[None]) for name, array in arrays.items()}
        answers.append(module(**batch).numpy())
    np.testing.assert_array_equal(*answers)


def test_the_evaluation_sets_show_the_cards_quality() -> None:
    """The intervals of so few users reach further than the tolerances here."""
    expected = {
        "kuairand-retrieval": {"ndcg@10": 0.0553, "hr@10": 0.1068},
        "kuairand-ranking": {"auc:recommendation": 0.7484, "auc:engagement": 0.7480},
    }
    for name, right in expected.items():
        model = opened(name)
        task = model.tasks[0]
        found = cases(model, task, labelled_requests(model))
        engine = engine_of(model)
        results = [r for case in found for r in engine.infer([case.request])]
        engine.close()
        measured = quality(task, found, results, model.heads)
        for metric, value in right.items():
            assert measured[metric] == pytest.approx(value, abs=0.02), (name, metric)
