"""Loading a whole image into a new volume in one pass (format document, section 15).

Two kinds of tasks for the workers: look which blocks of a piece of the source are not zero, and seal blocks into a
segment. This process draws all keys, decides what goes where, and writes all pages. The result depends on the content
of the source, not on where its file has holes, so the same input, entropy and time give the same bytes.
"""

from __future__ import annotations

import errno
import os
import random
import struct
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from uuid import UUID

from jindiskd.base.secret import Secret
from jindiskd.errors import InvalidArgument, NoSpace
from jindiskd.jindisk.anchor import Anchor
from jindiskd.jindisk.create import wipe
from jindiskd.jindisk.crypto import TAG_BYTES, Generator, SealingKey
from jindiskd.jindisk.device import FileDevice
from jindiskd.jindisk.errors import VolumeDeviceFailed
from jindiskd.jindisk.geometry import BLOCK, ENTRY_BYTES, PER_LEAF, Geometry, Kind, blocks_of, default_geometry
from jindiskd.jindisk.pool import Pool, default_workers
from jindiskd.jindisk.segments import FreeList, SegmentTable, Taken
from jindiskd.jindisk.slots import Slots
from jindiskd.jindisk.superblock import HOLE, SLOT_START, Superblock, root_after_superblock
from jindiskd.jindisk.tree import PageWriter, Tree, TreeUpdate

PIECE_BLOCKS = 1024
SMALL_BLOCKS = 8192
"""Below this, processes cost more than they bring."""
STEP_BLOCKS = 64
"""Read, sealed and written at once."""
_SCAN = struct.Struct("<BQI")
_SEAL = struct.Struct("<BQ32s")
_RUN = struct.Struct("<QI")
_ZERO, _ZERO16 = bytes(BLOCK), bytes(16)
_F_LEAF, _F_ENTRY, _R_LEAF = PER_LEAF[Kind.F], ENTRY_BYTES[Kind.F], PER_LEAF[Kind.R]
Run = tuple[int, int]
"""First block and count."""


def bulk_load(
    source_fd: int,
    target_fd: int,
    *,
    size_bytes: int,
    key: Secret,
    uuid: UUID,
    session_id: bytes,
    timestamp: int,
    source_offset_bytes: int = 0,
    target_offset_bytes: int = 0,
    ranges: Sequence[tuple[int, int]] | None = None,
    progress: Callable[[int, int], None] | None = None,
    entropy: Callable[[int], bytes] = os.urandom,
    workers: int | None = None,
    label: str = "",
    geometry: Geometry | None = None,
    ordered_placement: bool = False,
) -> Anchor:
    """Write a new, closed volume with the content of a source into a window of a file or device.

    Args:
        source_fd: the clear image; read with `pread`, its end counts as zeros. Blocks of zeros are not stored.
        target_fd: read and written at `target_offset_bytes` and after it, for `required_bytes(size_bytes)` bytes. A
            file that ends before is made longer. Whatever the window holds is lost.
        size_bytes: logical size, a multiple of 4096, 16 MiB to 256 TiB.
        key: the volume key, 32 bytes; stays the caller's.
        uuid: the volume's identity.
        session_id: 32 bytes, of the builder's session.
        timestamp: Unix seconds.
        source_offset_bytes: where the image begins in the source.
        target_offset_bytes: where the volume begins in the target.
        ranges: offset and length in bytes of the parts of the image that count, in order, apart from each other, whole
            blocks; the rest becomes zeros whatever the source has there. None for all of it.
        progress: called with bytes of the source done, and in all.
        entropy: the source of random bytes; asked once, for 64 bytes.
        workers: processes; None for one on each processor.
        label: for people; public.
        geometry: None for the default one of this size.
        ordered_placement: fill segments in order of position; otherwise their places are drawn.

    Returns:
        The first anchor: to be kept with the key.

    Raises:
        InvalidArgument: size, key or label.
        NoSpace: the target's file system is full.
        VolumeDeviceFailed: reading or writing failed.
        VolumeMalformed: the target is a device, and too small.
        WorkerFailed: a process was killed.
    """
    blocks = blocks_of(size_bytes)
    shape = geometry or default_geometry(blocks)
    if workers is None:
        workers = default_workers() if blocks > SMALL_BLOCKS else 1
    lengthen(target_fd, target_offset_bytes + shape.end * BLOCK)
    device = FileDevice(target_fd, name="the target", offset_bytes=target_offset_bytes)
    loader = _Loader(device, shape, Generator(key, session_id, entropy), ordered=ordered_placement)
    worker = _Worker(source_fd, source_offset_bytes, device)
    try:
        wipe(device, shape)
        with Pool(worker.work, workers) as pool:
            if ranges is None:
                pieces = data_pieces(source_fd, source_offset_bytes, blocks)
            else:
                pieces = _pieces_of(ranges, blocks)
            loader.run(pool, pieces, progress or (lambda _d, _t: None))
        return loader.finish(key=key, uuid=uuid, session_id=session_id, timestamp=timestamp, label=label)
    except OSError as exc:
        if exc.errno == errno.ENOSPC:
            raise NoSpace("the encrypted volume", shape.end * BLOCK) from exc
        raise VolumeDeviceFailed("loading the volume", exc) from exc


