"""The cache ``paged``: K and V of histories in blocks, shared by all with the same prefix.

Sequences are found in a tree of blocks (`gr_kernels.cache.tree`). Full blocks are shared. Of a
block that differs further on, the common tokens are copied into a fresh block; one that is not
full and that nobody else holds is extended in place (`gr_kernels.cache.lease`). Memory comes in
slabs (`gr_kernels.cache.arena`); what has to make room goes leaves first, least valuable first
(`gr_kernels.cache.pool`), into the file where there is one (`gr_kernels.cache.tier`).

Each CUDA device has memory and a tree of its own; behind it is pinned memory of the host
(`gr_kernels.cache.host_tier`), and copies between them are not waited for
(`gr_kernels.cuda.transfers`).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from gr_core.config import parse_bytes
from gr_core.contracts import CacheStatistics, Rates
from gr_kernels.cache.arena import Arena
from gr_kernels.cache.digests import namespace_digest, owner_digest
from gr_kernels.cache.host_tier import HostTier
from gr_kernels.cache.layout import Layout
from gr_kernels.cache.lease import PagedLease
from gr_kernels.cache.memory import HostMemory
from gr_kernels.cache.store import Store
from gr_kernels.cache.tier import FileTier
from gr_kernels.cache.tree import Tree

if TYPE_CHECKING:
    from gr_kernels.cuda.transfers import Transfers

logger = logging.getLogger(__name__)


class PagedCache:
    """Implements `gr_core.contracts.BlockCache`, under one lock.

    The blocks take ``capacity_bytes`` of the host's memory at most. Besides, a block in memory
    needs its tokens' content and about 1 KiB of book-keeping; a block in the file only the latter.

    ``file`` names a file, in a folder that exists, for up to ``file_bytes`` (a number, or text such
    as ``"4GiB"``) of blocks that memory has no room for; evicting then writes, under the lock.
    **It holds data derived from users' behaviour** and outlives the process: started again with
    the same file and model, the cache is warm. Only one process at a time may use it.

    Blocks of spaces on a CUDA device take ``device_bytes`` of its memory at most, each device
    having its own; what there is no room for is kept in up to ``host_bytes`` of pinned memory of
    the host, for each device. The file is only behind spaces on the host.

    Hits are tokens that were reused, misses those that were not; evictions and entries are blocks
    in the memory of the host and of devices, and bytes are these and what leases hold. Of the
    tiers ``file`` and ``host``, hits are tokens copied back, misses those that were not reused;
    the rest is of blocks in them.
    """

    def __init__(
        self,
        capacity_bytes: int,
        *,
        file: str = "",
        file_bytes: int | str = 0,
        device_bytes: int | str = "2GiB",
        host_bytes: int | str = 0,
    ) -> None:
        if capacity_bytes < 1:
            raise ValueError(f"capacity_bytes: {capacity_bytes}, expected at least 1")
        size = parse_bytes("file_bytes", file_bytes)
        if bool(file) != bool(size):
            raise ValueError(f"file: {file!r} and file_bytes: {size}, expected both or neither")
        self._device_bytes = parse_bytes("device_bytes", device_bytes)
        self._host_bytes = parse_bytes("host_bytes", host_bytes)
        tier = FileTier(str(Path(file).expanduser()), size) if file else None
        memory = HostMemory()
        self._store = Store(Arena(capacity_bytes, memory), memory, tier)
        self._stores = {"cpu": self._store}
        """By device."""
        self._lock = threading.Lock()
        self._closed = False

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
    ) -> PagedSpace:
        for name, value, least in (
            ("block_tokens", block_tokens, 1),
            ("block_bytes", block_bytes, 1),
            ("token_cost", token_cost, 0),
            ("pair_cost", pair_cost, 0),
            ("layers", layers, 1),
        ):
            if not value >= least:
                raise ValueError(f"{name}: {value}, expected at least {least}")
        if block_bytes % layers:
            raise ValueError(f"block_bytes: {block_bytes}, expected a multiple of {layers} layers")
        store = self._store_of(device)
        if not store.arena.most(block_bytes):
            logger.warning(
                "a block of %d bytes is larger than the cache of %d, which keeps nothing then; "
                "raise %s",
                block_bytes,
                store.arena.capacity,
                "capacity_bytes" if store is self._store else "device_bytes",
            )
        # Where nothing comes late, it does not matter of what parts a block is.
        sizes = (block_tokens, block_bytes, 1 if store is self._store else layers)
        return PagedSpace(self, store, namespace, sizes, (token_cost, pair_cost))

    def evict(self, owner: str) -> int:
        """Drops the blocks that only this owner committed, in memory and in what is behind it.

        What requests in flight hold goes when they release it; they publish nothing any more.
        """
        mark = owner_digest(owner)
        if not owner:
            return 0
        with self._lock:
            for store in self._stores.values():
                _cancel(store, owner=mark)
            return sum(store.evict(mark) for store in self._stores.values())

    def clear(self) -> None:
        """Drops everything, in memory and behind it; what is held goes when it is released."""
        with self._lock:
            for store in self._stores.values():
                _cancel(store)
                store.clear()

    def statistics(self) -> CacheStatistics:
        with self._lock:
            stores = self._stores.values()
            devices = [store for store in stores if store is not self._store]
            tiers = {"file": _of_tiers([self._store]), "host": _of_tiers(devices)}
            found = [_of_memory(store) for store in stores]
            there = {name: tier for name, tier in tiers.items() if tier is not None}
            return replace(_sum(found), tiers=there)

    def close(self) -> None:
        """Writes what the host's memory has to the file, if there is one, and frees everything."""
        with self._lock:
            self._closed = True
            for store in self._stores.values():
                if not store.closed:
                    _cancel(store)
                    store.close()

    def _store_of(self, device: str) -> Store:
        """Where the blocks of a device are; made when the first space on it is."""
        if device == "cpu":
            return self._store
        name = device if ":" in device else f"{device}:0"
        with self._lock:
            if (store := self._stores.get(name)) is not None:
                return store
            transfers = self._transfers(name)
            if not self._device_bytes:
                raise ValueError(f"device_bytes: 0, expected more for blocks on {device}")
            arena = Arena(self._device_bytes, transfers.device)
            tier = HostTier(self._host_bytes, transfers) if self._host_bytes else None
            self._stores[name] = store = Store(arena, transfers, tier)
            store.closed = self._closed
            return store

    def _transfers(self, device: str) -> Transfers:
        """Copies of a device, and its memory."""
        from gr_kernels.cuda.transfers import cuda_transfers

        return cuda_transfers(device)


