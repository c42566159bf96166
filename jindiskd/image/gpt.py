"""GUID partition tables: read one strictly, write one with given identities.

Source: UEFI specification 2.10, sections 5.2 (protective MBR) and 5.3 (GPT). Sectors of 512 bytes; integers are
little-endian, GUIDs in their mixed byte order.
"""

from __future__ import annotations

import itertools
import os
import struct
import uuid
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

from jindiskd.image.refusals import BaseTruncated, NoPartitionTable, PartitionTableDamaged

SECTOR_BYTES = 512
ALIGNMENT_BYTES = 1 << 20
ENTRIES = 128
ENTRY_BYTES = 128
MAX_ENTRIES = 1024
MAX_SECTOR = 1 << 50  # keeps offsets in bytes within what the kernel's calls take
TABLE_SECTORS = ENTRIES * ENTRY_BYTES // SECTOR_BYTES
FIRST_USABLE_SECTOR = 2 + TABLE_SECTORS
NAME_CHARACTERS = 36

TYPE_ESP = "c12a7328-f81f-11d2-ba4b-00a0c93ec93b"
TYPE_BOOT = "bc13c2ff-59e6-4262-a352-b275fd6f7172"  # XBOOTLDR, the UAPI discoverable partitions specification
TYPE_ROOT_X86_64 = "4f68bce3-e8cd-4db1-96e7-fbcaf984b709"  # the same specification
TYPE_LUKS = "ca7d7ccb-63ed-4c53-861c-1742536059cc"  # util-linux, "Linux LUKS"
TYPE_JINDISK = "4a0feb3f-f302-4b40-a4ba-8b27e42e994b"  # random, chosen once for volumes of JinDisk

