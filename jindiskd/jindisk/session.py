"""A session: the process that writes a volume (format document, sections 11, 13 and 14).

Two locks. `volume.lock` guards what is in memory, for short times. `_commits` is held through a commit, checkpoint or
cleaning, and taken before the other. Barriers run without `volume.lock`, so reads and writes go on meanwhile. Any
thread may call any public method; a flush that waits for another's commit shares it.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from uuid import UUID

from jindiskd.base.anchor import State
from jindiskd.base.secret import Secret
from jindiskd.jindisk import checkpoint
from jindiskd.jindisk.anchor import Forgetful, Keeper, Reporting
from jindiskd.jindisk.appender import STREAMS, Appender
from jindiskd.jindisk.cleaner import Cleaner
from jindiskd.jindisk.crypto import Generator, check_key
from jindiskd.jindisk.errors import VolumeCrowded, VolumeDeviceFailed, VolumeFenced, VolumeReadOnly
from jindiskd.jindisk.geometry import BLOCK, JOURNAL_START, Kind
from jindiskd.jindisk.journal import UNORDERED_MAPS, EntryLog, JournalWriter
from jindiskd.jindisk.memtable import UNMAPPED
from jindiskd.jindisk.reporting import Reporter
from jindiskd.jindisk.room import RESERVED_SEGMENTS, Room
from jindiskd.jindisk.slots import Slots
from jindiskd.jindisk.volume import ZERO_BLOCK, Volume

FREE_TARGET = 8
MEMTABLE_AT_FLUSH = 131_072
PENDING_BLOCKS = 1024
TICK_S = 1.0
Planned = tuple[int, bytes | None, bool]
"""Of a write: LBA, content or None for zeros, and whether zeros there need an unmapping."""


class Session:
    """A volume open for writing, from `begin` to `close`."""

    def __init__(
        self,
        volume: Volume,
        *,
        session_id: bytes,
        keeper: Keeper | None = None,
        reporting: Reporting = Reporting.INTERVAL,
        interval_s: float = 60.0,
        lease_s: float = 0.0,
        entropy: Callable[[int], bytes] = os.urandom,
        generator: Generator | None = None,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
        ordered_placement: bool = False,
    ) -> None:
        """Draw the seed; nothing is written. Use `begin`, or `create.create_volume` for a new volume.

        Args:
            volume: open for reading; belongs to the session from now on.
            session_id: 32 bytes, from the broker, or drawn where there is none.
            keeper: who remembers the anchor; None where nobody does.
            reporting: when commits are reported.
            interval_s: for `Reporting.INTERVAL`.
            lease_s: fence when the keeper's last answer is older; 0 for no lease.
            entropy: the operating system's source of random bytes.
            generator: the one of this process, if it has one already.
            clock: Unix time, for the superblock's informative fields.
            monotonic: for interval and lease.
            ordered_placement: take free segments in order, for tests and reproduction; the host sees more then.
        """
        self.volume = volume
        self.session_id = session_id
        self.generator = generator or Generator(volume.key, session_id, entropy)
        self.clock = clock
        self.reporter = Reporter(
            keeper or Forgetful(), reporting, interval_s=interval_s, lease_s=lease_s, monotonic=monotonic
        )
        self._commits = threading.RLock()
        self.appender = Appender(volume, self.generator, ordered=ordered_placement)
        self.room = Room(volume, self.appender)
        self.cleaner = Cleaner(self)
        self.journal: JournalWriter | None = None
        self.epoch = volume.superblock.epoch
        self.sequence = volume.state.sequence
        self.durable: State = volume.state
        """The last durable state."""
        self.closed = False
        self._begun = self._close_told = False
        self._changes = self._durable_changes = 0

    def begin(self) -> None:
        """Step R7: have the state adopted, then checkpoint under the new session id. Writes nothing before.

        Raises:
            VolumeFenced: the keeper refuses.
            VolumeReadOnly: the volume has a feature that this release can only read.
            VolumeError: reading or writing failed.
        """
        if self.volume.superblock.readonly_compatible:
            raise VolumeReadOnly
        with self._commits:
            self.reporter.adopt(self.volume.state, self.session_id)
            self._begun = True
            self.checkpoint()
            self.reporter.committed(self.durable)

    def begin_new(self, journal: JournalWriter, slots: Slots) -> None:
        """Instead of `begin`, for a volume that this process has just formatted: there is nothing to adopt."""
        self.journal, self.room.slots, self._begun = journal, slots, True

    # Requests

    @property
    def size_bytes(self) -> int:
        """Logical size."""
        return self.volume.size_bytes

    @property
    def fenced(self) -> str | None:
        """Why the process gave up writing; None while it has not."""
        return self.reporter.fenced

    def read(self, offset: int, length: int) -> bytes:
        """As `Volume.read`; the latest content."""
        return self.volume.read(offset, length)

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Write bytes; durable after the next `flush` that begins later.

        All of it is in one commit if it fits: up to four segments always (1 MiB below 1 GiB of logical size, 16 MiB
        from 16 GiB up), more as far as segments are free.

        Raises:
            InvalidArgument: the range reaches beyond the end.
            VolumeFenced: the session ended.
            VolumeCrowded: there is no room, and cleaning gains none.
            VolumeError: a block that is changed in part cannot be read; nothing was written.
            VolumeDeviceFailed: the store refused the data. They are kept in memory, and a flush tries again.
        """
        self.volume.check_range(offset, len(data))
        if not len(data):
            return
        if self._put(offset, data):
            return
        self._make_room(_blocks(offset, len(data)))
        if self._put(offset, data):
            return
        # Still not all at once: piece by piece, with room made for each.
        step = self.volume.geometry.segment_blocks * BLOCK
        with memoryview(data) as view:
            while view:
                piece = bytes(view[: step - offset % step])
                self._insist(_blocks(offset, len(piece)), partial(self._put, offset, piece))
                offset, view = offset + len(piece), view[len(piece) :]

    def zero(self, offset: int, length: int) -> None:
        """Make the bytes read as zeros; whole blocks are unmapped. All in one commit; errors as `write`.

        On volumes beyond some 20 TiB a long range is done in pieces, for it could touch more pages than there is room
        for at a time.
        """
        self.volume.check_range(offset, length)
        if not length:
            return
        step = self.room.zeroed_at_once * BLOCK
        if length > step:
            end = offset + length
            while offset < end:
                length = min(step - offset % step, end - offset)
                self.zero(offset, length)
                offset += length
            return
        first, last = -(-offset // BLOCK), (offset + length) // BLOCK
        if first > last:  # within one block
            self.write(offset, bytes(length))
        else:
            parts = (offset % BLOCK > 0) + ((offset + length) % BLOCK > 0)
            self._insist(parts, partial(self._zero, offset, length, parts), unmapped=last - first)

    def discard(self, offset: int, length: int) -> None:
        """Trim: whole blocks within the range read as zeros afterwards, others are kept. Errors as `write`."""
        self.volume.check_range(offset, length)
        first, last = -(-offset // BLOCK), (offset + length) // BLOCK
        if last > first:
            self.zero(first * BLOCK, (last - first) * BLOCK)

    def flush(self) -> None:
        """Make everything written before durable, in one commit shared with other flushes.

        Raises:
            VolumeFenced: the session ended, now or before; what was written since the last flush may be lost.
            VolumeDeviceFailed: the store refused the data; they are kept in memory, and a later flush may succeed.
        """
        with self.volume.lock:
            self._check()
            goal = self._changes
        with self._commits:
            if self._durable_changes < goal:
                self._commit()
            self.reporter.committed(self.durable)
            self.reporter.check()  # a lease may have run out meanwhile

    def tick(self) -> float:
        """Report what is due by the clock. Returns the seconds until it should be called again.

        A failing keeper does not raise; only its refusal fences the session.
        """
        self.reporter.tick(lambda: self.durable if self._begun and not self.closed else None)
        return TICK_S

    def idle(self) -> bool:
        """Clean a little if it is worth while; returns whether anything was done. Errors as `flush`."""
        with self._commits:
            self._check()
            return self.cleaner.background()

    def close(self) -> None:
        """Write the closing checkpoint and report it; nothing is written afterwards. Closing twice does nothing.

        Raises:
            VolumeFenced: the session had ended otherwise, or the keeper refuses.
            VolumeError: writing failed; the session is fenced.
            Exception: what the keeper raised for want of an answer: close again to ask again.
        """
        with self._commits:
            if self._close_told:
                return
            if not self.closed:
                self._check()
                self.checkpoint(closing=True)
            self.reporter.close(self.durable)
            self._close_told = True

    def rekey(self, new_key: Secret, *, uuid: UUID | None = None, label: str | None = None) -> None:
        """Put the volume under another volume key: two checkpoints, so that both superblock slots are overwritten.

        The data keep their keys; `new_key` replaces the session's and stays the caller's. Errors as `flush`.

        Args:
            new_key: 32 bytes.
            uuid: for a copy that becomes a volume of its own (section 15), its new identity. Interrupted, that copy is
                under the old identity or cannot be opened; copy again.
            label: the new one; None keeps the old.
        """
        check_key(new_key)
        with self._commits:
            self._check()
            volume = self.volume
            volume.key = new_key
            if uuid is not None:
                volume.superblock = replace(volume.superblock, uuid=uuid)
            self.checkpoint()
            self.checkpoint()
            old = volume.identification
            volume.identification = volume.superblock.identification(old.label if label is None else label)
            if volume.identification != old:
                with self._fencing("writing the identification block"):
                    volume.device.pwrite(0, volume.identification.encode())
                    volume.device.flush()
            self.reporter.report(self.durable)

    def fence(self, why: str) -> None:
        """End all writing; reads may go on."""
        self.reporter.fence(why)

    def _check(self) -> None:
        if not self._begun:
            raise VolumeReadOnly
        self.reporter.check()
        if self.closed:
            raise VolumeFenced("it was closed")

    @contextlib.contextmanager
    def _fencing(self, doing: str) -> Iterator[None]:
        """Fence after whatever failure: the disk's state, or what memory says of it, is unknown then."""
        try:
            yield
        except OSError as exc:
            self.fence(f"{doing} failed ({exc})")
            raise VolumeDeviceFailed(doing, exc) from exc
        except BaseException as exc:
            self.fence(f"{doing} failed ({exc})")
            raise

    # Changing what is in memory

    def _insist(self, blocks: int, change: Callable[[], bool], *, unmapped: int = 0) -> None:
        """Make room until a change of so many blocks is accepted, which unmaps so many others."""
        while not change():
            if not self._make_room(blocks, unmapped) and not len(self.volume.pending):
                raise VolumeCrowded(len(self.cleaner.damaged))

    def _put(self, offset: int, data: bytes | bytearray | memoryview) -> bool:
        """Accept a write as a whole, or return False for want of room. What cannot be read is met before any change."""
        with self.volume.lock:
            if not self._accepts(_blocks(offset, len(data))):
                return False
            if offset % BLOCK or len(data) % BLOCK:
                offset, data = self._widen(offset, data)
            self._apply(self._planned(offset // BLOCK, data))
            self._accepted()
        return True

    def _planned(self, lba: int, data: bytes | bytearray | memoryview) -> list[Planned]:
        """What a write of whole blocks will do; reads what it must know, and changes nothing."""
        planned: list[Planned] = []
        for number, at in enumerate(range(0, len(data), BLOCK), lba):
            plain = bytes(data[at : at + BLOCK])
            zero = plain == ZERO_BLOCK
            planned.append((number, None if zero else plain, zero and self.volume.entry(number) != UNMAPPED))
        return planned

    def _apply(self, planned: list[Planned]) -> None:
        pending = self.volume.pending
        for lba, block, mapped in planned:
            if block is not None:
                pending[lba] = block
                continue
            pending.pop(lba, None)
            if mapped:
                self.volume.memtable.put(lba, UNMAPPED)
                self.appender.log.unmap(lba, 1)

    def _widen(self, offset: int, data: bytes | bytearray | memoryview) -> tuple[int, bytearray]:
        """A write of parts of blocks as one of whole blocks."""
        first = offset // BLOCK
        merged = bytearray(self.volume.read_blocks(first, _blocks(offset, len(data))))
        merged[offset - first * BLOCK : offset - first * BLOCK + len(data)] = data
        return first * BLOCK, merged

    def _zero(self, offset: int, length: int, partial_blocks: int) -> bool:
        """As `_put`, of zeros, with so many blocks that are zeroed in part."""
        first, last = -(-offset // BLOCK), (offset + length) // BLOCK
        with self.volume.lock:
            if not self._accepts(partial_blocks, last - first):
                return False
            volume, parts = self.volume, list[Planned]()
            for at, size in ((offset, first * BLOCK - offset), (last * BLOCK, offset + length - last * BLOCK)):
                if size:
                    start, block = self._widen(at, bytes(size))
                    parts += self._planned(start // BLOCK, block)
            count = last - first
            if count and not (count == 1 and volume.entry(first) == UNMAPPED):
                volume.memtable.clear(first, count, volume.trees[Kind.F].present)
                self.appender.log.unmap(first, count)
            if count > len(volume.pending):
                volume.pending = {lba: block for lba, block in volume.pending.items() if not first <= lba < last}
            else:
                for lba in range(first, last):
                    volume.pending.pop(lba, None)
            self._apply(parts)
            self._accepted()
        return True

    def _accepts(self, blocks: int, unmapped: int = 0) -> bool:
        """Whether there is room for a change of so many blocks, and unmapped ones. Raises if the store refuses."""
        self._check()
        if len(self.volume.pending) >= self._pending_limit():
            self.appender.seal_pending()
        return self.room.suffices(blocks, unmapped)

    def _accepted(self) -> None:
        self._changes += 1
        if len(self.volume.pending) >= self._pending_limit():
            self.appender.seal_pending()

    def _pending_limit(self) -> int:
        return min(PENDING_BLOCKS, 2 * self.volume.geometry.segment_blocks)

    # Room

    def _make_room(self, blocks: int, unmapped: int = 0) -> bool:
        """Checkpoint, then clean until a change of so many blocks, and unmapped ones, has room; whether it has."""
        with self._commits:
            with self.volume.lock:
                self._check()
                if self.room.suffices(blocks, unmapped):
                    return True
            self.checkpoint()
            need, free = self.appender.segments_for(blocks), len(self.appender.free)
            # Larger requests are split instead: emptying so many segments at once may mean rewriting the whole volume.
            if need <= FREE_TARGET - RESERVED_SEGMENTS and free - need < RESERVED_SEGMENTS + len(STREAMS):
                self.cleaner.clean(FREE_TARGET)
            with self.volume.lock:
                return self.room.suffices(blocks, unmapped)

    # Commits

    def _commit(self) -> None:
        """Steps F1 to F4, or a checkpoint where one is due. `_commits` is held."""
        with self.volume.lock:
            self._check()
            self.appender.seal_pending()
            covered = self._changes
            if not self.appender.log.entries:
                self._durable_changes = covered
                return
            due = self._checkpoint_due()
            if not due:
                log = self.appender.take_log()
                for segment in log.segments:
                    self.volume.segments.taken[segment].stamp = self.sequence + 1
        if due:
            self.checkpoint()
            return
        with self._fencing("writing a commit"):
            self._write_commit(log)
        self._durable_changes = covered

    def _checkpoint_due(self) -> bool:
        assert self.journal is not None, "the session has begun"
        full = self.journal.index + self.appender.log.block_bound() > self.volume.geometry.journal_blocks
        large = len(self.volume.memtable) > MEMTABLE_AT_FLUSH
        return full or large or self.room.pages_scarce()

    def _write_commit(self, log: EntryLog) -> None:
        assert self.journal is not None, "the session has begun"
        device, start = self.volume.device, JOURNAL_START + self.journal.index
        ordered = log.maps > UNORDERED_MAPS
        if ordered:
            device.flush()
        device.pwrite(start * BLOCK, self.journal.seal(log.blocks(), self.sequence + 1, ordered=ordered))
        device.flush()
        self.sequence += 1
        self.durable = State(session=self.session_id, sequence=self.sequence, root=self.journal.root)

    def checkpoint(self, *, closing: bool = False) -> None:
        """Steps C1 to C7: everything written so far becomes durable in the trees.

        Raises:
            VolumeDeviceFailed: the store refused waiting data, which are kept; or, and then the session is fenced,
                anything else.
            VolumeError: the session is fenced.
        """
        with self._commits:
            with self.volume.lock:
                self._check()
                self.appender.seal_pending()  # if the store refuses, the data are kept and nothing was begun
                with self._fencing("a checkpoint"):
                    covered = self._changes
                    self.room.collect_slots()
                    freed, superblock, journal = checkpoint.merge(self, closing=closing)
            with self._fencing("a checkpoint"):
                checkpoint.commit(self, superblock)
            with self.volume.lock:
                self.journal = journal
                self._durable_changes = covered
                self.room.slots.release_retired()
                self.appender.free.add(freed)
                self.cleaner.damaged.difference_update(freed)
                self.volume.reuse += 1
                self.closed = closing


def _blocks(offset: int, length: int) -> int:
    """How many blocks a range of bytes touches."""
    return -(-(offset + length) // BLOCK) - offset // BLOCK
