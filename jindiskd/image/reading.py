"""Reading the encrypted root of an image in the store, with its key, into a clear file without a name."""

from __future__ import annotations

import os
from collections.abc import Callable
from uuid import UUID

from jindiskd.base.anchor import Anchor
from jindiskd.base.secret import Secret
from jindiskd.guest.config import GuestConfig, Luks2Expectation
from jindiskd.image.sparse import block_ranges
from jindiskd.image.store import ImageDamaged, StoredImage
from jindiskd.jindisk.device import FileDevice
from jindiskd.jindisk.export import bulk_export
from jindiskd.jindisk.v1.export import bulk_export as bulk_export1
from jindiskd.jindisk.v1.volume import open_volume as open_volume1
from jindiskd.jindisk.volume import open_volume
from jindiskd.luks2 import check, xts
from jindiskd.luks2.populate import populate, read_exactly

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
    share: Callable[[int, int], None],
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
    fd = os.open(source.disk, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        if config.root.luks2 is not None:
            return _read_luks2(fd, root.offset_bytes, config.root.luks2, target_fd, key, workers, share)
        device = FileDevice(fd, name="the root", offset_bytes=root.offset_bytes, size_bytes=root.size_bytes)
        if config.root.jindisk is not None:
            uuid, state = UUID(config.root.jindisk.uuid), Anchor.unpack(anchor)
            volume = open_volume(device, key=key, uuid=uuid, anchor=state, name="the root")
            bulk_export(volume, target_fd, progress=share, workers=workers)
            return volume.size_bytes
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
    share: Callable[[int, int], None],
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
