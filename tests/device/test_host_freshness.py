"""A volume opened on the host is a session like a guest's: the key store's word and the disk never part.

Real key store, real worker, real engine; the kernel's end of the connection is the test's.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import devicevolumes
import pytest

from jindiskd.base.anchor import Anchor, State
from jindiskd.base.platform import Platform
from jindiskd.base.secret import Secret
from jindiskd.device.registry import ImageVolume
from jindiskd.device.service import Permit
from jindiskd.device.states import StatesListener
from jindiskd.devices import OwnersVolumes, SessionStates, StoredVolumes
from jindiskd.errors import NotSupported
from jindiskd.helper import states, worker
from jindiskd.helper.protocol import Below, Kind, Open
from jindiskd.jindisk.anchor import UNANCHORED
from jindiskd.jindisk.device import OpenFile
from jindiskd.jindisk.errors import VolumeFenced, VolumeStale
from jindiskd.jindisk.volume import Volume, anchor_of, open_volume
from jindiskd.keys.store import ApprovalWaiting, ReleaseRefused, Store
from jindiskd.keys.volumes import Volumes
from jindiskd.policy.rules import ReleaseRules

IMAGE = "11111111-1111-4111-8111-111111111111"
WEB = ImageVolume(image="web", image_id=IMAGE, kind="jindisk2", uuid=devicevolumes.UUID)
BELOW = Below(major=7, minor=0, sequence=1)
WHO = "device /dev/loop0 of this host, opened by user 1000"


def images() -> SimpleNamespace:
    """An image store with one image."""
    volume = SimpleNamespace(format="jindisk", uuid=devicevolumes.UUID, header_sha256=b"")
    manifest = SimpleNamespace(
        name="web", image_id=IMAGE, partitions=(), volume=volume, volumes=(), platform=Platform.SIMULATED_SNP
    )
    return SimpleNamespace(list=lambda: [SimpleNamespace(manifest=manifest)])


class Host:
    """The disk, the key store, and the service's side of it."""

    def __init__(self, folder: Path) -> None:
        self.disk = devicevolumes.make_jindisk2(folder / "disk", 16 << 20)
        self.store = Store.open(f"sqlite:///{folder}/keys.db", Secret.random(32))
        self.store.add_image(IMAGE, "web", Platform.SIMULATED_SNP, f"default/{IMAGE}/root", Secret(devicevolumes.KEY))
        with self.volume(UNANCHORED) as found:
            anchor = Anchor.unpack(anchor_of(found.state, still_open=False).pack())
        self.volumes = Volumes(self.store)
        self.volumes.add(devicevolumes.UUID, IMAGE, anchor)
        self.store.activate(IMAGE, [bytes(48)])
        self.keys = StoredVolumes(images(), self.store)
        self.path = folder / "states"
        self.listener: StatesListener | None = None

    @property
    def anchor(self) -> Anchor:
        found = self.volumes.get(devicevolumes.UUID).anchor
        assert found is not None
        return found

    @contextlib.contextmanager
    def volume(self, anchor, path: Path | None = None) -> Iterator[Volume]:
        """As the next guest opens it."""
        with OpenFile(path or self.disk, writable=False) as device:
            key = Secret(devicevolumes.KEY)
            yield open_volume(device, key=key, uuid=uuid.UUID(devicevolumes.UUID), anchor=anchor)

    def wait_for_report(self, before: int) -> None:
        """A session's own first state is reported soon after it was adopted."""
        end_s = time.monotonic() + 300
        while self.anchor.sequence == before:
            assert time.monotonic() < end_s
            time.sleep(0.05)

    def block(self, at: int, path: Path | None = None) -> bytes:
        """Read a block of what the key store's anchor accepts."""
        with self.volume(Anchor.unpack(self.anchor.pack()), path) as volume:
            return volume.read(at, 4096)

    def listen(self) -> None:
        self.listener = StatesListener(self.path, SessionStates(self.store).tell)
        self.listener.start()

    async def close_listener(self) -> None:
        assert self.listener is not None
        await self.listener.stop()

    def kinds(self) -> list[str]:
        return [row["kind"] for row in self.store.audit_rows()]

    def permit(self, *, read_only: bool = False, key: Secret | None = None) -> Permit:
        (web,) = self.keys.volumes()
        return self.keys.permit(web, read_only=read_only, key=key, who=WHO)


