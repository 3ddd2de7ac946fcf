"""The training loop, losses, batches and features of training."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("scipy", reason="needs gr-hstu[train]")

from gr_hstu.data.interactions import Interactions, Table
from gr_hstu.evaluation.protocols import Cases
from gr_hstu.features import Feature, FeatureSchema
from gr_hstu.training import losses, settings
from gr_hstu.training.batches import HistoryEncoder, catalogue_of, stack
from gr_hstu.training.generation_task import GenerationTask
from gr_hstu.training.loop import Interrupted, Options, fit
from gr_hstu.training.ranking import predict
from gr_hstu.training.ranking_task import RankingTask
from gr_hstu.training.retrieval_task import RetrievalTask
from gr_hstu.training.warm_start import leading_eigenvectors

DAY_MS = 86_400_000


def cyclic(users: int = 60, length: int = 12, items: int = 20) -> Interactions:
    """Every user goes round the items: what comes next is certain."""
    user = np.repeat(np.arange(1, users + 1), length)
    step = np.tile(np.arange(length), users)
    liked = ((user + step) % items < items // 2).astype(np.float32)
    return Interactions.sort(
        Interactions(
            name="cyclic",
            user_N=user,
            item_N=(user + step) % items + 1,
            timestamp_ms_N=step * 3_600_000 + 1_650_000_000_000,
            users=Table(
                tuple(str(u) for u in range(1, users + 1)),
                features={
                    "group": np.array(["a", "b"] * (users // 2)),
                },
            ),
            items=Table(
                tuple(str(i) for i in range(1, items + 1)),
                features={
                    "length": np.arange(items).astype(np.float32),
                },
            ),
            signals={"is_liked": liked},
            context={"tab": (user % 3).astype(np.int64)},
        )
    )


def retrieval_task(**changes: Any) -> RetrievalTask:
    values = {
        "d_model": 16,
        "max_history": 8,
        "truncate_step": 2,
        "dropout": 0.1,
        "sasrec_dropout": 0.1,
        "batch_size": 16,
        "signals": (Feature("is_liked", "binary"),),
    }
    return RetrievalTask(cyclic(), settings.RetrievalSettings(**(values | changes)))


def ranking_task(model: str = "mtgr", length: int = 12) -> RankingTask:
    return RankingTask(
        cyclic(length=length),
        settings.RankingSettings(
            model=model,
            d_model=16,
            embedding_dim=8,
            mlp_dim=16,
            max_history=8,
            truncate_step=2,
            dropout=0.1,
            batch_size=32,
            heads={"like": "is_liked"},
            signals=(Feature("is_liked", "binary"),),
            user_columns=("group",),
            item_columns=("length",),
        ),
    )


OPTIONS = Options(max_epochs=3, patience=3, learning_rate=3e-3)


@pytest.mark.parametrize("kind", ["hstu", "sasrec"])
@pytest.mark.parametrize("loss", ["full", "sampled", "shared", "in-batch"])
def test_retrieval_learns_what_comes_next(kind: str, loss: str) -> None:
    task = retrieval_task(loss=loss, negatives=10)
    model = task.new_model(kind, seed=0)
    options = Options(max_epochs=30, patience=30, learning_rate=1e-2)
    progress = task.train(model, kind, options)
    assert progress.history[-1]["loss"] < 0.6 * progress.history[0]["loss"]
    result = task.test(task.scorer(model))
    assert result.mean("hr@1") > 0.9
    popularity = task.test(task.baselines()["popularity"]())
    assert result.mean("ndcg@10") > popularity.mean("ndcg@10")


def generation_task(**changes: Any) -> GenerationTask:
    data = cyclic()
    index = np.arange(len(data.items))
    features = {"code_1": (index // 4).astype(np.float32), "code_2": (index % 4).astype(np.float32)}
    data = replace(data, items=replace(data.items, features=features))
    values = {"d_model": 16, "max_history": 8, "truncate_step": 2, "dropout": 0.1, "batch_size": 16}
    return GenerationTask(data, settings.GenerationSettings(**(values | changes)))


@pytest.mark.parametrize(("normalised", "rate"), [(True, 1e-2), (False, 3e-2)])
def test_generation_learns_what_comes_next(normalised: bool, rate: float) -> None:
    task = generation_task(normalised=normalised)
    model = task.new_model(seed=0)
    progress = task.train(model, Options(max_epochs=40, patience=40, learning_rate=rate))
    assert progress.history[-1]["loss"] < 0.5 * progress.history[0]["loss"]
    result = task.test(task.scorer(model))
    assert result.mean("hr@1") > 0.8
    popularity = task.test(task.baselines()["popularity"]())
    assert result.mean("ndcg@10") > popularity.mean("ndcg@10")


def test_generation_goes_on_from_where_it_stopped(tmp_path: Path) -> None:
    options = Options(max_epochs=2, patience=2)

    def run(folder: Path | None, stop: int | None = None) -> dict[str, Tensor]:
        task = generation_task()
        model = task.new_model(seed=0)
        objective = task.objective()
        fit(model, objective, options, folder, stop_after_steps=stop)
        return weights(model)

    undisturbed = run(None)
    with pytest.raises(Interrupted):
        run(tmp_path, stop=3)
    resumed = run(tmp_path)
    assert same(undisturbed, resumed)
    assert resumed["item_codes"].dtype == torch.int32
    assert (resumed["item_codes"][1:] == torch.from_numpy(generation_task().codes_IL[1:])).all()


def test_generation_windows_cover_every_training_row_once() -> None:
    task = generation_task(max_history=4)
    objective = task.objective()
    for epoch in range(3):
        plans = objective.epoch(np.random.default_rng(epoch))
        windows = np.concatenate(list(plans))
        assert (windows[:, 1] - windows[:, 0] <= 5).all()
        rows = np.concatenate([np.arange(start, end) for start, end in windows])
        assert sorted(rows.tolist()) == np.flatnonzero(task.split.train_N).tolist()
        assert (task.data.user_N[windows[:, 0]] == task.data.user_N[windows[:, 1] - 1]).all()


def test_the_loss_of_generation_is_the_score_of_what_came_next() -> None:
    """Teacher forcing in one pass gives each item's log-probability as the search has it."""
    task = generation_task()
    model = task.new_model(seed=0).eval()
    start, end = 0, 6
    loss = task.objective().loss(model, np.array([[start, end]]))
    total = 0.0
    for row in range(start, end):
        cases = Cases(*(np.array([i]) for i in (row, start, row)))
        scores = task.scorer(model).score(task.data, cases)
        total -= scores[0, task.data.item_N[row]]
    assert float(loss.detach()) == pytest.approx(total / (end - start), rel=1e-5)


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ({}, "the items have no codes"),
        ({"code_1": np.array(["a"] * 20)}, "code_1 of the items must be a count"),
        ({"code_1": np.full(20, 0.5, np.float32)}, "code_1 of the items must be a count"),
        ({"code_1": np.full(20, np.nan, np.float32)}, "code_1 of the items must be a count"),
        ({"code_1": np.full(20, -1, np.float32)}, "code_1 of the items must be a count"),
    ],
)
def test_items_without_codes_are_a_users_mistake(features: dict[str, Any], message: str) -> None:
    data = cyclic()
    data = replace(data, items=replace(data.items, features=features))
    with pytest.raises(ValueError, match=message):
        GenerationTask(data, settings.GenerationSettings())


