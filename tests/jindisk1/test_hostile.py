"""A hostile disk: an error or the right data, where the format can tell; and plainly what it cannot.

Someone who holds the disk holds all keys of a JinDisk 1 volume (its catalogue is in clear). So the last tests of this
module show forgeries that are accepted: no reader of this format can do better.
"""

import random
import struct
from collections.abc import Callable

import pytest
from jd1 import BLOCK, SparseDevice, key, pattern

from jindiskd.jindisk.errors import VolumeError, VolumeInconsistent, VolumeMalformed, VolumeUnauthentic
from jindiskd.jindisk.v1 import session
from jindiskd.jindisk.v1.catalogue import Entry
from jindiskd.jindisk.v1.index_file import IndexWriter
from jindiskd.jindisk.v1.keys import data_aad, seal, unseal
from jindiskd.jindisk.v1.layout import BITC_ENTRY, INNER_BYTES, LEAF_BYTES, Layout
from jindiskd.jindisk.v1.load import create_empty
from jindiskd.jindisk.v1.nodes import MARK, RECORD, RECORD_BYTES, build_inner, build_leaf, parse_inner, parse_leaf
from jindiskd.jindisk.v1.session import open_session
from jindiskd.jindisk.v1.volume import Volume, open_volume

LAYOUT = Layout(321)
BLOCKS = 1024


@pytest.fixture(scope="module")
def written() -> tuple[SparseDevice, dict[int, bytes]]:
    """A volume with a file of level 1 of three leaves and more, one of level 0 that covers a part, and its content."""
    device = SparseDevice(LAYOUT.total_bytes)
    create_empty(device, layout=LAYOUT, key=key(), blank=True)
    content = {}
    limit = session.FOLD_AT
    try:
        session.FOLD_AT = 300
        writer = open_session(device, key=key())
        for lba in range(100, 500):
            content[lba] = pattern(lba, 1)
            writer.write(lba * BLOCK, content[lba])
        writer.flush()
        for lba in range(90, 130):
            content[lba] = pattern(lba, 2)
            writer.write(lba * BLOCK, content[lba])
        writer.flush()  # left like this: closing would merge
    finally:
        session.FOLD_AT = limit
    volume = open_volume(device, key=key())
    assert volume.levels.level0 is not None
    assert [file.entry.records for file in volume.levels.level1] == [400]
    return device, content


def verdict(device: SparseDevice, content: dict[int, bytes]) -> str:
    """`error`, `right` or `wrong`, by reading every block; an error in one block does not excuse a wrong other one."""
    try:
        volume = open_volume(device, key=key())
    except VolumeError:
        return "error"
    found = "right"
    for lba in range(BLOCKS):
        try:
            if volume.read(lba * BLOCK, BLOCK) != content.get(lba, bytes(BLOCK)):
                return "wrong"
        except VolumeError:
            found = "error"
    return found


def flipped(device: SparseDevice, at: int, bit: int = 1) -> SparseDevice:
    other = device.copy()
    other.apply(at, bytes([other.pread(at, 1)[0] ^ bit]))
    return other


def entries_of(device: SparseDevice) -> list[Entry]:
    return open_volume(device, key=key()).levels.entries


def test_every_byte_of_the_superblock(written: tuple[SparseDevice, dict[int, bytes]]) -> None:
    device, _ = written
    for at in range(148):
        with pytest.raises(VolumeUnauthentic, match=r"superblock \(raw block 0\)"):
            open_volume(flipped(device, at, 1 << at % 8), key=key())


@pytest.mark.parametrize("level", [0, 1])
def test_every_byte_of_a_catalogue_entry(level: int, written: tuple[SparseDevice, dict[int, bytes]]) -> None:
    """Positions, keys, ranges and counts are held against the tree. Versions and padding are nobody's business here."""
    device, content = written
    slot = next(entry.slot for entry in entries_of(device) if entry.level == level)
    start = LAYOUT.bitc_start * BLOCK + slot * BITC_ENTRY
    for at in range(BITC_ENTRY):
        for bit in (1, 0x80):
            ignored = 24 <= at < 36 or 52 <= at < 60 or at >= 72
            found = verdict(flipped(device, start + at, bit), content)
            assert found == ("right" if ignored else "error"), f"byte {at}"


