"""Builds that fail: each unfit base, full disk or setting has its own error, and no image is there."""

import contextlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from jindiskd.attest.firmware import FirmwareUnsuitable
from jindiskd.base.platform import Platform
from jindiskd.errors import InvalidArgument, JindiskError
from jindiskd.image import refusals
from jindiskd.image.cmdline import UnsafeCommandLine

MIB = 1 << 20
ROOT = Path(__file__).resolve().parent.parent.parent


@contextlib.contextmanager
def altered(base: Path, tmp_path: Path):
    """A private copy of a base to damage."""
    copy = tmp_path / "altered.raw"
    shutil.copyfile(base, copy)
    with copy.open("r+b") as stream:
        yield copy, stream


def refusal(builder, base: Path, kind: type[JindiskError], match: str, **changes) -> None:
    """The build fails with that error, and no image is there."""
    with pytest.raises(kind, match=match):
        builder(base, **changes)


def test_bases_that_cannot_be_built_from(builder, disk_image, root_image, tmp_path, kit) -> None:
    """Each unfit base has its own error, which says what it is and what to do."""
    disk = tmp_path / "unfit.raw"
    xfs, luks, jindisk, empty = (tmp_path / name for name in ("xfs", "luks", "jindisk", "empty"))
    for path, content in ((xfs, b"XFSB"), (luks, b"LUKS\xba\xbe\0\2"), (jindisk, b"JinDisk2"), (empty, b"")):
        path.write_bytes(content.ljust(4 * MIB, b"\0"))
    ext3 = tmp_path / "ext3"
    kit.run("mke2fs", "-q", "-t", "ext3", ext3, "8M")
    bare = tmp_path / "bare"
    kit.run("mke2fs", "-q", "-t", "ext4", bare, "8M")
    for content, type_uuid, kind, match in (
        (empty, kit.LINUX_TYPE, refusals.NoRootPartition, "no root partition"),
        (bare, kit.LINUX_TYPE, refusals.NoRootPartition, "no root partition"),
        (bare, kit.ROOT_TYPE, refusals.NoKernel, "no kernel"),
        (xfs, kit.LINUX_TYPE, refusals.RootNotExt4, "XFS"),
        (ext3, kit.ROOT_TYPE, refusals.RootNotExt4, "ext2 or ext3"),
        (luks, kit.LINUX_TYPE, refusals.AlreadyEncrypted, "LUKS"),
        (jindisk, kit.LINUX_TYPE, refusals.AlreadyEncrypted, "JinDisk"),
    ):
        kit.make_disk(disk, [(type_uuid, content, 8)])
        refusal(builder, disk, kind, match)
    refusal(builder, luks, refusals.AlreadyEncrypted, "LUKS")
    refusal(builder, empty, refusals.NoPartitionTable, "no partition table")
    refusal(builder, root_image, refusals.NoPartitionTable, "without partitions")
    kit.make_disk(disk, [("83", bare, 8)], label="dos")
    refusal(builder, disk, refusals.NoPartitionTable, "an MBR")
    refusal(builder, Path("/dev/null"), InvalidArgument, "regular file")


def test_kernel_needs_its_modules(builder, root_image, tmp_path, kit) -> None:
    """A kernel without modules, or without one that the guest needs, is refused; an older complete one is taken."""
    root, disk = tmp_path / "root", tmp_path / "disk.raw"
    shutil.copyfile(root_image, root)
    newest = kit.RELEASES[1]
    kit.debugfs(root, f"rm /usr/lib/modules/{newest}/kernel/dm-crypt.ko")
    kit.make_disk(disk, [(kit.ROOT_TYPE, root, 96)])
    refusal(builder, disk, refusals.NoKernel, "dm-crypt.ko is missing")
    kit.debugfs(root, f"rm /usr/lib/modules/{newest}/modules.dep", f"rm /boot/vmlinuz-{newest}")
    kit.make_disk(disk, [(kit.ROOT_TYPE, root, 96)])
    manifest, _ = builder(disk)
    assert manifest.kernel_release == kit.RELEASES[0]


def test_damaged_table(builder, disk_image, tmp_path) -> None:
    """One damaged copy of the GPT does no harm; with both, or with contradictions, the base is refused."""
    size = disk_image.stat().st_size
    with altered(disk_image, tmp_path) as (copy, stream):
        stream.seek(512 + 60)
        stream.write(b"\xff" * 8)
        stream.flush()
        builder(copy)
        stream.seek(size - 512 + 60)
        stream.write(b"\xff" * 8)
        stream.flush()
        refusal(builder, copy, refusals.PartitionTableDamaged, "checksum")
    with altered(disk_image, tmp_path) as (copy, stream):
        stream.seek(512)
        stream.write(bytes(512))
        stream.seek(size - 512)
        stream.write(bytes(512))
        stream.flush()
        refusal(builder, copy, refusals.PartitionTableDamaged, "absent")


def test_truncated_base(builder, disk_image, tmp_path, kit) -> None:
    """A base that ends early, raw or qcow2, is refused as such."""
    with altered(disk_image, tmp_path) as (copy, stream):
        stream.truncate(60 * MIB)
        refusal(builder, copy, refusals.BaseTruncated, "cut short")
    qcow2 = tmp_path / "disk.qcow2"
    kit.run("qemu-img", "convert", "-O", "qcow2", disk_image, qcow2)
    os.truncate(qcow2, 3 * MIB)
    refusal(builder, qcow2, refusals.BaseRefused, "qcow2|cut short|changed")
    os.truncate(qcow2, 50)
    refusal(builder, qcow2, refusals.BaseTruncated, "qcow2 header")


