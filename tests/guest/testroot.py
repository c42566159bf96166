"""A small root file system whose init looks around and says what it sees, encrypted as the builder would do it."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import subprocess
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from jindiskd.base.anchor import Anchor
from jindiskd.base.secret import Secret
from jindiskd.guest.config import Luks2Expectation
from jindiskd.image import python_closure
from jindiskd.image.cpio import Archive
from jindiskd.jindisk.create import create_volume
from jindiskd.jindisk.device import OpenFile
from jindiskd.jindisk.geometry import BLOCK, default_geometry
from jindiskd.jindisk.volume import anchor_of, open_volume
from jindiskd.luks2 import check, layout, populate
from jindiskd.luks2.header import make_header

UUID = "5a9d1a7e-62a1-4a4c-8f4e-0c2f27bd6d1e"
ROOT_BYTES = 48 << 20

# Runs in the guest as the system's init. Everything it prints is on one line, so that kernel messages do not mix in.
INIT = """#!/usr/bin/{python} -ISB
import ctypes, json, os
seen = {{
    "pid": os.getpid(),
    "mounts": [line.split()[:4] for line in open("/proc/mounts")],
    "descriptors": sorted(int(name) for name in os.listdir("/proc/self/fd")),
    "streams": [os.readlink(f"/proc/self/fd/{{n}}") for n in range(3)],
    "children": [name for name in os.listdir("/proc") if name.isdigit() and name != "1"
                 and int(open(f"/proc/{{name}}/stat").read().rpartition(")")[2].split()[1]) == 1],
    "root": sorted(os.listdir("/")),
    "free_kib": int(next(line for line in open("/proc/meminfo") if line.startswith("MemFree")).split()[1]),
    "shmem_kib": int(next(line for line in open("/proc/meminfo") if line.startswith("Shmem:")).split()[1]),
    "settings": [open("/proc/sys/kernel/" + name).read().split() for name in ("printk", "panic", "panic_on_oops")],
    "udev": {{name: open("/run/udev/data/" + name).read() for name in os.listdir("/run/udev/data")}}
            if os.path.isdir("/run/udev/data") else {{}},
    "mapper": {{name: os.path.realpath("/dev/mapper/" + name) for name in os.listdir("/dev/mapper")}}
            if os.path.isdir("/dev/mapper") else {{}},
    "secret": open("/etc/secret").read(),
}}
os.write(1, ("\\nROOT-SEES " + json.dumps(seen) + "\\n").encode())
os.sync()
ctypes.CDLL(None).reboot(0x4321FEDC)
"""


def write_tree(archive: Archive, target: Path) -> None:
    """The archive's entries as files; device nodes are left out."""
    target.mkdir()
    for name, entry in archive.entries.items():
        path = target / name
        if stat.S_ISDIR(entry.mode):
            path.mkdir(exist_ok=True)
        elif stat.S_ISLNK(entry.mode):
            path.symlink_to(entry.data.decode())
        elif stat.S_ISREG(entry.mode):
            path.write_bytes(entry.data)
            path.chmod(stat.S_IMODE(entry.mode))


def make_root(
    directory: Path,
    *,
    init: str = INIT,
    init_path: str = "usr/sbin/init",
    files: Mapping[str, bytes] | None = None,
    modules: tuple[str, ...] = (),
) -> Path:
    """An ext4 file with an interpreter, its further `modules`, the init above, and `files`."""
    archive = Archive()
    for name in python_closure.MERGED:
        archive.directory(f"usr/{name}")
        archive.link(name, f"usr/{name}")
    for name in ("dev", "proc", "sys", "run", "etc", "tmp"):
        archive.directory(name)
    plain = ("json", "ctypes", "os", "signal", "socket", "time", "encodings.ascii", "struct")
    python_closure.add_python(archive, (*plain, *modules))
    for folder in sorted({str(Path(name).parent) for name in files or ()} - {"."}):
        archive.directory(folder)
    for name, content in (files or {}).items():
        archive.file(name, content)
    archive.file("etc/secret", b"inside")
    archive.file("etc/broken-init", b"no program", 0o755)
    archive.file(init_path, init.format(python=python_closure.python_name()).encode(), 0o755)
    tree, image = directory / "tree", directory / "root.ext4"
    write_tree(archive, tree)
    with image.open("wb") as file:
        file.truncate(ROOT_BYTES)
    command = ["mkfs.ext4", "-q", "-F", "-b", "4096", "-d", os.fspath(tree), os.fspath(image)]
    path = os.environ["PATH"] + ":/usr/sbin:/sbin"
    subprocess.run(command, check=True, env={**os.environ, "PATH": path}, capture_output=True)
    return image


