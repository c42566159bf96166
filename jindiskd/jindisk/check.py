"""The checker: is all that the state refers to authentic and consistent? Reads only (format document, section 21)."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from jindiskd.jindisk.errors import VolumeError, VolumeInconsistent
from jindiskd.jindisk.geometry import BLOCK, ENTRY_BYTES, PER_LEAF, Kind
from jindiskd.jindisk.memtable import UNMAPPED
from jindiskd.jindisk.segments import data_name
from jindiskd.jindisk.slots import Slots
from jindiskd.jindisk.tree import page_name, ref_raw
from jindiskd.jindisk.volume import Volume

MAX_FAULTS = 1000
_LEAF, _ENTRY = PER_LEAF[Kind.F], ENTRY_BYTES[Kind.F]


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What the checker found."""

    slots: tuple[str, str]
    """What each superblock slot holds, in words. One may be unauthentic after a crash, or older."""
    sequence: int
    mapped: int
    """Mapped logical blocks, the journal's changes included."""
    pages: int
    """Pages that opened."""
    data_blocks: int
    """Data blocks that opened; 0 in the quick check."""
    faults: tuple[VolumeError, ...]
    """At most 1000."""


class _Checker:
    def __init__(self, volume: Volume, progress: Callable[[int, int], None] | None) -> None:
        self.volume, self.geometry = volume, volume.geometry
        self.faults: list[VolumeError] = []
        self.pages = self.data_blocks = 0
        self._progress = progress or (lambda _done, _total: None)

    def fault(self, error: VolumeError) -> None:
        """Note one, up to the limit."""
        if len(self.faults) < MAX_FAULTS:
            self.faults.append(error)

    def trees(self) -> None:
        """Every reachable page opens, and no slot is used twice."""
        slots = Slots(self.geometry)
        for kind, tree in self.volume.trees.items():
            try:
                for level, index, ref in tree.interior_refs():
                    try:
                        slots.mark(ref_raw(ref), page_name(kind, level, index, ref_raw(ref)))
                        tree.read(level, index, ref)
                        self.pages += 1
                    except VolumeError as exc:
                        self.fault(exc)
            except VolumeError as exc:  # an interior page: what lies below it cannot be visited
                self.fault(exc)

    def mapping(self) -> int:
        """F against R and S, and the journal's entries against both; returns the mapped blocks."""
        geometry, segments, memtable = self.geometry, self.volume.segments, self.volume.memtable
        live = array("I", bytes(4 * geometry.segments))
        seen = bytearray(-(-(geometry.segments << geometry.segment_bits) // 8))
        count = 0
        for lba, raw in self._mapped_in_f():
            what = data_name(lba, raw)
            if not geometry.data_start <= raw < geometry.end:
                self.fault(VolumeInconsistent(what, "it lies outside the data region"))
                continue
            live[geometry.segment_of(raw)] += 1
            if not segments.in_use(geometry.segment_of(raw)):
                self.fault(VolumeInconsistent(what, "its segment is not in use"))
            if self._reverse(raw) not in {lba + 1, None}:
                self.fault(VolumeInconsistent(what, "tree R does not point back"))
            if memtable.get(lba) is None:
                count += 1
                self._once(seen, lba, raw)
        for lba, entry in memtable.entries.items():
            if entry != UNMAPPED:
                count += 1
                self._once(seen, lba, int.from_bytes(entry[:8], "little"))
        for segment, (counted, stored) in enumerate(zip(live, segments.live, strict=True)):
            if counted != stored:
                what = f"the entry of segment {segment} in tree S"
                self.fault(VolumeInconsistent(what, f"it counts {stored} live blocks, tree F has {counted}"))
        if segments.oldest_stamp() != self.volume.superblock.oldest_stamp:
            self.fault(VolumeInconsistent("the superblock", "its oldest stamp is not the oldest in tree S"))
        return count

    def _once(self, seen: bytearray, lba: int, raw: int) -> None:
        at, bit = divmod(raw - self.geometry.data_start, 8)
        if seen[at] >> bit & 1:
            self.fault(VolumeInconsistent(data_name(lba, raw), "another logical block has the same raw block"))
        seen[at] |= 1 << bit

    def _mapped_in_f(self) -> Iterator[tuple[int, int]]:
        """LBA and raw block of every mapping in tree F; pages that do not open were named by `trees`."""
        tree = self.volume.trees[Kind.F]
        for level, index, ref in self._reachable(Kind.F):
            if level:
                continue
            try:
                page = tree.read(level, index, ref)
            except VolumeError:
                continue
            for at in range(tree.used(0, index) // _ENTRY):
                entry = page[at * _ENTRY : (at + 1) * _ENTRY]
                raw = int.from_bytes(entry[:8], "little")
                if raw:
                    yield index * _LEAF + at, raw
                elif entry != UNMAPPED:
                    what = f"the entry of logical block {index * _LEAF + at} in tree F"
                    self.fault(VolumeInconsistent(what, "it is unmapped, but its tag is not zero"))

    def _reachable(self, kind: Kind) -> Iterator[tuple[int, int, bytes]]:
        try:
            yield from self.volume.trees[kind].interior_refs()
        except VolumeError:
            return

    def _reverse(self, raw: int) -> int | None:
        """The entry of tree R; None if its page does not open, which `trees` has named already."""
        index, at = divmod(raw - self.geometry.data_start, PER_LEAF[Kind.R])
        try:
            page = self.volume.trees[Kind.R].page(0, index)
        except VolumeError:
            return None
        return int.from_bytes(page[at * 8 : at * 8 + 8], "little") if page else 0

    def data(self) -> None:
        """Every mapped block opens."""
        total = self.geometry.blocks
        for index, page in self.volume.leaves():
            for at in range(min(_LEAF, total - index * _LEAF)):
                entry = page[at * _ENTRY : (at + 1) * _ENTRY]
                if entry == UNMAPPED:
                    continue
                try:
                    self.volume.fetch([self.volume.wanted(index * _LEAF + at, entry)])
                    self.data_blocks += 1
                except VolumeError as exc:
                    self.fault(exc)
            self._progress(min((index + 1) * _LEAF, total) * BLOCK, total * BLOCK)


def check_volume(
    volume: Volume, *, data: bool = False, progress: Callable[[int, int], None] | None = None
) -> Report:
    """Check the state that a volume was opened in.

    Args:
        volume: open for reading, not in a session. That it opened means that superblock, tree S, journal and
            identification block are in order: `open_volume` checks these and raises.
        data: also open every mapped data block; else the quick check.
        progress: called with bytes of the logical volume done and in all.
    """
    checker = _Checker(volume, progress)
    checker.trees()
    mapped = checker.mapping()
    if data:
        try:
            checker.data()
        except VolumeError as exc:  # a page of the map: named by `trees` as well
            checker.fault(exc)
    return Report(
        slots=volume.slot_words,
        sequence=volume.state.sequence,
        mapped=mapped,
        pages=checker.pages,
        data_blocks=checker.data_blocks,
        faults=tuple(checker.faults),
    )
