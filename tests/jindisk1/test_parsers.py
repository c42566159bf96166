"""Parsers of what the disk holds: any bytes give a value within bounds or the documented error."""

import contextlib
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jd1 import SparseDevice, key

from jindiskd.jindisk.errors import VolumeError, VolumeMalformed
from jindiskd.jindisk.v1 import superblock
from jindiskd.jindisk.v1.catalogue import Entry, bits_of, decode_entry, next_version
from jindiskd.jindisk.v1.identification import Certainty, identify
from jindiskd.jindisk.v1.index_file import IndexWriter
from jindiskd.jindisk.v1.keys import seal
from jindiskd.jindisk.v1.layout import (
    BITC_ENTRY,
    BLOCK,
    INNER_BYTES,
    LEAF_BYTES,
    NONE,
    SLOT_BYTES,
    Layout,
    available_sectors,
    layout_for,
)
from jindiskd.jindisk.v1.nodes import (
    INNER_PLAIN,
    LEAF_PLAIN,
    RECORD,
    BadNode,
    build_inner,
    build_leaf,
    parse_inner,
    parse_leaf,
)
from jindiskd.jindisk.v1.volume import open_volume

LAYOUT = Layout(321)
U64, U32 = st.integers(0, (1 << 64) - 1), st.integers(0, (1 << 32) - 1)


@st.composite
def leaves(draw: st.DrawFn) -> bytes:
    """Bytes that look like a leaf to some degree."""
    count = draw(st.one_of(st.integers(0, 200), U64))
    keys = draw(st.lists(U32, min_size=128, max_size=128))
    if draw(st.booleans()):
        keys.sort()
    positions = draw(st.lists(st.one_of(st.integers(0, 400_000), st.just(NONE), U64), min_size=128, max_size=128))
    head = struct.pack("<BQ128I", draw(st.integers(0, 255)), count, *keys)
    return (head + b"".join(RECORD.pack(position, b"", b"") for position in positions)).ljust(LEAF_PLAIN, b"\1")


@settings(deadline=None)
@given(st.one_of(leaves(), st.binary(min_size=LEAF_PLAIN, max_size=LEAF_PLAIN)))
def test_leaves(plain: bytes) -> None:
    try:
        leaf = parse_leaf(plain, LAYOUT.data_blocks)
    except BadNode:
        return
    assert 1 <= len(leaf.keys) == len(leaf.positions) == len(leaf.records) // 40 <= 128
    assert sorted(leaf.keys) == list(leaf.keys)
    assert all(position < LAYOUT.data_blocks or position == NONE for position in leaf.positions)
    assert leaf.marks == (NONE in leaf.positions)


@settings(deadline=None)
@given(st.sets(U32, min_size=1, max_size=128), st.data())
def test_a_leaf_comes_back(keys: set[int], data: st.DataObject) -> None:
    order = sorted(keys)
    positions = data.draw(st.lists(st.integers(0, 100), min_size=len(order), max_size=len(order)))
    records = b"".join(RECORD.pack(position, b"t" * 16, b"k" * 16) for position in positions)
    leaf = parse_leaf(build_leaf(order, records, 77), 101)
    assert (tuple(order), tuple(positions), records, 77) == (leaf.keys, leaf.positions, leaf.records, leaf.next)


@st.composite
def inners(draw: st.DrawFn) -> bytes:
    count = draw(st.one_of(st.integers(0, 40), U64))
    children = [(draw(st.integers(0, 3)), draw(U32), draw(st.integers(0, 3000))) for _ in range(4)]
    body = b"".join(struct.pack("<BIQ", *child) for child in children)
    return (struct.pack("<BQ", draw(st.integers(0, 3)), count) + body * 8).ljust(INNER_PLAIN, b"\0")


@settings(deadline=None)
@given(st.one_of(inners(), st.binary(min_size=INNER_PLAIN, max_size=INNER_PLAIN)))
def test_inner_nodes(plain: bytes) -> None:
    try:
        node = parse_inner(plain, 100, 10_000)
    except BadNode:
        return
    size = LEAF_BYTES if node.leaves else INNER_BYTES
    assert 1 <= len(node.keys) == len(node.positions) <= 32
    assert all(100 <= position <= 10_000 - size for position in node.positions)
    assert sorted(node.keys) == list(node.keys)


@settings(deadline=None)
@given(st.lists(U32, min_size=1, max_size=32), st.booleans())
def test_an_inner_node_comes_back(keys: list[int], leaves: bool) -> None:
    children = [(child, 200 + number) for number, child in enumerate(sorted(keys))]
    node = parse_inner(build_inner(children, leaves=leaves), 200, 200 + LEAF_BYTES + 32)
    assert children == list(zip(node.keys, node.positions, strict=True))
    assert leaves == node.leaves


