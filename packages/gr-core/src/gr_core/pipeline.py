"""The request's way: validate, encode, batch, infer, decode, compose the answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gr_core.contracts import CacheStatistics, Health
from gr_core.types import Recommendation, RecommendRequest, Task


@dataclass(frozen=True, slots=True)
class ServedVersion:
    """One loaded version of a served model, for people and for ListModels."""

    version: str
    active: bool
    architecture: str
    tasks: Sequence[Task]
    heads: Sequence[str]
    engines: Mapping[Task, str]
    """Engine of each task, e.g. ``torch (cpu, float32)``."""
    plan: Mapping[Task, str]
    """The chain of each task with the reasons, one line each."""
    catalogue_size: int
    signals: Sequence[str]
    parameters: int


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A name that requests may give in ``model``."""

    name: str
    default: bool
    stages: Mapping[Task, str]
    """Which model of the repository answers each task; more than one model for a pipeline."""
    versions: Sequence[ServedVersion]


class Pipeline:
    """Answers requests. All methods are to be called on one event loop, which it never blocks."""

    async def start(self) -> None:
        """Loads, warms up and activates everything; raises what makes serving impossible."""
        raise NotImplementedError

    async def recommend(self, request: RecommendRequest) -> Recommendation:
        """Raises `InvalidRequest`, `NotFound`, `FailedPrecondition`, `Overloaded`,
        `DeadlineExceeded`, `Unavailable`. Cancelling it drops the request from its queue."""
        raise NotImplementedError

    def models(self) -> Sequence[ServedModel]:
        raise NotImplementedError

    def health(self) -> Health:
        """Whether every active model can answer."""
        raise NotImplementedError

    def drop_user(self, user_id: str) -> int:
        """Drops what caches hold of a user and returns the number of entries."""
        raise NotImplementedError

    def cache_statistics(self) -> Mapping[str, CacheStatistics]:
        raise NotImplementedError

    def queue_depths(self) -> Mapping[str, int]:
        """Requests waiting, by ``model/version/engine``."""
        raise NotImplementedError

    async def close(self) -> None:
        """Finishes accepted requests, then frees everything."""
        raise NotImplementedError
