"""The initrd in a real kernel under emulation: the way to the root, and every way not to get there.

No guest here may run longer than its time limit plus a few seconds, print anything but its code, or boot what it
should not.
"""

import functools
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import testroot
from qemu import Machine
from quick_initrd import build_initrd
from small_broker import SmallBroker, firmware

from jindiskd.guest.codes import Code
from jindiskd.guest.config import BrokerPin, DataVolume, GuestConfig, RootVolume, serial_of
from jindiskd.image import cpio, initrd, python_closure

pytestmark = [pytest.mark.guest, pytest.mark.slow]

TIMEOUT_S = 200  # of the image; the tests of time have limits of their own
SLACK_S = 60
LIMIT_S = 400  # for a run on a loaded machine
STAGES = ["boot", "report", "attested", "key", "unlocked", "running"]


class Boot:
    """A configured guest with its broker, firmware and disk; each part may be exchanged before `run`."""

    def __init__(self, machine: Callable[..., Machine], modules: Path, disk: testroot.EncryptedDisk, tmp_path: Path):
        self.make, self.modules, self.tmp_path = machine, modules, tmp_path
        self.disk: Path | None = disk.path
        self.expectation = disk.expectation
        self.broker = SmallBroker(tmp_path, bytes(disk.key.reveal()))
        self.serve_broker: Callable[[socket.socket], None] | None = self.broker.serve
        self.serve_firmware: Callable[[socket.socket], None] | None = firmware
        self.settings: dict[str, object] = {}
        self.root: dict[str, object] = {}
        self.arguments: dict[str, object] = {}
        self.build = build_initrd
        self.machine: Machine

    def config(self) -> GuestConfig:
        root = {"device": "/dev/vda", "resource": "default/image/root", "luks2": self.expectation, **self.root}
        settings = {
            "schema": 1, "image_id": testroot.UUID, "platform": "simulated-snp", "modules": (),
            "broker": BrokerPin(spki_sha256=self.broker.spki_sha256), "root": RootVolume(**root),
            "timeout_s": TIMEOUT_S, **self.settings,
        }  # fmt: skip
        return GuestConfig(**settings)

    def own_disk(self) -> Path:
        """A copy of the disk to be altered."""
        assert self.disk is not None
        self.disk = Path(shutil.copy(self.disk, self.tmp_path / "altered.img"))
        return self.disk

    def run(self) -> float:
        archive = self.tmp_path / "initrd"
        self.build(config=self.config(), modules_dir=self.modules, output=archive)
        self.machine = self.make(initrd=archive, disk=self.disk, **self.arguments)
        self.machine.record_progress()
        if self.serve_broker:
            self.machine.serve(19012, self.serve_broker)
        if self.serve_firmware:
            self.machine.serve(19013, self.serve_firmware)
        self.machine.start()
        return self.machine.wait(LIMIT_S)

    def seconds_of_agent(self) -> float:
        """From the guest's first word to its last: what the image's own time limits."""
        return self.machine.lines[-1][0] - self.machine.lines[0][0]

    def expect(self, code: Code, stages: list[str]) -> None:
        """The guest ended with this code and showed nothing else."""
        assert self.machine.stages == [*stages, f"fail {code.value}"], self.machine.console
        said = [line for line in self.machine.console.splitlines() if line.strip() and not line.startswith("[")]
        assert said == [f"jindisk: {code.value}"]
        assert "ROOT-SEES" not in self.machine.console


@pytest.fixture
def boot(machine, guest_kernel, encrypted, tmp_path) -> Boot:
    return Boot(machine, guest_kernel.modules, encrypted, tmp_path)


def test_success(boot) -> None:
    """From power-on to the system's init: stages in order, bound report, clean hand-over, nothing of ours left."""
    boot.build = initrd.build_initrd
    boot.run()
    assert boot.machine.stages == STAGES
    # The broker hears of the guest before its time is over: after 4 s on an idle machine, and no limit of its own here.
    report = next(seconds for seconds, stage in boot.machine.lines if stage == "report")
    assert report < boot.settings.get("timeout_s", 120)
    assert boot.broker.bound == [True]
    assert boot.broker.asked[-1] == "GET /kbs/v0/resource/default/image/root"
    line = next(line for line in boot.machine.console.splitlines() if "ROOT-SEES" in line)
    seen = json.loads(line.partition("ROOT-SEES ")[2])
    assert seen["pid"] == 1
    assert seen["secret"] == "inside"
    assert seen["children"] == []
    assert seen["streams"] == ["/dev/console"] * 3
    assert seen["descriptors"] == [0, 1, 2, 3]  # the last is the listing's own
    assert ["/dev/mapper/root", "/", "ext4", "ro,relatime"] in seen["mounts"]
    assert [mount[1] for mount in seen["mounts"]] == ["/proc", "/sys", "/dev", "/run", "/"]
    assert seen["mapper"]["root"] == "/dev/dm-0"
    assert "sysroot" not in seen["root"]
    assert "init" not in seen["root"]
    assert len(seen["udev"]) == 1
    assert seen["settings"] == [["4", "4", "1", "7"], ["5"], ["0"]]  # as `quiet panic=5` set them
    # The initrd takes 36 MiB unpacked; of 1 GiB, the rest of what the kernel can give is free again.
    assert seen["free_kib"] > 900_000
    said = [text for text in boot.machine.console.splitlines() if text.strip() and not text.startswith("[")]
    assert len(said) == 1


