"""What the kernels of a GPU need to know of a batch, as arrays that one copy brings there.

Shapes: B segments, T tokens of all, R rows of them that are wanted of the last layer (0 where that
is all), M blocks of a history, Z times of all keys.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gr_core.stack import Stack
from gr_kernels.ops.hstu_stack.interface import BLOCK_TOKENS, Rows, Segment

_ALIGNMENT = 16
_Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Sizes:
    """How large the arrays are; those of a batch, or of all batches that one CUDA graph serves."""

    tokens: int
    segments: int
    rows: int
    blocks: int
    times: int

    def hold(self, other: Sizes) -> bool:
        return (
            self.tokens >= other.tokens
            and self.segments >= other.segments
            and (not self.rows or self.rows >= other.rows)  # 0: all
            and self.blocks >= other.blocks
            and self.times >= other.times
        )


Layout = Mapping[str, tuple[np.dtype[Any], tuple[int, ...], int]]
"""Dtype, shape and offset in bytes of each array. The last, ``end``, says where they end."""


def sizes_of(segments: Sequence[Segment], stack: Stack) -> Sizes:
    has_times = stack.layers[0].time_bias is not None
    tokens = sum(s.new + s.candidates for s in segments)
    rows = sum(_wanted(s) for s in segments)
    return Sizes(
        tokens=tokens,
        segments=len(segments),
        rows=rows if rows < tokens else 0,
        blocks=max(-(-(s.cached + s.new) // BLOCK_TOKENS) for s in segments),
        times=sum(s.cached + s.new + s.candidates for s in segments) if has_times else 0,
    )


def layout(sizes: Sizes, stack: Stack) -> Layout:
    """The arrays of a batch, side by side in one buffer."""
    has_bias = stack.layers[0].position_bias is not None
    has_times = stack.layers[0].time_bias is not None
    t, b, r, m, z = sizes.tokens, sizes.segments, sizes.rows, sizes.blocks, sizes.times
    shapes: dict[str, tuple[type, tuple[int, ...]]] = {
        "addresses_BM": (np.int64, (b, m)),
        "block_T": (np.int64, (t,)),  # address of the block that a token is stored in, or 0
        "row_R": (np.int64, (r,)),
        "offsets": (np.int64, (b + 1,)),
        "wanted_offsets": (np.int64, (b + 1,)),
        "cached_B": (np.int32, (b,)),
        "place_T": (np.int32, (t,)),  # within the block
    }
    for end, count in (("_T", t), ("_R", r)):
        for name in ("low", "high", "own"):
            shapes[name + end] = (np.int32, (count,))
        if has_bias or has_times:
            shapes["position" + end] = (np.int32, (count,))
        if has_times:
            shapes["next_time" + end] = (np.int64, (count,))
    if has_bias or has_times:
        shapes["history_B"] = (np.int32, (b,))
    if has_times:
        shapes["time_Z"] = (np.int64, (z,))
        shapes["time_start_B"] = (np.int64, (b,))
    if stack.groups > 1:
        shapes["group_T"] = (np.uint8, (t,))
    found: dict[str, tuple[np.dtype[Any], tuple[int, ...], int]] = {}
    offset = 0
    for name, (dtype, shape) in shapes.items():
        found[name] = (np.dtype(dtype), shape, offset)
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        offset += -(-size // _ALIGNMENT) * _ALIGNMENT
    found["end"] = (np.dtype(np.uint8), (0,), offset)
    return found


def views(buffer: Tensor, of: Layout) -> Mapping[str, Tensor]:
    """The arrays in a buffer of bytes, sharing its memory."""
    found = {}
    for name, (dtype, shape, offset) in of.items():
        size = int(np.prod(shape)) * dtype.itemsize
        found[name] = buffer[offset : offset + size].view(_TORCH[dtype.name]).view(shape)
    return found


_TORCH = {"int64": torch.int64, "int32": torch.int32, "uint8": torch.uint8}


def fill(arrays: Mapping[str, _Array], segments: Sequence[Segment], sizes: Sizes) -> None:
    """Writes a batch into arrays that may be larger than it: what is left over does nothing.

    Segments that are not there have no tokens; tokens that are not there belong to no segment and
    are stored nowhere. Raises `ValueError` for a segment that lacks something.
    """
    count = len(segments)
    new = np.array([s.new for s in segments])
    cached = np.array([s.cached for s in segments])
    lengths = new + np.array([s.candidates for s in segments])
    wanted = np.array([_wanted(s) for s in segments])
    ends, wanted_ends = np.cumsum(lengths), np.cumsum(wanted)
    starts = ends - lengths
    tokens, rows = int(ends[-1]), int(wanted_ends[-1])
    for name, filled in (("offsets", ends), ("wanted_offsets", wanted_ends)):
        arrays[name][0] = 0
        arrays[name][1 : count + 1] = filled
        arrays[name][count + 1 :] = filled[-1]
    arrays["cached_B"][:count] = cached
    arrays["cached_B"][count:] = 0
    for address_M, segment in zip(arrays["addresses_BM"], segments, strict=False):
        needed = -(-(segment.cached + segment.new) // BLOCK_TOKENS)
        if len(segment.blocks) < needed:
            raise ValueError(
                f"{segment.cached + segment.new} tokens need {needed} blocks; "
                f"there are {len(segment.blocks)}"
            )
        address_M[:needed] = segment.blocks[:needed].astype(np.int64)
    # Of each token: its segment, and its own place there.
    segment_T = np.repeat(np.arange(count), lengths)
    place_T = np.arange(tokens) - starts[segment_T] + cached[segment_T]
    history_B = cached + new
    stored_T = place_T < history_B[segment_T]
    block_T, within_T = arrays["block_T"], arrays["place_T"]
    block_T[:] = 0
    stored = np.flatnonzero(stored_T)
    block_T[stored] = arrays["addresses_BM"][segment_T[stored], place_T[stored] // BLOCK_TOKENS]
    within_T[:tokens] = place_T % BLOCK_TOKENS
    # The wanted rows are the last ones of each segment.
    row_R = np.arange(rows) + np.repeat(ends - wanted_ends, wanted)
    if sizes.rows:
        arrays["row_R"][:] = row_R
    per_token: dict[str, _Array] = {
        "low": _joined(segments, "low", lengths),
        "high": _joined(segments, "high", lengths),
        "own": place_T,
    }
    if "history_B" in arrays:
        arrays["history_B"][:count] = history_B
        per_token["position"] = np.minimum(place_T, history_B[segment_T])
    if "time_Z" in arrays:
        keys = history_B + lengths - new
        times = _joined(segments, "times", keys)
        arrays["time_Z"][: len(times)] = times
        arrays["time_start_B"][:count] = np.cumsum(keys) - keys
        per_token["next_time"] = _joined(segments, "next_times", lengths)
    for name, of_tokens in per_token.items():
        arrays[name + "_T"][:tokens] = of_tokens
        if sizes.rows:
            arrays[name + "_R"][:] = of_tokens[row_R]
    if "group_T" in arrays:
        # Norms read those of tokens that are not there, too.
        arrays["group_T"][tokens:] = 0
        arrays["group_T"][:tokens] = _joined(segments, "groups", lengths)


def _wanted(segment: Segment) -> int:
    """Rows at the end of a segment that the last layer has to give."""
    if segment.rows is Rows.ALL:
        return segment.new + segment.candidates
    last = segment.rows is Rows.CANDIDATES_AND_LAST and segment.new > 0
    return segment.candidates + last


def _joined(segments: Sequence[Segment], name: str, lengths: npt.NDArray[np.int64]) -> _Array:
    parts = []
    for segment, length in zip(segments, lengths.tolist(), strict=True):
        part = getattr(segment, name)
        if part is None or len(part) < length:
            found = "missing" if part is None else f"{len(part)} long"
            raise ValueError(f"segment.{name} is {found}; expected {length} numbers")
        parts.append(part[:length])
    return np.concatenate(parts)
