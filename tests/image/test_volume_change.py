"""Data volumes that come and go: the image measures otherwise, its keys follow, all other disks stay as they are;
whatever is killed or cancelled, it has happened or it has not."""

import asyncio
import dataclasses
import os
import signal
import subprocess
import sys
from pathlib import Path
from uuid import UUID

import pytest

from jindiskd.base import document
from jindiskd.base.secret import Secret
from jindiskd.custody import KeyPort
from jindiskd.errors import AlreadyExists, Busy, InvalidArgument, NotFound, NotSupported
from jindiskd.guest import config as guest
from jindiskd.image import data_volumes, initrd, volume_change, volume_service
from jindiskd.image.cpio import Archive
from jindiskd.image.request import VolumeFormat, VolumeRequest
from jindiskd.image.service import ImageService
from jindiskd.image.store import ImageDamaged, ImageStore, verify
from jindiskd.jindisk.device import OpenFile
from jindiskd.jindisk.volume import open_volume
from jindiskd.keys.changes import Change, Changes
from jindiskd.keys.records import ReleaseRefused
from jindiskd.keys.registry import Registry
from jindiskd.keys.store import Requester, Store
from jindiskd.keys.volumes import Volumes
from jindiskd.luks2 import check

ROOT = Path(__file__).resolve().parents[2]
MIB = 1 << 20
DATA = VolumeRequest(name="data", size_bytes=16 * MIB, mount="/srv/data")
MORE = VolumeRequest(name="more", size_bytes=16 * MIB, mount="/srv/more")
LOGS = VolumeRequest(name="logs", size_bytes=16 * MIB, format=VolumeFormat.LUKS2)
WHO = Requester(peer="test")
LONG = pytest.mark.long


class Setting:
    """A service with its store and keys."""

    def __init__(self, folder: Path) -> None:
        self.images = ImageStore(folder / "images")
        self.keys = Store.open(f"sqlite:///{folder}/keys.db", Secret(bytes(32)))
        self.service = ImageService(self.images, KeyPort(self.keys), broker_spki_sha256=bytes(32))

    @property
    def image(self):
        return self.images.get("web")

    async def add(self, volume: VolumeRequest, progress=lambda _progress: None):
        return await self.service.volumes.add("web", volume, "user 7", progress)

    async def remove(self, name: str, progress=lambda _progress: None):
        return await self.service.volumes.remove("web", name, "user 7", progress)

    def config(self) -> guest.GuestConfig:
        entry = Archive.read((self.image.path / "initrd").read_bytes()).entries[guest.PATH]
        return document.load(guest.GuestConfig, entry.data, document="configuration")

    def state(self) -> tuple[object, ...]:
        """All that a change changes: files, manifest, keys and digests, and what is under way."""
        image = self.image
        record = self.keys.image(image.manifest.image_id)
        files = {path.name: path.stat().st_ino for path in image.path.iterdir() if path.name != "manifest.json"}
        resources = [key.resource for key in Registry(self.keys).keys(record.image_id)]
        return image.manifest, files, record.launch_digests, resources, Changes(self.keys).list(), self.left()

    def left(self) -> list[str]:
        return sorted(path.name for path in self.images.root.iterdir())

    def key(self, name: str) -> Secret:
        resource = f"default/{self.image.manifest.image_id}/{name}"
        return self.keys.release_to(self.image.manifest.image_id, WHO, resource=resource)


@pytest.fixture(scope="module")
def with_web(request_for, disk_image, tmp_path_factory) -> Path:
    """A store and keys with an image, `web`, which has a volume, `data`."""
    folder = tmp_path_factory.mktemp("with-volume")
    made = Setting(folder)

    async def build() -> None:
        with disk_image.open("rb") as base:
            request = request_for(name="web", seed=None, format=VolumeFormat.JINDISK, volumes=(DATA,))
            await made.service.build(request, base.fileno(), lambda _progress: None)

    asyncio.run(build())
    made.keys.close()
    return folder


