"""Formatting: a new, empty volume (format document, sections 4, 5 and 7)."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from uuid import UUID

from jindiskd.base.anchor import State
from jindiskd.base.secret import Secret
from jindiskd.jindisk.anchor import Keeper, Reporting
from jindiskd.jindisk.crypto import Generator
from jindiskd.jindisk.device import Device
from jindiskd.jindisk.errors import VolumeMalformed
from jindiskd.jindisk.geometry import BLOCK, JOURNAL_START, Geometry, Kind
from jindiskd.jindisk.identification import Identification
from jindiskd.jindisk.journal import JournalWriter
from jindiskd.jindisk.recovery import Recovered
from jindiskd.jindisk.segments import SegmentTable
from jindiskd.jindisk.session import Session
from jindiskd.jindisk.slots import Slots
from jindiskd.jindisk.superblock import HOLE, SLOT_START, Superblock, root_after_superblock
from jindiskd.jindisk.tree import Tree
from jindiskd.jindisk.volume import Volume


def wipe(device: Device, geometry: Geometry) -> None:
    """Check the device's size and overwrite what could be taken for an older volume. Raises `VolumeMalformed`."""
    if device.size_bytes < geometry.end * BLOCK:
        raise VolumeMalformed("device", f"it has {device.size_bytes} bytes, the volume needs {geometry.end * BLOCK}")
    device.pwrite(0, bytes(JOURNAL_START * BLOCK))
    device.flush()


def identify(device: Device, header: Identification) -> None:
    """Write the identification block, durably: from then on this is a volume. Raises `OSError`."""
    device.pwrite(0, header.encode())
    device.flush()


def create_volume(
    device: Device,
    *,
    geometry: Geometry,
    key: Secret,
    uuid: UUID,
    session_id: bytes,
    label: str = "",
    keeper: Keeper | None = None,
    reporting: Reporting = Reporting.INTERVAL,
    entropy: Callable[[int], bytes] = os.urandom,
    clock: Callable[[], float] = time.time,
    ordered_placement: bool = False,
    identified: bool = True,
) -> Session:
    """Format a device and begin the first session on it; epoch and sequence number are 1.

    Args:
        device: at least `geometry.end` blocks; what it holds is lost.
        geometry: for example `default_geometry(blocks)`.
        key: the volume key, 32 bytes; used for this volume and nothing else; stays the caller's.
        uuid: the volume's identity.
        session_id: 32 bytes, of the first session.
        label: for people; public and not authenticated.
        keeper: is told about commits and closing; there is nothing to adopt.
        reporting: when.
        entropy: the operating system's source of random bytes.
        clock: Unix time.
        ordered_placement: as in `Session`.
        identified: otherwise nothing opens the volume before the caller, at the end, has it identified by `identify`.

    Raises:
        InvalidArgument: the label is too long.
        VolumeMalformed: the device is too small.
        OSError: the device failed.
    """
    wipe(device, geometry)
    generator = Generator(key, session_id, entropy)
    journal_key = generator.sealing_key()
    superblock = Superblock(
        uuid=uuid,
        geometry=geometry,
        epoch=1,
        sequence=1,
        closed=False,
        mapped=0,
        oldest_stamp=0,
        formatted_at=int(clock()),
        committed_at=int(clock()),
        session=session_id,
        previous_root=bytes(32),
        journal_key=journal_key.material,
        tops=dict.fromkeys(Kind, HOLE),
    )
    sealed = superblock.seal(key, generator)
    header = superblock.identification(label)
    device.pwrite((SLOT_START + superblock.slot) * BLOCK, sealed)
    device.flush()
    if identified:
        identify(device, header)
    tree = Tree(device, geometry, Kind.S, HOLE, cache_pages=1)
    root = root_after_superblock(sealed)
    found = Recovered(
        identification=header,
        superblock=superblock,
        state=State(session=session_id, sequence=1, root=root),
        commits=(),
        segments=SegmentTable(geometry, tree, sequence=1, mapped=0),
        slots=("", ""),
    )
    session = Session(
        Volume(device, found, key=key),
        session_id=session_id,
        keeper=keeper,
        reporting=reporting,
        generator=generator,
        clock=clock,
        ordered_placement=ordered_placement,
    )
    session.begin_new(JournalWriter(journal_key, 1, root), Slots(geometry))
    return session
