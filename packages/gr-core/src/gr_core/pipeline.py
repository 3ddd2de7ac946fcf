"""The request's way: validate, encode, batch, infer, decode, compose the answer."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from gr_core.artifacts import cache_folder
from gr_core.batcher import Batched, BatchingOptions
from gr_core.caches import open_caches
from gr_core.contracts import CacheStatistics, Encoding, Health, Measurement, Model
from gr_core.deployment import Deployment, Environment, ModelSpec
from gr_core.errors import (
    ConfigurationError,
    InvalidRequest,
    NotFound,
    Unavailable,
    UnknownHistory,
    Violation,
)
from gr_core.histories import CAPACITY_BYTES, HistoryStore, Owner, StoredHistory
from gr_core.observers import Observer, Observers, RequestEvent
from gr_core.planner import PROFILE, load_profile
from gr_core.plugins.registry import Registry
from gr_core.repository import ModelRepository
from gr_core.rollout import Rollout
from gr_core.types import (
    Candidates,
    FloatArray,
    IntArray,
    RankedItem,
    Recommendation,
    RecommendRequest,
    StageReport,
    Task,
)
from gr_core.validation import Limits, violations_of

if TYPE_CHECKING:
    from gr_core.config import Config

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

HISTORIES = "histories"
"""What the store of histories is called among the caches' statistics."""

_INLINE_ROWS = 4096
"""Requests with more rows are encoded on a thread, so that the event loop is never held up."""


@dataclass(frozen=True, slots=True)
class PipelineSpec:
    """A name that requests may give, and the models of the repository that answer it."""

    name: str
    retrieve: str = ""
    rank: str = ""
    generate: str = ""
    """Finds items in place of ``retrieve``: where there is none, or a request asks for it."""
    retrieve_k: int = 100
    """How many items are found to be ranked."""
    rerank: bool = True
    """Whether found items are ranked; otherwise ``rank`` scores given candidates only."""
    default: bool = False

    @property
    def stages(self) -> Mapping[Task, str]:
        """The model of each task that there is one for."""
        models = {Task.RETRIEVE: self.retrieve, Task.RANK: self.rank, Task.GENERATE: self.generate}
        return {task: model for task, model in models.items() if model}

    def finder(self, request: RecommendRequest) -> Task | None:
        """The task that finds items for a request, None if none of the models does."""
        wanted = (Task.RETRIEVE, Task.GENERATE) if request.task is None else (request.task,)
        return next((task for task in wanted if task in self.stages), None)


