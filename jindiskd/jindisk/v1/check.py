"""The checker of JinDisk 1: can all be read, and can the module go on with it? Reads only.

That nothing is found does not mean that nothing was changed: the format cannot tell a forged volume from a true one.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from jindiskd.jindisk.device import Device
from jindiskd.jindisk.errors import VolumeDeviceFailed, VolumeError, VolumeMalformed
from jindiskd.jindisk.v1.catalogue import (
    Entry,
    bits_of,
    decode_entry,
    entry_name,
    next_version,
    read_entries,
    read_validity,
)
from jindiskd.jindisk.v1.index import is_mark, load_level0
from jindiskd.jindisk.v1.index_file import IndexFile
from jindiskd.jindisk.v1.layout import BLOCK, DST_ENTRY, DST_PER_BLOCK, NONE, RIT_PER_BLOCK, SEGMENT_BLOCKS, Layout
from jindiskd.jindisk.v1.nodes import Leaf
from jindiskd.jindisk.v1.tables import dst_fault, must_pad
from jindiskd.jindisk.v1.volume import Volume, block_name

MAX_FINDINGS = 1000
_WORDS = struct.Struct(f"<{RIT_PER_BLOCK}Q")


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is wrong."""

    id: str
    """`read.…`: data or index cannot be read. `module.…`: the module would lose data or crash, and the rule's name.
    `space.…`: only room is lost."""
    text: str
    """For people; names structure and raw block."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What the checker found."""

    mapped: int
    """Mapped logical blocks."""
    nodes: int
    """Leaves that opened."""
    data_blocks: int
    """Data blocks that opened; 0 in the quick check."""
    leaked_blocks: int
    """Blocks that may not be reused though nothing names them."""
    findings: tuple[Finding, ...]
    """At most 1000."""


