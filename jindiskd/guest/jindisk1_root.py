"""A root on JinDisk 1, by the kernel's `jindisk` target. The format does not protect it: the host reads and changes it.

Attestation and release go the same way as for other roots, so the key is released to the measured guest alone; but the
key is not needed to read the disk (`docs/formats/jindisk1.md`, section 1). For guests that have such volumes already.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from jindiskd.base.secret import Secret
from jindiskd.guest import devices, dm, shutdown, udev
from jindiskd.guest.codes import Code, GuestFailure
from jindiskd.guest.config import Jindisk1Expectation
from jindiskd.jindisk.v1 import superblock
from jindiskd.jindisk.v1.layout import SECTOR_BYTES, Layout

TARGET = "jindisk"


class Jindisk1Root:
    """A JinDisk 1 volume on a block device."""

    def __init__(self, device: Path, expectation: Jindisk1Expectation) -> None:
        """Look whether the kernel can open it, then whether it seems to be the volume expected.

        Raises:
            GuestFailure: the kernel has no such target, or it is another volume.
            OSError, EOFError: the device cannot be read.
        """
        try:
            known = dm.targets()
        except OSError:
            raise GuestFailure(Code.TARGET) from None
        if TARGET not in known:
            raise GuestFailure(Code.TARGET)
        self._device = device
        descriptor = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self._superblock = bytes(devices.read_head(descriptor, superblock.SEALED_BYTES))
            self._bytes = os.lseek(descriptor, 0, os.SEEK_END)
        finally:
            os.close(descriptor)
        if hashlib.sha256(self._superblock).digest() != expectation.superblock_sha256:
            raise GuestFailure(Code.VOLUME)

    def unlock(self, key: Secret) -> Layout:
        """Where everything lies, from the superblock; shows that the released key is the volume's.

        Raises:
            JindiskError: the key does not open it.
            GuestFailure: the device is smaller than the volume.
        """
        layout = superblock.open_sealed(self._superblock, key)
        if layout.total_bytes > self._bytes:
            raise GuestFailure(Code.VOLUME)
        return layout

    def activate(self, key: Secret, layout: Layout, mapping: str) -> Path:
        """Open the volume as `/dev/mapper/<mapping>` and return that path.

        Raises:
            OSError: the kernel refused.
        """
        sectors, uuid = layout.size_bytes // SECTOR_BYTES, f"JINDISK1-{mapping}"
        active = dm.activate(
            mapping,
            uuid,
            sectors=sectors,
            kind=TARGET,
            parameters=dm.jindisk_parameters(key.reveal(), os.fspath(self._device)),
        )
        # The target holds its index in memory until it ends.
        shutdown.remember_mapping(mapping, uuid, sectors, self._device)
        return udev.publish(active)
