"""Small bases with everything a root file system consists of, made with the tools that make real ones."""

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

from jindiskd.base.platform import Platform
from jindiskd.base.secret import Secret
from jindiskd.image import cpio, initrd, tarroot
from jindiskd.image.builder import build
from jindiskd.image.request import BaseKind, BuildRequest, BuildTask, VolumeFormat

MIB = 1 << 20
RELEASES = ("6.1.0-9-test", "6.1.0-13-test")
MODULES = (
    "virtio_pci", "virtio_blk", "vmw_vsock_virtio_transport", "sev-guest", "dm-mod", "dm-crypt", "xts", "nbd", "ext4",
)  # fmt: skip
KEY = hashlib.sha256(b"a test key").digest()
IMAGE_ID = "0b5c1f0e-7a63-4c39-9d0a-2d6a3c1f9e11"
FSTAB = """# a comment
UUID=0b5c1f0e-7a63-4c39-9d0a-2d6a3c1f9e11 / ext4 rw,discard,errors=remount-ro 0 1
UUID=ABCD-1234 /boot/efi vfat defaults 0 0
LABEL=other /srv ext4 defaults 0 0
/dev/sda5 none swap sw 0 0
tmpfs /tmp tmpfs nosuid 0 0
share /mnt virtiofs ro 0 0
"""


def capability() -> bytes:
    """cap_net_raw=ep, as setcap writes it (linux/capability.h, revision 2)."""
    return (0x02000001).to_bytes(4, "little") + (1 << 13).to_bytes(4, "little") + bytes(12)


def tree_entries() -> list[tuple[tarfile.TarInfo, bytes]]:
    """A root file system as tar entries: devices, links, odd names, odd owners, attributes."""
    made: list[tuple[tarfile.TarInfo, bytes]] = []

    def add(name, content=b"", *, kind=tarfile.REGTYPE, mode=0o644, uid=0, gid=0, link="", dev=(0, 0), xattrs=None):
        info = tarfile.TarInfo(name)
        info.type, info.mode, info.uid, info.gid, info.linkname = kind, mode, uid, gid, link
        info.mtime, info.size = 1_600_000_000 + len(made), len(content)
        info.devmajor, info.devminor = dev
        info.pax_headers = {f"SCHILY.xattr.{k}": os.fsdecode(v) for k, v in (xattrs or {}).items()}
        made.append((info, content))

    def folder(name, **more):
        add(name, kind=tarfile.DIRTYPE, **{"mode": 0o755, **more})

    for name in ("etc", "usr", "usr/lib", "usr/lib/modules", "boot", "dev", "usr/bin", "home", "etc/cloud"):
        folder(name)
    folder("home/user", uid=1000, gid=70000, mode=0o2750)
    folder("tmp", mode=0o1777)
    folder("etc/cloud/cloud.cfg.d")
    folder("etc/systemd")
    folder("etc/systemd/system")
    folder("usr/lib/systemd")
    folder("usr/lib/systemd/system")
    add("usr/lib/systemd/system/qemu-guest-agent.service", b"[Unit]\n")
    add("etc/cloud/cloud.cfg.d/90_dpkg.cfg", b"datasource_list: [ NoCloud, Ec2 ]\n")
    add("lib", kind=tarfile.SYMTYPE, link="usr/lib")
    add("usr/lib/os-release", b'NAME="Test"\nPRETTY_NAME="Test Linux 1"\n')
    add("etc/os-release", kind=tarfile.SYMTYPE, link="../usr/lib/os-release")
    add("etc/fstab", FSTAB.encode(), mode=0o640, uid=3, gid=4, xattrs={"user.note": b"kept"})
    add("usr/bin/ping", b"\x7fELF" + bytes(9000), mode=0o755, xattrs={"security.capability": capability()})
    add("usr/bin/su", b"\x7fELF" + bytes(100), mode=0o4755)
    add("usr/bin/su-too", kind=tarfile.LNKTYPE, link="usr/bin/su")
    add("dev/null", kind=tarfile.CHRTYPE, mode=0o666, dev=(1, 3))
    add("dev/big", kind=tarfile.BLKTYPE, mode=0o660, gid=6, dev=(259, 300))
    add("dev/pipe", kind=tarfile.FIFOTYPE, mode=0o600)
    add('home/user/a name with "quotes" and ünïcode', b"x" * 5000, uid=1000, gid=70000)
    for name in ("-x", "<5>", "#comment", "!true", "~", "a;b", "back\\slash"):
        add(f"home/user/{name}", name.encode(), uid=7, xattrs={"user.name": name.encode()})
    add("home/user/empty", uid=1000, gid=1000)
    add("home/user/binary-attribute", b"1", xattrs={"user.raw": bytes(range(256)), "user.long": b"v" * 3000})
    add("home/user/long-link", kind=tarfile.SYMTYPE, link="/" + "x" * 200)
    add("home/user/large", os.urandom(64) * 40_000)
    for release in RELEASES:
        base = f"usr/lib/modules/{release}"
        folder(base)
        folder(f"{base}/kernel")
        lines = []
        for module in MODULES:
            add(f"{base}/kernel/{module}.ko", b"\x7fELF" + module.encode() * 50)
            lines.append(f"kernel/{module}.ko:" + (" kernel/dm-mod.ko" if module == "dm-crypt" else ""))
        add(f"{base}/modules.dep", ("\n".join(lines) + "\n").encode())
        add(f"{base}/modules.builtin", b"")
        add(f"{base}/modules.order", b"")
        add(f"boot/vmlinuz-{release}", b"kernel " + release.encode() + bytes(70_000) + b"end")
    return made


