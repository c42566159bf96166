"""An encrypted volume on LUKS2, the root or another: the header is read once, checked, and only the copy is used."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from jindiskd.base.secret import Secret
from jindiskd.guest import devices, dm, udev
from jindiskd.guest.config import Luks2Expectation
from jindiskd.luks2 import check


class LuksRoot:
    """A LUKS2 volume on a block device."""

    def __init__(self, device: Path, expectation: Luks2Expectation) -> None:
        """Read the header area of `device` into memory and check it.

        Raises:
            OSError, EOFError: it cannot be read.
            JindiskError: it is not what the image was built with.
        """
        descriptor = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
        try:
            found = os.fstat(descriptor)
            # By number, so that no name is followed a second time.
            number = found.st_rdev if stat.S_ISBLK(found.st_mode) else found.st_dev
            self._device = f"{os.major(number)}:{os.minor(number)}"
            self._copy = devices.read_head(descriptor, expectation.header_bytes)
        finally:
            os.close(descriptor)
        self._checked = check.parse_and_check(self._copy, expectation)

    def unlock(self, key: Secret) -> Secret:
        """The volume key; `key` is what the broker released. Raises `WrongKey`."""
        return check.unlock(self._copy, key)

    def activate(self, volume_key: Secret, mapping: str) -> Path:
        """Open the volume as `/dev/mapper/<mapping>` and return that path. The kernel gets the key, nobody else.

        Raises:
            OSError: the kernel refused.
        """
        checked = self._checked
        active = dm.activate(
            mapping,
            # The form that cryptsetup recognises as its own.
            f"CRYPT-LUKS2-{checked.uuid.replace('-', '')}-{mapping}",
            sectors=checked.data_bytes // dm.SECTOR_BYTES,
            kind="crypt",
            parameters=dm.crypt_parameters(
                checked.cipher,
                volume_key.reveal(),
                self._device,
                offset_sectors=checked.data_offset_bytes // dm.SECTOR_BYTES,
                sector_bytes=checked.sector_bytes,
            ),
        )
        return udev.publish(active)