def lengthen(fd: int, size: int) -> None:
    """Make a regular file at least so long; a device is left as it is."""
    status = os.fstat(fd)
    if status.st_mode & 0o170000 == 0o100000 and status.st_size < size:  # a regular file
        os.ftruncate(fd, size)


def data_pieces(fd: int, offset: int, blocks: int) -> Iterator[Run]:
    """The pieces of the source that may hold data, in order: runs of at most 1024 blocks."""
    at, end = 0, blocks * BLOCK
    while at < end:
        try:
            start = os.lseek(fd, offset + at, os.SEEK_DATA) - offset
            stop = os.lseek(fd, offset + start, os.SEEK_HOLE) - offset
        except OSError as exc:
            if exc.errno == errno.ENXIO:
                return  # only a hole follows, or the end
            if exc.errno != errno.EINVAL:
                raise
            start, stop = at, end  # a device that knows no holes
        first, last = max(at, start) // BLOCK, -(-min(stop, end) // BLOCK)
        for block in range(first, last, PIECE_BLOCKS):
            yield block, min(PIECE_BLOCKS, last - block)
        at = last * BLOCK


def _pieces_of(ranges: Sequence[tuple[int, int]], blocks: int) -> Iterator[Run]:
    """The given parts of the source as runs of at most 1024 blocks."""
    before = 0
    for offset, length in ranges:
        first, last = offset // BLOCK, (offset + length) // BLOCK
        if offset % BLOCK or length % BLOCK or not before <= first < last <= blocks:
            raise InvalidArgument("a range of", f"{length} bytes at {offset}", "whole blocks, in order, in the image")
        for block in range(first, last, PIECE_BLOCKS):
            yield block, min(PIECE_BLOCKS, last - block)
        before = last


