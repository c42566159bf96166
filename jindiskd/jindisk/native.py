"""The loop over the blocks of a load or an export, compiled, where this installation has it.

What Python does around each call of a cipher costs more than the cipher. native.c has the loop, and Intel's ipsec-mb
the cipher. Loads and exports alone use it, which seal and open millions of blocks, and it is imported when they ask:
a guest's initrd is the same with it and without.
"""

from __future__ import annotations

import functools
import importlib
import os
import struct
from typing import Any, NamedTuple

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from jindiskd.jindisk.geometry import BLOCK, TAG_BYTES

RUN = struct.Struct("<QI")
"""A run of blocks: first number and count."""
MOST_AAD = 24
Buffer = bytes | bytearray | memoryview


class Blocks(NamedTuple):
    """Which blocks are sealed or opened, and with what."""

    keys: bytes
    """One for all, or one for each block, one behind the other."""
    key_bytes: int
    """16 or 32."""
    nonce: int | None
    """Of the first block, counted on from there, as `block_nonce` has it; None for zero nonces."""
    runs: Buffer
    """Their numbers, as `RUN`, one run behind the other: associated data, and where their plaintexts lie."""
    base: int
    """The number of the block that begins the buffer of plaintexts."""
    aad_bytes: int = 8
    """Associated data: the number of the block, and zeros behind it."""


class Native:
    """The compiled loop. Holds no keys: each call expands its own, and wipes them. Threads may share it."""

    __slots__ = ("_ffi", "_lib")

    def __init__(self, module: Any) -> None:
        """`module`: what `native_build` builds."""
        self._ffi, self._lib = module.ffi, module.lib

    def seal(self, blocks: Blocks, plain: Buffer, sealed: memoryview, tags: memoryview) -> int:
        """Seal blocks of 4096 bytes; how many.

        Args:
            blocks: which, and with what. The caller sees to it that no nonce comes twice under one key.
            plain: has the plaintexts.
            sealed: takes the ciphertexts, one behind the other.
            tags: takes the tags, 16 bytes each.

        Raises:
            ValueError: a block lies outside `plain`, or there is too little room, or not a key for each.
        """
        found, held = self._blocks(blocks)
        count = self._count(blocks, found, plain, min(len(sealed) // BLOCK, len(tags) // TAG_BYTES))
        take = self._ffi.from_buffer
        self._lib.seal(found, take(plain), take(sealed, require_writable=True), take(tags, require_writable=True))
        del held
        return count

    def unseal(self, blocks: Blocks, sealed: Buffer, tags: Buffer, plain: memoryview, *, tag_step: int) -> int:
        """Open blocks of 4096 bytes; how many of them before the first whose tag does not verify.

        Of that one nothing is left in `plain`, and the others behind it are not opened.

        Args:
            blocks: which, and with what.
            sealed: has the ciphertexts, one behind the other.
            tags: has the tags, each `tag_step` bytes behind the one before.
            plain: takes the plaintexts.
            tag_step: 16 or more.

        Raises:
            ValueError: as `seal`.
        """
        if tag_step < TAG_BYTES:
            raise ValueError(f"tags {tag_step} bytes apart")
        found, held = self._blocks(blocks)
        room = min(len(sealed) // BLOCK, (len(tags) + tag_step - TAG_BYTES) // tag_step)
        self._count(blocks, found, plain, room)
        take = self._ffi.from_buffer
        good: int = self._lib.unseal(found, take(sealed), take(tags), tag_step, take(plain, require_writable=True))
        del held
        return good

    def data_runs(self, plain: Buffer, base: int) -> bytes:
        """The runs of blocks of 4096 bytes that are not zero, as `RUN`; `base` is the first block's number."""
        count = len(plain) // BLOCK
        runs = bytearray((count + 1) // 2 * RUN.size)
        take = self._ffi.from_buffer
        found: int = self._lib.data_runs(take(plain), count, base, take(runs, require_writable=True))
        return bytes(runs[: found * RUN.size])

    def following(self, entries: Buffer, most: int, *, step: int) -> int:
        """How many entries, of `step` bytes, name raw blocks one behind the other, the first included; at most `most`.

        Raises:
            ValueError: they are shorter than the number of a raw block.
        """
        if step < 8:
            raise ValueError(f"entries of {step} bytes")
        found: int = self._lib.following(self._ffi.from_buffer(entries), step, min(most, len(entries) // step))
        return found

    def _blocks(self, blocks: Blocks) -> tuple[Any, object]:
        """What C needs, and what must live as long as that."""
        size = blocks.key_bytes
        if size not in (16, 32) or not blocks.keys or len(blocks.keys) % size:
            raise ValueError(f"keys of {len(blocks.keys)} bytes")
        if not 8 <= blocks.aad_bytes <= MOST_AAD or len(blocks.runs) % RUN.size:
            raise ValueError("a run that is cut off, or too much associated data")
        keys, runs = (self._ffi.from_buffer("uint8_t[]", part) for part in (blocks.keys, blocks.runs))
        step = size if len(blocks.keys) > size else 0
        counting = blocks.nonce is not None
        found = self._ffi.new(
            "blocks *",
            (size, step, keys, blocks.nonce or 0, counting, blocks.aad_bytes, runs, len(blocks.runs) // RUN.size,
             blocks.base),
        )  # fmt: skip
        return found, (keys, runs)

    def _count(self, blocks: Blocks, found: Any, plain: Buffer, room: int) -> int:
        if len(blocks.keys) > blocks.key_bytes:
            room = min(room, len(blocks.keys) // blocks.key_bytes)
        count: int = self._lib.count_blocks(found, len(plain) // BLOCK, room)
        if count > room:
            raise ValueError("a block outside the plaintexts, or more blocks than keys, ciphertexts or tags")
        return count


@functools.cache
def native() -> Native | None:
    """The compiled loop; None where it was not built, the processor lacks the instructions, or it does not agree.

    Before it is used it seals a block as `cryptography` does, and opens it: the library has other code for every
    generation of processors, and what is sealed wrongly is lost.
    """
    try:
        module = importlib.import_module("jindiskd.jindisk._native")
    except ImportError:
        return None
    if not module.lib.ready():
        return None
    found = Native(module)
    return found if _agrees(found) else None


def _agrees(found: Native) -> bool:
    for key_bytes in (16, 32):
        plain, number = os.urandom(BLOCK), int.from_bytes(os.urandom(7))
        blocks = Blocks(os.urandom(key_bytes), key_bytes, number, RUN.pack(number, 1), number)
        name = number.to_bytes(8, "little")
        right = memoryview(AESGCM(blocks.keys).encrypt(name + bytes(4), plain, name))
        sealed, opened = memoryview(bytearray(BLOCK + TAG_BYTES)), memoryview(bytearray(BLOCK))
        found.seal(blocks, plain, sealed[:BLOCK], sealed[BLOCK:])
        good = found.unseal(blocks, right, right[BLOCK:], opened, tag_step=TAG_BYTES)
        if sealed != right or not good or opened != plain:
            return False
    return True
