"""The contracts: what the factories of plugins make, as small protocols.

Data flows one way: a `Model` encodes a request into named arrays, an engine turns encoded requests
into `InferenceResult`s, the model decodes these into scores. Nothing here knows torch: a model may
offer a torch module to engines that want one, see `TorchModel`.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from gr_core.types import FloatArray, IntArray, RecommendRequest, Task

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from gr_core.observers import Observer
    from gr_core.pipeline import Pipeline
    from gr_core.repository import Bundle, Catalogue


# ── Models ────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class ArraySpec:
    """One named input of a model for one request, before batching.

    ``axes`` names jagged axes by strings (``"history"``, ``"candidate"``) and gives fixed ones as
    integers; ``()`` is a scalar. Batches get a leading batch axis, and jagged axes are padded on
    the right with ``pad``. The lengths of jagged axes are inputs of their own.
    """

    name: str
    dtype: str
    axes: tuple[str | int, ...] = ()
    pad: float = 0


@dataclass(frozen=True, slots=True)
class EncodedRequest:
    """A request as a model's arrays: what is queued, batched, and computed by engines.

    ``arrays`` holds an array for every `ArraySpec` of the task, without padding.
    """

    task: Task
    arrays: Mapping[str, npt.NDArray[Any]]
    tokens: int
    """Tokens that the model computes for it, the measure of its cost and its place in a batch."""
    k: int = 0
    """For a task that finds items, how many the engine must return."""
    user_id: str = ""
    """Owner of cached state, so that it can be dropped on demand. Never a key of the cache."""


@dataclass(frozen=True, slots=True)
class Encoding:
    """What `Model.encode` returns: the arrays, and what it had to leave out."""

    request: EncodedRequest
    candidate_indices: IntArray
    """Catalogue indices of the scored candidates, shape (c,), in the order of the scores."""
    unscored: npt.NDArray[np.bool_]
    """Shape (candidates of the request,): True where the model does not know the item."""
    unknown_items: int
    """Behaviours left out because the model does not know their item."""


@dataclass(frozen=True, slots=True)
class InferenceResult:
    """What an engine computed for one encoded request.

    For `Task.RETRIEVE` and `Task.GENERATE`, ``indices`` (k,) int64 are catalogue indices, best
    first, and ``scores`` (k,) float32 theirs; generation may find fewer where k is larger than
    `gr_core.generation.MAX_BEAM_WIDTH`. For `Task.RANK`, ``indices`` is None and ``scores``
    (c, heads) float32 are the raw outputs of the heads for the candidates, in order.
    """

    scores: FloatArray
    indices: IntArray | None = None
    tokens_reused: int = 0


@dataclass(frozen=True, slots=True)
class PrefixStability:
    """What of a history's K and V may be reused exactly, and what a cache has to key on.

    It holds for a history that keeps its oldest behaviour; dropping that shifts all positions.
    """

    reusable: Literal["growing", "unchanged", "none"]
    """``growing``: K and V stay true when behaviours are appended. ``unchanged``: only for the
    same history. ``none``: nothing is."""
    recompute_last: int
    """Of a growing history, the last tokens to compute anew once newer ones follow."""
    depends_on: tuple[str, ...]
    """Further inputs of the model that the K and V of the history depend on."""
    reason: str


@runtime_checkable
class Model(Protocol):
    """A loaded bundle: encodes requests, names its inputs, decodes outputs. Thread-safe.

    Its factory is called as ``factory(bundle: Bundle) -> Model`` and raises `BundleError` for a
    bundle that it cannot use, before anything is served from it.
    """

    @property
    def bundle(self) -> Bundle: ...

    @property
    def catalogue(self) -> Catalogue: ...

    @property
    def tasks(self) -> Sequence[Task]: ...

    @property
    def heads(self) -> Sequence[str]:
        """Names of the heads that `Task.RANK` scores, in the order of the engine's outputs."""
        ...

    @property
    def notes(self) -> Sequence[str]:
        """What people should know of how it was loaded, e.g. where its weights came from."""
        ...

    @property
    def prefix_stability(self) -> PrefixStability: ...

    def inputs(self, task: Task) -> Sequence[ArraySpec]: ...

    def encode(self, request: RecommendRequest, task: Task) -> Encoding:
        """Arrays for one stage. ``request.request_time_ms`` is set. Raises `InvalidRequest`."""
        ...

    def decode(
        self, task: Task, result: InferenceResult, head_weights: Mapping[str, float]
    ) -> tuple[FloatArray, FloatArray]:
        """Final scores (m,) float32 and head scores (m, heads) float32 of one result."""
        ...

    def close(self) -> None: ...


