"""Data segments: keys, live counts, stamps, and which are free (format document, sections 8 and 9; tree S).

All of tree S is held in memory (64 GiB: 203 pages). Live counts and stamps are those of the last checkpoint; segments
taken since then are kept beside them.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Callable, Collection, Iterable, Sequence

from jindiskd.jindisk.crypto import OpeningKey, SealingKey
from jindiskd.jindisk.device import Device, read_parts
from jindiskd.jindisk.errors import VolumeDeviceFailed, VolumeError, VolumeInconsistent, VolumeUnauthentic
from jindiskd.jindisk.geometry import BLOCK, PER_LEAF, Geometry, Kind
from jindiskd.jindisk.runs import OpeningRun, SealingRun
from jindiskd.jindisk.tree import Tree, TreeUpdate

ENTRY = struct.Struct("<32sIIQ")
IN_USE = 1
_FREE = bytes(ENTRY.size)
_LEAF = PER_LEAF[Kind.S]
_KEYS_HELD = 4096
_LBA = struct.Struct("<Q")
Wanted = tuple[int, int, bytes, OpeningKey]
"""A data block to be read: LBA, raw block, tag, key."""


def data_aad(lba: int) -> bytes:
    """8 bytes of associated data of a data block."""
    return _LBA.pack(lba)


def data_name(lba: int, raw: int) -> str:
    """How messages name a data block."""
    return f"the data of logical block {lba} (raw block {raw})"


def open_run(
    device: Device, wanted: Sequence[Wanted], plains: Sequence[memoryview], room: OpeningRun
) -> VolumeError | None:
    """Read and open blocks that lie one behind the other in one segment, with one read.

    Args:
        device: the volume's.
        wanted: the blocks, at most as many as there is room for.
        plains: take the plaintexts, 4096 bytes each.
        room: for the ciphertexts.

    Returns:
        None, or the error of the first that cannot be read.
    """
    lba, raw, _, key = wanted[0]
    count = len(wanted)
    try:
        read_parts(device, raw * BLOCK, room.blocks[:count])
    except OSError as exc:
        return VolumeDeviceFailed(f"reading {data_name(lba, raw)}", exc)
    with memoryview(b"".join(tag for _, _, tag, _ in wanted)) as tags, tags.cast("Q") as halves:
        room.put_tags(halves[0::2], halves[1::2])
    room.number(raw, [lba for lba, _, _, _ in wanted])
    if key.open_run(room, plains):
        return None
    bad = next(at for at, plain in enumerate(plains) if not key.open_run_at(room, at, plain))
    return VolumeUnauthentic(data_name(*wanted[bad][:2]))


class Taken:
    """A segment taken into use since the last checkpoint."""

    __slots__ = ("key", "stamp")

    def __init__(self, key: bytes, stamp: int = 0) -> None:
        """`stamp`: sequence number of the commit that recorded it; 0 as long as none did."""
        self.key, self.stamp = key, stamp


class SegmentTable:
    """Tree S in memory, and what was taken since."""

    def __init__(self, geometry: Geometry, tree: Tree, *, sequence: int, mapped: int) -> None:
        """Read all pages of S.

        Args:
            geometry: the volume's.
            tree: S.
            sequence: of the superblock; no stamp may be greater.
            mapped: of the superblock; the sum of all live counts.

        Raises:
            VolumeError: a page does not open, or an entry violates the format document.
        """
        self._geometry, self._tree = geometry, tree
        self.live = array("I", bytes(4 * geometry.segments))
        self.stamps = array("Q", bytes(8 * geometry.segments))
        """0 for a segment not in use."""
        self.taken: dict[int, Taken] = {}
        self._pages: dict[int, bytearray] = {}
        self._hollow: set[int] = set()
        """In use without a live block: left by an earlier process, or being filled at the last checkpoint."""
        self._opening: dict[int, tuple[bytes, OpeningKey]] = {}
        for leaf in tree.present(0, tree.levels[0]):
            page = tree.page(0, leaf)
            assert page is not None, "present() named it"
            self._pages[leaf] = bytearray(page)
            self._load(leaf, page, sequence)
        self.mapped = sum(self.live)
        if self.mapped != mapped:
            raise VolumeInconsistent("tree S", f"it counts {self.mapped} mapped blocks, the superblock {mapped}")

    def _load(self, leaf: int, page: bytes, sequence: int) -> None:
        for at, (key, live, flags, stamp) in enumerate(ENTRY.iter_unpack(page[: _LEAF * ENTRY.size])):
            if not flags and not live and not stamp and not any(key):
                continue
            segment = leaf * _LEAF + at
            if flags != IN_USE or live > self._geometry.segment_blocks or not 1 <= stamp <= sequence:
                raise VolumeInconsistent(f"the entry of segment {segment} in tree S", "its fields are out of range")
            self.live[segment], self.stamps[segment] = live, stamp
            if not live:
                self._hollow.add(segment)

    def in_use(self, segment: int) -> bool:
        """Whether S had the segment in use at the last checkpoint."""
        return self.stamps[segment] != 0

    def key(self, segment: int) -> bytes:
        """The segment's key, 32 bytes.

        Raises:
            VolumeInconsistent: it is not in use.
        """
        taken = self.taken.get(segment)
        if taken is not None:
            return taken.key
        if not self.stamps[segment]:
            raise VolumeInconsistent(f"segment {segment}", "a block is mapped into it, but it is not in use")
        at = segment % _LEAF * ENTRY.size
        return bytes(self._pages[segment // _LEAF][at : at + 32])

    def opening_key(self, segment: int) -> OpeningKey:
        """The key that opens the segment's blocks; recently used ones are held ready."""
        material = self.key(segment)
        held = self._opening.get(segment)
        if held is None or held[0] != material:
            if len(self._opening) >= _KEYS_HELD:
                self._opening.clear()
            held = self._opening[segment] = (material, OpeningKey(material))
        return held[1]

    def free_segments(self, named: Iterable[int]) -> list[int]:
        """Segments that a new process may take: not in use or without a live block, and not `named` by the journal."""
        held = set(named)
        return [s for s in range(self._geometry.segments) if not self.live[s] and s not in held]

    def checkpoint(self, update: TreeUpdate, delta: dict[int, int], filling: set[int], sequence: int) -> list[int]:
        """Bring S up to date and hand its changed pages to `update`.

        Args:
            update: of tree S.
            delta: change of the live count by segment.
            filling: segments that this process goes on filling; they stay in use even without a live block.
            sequence: of this checkpoint.

        Returns:
            The segments freed; they may be taken when the checkpoint is durable.

        Raises:
            VolumeInconsistent: the live counts were wrong.
        """
        for segment, change in delta.items():
            live = self.live[segment] + change
            if not 0 <= live <= self._geometry.segment_blocks:
                what = f"the entry of segment {segment} in tree S"
                raise VolumeInconsistent(what, "its live count does not agree with tree F")
            self.live[segment] = live
            self.mapped += change
        changed = set(delta) | set(self.taken) | self._hollow
        self._hollow = set()
        dirty: set[int] = set()
        freed = []
        for segment in changed:
            taken = self.taken.get(segment)
            if not self.live[segment] and segment not in filling:
                if taken is not None or self.stamps[segment]:
                    freed.append(segment)
                entry, stamp = _FREE, 0
            else:
                stamp = (taken.stamp or sequence) if taken else self.stamps[segment]
                entry = ENTRY.pack(self.key(segment), self.live[segment], IN_USE, stamp)
                if not self.live[segment]:
                    self._hollow.add(segment)
            at, leaf = segment % _LEAF * ENTRY.size, segment // _LEAF
            page = self._pages.setdefault(leaf, bytearray(BLOCK))
            if page[at : at + ENTRY.size] != entry:
                page[at : at + ENTRY.size] = entry
                dirty.add(leaf)
            self.stamps[segment] = stamp
        self.taken = {}
        for leaf in sorted(dirty):
            update.replace(leaf, bytes(self._pages[leaf]))
        return freed

    def oldest_stamp(self) -> int:
        """The least stamp of a segment in use; 0 if there is none."""
        return min((stamp for stamp in self.stamps if stamp), default=0)


