"""SVT, DST and RIT of JinDisk 1: tables about segments (`docs/formats/jindisk1.md`, section 5). In clear, untagged."""

from __future__ import annotations

import struct
from collections.abc import Callable

from jindiskd.jindisk.device import Device
from jindiskd.jindisk.v1.layout import BLOCK, DST_ENTRY, DST_PER_BLOCK, SEGMENT_BLOCKS, Layout

BITMAP_BYTES = SEGMENT_BLOCKS // 8
FULL_BITMAP = b"\xff" * BITMAP_BYTES
_COUNT = struct.Struct("<Q")
FULL_ENTRY = _COUNT.pack(SEGMENT_BLOCKS) + FULL_BITMAP
EMPTY_ENTRY = bytes(DST_ENTRY)
ZERO_CHUNK = bytes(1 << 20)


def dst_entry(bitmap: bytes | bytearray | memoryview) -> bytes:
    """The 136 bytes for a segment of which these 1024 bits may not be reused."""
    return _COUNT.pack(int.from_bytes(bitmap, "little").bit_count()) + bytes(bitmap)


def dst_fault(entry: bytes) -> str | None:
    """What is wrong within an entry, in words."""
    count, bits = _COUNT.unpack_from(entry)[0], int.from_bytes(entry[8:], "little").bit_count()
    return None if count == bits else f"it counts {count} blocks, its bitmap has {bits}"


def first_bits(count: int) -> bytes:
    """A bitmap of 1024 bits whose first `count` are set."""
    return ((1 << count) - 1).to_bytes(BITMAP_BYTES, "little")


def must_pad(logical_segments: int, allocated: int) -> bool:
    """Whether a partly used segment must be marked full, as the module does itself (rule 11).

    From N = 320 on, and with at least N - 320 segments allocated, the module collects segments that are marked partly
    used a second after opening, and does not read all of what it moved.
    """
    return logical_segments >= 320 and allocated >= logical_segments - 320


def dst_block(entry_of: Callable[[int], bytes], layout: Layout, number: int) -> bytes:
    """Block `number` of the DST, of the entries of its 30 segments."""
    first = number * DST_PER_BLOCK
    end = min(first + DST_PER_BLOCK, layout.segments)
    return b"".join(entry_of(segment) for segment in range(first, end)).ljust(BLOCK, b"\0")


def write_zeros(device: Device, start_block: int, blocks: int) -> None:
    """Overwrite raw blocks with zeros. Raises `OSError`."""
    at, end = start_block * BLOCK, (start_block + blocks) * BLOCK
    while at < end:
        size = min(len(ZERO_CHUNK), end - at)
        device.pwrite(at, ZERO_CHUNK[:size])
        at += size
