"""The catalogue of index files: BVT and BITC (`docs/formats/jindisk1.md`, section 5). In clear, without any tag.

It holds the keys of the index files, from which all data keys follow.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass, field

from jindiskd.jindisk.device import Device
from jindiskd.jindisk.errors import VolumeDeviceFailed, VolumeMalformed
from jindiskd.jindisk.v1.layout import (
    BITC_ENTRY,
    BITC_PER_BLOCK,
    BLOCK,
    FILE_RECORDS,
    INNER_BYTES,
    SLOT_BYTES,
    Layout,
    ceil_div,
)

_ENTRY = struct.Struct("<Q16s12sQQQIII16s")
assert _ENTRY.size == BITC_ENTRY, "the table of the format's page"


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """An index file."""

    root: int
    """Byte position of the root node on the raw device."""
    key: bytes = field(repr=False)
    slot: int
    level: int
    version: int
    first: int
    last: int
    records: int
    """Deletion marks included."""

    def encode(self) -> bytes:
        """88 bytes."""
        return _ENTRY.pack(
            self.root, self.key, b"", self.slot, self.level, self.version, self.first, self.last, self.records, b""
        )

    @property
    def name(self) -> str:
        """For messages."""
        return f"the index file in slot {self.slot}"

    def meets(self, other: Entry) -> bool:
        """Whether the key ranges of the two intersect."""
        return self.first <= other.last and other.first <= self.last


def entry_name(layout: Layout, slot: int) -> str:
    """The catalogue entry of a slot, for messages."""
    return f"catalogue entry {slot} (raw block {layout.bitc_start + slot // BITC_PER_BLOCK})"


def decode_entry(data: bytes, layout: Layout, slot: int) -> Entry:
    """Read the catalogue entry of a slot in use.

    Args:
        data: 88 bytes.
        layout: of the volume.
        slot: the entry's index.

    Raises:
        VolumeMalformed: slot, level, positions, keys or counts cannot be.
    """
    root, key, _, number, level, version, first, last, records, _ = _ENTRY.unpack(data)
    start = layout.slot_start(slot)
    for good, why in (
        (number == slot, f"it names slot {number}"),
        (level <= 1, f"its level is {level}"),
        (start <= root <= start + SLOT_BYTES - INNER_BYTES, f"its root at byte {root} lies outside its slot"),
        (first <= last, f"its keys go from {first} to {last}"),
        (1 <= records <= FILE_RECORDS, f"it has {records} records"),
        # A key can come twice, as a live record and a mark.
        (records <= 2 * (last - first + 1), f"it has {records} records for keys {first} to {last}"),
    ):
        if not good:
            raise VolumeMalformed(entry_name(layout, slot), why)
    return Entry(root=root, key=key, slot=slot, level=level, version=version, first=first, last=last, records=records)


def bits_of(table: bytes | bytearray, count: int) -> list[int]:
    """The numbers below `count` whose bits are set, ascending."""
    found = []
    for number, byte in enumerate(table[: ceil_div(count, 8)]):
        if byte:
            found += [number * 8 + bit for bit in range(8) if byte >> bit & 1 and number * 8 + bit < count]
    return found


def read_validity(device: Device, layout: Layout) -> bytearray:
    """Copy 0 of the BVT, whole blocks. Raises `VolumeDeviceFailed`."""
    try:
        return bytearray(device.pread(layout.bvt_start * BLOCK, layout.bvt_blocks * BLOCK))
    except OSError as exc:
        raise VolumeDeviceFailed(f"reading the BVT (raw block {layout.bvt_start})", exc) from exc


def read_entries(device: Device, layout: Layout, valid: Iterable[int]) -> dict[int, bytes]:
    """The 88 bytes of the entries of the slots given, as they are. Raises `VolumeDeviceFailed`."""
    found: dict[int, bytes] = {}
    at, block = -1, b""
    for slot in valid:
        number, place = divmod(slot, BITC_PER_BLOCK)
        if number != at:
            try:
                at, block = number, device.pread((layout.bitc_start + number) * BLOCK, BLOCK)
            except OSError as exc:
                what = f"reading the catalogue (raw block {layout.bitc_start + number})"
                raise VolumeDeviceFailed(what, exc) from exc
        found[slot] = block[place * BITC_ENTRY : (place + 1) * BITC_ENTRY]
    return found


def read_catalogue(device: Device, layout: Layout) -> list[Entry]:
    """The index files, in order of slots.

    Raises:
        VolumeMalformed: an entry cannot be.
        VolumeDeviceFailed: reading failed.
    """
    valid = bits_of(read_validity(device, layout), layout.slots)
    raw = read_entries(device, layout, valid)
    return [decode_entry(data, layout, slot) for slot, data in raw.items()]


def next_version(entries: Iterable[Entry]) -> int:
    """The version that the module gives its next file after opening a volume with these; strict comparison is its."""
    found = 0
    for entry in sorted(entries, key=lambda e: e.slot):
        if found < entry.version:
            found = entry.version + 1
    return found
