"""Authentic but wrong: structures that a faulty writer sealed (section 22).

Every one of them gives an error of the volume's family, with the words of its class; never another exception, never an
endless loop, never content that nobody wrote.
"""

import random
import re
import struct
import zlib
from collections.abc import Callable

import pytest
from jd import KEY, UUID1, MemoryDevice, content
from jd_attack import attack, device, opened
from jd_disk import FREE, GEOMETRY, TAG, WRITTEN, D, free_block, mapped, only_newest
from jd_forge import BLOCK, TOP, Forge, entry
from jd_reader import Wrong

from jindiskd.base.secret import Secret
from jindiskd.jindisk.anchor import UNANCHORED
from jindiskd.jindisk.check import check_volume
from jindiskd.jindisk.errors import (
    VolumeError,
    VolumeInconsistent,
    VolumeMalformed,
    VolumeReadOnly,
    VolumeUnsupported,
)
from jindiskd.jindisk.repair import salvage
from jindiskd.jindisk.session import Session
from jindiskd.jindisk.volume import open_volume

pytestmark = pytest.mark.usefixtures("no_endless_loop")

U64, U32, U16 = struct.Struct("<Q"), struct.Struct("<I"), struct.Struct("<H")
BIG = (0, 1, 15, 1 << 31, (1 << 40) + 1, (1 << 64) - 1)
SUPERBLOCK = {
    "magic": (0, [b"JD2Super", bytes(8)], VolumeInconsistent),
    "major": (8, [U16.pack(0), U16.pack(2), U16.pack(65535)], VolumeUnsupported),
    "state": (12, [U32.pack(2), U32.pack(1 << 31)], VolumeInconsistent),
    "uuid": (16, [bytes(16)], VolumeInconsistent),
    "incompatible": (32, [U64.pack(1), U64.pack(1 << 63)], VolumeUnsupported),
    "epoch": (56, [U64.pack(0), U64.pack(3), U64.pack((1 << 64) - 2)], VolumeInconsistent),
    "sequence": (64, [U64.pack(0), U64.pack((1 << 64) - 1)], VolumeInconsistent),
    "L": (72, [U64.pack(n) for n in BIG], VolumeInconsistent),
    "end": (80, [U64.pack(n) for n in BIG], VolumeInconsistent),
    "S": (88, [U64.pack(n) for n in BIG], VolumeInconsistent),
    "b": (96, [U32.pack(n) for n in (0, 5, 7, 12, 13, (1 << 32) - 1)], VolumeInconsistent),
    "J": (100, [U32.pack(n) for n in (0, 15, 17, 65536, 65537, (1 << 32) - 1)], VolumeInconsistent),
    "journal_start": (104, [U64.pack(n) for n in (0, 7, 9)], VolumeInconsistent),
    "meta_start": (112, [U64.pack(n) for n in BIG], VolumeInconsistent),
    "meta_slots": (120, [U64.pack(n) for n in BIG], VolumeInconsistent),
    "data_start": (128, [U64.pack(n) for n in BIG], VolumeInconsistent),
    "mapped": (136, [U64.pack(n) for n in (0, 201, 203, 4097, (1 << 64) - 1)], VolumeInconsistent),
    "oldest": (144, [U64.pack((1 << 64) - 1)], VolumeInconsistent),
    "reserved": (432, [b"\x01"], VolumeInconsistent),
    "the last byte": (4047, [b"\x80"], VolumeInconsistent),
}


@pytest.mark.parametrize("field", SUPERBLOCK)
def test_superblock_fields(disk: dict[int, bytes], field: str) -> None:
    """Each value out of range is refused, with its class."""
    at, values, kind = SUPERBLOCK[field]
    for value in values:
        forge = only_newest(Forge(disk, KEY))
        forge.superblock(at, value)
        with pytest.raises(kind):
            opened(forge)


