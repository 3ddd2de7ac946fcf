"""Stored histories: what is appended to one is answered as the whole would be, and only to whom it
belongs; memory is bounded and users are forgotten."""

from __future__ import annotations

import asyncio
import math
import tracemalloc
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gr_core import Behaviour, History, Recommendation, RecommendRequest, Task
from gr_core.config import Config
from gr_core.deployment import Environment, ModelSpec
from gr_core.errors import FailedPrecondition, InvalidRequest, UnknownHistory
from gr_core.histories import HANDLE_BYTES, HistoryStore, Owner, StoredHistory, content_digest
from gr_core.observers import Observer, Observers, RequestEvent
from gr_core.pipeline import HISTORIES, Pipeline, PipelineSpec
from gr_core.repository import ModelRepository
from gr_core.testing.tiny import tiny_registry, write_tiny_bundle
from gr_core.validation import Limits

from .helpers import NOW_MS, Lab, environment, request, serving, write_model

ADA = Owner.of("ada", [("finder", "1"), ("ranker", "1")])
BOB = Owner.of("bob", [("finder", "1"), ("ranker", "1")])
NAMES = ("is_liked", "is_shared", "watch_percentage")

behaviours_st = st.lists(
    st.builds(
        Behaviour,
        st.integers(-(2**63), 2**63 - 1) | st.text(max_size=4),
        st.integers(0, 2**40),
        st.dictionaries(st.sampled_from(NAMES), st.floats(width=32, allow_nan=False), max_size=2),
    ),
    max_size=6,
)


def history(*ids: int | str, **signals: Sequence[float]) -> History:
    rows = [
        Behaviour(item, NOW_MS + i, {name: column[i] for name, column in signals.items()})
        for i, item in enumerate(ids)
    ]
    return History.of(rows)


def put(
    store: HistoryStore, owner: Owner, new: History, known: StoredHistory | None = None
) -> StoredHistory:
    """Stores a history as the pipeline does, and finds it again."""
    entry = store.extended(owner, new, known)
    assert store.keep(entry, known, store.drops) == entry.handle
    return store.find(entry.handle, owner)


def rows(found: History) -> list[tuple[int | str, int, dict[str, float]]]:
    """A history as rows, in which a signal that is missing is left out."""
    columns = {name: column.tolist() for name, column in found.signals.items()}
    return [
        (item, time, {n: c[i] for n, c in columns.items() if not math.isnan(c[i])})
        for i, (item, time) in enumerate(
            zip(found.item_ids.tolist(), found.timestamps_ms.tolist(), strict=True)
        )
    ]


# ── The store ─────────────────────────────────────────────────────────────────────────────────


@given(st.lists(behaviours_st, min_size=1, max_size=5))
def test_parts_are_the_whole(parts: list[list[Behaviour]]) -> None:
    store = HistoryStore(2**20)
    known = None
    for part in parts:
        known = put(store, ADA, History.of(part), known)
    assert known is not None
    whole = History.of([behaviour for part in parts for behaviour in part])
    assert rows(known.history) == rows(whole)
    assert known.history.timestamps_ms.dtype == np.int64
    assert all(column.dtype == np.float32 for column in known.history.signals.values())


@given(behaviours_st, behaviours_st)
def test_digests_differ_where_histories_do(one: list[Behaviour], other: list[Behaviour]) -> None:
    a, b = History.of(one), History.of(other)
    same = rows(a) == rows(b) and (not len(a) or a.item_ids.dtype == b.item_ids.dtype)
    if not same:
        assert content_digest(a) != content_digest(b)
    assert content_digest(a) == content_digest(History.of(one))


def test_what_a_digest_must_tell_apart() -> None:
    different = [
        history(),
        history(1),
        history("1"),
        history(1, 2),
        history(2, 1),
        history("ab", "c"),
        history("a", "bc"),
        history("abc"),
        history(1, is_liked=[0.0]),
        history(1, is_liked=[1.0]),
        history(1, is_shared=[1.0]),
        history(1, 2, is_liked=[1.0, math.nan]),
        history(1, 2, is_liked=[math.nan, 1.0]),
        replace(history(1), timestamps_ms=np.array([5])),
    ]
    assert len({content_digest(h) for h in different}) == len(different)
    # Nobody has this signal, so it is as if it were not there.
    assert content_digest(history(1, is_liked=[math.nan])) == content_digest(history(1))