class _Worker:
    """The tasks, as they run in the worker processes."""

    def __init__(self, source_fd: int, source_offset: int, target: FileDevice) -> None:
        self._source, self._offset, self._target = source_fd, source_offset, target
        # Used again and again, and small: new memory, and memory far from the processor, cost more than the cipher.
        self._plain, self._sealed = bytearray(STEP_BLOCKS * BLOCK), bytearray(STEP_BLOCKS * BLOCK + TAG_BYTES)

    def _read(self, lba: int, count: int) -> None:
        """Blocks of the source into `_plain`; zeros behind the source's end."""
        with memoryview(self._plain) as whole, whole[: count * BLOCK] as view:
            done = 0
            while done < len(view):
                more = os.preadv(self._source, [view[done:]], self._offset + lba * BLOCK + done)
                if not more:
                    view[done:] = bytes(len(view) - done)
                    return
                done += more

    def work(self, task: bytes) -> bytes:
        """Do one task."""
        return self._scan(task) if task[0] == 0 else self._seal(task)

    def _scan(self, task: bytes) -> bytes:
        """Which blocks are not zero, as runs."""
        _, first, count = _SCAN.unpack(task)
        runs, start = [], -1
        for lba in range(first, first + count):
            at = (lba - first) % STEP_BLOCKS * BLOCK
            if not at:
                self._read(lba, min(STEP_BLOCKS, first + count - lba))
            if self._plain[at : at + 16] != _ZERO16 or self._plain[at : at + BLOCK] != _ZERO:
                if start < 0:
                    start = lba
            elif start >= 0:
                runs.append(_RUN.pack(start, lba - start))
                start = -1
        if start >= 0:
            runs.append(_RUN.pack(start, first + count - start))
        return b"".join(runs)

    def _seal(self, task: bytes) -> bytes:
        """Seal blocks into a segment; their tags."""
        _, raw, material = _SEAL.unpack_from(task)
        key, tags = SealingKey.take_over(material), list[bytes]()
        with memoryview(self._plain) as plain, memoryview(self._sealed) as sealed:
            parts = [plain[at : at + BLOCK] for at in range(0, len(plain), BLOCK)]
            for first, whole in _RUN.iter_unpack(task[_SEAL.size :]):
                for lba in range(first, first + whole, STEP_BLOCKS):
                    count = min(STEP_BLOCKS, first + whole - lba)
                    self._read(lba, count)
                    tags += key.seal_run(raw, zip(range(lba, lba + count), parts, strict=False), sealed)
                    self._target.pwrite(raw * BLOCK, sealed[: count * BLOCK])
                    raw += count
            for part in parts:
                part.release()
        return b"".join(tags)


