"""Where the randomness of a build comes from: the operating system, or one seed for all of it."""

from __future__ import annotations

import hashlib
import secrets
import uuid
from collections.abc import Callable

Rng = Callable[[int], bytes]
"""`rng(n)` gives n random bytes."""


def system(length: int) -> bytes:
    """Random bytes from the operating system."""
    return secrets.token_bytes(length)


def seeded(seed: bytes, purpose: str) -> Rng:
    """A stream of bytes that follows from the seed and the purpose alone; streams of other purposes are unrelated.

    Request number i for n bytes gets SHAKE-256 over a label, the lengths and values of purpose and seed, i and n.
    Whoever knows the seed knows every key made with it: for tests and for showing that a build can be repeated.
    """
    prefix = b"jindiskd image build 1\0" + b"".join(
        len(part).to_bytes(8, "big") + part for part in (purpose.encode(), seed)
    )
    count = 0

    def rng(length: int) -> bytes:
        nonlocal count
        count += 1
        request = prefix + count.to_bytes(8, "big") + length.to_bytes(8, "big")
        return hashlib.shake_256(request).digest(length)

    return rng


def stream(seed: bytes | None, purpose: str) -> Rng:
    """The system's randomness, or with a seed the stream for `purpose`."""
    return system if seed is None else seeded(seed, purpose)


def new_uuid(rng: Rng) -> str:
    """A random UUID (version 4) in lower case."""
    return str(uuid.UUID(bytes=rng(16), version=4))
