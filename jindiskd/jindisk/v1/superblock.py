"""The superblock of JinDisk 1: raw block 0 (`docs/formats/jindisk1.md`, section 3). Written once, at format.

It authenticates the geometry and nothing else: neither index nor data are bound to it.
"""

from __future__ import annotations

import struct

from jindiskd.base.secret import Secret
from jindiskd.jindisk.errors import VolumeMalformed
from jindiskd.jindisk.v1.keys import TAG_BYTES, open_superblock, seal_superblock
from jindiskd.jindisk.v1.layout import INDEX_START, MAX_SEGMENTS, RESERVE_SEGMENTS, SEGMENT_BLOCKS, Layout

MAGIC = 0x22946
PLAIN_BYTES = 132
SEALED_BYTES = PLAIN_BYTES + TAG_BYTES
LEVEL_RATIO, LEVELS = 10, 2
JOURNAL_RECORD, JOURNAL_RECORDS = 128, 507_904
CHECKSUM_XOR = 0x3828
POLYNOMIAL = 0x04C11DB7
WHAT = "superblock (raw block 0)"
NAMES = (
    "checksum",
    "magic",
    "blocks_per_segment",
    "segments",
    "data_start",
    "level_ratio",
    "levels",
    "index_capacity",
    "index_start",
    "journal_record_size",
    "journal_records",
    "journal_head",
    "journal_tail",
    "checkpoint_record",
    "journal_start",
    "svt_start",
    "dst_start",
    "rit_start",
    "catalogue_start",
)
_FIELDS = struct.Struct("<IQIQQIIQQIQQQQQQQQQ")
assert _FIELDS.size == PLAIN_BYTES, "the table of the format's page"


def crc32(data: bytes, initial: int = 0xFFFFFFFF) -> int:
    """CRC-32 with the most significant bit first, neither reflected nor inverted at the end."""
    value = initial
    for byte in data:
        value ^= byte << 24
        for _ in range(8):
            value = (value << 1 ^ POLYNOMIAL if value & 0x80000000 else value << 1) & 0xFFFFFFFF
    return value


def checksum(plain: bytes) -> int:
    """The checksum over bytes 4 to 131 of the superblock."""
    return crc32(plain[4:PLAIN_BYTES]) ^ CHECKSUM_XOR


def fields_of(layout: Layout) -> dict[str, int]:
    """All fields for a layout, by the names in `NAMES`; the checksum is 0 yet."""
    values = (
        0,
        MAGIC,
        SEGMENT_BLOCKS,
        layout.segments,
        layout.data_start,
        LEVEL_RATIO,
        LEVELS,
        layout.data_blocks,
        INDEX_START,
        JOURNAL_RECORD,
        JOURNAL_RECORDS,
        0,
        0,
        0,
        layout.journal_start,
        layout.svt_start,
        layout.dst_start,
        layout.rit_start,
        layout.bvt_start,
    )
    return dict(zip(NAMES, values, strict=True))


def encode(layout: Layout) -> bytes:
    """The 132 bytes in clear."""
    plain = _FIELDS.pack(*fields_of(layout).values())
    return checksum(plain).to_bytes(4, "little") + plain[4:]


def seal(layout: Layout, key: Secret) -> bytes:
    """148 bytes for the start of raw block 0; the last 16 are the tag, the module's "measurement".

    The nonce is the key's own IV: format under one key twice with different sizes, and both superblocks are open.
    """
    return seal_superblock(key, encode(layout))


def decode(plain: bytes) -> Layout:
    """The layout that a superblock in clear tells, after checking every field.

    Raises:
        VolumeMalformed: checksum or magic are wrong, or a field differs from what the module writes.
    """
    found = dict(zip(NAMES, _FIELDS.unpack(plain), strict=True))
    if found["checksum"] != checksum(plain):
        raise VolumeMalformed(WHAT, "its checksum does not match")
    if found["magic"] != MAGIC:
        raise VolumeMalformed(WHAT, f"its magic is {found['magic']:#x}")
    segments = found["segments"]
    if not RESERVE_SEGMENTS < segments <= MAX_SEGMENTS:
        raise VolumeMalformed(WHAT, f"it has {segments} segments, of {RESERVE_SEGMENTS + 1} to {MAX_SEGMENTS}")
    layout = Layout(segments)
    for name, value in fields_of(layout).items():
        if name != "checksum" and found[name] != value:
            raise VolumeMalformed(WHAT, f"{name} is {found[name]}, where the module writes {value}")
    return layout


def open_sealed(block: bytes, key: Secret) -> Layout:
    """The layout from raw block 0.

    Raises:
        VolumeUnauthentic: wrong key or IV, or an altered block.
        VolumeMalformed: authentic, but not what the module writes.
    """
    return decode(open_superblock(key, block[:SEALED_BYTES]))
