"""A JinDisk root in a real kernel: released, adopted, served, closed; stale, foreign and damaged disks refused."""

import shutil
import subprocess
from pathlib import Path

import pytest
import testroot
from quick_initrd import build_initrd
from small_broker import Remembering, SmallBroker, firmware
from test_storage import SHUTTING_DOWN

from jindiskd.base.secret import Secret
from jindiskd.guest.codes import Code
from jindiskd.guest.config import BrokerPin, GuestConfig, JindiskExpectation, RootVolume

pytestmark = [pytest.mark.guest, pytest.mark.slow]

LIMIT_S = 400

# An init that stays: says how many boots it finds, adds a file of its own, makes it durable.
STAYING = """#!/usr/bin/{python} -ISB
import ctypes, os, time
libc = ctypes.CDLL(None)
libc.mount(b"/dev/nbd0", b"/", b"ext4", ctypes.c_ulong(32), None)
found = [name for name in os.listdir("/") if name.startswith("boot-")]
with open(f"/boot-{{len(found)}}", "wb") as file:
    file.write(os.urandom(1 << 20))
    file.flush()
    os.fsync(file.fileno())
os.sync()
os.write(1, f"\\nFOUND {{len(found)}}\\nREADY\\n".encode())
time.sleep(1000)
"""


@pytest.fixture(scope="session")
def volume(tmp_path_factory) -> testroot.JindiskDisk:
    """A small root whose init writes, and then behaves as systemd-shutdown does."""
    directory = tmp_path_factory.mktemp("jindisk")
    return testroot.jindisk_root(testroot.make_root(directory, init=SHUTTING_DOWN), directory / "disk.img")


class Boot:
    def __init__(self, machine, modules: Path, volume: testroot.JindiskDisk, tmp_path: Path) -> None:
        self.make, self.modules, self.tmp_path = machine, modules, tmp_path
        path = Path(shutil.copy(volume.path, tmp_path / "disk.img"))
        self.volume = testroot.JindiskDisk(path, volume.key, volume.anchor)
        self.broker = SmallBroker(tmp_path, b"")
        self.memory = Remembering(self.broker, volume.key, volume.anchor, testroot.UUID)
        self.uuid, self.timeout_s = testroot.UUID, 60

    def run(self) -> None:
        self.start()
        self.machine.wait(LIMIT_S)

    def start(self) -> None:
        config = GuestConfig(
            schema=1, image_id=testroot.UUID, platform="simulated-snp", modules=(), timeout_s=self.timeout_s,
            broker=BrokerPin(spki_sha256=self.broker.spki_sha256),
            root=RootVolume(
                device="/dev/vda", resource="default/image/root",
                jindisk=JindiskExpectation(version=2, uuid=self.uuid),
            ),
        )  # fmt: skip
        archive = self.tmp_path / "initrd"
        build_initrd(config=config, modules_dir=self.modules, output=archive)
        self.machine = self.make(initrd=archive, disk=self.volume.path)
        self.machine.record_progress()
        self.machine.serve(19012, self.broker.serve)
        self.machine.serve(19013, firmware)
        self.machine.start()


@pytest.fixture
def boot(machine, guest_kernel, volume, tmp_path) -> Boot:
    return Boot(machine, guest_kernel.modules, volume, tmp_path)


def test_life(boot) -> None:
    """Two boots: each adopts, writes and closes; what was written is there, sound, and the old copy is refused."""
    old = Path(shutil.copy(boot.volume.path, boot.tmp_path / "old.img"))
    first = boot.memory.anchor.sequence
    boot.run()
    assert boot.machine.stages == ["boot", "report", "attested", "key", "unlocked", "running"], boot.machine.console
    assert "ROOT-SEES" in boot.machine.console, boot.machine.console
    assert boot.memory.said == ["release", "adopt", "close"]
    assert not boot.memory.anchor.open
    found = testroot.export_jindisk(boot.volume, boot.memory.anchor, boot.tmp_path / "found.ext4")
    checked = subprocess.run(["/usr/sbin/e2fsck", "-fn", found], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout
    listed = subprocess.run(["/usr/sbin/debugfs", "-R", "ls /", found], capture_output=True, text=True).stdout
    assert "written-39" in listed
    boot.run()
    assert boot.memory.said == ["release", "adopt", "close"] * 2, boot.machine.console
    boot.volume.path = old
    boot.run()
    assert boot.machine.stages[-1] == f"fail {Code.STALE.value}"
    assert boot.memory.said[-2:] == ["release", f"stale {first}"]


def test_power_failure(boot, tmp_path_factory) -> None:
    """Killed while it runs, twice: the interrupted session's latest state opens, synced files are there and sound."""
    directory = tmp_path_factory.mktemp("staying")
    volume = testroot.jindisk_root(testroot.make_root(directory, init=STAYING), directory / "disk.img")
    boot.volume, boot.memory = volume, Remembering(boot.broker, volume.key, volume.anchor, testroot.UUID)
    for number in range(2):
        boot.start()
        boot.machine.wait_for("READY", LIMIT_S)
        boot.machine.close()
        assert f"FOUND {number}" in boot.machine.console
    assert boot.memory.said == ["release", "adopt"] * 2
    assert boot.memory.anchor.open
    found = testroot.export_jindisk(boot.volume, boot.memory.anchor, boot.tmp_path / "found.ext4")
    replayed = subprocess.run(["/usr/sbin/e2fsck", "-fp", found], capture_output=True, text=True)
    assert replayed.returncode in {0, 1}, replayed.stdout
    listed = subprocess.run(["/usr/sbin/debugfs", "-R", "ls /", found], capture_output=True, text=True).stdout
    assert "boot-0" in listed
    assert "boot-1" in listed


def test_other_volume(boot) -> None:
    """Another UUID: the broker is not asked for a key."""
    boot.uuid = "00000000-0000-4000-8000-000000000000"
    boot.run()
    assert boot.machine.stages == ["boot", f"fail {Code.VOLUME.value}"]
    assert boot.memory.told == []


def test_damage(boot) -> None:
    """Both superblocks altered: refused, with nothing written and nothing adopted."""
    with boot.volume.path.open("r+b") as file:
        file.seek(4096)
        file.write(bytes(64 << 10))
    boot.run()
    assert boot.machine.stages[-1] == f"fail {Code.VOLUME.value}"
    assert boot.memory.told == ["release"]


def test_wrong_key(boot) -> None:
    """A key of another volume does not open it."""
    boot.memory.key = Secret.random(32)
    boot.run()
    assert boot.machine.stages[-1] == f"fail {Code.VOLUME.value}"


def test_refused_adoption(boot) -> None:
    """A broker that has released to somebody else meanwhile: fenced, and the disk is as it was."""
    before = boot.volume.path.read_bytes()
    honest = boot.memory.answer

    def overtaken(verb: str, body: dict) -> tuple[int, bytes]:
        if verb == "adopt":
            boot.memory.pending = bytes(32)
        return honest(verb, body)

    boot.broker.more = overtaken
    boot.run()
    assert boot.machine.stages[-1] == f"fail {Code.FENCED.value}"
    assert boot.volume.path.read_bytes() == before