def _cancel(store: Store, owner: bytes | None = None, tree: Tree | None = None) -> None:
    """Lets leases of an owner, of a tree, or all, publish nothing any more."""
    for lease in store.holders:
        assert isinstance(lease, PagedLease)
        if owner in (None, lease.owner) and tree in (None, lease.tree):
            lease.cancelled = True


def _of_memory(store: Store) -> CacheStatistics:
    blocks = store.memory.shares.items()
    leased = sum(len(holder.own) for holder in store.holders)
    return CacheStatistics(
        hits=store.hits,
        misses=store.misses,
        evictions=store.evictions,
        entries=sum(share.used for _, share in blocks) - leased,
        bytes=sum(
            share.used * store.arena.stride(tree.layout.block_bytes) for tree, share in blocks
        ),
        capacity_bytes=store.arena.capacity,
    )


def _of_tiers(stores: Iterable[Store]) -> CacheStatistics | None:
    """What is behind some memories; None if nothing is."""
    found = []
    for store in stores:
        if store.slots is not None and store.tier is not None:
            slots, tier = store.slots.shares.items(), store.tier
            found.append(
                CacheStatistics(
                    hits=store.tier_hits,
                    misses=store.misses,
                    evictions=store.tier_evictions,
                    entries=sum(share.used for _, share in slots),
                    bytes=sum(share.used * tier.slot_bytes(tree.layout) for tree, share in slots),
                    capacity_bytes=tier.capacity,
                )
            )
    return _sum(found) if found else None


