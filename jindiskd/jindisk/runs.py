"""Room for a run of sealed blocks: each ciphertext with its tag behind it, and the numbers that go with it.

The cipher is called once a block, so what Python does around each call is most of the cost. Here all that a call needs
is cut to size once, used again and again, and numbered for a whole run at a time: then one loop in C goes over it. New
memory for every run would cost more than the cipher.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Sequence

from jindiskd.jindisk.geometry import BLOCK, ENTRY_BYTES, Kind

TAG_BYTES = 16
NONCE_BYTES = 12
_ENTRY = ENTRY_BYTES[Kind.F]
STRIDE = BLOCK + TAG_BYTES
_WORDS, _TAG_WORD = STRIDE // 8, BLOCK // 8


@functools.cache
def _nonces(count: int) -> struct.Struct:
    return struct.Struct("<" + "Q4x" * count)


@functools.cache
def _numbers(count: int) -> struct.Struct:
    return struct.Struct(f"<{count}Q")


@functools.cache
def _entries(count: int) -> struct.Struct:
    return struct.Struct(f"{_ENTRY}s" * count)


def packed_entries(first: int, tags: bytes) -> bytearray:
    """Entries of tree F, 24 bytes each, for consecutive raw blocks from `first` on with these tags."""
    count = len(tags) // TAG_BYTES
    packed = bytearray(_ENTRY * count)
    places = memoryview(_numbers(count).pack(*range(first, first + count))).cast("Q")
    halves = memoryview(tags).cast("Q")
    # Words are only copied, here and below, so the machine's byte order does not matter.
    with memoryview(packed) as whole, whole.cast("Q") as words:
        words[0::3], words[1::3], words[2::3] = places, halves[0::2], halves[1::2]
    return packed


def entries_of(first: int, tags: bytes) -> tuple[bytes, ...]:
    """As `packed_entries`, one by one."""
    return _entries(len(tags) // TAG_BYTES).unpack(packed_entries(first, tags))


class SealedRun:
    """Room for some blocks. Not thread-safe."""

    __slots__ = ("_aads", "_nonces", "_words", "aads", "blocks", "nonces", "places")

    def __init__(self, blocks: int) -> None:
        """Take memory for so many."""
        room = memoryview(bytearray(blocks * STRIDE))
        self._words = room.cast("Q")
        self._nonces, self._aads = memoryview(bytearray(blocks * NONCE_BYTES)), memoryview(bytearray(blocks * 8))
        self.places = [room[at : at + STRIDE] for at in range(0, len(room), STRIDE)]
        """4112 bytes of each block: ciphertext and tag."""
        self.blocks = [place[:BLOCK] for place in self.places]
        """The ciphertexts alone."""
        self.nonces = [self._nonces[at : at + NONCE_BYTES] for at in range(0, len(self._nonces), NONCE_BYTES)]
        self.aads = [self._aads[at : at + 8] for at in range(0, len(self._aads), 8)]

    def __len__(self) -> int:
        return len(self.places)

    def number(self, first: int, lbas: Sequence[int]) -> None:
        """Set nonces and associated data: of consecutive raw blocks from `first` on, holding these logical blocks."""
        count = len(lbas)
        if count > len(self.places):
            raise ValueError("more blocks than there is room for")
        _nonces(count).pack_into(self._nonces, 0, *range(first, first + count))
        _numbers(count).pack_into(self._aads, 0, *lbas)

    def tags(self, count: int) -> bytes:
        """The tags of the first blocks, 16 bytes each."""
        tags = bytearray(count * TAG_BYTES)
        with memoryview(tags) as view, view.cast("Q") as words:
            words[0::2] = self._words[_TAG_WORD : count * _WORDS : _WORDS]
            words[1::2] = self._words[_TAG_WORD + 1 : count * _WORDS : _WORDS]
        return bytes(tags)

    def put_tags(self, first_halves: memoryview, second_halves: memoryview) -> None:
        """Put tags behind the first blocks, given as views of 8-byte words."""
        end = len(first_halves) * _WORDS
        self._words[_TAG_WORD:end:_WORDS] = first_halves
        self._words[_TAG_WORD + 1 : end : _WORDS] = second_halves