def test_a_device_too_small_and_another_slot(disk: dict[int, bytes]) -> None:
    forge = only_newest(Forge(disk, KEY))
    with pytest.raises(VolumeMalformed, match="the volume needs"):
        open_volume(
            MemoryDevice((GEOMETRY.end - 1) * BLOCK, forge.blocks), key=Secret(KEY), uuid=UUID1, anchor=UNANCHORED
        )
    forge.superblock(56, U64.pack(forge.reader.epoch), slot=1 - forge.reader.epoch % 2)
    forge.blocks.pop(1 + forge.reader.epoch % 2)
    with pytest.raises(VolumeInconsistent, match="cannot be there"):
        opened(forge)


def test_features(disk: dict[int, bytes]) -> None:
    """Read-only compatible: for reading; compatible: kept. The header must say the same (section 20)."""
    forge = only_newest(Forge(disk, KEY))
    forge.superblock(40, U64.pack(4))
    with pytest.raises(VolumeMalformed, match="read-only compatible features"):
        opened(forge)
    repaired = device(forge)
    from jindiskd.jindisk.repair import restore_identification

    restore_identification(repaired, key=Secret(KEY), uuid=UUID1, anchor=UNANCHORED)
    volume = open_volume(repaired, key=Secret(KEY), uuid=UUID1, anchor=UNANCHORED)
    assert volume.read(0, BLOCK) == content(0)
    with pytest.raises(VolumeReadOnly):
        Session(volume, session_id=bytes(32)).begin()
    forge = only_newest(Forge(disk, KEY))
    forge.superblock(48, U64.pack(1 << 60))
    forge.superblock(10, U16.pack(7))  # a later minor version
    repaired = device(forge)
    restore_identification(repaired, key=Secret(KEY), uuid=UUID1, anchor=UNANCHORED)
    session = Session(open_volume(repaired, key=Secret(KEY), uuid=UUID1, anchor=UNANCHORED), session_id=bytes(32))
    session.begin()
    session.close()
    assert open_volume(repaired, key=Secret(KEY), uuid=UUID1, anchor=UNANCHORED).superblock.compatible == 1 << 60


def s_entry(forge: Forge, key: bytes = b"k" * 32, live: int = 0, flags: int = 1, stamp: int = 1) -> bytes:
    return struct.pack("<32sIIQ", key, live, flags, stamp)


def used(forge: Forge) -> int:
    """A segment with live blocks."""
    return (forge.reader.map[0][0] - D) >> GEOMETRY.segment_bits


TREE_S: dict[str, Callable[[Forge], tuple[int, bytes]]] = {
    "free, with a key": lambda f: (48 * FREE, s_entry(f, flags=0, stamp=0)),
    "free, with a stamp": lambda f: (48 * FREE, s_entry(f, key=bytes(32), flags=0)),
    "unknown flags": lambda f: (48 * FREE, s_entry(f, flags=3)),
    "more live than it has": lambda f: (48 * used(f) + 32, U32.pack(65)),
    "live by far": lambda f: (48 * used(f) + 32, U32.pack((1 << 32) - 1)),
    "no stamp": lambda f: (48 * FREE, s_entry(f, stamp=0)),
    "a stamp of the future": lambda f: (48 * FREE, s_entry(f, stamp=f.reader.sequence + 1)),
    "other counts than the superblock": lambda f: (48 * used(f) + 32, U32.pack(1)),
    "entries beyond S": lambda f: (48 * GEOMETRY.segments, b"\1"),
    "reserved bytes": lambda f: (4080, b"\1"),
}


@pytest.mark.parametrize("case", TREE_S)
def test_pages_of_s(disk: dict[int, bytes], case: str) -> None:
    """They are read when the volume is opened, and judged then."""
    forge = only_newest(Forge(disk, KEY))
    forge.page(3, 0, 0, *TREE_S[case](forge))
    with pytest.raises(VolumeInconsistent, match="tree S"):
        opened(forge)


def overwrite_all(session: Session) -> None:
    for lba in WRITTEN:
        session.write(lba * BLOCK, content(9000 + lba))
    session.close()


