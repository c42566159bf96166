"""A JinDisk 2 root inside a guest, beside dm-crypt and dm-crypt over dm-integrity on disks of the same guest.

    .venv/bin/python bench/guest/root.py

One guest boots from a JinDisk 2 volume that the agent's storage process serves, and measures that volume, a bare
virtio disk, dm-crypt (aes-xts, what LUKS2 images have) and dm-crypt over dm-integrity (aes-gcm with random nonces, 28
bytes a sector), all with sectors of 4 KiB and past the page cache (O_DIRECT), one request at a time. Another guest
boots the same root from LUKS2, for the seconds from power-on to init. Prints one JSON object: MB (10^6) and requests a
second, and each as a share of dm-crypt's. Guests run under emulation here (TCG), which makes ciphers and changes of
process expensive: the shares say more than the figures, and neither says much about hardware.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests/guest"))

# ruff: noqa: E402 (the helpers of the tests are found by the path above)
import qemu
import qemu_kernel
import testroot
from small_broker import Remembering, SmallBroker, firmware

from jindiskd.base.anchor import Anchor
from jindiskd.base.secret import Secret
from jindiskd.guest.config import BrokerPin, GuestConfig, JindiskExpectation, Luks2Expectation, RootVolume
from jindiskd.image import kmod
from jindiskd.image.initrd import build_initrd

MIB = 1 << 20
DISK_BYTES = 192 * MIB
LIMIT_S = 900
MODULES = ("dm_mod", "dm_crypt", "dm_integrity", "xts", "gcm", "ghash_generic", "authenc", "algif_aead", "aesni_intel")

INIT = """#!/usr/bin/{python} -ISB
import ctypes, fcntl, json, mmap, os, random, struct, time
os.write(1, b"\\nINIT-RUNS\\n")
libc = ctypes.CDLL(None, use_errno=True)
MIB = 1 << 20
from jindiskd.guest import dm
from jindiskd.guest.modules import load_modules
from pathlib import Path

def number(node):
    found = os.stat(node).st_rdev
    return f"{{os.major(found)}}:{{os.minor(found)}}"

def size(node):
    return int(Path("/sys/class/block", os.path.basename(node), "size").read_text())

def integrity(node, tag):
    # The first table makes the kernel write a superblock, which says how many sectors there are room for.
    words = f"{{number(node)}} 0 {{tag}} J 1 block_size:4096".encode()
    made = dm.activate("new", "", sectors=8, kind="integrity", parameters=bytearray(words))
    control = os.open(dm.CONTROL, os.O_RDWR)
    fcntl.ioctl(control, dm.DM_DEV_REMOVE, dm._padded(dm.pack_header("new", total_bytes=dm.BUFFER_BYTES)), True)
    with open(node, "rb") as disk:
        room = struct.unpack_from("<Q", disk.read(512), 16)[0] // 8 * 8
    made = dm.activate("integrity", "", sectors=room, kind="integrity", parameters=bytearray(words))
    return str(made.node), room