@pytest.fixture
def folder() -> Iterator[Path]:
    """Every user reaches it: a worker is nobody."""
    with tempfile.TemporaryDirectory(prefix="jindisk-states-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.fixture
async def host(folder) -> Iterator[Host]:
    if os.geteuid() != 0:
        pytest.skip("workers give up the rights of root: run the tests as root")
    found = Host(folder)
    found.listen()
    yield found
    await found.close_listener()
    found.store.close()


class Opened:
    """A worker on the disk, begun."""

    def __init__(self, host: Host, permit: Permit, *, read_only: bool = False) -> None:
        asked = Open(
            kind=Kind.JINDISK2, below=BELOW, owner=0, read_only=read_only, uuid=devicevolumes.UUID,
            anchor=permit.anchor, session=permit.session, lease_s=permit.lease_s,
        )  # fmt: skip
        fd = os.open(host.disk, os.O_RDONLY if read_only else os.O_RDWR)
        key = permit.key

        def body(parent) -> None:
            worker.serve(asked, fd, key, "the disk", host.path, parent)

        self.process, self.parent = worker.start(body, worker.User(uid=65534, gid=65534))
        os.close(fd)
        key.close()
        self.parent.settimeout(120)
        self.said, fds = worker.hear(self.parent)
        if fds:
            self.kernel = devicevolumes.Kernel(fds[0])
            self.parent.send(worker.GO)

    def write(self, at: int, data: bytes) -> None:
        assert self.kernel.ask(1, at, data=data) == (0, b"")
        assert self.kernel.ask(3) == (0, b"")

    def close(self) -> int:
        """As the kernel lets go; the exit status."""
        if self.said.failed is None:
            self.kernel.stream.close()
        self.parent.close()
        return os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1])


async def opened(host: Host, permit: Permit, **how) -> Opened:
    return await asyncio.to_thread(Opened, host, permit, **how)


async def test_what_was_written_here_is_the_latest_state_and_the_disk_of_before_an_old_one(host):
    """The next guest finds its disk in the state that it is told; a copy of before is refused."""
    before = host.disk.with_name("before")
    shutil.copy(host.disk, before)
    sequence = host.anchor.sequence
    volume = await opened(host, host.permit())
    assert volume.said.failed is None
    assert host.anchor.open
    await asyncio.to_thread(volume.write, 8192, b"w" * 4096)
    assert await asyncio.to_thread(volume.close) == 0
    assert (host.anchor.open, host.anchor.sequence > sequence) == (False, True)
    assert host.block(8192) == b"w" * 4096
    with pytest.raises(VolumeStale):
        host.block(0, before)
    kinds = host.kinds()
    assert kinds[-3:] == ["released", "adopted", "closed"]
    released = next(row for row in host.store.audit_rows() if row["kind"] == "released")
    assert released["peer"] == WHO
    assert released["simulated"]


async def test_an_approval_is_for_whom_it_was_asked(host):
    """Another user who opens the volume meanwhile waits for one of his own."""
    host.store.set_rules(IMAGE, ReleaseRules(approval=True))
    with pytest.raises(ApprovalWaiting) as waits:
        host.permit()
    host.store.approvals.grant(waits.value.number)
    (web,) = host.keys.volumes()
    for read_only in (False, True):
        with pytest.raises(ApprovalWaiting):
            host.keys.permit(web, read_only=read_only, key=None, who=WHO.replace("1000", "1001"))
    host.permit().key.close()


async def test_reading_changes_nothing(host):
    """Neither the disk nor what is remembered; but that the key left is written down."""
    disk, anchor = host.disk.read_bytes(), host.anchor
    volume = await opened(host, host.permit(read_only=True), read_only=True)
    assert (await asyncio.to_thread(volume.kernel.ask, 0, 0, 4096))[0] == 0
    assert await asyncio.to_thread(volume.close) == 0
    assert (host.disk.read_bytes(), host.anchor) == (disk, anchor)
    assert host.kinds()[-1] == "released"


