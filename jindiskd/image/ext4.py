"""What is used in an ext4 file system, read from its group descriptors and block bitmaps.

Believes little: the file system was checked by e2fsck before its bitmaps are taken for the truth.
Source: linux `Documentation/filesystems/ext4/` (super, group_descr, bitmaps). Integers are little-endian.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from jindiskd.image.refusals import BaseTruncated, RootDamaged, RootNotExt4

SUPERBLOCK_OFFSET_BYTES = 1024
SUPERBLOCK_BYTES = 1024
_MAGIC = 0xEF53

COMPAT_SPARSE_SUPER2 = 0x200
INCOMPAT_RECOVER = 0x4
INCOMPAT_JOURNAL_DEV = 0x8
INCOMPAT_META_BG = 0x10
INCOMPAT_EXTENTS = 0x40
INCOMPAT_64BIT = 0x80
RO_COMPAT_SPARSE_SUPER = 0x1
RO_COMPAT_BIGALLOC = 0x200
BLOCK_UNINIT = 0x2
STATE_CLEAN = 0x1
STATE_ERRORS = 0x2
MAX_GROUPS = 1 << 18  # 32 TiB with blocks of 4096 bytes; bounds what a hostile superblock can make us read

Range = tuple[int, int]
"""Offset and length in bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Superblock:
    """The fields of a superblock that matter here."""

    uuid: bytes
    block_bytes: int
    blocks: int
    free_blocks: int
    first_data_block: int
    blocks_per_group: int
    inodes_per_group: int
    inode_bytes: int
    descriptor_bytes: int
    reserved_descriptor_blocks: int
    feature_compat: int
    feature_incompat: int
    feature_ro_compat: int
    first_meta_group: int
    state: int
    write_time: int
    """Seconds since the epoch, when it was last written."""

    @property
    def size_bytes(self) -> int:
        """Length of the whole file system."""
        return self.blocks * self.block_bytes

    @property
    def used_bytes(self) -> int:
        """What is in use, as the superblock says."""
        return max(0, self.blocks - self.free_blocks) * self.block_bytes

    @property
    def groups(self) -> int:
        """Number of block groups."""
        return -(-(self.blocks - self.first_data_block) // self.blocks_per_group)

    @property
    def clean(self) -> bool:
        """True where it was unmounted in order: no journal to replay, no error noted."""
        return not self.feature_incompat & INCOMPAT_RECOVER and self.state & 3 == STATE_CLEAN


def read_superblock(fd: int, offset_bytes: int = 0) -> Superblock | None:
    """The superblock of an ext2, ext3 or ext4 file system at `offset_bytes`, or None where there is none.

    Raises:
        RootDamaged: it is one, with impossible numbers.
    """
    raw = os.pread(fd, SUPERBLOCK_BYTES, offset_bytes + SUPERBLOCK_OFFSET_BYTES)
    if len(raw) < SUPERBLOCK_BYTES or struct.unpack_from("<H", raw, 0x38)[0] != _MAGIC:
        return None

    def u32(at: int) -> int:
        return int(struct.unpack_from("<I", raw, at)[0])

    def u16(at: int) -> int:
        return int(struct.unpack_from("<H", raw, at)[0])

    incompat, log_block = u32(0x60), u32(0x18)
    wide = bool(incompat & INCOMPAT_64BIT)
    found = Superblock(
        uuid=raw[0x68:0x78],
        block_bytes=1024 << log_block if log_block <= 6 else 0,
        blocks=u32(0x4) | (u32(0x150) << 32 if wide else 0),
        free_blocks=u32(0xC) | (u32(0x158) << 32 if wide else 0),
        first_data_block=u32(0x14),
        blocks_per_group=u32(0x20),
        inodes_per_group=u32(0x28),
        inode_bytes=u16(0x58),
        descriptor_bytes=u16(0xFE) if wide else 32,
        reserved_descriptor_blocks=u16(0xCE),
        feature_compat=u32(0x5C),
        feature_incompat=incompat,
        feature_ro_compat=u32(0x64),
        first_meta_group=u32(0x104),
        state=u16(0x3A),
        write_time=u32(0x30) | raw[0x274] << 32,
    )
    if (
        not found.block_bytes
        or not 0 < found.blocks_per_group <= 8 * found.block_bytes
        or found.blocks <= found.first_data_block
        or found.first_data_block > 1
        or found.descriptor_bytes not in {32, 64}
        or found.groups > MAX_GROUPS
    ):
        raise RootDamaged("its superblock has impossible numbers")
    return found


def require_ext4(found: Superblock, partition_bytes: int) -> None:
    """Check that the file system is one that can be built from.

    Raises:
        RootNotExt4: ext2 or ext3, or a feature that is not handled.
        BaseTruncated: it is longer than its partition.
    """
    if found.feature_incompat & INCOMPAT_JOURNAL_DEV:
        raise RootNotExt4("the journal of another file system")
    if not found.feature_incompat & INCOMPAT_EXTENTS:
        raise RootNotExt4("ext2 or ext3")
    if found.feature_ro_compat & RO_COMPAT_BIGALLOC:
        raise RootNotExt4("ext4 with clusters (bigalloc)")
    if found.size_bytes > partition_bytes:
        raise BaseTruncated("the root file system", found.size_bytes, partition_bytes)


def used_ranges(fd: int, found: Superblock, offset_bytes: int = 0, granule_bytes: int = 4096) -> list[Range]:
    """Where the file system keeps data or metadata: sorted, merged, rounded out to whole granules.

    Raises:
        RootDamaged: a descriptor or bitmap lies outside the file system.
    """
    block = found.block_bytes
    spans = [(0, max(1, found.first_data_block + 1))]
    for group, descriptor in enumerate(_descriptors(fd, found, offset_bytes)):
        spans.extend(_group_spans(fd, found, offset_bytes, group, descriptor))
    ranges: list[Range] = []
    for start, end in sorted((first * block, last * block) for first, last in spans):
        low = start // granule_bytes * granule_bytes
        high = -(-end // granule_bytes) * granule_bytes
        if ranges and low <= ranges[-1][0] + ranges[-1][1]:
            before = ranges[-1][0]
            ranges[-1] = (before, max(high, before + ranges[-1][1]) - before)
        else:
            ranges.append((low, high - low))
    return ranges


def _descriptors(fd: int, found: Superblock, offset: int) -> Iterator[bytes]:
    per_block = found.block_bytes // found.descriptor_bytes
    for first in range(0, found.groups, per_block):
        at = _descriptor_block(found, first // per_block)
        raw = os.pread(fd, found.block_bytes, offset + at * found.block_bytes)
        if len(raw) < found.block_bytes:
            raise RootDamaged("its group descriptors lie outside it")
        for index in range(min(per_block, found.groups - first)):
            yield raw[index * found.descriptor_bytes : (index + 1) * found.descriptor_bytes]


def _descriptor_block(found: Superblock, index: int) -> int:
    """Where block `index` of the group descriptors is (ext4 documentation, "Meta Block Groups")."""
    if not found.feature_incompat & INCOMPAT_META_BG or index < found.first_meta_group:
        return found.first_data_block + 1 + index
    group = index * (found.block_bytes // found.descriptor_bytes)
    start = found.first_data_block + group * found.blocks_per_group
    return start + (1 if _has_super(found, group) else 0)


def _has_super(found: Superblock, group: int) -> bool:
    """Whether a group begins with a copy of the superblock and of the descriptors. Too often true would do no harm."""
    if group <= 1 or not found.feature_ro_compat & RO_COMPAT_SPARSE_SUPER:
        return True
    if found.feature_compat & COMPAT_SPARSE_SUPER2:
        return True
    for base in (3, 5, 7):
        power = base
        while power < group:
            power *= base
        if power == group:
            return True
    return False


def _group_spans(fd: int, found: Superblock, offset: int, group: int, descriptor: bytes) -> Iterable[Range]:
    """Used block numbers of one group as half-open spans. An uninitialised bitmap stands for metadata alone."""
    start = found.first_data_block + group * found.blocks_per_group
    count = min(found.blocks_per_group, found.blocks - start)
    bitmap, inode_bitmap, table = struct.unpack_from("<III", descriptor, 0)
    if found.descriptor_bytes == 64:
        high = struct.unpack_from("<III", descriptor, 0x20)
        bitmap, inode_bitmap, table = (
            low | top << 32 for low, top in zip((bitmap, inode_bitmap, table), high, strict=True)
        )
    table_blocks = -(-found.inodes_per_group * found.inode_bytes // found.block_bytes)
    for at, length in ((bitmap, 1), (inode_bitmap, 1), (table, table_blocks)):
        if not found.first_data_block < at <= at + length <= found.blocks:
            raise RootDamaged(f"metadata of block group {group} lies outside it")
        yield at, at + length
    if struct.unpack_from("<H", descriptor, 0x12)[0] & BLOCK_UNINIT:
        if _has_super(found, group):
            per_block = found.block_bytes // found.descriptor_bytes
            own = 1 + -(-found.groups // per_block) + found.reserved_descriptor_blocks
            yield start, min(start + own, start + count)
        elif found.feature_incompat & INCOMPAT_META_BG:
            yield start, start + 1
        return
    raw = os.pread(fd, found.block_bytes, offset + bitmap * found.block_bytes)
    if len(raw) < found.block_bytes:
        raise RootDamaged(f"the bitmap of block group {group} lies outside it")
    bits = bin(int.from_bytes(raw, "little") | 1 << (8 * len(raw)))[:2:-1][:count]
    for match in re.finditer("1+", bits):
        yield start + match.start(), start + match.end()
