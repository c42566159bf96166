"""A session: the process that writes a volume (format document, sections 11, 13 and 14).

Two locks. `volume.lock` guards what is in memory, for short times. `_commits` is held through a commit, checkpoint or
cleaning, and taken before the other. Barriers run without `volume.lock`, so reads and writes go on meanwhile. Any
thread may call any public method; a flush that waits for another's commit shares it.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable
from typing import NoReturn

from jindiskd.base.secret import Secret
from jindiskd.errors import JindiskError
from jindiskd.jindisk import checkpoint
from jindiskd.jindisk.anchor import Forgetful, Keeper, Reporting, State
from jindiskd.jindisk.cleaner import Cleaner
from jindiskd.jindisk.crypto import Generator, check_key
from jindiskd.jindisk.errors import VolumeCrowded, VolumeDeviceFailed, VolumeError, VolumeFenced, VolumeReadOnly
from jindiskd.jindisk.geometry import BLOCK, JOURNAL_START, Kind
from jindiskd.jindisk.journal import UNORDERED_MAPS, EntryLog, JournalWriter
from jindiskd.jindisk.memtable import UNMAPPED
from jindiskd.jindisk.segments import FreeList, Stream, Taken
from jindiskd.jindisk.slots import Slots
from jindiskd.jindisk.tree import page_name, ref_raw
from jindiskd.jindisk.volume import ZERO_BLOCK, Volume

RESERVED_SEGMENTS = 4
"""The last free segments are for the cleaner and for checkpoints."""
FREE_TARGET = 8
STREAMS = 2
MEMTABLE_AT_FLUSH = 131_072
MEMTABLE_LIMIT = 262_144
PENDING_BLOCKS = 1024
TICK_S = 1.0


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
        self.keeper: Keeper = keeper or Forgetful()
        self.clock = clock
        self._reporting, self._interval_s, self._lease_s, self._monotonic = reporting, interval_s, lease_s, monotonic
        self._commits = threading.RLock()
        choose = None if ordered_placement else random.Random(self.generator.placement_seed()).randrange  # noqa: S311 - hides nothing but order
        self.free = FreeList(volume.segments.free_segments(volume.named), choose)
        self.streams = {"guest": Stream(), "cleaner": Stream()}
        self.log = EntryLog()
        self.journal: JournalWriter | None = None
        self.epoch = volume.superblock.epoch
        self.sequence = volume.state.sequence
        self.durable: State = volume.state
        """The last durable state."""
        self.slots: Slots | None = None
        self.fenced: str | None = None
        self.closed = False
        self._changes = self._durable_changes = 0
        self._reported: State | None = None
        self._answered = self._last_report = monotonic()
        self.cleaner = Cleaner(self)
        self.written_blocks = 0
        """Data blocks sealed, the cleaner's included."""

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
            self._tell(self.keeper.adopt, self.volume.state, self.session_id)
            self.checkpoint()
            self._tell_if_commit()

    # Requests

    @property
    def size_bytes(self) -> int:
        """Logical size."""
        return self.volume.size_bytes

    def read(self, offset: int, length: int) -> bytes:
        """As `Volume.read`; the latest content."""
        return self.volume.read(offset, length)

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Write bytes; durable after the next `flush` that begins later. All of it is in one commit, if it fits.

        Raises:
            InvalidArgument: the range reaches beyond the end.
            VolumeFenced: the session ended.
            VolumeError: a block that is changed in part cannot be read, or there is no room; nothing was written.
        """
        self.volume.check_range(offset, len(data))
        if not len(data):
            return
        blocks = -(-(offset + len(data)) // BLOCK) - offset // BLOCK
        whole = not offset % BLOCK and not len(data) % BLOCK
        if self._try(blocks, lambda: self._put(offset, data, whole=whole)):
            return
        self.checkpoint()
        if self._try(blocks, lambda: self._put(offset, data, whole=whole)):
            return
        # Still not all at once: piece by piece, with room made for each.
        step = self.volume.geometry.segment_blocks * BLOCK
        with memoryview(data) as view:
            at = 0
            while at < len(view):
                size = min(step - (offset + at) % step, len(view) - at)
                self._put_piece(offset + at, bytes(view[at : at + size]))
                at += size

    def _put_piece(self, offset: int, data: bytes) -> None:
        whole = not offset % BLOCK and not len(data) % BLOCK
        blocks = -(-(offset + len(data)) // BLOCK) - offset // BLOCK
        while not self._try(blocks, lambda: self._put(offset, data, whole=whole)):
            self.make_room(blocks)

    def zero(self, offset: int, length: int) -> None:
        """Make the bytes read as zeros; whole blocks are unmapped. Durable, and errors, as `write`."""
        self.volume.check_range(offset, length)
        first, last = -(-offset // BLOCK), (offset + length) // BLOCK
        if first > last:
            self.write(offset, bytes(length))
            return
        if offset % BLOCK:
            self.write(offset, bytes(first * BLOCK - offset))
        if last > first:
            while not self._try(0, lambda: self._clear(first, last - first)):
                self.make_room(0)
        if (offset + length) % BLOCK:
            self.write(last * BLOCK, bytes(offset + length - last * BLOCK))

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

    def tick(self) -> float:
        """What is due by the clock: reports, background cleaning. Returns the seconds until it should be called again.

        A failing keeper does not raise; only its refusal fences the session.
        """
        if self.fenced is None and not self.closed:
            due = self._reporting is Reporting.INTERVAL and self.durable != self._reported
            if due and self._monotonic() - self._last_report >= self._interval_s:
                self._last_report = self._monotonic()
                self._report_quietly()
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
        """
        with self._commits:
            if self.closed:
                return
            self._check()
            self.checkpoint(closing=True)
            self.closed = True
            self._tell(self.keeper.close, self.durable)

    def rekey(self, new_key: Secret) -> None:
        """Put the volume under another volume key: two checkpoints, so that both superblock slots are overwritten.

        The data keep their keys; `new_key` replaces the session's and stays the caller's. Errors as `flush`.
        """
        check_key(new_key)
        with self._commits:
            self._check()
            self.volume.key = new_key
            self.checkpoint()
            self.checkpoint()
            self._tell(self.keeper.report, self.durable)

    # Fencing and reporting

    def fence(self, why: str) -> None:
        """End all writing; reads may go on."""
        self.fenced = self.fenced or why

    def _check(self) -> None:
        if self.fenced is None and self._lease_s and self._monotonic() - self._answered > self._lease_s:
            self.fence("the lease ran out without an answer from the broker")
        if self.fenced is not None:
            raise VolumeFenced(self.fenced)
        if self.closed:
            raise VolumeFenced("it was closed")

    def _fail(self, doing: str, exc: Exception) -> NoReturn:
        """Fence after a failure that leaves the disk's state unknown to us."""
        self.fence(f"{doing} failed ({exc})")
        if isinstance(exc, JindiskError):
            raise exc
        if isinstance(exc, OSError):
            raise VolumeDeviceFailed(doing, exc) from exc
        raise exc

    def _tell(self, message: Callable[..., None], *values: object) -> None:
        """Send a message to the keeper; a refusal fences."""
        asked = self._monotonic()
        try:
            message(*values)
        except VolumeFenced as exc:
            self.fence(f"the broker refuses the session ({exc})")
            raise
        self._answered = asked
        self._reported = self.durable

    def _report_quietly(self) -> None:
        try:
            self._tell(self.keeper.report, self.durable)
        except Exception:  # noqa: BLE001 - no answer is no refusal: the next interval tries again, a lease may run out
            return

    def _tell_if_commit(self) -> None:
        """Report before a commit is acknowledged, where that is the policy. No answer is as bad as a refusal then."""
        if self._reporting is Reporting.COMMIT:
            try:
                self._tell(self.keeper.report, self.durable)
            except VolumeFenced:
                raise
            except Exception as exc:
                self.fence(f"the broker gives no answer ({exc})")
                raise VolumeFenced(self.fenced or "") from exc

    # Changing what is in memory; the lock is held

    def _try(self, blocks: int, change: Callable[[], None]) -> bool:
        """Apply a change of so many blocks if there is room for it, else return False and change nothing."""
        with self.volume.lock:
            self._check()
            if not self.has_room(blocks):
                return False
            change()
            self._changes += 1
            limit = min(PENDING_BLOCKS, STREAMS * self.volume.geometry.segment_blocks)
            if len(self.volume.pending) >= limit:
                self.seal_pending()
        return True

    def _put(self, offset: int, data: bytes | bytearray | memoryview, *, whole: bool) -> None:
        if not whole:
            first, end = offset // BLOCK, -(-(offset + len(data)) // BLOCK)
            merged = bytearray(self.volume.read_blocks(first, end - first))
            merged[offset - first * BLOCK : offset - first * BLOCK + len(data)] = data
            offset, data = first * BLOCK, merged
        pending, lba = self.volume.pending, offset // BLOCK
        for at in range(0, len(data), BLOCK):
            block = bytes(data[at : at + BLOCK])
            if block == ZERO_BLOCK:
                self._clear(lba, 1)
            else:
                pending[lba] = block
            lba += 1

    def _clear(self, lba: int, count: int) -> None:
        pending = self.volume.pending
        if count > len(pending):
            for block in [b for b in pending if lba <= b < lba + count]:
                del pending[block]
        else:
            for block in range(lba, lba + count):
                pending.pop(block, None)
        if count == 1 and self.volume.entry(lba) == UNMAPPED:
            return  # nothing was mapped, nothing changes
        self.volume.memtable.clear(lba, count, self.volume.trees[Kind.F].present)
        self.log.unmap(lba, count)

    def seal_pending(self) -> None:
        """Step F1: seal what is pending and write it into segments.

        A block leaves `pending` only after it was written: what the store refuses is sealed anew, elsewhere, later.
        """
        items = list(self.volume.pending.items())
        at = 0
        while at < len(items):
            at += self.fill("guest", items[at:])

    def fill(self, name: str, items: list[tuple[int, bytes]]) -> int:
        """Seal blocks into a stream's segment, as many as fit, with one write; returns how many.

        Raises:
            VolumeDeviceFailed: the store refused; the raw blocks are lost until their segment is cleaned.
        """
        stream = self.streams[name]
        if not stream.room:
            self._next_segment(stream)
        items = items[: stream.room]
        start, sealed, tags = stream.next, [], []
        for lba, plain in items:
            _, block = stream.seal(lba, plain)
            sealed.append(block[:BLOCK])
            tags.append(block[BLOCK:])
        try:
            self.volume.device.pwrite(start * BLOCK, b"".join(sealed))
        except OSError as exc:
            raise VolumeDeviceFailed(f"writing data (raw block {start})", exc) from exc
        memtable, pending, log = self.volume.memtable, self.volume.pending, self.log
        for (lba, plain), raw, tag in zip(items, range(start, stream.next), tags, strict=True):
            memtable.put(lba, raw.to_bytes(8, "little") + tag)
            log.map(lba, raw, tag)
            if pending.get(lba) is plain:
                del pending[lba]
        self.written_blocks += len(items)
        return len(items)

    def _next_segment(self, stream: Stream) -> None:
        if not len(self.free):
            raise VolumeCrowded(len(self.cleaner.damaged))
        segment, key = self.free.take(), self.generator.sealing_key()
        geometry = self.volume.geometry
        stream.begin(segment, geometry.segment_start(segment), geometry.segment_blocks, key)
        self.volume.segments.taken[segment] = Taken(key.material)
        self.log.segment(segment, key.material)

    # Room

    def segments_for(self, blocks: int) -> int:
        """Free segments that pending blocks and `blocks` more will take."""
        waiting = len(self.volume.pending) + blocks - self.streams["guest"].room
        return max(0, -(-waiting // self.volume.geometry.segment_blocks))

    def has_room(self, blocks: int) -> bool:
        """Whether a change of so many blocks may be accepted now."""
        need = self.segments_for(blocks)
        if need and len(self.free) - need < RESERVED_SEGMENTS:
            return False
        memtable = self.volume.memtable
        if len(memtable) + len(self.volume.pending) + blocks > MEMTABLE_LIMIT and len(memtable):
            return False
        return self.slots is None or self.page_estimate(blocks) <= self.slots.free or not len(memtable)

    def page_estimate(self, extra: int) -> int:
        """At most so many pages will the next checkpoint write (format document, section 14.4)."""
        geometry, memtable = self.volume.geometry, self.volume.memtable
        more = len(self.volume.pending) + extra
        per_segment = max(1, -(-geometry.segment_blocks // 512)) + 1
        counts = {
            Kind.F: len(memtable.touched) + more,
            Kind.R: (len(self.volume.segments.taken) + self.segments_for(extra) + STREAMS) * per_segment,
            Kind.S: len(memtable.entries) + 170 * len(memtable.cleared) + more + STREAMS,
        }
        return sum(min(count, pages) for kind, count in counts.items() for pages in geometry.levels[kind])

    def make_room(self, blocks: int) -> None:
        """Checkpoint, then clean until a change of so many blocks has room.

        Raises:
            VolumeCrowded: cleaning gains nothing.
            VolumeError: writing failed.
        """
        with self._commits:
            with self.volume.lock:
                self._check()
                if self.has_room(blocks):
                    return
            self.checkpoint()
            need = self.segments_for(blocks)
            if len(self.free) - need < RESERVED_SEGMENTS + STREAMS:
                self.cleaner.clean(max(FREE_TARGET, RESERVED_SEGMENTS + need))
            with self.volume.lock:
                if not self.has_room(blocks) and not len(self.volume.pending):
                    raise VolumeCrowded(len(self.cleaner.damaged))

    # Commits

    def _commit(self) -> None:
        """Steps F1 to F5, or a checkpoint where one is due. `_commits` is held."""
        with self.volume.lock:
            self._check()
            covered = self._changes
            self.seal_pending()
            if not self.log.entries:
                self._durable_changes = covered
                return
            due = self._checkpoint_due()
            if not due:
                log, self.log = self.log, EntryLog()
                for segment in log.segments:
                    self.volume.segments.taken[segment].stamp = self.sequence + 1
        if due:
            self.checkpoint()
        else:
            self._write_commit(log)
            self._durable_changes = covered
        self._tell_if_commit()

    def _checkpoint_due(self) -> bool:
        assert self.journal is not None, "the session has begun"
        assert self.slots is not None, "the session has begun"
        full = self.journal.index + self.log.block_bound() > self.volume.geometry.journal_blocks
        large = len(self.volume.memtable) > MEMTABLE_AT_FLUSH
        return full or large or self.page_estimate(0) > self.slots.free * 4 // 5

    def _write_commit(self, log: EntryLog) -> None:
        assert self.journal is not None, "the session has begun"
        ordered = log.maps > UNORDERED_MAPS
        start = JOURNAL_START + self.journal.index
        try:
            if ordered:
                self.volume.device.flush()
            sealed = self.journal.seal(log.blocks(), self.sequence + 1, ordered=ordered)
            self.volume.device.pwrite(start * BLOCK, sealed)
            self.volume.device.flush()
        except OSError as exc:
            self._fail("writing a commit", exc)
        self.sequence += 1
        self.durable = State(session=self.session_id, sequence=self.sequence, root=self.journal.root)

    def checkpoint(self, *, closing: bool = False) -> None:
        """Steps C1 to C7: everything written so far becomes durable in the trees. Any failure fences."""
        with self._commits:
            self._check()
            with self.volume.lock:
                self.seal_pending()  # if the store refuses, the data are kept and nothing was begun
            try:
                with self.volume.lock:
                    covered = self._changes
                    self._collect_slots()
                    freed, superblock, journal = checkpoint.merge(self, closing=closing)
                checkpoint.commit(self, superblock)
            except (VolumeError, OSError) as exc:
                self._fail("a checkpoint", exc)
            with self.volume.lock:
                self.journal = journal
                self._durable_changes = covered
                assert self.slots is not None, "collected above"
                self.slots.release_retired()
                self.free.add(freed)
                self.volume.reuse += 1

    def _collect_slots(self) -> None:
        """Find the used page slots, once."""
        if self.slots is not None:
            return
        slots = Slots(self.volume.geometry)
        for kind, tree in self.volume.trees.items():
            for level, index, ref in tree.interior_refs():
                slots.mark(ref_raw(ref), page_name(kind, level, index, ref_raw(ref)))
        self.slots = slots
