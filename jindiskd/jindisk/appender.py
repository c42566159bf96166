"""Appending sealed blocks to segments, and the entries of the next commit (format document, sections 9 and 11.1, F1).

The caller holds the volume's lock around every call.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from jindiskd.jindisk.crypto import Generator
from jindiskd.jindisk.device import write_parts
from jindiskd.jindisk.errors import VolumeCrowded, VolumeDeviceFailed
from jindiskd.jindisk.geometry import BLOCK
from jindiskd.jindisk.journal import EntryLog
from jindiskd.jindisk.runs import SealingRun, entries_of
from jindiskd.jindisk.segments import FreeList, Stream, Taken
from jindiskd.jindisk.volume import Volume

GUEST, CLEANER = "guest", "cleaner"
STREAMS = (GUEST, CLEANER)
RUN_BLOCKS = 128
"""Sealed and written at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sealed:
    """Blocks sealed for consecutive raw blocks."""

    start: int
    """Raw block."""
    items: list[tuple[int, bytes]] = field(repr=False)
    """LBA and plaintext of each."""
    tags: bytes = field(repr=False)
    data: Sequence[bytes | memoryview] = field(repr=False)
    """The ciphertexts."""


class Appender:
    """The segments that a process fills, those it may take, and what its next commit will say."""

    def __init__(self, volume: Volume, generator: Generator, *, ordered: bool) -> None:
        """`ordered`: take free segments in order, for tests and reproduction; the host sees more then."""
        self._volume, self._generator = volume, generator
        choose = None if ordered else random.Random(generator.placement_seed()).randrange  # noqa: S311 - hides nothing but order
        self.free = FreeList(volume.segments.free_segments(volume.named), choose)
        self._streams = {name: Stream() for name in STREAMS}
        self.log = EntryLog()
        self._run = SealingRun(RUN_BLOCKS)
        self._refused: _Sealed | None = None
        """What the store refused: written again as it is, or not at all."""
        self.written_blocks = 0
        """Data blocks written, the cleaner's included."""

    @property
    def filling(self) -> set[int]:
        """Segments that will be filled further."""
        return {stream.segment for stream in self._streams.values() if stream.room}

    @property
    def current(self) -> set[int]:
        """Segments filled last, be they full or not."""
        return {stream.segment for stream in self._streams.values()}

    def room(self, name: str) -> int:
        """Blocks left in a stream's segment."""
        return self._streams[name].room

    def segments_for(self, blocks: int) -> int:
        """Free segments that pending blocks and `blocks` more will take."""
        waiting = len(self._volume.pending) + blocks - self._streams[GUEST].room
        return max(0, -(-waiting // self._volume.geometry.segment_blocks))

    def take_log(self) -> EntryLog:
        """The entries of the next commit, which are nobody else's from now on."""
        log, self.log = self.log, EntryLog()
        return log

    def end_streams(self) -> None:
        """Fill none of the present segments any further."""
        self._streams = {name: Stream() for name in STREAMS}

    def seal_pending(self) -> None:
        """Seal what is pending and write it into segments.

        A block leaves `pending` only after it was written. What the store refuses stays there, and the next call
        writes the same ciphertext to the same place again.

        Raises:
            VolumeDeviceFailed: the store refused.
            VolumeCrowded: no segment is free.
        """
        if self._refused is not None:
            again = self._refused
            self._write(again)
            self._refused = None
            # What was overwritten or trimmed meanwhile has its place for nothing.
            self._enter(again, only_pending=True)
        items = list(self._volume.pending.items())
        at = 0
        while at < len(items):
            at += self.fill(GUEST, items[at:])

    def fill(self, name: str, items: list[tuple[int, bytes]]) -> int:
        """Seal blocks (LBA and plaintext) into a stream's segment, as many as fit, with one write; returns how many.

        Raises:
            VolumeDeviceFailed: the store refused.
            VolumeCrowded: no segment is free.
        """
        stream = self._streams[name]
        if not stream.room:
            self._next_segment(stream)
        items = items[: min(stream.room, len(self._run))]
        start = stream.seal(items, self._run)
        data, tags = [self._run.data(len(items))], self._run.tags(len(items))
        sealed = _Sealed(start=start, items=items, tags=tags, data=data)
        try:
            self._write(sealed)
        except VolumeDeviceFailed:
            if name == GUEST:
                self._refused = replace(sealed, data=[bytes(part) for part in data])
            raise
        self._enter(sealed, only_pending=False)
        return len(items)

    def _write(self, sealed: _Sealed) -> None:
        try:
            write_parts(self._volume.device, sealed.start * BLOCK, sealed.data)
        except OSError as exc:
            raise VolumeDeviceFailed(f"writing data (raw block {sealed.start})", exc) from exc

    def _enter(self, sealed: _Sealed, *, only_pending: bool) -> None:
        """Enter written blocks into memtable and log."""
        pending, count = self._volume.pending, len(sealed.items)
        entries = entries_of(sealed.start, sealed.tags)
        written = [(lba, entry) for (lba, _), entry in zip(sealed.items, entries, strict=True)]
        waiting = [pending.get(lba) is plain for lba, plain in sealed.items]
        if only_pending:
            written = list(itertools.compress(written, waiting))
        self._volume.memtable.put_all(written)
        self.log.map_all(written)
        for lba, _ in itertools.compress(sealed.items, waiting):
            del pending[lba]
        self.written_blocks += count

    def _next_segment(self, stream: Stream) -> None:
        if not len(self.free):
            raise VolumeCrowded(0)
        segment, key = self.free.take(), self._generator.sealing_key()
        geometry = self._volume.geometry
        stream.begin(segment, geometry.segment_start(segment), geometry.segment_blocks, key)
        self._volume.segments.taken[segment] = Taken(key.material)
        self.log.segment(segment, key.material)
