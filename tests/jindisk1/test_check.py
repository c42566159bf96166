"""The checker: quiet about good volumes, one finding for each fault, and nothing written."""

import random
import struct
from collections.abc import Callable

import pytest
from jd1 import BLOCK, SparseDevice, Vector, key, pattern

from jindiskd.jindisk.v1.check import Report, check_catalogue, check_volume
from jindiskd.jindisk.v1.index_file import IndexWriter
from jindiskd.jindisk.v1.keys import data_aad, seal
from jindiskd.jindisk.v1.layout import BITC_ENTRY, DST_ENTRY, LEAF_BYTES, Layout
from jindiskd.jindisk.v1.load import create_empty
from jindiskd.jindisk.v1.nodes import MARK, RECORD
from jindiskd.jindisk.v1.session import open_session
from jindiskd.jindisk.v1.volume import open_volume

LAYOUT = Layout(321)


class Unwritable(SparseDevice):
    def pwrite(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        raise AssertionError("the checker writes")


def report(device: SparseDevice, *, data: bool = True) -> Report:
    watched = Unwritable(device.size_bytes)
    watched.blocks = device.blocks
    assert check_catalogue(watched, LAYOUT) == ()
    return check_volume(open_volume(watched, key=key(), strict=False), data=data)


def ids(device: SparseDevice, *, data: bool = True) -> set[str]:
    return {finding.id for finding in report(device, data=data).findings}


@pytest.fixture
def good() -> SparseDevice:
    device = SparseDevice(LAYOUT.total_bytes)
    create_empty(device, layout=LAYOUT, key=key(), blank=True)
    writer = open_session(device, key=key())
    rng = random.Random(1)
    for number in range(600):
        writer.write(rng.randrange(800) * BLOCK, pattern(number, 1))
        if number % 100 == 0:
            writer.flush()
    writer.close()
    return device


def test_a_good_volume(good: SparseDevice) -> None:
    found = report(good)
    assert found.findings == ()
    assert found.mapped == found.data_blocks > 300
    assert found.leaked_blocks == 0
    assert report(good, data=False).data_blocks == 0


@pytest.mark.parametrize("name", ["01-fresh", "02-sequential", "04-ext4", "06-password", "07-reopened"])
def test_volumes_of_the_module(name: str, vector: Callable[[str], Vector]) -> None:
    """What the module left of its last segments is told as leaked; all is readable and within its rules."""
    found = vector(name)
    with found.device() as device:
        told = check_volume(open_volume(device, key=found.key(), strict=False), data=True)
    assert told.findings == ()
    assert found.entry["mapped_blocks"] == told.mapped == told.data_blocks
    assert bool(told.mapped) == bool(told.leaked_blocks)


def first(device: SparseDevice) -> tuple[int, int]:
    """LBA and PBA of the first mapped block."""
    for keys, records in open_volume(device, key=key()).chunks():
        return keys[0], RECORD.unpack(records[:40])[0]
    raise AssertionError("nothing is mapped")


def test_damaged_data(good: SparseDevice) -> None:
    lba, position = first(good)
    good.apply((LAYOUT.data_start + position) * BLOCK, b"\0\1\2")
    found = report(good)
    assert [finding.id for finding in found.findings] == ["read.data"]
    assert f"logical block {lba} (raw block {LAYOUT.data_start + position})" in found.findings[0].text
    assert ids(good, data=False) == set()


def test_damaged_nodes(good: SparseDevice) -> None:
    """All other leaves and their data are still checked."""
    entry = open_volume(good, key=key()).levels.entries[0]
    good.apply(LAYOUT.slot_start(entry.slot) + LEAF_BYTES, b"junk")
    found = report(good)
    assert {"read.index"} == {finding.id for finding in found.findings}
    assert found.data_blocks == found.mapped == entry.records - 128
    good.apply(entry.root, b"junk")
    assert "the root at byte" in report(good).findings[0].text


@pytest.mark.parametrize(
    ("raw", "at", "value", "expected"),
    [
        (LAYOUT.svt_start, 0, b"\0", {"module.unallocated"}),
        (LAYOUT.dst_start, 0, struct.pack("<Q", 7), {"module.count"}),
        (LAYOUT.dst_start, 8, b"\0" * 8, {"module.count", "module.unmarked"}),
        (LAYOUT.dst_start, DST_ENTRY * 5, struct.pack("<QQ", 1, 1), {"module.unallocated"}),
        (LAYOUT.rit_start, 0, b"\xff" * 2048, {"module.reverse"}),
    ],
)
def test_tables(raw: int, at: int, value: bytes, expected: set[str], good: SparseDevice) -> None:
    good.apply(raw * BLOCK + at, value)
    assert expected == ids(good)
    # And the engine puts all of it right.
    writer = open_session(good, key=key())
    writer.write(0, pattern(0, 2))
    writer.close()
    assert ids(good) == set()


def test_leaks_are_counted(good: SparseDevice) -> None:
    before = int.from_bytes(good.pread(LAYOUT.dst_start * BLOCK, 8), "little")
    good.apply(LAYOUT.dst_start * BLOCK, struct.pack("<Q", 1024) + b"\xff" * 128)
    found = report(good)
    assert found.findings == ()
    assert 1024 - before == found.leaked_blocks


def crafted(*files: tuple[int, int, int, list[int], bytes]) -> SparseDevice:
    """A volume with files of slot, level, version, keys and records; all blocks hold the same."""
    device = SparseDevice(LAYOUT.total_bytes)
    create_empty(device, layout=LAYOUT, key=key(), blank=True)
    bits = 0
    for slot, level, version, keys, records in files:
        writer = IndexWriter(LAYOUT, slot, bytes([slot]) * 16)
        writer.add(keys, records)
        entry = writer.finish(device, level=level, version=version)
        device.apply(LAYOUT.bitc_start * BLOCK + slot * BITC_ENTRY, entry.encode())
        bits |= 1 << slot
    device.apply(LAYOUT.bvt_start * BLOCK, bytes([bits]))
    device.apply(LAYOUT.svt_start * BLOCK, b"\1")
    device.apply(LAYOUT.dst_start * BLOCK, struct.pack("<Q", 1024) + b"\xff" * 128)
    return device


def live(device_position: int) -> bytes:
    sealed = seal(bytes(16), bytes(BLOCK), data_aad(device_position))
    return RECORD.pack(device_position, sealed[BLOCK:], bytes(16))


def test_versions_that_bring_old_data_back() -> None:
    """Level 1 of version 0 without a file of level 0; and a level 0 that is older than what it covers."""
    device = crafted((0, 1, 0, [0], live(0)))
    assert ids(device, data=False) == {"module.versions"}
    device = crafted((0, 1, 5, [0], live(0)), (1, 0, 4, [0], live(1)))
    assert "module.versions" in ids(device, data=False)
    device = crafted((0, 1, 1, [0], live(0)))
    assert ids(device, data=False) == set()


def test_a_full_level_1() -> None:
    device = crafted(*((slot, 1, 2 * slot + 1, [slot], live(slot)) for slot in range(4)))
    device.apply(LAYOUT.rit_start * BLOCK, struct.pack("<4Q", 0, 1, 2, 3))
    assert ids(device, data=False) == {"module.level1_full"}


def test_marks_beside_records() -> None:
    device = crafted((0, 0, 1, [0, 3, 3], live(0) + live(1) + MARK))
    device.apply(LAYOUT.rit_start * BLOCK, struct.pack("<2Q", 0, 3))
    assert ids(device, data=False) == {"module.marks"}


def test_shared_blocks_and_covered_ones() -> None:
    device = crafted((0, 0, 1, [0, 1], live(0) * 2))
    assert ids(device, data=False) == {"module.shared", "module.reverse"}
    device = crafted((0, 1, 1, [0], live(0)), (1, 0, 3, [0], live(0)))
    assert ids(device, data=False) == {"module.covered"}


def test_blocks_beyond_the_end() -> None:
    device = crafted((0, 0, 1, [5000], live(0)))
    device.apply(LAYOUT.rit_start * BLOCK, struct.pack("<Q", 5000))
    assert ids(device, data=False) == {"space.beyond_end"}


def test_a_catalogue_that_cannot_be_opened() -> None:
    """Each entry has its finding."""
    device = crafted((0, 0, 1, [0], live(0)), (1, 0, 3, [5], live(1)), (2, 1, 5, [8, 9], live(2) + live(3)))
    assert [finding.id for finding in check_catalogue(device, LAYOUT)] == ["module.level0"]
    device = crafted((0, 1, 1, [0, 8], live(0) + live(1)), (1, 1, 3, [5], live(2)))
    assert [finding.id for finding in check_catalogue(device, LAYOUT)] == ["module.overlap"]
    device.apply(LAYOUT.bitc_start * BLOCK + 44, b"\7")
    assert [finding.id for finding in check_catalogue(device, LAYOUT)] == ["read.catalogue"]
