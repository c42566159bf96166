"""A full volume never runs out of space, and costs what the document says (section 14)."""

import random

import pytest
from jd import World, content, world

from jindiskd.jindisk import cleaner
from jindiskd.jindisk.check import check_volume
from jindiskd.jindisk.geometry import BLOCK, default_geometry
from jindiskd.jindisk.session import Session

BLOCKS = 4096
COMPUTED = 7.2
"""Blocks written for each block of the guest, at U = 4096 / (64 · (76 − 7)): section 14.2."""


def filled(here: World) -> Session:
    session = here.create(default_geometry(BLOCKS))
    for lba in range(0, BLOCKS, 64):
        session.write(lba * BLOCK, b"".join(content(n) for n in range(lba, lba + 64)))
    session.flush()
    return session


@pytest.mark.parametrize("times", [2, pytest.param(10, marks=pytest.mark.long)])
def test_overwriting_a_full_volume_at_random(times: int) -> None:
    """No write fails, two segments stay free, and the cost is within a fifth of the computed one."""
    here, rng = world(default_geometry(BLOCKS)), random.Random(1)
    session = filled(here)
    now = {lba: content(lba) for lba in range(BLOCKS)}
    least, settled = len(session.appender.free), 0
    for number in range(BLOCKS * times):
        if number == BLOCKS:  # what the first writes met was not yet in disorder
            settled = session.appender.written_blocks
        lba = rng.randrange(BLOCKS)
        now[lba] = content(BLOCKS + number)
        session.write(lba * BLOCK, now[lba])
        least = min(least, len(session.appender.free))
        if number % 100 == 0:
            session.flush()
    assert least >= 2
    cost = (session.appender.written_blocks - settled) / (BLOCKS * (times - 1))
    assert COMPUTED * 0.8 < cost < COMPUTED * 1.2
    session.close()
    assert here.open().read(0, BLOCKS * BLOCK) == b"".join(now[lba] for lba in range(BLOCKS))
    assert not check_volume(here.open(), data=True).faults


@pytest.mark.parametrize("sessions", [200, pytest.param(1000, marks=pytest.mark.long)])
def test_sessions_that_end_in_crashes_use_nothing_up(sessions: int) -> None:
    """Each takes a segment for one block, and is stopped: what it left is found again."""
    here = world(default_geometry(BLOCKS))
    session = filled(here)
    used_slots, rng = None, random.Random(2)
    now = {lba: content(lba) for lba in range(BLOCKS)}
    for number in range(sessions):
        session = here.begin()
        lba = rng.randrange(BLOCKS)
        now[lba] = content(BLOCKS + number)
        session.write(lba * BLOCK, now[lba])
        session.flush()
        assert len(session.appender.free) >= 2
        if number == 10:
            used_slots = session.room.slots.free
    assert used_slots == session.room.slots.free
    session.close()
    assert here.open().read(0, BLOCKS * BLOCK) == b"".join(now[lba] for lba in range(BLOCKS))
    assert not check_volume(here.open(), data=True).faults


def test_trimming_makes_writing_cheap_again() -> None:
    """With half of the volume trimmed a write costs little more than itself."""
    here, rng = world(default_geometry(BLOCKS)), random.Random(3)
    session = filled(here)
    session.discard(0, BLOCKS // 2 * BLOCK)
    session.checkpoint()
    before = session.appender.written_blocks
    for number in range(BLOCKS * 2):
        session.write((BLOCKS // 2 + rng.randrange(BLOCKS // 2)) * BLOCK, content(number))
    assert (session.appender.written_blocks - before) / (BLOCKS * 2) < 1.4
    session.close()


def test_cleaning_when_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """It frees segments while few are free and some are mostly dead; then it has nothing to do. Nothing is lost."""
    here, rng = world(default_geometry(BLOCKS)), random.Random(5)
    session = filled(here)
    assert not session.idle()  # enough is free for a volume of this size
    kept = {lba for lba in range(BLOCKS) if rng.random() < 0.4}
    for lba in set(range(BLOCKS)) - kept:
        session.discard(lba * BLOCK, BLOCK)
    session.checkpoint()
    monkeypatch.setattr(cleaner, "BACKGROUND_SHARE", 2)  # "few" is below 38 segments, instead of 2
    free = len(session.appender.free)
    assert session.idle()
    assert len(session.appender.free) > free
    while session.idle():
        pass
    assert len(session.appender.free) >= 38
    session.close()
    assert here.open().read(0, BLOCKS * BLOCK) == b"".join(
        content(lba) if lba in kept else bytes(BLOCK) for lba in range(BLOCKS)
    )
    assert not check_volume(here.open(), data=True).faults
