"""The disk of an image: two clear partitions and the encrypted root, laid out and written; boot files described.

Used in the worker, for builds and clones alike.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from jindiskd.image import bootparts, gpt, randomness
from jindiskd.image import manifest as manifests
from jindiskd.image.manifest import BootFile, Partition
from jindiskd.image.randomness import Rng
from jindiskd.image.sparse import copy_ranges, data_ranges
from jindiskd.image.store import CMDLINE, DISK, INITRD, KERNEL
from jindiskd.image.volume import SealedVolume


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Where everything goes."""

    entries: tuple[gpt.Entry, ...]
    """boot, UEFI, root."""
    disk_uuid: str
    contents: tuple[int, int]
    """Descriptors of the clear partitions' contents."""

    @property
    def size_bytes(self) -> int:
        """Of the disk."""
        return gpt.disk_bytes([entry.size_bytes for entry in self.entries])

    @property
    def partitions(self) -> tuple[Partition, ...]:
        """For the manifest."""
        return tuple(
            Partition(
                name=entry.name,
                uuid=entry.uuid,
                type_uuid=entry.type_uuid,
                offset_bytes=entry.offset_bytes,
                size_bytes=entry.size_bytes,
            )
            for entry in self.entries
        )


def lay_out(
    staging: Path, volume: SealedVolume, identities: Rng, *, time: int, owned: Callable[[int], int]
) -> Layout:
    """Make the two clear partitions, of the boot files in `staging`, and place all three.

    Args:
        staging: where the boot files are, and what is not named is kept.
        volume: the root to be.
        identities: gives UUIDs.
        time: Unix seconds, for everything in the clear partitions.
        owned: takes each descriptor that is opened, to be closed at the end.
    """
    files = {name: staging / name for name in (KERNEL, INITRD, CMDLINE)}
    boot = owned(bootparts.make_boot(files, randomness.new_uuid(identities), time, staging))
    uefi = owned(bootparts.make_uefi(identities(4), time, staging))
    disk_uuid, *uuids = (randomness.new_uuid(identities) for _ in range(4))
    entries = gpt.lay_out(
        [
            (gpt.TYPE_BOOT, uuids[0], "boot", os.fstat(boot).st_size),
            (gpt.TYPE_ESP, uuids[1], "UEFI", os.fstat(uefi).st_size),
            (volume.partition_type, uuids[2], "jindisk-rootfs", volume.size_bytes),
        ]
    )
    return Layout(entries=entries, disk_uuid=disk_uuid, contents=(boot, uefi))


def write_disk(staging: Path, layout: Layout, fill: Callable[[int, int], manifests.Volume]) -> manifests.Volume:
    """Write the disk image: table, clear partitions, and by `fill(descriptor, offset)` the encrypted root; synced."""
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    disk = os.open(staging / DISK, flags, 0o644)
    try:
        os.truncate(disk, layout.size_bytes)
        gpt.write_table(disk, layout.size_bytes, layout.disk_uuid, layout.entries)
        for entry, content in zip(layout.entries[:2], layout.contents, strict=True):
            copy_ranges(content, disk, data_ranges(content), target_offset=entry.offset_bytes)
        sealed = fill(disk, layout.entries[2].offset_bytes)
        os.fsync(disk)
    finally:
        os.close(disk)
    return sealed


def boot_file(staging: Path, name: str) -> BootFile:
    """Describe a boot file, and make it durable."""
    with (staging / name).open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").digest()
        os.fchmod(stream.fileno(), 0o644)
        os.fsync(stream.fileno())
        size = os.fstat(stream.fileno()).st_size
    return BootFile(file=name, size_bytes=size, sha256=digest)