@dataclass(frozen=True, slots=True)
class ServedVersion:
    """One loaded version of a model, for people and for ListModels."""

    model: str
    version: str
    active: bool
    architecture: str
    tasks: Sequence[Task]
    heads: Sequence[str]
    engines: Mapping[Task, str]
    """Engine of each task."""
    plan: Mapping[Task, str]
    """The chain of each task with its reason, one line each."""
    catalogue_size: int
    description: str
    notes: Sequence[str]
    """How it was loaded, e.g. where its weights came from."""


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A name that requests may give in ``model``."""

    name: str
    default: bool
    stages: Mapping[Task, str]
    """Which model of the repository answers each task."""
    versions: Sequence[ServedVersion]


@dataclass(slots=True)
class _Run:
    """What is known of one request while it is answered."""

    started: float
    model: str = ""
    """The name that answers, once it is known."""
    stages: list[StageReport] = field(default_factory=list)
    features_s: float = 0.0
    unknown_items: int = 0
    history_length: int = 0
    """Of the whole history, also where the request brought a part of it."""


@dataclass(frozen=True, slots=True)
class _Finder:
    """What finds the items of an answer."""

    task: Task
    deployment: Deployment


class Pipeline:
    """Answers requests. All methods are to be called on one event loop, which it never blocks."""

    def __init__(
        self,
        repository: ModelRepository,
        models: Sequence[ModelSpec],
        pipelines: Sequence[PipelineSpec],
        environment: Environment,
        *,
        limits: Limits | None = None,
        poll_seconds: float = 1.0,
        histories_bytes: int = CAPACITY_BYTES,
    ) -> None:
        """``histories_bytes`` bounds the histories kept for handles; 0: none are kept."""
        self._environment = environment
        self._limits = limits or Limits()
        self._histories = HistoryStore(histories_bytes, self._limits) if histories_bytes else None
        self._rollout = Rollout(repository, models, environment, poll_seconds)
        self._models = models
        self._pipelines = pipelines
        self._routes: Mapping[str, PipelineSpec] = {}
        self._encoder = ThreadPoolExecutor(1, thread_name_prefix="gr-encode")
        self._closing = False

    @staticmethod
    def from_config(
        config: Config, registry: Registry, observers: Sequence[Observer] = ()
    ) -> Pipeline:
        """What a configuration describes; all models of the repository where it names none."""
        repository = ModelRepository(config.repository.path)
        models = [ModelSpec(**dict(section)) for section in config.models]
        return Pipeline(
            repository,
            models or [ModelSpec(name) for name in repository.names()],
            [PipelineSpec(**dict(section)) for section in config.pipelines],
            Environment(
                registry=registry,
                batching=BatchingOptions(**dict(config.batching)),
                caches=open_caches(config.cache, registry),
                observers=Observers(observers),
                profile=load_profile(cache_folder() / PROFILE),
            ),
            limits=Limits(**dict(config.limits)),
            poll_seconds=config.repository.poll_seconds,
            histories_bytes=config.histories.capacity_bytes,
        )

    async def start(self) -> None:
        """Loads, warms up and activates everything; raises what makes serving impossible."""
        await self._rollout.start()
        try:
            tasks = {m.name: self._rollout.deployment(m.name).tasks for m in self._models}
            self._routes = _routes(tasks, self._pipelines)
        except BaseException:
            await self.close()
            raise

    async def recommend(self, request: RecommendRequest) -> Recommendation:
        """Answers a request.

        Raises `InvalidRequest`, `NotFound`, `UnknownHistory`, `Overloaded`, `DeadlineExceeded`,
        `Unavailable`. Cancelling it drops the request from its queue.
        """
        run = _Run(time.monotonic(), history_length=len(request.history))
        if not request.request_id or request.request_time_ms is None:
            request = replace(
                request,
                request_id=request.request_id or uuid.uuid4().hex,
                request_time_ms=(
                    time.time_ns() // 1_000_000
                    if request.request_time_ms is None
                    else request.request_time_ms
                ),
            )
        try:
            answer = await self._answer(request, run)
        except BaseException as error:
            self._report(request, run, type(error).__name__)
            raise
        self._report(request, run, "ok")
        return answer

    async def _answer(self, request: RecommendRequest, run: _Run) -> Recommendation:
        if self._closing:
            raise Unavailable("the server is stopping")
        route = self._route(request.model)
        run.model = route.name
        if violations := violations_of(request, self._limits) + self._misrouted(route, request):
            raise InvalidRequest(violations)
        ranking = _ranks(request)
        reranks = not ranking and request.task is None and bool(route.rank) and route.rerank
        with ExitStack() as leases:
            ranker = self._lease(leases, route.rank, request) if ranking or reranks else None
            finder = None
            if not ranking:
                task = route.finder(request)
                assert task is not None, "a request that nothing can answer is misrouted"
                finder = _Finder(task, self._lease(leases, route.stages[task], request))
            if self._histories is None or not request.user_id:
                if request.history_handle:
                    raise UnknownHistory
                return await self._stages(route, finder, ranker, request, run)
            # Drawn before anything is awaited, with the leases: these versions answer.
            owner, drops = self._owner(route, request), self._histories.drops
            known = None
            if request.history_handle:
                known = self._histories.find(request.history_handle, owner)
            whole = await self._whole_history(self._histories, owner, request, known, run)
            request = replace(request, history=whole.history, history_handle=b"")
            answer = await self._stages(route, finder, ranker, request, run)
            return replace(answer, history_handle=self._histories.keep(whole, known, drops))

    async def _stages(
        self,
        route: PipelineSpec,
        finder: _Finder | None,
        ranker: Deployment | None,
        request: RecommendRequest,
        run: _Run,
    ) -> Recommendation:
        """Finds items, ranks, or both, as deployments are given."""
        if finder is None:
            assert ranker is not None
            return await self._rank(ranker, request, run)
        if ranker is None:
            indices, scores = await self._find(finder, request, request.k, run)
            return self._compose(finder.deployment, request, run, indices, scores, None, ())
        wanted = max(route.retrieve_k, request.k)
        indices, _ = await self._find(finder, request, wanted, run)
        found = Candidates(finder.deployment.model.catalogue.ids_of(indices))
        return await self._rank(ranker, replace(request, candidates=found), run)

    def _owner(self, route: PipelineSpec, request: RecommendRequest) -> Owner:
        """The user and all models of a route, whichever of them the request needs."""
        models = [
            (model, self._rollout.deployment(model, request.version).version)
            for model in route.stages.values()
        ]
        return Owner.of(request.user_id, models)

    async def _whole_history(
        self,
        store: HistoryStore,
        owner: Owner,
        request: RecommendRequest,
        known: StoredHistory | None,
        run: _Run,
    ) -> StoredHistory:
        """What the request brought, behind what is known."""
        rows = len(request.history) + (0 if known is None else len(known.history))
        whole = await self._features(rows, run, store.extended, owner, request.history, known)
        run.history_length = len(whole.history)
        return whole

    async def _find(
        self, finder: _Finder, request: RecommendRequest, k: int, run: _Run
    ) -> tuple[IntArray, FloatArray]:
        """The best k indices that are not excluded, (≤ k,), and their scores."""
        task, deployment = finder.task, finder.deployment
        model = deployment.model
        encoding, excluded = await self._features(
            _rows(request),
            run,
            lambda: (model.encode(request, task), _excluded(model, request)),
        )
        run.unknown_items = encoding.unknown_items
        if task is Task.GENERATE:
            excluded = np.unique(excluded)  # a search is as wide as it is deep
        fetched = min(len(model.catalogue), k + len(excluded))
        encoded = replace(encoding.request, k=fetched)
        batched = await deployment.infer(task, encoded, request.deadline)
        run.stages.append(_stage(deployment, task, encoding, batched))
        result = batched.result
        assert result.indices is not None
        scores, _ = model.decode(task, result, request.head_weights)
        passed_over = np.zeros(len(model.catalogue) + 1, np.bool_)
        passed_over[excluded] = True
        (keep,) = (~passed_over[result.indices]).nonzero()
        return result.indices[keep[:k]], scores[keep[:k]]

    async def _rank(
        self, deployment: Deployment, request: RecommendRequest, run: _Run
    ) -> Recommendation:
        assert request.candidates is not None
        encoding = await self._features(
            _rows(request), run, deployment.model.encode, request, Task.RANK
        )
        run.unknown_items = max(run.unknown_items, encoding.unknown_items)
        unscored = request.candidates.item_ids[encoding.unscored].tolist()
        if not len(encoding.candidate_indices):
            none = np.empty(0, np.float32)
            return self._compose(
                deployment, request, run, encoding.candidate_indices, none, None, unscored
            )
        batched = await deployment.infer(Task.RANK, encoding.request, request.deadline)
        run.stages.append(_stage(deployment, Task.RANK, encoding, batched))
        scores, heads = deployment.model.decode(Task.RANK, batched.result, request.head_weights)
        best = np.argsort(-scores, kind="stable")[: request.k]
        return self._compose(
            deployment,
            request,
            run,
            encoding.candidate_indices[best],
            scores[best],
            heads[best],
            unscored,
        )

    async def _features(
        self, rows: int, run: _Run, compute: Callable[..., _T], *arguments: Any
    ) -> _T:
        """What takes time in proportion to a request's rows."""
        started = time.monotonic()
        if rows <= _INLINE_ROWS:
            result = compute(*arguments)
        else:
            result = await asyncio.get_running_loop().run_in_executor(
                self._encoder, compute, *arguments
            )
        run.features_s += time.monotonic() - started
        return result

    def _compose(
        self,
        deployment: Deployment,
        request: RecommendRequest,
        run: _Run,
        indices: IntArray,
        scores: FloatArray,
        heads: FloatArray | None,
        unscored: Sequence[int | str],
    ) -> Recommendation:
        catalogue, names = deployment.model.catalogue, deployment.model.heads
        ids = catalogue.ids_of(indices).tolist()
        by_head: Iterable[dict[str, float]] = ({} for _ in ids)
        if heads is not None:
            by_head = (dict(zip(names, row, strict=True)) for row in heads.tolist())
        items = [
            RankedItem(item, score, head_scores, catalogue.title(index))
            for item, score, head_scores, index in zip(
                ids, scores.tolist(), by_head, indices.tolist(), strict=True
            )
        ]
        return Recommendation(
            request_id=request.request_id,
            items=items,
            stages=tuple(run.stages),
            features_s=run.features_s,
            total_s=time.monotonic() - run.started,
            unknown_items=run.unknown_items,
            unscored_item_ids=unscored,
        )

    def _route(self, name: str) -> PipelineSpec:
        if not name:
            return next(route for route in self._routes.values() if route.default)
        route = self._routes.get(name)
        if route is None:
            raise NotFound(f"model: {name!r} is not served; there are: {', '.join(self._routes)}")
        return route

    def _misrouted(self, route: PipelineSpec, request: RecommendRequest) -> list[Violation]:
        """What a request asks for that the models of its route cannot do."""
        found = []
        if _ranks(request) and not route.rank:
            found.append(
                Violation("task", f"{route.name} has no model that ranks; leave out the candidates")
            )
        elif _ranks(request) and not request.candidates:
            found.append(Violation("candidates", "none given, but there is nothing to rank"))
        elif not _ranks(request) and route.finder(request) is None:
            if request.task is Task.GENERATE:
                found.append(Violation("task", f"{route.name} has no model that generates"))
            else:
                problem = f"none given, and {route.name} has no model that retrieves"
                found.append(Violation("candidates", problem))
        version = request.version
        composed = dict.fromkeys(route.stages.values())
        if version and len(composed) > 1:
            version = ""
            found.append(
                Violation(
                    "version",
                    f"{route.name} composes {' and '.join(composed)}, in their active versions; "
                    "name one of these models to choose a version",
                )
            )
        if request.head_weights:
            heads: Sequence[str] = ()
            if route.rank:
                heads = self._rollout.deployment(route.rank, version).model.heads
            listing = ", ".join(heads) or f"none, {route.name} has no model that ranks"
            found += [
                Violation(f"head_weights[{name!r}]", f"no such head; there are: {listing}")
                for name in request.head_weights
                if name not in heads
            ]
        return found

    def _lease(self, leases: ExitStack, model: str, request: RecommendRequest) -> Deployment:
        deployment = self._rollout.deployment(model, request.version)
        leases.enter_context(deployment.lease())
        return deployment

    def _report(self, request: RecommendRequest, run: _Run, outcome: str) -> None:
        self._environment.observers.notify(
            RequestEvent(
                request_id=request.request_id,
                model=run.model,
                outcome=outcome,
                total_s=time.monotonic() - run.started,
                features_s=run.features_s,
                history_length=run.history_length,
                candidates=len(request.candidates or ()),
                stages=run.stages,
            )
        )

    def models(self) -> Sequence[ServedModel]:
        """What requests may name, in the order of the configuration."""
        return [
            ServedModel(
                name=route.name,
                default=route.default,
                stages=route.stages,
                versions=[
                    _describe(deployment, active)
                    for model in dict.fromkeys(route.stages.values())
                    for deployment, active in self._rollout.deployments(model)
                ],
            )
            for route in self._routes.values()
        ]

    @property
    def limits(self) -> Limits:
        """Bounds of one request, for servers that refuse what is larger before they read it."""
        return self._limits

    def health(self) -> Health:
        """Whether every active version can answer."""
        if self._closing:
            return Health(False, "stopping")
        return self._rollout.health()

    def drop_user(self, user_id: str) -> int:
        """Drops what caches and stored histories hold of a user; the number of entries."""
        dropped = sum(cache.evict(user_id) for cache in self._environment.caches.values())
        return dropped + (0 if self._histories is None else self._histories.drop(user_id))

    def cache_statistics(self) -> Mapping[str, CacheStatistics]:
        """By kind of cache, and of the stored histories as `HISTORIES`, if any are kept."""
        found = {str(kind): cache.statistics() for kind, cache in self._environment.caches.items()}
        if self._histories is not None:
            found[HISTORIES] = self._histories.statistics()
        return found

    def queue_depths(self) -> Mapping[str, int]:
        """Requests waiting, by ``model/version/engine``."""
        return self._rollout.queue_depths()

    def measurements(self) -> Mapping[str, Sequence[Measurement]]:
        """What engines measure of themselves, by ``model/version/engine``."""
        return self._rollout.measurements()

    async def close(self) -> None:
        """Refuses new requests, finishes the accepted ones, then frees everything."""
        self._closing = True
        await self._rollout.close()
        self._encoder.shutdown(wait=True)
        for cache in self._environment.caches.values():
            await asyncio.to_thread(cache.close)