def measure(node):
    fd = os.open(node, os.O_RDWR | os.O_DIRECT)
    block, piece = mmap.mmap(-1, 4096), mmap.mmap(-1, MIB)
    piece.write(os.urandom(MIB))
    block.write(os.urandom(4096))
    start, length, found = 64 * MIB, 48 * MIB, {{}}
    def timed(name, count, unit, action):
        began = time.monotonic()
        for turn in range(count):
            action(turn)
        found[name] = unit * count / (time.monotonic() - began)
    def write(turn):
        os.pwritev(fd, [piece], start + turn * MIB)
        if turn == length // MIB - 1:
            os.fsync(fd)
    timed("write_mb_s", length // MIB, MIB / 1e6, write)
    timed("read_mb_s", length // MIB, MIB / 1e6, lambda turn: os.preadv(fd, [piece], start + turn * MIB))
    places = [start + random.Random(n).randrange(length // 4096) * 4096 for n in range(400)]
    timed("read_iops", len(places), 1, lambda turn: os.preadv(fd, [block], places[turn]))
    timed("write_iops", len(places), 1, lambda turn: os.pwritev(fd, [block], places[turn]))
    def flushed(turn):
        os.pwritev(fd, [block], places[turn])
        os.fsync(fd)
    timed("flushed_write_iops", 100, 1, flushed)
    os.close(fd)
    return found

try:
    load_modules(Path(line) for line in open("/modules.list").read().split())
    seen = {{"jindisk2": measure("/dev/nbd0"), "bare": measure("/dev/vdb")}}
    key = bytearray(os.urandom(64))
    words = dm.crypt_parameters("aes-xts-plain64", key, number("/dev/vdc"), offset_sectors=0, sector_bytes=4096)
    made = dm.activate("crypt", "", sectors=size("/dev/vdc"), kind="crypt", parameters=words)
    seen["dm_crypt"] = measure(str(made.node))
    node, room = integrity("/dev/vdd", 28)
    words = f"capi:gcm(aes)-random {{os.urandom(32).hex()}} 0 {{number(node)}} 0 2 integrity:28:aead sector_size:4096"
    made = dm.activate("aead", "", sectors=room, kind="crypt", parameters=bytearray(words.encode()))
    seen["dm_crypt_integrity"] = measure(str(made.node))
    os.write(1, ("\\nBENCH " + json.dumps(seen) + "\\n").encode())
except BaseException as exc:
    os.write(1, f"\\nBENCH-FAILED {{exc!r}} line {{exc.__traceback__.tb_lineno}}\\n".encode())
libc.reboot(0x4321FEDC)
"""


class Guest:
    """One machine with what serves it."""

    def __init__(self, folder: Path, kernel: qemu_kernel.GuestKernel) -> None:
        folder.mkdir()
        self.folder, self.kernel = folder, kernel

    def run(
        self,
        disk: Path,
        key: Secret,
        *,
        jindisk: Anchor | None = None,
        luks2: Luks2Expectation | None = None,
        more: tuple[Path, ...] = (),
    ) -> tuple[float, str]:
        """Boot to the end; returns the seconds from power-on to init, and the console."""
        broker = SmallBroker(self.folder, bytes(key.reveal()))
        expectation = None
        if jindisk is not None:
            Remembering(broker, key, jindisk, testroot.UUID)
            expectation = JindiskExpectation(version=2, uuid=testroot.UUID)
        config = GuestConfig(
            schema=1, image_id=testroot.UUID, platform="simulated-snp", modules=(), timeout_s=600,
            broker=BrokerPin(spki_sha256=broker.spki_sha256),
            root=RootVolume(device="/dev/vda", resource="default/image/root", luks2=luks2, jindisk=expectation),
        )  # fmt: skip
        build_initrd(config=config, modules_dir=self.kernel.modules, output=self.folder / "initrd")
        machine = qemu.Machine(
            directory=self.folder, kernel=self.kernel.kernel, initrd=self.folder / "initrd", disk=disk, more_disks=more
        )
        try:
            machine.serve(19012, broker.serve)
            machine.serve(19013, firmware)
            machine.serve(19014, lambda stream: stream.recv(1 << 16) and None)
            machine.start()
            machine.wait_for("INIT-RUNS", LIMIT_S)
            seconds = time.monotonic() - machine.began
            machine.wait(LIMIT_S)
            return seconds, machine.console
        finally:
            machine.close()


def make_root(folder: Path, kernel: qemu_kernel.GuestKernel) -> Path:
    """The small root with the measuring init, the modules it needs, and room behind the file system."""
    folder.mkdir()
    files: dict[str, bytes] = {}
    for file in kmod.needed_modules(kernel.modules, MODULES[:4], optional=MODULES[4:]):
        files[f"mod/{file.name.partition('.ko')[0]}.ko"] = kmod.module_bytes(file)
    files["modules.list"] = "\n".join(f"/{name}" for name in files).encode()
    names = ("jindiskd.guest.dm", "jindiskd.guest.modules", "mmap", "random", "fcntl", "pathlib")
    image = testroot.make_root(folder, init=INIT, files=files, modules=names)
    with image.open("r+b") as opened:
        opened.truncate(DISK_BYTES)
    return image


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="jindisk-bench-") as name:
        folder = Path(name)
        kernel = qemu_kernel.find_kernel(folder / "kernel")
        if kernel is None:
            raise SystemExit(qemu_kernel.MISSING)
        image = make_root(folder / "root", kernel)
        more = []
        for letter in "bcd":
            more.append(folder / letter)
            with more[-1].open("wb") as disk:
                disk.truncate(DISK_BYTES)
        volume = testroot.jindisk_root(image, folder / "jindisk.img")
        guest = Guest(folder / "one", kernel)
        jindisk_s, said = guest.run(volume.path, volume.key, jindisk=volume.anchor, more=tuple(more))
        line = next((line for line in said.splitlines() if line.startswith("BENCH ")), None)
        if line is None:
            raise SystemExit(f"the guest did not measure:\n{said[-2000:]}")
        figures = json.loads(line.partition(" ")[2])
        encrypted = testroot.encrypt_root(image, folder / "luks2.img")
        luks2_s, _ = Guest(folder / "two", kernel).run(
            encrypted.path, encrypted.key, luks2=encrypted.expectation, more=tuple(more)
        )
        peer = figures["dm_crypt"]
        result = {
            "seconds_to_init": {"jindisk2": round(jindisk_s, 1), "luks2": round(luks2_s, 1)},
            **{kind: {name: round(value, 1) for name, value in found.items()} for kind, found in figures.items()},
            "share_of_dm_crypt": {
                kind: {name: round(value / peer[name], 2) for name, value in found.items()}
                for kind, found in figures.items()
                if kind != "dm_crypt"
            },
        }
        print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
