"""Reading an encrypted volume of an image in the store, with its key, into a clear file without a name."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from uuid import UUID

from jindiskd.base.anchor import Anchor
from jindiskd.base.secret import Secret
from jindiskd.guest.config import DataVolume, GuestConfig, Luks2Expectation, RootVolume
from jindiskd.image.sparse import block_ranges
from jindiskd.image.store import ImageDamaged, StoredImage
from jindiskd.jindisk.device import FileDevice
from jindiskd.jindisk.export import bulk_export
from jindiskd.jindisk.v1.export import bulk_export as bulk_export1
from jindiskd.jindisk.v1.volume import open_volume as open_volume1
from jindiskd.jindisk.volume import open_volume
from jindiskd.luks2 import check, xts
from jindiskd.luks2.populate import populate, read_exactly

Share = Callable[[int, int], None]
ROOT_PARTITION = 2
"""The third, after boot and UEFI."""


def read_root(
    source: StoredImage,
    config: GuestConfig,
    target_fd: int,
    *,
    key: Secret,
    anchor: bytes,
    workers: int,
    share: Share,
) -> int:
    """Write the content of an image's root volume to a new file; holes stay holes. Returns its length in bytes.

    Args:
        source: the image; nobody writes its disk meanwhile.
        config: the measured configuration of its guests, which says what the volume is.
        target_fd: a new file.
        key: of the volume.
        anchor: JinDisk 2: the last known state, 73 bytes.
        workers: processes.
        share: called with bytes done and in all.

    Raises:
        VolumeError: JinDisk: it does not open with this key, or is not in the last known state; or a block is damaged.
        Luks2HeaderRefused, WrongKey: LUKS2: the header is not the one that was built, or the key another's.
        ImageDamaged: the disk has no root partition.
    """
    if len(source.manifest.partitions) <= ROOT_PARTITION:
        raise ImageDamaged(source.manifest.name, "its manifest names no root partition")
    root = source.manifest.partitions[ROOT_PARTITION]
    place = (source.disk, root.offset_bytes, root.size_bytes)
    return _read(place, config.root, target_fd, "the root", key=key, anchor=anchor, workers=workers, share=share)


def read_data(
    source: StoredImage,
    volume: DataVolume,
    target_fd: int,
    *,
    key: Secret,
    anchor: bytes,
    workers: int,
    share: Share,
) -> int:
    """Write the content of a data volume, as the measured configuration names it, to a new file; as `read_root`.

    Raises:
        ImageDamaged: the image has no such volume. Others as `read_root`.
    """
    known = [one for one in source.manifest.volumes if one.name == volume.name]
    if not known:
        raise ImageDamaged(source.manifest.name, f"its manifest names no volume {volume.name!r}")
    place = (source.volume_disk(known[0]), 0, known[0].disk_size_bytes)
    what = f"the volume {volume.name!r}"
    return _read(place, volume, target_fd, what, key=key, anchor=anchor, workers=workers, share=share)


def _read(
    place: tuple[Path, int, int],
    volume: RootVolume | DataVolume,
    target_fd: int,
    what: str,
    *,
    key: Secret,
    anchor: bytes,
    workers: int,
    share: Share,
) -> int:
    path, offset_bytes, size_bytes = place
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        if volume.luks2 is not None:
            return _read_luks2(fd, offset_bytes, volume.luks2, target_fd, key, workers, share)
        device = FileDevice(fd, name=what, offset_bytes=offset_bytes, size_bytes=size_bytes)
        if volume.jindisk is not None:
            uuid, state = UUID(volume.jindisk.uuid), Anchor.unpack(anchor)
            opened = open_volume(device, key=key, uuid=uuid, anchor=state, name=what)
            bulk_export(opened, target_fd, progress=share, workers=workers)
            return opened.size_bytes
        old = open_volume1(device, key=key)
        bulk_export1(old, target_fd, progress=share, workers=workers)
        return old.size_bytes
    finally:
        os.close(fd)


def _read_luks2(
    fd: int,
    offset: int,
    expectation: Luks2Expectation,
    target_fd: int,
    key: Secret,
    workers: int,
    share: Share,
) -> int:
    """Decrypt what was ever written; what is a hole in the disk is one in the target, and never was anything."""
    header = read_exactly(fd, expectation.header_bytes, offset)
    checked = check.parse_and_check(header, expectation)
    data = offset + checked.data_offset_bytes
    os.ftruncate(target_fd, checked.data_bytes)
    ranges = block_ranges(fd, data, checked.data_bytes)
    total = sum(length for _, length in ranges)
    with check.unlock(header, key) as volume_key:
        populate(
            fd,
            target_fd,
            ranges,
            volume_key=volume_key,
            source_offset_bytes=data,
            workers=workers,
            progress=lambda done: share(done, total),
            cipher=xts.decrypt,
        )
    return checked.data_bytes
