"""Page trees: reading them, and making their next version (format document, section 8).

A tree is a dense array in pages of 4096 bytes; a page opens only under the key and tag that its parent holds. A page is
never changed in place: `TreeUpdate` writes new versions into free slots, leaves first, and returns the new top.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator

from jindiskd.jindisk.crypto import ZERO_NONCE, Generator, OpeningKey
from jindiskd.jindisk.device import Device
from jindiskd.jindisk.errors import VolumeDeviceFailed, VolumeError, VolumeInconsistent
from jindiskd.jindisk.geometry import BLOCK, ENTRY_BYTES, FANOUT, PER_LEAF, REF_BYTES, Geometry, Kind
from jindiskd.jindisk.slots import Slots
from jindiskd.jindisk.superblock import HOLE

ZERO_PAGE = bytes(BLOCK)
RUN_PAGES = 256
_AAD = struct.Struct("<4sBBHQQ")
_RAW = struct.Struct("<Q")
_CHILDREN = struct.Struct("<" + f"Q{REF_BYTES - 8}x" * FANOUT)


def page_aad(kind: Kind, level: int, index: int, raw: int) -> bytes:
    """24 bytes of associated data of a page."""
    return _AAD.pack(b"JD2P", kind, level, 0, index, raw)


def page_name(kind: Kind, level: int, index: int, raw: int) -> str:
    """How messages name a page."""
    return f"page {index} of level {level} of tree {kind.name} (raw block {raw})"


def ref_raw(ref: bytes) -> int:
    """Raw block of a page reference; 0 for a hole."""
    return int.from_bytes(ref[:8], "little")


class PageCache:
    """Two generations of pages: a page used in the younger one survives the next turn. Cheaper than an exact order."""

    __slots__ = ("_half", "_old", "_young")

    def __init__(self, pages: int) -> None:
        """Keep about `pages` pages."""
        self._half = max(pages // 2, 8)
        self._young: dict[tuple[int, int], bytes] = {}
        self._old: dict[tuple[int, int], bytes] = {}

    def get(self, key: tuple[int, int]) -> bytes | None:
        """The page, if it is held."""
        page = self._young.get(key)
        if page is None:
            page = self._old.get(key)
            if page is not None:
                self.put(key, page)
        return page

    def put(self, key: tuple[int, int], page: bytes) -> None:
        """Hold this version of a page."""
        if len(self._young) >= self._half and key not in self._young:
            self._old, self._young = self._young, {}
        self._young[key] = page

    def drop(self, key: tuple[int, int]) -> None:
        """Forget a page."""
        self._young.pop(key, None)
        self._old.pop(key, None)


class Tree:
    """One tree in its current version. Not thread-safe."""

    def __init__(self, device: Device, geometry: Geometry, kind: Kind, top: bytes, *, cache_pages: int) -> None:
        """Read pages of `kind` under the reference `top` when they are asked for."""
        self._device, self._geometry, self.kind, self.top = device, geometry, kind, top
        self.levels = geometry.levels[kind]
        self.top_level = len(self.levels) - 1
        self._leaves, self._interior = PageCache(cache_pages), PageCache(cache_pages)
        self._used_of_page = PER_LEAF[kind] * ENTRY_BYTES[kind]
        self._total = geometry.entries(kind) * ENTRY_BYTES[kind]

    def ref(self, level: int, index: int) -> bytes:
        """The 56-byte reference of a page, from its parent."""
        if level == self.top_level:
            return self.top
        parent = self.page(level + 1, index // FANOUT)
        if parent is None:
            return HOLE
        at = index % FANOUT * REF_BYTES
        return parent[at : at + REF_BYTES]

    def page(self, level: int, index: int) -> bytes | None:
        """A page's plaintext, 4096 bytes; None if it is a hole.

        Raises:
            VolumeUnauthentic: it or a page above does not open.
            VolumeInconsistent: it or a page above violates the format document.
            VolumeDeviceFailed: it cannot be read.
        """
        cache = self._interior if level else self._leaves
        found = cache.get((level, index))
        if found is not None:
            return found
        ref = self.ref(level, index)
        if ref == HOLE:
            return None
        page = self.read(level, index, ref)
        cache.put((level, index), page)
        return page

    def read(self, level: int, index: int, ref: bytes) -> bytes:
        """Open the page that a reference names, without the cache."""
        raw = ref_raw(ref)
        name = page_name(self.kind, level, index, raw)
        if not self._geometry.meta_start <= raw < self._geometry.meta_end:
            raise VolumeInconsistent(name, "its reference points outside the page slots")
        try:
            sealed = self._device.pread(raw * BLOCK, BLOCK)
        except OSError as exc:
            raise VolumeDeviceFailed(f"reading {name}", exc) from exc
        page = OpeningKey(ref[8:40]).open(ZERO_NONCE, sealed + ref[40:], page_aad(self.kind, level, index, raw), name)
        used = self.used(level, index)
        if page[used:] != ZERO_PAGE[used:]:
            raise VolumeInconsistent(name, "reserved bytes are not zero")
        return page

    def used(self, level: int, index: int) -> int:
        """Bytes of a page that may be other than zero."""
        if level:
            return min(FANOUT, self.levels[level - 1] - index * FANOUT) * REF_BYTES
        return min(self._used_of_page, self._total - index * self._used_of_page)

    def hold(self, level: int, index: int, page: bytes | None) -> None:
        """Put the current version of a page into the cache; None for a hole."""
        cache = self._interior if level else self._leaves
        if page is None:
            cache.drop((level, index))
        else:
            cache.put((level, index), page)

    def present(self, first: int, count: int) -> Iterator[int]:
        """The leaves among `count` from `first` that are no holes, in order; skips empty subtrees at once."""
        index, end = first, first + count
        while index < end:
            level, skip = self.top_level, 0
            while level >= 0:
                if self.ref(level, index // FANOUT**level) == HOLE:
                    skip = FANOUT**level
                    break
                level -= 1
            if skip:
                index = (index // skip + 1) * skip
            else:
                yield index
                index += 1

    def leaves(self, damaged: Callable[[VolumeError], None] | None = None) -> Iterator[int]:
        """All leaves that are no holes, in order.

        A page above them that cannot be read is given to `damaged`, if there is one, and what lies below is left out.
        """
        yield from self._leaves_below(self.top_level, 0, damaged)

    def _leaves_below(self, level: int, index: int, damaged: Callable[[VolumeError], None] | None) -> Iterator[int]:
        if not level:
            if self.ref(0, index) != HOLE:
                yield index
            return
        try:
            page = self.page(level, index)
        except VolumeError as exc:
            if damaged is None:
                raise
            damaged(exc)
            return
        if page is not None:
            for at in range(self.used(level, index) // REF_BYTES):
                if page[at * REF_BYTES : (at + 1) * REF_BYTES] != HOLE:
                    yield from self._leaves_below(level - 1, index * FANOUT + at, damaged)

    def interior_refs(self) -> Iterator[tuple[int, int, bytes]]:
        """Level, index and reference of every page, the top first; reads interior pages, not leaves."""
        if self.top != HOLE:
            yield from self._below(self.top_level, 0, self.top)

    def page_raws(self) -> Iterator[tuple[int, int, tuple[int, ...]]]:
        """Where all pages lie: level and index of the first of some neighbours, and their raw blocks, 0 for a hole.

        As `interior_refs`, quicker where there are many.
        """
        if self.top != HOLE:
            yield self.top_level, 0, (ref_raw(self.top),)
            yield from self._raws_below(self.top_level, 0)

    def _raws_below(self, level: int, index: int) -> Iterator[tuple[int, int, tuple[int, ...]]]:
        page = self.page(level, index) if level else None
        if page is None:
            return
        raws = _CHILDREN.unpack_from(page)[: self.used(level, index) // REF_BYTES]
        for at, raw in enumerate(raws):
            if not raw and page[at * REF_BYTES : (at + 1) * REF_BYTES] != HOLE:
                name = page_name(self.kind, level, index, ref_raw(self.ref(level, index)))
                raise VolumeInconsistent(name, "the reference of a hole is not zero")
        yield level - 1, index * FANOUT, raws
        if level > 1:
            for at, raw in enumerate(raws):
                if raw:
                    yield from self._raws_below(level - 1, index * FANOUT + at)

    def _below(self, level: int, index: int, ref: bytes) -> Iterator[tuple[int, int, bytes]]:
        yield level, index, ref
        if not level:
            return
        page = self.page(level, index) or ZERO_PAGE
        for at in range(self.used(level, index) // REF_BYTES):
            child = page[at * REF_BYTES : (at + 1) * REF_BYTES]
            if child != HOLE:
                if not ref_raw(child):
                    name = page_name(self.kind, level, index, ref_raw(ref))
                    raise VolumeInconsistent(name, "the reference of a hole is not zero")
                yield from self._below(level - 1, index * FANOUT + at, child)


class PageWriter:
    """Seals pages under fresh keys into free slots; neighbouring slots are written at once."""

    def __init__(self, device: Device, slots: Slots, generator: Generator) -> None:
        """Take slots from `slots`, keys from `generator`."""
        self._device, self._slots, self._generator = device, slots, generator
        self._start, self._run = 0, bytearray()

    def write(self, kind: Kind, level: int, index: int, page: bytes) -> bytes:
        """Seal a page into a free slot; returns its reference. It is on the device after `finish`.

        Raises:
            VolumeCrowded: no slot is free (the page estimate prevents it).
            OSError: the device failed.
        """
        raw = self._slots.take()
        key = self._generator.sealing_key()
        sealed = key.seal(ZERO_NONCE, page, page_aad(kind, level, index, raw))
        if raw != self._start + len(self._run) // BLOCK or len(self._run) >= RUN_PAGES * BLOCK:
            self.finish()
            self._start = raw
        self._run += sealed[:BLOCK]
        return _RAW.pack(raw) + key.material + sealed[BLOCK:]

    def finish(self) -> None:
        """Write what is collected. Raises `OSError`."""
        if self._run:
            self._device.pwrite(self._start * BLOCK, self._run)
            self._run = bytearray()


class TreeUpdate:
    """The next version of a tree: replace leaves, then `finish`. Until then readers of the tree see the old version."""

    def __init__(self, tree: Tree, writer: PageWriter, slots: Slots) -> None:
        """Begin with the tree as it is."""
        self._tree, self._writer, self._slots = tree, writer, slots
        self._dirty: dict[tuple[int, int], bytearray] = {}
        self._top = tree.top

    def replace(self, index: int, page: bytes) -> None:
        """Give leaf `index` a new version; an all-zero page becomes a hole."""
        self._replace(0, index, page)

    def _replace(self, level: int, index: int, page: bytes) -> None:
        tree = self._tree
        old = tree.ref(level, index)
        if old != HOLE:
            self._slots.retire(ref_raw(old))
        hole = page == ZERO_PAGE
        if hole and old == HOLE:
            ref = HOLE
        else:
            ref = HOLE if hole else self._writer.write(tree.kind, level, index, page)
        if level == tree.top_level:
            self._top = ref
        else:
            parent = (level + 1, index // FANOUT)
            dirty = self._dirty.get(parent)
            if dirty is None:
                dirty = self._dirty[parent] = bytearray(tree.page(*parent) or ZERO_PAGE)
            at = index % FANOUT * REF_BYTES
            dirty[at : at + REF_BYTES] = ref
        if not level:
            tree.hold(0, index, None if hole else page)

    def finish(self) -> None:
        """Write the interior pages, then make the new version the tree's. Raises `OSError`."""
        tree, new = self._tree, []
        for level in range(1, tree.top_level + 1):
            for key in sorted(k for k in self._dirty if k[0] == level):
                page = bytes(self._dirty.pop(key))
                self._replace(*key, page)
                new.append((key, page))
        tree.top = self._top
        for key, page in new:
            tree.hold(*key, None if page == ZERO_PAGE else page)
