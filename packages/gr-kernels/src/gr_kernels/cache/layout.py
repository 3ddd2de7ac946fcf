"""How blocks are laid out, and what their namespace is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Layout:
    """What all blocks of a tree have in common."""

    namespace: bytes
    """Digest of the namespace and of the sizes below."""
    block_tokens: int
    block_bytes: int
    """K and V of a block's tokens."""
    width: int
    """Bytes of a token's content."""
    layers: int = 1
    """Parts of a block, of equal size, in the order in which they are needed."""

    @property
    def rows_bytes(self) -> int:
        """Content of a block's tokens."""
        return self.block_tokens * self.width