def test_a_chain_names_the_history_and_the_owner() -> None:
    store = HistoryStore(2**20)
    first = put(store, ADA, history(1, 2))
    grown = put(store, ADA, history(3), first)
    assert len(first.handle) == len(grown.handle) == HANDLE_BYTES
    assert first.handle != grown.handle
    again = store.extended(ADA, history(3), store.extended(ADA, history(1, 2)))
    assert again.handle == grown.handle, "a request that is tried again is stored once"
    assert put(store, ADA, history(), first).handle == first.handle, "nothing new, the same handle"
    others = [
        store.extended(ADA, history(4), first),
        store.extended(ADA, history(3), store.extended(ADA, history(2, 1))),
        store.extended(BOB, history(1, 2)),
        HistoryStore(2**20).extended(ADA, history(1, 2)),
    ]
    assert len({first.handle, grown.handle, *(other.handle for other in others)}) == 6


def test_owners_are_told_apart() -> None:
    owners = [
        Owner.of("ada", [("m", "1"), ("", "")]),
        Owner.of("ada", [("", ""), ("m", "1")]),
        Owner.of("ada", [("m", "2"), ("", "")]),
        Owner.of("ada", [("m1", ""), ("", "")]),
        Owner.of("adam", [("", "1"), ("", "")]),
        Owner.of("bob", [("m", "1"), ("", "")]),
    ]
    assert len({owner.digest for owner in owners}) == len(owners)


@given(st.data())
def test_only_the_handle_itself_is_known(data: st.DataObject) -> None:
    store = HistoryStore(2**20)
    handle = put(store, ADA, history(1, 2)).handle
    bit = data.draw(st.integers(0, 8 * len(handle) - 1))
    flipped = (int.from_bytes(handle) ^ 1 << bit).to_bytes(len(handle))
    cut = handle[: data.draw(st.integers(0, len(handle) - 1))]
    longer = handle + data.draw(st.binary(min_size=1, max_size=8))
    refusals = []
    for wrong, owner in ((flipped, ADA), (cut, ADA), (longer, ADA), (handle, BOB)):
        with pytest.raises(UnknownHistory) as refused:
            store.find(wrong, owner)
        refusals.append(str(refused.value))
    assert len(set(refusals)) == 1, "why it is of no use is not told"
    assert store.find(handle, ADA)
    assert issubclass(UnknownHistory, FailedPrecondition)


def test_what_is_stored_is_nobodys_to_change() -> None:
    store = HistoryStore(2**20)
    mine = History(np.array([1, 2]), np.array([5, 6]), {"is_liked": np.ones(2, np.float32)})
    known = put(store, ADA, mine)
    for array in (mine.item_ids, mine.timestamps_ms, mine.signals["is_liked"]):
        array[:] = 0
    assert rows(known.history) == [(1, 5, {"is_liked": 1.0}), (2, 6, {"is_liked": 1.0})]
    grown = put(store, ADA, history(3), known)
    for found in (known.history, grown.history):
        for array in (found.item_ids, found.timestamps_ms, found.signals["is_liked"]):
            assert array.base is None, "it keeps no larger array in memory"
            with pytest.raises(ValueError, match="read-only"):
                array[0] = 9


def test_only_the_newest_behaviours_are_kept() -> None:
    store = HistoryStore(2**20, Limits(max_history=5))
    known = None
    for i in range(40):
        known = put(store, ADA, history(2 * i, 2 * i + 1, is_liked=[0.0, 1.0]), known)
    assert known is not None
    assert known.history.item_ids.tolist() == [75, 76, 77, 78, 79]
    assert known.history.signals["is_liked"].tolist() == [1, 0, 1, 0, 1]


def test_signals_are_bounded_over_all_requests() -> None:
    store = HistoryStore(2**20, Limits(max_features=2))
    known = put(store, ADA, history(1, a=[1.0], b=[1.0]))
    with pytest.raises(InvalidRequest, match=r"history.signals: 3 given.*at most 2"):
        store.extended(ADA, history(2, c=[1.0]), known)


# ── Memory ────────────────────────────────────────────────────────────────────────────────────


