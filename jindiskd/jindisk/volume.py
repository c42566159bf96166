"""An open volume: reading it. Writing is `session.Session`, which begins with one of these.

Any thread may call `read`; the lock covers looking things up, not reading and opening the data.
"""

from __future__ import annotations

import heapq
import itertools
import struct
import threading
from collections.abc import Callable, Iterator
from uuid import UUID

from jindiskd.base.anchor import Anchor, State
from jindiskd.base.secret import Secret
from jindiskd.errors import InvalidArgument
from jindiskd.jindisk.anchor import Unanchored
from jindiskd.jindisk.crypto import block_nonce
from jindiskd.jindisk.device import Device
from jindiskd.jindisk.errors import VolumeDeviceFailed, VolumeError, VolumeInconsistent, VolumeUnauthentic
from jindiskd.jindisk.geometry import BLOCK, ENTRY_BYTES, PER_LEAF, Geometry, Kind
from jindiskd.jindisk.journal import Map, Unmap
from jindiskd.jindisk.memtable import UNMAPPED, Memtable
from jindiskd.jindisk.recovery import Recovered, recover
from jindiskd.jindisk.runs import OpeningRun
from jindiskd.jindisk.segments import SegmentTable, Wanted, data_aad, data_name, open_run
from jindiskd.jindisk.tree import Tree

CACHE_PAGES = 4096
RUN_BLOCKS = 64
"""Read and opened at once."""
ZERO_BLOCK = bytes(BLOCK)
_LEAF = PER_LEAF[Kind.F]
_ENTRY = ENTRY_BYTES[Kind.F]
_MAPPING, _NO_TAG = struct.Struct("<Q16s"), UNMAPPED[8:]