def _routes(
    tasks: Mapping[str, Sequence[Task]], pipelines: Sequence[PipelineSpec]
) -> dict[str, PipelineSpec]:
    """What requests may name: the pipelines, and every model by itself. One is the default."""
    routes: dict[str, PipelineSpec] = {}
    for spec in pipelines:
        if spec.name in routes:
            raise ConfigurationError(f"pipelines: {spec.name!r} occurs twice")
        for task, model in spec.stages.items():
            if task not in tasks.get(model, ()):
                able = ", ".join(n for n, t in tasks.items() if task in t) or "none"
                raise ConfigurationError(
                    f"pipelines.{spec.name}.{task}: {model!r} is not a served model with the task "
                    f"{task}; there are: {able}"
                )
        routes[spec.name] = spec
    for model, can in tasks.items():
        alone = PipelineSpec(
            name=model,
            retrieve=model if Task.RETRIEVE in can else "",
            rank=model if Task.RANK in can else "",
            generate=model if Task.GENERATE in can else "",
            rerank=False,
        )
        routes.setdefault(model, alone)
    if not routes:
        raise ConfigurationError("models: nothing to serve; name at least one model")
    if not any(route.default for route in routes.values()):
        first = next(iter(routes))
        routes[first] = replace(routes[first], default=True)
    return routes


