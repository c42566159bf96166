"""A JinDisk 1 volume open for reading (`docs/formats/jindisk1.md`, sections 3 to 7).

Nothing that a reader checks makes this format secure: whoever holds the disk can read it and give it any content, with
tags that verify. What is given instead of wrong bytes, where the format can tell, is an error: never the garbage that
the module hands out, and never stale memory for a block that was not written, but zeros.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Iterator

from jindiskd.base.secret import Secret
from jindiskd.errors import InvalidArgument
from jindiskd.jindisk.device import Device
from jindiskd.jindisk.errors import VolumeDeviceFailed, VolumeMalformed, VolumeUnauthentic
from jindiskd.jindisk.v1 import superblock
from jindiskd.jindisk.v1.catalogue import Entry, read_catalogue
from jindiskd.jindisk.v1.index import Chunk, Levels, arrange, load_level0, lookup, merge
from jindiskd.jindisk.v1.index_file import LeafCache
from jindiskd.jindisk.v1.keys import Kdf, check_root, data_aad, derive, unseal
from jindiskd.jindisk.v1.layout import BLOCK, SEGMENT_BYTES, Layout
from jindiskd.jindisk.v1.nodes import RECORD

ZERO_BLOCK = bytes(BLOCK)
_POSITION = struct.Struct("<Q")


class Volume:
    """A volume open for reading. Any thread may call any method."""

    def __init__(
        self, device: Device, layout: Layout, entries: list[Entry], size_bytes: int, *, strict: bool = True
    ) -> None:
        """Use `open_volume`. Raises as `read`."""
        self.device, self.layout, self.size_bytes = device, layout, size_bytes
        self.cache = LeafCache()
        self.lock = threading.RLock()
        self.levels: Levels = arrange(device, layout, entries, self.cache)
        if strict:
            for file in (*self.levels.level1, *([self.levels.level0] if self.levels.level0 else [])):
                file.verify()

    def read(self, offset: int, length: int) -> bytes:
        """Bytes of the logical volume; blocks that were never written read as zeros.

        Raises:
            InvalidArgument: the range reaches beyond the end.
            VolumeUnauthentic: a block or a node of the index does not open.
            VolumeInconsistent: a node of the index opens, but breaks the format's rules.
            VolumeDeviceFailed: reading failed.
        """
        self.check_range(offset, length)
        first, end = offset // BLOCK, -(-(offset + length) // BLOCK)
        data = self.read_blocks(first, end - first)
        skip = offset - first * BLOCK
        return data if not skip and len(data) == length else data[skip : skip + length]

    def check_range(self, offset: int, length: int) -> None:
        """Raise `InvalidArgument` unless the range lies inside the volume."""
        if offset < 0 or length < 0 or offset + length > self.size_bytes:
            raise InvalidArgument("the range", f"{offset}+{length}", f"the volume has {self.size_bytes} bytes")

    # Blocks

    def read_blocks(self, lba: int, count: int) -> bytes:
        """Whole blocks. Raises as `read`."""
        with self.lock:
            return self.fetch([(key, self.record(key)) for key in range(lba, lba + count)])

    def record(self, lba: int) -> bytes | None:
        """The record of a mapped block, 40 bytes: PBA, tag, data key. None if it is not mapped. Raises as `read`."""
        return lookup(self.levels, lba)

    def fetch(self, wanted: list[tuple[int, bytes | None]]) -> bytes:
        """Blocks by LBA and record, one after the other; neighbours on the disk are read together. Raises as `read`."""
        parts: list[bytes] = []
        at = 0
        while at < len(wanted):
            record = wanted[at][1]
            if record is None:
                parts.append(ZERO_BLOCK)
                at += 1
                continue
            position = _POSITION.unpack_from(record)[0]
            run = 1
            while at + run < len(wanted):
                following = wanted[at + run][1]
                if following is None or _POSITION.unpack_from(following)[0] != position + run:
                    break
                run += 1
            parts += self._open_run(position, wanted[at : at + run])
            at += run
        return b"".join(parts)

    def _open_run(self, position: int, wanted: list[tuple[int, bytes | None]]) -> list[bytes]:
        raw = self.layout.data_start + position
        try:
            data = self.device.pread(raw * BLOCK, len(wanted) * BLOCK)
        except OSError as exc:
            raise VolumeDeviceFailed(f"reading data (raw block {raw})", exc) from exc
        parts = []
        for number, (lba, record) in enumerate(wanted):
            assert record is not None, "runs are of mapped blocks"
            plain = open_block(data[number * BLOCK : (number + 1) * BLOCK], record)
            if plain is None:
                raise VolumeUnauthentic(block_name(lba, raw + number))
            parts.append(plain)
        return parts

    # The whole

    def chunks(self) -> Iterator[Chunk]:
        """Everything mapped, in order of LBAs, in pieces of some hundred blocks. Raises as `read`.

        Records beyond the volume's end appear too, if an earlier, longer table left some.
        """
        recent = load_level0(self.levels)
        return merge(self.levels.level1, recent, sorted(recent))


def block_name(lba: int, raw: int) -> str:
    """A data block, for messages."""
    return f"logical block {lba} (raw block {raw})"


def open_block(sealed: bytes | memoryview, record: bytes) -> bytes | None:
    """A data block's plaintext, of its 4096 bytes on the disk and its record; None if the tag does not verify."""
    position, tag, key = RECORD.unpack(record)
    return unseal(key, b"".join((sealed, tag)), data_aad(position))