@pytest.mark.parametrize("kind", ["mtgr", "hstu"])
def test_ranking_learns_from_items_and_features(kind: str) -> None:
    task = ranking_task(kind)
    model = task.new_model(seed=0)
    progress = task.train(model, Options(max_epochs=6, patience=6, learning_rate=1e-2))
    assert progress.history[-1]["loss"] < progress.history[0]["loss"]
    assert progress.best_metric > 0.95
    probability = task.test(model)
    assert probability.shape == (len(task.split.test), 1)
    assert ((probability > 0) & (probability < 1)).all()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(("stop", "decay"), [(1, 0.9), (7, 0.0), (40, 0.9), (62, 0.0)])
def test_a_resumed_run_is_bit_identical(tmp_path: Path, stop: int, decay: float) -> None:
    task = retrieval_task()
    options = replace(OPTIONS, average_decay=decay)
    straight = task.new_model("hstu", seed=3)
    whole = task.train(straight, "hstu", options)

    model = task.new_model("hstu", seed=3)
    objective = task.objective("hstu")
    with pytest.raises(Interrupted):
        # stop_after_steps of every call, until the run is through
        fit(model, objective, options, tmp_path, stop_after_steps=1)
    for _ in range(100):
        model = task.new_model("hstu", seed=99)  # the checkpoint decides, not this
        torch.rand(7)  # nor what else draws random numbers
        try:
            resumed = fit(model, objective, options, tmp_path, stop_after_steps=stop)
            break
        except Interrupted:
            continue
    assert resumed == whole
    assert same(weights(model), weights(straight))


