"""Loading a whole image into a new volume in one pass (format document, section 15).

Workers read pieces of the source, say which of their blocks are not zero, and seal these into segments. This process
draws all keys, decides what goes where, and writes all pages. The result depends on the content of the source, not on
where its file has holes, so the same input, entropy and time give the same bytes.
"""

from __future__ import annotations

import errno
import os
import random
import struct
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from uuid import UUID

from jindiskd.base.anchor import Anchor
from jindiskd.base.secret import Secret
from jindiskd.errors import NoSpace
from jindiskd.jindisk.create import wipe
from jindiskd.jindisk.crypto import Generator, SealingKey
from jindiskd.jindisk.device import FileDevice
from jindiskd.jindisk.direct import DirectWriter
from jindiskd.jindisk.errors import VolumeDeviceFailed
from jindiskd.jindisk.geometry import (
    BLOCK,
    ENTRY_BYTES,
    PER_LEAF,
    TAG_BYTES,
    Geometry,
    Kind,
    blocks_of,
    default_geometry,
)
from jindiskd.jindisk.native import RUN, native
from jindiskd.jindisk.pieces import PIECE_BLOCKS, PieceBuffer, Run, data_pieces, pieces_of
from jindiskd.jindisk.pool import DEPTH, Pool, default_workers
from jindiskd.jindisk.runs import SealingRun, packed_entries
from jindiskd.jindisk.segments import FreeList, SegmentTable, Taken
from jindiskd.jindisk.slots import Slots
from jindiskd.jindisk.superblock import HOLE, SLOT_START, Superblock, root_after_superblock
from jindiskd.jindisk.tree import PageWriter, Tree, TreeUpdate

SMALL_BLOCKS = 8192
"""Below this, processes cost more than they bring."""
_TASK = struct.Struct("<?QI")
"""Whether to seal a piece, then first block and count of the piece to read; chunks follow."""
_CHUNK = struct.Struct("<Q32sI")
"""First raw block, key, number of runs; these follow."""
_F_LEAF, _F_ENTRY, _R_LEAF = PER_LEAF[Kind.F], ENTRY_BYTES[Kind.F], PER_LEAF[Kind.R]


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
    try:
        wipe(device, shape)
        with closing(_Worker(source_fd, source_offset_bytes, device)) as worker, Pool(worker.work, workers) as pool:
            if ranges is None:
                pieces = data_pieces(source_fd, source_offset_bytes, blocks)
            else:
                pieces = pieces_of(ranges, blocks)
            length = os.lseek(source_fd, 0, os.SEEK_END)
            loader.run(pool, pieces, progress or (lambda _d, _t: None))
            if os.lseek(source_fd, 0, os.SEEK_END) < length:
                # Its end counts as zeros where it was, and nowhere else.
                raise OSError(errno.ENODATA, "the source became shorter while it was read")
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


class _Worker:
    """The work as it is done in the worker processes: pieces of the source are read, looked at, held, and sealed.

    Only when all pieces before are known to the parent does it know where the blocks of this one go. A piece waits in
    the memory of the worker that read it until then, so that nothing is read twice.
    """

    def __init__(self, source_fd: int, source_offset: int, target: FileDevice) -> None:
        self._source, self._offset, self._target = source_fd, source_offset, DirectWriter(target)
        self._native = native()
        # Used again and again, 1 MiB each: new memory, and memory far from the processor, cost more than the cipher.
        self._run = SealingRun(PIECE_BLOCKS)
        self._free = [PieceBuffer() for _ in range(DEPTH)]
        self._held: deque[tuple[int, PieceBuffer]] = deque()

    def close(self) -> None:
        """In the process that made it: nothing is left open."""
        self._target.close()

    def work(self, task: bytes) -> bytes:
        """Seal the piece held longest, if told so, then read another; tags, and runs of blocks that are not zero."""
        sealing, first, count = _TASK.unpack_from(task)
        result = b""
        if sealing:
            start, buffer = self._held.popleft()
            result = self._seal(task, start, buffer)
            self._free.append(buffer)
        if count:
            buffer = self._free.pop()
            self._held.append((first, buffer))
            buffer.read(self._source, self._offset + first * BLOCK, count)
            if self._native is not None:
                result += self._native.data_runs(buffer.view[: count * BLOCK], first)
            else:
                result += b"".join(RUN.pack(first + start, length) for start, length in buffer.runs(count))
        return result

    def _seal(self, task: bytes, start: int, buffer: PieceBuffer) -> bytes:
        at, tags = _TASK.size, list[bytes]()
        while at < len(task):
            raw, material, count = _CHUNK.unpack_from(task, at)
            at += _CHUNK.size
            with memoryview(task)[at : at + count * RUN.size] as runs:
                done = self._seal_chunk(SealingKey.take_over(material), raw, runs, start, buffer)
            at += count * RUN.size
            self._target.write(raw * BLOCK, self._run.data(done))
            tags.append(self._run.tags(done))
        return b"".join(tags)

    def _seal_chunk(self, key: SealingKey, raw: int, runs: memoryview, start: int, buffer: PieceBuffer) -> int:
        """Seal runs of blocks of one piece for one segment; how many blocks."""
        if self._native is not None:
            return key.seal_blocks(self._native, raw, runs, base=start, plain=buffer.view, room=self._run)
        lbas, plains = list[int](), list[memoryview]()
        for lba, length in RUN.iter_unpack(runs):
            lbas += range(lba, lba + length)
            plains += buffer.blocks[lba - start : lba - start + length]
        key.seal_run(raw, lbas, plains, self._run)
        return len(lbas)


