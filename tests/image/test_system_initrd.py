"""The initrd that a base's own system made: looked into whatever its form, refused without the agent, given its
configuration."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import lzma
import os
import random
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

from jindiskd.attest.measure import LaunchInputs, snp_launch_digest
from jindiskd.base import document
from jindiskd.base.platform import Platform
from jindiskd.errors import InvalidArgument, JindiskError, NotSupported
from jindiskd.guest.config import PATH, GuestConfig
from jindiskd.image import system_initrd
from jindiskd.image.boot_update import release_of
from jindiskd.image.cpio import Archive
from jindiskd.image.initramfs_files import MOUNT_VOLUMES, UNLOCK
from jindiskd.image.request import BaseKind, InitrdKind, VolumeFormat
from jindiskd.image.service import ImageService
from jindiskd.image.store import ImageStore, verify
from jindiskd.image.system_initrd import InitramfsRefused, require_agent

PACKERS = {
    "none": lambda data: data,
    "gzip": lambda data: gzip.compress(data, 1),
    "xz": lambda data: lzma.compress(data, check=lzma.CHECK_CRC32, preset=0),
    "zstd": lambda data: subprocess.run(["zstd", "-qc"], input=data, capture_output=True, check=True).stdout,
}


def tree(*names: str) -> bytes:
    """An archive with files of these names among others, by cpio's own hand."""
    archive = Archive()
    for name in ("init", *names, "usr/bin/sh"):
        archive.file(name, name.encode() * 300, 0o755)
    archive.link("lib", "usr/lib")
    return archive.to_bytes()


def made(tmp_path: Path, *parts: bytes) -> Path:
    path = tmp_path / "initrd.img"
    path.write_bytes(b"".join(part + bytes(-len(part) % 4) for part in parts))
    return path


@pytest.mark.parametrize("packer", PACKERS)
@pytest.mark.parametrize("early", [False, True])
def test_the_agent_is_found(tmp_path: Path, packer: str, early: bool) -> None:
    """In a plain archive and in a compressed one, behind an early one with microcode or without."""
    before = [tree("kernel/x86/microcode/GenuineIntel.bin") + bytes(512)] if early else []
    require_agent(made(tmp_path, *before, PACKERS[packer](tree(UNLOCK))), "/boot/x")
    with pytest.raises(InitramfsRefused, match="does not have the agent: install the package jindisk-initramfs"):
        require_agent(made(tmp_path, *before, PACKERS[packer](tree("usr/lib/jindisk/other"))), "/boot/x")


def test_an_agent_of_before_is_told_from_one_that_knows_volumes(tmp_path: Path) -> None:
    """An older package boots what it can; what it would not mount is refused, and named."""
    old, new = tree(UNLOCK), tree(MOUNT_VOLUMES, UNLOCK)
    assert not require_agent(made(tmp_path, old), "/boot/x")
    assert require_agent(made(tmp_path, new), "/boot/x", volumes=True)
    with pytest.raises(InitramfsRefused, match="/boot/x has an agent that knows no data volumes: install a newer"):
        require_agent(made(tmp_path, old), "/boot/x", volumes=True)
    with pytest.raises(InitramfsRefused, match="does not have the agent"):
        require_agent(made(tmp_path, tree(MOUNT_VOLUMES)), "/boot/x", volumes=True)


def test_an_archive_of_cpio_is_read(tmp_path: Path) -> None:
    """Names as mkinitramfs has them, with a dot in front, hard links and all."""
    folder = tmp_path / "tree"
    (folder / "usr/lib/jindisk").mkdir(parents=True)
    (folder / UNLOCK).write_text("agent")
    (folder / "again").hardlink_to(folder / UNLOCK)
    words = "find . | LC_ALL=C sort | cpio --quiet -o -H newc"
    data = subprocess.run(["sh", "-c", words], cwd=folder, capture_output=True, check=True).stdout
    require_agent(made(tmp_path, PACKERS["zstd"](data)), "/boot/x")


