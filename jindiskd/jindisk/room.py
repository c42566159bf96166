"""Whether there is room for a change: free segments, memory, page slots (format document, sections 14 and 17).

The caller holds the volume's lock around every call.
"""

from __future__ import annotations

from jindiskd.jindisk.appender import STREAMS, Appender
from jindiskd.jindisk.geometry import PER_LEAF, SPARE_SLOTS, Kind
from jindiskd.jindisk.slots import Slots
from jindiskd.jindisk.tree import page_name
from jindiskd.jindisk.volume import Volume

RESERVED_SEGMENTS = 4
"""The last free segments are for the cleaner and for checkpoints."""
MEMTABLE_LIMIT = 262_144
_F_LEAF, _R_LEAF = PER_LEAF[Kind.F], PER_LEAF[Kind.R]


class Room:
    """What a session has left of everything that can run out."""

    def __init__(self, volume: Volume, appender: Appender) -> None:
        """Page slots are unknown until `collect_slots`, or until whoever made the volume sets them."""
        self._volume, self._appender = volume, appender
        self._slots: Slots | None = None

    @property
    def slots(self) -> Slots:
        """The page slots. Only once they are known."""
        assert self._slots is not None, "the session has begun"
        return self._slots

    @slots.setter
    def slots(self, slots: Slots) -> None:
        self._slots = slots

    def collect_slots(self) -> None:
        """Find the used page slots, once. Reads interior pages; raises `VolumeError`."""
        if self._slots is not None:
            return
        slots = Slots(self._volume.geometry)
        for kind, tree in self._volume.trees.items():
            for level, first, raws in tree.page_raws():
                if not slots.mark_all(raws):
                    for index, raw in enumerate(raws, first):
                        if raw:
                            slots.mark(raw, page_name(kind, level, index, raw))  # raises for one of them
        self._slots = slots

    @property
    def zeroed_at_once(self) -> int:
        """So many blocks may be unmapped in one change, wherever they lie: all, but for the largest volumes."""
        geometry = self._volume.geometry
        spare = geometry.meta_slots - geometry.pages
        if sum(geometry.levels[Kind.S]) + SPARE_SLOTS // 4 <= spare:
            return geometry.blocks
        return (spare - SPARE_SLOTS // 4) // 2

    def suffices(self, blocks: int, unmapped: int = 0) -> bool:
        """Whether a change may be accepted now that writes so many blocks and unmaps so many others."""
        need = self._appender.segments_for(blocks)
        if need and len(self._appender.free) - need < RESERVED_SEGMENTS:
            return False
        memtable = self._volume.memtable
        if not len(memtable):
            return True
        return len(memtable) + len(self._volume.pending) + blocks <= MEMTABLE_LIMIT and self.has_slots(blocks, unmapped)

    def has_slots(self, blocks: int, unmapped: int = 0) -> bool:
        """Whether the page slots suffice for a checkpoint after a change of so many blocks more."""
        return self._slots is None or self._page_estimate(blocks, unmapped) <= self._slots.free

    def pages_scarce(self) -> bool:
        """Whether the next checkpoint may need four fifths of the free page slots."""
        return self._page_estimate(0) > self.slots.free * 4 // 5

    def _page_estimate(self, extra: int, unmapped: int = 0) -> int:
        """At most so many pages will the next checkpoint write, after `extra` blocks and a range unmapped."""
        geometry, memtable = self._volume.geometry, self._volume.memtable
        more = len(self._volume.pending) + extra
        per_segment = -(-geometry.segment_blocks // _R_LEAF) + 1
        taken = len(self._volume.segments.taken) + self._appender.segments_for(extra) + len(STREAMS)
        counts = {
            Kind.F: len(memtable.touched) + more + (unmapped // _F_LEAF + 2 if unmapped else 0),
            Kind.R: taken * per_segment,
            Kind.S: len(memtable.entries) + _F_LEAF * len(memtable.cleared) + more + unmapped + len(STREAMS),
        }
        return sum(min(count, pages) for kind, count in counts.items() for pages in geometry.levels[kind])
