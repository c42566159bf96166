"""What there is, put together from udev, kernel, helper and image store; and the one function that does it."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from jindiskd.base.secret import Secret
from jindiskd.device.registry import NOBODY, DeviceState, ImageVolume, device_id, views
from jindiskd.device.service import DeviceService, Permit
from jindiskd.device.watch import Seen
from jindiskd.errors import Busy, InvalidArgument, JindiskError, NotFound
from jindiskd.helper import mapped
from jindiskd.helper.mapped import Mapped
from jindiskd.helper.protocol import Answer, Below, Close, HelperFailed, Kind, Open, Serving

UUID, OTHER = "7c1d1f0a-5a0e-4bd5-9a3e-3b0c6a7f0a11", "11111111-2222-4333-8444-555555555555"
BELOW = Below(major=8, minor=3, sequence=5)
DISK = Seen(
    name="sda3", node="/dev/sda3", below=BELOW, size_bytes=1 << 30, read_only=False, kind="jindisk2", uuid=UUID,
    label="web", volume_bytes=1 << 29, partition_uuid=OTHER,
)  # fmt: skip
WEB = ImageVolume(image="web", image_id="id-web", kind="jindisk2", uuid=UUID, partition_uuid=OTHER)
OLD = ImageVolume(image="old", image_id="id-old", kind="jindisk1", uuid=OTHER, partition_uuid=OTHER)


def opened(*, read_only: bool = False, below: Below = BELOW, node: str = "nbd0") -> Mapped:
    request = Open(kind=Kind.JINDISK2, below=below, owner=1000, read_only=read_only, uuid=UUID)
    found = mapped.read_mark(node, mapped.nbd_mark(request), process=77)
    assert found is not None
    return found


def served(item: Mapped, *, alive: bool = True, fault: str = "") -> Serving:
    return Serving(node=item.node, mark=item.mark, alive=alive, fault=fault)


def test_a_closed_device():
    (view,) = views([DISK], [], [], [OLD, WEB]).values()
    assert (view.device_id, view.node, view.state, view.image) == ("8-3-5", "/dev/sda3", "closed", "web")
    assert (view.mapped_node, view.opened_by, view.read_only, view.fault) == ("", NOBODY, False, "")


@pytest.mark.parametrize(
    ("serving", "state"),
    [
        ([], "open"),
        ([served(opened())], "open"),
        ([served(opened(), alive=False)], "failed"),
        ([served(opened(), fault="the device failed")], "failed"),
        ([served(opened(node="nbd1"), alive=False)], "open"),
    ],
)
def test_an_open_device_is_as_well_as_its_server(serving, state):
    (view,) = views([DISK], [opened()], serving, [WEB]).values()
    assert (view.state, view.mapped_node, view.opened_by) == (state, "/dev/nbd0", 1000)
    assert bool(view.fault) == (state == "failed")


def test_a_device_that_was_taken_away_stays_the_same_object():
    """And another disk in its place, with the same numbers, is another one."""
    (lost,) = views([], [opened()], [], [WEB]).values()
    assert (lost.device_id, lost.state, lost.node, lost.image) == (device_id(BELOW), "lost", "", "web")
    later = replace(DISK, below=replace(BELOW, sequence=6))
    found = views([later], [opened()], [], [WEB])
    assert {view.device_id: view.state.value for view in found.values()} == {"8-3-6": "closed", "8-3-5": "lost"}


def test_matching_needs_the_kind_too_and_hidden_volumes_match_by_their_partition():
    (view,) = views([replace(DISK, kind="luks2")], [], [], [WEB, OLD]).values()
    assert view.image == ""
    (view,) = views([replace(DISK, kind="", uuid="")], [], [], [WEB, OLD]).values()
    assert (view.image, view.kind) == ("old", "jindisk1")
    (view,) = views([replace(DISK, kind="", uuid="", partition_uuid="")], [], [], [WEB, OLD]).values()
    assert (view.image, view.kind) == ("", "")
    (view,) = views([replace(DISK, uuid="")], [], [], [replace(WEB, uuid="")]).values()
    assert view.image == ""


# The service, with a kernel that the test plays


class World:
    """Everything that the service looks at."""

    def __init__(self) -> None:
        self.seen = [DISK]
        self.mapped: list[Mapped] = []
        self.volumes_ = [WEB]
        self.domain = ""
        self.asked: list[object] = []
        self.permits: list[tuple[bool, bool, str]] = []
        self.error: JindiskError | None = None
        self.busy = False
        self.told = 0
        self.gate: asyncio.Event | None = None
        self.given: list[Secret] = []
        self.service = DeviceService(
            self, self, running=lambda _id: self.domain, watch=lambda _changed: self,
            look_mapped=lambda: list(self.mapped),
        )  # fmt: skip
        self.service.subscribe(self._count)

    def _count(self) -> None:
        self.told += 1

    # Watch

    def start(self) -> None: ...

    def stop(self) -> None: ...

    def look(self):
        return list(self.seen)

    # Keys

    def volumes(self):
        return self.volumes_

    def permit(self, volume, *, read_only, key, who):
        if self.error is not None:
            raise self.error
        self.permits.append((read_only, key is not None, who))
        self.given.append(key or Secret(bytes(32)))
        return Permit(key=self.given[-1], anchor=bytes(73), session=b"" if read_only else bytes(32))

    # Helper

    async def open(self, request: Open, key: Secret) -> str:
        assert len(key) == 32
        self.asked.append(request)
        if self.gate is not None:
            await self.gate.wait()
        self.mapped.append(opened(read_only=request.read_only, below=request.below))
        return "nbd0"

    async def close(self, request: Close) -> None:
        self.asked.append(request)
        if self.busy:
            raise Busy("/dev/nbd0", "it is mounted")
        self.mapped = [item for item in self.mapped if (item.node, item.mark) != (request.node, request.mark)]

    async def serving(self):
        return [served(item) for item in self.mapped]


@pytest.fixture
async def world():
    found = World()
    await found.service.start()
    yield found
    await found.service.stop()


ID = device_id(BELOW)


async def test_open_and_close(world):
    assert await world.service.open(ID, key=None, read_only=False, owner=1000) == "/dev/nbd0"
    (view,) = world.service.views()
    assert (view.state, view.opened_by) == (DeviceState.OPEN, 1000)
    assert world.permits == [(False, False, "device /dev/sda3 of this host, opened by user 1000")]
    assert "open on this host as /dev/nbd0" in world.service.in_use("id-web")
    assert world.service.in_use("id-old") == ""
    assert len(world.given[0]) == 0  # wiped
    with pytest.raises(Busy):
        await world.service.open(ID, key=None, read_only=False, owner=0)
    await world.service.close(ID)
    (view,) = world.service.views()
    assert view.state is DeviceState.CLOSED
    with pytest.raises(NotFound):
        await world.service.close(ID)


async def test_reading_does_not_keep_guests_away(world):
    await world.service.open(ID, key=None, read_only=True, owner=0)
    assert world.service.in_use("id-web") == ""


async def test_a_domain_keeps_the_device_closed_and_an_opening_keeps_domains_away(world):
    world.domain = "web"
    with pytest.raises(Busy, match="domain 'web'"):
        await world.service.open(ID, key=None, read_only=True, owner=0)
    assert world.permits == []  # no key left
    world.domain, world.gate = "", asyncio.Event()
    opening = asyncio.ensure_future(world.service.open(ID, key=None, read_only=False, owner=0))
    while not world.asked:  # noqa: ASYNC110 - the event is in the object that is tested
        await asyncio.sleep(0)
    assert "is being opened" in world.service.in_use("id-web")
    with pytest.raises(Busy):
        await world.service.open(ID, key=None, read_only=False, owner=0)
    world.gate.set()
    await opening
    assert "is open on this host" in world.service.in_use("id-web")


async def test_a_refusal_of_the_key_store_leaves_nothing(world):
    world.error = Busy("the key", "waits for approval")
    with pytest.raises(Busy, match="approval"):
        await world.service.open(ID, key=None, read_only=False, owner=0)
    assert world.asked == []
    assert world.service.in_use("id-web") == ""


async def test_without_an_image_the_key_must_be_given(world):
    world.volumes_ = []
    await world.service.reconcile()
    with pytest.raises(InvalidArgument, match="--key-file"):
        await world.service.open(ID, key=None, read_only=False, owner=0)
    with Secret(bytes(32)) as key:
        await world.service.open(ID, key=key, read_only=False, owner=0)
    (request,) = world.asked
    assert (request.session, request.anchor) == (b"", b"")


async def test_another_copy_of_an_open_volume_stays_closed(world):
    world.seen.append(replace(DISK, node="/dev/sdb3", name="sdb3", below=Below(major=8, minor=19, sequence=9)))
    await world.service.open(ID, key=None, read_only=False, owner=0)
    with pytest.raises(Busy, match="another copy"):
        await world.service.open("8-19-9", key=None, read_only=True, owner=0)
    with pytest.raises(InvalidArgument, match="several"):
        world.service.find("web")
    assert world.service.find("/dev/sdb3").device_id == "8-19-9"


async def test_what_was_lost_is_closed_unless_it_is_in_use(world):
    """Mounted, it stays to be seen; then it goes by itself."""
    await world.service.open(ID, key=None, read_only=False, owner=0)
    world.seen, world.busy = [], True
    await world.service.reconcile()
    (view,) = world.service.views()
    assert (view.state, view.device_id) == (DeviceState.LOST, ID)
    assert world.service.find("/dev/nbd0") == view
    world.busy = False
    await world.service.reconcile()
    assert world.service.views() == []


async def test_a_restarted_service_knows_what_was_open(world):
    await world.service.open(ID, key=None, read_only=False, owner=1000)
    again = DeviceService(
        world, world, running=lambda _id: "", watch=lambda _changed: world, look_mapped=lambda: list(world.mapped)
    )
    await again.reconcile()
    assert again.views() == world.service.views()
    await again.close(ID)
    assert again.views()[0].state is DeviceState.CLOSED


async def test_without_events_the_service_runs_all_the_same(world):
    """In a container that may not listen, say."""

    def refuse() -> None:
        raise OSError(1, "Operation not permitted")

    world.start = refuse
    again = DeviceService(world, world, running=lambda _id: "", watch=lambda _changed: world)
    await again.start()
    assert [view.node for view in again.views()] == ["/dev/sda3"]
    await again.stop()


async def test_only_changes_are_told(world):
    before = world.told
    for _ in range(3):
        await world.service.reconcile()
    assert world.told == before
    world.seen = []
    world.service.poke()
    while world.told == before:  # noqa: ASYNC110 - as above
        await asyncio.sleep(0.01)
    assert world.service.views() == []


async def test_errors_of_the_helper_keep_their_code(world):
    async def refuse(_request, _key):
        raise HelperFailed(Answer(error="VolumeStale", exit_code=8, text="an old copy"))

    world.open = refuse
    with pytest.raises(HelperFailed, match="an old copy") as caught:
        await world.service.open(ID, key=None, read_only=False, owner=0)
    assert (caught.value.code, caught.value.exit_code) == ("VolumeStale", 8)
    assert world.service.in_use("id-web") == ""