def test_seeds_decide(tmp_path: Path) -> None:
    task = retrieval_task()
    runs = []
    for seed in (0, 0, 1):
        model = task.new_model("hstu", seed)
        task.train(model, "hstu", Options(seed=seed, max_epochs=1))
        runs.append(weights(model))
    assert same(runs[0], runs[1])
    assert not same(runs[0], runs[2])


def test_the_best_epoch_is_kept_and_patience_ends_the_run() -> None:
    class Objective:
        metrics = iter([0.1, 0.5, 0.4, 0.3, 0.9])

        def epoch(self, draw: np.random.Generator) -> list[int]:
            return [0]

        def loss(self, model: nn.Linear, plan: int) -> Tensor:
            return model.weight.sum()

        def validate(self, model: nn.Linear) -> float:
            seen.append(model.weight.item())
            return next(self.metrics)

    seen: list[float] = []
    model = nn.Linear(1, 1)
    progress = fit(model, Objective(), Options(max_epochs=9, patience=2))
    assert (progress.best_epoch, progress.epoch, progress.finished) == (1, 4, True)
    assert model.weight.item() == seen[1]
    assert not model.training


def test_the_average_of_the_weights_is_kept() -> None:
    class Objective:
        def epoch(self, draw: np.random.Generator) -> list[int]:
            return [0] * 5

        def loss(self, model: nn.Linear, plan: int) -> Tensor:
            walked.append(model.weight.item())
            return model.weight.sum()

        def validate(self, model: nn.Linear) -> float:
            return 1.0

    walked: list[float] = []
    model = nn.Linear(1, 1, bias=False)
    fit(model, Objective(), Options(max_epochs=1, average_decay=0.9))
    after = [*walked[1:], walked[-1] + walked[1] - walked[0]]
    average = walked[0]
    for weight in after:
        average = 0.9 * average + 0.1 * weight
    assert model.weight.item() == pytest.approx(average, rel=1e-4)


def test_an_interrupt_leaves_a_state_to_go_on_from(tmp_path: Path) -> None:
    task = retrieval_task()
    straight = task.new_model("hstu", seed=0)
    task.train(straight, "hstu", OPTIONS)

    class Interrupting:
        steps = 0

        def __init__(self, inner: Any) -> None:
            self.inner = inner

        def epoch(self, draw: np.random.Generator) -> Any:
            return self.inner.epoch(draw)

        def loss(self, model: Any, plan: Any) -> Tensor:
            self.steps += 1
            if self.steps == 3:
                os.kill(os.getpid(), signal.SIGINT)
            return self.inner.loss(model, plan)

        def validate(self, model: Any) -> float:
            return self.inner.validate(model)

    before = signal.getsignal(signal.SIGINT)
    model = task.new_model("hstu", seed=0)
    with pytest.raises(KeyboardInterrupt, match="epoch 0, step 3"):
        fit(model, Interrupting(task.objective("hstu")), OPTIONS, tmp_path)
    assert signal.getsignal(signal.SIGINT) is before
    model = task.new_model("hstu", seed=0)
    fit(model, task.objective("hstu"), OPTIONS, tmp_path)
    assert same(weights(model), weights(straight))


