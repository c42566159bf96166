"""The versions of JinDisk, in one shape: what the commands need of each. A table instead of conditions.

A version registers an object here; what it cannot do raises `NotSupported`. Results are documents: names and values
for `--json`, of which the commands show a part to people.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from uuid import UUID

from jindiskd.base.secret import Secret
from jindiskd.jindisk.anchor import Reporting
from jindiskd.jindisk.extents import Extent
from jindiskd.jindisk.served import Served
from jindiskd.jindisksetup.progress import Progress
from jindiskd.jindisksetup.targets import Target

Document = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class NewVolume:
    """What a new volume shall be."""

    key: Secret
    """Stays the caller's, here and below."""
    uuid: UUID
    label: str
    size_bytes: int | None
    """Logical size; None for the source's, or the largest that fits."""
    reserve_per_mille: int
    offset_bytes: int
    """Where it begins in the target."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """An existing volume, and what is needed to open it."""

    device: Path
    offset_bytes: int
    key: Secret
    uuid: UUID | None
    anchor_file: Path | None
    """None: unanchored."""
    size_bytes: int | None
    """Logical size, where the format does not record it; None for what the format knows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """How a volume is served."""

    read_only: bool
    reporting: Reporting
    interval_s: float


class Source(Protocol):
    """What a volume is filled from, in order; part of `Served`."""

    @property
    def size_bytes(self) -> int:
        """Length, a multiple of 4096."""

    def read(self, offset: int, length: int) -> bytes:
        """The bytes there. Raises `OSError`."""

    def extents(self, offset: int, length: int) -> list[Extent]:
        """See `Served`."""


class VolumeFormat(Protocol):
    """A version of JinDisk."""

    name: str
    key_bytes: int
    warning: str
    """What it does not protect, in a sentence; empty if it keeps the promise."""
    anchored: bool
    """Whether its state can be remembered: documents of new volumes and `measure` then have the member `anchor`."""

    def create(self, target: Target, new: NewVolume) -> Document:
        """Format an empty, closed volume."""

    def load(self, source_fd: int, source_bytes: int, target: Target, new: NewVolume, progress: Progress) -> Document:
        """Format with the content of a source."""

    def fill(self, source: Source, target: Target, new: NewVolume, progress: Progress) -> Document:
        """Format with the content of another volume or a stream, of which nothing gets on a disk in clear."""

    def size_bytes(self, access: Access) -> int:
        """Logical size of an existing volume."""

    def export(self, access: Access, target_fd: int, offset_bytes: int, progress: Progress) -> int:
        """Write the content where zeros are; returns the bytes of data."""

    def describe(self, device: Path, offset_bytes: int) -> Document:
        """What can be seen without a key; none of it is authentic."""

    def dump(self, access: Access) -> Document:
        """All fields that are no secrets."""

    def check(self, access: Access, *, data: bool, progress: Progress) -> Document:
        """Look for faults: a list under `faults`, of sentences."""

    def measure(self, access: Access) -> Document:
        """What the owner has to remember of its state."""

    def rekey(self, access: Access, new_key: Secret) -> Document:
        """Put it under another key."""

    def open_served(self, access: Access, serving: Serving) -> contextlib.AbstractContextManager[Served]:
        """Open it as a block device; the caller closes that, the context frees what lies below."""


def get(version: int) -> VolumeFormat:
    """The format of a version number."""
    if version == 1:
        from jindiskd.jindisksetup.format1 import JinDisk1  # seldom needed

        return JinDisk1()
    from jindiskd.jindisksetup.format2 import JinDisk2

    return JinDisk2()


VERSIONS = (1, 2)
DEFAULT = 2