@dataclass(slots=True)
class _Filling:
    """A segment that is being filled."""

    start: int
    """Raw block."""
    material: bytes = field(repr=False)
    runs: list[Run] = field(default_factory=list)
    """Of logical blocks, as they lie in it; neighbours are one."""
    blocks: int = 0
    waiting: int = 0
    """Blocks whose tags are not known yet."""
    tags: list[bytes] = field(default_factory=list, repr=False)

    def add(self, lba: int, count: int) -> None:
        """Blocks that lie behind the others."""
        if self.runs and sum(self.runs[-1]) == lba:
            lba, count_before = self.runs.pop()
            self.runs.append((lba, count_before + count))
        else:
            self.runs.append((lba, count))
        self.blocks += count
        self.waiting += count


@dataclass(frozen=True, slots=True)
class _Piece:
    """A piece of the source that was read: which of its blocks go to which segment."""

    end: int
    """The logical block behind it."""
    chunks: list[tuple[_Filling, int, list[Run]]]
    """Segment, first raw block, runs."""


def _task(sealed: _Piece | None, piece: Run) -> bytes:
    """The task of sealing a piece that the worker holds, and of reading the next."""
    parts = [_TASK.pack(sealed is not None, *piece)]
    if sealed is not None:
        for filling, raw, runs in sealed.chunks:
            parts.append(_CHUNK.pack(raw, filling.material, len(runs)))
            parts += [RUN.pack(*run) for run in runs]
    return b"".join(parts)


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
        self._filling: deque[_Filling] = deque()
        self._leaf, self._leaf_page = -1, bytearray()
        self._reverse: dict[int, bytearray] = {}

    def run(self, pool: Pool, pieces: Iterator[Run], progress: Callable[[int, int], None]) -> None:
        """Read and seal everything."""
        total = self._geometry.size_bytes
        known: list[deque[_Piece]] = [deque() for _ in range(pool.lanes)]
        asked: deque[tuple[int, _Piece | None, Run | None]] = deque()

        def ask(lane: int) -> None:
            """Have a worker seal the piece that it has held longest, and read the next."""
            sealed = known[lane].popleft() if known[lane] else None
            if (piece := next(pieces, None)) or sealed:
                pool.give(_task(sealed, piece or (0, 0)), lane)
                asked.append((lane, sealed, piece))

        for turn in range(DEPTH * pool.lanes):
            ask(turn % pool.lanes)
        while asked:
            lane, sealed, piece = asked.popleft()
            result = pool.next()
            if sealed is not None:
                result = result[self._take(sealed, result) :]
                progress(sealed.end * BLOCK, total)
            if piece is not None:
                known[lane].append(_Piece(sum(piece), list(self._assign(RUN.iter_unpack(result)))))
            ask(lane)
        self._place_full(everything=True)
        progress(total, total)

    def _assign(self, runs: Iterable[Run]) -> Iterator[tuple[_Filling, int, list[Run]]]:
        """Where the next blocks of the source go."""
        size, part, at = self._geometry.segment_blocks, list[Run](), 0
        for first, length in runs:
            lba, left = first, length
            while left:
                if not self._filling or self._filling[-1].blocks == size:
                    if part:
                        yield self._filling[-1], at, part
                        part = []
                    self._next_segment()
                filling = self._filling[-1]
                if not part:
                    at = filling.start + filling.blocks
                count = min(left, size - filling.blocks)
                filling.add(lba, count)
                part.append((lba, count))
                lba, left = lba + count, left - count
        if part:
            yield self._filling[-1], at, part

    def _next_segment(self) -> None:
        segment, key = self._free.take(), self._segment_keys.sealing_key()
        self._segments.taken[segment] = Taken(key.material)
        self._filling.append(_Filling(self._geometry.segment_start(segment), key.hand_over()))

    def _take(self, piece: _Piece, tags: bytes) -> int:
        """Take the tags of a piece that was sealed; returns how many bytes they are."""
        at = 0
        for filling, _, runs in piece.chunks:
            count = sum(length for _, length in runs)
            filling.tags.append(tags[at : at + count * TAG_BYTES])
            filling.waiting -= count
            at += count * TAG_BYTES
        self._place_full()
        return at

    def _place_full(self, *, everything: bool = False) -> None:
        """Enter segments that are full and sealed into the trees, in the order in which they were begun.

        By whole segments, so that what is written when does not depend on how the source was cut into pieces.
        """
        size = self._geometry.segment_blocks
        while self._filling and not self._filling[0].waiting and (everything or self._filling[0].blocks == size):
            filling = self._filling.popleft()
            self._live[self._geometry.segment_of(filling.start)] = filling.blocks
            self._place(filling.start, filling.runs, b"".join(filling.tags))

    def _place(self, raw: int, runs: Sequence[Run], tags: bytes) -> None:
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
                entries = packed_entries(raw, tags[at * TAG_BYTES : (at + part) * TAG_BYTES])
                self._leaf_page[entry * _F_ENTRY : (entry + part) * _F_ENTRY] = entries
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