@pytest.mark.parametrize("level", [0, 1])
def test_every_node_of_the_index(level: int, written: tuple[SparseDevice, dict[int, bytes]]) -> None:
    """Bytes of every node, tags included: never wrong data."""
    device, content = written
    entry = next(entry for entry in entries_of(device) if entry.level == level)
    start, size = LAYOUT.slot_start(entry.slot), entry.root + INNER_BYTES - LAYOUT.slot_start(entry.slot)
    rng = random.Random(level)
    places = {0, LEAF_BYTES - 1, size - 1, size - INNER_BYTES, size - 2 * INNER_BYTES}
    for at in sorted(places | {rng.randrange(size) for _ in range(60)}):
        assert verdict(flipped(device, start + at, 1 << rng.randrange(8)), content) == "error", f"byte {at}"


def test_data_that_were_changed_moved_or_set_back(written: tuple[SparseDevice, dict[int, bytes]]) -> None:
    """Each in its place, or an error that names logical and raw block; other blocks are not concerned."""
    device, content = written
    volume = open_volume(device, key=key())
    position = RECORD.unpack(volume.record(200) or b"")[0]
    raw = LAYOUT.data_start + position
    for at in (0, 1, 2048, 4095):
        damaged = open_volume(flipped(device, raw * BLOCK + at), key=key())
        with pytest.raises(VolumeUnauthentic, match=rf"logical block 200 \(raw block {raw}\)"):
            damaged.read(200 * BLOCK, 1)
        assert content[201] == damaged.read(201 * BLOCK, BLOCK)
    swapped = device.copy()
    swapped.apply(raw * BLOCK, device.pread((raw + 1) * BLOCK, BLOCK) + device.pread(raw * BLOCK, BLOCK))
    assert verdict(swapped, content) == "error"
    newer = device.copy()
    writer = open_session(newer, key=key())
    for lba in range(90, 130):
        writer.write(lba * BLOCK, pattern(lba, 3))
    writer.close()
    newer.blocks.update({n: block for n, block in device.blocks.items() if n >= LAYOUT.data_start})
    assert verdict(newer, content | {lba: pattern(lba, 3) for lba in range(90, 130)}) in ("error", "right")


def test_tables_that_a_reader_does_not_need(written: tuple[SparseDevice, dict[int, bytes]]) -> None:
    """SVT, DST, RIT, second copies and the journal region: the right data; and a session puts the first three right."""
    device, content = written
    junk = random.Random(1).randbytes(BLOCK)
    places = [LAYOUT.svt_start, LAYOUT.dst_start, LAYOUT.rit_start, LAYOUT.journal_start]
    places += [start + blocks for _, start, blocks in LAYOUT.tables]
    for raw in places:
        other = device.copy()
        other.apply(raw * BLOCK, junk)
        assert verdict(other, content) == "right"
        writer = open_session(other, key=key())
        writer.write(300 * BLOCK, pattern(300, 9))
        writer.close()
        assert verdict(other, content | {300: pattern(300, 9)}) == "right"