def test_qcow2_that_refers_to_other_files(builder, disk_image, tmp_path, kit) -> None:
    """Backing files and external data files would be read with our rights: refused; so is an encrypted image."""
    backed, external, locked = (tmp_path / f"{name}.qcow2" for name in ("backed", "external", "locked"))
    kit.run("qemu-img", "create", "-q", "-f", "qcow2", "-b", disk_image, "-F", "raw", backed)
    refusal(builder, backed, refusals.ImageFormatRefused, "backing file")
    data = tmp_path / "data.raw"
    kit.run("qemu-img", "create", "-q", "-f", "qcow2", "-o", f"data_file={data},data_file_raw=on", external, "64M")
    refusal(builder, external, refusals.ImageFormatRefused, "external data file")
    kit.run(
        "qemu-img", "create", "-q", "-f", "qcow2", "--object", "secret,id=s,data=abc",
        "-o", "encrypt.format=aes,encrypt.key-secret=s", locked, "64M",
    )  # fmt: skip
    refusal(builder, locked, refusals.ImageFormatRefused, "encrypted")


def test_damaged_root(builder, disk_image, tmp_path) -> None:
    """A root file system beyond a preen is refused, not copied."""
    with altered(disk_image, tmp_path) as (copy, stream):
        stream.seek(5 * MIB + 4096)  # the group descriptors
        stream.write(os.urandom(4096))
        stream.flush()
        refusal(builder, copy, refusals.RootDamaged, "e2fsck")


def test_base_that_changes_meanwhile(builder, disk_image, tmp_path) -> None:
    """A base written to during the build is noticed: its digest would be of neither content."""
    with altered(disk_image, tmp_path) as (copy, stream):

        def meddle(progress) -> None:
            if progress.stage == "boot":
                stream.seek(0)
                stream.write(b"\0")
                stream.flush()

        refusal(builder, copy, refusals.BaseChanged, "changed", progress=meddle)


def test_full_disk(builder, disk_image, request_for, tmp_path, kit) -> None:
    """A file system that fills up during the build gives NoSpace; one that is too small from the start does at once."""
    small = tmp_path / "small"
    small.mkdir()
    script = f"""
mount -t tmpfs -o size=$1 none {small} && mkdir {small}/staging && exec "$2" "$3" {small}/staging {disk_image}
"""
    if subprocess.run(["unshare", "--mount", "true"], check=False).returncode:
        pytest.skip("making a small file system needs a mount namespace of our own")
    program = tmp_path / "program.py"
    program.write_text(FULL_DISK)
    env = {**os.environ, "FIRMWARE": request_for().firmware, "SOURCE": str(ROOT)}
    for size in ("12m", "32m", "40m"):
        argv = ["unshare", "--mount", "sh", "-c", script, "sh", size, sys.executable, program]
        done = subprocess.run(argv, capture_output=True, text=True, check=False, env=env)
        assert "NoSpace" in done.stdout, (size, done.stdout, done.stderr)


FULL_DISK = """
import os, sys
sys.path.insert(0, os.environ['SOURCE'])
from jindiskd.base.platform import Platform
from jindiskd.base.secret import Secret
from jindiskd.errors import NoSpace
from jindiskd.image.builder import build
from jindiskd.image.request import BaseKind, BuildRequest, BuildTask, VolumeFormat
request = BuildRequest(name="x", platform=Platform.SIMULATED_SNP, format=VolumeFormat.LUKS2, base_kind=BaseKind.DISK,
                       firmware=os.environ["FIRMWARE"], vcpus=1, cpu_model="EPYC-v4")
task = BuildTask(request=request, image_id="0b5c1f0e-7a63-4c39-9d0a-2d6a3c1f9e11", created="", staging=sys.argv[1],
                 broker_spki_sha256=bytes(32))
try:
    build(task, os.open(sys.argv[2], os.O_RDONLY), Secret(bytes(32)), lambda p: print(p, file=sys.stderr))
except NoSpace as exc:
    print("NoSpace", exc)
"""


def test_firmware_must_check_kernels(builder, disk_image, firmware, tmp_path) -> None:
    """For real hardware, firmware that does not check kernels, or of an unknown build, is refused at once."""
    unknown = tmp_path / "unknown.fd"
    unknown.write_bytes(b"?" + firmware.read_bytes()[1:])
    asked = {"platform": Platform.SNP, "firmware": str(unknown)}
    refusal(builder, disk_image, FirmwareUnsuitable, "unknown build", **asked)
    manifest, _ = builder(disk_image, vouch_firmware=True, **asked)
    assert manifest.platform is Platform.SNP
    generic = firmware.with_name("OVMF.fd")
    refusal(builder, disk_image, FirmwareUnsuitable, "does not check", platform=Platform.SNP, firmware=str(generic))


def test_command_line_is_checked_before_any_work(builder, tmp_path) -> None:
    """An unsafe word ends the build before the base is even looked at."""
    base = tmp_path / "nothing"
    base.touch()
    refusal(builder, base, UnsafeCommandLine, "rd.break", cmdline="quiet rd.break")