@settings(max_examples=50)
@given(
    st.integers(2_000, 40_000),
    st.lists(
        st.tuples(
            st.sampled_from(["ada", "bob", "eve"]),
            st.sampled_from(["1", "2"]),
            st.integers(0, 60),
            st.booleans(),
        ),
        max_size=60,
    ),
)
def test_memory_is_bounded_and_counted(
    capacity: int, steps: list[tuple[str, str, int, bool]]
) -> None:
    store = HistoryStore(capacity)
    handles: dict[Owner, list[bytes]] = {}
    for step, (user, version, length, extend) in enumerate(steps):
        owner = Owner.of(user, [("m", version)])
        given_out = handles.setdefault(owner, [])
        known = None
        if extend and given_out:
            try:
                known = store.find(given_out[-1], owner)
            except UnknownHistory:
                known = None
        new = history(*(f"{step}-{i}" for i in range(length)))
        entry = store.extended(owner, new, known)
        handle = store.keep(entry, known, store.drops)
        assert bool(handle) == (entry.size <= capacity)
        if handle:
            given_out.append(handle)
            assert store.find(handle, owner) is not None, "what was just stored is there"
    held: list[StoredHistory] = []
    for owner, given_out in handles.items():
        alive = []
        for handle in dict.fromkeys(given_out):
            try:
                alive.append(store.find(handle, owner))
            except UnknownHistory:
                continue
        assert len(alive) <= 4
        held += alive
    told = store.statistics()
    assert told.entries == len(held)
    assert told.bytes == sum(entry.size for entry in held) <= capacity == told.capacity_bytes


@pytest.mark.parametrize(
    ("length", "signals", "text"), [(0, 0, False), (64, 4, False), (64, 4, True)]
)
def test_what_is_counted_is_what_is_used(length: int, signals: int, text: bool) -> None:
    store = HistoryStore(2**30)
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        for user in range(300):
            owner = Owner.of(f"user {user}", [("m", "1")])
            ids = [f"item {i} of {user}" if text else i for i in range(length)]
            columns = {f"signal {i}": [0.5] * length for i in range(signals)}
            put(store, owner, history(*ids, **columns))
        used = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert 0.5 * store.statistics().bytes < used <= store.statistics().bytes


def test_the_longest_unused_goes_first_and_what_was_outgrown_before_it() -> None:
    old, eve = history(1), Owner.of("eve", [("m", "1")])
    size = HistoryStore(2**20).extended(ADA, old).size
    store = HistoryStore(3 * size + 500)
    bob, ada = put(store, BOB, old), put(store, ADA, old)
    grown = put(store, ADA, history(2), ada)
    put(store, eve, old)  # needs room
    with pytest.raises(UnknownHistory):
        store.find(ada.handle, ADA)
    assert store.find(bob.handle, BOB)
    assert store.statistics().evictions == 1
    store.find(grown.handle, ADA)
    put(store, eve, history(7))  # bob was used before ada, and eve after both
    store.find(grown.handle, ADA)
    put(store, eve, history(8))
    with pytest.raises(UnknownHistory):
        store.find(bob.handle, BOB)
    assert store.find(grown.handle, ADA)


def test_asking_again_is_use() -> None:
    size = HistoryStore(2**20).extended(ADA, history(1)).size
    store, eve = HistoryStore(3 * size + 500), Owner.of("eve", [("m", "1")])
    root = put(store, ADA, history(1))
    put(store, ADA, history(), root)  # nothing new, which extends nothing
    bob = put(store, BOB, history(1))
    grown = put(store, ADA, history(2), root)
    put(store, eve, history(1))
    with pytest.raises(UnknownHistory):
        store.find(root.handle, ADA)
    # The same extension once more, by a request that began before its root was gone.
    store.find(bob.handle, BOB)
    store.keep(store.extended(ADA, history(2), root), root, store.drops)
    for i in range(2):
        put(store, eve, history(10 + i))
    assert store.find(grown.handle, ADA)
    with pytest.raises(UnknownHistory):
        store.find(bob.handle, BOB)


def test_what_is_extended_again_and_again_stays() -> None:
    store = HistoryStore(2**20)
    root = put(store, ADA, history(1))
    for i in range(50):
        put(store, ADA, history(i), store.find(root.handle, ADA))
    assert store.statistics().entries == 4


def test_one_user_cannot_fill_the_store() -> None:
    store = HistoryStore(2**20)
    bob = put(store, BOB, history(1))
    for i in range(100):
        put(store, ADA, history(i))
    assert store.statistics().entries == 5
    assert store.find(bob.handle, BOB)


