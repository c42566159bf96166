"""A JinDisk 1 root. No distribution's kernel has the target, so opening one goes as far as the kernel's doors here."""

import hashlib
import os
from pathlib import Path

import pytest
import testroot
from test_boot import Boot

from jindiskd.base.secret import Secret
from jindiskd.guest import dm, jindisk1_root
from jindiskd.guest.codes import Code, GuestFailure
from jindiskd.guest.config import Jindisk1Expectation
from jindiskd.image.kmod import ModulesUnusable
from jindiskd.jindisk.errors import VolumeUnauthentic
from jindiskd.jindisk.v1.load import bulk_load

# Runs as the system's init: asks the kernel for its list of targets, and prints the answer.
LISTING = """#!/usr/bin/{python} -ISB
import ctypes, os, struct
libc = ctypes.CDLL(None, use_errno=True)
control = os.open("/dev/mapper/control", os.O_RDWR)
buffer = ctypes.create_string_buffer(65536)
buffer[:20] = struct.pack("<3III", 4, 0, 0, 65536, 312)
result = libc.ioctl(control, ctypes.c_ulong(0xC138FD0D), buffer)
size = struct.unpack_from("<I", buffer.raw, 12)[0]
os.write(1, f"\\nLIST {{result}} {{buffer.raw[:size].hex()}}\\n".encode())
libc.reboot(0x4321FEDC)
"""


class Disk:
    """A small JinDisk 1 volume in a file."""

    def __init__(self, directory: Path) -> None:
        self.path, self.key = directory / "jindisk1.img", Secret(bytes(range(28)))
        source = directory / "clear"
        source.write_bytes(b"root" * 1024)
        target = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
        with source.open("rb") as file:
            self.layout = bulk_load(file.fileno(), target, size_bytes=4096, key=self.key, skip_zeros=True)
        os.close(target)
        self.expectation = Jindisk1Expectation(superblock_sha256=hashlib.sha256(self.head()).digest())

    def head(self) -> bytes:
        with self.path.open("rb") as file:
            return file.read(148)


@pytest.fixture
def disk(tmp_path: Path) -> Disk:
    return Disk(tmp_path)


@pytest.mark.guest
@pytest.mark.slow
def test_no_key_is_asked_for_without_the_target(machine, guest_kernel, encrypted, disk, tmp_path) -> None:
    """The distribution's kernel, with a list of modules that says the target is built in."""
    modules = tmp_path / "modules" / guest_kernel.modules.name
    modules.mkdir(parents=True)
    for entry in guest_kernel.modules.iterdir():
        if entry.name != "modules.builtin":
            (modules / entry.name).symlink_to(entry)
    builtin = (guest_kernel.modules / "modules.builtin").read_text()
    (modules / "modules.builtin").write_text(builtin + "kernel/drivers/md/dm-jindisk.ko\n")
    boot = Boot(machine, modules, encrypted, tmp_path)
    boot.disk, boot.expectation = disk.path, None
    boot.root = {"jindisk1": disk.expectation}
    boot.run()
    boot.expect(Code.TARGET, ["boot"])
    assert boot.broker.asked == []


@pytest.mark.guest
def test_an_image_whose_kernel_has_no_such_module_is_not_built(guest_kernel, encrypted, disk, tmp_path) -> None:
    boot = Boot(lambda **_: None, guest_kernel.modules, encrypted, tmp_path)
    boot.expectation, boot.root = None, {"jindisk1": disk.expectation}
    with pytest.raises(ModulesUnusable, match="dm_jindisk"):
        boot.run()


@pytest.mark.guest
@pytest.mark.slow
def test_the_list_of_targets_of_a_real_kernel(machine, guest_kernel, tmp_path, tmp_path_factory, monkeypatch) -> None:
    """A kernel that has a LUKS2 root mapped knows the target for it, and not that of JinDisk 1."""
    directory = tmp_path_factory.mktemp("listing")
    root = testroot.make_root(directory, init=LISTING)
    boot = Boot(machine, guest_kernel.modules, testroot.encrypt_root(root, directory / "disk.img"), tmp_path)
    boot.run()
    line = next(line for line in boot.machine.console.splitlines() if line.startswith("LIST "))
    _, result, recorded = line.split()
    assert result == "0"

    def replay(_descriptor: int, _request: int, buffer: bytearray) -> int:
        data = bytes.fromhex(recorded)
        buffer[: len(data)] = data
        return 0

    (tmp_path / "control").touch()
    found = dm.targets(control=tmp_path / "control", ioctl=replay)
    assert {"crypt", "linear"} <= set(found)
    assert "jindisk" not in found
    assert found["crypt"] > (1, 0, 0)


# Without a kernel that has the target: what would be handed to it.


@pytest.fixture
def with_target(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dm, "targets", lambda: {"jindisk": (1, 0, 0)})


@pytest.mark.usefixtures("with_target")
def test_what_the_kernel_would_be_given(disk, monkeypatch) -> None:
    """Name, length, parameters: the whole logical device, and the key wiped afterwards by `activate`."""
    given = {}

    class Stop(Exception):
        pass

    def activate(name: str, uuid: str, **values: object) -> None:
        given.update(values, name=name, uuid=uuid, parameters=bytes(values["parameters"]))
        raise Stop

    monkeypatch.setattr(dm, "activate", activate)
    root = jindisk1_root.Jindisk1Root(disk.path, disk.expectation)
    layout = root.unlock(disk.key)
    assert layout == disk.layout
    with pytest.raises(Stop):
        root.activate(disk.key, layout, "root")
    assert given == {
        "name": "root", "uuid": "JINDISK1-root", "sectors": 8192, "kind": "jindisk",
        "parameters": f"{bytes(range(16)).hex()} {bytes(range(16, 28)).hex()} {disk.path} 0".encode(),
    }  # fmt: skip


@pytest.mark.usefixtures("with_target")
def test_another_volume_causes_no_release(disk) -> None:
    """One byte of the superblock, or a disk that is cut, is seen before anything is asked of the broker."""
    with disk.path.open("r+b") as file:
        file.seek(147)
        file.write(b"\0" if disk.head()[147] else b"\1")
    with pytest.raises(GuestFailure, match=Code.VOLUME):
        jindisk1_root.Jindisk1Root(disk.path, disk.expectation)
    disk.path.write_bytes(bytes(100))
    with pytest.raises(EOFError):
        jindisk1_root.Jindisk1Root(disk.path, disk.expectation)


@pytest.mark.usefixtures("with_target")
def test_another_key_or_a_short_device_opens_nothing(disk) -> None:
    with pytest.raises(VolumeUnauthentic):
        jindisk1_root.Jindisk1Root(disk.path, disk.expectation).unlock(Secret.random(28))
    os.truncate(disk.path, disk.layout.total_bytes - 1)
    with pytest.raises(GuestFailure, match=Code.VOLUME):
        jindisk1_root.Jindisk1Root(disk.path, disk.expectation).unlock(disk.key)


@pytest.mark.parametrize("known", [{}, {"crypt": (1, 0, 0)}, None])
def test_no_target_no_look_at_the_disk(known, monkeypatch) -> None:
    """Also where there is no device mapper at all."""

    def targets() -> dict[str, tuple[int, int, int]]:
        if known is None:
            raise FileNotFoundError("/dev/mapper/control")
        return known

    monkeypatch.setattr(dm, "targets", targets)
    with pytest.raises(GuestFailure, match=Code.TARGET):
        jindisk1_root.Jindisk1Root(Path("/nonexistent"), Jindisk1Expectation(superblock_sha256=bytes(32)))
