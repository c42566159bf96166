"""Images with a JinDisk 1 root: asked for by name alone, for kernels that have the reference's module."""

import contextlib
import hashlib
import json
import os
import subprocess
from pathlib import Path

import pytest

from jindiskd.base.secret import Secret
from jindiskd.config import BadConfiguration, load
from jindiskd.image import gpt
from jindiskd.image.builder import build
from jindiskd.image.kmod import ModulesUnusable
from jindiskd.image.request import BaseKind, BuildTask, VolumeFormat
from jindiskd.jindisk.device import FileDevice
from jindiskd.jindisk.v1.check import check_volume
from jindiskd.jindisk.v1.export import bulk_export
from jindiskd.jindisk.v1.layout import required_bytes
from jindiskd.jindisk.v1.volume import open_volume

KEY = hashlib.sha256(b"a test key").digest()[:28]


@pytest.fixture(scope="module")
def built(with_module, request_for, tmp_path_factory):
    return make(with_module, request_for, tmp_path_factory.mktemp("built"))


def make(base: Path, request_for, staging: Path):
    task = BuildTask(
        request=request_for(format=VolumeFormat.JINDISK1, base_kind=BaseKind.ROOTFS),
        image_id="0b5c1f0e-7a63-4c39-9d0a-2d6a3c1f9e11",
        created="2026-01-02T03:04:05Z",
        broker_spki_sha256=bytes(32),
        staging=os.fspath(staging),
        workers=2,
    )
    with base.open("rb") as stream:
        return build(task, stream.fileno(), Secret(KEY), lambda _progress: None), staging


@contextlib.contextmanager
def opened(manifest, disk: Path):
    root = manifest.partitions[2]
    fd = os.open(disk, os.O_RDONLY)
    try:
        device = FileDevice(fd, name="root", offset_bytes=root.offset_bytes, size_bytes=root.size_bytes)
        yield open_volume(device, key=Secret(KEY))
    finally:
        os.close(fd)


def test_the_volume_holds_the_root(built, tmp_path, kit) -> None:
    """The checker is content, the module's rules included; the file system is sound and names its own device."""
    manifest, staging = built
    with opened(manifest, staging / "disk.img") as volume:
        report = check_volume(volume, data=True)
        assert report.findings == ()
        assert report.data_blocks > 500
        with (tmp_path / "plain").open("w+b") as out:
            bulk_export(volume, out.fileno(), workers=1)
    kit.run("e2fsck", "-fn", tmp_path / "plain")
    command = ["debugfs", "-R", "cat /etc/fstab", tmp_path / "plain"]
    fstab = subprocess.check_output(command, text=True, stderr=subprocess.DEVNULL)
    assert "\n/dev/mapper/root / ext4 " in f"\n{fstab}"


def test_what_describes_it(built) -> None:
    """Manifest, command line and measured configuration; the superblock that the guest will look for is the disk's."""
    manifest, staging = built
    volume, root = manifest.volume, manifest.partitions[2]
    assert (volume.format, volume.cipher, volume.header_bytes) == ("jindisk1", "aes-128-gcm", 148)
    assert any("whoever has the disk can read and change all of it" in change for change in manifest.changes)
    assert root.type_uuid == gpt.TYPE_JINDISK
    assert root.size_bytes >= required_bytes(1)
    assert (staging / "cmdline").read_text().startswith("root=/dev/mapper/root ro ")
    with (staging / "disk.img").open("rb") as disk:
        disk.seek(root.offset_bytes)
        assert volume.header_sha256 == hashlib.sha256(disk.read(148)).digest()
    archive = subprocess.check_output(["gzip", "-dc", staging / "initrd"])
    start = archive.index(b'{\n  "broker"')
    config = json.loads(archive[start : archive.index(b"\n}\n", start) + 2])
    assert config["root"]["jindisk1"] == {"superblock_sha256": volume.header_sha256.hex()}
    assert config["root"]["luks2"] is None
    assert config["root"]["jindisk"] is None
    assert [path.rpartition("/")[2] for path in config["modules"] if "dm" in path] == ["dm-mod.ko", "dm-jindisk.ko"]
    assert b"from jindiskd.guest.shutdown import main" in archive, "the mapping must be removed at the end"


def written_parts(path: Path) -> str:
    """A digest of where a sparse file has data, and of the data."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        end = 0
        while True:
            try:
                at = os.lseek(file.fileno(), end, os.SEEK_DATA)
            except OSError:
                return found.hexdigest()
            end = os.lseek(file.fileno(), at, os.SEEK_HOLE)
            found.update(f"{at} {end}".encode())
            file.seek(at)
            found.update(file.read(end - at))


def test_seeded_builds_are_identical(built, with_module, request_for, tmp_path) -> None:
    manifest, staging = built
    again, second = make(with_module, request_for, tmp_path)
    assert again == manifest
    for name in ("disk.img", "initrd"):
        assert written_parts(staging / name) == written_parts(second / name)


def test_a_base_without_the_module_is_refused(kit, request_for, tmp_path) -> None:
    (tmp_path / "root.tar").write_bytes(kit.make_tar(kit.tree_entries()))
    (tmp_path / "staging").mkdir()
    with pytest.raises(ModulesUnusable, match="dm_jindisk"):
        make(tmp_path / "root.tar", request_for, tmp_path / "staging")


def test_it_is_never_the_default(tmp_path) -> None:
    """The setting for new images does not take it."""
    (tmp_path / "jindiskd.toml").write_text('[images]\nformat = "jindisk1"\n')
    with pytest.raises(BadConfiguration, match="is not one of jindisk, luks2"):
        load(tmp_path / "jindiskd.toml")
