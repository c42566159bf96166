"""Helpers of the JinDisk 1 tests: recorded volumes, a sparse device in memory, pattern blocks."""

import hashlib
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jindiskd.base.secret import Secret
from jindiskd.jindisk.device import FileDevice, OpenFile

BLOCK = 4096
KEY = bytes(range(0x50, 0x50 + 28))
WORD = (1 << 64) - 1


def key() -> Secret:
    return Secret(KEY)


class Vector:
    """A volume written by the reference module."""

    def __init__(self, path: Path, entry: dict[str, Any]) -> None:
        self.path, self.entry = path, entry

    def key(self) -> Secret:
        return Secret(bytes.fromhex(self.entry["key"] + self.entry["iv"]))

    @contextmanager
    def device(self) -> Iterator[FileDevice]:
        with OpenFile(self.path, writable=False) as opened:
            yield opened


class SparseDevice:
    """A device in memory that takes no room for zeros. Remembers its writes, for crash tests."""

    name = "memory"

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self.blocks: dict[int, bytes] = {}
        self.log: list[tuple[int, bytes] | None] | None = None
        """Writes by offset; None for a flush."""
        self.written = 0

    def pread(self, offset: int, length: int) -> bytes:
        if offset < 0 or offset + length > self.size_bytes:
            raise OSError(5, "outside the device")
        first, end = offset // BLOCK, -(-(offset + length) // BLOCK)
        data = b"".join(self.blocks.get(n, bytes(BLOCK)) for n in range(first, end))
        return data[offset - first * BLOCK :][:length]

    def pwrite(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        data = bytes(data)
        if offset < 0 or offset + len(data) > self.size_bytes:
            raise OSError(5, "outside the device")
        if self.log is not None:
            self.log.append((offset, data))
        self.written += len(data)
        self.apply(offset, data)

    def apply(self, offset: int, data: bytes) -> None:
        at = 0
        while at < len(data):
            number, start = divmod(offset + at, BLOCK)
            part = data[at : at + BLOCK - start]
            if len(part) < BLOCK:
                old = self.blocks.get(number, bytes(BLOCK))
                whole = old[:start] + part + old[start + len(part) :]
            else:
                whole = part
            self.blocks[number] = whole
            at += len(part)

    def flush(self) -> None:
        if self.log is not None:
            self.log.append(None)

    def discard(self, offset: int, length: int) -> None:
        """Nothing to do."""

    def copy(self) -> "SparseDevice":
        other = SparseDevice(self.size_bytes)
        other.blocks = dict(self.blocks)
        return other


def _mix(z: int) -> int:
    z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) & WORD
    z = ((z ^ z >> 27) * 0x94D049BB133111EB) & WORD
    return z ^ z >> 31


def _sm(x: int) -> int:
    return _mix((x + 0x9E3779B97F4A7C15) & WORD)


def recorded_pattern(seed: int, lba: int, generation: int) -> bytes:
    """A block of the recorded volumes, as their README defines it."""
    state, words = _sm(_sm(_sm(seed) ^ lba) ^ generation), []
    for _ in range(512):
        state = (state + 0x9E3779B97F4A7C15) & WORD
        words.append(_mix(state))
    return struct.pack("<512Q", *words)


def pattern(lba: int, generation: int) -> bytes:
    """A block of ours, cheap to make."""
    return hashlib.shake_128(struct.pack("<QQ", lba, generation)).digest(64) * 64
