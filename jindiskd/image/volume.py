"""An encrypted volume of an image, in one of the formats: what the guest shall expect of it, its room, its filling."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol
from uuid import UUID

from jindiskd.base.secret import Secret
from jindiskd.guest.config import Jindisk1Expectation, JindiskExpectation, Luks2Expectation
from jindiskd.image import gpt, manifest, randomness
from jindiskd.image.randomness import Rng
from jindiskd.image.request import BuildTask, VolumeFormat, VolumeRequest
from jindiskd.jindisk import geometry
from jindiskd.jindisk.bulk import bulk_load
from jindiskd.jindisk.crypto import SESSION_BYTES
from jindiskd.jindisk.v1 import load as load1
from jindiskd.jindisk.v1 import superblock as superblock1
from jindiskd.jindisk.v1.layout import layout_for
from jindiskd.luks2 import header, layout
from jindiskd.luks2.populate import Range, populate, write_exactly

Share = Callable[[int, int], None]
"""Called with bytes done and bytes in all."""


Expectation = Luks2Expectation | JindiskExpectation | Jindisk1Expectation


class SealedVolume(Protocol):
    """A volume to be: known before the disk exists, as the guest's measured configuration names it."""

    @property
    def partition_type(self) -> str:
        """GUID of the partition's type."""

    @property
    def size_bytes(self) -> int:
        """Room it needs on the disk."""

    @property
    def expected(self) -> Expectation:
        """What the guest shall expect."""

    def fill(
        self, source_fd: int, target_fd: int, ranges: Sequence[Range], target_offset_bytes: int, share: Share
    ) -> manifest.Volume:
        """Write the volume to the target, with the used `ranges` of the source, which begins at its start."""


@contextlib.contextmanager
def prepare_volume(
    task: BuildTask, key: Secret, data_bytes: int, time: int, *, asked: VolumeRequest | None = None
) -> Iterator[SealedVolume]:
    """A volume of the format asked for, for `data_bytes` bytes; what it derives from the key is wiped at the end.

    Args:
        task: whose root it is, unless `asked` is given.
        key: of the volume.
        data_bytes: of what goes into it.
        time: Unix seconds, what the volume says of its making.
        asked: one of its data volumes.
    """
    form = task.request.format if asked is None else asked.format
    rng = task.request.stream(form.value if asked is None else f"volume {asked.name}")
    match form:
        case VolumeFormat.LUKS2:
            volume = Luks2Volume(rng, task.workers, key, data_bytes)
            try:
                yield volume
            finally:
                volume.close()
        case VolumeFormat.JINDISK:
            yield JindiskVolume(rng, task.workers, key, data_bytes, time)
        case VolumeFormat.JINDISK1:
            yield Jindisk1Volume(rng, task.workers, key, data_bytes)


def placeholder(form: VolumeFormat) -> Expectation:
    """What stands for the expectation of a volume that is not there yet: enough to know which modules it will need."""
    match form:
        case VolumeFormat.LUKS2:
            return Luks2Expectation(header_bytes=0, header_sha256=b"", uuid="", cipher="", key_bytes=0, sector_bytes=0)
        case VolumeFormat.JINDISK:
            return JindiskExpectation(version=JindiskVolume.version, uuid="")
        case VolumeFormat.JINDISK1:
            return Jindisk1Expectation(superblock_sha256=b"")


class Luks2Volume:
    """LUKS2 with a random volume key; the broker's key opens its only slot."""

    partition_type = gpt.TYPE_LUKS

    def __init__(self, rng: Rng, workers: int, key: Secret, data_bytes: int) -> None:
        """Draw volume key and UUID and make the header."""
        self._key = Secret(bytearray(rng(layout.KEY_BYTES)))
        self._workers, self._data_bytes = workers, data_bytes
        uuid = randomness.new_uuid(rng)
        self._header = header.make_header(
            volume_key=self._key, passphrase=key, uuid=uuid, data_bytes=data_bytes, rng=rng
        )
        self.expected = Luks2Expectation(
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
            uuid=self.expected.uuid,
            cipher=self.expected.cipher,
            header_bytes=self.expected.header_bytes,
            header_sha256=self.expected.header_sha256,
        )

    def close(self) -> None:
        """Wipe the volume key."""
        self._key.close()


class JindiskVolume:
    """JinDisk 2. The broker's key is the volume key; the builder's session is the first, and closed when this is."""

    version = 2
    cipher = "aes-256-gcm"
    partition_type = gpt.TYPE_JINDISK

    def __init__(self, rng: Rng, workers: int, key: Secret, data_bytes: int, time: int) -> None:
        """Choose identity and shape; `key` stays the caller's."""
        self._rng = rng
        self._key, self._workers, self._time = key, workers, time
        self.expected = JindiskExpectation(version=self.version, uuid=randomness.new_uuid(self._rng))
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
            uuid=UUID(self.expected.uuid),
            session_id=self._rng(SESSION_BYTES),
            timestamp=self._time,
            target_offset_bytes=target_offset_bytes,
            progress=share,
            entropy=self._rng,
            workers=self._workers,
        )
        return manifest.Volume(
            format=VolumeFormat.JINDISK, uuid=self.expected.uuid, cipher=self.cipher, anchor=anchor.pack()
        )


class Jindisk1Volume:
    """JinDisk 1, which protects nothing against whoever has the disk. The broker's key is root key and root IV."""

    cipher = "aes-128-gcm"
    partition_type = gpt.TYPE_JINDISK

    def __init__(self, rng: Rng, workers: int, key: Secret, data_bytes: int) -> None:
        """Choose the layout; `key`, 28 bytes, stays the caller's."""
        self._rng = rng
        self._key, self._workers = key, workers
        self._data_bytes, self._layout = data_bytes, layout_for(data_bytes)
        sealed = superblock1.seal(self._layout, key)
        self.expected = Jindisk1Expectation(superblock_sha256=hashlib.sha256(sealed).digest())

    @property
    def size_bytes(self) -> int:
        """Data, index, and the reserve of 1.25 GiB, most of which stay holes."""
        return self._layout.total_bytes

    def fill(
        self, source_fd: int, target_fd: int, ranges: Sequence[Range], target_offset_bytes: int, share: Share
    ) -> manifest.Volume:
        """Load the ranges, with the zeros in them; nothing between them is ever read by a file system."""
        load1.bulk_load(
            source_fd,
            target_fd,
            size_bytes=self._data_bytes,
            ranges=ranges,
            key=self._key,
            layout=self._layout,
            target_offset_bytes=target_offset_bytes,
            progress=share,
            entropy=self._rng,
            workers=self._workers,
        )
        return manifest.Volume(
            format=VolumeFormat.JINDISK1,
            uuid="",
            cipher=self.cipher,
            header_bytes=superblock1.SEALED_BYTES,
            header_sha256=self.expected.superblock_sha256,
        )
