"""Which blocks of a JinDisk 1 volume are in use, and how SVT, DST and RIT are kept (`docs/formats/jindisk1.md`, 10).

A block is in use as long as any record of an index file on the disk names it, covered ones included: the module gives
the block of a covered record back when it merges, so it must not be another's by then. What is in memory is exact; what
is on the disk errs towards more in use, as the module's own does.
"""

from __future__ import annotations

import struct
from array import array
from collections import deque

from jindiskd.jindisk.device import Device
from jindiskd.jindisk.errors import VolumeCrowded
from jindiskd.jindisk.v1.layout import BLOCK, DST_PER_BLOCK, NONE, RIT_PER_BLOCK, SECTOR_BYTES, SEGMENT_BLOCKS, Layout
from jindiskd.jindisk.v1.tables import (
    BITMAP_BYTES,
    EMPTY_ENTRY,
    FULL_BITMAP,
    FULL_ENTRY,
    dst_block,
    dst_entry,
    must_pad,
)

SPARE_FREE = 64
"""Segments that are left free for the module where others have holes, on volumes where it does not collect."""
PAD_MARGIN = 64
"""Padding begins so many segments early: more than a commit allocates, so that no crash falls in between."""
_WORD = struct.Struct("<Q")


class Space:
    """Blocks in use, by segment, and what of the tables is to be written."""

    def __init__(self, layout: Layout, svt: bytes, *, table_segments: int) -> None:
        """Nothing is in use yet.

        Args:
            layout: of the volume.
            svt: copy 0 as it is on the disk, whole blocks.
            table_segments: N as the module will have it, for its collection's threshold.
        """
        self.layout, self._table_segments = layout, table_segments
        self.bits = bytearray(layout.segments * BITMAP_BYTES)
        self.counts = array("H", bytes(2 * layout.segments))
        self.used = 0
        self.svt = bytearray(svt)
        self.reverse: dict[int, int] = {}
        """RIT entries to be written."""
        self._touched: set[int] = set()
        self._dirty: set[int] = set()
        self._emptied: set[int] = set()
        self._room: deque[int] = deque()
        self._free: deque[int] = deque()
        self._holes: list[int] = []
        self._pads = self._padding()

    # Filling in, before use

    def enter(self, segment: int, bitmap: bytes) -> None:
        """Say which blocks of a segment are in use."""
        self.bits[segment * BITMAP_BYTES : (segment + 1) * BITMAP_BYTES] = bitmap
        self.counts[segment] = int.from_bytes(bitmap, "little").bit_count()
        self.used += self.counts[segment]

    def compare(self, device: Device) -> None:
        """Note where SVT and DST on the disk differ from what is in use. Raises `OSError`."""
        layout = self.layout
        self._free = deque(segment for segment in range(layout.segments) if not self.counts[segment])
        for segment in range(layout.segments):
            if bool(self.counts[segment]) != self._allocated(segment):
                self._touched.add(segment)
        for number in range(layout.dst_blocks):
            found = device.pread((layout.dst_start + number) * BLOCK, BLOCK)
            if found != dst_block(self._entry, layout, number):
                self._dirty.add(number)

    # Taking and giving

    @property
    def free_blocks(self) -> int:
        """Blocks not in use."""
        return self.layout.data_blocks - self.used

    def take(self, count: int) -> list[int]:
        """So many free blocks, neighbours where possible.

        Raises:
            VolumeCrowded: there are not so many; none is taken.
        """
        if count > self.free_blocks:
            raise VolumeCrowded(0)
        taken: list[int] = []
        while len(taken) < count:
            if not self._room:
                self._room.extend(self._next_segment())
            position = self._room.popleft()
            self.bits[position >> 3] |= 1 << (position & 7)
            self._change(position // SEGMENT_BLOCKS, 1)
            taken.append(position)
        return taken

    def give(self, position: int) -> None:
        """A block is not in use any more."""
        bit = 1 << (position & 7)
        assert self.bits[position >> 3] & bit, "blocks are given back once"
        self.bits[position >> 3] &= ~bit
        segment = position // SEGMENT_BLOCKS
        self._change(segment, -1)
        if not self.counts[segment]:
            self._free.append(segment)

    def _change(self, segment: int, by: int) -> None:
        self.counts[segment] += by
        self.used += by
        self._touched.add(segment)

    def _next_segment(self) -> list[int]:
        """Free blocks of the segment to fill next: a free one, or holes where free ones are getting few."""
        layout = self.layout
        n = self._table_segments
        spread = n - 320 - PAD_MARGIN if n >= 320 else layout.segments - SPARE_FREE
        while self._free and layout.segments - len(self._free) < spread:
            if found := self._vacant(self._free.popleft()):
                return found
        if not self._holes:
            partly = [s for s in range(layout.segments) if 0 < self.counts[s] < SEGMENT_BLOCKS]
            self._holes = sorted(partly, key=lambda s: -self.counts[s])
        while self._holes:
            if found := self._vacant(self._holes.pop()):
                return found
        while self._free:
            if found := self._vacant(self._free.popleft()):
                return found
        # What became free since: by the caller's count there is some.
        return [at for s in range(layout.segments) if self.counts[s] < SEGMENT_BLOCKS for at in self._vacant(s)]

    def _vacant(self, segment: int) -> list[int]:
        start = segment * SEGMENT_BLOCKS
        if not self.counts[segment]:
            return list(range(start, start + SEGMENT_BLOCKS))
        bits = self.bits
        return [at for at in range(start, start + SEGMENT_BLOCKS) if not bits[at >> 3] >> (at & 7) & 1]

    # The tables

    def _allocated(self, segment: int) -> bool:
        return bool(self.svt[segment >> 3] >> (segment & 7) & 1)

    def _padding(self) -> bool:
        allocated = int.from_bytes(self.svt, "little").bit_count()
        counts = {self._table_segments, self.layout.logical_segments}  # whichever the module will be told
        return any(must_pad(n, allocated + PAD_MARGIN) for n in counts)

    def _entry(self, segment: int) -> bytes:
        count = self.counts[segment]
        if not count:
            return EMPTY_ENTRY
        if self._pads or count == SEGMENT_BLOCKS:
            return FULL_ENTRY
        return dst_entry(self.bits[segment * BITMAP_BYTES : (segment + 1) * BITMAP_BYTES])

    @property
    def changed(self) -> bool:
        """Whether tables are to be written."""
        return bool(self._touched or self._dirty or self.reverse or self._emptied)

    def write_allocation(self, device: Device) -> None:
        """SVT: set what is in use; clear what was written as empty before. Comes before `write_use`, with a barrier.

        A DST entry must be zero wherever the SVT bit is clear, or the module cannot allocate the segment.
        """
        sectors = set()
        for segment in self._touched | self._emptied:
            wanted = bool(self.counts[segment])
            if wanted == self._allocated(segment) or (not wanted and segment not in self._emptied):
                continue
            self.svt[segment >> 3] ^= 1 << (segment & 7)
            sectors.add((segment >> 3) // SECTOR_BYTES)
        for sector in sectors:
            part = self.svt[sector * SECTOR_BYTES : (sector + 1) * SECTOR_BYTES]
            device.pwrite(self.layout.svt_start * BLOCK + sector * SECTOR_BYTES, part)
        self._emptied.clear()
        pads = self._padding()
        if pads != self._pads:
            self._pads = pads
            partly = (s for s in range(self.layout.segments) if 0 < self.counts[s] < SEGMENT_BLOCKS)
            self._dirty.update(s // DST_PER_BLOCK for s in partly)

    def write_use(self, device: Device) -> None:
        """DST and RIT. What they say is in use includes all that any index on the disk names."""
        layout = self.layout
        for number in sorted(self._dirty | {segment // DST_PER_BLOCK for segment in self._touched}):
            device.pwrite((layout.dst_start + number) * BLOCK, dst_block(self._entry, layout, number))
        self._emptied.update(s for s in self._touched if not self.counts[s] and self._allocated(s))
        blocks: dict[int, list[int]] = {}
        for position in self.reverse:
            blocks.setdefault(position // RIT_PER_BLOCK, []).append(position)
        for number in sorted(blocks):
            at = (layout.rit_start + number) * BLOCK
            block = bytearray(BLOCK if len(blocks[number]) == RIT_PER_BLOCK else device.pread(at, BLOCK))
            for position in blocks[number]:
                _WORD.pack_into(block, position % RIT_PER_BLOCK * 8, self.reverse[position])
            device.pwrite(at, block)
        self._touched.clear()
        self._dirty.clear()
        self.reverse.clear()

    def owner(self, device: Device, position: int) -> int:
        """The LBA that RIT has for a block, `NONE` after it was given back. Raises `OSError`."""
        known = self.reverse.get(position)
        if known is not None:
            return known
        return int(_WORD.unpack(device.pread(self.layout.rit_start * BLOCK + position * 8, 8))[0])

    def release(self, position: int) -> None:
        """Give back a block that no index on the disk names any more."""
        self.give(position)
        self.reverse[position] = NONE


assert len(FULL_BITMAP) == BITMAP_BYTES, "a bitmap of a segment"