def test_a_data_volume_beside_the_root(boot, tmp_path) -> None:
    """By the same attestation, mounted at a place that the root does not have, and known by its name; the root is not
    where the configuration expects it, but a disk of the host's own."""
    clear = tmp_path / "data.ext4"
    with clear.open("wb") as file:
        file.truncate(16 << 20)
    subprocess.run(["/usr/sbin/mkfs.ext4", "-q", "-F", "-b", "4096", clear], check=True, capture_output=True)
    data = testroot.encrypt_root(clear, tmp_path / "data.img")
    resource = "default/image/data"
    boot.broker.keys[resource] = bytes(data.key.reveal())
    boot.settings["volumes"] = (
        DataVolume(name="data", resource=resource, luks2=data.expectation, mount="/srv/da.ta/here"),
    )
    boot.arguments["serials"] = (("", clear), (serial_of("data"), data.path), ("", boot.disk))
    boot.disk = None
    boot.run()
    assert boot.machine.stages == STAGES, boot.machine.console
    assert [asked for asked in boot.broker.asked if "/auth" in asked] == ["POST /kbs/v0/auth"]
    line = next(line for line in boot.machine.console.splitlines() if "ROOT-SEES" in line)
    seen = json.loads(line.partition("ROOT-SEES ")[2])
    assert ["/dev/mapper/jindisk-data", "/srv/da.ta/here", "ext4", "rw,relatime"] in seen["mounts"]
    assert ["/dev/mapper/root", "/", "ext4", "ro,relatime"] in seen["mounts"]
    assert seen["mapper"] == {"root": "/dev/dm-0", "jindisk-data": "/dev/dm-1", "control": "/dev/mapper/control"}
    assert seen["children"] == []


@pytest.mark.long
def test_a_program_gives_the_key_of_each_volume(boot, tmp_path) -> None:
    """It is run for each, by the volume's UUID, and no broker is asked."""
    clear = tmp_path / "data.ext4"
    with clear.open("wb") as file:
        file.truncate(16 << 20)
    subprocess.run(["/usr/sbin/mkfs.ext4", "-q", "-F", "-b", "4096", clear], check=True, capture_output=True)
    data = testroot.encrypt_root(clear, tmp_path / "data.img", uuid="0f3b4bb5-6b8b-4c7e-9d3c-0e2f11223344")
    keys = {boot.expectation.uuid: boot.broker.key.hex(), data.expectation.uuid: bytes(data.key.reveal()).hex()}
    program = "#!/usr/bin/{python} -ISB\nimport os\nos.write(1, bytes.fromhex({keys}[os.environ['JINDISK_VOLUME']]))\n"
    python = f"python3.{sys.version_info.minor}"
    text = program.format(python=python, keys=keys).encode()
    boot.build = functools.partial(initrd.build_initrd, key_program=text)
    boot.settings["volumes"] = (
        DataVolume(name="data", resource="default/image/data", luks2=data.expectation, mount="/srv/data"),
    )
    boot.arguments["serials"] = (("", boot.disk), (serial_of("data"), data.path))
    boot.disk = None
    boot.run()
    assert boot.machine.stages == STAGES, boot.machine.console
    assert "/dev/mapper/jindisk-data" in boot.machine.console
    assert boot.broker.asked == []


def test_key_is_nowhere_on_the_console(boot) -> None:
    """Neither the key nor its hexadecimal form is printed."""
    boot.arguments["cmdline"] = "console=ttyS0 panic=5 noresume ignore_loglevel"
    boot.run()
    assert boot.machine.stages == STAGES
    console = boot.machine.directory.joinpath("console").read_bytes()
    assert boot.broker.key not in console
    assert boot.broker.key.hex().encode() not in console.lower()


