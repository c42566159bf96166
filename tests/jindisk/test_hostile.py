"""What the host may do to a disk: every structure, changed in every way (section 22).

While the volume is closed, after a crash, and while it is open: a read gives the right content, or an error that names
what is wrong; never anything else.
"""

import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from uuid import UUID

import pytest
from jd import UUID1, ZERO, Broker, MemoryDevice, World, content

from jindiskd.base.anchor import Anchor
from jindiskd.base.secret import Secret
from jindiskd.jindisk.anchor import UNANCHORED
from jindiskd.jindisk.check import check_volume
from jindiskd.jindisk.errors import (
    VolumeError,
    VolumeMalformed,
    VolumeStale,
    VolumeUnauthentic,
    VolumeUnrecognised,
    VolumeUnsupported,
)
from jindiskd.jindisk.geometry import BLOCK, JOURNAL_START, Geometry, Kind, default_geometry
from jindiskd.jindisk.recovery import recover
from jindiskd.jindisk.session import Session
from jindiskd.jindisk.tree import PageCache, ref_raw
from jindiskd.jindisk.volume import Volume, open_volume

BLOCKS = 16_384
"""Three levels of tree F, two of the others."""
_shape = default_geometry(BLOCKS)
GEOMETRY = Geometry(
    blocks=BLOCKS, segment_bits=6, segments=_shape.segments, journal_blocks=16, meta_slots=_shape.meta_slots
)
WRITTEN = [*range(0, 400, 7), *range(5_000, 5_200, 9), *range(12_350, 12_500, 11), BLOCKS - 1]
LOOKED_AT = sorted({*WRITTEN, 1, 6_000, 14_000})
Contents = dict[int, bytes]


@dataclass(kw_only=True)
class Past:
    """A volume with a history: its disks, what they held, and where things were."""

    world: World
    contents: dict[int, Contents] = field(default_factory=dict)
    """By sequence number."""
    disks: list[MemoryDevice] = field(default_factory=list)
    places: list[dict[str, int]] = field(default_factory=list)
    """Of each disk, raw block by name of the structure."""
    session: Session | None = None

    def snapshot(self) -> None:
        self.disks.append(self.world.device.copy())
        self.places.append(places(self.world))


def places(world: World) -> dict[str, int]:
    """Raw block of every structure of the newest state, by name."""
    found = recover(world.device, key=world.key, uuid=world.uuid, anchor=UNANCHORED, where="here")
    volume = Volume(world.device, found, key=world.key)
    names = {"identification": 0, "superblock newest": 1 + found.superblock.slot}
    names["superblock other"] = 2 - found.superblock.slot
    for index in range(sum(len(commit.blocks) for commit in found.commits)):
        names[f"journal {index}"] = JOURNAL_START + index
    for kind, tree in volume.trees.items():
        for level, index, ref in tree.interior_refs():
            names[f"page {kind.name} {level} {index}"] = ref_raw(ref)
    for lba in WRITTEN:
        raw = int.from_bytes(volume.entry(lba)[:8], "little")
        if raw:
            names[f"data {lba}"] = raw
    return names


def make(key: bytes, uuid: UUID, *, salt: int, closing: bool) -> Past:
    """Two closed sessions and one that is closed or stopped after four commits, the second of them reported."""
    here = World(device=MemoryDevice(GEOMETRY.end * BLOCK), broker=Broker(), key=Secret(key), uuid=uuid, seed=salt)
    past, now = Past(world=here), dict.fromkeys(LOOKED_AT, ZERO)

    def write(session: Session, lbas: list[int], value: int) -> None:
        for lba in lbas:
            now[lba] = content(value * 100_000 + lba + salt)
            session.write(lba * BLOCK, now[lba])

    session = here.create(GEOMETRY)
    write(session, WRITTEN, 1)
    session.close()
    past.contents[session.sequence] = dict(now)
    past.snapshot()
    session = here.begin()
    write(session, WRITTEN[::2], 2)
    session.close()
    past.contents[session.sequence] = dict(now)
    past.snapshot()
    session = here.begin()
    past.contents[session.sequence] = dict(now)
    for number in range(4):
        write(session, WRITTEN[number::3], 3 + number)
        session.flush()
        past.contents[session.sequence] = dict(now)
        if number == 1:
            session.reporter.report(session.durable)
            past.snapshot()
    if closing:
        session.close()
        past.contents[session.sequence] = dict(now)
    past.snapshot()
    past.session = session
    return past


