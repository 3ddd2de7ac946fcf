"""The cache ``paged``: K and V of histories in blocks, shared by all with the same prefix.

Sequences are found in a tree of blocks (`gr_kernels.cache.tree`). Full blocks are shared. Of a
block that differs further on, the common tokens are copied into a fresh block; one that is not
full and that nobody else holds is extended in place (`gr_kernels.cache.lease`). Memory comes in
slabs (`gr_kernels.cache.arena`); what has to make room goes leaves first, least valuable first
(`gr_kernels.cache.pool`), into the file where there is one (`gr_kernels.cache.tier`).
"""

from __future__ import annotations

import logging
import threading
from pathlib import Path

import numpy as np
import numpy.typing as npt

from gr_core.config import parse_bytes
from gr_core.contracts import CacheStatistics
from gr_kernels.cache.digests import namespace_digest, owner_digest
from gr_kernels.cache.layout import Layout
from gr_kernels.cache.lease import PagedLease
from gr_kernels.cache.store import Store
from gr_kernels.cache.tier import FileTier, slot_bytes
from gr_kernels.cache.tree import Tree

logger = logging.getLogger(__name__)


class PagedCache:
    """Implements `gr_core.contracts.BlockCache`, under one lock.

    The blocks take ``capacity_bytes`` at most. Besides, a block in memory needs its tokens'
    content and about 1 KiB of book-keeping; a block in the file only the latter.

    ``file`` names a file, in a folder that exists, for up to ``file_bytes`` (a number, or text such
    as ``"4GiB"``) of blocks that memory has no room for; evicting then writes, under the lock.
    **It holds data derived from users' behaviour** and outlives the process: started again with
    the same file and model, the cache is warm. Only one process at a time may use it.

    Hits are tokens that were reused, misses those that were not; evictions and entries are blocks
    in memory, and bytes are these and what leases hold. Of the tier ``file``, hits are tokens
    copied back; the rest is of blocks in the file.
    """

    def __init__(self, capacity_bytes: int, *, file: str = "", file_bytes: int | str = 0) -> None:
        if capacity_bytes < 1:
            raise ValueError(f"capacity_bytes: {capacity_bytes}, expected at least 1")
        size = parse_bytes("file_bytes", file_bytes)
        if bool(file) != bool(size):
            raise ValueError(f"file: {file!r} and file_bytes: {size}, expected both or neither")
        tier = FileTier(str(Path(file).expanduser()), size) if file else None
        self._store = Store(capacity_bytes, tier)
        self._lock = threading.Lock()
        self._hits = self._misses = 0

    def space(
        self,
        namespace: bytes,
        *,
        block_tokens: int,
        block_bytes: int,
        token_cost: float,
        pair_cost: float,
    ) -> PagedSpace:
        for name, value, least in (
            ("block_tokens", block_tokens, 1),
            ("block_bytes", block_bytes, 1),
            ("token_cost", token_cost, 0),
            ("pair_cost", pair_cost, 0),
        ):
            if not value >= least:
                raise ValueError(f"{name}: {value}, expected at least {least}")
        capacity = self._store.arena.capacity
        if not self._store.arena.most(block_bytes):
            logger.warning(
                "a block of %d bytes is larger than the cache of %d, which keeps nothing then; "
                "raise capacity_bytes",
                block_bytes,
                capacity,
            )
        return PagedSpace(self, namespace, block_tokens, block_bytes, (token_cost, pair_cost))

    def evict(self, owner: str) -> int:
        """Drops the blocks that only this owner committed, in memory and in the file.

        What requests in flight hold goes when they release it; they publish nothing any more.
        """
        mark = owner_digest(owner)
        if not owner:
            return 0
        with self._lock:
            self._cancel(owner=mark)
            return self._store.evict(mark)

    def clear(self) -> None:
        """Drops everything, in memory and in the file; what is held goes when it is released."""
        with self._lock:
            self._cancel()
            self._store.clear()

    def statistics(self) -> CacheStatistics:
        with self._lock:
            store, tiers = self._store, {}
            if store.file is not None and store.tier is not None:
                slots = store.file.shares.items()
                tiers["file"] = CacheStatistics(
                    hits=store.file_hits,
                    misses=self._misses,
                    evictions=store.file_evictions,
                    entries=sum(share.used for _, share in slots),
                    bytes=sum(share.used * slot_bytes(tree.layout) for tree, share in slots),
                    capacity_bytes=store.tier.capacity,
                )
            blocks = store.memory.shares.items()
            leased = sum(len(holder.own) for holder in store.holders)
            return CacheStatistics(
                hits=self._hits,
                misses=self._misses,
                evictions=store.evictions,
                entries=sum(share.used for _, share in blocks) - leased,
                bytes=sum(
                    share.used * store.arena.stride(tree.layout.block_bytes)
                    for tree, share in blocks
                ),
                capacity_bytes=store.arena.capacity,
                tiers=tiers,
            )

    def close(self) -> None:
        """Writes what is in memory to the file, if there is one, and frees everything."""
        with self._lock:
            if not self._store.closed:
                self._cancel()
                self._store.close()

    def _cancel(self, owner: bytes | None = None, tree: Tree | None = None) -> None:
        """Lets leases of an owner, of a tree, or all, publish nothing any more."""
        for lease in self._store.holders:
            assert isinstance(lease, PagedLease)
            if owner in (None, lease.owner) and tree in (None, lease.tree):
                lease.cancelled = True


