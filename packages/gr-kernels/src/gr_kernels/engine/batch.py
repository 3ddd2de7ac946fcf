"""From the requests of a batch to segments of a stack: what to compute, on whose blocks.

Shapes: T tokens of the batch, N tokens of one history, C candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gr_core.contracts import Arrivals, BlockLease
from gr_core.stack import TokenSequence
from gr_kernels.ops.hstu_stack.interface import BLOCK_TOKENS, Rows, Segment


@dataclass(frozen=True, slots=True)
class Piece:
    """A segment, and which rows of the batch's input it computes."""

    segment: Segment
    start: int
    stop: int


class _Together:
    """Implements `Arrivals` for several leases, which may have the same."""

    def __init__(self, parts: Sequence[Arrivals]) -> None:
        self._parts = {id(part): part for part in parts}.values()

    def start(self) -> None:
        for part in self._parts:
            part.start()

    def wait(self, layer: int) -> None:
        for part in self._parts:
            part.wait(layer)


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """The tokens of a batch: request after request, new history tokens, then candidates."""

    sequences: Sequence[TokenSequence]
    leases: Sequence[BlockLease]
    """One a request; requests with the same history share one."""
    starts: Sequence[int]
    """Per request, the first history token that it computes; N for one that another computes."""
    tokens: int
    """T."""

    def release(self) -> None:
        for lease in self.leases:
            lease.release()

    def commit(self) -> None:
        """Publishes what holds for later requests too."""
        for sequence, lease, start in zip(self.sequences, self.leases, self.starts, strict=True):
            if start < sequence.history:
                lease.commit(min(sequence.reusable, sequence.history))

    def arrivals(self) -> Arrivals | None:
        """What of the blocks is still on its way to a device."""
        found = [lease.arrivals for lease in self.leases if lease.arrivals is not None]
        return _Together(found) if found else None

    def answer_rows(self) -> npt.NDArray[np.int64]:
        """Rows of T that answers are read from: of the candidates, or of the last history tokens.

        -1 stands for the last token of an empty history.
        """
        rows = []
        row = 0
        for sequence, start in zip(self.sequences, self.starts, strict=True):
            row += sequence.history - start
            if sequence.candidates:
                rows.append(np.arange(row, row + sequence.candidates))
            else:
                rows.append(np.array([row - 1 if sequence.history else -1]))
            row += sequence.candidates
        return np.concatenate(rows)

    def runs(self, max_tokens: int) -> Iterator[Sequence[Piece]]:
        """Pieces in the order in which they must be computed, at most ``max_tokens`` at once.

        A long history is split where no token sees a later piece's, candidates anywhere
        (M-FALCON); what cannot be split makes a larger run.
        """
        run: list[Piece] = []
        tokens = 0
        for piece in self._pieces(max_tokens):
            size = piece.stop - piece.start
            if run and tokens + size > max_tokens:
                yield run
                run, tokens = [], 0
            run.append(piece)
            tokens += size
        if run:
            yield run

    def _pieces(self, max_tokens: int) -> Iterator[Piece]:
        row = 0
        for sequence, lease, start in zip(self.sequences, self.leases, self.starts, strict=True):
            end = sequence.history + sequence.candidates
            while start < end:
                stop = _split(sequence, start, start + max_tokens)
                yield Piece(_segment(sequence, lease, start, stop), row, row + stop - start)
                row += stop - start
                start = stop


def _split(sequence: TokenSequence, start: int, stop: int) -> int:
    """The end of a piece that begins at ``start`` and should end at ``stop``."""
    n = sequence.history
    if stop < n and int(sequence.high[start:stop].max()) > stop:
        # Tokens that see later ones, which then have to be there.
        stop = n
    return min(stop, n + sequence.candidates)


def _segment(sequence: TokenSequence, lease: BlockLease, start: int, stop: int) -> Segment:
    """Tokens ``start`` to ``stop - 1``; what comes before is in the blocks."""
    n = sequence.history
    cached, keys = min(start, n), min(stop, n)
    ends_history = not sequence.candidates and stop == n
    times = None
    if sequence.times is not None:
        times = np.concatenate([sequence.times[:keys], sequence.times[max(start, n) : stop]])
    return Segment(
        blocks=lease.blocks[: -(-keys // BLOCK_TOKENS)],
        cached=cached,
        new=keys - cached,
        candidates=max(0, stop - max(start, n)),
        low=sequence.low[start:stop],
        high=sequence.high[start:stop],
        groups=None if sequence.groups is None else sequence.groups[start:stop],
        times=times,
        next_times=None if sequence.next_times is None else sequence.next_times[start:stop],
        rows=Rows.CANDIDATES_AND_LAST if ends_history else Rows.CANDIDATES,
    )


def plan_batch(
    sequences: Sequence[TokenSequence],
    acquire: Callable[[int, TokenSequence, int], BlockLease],
) -> BatchPlan:
    """Finds or makes the blocks of every distinct history.

    ``acquire(i, sequence, reusable)`` leases the blocks of request i, of whose tokens at most the
    first ``reusable`` may come from a cache.
    """
    leases: list[BlockLease] = []
    starts: list[int] = []
    tokens = 0
    seen: dict[tuple[bytes, bytes], BlockLease] = {}
    try:
        for i, sequence in enumerate(sequences):
            n = sequence.history
            key = (sequence.salt, sequence.content.tobytes()) if len(sequences) > 1 else None
            # Where the last token's output is the answer, it has to be computed.
            shared = seen.get(key) if key is not None and sequence.candidates else None
            if shared is not None:
                leases.append(shared)
                starts.append(n)
            else:
                reusable = min(sequence.reusable, n if sequence.candidates else n - 1)
                lease = acquire(i, sequence, max(0, reusable))
                leases.append(lease)
                starts.append(min(lease.reused, n))
                if key is not None:
                    seen[key] = lease
            tokens += n - starts[-1] + sequence.candidates
    except BaseException:
        for lease in leases:
            lease.release()
        raise
    return BatchPlan(sequences, leases, starts, tokens)