def test_device_missing(boot) -> None:
    """No disk: the broker is never asked."""
    boot.disk = None
    boot.settings["timeout_s"] = 8
    boot.run()
    boot.expect(Code.DEVICE_MISSING, ["boot"])
    assert boot.broker.asked == []


def test_other_disk(boot) -> None:
    """A disk of the host's own, in the clear and mountable, is not looked at."""
    disk = boot.tmp_path / "clear.img"
    disk.write_bytes(bytes(2 << 20))
    boot.disk = disk
    boot.run()
    boot.expect(Code.HEADER, ["boot"])
    assert boot.broker.asked == []


def test_header_rewritten_to_cipher_null(boot) -> None:
    """The genuine key slot with a null cipher (CVE-2025-59054), checksums right, is refused before the key is asked."""
    disk = boot.own_disk()
    testroot.rewrite_to_cipher_null(disk)
    boot.run()
    boot.expect(Code.HEADER, ["boot"])
    assert boot.broker.asked == []


def test_short_disk(boot) -> None:
    """A disk shorter than its header."""
    os.truncate(boot.own_disk(), 512 << 10)
    boot.run()
    boot.expect(Code.HEADER, ["boot"])


def test_truncated_data(boot) -> None:
    """The header is genuine, the data is cut off: the mapping does not fit the device."""
    os.truncate(boot.own_disk(), 4 << 20)
    boot.run()
    boot.expect(Code.ACTIVATION, STAGES[:4])


def test_damaged_root(boot) -> None:
    """A garbled superblock does not mount."""
    disk = boot.own_disk()
    with disk.open("r+b") as file:
        file.seek(boot.expectation.header_bytes)
        file.write(bytes(8192))
    boot.run()
    boot.expect(Code.ROOT_MOUNT, STAGES[:5])


def test_wrong_key(boot) -> None:
    """A key of another image."""
    boot.broker.key = bytes(32)
    boot.run()
    boot.expect(Code.KEY, STAGES[:4])


@pytest.mark.parametrize("init", ["/sbin/none", "/etc/secret"])
def test_no_init(boot, init) -> None:
    """The root has no such program, or it is none."""
    boot.settings["init"] = init
    boot.run()
    boot.expect(Code.INIT_MISSING, STAGES[:5])


def test_init_does_not_run(boot) -> None:
    """What is executable but no program fails the hand-over, after the initrd is gone: still a code and power off."""
    boot.settings["init"] = "/etc/broken-init"
    boot.run()
    assert boot.machine.stages == [*STAGES, f"fail {Code.SWITCH_ROOT.value}"]
    assert f"jindisk: {Code.SWITCH_ROOT.value}" in boot.machine.console


def test_no_firmware(boot) -> None:
    """The platform does not answer."""
    boot.serve_firmware = None
    boot.run()
    boot.expect(Code.REPORT, ["boot"])


def test_simulation_is_no_substitute(boot, monkeypatch) -> None:
    """An image for the real platform does not ask the simulated firmware, though it is there."""
    monkeypatch.setattr(initrd, "TEE_MODULES", {})  # the kernel at hand may lack the driver
    boot.settings["platform"] = "snp"
    boot.run()
    boot.expect(Code.REPORT, ["boot"])


@pytest.mark.parametrize(
    ("step", "kind", "code"),
    [
        ("resource", "PolicyDeny", Code.POLICY_DENIED),
        ("attest", "AttestationError", Code.EVIDENCE_REFUSED),
        ("resource", "PluginNotFound", Code.BROKER_TROUBLE),
    ],
)
def test_refusals(boot, step, kind, code) -> None:
    """What the broker says in its protocol ends in the code for it; a policy denial at once."""
    boot.broker.refuse(step, kind)
    boot.run()
    assert boot.machine.stages[-1] == f"fail {code.value}"
    assert set(boot.machine.stages[:-1]) == {"boot", "report"}
    if kind == "PolicyDeny":
        assert sum("resource" in asked for asked in boot.broker.asked) == 1


def test_false_broker(boot) -> None:
    """Another key pair answers: nothing of the protocol is sent to it."""
    false = SmallBroker(boot.tmp_path, boot.broker.key)
    boot.serve_broker = false.serve
    boot.run()
    boot.expect(Code.BROKER_NOT_TRUSTED, ["boot"])
    assert false.asked == []