class Volume:
    """A volume in the state that recovery chose, for reading."""

    def __init__(self, device: Device, found: Recovered, *, key: Secret, cache_pages: int = CACHE_PAGES) -> None:
        """Take what `recover` found; `cache_pages` of each tree are held in memory. `key` stays the caller's."""
        self.device, self.superblock, self.state = device, found.superblock, found.state
        self.identification, self.slot_words = found.identification, found.slots
        self.key = key
        self.geometry: Geometry = found.superblock.geometry
        self.segments: SegmentTable = found.segments
        self.trees = {
            kind: Tree(device, self.geometry, kind, found.superblock.tops[kind], cache_pages=cache_pages)
            for kind in Kind
        }
        self.memtable = Memtable()
        self.pending: dict[int, bytes] = {}
        """Blocks written but not sealed yet, by LBA."""
        self.lock = threading.RLock()
        self._rooms = threading.local()
        self.reuse = 0
        """Counts up whenever freed segments may be taken again: a block looked up before may be gone."""
        self.named: set[int] = set()
        """Segments that the journal's commits name."""
        self._replay(found)

    def _replay(self, found: Recovered) -> None:
        """Step R5: the memtable is the journal's commits up to the state."""
        for commit in found.commits:
            for block in commit.blocks:
                for entry in block.entries:
                    if isinstance(entry, Map):
                        self.memtable.put(entry.lba, entry.raw.to_bytes(8, "little") + entry.tag)
                        self.named.add(self.geometry.segment_of(entry.raw))
                    elif isinstance(entry, Unmap):
                        self.memtable.clear(entry.lba, entry.count, self.trees[Kind.F].present)
                    else:
                        self.named.add(entry.segment)

    @property
    def size_bytes(self) -> int:
        """Logical size."""
        return self.geometry.size_bytes

    @property
    def uuid(self) -> UUID:
        """The volume's identity."""
        return self.superblock.uuid

    def check_range(self, offset: int, length: int) -> None:
        """Raise `InvalidArgument` unless the bytes lie within the volume."""
        if offset < 0 or length < 0 or offset + length > self.size_bytes:
            raise InvalidArgument("the range", (offset, length), f"the volume has {self.size_bytes} bytes")

    def read(self, offset: int, length: int) -> bytes:
        """The bytes there; what was never written or was trimmed is zero.

        Raises:
            InvalidArgument: the range reaches beyond the end.
            VolumeUnauthentic, VolumeInconsistent, VolumeDeviceFailed: some block cannot be read; no bytes are returned.
        """
        self.check_range(offset, length)
        if not length:
            return b""
        first, end = offset // BLOCK, -(-(offset + length) // BLOCK)
        data = self.read_blocks(first, end - first)
        skip = offset - first * BLOCK
        return data if not skip and len(data) == length else data[skip : skip + length]

    def read_blocks(self, lba: int, count: int) -> bytes:
        """Whole blocks; errors as `read`."""
        while True:
            with self.lock:
                reuse = self.reuse
                known, wanted = self._look_up(lba, count)
            if count == 1 and known:
                return known[0][1]
            if count == 1 and not wanted:
                return ZERO_BLOCK
            try:
                if count == 1:
                    return self._open_one(wanted[0])
                found = bytearray(count * BLOCK)
                for block, plain in known:
                    found[(block - lba) * BLOCK : (block - lba + 1) * BLOCK] = plain
                view = memoryview(found)
                self._open(wanted, [view[(n - lba) * BLOCK : (n - lba + 1) * BLOCK] for n, *_ in wanted])
            except VolumeUnauthentic:
                # The block may have been moved, and its place taken again, since it was looked up.
                if reuse == self.reuse:
                    raise
                continue
            return bytes(found)

    def _look_up(self, lba: int, count: int) -> tuple[list[tuple[int, bytes]], list[Wanted]]:
        """What waits in memory, and what to fetch; with keys, for a segment's key goes when it is freed."""
        known: list[tuple[int, bytes]] = []
        wanted: list[Wanted] = []
        pending, memtable, tree = self.pending, self.memtable, self.trees[Kind.F]
        end = lba + count
        for leaf in range(lba // _LEAF, (end - 1) // _LEAF + 1):
            low, high = max(lba, leaf * _LEAF), min(end, (leaf + 1) * _LEAF)
            changed, page, looked = leaf in memtable.touched, None, False
            if not changed and not pending:
                page, looked = tree.page(0, leaf), True
                if page is not None:
                    self._look_up_run(page, leaf, range(low, high), wanted)
                continue
            for block in range(low, high):
                if pending and (plain := pending.get(block)) is not None:
                    known.append((block, plain))
                    continue
                entry = memtable.get(block) if changed else None
                if entry is None:
                    if not looked:
                        page, looked = tree.page(0, leaf), True
                    if page is None:
                        continue
                    at = (block - leaf * _LEAF) * _ENTRY
                    entry = page[at : at + _ENTRY]
                if entry != UNMAPPED:
                    wanted.append(self.wanted(block, entry))
        return known, wanted

    def _look_up_run(self, page: bytes, leaf: int, lbas: range, wanted: list[Wanted]) -> None:
        """As `_look_up`, where a leaf of F alone counts."""
        start, end, bits = self.geometry.data_start, self.geometry.end, self.geometry.segment_bits
        first, segment, key = leaf * _LEAF, -1, None
        entries = page[(lbas.start - first) * _ENTRY : (lbas.stop - first) * _ENTRY]
        for lba, (raw, tag) in zip(lbas, _MAPPING.iter_unpack(entries), strict=True):
            if not raw and tag == _NO_TAG:
                continue
            if not start <= raw < end:
                raise VolumeInconsistent(data_name(lba, raw), "it lies outside the data region")
            if key is None or (raw - start) >> bits != segment:
                segment = (raw - start) >> bits
                key = self.segments.opening_key(segment)
            wanted.append((lba, raw, tag, key))

    def entry(self, lba: int) -> bytes:
        """Where a block is now, pending writes aside: an entry of F. Call with the lock held."""
        return self.memtable.get(lba) or self.mapped_in_tree(lba)

    def mapped_in_tree(self, lba: int) -> bytes:
        """The entry of tree F, 24 bytes."""
        page = self.trees[Kind.F].page(0, lba // _LEAF)
        if page is None:
            return UNMAPPED
        at = lba % _LEAF * _ENTRY
        return page[at : at + _ENTRY]

    def wanted(self, lba: int, entry: bytes) -> Wanted:
        """What `fetch` needs to read the block of an entry of F. Call with the lock held."""
        raw = int.from_bytes(entry[:8], "little")
        geometry = self.geometry
        if not geometry.data_start <= raw < geometry.end:
            raise VolumeInconsistent(data_name(lba, raw), "it lies outside the data region")
        return lba, raw, entry[8:], self.segments.opening_key((raw - geometry.data_start) >> geometry.segment_bits)

    def fetch(self, wanted: list[Wanted]) -> list[bytes]:
        """Read and open data blocks, neighbours on the disk in one read.

        Raises:
            VolumeUnauthentic, VolumeDeviceFailed: one of them cannot be read.
        """
        found = memoryview(bytearray(len(wanted) * BLOCK))
        parts = [found[at : at + BLOCK] for at in range(0, len(found), BLOCK)]
        self._open(wanted, parts)
        return [bytes(part) for part in parts]

    def _open(self, wanted: list[Wanted], plains: list[memoryview]) -> None:
        """As `fetch`, each block into its part."""
        room: OpeningRun | None = getattr(self._rooms, "room", None)
        if room is None:
            room = self._rooms.room = OpeningRun(RUN_BLOCKS)
        at = 0
        while at < len(wanted):
            _, raw, _, key = wanted[at]
            end = at + 1
            while (
                end < min(len(wanted), at + RUN_BLOCKS) and wanted[end][1] == raw + end - at and wanted[end][3] is key
            ):
                end += 1
            failed = open_run(self.device, wanted[at:end], plains[at:end], room)
            if failed is not None:
                raise failed
            at = end

    def _open_one(self, wanted: Wanted) -> bytes:
        """As `fetch`, of one block."""
        lba, raw, tag, key = wanted
        try:
            sealed = self.device.pread(raw * BLOCK, BLOCK)
        except OSError as exc:
            raise VolumeDeviceFailed(f"reading {data_name(lba, raw)}", exc) from exc
        return key.open(block_nonce(raw), sealed + tag, data_aad(lba), data_name(lba, raw))

    def leaves(self, damaged: Callable[[VolumeError], None] | None = None) -> Iterator[tuple[int, bytes]]:
        """Index and current page of every leaf of the map that is not empty, in order, journal included.

        A page that cannot be read is given to `damaged`, if there is one; only the journal's entries below it come.
        """
        tree, changed = self.trees[Kind.F], dict(self.memtable.by_leaf())
        for index, _ in itertools.groupby(heapq.merge(sorted(changed), tree.leaves(damaged))):
            try:
                page = None if index in self.memtable.cleared else tree.page(0, index)
            except VolumeError as exc:
                if damaged is None:
                    raise
                damaged(exc)
                page = None
            merged = bytearray(page or ZERO_BLOCK)
            for at, entry in changed.get(index, ()):
                merged[at * _ENTRY : (at + 1) * _ENTRY] = entry
            if merged != ZERO_BLOCK:
                yield index, bytes(merged)


def open_volume(
    device: Device,
    *,
    key: Secret,
    uuid: UUID | None,
    anchor: Anchor | Unanchored,
    name: str = "the device",
    cache_pages: int = CACHE_PAGES,
) -> Volume:
    """Open a volume for reading; nothing is written. `Session.begin` goes on from it.

    Args:
        device: the device that holds it from its first byte on.
        key: the volume key, 32 bytes; stays the caller's, and must live as long as a session.
        uuid: the volume expected; None accepts any.
        anchor: what the owner remembers; `UNANCHORED` is the explicit decision to do without.
        name: of the device, for messages.
        cache_pages: map pages held in memory for each tree, 4 KiB each.

    Raises:
        VolumeError: one of the classes of the format document, section 16.
    """
    found = recover(device, key=key, uuid=uuid, anchor=anchor, where=name)
    return Volume(device, found, key=key, cache_pages=cache_pages)


def anchor_of(state: State, *, still_open: bool) -> Anchor:
    """The anchor that remembers a state."""
    return Anchor(open=still_open, session=state.session, sequence=state.sequence, root=state.root)
