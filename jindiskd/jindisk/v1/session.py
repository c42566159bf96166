"""Writing a JinDisk 1 volume in place (`docs/formats/jindisk1.md`, section 10).

The volume protects nothing against whoever holds the disk. What this engine gives beyond the module is a flush that is
durable, and no wrong byte after a crash; what it keeps to are the rules without which the module loses data.

A commit writes, with a barrier after each step: data blocks, new index files in free slots, their catalogue entries and
SVT; DST and RIT; one sector of the BVT, which puts the new files in force and the old ones out. Before that sector is
written nothing that the old state needs was touched. There is no private journal: the module would not see it, and
what it writes would make the journal wrong.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field

from jindiskd.base.secret import Secret
from jindiskd.errors import JindiskError
from jindiskd.jindisk.device import Device
from jindiskd.jindisk.errors import VolumeCrowded, VolumeDeviceFailed, VolumeFenced, VolumeUnsupported
from jindiskd.jindisk.v1.catalogue import Entry, next_version
from jindiskd.jindisk.v1.index import Levels, file_of, is_mark, merge
from jindiskd.jindisk.v1.index_file import IndexFile, IndexWriter
from jindiskd.jindisk.v1.keys import KEY_BYTES, data_aad, seal
from jindiskd.jindisk.v1.layout import BITC_ENTRY, BITC_PER_BLOCK, BLOCK, SECTOR_BYTES
from jindiskd.jindisk.v1.nodes import RECORD, RECORD_BYTES
from jindiskd.jindisk.v1.survey import survey
from jindiskd.jindisk.v1.volume import Volume, open_volume

PENDING_BLOCKS = 1024
FRESH_LIMIT = 32_768
"""Blocks written since the last commit, after which there is one of its own accord."""
FOLD_AT = 65_536
"""Records in level 0, after which a commit merges it into level 1."""
ATOMIC_SLOTS = 8 * SECTOR_BYTES
"""A commit changes the BVT within one sector: more slots than it has bits have only volumes of 1 TiB and more."""
SESSIONS_LEFT = 3
"""So many files level 1 must be able to take after closing, before the module crashes."""
GREATEST_VERSION = 1 << 62


@dataclass(slots=True)
class _Plan:
    """What a commit puts in force."""

    level1: list[IndexFile]
    level0: IndexFile | None
    new: list[Entry] = field(default_factory=list)
    released: list[int] = field(default_factory=list)
    """Blocks of covered records that no file will have any more."""


class Session:
    """A volume open for writing, from `open_session` to `close`. Any thread may call any method."""

    def __init__(self, volume: Volume, *, entropy: Callable[[int], bytes] = os.urandom) -> None:
        """Read the whole index, and put the RIT right where it is wrong; nothing else is written before a change.

        Args:
            volume: open for reading; belongs to the session from now on.
            entropy: the source of keys.

        Raises:
            VolumeError: the index cannot be read, or two logical blocks share a raw block.
            VolumeUnsupported: the volume is too large to be written in place.
        """
        layout = volume.layout
        if layout.slots > ATOMIC_SLOTS:
            raise VolumeUnsupported("size for writing in place, in segments of 4 MiB,", layout.logical_segments)
        for entry in volume.levels.entries:
            if entry.version >= GREATEST_VERSION:
                raise VolumeUnsupported(f"version of {entry.name}", entry.version)
        self.volume, self._entropy = volume, entropy
        self.lock = volume.lock
        found = survey(volume)
        self.space, self._recent = found.space, found.recent
        self._fold_first, self._marked = found.fold, found.marked
        self.repaired = found.repaired
        """Blocks of the RIT that were put right at opening."""
        self.pending: dict[int, bytes] = {}
        self._fresh: set[int] = set()
        self._superseded: list[int] = []
        self._changed = False
        self.fenced: str | None = None
        self.closed = False

    # Requests

    @property
    def size_bytes(self) -> int:
        """Logical size."""
        return self.volume.size_bytes

    def read(self, offset: int, length: int) -> bytes:
        """As `Volume.read`; the latest content."""
        self.volume.check_range(offset, length)
        first, end = offset // BLOCK, -(-(offset + length) // BLOCK)
        with self.lock:
            data = self._read_blocks(first, end - first)
        skip = offset - first * BLOCK
        return data[skip : skip + length]

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Write bytes; durable after the next `flush`. Zeros are stored like anything else: see `zero`.

        Raises:
            InvalidArgument: the range reaches beyond the end.
            VolumeFenced: the session ended.
            VolumeError: a block that is changed in part cannot be read, or writing failed.
        """
        self.volume.check_range(offset, len(data))
        if not len(data):
            return
        with self.lock:
            self._check()
            first, end = offset // BLOCK, -(-(offset + len(data)) // BLOCK)
            head, tail = offset - first * BLOCK, end * BLOCK - offset - len(data)
            if head or tail:
                # Only the blocks at the ends are needed, but then the range is small or they are few.
                before = self._read_blocks(first, 1)[:head] if head else b""
                after = self._read_blocks(end - 1, 1)[BLOCK - tail :] if tail else b""
                data = b"".join((before, data, after))
            self._changed = True
            for lba in range(first, end):
                if len(self.pending) >= PENDING_BLOCKS:  # before more is taken, so that a failing device bounds it
                    self._seal_pending()
                    if len(self._fresh) >= FRESH_LIMIT:
                        self._commit()
                at = (lba - first) * BLOCK
                self.pending[lba] = bytes(data[at : at + BLOCK])

    def zero(self, offset: int, length: int) -> None:
        """Write zeros. They take room: an unmapped block reads as stale memory in the module. Errors as `write`."""
        self.volume.check_range(offset, length)
        step = PENDING_BLOCKS * BLOCK
        for at in range(offset, offset + length, step):
            self.write(at, bytes(min(step, offset + length - at)))

    def discard(self, offset: int, length: int) -> None:
        """Check the range, and do nothing more: the format has no way to unmap a block that the module can use."""
        self.volume.check_range(offset, length)
        self._check()

    def flush(self) -> None:
        """Make everything written before durable, visible for the module too.

        Raises:
            VolumeFenced: the session ended, now or before; what was written since the last flush may be lost.
            VolumeError: writing failed, or a part of the index that must be rewritten cannot be read.
        """
        with self.lock:
            self._check()
            self._commit()

    def close(self) -> None:
        """Commit, leave room in level 1 for sessions of the module, and put the tables right. Twice does nothing.

        Nothing is written if nothing was changed. Errors as `flush`.
        """
        with self.lock:
            if self.closed:
                return
            self._check()
            if self._changed:
                self._commit()
                levels = self.volume.levels
                if len(levels.level1) + bool(levels.level0) > self.volume.layout.cap - SESSIONS_LEFT:
                    self._install(self._fold(pack=True))
                self._tidy()
            self.closed = True

    # Inside; the lock is held

    def _check(self) -> None:
        if self.fenced is not None:
            raise VolumeFenced(self.fenced)
        if self.closed:
            raise VolumeFenced("it was closed")

    def record(self, lba: int) -> bytes | None:
        """The record of a block as last sealed; None if it is not mapped. Raises as `read`."""
        record = self._recent.get(lba)
        if record is None:
            file = file_of(self.volume.levels.level1, lba)
            record = file.lookup(lba) if file else None
        return None if record is None or is_mark(record) else record

    def _read_blocks(self, lba: int, count: int) -> bytes:
        parts: list[bytes] = []
        wanted: list[tuple[int, bytes | None]] = []
        for key in range(lba, lba + count):
            plain = self.pending.get(key)
            if plain is None:
                wanted.append((key, self.record(key)))
            else:
                parts += [self.volume.fetch(wanted), plain]
                wanted = []
        return b"".join((*parts, self.volume.fetch(wanted)))

    def _seal_pending(self) -> None:
        """Write what is pending into free blocks, each under a fresh key. What the device refuses stays pending."""
        if self.space.free_blocks < len(self.pending):
            self._make_room(len(self.pending))
        items = sorted(self.pending.items())
        positions = self.space.take(len(items))
        secret = self._entropy(KEY_BYTES * len(items))
        records: list[bytes] = []
        sealed: list[bytes] = []
        for number, ((_, plain), position) in enumerate(zip(items, positions, strict=True)):
            key = secret[number * KEY_BYTES : (number + 1) * KEY_BYTES]
            block = seal(key, plain, data_aad(position))
            sealed.append(block[:BLOCK])
            records.append(RECORD.pack(position, block[BLOCK:], key))
        try:
            self._write_runs(positions, sealed)
        except OSError as exc:
            for position in positions:
                self.space.give(position)
            raise VolumeDeviceFailed("writing data", exc) from exc
        for (lba, _), position, record in zip(items, positions, records, strict=True):
            self._supersede(lba)
            self._recent[lba] = record
            self._fresh.add(lba)
            self.space.reverse[position] = lba
        self.pending.clear()

    def _write_runs(self, positions: list[int], sealed: list[bytes]) -> None:
        start = 0
        for at in range(1, len(positions) + 1):
            if at == len(positions) or positions[at] != positions[at - 1] + 1:
                raw = self.volume.layout.data_start + positions[start]
                self.volume.device.pwrite(raw * BLOCK, b"".join(sealed[start:at]))
                start = at

    def _supersede(self, lba: int) -> None:
        """A record is about to be replaced: its block is free at once, or when no index on the disk has it."""
        old = self._recent.get(lba)
        if old is None or is_mark(old):
            return  # in level 1, if anywhere: covered until level 0 is merged
        position = RECORD.unpack(old)[0]
        if lba in self._fresh:
            self.space.reverse.pop(position, None)
            self.space.give(position)
        else:
            self._superseded.append(position)

    def _make_room(self, count: int) -> None:
        """Free covered blocks by merging. Raises `VolumeCrowded` if there are too few."""
        self._commit(seal=False)
        if self.space.free_blocks < count:
            self._install(self._fold(pack=False))
        if self.space.free_blocks < count:
            raise VolumeCrowded(0)

    # Commits

    def _commit(self, *, seal: bool = True) -> None:
        if seal and self.pending:
            self._seal_pending()
        if not self._fresh:
            return
        if self._fold_first or len(self._recent) > FOLD_AT:
            self._install(self._fold(pack=False))
        else:
            self._install(self._level0())

    def _slots(self) -> list[int]:
        """Free slots, ascending."""
        used = {entry.slot for entry in self.volume.levels.entries}
        return [slot for slot in range(self.volume.layout.slots) if slot not in used]

    def _versions(self) -> int:
        """The first version for new files; those after it go up by two.

        So the module's strict comparison finds a greater one than all, whichever slots they are in (rule 4).
        """
        return max((entry.version for entry in self.volume.levels.entries), default=-1) + 2

    def _writer(self, slots: list[int]) -> IndexWriter:
        if not slots:
            raise VolumeCrowded(0)
        slot = slots.pop(0)
        self.volume.cache.forget(slot)
        return IndexWriter(self.volume.layout, slot, self._entropy(KEY_BYTES))

    def _level0(self) -> _Plan:
        """A new file of level 0 in place of the old one."""
        keys = sorted(self._recent)
        writer = self._writer(self._slots())
        for at in range(0, len(keys), 1024):
            part = keys[at : at + 1024]
            writer.add(part, b"".join(self._recent[key] for key in part))
        entry = self._finish(writer, level=0, version=self._versions())
        plan = _Plan(list(self.volume.levels.level1), self._file(entry))
        plan.new.append(entry)
        return plan

    def _finish(self, writer: IndexWriter, *, level: int, version: int) -> Entry:
        try:
            return writer.finish(self.volume.device, level=level, version=version)
        except OSError as exc:
            raise VolumeDeviceFailed("writing an index file", exc) from exc

    def _file(self, entry: Entry) -> IndexFile:
        return IndexFile(self.volume.device, self.volume.layout, entry, self.volume.cache)

    def _fold(self, *, pack: bool) -> _Plan:
        """Level 0 merged into level 1: files that it meets are written anew, or with `pack` all."""
        kept, streams = self._streams(pack=pack)
        plan = _Plan(kept, None)
        slots, version = self._slots(), self._versions()
        for files, keys in streams:
            writer: IndexWriter | None = None
            for some, records in merge(files, self._recent, keys, lambda *lost: self._lost(plan, *lost)):
                at = 0
                while at < len(some):
                    writer = writer or self._writer(slots)
                    count = min(writer.room, len(some) - at)
                    writer.add(some[at : at + count], records[at * RECORD_BYTES : (at + count) * RECORD_BYTES])
                    at += count
                    if not writer.room:
                        plan.new.append(self._finish(writer, level=1, version=version))
                        writer, version = None, version + 2
            if writer is not None:
                plan.new.append(self._finish(writer, level=1, version=version))
                version += 2
        entries = [file.entry for file in kept] + plan.new
        crowded = len(entries) > self.volume.layout.cap - SESSIONS_LEFT
        stale = bool(entries) and next_version(entries) <= max(entry.version for entry in entries)
        if kept and (crowded or stale):
            return self._fold(pack=True)
        plan.level1 = sorted(kept + [self._file(entry) for entry in plan.new], key=lambda f: f.entry.first)
        return plan

    def _streams(self, *, pack: bool) -> tuple[list[IndexFile], list[tuple[list[IndexFile], list[int]]]]:
        """Files that stay; and runs of files to be merged, with the keys of level 0 that fall in or between them."""
        order, at = sorted(self._recent), 0
        kept: list[IndexFile] = []
        streams: list[tuple[list[IndexFile], list[int]]] = [([], [])]
        for file in self.volume.levels.level1:
            start = at
            while at < len(order) and order[at] < file.entry.first:
                at += 1
            streams[-1][1].extend(order[start:at])
            start = at
            while at < len(order) and order[at] <= file.entry.last:
                at += 1
            if pack or at > start or file.entry.slot in self._marked:
                streams[-1][0].append(file)
                streams[-1][1].extend(order[start:at])
            else:
                kept.append(file)
                streams.append(([], []))
        streams[-1][1].extend(order[at:])
        return kept, [stream for stream in streams if stream[0] or stream[1]]

    def _lost(self, plan: _Plan, lba: int, record: bytes, cover: bytes) -> None:
        """A covered record of level 1 goes: its block is free, unless it has another owner."""
        position = RECORD.unpack(record)[0]
        if is_mark(cover) or RECORD.unpack(cover)[0] != position:
            try:
                owner = self.space.owner(self.volume.device, position)
            except OSError as exc:
                raise VolumeDeviceFailed("reading the RIT", exc) from exc
            if owner == lba:
                plan.released.append(position)

    def _install(self, plan: _Plan) -> None:
        """The steps after the index files were written. Any failure fences: the disk's state is unknown to us then."""
        try:
            self._write_catalogue(plan)
            self.space.write_allocation(self.volume.device)
            self.volume.device.flush()
            self.space.write_use(self.volume.device)
            self.volume.device.flush()
            self._write_validity(plan)
            self.volume.device.flush()
        except (OSError, JindiskError) as exc:
            self.fenced = f"a commit failed ({exc})"
            if isinstance(exc, OSError):
                raise VolumeDeviceFailed("writing a commit", exc) from exc
            raise
        for slot in {e.slot for e in self.volume.levels.entries} - {f.entry.slot for f in plan.level1}:
            self.volume.cache.forget(slot)
        self.volume.levels = Levels(plan.level0, tuple(plan.level1))
        self._fresh.clear()
        if plan.level0 is None:
            self._recent.clear()
            self._fold_first, self._marked = False, frozenset()
        for position in {*self._superseded, *plan.released}:
            self.space.release(position)
        self._superseded.clear()

    def _write_catalogue(self, plan: _Plan) -> None:
        """The entries of new files. Others in the same block are written as they are."""
        device, layout = self.volume.device, self.volume.layout
        blocks: dict[int, bytearray] = {}
        for entry in plan.new:
            number, place = divmod(entry.slot, BITC_PER_BLOCK)
            if number not in blocks:
                blocks[number] = bytearray(device.pread((layout.bitc_start + number) * BLOCK, BLOCK))
            blocks[number][place * BITC_ENTRY : (place + 1) * BITC_ENTRY] = entry.encode()
        for number, block in blocks.items():
            device.pwrite((layout.bitc_start + number) * BLOCK, block)

    def _write_validity(self, plan: _Plan) -> None:
        """The one sector that puts the plan in force."""
        bits = bytearray(SECTOR_BYTES)
        for file in (*plan.level1, *([plan.level0] if plan.level0 else [])):
            bits[file.entry.slot >> 3] |= 1 << (file.entry.slot & 7)
        self.volume.device.pwrite(self.volume.layout.bvt_start * BLOCK, bits)

    def _tidy(self) -> None:
        """On closing: what was given back by the last commit. Nothing here is needed for what is mapped."""
        device = self.volume.device
        try:
            while self.space.changed:
                self.space.write_allocation(device)
                device.flush()
                self.space.write_use(device)
                device.flush()
        except OSError as exc:
            self.fenced = f"closing failed ({exc})"
            raise VolumeDeviceFailed("writing the tables", exc) from exc


def open_session(
    device: Device, *, key: Secret, size_bytes: int | None = None, entropy: Callable[[int], bytes] = os.urandom
) -> Session:
    """Open a JinDisk 1 volume for writing in place. The format does not protect it: see the package.

    Args:
        device: writable, and nobody else's: the module must not have it open.
        key: 28 bytes, root key and root IV; stays the caller's and is not kept.
        size_bytes: as for `open_volume`; the table's length, where the module will be given another than all.
        entropy: the source of keys.

    Raises:
        VolumeError: as `open_volume` and `Session`.
        InvalidArgument: key or size.
    """
    return Session(open_volume(device, key=key, size_bytes=size_bytes), entropy=entropy)
