"""Who has which places, and who must make room: the same rules for memory and what is behind.

Each tree has a share of slabs. When nothing is free, it evicts its own least valuable block, or
takes the least valuable slab of another tree where all of that is worth less.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Collection, Iterator
from itertools import count
from math import inf
from typing import Any, Generic, Protocol

from gr_kernels.cache.arena import Place, PlaceT, Slab
from gr_kernels.cache.tree import Node, Tree


class Queue:
    """Nodes that may be evicted, least valuable first. O(log n), amortised."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Node]] = []
        self._current: dict[Node, int] = {}
        self._numbers = count()

    def add(self, node: Node) -> None:
        if node in self._current:
            return
        self._push(node)
        if len(self._heap) > 2 * len(self._current) + 64:
            self._heap = [entry for entry in self._heap if self._current.get(entry[2]) == entry[1]]
            heapq.heapify(self._heap)

    def discard(self, node: Node) -> None:
        self._current.pop(node, None)

    def peek(self) -> Node | None:
        while self._heap:
            priority, number, node = self._heap[0]
            if self._current.get(node) != number:
                heapq.heappop(self._heap)
            elif node.priority > priority:  # it was used since
                heapq.heappop(self._heap)
                self._push(node)
            else:
                return node
        return None

    def pop(self) -> Node | None:
        node = self.peek()
        if node is not None:
            self.discard(node)
        return node

    def _push(self, node: Node) -> None:
        number = next(self._numbers)
        self._current[node] = number
        heapq.heappush(self._heap, (node.priority, number, node))

    def __contains__(self, node: Node) -> bool:
        return node in self._current

    def __iter__(self) -> Iterator[Node]:
        return iter(self._current)


class SlabSource(Protocol):
    """Where slabs come from: the arena, or the tier behind it."""

    def slab_for(self, tree: Tree) -> Slab | None: ...

    def full(self, tree: Tree) -> bool:
        """Whether a slab could be had if others gave theirs back."""
        ...

    def give_back(self, slab: Any) -> None: ...


class Share(Generic[PlaceT]):
    """What one tree has of a pool."""

    def __init__(self) -> None:
        self.slabs: list[Slab] = []
        self.free: list[PlaceT] = []
        self.queue = Queue()
        self.places = 0
        self.since_comparison = 0
        """Evictions since other trees' slabs were looked at."""

    @property
    def used(self) -> int:
        return self.places - len(self.free)


class Pool(Generic[PlaceT]):
    """Places of all trees. ``vacate`` empties a node's place, with what must go before it."""

    def __init__(
        self,
        source: SlabSource,
        vacate: Callable[[Node], None],
        held: Callable[[], Callable[[Slab], bool]],
    ) -> None:
        self._source = source
        self._vacate = vacate
        self._held = held
        self.shares: dict[Tree, Share[PlaceT]] = {}

    def join(self, tree: Tree) -> Share[PlaceT]:
        return self.shares.setdefault(tree, Share())

    def adopt(self, tree: Tree, slab: Slab, taken: Collection[Place] = ()) -> None:
        """Adds a slab to a tree's share; places that are not ``taken`` are free."""
        share = self.join(tree)
        share.slabs.append(slab)
        share.places += len(slab.places)
        # Taken from the end: the first places first.
        share.free += [p for p in reversed(slab.places) if p not in taken]  # type: ignore[misc]

    def place(self, tree: Tree) -> PlaceT | None:
        """A free place, evicting what nobody holds; None if all of that is not enough."""
        share = self.shares[tree]
        while not share.free:
            slab = self._source.slab_for(tree)
            if slab is not None:
                self.adopt(tree, slab)
                continue
            full = self._source.full(tree)
            if full and self._take_slab(share, inf, idle=True):
                continue
            node = share.queue.peek()
            # Looking at all slabs once in as many evictions as a slab has places costs little.
            if node is not None and share.since_comparison * len(share.slabs) >= share.places:
                share.since_comparison = 0
                if full and self._take_slab(share, node.priority):
                    continue
            if node is not None:
                share.since_comparison += 1
                share.queue.discard(node)
                self._vacate(node)
            elif not (full and self._take_slab(share, inf)):
                return None
        return share.free.pop()

    def free(self, tree: Tree, place: PlaceT) -> None:
        place.node = None
        place.leased = False
        self.shares[tree].free.append(place)

    def shrink(self, tree: Tree) -> None:
        """Gives back the slabs of a tree in which nothing is."""
        share = self.shares[tree]
        for slab in list(share.slabs):
            if not any(place.node or place.leased for place in slab.places):
                self._give_back(share, slab)

    def _take_slab(self, share: Share[PlaceT], limit: float, *, idle: bool = False) -> bool:
        """Gives back another tree's least valuable slab of a value below ``limit``.

        With ``idle``, only of trees that no space uses any more.
        """
        others = [
            other
            for tree, other in self.shares.items()
            if other is not share and other.slabs and not (idle and tree.users)
        ]
        if not others:
            return False
        held = self._held()
        least, found = limit, None
        for other in others:
            for slab in other.slabs:
                value = max((p.node.priority for p in slab.places if p.node), default=-1.0)
                if value < least and not held(slab):
                    least, found = value, (other, slab)
        if found is None:
            return False
        other, slab = found
        for place in slab.places:
            if place.node is not None:
                self._vacate(place.node)
            assert place.node is None
        self._give_back(other, slab)
        return True

    def _give_back(self, share: Share[PlaceT], slab: Slab) -> None:
        share.slabs.remove(slab)
        share.places -= len(slab.places)
        share.free = [place for place in share.free if place.slab is not slab]
        self._source.give_back(slab)
