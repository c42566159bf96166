"""Data volumes in a real kernel, with hosts that exchange, double, leave out and add disks: the guest says which, and
asks for no key."""

import dataclasses
import json
import os
import shutil
import uuid
from pathlib import Path

import pytest
import testroot
from quick_initrd import build_initrd
from small_broker import Remembering, SmallBroker, firmware

from jindiskd.base.secret import Secret
from jindiskd.guest.codes import Code
from jindiskd.guest.config import BrokerPin, DataVolume, GuestConfig, JindiskExpectation, RootVolume, serial_of
from jindiskd.jindisk.create import create_volume
from jindiskd.jindisk.device import OpenFile
from jindiskd.jindisk.geometry import BLOCK, default_geometry
from jindiskd.jindisk.session import Session
from jindiskd.jindisk.volume import anchor_of, open_volume

pytestmark = [pytest.mark.guest, pytest.mark.slow]

LIMIT_S = 500
MIB = 1 << 20


@dataclasses.dataclass
class Volume:
    """A data volume of 16 MiB, which nothing was written to."""

    name: str
    directory: Path

    def __post_init__(self) -> None:
        self.uuid, self.key = str(uuid.uuid4()), Secret.random(32)
        geometry, self.path = default_geometry(16 * MIB // BLOCK), self.directory / f"{self.name}.img"
        with self.path.open("wb") as file:
            file.truncate(geometry.end * BLOCK)
        with OpenFile(self.path, writable=True) as device:
            session = create_volume(
                device, geometry=geometry, key=self.key, uuid=uuid.UUID(self.uuid), session_id=os.urandom(32)
            )
            session.close()
            self.anchor = anchor_of(session.durable, still_open=False)

    @property
    def config(self) -> DataVolume:
        return DataVolume(
            name=self.name, resource=f"default/image/{self.name}",
            jindisk=JindiskExpectation(version=2, uuid=self.uuid),
        )  # fmt: skip


class Boot:
    """A guest with a root and the volumes `one` and `two`."""

    def __init__(self, machine, modules: Path, root: testroot.JindiskDisk, tmp_path: Path) -> None:
        self.make, self.modules, self.tmp_path = machine, modules, tmp_path
        self.root = Path(shutil.copy(root.path, tmp_path / "disk.img"))
        self.one, self.two = Volume("one", tmp_path), Volume("two", tmp_path)
        self.broker = SmallBroker(tmp_path, b"")
        known = {testroot.UUID: Remembering(self.broker, root.key, root.anchor, testroot.UUID)}
        for volume in (self.one, self.two):
            known[volume.uuid] = Remembering(self.broker, volume.key, volume.anchor, volume.uuid)
            known[volume.uuid].resource = f"default/image/{volume.name}"
        self.known = known
        self.broker.more = lambda verb, body: known[body["volume"]].answer(verb, body)
        self.timeout_s = 120

    def run(self, *disks: tuple[str, Path]) -> list[str]:
        """Start with these disks, given as serial number and file; returns what the guest told of itself."""
        config = GuestConfig(
            schema=1, image_id=testroot.UUID, platform="simulated-snp", modules=(), timeout_s=self.timeout_s,
            broker=BrokerPin(spki_sha256=self.broker.spki_sha256),
            root=RootVolume(
                device="/dev/vda", resource="default/image/root",
                jindisk=JindiskExpectation(version=2, uuid=testroot.UUID),
            ),
            volumes=(self.one.config, self.two.config),
        )  # fmt: skip
        archive = self.tmp_path / "initrd"
        build_initrd(config=config, modules_dir=self.modules, output=archive)
        self.machine = self.make(initrd=archive, serials=(*disks[:1], ("", self.root), *disks[1:]))
        self.machine.record_progress()
        self.machine.serve(19012, self.broker.serve)
        self.machine.serve(19013, firmware)
        self.machine.start()
        self.machine.wait(LIMIT_S)
        return list(self.machine.stages)

    @property
    def said(self) -> dict[str, list[str]]:
        names = {testroot.UUID: "root", self.one.uuid: "one", self.two.uuid: "two"}
        return {names[volume]: memory.said for volume, memory in self.known.items()}


LOOKING = """#!/usr/bin/{python} -ISB
import ctypes, json, os
seen = {{
    "links": {{name: os.path.realpath("/dev/disk/by-jindisk/" + name) for name in os.listdir("/dev/disk/by-jindisk")}},
    "rules": open("/run/udev/rules.d/61-jindisk-volumes.rules").read(),
    "beginnings": {{name: open("/dev/disk/by-jindisk/" + name, "rb").read(16).decode("latin-1")
                   for name in os.listdir("/dev/disk/by-jindisk")}},
}}
os.write(1, ("\\nROOT-SEES " + json.dumps(seen) + "\\n").encode())
os.sync()
ctypes.CDLL(None).reboot(0x4321FEDC)
"""


@pytest.fixture(scope="session")
def looking(tmp_path_factory) -> testroot.JindiskDisk:
    directory = tmp_path_factory.mktemp("looking")
    return testroot.jindisk_root(testroot.make_root(directory, init=LOOKING), directory / "disk.img")


@pytest.fixture
def boot(machine, guest_kernel, looking, tmp_path) -> Boot:
    return Boot(machine, guest_kernel.modules, looking, tmp_path)


def given(*volumes: Volume) -> list[tuple[str, Path]]:
    return [(serial_of(volume.name), volume.path) for volume in volumes]


def test_exchanged_disks_are_refused(boot) -> None:
    """Each with the other's serial number: the serial number is the host's word, what is on the disk counts."""
    stages = boot.run((serial_of("one"), boot.two.path), (serial_of("two"), boot.one.path))
    assert stages[-1] == f"fail {Code.DATA_VOLUME.value}", boot.machine.console
    assert boot.broker.asked == []


@pytest.mark.long
def test_every_volume_with_one_attestation(boot) -> None:
    """In whatever order the host attaches them, with a disk of its own among them: three volumes, one report."""
    stray = boot.tmp_path / "stray.img"
    shutil.copy(boot.one.path, stray)
    stages = boot.run(*given(boot.two), ("jd-other", stray), ("", stray), *given(boot.one))
    assert stages == ["boot", "report", "attested", "key", "unlocked", "running"], boot.machine.console
    assert [asked for asked in boot.broker.asked if "attest" in asked] == ["POST /kbs/v0/attest"]
    assert boot.said == {name: ["release", "adopt"] for name in ("root", "one", "two")}
    line = next(line for line in boot.machine.console.splitlines() if line.startswith("ROOT-SEES"))
    seen = json.loads(line.removeprefix("ROOT-SEES "))
    assert seen["links"] == {"one": "/dev/nbd1", "two": "/dev/nbd2"}
    assert 'KERNEL=="nbd2", SYMLINK+="disk/by-jindisk/two"' in seen["rules"]
    assert set(seen["beginnings"].values()) == {"\0" * 16}


@pytest.mark.long
def test_a_disk_that_is_there_twice_is_refused(boot) -> None:
    """Which of them is right is not for the guest to find out."""
    copy = Path(shutil.copy(boot.one.path, boot.tmp_path / "copy.img"))
    stages = boot.run(*given(boot.one, boot.two), (serial_of("one"), copy))
    assert stages[-1] == f"fail {Code.DATA_DOUBLE.value}", boot.machine.console
    assert boot.broker.asked == []


@pytest.mark.long
def test_a_disk_that_is_missing_is_named(boot) -> None:
    """A guest with half of its data does not start."""
    stages = boot.run(*given(boot.two))
    assert stages[-1] == f"fail {Code.DATA_MISSING.value}", boot.machine.console
    assert boot.broker.asked == []


@pytest.mark.long
def test_a_disk_under_a_false_name_is_refused(boot) -> None:
    """With the right identification block, which anybody can write, and another volume behind it: the key decides."""
    other = Volume("other", boot.tmp_path)
    with boot.one.path.open("rb") as right, other.path.open("r+b") as false:
        false.write(right.read(BLOCK))
    stages = boot.run((serial_of("one"), other.path), *given(boot.two))
    assert stages[-1] == f"fail {Code.DATA_VOLUME.value}", boot.machine.console
    # The root was open by then, and is closed in order.
    assert boot.said["root"] == ["release", "adopt", "close"]
    assert boot.said["one"] == ["release"]


@pytest.mark.long
def test_a_copy_of_the_root_beside_it(boot) -> None:
    """Neither of the two is where the root is expected: the serial number says which, or no key is asked for."""
    copy = Path(shutil.copy(boot.root, boot.tmp_path / "copy.img"))
    stray = boot.tmp_path / "stray.img"
    stray.write_bytes(bytes(MIB))
    stages = boot.run(("", stray), *given(boot.one, boot.two), ("", copy))
    assert stages == ["boot", f"fail {Code.ROOT_DOUBLE.value}"], boot.machine.console
    assert boot.broker.asked == []
    stages = boot.run(("", stray), *given(boot.one, boot.two), (serial_of("root"), copy))
    assert stages[-1] == "running", boot.machine.console
    assert copy.read_bytes() != boot.root.read_bytes(), "the copy was opened, which writes its session down"


@pytest.mark.long
def test_an_old_copy_is_told_of(boot) -> None:
    """Of any of the volumes; those that are open by then are closed in order."""
    old = Path(shutil.copy(boot.two.path, boot.tmp_path / "old.img"))
    with OpenFile(boot.two.path, writable=True) as device:
        volume = open_volume(device, key=boot.two.key, uuid=uuid.UUID(boot.two.uuid), anchor=boot.two.anchor)
        session = Session(volume, session_id=os.urandom(32))
        session.begin()
        session.write(0, b"x" * BLOCK)
        session.close()
        boot.known[boot.two.uuid].anchor = anchor_of(session.durable, still_open=False)
    stages = boot.run(*given(boot.one), (serial_of("two"), old))
    assert stages[-1] == f"fail {Code.STALE.value}", boot.machine.console
    assert boot.said["root"] == boot.said["one"] == ["release", "adopt", "close"]
    assert boot.said["two"] == ["release", f"stale {boot.two.anchor.sequence}"]
    assert old.read_bytes() != boot.two.path.read_bytes()