@pytest.mark.parametrize("packer", PACKERS)
def test_what_is_cut_or_damaged_is_refused(tmp_path: Path, packer: str) -> None:
    """Each is an error of ours that names the file, quickly; none is taken for an initramfs with the agent."""
    whole = PACKERS[packer](tree(*(f"a/file-{number}" for number in range(200)), UNLOCK))
    for length in (0, 3, 5, 7, 109, 113, len(whole) // 2, len(whole) * 9 // 10):
        with pytest.raises(InitramfsRefused, match="/boot/x"):
            require_agent(made(tmp_path, whole[:length]), "/boot/x")
    dice = random.Random(7)
    for _ in range(60):
        bad = bytearray(whole)
        for _ in range(dice.choice((1, 4, 64))):
            bad[dice.randrange(len(bad))] = dice.randrange(256)
        try:
            require_agent(made(tmp_path, bytes(bad)), "/boot/x")
        except InitramfsRefused:
            pass  # any other exception fails the test


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"\x04\x22\x4d\x18" + bytes(100), "compressed in a way that is not read"),
        (b"070701" + b"0" * 88 + b"FFFFFFFF" + b"0" * 8, "no reasonable length"),
        (b"070701" + b"zz" * 52, "header that is none"),
    ],
)
def test_hostile_headers_are_refused(tmp_path: Path, data: bytes, said: str) -> None:
    with pytest.raises(InitramfsRefused, match=said):
        require_agent(made(tmp_path, data), "/boot/x")


def test_a_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few bytes that unpack to more than any initramfs are not unpacked to the end."""
    monkeypatch.setattr(system_initrd, "MAX_UNPACKED_BYTES", 1 << 20)
    archive = Archive()
    archive.file("big", bytes(4 << 20))
    for packer in ("gzip", "xz", "zstd"):
        with pytest.raises(InitramfsRefused, match="unpacks to more"):
            require_agent(made(tmp_path, PACKERS[packer](archive.to_bytes())), "/boot/x")


SYSTEM = PACKERS["zstd"](tree(UNLOCK)) + b"\0"  # of a length that needs padding


@pytest.fixture
def base(tmp_path: Path, kit) -> Path:
    """A root file system as the package leaves it."""
    return made_base(tmp_path, kit, SYSTEM)


def made_base(tmp_path: Path, kit, initramfs: bytes | None, *, folder: bool = True) -> Path:
    entries = kit.tree_entries()
    if folder:
        info = tarfile.TarInfo("etc/jindisk")
        info.type, info.mode = tarfile.DIRTYPE, 0o755
        entries.append((info, b""))
    if initramfs is not None:
        info = tarfile.TarInfo(f"boot/initrd.img-{kit.RELEASES[1]}")
        info.size = len(initramfs)
        entries.append((info, initramfs))
    path = tmp_path / "base.tar"
    path.write_bytes(kit.make_tar(entries))
    return path


def build(builder, base: Path, **changes):
    return builder(base, base_kind=BaseKind.ROOTFS, initrd=InitrdKind.SYSTEM, size_bytes=96 << 20, **changes)


def test_a_build_takes_it_as_it_is(builder, base, tmp_path, kit, firmware) -> None:
    """The initrd is the system's, bytes unchanged, and the configuration; the digest is of that; twice the same."""
    manifest, staging = build(builder, base)
    initrd = (staging / "initrd").read_bytes()
    assert initrd.startswith(SYSTEM)
    tail = initrd[len(SYSTEM) + -len(SYSTEM) % 4 :]
    shown = subprocess.run(["cpio", "-it", "--quiet"], input=tail, capture_output=True, text=False, check=True)
    assert shown.stdout.split() == [b"etc", b"etc/jindisk", PATH.encode()]
    words = ["cpio", "-i", "--to-stdout", "--quiet", PATH]
    text = subprocess.run(words, input=tail, capture_output=True, check=True).stdout
    config = document.load(GuestConfig, text, document="x")
    assert config.modules == ()
    assert config.root.luks2 is not None
    assert config.root.luks2.header_sha256 == manifest.volume.header_sha256
    cmdline = (staging / "cmdline").read_text()
    assert " rd.shell=0 rd.emergency=poweroff " in cmdline
    assert " cryptopts= " in cmdline
    assert manifest.initrd.sha256 == hashlib.sha256(initrd).digest()
    inputs = LaunchInputs(
        firmware=firmware, kernel=staging / "vmlinuz", initrd=staging / "initrd", cmdline=cmdline,
        vcpus=2, cpu_model="EPYC-v4",
    )  # fmt: skip
    assert manifest.launch_digest == snp_launch_digest(inputs)
    assert f"started with /boot/initrd.img-{kit.RELEASES[1]}, which its own system made" in manifest.changes
    again, second = build(builder, base)
    assert again == manifest
    assert (second / "disk.img").read_bytes() == (staging / "disk.img").read_bytes()