@pytest.fixture
def having(with_web: Path, tmp_path: Path):
    """A copy of that."""
    subprocess.run(["cp", "-a", "--sparse=always", f"{with_web}/.", tmp_path], check=True)
    made = Setting(tmp_path)
    yield made
    made.keys.close()


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker's work in this process, which has put an initrd together before; other tests start the worker."""

    async def run(task, keys, files, progress) -> str:
        assert files == {}
        loop, names = asyncio.get_running_loop(), [task.added] if task.added else []

        def work() -> str:
            def tell(step) -> None:
                loop.call_soon_threadsafe(progress, step)

            with data_volumes.parted(keys["volumes"], names) as volume_keys:
                return volume_change.change(task, keys.get("source-key"), volume_keys, tell).name

        return await asyncio.to_thread(work)

    monkeypatch.setattr(volume_service, "run_worker", run)


@pytest.mark.usefixtures("here")
async def test_one_comes_and_goes(having) -> None:
    """Under a key of its own, allowed by the new digest alone; root, other volumes and their states are untouched."""
    before, old = having.image.manifest, having.state()
    seen = []
    changed = await having.add(MORE, seen.append)
    assert {progress.stage for progress in seen} == {"prepare", "boot", "encrypt", "finish"}, "the root is not read"
    image = having.image
    verify(image)
    after = image.manifest
    assert (changed.before, changed.after, changed.rules_measure) == (before, after, False)
    assert after == dataclasses.replace(
        before, initrd=after.initrd, launch_digest=after.launch_digest, volumes=(*before.volumes, after.volumes[1])
    )
    assert after.launch_digest != before.launch_digest
    record = having.keys.image(after.image_id)
    assert record.launch_digests == (after.launch_digest,)
    told = having.config()
    assert [one.name for one in told.volumes] == ["data", "more"]
    assert told.volumes[1].jindisk.uuid == after.volumes[1].volume.uuid
    assert (told.volumes[1].mount, after.volumes[1].mount) == ("/srv/more", "/srv/more")
    remembered = {one.volume: one for one in Volumes(having.keys).of_image(after.image_id)}
    assert len(remembered) == 3
    anchor = remembered[after.volumes[1].volume.uuid].anchor
    with OpenFile(image.path / "volume-more.img", writable=False) as device:
        opened = open_volume(device, key=having.key("more"), uuid=UUID(after.volumes[1].volume.uuid), anchor=anchor)
        assert opened.size_bytes == MORE.size_bytes
    inodes = having.state()[1]
    assert all(inodes[name] == old[1][name] for name in ("disk.img", "volume-data.img", "vmlinuz", "cmdline"))
    with pytest.raises(AlreadyExists):
        await having.add(MORE)
    await having.remove("data")
    assert [one.name for one in having.image.manifest.volumes] == ["more"]
    assert [one.name for one in having.config().volumes] == ["more"]
    assert not (image.path / "volume-data.img").exists()
    with pytest.raises(NotFound):
        having.key("data")
    assert len(Volumes(having.keys).of_image(after.image_id)) == 2
    assert having.keys.image(after.image_id).launch_digests == (having.image.manifest.launch_digest,)
    with pytest.raises(NotFound):
        await having.remove("data")
    rows = [row for row in having.keys.audit_rows() if row["kind"] == "volumes changed"]
    assert [row["peer"] for row in rows] == ["user 7"] * 2
    assert having.left() == ["web"]
    await having.service.clone("web", "copy", "user 7", lambda _progress: None)
    await having.service.remove("web")
    assert Changes(having.keys).list() == []


async def test_another_format_brings_its_modules(having) -> None:
    """They are read from the root, in its last known state; an initrd of them all, and the volume opens."""
    before = {entry.rpartition("/")[2] for entry in having.config().modules}
    assert "dm-crypt.ko" not in before
    seen = []
    await having.add(LOGS, seen.append)
    assert "decrypt" in {progress.stage for progress in seen}
    verify(having.image)
    archive = Archive.read((having.image.path / "initrd").read_bytes())
    modules = having.config().modules
    assert before < {entry.rpartition("/")[2] for entry in modules}
    assert any("dm-crypt" in entry for entry in modules)
    assert all(archive.entries[entry.removeprefix("/")].data for entry in modules)
    header = having.image.manifest.volumes[1].volume.header_bytes
    with (having.image.path / "volume-logs.img").open("rb") as disk:
        check.unlock(disk.read(header), having.key("logs")).close()
    rows = [row["kind"] for row in having.keys.audit_rows()]
    assert rows.count("root read") == 1
    assert having.left() == ["web"]