def _enter(page: bytearray, entry: int, raw: int, tags: bytes) -> None:
    """Entries of F from `entry` on: consecutive raw blocks from `raw` on, with these tags."""
    count = len(tags) // TAG_BYTES
    places = memoryview(struct.pack(f"<{count}Q", *range(raw, raw + count))).cast("Q")
    halves = memoryview(tags).cast("Q")
    # An entry is three words. Words are only copied here, so the machine's byte order does not matter.
    with memoryview(page) as whole, whole.cast("Q") as words:
        part = words[entry * _F_ENTRY // 8 : (entry + count) * _F_ENTRY // 8]
        part[0::3], part[1::3], part[2::3] = places, halves[0::2], halves[1::2]
        part.release()


class _Loader:
    """What the parent does: keys, placement, pages, superblock."""

    def __init__(self, device: FileDevice, geometry: Geometry, generator: Generator, *, ordered: bool) -> None:
        self._device, self._geometry, self._generator = device, geometry, generator
        # Segments and pages draw from branches: how far scanning runs ahead of sealing must not show in the keys.
        self._segment_keys = generator.branch("segments")
        self._slots = Slots(geometry)
        self._writer = PageWriter(device, self._slots, generator.branch("pages"))
        self._trees = {kind: Tree(device, geometry, kind, HOLE, cache_pages=16) for kind in Kind}
        self._updates = {kind: TreeUpdate(tree, self._writer, self._slots) for kind, tree in self._trees.items()}
        choose = None if ordered else random.Random(generator.placement_seed()).randrange  # noqa: S311 - hides only order
        self._free = FreeList(range(geometry.segments), choose)
        self._segments = SegmentTable(geometry, self._trees[Kind.S], sequence=1, mapped=0)
        self._live: Counter[int] = Counter()
        self._runs: deque[Run] = deque()
        self._collected = 0
        self._sealing: deque[tuple[int, tuple[Run, ...]]] = deque()
        self._leaf, self._leaf_page = -1, bytearray()
        self._reverse: dict[int, bytearray] = {}

    def run(self, pool: Pool, pieces: Iterator[Run], progress: Callable[[int, int], None]) -> None:
        """Scan and seal everything."""
        size, total = self._geometry.segment_blocks, self._geometry.size_bytes
        kinds: deque[bool] = deque()  # whether the task was a seal
        scanning, more = 0, True
        while more or kinds or self._runs:
            while not pool.full:
                if self._collected >= size or (self._runs and not more and not scanning):
                    pool.give(self._next_segment())
                    kinds.append(True)
                elif more and (piece := next(pieces, None)) is not None:
                    pool.give(_SCAN.pack(0, *piece))
                    kinds.append(False)
                    scanning += 1
                else:
                    more = False
                    if not self._runs or scanning:
                        break
            if not kinds:
                continue
            result = pool.next()
            if kinds.popleft():
                raw, runs = self._sealing.popleft()
                self._place(raw, runs, result)
                progress((runs[-1][0] + runs[-1][1]) * BLOCK, total)
            else:
                scanning -= 1
                for run in _RUN.iter_unpack(result):
                    self._runs.append(run)
                    self._collected += run[1]
        progress(total, total)

    def _next_segment(self) -> bytes:
        """The task of sealing what was collected, at most a segment full."""
        room, runs = self._geometry.segment_blocks, []
        while room and self._runs:
            lba, count = self._runs.popleft()
            if count > room:
                self._runs.appendleft((lba + room, count - room))
                count = room
            runs.append((lba, count))
            room -= count
            self._collected -= count
        segment, key = self._free.take(), self._segment_keys.sealing_key()
        self._segments.taken[segment] = Taken(key.material)
        self._live[segment] = self._geometry.segment_blocks - room
        raw = self._geometry.segment_start(segment)
        self._sealing.append((raw, tuple(runs)))
        return _SEAL.pack(1, raw, key.hand_over()) + b"".join(_RUN.pack(*run) for run in runs)

    def _place(self, raw: int, runs: tuple[Run, ...], tags: bytes) -> None:
        """Enter sealed blocks into F and R; leaves of F are complete as the input passes."""
        at = 0
        for lba, count in runs:
            self._reverse_run(raw, lba, count)
            while count:
                leaf, entry = divmod(lba, _F_LEAF)
                if leaf != self._leaf:
                    self._end_leaf()
                    self._leaf, self._leaf_page = leaf, bytearray(BLOCK)
                part = min(count, _F_LEAF - entry)
                _enter(self._leaf_page, entry, raw, tags[at * TAG_BYTES : (at + part) * TAG_BYTES])
                lba, raw, at, count = lba + part, raw + part, at + part, count - part

    def _end_leaf(self) -> None:
        if self._leaf >= 0:
            self._updates[Kind.F].replace(self._leaf, bytes(self._leaf_page))

    def _reverse_run(self, raw: int, lba: int, count: int) -> None:
        """Enter a run into R. Leaves wait for the end where several segments share one."""
        base = raw - self._geometry.data_start
        while count:
            leaf, at = divmod(base, _R_LEAF)
            part = min(count, _R_LEAF - at)
            page = self._reverse.setdefault(leaf, bytearray(BLOCK))
            page[at * 8 : (at + part) * 8] = struct.pack(f"<{part}Q", *range(lba + 1, lba + 1 + part))
            base, lba, count = base + part, lba + part, count - part
        if self._geometry.segment_blocks >= _R_LEAF:
            for leaf in [known for known in self._reverse if known != base // _R_LEAF]:
                self._updates[Kind.R].replace(leaf, bytes(self._reverse.pop(leaf)))

    def finish(self, *, key: Secret, uuid: UUID, session_id: bytes, timestamp: int, label: str) -> Anchor:
        """Write what is left of the trees, then superblock and identification block."""
        self._end_leaf()
        for leaf in sorted(self._reverse):
            self._updates[Kind.R].replace(leaf, bytes(self._reverse[leaf]))
        self._segments.checkpoint(self._updates[Kind.S], dict(self._live), set(), 1)
        for update in self._updates.values():
            update.finish()
        self._writer.finish()
        self._device.flush()
        superblock = Superblock(
            uuid=uuid,
            geometry=self._geometry,
            epoch=1,
            sequence=1,
            closed=True,
            mapped=self._segments.mapped,
            oldest_stamp=self._segments.oldest_stamp(),
            formatted_at=timestamp,
            committed_at=timestamp,
            session=session_id,
            previous_root=bytes(32),
            journal_key=self._generator.draw(),
            tops={kind: tree.top for kind, tree in self._trees.items()},
        )
        sealed = superblock.seal(key, self._generator)
        self._device.pwrite((SLOT_START + superblock.slot) * BLOCK, sealed)
        self._device.pwrite(0, superblock.identification(label).encode())
        self._device.flush()
        return Anchor(open=False, session=session_id, sequence=1, root=root_after_superblock(sealed))