def test_another_runs_checkpoint_is_refused(tmp_path: Path) -> None:
    task = retrieval_task()
    model = task.new_model("hstu", 0)
    task.train(model, "hstu", Options(max_epochs=1), tmp_path)
    with pytest.raises(ValueError, match=r"options.learning_rate was 0.001 and is 0.1"):
        task.train(model, "hstu", Options(max_epochs=1, learning_rate=0.1), tmp_path)
    smaller = retrieval_task(dropout=0.0)
    with pytest.raises(ValueError, match=r"settings.dropout was 0.1 and is 0.0"):
        smaller.train(smaller.new_model("hstu", 0), "hstu", Options(max_epochs=1), tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint.safetensors"]


def test_a_diverging_run_says_what_to_do() -> None:
    class Objective:
        def epoch(self, draw: np.random.Generator) -> list[int]:
            return [0]

        def loss(self, model: nn.Linear, plan: int) -> Tensor:
            return model.weight.sum() * torch.inf

        def validate(self, model: nn.Linear) -> float:
            return 0.0

    with pytest.raises(FloatingPointError, match="--set learning_rate"):
        fit(nn.Linear(1, 1), Objective(), Options())


# ── Losses ────────────────────────────────────────────────────────────────────────────────────


def softmax_case() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(5, 8), torch.randn(11, 8), torch.tensor([1, 2, 2, 7, 10])


def test_full_softmax_leaves_out_padding() -> None:
    query, item, target = softmax_case()
    expected = F.cross_entropy(query @ item[1:].T / 0.5, target - 1)
    torch.testing.assert_close(losses.full_softmax(query, item, target, 0.5).mean(), expected)
    item[0] = 1e4
    torch.testing.assert_close(losses.full_softmax(query, item, target, 0.5).mean(), expected)


def test_all_items_shared_as_negatives_are_the_full_softmax() -> None:
    query, item, target = softmax_case()
    expected = losses.full_softmax(query, item, target, 0.5)
    found = losses.shared_softmax(query, item, target, 0.5, negatives=10)
    torch.testing.assert_close(found, expected)


def test_a_drawn_target_is_no_negative() -> None:
    query, item, target = softmax_case()
    two = item[:2]  # the only item that can be drawn is the target of every row
    found = losses.sampled_softmax(query, two, torch.ones_like(target), 1.0, negatives=6)
    torch.testing.assert_close(found, torch.zeros(5))


def test_in_batch_negatives_are_corrected_and_never_the_target() -> None:
    query, item, target = softmax_case()
    frequency = torch.randn(11)
    logits = query @ item[target].T / 0.5 - frequency[target]
    logits[1, 2] = logits[2, 1] = -torch.inf  # the same item
    expected = F.cross_entropy(logits, torch.arange(5), reduction="none")
    found = losses.in_batch_softmax(query, item, target, 0.5, frequency)
    torch.testing.assert_close(found, expected)


def test_unobserved_labels_give_no_gradient() -> None:
    logits = torch.zeros(3, 1, 2, requires_grad=True)
    label = torch.tensor([[[1.0, torch.nan]], [[0.0, torch.nan]], [[torch.nan, 1.0]]])
    loss = losses.multi_task_bce(logits, label)
    loss.backward()
    assert loss.item() == pytest.approx(2 * np.log(2))
    assert logits.grad is not None
    assert (logits.grad[:, 0] == 0).tolist() == [
        [False, True],
        [False, True],
        [True, False],
    ]
    everything = losses.multi_task_bce(logits, torch.full_like(logits, torch.nan))
    assert everything.item() == 0


# ── What is trained on ────────────────────────────────────────────────────────────────────────


def test_windows_cover_every_training_target_once() -> None:
    task = retrieval_task()
    objective = task.objective("hstu")
    for epoch in range(5):
        batches = objective.epoch(np.random.default_rng([0, epoch]))
        windows = np.concatenate(batches)
        assert (windows[:, 1] - windows[:, 0] <= task.schema.max_history).all()
        targets = [row for start, end in windows for row in range(start + 1, end + 1)]
        first = task.data.start_N == np.arange(len(task.data))
        assert sorted(targets) == np.flatnonzero(task.split.train_N & ~first).tolist()
    assert not set(targets) & {*task.split.validation.row_C, *task.split.test.row_C}


def test_a_training_window_gives_what_serving_gives() -> None:
    task = retrieval_task(dropout=0.0)
    model = task.new_model("hstu", 0).eval()
    row = int(task.split.test.row_C[0])
    start = row - 6
    window = task.encoder.batch(Cases(np.array([row]), np.array([start]), np.array([row])))
    part = task.encoder.batch(Cases(np.array([row - 2]), np.array([start]), np.array([row - 2])))
    names = (
        "history_items",
        "history_timestamps",
        "history_lengths",
        "request_time",
        "history_signals",
    )
    whole = model.encode_all(**{name: window[name] for name in names})
    served = model(**{name: part[name] for name in names})
    # Position i of a training window is a request at the time of row i + 1.
    torch.testing.assert_close(whole[:, 3], served)


def test_long_histories_are_cut_as_in_serving() -> None:
    task = retrieval_task()
    data, encoder = task.data, task.encoder
    row = 11
    arrays = encoder.encode(0, row, int(data.timestamp_ms_N[row]))
    history, indices, _ = task.schema.history(encoder.history(0, row), task.catalogue)
    assert len(indices) == 7  # 11 behaviours lose 4, in steps of 2, to be at most 8
    np.testing.assert_array_equal(arrays["history_items"], indices)
    np.testing.assert_array_equal(arrays["history_items"], data.item_N[4:11])
    assert len(history) == 7


def test_very_long_histories_are_cut_the_same_without_being_encoded_whole() -> None:
    length = 100
    data = cyclic(users=2, length=length)
    schema = FeatureSchema(max_history=8, truncate_step=3)
    catalogue = catalogue_of(data)
    encoder = HistoryEncoder(data, schema, catalogue)
    for end in range(1, length):
        whole = schema.history(encoder.history(0, end), catalogue)[1]
        np.testing.assert_array_equal(encoder.encode(0, end, 0)["history_items"], whole)


def test_stack_pads_on_the_right() -> None:
    batch = stack(
        [
            {"a": np.array([1, 2]), "n": np.array(2)},
            {"a": np.array([3]), "n": np.array(1)},
        ]
    )
    assert batch["a"].tolist() == [[1, 2], [3, 0]]
    assert batch["n"].tolist() == [2, 1]


def timed(rows: list[tuple[int, int, int, float, bool]]) -> Interactions:
    user, item, time, label, is_timed = zip(*rows, strict=True)
    return Interactions.sort(
        Interactions(
            name="kuairand-pure",
            user_N=np.array(user),
            item_N=np.array(item),
            timestamp_ms_N=np.array(time),
            users=Table(("1", "2")),
            items=Table(("1", "2", "3")),
            signals={"is_long_view": np.float32(label), "is_liked": np.float32(label)},
            timed_N=np.array(is_timed),
        )
    )


def test_earlier_rates_never_see_a_timed_event() -> None:
    rows = [(1, 1, 10, 1.0, False), (1, 2, 10, 0.0, False), (1, 1, 90, 0.0, True)]
    features = settings.with_earlier_rates(timed(rows)).items.features
    changed = settings.with_earlier_rates(
        timed([*rows[:2], (1, 1, 90, 1.0, True), (2, 3, 95, 1.0, True)])
    ).items.features
    for name in ("earlier_impressions", "earlier_long_view_rate", "earlier_like_rate"):
        np.testing.assert_array_equal(features[name], changed[name])
    np.testing.assert_allclose(
        features["earlier_long_view_rate"], [(1 + 10) / 21, (0 + 10) / 21, 0.5]
    )


def test_returning_is_known_for_timed_events_before_the_last_day() -> None:
    start = settings.KUAIRAND_TEST_MS  # midnight in Beijing
    rows = [
        (1, 1, start - 5, 0.0, False),
        (1, 1, start + 1, 0.0, True),
        (1, 2, start + DAY_MS, 0.0, True),
        (1, 3, start + 2 * DAY_MS + 9, 0.0, True),
        (2, 1, start + 7, 0.0, True),
    ]
    found = settings.returns_next_day(timed(rows))
    np.testing.assert_array_equal(found, [np.nan, 1, 1, np.nan, 0])


def test_training_labels_hide_what_is_not_known_yet() -> None:
    start = settings.KUAIRAND_VALIDATION_MS
    rows = [
        (1, 1, start - 2 * DAY_MS, 0.0, True),
        (1, 2, start - 5, 1.0, True),
        (1, 3, start + 5, 0.0, True),
        (1, 1, settings.KUAIRAND_TEST_MS + 5, 1.0, True),
        (2, 1, start - 9, 0.0, False),
    ]
    task = RankingTask(timed(rows), settings.RankingSettings(heads={"stay": "returns_next_day"}))
    assert task.train_cases.row_C.tolist() == [0, 1]
    label = task.training_labels()[task.train_cases.row_C, 0]
    np.testing.assert_array_equal(label, [1, np.nan])
    assert task.label_NH[1, 0] == 1


def test_within_user_softmax_by_hand() -> None:
    logits = torch.tensor([[0.0], [1.0], [2.0], [5.0], [7.0]], requires_grad=True)
    label = torch.tensor([[1.0], [0.0], [0.0], [0.0], [1.0]])
    user = torch.tensor([1, 1, 1, 2, 3])
    # Only user 1 has both; users 2 and 3 are not compared with each other.
    expected = F.cross_entropy(logits[:3].T, torch.tensor([0])) / 5  # observed labels
    found = losses.within_user_softmax(logits, label, user)
    torch.testing.assert_close(found, expected)
    found.backward()
    assert logits.grad is not None
    assert (logits.grad[3:] == 0).all()
    nobody = losses.within_user_softmax(logits, torch.full_like(label, torch.nan), user)
    assert nobody.item() == 0


def test_no_impression_is_lost_and_a_request_has_one_user_and_context() -> None:
    task = ranking_task()
    objective = task.objective()
    requests = objective.train
    batches = objective.epoch(np.random.default_rng(0))
    members = [requests.members(r) for batch in batches for r in batch]
    assert sorted(np.concatenate(members)) == list(range(len(task.train_cases)))
    for cases in members:
        rows = task.train_cases.row_C[cases]
        assert len(set(task.data.user_N[rows])) == len(set(task.data.context["tab"][rows])) == 1
        assert len(set(task.train_cases.end_C[cases])) == 1


def test_candidates_of_a_request_do_not_change_each_others_scores() -> None:
    task = ranking_task(length=40)
    model = task.new_model(0).eval()
    cases = task.train_cases
    together = predict(model, task.impressions, cases)
    requests = task.impressions.requests(cases)
    assert requests.size_R.max() > 1
    # A request is made at the time of its first impression, which thus scores the same alone.
    first = np.array([requests.members(r)[0] for r in range(len(requests))])
    for one in first[:20]:
        alone = predict(model, task.impressions, cases.take(np.array([one])))
        np.testing.assert_allclose(together[one], alone[0], atol=1e-5)


def test_leading_eigenvectors_of_a_known_matrix() -> None:
    draw = np.random.default_rng(0)
    basis, _ = np.linalg.qr(draw.normal(size=(60, 60)))
    value = np.concatenate([[9.0, 5.0, 3.0, -8.0, -6.0], np.full(55, 0.01)])
    matrix = basis * value @ basis.T
    found, vectors = leading_eigenvectors(lambda x: matrix @ x, 60, 3)
    np.testing.assert_allclose(found, [9, -8, -6], atol=1e-6)
    np.testing.assert_allclose(np.abs((vectors * basis[:, [0, 3, 4]]).sum(0)), 1, atol=1e-6)


def test_a_warm_start_reads_training_rows_only() -> None:
    task = retrieval_task(warm_start=0.5)
    table = task.new_model("hstu", 0).items.weight
    assert table[0].abs().sum() == 0
    assert table[1:].norm(dim=1).mean().item() == pytest.approx(0.5, rel=1e-3)
    changed = retrieval_task(warm_start=0.5)
    changed.data.item_N[changed.split.test.row_C] = 1
    assert torch.equal(changed.new_model("hstu", 0).items.weight, table)
    assert torch.equal(changed.new_model("sasrec", 0).item.weight, table)
