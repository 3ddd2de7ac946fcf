"""The chain of digests that blocks are found by.

Equal digests mean equal content from the first token on, in the same namespace, with the same salt.
The parts are told apart by ``person``, by lengths and by digests of a fixed size.
"""

from __future__ import annotations

import hashlib

DIGEST_BYTES = 32


def namespace_digest(
    namespace: bytes, block_tokens: int, block_bytes: int, width: int, layers: int = 1
) -> bytes:
    """What all digests of a tree begin with."""
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES, person=b"gr.kv.namespace")
    for number in (block_tokens, block_bytes, width, len(namespace)):
        digest.update(number.to_bytes(8, "little"))
    digest.update(namespace)
    if layers > 1:  # the length of what comes before is known
        digest.update(layers.to_bytes(8, "little"))
    return digest.digest()


def root_digest(namespace: bytes, salt: bytes) -> bytes:
    """What the first block of a sequence is chained to; ``namespace`` is a digest."""
    return hashlib.blake2b(
        namespace + salt, digest_size=DIGEST_BYTES, person=b"gr.kv.salt"
    ).digest()


def chain(parent: bytes, rows: bytes) -> bytes:
    """Digest of a block by its parent's digest and its tokens' content; the width is the tree's."""
    return hashlib.blake2b(parent + rows, digest_size=DIGEST_BYTES, person=b"gr.kv.block").digest()


def owner_digest(owner: str) -> bytes:
    """What stands for an owner, so that no user's id is kept; empty for nobody."""
    if not owner:
        return b""
    return hashlib.blake2b(owner.encode(), digest_size=16, person=b"gr.kv.owner").digest()