def test_broker_down(boot) -> None:
    """Nobody listens: within the image's time it is over."""
    boot.serve_broker = None
    boot.settings["timeout_s"] = 8
    boot.run()
    assert boot.seconds_of_agent() < 8 + SLACK_S
    boot.expect(Code.BROKER_UNREACHABLE, ["boot"])


def test_broker_garbage(boot) -> None:
    """Bytes that are no TLS."""
    boot.settings["timeout_s"] = 8

    def garbage(stream: socket.socket) -> None:
        stream.sendall(b"\r\n220 smtp ready\x00\xff" * 1000)

    boot.serve_broker = garbage
    boot.run()
    assert boot.seconds_of_agent() < 8 + SLACK_S
    assert boot.machine.stages[-1] in {f"fail {Code.BROKER_UNREACHABLE}", f"fail {Code.BROKER_MISBEHAVED}"}


@pytest.mark.parametrize("answer", [b"{}", b"[" * 5000, b'{"protected":"","encrypted_key":"","iv":"","ciphertext":""}'])
def test_broker_answers_nonsense(boot, answer) -> None:
    """The pinned broker itself sends what cannot be understood."""
    boot.settings["timeout_s"] = 8
    boot.broker.answers["resource"] = (200, answer)
    boot.run()
    boot.expect(Code.BROKER_MISBEHAVED, boot.machine.stages[:-1])


def test_silent_broker(boot) -> None:
    """A broker that accepts and says nothing: the image's time is the limit, power is off soon after."""
    boot.settings["timeout_s"] = 8
    done = threading.Event()
    boot.serve_broker = lambda _stream: done.wait(60) and None
    boot.run()
    done.set()
    assert boot.seconds_of_agent() < 8 + SLACK_S
    assert boot.machine.stages[-1] in {f"fail {Code.BROKER_UNREACHABLE}", f"fail {Code.TIMEOUT}"}


def test_host_that_does_not_listen(boot) -> None:
    """Nobody reads the progress port: the guest boots all the same."""
    archive = boot.tmp_path / "initrd"
    build_initrd(config=boot.config(), modules_dir=boot.modules, output=archive)
    boot.machine = boot.make(initrd=archive, disk=boot.disk)
    boot.machine.serve(19012, boot.broker.serve)
    boot.machine.serve(19013, firmware)
    boot.machine.start()
    boot.machine.wait(LIMIT_S)
    assert "ROOT-SEES" in boot.machine.console


def test_host_that_reads_slowly(boot) -> None:
    """A progress port that never reads costs a second at most."""
    hold = threading.Event()

    def stuck(_stream: socket.socket) -> None:
        hold.wait(60)

    archive = boot.tmp_path / "initrd"
    build_initrd(config=boot.config(), modules_dir=boot.modules, output=archive)
    boot.machine = boot.make(initrd=archive, disk=boot.disk)
    boot.machine.serve(19014, stuck)
    boot.machine.serve(19012, boot.broker.serve)
    boot.machine.serve(19013, firmware)
    boot.machine.start()
    boot.machine.wait(LIMIT_S)
    hold.set()
    assert "ROOT-SEES" in boot.machine.console


def test_no_vsock_at_all(boot) -> None:
    """Without the device the report cannot be had; the console still says why."""
    boot.arguments["vsock"] = False
    boot.settings["timeout_s"] = 8
    began = time.monotonic()
    boot.run()
    assert time.monotonic() - began < 8 + LIMIT_S / 2
    assert f"jindisk: {Code.REPORT.value}" in boot.machine.console or (
        f"jindisk: {Code.BROKER_UNREACHABLE.value}" in boot.machine.console
    )


def test_panic_ends_the_machine(boot, guest_kernel) -> None:
    """An initrd whose configuration is damaged: a code, not a shell."""
    archive = cpio.Archive()
    for directory in initrd.EMPTY:
        archive.directory(directory)
    for name in python_closure.MERGED:
        archive.directory(f"usr/{name}")
        archive.link(name, f"usr/{name}")
    archive.node("dev/console", 5, 1)
    archive.node("dev/null", 1, 3)
    python_closure.add_python(archive, (initrd.ENTRY, *python_closure.LATE_IMPORTS))
    archive.file("etc/jindisk/guest.json", b"{}")
    archive.file("init", initrd.init_script(), 0o755)
    path = boot.tmp_path / "damaged"
    path.write_bytes(archive.to_gzip())
    boot.machine = boot.make(initrd=path, disk=None)
    boot.machine.start()
    boot.machine.wait(LIMIT_S)
    assert f"jindisk: {Code.CONFIG.value}" in boot.machine.console