async def test_a_key_of_the_callers_is_no_way_round_the_state(host):
    """An old disk is refused with it too, for reading and for writing, and the owner learns of it."""
    old = host.disk.read_bytes()
    volume = await opened(host, host.permit())
    await asyncio.to_thread(volume.write, 0, b"1" * 4096)
    await asyncio.to_thread(volume.close)
    host.disk.write_bytes(old)
    for read_only in (True, False):
        permit = host.permit(read_only=read_only, key=Secret(devicevolumes.KEY))
        volume = await opened(host, permit, read_only=read_only)
        assert volume.said.failed is not None
        assert volume.said.failed.error == "VolumeStale"
        await asyncio.to_thread(volume.close)
    assert host.kinds()[-1] == "refused"
    assert host.disk.read_bytes() == old


async def test_a_killed_server_loses_nothing_that_was_flushed(host):
    """As a guest that loses power: the next session goes on from the latest state of this one."""
    volume = await opened(host, host.permit())
    await asyncio.to_thread(volume.write, 4096, b"k" * 4096)
    os.kill(volume.process, signal.SIGKILL)
    assert await asyncio.to_thread(volume.close) == -signal.SIGKILL
    assert host.anchor.open
    assert host.block(4096) == b"k" * 4096
    again = await opened(host, host.permit())
    assert (await asyncio.to_thread(again.kernel.ask, 0, 4096, 4096))[1] == b"k" * 4096
    assert await asyncio.to_thread(again.close) == 0
    assert not host.anchor.open


async def test_a_service_that_was_restarted_meanwhile_hears_of_the_end(host):
    volume = await opened(host, host.permit())
    await asyncio.to_thread(volume.write, 0, b"r" * 4096)
    await host.close_listener()
    closing = asyncio.create_task(asyncio.to_thread(volume.close))
    await asyncio.sleep(0.5)
    assert not closing.done()  # it goes on trying
    host.listen()
    assert await closing == 0
    assert not host.anchor.open
    assert host.block(0) == b"r" * 4096


async def test_a_newer_session_fences_this_one(host):
    """A guest elsewhere, say: what this one has not yet written is not written."""
    before = host.anchor.sequence
    volume = await opened(host, host.permit())
    await asyncio.to_thread(host.wait_for_report, before)
    grant = host.permit()
    theirs = states.ServiceKeeper(devicevolumes.UUID, grant.session, host.path)
    kept = host.anchor
    state = State(session=kept.session, sequence=kept.sequence, root=kept.root)
    await asyncio.to_thread(theirs.adopt, state, grant.session)
    grant.key.close()
    assert await asyncio.to_thread(volume.close) != 0
    assert host.anchor.session == grant.session
    with pytest.raises(VolumeFenced):
        await asyncio.to_thread(states.ServiceKeeper(devicevolumes.UUID, bytes(32), host.path).report, state)


async def test_a_revoked_key_opens_nothing(host):
    host.store.revoke(IMAGE)
    for read_only in (True, False):
        with pytest.raises(ReleaseRefused):
            host.permit(read_only=read_only)


async def test_hostile_packets_change_nothing(host):
    """Whoever may speak at all gets no further without a session."""
    anchor = host.anchor
    for packet in (b"", b"x", b"close", b"close {}", b"adopt " + b"{" * 4000, b"release {}", b"report " + bytes(5000)):
        keeper = states.ServiceKeeper(devicevolumes.UUID, bytes(32), host.path)
        try:
            assert await asyncio.to_thread(keeper._ask, packet) in {b"", states.FENCED}, packet
        except OSError:
            pass
    assert host.anchor == anchor


def test_the_owners_volumes_are_not_written_here():
    """Where the broker is elsewhere, it would refuse the disk afterwards."""
    keys = OwnersVolumes(images())
    assert [volume.image for volume in keys.volumes()] == ["web"]
    with Secret(bytes(32)) as key:
        with pytest.raises(NotSupported, match="--read-only"):
            keys.permit(WEB, read_only=False, key=key, who=WHO)
        assert keys.permit(WEB, read_only=True, key=key, who=WHO).key == key
    with pytest.raises(NotSupported, match="--key-file"):
        keys.permit(WEB, read_only=True, key=None, who=WHO)