def read_layout(device: Device, key: Secret) -> Layout:
    """The layout of a volume, from its superblock.

    Raises:
        VolumeUnauthentic: the key is not the volume's, or there is no JinDisk 1 volume.
        VolumeMalformed: the superblock is not one that the module writes, or the device is shorter than the volume.
        VolumeDeviceFailed: reading failed.
    """
    check_root(key)
    if device.size_bytes < BLOCK:
        raise VolumeMalformed("device", f"it has {device.size_bytes} bytes")
    try:
        block = device.pread(0, BLOCK)
    except OSError as exc:
        raise VolumeDeviceFailed("reading the superblock (raw block 0)", exc) from exc
    layout = superblock.open_sealed(block, key)
    if device.size_bytes < layout.total_bytes:
        raise VolumeMalformed("device", f"it has {device.size_bytes} bytes, the volume needs {layout.total_bytes}")
    return layout


def check_size(layout: Layout, size_bytes: int | None) -> int:
    """The logical size to use: what is asked for, or all whole segments.

    The superblock does not have the size of the device that was made, only its whole segments of 4 MiB.

    Raises:
        InvalidArgument: not a multiple of 512, or so large that the layout would be another.
    """
    if size_bytes is None:
        return layout.size_bytes
    if size_bytes % 512 or not 0 < size_bytes < layout.size_bytes + SEGMENT_BYTES:
        limit = f"it is a multiple of 512 below {layout.size_bytes + SEGMENT_BYTES} on this volume"
        raise InvalidArgument("a logical size of", f"{size_bytes} bytes", limit)
    return size_bytes


def open_volume(device: Device, *, key: Secret, size_bytes: int | None = None, strict: bool = True) -> Volume:
    """Open a volume for reading. The format does not protect it: see the package.

    Args:
        device: at least as long as the volume.
        key: 28 bytes, root key and root IV; stays the caller's and is not kept.
        size_bytes: logical size, where it is not a whole number of segments or smaller than the layout's.
        strict: refuse a volume with an index file whose inner nodes or first leaf do not fit its catalogue entry.
            Without, for the checker and for what is left of a damaged volume, blocks that such a file has can read as
            zeros or as older data, since only its entry tells where it has any.

    Raises:
        VolumeUnauthentic: the key is not the volume's, or there is no JinDisk 1 volume; or an index node does not open.
        VolumeMalformed: superblock or catalogue cannot be.
        VolumeInconsistent: an index node opens, but breaks the format's rules.
        VolumeDeviceFailed: reading failed.
        InvalidArgument: key or size.
    """
    layout = read_layout(device, key)
    return Volume(device, layout, read_catalogue(device, layout), check_size(layout, size_bytes), strict=strict)


def root_from_password(device: Device, password: Secret) -> tuple[Kdf, Secret]:
    """The reference tool whose derivation opens a volume's superblock, and the root key; both are tried.

    Raises:
        VolumeUnauthentic: neither does.
        VolumeError: as `read_layout`.
    """
    for kdf in Kdf:
        key = derive(password, kdf)
        try:
            read_layout(device, key)
        except VolumeUnauthentic:
            key.close()
            continue
        return kdf, key
    raise VolumeUnauthentic("the JinDisk 1 superblock (raw block 0)")


def salvage_volume(device: Device, *, layout: Layout, strict: bool = True) -> Volume:
    """Open a volume without its root key, which the format does not need, by its layout.

    For volumes whose superblock is damaged or whose key is lost; it also shows what the format is worth. Raises, and
    `strict` means, the same as in `open_volume`.
    """
    if device.size_bytes < layout.total_bytes:
        raise VolumeMalformed("device", f"it has {device.size_bytes} bytes, the volume needs {layout.total_bytes}")
    return Volume(device, layout, read_catalogue(device, layout), layout.size_bytes, strict=strict)


def measurement(device: Device) -> bytes:
    """The superblock's tag, 16 bytes, which the reference calls the measurement. It says nothing about data."""
    return device.pread(superblock.PLAIN_BYTES, superblock.SEALED_BYTES - superblock.PLAIN_BYTES)