def make_tar(entries: list[tuple[tarfile.TarInfo, bytes]]) -> bytes:
    """The entries as a PAX stream."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for info, content in entries:
            tar.addfile(info, io.BytesIO(content) if info.isreg() else None)
    return out.getvalue()


def run(*argv: object, **more) -> str:
    """Run a tool, show what it said if it failed."""
    done = subprocess.run([str(word) for word in argv], capture_output=True, text=True, **more)
    assert done.returncode == 0, f"{argv}: {done.stdout}{done.stderr}"
    return done.stdout


def debugfs(path: Path, *commands: str, offset: int = 0) -> str:
    """Run debugfs commands that write on a file system in a file."""
    where = f"{path}?offset={offset}" if offset else str(path)
    done = subprocess.run(
        ["debugfs", "-w", "-f", "-", where], input="\n".join(commands) + "\n", capture_output=True, text=True
    )
    return done.stdout + done.stderr


def ask(path: Path, commands: list[str]) -> list[str]:
    """What debugfs says to each of many commands, in one process."""
    done = subprocess.run(
        ["debugfs", "-f", "-", path], input=os.fsencode("\n".join(commands) + "\n"), capture_output=True, check=True
    )
    answers = os.fsdecode(done.stdout).split("debugfs: ")[1:]
    assert len(answers) == len(commands)
    return [answer.partition("\n")[2] for answer in answers]


def listing(path: Path) -> dict[str, str]:
    """Every inode of an ext4 file system by path: all that it says but where its blocks are, and its content's digest.

    Independent of the builder: asks debugfs level by level, and takes the contents from a dump of the whole tree.
    """
    found: dict[str, tuple[str, str]] = {}
    level = ["/"]
    while level:
        below = []
        quoted = [name.replace('"', '""') for name in level]
        for directory, answer in zip(level, ask(path, [f'ls -p "{name}"' for name in quoted]), strict=True):
            for line in answer.splitlines():
                parts = line.split("/")
                if len(parts) == 8 and parts[1] != "0" and parts[5] not in {".", ".."}:
                    full = f"{directory.rstrip('/')}/{parts[5]}"
                    found[full] = (parts[1], parts[2])
                    if parts[2].startswith("04"):
                        below.append(full)
        level = below
    numbers = sorted({inode for inode, _ in found.values()}, key=int)
    about = dict(zip(numbers, ask(path, [f"stat <{number}>" for number in numbers]), strict=True))
    attributes = dict(zip(numbers, ask(path, [f"ea_list <{number}>" for number in numbers]), strict=True))
    wanted = (" ctime", " atime", " mtime", "crtime", "User:", "Links:", "Device", "(New-style)", "Fast link")
    result = {}
    with tempfile.TemporaryDirectory() as dump:
        subprocess.run(["debugfs", "-R", f"rdump / {dump}", path], capture_output=True, check=True)
        for full, (number, mode) in found.items():
            lines = [line for line in about[number].splitlines() if line.startswith(wanted)]
            digest = ""
            if mode.startswith("10"):
                digest = hashlib.sha256(Path(dump + full).read_bytes()).hexdigest()
            result[full] = "\n".join([mode, *lines, attributes[number], digest])
    return result


def make_ext4(path: Path, size: int, tar: bytes, tmp: Path) -> None:
    """An ext4 file system from a tar stream, by the builder's own maker; `test_tarroot` says whether that is right."""
    source = tmp / "stream.tar"
    source.write_bytes(tar)
    with source.open("rb") as stream:
        spooled, _ = tarroot.spool(stream.fileno(), tmp)
    fd = tarroot.make_root(
        spooled, tarroot.read_items(spooled), size_bytes=size, uuid="11111111-2222-4333-8444-555555555555", scratch=tmp
    )
    os.close(spooled)
    with os.fdopen(fd, "rb") as made:
        made.seek(0)
        path.write_bytes(made.read())
    source.unlink()


def make_disk(path: Path, parts: list[tuple[str, Path | None, int]], label: str = "gpt") -> list[int]:
    """A disk image by sfdisk with partitions given as type, content and size in MiB; returns their offsets."""
    total = sum(size for _, _, size in parts) + 2
    path.write_bytes(b"")
    os.truncate(path, total * MIB)
    script = f"label: {label}\n" + "".join(f"size={size}MiB, type={kind}\n" for kind, _, size in parts)
    run("sfdisk", "-q", path, input=script)
    table = json.loads(run("sfdisk", "--json", path))["partitiontable"]
    offsets = [part["start"] * 512 for part in table["partitions"]]
    for (_, content, _), offset in zip(parts, offsets, strict=True):
        if content is not None:
            run(
                "dd",
                f"if={content}",
                f"of={path}",
                "bs=1M",
                f"seek={offset // MIB}",
                "conv=notrunc,sparse",
                "status=none",
            )
    return offsets