class PagedSpace:
    """Implements `gr_core.contracts.BlockSpace`."""

    def __init__(
        self,
        cache: PagedCache,
        namespace: bytes,
        block_tokens: int,
        block_bytes: int,
        costs: tuple[float, float],
    ) -> None:
        self._cache = cache
        self._namespace = namespace
        self._block_tokens = block_tokens
        self._block_bytes = block_bytes
        self._costs = costs
        self._tree: Tree | None = None
        """None until the width of the content is known."""
        self._closed = False
        with cache._lock:
            # What the file has of it is not idle, though nobody has asked for it yet.
            self._awaited = [tree for tree in cache._store.trees.values() if self._is_mine(tree)]
            for tree in self._awaited:
                tree.users += 1

    def acquire(
        self, salt: bytes, content: npt.NDArray[np.uint8], reusable: int, owner: str = ""
    ) -> PagedLease | None:
        if content.ndim != 2 or content.dtype != np.uint8 or not content.shape[1]:
            raise ValueError(
                f"content: {content.dtype} {content.shape}, expected uint8 (tokens, width)"
            )
        cache = self._cache
        tree = self._tree or self._open(content.shape[1])
        if tree is None:
            return None
        if tree.layout.width != content.shape[1]:
            raise ValueError(
                f"content: width {content.shape[1]}, expected {tree.layout.width} as before"
            )
        lease = PagedLease(cache._store, cache._lock, tree, salt, content, owner)
        with cache._lock:
            if self._closed or cache._store.closed:
                return None
            try:
                found = lease.open(reusable)
            except BaseException:
                lease.give_back()
                raise
            cache._hits += lease.reused
            cache._misses += lease.tokens - lease.reused
        return lease if found else None

    def close(self) -> None:
        with self._cache._lock:
            if not self._closed:
                self._closed = True
                self._leave(self._awaited + ([self._tree] if self._tree else []))

    def _open(self, width: int) -> Tree | None:
        """The tree, once the width of the content is known; None if there is none any more."""
        cache = self._cache
        with cache._lock:
            if self._closed or cache._store.closed:
                return None
            if self._tree is None:
                size, block_bytes = self._block_tokens, self._block_bytes
                digest = namespace_digest(self._namespace, size, block_bytes, width)
                self._tree = tree = cache._store.tree(Layout(digest, size, block_bytes, width))
                tree.users += 1
                tree.token_cost, tree.pair_cost = self._costs
                self._leave(self._awaited)
                self._awaited = []
                tier = cache._store.tier
                if tier is not None and not tier.fits(tree):
                    logger.warning(
                        "%s: a block of %d bytes does not fit into it; raise file_bytes",
                        tier.path,
                        block_bytes,
                    )
            return self._tree

    def _leave(self, trees: list[Tree]) -> None:
        """Uses some trees no more; those that nobody uses keep nothing in memory."""
        if self._cache._store.closed:
            return
        for tree in trees:
            tree.users -= 1
            if not tree.users:
                self._cache._cancel(tree=tree)
                self._cache._store.retire(tree)

    def _is_mine(self, tree: Tree) -> bool:
        layout = tree.layout
        sizes = (self._block_tokens, self._block_bytes)
        return layout.namespace == namespace_digest(self._namespace, *sizes, layout.width)
