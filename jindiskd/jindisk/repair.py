"""What can be done for a damaged volume besides exporting it (format document, section 21).

Two things change a disk: writing the identification block anew, and, on demand, giving up blocks that cannot be read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from uuid import UUID

from jindiskd.base.anchor import Anchor
from jindiskd.base.secret import Secret
from jindiskd.jindisk.anchor import Unanchored
from jindiskd.jindisk.create import identify
from jindiskd.jindisk.device import Device
from jindiskd.jindisk.errors import VolumeDeviceFailed, VolumeError
from jindiskd.jindisk.geometry import BLOCK, ENTRY_BYTES, PER_LEAF, Kind
from jindiskd.jindisk.identification import Identification
from jindiskd.jindisk.memtable import UNMAPPED
from jindiskd.jindisk.recovery import choose_state
from jindiskd.jindisk.session import Session

_LEAF, _ENTRY = PER_LEAF[Kind.F], ENTRY_BYTES[Kind.F]


@dataclass(frozen=True, slots=True, kw_only=True)
class Salvaged:
    """What `salvage` found."""

    unmapped: tuple[int, ...]
    """Logical blocks that were given up and read as zeros now."""
    pages: tuple[VolumeError, ...]
    """Pages of the map that cannot be read. What they map stays unreadable: export the rest to a new volume."""


def salvage(session: Session, *, progress: Callable[[int, int], None] | None = None) -> Salvaged:
    """Give up every block that cannot be read, so that reading its place works again, with zeros.

    Their segments can be cleaned again afterwards. The loss is committed when this returns.

    Args:
        session: begun; nobody else writes meanwhile.
        progress: called with bytes of the volume looked at, and in all.

    Raises:
        VolumeError: committing failed.
    """
    volume, total = session.volume, session.size_bytes
    lost: list[int] = []
    pages: list[VolumeError] = []
    session.flush()
    for index, page in volume.leaves(pages.append):
        for at in range(min(_LEAF, volume.geometry.blocks - index * _LEAF)):
            entry, lba = page[at * _ENTRY : (at + 1) * _ENTRY], index * _LEAF + at
            if entry == UNMAPPED:
                continue
            try:
                volume.fetch([volume.wanted(lba, entry)])
            except VolumeError:
                lost.append(lba)
        if progress is not None:
            progress(min((index + 1) * _LEAF * BLOCK, total), total)
    for lba in lost:
        session.discard(lba * BLOCK, BLOCK)
    session.checkpoint()
    session.cleaner.damaged.clear()
    return Salvaged(unmapped=tuple(lost), pages=tuple(pages))


def restore_identification(
    device: Device, *, key: Secret, uuid: UUID, anchor: Anchor | Unanchored, label: str = ""
) -> Identification:
    """Write the identification block anew from the superblock, whatever is there now; returns what was written.

    Args:
        device: of a volume that nobody has open.
        key: the volume key.
        uuid: the volume's, from the owner's records.
        anchor: what the owner remembers.
        label: for people; it is nowhere else on the volume.

    Raises:
        VolumeError: there is no acceptable state.
        InvalidArgument: the label is too long.
    """
    found = choose_state(device, key=key, uuid=uuid, anchor=anchor)
    restored = found.superblock.identification(label)
    try:
        identify(device, restored)
    except OSError as exc:
        raise VolumeDeviceFailed("writing the identification block", exc) from exc
    return restored