@dataclass
class EncryptedDisk:
    path: Path
    key: Secret
    expectation: Luks2Expectation


def encrypt_root(image: Path, target: Path, *, uuid: str = UUID) -> EncryptedDisk:
    """The root as the LUKS2 volume that fills a disk."""
    key, volume_key = Secret.random(32), Secret.random(layout.KEY_BYTES)
    size = image.stat().st_size
    header = make_header(volume_key=volume_key, passphrase=key, uuid=uuid, data_bytes=size, rng=os.urandom)
    header = header.ljust(layout.DATA_OFFSET_BYTES, b"\0")
    with target.open("wb+") as disk, image.open("rb") as source:
        disk.truncate(layout.DATA_OFFSET_BYTES + size)
        os.pwrite(disk.fileno(), header, 0)
        populate.populate(
            source.fileno(), disk.fileno(), [(0, size)], volume_key=volume_key,
            target_offset_bytes=layout.DATA_OFFSET_BYTES,
        )  # fmt: skip
    expectation = Luks2Expectation(
        header_bytes=len(header),
        header_sha256=hashlib.sha256(header).digest(),
        uuid=uuid,
        cipher=layout.CIPHER,
        key_bytes=layout.KEY_BYTES,
        sector_bytes=layout.SECTOR_BYTES,
    )
    check.parse_and_check(header, expectation)
    return EncryptedDisk(path=target, key=key, expectation=expectation)


@dataclass
class JindiskDisk:
    path: Path
    key: Secret
    anchor: Anchor


def jindisk_root(image: Path, target: Path) -> JindiskDisk:
    """The root as a JinDisk 2 volume that fills a disk, closed after its first session."""
    key, session_id = Secret.random(32), os.urandom(32)
    geometry = default_geometry(image.stat().st_size // BLOCK)
    with target.open("wb") as file:
        file.truncate(geometry.end * BLOCK)
    with OpenFile(target, writable=True) as device, image.open("rb") as source:
        session = create_volume(device, geometry=geometry, key=key, uuid=uuid.UUID(UUID), session_id=session_id)
        while data := source.read(1 << 20):
            session.write(source.tell() - len(data), data)
        session.close()
        return JindiskDisk(target, key, anchor_of(session.durable, still_open=False))


def export_jindisk(disk: JindiskDisk, anchor: Anchor, target: Path) -> Path:
    """What the volume holds, as a file."""
    with OpenFile(disk.path, writable=False) as device:
        volume = open_volume(device, key=disk.key, uuid=uuid.UUID(UUID), anchor=anchor)
        with target.open("wb") as out:
            for offset in range(0, volume.size_bytes, 1 << 20):
                out.write(volume.read(offset, min(1 << 20, volume.size_bytes - offset)))
    return target


def rewrite_to_cipher_null(disk: Path) -> None:
    """What a hostile host does: another cipher in both headers' data segment, checksums made right, key slot kept."""
    with disk.open("r+b") as file:
        for copy in range(2):
            file.seek(copy * layout.HEADER_BYTES)
            head = bytearray(file.read(layout.HEADER_BYTES))
            end = head.index(b"\0", layout.BINARY_BYTES)
            values = json.loads(bytes(head[layout.BINARY_BYTES : end]))
            values["segments"]["0"]["encryption"] = "cipher_null-ecb"
            text = json.dumps(values).encode()
            head[layout.BINARY_BYTES :] = text.ljust(layout.JSON_BYTES, b"\0")
            # The checksum field is 64 bytes at offset 448, zero while it is computed (LUKS2 specification, section 2).
            head[448:512] = bytes(64)
            head[448:480] = hashlib.sha256(head).digest()
            file.seek(copy * layout.HEADER_BYTES)
            file.write(head)
