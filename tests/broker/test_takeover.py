"""Two guests on copies of one volume, as the agent opens it, with a real broker: one writes on, the other stops."""

import asyncio
import shutil
import uuid
from pathlib import Path

import brokerbench
import pytest
from brokerbench import IMAGE, Bench, bench

from jindiskd.base.anchor import Anchor
from jindiskd.base.secret import Secret
from jindiskd.guest.config import JindiskExpectation
from jindiskd.guest.jindisk_root import BrokerKeeper, open_session
from jindiskd.jindisk.create import create_volume
from jindiskd.jindisk.device import OpenFile
from jindiskd.jindisk.errors import VolumeFenced, VolumeStale
from jindiskd.jindisk.geometry import BLOCK, MIN_BLOCKS, default_geometry
from jindiskd.jindisk.served import ServedSession
from jindiskd.jindisk.session import Session
from jindiskd.keys.volumes import Volumes
from jindiskd.policy.rules import ReleaseRules
from jindiskd.sim.pki import SimulatedRoot

VOLUME = "33333333-3333-4333-8333-333333333333"
KEY = bytes(range(32))


class OverSocket:
    """The guest's broker, reached without AF_VSOCK."""

    def __init__(self, b: Bench) -> None:
        self._bench = b

    def client(self, _deadline_s: float) -> object:
        return self._bench.client()


def boot(b: Bench, disk: Path) -> Session:
    """What agent and storage process do: a release, then the volume opened and the session adopted."""
    grant = b.client().release("snp", f"default/{IMAGE}/root", VOLUME, b.evidence)
    keeper = BrokerKeeper(OverSocket(b), VOLUME, grant.session)
    return open_session(disk, JindiskExpectation(version=2, uuid=VOLUME), grant, keeper)


def fresh(disk: Path) -> Anchor:
    """A new, closed volume with one block written; the anchor of its builder."""
    geometry = default_geometry(MIN_BLOCKS)
    with disk.open("x+b") as file:
        file.truncate(geometry.end * BLOCK)
    with OpenFile(disk, writable=True) as device:
        session = create_volume(
            device, geometry=geometry, key=Secret(KEY), uuid=uuid.UUID(VOLUME), session_id=b"b" * 32
        )
        session.write(0, b"built" * 100)
        session.close()
    state = session.durable
    return Anchor(open=False, session=state.session, sequence=state.sequence, root=state.root)


async def test_a_second_guest_takes_over(
    root: SimulatedRoot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first one's next report is refused; from then on it writes nothing, and its disk is never accepted again."""
    monkeypatch.setattr(brokerbench, "KEY", KEY)
    one, two = tmp_path / "one.img", tmp_path / "two.img"
    async with bench(root, tmp_path) as b:
        volumes = Volumes(b.store)
        volumes.add(VOLUME, IMAGE, fresh(one))
        first = await asyncio.to_thread(boot, b, one)
        await asyncio.to_thread(first.tick)
        anchor = volumes.get(VOLUME).anchor
        assert anchor is not None
        assert (anchor.open, anchor.sequence) == (True, first.durable.sequence), "reported as soon as it was open"
        first.write(0, b"first" * 100)
        first.flush()
        shutil.copy(one, two)
        second = await asyncio.to_thread(boot, b, two)
        assert second.read(0, 500) == b"first" * 100
        second.write(0, b"second" * 100)
        second.flush()
        first.write(BLOCK, b"does not know yet")
        first.flush()
        first.reporter._interval_s = 0  # the minute has passed
        await asyncio.to_thread(first.tick)
        assert first.fenced
        assert "refuses" in first.fenced
        before = one.read_bytes()
        served = ServedSession(first)
        for attempt in (lambda: served.write(0, bytes(BLOCK)), served.flush, lambda: served.discard(0, 1 << 20)):
            with pytest.raises(OSError, match="VolumeFenced"):
                attempt()
        assert served.read(0, 500) == b"first" * 100
        with pytest.raises(VolumeFenced):
            served.close()
        assert one.read_bytes() == before
        await asyncio.to_thread(second.close)
        kinds = [row["kind"] for row in b.store.audit_rows()]
        assert kinds[-6:] == ["released", "adopted", "released", "adopted", "fenced", "closed"]
        with pytest.raises(VolumeStale):
            await asyncio.to_thread(boot, b, shutil.copy(one, tmp_path / "again.img"))
        third = await asyncio.to_thread(boot, b, shutil.copy(two, tmp_path / "third.img"))
        assert third.read(0, 600) == b"second" * 100


async def test_a_lease_ends_the_first_before_the_second_begins(
    root: SimulatedRoot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the lease runs nobody else is adopted; cut off from the broker, its holder stops by itself."""
    monkeypatch.setattr(brokerbench, "KEY", KEY)
    one = tmp_path / "one.img"
    async with bench(root, tmp_path) as b:
        Volumes(b.store).add(VOLUME, IMAGE, fresh(one))
        b.store.set_rules(IMAGE, ReleaseRules(lease_s=3600))
        first = await asyncio.to_thread(boot, b, one)
        await asyncio.to_thread(first.tick)
        first.write(0, b"first")
        first.flush()
        grant = await asyncio.to_thread(b.client().release, "snp", f"default/{IMAGE}/root", VOLUME, b.evidence)
        keeper = BrokerKeeper(OverSocket(b), VOLUME, grant.session)
        b_client = b.client
        monkeypatch.setattr(b, "client", lambda: b_client(within_s=1))
        with pytest.raises(Exception, match="LeaseHeld"):
            await asyncio.to_thread(keeper.adopt, first.durable, grant.session)
        later = first.reporter._monotonic() + 3601
        first.reporter._monotonic = lambda: later
        with pytest.raises(VolumeFenced, match="lease"):
            first.write(0, b"too late")
