"""Tokens as rows of ids, their order in a batch without padding, and their way to a device.

Shapes: N tokens of one history, W int32 ids of a token, T tokens of a batch, R some of its rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gr_core.contracts import EncodedRequest
from gr_core.stack import TokenSequence
from gr_hstu.jagged.intervals import Int32Array, counting
from gr_hstu.modules.embeddings import NEVER

Content = npt.NDArray[np.uint8]
Arrays = dict[str, npt.NDArray[Any]]
"""Ids, places and buckets by name: integers, and none of them needs more than 32 bits."""
_HOST = torch.device("cpu")


def on_host(device: torch.device) -> bool:
    """Whether a device computes on the memory that ids are made in, and starts at once."""
    return device == _HOST


def on_device(arrays: Mapping[str, npt.NDArray[Any]], device: torch.device) -> dict[str, Tensor]:
    """The arrays as tensors: on the CPU they share memory, elsewhere they are int32.

    To another device they go in one copy, which nobody waits for.
    """
    if on_host(device):
        return {name: torch.from_numpy(array) for name, array in arrays.items()}
    sizes = [array.size for array in arrays.values()]
    packed = torch.empty(sum(sizes), dtype=torch.int32, pin_memory=device.type == "cuda")
    rows = packed.numpy()
    start = 0
    for array, size in zip(arrays.values(), sizes, strict=True):
        rows[start : start + size] = array.reshape(-1)
        start += size
    parts = packed.to(device, non_blocking=True).split_with_sizes(sizes)
    return {
        name: part.view(array.shape)
        for (name, array), part in zip(arrays.items(), parts, strict=True)
    }


def picked(x: Tensor, rows: Tensor | None) -> Tensor:
    """Some rows of x, or all as they are."""
    return x if rows is None else x.index_select(0, rows)


def to_content(ids_NW: Int32Array) -> Content:
    """The rows as bytes, (N, 4·W), sharing memory."""
    return ids_NW.view(np.uint8)


def to_ids(content: Content) -> Int32Array:
    """The inverse of `to_content`."""
    return content.view(np.int32)


def digest(ids_NW: Int32Array) -> bytes:
    """Of rows that all tokens depend on."""
    return hashlib.blake2b(ids_NW.data, digest_size=32).digest()


def elapsed_before(times_L: npt.NDArray[np.int64]) -> Tensor:
    """Seconds since the previous behaviour (L,), as `modules.embeddings.since_previous`."""
    elapsed_L = np.empty_like(times_L)
    elapsed_L[:1] = times_L[:1] + NEVER
    np.subtract(times_L[1:], times_L[:-1], out=elapsed_L[1:])
    return torch.from_numpy(elapsed_L)


def elapsed_at_request(requests: Sequence[EncodedRequest]) -> Tensor:
    """Seconds from the last behaviour to the request (requests,), int64."""
    elapsed = []
    for request in requests:
        times_L = request.arrays["history_timestamps"]
        last = int(times_L[-1]) if len(times_L) else -NEVER
        elapsed.append(int(request.arrays["request_time"]) - last)
    return torch.tensor(elapsed)


def candidate_counts(requests: Sequence[EncodedRequest]) -> list[int]:
    return [len(request.arrays["candidate_items"]) for request in requests]


def joined(requests: Sequence[EncodedRequest], name: str) -> npt.NDArray[Any]:
    """A jagged array of all requests, one after another."""
    if len(requests) == 1:
        return requests[0].arrays[name]
    return np.concatenate([request.arrays[name] for request in requests])


def for_each_candidate(
    requests: Sequence[EncodedRequest], name: str, counts: Sequence[int]
) -> npt.NDArray[Any]:
    """A request's features, once for each of its candidates: (candidates, G)."""
    return np.repeat(np.stack([request.arrays[name] for request in requests]), counts, axis=0)


def new_ids(
    sequences: Sequence[TokenSequence], starts: Sequence[int]
) -> tuple[npt.NDArray[np.int32], Int32Array]:
    """Rows of ids (R, W) and places (R,) of the histories' tokens from ``starts`` on."""
    ids = [to_ids(s.content)[start:] for s, start in zip(sequences, starts, strict=True)]
    places = [counting(s.history)[start:] for s, start in zip(sequences, starts, strict=True)]
    if len(ids) == 1:
        return ids[0], places[0]
    return np.concatenate(ids), np.concatenate(places)


def columns(ids_RW: Int32Array) -> Int32Array:
    """(W, R), contiguous: look-ups of a column are cheaper than of a row's ids."""
    return np.ascontiguousarray(ids_RW.T)


def request_by_request(
    sequences: Sequence[TokenSequence], starts: Sequence[int], prefix: int
) -> npt.NDArray[np.int64] | None:
    """Where each token of a batch stands among all prefix tokens, behaviours, candidates, (T,).

    None for one request, whose tokens are in that order already.
    """
    if len(sequences) == 1:
        return None
    kinds = [
        (max(0, prefix - start), s.history - max(start, prefix), s.candidates)
        for s, start in zip(sequences, starts, strict=True)
    ]
    place = [0, 0, 0]
    for i in (0, 1):
        place[i + 1] = place[i] + sum(sizes[i] for sizes in kinds)
    order = []
    for sizes in kinds:
        for i, size in enumerate(sizes):
            order.append(np.arange(place[i], place[i] + size))
            place[i] += size
    return np.concatenate(order)


def prefix_rows(
    sequences: Sequence[TokenSequence], starts: Sequence[int], prefix: int
) -> tuple[Int32Array, npt.NDArray[np.int64] | None, npt.NDArray[np.int64]] | None:
    """What prefix tokens to compute; None if there are none.

    Ids (requests with some, P), which of these (flattened) are wanted if not all, and the places
    (R,) of the wanted ones in their sequences.
    """
    fresh = [(s, start) for s, start in zip(sequences, starts, strict=True) if start < prefix]
    if not fresh:
        return None
    ids_BP = np.stack([to_ids(s.content)[:prefix, 0] for s, _ in fresh])
    places = np.concatenate([np.arange(start, prefix) for _, start in fresh])
    if len(places) == ids_BP.size:
        return ids_BP, None, places
    wanted = np.concatenate(
        [np.arange(i * prefix + start, (i + 1) * prefix) for i, (_, start) in enumerate(fresh)]
    )
    return ids_BP, wanted, places


def answering_rows(counts: Sequence[int]) -> npt.NDArray[np.int64] | None:
    """Which rows are those of candidates, if not all.

    A request without any has brought one that nobody asked for.
    """
    if all(counts):
        return None
    return np.flatnonzero(np.concatenate([np.full(max(c, 1), c > 0) for c in counts]))
