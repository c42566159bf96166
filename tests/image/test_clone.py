"""Clones: the same system under other keys; nothing of one opens the other, and nothing half done is left."""

import asyncio
import contextlib
import dataclasses
import hashlib
import signal
import subprocess
import sys
from pathlib import Path
from uuid import UUID

import pytest

from jindiskd.base import document
from jindiskd.base.anchor import Anchor
from jindiskd.base.secret import Secret
from jindiskd.custody import KeyPort
from jindiskd.errors import AlreadyExists, InvalidArgument, NotFound
from jindiskd.guest import config as guest
from jindiskd.image.cpio import Archive
from jindiskd.image.request import BaseKind, VolumeFormat
from jindiskd.image.service import ImageService
from jindiskd.image.store import ImageDamaged, ImageStore, verify
from jindiskd.jindisk.device import FileDevice
from jindiskd.jindisk.errors import VolumeStale, VolumeUnauthentic
from jindiskd.jindisk.export import bulk_export
from jindiskd.jindisk.session import Session
from jindiskd.jindisk.v1.export import bulk_export as bulk_export1
from jindiskd.jindisk.v1.volume import open_volume as open_volume1
from jindiskd.jindisk.volume import open_volume
from jindiskd.kbs.freshness import VolumeState
from jindiskd.keys.audit import Requester
from jindiskd.keys.store import KeyState, ReleaseRefused, Store
from jindiskd.keys.volumes import Volumes
from jindiskd.luks2 import check, xts
from jindiskd.policy.rules import ReleaseRules

ROOT = Path(__file__).resolve().parents[2]
BLOCK = 4096
ASKING = Requester(peer="test")
FORMATS = [VolumeFormat.JINDISK, VolumeFormat.LUKS2, VolumeFormat.JINDISK1]


class Setting:
    """A service with its store and keys."""

    def __init__(self, folder: Path) -> None:
        self.images = ImageStore(folder / "images")
        self.keys = Store.open(f"sqlite:///{folder}/keys.db", Secret(bytes(32)))
        self.service = ImageService(self.images, KeyPort(self.keys), broker_spki_sha256=b"b" * 32)

    async def built(self, request, disk: Path):
        with disk.open("rb") as base:
            return await self.service.build(request, base.fileno(), lambda _progress: None)

    async def clone(self, source: str, name: str, progress=lambda _progress: None):
        return await self.service.clone(source, name, "user 7", progress)

    def key(self, manifest) -> bytes:
        released = self.keys.release(manifest.image_id, peer="test", measurement=b"", simulated=True)
        return bytes(released.reveal())

    def left(self) -> list[str]:
        return sorted(path.name for path in self.images.root.iterdir())

    def states(self) -> dict[str, KeyState]:
        return {record.name: record.state for record in self.keys.images()}


class Remembering:
    """Tells the key store what a session does, as the broker would."""

    def __init__(self, volumes: Volumes, volume: str, session: bytes) -> None:
        self._volumes, self._volume, self._session = volumes, volume, session

    def _state(self, state) -> VolumeState:
        return VolumeState(volume=self._volume, session=self._session, sequence=state.sequence, root=state.root)

    def adopt(self, state, _session: bytes) -> None:
        self._volumes.adopt(self._state(state), ASKING)

    def report(self, state) -> None:
        self._volumes.report(self._state(state))

    def close(self, state) -> None:
        self._volumes.close(self._state(state), ASKING)


@pytest.fixture
def setting(tmp_path):
    made = Setting(tmp_path)
    yield made
    made.keys.close()


@pytest.fixture(scope="module")
def with_web(request_for, disk_image, tmp_path_factory) -> Path:
    """A store and keys with an image, `web`."""
    folder = tmp_path_factory.mktemp("with-web")
    made = Setting(folder)
    asyncio.run(made.built(request_for(name="web", seed=None, format=VolumeFormat.JINDISK), disk_image))
    made.keys.close()
    return folder


@pytest.fixture
def having(with_web: Path, tmp_path: Path):
    """A copy of that."""
    subprocess.run(["cp", "-a", "--sparse=always", f"{with_web}/.", tmp_path], check=True)
    made = Setting(tmp_path)
    yield made
    made.keys.close()


def config_of(image) -> guest.GuestConfig:
    entry = Archive.read((image.path / "initrd").read_bytes()).entries[guest.PATH]
    return document.load(guest.GuestConfig, entry.data, document="configuration")


