"""Where things lie on a volume (format document, section 4). All positions are raw block numbers of 4096 bytes."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from jindiskd.errors import InvalidArgument

BLOCK = 4096
TAG_BYTES = 16
JOURNAL_START = 8
MIN_BLOCKS = 4096
MAX_BLOCKS = 1 << 36
MAX_RAW = 1 << 40
FANOUT = 73
REF_BYTES = 56
SPARE_SEGMENTS = 8
SPARE_SLOTS = 64
RESERVE_PER_MILLE = (20, 200)


def ceil(a: int, b: int) -> int:
    """Integer division rounded up."""
    return -(-a // b)


class Kind(enum.IntEnum):
    """The page trees; the value is the number in a page's associated data."""

    F = 1
    """LBA to raw block and tag."""
    R = 2
    """Raw block to LBA."""
    S = 3
    """Segment to key, live count, stamp."""


PER_LEAF = {Kind.F: 170, Kind.R: 512, Kind.S: 85}
ENTRY_BYTES = {Kind.F: 24, Kind.R: 8, Kind.S: 48}


def tree_levels(entries: int, per_leaf: int) -> tuple[int, ...]:
    """Pages at each level, leaves first; the last is 1."""
    levels = [ceil(entries, per_leaf)]
    while levels[-1] > 1:
        levels.append(ceil(levels[-1], FANOUT))
    return tuple(levels)


@dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """The parameters of a volume and what follows from them."""

    blocks: int
    """L: logical blocks."""
    segment_bits: int
    """b: a segment has 2^b blocks."""
    segments: int
    """S."""
    journal_blocks: int
    """J."""
    meta_slots: int
    """Page slots."""
    levels: dict[Kind, tuple[int, ...]] = field(init=False, repr=False, compare=False)
    """Of each tree, pages at each level, leaves first."""
    segment_blocks: int = field(init=False, repr=False, compare=False)
    """Blocks in a segment."""
    meta_start: int = field(init=False, repr=False, compare=False)
    """First page slot."""
    meta_end: int = field(init=False, repr=False, compare=False)
    """Behind the last page slot."""
    data_start: int = field(init=False, repr=False, compare=False)
    """First raw block of the data region, aligned to a segment."""
    end: int = field(init=False, repr=False, compare=False)
    """Raw blocks needed."""

    def __post_init__(self) -> None:
        entries = {Kind.F: self.blocks, Kind.R: self.segments << self.segment_bits, Kind.S: self.segments}
        size, meta_start = 1 << self.segment_bits, JOURNAL_START + self.journal_blocks
        data_start = ceil(meta_start + self.meta_slots, size) * size
        computed = {
            "levels": {k: tree_levels(n, PER_LEAF[k]) for k, n in entries.items()},
            "segment_blocks": size,
            "meta_start": meta_start,
            "meta_end": meta_start + self.meta_slots,
            "data_start": data_start,
            "end": data_start + self.segments * size,
        }
        for name, value in computed.items():
            object.__setattr__(self, name, value)

    @property
    def size_bytes(self) -> int:
        """Logical size."""
        return self.blocks * BLOCK

    @property
    def pages(self) -> int:
        """P: pages of all trees when nothing is a hole."""
        return sum(sum(levels) for levels in self.levels.values())

    def entries(self, kind: Kind) -> int:
        """Entries of a tree."""
        return {Kind.F: self.blocks, Kind.R: self.segments << self.segment_bits, Kind.S: self.segments}[kind]

    def segment_of(self, raw: int) -> int:
        """The segment of a raw block of the data region."""
        return (raw - self.data_start) >> self.segment_bits

    def segment_start(self, segment: int) -> int:
        """First raw block of a segment."""
        return self.data_start + (segment << self.segment_bits)

    def fault(self) -> str | None:
        """Which requirement of section 4 is not met, in words; None if all are."""
        checks = (
            (MIN_BLOCKS <= self.blocks <= MAX_BLOCKS, f"{self.blocks} logical blocks"),
            (6 <= self.segment_bits <= 12, f"segments of 2^{self.segment_bits} blocks"),
            (16 <= self.journal_blocks <= 65536, f"{self.journal_blocks} journal blocks"),
            (self.meta_slots <= MAX_RAW and self.segments <= MAX_RAW, "counts out of range"),
            (
                self.segments << self.segment_bits >= self.blocks + (SPARE_SEGMENTS << self.segment_bits),
                f"{self.segments} segments are too few",
            ),
        )
        for good, words in checks:
            if not good:
                return words
        if self.meta_slots < self.pages + SPARE_SLOTS:
            return f"{self.meta_slots} page slots are too few"
        return None if self.end < MAX_RAW else "the end lies beyond the limit"


