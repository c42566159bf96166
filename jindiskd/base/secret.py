"""A secret in memory that cannot be printed, compared carelessly or pickled. Standard library only."""

from __future__ import annotations

import hmac
import secrets as _random
from typing import NoReturn, Self


class Secret:
    """Secret bytes in a buffer of their own, wiped by `close()` or at the end of a `with` block.

    `repr` shows the length alone, equality takes constant time. What `reveal()` returns is the buffer
    itself: keep the time between revealing and use short. Libraries may copy what they are given.
    """

    __slots__ = ("_buffer",)

    def __init__(self, data: bytes | bytearray | memoryview) -> None:
        """Copy `data`; a bytearray given is wiped, so that one copy is left."""
        self._buffer = bytearray(data)
        if isinstance(data, bytearray):
            data[:] = bytes(len(data))

    @classmethod
    def random(cls, length: int) -> Secret:
        """`length` bytes from the operating system's generator."""
        return cls(bytearray(_random.token_bytes(length)))

    def reveal(self) -> bytearray:
        """The bytes themselves, not a copy."""
        return self._buffer

    def close(self) -> None:
        """Overwrite the bytes with zeros and forget them."""
        self._buffer[:] = bytes(len(self._buffer))
        self._buffer = bytearray()

    def __len__(self) -> int:
        return len(self._buffer)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and hmac.compare_digest(self._buffer, other._buffer)

    __hash__ = None  # type: ignore[assignment]  # a secret is no dictionary key

    def __repr__(self) -> str:
        return f"Secret({len(self._buffer)} bytes)"

    __str__ = __repr__

    def __reduce__(self) -> NoReturn:
        raise TypeError("a secret cannot be pickled")
