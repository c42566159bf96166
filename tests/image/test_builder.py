"""A whole build: what comes out has the right shape, opens with the key only, and holds exactly the base's files."""

import hashlib
import itertools
import json
import os
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from jindiskd.attest.measure import LaunchInputs, snp_launch_digest
from jindiskd.base.secret import Secret
from jindiskd.errors import InvalidArgument
from jindiskd.guest.config import GuestConfig
from jindiskd.image.debugfs import FileSystemNotWritten
from jindiskd.image.ext4 import read_superblock, used_ranges
from jindiskd.image.request import BaseKind
from jindiskd.image.sparse import copy_ranges
from jindiskd.luks2 import check

MIB = 1 << 20
ROOT = Path(__file__).resolve().parent.parent.parent
DEBIAN = ROOT / "build/base/debian.img"
CHANGED = {
    "/etc/fstab", "/etc/cloud/cloud.cfg.d/zz-jindiskd.cfg", "/etc/systemd/system/qemu-guest-agent.service",
}  # fmt: skip


def decrypted(manifest, staging: Path, target: Path, key: bytes) -> Path:
    """The root file system by a path of its own: header from the disk, then sector by sector, tweak = LBA of 512."""
    root = manifest.partitions[2]
    with (staging / "disk.img").open("rb") as disk:
        disk.seek(root.offset_bytes)
        header = disk.read(manifest.volume.header_bytes)
        assert hashlib.sha256(header).digest() == manifest.volume.header_sha256
        volume_key = bytes(check.unlock(header, Secret(key)).reveal())
        size = int(json.loads(header[4096:16384].rstrip(b"\0"))["segments"]["0"]["size"])
        with target.open("wb") as out:
            out.truncate(size)
            for number in range(size // 4096):
                sector = disk.read(4096)
                if sector.strip(b"\0"):
                    tweak = struct.pack("<QQ", number * 8, 0)
                    context = Cipher(algorithms.AES(volume_key), modes.XTS(tweak)).decryptor()
                    out.seek(number * 4096)
                    out.write(context.update(sector))
    return target


def files_of(folder: Path) -> dict[str, str]:
    """Every file of a folder by name, with its digest."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_disk_becomes_an_encrypted_image(builder, disk_image, root_image, tmp_path, kit) -> None:
    """Opened by an independent path, the root is sound and differs from the base in the recorded changes alone."""
    seen = []
    manifest, staging = builder(disk_image, seen.append)
    assert {path.name for path in staging.iterdir()} == {"disk.img", "vmlinuz", "initrd", "cmdline", "manifest.json"}
    plain = decrypted(manifest, staging, tmp_path / "plain", kit.KEY)
    kit.run("e2fsck", "-fn", plain)
    before, after = kit.listing(root_image), kit.listing(plain)
    assert len(before) > 50
    assert {path for path in before.keys() | after.keys() if before.get(path) != after.get(path)} == CHANGED
    assert {change.partition(":")[0] for change in manifest.changes} == CHANGED
    assert [part.name for part in manifest.partitions] == ["boot", "UEFI", "jindisk-rootfs"]
    assert manifest.base_sha256 == hashlib.sha256(disk_image.read_bytes()).digest()
    assert (manifest.distribution, manifest.kernel_release) == ("Test Linux 1", kit.RELEASES[1])
    assert [p.stage for p in seen if p.fraction == 1.0] == ["read", "encrypt"]
    assert list(dict.fromkeys(p.stage for p in seen)) == ["read", "prepare", "boot", "encrypt", "finish"]


def test_amended_files_keep_what_they_were(built, tmp_path, kit) -> None:
    """fstab keeps owner, mode and attributes; nothing outside the root is mounted; cloud-init gets no data source."""
    manifest, staging = built
    plain = decrypted(manifest, staging, tmp_path / "plain", kit.KEY)

    def ask(command: str) -> str:
        return subprocess.check_output(["debugfs", "-R", command, plain], text=True, stderr=subprocess.DEVNULL)

    fstab = kit.listing(plain)["/etc/fstab"]
    assert fstab.startswith("100640")
    assert "User:     3   Group:     4" in fstab
    assert 'user.note (4) = "kept"' in fstab
    active = [line for line in ask("cat /etc/fstab").splitlines() if not line.startswith("#")]
    assert active == [
        "/dev/mapper/root / ext4 rw,discard,errors=remount-ro 0 0",
        "tmpfs /tmp tmpfs nosuid 0 0",
    ]
    assert ask("cat /etc/cloud/cloud.cfg.d/zz-jindiskd.cfg").endswith("datasource_list: [ None ]\n")


def test_partition_table_satisfies_sfdisk(builder, disk_image, kit) -> None:
    """sfdisk reads the table as the manifest tells it, and finds no fault; both copies are there."""
    manifest, staging = builder(disk_image)
    disk = staging / "disk.img"
    said = kit.run("sfdisk", "--verify", disk)
    assert "No errors detected" in said
    table = json.loads(kit.run("sfdisk", "--json", disk))["partitiontable"]
    assert table["label"] == "gpt"
    assert table["sectorsize"] == 512
    found = [
        (p["name"], p["uuid"].lower(), p["type"].lower(), p["start"] * 512, p["size"] * 512)
        for p in table["partitions"]
    ]
    assert found == [(p.name, p.uuid, p.type_uuid, p.offset_bytes, p.size_bytes) for p in manifest.partitions]
    assert disk.stat().st_size == manifest.disk_size_bytes
    with disk.open("r+b") as stream:  # the second copy alone is enough
        stream.seek(512)
        stream.write(bytes(512))
    again = json.loads(kit.run("sfdisk", "--json", disk))["partitiontable"]["partitions"]
    assert [p["uuid"] for p in again] == [p["uuid"] for p in table["partitions"]]


def test_clear_partitions_hold_what_is_started(built, tmp_path, kit) -> None:
    """The boot partition is sound ext4 with the three boot files, the UEFI partition sound FAT."""
    manifest, staging = built
    parts = []
    for part in manifest.partitions[:2]:
        path = tmp_path / part.name
        with (staging / "disk.img").open("rb") as disk:
            disk.seek(part.offset_bytes)
            path.write_bytes(disk.read(part.size_bytes))
        parts.append(path)
    kit.run("e2fsck", "-fn", parts[0])
    for name in ("vmlinuz", "initrd", "cmdline"):
        inside = subprocess.check_output(["debugfs", "-R", f"cat /{name}", parts[0]], stderr=subprocess.DEVNULL)
        assert inside == (staging / name).read_bytes()
    kit.run("fsck.vfat", "-n", parts[1])
    assert "BOOT" in kit.run("mdir", "-i", parts[1], "::/EFI")


def test_measurement_is_of_the_files_that_were_built(built, kit) -> None:
    """Recomputing the launch digest from the store's files gives the manifest's; the guest's configuration pins all."""
    manifest, staging = built
    inputs = LaunchInputs(
        firmware=Path(manifest.shape.firmware), kernel=staging / "vmlinuz", initrd=staging / "initrd",
        cmdline=(staging / "cmdline").read_text(), vcpus=2, cpu_model="EPYC-v4",
    )  # fmt: skip
    assert snp_launch_digest(inputs) == manifest.launch_digest
    for entry in (manifest.kernel, manifest.initrd, manifest.cmdline):
        content = (staging / entry.file).read_bytes()
        assert (len(content), hashlib.sha256(content).digest()) == (entry.size_bytes, entry.sha256)
    assert (staging / "vmlinuz").read_bytes().startswith(b"kernel 6.1.0-13-test")
    archive = subprocess.check_output(["gzip", "-dc", staging / "initrd"])
    start = archive.index(b'{\n  "broker"')
    config = json.loads(archive[start : archive.index(b"\n}\n", start) + 2])
    assert set(config) == set(GuestConfig.__dataclass_fields__)
    assert config["root"]["luks2"]["header_sha256"] == manifest.volume.header_sha256.hex()
    assert config["root"]["resource"] == manifest.resource == f"default/{kit.IMAGE_ID}/root"
    assert config["broker"]["spki_sha256"] == manifest.broker_spki_sha256.hex()
    assert any(path.endswith("/kernel/dm-crypt.ko") for path in config["modules"])


def test_seeded_builds_are_identical(builder, built, disk_image) -> None:
    """The same base, request and seed give the same bytes in every file; another seed gives another disk."""
    first, one = built
    second, two = builder(disk_image)
    assert files_of(one) == files_of(two)
    assert first == second
    assert first.seeded
    other, _ = builder(disk_image, seed=b"other")
    assert other.volume.uuid != first.volume.uuid
    assert other.launch_digest != first.launch_digest
    unseeded, _ = builder(disk_image, seed=None)
    assert not unseeded.seeded
    assert unseeded.volume.uuid not in {first.volume.uuid, other.volume.uuid}


def test_nothing_of_the_base_is_left_in_clear(built, kit) -> None:
    """Neither contents nor names of the root are found in the staging directory; the key is found nowhere."""
    _, staging = built
    traces = (b'NAME="Test"', b"discard,errors=remount-ro", b"binary-attribute", kit.KEY, kit.KEY.hex().encode())
    for path in staging.iterdir():
        content = path.read_bytes()
        for trace in traces:
            assert trace not in content, (path, trace)


def test_disk_stays_sparse(built) -> None:
    """What the base does not use takes no room."""
    manifest, staging = built
    assert (staging / "disk.img").stat().st_blocks * 512 < manifest.disk_size_bytes // 2


def test_root_grows_to_the_size_asked_for(builder, disk_image, root_image, tmp_path, kit) -> None:
    """A larger root is sound, holds the same files and fills its partition; a smaller one is refused."""
    manifest, staging = builder(disk_image, size_bytes=200 * MIB)
    plain = decrypted(manifest, staging, tmp_path / "plain", kit.KEY)
    kit.run("e2fsck", "-fn", plain)
    assert "Block count:              51200" in kit.run("dumpe2fs", "-h", plain)
    before, after = kit.listing(root_image), kit.listing(plain)
    assert {path for path in before.keys() | after.keys() if before.get(path) != after.get(path)} == CHANGED
    with pytest.raises(InvalidArgument, match="not made smaller"):
        builder(disk_image, size_bytes=64 * MIB)


def test_qcow2_gives_the_same_root(builder, built, disk_image, tmp_path, kit) -> None:
    """A qcow2 image, compressed too, gives the disk that its raw form gives."""
    qcow2 = tmp_path / "disk.qcow2"
    kit.run("qemu-img", "convert", "-c", "-O", "qcow2", disk_image, qcow2)
    first, one = built
    second, two = builder(qcow2)
    assert files_of(one)["disk.img"] == files_of(two)["disk.img"]
    assert second.base_sha256 == hashlib.sha256(qcow2.read_bytes()).digest() != first.base_sha256


def test_tar_stream_becomes_a_root(builder, tar_stream, root_image, tmp_path, kit) -> None:
    """Owners, modes, links, devices, capabilities, attributes of a stream arrive; equal streams give equal disks."""
    path = tmp_path / "root.tar"
    path.write_bytes(tar_stream)
    manifest, staging = builder(path, base_kind=BaseKind.ROOTFS, size_bytes=96 * MIB)
    plain = decrypted(manifest, staging, tmp_path / "plain", kit.KEY)
    kit.run("e2fsck", "-fn", plain)
    before, after = kit.listing(root_image), kit.listing(plain)
    assert {path for path in before.keys() | after.keys() if before.get(path) != after.get(path)} == CHANGED
    assert manifest.base_sha256 == hashlib.sha256(tar_stream).digest()
    again, second = builder(path, base_kind=BaseKind.ROOTFS, size_bytes=96 * MIB)
    assert again == manifest
    assert files_of(second) == files_of(staging)
    automatic, _ = builder(path, base_kind=BaseKind.ROOTFS)
    assert automatic.partitions[2].size_bytes >= 64 * MIB
    large, content = kit.tree_entries()[-1][0], os.urandom(10 * MIB - 65536)
    large.size = len(content)
    path.write_bytes(kit.make_tar([(large, content)]))
    with pytest.raises(InvalidArgument, match="the tree alone"):
        builder(path, base_kind=BaseKind.ROOTFS, size_bytes=8 * MIB)
    with pytest.raises(FileSystemNotWritten, match="larger size"):
        builder(path, base_kind=BaseKind.ROOTFS, size_bytes=10 * MIB)


def test_journal_is_replayed(builder, root_image, tmp_path, kit) -> None:
    """A root that was not unmounted is copied whole and its journal replayed: what only that knew is not lost."""
    dirty, block = tmp_path / "dirty.ext4", tmp_path / "block"
    shutil.copyfile(root_image, dirty)
    block.write_bytes(b"J" * 4096)
    name = "/home/user/binary-attribute"
    number = kit.run("debugfs", "-R", f"blocks {name}", dirty).split()[-1]
    kit.debugfs(dirty, "jo", f"jw -b {number} {block}", "jc")
    assert "needs_recovery" in kit.run("dumpe2fs", "-h", dirty)
    assert kit.run("debugfs", "-R", f"cat {name}", dirty) == "1"
    disk = tmp_path / "dirty.raw"
    kit.make_disk(disk, [(kit.ROOT_TYPE, dirty, 96)])
    manifest, staging = builder(disk)
    plain = decrypted(manifest, staging, tmp_path / "plain", kit.KEY)
    kit.run("e2fsck", "-fn", plain)
    assert kit.run("debugfs", "-R", f"cat {name}", plain) == "J"


@pytest.mark.parametrize(
    "options",
    [
        ("-b", "1024"),
        ("-O", "meta_bg,^resize_inode"),
        ("-O", "^64bit,^metadata_csum,uninit_bg"),
        ("-O", "sparse_super2"),
        ("-O", "^flex_bg"),
        ("-O", "inline_data"),
        ("-G", "4"),
    ],
)
def test_used_ranges_cover_all_that_is_used(tmp_path, kit, tools, tar_stream, options) -> None:
    """For every layout of ext4: a copy of the used ranges alone is as sound as the original and has the same files."""
    source, copy, folder = tmp_path / "source", tmp_path / "copy", tmp_path / "tree"
    for index in range(40):
        (folder / str(index)).mkdir(parents=True)
        (folder / str(index) / "file").write_bytes(os.urandom(300 * index))
    kit.run("mke2fs", "-q", "-t", "ext4", *options, "-d", folder, source, "300M")
    with source.open("rb") as src, copy.open("w+b") as dst:
        found = read_superblock(src.fileno())
        ranges = used_ranges(src.fileno(), found)
        assert all(offset % 4096 == 0 and length % 4096 == 0 and length > 0 for offset, length in ranges)
        assert all(a + length < b for (a, length), (b, _) in itertools.pairwise(ranges))
        dst.truncate(found.size_bytes)
        copy_ranges(src.fileno(), dst.fileno(), ranges)
    assert sum(length for _, length in ranges) < found.size_bytes // 2
    kit.run("e2fsck", "-fn", copy)
    assert kit.listing(source) == kit.listing(copy)


@pytest.mark.slow
def test_debian(builder, tmp_path, kit) -> None:
    """A real Debian base: opened by an independent path, it is sound and has every file with all it had."""
    if not DEBIAN.is_file():
        pytest.skip(f"there is no {DEBIAN}; scripts/make-base-image makes it")
    manifest, staging = builder(DEBIAN)
    plain = decrypted(manifest, staging, tmp_path / "plain", kit.KEY)
    kit.run("e2fsck", "-fn", plain)
    assert manifest.distribution.startswith("Debian")
    root = max(json.loads(kit.run("sfdisk", "--json", DEBIAN))["partitiontable"]["partitions"], key=lambda p: p["size"])
    base = tmp_path / "base"
    kit.run(
        "dd", f"if={DEBIAN}", f"of={base}", "bs=512", f"skip={root['start']}", f"count={root['size']}", "conv=sparse"
    )
    before, after = kit.listing(base), kit.listing(plain)
    assert len(before) > 5000
    differing = {path for path in before.keys() | after.keys() if before.get(path) != after.get(path)}
    assert differing <= {change.partition(":")[0] for change in manifest.changes}