_HEADER = struct.Struct("<8sIIIIQQQQ16sQIII")
_ENTRY = struct.Struct("<16s16sQQQ72s")
_SIGNATURE = b"EFI PART"
_REVISION = 0x00010000


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One partition."""

    type_uuid: str
    uuid: str
    name: str
    offset_bytes: int
    size_bytes: int


def read_table(fd: int, size_bytes: int) -> tuple[Entry, ...]:
    """The partitions of the disk image behind `fd`, in the table's order; a damaged first copy is passed over.

    Raises:
        NoPartitionTable: nothing there, or an MBR only.
        PartitionTableDamaged: neither copy is whole, or the partitions overlap or lie outside.
        BaseTruncated: a partition reaches beyond the end of the image.
    """
    last = size_bytes // SECTOR_BYTES - 1
    problems = []
    for lba in (1, last):
        found = _read_copy(fd, lba)
        if isinstance(found, str):
            problems.append(found)
            continue
        for entry in found:
            if entry.offset_bytes + entry.size_bytes > size_bytes:
                name = entry.name or entry.uuid
                raise BaseTruncated(f"partition {name!r}", entry.offset_bytes + entry.size_bytes, size_bytes)
        return found
    mbr = os.pread(fd, SECTOR_BYTES, 0).ljust(SECTOR_BYTES, b"\0")
    kinds = {mbr[446 + 16 * index + 4] for index in range(4)} - {0}
    has_mbr = mbr[510:] == b"\x55\xaa"
    if all(problem == "absent" for problem in problems) and not (has_mbr and 0xEE in kinds):
        raise NoPartitionTable("an MBR" if has_mbr and kinds else "no partition table at all")
    raise PartitionTableDamaged("; ".join(f"copy {i + 1} is {problem}" for i, problem in enumerate(problems)))


def _read_copy(fd: int, lba: int) -> tuple[Entry, ...] | str:
    """The entries of the copy whose header lies at `lba`, or in a few words why it cannot be used."""
    sector = os.pread(fd, SECTOR_BYTES, lba * SECTOR_BYTES) if lba > 0 else b""
    if len(sector) < SECTOR_BYTES or sector[:8] != _SIGNATURE:
        return "absent"
    (_, revision, length, crc, _, mine, _, first, last, _, table, count, entry_bytes, table_crc) = _HEADER.unpack_from(
        sector
    )
    if not _HEADER.size <= length <= SECTOR_BYTES or revision >> 16 != 1:
        return "of an unknown revision"
    if zlib.crc32(sector[:16] + bytes(4) + sector[20:length]) != crc or mine != lba:
        return "not what its checksum says"
    if not 0 < count <= MAX_ENTRIES or entry_bytes != ENTRY_BYTES or table > MAX_SECTOR:
        return f"of {count} entries of {entry_bytes} bytes at sector {table}"
    raw = os.pread(fd, count * entry_bytes, table * SECTOR_BYTES)
    if len(raw) != count * entry_bytes or zlib.crc32(raw) != table_crc:
        return "not what the checksum of its entries says"
    entries = []
    for at in range(0, len(raw), entry_bytes):
        kind, identity, start, end, _, name = _ENTRY.unpack_from(raw, at)
        if kind == bytes(16):
            continue
        if not first <= start <= end <= last:
            return f"one whose partition {at // entry_bytes + 1} lies outside its bounds"
        entries.append(
            Entry(
                type_uuid=str(uuid.UUID(bytes_le=kind)),
                uuid=str(uuid.UUID(bytes_le=identity)),
                name=name.decode("utf-16-le", errors="replace").split("\0")[0],
                offset_bytes=start * SECTOR_BYTES,
                size_bytes=(end - start + 1) * SECTOR_BYTES,
            )
        )
    ordered = sorted(entries, key=lambda entry: entry.offset_bytes)
    for left, right in itertools.pairwise(ordered):
        if left.offset_bytes + left.size_bytes > right.offset_bytes:
            return "one with overlapping partitions"
    return tuple(entries)


def disk_bytes(sizes_bytes: Sequence[int]) -> int:
    """How long a disk with partitions of these lengths is, all aligned to `ALIGNMENT_BYTES`, both tables included."""
    aligned = sum(-(-size // ALIGNMENT_BYTES) * ALIGNMENT_BYTES for size in sizes_bytes)
    return 2 * ALIGNMENT_BYTES + aligned


def lay_out(parts: Sequence[tuple[str, str, str, int]]) -> tuple[Entry, ...]:
    """Place partitions one after the other, aligned; each given as type, identity, name and length in bytes."""
    entries, at = [], ALIGNMENT_BYTES
    for type_uuid, identity, name, size in parts:
        aligned = -(-size // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        entries.append(Entry(type_uuid=type_uuid, uuid=identity, name=name, offset_bytes=at, size_bytes=aligned))
        at += aligned
    return tuple(entries)


def write_table(fd: int, size_bytes: int, disk_uuid: str, entries: Sequence[Entry]) -> None:
    """Write protective MBR and both copies of the table to an image of `size_bytes`, a whole number of sectors."""
    sectors = size_bytes // SECTOR_BYTES
    table = b"".join(_pack_entry(entry) for entry in entries).ljust(ENTRIES * ENTRY_BYTES, b"\0")
    os.pwrite(fd, _protective_mbr(sectors), 0)
    backup_table = sectors - 1 - TABLE_SECTORS
    for lba, other, table_lba in ((1, sectors - 1, 2), (sectors - 1, 1, backup_table)):
        fields = (
            *(lba, other, FIRST_USABLE_SECTOR, backup_table - 1, uuid.UUID(disk_uuid).bytes_le, table_lba),
            *(ENTRIES, ENTRY_BYTES, zlib.crc32(table)),
        )
        blank = _HEADER.pack(_SIGNATURE, _REVISION, _HEADER.size, 0, 0, *fields)
        header = _HEADER.pack(_SIGNATURE, _REVISION, _HEADER.size, zlib.crc32(blank), 0, *fields)
        os.pwrite(fd, header.ljust(SECTOR_BYTES, b"\0"), lba * SECTOR_BYTES)
        os.pwrite(fd, table, table_lba * SECTOR_BYTES)


def _pack_entry(entry: Entry) -> bytes:
    name = entry.name.encode("utf-16-le")
    assert len(name) <= 2 * NAME_CHARACTERS
    start = entry.offset_bytes // SECTOR_BYTES
    end = (entry.offset_bytes + entry.size_bytes) // SECTOR_BYTES - 1
    kind, identity = uuid.UUID(entry.type_uuid).bytes_le, uuid.UUID(entry.uuid).bytes_le
    return _ENTRY.pack(kind, identity, start, end, 0, name)


def _protective_mbr(sectors: int) -> bytes:
    record = struct.pack("<B3sB3sII", 0, b"\x00\x02\x00", 0xEE, b"\xff\xff\xff", 1, min(sectors - 1, 0xFFFFFFFF))
    return (bytes(446) + record).ljust(510, b"\0") + b"\x55\xaa"
