"""Index files of JinDisk 1: reading and writing (`docs/formats/jindisk1.md`, section 6).

A file is a tree of exactly three levels in one slot of the index region: root, second-level nodes, leaves. Reading
follows pointers only downwards, so no loop is possible, and compares every node with what its parent and the catalogue
say of it.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence

from jindiskd.jindisk.device import Device
from jindiskd.jindisk.errors import VolumeDeviceFailed, VolumeInconsistent, VolumeUnauthentic
from jindiskd.jindisk.v1.catalogue import Entry
from jindiskd.jindisk.v1.keys import KEY_BYTES, seal, unseal
from jindiskd.jindisk.v1.layout import (
    BLOCK,
    FILE_RECORDS,
    INNER_BYTES,
    INNER_CHILDREN,
    LEAF_BYTES,
    LEAF_RECORDS,
    SLOT_BYTES,
    Layout,
    ceil_div,
)
from jindiskd.jindisk.v1.nodes import (
    RECORD_BYTES,
    BadNode,
    Inner,
    Leaf,
    build_inner,
    build_leaf,
    parse_inner,
    parse_leaf,
)

CACHED_LEAVES = 2048
"""About 12 MiB."""


class LeafCache:
    """The leaves used last, of all files of a volume."""

    def __init__(self, limit: int = CACHED_LEAVES) -> None:
        """Empty."""
        self._limit = limit
        self._leaves: OrderedDict[tuple[int, int], Leaf] = OrderedDict()

    def get(self, name: tuple[int, int], read: Callable[[], Leaf]) -> Leaf:
        """The leaf of this name (slot and number), read if need be."""
        leaf = self._leaves.get(name)
        if leaf is None:
            leaf = self._leaves[name] = read()
            if len(self._leaves) > self._limit:
                self._leaves.popitem(last=False)
        else:
            self._leaves.move_to_end(name)
        return leaf

    def forget(self, slot: int) -> None:
        """A slot is written anew."""
        for name in [name for name in self._leaves if name[0] == slot]:
            del self._leaves[name]


class IndexFile:
    """An index file of the catalogue. Its inner nodes are read at first use and kept, at most 1024 leaves' places."""

    def __init__(self, device: Device, layout: Layout, entry: Entry, cache: LeafCache) -> None:
        """Nothing is read yet."""
        self._device, self._layout, self.entry, self._cache = device, layout, entry, cache
        self._start = layout.slot_start(entry.slot)
        self._keys: array[int] | None = None
        self._positions = array("Q")

    def _read(self, position: int, size: int, kind: str) -> bytes:
        what = f"{kind} at byte {position} of {self.entry.name} (raw block {position // BLOCK})"
        try:
            sealed = self._device.pread(position, size)
        except OSError as exc:
            raise VolumeDeviceFailed(f"reading {what}", exc) from exc
        plain = unseal(self.entry.key, sealed)
        if plain is None:
            raise VolumeUnauthentic(what)
        return plain

    def _fault(self, position: int, kind: str, why: str) -> VolumeInconsistent:
        return VolumeInconsistent(
            f"{kind} at byte {position} of {self.entry.name} (raw block {position // BLOCK})", why
        )

    def _inner(self, position: int, kind: str, *, leaves: bool) -> Inner:
        try:
            node = parse_inner(self._read(position, INNER_BYTES, kind), self._start, self._start + SLOT_BYTES)
        except BadNode as exc:
            raise self._fault(position, kind, str(exc)) from exc
        if node.leaves != leaves:
            raise self._fault(position, kind, "the file has not three levels")
        return node

    def _load(self) -> array[int]:
        """Greatest key and place of every leaf.

        Raises:
            VolumeError: as `leaf`, of an inner node.
        """
        if self._keys is not None:
            return self._keys
        entry = self.entry
        root = self._inner(entry.root, "the root", leaves=False)
        keys, positions = array("I"), array("Q")
        before = -1
        for greatest, position in zip(root.keys, root.positions, strict=True):
            node = self._inner(position, "an inner node", leaves=True)
            if node.keys[-1] != greatest or node.keys[0] < before:
                raise self._fault(position, "an inner node", "its keys are not those its parent names")
            before = greatest
            keys.extend(node.keys)
            positions.extend(node.positions)
        if keys[-1] != entry.last:
            why = f"its greatest key is {keys[-1]}, the catalogue has {entry.last}"
            raise self._fault(entry.root, "the root", why)
        # Every leaf but the last is full, so the count of leaves follows from that of records.
        if len(keys) != ceil_div(entry.records, LEAF_RECORDS):
            why = f"it has {len(keys)} leaves for {entry.records} records"
            raise self._fault(entry.root, "the root", why)
        self._keys, self._positions = keys, positions
        return keys

    def verify(self) -> None:
        """Compare the catalogue's range with the tree's: what lies outside the range is never looked up.

        Raises as `leaf`.
        """
        self._load()
        self.leaf(0)

    @property
    def leaf_count(self) -> int:
        """Leaves. Raises as `leaf`."""
        return len(self._load())

    def leaf(self, number: int) -> Leaf:
        """A leaf, from the cache or the disk.

        Raises:
            VolumeUnauthentic: a node does not open.
            VolumeInconsistent: a node opens but breaks a rule of the format, or differs from what its parent says.
            VolumeDeviceFailed: reading failed.
        """
        self._load()
        return self._cache.get((self.entry.slot, number), lambda: self._read_leaf(number))

    def _read_leaf(self, number: int) -> Leaf:
        keys, entry = self._load(), self.entry
        position = self._positions[number]
        plain = self._read(position, LEAF_BYTES, "a leaf")
        try:
            leaf = parse_leaf(plain, self._layout.data_blocks)
        except BadNode as exc:
            raise self._fault(position, "a leaf", str(exc)) from exc
        least = keys[number - 1] if number else entry.first
        final = number == len(keys) - 1
        count = entry.records - LEAF_RECORDS * number if final else LEAF_RECORDS
        if len(leaf.keys) != count:
            raise self._fault(position, "a leaf", f"it has {len(leaf.keys)} records, its place in the file {count}")
        if leaf.keys[-1] != keys[number] or leaf.keys[0] < least or (not number and leaf.keys[0] != entry.first):
            raise self._fault(position, "a leaf", "its keys are not those its parent names")
        if number and leaf.keys[0] == least and leaf.positions[0] >= self._layout.data_blocks:
            return leaf  # the mark of a pair whose record ends the leaf before
        if number and leaf.keys[0] == least:
            raise self._fault(position, "a leaf", f"key {least} follows itself")
        return leaf

    def leaves(self) -> Iterator[Leaf]:
        """All leaves in order, not kept in the cache. Raises as `leaf`."""
        for number in range(len(self._load())):
            yield self._read_leaf(number)

    def lookup(self, key: int) -> bytes | None:
        """The first record of a key, 40 bytes, which can be a mark; None if there is none. Raises as `leaf`."""
        entry = self.entry
        if not entry.first <= key <= entry.last:
            return None
        leaf = self.leaf(bisect_left(self._load(), key))
        at = bisect_left(leaf.keys, key)
        return leaf.record(at) if leaf.keys[at] == key else None


