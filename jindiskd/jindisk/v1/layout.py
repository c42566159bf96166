"""Where the parts of a JinDisk 1 volume lie (`docs/formats/jindisk1.md`, section 2). All of it follows from one number.

The format protects nothing against whoever holds the disk; see the package.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from jindiskd.errors import InvalidArgument

BLOCK = 4096
SECTOR_BYTES = 512
SEGMENT_BLOCKS = 1024
SEGMENT_BYTES = BLOCK * SEGMENT_BLOCKS
SEGMENT_SECTORS = SEGMENT_BYTES // SECTOR_BYTES
RESERVE_SEGMENTS = 320
MAX_SEGMENTS = 524_288
"""S of the largest volume: beyond, the module cannot allocate an array."""
FILE_RECORDS = 131_072
"""Records in an index file, at most."""
LEAF_BYTES = 5665
INNER_BYTES = 441
LEAF_RECORDS = 128
INNER_CHILDREN = 32
SLOT_BYTES = 33 * INNER_BYTES + 1024 * LEAF_BYTES
INDEX_START = 1
JOURNAL_BLOCKS = 16_384
DST_ENTRY = 136
DST_PER_BLOCK = BLOCK // DST_ENTRY
RIT_PER_BLOCK = BLOCK // 8
BITC_ENTRY = 88
BITC_PER_BLOCK = BLOCK // BITC_ENTRY
NONE = (1 << 64) - 1
"""The position of a deletion mark, and what the reverse index has for a block that was given back."""


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


@dataclass(frozen=True)
class Layout:
    """Positions in raw blocks of 4096 bytes, from the number of data segments, S = N + 320; 321 to 524288 are valid."""

    segments: int

    @property
    def logical_segments(self) -> int:
        """N: segments of 4 MiB of the logical device."""
        return self.segments - RESERVE_SEGMENTS

    @property
    def size_bytes(self) -> int:
        """Logical size, a multiple of 4 MiB."""
        return self.logical_segments * SEGMENT_BYTES

    @property
    def data_blocks(self) -> int:
        """Blocks of the data region; every PBA is smaller."""
        return self.segments * SEGMENT_BLOCKS

    @cached_property
    def cap(self) -> int:
        """Index files of level 1 at which the module crashes."""
        return ceil_div(self.segments * SEGMENT_BLOCKS, FILE_RECORDS) + 1

    @property
    def slots(self) -> int:
        """Places for index files."""
        return 2 * self.cap

    def slot_start(self, slot: int) -> int:
        """First byte of a slot on the raw device. Slots are packed, not aligned."""
        return INDEX_START * BLOCK + slot * SLOT_BYTES

    @cached_property
    def journal_start(self) -> int:
        """First block of the journal region, which the module never touches."""
        return INDEX_START + ceil_div(self.slots * SLOT_BYTES, BLOCK)

    @cached_property
    def svt_start(self) -> int:
        """Segment validity table: which segments are allocated."""
        return self.journal_start + JOURNAL_BLOCKS

    @property
    def svt_blocks(self) -> int:
        """Of one copy. There are two of each table, copy 1 behind copy 0; copy 0 alone is used."""
        return ceil_div(ceil_div(self.segments, 64) * 8, BLOCK)

    @cached_property
    def dst_start(self) -> int:
        """Data segment table: which blocks of each segment may not be reused."""
        return self.svt_start + 2 * self.svt_blocks

    @property
    def dst_blocks(self) -> int:
        """Of one copy."""
        return self.segments // DST_PER_BLOCK + 1

    @cached_property
    def rit_start(self) -> int:
        """Reverse index table: the LBA that each PBA was last written for."""
        return self.dst_start + 2 * self.dst_blocks

    @property
    def rit_blocks(self) -> int:
        """Of one copy."""
        return self.data_blocks // RIT_PER_BLOCK + 1

    @cached_property
    def bvt_start(self) -> int:
        """Validity table of the index files: which slots are in use."""
        return self.rit_start + 2 * self.rit_blocks

    @property
    def bvt_blocks(self) -> int:
        """Of one copy."""
        return ceil_div(ceil_div(self.slots, 64) * 8, BLOCK)

    @cached_property
    def bitc_start(self) -> int:
        """Catalogue of the index files, with their keys, in clear."""
        return self.bvt_start + 2 * self.bvt_blocks

    @property
    def bitc_blocks(self) -> int:
        """Of one copy."""
        return self.slots // BITC_PER_BLOCK + 1

    @cached_property
    def data_start(self) -> int:
        """Raw block of PBA 0."""
        return self.bitc_start + 2 * self.bitc_blocks

    @cached_property
    def end(self) -> int:
        """Raw blocks of the whole volume."""
        return self.data_start + self.data_blocks

    @property
    def total_bytes(self) -> int:
        """Bytes of the whole volume."""
        return self.end * BLOCK

    @property
    def tables(self) -> tuple[tuple[str, int, int], ...]:
        """Name, first block and blocks in one copy of each table."""
        return (
            ("SVT", self.svt_start, self.svt_blocks),
            ("DST", self.dst_start, self.dst_blocks),
            ("RIT", self.rit_start, self.rit_blocks),
            ("BVT", self.bvt_start, self.bvt_blocks),
            ("BITC", self.bitc_start, self.bitc_blocks),
        )


def layout_for(size_bytes: int) -> Layout:
    """The layout of the smallest volume with at least this logical size.

    Raises:
        InvalidArgument: not 1 byte to 523968 segments of 4 MiB.
    """
    count = ceil_div(size_bytes, SEGMENT_BYTES)
    if not 1 <= count <= MAX_SEGMENTS - RESERVE_SEGMENTS:
        limit = (MAX_SEGMENTS - RESERVE_SEGMENTS) * SEGMENT_BYTES
        raise InvalidArgument("a JinDisk 1 volume of", f"{size_bytes} bytes", f"its size is 1 to {limit} bytes")
    return Layout(count + RESERVE_SEGMENTS)


def required_bytes(size_bytes: int) -> int:
    """Bytes of the device that a volume of this logical size needs. Raises `InvalidArgument` as `layout_for`."""
    return layout_for(size_bytes).total_bytes


def available_sectors(real_sectors: int) -> int:
    """Sectors of 512 bytes of the logical device that the module offers on a raw device of so many; 0 for none.

    The search of the module's ioctl, step by step, since its result is not in all cases the greatest that fits.
    """
    left = real_sectors - RESERVE_SEGMENTS * SEGMENT_SECTORS
    if left < 0:
        return 0
    found, step = 0, (left >> 1) // SEGMENT_SECTORS
    while found < left and step:
        tried = found + step * SEGMENT_SECTORS
        # The difference is of unsigned 64-bit numbers there: where `tried` is beyond, it is huge.
        if _metadata_sectors(tried // SEGMENT_SECTORS + RESERVE_SEGMENTS) <= (left - tried) % (1 << 64):
            found = tried
        else:
            step >>= 1
    return found


def _metadata_sectors(segments: int) -> int:
    return Layout(segments).data_start * (BLOCK // SECTOR_BYTES)


def largest_layout(device_bytes: int) -> Layout | None:
    """The layout that the module's tools choose for a raw device; None if it is too small."""
    count = available_sectors(device_bytes // SECTOR_BYTES) // SEGMENT_SECTORS
    return Layout(min(count, MAX_SEGMENTS - RESERVE_SEGMENTS) + RESERVE_SEGMENTS) if count else None
