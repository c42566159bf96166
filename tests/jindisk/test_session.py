"""What a session does when things go wrong below it or above it, and that what is written is exact."""

import errno
import os
import random
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from jd import KEY, UUID1, ZERO, Audit, Broker, MemoryDevice, World, content, world

from jindiskd.base.anchor import State
from jindiskd.base.secret import Secret
from jindiskd.errors import InvalidArgument
from jindiskd.jindisk.anchor import UNANCHORED, Reporting
from jindiskd.jindisk.check import check_volume
from jindiskd.jindisk.create import create_volume
from jindiskd.jindisk.device import FileDevice
from jindiskd.jindisk.errors import (
    VolumeDeviceFailed,
    VolumeFenced,
    VolumeReadOnly,
)
from jindiskd.jindisk.geometry import BLOCK, default_geometry
from jindiskd.jindisk.session import Session
from jindiskd.jindisk.slots import Slots
from jindiskd.jindisk.tree import ref_raw
from jindiskd.jindisk.volume import open_volume


class Failing(MemoryDevice):
    """A device whose writes and barriers can be made to fail."""

    def __init__(self, size_bytes: int, blocks: dict[int, bytes] | None = None) -> None:
        super().__init__(size_bytes, blocks)
        self.refuse: Callable[[int], bool] = lambda _raw: False
        self.refuse_flush = False
        self.writes = 0

    def pwrite(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        if self.refuse(offset // BLOCK):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.writes += 1
        super().pwrite(offset, data)

    def flush(self) -> None:
        if self.refuse_flush:
            raise OSError(errno.EIO, os.strerror(errno.EIO))


def failing(audit: Audit | None = None) -> tuple[World, Failing, Session]:
    here = world(audit=audit)
    here.create().close()
    device = Failing(here.device.size_bytes, here.device.blocks)
    here.device = device
    return here, device, here.begin()


def refuse_data(session: Session) -> Callable[[int], bool]:
    start = session.volume.geometry.data_start
    return lambda raw: raw >= start


def test_refused_data_are_kept_and_written_later(audit: Audit) -> None:
    """The store is full for a while: flushes fail, nothing is acknowledged, lost, fenced, or sealed twice."""
    here, device, session = failing(audit)
    session.write(0, content(1))
    session.flush()
    durable, free = session.durable, len(session.appender.free)
    device.refuse = refuse_data(session)
    session.write(BLOCK, content(2))
    session.write(2 * BLOCK, content(3))
    session.write(3 * BLOCK, content(4))
    for _ in range(100):
        with pytest.raises(VolumeDeviceFailed, match="writing data") as caught:
            session.flush()
        assert caught.value.errno == errno.ENOSPC
    assert session.durable == durable
    assert session.fenced is None
    assert len(session.appender.free) == free
    session.write(2 * BLOCK, content(5))  # newer than what was refused
    session.discard(3 * BLOCK, BLOCK)
    assert session.read(0, 4 * BLOCK) == content(1) + content(2) + content(5) + ZERO
    device.refuse = lambda _raw: False
    session.flush()
    expected = content(1) + content(2) + content(5) + ZERO
    assert here.fork().begin().read(0, 4 * BLOCK) == expected
    session.close()
    assert here.open().read(0, 4 * BLOCK) == expected
    assert not check_volume(here.open(), data=True).faults


def test_what_waits_for_a_full_store_is_bounded() -> None:
    """Writes are refused before they fill the memory; none of those is visible."""
    _, device, session = failing()
    device.refuse = refuse_data(session)
    refused = []
    for lba in range(600):
        try:
            session.write(lba * BLOCK, content(lba))
        except VolumeDeviceFailed:
            refused.append(lba)
    assert len(session.volume.pending) <= 256
    assert len(refused) > 300
    assert session.read(refused[-1] * BLOCK, BLOCK) == ZERO
    device.refuse = lambda _raw: False
    session.close()


@pytest.mark.parametrize("what", ["journal", "barrier", "page", "superblock", "closing"])
def test_a_failure_that_leaves_the_disk_unknown_fences(what: str) -> None:
    """After it nothing is written or acknowledged any more; reading goes on; reopening gives what was acknowledged."""
    here, device, session = failing()
    geometry = session.volume.geometry
    session.write(0, content(1))
    session.flush()
    session.write(0, content(2))
    if what == "barrier":
        device.refuse_flush = True
    else:
        ranges = {"journal": (8, geometry.meta_start), "page": (geometry.meta_start, geometry.meta_end)}
        low, high = ranges.get(what, (1, 3))
        device.refuse = lambda raw: low <= raw < high
    with pytest.raises(VolumeDeviceFailed):
        {"closing": session.close, "journal": session.flush, "barrier": session.flush}.get(what, session.checkpoint)()
    assert session.fenced
    device.refuse, device.refuse_flush = lambda _raw: False, False
    writes = device.writes
    calls = (session.flush, session.close, session.checkpoint, session.idle, lambda: session.write(0, content(3)))
    for attempt in calls:
        with pytest.raises(VolumeFenced, match="not written any more"):
            attempt()
    session.tick()
    assert device.writes == writes
    assert session.read(0, BLOCK) == content(2)
    assert here.begin().read(0, BLOCK) in {content(1), content(2)}


def test_any_exception_within_a_commit_fences(monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupted commit must not be taken for a written one by the next flush."""
    _, _, session = failing()

    def interrupted(_log: object) -> None:
        raise KeyboardInterrupt

    session.write(0, content(1))
    monkeypatch.setattr(session, "_write_commit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        session.flush()
    with pytest.raises(VolumeFenced):
        session.flush()


class Moody(Broker):
    """A broker that sometimes does not answer."""

    silent = False
    reports: list[int]

    def _follow(self, state: State, still_open: bool) -> None:
        if self.silent:
            raise TimeoutError("no answer")
        super()._follow(state, still_open)
        self.reports = [*getattr(self, "reports", []), state.sequence]


def test_a_close_without_an_answer_can_be_repeated() -> None:
    """The volume is closed and not written again; only the message is sent again."""
    here = world()
    here.broker = broker = Moody()
    session = here.create()
    session.write(0, content(1))
    broker.silent = True
    with pytest.raises(TimeoutError):
        session.close()
    before = dict(here.device.blocks)
    with pytest.raises(VolumeFenced):
        session.write(0, content(2))
    broker.silent = False
    session.close()
    session.close()
    assert before == here.device.blocks
    assert broker.anchor is not None
    assert not broker.anchor.open
    assert here.open().read(0, BLOCK) == content(1)


def test_with_commit_reporting_nothing_unreported_is_acknowledged() -> None:
    """Commits by checkpoints included; a broker that does not answer ends the session."""
    here = world()
    here.create().close()
    moody = Moody()
    moody.__dict__.update(here.broker.__dict__)
    here.broker = moody
    session = here.begin(reporting=Reporting.COMMIT)
    session.write(0, content(1))
    session.checkpoint()  # as a write may do that needs room
    session.flush()
    assert moody.anchor is not None
    assert moody.anchor.sequence == session.durable.sequence
    reports = len(moody.reports)
    session.flush()
    assert len(moody.reports) == reports, "nothing new, nothing to tell"
    session.write(0, content(2))
    moody.silent = True
    with pytest.raises(VolumeFenced, match="no answer"):
        session.flush()
    with pytest.raises(VolumeFenced):
        session.flush()


def test_interval_and_lease_follow_the_clock() -> None:
    """A report comes at once, then after an interval with a commit in it; silence past the lease fences."""
    now = [0.0]
    here = world()
    here.create().close()
    moody = Moody()
    moody.__dict__.update(here.broker.__dict__)
    here.broker = moody
    session = here.begin(monotonic=lambda: now[0], interval_s=10.0, lease_s=100.0)
    session.tick()
    assert moody.reports == [session.durable.sequence]  # that of the first checkpoint
    session.write(0, content(1))
    session.flush()
    now[0] = 9.0
    session.tick()
    assert len(moody.reports) == 1, "not yet"
    now[0] = 11.0
    session.tick()
    assert moody.reports[1:] == [session.durable.sequence]
    now[0] = 40.0
    session.tick()
    assert len(moody.reports) == 2, "nothing new"
    moody.silent = True
    session.write(0, content(2))
    session.flush()
    now[0] = 110.0
    session.tick()
    session.flush()
    now[0] = 112.0
    with pytest.raises(VolumeFenced, match="lease"):
        session.flush()
    assert session.read(0, BLOCK) == content(2)


@pytest.mark.parametrize("reporting", Reporting)
@pytest.mark.parametrize("lease_s", [15.0, 300.0])
def test_a_session_that_writes_nothing_keeps_its_lease(lease_s: float, reporting: Reporting) -> None:
    """It says the same again in time, be the lease shorter or longer than the interval, whenever else it reports."""
    now = [0.0]
    here = world()
    here.create().close()
    session = here.begin(monotonic=lambda: now[0], interval_s=60.0, lease_s=lease_s, reporting=reporting)
    for second in range(1000):
        now[0] = float(second)
        session.tick()
    session.write(0, content(1))
    session.flush()
    assert session.fenced is None


@pytest.mark.parametrize("reporting", [Reporting.CLOSE, Reporting.COMMIT])
def test_without_a_lease_only_what_the_policy_says_is_told(reporting: Reporting) -> None:
    """The clock alone makes no reports."""
    now = [0.0]
    here = world()
    here.create().close()
    moody = Moody()
    moody.__dict__.update(here.broker.__dict__)
    here.broker = moody
    session = here.begin(monotonic=lambda: now[0], interval_s=10.0, reporting=reporting)
    session.write(0, content(1))
    session.flush()
    reports = len(getattr(moody, "reports", []))
    session.write(0, content(2))
    session.checkpoint()
    now[0] = 1000.0
    session.tick()
    assert len(getattr(moody, "reports", [])) == reports
    assert (reports > 0) == (reporting is Reporting.COMMIT)


def test_a_lease_that_runs_out_during_a_commit_is_noticed_before_it_is_acknowledged() -> None:
    """The barrier may take longer than the lease: by then another guest may have begun."""
    now = [0.0]
    here, device, _ = failing()
    session = here.begin(monotonic=lambda: now[0], lease_s=10.0)
    session.write(0, content(1))
    session.flush()

    def slow() -> None:
        now[0] += 6.0

    device.flush = slow  # type: ignore[method-assign]  # this device's alone
    session.write(0, content(2))
    session.flush()
    session.write(0, content(3))
    with pytest.raises(VolumeFenced, match="lease"):
        session.flush()


def test_nothing_is_accepted_once_the_closing_checkpoint_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """From then on the blocks that this process would write to may be another's."""
    session = world().create()
    checkpoint = session.checkpoint

    def watched(*, closing: bool = False) -> None:
        checkpoint(closing=closing)
        with pytest.raises(VolumeFenced, match="closed"):
            session.write(0, content(1))

    monkeypatch.setattr(session, "checkpoint", watched)
    session.close()


def test_a_session_that_has_not_begun_writes_nothing() -> None:
    here = world()
    here.create().close()
    before = dict(here.device.blocks)
    session = Session(here.open(), session_id=bytes(32))
    for attempt in (session.flush, session.close, session.checkpoint, lambda: session.write(0, content(1))):
        with pytest.raises(VolumeReadOnly):
            attempt()
    assert here.device.blocks == before


def test_zeroing_and_trimming_are_exact() -> None:
    """Parts of blocks, single blocks, whole leaves of the map; in one commit; what is not within stays."""
    here, rng = world(), random.Random(3)
    session = here.create()
    model = bytearray(rng.randbytes(700 * BLOCK))
    session.write(0, bytes(model))
    for offset, length in [(100, 50), (4000, 200), (8192, 4096), (12_000, 9_000), (170 * BLOCK - 5, 345 * BLOCK + 77)]:
        session.zero(offset, length)
        model[offset : offset + length] = bytes(length)
    for offset, length in [(20 * BLOCK + 1, 3 * BLOCK), (40 * BLOCK, BLOCK), (50 * BLOCK + 1, 4095)]:
        session.discard(offset, length)
        first, last = -(-offset // BLOCK) * BLOCK, (offset + length) // BLOCK * BLOCK
        model[first:last] = bytes(max(0, last - first))
    session.zero(5, 0)
    assert session.read(0, len(model)) == bytes(model)
    commits = session.sequence
    session.flush()
    assert session.sequence == commits + 1
    assert here.fork().begin().read(0, len(model)) == bytes(model)
    session.close()
    assert here.open().read(0, len(model)) == bytes(model)
    assert not check_volume(here.open(), data=True).faults
    with pytest.raises(InvalidArgument):
        session.zero(session.size_bytes - 1, 2)


def test_threads_share_a_session(tmp_path: Path, audit: Audit) -> None:
    """Writers, readers, flushes, cleaning and reports at once; every block is its writer's last, reopened too."""
    geometry, path = default_geometry(4096), tmp_path / "volume"
    broker = Broker()
    _, sid = broker.release()
    with path.open("w+b") as file:
        file.truncate(geometry.end * BLOCK)
        device = FileDevice(file.fileno(), name="volume")
        session = create_volume(device, geometry=geometry, key=Secret(KEY), uuid=UUID1, session_id=sid, keeper=broker)
        broker.first(session.durable)
        failures: list[BaseException] = []
        last: dict[int, bytes] = {}

        def write(number: int) -> None:
            rng = random.Random(number)
            try:
                for step in range(400):
                    lba = number + 4 * rng.randrange(1024)
                    last[lba] = content(number * 100_000 + step)
                    session.write(lba * BLOCK, last[lba])
                    if step % 20 == 0:
                        session.flush()
                    if step % 50 == 0:
                        session.tick()
                        session.idle()
                    assert session.read(lba * BLOCK, BLOCK) == last[lba]
            except BaseException as exc:
                failures.append(exc)
                raise

        threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(300)
        assert not failures
        session.close()
        volume = open_volume(device, key=Secret(KEY), uuid=UUID1, anchor=broker.anchor or UNANCHORED)
        expected = b"".join(last.get(lba, ZERO) for lba in range(4096))
        assert volume.read(0, 4096 * BLOCK) == expected
        assert not check_volume(volume, data=True).faults


def test_page_slots_are_found_as_the_trees_name_them() -> None:
    """Neighbours at once, and one by one; what marks one twice or outside marks nothing."""
    here = world()
    session = here.create()
    for lba in range(0, 4096, 13):
        session.write(lba * BLOCK, content(lba))
    session.checkpoint()
    for tree in session.volume.trees.values():
        singly = {(level, index): ref_raw(ref) for level, index, ref in tree.interior_refs()}
        rows = {
            (level, index): raw
            for level, first, raws in tree.page_raws()
            for index, raw in enumerate(raws, first)
            if raw
        }
        assert rows == singly
    slots = Slots(session.volume.geometry)
    start, free = session.volume.geometry.meta_start, slots.free
    assert slots.mark_all((start, 0, 0, start + 5))
    assert slots.free == free - 2
    for wrong in ((start + 1, start + 5), (start + 1, start + 1), (start + 1, start - 1), (start + 1, start + free)):
        assert not slots.mark_all(wrong)
    assert slots.free == free - 2
    slots.mark(start + 1, "a page")
