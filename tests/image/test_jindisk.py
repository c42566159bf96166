"""Images with a JinDisk 2 root: loaded whole, expected by the measured configuration, and remembered with their key."""

import contextlib
import hashlib
import json
import os
import subprocess
from pathlib import Path
from uuid import UUID

import pytest

from jindiskd.base.anchor import Anchor
from jindiskd.base.secret import Secret
from jindiskd.custody import KeyPort
from jindiskd.image import gpt
from jindiskd.image.request import BaseKind, VolumeFormat
from jindiskd.image.service import ImageService
from jindiskd.image.store import ImageStore
from jindiskd.jindisk.check import check_volume
from jindiskd.jindisk.device import FileDevice
from jindiskd.jindisk.errors import VolumeUnauthentic
from jindiskd.jindisk.export import bulk_export
from jindiskd.jindisk.geometry import required_bytes
from jindiskd.jindisk.volume import Volume, open_volume
from jindiskd.keys.store import KeyState, Store
from jindiskd.keys.volumes import Volumes

MIB = 1 << 20
CHANGED = {
    "/etc/fstab", "/etc/cloud/cloud.cfg.d/zz-jindiskd.cfg", "/etc/systemd/system/qemu-guest-agent.service",
}  # fmt: skip
JINDISK = {"format": VolumeFormat.JINDISK}


@contextlib.contextmanager
def opened(manifest, disk: Path, key: bytes):
    """The volume on an image's disk, in the state that the manifest names."""
    root = manifest.partitions[2]
    fd = os.open(disk, os.O_RDONLY)
    try:
        device = FileDevice(fd, name="root", offset_bytes=root.offset_bytes, size_bytes=root.size_bytes)
        anchor, uuid = Anchor.unpack(manifest.volume.anchor), UUID(manifest.volume.uuid)
        yield open_volume(device, key=Secret(key), uuid=uuid, anchor=anchor)
    finally:
        os.close(fd)


def exported(volume: Volume, target: Path) -> Path:
    with target.open("wb") as out:
        bulk_export(volume, out.fileno(), workers=1)
    return target


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def built(build_in, disk_image, tmp_path_factory):
    return build_in(tmp_path_factory.mktemp("built"), disk_image, **JINDISK)


def test_the_volume_holds_the_root(built, root_image, tmp_path, kit) -> None:
    """The checker finds no fault in the closed volume, and the root in it is sound and has the base's files."""
    manifest, staging = built
    anchor = Anchor.unpack(manifest.volume.anchor)
    assert not anchor.open
    with opened(manifest, staging / "disk.img", kit.KEY) as volume:
        assert volume.superblock.closed
        assert check_volume(volume, data=True).faults == ()
        plain = exported(volume, tmp_path / "plain")
        assert plain.stat().st_size == root_image.stat().st_size
    kit.run("e2fsck", "-fn", plain)
    before, after = kit.listing(root_image), kit.listing(plain)
    assert {path for path in before.keys() | after.keys() if before.get(path) != after.get(path)} == CHANGED
    fstab = subprocess.check_output(["debugfs", "-R", "cat /etc/fstab", plain], text=True, stderr=subprocess.DEVNULL)
    assert "\n/dev/nbd0 / ext4 rw,discard,errors=remount-ro 0 0\n" in f"\n{fstab}"
    with pytest.raises(VolumeUnauthentic), opened(manifest, staging / "disk.img", bytes(32)):
        pass


def test_what_describes_it(built, kit) -> None:
    """Manifest, partition table, command line and the guest's configuration name the same volume, and its room."""
    manifest, staging = built
    volume, root = manifest.volume, manifest.partitions[2]
    assert (volume.format, volume.cipher, volume.header_bytes) == ("jindisk", "aes-256-gcm", 0)
    assert (root.name, root.type_uuid) == ("jindisk-rootfs", gpt.TYPE_JINDISK)
    assert required_bytes(96 * MIB) <= root.size_bytes < required_bytes(96 * MIB) + MIB
    assert (staging / "cmdline").read_text().startswith("root=/dev/nbd0 ro ")
    archive = subprocess.check_output(["gzip", "-dc", staging / "initrd"])
    start = archive.index(b'{\n  "broker"')
    config = json.loads(archive[start : archive.index(b"\n}\n", start) + 2])
    assert config["root"]["jindisk"] == {"version": 2, "uuid": volume.uuid}
    assert config["root"]["luks2"] is None
    assert any(path.endswith("/nbd.ko") for path in config["modules"])
    with (staging / "disk.img").open("rb") as disk:
        disk.seek(root.offset_bytes)
        head = disk.read(32)
    assert head[:8] == b"JinDisk2"
    assert head[16:] == UUID(volume.uuid).bytes