def _ranks(request: RecommendRequest) -> bool:
    """Whether given candidates are to be ranked, rather than items found."""
    return bool(request.candidates) if request.task is None else request.task is Task.RANK


def _rows(request: RecommendRequest) -> int:
    return len(request.history) + len(request.candidates or ()) + len(request.exclude_item_ids)


def _excluded(model: Model, request: RecommendRequest) -> IntArray:
    """Catalogue indices that may not be answered, some perhaps more than once."""
    excluded = model.catalogue.indices_of(request.exclude_item_ids)
    if not request.include_seen:
        seen = model.catalogue.indices_of(request.history.item_ids)
        excluded = np.concatenate([excluded, seen]) if len(excluded) else seen
    return excluded[excluded > 0]


def _stage(deployment: Deployment, task: Task, encoding: Encoding, batched: Batched) -> StageReport:
    return StageReport(
        task=task,
        model=deployment.name,
        version=deployment.version,
        engine=deployment.engine_name(task),
        queue_s=batched.queue_s,
        compute_s=batched.compute_s,
        batch_size=batched.batch_size,
        tokens=encoding.request.tokens,
        tokens_reused=batched.result.tokens_reused,
    )


def _describe(deployment: Deployment, active: bool) -> ServedVersion:
    bundle = deployment.model.bundle
    return ServedVersion(
        model=bundle.name,
        version=bundle.version,
        active=active,
        architecture=bundle.architecture,
        tasks=deployment.tasks,
        heads=deployment.model.heads,
        engines={task: deployment.engine_name(task) for task in deployment.tasks},
        plan={task: plan.summary() for task, plan in deployment.plans.items()},
        catalogue_size=len(deployment.model.catalogue),
        description=bundle.description,
        notes=deployment.model.notes,
    )