def test_what_is_too_large_is_not_stored() -> None:
    store = HistoryStore(2_000)
    assert store.keep(store.extended(ADA, history(*range(100))), None, 0) == b""
    assert store.statistics().entries == 0
    with pytest.raises(ValueError, match="capacity_bytes: 0"):
        HistoryStore(0)


def test_a_user_is_forgotten() -> None:
    store = HistoryStore(2**20)
    ada, bob = put(store, ADA, history(1)), put(store, BOB, history(1))
    grown = put(store, ADA, history(2), ada)
    assert store.drop("ada") == 2
    assert store.drop("ada") == 0
    for handle in (ada.handle, grown.handle):
        with pytest.raises(UnknownHistory):
            store.find(handle, ADA)
    assert store.find(bob.handle, BOB)
    assert store.statistics().bytes == bob.size


# ── The pipeline ──────────────────────────────────────────────────────────────────────────────


def whole(user: str, items: Sequence[int], **fields: object) -> RecommendRequest:
    """A request of the tiny model's items, with times that do not say in which order they came."""
    ids = np.array(items, np.int64)
    times = NOW_MS - 1000 * (ids * 7919 % 50)
    return RecommendRequest(History(ids, times), user_id=user, request_time_ms=NOW_MS, **fields)


def ids(answer: Recommendation) -> list[tuple[int | str, float]]:
    return [(item.item_id, item.score) for item in answer.items]


steps_st = st.lists(
    st.tuples(
        st.sampled_from(["ada", "bob", ""]),
        st.sampled_from(["append", "edit", "another's handle", "forget", "whole"]),
        st.lists(st.integers(995, 1055), max_size=12),
        st.none() | st.lists(st.integers(1000, 1049), unique=True, min_size=1, max_size=5),
    ),
    max_size=25,
)


@settings(max_examples=40)
@given(steps_st, st.sampled_from([2_000, 8_000, 2**20]))
def test_answers_are_those_of_whole_histories(
    repository: Path, steps: list[tuple[str, str, list[int], list[int] | None]], capacity: int
) -> None:
    """As a client that resends the whole when it is told to; every answer is compared."""

    async def case() -> None:
        env = Environment(tiny_registry())
        async with (
            serving(repository, env, histories_bytes=capacity) as pipeline,
            serving(repository, env, histories_bytes=0) as without,
        ):
            known: dict[str, tuple[bytes, int]] = {}
            past: dict[str, list[int]] = {}
            for user, action, items, candidates in steps:
                if action == "edit":
                    past[user] = past.get(user, [])[1:]
                    known.pop(user, None)
                elif action == "forget":
                    pipeline.drop_user(user)
                elif action == "another's handle":
                    for other, (handle, _) in known.items():
                        if other != user and handle:
                            with pytest.raises(UnknownHistory):
                                await pipeline.recommend(whole(user, items, history_handle=handle))
                past[user] = [*past.get(user, []), *items]
                asked = whole(user, past[user])
                asked = replace(asked, candidates=request(candidates=candidates).candidates)
                handle, length = known.get(user, (b"", 0))
                short = whole(user, past[user][length:], history_handle=handle)
                short = replace(short, candidates=asked.candidates)
                if action == "whole" or not handle:
                    short = asked
                try:
                    answer = await pipeline.recommend(short)
                except UnknownHistory:
                    assert short.history_handle
                    answer = await pipeline.recommend(asked)
                expected = await without.recommend(asked)
                assert ids(answer) == ids(expected)
                assert answer.unknown_items == expected.unknown_items
                assert expected.history_handle == b""
                known[user] = (answer.history_handle, len(past[user]))
                assert bool(answer.history_handle) <= bool(user)

    asyncio.run(case())


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny_bundle(folder)
    return folder


@pytest.fixture
async def pipeline(repository: Path):  # type: ignore[no-untyped-def]
    async with serving(repository, Environment(tiny_registry())) as pipeline:
        yield pipeline