@runtime_checkable
class TorchModel(Model, Protocol):
    """A model of the format ``torch``: it offers a module with plain tensor inputs.

    ``module(task)`` takes the task's inputs by name, batched, and returns for `Task.RANK` the
    outputs of the heads (batch, candidates, heads), and for `Task.RETRIEVE` the user's
    representation (batch, d), to be multiplied with `item_table`. For `Task.GENERATE` it also takes
    ``prefixes`` (batch, p) int64, the tokens of p levels, and returns log-probabilities
    (batch, codes) of all tokens of the next level. It is in eval mode, float32, on the CPU; whoever
    wants another dtype or device makes a copy.
    """

    def module(self, task: Task) -> Any: ...

    def item_table(self) -> Any:
        """A tensor (catalogue size + 1, d) float32; row 0 is padding and never an answer.

        Raises `PlanError` where items have no vectors.
        """
        ...


# ── Artifacts, exporters ──────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Artifact:
    """Something an engine can load: a folder of a certain format, made from a bundle."""

    format: str
    path: Path


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """What an artifact is made for; ``extra`` holds what only some exporters know."""

    device: str = "cpu"
    dtype: str = "float32"
    extra: Mapping[str, Any] = field(default_factory=dict)


class Exporter(Protocol):
    """Turns an artifact of one format into another.

    Its factory is called without arguments. `export` writes into ``out_dir``, which is new and
    empty, checks what it wrote by running both sides, and raises `GrError` otherwise; the caller
    moves the folder to its place only after it returned.
    """

    def export(
        self, artifact: Artifact, model: Model, out_dir: Path, options: ExportOptions
    ) -> Artifact: ...


# ── Engines ───────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """How an engine is to run; the same for all engines, ``extra`` holds what only one knows."""

    device: str = "cpu"
    dtype: str = "float32"
    threads: int = 0
    """CPU threads of one engine; 0 leaves the choice to the engine."""
    max_batch_size: int = 32
    max_batch_tokens: int = 65536
    caches: Mapping[str, Cache] = field(default_factory=dict)
    """Caches of the configuration by kind, e.g. ``user_kv``."""
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Health:
    ok: bool
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Measurement:
    """A number that an engine keeps of itself, under the name that its users know."""

    name: str
    """As Prometheus has it, without the ``_total`` of counters."""
    value: float
    kind: Literal["counter", "gauge"]
    description: str


@runtime_checkable
class MeasuredEngine(Protocol):
    """What an engine may offer besides: its own measurements, cheap to get, from any thread."""

    def measurements(self) -> Sequence[Measurement]: ...


class EngineBase(Protocol):
    """The life of an engine: made by its factory without arguments, loaded, warmed up, closed."""

    def load(
        self, artifact: Artifact, model: Model, tasks: Sequence[Task], options: EngineOptions
    ) -> None: ...

    def warm_up(self) -> None:
        """Runs every task once at small and large sizes, so that no request pays for it."""
        ...

    def health(self) -> Health:
        """Cheap; called often."""
        ...

    def close(self) -> None:
        """Frees everything. May be called twice."""
        ...


