"""The encrypted root of an image, in one of the formats: what the guest shall expect of it, its room, its filling."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol
from uuid import UUID

from jindiskd.base.secret import Secret
from jindiskd.guest.config import JindiskExpectation, Luks2Expectation
from jindiskd.image import gpt, manifest, randomness
from jindiskd.image.request import BuildTask, VolumeFormat
from jindiskd.jindisk import geometry
from jindiskd.jindisk.bulk import bulk_load
from jindiskd.jindisk.crypto import SESSION_BYTES
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
def prepare_volume(task: BuildTask, key: Secret, data_bytes: int, time: int) -> Iterator[SealedVolume]:
    """A volume of the format asked for, for `data_bytes` bytes; what it derives from the key is wiped at the end.

    `time`, in Unix seconds, is what the volume says of its making.
    """
    match task.request.format:
        case VolumeFormat.LUKS2:
            volume = Luks2Volume(task, key, data_bytes)
            try:
                yield volume
            finally:
                volume.close()
        case VolumeFormat.JINDISK:
            yield JindiskVolume(task, key, data_bytes, time)


def placeholders(form: VolumeFormat) -> tuple[Luks2Expectation | None, JindiskExpectation | None]:
    """What stands for the expectations of a volume that is not there yet: enough to know which modules it will need."""
    if form is VolumeFormat.LUKS2:
        blank = Luks2Expectation(header_bytes=0, header_sha256=b"", uuid="", cipher="", key_bytes=0, sector_bytes=0)
        return blank, None
    return None, JindiskExpectation(version=JindiskVolume.version, uuid="")


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


class JindiskVolume:
    """JinDisk 2. The broker's key is the volume key; the builder's session is the first, and closed when this is."""

    version = 2
    cipher = "aes-256-gcm"
    partition_type = gpt.TYPE_JINDISK
    luks2 = None

    def __init__(self, task: BuildTask, key: Secret, data_bytes: int, time: int) -> None:
        """Choose identity and shape; `key` stays the caller's."""
        self._rng = task.request.stream("jindisk")
        self._key, self._workers, self._time = key, task.workers, time
        self.jindisk = JindiskExpectation(version=self.version, uuid=randomness.new_uuid(self._rng))
        # A file system may be smaller than the smallest volume.
        self._logical_bytes = max(data_bytes, geometry.MIN_BLOCKS * geometry.BLOCK)

    @property
    def size_bytes(self) -> int:
        """Data, map, journal, and the reserve that cleaning needs."""
        return geometry.required_bytes(self._logical_bytes)

    def fill(
        self, source_fd: int, target_fd: int, ranges: Sequence[Range], target_offset_bytes: int, share: Share
    ) -> manifest.Volume:
        """Load the ranges; what lies between them reads as zeros."""
        anchor = bulk_load(
            source_fd,
            target_fd,
            size_bytes=self._logical_bytes,
            ranges=ranges,
            key=self._key,
            uuid=UUID(self.jindisk.uuid),
            session_id=self._rng(SESSION_BYTES),
            timestamp=self._time,
            target_offset_bytes=target_offset_bytes,
            progress=share,
            entropy=self._rng,
            workers=self._workers,
        )
        return manifest.Volume(
            format=VolumeFormat.JINDISK, uuid=self.jindisk.uuid, cipher=self.cipher, anchor=anchor.pack()
        )