class _Checker:
    def __init__(self, volume: Volume, progress: Callable[[int, int], None] | None) -> None:
        self.volume, self.layout, self.device = volume, volume.layout, volume.device
        self.findings: list[Finding] = []
        self.mapped = self.nodes = self.data_blocks = self.leaked = 0
        self._progress = progress or (lambda _done, _total: None)
        self._recent: dict[int, bytes] = {}
        self._words: tuple[int, tuple[int, ...]] = (-1, ())
        # A bit for each block: live, and named by any record.
        self._live = bytearray(self.layout.data_blocks // 8)
        self._named = bytearray(self.layout.data_blocks // 8)

    def find(self, name: str, text: str | VolumeError) -> None:
        """Note one, up to the limit."""
        if len(self.findings) < MAX_FINDINGS:
            self.findings.append(Finding(name, str(text)))

    def files(self) -> None:
        """What the catalogue says of the files, against the module's rules."""
        entries = self.volume.levels.entries
        level0 = self.volume.levels.level0
        level1 = [file.entry for file in self.volume.levels.level1]
        if len(level1) >= self.layout.cap:
            why = f"level 1 has {len(level1)} files; from {self.layout.cap} on the module crashes when it merges"
            self.find("module.level1_full", why)
        if entries:
            greatest, following = max(entry.version for entry in entries), next_version(entries)
            if following < greatest or (level0 is None and following <= greatest):
                why = f"the module's next version would be {following}, and {greatest} is in use: old data would return"
                self.find("module.versions", why)
        for entry in level1:
            if level0 is not None and entry.meets(level0.entry) and entry.version >= level0.entry.version:
                self.find("module.versions", f"{level0.entry.name} is not newer than {entry.name}, which it covers")

    def index(self) -> None:
        """Every leaf, and what it says against the tables."""
        levels = self.volume.levels
        if levels.level0 is not None:
            try:
                self._recent = load_level0(levels)
            except VolumeError as exc:
                self.find("read.index", exc)
        for file in (*([levels.level0] if levels.level0 else []), *levels.level1):
            pairs, before = 0, -1
            for number in range(self._leaves(file)):
                try:
                    leaf = file.leaf(number)
                except VolumeError as exc:
                    self.find("read.index", exc)
                    continue
                self.nodes += 1
                pairs += self._leaf(file, leaf, before)
                before = leaf.keys[-1]
            if pairs:
                why = f"{file.entry.name} has {pairs} deletion marks beside live records: the module reads some blocks"
                self.find("module.marks", f"{why} as nothing the first time")

    def _leaves(self, file: IndexFile) -> int:
        try:
            return file.leaf_count
        except VolumeError as exc:
            self.find("read.index", exc)
            return 0

    def _leaf(self, file: IndexFile, leaf: Leaf, before: int) -> int:
        """Check the records of a leaf; how many marks stand behind live records."""
        pairs, covers = 0, file.entry.level == 1
        for key, position in zip(leaf.keys, leaf.positions, strict=True):
            if position == NONE:
                pairs += key == before
            elif key != before:
                covered = covers and key in self._recent
                self._record(key, position, covered=covered, marked=covered and is_mark(self._recent[key]))
            before = key
        return pairs

    def _record(self, lba: int, position: int, *, covered: bool, marked: bool) -> None:
        byte, bit = position >> 3, 1 << (position & 7)
        what = block_name(lba, self.layout.data_start + position)
        self._named[byte] |= bit
        owner = self._reverse(position)
        if covered:
            if owner == lba and not marked and self._live[byte] & bit:
                self.find("module.covered", f"{what} was replaced, but its raw block is in use: it would be given back")
            return
        self.mapped += 1
        if lba * BLOCK >= self.volume.size_bytes:
            self.find("space.beyond_end", f"{what} lies beyond the end of the volume")
        if self._live[byte] & bit:
            self.find("module.shared", f"{what} is the raw block of another logical block too")
        self._live[byte] |= bit
        if owner != lba:
            self.find("module.reverse", f"{what}: RIT names {'nobody' if owner == NONE else owner} as its owner")

    def _reverse(self, position: int) -> int:
        number, at = divmod(position, RIT_PER_BLOCK)
        if number != self._words[0]:
            self._words = number, _WORDS.unpack(self._block(self.layout.rit_start + number, "RIT"))
        return self._words[1][at]

    def _block(self, raw: int, table: str) -> bytes:
        try:
            return self.device.pread(raw * BLOCK, BLOCK)
        except OSError as exc:
            raise VolumeDeviceFailed(f"reading the {table} (raw block {raw})", exc) from exc

    def segments(self) -> None:
        """SVT and DST against what is in use."""
        layout = self.layout
        svt = b"".join(self._block(layout.svt_start + n, "SVT") for n in range(layout.svt_blocks))
        allocated = set(bits_of(svt, layout.segments))
        pads = must_pad(self.volume.size_bytes // (SEGMENT_BLOCKS * BLOCK), len(allocated))
        block = b""
        for segment in range(layout.segments):
            raw, place = layout.dst_start + segment // DST_PER_BLOCK, segment % DST_PER_BLOCK
            if not place:
                block = self._block(raw, "DST")
            entry = block[place * DST_ENTRY : (place + 1) * DST_ENTRY]
            what = f"segment {segment} in the DST (raw block {raw})"
            if why := dst_fault(entry):
                self.find("module.count", f"{what}: {why}")
            self._segment(segment, entry, what, allocated=segment in allocated)
            if pads and 1 <= int.from_bytes(entry[8:], "little").bit_count() < SEGMENT_BLOCKS:
                self.find("module.partly_used", f"{what} is marked partly used: the module moves it and misreads some")

    def _segment(self, segment: int, entry: bytes, what: str, *, allocated: bool) -> None:
        start, size = segment * SEGMENT_BLOCKS // 8, SEGMENT_BLOCKS // 8
        marked = int.from_bytes(entry[8:], "little")
        named = int.from_bytes(self._named[start : start + size], "little")
        live = int.from_bytes(self._live[start : start + size], "little")
        self.leaked += (marked & ~named).bit_count()
        if live & ~marked:
            self.find("module.unmarked", f"{what}: {(live & ~marked).bit_count()} blocks in use may be reused")
        if (live or marked) and not allocated:
            self.find("module.unallocated", f"{what} has blocks, but the SVT has it free: the module cannot take it")

    def data(self) -> None:
        """Every mapped block opens."""
        total = self.volume.size_bytes
        for file in (*([self.volume.levels.level0] if self.volume.levels.level0 else []), *self.volume.levels.level1):
            for number in range(self._leaves(file)):
                try:
                    leaf = file.leaf(number)
                except VolumeError:
                    continue  # named before
                self._data_of(leaf, file.entry.level)
                self._progress(min((leaf.keys[-1] + 1) * BLOCK, total), total)
        self._progress(total, total)

    def _data_of(self, leaf: Leaf, level: int) -> None:
        for at, key in enumerate(leaf.keys):
            if leaf.positions[at] == NONE or (level and key in self._recent):
                continue
            try:
                self.volume.fetch([(key, leaf.record(at))])
                self.data_blocks += 1
            except VolumeError as exc:
                self.find("read.data", exc)


def check_volume(volume: Volume, *, data: bool = False, progress: Callable[[int, int], None] | None = None) -> Report:
    """Check a volume: whether all can be read, and whether the module can go on with it.

    Args:
        volume: open for reading with `strict=False`, and nobody writes it meanwhile. That it opened means that
            superblock and catalogue are well formed; `check_catalogue` tells of one that is not.
        data: also open every mapped data block; else the quick check.
        progress: called with bytes of the logical volume done and in all; goes twice where level 0 and level 1 meet.

    Raises:
        VolumeDeviceFailed: a table cannot be read.
    """
    checker = _Checker(volume, progress)
    checker.files()
    checker.index()
    checker.segments()
    if data:
        checker.data()
    return Report(
        mapped=checker.mapped,
        nodes=checker.nodes,
        data_blocks=checker.data_blocks,
        leaked_blocks=checker.leaked,
        findings=tuple(checker.findings),
    )


def check_catalogue(device: Device, layout: Layout) -> tuple[Finding, ...]:
    """All that keeps a volume from being opened by its catalogue, one finding an entry. Raises `VolumeDeviceFailed`."""
    findings: list[Finding] = []
    good: list[Entry] = []
    for slot, data in read_entries(device, layout, bits_of(read_validity(device, layout), layout.slots)).items():
        try:
            good.append(decode_entry(data, layout, slot))
        except VolumeMalformed as exc:
            findings.append(Finding("read.catalogue", str(exc)))
    level0 = [entry for entry in good if not entry.level]
    for entry in level0[1:]:
        what = f"{entry_name(layout, entry.slot)}: slot {level0[0].slot} has a file of level 0 too"
        findings.append(Finding("module.level0", what))
    level1 = sorted((entry for entry in good if entry.level), key=lambda e: e.first)
    for before, after in pairwise(level1):
        if before.last >= after.first:
            findings.append(Finding("module.overlap", f"{entry_name(layout, after.slot)} meets slot {before.slot}"))
    return tuple(findings)