TREES: dict[str, tuple[int, int, Callable[[Forge], tuple[int, bytes]]]] = {
    "F: before the data": (1, 0, lambda f: (0, U64.pack(D - 1))),
    "F: behind the data": (1, 0, lambda f: (0, U64.pack(GEOMETRY.end))),
    "F: far away": (1, 0, lambda f: (0, U64.pack((1 << 64) - 1))),
    "F: a free segment": (1, 0, lambda f: (0, U64.pack(free_block(f)))),
    "F: unmapped, with a tag": (1, 0, lambda f: (0, U64.pack(0) + TAG)),
    "F: the same raw block twice": (1, 0, lambda f: (24, U64.pack(f.reader.map[0][0]) + f.reader.map[0][1])),
    "F: reserved bytes": (1, 0, lambda f: (4080, b"\1")),
    "F: a reference outside the slots": (1, 1, lambda f: (0, U64.pack(D))),
    "F: a reference to the superblock": (1, 1, lambda f: (0, U64.pack(1))),
    "F: a hole with a key": (1, 1, lambda f: (0, U64.pack(0))),
    "F: a reference beyond the leaves": (1, 1, lambda f: (56 * 25, U64.pack(D))),
    "F: two references to a slot": (1, 1, lambda f: (56 * 20, _first_ref(f))),
    "R: reserved page": (2, 1, lambda f: (56 * 10, U64.pack(D))),
    "R: points to another": (2, 0, lambda f: (8 * ((f.reader.map[0][0] - D) % 512), U64.pack(4000))),
    "S: live moved to another": (3, 0, lambda f: (48 * used(f) + 32, U32.pack(0))),
}


SAYS = {
    "F: before|F: behind|F: far": "outside the data region",
    "F: a free": "its segment is not in use",
    "F: unmapped": "its tag is not zero",
    "F: the same": "another logical block has the same raw block",
    "F: reserved|F: a reference beyond|R: reserved": "reserved bytes",
    "F: a reference": "outside the page slots",
    "F: a hole": "of a hole is not zero",
    "F: two": "in use by another page",
    "R: points": "does not point back",
    "S:": "it counts",
}
"""What the checker says of each, by how the case's name begins."""


def _first_ref(forge: Forge) -> bytes:
    top = forge.reader.page(1, 1, 0, bytes(forge.plain[TOP[1] : TOP[1] + 56]))
    return top[:56]


