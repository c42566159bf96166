"""What the kernel has mapped that is the helper's: found by the mark on each, never by a record of our own.

A network block device carries its mark as the backend identifier, a device-mapper mapping as its UUID. A mark says what
is mapped, from which device, and for whom; it is read back from sysfs, by anybody.

    nbd     jindisk:KIND:UUID:MAJOR:MINOR:SEQUENCE:ro|rw:UID
    dm      CRYPT-LUKS2-UUID-jindisk.MAJOR.MINOR.SEQUENCE.UID      (the form that cryptsetup knows as its own)
    dm      JINDISK-1-jindisk.MAJOR.MINOR.SEQUENCE.UID
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

from jindiskd.helper.protocol import Below, Kind, MalformedRequest, Open

SYS = Path("/sys")
_NBD = re.compile(
    r"jindisk:(jindisk1|jindisk2):([0-9a-f-]{36})?:([0-9]{1,4}):([0-9]{1,7}):([0-9]{1,19}):(ro|rw):([0-9]{1,10})"
)
_DM = re.compile(
    r"(?:CRYPT-LUKS2-([0-9a-f]{32})|JINDISK-1)-jindisk\.([0-9]{1,4})\.([0-9]{1,7})\.([0-9]{1,19})\.([0-9]{1,10})"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mapped:
    """A mapped volume."""

    node: str
    mark: str
    kind: Kind
    uuid: str
    below: Below
    read_only: bool
    owner: int
    process: int = 0
    """The network block device's: which process attached it; 0 where there is none."""


def nbd_mark(request: Open) -> str:
    """The mark of a network block device."""
    below, mode = request.below, "ro" if request.read_only else "rw"
    numbers = f"{below.major}:{below.minor}:{below.sequence}"
    return f"jindisk:{request.kind}:{request.uuid}:{numbers}:{mode}:{request.owner}"


def dm_mark(request: Open) -> str:
    """The mark of a mapping."""
    below = request.below
    head = f"CRYPT-LUKS2-{UUID(request.uuid).hex}" if request.kind is Kind.LUKS2 else "JINDISK-1"
    return f"{head}-jindisk.{below.major}.{below.minor}.{below.sequence}.{request.owner}"


def dm_name(request: Open) -> str:
    """The name of a mapping, below /dev/mapper."""
    return f"jindisk-{request.uuid or str(request.below).replace(':', '-')}"


def read_mark(node: str, mark: str, *, read_only: bool = False, process: int = 0) -> Mapped | None:
    """What a mark says; None if it is none of ours. `read_only` is what the kernel says of a mapping."""
    try:
        if node.startswith("nbd"):
            if (found := _NBD.fullmatch(mark)) is None:
                return None
            kind, uuid, major, minor, sequence, mode, owner = found.groups()
            mapped = Mapped(
                node=node, mark=mark, kind=Kind(kind), uuid=uuid or "", read_only=mode == "ro", owner=int(owner),
                below=Below(major=int(major), minor=int(minor), sequence=int(sequence)), process=process,
            )  # fmt: skip
        else:
            if (found := _DM.fullmatch(mark)) is None:
                return None
            uuid, major, minor, sequence, owner = found.groups()
            mapped = Mapped(
                node=node, mark=mark, kind=Kind.LUKS2 if uuid else Kind.JINDISK1, owner=int(owner),
                uuid=str(UUID(uuid)) if uuid else "", read_only=read_only,
                below=Below(major=int(major), minor=int(minor), sequence=int(sequence)),
            )  # fmt: skip
        mapped.below.check()
        return mapped
    except (MalformedRequest, ValueError):
        return None


def _text(path: Path) -> str:
    """The line in a file of sysfs; empty where there is none, or the device has gone meanwhile."""
    try:
        return path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return ""


def mapped(sys: Path = SYS) -> list[Mapped]:
    """All that is mapped now, by node."""
    return sorted(_all(sys), key=lambda item: item.node)


def _all(sys: Path) -> Iterator[Mapped]:
    for folder in (sys / "block").glob("nbd*"):
        process = _text(folder / "pid")
        if process.isdecimal():  # else nothing is attached
            found = read_mark(folder.name, _text(folder / "backend"), process=int(process))
            if found is not None:
                yield found
    for folder in (sys / "block").glob("dm-*"):
        found = read_mark(folder.name, _text(folder / "dm/uuid"), read_only=_text(folder / "ro") == "1")
        if found is not None:
            yield found


def in_use(node: str, sys: Path = SYS) -> bool:
    """Whether another device lies on a node; a mount does not show here."""
    return any((sys / "block" / node / "holders").glob("*"))