def clear_of(image, key: bytes, target: Path, anchor: bytes = b"") -> bytes:
    """Digest of the root in clear, by the engine's own export or by hand."""
    manifest = image.manifest
    root = manifest.partitions[2]
    with image.disk.open("rb") as disk, target.open("w+b") as out:
        if manifest.volume.format == "luks2":
            disk.seek(root.offset_bytes)
            header = disk.read(manifest.volume.header_bytes)
            volume_key = check.unlock(header, Secret(key))
            with volume_key:
                for at in range(0, check.parse(header).data_bytes, BLOCK):
                    disk.seek(root.offset_bytes + len(header) + at)
                    data = disk.read(BLOCK)
                    if any(data):
                        out.seek(at)
                        out.write(
                            xts.decrypt(volume_key.reveal(), data, sector_bytes=BLOCK, first_tweak=at // 512, step=8)
                        )
        elif manifest.volume.format == "jindisk1":
            device = FileDevice(disk.fileno(), name="root", offset_bytes=root.offset_bytes, size_bytes=root.size_bytes)
            bulk_export1(open_volume1(device, key=Secret(key)), out.fileno(), workers=1)
        else:
            device = FileDevice(disk.fileno(), name="root", offset_bytes=root.offset_bytes, size_bytes=root.size_bytes)
            known = Anchor.unpack(anchor or manifest.volume.anchor)
            volume = open_volume(device, key=Secret(key), uuid=UUID(manifest.volume.uuid), anchor=known)
            bulk_export(volume, out.fileno(), workers=1)
    return hashlib.sha256(target.read_bytes()).digest()


@pytest.mark.parametrize("form", FORMATS)
async def test_a_clone_is_the_same_system_under_other_keys(
    setting, request_for, disk_image, with_module, tmp_path, kit, form: VolumeFormat
) -> None:
    """Same kernel and files in the root; other identity, key, digest and initrd, and no block of cipher text alike."""
    base, more = (with_module, {"base_kind": BaseKind.ROOTFS}) if form is VolumeFormat.JINDISK1 else (disk_image, {})
    source = await setting.built(request_for(name="web", seed=None, format=form, **more), base)
    rules = ReleaseRules(releases_per_guest=3)
    setting.keys.set_rules(source.image_id, rules)
    seen = []
    made = await setting.clone("web", "copy", seen.append)
    assert {progress.stage for progress in seen} == {"prepare", "decrypt", "boot", "encrypt", "finish"}
    one, two = setting.images.get("web"), setting.images.get("copy")
    assert two.manifest == made
    verify(two)
    assert (made.name, made.clone_of, made.kernel, made.cmdline) == (
        "copy", source.image_id, source.kernel, source.cmdline,
    )  # fmt: skip
    for name in ("image_id", "resource", "launch_digest", "initrd"):
        assert getattr(made, name) != getattr(source, name), name
    assert made.shape == source.shape
    record = setting.keys.image(made.image_id)
    assert (record.state, record.launch_digests, record.resource) == (
        KeyState.ACTIVE, (made.launch_digest,), made.resource,
    )  # fmt: skip
    assert record.rules == rules
    keys = setting.key(source), setting.key(made)
    assert keys[0] != keys[1]
    config = config_of(two)
    assert (config.image_id, config.root.resource) == (made.image_id, made.resource)
    assert config.broker.spki_sha256 == b"b" * 32
    old = config_of(one)
    same = dataclasses.replace(config, image_id=old.image_id, root=old.root)
    assert same == old
    # JinDisk 1 keeps its indexes in clear, which are alike where the data are in the same places.
    cipher = [
        {data for data in blocks(image.disk, image.manifest.partitions[2]) if any(data)} for image in (one, two)
    ]
    assert len(cipher[0]) > 100
    assert form is VolumeFormat.JINDISK1 or not cipher[0] & cipher[1]
    rows = [row for row in setting.keys.audit_rows() if row["kind"] == "cloned"]
    assert [(row["image_id"], row["peer"]) for row in rows] == [(source.image_id, "user 7")]
    assert clear_of(one, keys[0], tmp_path / "one") == clear_of(two, keys[1], tmp_path / "two")
    kit.run("e2fsck", "-fn", tmp_path / "two")
    with pytest.raises((VolumeUnauthentic, check.WrongKey)):
        clear_of(two, keys[0], tmp_path / "three")
    if form is VolumeFormat.JINDISK:
        [volume] = Volumes(setting.keys).of_image(made.image_id)
        assert volume.volume == made.volume.uuid != source.volume.uuid
        assert volume.anchor is not None
        assert volume.anchor.pack() == made.volume.anchor


def blocks(disk: Path, part):
    """The blocks of a partition."""
    with disk.open("rb") as stream:
        stream.seek(part.offset_bytes)
        for _ in range(part.size_bytes // BLOCK):
            yield stream.read(BLOCK)


async def test_what_a_guest_wrote_is_in_the_clone_and_an_old_disk_is_not_cloned(having, tmp_path) -> None:
    """The state that the broker remembers last is what is cloned; the disk of before is refused."""
    setting = having
    image = setting.images.get("web")
    source = image.manifest
    before = image.disk.read_bytes()
    volumes, uuid = Volumes(setting.keys), source.volume.uuid
    grant = volumes.release(uuid, source.image_id, ASKING)
    root = source.partitions[2]
    with image.disk.open("r+b") as disk:
        device = FileDevice(disk.fileno(), name="root", offset_bytes=root.offset_bytes, size_bytes=root.size_bytes)
        known = Anchor.unpack(source.volume.anchor)
        volume = open_volume(device, key=grant.key, uuid=UUID(uuid), anchor=known)
        session = Session(volume, session_id=grant.session, keeper=Remembering(volumes, uuid, grant.session))
        session.begin()
        session.write(volume.size_bytes - BLOCK, b"written by a guest".ljust(BLOCK, b"."))
        session.close()
    made = await setting.clone("web", "copy")
    clear_of(setting.images.get("copy"), setting.key(made), tmp_path / "clear")
    assert (tmp_path / "clear").read_bytes()[-BLOCK:].startswith(b"written by a guest.")
    image.disk.write_bytes(before)
    with pytest.raises(VolumeStale):
        await setting.clone("web", "older")
    assert setting.left() == ["copy", "web"]
    assert setting.states() == {"copy": KeyState.ACTIVE, "web": KeyState.ACTIVE}


async def test_what_cannot_be_cloned_is_refused_and_leaves_nothing(having) -> None:
    """Taken and impossible names, no source, a revoked or foreign key, a changed boot file or initrd."""
    setting = having
    source = setting.images.get("web").manifest
    for name, kind in (("web", AlreadyExists), ("../x", InvalidArgument)):
        with pytest.raises(kind):
            await setting.clone("web", name)
    with pytest.raises(NotFound):
        await setting.clone("none", "x")
    image = setting.images.get("web")
    for file in ("initrd", "cmdline", "vmlinuz"):
        data = (image.path / file).read_bytes()
        (image.path / file).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        with pytest.raises(ImageDamaged, match=file):
            await setting.clone("web", "x")
        (image.path / file).write_bytes(data)
    # Somebody changes the files and the manifest too: the key store knows what its key is released to.
    (image.path / "cmdline").write_bytes(b"other words")
    entry = dataclasses.replace(
        source.cmdline, size_bytes=11, sha256=hashlib.sha256(b"other words").digest()
    )
    (image.path / "manifest.json").write_bytes(document.dump(dataclasses.replace(source, cmdline=entry)))
    with pytest.raises(ImageDamaged, match="to which its key is not released"):
        await setting.clone("web", "x")
    setting.keys.revoke(source.image_id)
    with pytest.raises(ReleaseRefused, match="revoked"):
        await setting.clone("web", "x")
    setting.keys.forget(source.image_id)
    with pytest.raises(NotFound):
        await setting.clone("web", "x")
    assert (setting.left(), setting.states()) == (["web"], {})


@pytest.mark.parametrize("stage", ["decrypt", "encrypt"])
async def test_cancelling_a_clone_leaves_nothing(having, stage: str) -> None:
    """At each stage: no file and no key of it; the source as it was."""
    setting = having
    reached = asyncio.Event()
    task = asyncio.create_task(setting.clone("web", "x", lambda p: reached.set() if p.stage == stage else None))
    await asyncio.wait_for(reached.wait(), 300)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (setting.left(), setting.states()) == (["web"], {"web": KeyState.ACTIVE})


PROGRAM = """
import asyncio, os, signal, sys
from pathlib import Path
sys.path.insert(0, {root!r})
from jindiskd.custody import KeyPort
from jindiskd.base.secret import Secret
from jindiskd.image.service import ImageService
from jindiskd.image.store import ImageStore
from jindiskd.keys.store import Store
folder, stage = sys.argv[1:]
die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
if stage == "committed":
    Store.activate = die
service = ImageService(ImageStore(Path(folder) / "images"), KeyPort(Store.open(f"sqlite:///{{folder}}/keys.db",
                       Secret(bytes(32)))), broker_spki_sha256=bytes(32))
asyncio.run(service.clone("web", "x", "test", lambda p: die() if p.stage == stage else None))
"""


@pytest.mark.parametrize("stage", ["encrypt", "committed"])
async def test_a_killed_service_leaves_half_of_no_clone(having, tmp_path, stage: str) -> None:
    """The next start finishes what was renamed and clears the rest."""
    setting = having
    argv = [sys.executable, "-c", PROGRAM.format(root=str(ROOT)), tmp_path, stage]
    done = await asyncio.to_thread(subprocess.run, argv, check=False, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert setting.states() == {"web": KeyState.ACTIVE, "x": KeyState.PENDING}
    visible = ["web", "x"] if stage == "committed" else ["web"]
    async with asyncio.timeout(300):
        while setting.left() != visible:  # the worker ends when it notices; its directory is locked until then
            await setting.service.reconcile()
            await asyncio.sleep(0.1)
    await setting.service.reconcile()
    assert setting.states() == dict.fromkeys(visible, KeyState.ACTIVE)


async def test_no_key_is_in_what_a_clone_leaves(having, capfd) -> None:
    """Neither key is in a file of the store, in arguments or in output."""
    setting = having
    source = setting.images.get("web").manifest
    lines = []

    def look(_progress) -> None:
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                line = (entry / "cmdline").read_bytes()
                if b"jindiskd.image.worker" in line:
                    lines.append(line + (entry / "environ").read_bytes())

    made = await setting.clone("web", "copy", look)
    out, err = capfd.readouterr()
    texts = [*lines, out.encode(), err.encode()]
    texts += [path.read_bytes() for path in setting.images.root.rglob("*") if path.is_file()]
    assert any(b"--source-key" in line for line in lines)
    for key in (setting.key(source), setting.key(made)):
        for form in (key, key.hex().encode()):
            assert not any(form in text for text in texts)
