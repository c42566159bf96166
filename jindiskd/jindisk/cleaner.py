"""Cleaning: moving the live blocks of mostly dead segments together (format document, section 14.2)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jindiskd.jindisk.appender import CLEANER
from jindiskd.jindisk.errors import VolumeDeviceFailed, VolumeInconsistent, VolumeUnauthentic
from jindiskd.jindisk.geometry import PER_LEAF, Kind

if TYPE_CHECKING:
    from jindiskd.jindisk.session import Session

KEPT_FREE = 2
"""So many free segments cleaning never touches."""
BACKGROUND_SHARE = 64
BACKGROUND_LIVE = 0.75
BACKGROUND_VICTIMS = 8
"""At once: others wait meanwhile."""
_R_LEAF = PER_LEAF[Kind.R]


class Cleaner:
    """Chooses victims and moves their blocks. The session holds its commit lock around every call."""

    def __init__(self, session: Session) -> None:
        """Clean the volume of this session."""
        self._session = session
        self.damaged: set[int] = set()
        """Segments with a block that does not open; they stay as they are."""

    def victims(self) -> list[int]:
        """Segments worth cleaning, the best first. Valid right after a checkpoint."""
        session, segments = self._session, self._session.volume.segments
        size = session.volume.geometry.segment_blocks
        filling, free = session.appender.current, session.appender.free
        tight = len(free) <= 4
        found = []
        for segment, stamp in enumerate(segments.stamps):
            live = segments.live[segment]
            if not stamp or live >= size or segment in filling or segment in segments.taken or segment in self.damaged:
                continue
            if not live and segment in free:
                continue  # left over by an earlier process, free already
            share, age = live / size, session.sequence - stamp + 1
            score = -live if tight else (1 - share) * age / (1 + share)
            found.append((score, segment))
        found.sort(reverse=True)
        return [segment for _, segment in found]

    def clean(self, target: int) -> None:
        """Clean until `target` segments are free or nothing is gained any more. Begins right after a checkpoint."""
        session = self._session
        while len(session.appender.free) < target:
            if not self._round(self.victims()):
                return
            session.checkpoint()

    def background(self) -> bool:
        """One round, if few segments are free and a victim is cheap; whether it was done."""
        session, geometry = self._session, self._session.volume.geometry
        if len(session.appender.free) >= max(geometry.segments // BACKGROUND_SHARE, KEPT_FREE):
            return False
        limit = BACKGROUND_LIVE * geometry.segment_blocks
        cheap = [s for s in self.victims() if session.volume.segments.live[s] <= limit]
        if not cheap or not self._round(cheap[:BACKGROUND_VICTIMS]):
            return False
        session.checkpoint()
        return True

    def _round(self, victims: list[int]) -> bool:
        """Move the blocks of as many victims as there is room for; whether any was emptied."""
        session, volume = self._session, self._session.volume
        size, emptied = volume.geometry.segment_blocks, False
        for segment in victims:
            with volume.lock:
                appender, live = session.appender, volume.segments.live[segment]
                spare = len(appender.free) - KEPT_FREE - appender.segments_for(0)
                if live > appender.room(CLEANER) + max(0, spare) * size or not session.room.has_slots(live):
                    break
                if not self._move(segment):
                    self.damaged.add(segment)
                    continue
                emptied = True
        return emptied

    def _move(self, segment: int) -> bool:
        """Move one segment's live blocks into the cleaner's stream; False if one does not open."""
        session, volume = self._session, self._session.volume
        start, size = volume.geometry.segment_start(segment), volume.geometry.segment_blocks
        try:
            live = self._live(start, size)
            plain = volume.fetch([volume.wanted(lba, volume.entry(lba)) for lba in live])
        except (VolumeUnauthentic, VolumeInconsistent, VolumeDeviceFailed):
            return False
        moving, at = list(zip(live, plain, strict=True)), 0
        while at < len(moving):
            at += session.appender.fill(CLEANER, moving[at:])
        return True

    def _live(self, start: int, size: int) -> list[int]:
        """The logical blocks that the map has in these raw blocks, without those about to be overwritten."""
        volume = self._session.volume
        tree, base = volume.trees[Kind.R], start - volume.geometry.data_start
        found = []
        for index in range(base // _R_LEAF, (base + size - 1) // _R_LEAF + 1):
            page = tree.page(0, index)
            if page is None:
                continue
            low, high = max(base, index * _R_LEAF), min(base + size, (index + 1) * _R_LEAF)
            for at in range(low, high):
                offset = (at - index * _R_LEAF) * 8
                lba = int.from_bytes(page[offset : offset + 8], "little") - 1
                if lba < 0 or lba >= volume.geometry.blocks or lba in volume.pending:
                    continue
                if int.from_bytes(volume.entry(lba)[:8], "little") == volume.geometry.data_start + at:
                    found.append(lba)
        return found
