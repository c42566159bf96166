"""The anti-forensic splitter of LUKS: spreads a key over many stripes, all of which are needed to get it back.

Source: "LUKS1 On-Disk Format Specification", version 1.2.3, section 2.4, with SHA-256. Standard library only.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

_BLOCK = hashlib.sha256().digest_size


def _diffuse(block: bytes) -> bytes:
    """Hash each 32-byte part with its big-endian number in front, so that each bit depends on its whole part."""
    return b"".join(
        hashlib.sha256(index.to_bytes(4, "big") + block[start : start + _BLOCK]).digest()[: len(block) - start]
        for index, start in enumerate(range(0, len(block), _BLOCK))
    )


def _xor(left: bytes, right: bytes) -> bytes:
    return (int.from_bytes(left, "big") ^ int.from_bytes(right, "big")).to_bytes(len(left), "big")


def split(key: bytes | bytearray, stripes: int, rng: Callable[[int], bytes]) -> bytes:
    """`key` spread over `stripes` stripes of its own length; `rng(n)` gives n random bytes."""
    noise = rng(len(key) * (stripes - 1))
    state = bytes(len(key))
    for start in range(0, len(noise), len(key)):
        state = _diffuse(_xor(state, noise[start : start + len(key)]))
    return noise + _xor(state, bytes(key))


def merge(material: bytes, key_bytes: int) -> bytearray:
    """The key of `key_bytes` bytes that `split` spread over `material`."""
    state = bytes(key_bytes)
    last = len(material) - key_bytes
    for start in range(0, last, key_bytes):
        state = _diffuse(_xor(state, material[start : start + key_bytes]))
    return bytearray(_xor(state, material[last:]))