@settings(deadline=None)
@given(st.binary(min_size=BITC_ENTRY, max_size=BITC_ENTRY), st.integers(0, LAYOUT.slots - 1), st.data())
def test_catalogue_entries(raw: bytes, slot: int, data: st.DataObject) -> None:
    if data.draw(st.booleans()):  # nearer to a good one
        start = LAYOUT.slot_start(slot)
        root = data.draw(st.integers(start - 1, start + SLOT_BYTES))
        small = st.integers(0, 3)
        raw = struct.pack("<Q28xQQ", root, slot, data.draw(small)) + raw[52:60]
        raw += struct.pack("<III16x", data.draw(small), data.draw(small), data.draw(small))
    try:
        entry = decode_entry(raw, LAYOUT, slot)
    except VolumeMalformed:
        return
    start = LAYOUT.slot_start(slot)
    assert start <= entry.root <= start + SLOT_BYTES - INNER_BYTES
    assert entry.first <= entry.last
    assert entry.level in (0, 1)
    assert entry == decode_entry(entry.encode(), LAYOUT, slot)


@settings(deadline=None)
@given(st.one_of(st.binary(min_size=132, max_size=132), st.lists(U32, min_size=33, max_size=33)))
def test_superblocks(found: bytes | list[int]) -> None:
    """Anything but what the module writes is refused, with a right checksum too."""
    plain = found if isinstance(found, bytes) else superblock.encode(LAYOUT)[:4] + struct.pack("<33I", *found)[4:]
    for candidate in (plain, superblock.checksum(plain).to_bytes(4, "little") + plain[4:]):
        with pytest.raises(VolumeMalformed, match="superblock"):
            superblock.decode(candidate)


@settings(deadline=None)
@given(st.integers(321, 524_288))
def test_layouts(segments: int) -> None:
    """Regions follow each other, and sizes and layouts fit both ways."""
    layout = Layout(segments)
    starts = [layout.journal_start, *(start for _, start, _ in layout.tables), layout.data_start]
    assert sorted(starts) == starts
    assert layout == superblock.decode(superblock.encode(layout))
    assert layout == layout_for(layout.size_bytes)
    assert available_sectors(layout.end * 8) == layout.logical_segments * 8192
    assert layout.slot_start(layout.slots) <= layout.journal_start * BLOCK


@settings(deadline=None)
@given(st.lists(st.integers(0, (1 << 62) - 1), max_size=6))
def test_versions_two_above_all_satisfy_the_module(versions: list[int]) -> None:
    """Whatever versions are there, and whichever slot the new file takes."""

    def files(order: list[int]) -> list[Entry]:
        return [
            Entry(root=0, key=b"", slot=slot, level=1, version=version, first=0, last=0, records=1)
            for slot, version in enumerate(order)
        ]

    new = max(versions, default=-1) + 2
    for place in range(len(versions) + 1):
        assert next_version(files([*versions[:place], new, *versions[place:]])) > new


@settings(deadline=None)
@given(st.binary(max_size=64), st.integers(0, 600))
def test_bitmaps(table: bytes, count: int) -> None:
    expected = [n for n in range(min(count, 8 * len(table))) if table[n // 8] >> n % 8 & 1]
    assert expected == bits_of(table, count)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_volume_with_a_random_node(data: st.DataObject) -> None:
    """A node of any bytes, sealed with the right key: reading gives an error of ours or an answer, and ends."""
    device = SparseDevice(LAYOUT.total_bytes)
    device.apply(0, superblock.seal(LAYOUT, key()))
    writer = IndexWriter(LAYOUT, 0, bytes(16))
    writer.add(range(300), RECORD.pack(3, b"", b"") * 300)
    entry = writer.finish(device, level=1, version=1)
    device.apply(LAYOUT.bitc_start * BLOCK, entry.encode())
    device.apply(LAYOUT.bvt_start * BLOCK, b"\1")
    start = LAYOUT.slot_start(0)
    places = {
        "leaf": (start + LEAF_BYTES, leaves()),
        "inner": (entry.root - INNER_BYTES, inners()),
        "root": (entry.root, inners()),
    }
    position, kind = places[data.draw(st.sampled_from(sorted(places)))]
    device.apply(position, seal(bytes(16), data.draw(kind)))
    for lba in (0, 127, 128, 255, 256, 299, 300):
        with contextlib.suppress(VolumeError):
            open_volume(device, key=key(), strict=data.draw(st.booleans())).read(lba * BLOCK, BLOCK)
    assert identify(device).certainty in set(Certainty)


@settings(max_examples=50, deadline=None)
@given(st.binary(min_size=148, max_size=148), st.integers(0, 1 << 22))
def test_identifying_anything(head: bytes, blocks: int) -> None:
    """Devices of any size with anything at their start are looked at without harm."""
    device = SparseDevice(blocks * BLOCK)
    if blocks:
        device.apply(0, head)
    assert identify(device).certainty in (Certainty.NO, Certainty.POSSIBLE)
