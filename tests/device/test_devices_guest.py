"""Devices on a host that is a guest: real device mapper, nbd, partitions, systemd-udevd, systemd as process 1.

A Debian system boots by emulation, with this program and its interpreter laid over its /usr from a second disk; the
system files are installed as an administrator would, and the units started. Disks are plugged and unplugged by QEMU's
monitor, when the agent in the guest (device_agent.py) asks for it on the console.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import devicevolumes
import pytest

from jindiskd.base.secret import Secret
from jindiskd.luks2 import layout, populate
from jindiskd.luks2.header import make_header

ROOT = Path(__file__).resolve().parents[2]
BASE = ROOT / "build/base/debian.img"
SITE = Path(sys.prefix) / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
LIBRARIES = (
    "aiohappyeyeballs", "aiohttp", "aiosignal", "alembic", "attr", "attrs", "cffi", "click", "cryptography",
    "dbus_next", "frozenlist", "greenlet", "idna", "libvirt", "libvirtmod", "mako", "markupsafe", "multidict",
    "propcache", "pyudev", "rich", "markdown_it", "mdurl", "pygments", "sevsnpmeasure", "sqlalchemy", "structlog",
    "typing_extensions", "types", "yarl", "_cffi_backend", "pycparser",
)  # fmt: skip
"""What the program imports; the whole of site-packages would be ten times as large."""
COMMAND = "/bin/sh -c 'mount -o ro LABEL=payload /mnt && exec /bin/sh /mnt/run'"
APPEND = (
    "root=LABEL=cloudimg-rootfs console=ttyS0 quiet panic=5 no_timer_check mitigations=off tsc=reliable "
    f'systemd.mask=guest-witness.service systemd.run="{COMMAND}" systemd.run_success_action=poweroff-force'
)
RUN = """
exec >/dev/ttyS0 2>&1
set -e
modprobe overlay
mkdir -p /run/over/up /run/over/work
mount -t overlay -o lowerdir=/mnt/usr:/usr,upperdir=/run/over/up,workdir=/run/over/work overlay /usr
exec /usr/bin/python3 -B /mnt/device_agent.py
"""
PROGRAM = "#!/usr/bin/python3 -I\nimport sys\nfrom jindiskd.{module} import main\nsys.exit(main())\n"
SCENES = os.environ.get("JINDISK_DEVICE_SCENES", "plug wrong_key jindisk2+luks2 restart+overflow kill unplug")
"""What is tried, in this order, some of it together; a part of it helps whoever looks for a fault."""
LIMIT_S = 1500
MIB = 1 << 20

pytestmark = [pytest.mark.guest, pytest.mark.slow, pytest.mark.long]


def need() -> None:
    missing = [name for name in ("qemu-system-x86_64", "debugfs", "mke2fs", "sfdisk") if not shutil.which(name)]
    if missing or not BASE.exists():
        pytest.skip(f"run scripts/setup and scripts/make-base-image: {', '.join(missing) or BASE} is missing")


def boot_files(target: Path) -> tuple[Path, Path]:
    """The kernel and initrd of the base image."""
    table = json.loads(subprocess.check_output(["sfdisk", "--json", BASE]))["partitiontable"]
    start = next(part["start"] for part in table["partitions"] if part["name"] == "root") * 512
    subprocess.run(
        ["debugfs", "-R", f"rdump /boot {target}", f"{BASE}?offset={start}"], check=True, capture_output=True
    )
    (kernel,), (initrd,) = (target / "boot").glob("vmlinuz-*"), (target / "boot").glob("initrd.img-*")
    return kernel, initrd


def shared_objects(files: list[Path]) -> set[Path]:
    """Every library that programs and modules need, but the C library itself, which the guest has."""
    done = subprocess.run(["ldd", *files], capture_output=True, text=True, check=False).stdout
    found = {Path(line.split("=>")[1].split()[0]) for line in done.splitlines() if "=> /" in line}
    own = ("libc.so", "libm.so", "libpthread", "libdl.so", "librt.so", "ld-linux", "libresolv")
    return {path for path in found if not path.name.startswith(own)}


def make_payload(folder: Path) -> Path:
    """A file system with an interpreter, the program and what it imports, and the agent."""
    tree = folder / "payload"
    minor = f"python{sys.version_info.major}.{sys.version_info.minor}"
    packages = tree / f"usr/local/lib/{minor}/dist-packages"
    left_out = shutil.ignore_patterns("test", "tests", "idlelib", "config-*", "lib2to3", "ensurepip")
    shutil.copytree(f"/usr/lib/{minor}", tree / f"usr/lib/{minor}", symlinks=True, ignore=left_out)
    (tree / "usr/bin").mkdir(parents=True)
    shutil.copy2(f"/usr/bin/{minor}", tree / f"usr/bin/{minor}")
    (tree / "usr/bin/python3").symlink_to(minor)
    packages.mkdir(parents=True)
    for path in SITE.iterdir():
        if path.name.split(".")[0] in LIBRARIES or path.name.endswith(".libs"):
            if path.is_dir():
                shutil.copytree(path, packages / path.name, ignore=shutil.ignore_patterns("tests", "testing"))
            else:
                shutil.copy2(path, packages / path.name)
        elif path.suffix == ".dist-info" and path.name.split("-")[0].lower() in {"dbus_next", "click", "rich"}:
            shutil.copytree(path, packages / path.name)
    shutil.copytree(ROOT / "jindiskd", packages / "jindiskd")
    for name, source in {"interfaces": "dbus", "units": "systemd", "rules": "udev"}.items():
        shutil.copytree(ROOT / source, packages / "jindiskd" / name)
    for name, module in {"jindiskd": "daemon", "jindiskctl": "cli.main"}.items():
        (tree / "usr/bin" / name).write_text(PROGRAM.format(module=module))
        (tree / "usr/bin" / name).chmod(0o755)
    objects = [path for path in tree.rglob("*.so*") if path.is_file()] + [tree / f"usr/bin/{minor}"]
    libraries = tree / "usr/lib/x86_64-linux-gnu"
    libraries.mkdir(parents=True)
    for path in [*shared_objects(objects), *Path("/lib/x86_64-linux-gnu").glob("libudev.so.1*")]:
        if not (libraries / path.name).exists():
            shutil.copy2(path.resolve(), libraries / path.name)
    # Compiled here, where it costs little.
    subprocess.run([sys.executable, "-m", "compileall", "-q", "-j2", "-s", tree, "-p", "/", packages],
                   check=True, capture_output=True)  # fmt: skip
    shutil.copy2(Path(__file__).with_name("device_agent.py"), tree)
    (tree / "run").write_text(RUN)
    (tree / "scenes").write_text(SCENES)
    image = folder / "payload.ext4"
    bytes_ = sum(path.lstat().st_size + 4096 for path in tree.rglob("*"))
    with image.open("wb") as file:
        file.truncate(bytes_ * 5 // 4 + 16 * MIB)
    subprocess.run(["mke2fs", "-q", "-t", "ext4", "-L", "payload", "-d", tree, image], check=True)
    return image


def file_system(path: Path, size: int, word: str) -> Path:
    """An ext4 file system with a file."""
    tree = path.with_name(path.name + ".tree")
    tree.mkdir()
    (tree / "word").write_text(word)
    with path.open("wb") as file:
        file.truncate(size)
    subprocess.run(["mke2fs", "-q", "-t", "ext4", "-b", "4096", "-d", tree, path], check=True)
    return path


def make_disk(folder: Path) -> Path:
    """A disk with a partition of ours in each format, and one of nobody's."""
    clear = file_system(folder / "clear", 32 * MIB, "inside")
    (folder / "key").write_bytes(devicevolumes.KEY)
    (folder / "key").chmod(0o600)
    words = [Path(sys.executable).with_name("jindisksetup"), "load", clear, folder / "jindisk", "--uuid",
             devicevolumes.UUID, "--label", "a label", "--key-file", folder / "key"]  # fmt: skip
    subprocess.run(words, check=True, capture_output=True)
    volume_key = Secret.random(layout.KEY_BYTES)
    header = make_header(
        volume_key=volume_key, passphrase=Secret(devicevolumes.KEY), uuid=devicevolumes.UUID2, data_bytes=32 * MIB,
        rng=os.urandom,
    )  # fmt: skip
    luks = folder / "luks"
    luks.write_bytes(header.ljust(layout.DATA_OFFSET_BYTES, b"\0"))
    os.truncate(luks, layout.DATA_OFFSET_BYTES + 32 * MIB)
    with clear.open("rb") as source, luks.open("rb+") as target:
        populate.populate(
            source.fileno(), target.fileno(), [(0, 32 * MIB)], volume_key=volume_key,
            target_offset_bytes=layout.DATA_OFFSET_BYTES,
        )  # fmt: skip
    disk, parts = folder / "disk.img", [folder / "jindisk", luks, clear]
    sizes = [-(-path.stat().st_size // MIB) for path in parts]
    with disk.open("wb") as file:
        file.truncate((sum(sizes) + 2) * MIB)
    kinds = ["4A0FEB3F-F302-4B40-A4BA-8B27E42E994B", "CA7D7CCB-63ED-4C53-861C-1742536059CC", "L"]
    lines, at = ["label: gpt"], 1
    for kind, size, path in zip(kinds, sizes, parts, strict=True):
        lines.append(f"start={at * 2048}, size={size * 2048}, type={kind}")
        with disk.open("rb+") as file:
            file.seek(at * MIB)
            file.write(path.read_bytes())
        at += size
    subprocess.run(["sfdisk", "-q", disk], input="\n".join(lines).encode(), check=True)
    return disk


class Machine:
    """The host that is a guest, its console and its monitor."""

    def __init__(self, folder: Path, disk: Path) -> None:
        kernel, initrd = boot_files(folder)
        payload = make_payload(folder)
        self.console, self.disk, self._qmp = folder / "console", disk, folder / "qmp"
        words = [
            "qemu-system-x86_64", "-machine", "q35,accel=tcg", "-cpu", "max", "-smp", "2", "-m", "1536", "-nodefaults",
            "-display", "none", "-no-reboot", "-serial", f"file:{self.console}",
            "-qmp", f"unix:{self._qmp},server=on,wait=off",
            "-kernel", kernel, "-initrd", initrd, "-append", APPEND,
            "-drive", f"if=virtio,format=raw,snapshot=on,file={BASE}",
            "-drive", f"if=virtio,format=raw,readonly=on,file={payload}",
            "-device", "virtio-scsi-pci,id=scsi",
            "-blockdev", f"node-name=disk,driver=raw,file.driver=file,file.filename={disk}",
        ]  # fmt: skip
        self.log = folder / "qemu.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(list(map(str, words)), stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def ask(self, command: str, **arguments: Any) -> Any:
        """One command to QEMU's monitor."""
        with socket.socket(socket.AF_UNIX) as stream:
            stream.settimeout(120)
            stream.connect(os.fspath(self._qmp))
            lines = stream.makefile("rw")
            lines.readline()
            for line in ({"execute": "qmp_capabilities"}, {"execute": command, "arguments": arguments}):
                lines.write(json.dumps(line) + "\n")
                lines.flush()
                while "event" in (answer := json.loads(lines.readline())):
                    pass
                assert "return" in answer, (command, answer)
            return answer["return"]

    def said(self) -> str:
        return self.console.read_text(errors="replace") if self.console.exists() else ""

    def run(self) -> dict[str, Any]:
        """Do what the agent asks for until it is done; what it found."""
        done, limit = 0, time.monotonic() + LIMIT_S
        while True:
            lines = [line for line in self.said().split("\n")[:-1] if "DEVICE-AGENT " in line]
            for line in lines[done:]:
                done += 1
                word = line.partition("DEVICE-AGENT ")[2].strip()
                if word == "plug":
                    self.ask("device_add", driver="scsi-hd", drive="disk", id="one", bus="scsi.0", serial="one")
                elif word == "unplug":
                    self.ask("device_del", id="one")
                elif word.startswith("found "):
                    return json.loads(word.removeprefix("found "))
            text = self.said()[-6000:]
            assert self.process.poll() is None, f"the machine ended:\n{text}\n{self.log.read_text()}"
            assert time.monotonic() < limit, f"the guest is not done:\n{text}"
            time.sleep(0.2)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """What the agent found; one boot for all tests."""
    need()
    folder = tmp_path_factory.mktemp("host")
    machine = Machine(folder, make_disk(folder))
    try:
        facts = machine.run()
        facts["console"] = machine.said()
        print(json.dumps({name: value for name, value in facts.items() if name != "console"}, indent=1))
        assert "fault" not in facts, f"{facts['fault']}\n{facts['console'][-6000:]}"
        yield facts
    finally:
        machine.close()
        with contextlib.suppress(OSError):
            shutil.rmtree(folder / "payload")


CLOSED = {"State": "closed", "MappedNode": "", "OpenedBy": 4294967295, "Reason": ""}


def test_partitions_of_ours_are_seen_and_others_not(found):
    """By udev's rules on a disk that was plugged in while the service ran."""
    first, second = found["plugged"]
    assert (first["Kind"], first["Volume"], first["Label"]) == ("jindisk2", devicevolumes.UUID, "a label")
    assert (second["Kind"], second["Volume"]) == ("luks2", devicevolumes.UUID2)
    for item in (first, second):
        assert item.items() >= CLOSED.items()
        assert item["Image"] == ""
    assert found["lsblk"] == ["crypto", "jindisk"]
    assert found["helper exposed"] <= 2.5


@pytest.mark.parametrize("kind", ["jindisk2", "luks2"])
def test_open_mount_write_close(found, kind):
    """In the kernel's own file system, and what was written is there when it is opened again, for reading alone."""
    life = found[kind]
    assert life["open"]["State"] == "open"
    assert life["open"]["OpenedBy"] == 0
    assert life["open"]["MappedNode"].startswith("/dev/nbd" if kind == "jindisk2" else "/dev/dm-")
    assert life["word"] == "inside"
    assert life["busy"] == "Busy"
    assert life["again"] == "Busy"
    assert life["closed"].items() >= CLOSED.items()
    assert life["read only"] is True
    assert life["written"] == "x" * 100
    assert life["read-only file system"]


def test_a_wrong_key_opens_nothing(found):
    assert found["wrong key"] == {"jindisk2": "VolumeUnauthentic", "luks2": "WrongKey"}


def test_a_restarted_service_shows_what_is_open_and_closes_it(found):
    assert found["after restart"]["State"] == "open"
    assert found["after restart"]["MappedNode"] == found["before restart"]["MappedNode"]
    assert found["closed after restart"].items() >= CLOSED.items()


def test_a_killed_server_is_shown_and_its_device_closed(found):
    """Every process of the helper's is killed while a file system is mounted: no device is left for good."""
    assert found["killed"]["State"] == "failed"
    assert found["killed"]["Reason"]
    assert found["closed after kill"].items() >= CLOSED.items()
    assert found["kept after kill"] == "y" * 100


def test_a_disk_that_is_taken_away_while_open(found):
    """Lost as long as it is mounted, and gone by itself afterwards; nothing stays mapped."""
    assert found["lost"]["State"] == "lost"
    assert found["lost"]["Node"] == ""
    assert found["after unmount"] == []
    assert found["left"] == []


def test_lost_events_cost_nothing(found):
    """The kernel drops what a small buffer cannot take; the watch looks at everything again, and goes on."""
    assert found["overruns"] >= 1
    assert found["seen after overrun"] == 2
    assert found["heard after overrun"]