def test_the_root_knows_its_configuration(builder, base, tmp_path, kit) -> None:
    """The same bytes as in the initrd are in the root, so that its system puts them into each initramfs it makes."""
    manifest, staging = build(builder, base, format=VolumeFormat.JINDISK)
    key = tmp_path / "key"
    key.write_bytes(kit.KEY)
    part = tmp_path / "volume"
    root = manifest.partitions[2]
    with (staging / "disk.img").open("rb") as disk:
        disk.seek(root.offset_bytes)
        part.write_bytes(disk.read(root.size_bytes))
    plain = tmp_path / "plain"
    setup = [os.fspath(Path(__file__).parents[2] / ".venv/bin/jindisksetup"), "export", "--key-file"]
    subprocess.run([*setup, key, part, plain], check=True, capture_output=True)
    kit.run("e2fsck", "-fn", plain)
    text = subprocess.check_output(["debugfs", "-R", f"cat /{PATH}", plain], stderr=subprocess.DEVNULL)
    assert text in (staging / "initrd").read_bytes()
    assert document.load(GuestConfig, text, document="x").image_id == manifest.image_id


def test_bases_without_it_are_refused(builder, tmp_path, kit) -> None:
    """Each says what is missing and what to install."""
    for initramfs, folder, said in (
        (None, True, "there is no initrd.img-"),
        (PACKERS["gzip"](tree()), True, "install the package jindisk-initramfs"),
        (SYSTEM, False, "has no /etc/jindisk: install the package jindisk-initramfs"),
    ):
        with pytest.raises(InitramfsRefused, match=said):
            build(builder, made_base(tmp_path, kit, initramfs, folder=folder))


@pytest.mark.parametrize(
    "changes",
    [
        {"format": VolumeFormat.JINDISK1},
        {"key_program": "/bin/true"},
        {"report_source": "module:source"},
    ],
)
def test_what_is_not_in_the_package_is_not_offered(request_for, changes) -> None:
    request_for(initrd=InitrdKind.SYSTEM, platform=Platform.SIMULATED_SNP).check()
    with pytest.raises(NotSupported, match="own"):
        request_for(initrd=InitrdKind.SYSTEM, **changes).check()


def test_jindisk1_is_refused_with_the_reason(request_for) -> None:
    """Whoever asks for it learns why, and the two ways that there are."""
    wanted = request_for(initrd=InitrdKind.SYSTEM, format=VolumeFormat.JINDISK1, platform=Platform.SIMULATED_SNP)
    with pytest.raises(NotSupported, match=r"no distribution's kernel has its module.*format jindisk, .*initrd own"):
        wanted.check()


def test_the_error_is_one_of_ours() -> None:
    assert JindiskError.by_code["InitramfsRefused"] is InitramfsRefused


class NoKeys:
    """Fails whoever asks anything of the key store."""


@pytest.fixture
def stored(builder, base, tmp_path):
    """The image `test` in a store, and the service that has it."""
    store = ImageStore(tmp_path / "store")
    manifest, directory = build(builder, base)
    staging = store.stage()
    for path in directory.iterdir():
        shutil.copy(path, staging.path)
    store.commit(staging, manifest.name)
    staging.close()
    return store, ImageService(store, NoKeys(), broker_spki_sha256=bytes(32)), manifest