async def test_a_handle_stands_for_the_history(pipeline: Pipeline) -> None:
    first = await pipeline.recommend(whole("ada", [1001, 1002]))
    second = await pipeline.recommend(whole("ada", [1003], history_handle=first.history_handle))
    expected = await pipeline.recommend(whole("", [1001, 1002, 1003]))
    assert ids(second) == ids(expected)
    assert not {1001, 1002, 1003} & {item for item, _ in ids(second)}, "what was seen is left out"
    assert second.history_handle not in (b"", first.history_handle)
    assert second.stages[0].tokens == 3
    third = await pipeline.recommend(whole("ada", [], history_handle=second.history_handle))
    assert ids(third) == ids(expected)
    assert third.history_handle == second.history_handle
    again = await pipeline.recommend(whole("ada", [1003], history_handle=first.history_handle))
    assert again.history_handle == second.history_handle
    told = pipeline.cache_statistics()[HISTORIES]
    assert (told.hits, told.misses, told.entries) == (3, 0, 2)


async def test_without_a_user_there_is_no_handle(pipeline: Pipeline) -> None:
    nobody = await pipeline.recommend(whole("", [1001]))
    assert nobody.history_handle == b""
    ada = await pipeline.recommend(whole("ada", [1001]))
    for user in ("", "bob"):
        with pytest.raises(UnknownHistory):
            await pipeline.recommend(whole(user, [], history_handle=ada.history_handle))
    assert pipeline.cache_statistics()[HISTORIES].entries == 1


async def test_a_failed_request_stores_nothing(pipeline: Pipeline) -> None:
    with pytest.raises(InvalidRequest, match="k: 0"):
        await pipeline.recommend(whole("ada", [1001], k=0))
    with pytest.raises(InvalidRequest, match="k: 0"):
        await pipeline.recommend(whole("ada", [1001], k=0, history_handle=b"unknown"))
    assert pipeline.cache_statistics()[HISTORIES].entries == 0


async def test_none_are_kept_where_none_are_to_be(repository: Path) -> None:
    async with serving(repository, Environment(tiny_registry()), histories_bytes=0) as pipeline:
        answer = await pipeline.recommend(whole("ada", [1001]))
        assert answer.history_handle == b""
        with pytest.raises(UnknownHistory):
            await pipeline.recommend(whole("ada", [], history_handle=b"x" * HANDLE_BYTES))
        assert HISTORIES not in pipeline.cache_statistics()
        assert pipeline.drop_user("ada") == 0


async def test_another_process_does_not_know_it(repository: Path, pipeline: Pipeline) -> None:
    handle = (await pipeline.recommend(whole("ada", [1001]))).history_handle
    async with serving(repository, Environment(tiny_registry())) as other:
        await other.recommend(whole("ada", [1001]))
        with pytest.raises(UnknownHistory):
            await other.recommend(whole("ada", [], history_handle=handle))


async def test_a_user_who_is_dropped_is_forgotten(pipeline: Pipeline) -> None:
    handle = (await pipeline.recommend(whole("ada", [1001]))).history_handle
    await pipeline.recommend(whole("bob", [1001]))
    assert pipeline.drop_user("ada") == 1
    with pytest.raises(UnknownHistory):
        await pipeline.recommend(whole("ada", [], history_handle=handle))
    assert pipeline.cache_statistics()[HISTORIES].entries == 1


async def test_a_user_who_is_dropped_meanwhile_is_not_stored(tmp_path: Path) -> None:
    lab = Lab()
    write_model(tmp_path)
    async with serving(tmp_path, environment(lab=lab)) as pipeline:
        lab.hold()
        asked = asyncio.create_task(pipeline.recommend(request((100, 101), user_id="ada")))
        await lab.entered()
        pipeline.drop_user("ada")
        lab.release()
        assert (await asked).history_handle == b""
        assert pipeline.cache_statistics()[HISTORIES].entries == 0
        assert (await pipeline.recommend(request((100,), user_id="ada"))).history_handle


