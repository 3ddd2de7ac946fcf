"""Which tokens a block holds: a tree of blocks, found by a chain of digests.

A node is a block of tokens after all blocks of its ancestors. Its digest is one of its parent's
digest and its own tokens' content, so equal digests mean equal content from the first token on.
Only leaves hold fewer tokens than a block has.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from gr_core.contracts import Rates
from gr_kernels.cache.arena import Block, Place
from gr_kernels.cache.layout import Layout

ANYONE = b""
"""The mark of blocks that belong to nobody in particular."""
MAX_MARKS = 8
"""Owners that a block is kept for by name; of one with more, nobody is the owner."""
SCANNED = 16
"""Blocks with the same first token whose further tokens are compared, newest first."""
_MAX_HITS = 16


class Node:
    """Tokens ``start`` to ``start + tokens - 1`` of all sequences that begin as its path does."""

    __slots__ = (
        "block",
        "children",
        "count",
        "digest",
        "first",
        "hits",
        "in_memory",
        "marks",
        "parent",
        "pins",
        "priority",
        "rows",
        "slot",
        "start",
        "tokens",
        "tree",
        "writer",
    )

    def __init__(
        self, tree: Tree, parent: Node | None, digest: bytes, first: bytes, start: int, tokens: int
    ) -> None:
        self.tree = tree
        self.parent = parent
        self.digest = digest
        self.first = first
        """Content of its first token."""
        self.start = start
        self.tokens = tokens
        self.rows: bytes | None = None
        """Content of its tokens, (tokens, width); None where only the tier behind has it."""
        self.children: dict[bytes, dict[Node, None]] = {}
        """By their first token, oldest first."""
        self.count = 0
        """Children."""
        self.in_memory = 0
        """Children that have a block."""
        self.block: Block | None = None
        self.slot: Place | None = None
        """Its place in the tier behind the memory."""
        self.pins = 0
        """Leases whose last block in the tree it is; they hold its ancestors by that."""
        self.writer: object | None = None
        """The lease that may write tokens behind those that it has."""
        self.hits = 1
        self.priority = 0.0
        self.marks: set[bytes] = set()
        """Owners of sequences that ended here, or further on in blocks that are gone."""

    @property
    def is_root(self) -> bool:
        return self.parent is None

    def descendants(self) -> list[Node]:
        """It and all below it, parents before children."""
        found = [self]
        for node in found:
            for bucket in node.children.values():
                found += bucket
        return found


class Tree:
    """The nodes of one namespace and layout. Roots stand for salts and hold no tokens."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.users = 0
        """Open spaces."""
        self.token_cost = self.pair_cost = 0.0
        self.rates: Rates | None = None
        """None: whatever can be loaded is."""
        self.index: dict[bytes, Node] = {}
        self.roots: dict[bytes, Node] = {}

    def root(self, digest: bytes) -> Node:
        root = self.roots.get(digest)
        if root is None:
            root = self.roots[digest] = Node(self, None, digest, b"", 0, 0)
        return root

    def add(self, parent: Node, digest: bytes, first: bytes, tokens: int) -> Node:
        assert digest not in self.index
        start = parent.start + parent.tokens
        assert start % self.layout.block_tokens == 0
        node = Node(self, parent, digest, first, start, tokens)
        self.index[digest] = node
        parent.children.setdefault(first, {})[node] = None
        parent.count += 1
        return node

    def remove(self, node: Node) -> None:
        """Takes a leaf out."""
        parent = node.parent
        assert parent is not None
        assert not node.count
        assert not node.pins
        del self.index[node.digest]
        bucket = parent.children[node.first]
        del bucket[node]
        if not bucket:
            del parent.children[node.first]
        parent.count -= 1

    def extend(self, node: Node, digest: bytes, rows: bytes) -> None:
        """A leaf has more tokens now."""
        assert digest not in self.index
        del self.index[node.digest]
        node.digest, node.rows, node.tokens = digest, rows, len(rows) // self.layout.width
        self.index[digest] = node

    def alike(self, parent: Node, first: bytes) -> Iterator[Node]:
        """Children that begin with a token: some of the newest."""
        return islice(reversed(parent.children.get(first, {})), SCANNED)

    def cost(self, start: int, tokens: int) -> float:
        """Of computing some tokens anew, in the unit of the space."""
        positions = tokens * start + tokens * (tokens - 1) / 2
        return tokens * self.token_cost + positions * self.pair_cost

    def touch(self, node: Node, clock: float) -> None:
        """Values a node by GreedyDual-Size-Frequency: clock + hits · cost / size.

        Cost is that of recomputing its tokens; the clock is the value of what was last evicted, so
        what is not used grows old. The hits are capped, so that it does not take forever.
        Cherkasova, "Improving WWW Proxies Performance with Greedy-Dual-Size-Frequency Caching
        Policy", HPL-98-69R1, 1998; Cao and Irani, "Cost-Aware WWW Proxy Caching Algorithms", 1997.
        """
        cost = self.cost(node.start, node.tokens)
        node.priority = clock + node.hits * cost / self.layout.block_bytes
        if node.hits < _MAX_HITS:
            node.hits += 1