@runtime_checkable
class Engine(EngineBase, Protocol):
    """An engine that computes batches made by the platform's micro-batcher.

    `infer` blocks, is called from one worker thread that belongs to this engine, and gets requests
    of one task, of any lengths. An exception fails the whole batch; the batcher then retries the
    requests one by one, so that a poisoned one fails alone.
    """

    def infer(self, batch: Sequence[EncodedRequest]) -> Sequence[InferenceResult]: ...


@runtime_checkable
class AsyncEngine(EngineBase, Protocol):
    """An engine that batches by itself; declared by ``batches_itself`` in its descriptor.

    `infer` is called on the event loop and must not compute there. Cancellation of the coroutine
    aborts the work.
    """

    async def infer(self, request: EncodedRequest, deadline: float | None) -> InferenceResult: ...


# ── Caches ────────────────────────────────────────────────────────────────────────────────────


class CacheKind(enum.StrEnum):
    """What a cache holds."""

    RESULTS = "results"
    """Results of engines by the content of the encoded request."""
    USER_KV = "user_kv"
    """Keys and values of the tokens of users' histories."""
    EMBEDDINGS = "embeddings"
    """Hot rows of embedding tables."""


@dataclass(frozen=True, slots=True)
class CacheStatistics:
    """Counts since the cache was made, and what it holds now.

    An `EntryCache` counts lookups and entries. A `BlockCache` counts the tokens of acquired
    sequences, reused ones as hits and others as misses, and blocks as entries and evictions.
    """

    hits: int = 0
    misses: int = 0
    evictions: int = 0
    """What made room for others."""
    entries: int = 0
    bytes: int = 0
    capacity_bytes: int = 0
    tiers: Mapping[str, CacheStatistics] = field(default_factory=dict)
    """The same of what stands behind it, e.g. ``file``: hits and misses are of what was looked
    for there."""


class Cache(Protocol):
    """Bounded memory by content. Its factory is called as ``factory(capacity_bytes, **options)``.

    The options are the plugin's own, from its table of the configuration; an unknown one is a
    TypeError, a wrong one a ValueError. What is looked up by is a digest of everything that a
    value depends on, so a hit is exact by construction. An owner serves to drop a user's entries
    on demand. All methods are thread-safe and quick.
    """

    def evict(self, owner: str) -> int:
        """Drops all entries of an owner and returns their number."""
        ...

    def clear(self) -> None: ...

    def statistics(self) -> CacheStatistics: ...

    def close(self) -> None:
        """Frees everything; what outlives the process is complete on disk. May be called twice."""
        ...


@runtime_checkable
class EntryCache(Cache, Protocol):
    """A cache of whole values, for every kind but `CacheKind.USER_KV`."""

    def get(self, key: bytes) -> Any | None: ...

    def put(self, key: bytes, value: Any, size: int, owner: str = "") -> None:
        """Keeps ``value`` of ``size`` bytes, evicting others; one larger than the cache is not."""
        ...


class Arrivals(Protocol):
    """Blocks on their way to a device, layer by layer. Leases of one batch may share one."""

    def start(self) -> None:
        """Begins to copy what all leases need that were acquired until now; `wait` does it too."""
        ...

    def wait(self, layer: int) -> None:
        """Lets what is launched next on the current stream wait for a layer; at once for us.

        A layer of the blocks may be read or written then, and so may those before it.
        """
        ...


class BlockLease(Protocol):
    """Memory for the tokens of one sequence, held until it is released.

    On a device, the stream that computes has to wait for the ``arrivals``, and whoever commits or
    releases has waited for that stream: then nothing is being read from the blocks or written to
    them. A lease may be released without its arrivals having been waited for.
    """

    @property
    def blocks(self) -> npt.NDArray[np.uintp]:
        """Addresses of the sequence's blocks, in order, shape (blocks,)."""
        ...

    @property
    def arrivals(self) -> Arrivals | None:
        """What to wait for before a block is read or written; None if there is nothing to."""
        ...

    @property
    def reused(self) -> int:
        """How many of the first tokens the blocks already hold; only later ones may be written."""
        ...

    def commit(self, tokens: int) -> None:
        """Publishes the first ``tokens`` tokens, which are written now, to later sequences.

        What is published may not be written any more. Nothing is where the owner, the cache or
        the space was dropped meanwhile.
        """
        ...

    def release(self) -> None:
        """Gives the memory back; what was committed stays cached. May be called twice."""
        ...