class IndexWriter:
    """Writes one index file into a free slot, in the module's own arrangement, in one piece at the end."""

    def __init__(self, layout: Layout, slot: int, key: bytes) -> None:
        """Args: the slot, free; and 16 random bytes, drawn for this file alone."""
        assert len(key) == KEY_BYTES, "a file key"
        self._layout, self._slot, self._key = layout, slot, key
        self._keys: list[int] = []
        self._records = bytearray()
        self.records = 0
        self._first = self._last = 0
        self._start = layout.slot_start(slot)
        self._out: list[bytes] = []
        self._at = self._start
        self._children: list[tuple[int, int]] = []
        self._inners: list[tuple[int, int]] = []

    @property
    def room(self) -> int:
        """How many records it still takes."""
        return FILE_RECORDS - self.records

    def add(self, keys: Sequence[int], records: bytes | bytearray | memoryview) -> None:
        """Append records, at most `room`, with keys ascending and greater than all before."""
        if not self.records:
            self._first = keys[0]
        self.records += len(keys)
        assert self.records <= FILE_RECORDS, "the caller asked for the room"
        self._last = keys[-1]
        self._keys += keys
        self._records += records
        # A full leaf waits until it is known whether another follows.
        while len(self._keys) > LEAF_RECORDS:
            self._leaf(LEAF_RECORDS, last=False)

    def _leaf(self, count: int, *, last: bool) -> None:
        keys, records = self._keys[:count], bytes(self._records[: count * RECORD_BYTES])
        del self._keys[:count]
        del self._records[: count * RECORD_BYTES]
        behind = self._at + LEAF_BYTES
        if len(self._children) == INNER_CHILDREN - 1 or last:
            behind += INNER_BYTES
        following = 0 if last and count < LEAF_RECORDS else behind
        self._children.append((keys[-1], self._at))
        self._put(build_leaf(keys, records, following), LEAF_BYTES)
        if len(self._children) == INNER_CHILDREN or last:
            self._inners.append((keys[-1], self._at))
            self._put(build_inner(self._children, leaves=True), INNER_BYTES)
            self._children = []

    def _put(self, plain: bytes, size: int) -> None:
        self._out.append(seal(self._key, plain))
        self._at += size

    def finish(self, device: Device, *, level: int, version: int) -> Entry:
        """Write the file, which has at least one record; the catalogue entry for it.

        Raises:
            OSError: writing failed.
        """
        assert self.records, "a file has records"
        while self._keys:
            count = min(LEAF_RECORDS, len(self._keys))
            self._leaf(count, last=count == len(self._keys))
        root = self._at
        self._put(build_inner(self._inners, leaves=False), INNER_BYTES)
        device.pwrite(self._start, b"".join(self._out))
        return Entry(
            root=root,
            key=self._key,
            slot=self._slot,
            level=level,
            version=version,
            first=self._first,
            last=self._last,
            records=self.records,
        )