KEY_A, KEY_C = bytes(range(32)), bytes(range(32, 64))
UUID_B, UUID_C = UUID(int=0xB), UUID(int=0xC)


@pytest.fixture(scope="module", params=[True, False], ids=["closed", "crashed"])
def volumes(request: pytest.FixtureRequest) -> tuple[Past, Past, Past, bool]:
    """The volume; another under the same key; another; and whether they were closed."""
    closing = request.param
    mine = make(KEY_A, UUID1, salt=0, closing=closing)
    return mine, make(KEY_A, UUID_B, salt=1, closing=closing), make(KEY_C, UUID_C, salt=2, closing=closing), closing


Actions = Iterator[tuple[str, dict[int, bytes]]]


def actions(volumes: tuple[Past, Past, Past, bool], name: str) -> Actions:
    """What the host does with a structure: raw blocks and their new content."""
    mine, same_key, other, _ = volumes
    disk, raw = mine.disks[-1], mine.places[-1][name]
    block = disk.pread(raw * BLOCK, BLOCK)
    for at in (0, 31, 32, 2000, BLOCK - 17, BLOCK - 1):
        yield f"flip of byte {at}", {raw: block[:at] + bytes([block[at] ^ 0x10]) + block[at + 1 :]}
    yield "zero", {raw: ZERO}
    yield "ones", {raw: b"\xff" * BLOCK}
    for age in range(len(mine.disks) - 1):
        older = mine.places[age].get(name)
        for place in {raw, older} - {None}:
            old = mine.disks[age].pread(place * BLOCK, BLOCK)
            if old != block:
                yield f"version {age}", {raw: old}
    kind = name.rsplit(" ", 1)[0]
    alike = [place for other_name, place in mine.places[-1].items() if other_name.startswith(kind) and place != raw]
    for place in alike[:3]:
        theirs = disk.pread(place * BLOCK, BLOCK)
        yield f"copy of raw block {place}", {raw: theirs}
        yield f"swap with raw block {place}", {raw: theirs, place: block}
    for said, volume in (("same key", same_key), ("other key", other)):
        for place in {raw, volume.places[-1].get(name)} - {None}:
            yield f"volume of {said}", {raw: volume.disks[-1].pread(place * BLOCK, BLOCK)}


def changed(disk: MemoryDevice, blocks: dict[int, bytes]) -> MemoryDevice:
    return MemoryDevice(disk.size_bytes, {**disk.blocks, **blocks})


def read_all(read: Callable[[int, int], bytes], expected: Contents, said: str) -> dict[int, VolumeError]:
    """Every block is right, or fails; returns what failed."""
    failed = {}
    for lba in LOOKED_AT:
        try:
            found = read(lba * BLOCK, BLOCK)
        except VolumeError as exc:
            failed[lba] = exc
        else:
            assert found == expected[lba], f"{said}: logical block {lba} has content that it had not then"
    return failed


def opened(past: Past, disk: MemoryDevice) -> Volume:
    return open_volume(disk, key=past.world.key, uuid=past.world.uuid, anchor=past.world.broker.anchor, cache_pages=16)


def under(name: str) -> Callable[[int], bool]:
    """Which logical blocks depend on a page of tree F, or a data block."""
    kind, *rest = name.split()
    if kind == "data":
        return lambda lba: lba == int(rest[0])
    assert rest[0] == "F"
    level, index = int(rest[1]), int(rest[2])
    return lambda lba: lba // 170 // 73**level == index


def affected(volumes: tuple[Past, Past, Past, bool], blocks: dict[int, bytes]) -> dict[str, int]:
    """The structures that lie in these raw blocks."""
    return {name: raw for name, raw in volumes[0].places[-1].items() if raw in blocks}