def bzimage(release: str) -> bytes:
    """The head of a kernel for x86 that says its release."""
    head = bytearray(0x1000)
    head[0x202:0x206] = b"HdrS"
    head[0x20E:0x210] = (0x600).to_bytes(2, "little")
    head[0x800 : 0x800 + 60] = f"{release} (builder@host) #1 SMP".encode().ljust(60, b"\0")
    return bytes(head) + b"new kernel" * 1000


async def update(service, tmp_path: Path, kernel: bytes, initrd: bytes):
    (tmp_path / "k").write_bytes(kernel)
    (tmp_path / "i").write_bytes(initrd)
    with (tmp_path / "k").open("rb") as one, (tmp_path / "i").open("rb") as other:
        return await service.update("test", one.fileno(), other.fileno())


async def test_boot_files_are_replaced_all_at_once(stored, tmp_path, firmware) -> None:
    """New kernel, initramfs, digest and release; the same disk, command line and identity; nothing else is left."""
    store, service, old = stored
    inode = store.get("test").disk.stat().st_ino
    initrd = PACKERS["gzip"](tree(UNLOCK, PATH))
    new = await update(service, tmp_path, bzimage("6.12.9-test"), initrd)
    image = store.get("test")
    assert image.manifest == new
    verify(image)
    assert (image.path / "initrd").read_bytes() == initrd
    assert new.kernel_release == "6.12.9-test"
    assert image.disk.stat().st_ino == inode
    assert new.launch_digest != old.launch_digest
    inputs = LaunchInputs(
        firmware=firmware, kernel=image.path / "vmlinuz", initrd=image.path / "initrd",
        cmdline=(image.path / "cmdline").read_text(), vcpus=2, cpu_model="EPYC-v4",
    )  # fmt: skip
    assert new.launch_digest == snp_launch_digest(inputs)
    same = {"image_id", "name", "cmdline", "volume", "resource", "partitions", "shape", "changes", "initrd_kind"}
    assert {name for name in same if getattr(new, name) != getattr(old, name)} == set()
    assert [path.name for path in store.root.iterdir() if path.name != ".lock"] == ["test"]


@pytest.mark.parametrize(
    ("kernel", "initrd", "error"),
    [
        (b"", SYSTEM, InvalidArgument),
        (bzimage("1"), b"", InvalidArgument),
        (bzimage("1"), tree(), InitramfsRefused),
        (bzimage("1"), SYSTEM[:60], InitramfsRefused),
    ],
)
async def test_an_update_that_is_refused_changes_nothing(stored, tmp_path, kernel, initrd, error) -> None:
    store, service, old = stored
    with pytest.raises(error):
        await update(service, tmp_path, kernel, initrd)
    assert store.get("test").manifest == old
    verify(store.get("test"))
    assert [path.name for path in store.root.iterdir() if path.name != ".lock"] == ["test"]


def test_images_with_our_own_initrd_are_not_updated(builder, base, tmp_path) -> None:
    """Their initrd is made with the image, and is no file of anybody's."""
    store = ImageStore(tmp_path / "store")
    manifest, directory = builder(base, base_kind=BaseKind.ROOTFS, size_bytes=96 << 20)
    assert manifest.initrd_kind == "own"
    staging = store.stage()
    for path in directory.iterdir():
        shutil.copy(path, staging.path)
    store.commit(staging, "test")
    staging.close()
    service = ImageService(store, NoKeys(), broker_spki_sha256=bytes(32))
    with pytest.raises(NotSupported, match="build it again"):
        asyncio.run(update(service, tmp_path, bzimage("1"), SYSTEM))


def test_a_release_is_believed_in_form_alone(tmp_path) -> None:
    """What is no kernel for x86, or says nothing that could be a release, has none."""
    path = tmp_path / "kernel"
    for data, release in (
        (bzimage("6.1.0-50-cloud-amd64"), "6.1.0-50-cloud-amd64"),
        (bzimage("../../etc"), ""),
        (bzimage("a\nb"), ""),
        (b"", ""),
        (b"\x7fELF" + bytes(9000), ""),
        (bzimage("1")[:0x210], ""),
    ):
        path.write_bytes(data)
        assert release_of(path) == release
