"""Room for runs of blocks that are sealed or opened, and the numbers that go with them.

The cipher is called once a block, so what Python does around each call is most of the cost. Here all that a call needs
is cut to size once, used again and again, and numbered for a whole run at a time: then one loop in C goes over it. New
memory for every run would cost more than the cipher. Where there is a compiled loop (`native`), loads and exports have
that do it.
"""

from __future__ import annotations

import functools
import mmap
import struct
from collections import deque
from collections.abc import Iterable, Sequence

from jindiskd.jindisk.geometry import BLOCK, ENTRY_BYTES, TAG_BYTES, Kind
from jindiskd.jindisk.native import Blocks, Native

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


class _Run:
    """The numbers of a run of blocks."""

    __slots__ = ("_aads", "_nonces", "aads", "nonces", "places")

    def __init__(self, places: list[memoryview]) -> None:
        """`places`: 4112 bytes for each block, ciphertext and tag."""
        self.places = places
        self._nonces, self._aads = (
            memoryview(bytearray(len(places) * NONCE_BYTES)),
            memoryview(bytearray(len(places) * 8)),
        )
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


class SealingRun(_Run):
    """Room for blocks that are sealed: ciphertexts one behind the other, as they are written; tags apart.

    The cipher puts a tag behind its ciphertext, where the next one begins: blocks are sealed in order, and each tag is
    set aside before the next. Not thread-safe.
    """

    __slots__ = ("_ends", "_room", "_tags", "_tags_room")

    def __init__(self, blocks: int) -> None:
        """Take memory for so many; its start is that of a page."""
        self._room = page_memory(blocks * BLOCK + TAG_BYTES)
        super().__init__([self._room[at : at + STRIDE] for at in range(0, blocks * BLOCK, BLOCK)])
        self._ends = [place[BLOCK:] for place in self.places]
        self._tags_room = memoryview(bytearray(blocks * TAG_BYTES))
        self._tags = [self._tags_room[at : at + TAG_BYTES] for at in range(0, len(self._tags_room), TAG_BYTES)]

    def take(self, sealed: Iterable[int]) -> None:
        """Draw from an iterator that seals one block after the other into `places`, each time it is drawn from."""
        # All in C: each slice is 4112 long, which takes the 16 bytes of a tag whole.
        deque(map(memoryview.__setitem__, self._tags, map(slice, sealed), self._ends), maxlen=0)

    def seal(self, native: Native, blocks: Blocks, plain: memoryview) -> int:
        """Seal blocks by the compiled loop; how many."""
        return native.seal(blocks, plain, self._room, self._tags_room)

    def data(self, count: int) -> memoryview:
        """The ciphertexts of the first blocks, until the next are sealed."""
        return self._room[: count * BLOCK]

    def tags(self, count: int) -> bytes:
        """The tags of the first blocks, 16 bytes each."""
        return bytes(self._tags_room[: count * TAG_BYTES])


class OpeningRun(_Run):
    """Room for blocks that are opened: each ciphertext with its tag behind it. Not thread-safe."""

    __slots__ = ("_words", "blocks")

    def __init__(self, blocks: int) -> None:
        """Take memory for so many."""
        room = memoryview(bytearray(blocks * STRIDE))
        self._words = room.cast("Q")
        super().__init__([room[at : at + STRIDE] for at in range(0, len(room), STRIDE)])
        self.blocks = [place[:BLOCK] for place in self.places]
        """The ciphertexts alone."""

    def put_tags(self, first_halves: memoryview, second_halves: memoryview) -> None:
        """Put tags behind the first blocks, given as views of 8-byte words."""
        end = len(first_halves) * _WORDS
        self._words[_TAG_WORD:end:_WORDS] = first_halves
        self._words[_TAG_WORD + 1 : end : _WORDS] = second_halves


def page_memory(size: int) -> memoryview:
    """Zeroed memory of this process alone, beginning at a page, as direct I/O needs it."""
    return memoryview(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
