"""Which of the guest's disks has the root: told by what is on it and in the measured configuration, never by its place.

The host says where a disk is and which serial number it has: that decides the order of looking, and which of several
that look right is taken. What is on a disk in clear proves nothing either; the key, and the broker's memory, do.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from jindiskd.guest import devices
from jindiskd.guest.codes import Code, GuestFailure
from jindiskd.guest.config import serial_of

T = TypeVar("T")
DISK = re.compile(r"((?:vd|sd)[a-z]{1,2})([0-9]{0,3})")
ROOT = "root"
SETTLE_S = 0.5
"""For so long no disk may have come or gone before one that is neither at its place nor hinted at is taken."""
NOT_IT_S = 2.0
"""For so long none may have come before the disk that is at the root's place, or hinted at, is refused."""
MAX_CANDIDATES = 64
"""As many are looked at: a host may attach any number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a root may be."""

    node: Path
    rank: int
    """0 for a disk that says to have the root, 1 for the place in the configuration, 2 for any other."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Root(Generic[T]):
    """Where it is, and what was seen of it."""

    node: Path
    seen: T


def places(device: str, block: Path = devices.BLOCK) -> list[Place]:
    """The nodes that may hold the root, the likeliest first: the same partition of all disks, or all whole disks.

    Args:
        device: by the configuration, such as `/dev/vda3`.
        block: what the kernel knows of block devices.
    """
    wanted = Path(device)
    match = DISK.fullmatch(wanted.name)
    part = match[2] if match is not None else ""
    hinted = {node.name for node in devices.with_serial(serial_of(ROOT), block)}
    found = []
    for entry in block.iterdir():
        one = DISK.fullmatch(entry.name)
        if one is None or one[2] != part:
            continue
        rank = 0 if one[1] in hinted else 1 if entry.name == wanted.name else 2
        found.append(Place(node=Path("/dev", entry.name), rank=rank))
    return sorted(found, key=lambda place: (place.rank, len(place.node.name), place.node.name))[:MAX_CANDIDATES]


def find(device: str, until_s: float, look: Callable[[Path], T], block: Path = devices.BLOCK) -> Root[T]:
    """Wait for the root's disk.

    Args:
        device: where the configuration expects it.
        until_s: a `time.monotonic()` value.
        look: looks at a node, each once, and raises `GuestFailure` if it is not the root.
        block: as of `places`.

    Raises:
        GuestFailure: `DEVICE_MISSING`: no disk that may be it came. `ROOT_DOUBLE`: there are two, and neither place nor
            serial number says which. As `look`: what is where it should be is not it.
    """
    seen: dict[Path, T | GuestFailure] = {}
    known: list[Place] | None = None
    changed_s = time.monotonic()
    while True:
        there, now_s = [place for place in places(device, block) if place.node.is_block_device()], time.monotonic()
        if there != known:
            known, changed_s = there, now_s
        for place in there:
            if place.node not in seen and len(seen) < MAX_CANDIDATES:
                seen[place.node] = _look(look, place.node)
        for rank in range(3):
            fitting = [place.node for place in there if place.rank == rank and _fits(seen.get(place.node))]
            if fitting and rank == 2 and now_s < min(changed_s + SETTLE_S, until_s):
                break
            if len(fitting) > 1:
                raise GuestFailure(Code.ROOT_DOUBLE)
            if fitting:
                found = seen[fitting[0]]
                assert not isinstance(found, GuestFailure)
                return Root(node=fitting[0], seen=found)
        else:
            failure = seen.get(there[0].node) if there and there[0].rank < 2 else None
            if isinstance(failure, GuestFailure) and now_s >= min(changed_s + NOT_IT_S, until_s):
                raise failure
            if now_s >= until_s:
                raise GuestFailure(Code.DEVICE_MISSING)
        time.sleep(devices.POLL_S)


def _look(look: Callable[[Path], T], node: Path) -> T | GuestFailure:
    try:
        return look(node)
    except GuestFailure as failure:
        return failure


def _fits(seen: object) -> bool:
    return seen is not None and not isinstance(seen, GuestFailure)