def _sum(found: Sequence[CacheStatistics]) -> CacheStatistics:
    return CacheStatistics(
        hits=sum(one.hits for one in found),
        misses=sum(one.misses for one in found),
        evictions=sum(one.evictions for one in found),
        entries=sum(one.entries for one in found),
        bytes=sum(one.bytes for one in found),
        capacity_bytes=sum(one.capacity_bytes for one in found),
    )


class PagedSpace:
    """Implements `gr_core.contracts.BlockSpace`."""

    def __init__(
        self,
        cache: PagedCache,
        store: Store,
        namespace: bytes,
        sizes: tuple[int, int, int],
        costs: tuple[float, float],
    ) -> None:
        """``sizes`` are a block's tokens, bytes and layers, ``costs`` of a token and of a pair."""
        self._store = store
        self._lock = cache._lock
        self._namespace = namespace
        self._sizes = sizes
        self._costs = costs
        self._rates: Rates | None = None
        self._tree: Tree | None = None
        """None until the width of the content is known."""
        self._closed = False
        with self._lock:
            # What a file has of it is not idle, though nobody has asked for it yet.
            self._awaited = [tree for tree in store.trees.values() if self._is_mine(tree)]
            for tree in self._awaited:
                tree.users += 1

    def set_rates(self, rates: Rates) -> None:
        with self._lock:
            self._rates = rates
            if self._tree is not None:
                self._tree.rates = rates

    def acquire(
        self, salt: bytes, content: npt.NDArray[np.uint8], reusable: int, owner: str = ""
    ) -> PagedLease | None:
        if content.ndim != 2 or content.dtype != np.uint8 or not content.shape[1]:
            raise ValueError(
                f"content: {content.dtype} {content.shape}, expected uint8 (tokens, width)"
            )
        store = self._store
        tree = self._tree or self._open(content.shape[1])
        if tree is None:
            return None
        if tree.layout.width != content.shape[1]:
            raise ValueError(
                f"content: width {content.shape[1]}, expected {tree.layout.width} as before"
            )
        lease = PagedLease(store, self._lock, tree, salt, content, owner)
        with self._lock:
            if self._closed or store.closed:
                return None
            try:
                found = lease.open(reusable)
            except BaseException:
                lease.give_back()
                raise
            store.hits += lease.reused
            store.misses += lease.tokens - lease.reused
        return lease if found else None

    def close(self) -> None:
        with self._lock:
            if not self._closed:
                self._closed = True
                self._leave(self._awaited + ([self._tree] if self._tree else []))

    def _open(self, width: int) -> Tree | None:
        """The tree, once the width of the content is known; None if there is none any more."""
        store = self._store
        with self._lock:
            if self._closed or store.closed:
                return None
            if self._tree is None:
                tokens, block_bytes, layers = self._sizes
                digest = self._digest(width)
                self._tree = tree = store.tree(Layout(digest, tokens, block_bytes, width, layers))
                tree.users += 1
                tree.token_cost, tree.pair_cost = self._costs
                tree.rates = self._rates or tree.rates
                self._leave(self._awaited)
                self._awaited = []
                tier = store.tier
                if tier is not None and not tier.fits(tree):
                    logger.warning(
                        "%s: a block of %d bytes does not fit into it; raise %s",
                        tier.name,
                        block_bytes,
                        tier.option,
                    )
            return self._tree

    def _leave(self, trees: list[Tree]) -> None:
        """Uses some trees no more; those that nobody uses keep nothing in memory."""
        if self._store.closed:
            return
        for tree in trees:
            tree.users -= 1
            if not tree.users:
                _cancel(self._store, tree=tree)
                self._store.retire(tree)

    def _is_mine(self, tree: Tree) -> bool:
        return tree.layout.namespace == self._digest(tree.layout.width)

    def _digest(self, width: int) -> bytes:
        tokens, block_bytes, layers = self._sizes
        return namespace_digest(self._namespace, tokens, block_bytes, width, layers)
