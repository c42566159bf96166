"""What is left of a volume with damaged blocks: reading, writing, salvage, export, and its identification."""

import errno
import random
from pathlib import Path
from uuid import UUID

import pytest
from jd import UUID1, ZERO, World, content, world

from jindiskd.jindisk.anchor import UNANCHORED
from jindiskd.jindisk.check import check_volume
from jindiskd.jindisk.errors import (
    VolumeCrowded,
    VolumeError,
    VolumeUnauthentic,
    VolumeUnrecognised,
)
from jindiskd.jindisk.export import bulk_export
from jindiskd.jindisk.geometry import BLOCK, Kind
from jindiskd.jindisk.repair import restore_identification, salvage
from jindiskd.jindisk.session import Session


def damage(here: World, session: Session, lba: int) -> int:
    """Flip a bit of a block's data on the disk; its raw block."""
    raw = int.from_bytes(session.volume.entry(lba)[:8], "little")
    block = here.device.blocks[raw]
    here.device.blocks[raw] = bytes([block[0] ^ 1]) + block[1:]
    return raw


def full_session(here: World) -> Session:
    session = here.create()
    for lba in range(0, 4096, 64):
        session.write(lba * BLOCK, b"".join(content(n) for n in range(lba, lba + 64)))
    session.flush()
    return session


def test_damaged_blocks_stay_in_their_place_and_salvage_gives_them_up() -> None:
    """Cleaning goes round them, however full the volume; after salvage they read as zeros and all is clean."""
    here, rng = world(), random.Random(4)
    session = full_session(here)
    lost = {5, 1000, 4000}
    for lba in lost:
        damage(here, session, lba)
    expected = {lba: content(lba) for lba in range(4096)}
    for number in range(4096):
        lba = rng.randrange(4096)
        if lba not in lost:
            expected[lba] = content(10_000 + number)
            session.write(lba * BLOCK, expected[lba])
    session.flush()
    assert len(session.cleaner.damaged) == 3
    for lba in lost:
        with pytest.raises(VolumeUnauthentic, match=f"logical block {lba} "):
            session.read(lba * BLOCK, BLOCK)
    found = salvage(session)
    assert set(found.unmapped) == lost
    assert not found.pages
    expected |= dict.fromkeys(lost, ZERO)
    assert not session.cleaner.damaged
    assert session.read(0, 4096 * BLOCK) == b"".join(expected[lba] for lba in range(4096))
    session.close()
    assert here.open().read(0, 4096 * BLOCK) == b"".join(expected[lba] for lba in range(4096))
    assert not check_volume(here.open(), data=True).faults


def test_a_damaged_segment_that_became_free_is_as_good_as_any() -> None:
    """What was damaged goes when it is trimmed or overwritten; the next use of its place is cleaned like others."""
    here = world()
    session = full_session(here)
    segment = session.volume.geometry.segment_of(damage(here, session, 5))
    session.discard(6 * BLOCK, BLOCK)  # a segment without garbage is no victim
    session.discard(100 * BLOCK, 3900 * BLOCK)
    session.checkpoint()
    session.cleaner.clean(session.volume.geometry.segments)  # goes on until nothing is gained
    assert session.cleaner.damaged == {segment}
    session.write(0, b"".join(content(5000 + n) for n in range(64)))
    session.checkpoint()
    assert not session.cleaner.damaged
    assert session.read(0, 100 * BLOCK) == b"".join(content(5000 + n if n < 64 else n) for n in range(100))


def test_a_volume_crowded_by_damage_says_so_and_can_be_trimmed() -> None:
    """Where every segment has a damaged block nothing can be cleaned: writing fails with ENOSPC, trimming works."""
    here = world()
    session = full_session(here)
    for lba in range(0, 4096, 8):
        damage(here, session, lba)

    def overwrite() -> None:
        for number in range(4096):
            session.write((number * 8 % 4096 + 1 + number // 512) * BLOCK, content(number))

    with pytest.raises(VolumeCrowded, match="damaged") as caught:
        overwrite()
    assert caught.value.errno == errno.ENOSPC
    assert session.fenced is None
    session.discard(0, 2048 * BLOCK)
    session.checkpoint()
    session.write(0, content(1))
    session.flush()
    assert session.read(0, BLOCK) == content(1)


def test_exporting_past_damage(tmp_path: Path) -> None:
    """Blocks and pages that cannot be read become zeros and are reported; unless asked to go on, the first ends it."""
    here = world()
    session = full_session(here)
    session.close()
    raw = damage(here, session, 100)
    refs = {index: ref for level, index, ref in session.volume.trees[Kind.F].interior_refs() if not level}
    page_raw = int.from_bytes(refs[3][:8], "little")
    target = tmp_path / "image"
    with target.open("w+b") as file:
        with pytest.raises(VolumeUnauthentic, match=f"logical block 100 .raw block {raw}."):
            bulk_export(here.open(), file.fileno(), workers=1)
        here.device.blocks[page_raw] = ZERO
        told: list[VolumeError] = []
        bulk_export(here.open(), file.fileno(), workers=1, damaged=told.append)
    assert [str(exc).split(" is not")[0] for exc in told] == [
        f"page 3 of level 0 of tree F (raw block {page_raw})",
        f"the data of logical block 100 (raw block {raw})",
    ]
    expected = [content(n) if n // 170 != 3 and n != 100 else ZERO for n in range(4096)]
    assert target.read_bytes() == b"".join(expected)


def test_the_identification_block_can_be_restored() -> None:
    """From the superblock, with the UUID that the owner knows."""
    here = world()
    session = here.create()
    session.write(0, content(1))
    session.close()
    before = here.device.blocks[0]
    here.device.blocks[0] = ZERO
    with pytest.raises(VolumeUnrecognised):
        here.open()
    with pytest.raises(VolumeUnauthentic):
        restore_identification(here.device, key=here.key, uuid=UUID(int=2), anchor=UNANCHORED)
    assert here.device.blocks[0] == ZERO
    assert here.broker.anchor is not None
    restore_identification(here.device, key=here.key, uuid=UUID1, anchor=here.broker.anchor)
    assert here.device.blocks[0] == before
    assert here.open().read(0, BLOCK) == content(1)
