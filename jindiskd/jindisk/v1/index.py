"""The index of JinDisk 1: all its files together (`docs/formats/jindisk1.md`, section 7).

Level 0 has at most one file, and is newer than level 1, whose files have disjoint ranges. A deletion mark means that a
key is not mapped. Tables and catalogue carry no authentication: what is checked here is consistency.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from jindiskd.jindisk.device import Device
from jindiskd.jindisk.errors import VolumeMalformed
from jindiskd.jindisk.v1.catalogue import Entry, entry_name
from jindiskd.jindisk.v1.index_file import IndexFile, LeafCache
from jindiskd.jindisk.v1.layout import NONE, Layout
from jindiskd.jindisk.v1.nodes import RECORD_BYTES, Leaf

_NO_POSITION = NONE.to_bytes(8, "little")

Chunk = tuple[Sequence[int], bytes]
"""Keys, ascending, and their records of 40 bytes each; live ones only, each key once."""


def is_mark(record: bytes) -> bool:
    """Whether a record says that the key is not mapped."""
    return record[:8] == _NO_POSITION


@dataclass(frozen=True, slots=True)
class Levels:
    """The index files of a volume."""

    level0: IndexFile | None
    level1: tuple[IndexFile, ...]
    """In order of keys."""

    @property
    def entries(self) -> list[Entry]:
        """Of all files."""
        return [file.entry for file in (*self.level1, *([self.level0] if self.level0 else []))]


def arrange(device: Device, layout: Layout, entries: Iterable[Entry], cache: LeafCache) -> Levels:
    """Sort the files of a catalogue into levels; nothing is read.

    Raises:
        VolumeMalformed: two files of level 0, or ranges of level 1 that meet.
    """
    level0: Entry | None = None
    level1: list[Entry] = []
    for entry in entries:
        if entry.level:
            level1.append(entry)
        elif level0 is None:
            level0 = entry
        else:
            raise VolumeMalformed(entry_name(layout, entry.slot), f"slot {level0.slot} has a file of level 0 too")
    level1.sort(key=lambda e: e.first)
    for before, after in pairwise(level1):
        if before.last >= after.first:
            why = f"its keys from {after.first} meet those of slot {before.slot} up to {before.last}"
            raise VolumeMalformed(entry_name(layout, after.slot), why)
    files = tuple(IndexFile(device, layout, entry, cache) for entry in level1)
    return Levels(IndexFile(device, layout, level0, cache) if level0 else None, files)


def file_of(files: Sequence[IndexFile], key: int) -> IndexFile | None:
    """The file of level 1 whose range has a key."""
    at = bisect_left(files, key, key=lambda file: file.entry.last)
    return files[at] if at < len(files) and files[at].entry.first <= key else None


def lookup(levels: Levels, key: int) -> bytes | None:
    """The record of a mapped key, 40 bytes; None if it is not mapped. Raises as `IndexFile.leaf`."""
    record = levels.level0.lookup(key) if levels.level0 else None
    if record is None:
        file = file_of(levels.level1, key)
        record = file.lookup(key) if file else None
    return None if record is None or is_mark(record) else record


def first_records(leaf: Leaf, before: int) -> tuple[Sequence[int], bytes]:
    """Keys and records of a leaf, each key once, marks included; `before` is the key that was last, or -1.

    Marks that stand behind a live record of the same key are left out.
    """
    if not leaf.marks:
        return leaf.keys, leaf.records
    keys: list[int] = []
    records = bytearray()
    for at, key in enumerate(leaf.keys):
        if key != before:
            keys.append(key)
            records += leaf.record(at)
        before = key
    return keys, bytes(records)


def load_level0(levels: Levels) -> dict[int, bytes]:
    """All first records of level 0, marks included; at most 131072. Raises as `IndexFile.leaf`."""
    found: dict[int, bytes] = {}
    if levels.level0 is not None:
        for leaf in levels.level0.leaves():
            for at, key in enumerate(leaf.keys):
                found.setdefault(key, leaf.record(at))
    return found


def _leaf_chunks(files: Iterable[IndexFile]) -> Iterator[tuple[Sequence[int], bytes, bool]]:
    for file in files:
        before = -1
        for leaf in file.leaves():
            keys, records = first_records(leaf, before)
            before = leaf.keys[-1]
            if keys:
                yield keys, records, leaf.marks


def _live(keys: Sequence[int], records: bytes) -> Iterator[Chunk]:
    """Without marks."""
    good = [at for at in range(len(keys)) if records[at * RECORD_BYTES : at * RECORD_BYTES + 8] != _NO_POSITION]
    if len(good) == len(keys):
        yield keys, records
    elif good:
        kept = b"".join(records[at * RECORD_BYTES : (at + 1) * RECORD_BYTES] for at in good)
        yield [keys[at] for at in good], kept


Lost = Callable[[int, bytes, bytes], None]
"""Told of a record of level 1 that was covered: key, the record, and the record or mark that covers it."""


def merge(
    files: Iterable[IndexFile], overlay: Mapping[int, bytes], over_keys: Sequence[int], lost: Lost | None = None
) -> Iterator[Chunk]:
    """What is mapped by files of level 1 and newer records above them, in order of keys.

    Args:
        files: with disjoint ranges, ascending.
        overlay: the newer records by key; marks unmap.
        over_keys: keys of `overlay`, sorted, that are to appear.
        lost: as `Lost`.

    Raises:
        VolumeError: as `IndexFile.leaf`.
    """
    at = 0
    for keys, records, marks in _leaf_chunks(files):
        low = bisect_left(over_keys, keys[0], at)
        if low > at:
            part = over_keys[at:low]
            yield from _live(part, b"".join(overlay[key] for key in part))
        high = bisect_right(over_keys, keys[-1], low)
        if high == low:
            if marks:
                yield from _live(keys, records)
            else:
                yield keys, records
        else:
            both = dict(
                zip(keys, (records[n : n + RECORD_BYTES] for n in range(0, len(records), RECORD_BYTES)), strict=True)
            )
            for key in over_keys[low:high]:
                if lost is not None and key in both and not is_mark(both[key]):
                    lost(key, both[key], overlay[key])
                both[key] = overlay[key]
            order = sorted(both)
            yield from _live(order, b"".join(both[key] for key in order))
        at = high
    if at < len(over_keys):
        for start in range(at, len(over_keys), 1024):
            part = over_keys[start : start + 1024]
            yield from _live(part, b"".join(overlay[key] for key in part))