def default_geometry(blocks: int, *, reserve_per_mille: int = 50) -> Geometry:
    """The geometry a writer should choose for a logical size.

    Args:
        blocks: L, 4096 … 2^36.
        reserve_per_mille: space for cleaning in thousandths of the size, 20 … 200.

    Raises:
        InvalidArgument: one of the two is out of range.
    """
    if not MIN_BLOCKS <= blocks <= MAX_BLOCKS:
        raise InvalidArgument("a volume of", f"{blocks * BLOCK} bytes", "its size is 16 MiB to 256 TiB")
    if not RESERVE_PER_MILLE[0] <= reserve_per_mille <= RESERVE_PER_MILLE[1]:
        raise InvalidArgument("a reserve of", f"{reserve_per_mille} per thousand", "20 to 200 are allowed")
    bits = 6 if blocks < 1 << 18 else 8 if blocks < 1 << 22 else 10
    used = ceil(blocks, 1 << bits)
    segments = used + SPARE_SEGMENTS + ceil(used * reserve_per_mille, 1000)
    journal = min(max(blocks // 512, 32), 4096)
    plain = Geometry(blocks=blocks, segment_bits=bits, segments=segments, journal_blocks=journal, meta_slots=0)
    slots = plain.pages + min(plain.pages, 65536) + SPARE_SLOTS
    return Geometry(blocks=blocks, segment_bits=bits, segments=segments, journal_blocks=journal, meta_slots=slots)


def blocks_of(size_bytes: int) -> int:
    """Logical blocks of a size.

    Raises:
        InvalidArgument: it is no multiple of 4096, or out of range.
    """
    if size_bytes % BLOCK or not MIN_BLOCKS <= size_bytes // BLOCK <= MAX_BLOCKS:
        raise InvalidArgument("a volume of", f"{size_bytes} bytes", "its size is a multiple of 4096, 16 MiB to 256 TiB")
    return size_bytes // BLOCK


def required_bytes(size_bytes: int, *, reserve_per_mille: int = 50) -> int:
    """Bytes of the device that a volume of this logical size needs. Raises `InvalidArgument` as `blocks_of`."""
    return default_geometry(blocks_of(size_bytes), reserve_per_mille=reserve_per_mille).end * BLOCK


def largest_logical(window_bytes: int, *, reserve_per_mille: int = 50) -> int:
    """The largest logical size in bytes whose volume fits into `window_bytes`.

    Raises:
        InvalidArgument: not even the smallest volume fits.
    """

    def fits(blocks: int) -> bool:
        return default_geometry(blocks, reserve_per_mille=reserve_per_mille).end * BLOCK <= window_bytes

    if not fits(MIN_BLOCKS):
        need = required_bytes(MIN_BLOCKS * BLOCK, reserve_per_mille=reserve_per_mille)
        raise InvalidArgument("a window of", f"{window_bytes} bytes", f"the smallest volume needs {need}")
    low, high = MIN_BLOCKS, min(MAX_BLOCKS, max(window_bytes // BLOCK, MIN_BLOCKS)) + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low * BLOCK
