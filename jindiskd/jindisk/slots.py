"""Page slots: which are free (format document, sections 8 and 14.4)."""

from __future__ import annotations

from collections.abc import Sequence

from jindiskd.jindisk.errors import VolumeCrowded, VolumeInconsistent
from jindiskd.jindisk.geometry import Geometry


class Slots:
    """A byte for each slot; taken in rotation. A slot whose page was replaced waits until the checkpoint is durable."""

    def __init__(self, geometry: Geometry) -> None:
        """All free."""
        self._start = geometry.meta_start
        self._used = bytearray(geometry.meta_slots)
        self._next = 0
        self._retired: list[int] = []
        self.free = geometry.meta_slots

    def mark(self, raw: int, name: str) -> None:
        """A page is in this slot.

        Raises:
            VolumeInconsistent: `name` points outside the slots, or to one in use.
        """
        at = raw - self._start
        if not 0 <= at < len(self._used):
            raise VolumeInconsistent(name, "its reference points outside the page slots")
        if self._used[at]:
            raise VolumeInconsistent(name, "its page slot is in use by another page")
        self._used[at] = 1
        self.free -= 1

    def mark_all(self, raws: Sequence[int]) -> bool:
        """Pages are in these slots; 0 is none. False, with nothing marked, where `mark` would fail for one of them."""
        places = [raw - self._start for raw in raws if raw]
        if not places:
            return True
        used = self._used
        if min(places) < 0 or max(places) >= len(used) or len(set(places)) < len(places):
            return False
        if any([used[place] for place in places]):  # noqa: C419 - a list is quicker here, and this is a long loop
            return False
        for place in places:
            used[place] = 1
        self.free -= len(places)
        return True

    def take(self) -> int:
        """Raw block of a free slot.

        Raises:
            VolumeCrowded: there is none.
        """
        at = self._used.find(0, self._next)
        if at < 0:
            at = self._used.find(0)
        if at < 0:
            raise VolumeCrowded(0)
        self._used[at] = 1
        self._next = at + 1
        self.free -= 1
        return self._start + at

    def retire(self, raw: int) -> None:
        """The page in this slot was replaced; it is needed until the superblock that drops it is durable."""
        self._retired.append(raw)

    def release_retired(self) -> None:
        """That superblock is durable."""
        for raw in self._retired:
            self._used[raw - self._start] = 0
        self.free += len(self._retired)
        self._retired = []