async def test_handles_are_of_one_version(tmp_path: Path) -> None:
    for version in ("1", "2"):
        write_model(tmp_path, version=version, tasks=(Task.RETRIEVE,))
    write_model(tmp_path, "ranker", tasks=(Task.RANK,))
    models = ModelRepository(tmp_path)
    models.activate("mean", "1")
    both = PipelineSpec("both", retrieve="mean", rank="ranker", default=True)
    specs = [ModelSpec("mean", versions=("1", "2")), ModelSpec("ranker")]
    async with serving(tmp_path, environment(lab=Lab()), specs, [both]) as pipeline:
        asked = request((100, 101), user_id="ada")
        old = (await pipeline.recommend(asked)).history_handle
        kept = request((102,), user_id="ada", history_handle=old)
        assert (await pipeline.recommend(kept)).history_handle
        # All models of the route count, whichever of them a request needs.
        ranked = request((102,), user_id="ada", history_handle=old, candidates=[103, 104])
        assert (await pipeline.recommend(ranked)).history_handle
        for other in ({"model": "mean"}, {"model": "mean", "version": "2"}):
            with pytest.raises(UnknownHistory):
                await pipeline.recommend(replace(kept, **other))
        models.activate("mean", "2")
        await pipeline._rollout.follow()
        for stale in (kept, ranked):
            with pytest.raises(UnknownHistory):
                await pipeline.recommend(stale)
        new = (await pipeline.recommend(asked)).history_handle
        assert new not in (b"", old)
        assert (await pipeline.recommend(replace(kept, history_handle=new))).items


async def test_an_answer_of_the_old_version_gives_a_handle_of_the_old_version(
    tmp_path: Path,
) -> None:
    """The version changes while the request is computed."""
    lab = Lab()
    for version in ("1", "2"):
        write_model(tmp_path, version=version)
    models = ModelRepository(tmp_path)
    models.activate("mean", "1")
    specs = [ModelSpec("mean", versions=("1", "2"))]
    async with serving(tmp_path, environment(lab=lab), specs) as pipeline:
        lab.hold()
        asked = asyncio.create_task(pipeline.recommend(request((100,), user_id="ada")))
        await lab.entered()
        models.activate("mean", "2")
        await pipeline._rollout.follow()
        lab.release()
        answer = await asked
        assert answer.stages[0].version == "1"
        short = request((101,), user_id="ada", history_handle=answer.history_handle)
        with pytest.raises(UnknownHistory):
            await pipeline.recommend(short)
        assert (await pipeline.recommend(replace(short, version="1"))).stages[0].version == "1"


async def test_long_histories_are_joined_beside_the_event_loop(pipeline: Pipeline) -> None:
    items = [1000 + i % 50 for i in range(9_000)]
    handle = b""
    for start in range(0, len(items), 3_000):
        part = whole("ada", items[start : start + 3_000], history_handle=handle)
        answer = await pipeline.recommend(replace(part, include_seen=True))
        handle = answer.history_handle
    expected = await pipeline.recommend(whole("", items, include_seen=True))
    assert ids(answer) == ids(expected)
    assert answer.stages[0].tokens == len(items)


async def test_a_client_may_append_for_ever(repository: Path) -> None:
    limits = Limits(max_history=8)
    env = Environment(tiny_registry())
    async with serving(repository, env, limits=limits) as pipeline:
        items = [1000 + i % 50 for i in range(60)]
        handle = b""
        for i in range(0, 60, 3):
            part = whole("ada", items[i : i + 3], history_handle=handle)
            answer = await pipeline.recommend(part)
            handle = answer.history_handle
        assert ids(answer) == ids(await pipeline.recommend(whole("", items[-8:])))


async def test_observers_are_told_of_whole_histories(repository: Path) -> None:
    events: list[RequestEvent] = []

    class Watching(Observer):
        def on_request(self, event: RequestEvent) -> None:
            events.append(event)

    env = Environment(tiny_registry(), observers=Observers([Watching()]))
    async with serving(repository, env) as pipeline:
        first = await pipeline.recommend(whole("ada", [1001, 1002]))
        await pipeline.recommend(whole("ada", [1003], history_handle=first.history_handle))
        with pytest.raises(UnknownHistory):
            await pipeline.recommend(whole("ada", [1003], history_handle=b"?"))
    assert [(e.history_length, e.outcome) for e in events] == [
        (2, "ok"),
        (3, "ok"),
        (1, "UnknownHistory"),
    ]


def test_the_configuration_bounds_them() -> None:
    assert Config.load(environ={}).histories.capacity_bytes == 64 << 20
    variable = {"GR_HISTORIES__CAPACITY_BYTES": "2MiB"}
    assert Config.load(environ=variable).histories.capacity_bytes == 2 << 20
    assert Config.load(environ={"GR_HISTORIES__CAPACITY_BYTES": "0"}).histories.capacity_bytes == 0