@pytest.mark.parametrize("case", TREES)
def test_trees_that_disagree(disk: dict[int, bytes], case: str) -> None:
    """The checker names it; reading gives right content or an error; a session gets no error but of the family."""
    tree, level, change = TREES[case]
    forge = only_newest(Forge(disk, KEY))
    if case.startswith("S:"):  # the sums stay right
        other = next(s for s in forge.reader.keys if s != used(forge))
        live = _live(forge, used(forge))
        forge.page(3, 0, 0, *change(forge))
        forge.page(3, 0, 0, 48 * other + 32, U32.pack(_live(forge, other) + live))
        if _live(forge, other) + live > 64:
            with pytest.raises(VolumeInconsistent):
                opened(forge)
    else:
        forge.page(tree, level, 0 if level else (used(forge) * 64 // 512 if tree == 2 else 0), *change(forge))
    try:
        volume = opened(forge)
    except VolumeError:
        return
    faults = check_volume(volume, data=True).faults
    assert faults, "the checker finds nothing wrong"
    words = next(words for names, words in SAYS.items() if re.match(names, case))
    assert any(isinstance(fault, VolumeInconsistent) and words in str(fault) for fault in faults), faults
    for lba in WRITTEN:
        try:
            found = volume.read(lba * BLOCK, BLOCK)
        except VolumeError:
            continue
        assert found == content(lba) or (lba == 0 and found == bytes(BLOCK) and "unmapped" in case)
    for work in (overwrite_all, salvage):
        session = Session(opened(forge), session_id=bytes(32))
        try:
            session.begin()
            work(session)
        except VolumeError:
            continue


def test_the_checker_looks_for_the_oldest_stamp(disk: dict[int, bytes]) -> None:
    """The superblock's is how re-encryption knows that it is done."""
    forge = only_newest(Forge(disk, KEY))
    assert not check_volume(opened(forge), data=True).faults
    forge.superblock(144, U64.pack(0))
    (fault,) = check_volume(opened(forge)).faults
    assert "oldest stamp" in str(fault)


@pytest.mark.parametrize("tree", [False, True])
def test_what_is_inconsistent_is_not_passed_over_for_an_older_state(disk: dict[int, bytes], tree: bool) -> None:
    """The older superblock is whole, but what was acknowledged since would be lost without a word."""
    forge = Forge(disk, KEY)
    if tree:
        forge.page(3, 0, 0, *TREE_S["unknown flags"](forge))
    else:
        forge.journal([forge.commit([entry(2, 0, 1)]), forge.commit([entry(2, 0, 1)], index=1, sequence=99)])
    with pytest.raises(VolumeInconsistent):
        opened(forge)


@pytest.mark.parametrize("label", [b"a\0b", b"\0a", b"\xff"])
def test_a_label_is_text_with_zeros_behind_it(disk: dict[int, bytes], label: bytes) -> None:
    """Anything else is malformed (section 5): the host can write there, and it is written back when renamed."""
    block = bytearray(disk[0])
    block[72:136] = label.ljust(64, b"\0")
    block[508:512] = zlib.crc32(bytes(block[:508])).to_bytes(4, "little")
    with pytest.raises(VolumeMalformed, match="label"):
        open_volume(
            MemoryDevice(GEOMETRY.end * BLOCK, disk | {0: bytes(block)}), key=Secret(KEY), uuid=UUID1, anchor=UNANCHORED
        )


def _live(forge: Forge, segment: int) -> int:
    page = forge.reader.page(3, 0, 0, bytes(forge.plain[TOP[3] : TOP[3] + 56]))
    return int.from_bytes(page[48 * segment + 32 : 48 * segment + 36], "little")


def mutate(rng: random.Random, data: bytes, used_bytes: int) -> tuple[int, bytes]:
    """A random change within the used part: a byte, or an integer that is likely to hurt."""
    size = rng.choice((1, 2, 4, 8))
    at = rng.randrange(used_bytes) // size * size
    value = rng.choice((0, 1, (1 << 8 * size) - 1, 1 << rng.randrange(8 * size), rng.randrange(1 << 8 * size)))
    return at, value.to_bytes(size, "little")


@pytest.mark.parametrize(("seed", "count"), [(1, 150), pytest.param(2, 6000, marks=pytest.mark.long)])
def test_random_changes_of_authentic_structures(
    disk: dict[int, bytes], seed: int, count: int, record_property: Callable[[str, object], None]
) -> None:
    """Superblock, pages of every tree, journal."""
    record_property("changed volumes", count)
    rng = random.Random(seed)
    for _ in range(count):
        forge = Forge(disk, KEY)
        if rng.random() < 0.7:
            only_newest(forge)
        for _ in range(rng.choice((1, 1, 2))):
            target = rng.randrange(5)
            if target == 0:
                forge.superblock(*mutate(rng, bytes(forge.plain), 440))
            elif target == 1:
                block = bytearray(forge.commit([mapped(forge), entry(3, FREE), entry(4, FREE), entry(2, 7, 30)]))
                at, value = mutate(rng, bytes(block), len(block))
                block[at : at + len(value)] = value
                forge.journal([bytes(block)])
            else:
                tree = target - 1
                level = rng.randrange(len(forge.reader.levels[tree]))
                try:
                    index = 0 if level else rng.choice(sorted(forge.reader.leaves(tree)))
                    forge.page(tree, level, index, *mutate(rng, b"", rng.choice((100, 4096))))
                except (AssertionError, Wrong):  # a second change may find no way to its page any more
                    continue
        try:
            attack(forge)
        except Exception as exc:
            raise AssertionError(f"seed {seed}") from exc
