"""The encrypted root of an image, in one of the formats: what the guest shall expect of it, its room, its filling."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from jindiskd.base.secret import Secret
from jindiskd.errors import NotSupported
from jindiskd.guest.config import JindiskExpectation, Luks2Expectation
from jindiskd.image import gpt, manifest, randomness
from jindiskd.image.request import BuildTask, VolumeFormat
from jindiskd.luks2 import header, layout
from jindiskd.luks2.populate import Range, populate, write_exactly

Share = Callable[[int, int], None]
"""Called with bytes done and bytes in all."""


class SealedVolume(Protocol):
    """A volume to be: known before the disk exists, as the guest's measured configuration names it."""

    @property
    def partition_type(self) -> str:
        """GUID of the partition's type."""

    @property
    def size_bytes(self) -> int:
        """Room it needs on the disk."""

    @property
    def luks2(self) -> Luks2Expectation | None:
        """What the guest shall expect, if it is LUKS2."""

    @property
    def jindisk(self) -> JindiskExpectation | None:
        """What the guest shall expect, if it is JinDisk."""

    def fill(
        self, source_fd: int, target_fd: int, ranges: Sequence[Range], target_offset_bytes: int, share: Share
    ) -> manifest.Volume:
        """Write the volume to the target, with the used `ranges` of the source, which begins at its start."""


@contextlib.contextmanager
def prepare_volume(task: BuildTask, key: Secret, data_bytes: int) -> Iterator[SealedVolume]:
    """A volume of the format asked for, for `data_bytes` bytes; what it derives from the key is wiped at the end."""
    if task.request.format is VolumeFormat.JINDISK:
        raise NotSupported("the format jindisk", "build with the format luks2")
    volume = Luks2Volume(task, key, data_bytes)
    try:
        yield volume
    finally:
        volume.close()


class Luks2Volume:
    """LUKS2 with a random volume key; the broker's key opens its only slot."""

    partition_type = gpt.TYPE_LUKS
    jindisk = None

    def __init__(self, task: BuildTask, key: Secret, data_bytes: int) -> None:
        """Draw volume key and UUID and make the header."""
        rng = task.request.stream("luks2")
        self._key = Secret(bytearray(rng(layout.KEY_BYTES)))
        self._workers, self._data_bytes = task.workers, data_bytes
        uuid = randomness.new_uuid(rng)
        self._header = header.make_header(
            volume_key=self._key, passphrase=key, uuid=uuid, data_bytes=data_bytes, rng=rng
        )
        self.luks2 = Luks2Expectation(
            header_bytes=len(self._header),
            header_sha256=hashlib.sha256(self._header).digest(),
            uuid=uuid,
            cipher=layout.CIPHER,
            key_bytes=layout.KEY_BYTES,
            sector_bytes=layout.SECTOR_BYTES,
        )

    @property
    def size_bytes(self) -> int:
        """Header area and data."""
        return len(self._header) + self._data_bytes

    def fill(
        self, source_fd: int, target_fd: int, ranges: Sequence[Range], target_offset_bytes: int, share: Share
    ) -> manifest.Volume:
        """Write the header, then encrypt the ranges behind it."""
        write_exactly(target_fd, self._header, target_offset_bytes)
        total = sum(length for _, length in ranges)
        populate(
            source_fd,
            target_fd,
            ranges,
            volume_key=self._key,
            target_offset_bytes=target_offset_bytes + len(self._header),
            workers=self._workers,
            progress=lambda done: share(done, total),
        )
        return manifest.Volume(
            format=VolumeFormat.LUKS2,
            uuid=self.luks2.uuid,
            cipher=self.luks2.cipher,
            header_bytes=self.luks2.header_bytes,
            header_sha256=self.luks2.header_sha256,
        )

    def close(self) -> None:
        """Wipe the volume key."""
        self._key.close()