@pytest.mark.usefixtures("here")
async def test_what_cannot_be_changes_nothing(having) -> None:
    """Impossible volumes, a damaged image, a revoked key, a change under way, a digest that is not released to."""
    before = having.state()
    for wrong, kind in (
        (dataclasses.replace(MORE, size_bytes=1), InvalidArgument), (DATA, AlreadyExists),
        (dataclasses.replace(MORE, mount="/srv/data"), InvalidArgument),
    ):  # fmt: skip
        with pytest.raises(kind):
            await having.add(wrong)
    with pytest.raises(NotFound):
        await having.remove("none")
    initrd = having.image.path / "initrd"
    data = initrd.read_bytes()
    initrd.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    for work in (having.add(MORE), having.remove("data")):
        with pytest.raises(ImageDamaged, match="initrd"):
            await work
    initrd.write_bytes(data)
    assert having.state() == before
    changes, image_id = Changes(having.keys), having.image.manifest.image_id
    changes.begin(Change(image_id=image_id, removed=f"default/{image_id}/data"), None)
    with pytest.raises(Busy, match="not finished"):
        await having.add(MORE)
    changes.undo(image_id)
    changes.undo(image_id)
    with pytest.raises(NotFound):
        changes.begin(Change(image_id=image_id, removed=f"default/{image_id}/none"), None)
    having.keys.revoke(image_id)
    with pytest.raises(ReleaseRefused, match="revoked"):
        await having.add(MORE)
    having.keys.reinstate(image_id)
    assert having.state() == before


@pytest.mark.usefixtures("here")
async def test_a_key_store_that_fails_at_the_end_changes_nothing(having, monkeypatch) -> None:
    """The image is exchanged back."""
    before = having.state()

    def fail(*_arguments: object) -> bool:
        raise OSError(5, "no more")

    monkeypatch.setattr(Changes, "finish", fail)
    for work in (having.add(MORE), having.remove("data")):
        with pytest.raises(OSError, match="no more"):
            await work
        assert having.state() == before
        verify(having.image)


@pytest.mark.parametrize("stage", ["encrypt", pytest.param("prepare", marks=LONG)])
async def test_cancelling_changes_nothing(having, stage: str) -> None:
    """At each stage."""
    before = having.state()
    reached = asyncio.Event()
    task = asyncio.create_task(having.add(MORE, lambda p: reached.set() if p.stage == stage else None))
    await asyncio.wait_for(reached.wait(), 300)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert having.state() == before


@pytest.mark.usefixtures("here")
async def test_cancelling_too_late_is_no_cancelling(having, monkeypatch) -> None:
    """Once the image is exchanged, the work ends as if nothing had been said."""
    loop, finish = asyncio.get_running_loop(), Changes.finish

    def late(*arguments: object) -> bool:
        loop.call_soon_threadsafe(task.cancel)
        asyncio.run_coroutine_threadsafe(asyncio.sleep(0), loop).result(60)
        return finish(*arguments)

    monkeypatch.setattr(Changes, "finish", late)
    task = asyncio.create_task(having.remove("data"))
    changed = await task
    assert changed.after.volumes == ()
    assert having.image.manifest == changed.after
    assert Changes(having.keys).list() == []


PROGRAM = """
import asyncio, os, signal, sys
from pathlib import Path
sys.path.insert(0, {root!r})
from jindiskd.custody import KeyPort
from jindiskd.base.secret import Secret
from jindiskd.image.request import VolumeRequest
from jindiskd.image.service import ImageService
from jindiskd.image.store import ImageStore
from jindiskd.keys.changes import Changes
from jindiskd.keys.store import Store
folder, verb, stage = sys.argv[1:]
die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
if stage == "begun":
    begin = Changes.begin
    Changes.begin = lambda *given: (begin(*given), die())
if stage == "made":
    ImageStore.replace = die
if stage == "exchanged":
    Changes.finish = die
if stage == "finished":
    finish = Changes.finish
    Changes.finish = lambda *given: (finish(*given), die())
service = ImageService(ImageStore(Path(folder) / "images"), KeyPort(Store.open(f"sqlite:///{{folder}}/keys.db",
                       Secret(bytes(32)))), broker_spki_sha256=bytes(32))
look = lambda p: die() if p.stage == stage else None
if verb == "add":
    work = service.volumes.add("web", VolumeRequest(name="more", size_bytes=16 << 20, mount="/srv/more"), "t", look)
else:
    work = service.volumes.remove("web", "data", "t", look)
asyncio.run(work)
"""


