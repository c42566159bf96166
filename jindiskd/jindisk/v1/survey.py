"""Finding out what is in use in a JinDisk 1 volume, before it is written (`docs/formats/jindisk1.md`, section 10).

The tables on the disk say too much after a crash of the module, can say too little, and are anybody's to forge. So
what is in use is taken from the index, and tables that differ are put right.
"""

from __future__ import annotations

import struct
from array import array
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

from jindiskd.jindisk.errors import VolumeDeviceFailed, VolumeInconsistent
from jindiskd.jindisk.v1.index import is_mark, load_level0
from jindiskd.jindisk.v1.layout import BLOCK, MAX_SEGMENTS, RIT_PER_BLOCK, SEGMENT_BLOCKS
from jindiskd.jindisk.v1.nodes import Leaf
from jindiskd.jindisk.v1.space import Space
from jindiskd.jindisk.v1.tables import FULL_BITMAP
from jindiskd.jindisk.v1.volume import Volume, block_name

WINDOW_BLOCKS = 20 << 20
"""Blocks whose owners are in memory at a time: 80 MiB of memory, and one pass for a volume of 64 GiB."""
_QUADS = struct.Struct(f"<{RIT_PER_BLOCK}Q")
_POSITION = struct.Struct("<Q")
Window: TypeAlias = "array[int]"
"""By block: the LBA that owns it, or `NOBODY`."""
NOBODY = 0xFFFFFFFF
_NOBODY_BYTES = b"\xff" * 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """What was found."""

    space: Space
    recent: dict[int, bytes]
    """Records and marks of level 0."""
    fold: bool
    """Whether level 0 must be merged into level 1 before anything else: there are deletion marks, or covered records
    whose blocks are in use otherwise."""
    marked: frozenset[int]
    """Slots of files of level 1 with deletion marks."""
    repaired: int
    """Blocks of the RIT that were put right."""


class _Surveyor:
    def __init__(self, volume: Volume, recent: Mapping[int, bytes]) -> None:
        self.volume, self.recent = volume, recent
        self.layout = volume.layout
        self.marked: set[int] = set()
        self.fold = any(is_mark(record) for record in recent.values())
        self.repaired = 0
        self._order = sorted(recent)

    def window(self, start: int, end: int) -> Window:
        """Owners of blocks from `start` to before `end`."""
        owners: Window = array("I", [NOBODY]) * (end - start)
        covered: list[tuple[int, int]] = []
        for file in self.volume.levels.level1:
            before = -1
            for leaf in file.leaves():
                if leaf.marks:
                    self.marked.add(file.entry.slot)
                if not self._own_run(owners, leaf, start):
                    self._own_each(owners, leaf, start, before=before, covered=covered)
                before = leaf.keys[-1]
        for key, record in self.recent.items():
            position = _POSITION.unpack_from(record)[0]
            if start <= position < end:
                self._own(owners, position - start, key, position)
        for key, position in covered:
            # The module gives such a block back when it merges, if RIT still has this owner.
            if owners[position - start] == NOBODY:
                owners[position - start] = key
            else:
                self.fold = True
        return owners

    def _own_run(self, owners: Window, leaf: Leaf, start: int) -> bool:
        """Enter a leaf whose blocks lie one after the other, all at once; False if it is not such a leaf."""
        count, at = len(leaf.keys), leaf.positions[0] - start
        if not leaf.marks and (max(leaf.positions) < start or min(leaf.positions) >= start + len(owners)):
            return True  # another window's
        if leaf.marks or at < 0 or at + count > len(owners):
            return False
        if owners[at : at + count].tobytes() != _NOBODY_BYTES * count:
            return False
        if leaf.positions != tuple(range(leaf.positions[0], leaf.positions[0] + count)):
            return False
        near = bisect_left(self._order, leaf.keys[0])
        if near < len(self._order) and self._order[near] <= leaf.keys[-1]:
            return False
        owners[at : at + count] = array("I", leaf.keys)
        return True

    def _own_each(self, owners: Window, leaf: Leaf, start: int, *, before: int, covered: list[tuple[int, int]]) -> None:
        for key, position in zip(leaf.keys, leaf.positions, strict=True):
            if key != before and start <= position < start + len(owners):
                if key in self.recent:
                    covered.append((key, position))
                else:
                    self._own(owners, position - start, key, position)
            before = key

    def _own(self, owners: Window, at: int, key: int, position: int) -> None:
        if owners[at] != NOBODY:
            what = block_name(key, self.layout.data_start + position)
            raise VolumeInconsistent(what, f"logical block {owners[at]} has the same raw block")
        owners[at] = key

    def enter(self, space: Space, owners: Window, start: int) -> None:
        """Fill in the bitmaps of a window's segments."""
        for at in range(0, len(owners), SEGMENT_BLOCKS):
            part = owners[at : at + SEGMENT_BLOCKS]
            free = part.count(NOBODY)
            if free == SEGMENT_BLOCKS:
                continue
            bitmap = FULL_BITMAP
            if free:
                digits = "".join("0" if owner == NOBODY else "1" for owner in reversed(part))
                bitmap = int(digits, 2).to_bytes(SEGMENT_BLOCKS // 8, "little")
            space.enter((start + at) // SEGMENT_BLOCKS, bitmap)

    def repair_reverse(self, owners: Window, start: int) -> None:
        """Write RIT entries of blocks in use that name another owner. Raises `OSError`."""
        device = self.volume.device
        for at in range(0, len(owners), RIT_PER_BLOCK):
            part = owners[at : at + RIT_PER_BLOCK]
            if part.tobytes() == _NOBODY_BYTES * RIT_PER_BLOCK:
                continue
            where = (self.layout.rit_start + (start + at) // RIT_PER_BLOCK) * BLOCK
            block = device.pread(where, BLOCK)
            if block == array("Q", part).tobytes():
                continue  # all in use, and all right
            found = _QUADS.unpack(block)
            wanted = [value if owner == NOBODY else owner for owner, value in zip(part, found, strict=True)]
            if wanted != list(found):
                device.pwrite(where, _QUADS.pack(*wanted))
                self.repaired += 1


def survey(volume: Volume) -> Survey:
    """Read the whole index, and put the RIT right where it names another owner for a block in use.

    Raises:
        VolumeError: the index cannot be read, or two logical blocks share a raw block.
        VolumeDeviceFailed: reading, or writing the RIT, failed.
    """
    for entry in volume.levels.entries:
        if entry.last >= MAX_SEGMENTS * SEGMENT_BLOCKS:
            raise VolumeInconsistent(entry.name, f"it has logical block {entry.last}, which no volume can have")
    recent = load_level0(volume.levels)
    layout, device = volume.layout, volume.device
    surveyor = _Surveyor(volume, recent)
    try:
        svt = device.pread(layout.svt_start * BLOCK, layout.svt_blocks * BLOCK)
        space = Space(layout, svt, table_segments=volume.size_bytes // (SEGMENT_BLOCKS * BLOCK))
        for start in range(0, layout.data_blocks, WINDOW_BLOCKS):
            owners = surveyor.window(start, min(start + WINDOW_BLOCKS, layout.data_blocks))
            surveyor.enter(space, owners, start)
            surveyor.repair_reverse(owners, start)
        space.compare(device)
    except OSError as exc:
        raise VolumeDeviceFailed("looking through the tables", exc) from exc
    return Survey(
        space=space,
        recent=recent,
        fold=surveyor.fold or bool(surveyor.marked),
        marked=frozenset(surveyor.marked),
        repaired=surveyor.repaired,
    )