def test_nothing_is_in_clear_and_holes_stay(built, kit) -> None:
    """No name, content or key in any file; what the base does not use takes no room."""
    manifest, staging = built
    traces = (b'NAME="Test"', b"discard,errors=remount-ro", b"binary-attribute", kit.KEY, kit.KEY.hex().encode())
    for path in staging.iterdir():
        content = path.read_bytes()
        for trace in traces:
            assert trace not in content, (path, trace)
    assert (staging / "disk.img").stat().st_blocks * 512 < manifest.disk_size_bytes // 2


def test_seeded_builds_are_identical(builder, built, disk_image) -> None:
    """The same seed gives every byte again; without one, volumes have nothing in common but what they hold."""
    manifest, staging = built
    again, second = builder(disk_image, **JINDISK)
    assert again == manifest
    assert digests(second) == digests(staging)
    unseeded, third = builder(disk_image, **JINDISK, seed=None)
    assert unseeded.volume.uuid != manifest.volume.uuid
    assert Anchor.unpack(unseeded.volume.anchor).session != Anchor.unpack(manifest.volume.anchor).session
    assert digests(third)["disk.img"] != digests(staging)["disk.img"]


def test_a_root_smaller_than_the_smallest_volume(builder, tmp_path, kit) -> None:
    """The volume is then as small as one can be, and the file system in it keeps its size."""
    path = tmp_path / "root.tar"
    path.write_bytes(kit.make_tar([(item, content) for item, content in kit.tree_entries()]))
    manifest, staging = builder(path, **JINDISK, base_kind=BaseKind.ROOTFS, size_bytes=12 * MIB)
    with opened(manifest, staging / "disk.img", kit.KEY) as volume:
        assert volume.size_bytes == 16 * MIB
        plain = exported(volume, tmp_path / "plain")
    kit.run("e2fsck", "-fn", plain)
    assert "Block count:              3072" in kit.run("dumpe2fs", "-h", plain)


class Crash(Exception):
    """The process ends here."""


async def test_key_and_first_state_become_known_together(request_for, disk_image, tmp_path, monkeypatch) -> None:
    """After a build the key store knows the manifest's anchor. When it ends before it can, the next start makes up."""
    images, keys = ImageStore(tmp_path / "images"), Store.open(f"sqlite:///{tmp_path}/keys.db", Secret(bytes(32)))
    service = ImageService(images, KeyPort(keys), broker_spki_sha256=bytes(32))
    volumes = Volumes(keys)
    fd = os.open(disk_image, os.O_RDONLY)
    insert, undo = Volumes._activated, ImageService._undo

    def fails(*arguments: object) -> None:
        insert(*arguments)
        raise Crash

    monkeypatch.setattr(Volumes, "_activated", fails)
    monkeypatch.setattr(ImageService, "_undo", lambda *_: None)
    with pytest.raises(Crash):
        await service.build(request_for(name="web", **JINDISK), fd, lambda _progress: None)
    # Neither of the two is there: they are one transaction.
    (record,) = keys.images()
    assert record.state is KeyState.PENDING
    assert volumes.list() == []
    monkeypatch.setattr(Volumes, "_activated", insert)
    monkeypatch.setattr(ImageService, "_undo", undo)
    for _ in range(2):
        await service.reconcile()
        manifest = (await service.get("web")).manifest
        assert keys.image(manifest.image_id).state is KeyState.ACTIVE
        (known,) = volumes.list()
        assert (known.volume, known.image_id) == (manifest.volume.uuid, manifest.image_id)
        assert known.anchor is not None
        assert known.anchor.pack() == manifest.volume.anchor
    other = await service.build(request_for(name="other", **JINDISK), fd, lambda _progress: None)
    assert {record.image_id for record in volumes.list()} == {manifest.image_id, other.image_id}
    await service.remove("web")
    assert [record.image_id for record in volumes.list()] == [other.image_id]
    os.close(fd)
    keys.close()