class Stream:
    """A segment being filled, front to back, by this process alone."""

    __slots__ = ("_key", "end", "next", "segment")

    def __init__(self) -> None:
        """No segment yet."""
        self.segment = -1
        self.next = self.end = 0
        self._key: SealingKey | None = None

    @property
    def room(self) -> int:
        """Blocks left in the segment."""
        return self.end - self.next

    def begin(self, segment: int, start: int, blocks: int, key: SealingKey) -> None:
        """Go on in another segment, from its first block, under a key drawn for it."""
        self.segment, self.next, self.end, self._key = segment, start, start + blocks, key

    def seal(self, items: Sequence[tuple[int, bytes]], room: SealingRun) -> int:
        """Seal blocks (LBA and plaintext) for the next raw blocks, the first of which is returned.

        The pointer advances before anything can fail, so a nonce cannot come twice.
        """
        raw = self.next
        assert self._key is not None, "begun"
        assert raw + len(items) <= self.end, "the caller looked at the room"
        self.next = raw + len(items)
        self._key.seal_run(raw, [lba for lba, _ in items], [plain for _, plain in items], room)
        return raw


class FreeList:
    """The free segments, handed out at random or in order."""

    __slots__ = ("_choose", "_list", "_members")

    def __init__(self, segments: Iterable[int], choose: Callable[[int], int] | None) -> None:
        """`choose` gives a number below its argument; without it the least segment is taken first."""
        self._list = sorted(segments, reverse=True)
        self._members = set(self._list)
        self._choose = choose

    def __len__(self) -> int:
        return len(self._list)

    def take(self) -> int:
        """Take one out."""
        if self._choose is not None:
            at = self._choose(len(self._list))
            self._list[at], self._list[-1] = self._list[-1], self._list[at]
        segment = self._list.pop()
        self._members.remove(segment)
        return segment

    def add(self, segments: Collection[int]) -> None:
        """Put some back."""
        self._list += segments
        self._members |= set(segments)
        if self._choose is None:
            self._list.sort(reverse=True)

    def __contains__(self, segment: int) -> bool:
        return segment in self._members