ROOT_TYPE = "4f68bce3-e8cd-4db1-96e7-fbcaf984b709"
LINUX_TYPE = "0fc63daf-8483-4772-8e79-3d69d8477de4"
ESP_TYPE = "c12a7328-f81f-11d2-ba4b-00a0c93ec93b"


_INTERPRETERS: dict[tuple[str, ...], cpio.Archive] = {}


@pytest.fixture(scope="module", autouse=True)
def quick_initrds() -> Iterator[None]:
    """The interpreter's part of all initrds made in this process is put together once, and they are packed in a hurry.

    That took two thirds of each build. tests/initrd, in the same process perhaps, tries both as they are, and so do
    builds by the service's worker.
    """
    made = _INTERPRETERS
    add_python = initrd.add_python

    def once(archive: cpio.Archive, names: Iterable[str]) -> None:
        key = tuple(names)
        if key not in made:
            made[key] = cpio.Archive()
            add_python(made[key], key)
        for name, entry in made[key].entries.items():
            archive._add(name, entry)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(initrd, "add_python", once)
        patch.setattr(cpio, "GZIP_LEVEL", 1)
        yield


@pytest.fixture(scope="session")
def tools() -> None:
    """The programs that builds and these tests need."""
    missing = [
        name for name in ("mke2fs", "debugfs", "sfdisk", "qemu-img", "mkfs.vfat", "mcopy") if not shutil.which(name)
    ]
    if missing:
        pytest.skip(f"these programs are not installed: {', '.join(missing)}")


@pytest.fixture(scope="session")
def tar_stream() -> bytes:
    return make_tar(tree_entries())


@pytest.fixture(scope="session")
def root_image(tools, tmp_path_factory, tar_stream) -> Path:
    """A root file system of 96 MiB, bare."""
    folder = tmp_path_factory.mktemp("root")
    make_ext4(folder / "root.ext4", 96 * MIB, tar_stream, folder)
    return folder / "root.ext4"


@pytest.fixture(scope="session")
def disk_image(root_image, tmp_path_factory) -> Path:
    """A disk as a stock cloud image has it: the root first in number, an ESP before it."""
    path = tmp_path_factory.mktemp("disk") / "disk.raw"
    make_disk(path, [(ESP_TYPE, None, 4), (ROOT_TYPE, root_image, 96)])
    return path


@pytest.fixture(scope="session")
def with_module(tmp_path_factory) -> Path:
    """A root whose kernels have the module."""
    entries = []
    for info, content in tree_entries():
        if info.name.endswith("/modules.dep"):
            content += b"kernel/dm-jindisk.ko: kernel/dm-mod.ko\n"
            info.size = len(content)
        entries.append((info, content))
    for release in RELEASES:
        info = tarfile.TarInfo(f"usr/lib/modules/{release}/kernel/dm-jindisk.ko")
        content = b"\x7fELF the module of the reference"
        info.size = len(content)
        entries.append((info, content))
    path = tmp_path_factory.mktemp("with-module") / "root.tar"
    path.write_bytes(make_tar(entries))
    return path


@pytest.fixture(scope="session")
def request_for(firmware) -> Callable[..., BuildRequest]:
    def make(**changes) -> BuildRequest:
        values = {
            "name": "test",
            "platform": Platform.SIMULATED_SNP,
            "format": VolumeFormat.LUKS2,
            "base_kind": BaseKind.DISK,
            "firmware": str(firmware),
            "vcpus": 2,
            "cpu_model": "EPYC-v4",
            "seed": b"test seed",
        }
        return BuildRequest(**{**values, **changes})

    return make


@pytest.fixture(scope="session")
def build_in(request_for):
    """Build a base into a given empty directory; returns the manifest and the directory."""

    def make(staging: Path, base: Path, progress=lambda _p: None, **changes):
        task = BuildTask(
            request=request_for(**changes),
            image_id=IMAGE_ID,
            created="2026-01-02T03:04:05Z",
            broker_spki_sha256=hashlib.sha256(b"a broker").digest(),
            staging=str(staging),
            workers=2,
        )
        with base.open("rb") as stream:
            return build(task, stream.fileno(), Secret(KEY), progress), staging

    return make


@pytest.fixture
def builder(build_in, tmp_path):
    """Build into a fresh staging directory."""
    count = 0

    def make(base: Path, progress=lambda _p: None, **changes):
        nonlocal count
        count += 1
        staging = tmp_path / f"staging{count}"
        staging.mkdir()
        return build_in(staging, base, progress, **changes)

    return make


@pytest.fixture(scope="session")
def built(build_in, disk_image, tmp_path_factory):
    """One plain build of the disk, for tests that only look."""
    return build_in(tmp_path_factory.mktemp("built"), disk_image)


@pytest.fixture(scope="session")
def kit():
    """This module: its functions and constants, as test folders are not packages."""
    return sys.modules[__name__]