def test_validity_bits(written: tuple[SparseDevice, dict[int, bytes]]) -> None:
    """A bit of an empty slot is an error. A cleared bit is data gone, or old data back, and nothing tells."""
    device, content = written
    used = {entry.slot: entry for entry in entries_of(device)}
    for slot in range(LAYOUT.slots):
        other = flipped(device, LAYOUT.bvt_start * BLOCK + slot // 8, 1 << slot % 8)
        assert verdict(other, content) == ("wrong" if slot in used else "error")
    beyond = flipped(device, LAYOUT.bvt_start * BLOCK + 100)
    assert verdict(beyond, content) == "right"


def test_devices_cut_short(written: tuple[SparseDevice, dict[int, bytes]]) -> None:
    device, _ = written
    for size in (0, 100, BLOCK, LAYOUT.total_bytes - 1):
        cut = SparseDevice(size)
        cut.blocks = device.blocks
        with pytest.raises(VolumeMalformed, match="device"):
            open_volume(cut, key=key())


# What is sealed with the right keys, as whoever holds the disk can, but against the format.


def node(device: SparseDevice, entry: Entry, position: int, size: int) -> bytes:
    plain = unseal(entry.key, device.pread(position, size))
    assert plain is not None
    return plain


def resealed(device: SparseDevice, entry: Entry, position: int, plain: bytes) -> SparseDevice:
    other = device.copy()
    other.apply(position, seal(entry.key, plain))
    return other


Change = Callable[[bytearray], None]


def put(form: str, at: int, *values: object) -> Change:
    return lambda plain: struct.pack_into("<" + form, plain, at, *values)


LEAF_FAULTS: dict[str, Change] = {
    "an inner node": put("B", 0, 0),
    "no records": put("Q", 1, 0),
    "too many records": put("Q", 1, 129),
    "a huge count": put("Q", 1, 1 << 63),
    "one record fewer": put("Q", 1, 127),
    "keys that fall": put("I", 9 + 4 * 5, 0),
    "a key twice": put("II", 9 + 4 * 5, 107, 107),
    "a greater first key": put("I", 9, 101),
    "a smaller first key": put("I", 9, 99),
    "a greater last key": put("I", 9 + 4 * 127, 4_000_000_000),
    "a position behind the data": put("Q", 521, LAYOUT.data_blocks),
    "a huge position": put("Q", 521, (1 << 64) - 2),
    "a mark with no record before it": put("IIQ", 9 + 4 * 5, 105, 105, 0),
}
INNER_FAULTS: dict[str, Change] = {
    "a leaf": put("B", 0, 1),
    "no children": put("Q", 1, 0),
    "too many children": put("Q", 1, 33),
    "a huge count": put("Q", 1, 1 << 63),
    "one child fewer": put("Q", 1, 3),
    "a child outside the slot": put("Q", 9 + 5, 0),
    "a child behind the slot": put("Q", 9 + 5, LAYOUT.total_bytes),
    "a huge position": put("Q", 9 + 5, (1 << 64) - 1),
    "children of both kinds": put("B", 9, 0),
    "children that are inner nodes": lambda plain: [put("B", 9 + 13 * i, 0)(plain) for i in range(4)] and None,
    "keys that fall": put("I", 9 + 1, 4_000_000_000),
    "another last key": put("I", 9 + 13 * 3 + 1, 498),
    "another key of a leaf": put("I", 9 + 1, 226),
    "two leaves exchanged": lambda plain: put("13s13s", 9 + 13, bytes(plain[35:48]), bytes(plain[22:35]))(plain),
    "one leaf twice": lambda plain: put("8s", 9 + 13 + 5, bytes(plain[14:22]))(plain),
}


def level1(device: SparseDevice) -> Entry:
    return next(entry for entry in entries_of(device) if entry.level)


@pytest.mark.parametrize("fault", LEAF_FAULTS)
def test_leaves_against_the_format(fault: str, written: tuple[SparseDevice, dict[int, bytes]]) -> None:
    device, content = written
    entry = level1(device)
    position = LAYOUT.slot_start(entry.slot)
    plain = bytearray(node(device, entry, position, LEAF_BYTES))
    LEAF_FAULTS[fault](plain)
    other = resealed(device, entry, position, bytes(plain))
    assert verdict(other, content) == "error"
    with pytest.raises(VolumeInconsistent, match=f"a leaf at byte {position} of the index file in slot {entry.slot}"):
        open_volume(other, key=key()).read(200 * BLOCK, BLOCK)


@pytest.mark.parametrize("fault", INNER_FAULTS)
def test_inner_nodes_against_the_format(fault: str, written: tuple[SparseDevice, dict[int, bytes]]) -> None:
    device, content = written
    entry = level1(device)
    position = entry.root - INNER_BYTES
    plain = bytearray(node(device, entry, position, INNER_BYTES))
    INNER_FAULTS[fault](plain)
    other = resealed(device, entry, position, bytes(plain))
    assert verdict(other, content) == "error"
    with pytest.raises(VolumeError):
        open_session(other, key=key())


def test_loops(written: tuple[SparseDevice, dict[int, bytes]]) -> None:
    """Nodes that point to themselves or upwards: the depth is fixed, so nothing turns round."""
    device, content = written
    entry = level1(device)
    inner = entry.root - INNER_BYTES
    to_itself = build_inner([(entry.last, entry.root)], leaves=False)
    assert verdict(resealed(device, entry, entry.root, to_itself), content) == "error"
    upwards = build_inner([(entry.last, entry.root)] * 4, leaves=False)
    assert verdict(resealed(device, entry, inner, upwards), content) == "error"
    # The next-leaf pointer is not followed by us.
    leaf = parse_leaf(node(device, entry, LAYOUT.slot_start(entry.slot), LEAF_BYTES), LAYOUT.data_blocks)
    looping = build_leaf(list(leaf.keys), leaf.records, LAYOUT.slot_start(entry.slot))
    assert verdict(resealed(device, entry, LAYOUT.slot_start(entry.slot), looping), content) == "right"


def test_files_that_contradict_each_other(written: tuple[SparseDevice, dict[int, bytes]]) -> None:
    """Two of level 0, ranges that meet in level 1, one tree in two slots: errors that name the entry."""
    device, _ = written
    entry = level1(device)
    for level, text in ((0, "has a file of level 0 too"), (1, "meet those of slot")):
        other = device.copy()
        writer = IndexWriter(LAYOUT, 5, bytes(range(16)))
        writer.add([110], RECORD.pack(0, bytes(16), bytes(16)))
        extra = writer.finish(other, level=level, version=99)
        add_entry(other, extra)
        with pytest.raises(VolumeMalformed, match=text):
            open_volume(other, key=key())
    other = device.copy()
    add_entry(other, Entry(**{**fields(entry), "slot": 5, "first": 600, "last": 999}))
    with pytest.raises(VolumeMalformed, match="lies outside its slot"):
        open_volume(other, key=key())


def fields(entry: Entry) -> dict[str, object]:
    return {name: getattr(entry, name) for name in Entry.__slots__}


def add_entry(device: SparseDevice, entry: Entry) -> None:
    device.apply(LAYOUT.bitc_start * BLOCK + entry.slot * BITC_ENTRY, entry.encode())
    at = LAYOUT.bvt_start * BLOCK + entry.slot // 8
    device.apply(at, bytes([device.pread(at, 1)[0] | 1 << entry.slot % 8]))


def volume_of(device: SparseDevice, keys: list[int], records: bytes, *, level: int = 1) -> Volume:
    writer = IndexWriter(LAYOUT, 0, bytes(range(16)))
    writer.add(keys, records)
    add_entry(device, writer.finish(device, level=level, version=1))
    return open_volume(device, key=key())


def empty() -> SparseDevice:
    device = SparseDevice(LAYOUT.total_bytes)
    create_empty(device, layout=LAYOUT, key=key(), blank=True)
    return device


def test_two_logical_blocks_in_one_raw_block_are_not_written_on() -> None:
    """Readable, but the first overwrite would free the block for both."""
    device = empty()
    sealed = seal(bytes(16), pattern(1, 1), data_aad(7))
    device.apply((LAYOUT.data_start + 7) * BLOCK, sealed[:BLOCK])
    volume = volume_of(device, [3, 4], RECORD.pack(7, sealed[BLOCK:], bytes(16)) * 2)
    assert pattern(1, 1) * 2 == volume.read(3 * BLOCK, 2 * BLOCK)
    with pytest.raises(VolumeInconsistent, match="logical block 3 has the same raw block"):
        open_session(device, key=key())


def test_pairs_and_marks_are_read_as_meant_and_written_no_more() -> None:
    """A live record before a mark counts; a mark alone unmaps. After a session of ours there are no marks."""
    device = empty()
    sealed = seal(bytes(16), pattern(1, 1), data_aad(7))
    device.apply((LAYOUT.data_start + 7) * BLOCK, sealed[:BLOCK])
    keys = sorted([*range(126), 126, 127, 127, 128, 130])  # the pair of key 127 lies in two leaves
    records = b"".join(RECORD.pack(7, sealed[BLOCK:], bytes(16)) if at == 127 else MARK for at in range(len(keys)))
    volume = volume_of(device, keys, records, level=0)
    assert keys.index(128) - 1 == 128, "the mark begins the second leaf"
    assert pattern(1, 1) == volume.read(127 * BLOCK, BLOCK)
    assert bytes(BLOCK) == volume.read(128 * BLOCK, BLOCK)
    assert [list(some) for some, _ in volume.chunks()] == [[127]]
    writer = open_session(device, key=key())
    assert pattern(1, 1) == writer.read(127 * BLOCK, BLOCK)
    writer.write(0, pattern(0, 5))
    writer.close()
    after = open_volume(device, key=key())
    assert pattern(1, 1) == after.read(127 * BLOCK, BLOCK)
    assert [list(some) for some, _ in after.chunks()] == [[0, 127]]
    assert all(not leaf.marks for file in after.levels.level1 for leaf in file.leaves())


def test_records_beyond_any_volume_are_not_written_on() -> None:
    device = empty()
    volume = volume_of(device, [0xFFFFFFFF], RECORD.pack(7, bytes(16), bytes(16)))
    assert bytes(BLOCK) == volume.read(0, BLOCK)
    with pytest.raises(VolumeInconsistent, match="which no volume can have"):
        open_session(device, key=key())


# What the format cannot tell.


def test_a_forged_block_is_accepted_by_design(written: tuple[SparseDevice, dict[int, bytes]]) -> None:
    """Without the root key: new data under a new key, and their leaf sealed with the catalogue's key."""
    device, _ = written
    entry = level1(device)
    other = device.copy()
    forged, position = b"forged by whoever holds the disk".ljust(BLOCK, b"!"), 300_000
    sealed = seal(bytes(range(16)), forged, data_aad(position))
    other.apply((LAYOUT.data_start + position) * BLOCK, sealed[:BLOCK])
    place = LAYOUT.slot_start(entry.slot) + LEAF_BYTES  # the second leaf, of keys 228 to 355
    leaf = parse_leaf(node(device, entry, place, LEAF_BYTES), LAYOUT.data_blocks)
    at = leaf.keys.index(300) * RECORD_BYTES
    records = (
        leaf.records[:at] + RECORD.pack(position, sealed[BLOCK:], bytes(range(16))) + leaf.records[at + RECORD_BYTES :]
    )
    other.apply(place, seal(entry.key, build_leaf(list(leaf.keys), records, leaf.next)))
    assert forged == open_volume(other, key=key()).read(300 * BLOCK, BLOCK)


def test_an_older_disk_is_accepted_by_design(written: tuple[SparseDevice, dict[int, bytes]]) -> None:
    """The superblock is written once and binds nothing: yesterday's tables go with it."""
    device, content = written
    newer = device.copy()
    writer = open_session(newer, key=key())
    writer.write(200 * BLOCK, pattern(200, 9))
    writer.close()
    assert pattern(200, 9) == open_volume(newer, key=key()).read(200 * BLOCK, BLOCK)
    assert device.blocks[0] == newer.blocks[0]
    assert verdict(device, content) == "right"


def test_nodes_share_a_key_stream_by_design(written: tuple[SparseDevice, dict[int, bytes]]) -> None:
    """Two leaves of one file, added bit by bit, show the sum of their contents without any key."""
    device, _ = written
    entry = level1(device)
    start = LAYOUT.slot_start(entry.slot)
    one, two = device.pread(start, LEAF_BYTES - 16), device.pread(start + LEAF_BYTES, LEAF_BYTES - 16)
    first, second = node(device, entry, start, LEAF_BYTES), node(device, entry, start + LEAF_BYTES, LEAF_BYTES)
    assert int.from_bytes(one) ^ int.from_bytes(two) == int.from_bytes(first) ^ int.from_bytes(second)


def test_inner_nodes_of_our_own_parse(written: tuple[SparseDevice, dict[int, bytes]]) -> None:
    """The faults above are faults of nodes that are good before."""
    device, _ = written
    entry = level1(device)
    start = LAYOUT.slot_start(entry.slot)
    found = parse_inner(node(device, entry, entry.root - INNER_BYTES, INNER_BYTES), start, entry.root + INNER_BYTES)
    assert found.keys == (227, 355, 483, 499)