@dataclass(frozen=True, slots=True)
class Rates:
    """How fast a machine loads and computes: what takes longer to load than to compute is computed.

    Raises ValueError for what is not positive; the latency may be 0.
    """

    bytes_per_second: float
    """That come to where a space's blocks are from what stands behind."""
    costs_per_second: float
    """That are computed, in the unit of the space."""
    latency_seconds: float = 0.0
    """Until the first byte comes."""

    def __post_init__(self) -> None:
        for name in ("bytes_per_second", "costs_per_second"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: {getattr(self, name)}, expected more than 0")
        if not self.latency_seconds >= 0:
            raise ValueError(f"latency_seconds: {self.latency_seconds}, expected at least 0")


class BlockSpace(Protocol):
    """The blocks of one user of a `BlockCache`: sequences that share a layout and a meaning."""

    def set_rates(self, rates: Rates) -> None:
        """Says what is worth loading; until then, and where nothing is loaded, all of it is."""
        ...

    def acquire(
        self, salt: bytes, content: npt.NDArray[np.uint8], reusable: int, owner: str = ""
    ) -> BlockLease | None:
        """Blocks for a sequence of tokens with the given content, shape (tokens, width).

        The width is the same for all sequences of a space. Blocks that hold tokens with the same
        salt and the same content up to there are shared, for the first ``reusable`` tokens at
        most; for the others there is fresh memory, its content arbitrary. None if there is not
        enough memory that nobody holds.
        """
        ...

    def close(self) -> None:
        """Gives back the memory of all blocks; of those that are held, once they are released."""
        ...


@runtime_checkable
class BlockCache(Cache, Protocol):
    """A cache of K and V in blocks of tokens, for `CacheKind.USER_KV`.

    Reuse is by content: a chain of digests over the namespace, the salt, and every token from the
    first. So a history that grew hits its prefix, a changed one only what is equal, and users with
    the same prefix share it. An owner's entries are the blocks that it committed and nobody else.
    """

    def space(
        self,
        namespace: bytes,
        *,
        block_tokens: int,
        block_bytes: int,
        token_cost: float,
        pair_cost: float,
        device: str = "cpu",
        layers: int = 1,
    ) -> BlockSpace:
        """A space of its own for everything that ``namespace`` stands for.

        That is the model's version, its precision, and what else K and V depend on. Spaces of the
        same namespace, layout and device share their blocks. Recomputing token i costs
        ``token_cost + i·pair_cost``, in any unit that is the same for all spaces.

        The blocks are in the memory of ``device``: ``cpu``, ``cuda`` or ``cuda:N``. There they
        may come late, see `BlockLease.arrivals`; a block is ``layers`` parts of equal size, in the
        order in which they are needed. A cache that knows no devices need not take these two.
        Raises ValueError for a device that is not there or that the cache has nothing on.
        """
        ...


# ── Servers ───────────────────────────────────────────────────────────────────────────────────


class Server(Protocol):
    """Serves a pipeline over a protocol.

    Its factory is called as ``factory(pipeline, settings, observers)`` with the server's own table
    of the configuration.
    """

    async def serve(
        self, stop: asyncio.Event, ready: Callable[[Sequence[str]], None] | None = None
    ) -> None:
        """Serves until ``stop`` is set, then refuses new work, finishes the accepted, returns.

        ``ready`` is called once with the bound addresses (``host:port``).
        """
        ...


class ServerFactory(Protocol):
    def __call__(
        self, pipeline: Pipeline, settings: Mapping[str, Any], observers: Sequence[Observer]
    ) -> Server: ...