KILLS = [
    ("add", "encrypt"), ("add", "exchanged"), ("remove", "exchanged"),
    *(pytest.param("add", stage, marks=LONG) for stage in ("begun", "prepare", "made", "finished")),
    *(pytest.param("remove", stage, marks=LONG) for stage in ("begun", "prepare", "boot", "made", "finished")),
]  # fmt: skip


@pytest.mark.parametrize(("verb", "stage"), KILLS)
async def test_a_killed_service_has_changed_all_or_nothing(having, tmp_path, verb: str, stage: str) -> None:
    """The next start finishes what the exchange decided, and takes back the rest."""
    before = having.state()
    argv = [sys.executable, "-c", PROGRAM.format(root=str(ROOT)), tmp_path, verb, stage]
    done = await asyncio.to_thread(subprocess.run, argv, check=False, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    async with asyncio.timeout(300):
        while having.left() != ["web"]:  # the worker ends when it notices; its directory is locked until then
            await having.service.reconcile()
            await asyncio.sleep(0.1)
    await having.service.reconcile()
    verify(having.image)
    if stage not in {"exchanged", "finished"}:
        assert having.state() == before
        return
    names = {"add": ["data", "more"], "remove": []}[verb]
    manifest = having.image.manifest
    assert [volume.name for volume in manifest.volumes] == names
    _, _, digests, resources, under_way, _ = having.state()
    assert digests == (manifest.launch_digest,) != before[2]
    assert resources == [volume.resource for volume in manifest.volumes]
    assert under_way == []
    assert len(Volumes(having.keys).of_image(manifest.image_id)) == 1 + len(names)


async def test_no_key_is_in_arguments_or_files(having, capfd) -> None:
    """Of the root or of the new volume, while the one is read to make the other."""
    lines = []

    def look(_progress) -> None:
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                line = (entry / "cmdline").read_bytes()
                if b"jindiskd.image.worker" in line:
                    lines.append(line + (entry / "environ").read_bytes())
            except OSError:
                continue

    await having.add(LOGS, look)
    secrets = [bytes(having.key(name).reveal()) for name in ("root", "logs")]
    assert lines
    said = "".join(capfd.readouterr()).encode() + b"".join(lines)
    for path in having.image.path.iterdir():
        if path.stat().st_size < 64 * MIB:
            said += path.read_bytes()
    for key in secrets:
        assert key not in said
        assert key.hex().encode() not in said


def test_changes_of_another_service_stay(having) -> None:
    """On a key store of several, an image that is not here is another's."""
    image_id = having.image.manifest.image_id
    changes = Changes(having.keys)
    changes.begin(Change(image_id=image_id, added=f"default/{image_id}/x"), Secret(bytes(32)))
    elsewhere = ImageService(ImageStore(Path(os.fspath(having.images.root)) / "other"), KeyPort(having.keys),
                             broker_spki_sha256=bytes(32))  # fmt: skip
    asyncio.run(elsewhere.volumes.settle({}))
    assert [change.image_id for change in changes.list()] == [image_id]
    asyncio.run(having.service.reconcile())
    assert changes.list() == []
    with pytest.raises(NotFound):
        having.key("x")


@pytest.mark.long
async def test_an_image_whose_keys_a_program_gives(request_for, disk_image, tmp_path) -> None:
    """It keeps the program, and is given volumes that the program can open alone."""
    program = tmp_path / "program"
    program.write_text("#!/bin/true")
    made = Setting(tmp_path)
    with disk_image.open("rb") as base:
        request = request_for(name="web", seed=None, key_program=str(program))
        await made.service.build(request, base.fileno(), lambda _progress: None)
    before = made.state()
    with pytest.raises(NotSupported, match="a program gives"):
        await made.add(MORE)
    assert made.state() == before
    await made.add(LOGS)
    assert made.config().key_program
    archive = Archive.read((made.image.path / "initrd").read_bytes())
    assert archive.entries[initrd.KEY_PROGRAM].data == program.read_bytes()
    made.keys.close()