def each(volumes: tuple[Past, Past, Past, bool], prefix: str) -> Iterator[tuple[str, str, dict[int, bytes]]]:
    """Structure, what is said of the case, and the blocks changed."""
    names = [name for name in volumes[0].places[-1] if name.startswith(prefix)]
    if len(names) > 6:
        names = names[::len(names) // 5]
    for name in names:
        for said, blocks in actions(volumes, name):
            yield name, f"{name}, {said}", blocks


def go_on(past: Past, disk: MemoryDevice, sequence: int, said: str) -> None:
    """A session on the damaged disk: it begins or says why not, and never shows wrong content."""
    here = World(device=disk, broker=Broker(), key=past.world.key, uuid=past.world.uuid)
    here.broker.__dict__.update(past.world.broker.__dict__)
    expected = dict(past.contents[sequence])
    try:
        session = here.begin()
        session.write(LOOKED_AT[0] * BLOCK, content(9))
        expected[LOOKED_AT[0]] = content(9)
        session.flush()
        read_all(session.read, expected, said)
        session.close()
    except VolumeError:
        return
    read_all(here.open().read, expected, said)


def test_data_blocks(volumes: tuple[Past, Past, Past, bool]) -> None:
    """The block concerned cannot be read, and the error names it; all others are right."""
    mine, count = volumes[0], 0
    for _, said, blocks in each(volumes, "data"):
        disk, hit = changed(mine.disks[-1], blocks), affected(volumes, blocks)
        volume = opened(mine, disk)
        failed = read_all(volume.read, mine.contents[volume.state.sequence], said)
        if volume.state.sequence == max(mine.contents):
            assert set(failed) == {int(name.split()[1]) for name in hit}, said
        # Otherwise the last commit was dropped, since its data did not open (R3 c).
        for lba, exc in failed.items():
            assert isinstance(exc, VolumeUnauthentic), said
            raw = mine.places[-1][f"data {lba}"]
            assert f"logical block {lba} (raw block {raw})" in str(exc), said
        report = check_volume(volume, data=True)
        assert {fault.what for fault in report.faults} == {exc.what for exc in failed.values()}, said
        count += 1
        if count % 10 == 0:
            go_on(mine, disk, volume.state.sequence, said)
    assert count > 50


@pytest.mark.parametrize("level", [0, 1, 2])
def test_pages_of_f(volumes: tuple[Past, Past, Past, bool], level: int) -> None:
    """The range of the page cannot be read, and the error names the page; all else is right."""
    mine, count = volumes[0], 0
    for _, said, blocks in each(volumes, f"page F {level}"):
        disk, hit = changed(mine.disks[-1], blocks), affected(volumes, blocks)
        volume = opened(mine, disk)
        failed = read_all(volume.read, mine.contents[volume.state.sequence], said)
        recent = set(volume.memtable.entries)
        concerned = {lba for name in hit for lba in LOOKED_AT if under(name)(lba)} - recent
        assert set(failed) == concerned, said
        for exc in failed.values():
            assert isinstance(exc, VolumeUnauthentic), said
            raws = "|".join(map(str, blocks))
            assert re.search(rf"page \d+ of level {level} of tree F \(raw block ({raws})\)", str(exc)), said
        assert any("of tree F" in str(fault) for fault in check_volume(volume).faults), said
        count += 1
        if count % 10 == 0:
            go_on(mine, disk, volume.state.sequence, said)
    assert count >= 10


def test_pages_of_r(volumes: tuple[Past, Past, Past, bool]) -> None:
    """Reading does not need them; the checker names them, and a session says so or goes on rightly."""
    mine, count = volumes[0], 0
    for name, said, blocks in each(volumes, "page R"):
        disk = changed(mine.disks[-1], blocks)
        volume = opened(mine, disk)
        assert not read_all(volume.read, mine.contents[volume.state.sequence], said)
        _, _, level, index = name.split()
        words = f"page {index} of level {level} of tree R (raw block {mine.places[-1][name]})"
        faults = [str(fault) for fault in check_volume(volume).faults if isinstance(fault, VolumeUnauthentic)]
        assert any(words in fault for fault in faults), said
        count += 1
        if count % 5 == 0:
            go_on(mine, disk, volume.state.sequence, said)
    assert count > 30


def test_pages_of_s(volumes: tuple[Past, Past, Past, bool]) -> None:
    """The volume does not open in that state; the error names the page."""
    mine, count = volumes[0], 0
    for _, _, blocks in each(volumes, "page S"):
        with pytest.raises(VolumeUnauthentic, match=r"page \d+ of level \d of tree S \(raw block \d+\)"):
            opened(mine, changed(mine.disks[-1], blocks))
        count += 1
    assert count > 15


def test_superblocks(volumes: tuple[Past, Past, Past, bool]) -> None:
    """Without the newest the older candidate counts, if the anchor has it; the other slot does not matter."""
    mine = volumes[0]
    for name, said, blocks in each(volumes, "superblock"):
        disk = changed(mine.disks[-1], blocks)
        if len(blocks) == 2:  # swapped: the slot is authenticated
            with pytest.raises(VolumeUnauthentic, match="superblock slot"):
                opened(mine, disk)
        elif name == "superblock newest":
            with pytest.raises(VolumeStale):
                opened(mine, disk)
        else:
            volume = opened(mine, disk)
            assert volume.state.sequence == max(mine.contents), said
            assert not read_all(volume.read, mine.contents[volume.state.sequence], said)
    for make_block in (
        lambda block: bytes([block[0] ^ 1]) + block[1:],
        lambda _: ZERO,
        lambda block: block[:-1] + bytes([block[-1] ^ 1]),
    ):
        both = {raw: make_block(mine.disks[-1].pread(raw * BLOCK, BLOCK)) for raw in (1, 2)}
        with pytest.raises(VolumeUnauthentic, match="superblock slot"):
            opened(mine, changed(mine.disks[-1], both))
    old = {raw: mine.disks[0].pread(raw * BLOCK, BLOCK) for raw in (1, 2)}
    with pytest.raises((VolumeStale, VolumeUnauthentic)):  # a page of theirs may be gone
        opened(mine, changed(mine.disks[-1], old))
    for theirs in volumes[1:3]:
        with pytest.raises(VolumeUnauthentic, match="superblock slot"):
            opened(mine, changed(mine.disks[-1], {r: theirs.disks[-1].pread(r * BLOCK, BLOCK) for r in (1, 2)}))


def test_journal(volumes: tuple[Past, Past, Past, bool]) -> None:
    """A closed volume has none. After a crash the chain ends there: an earlier state that the anchor has, or stale."""
    mine, _, _, closing = volumes
    if closing:
        noise = {JOURNAL_START + i: bytes([i + 1]) * BLOCK for i in range(16)}
        volume = opened(mine, changed(mine.disks[-1], noise))
        assert not read_all(volume.read, mine.contents[max(mine.contents)], "noise in the journal")
        return
    anchor, seen = mine.world.broker.anchor, set()
    assert anchor is not None
    for _, said, blocks in each(volumes, "journal"):
        index = min(raw for raw in blocks) - JOURNAL_START
        disk = changed(mine.disks[-1], blocks)
        if index < 2:  # before the state that was reported
            with pytest.raises(VolumeStale, match=str(anchor.sequence)):
                opened(mine, disk)
            seen.add("stale")
            continue
        volume = opened(mine, disk)
        assert anchor.sequence <= volume.state.sequence < max(mine.contents), said
        assert not read_all(volume.read, mine.contents[volume.state.sequence], said), said
        seen.add("earlier")
        go_on(mine, disk, volume.state.sequence, said)
    assert seen == {"stale", "earlier"}


def test_identification(volumes: tuple[Past, Past, Past, bool]) -> None:
    """It carries no trust: it is refused, or ignored, and never decides what a read gives."""
    mine, same_key, other, _ = volumes
    block = mine.disks[-1].pread(0, BLOCK)
    classes = set()
    for at, bit in itertools.product([*range(80), 140, 400, 508, 511, 512, 4095], (1, 0x80)):
        disk = changed(mine.disks[-1], {0: block[:at] + bytes([block[at] ^ bit]) + block[at + 1 :]})
        with pytest.raises((VolumeMalformed, VolumeUnrecognised, VolumeUnsupported)) as caught:
            opened(mine, disk)
        classes.add(type(caught.value))
    assert classes == {VolumeMalformed, VolumeUnrecognised}
    with pytest.raises(VolumeUnrecognised, match="there is no JinDisk 2 volume"):
        opened(mine, changed(mine.disks[-1], {0: ZERO}))
    volume = opened(mine, changed(mine.disks[-1], {0: mine.disks[0].pread(0, BLOCK)}))
    assert not read_all(volume.read, mine.contents[max(mine.contents)], "old identification")
    for theirs in (same_key, other):
        disk = changed(mine.disks[-1], {0: theirs.disks[-1].pread(0, BLOCK)})
        with pytest.raises(VolumeMalformed, match="identification block is malformed: its UUID"):
            opened(mine, disk)
        with pytest.raises(VolumeUnauthentic, match="superblock slot"):
            open_volume(disk, key=mine.world.key, uuid=None, anchor=mine.world.broker.anchor)


def test_whole_disks(volumes: tuple[Past, Past, Past, bool]) -> None:
    """Zeros, an older copy, another volume."""
    mine, same_key, other, closing = volumes
    with pytest.raises(VolumeUnrecognised):
        opened(mine, MemoryDevice(mine.disks[-1].size_bytes))
    for age, disk in enumerate(mine.disks[:-1]):
        if age == 2 and not closing:  # the state that was reported
            volume = opened(mine, disk)
            assert not read_all(volume.read, mine.contents[volume.state.sequence], "the reported state")
            continue
        with pytest.raises(VolumeStale):
            opened(mine, disk)
    for theirs in (same_key, other):
        with pytest.raises(VolumeUnauthentic, match="superblock slot"):
            opened(mine, theirs.disks[-1])
    with pytest.raises(VolumeUnauthentic, match="superblock slot"):
        open_volume(mine.disks[-1], key=Secret(KEY_C), uuid=UUID1, anchor=mine.world.broker.anchor)


def test_while_open() -> None:
    """The same under a running session: the latest content, or an error; and right again when the bytes are back."""
    mine = make(KEY_A, UUID1, salt=0, closing=False)
    same_key, other = make(KEY_A, UUID_B, salt=1, closing=False), make(KEY_C, UUID_C, salt=2, closing=False)
    session, device = mine.session, mine.world.device
    assert session is not None
    latest = mine.contents[max(mine.contents)]
    count = 0
    for prefix in ("identification", "superblock", "journal", "page F", "page R", "page S", "data"):
        for name, said, blocks in each((mine, same_key, other, False), prefix):
            before = {raw: device.pread(raw * BLOCK, BLOCK) for raw in blocks}
            device.blocks.update(blocks)
            for tree in session.volume.trees.values():
                tree._leaves, tree._interior = PageCache(16), PageCache(16)
            failed = read_all(session.read, latest, said)
            hit = {n for n, raw in mine.places[-1].items() if raw in blocks}
            for lba, exc in failed.items():
                assert isinstance(exc, VolumeUnauthentic), said
                assert any(under(n)(lba) for n in hit if n.startswith(("page F", "data"))), said
                assert f"logical block {lba} " in str(exc) or "of tree F" in str(exc), said
            if name.startswith("data"):
                assert {f"data {lba}" for lba in failed} == hit, said
            elif not name.startswith("page F"):
                assert not failed, said
            device.blocks.update(before)
            count += 1
    assert not read_all(session.read, latest, "restored")
    assert count > 200
    session.close()
    assert not read_all(mine.world.open().read, latest, "closed")


def test_an_anchor_is_not_needed_to_notice_damage() -> None:
    """Unanchored, which is an explicit decision, only freshness is lost."""
    mine = make(KEY_A, UUID1, salt=0, closing=True)
    volume = open_volume(mine.disks[0], key=mine.world.key, uuid=UUID1, anchor=UNANCHORED)
    assert not read_all(volume.read, mine.contents[min(mine.contents)], "old, unanchored")
    raw = mine.places[-1][f"data {WRITTEN[0]}"]
    damaged = changed(mine.disks[-1], {raw: ZERO})
    with pytest.raises(VolumeUnauthentic):
        open_volume(damaged, key=mine.world.key, uuid=UUID1, anchor=UNANCHORED).read(WRITTEN[0] * BLOCK, BLOCK)
    assert isinstance(mine.world.broker.anchor, Anchor)
    assert Kind.S.name == "S"
