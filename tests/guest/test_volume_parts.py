"""The guest's parts for data volumes, one by one: disks by serial number, links, places to mount, the end."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from jindiskd.base import document
from jindiskd.errors import TimedOut
from jindiskd.guest import agent, devices, shutdown, storage, udev
from jindiskd.guest.codes import Code, GuestFailure
from jindiskd.guest.config import (
    MAX_VOLUMES,
    BrokerPin,
    DataVolume,
    GuestConfig,
    JindiskExpectation,
    RootVolume,
    serial_of,
)

EXPECTED = JindiskExpectation(version=2, uuid="5a9d1a7e-62a1-4a4c-8f4e-0c2f27bd6d1e")
VOLUME = DataVolume(name="data", resource="default/image/data", jindisk=EXPECTED)


def config(**changes) -> GuestConfig:
    values = {
        "schema": 1, "image_id": "image", "platform": "simulated-snp", "modules": (),
        "broker": BrokerPin(spki_sha256=bytes(32)),
        "root": RootVolume(device="/dev/vda3", resource="default/image/root", jindisk=EXPECTED),
    }  # fmt: skip
    return GuestConfig(**{**values, **changes})


@pytest.fixture
def block(tmp_path) -> Path:
    """A /sys/class/block with disks whose serial numbers a host has chosen."""
    serials = {"vda": b"", "vda1": None, "vdb": b"jd-data\n", "vdc": b"jd-data-2", "vdd": b"\xff" * 300, "nbd0": None,
               "vde": b"jd-logs\0\0\0"}  # fmt: skip
    for name, serial in serials.items():
        (tmp_path / name).mkdir()
        if serial is not None:
            (tmp_path / name / "serial").write_bytes(serial)
    return tmp_path


def test_disks_are_found_by_the_whole_serial_number(block) -> None:
    """Not by a part of it; more than one is told; what cannot be read is nobody's."""
    assert devices.with_serial(serial_of("data"), block) == [Path("/dev/vdb")]
    assert devices.with_serial(serial_of("logs"), block) == [Path("/dev/vde")]
    assert devices.with_serial(serial_of("dat"), block) == []
    (block / "vda/serial").write_bytes(b"jd-data")
    assert devices.with_serial(serial_of("data"), block) == [Path("/dev/vda"), Path("/dev/vdb")]


@pytest.mark.parametrize(
    ("page", "found"),
    [
        (b"\0\x80\0\x07jd-data", True),
        (b"\0\x80\0\x14jd-data             ", True),
        (b"\0\x80\0\x07jd-data-and-what-is-behind", True),
        (b"\0\x80\0\x09jd-data-2", False),
        (b"\0\x80\0\x03jd-data", False),
        (b"\0\x80\xff\xffjd-data", True),
        (b"\0\x83\0\x07jd-data", False),
        (b"\0\x80\0", False),
        (b"", False),
        (b"\xff" * 5000, False),
    ],
)
def test_a_scsi_disk_is_known_by_its_page(tmp_path, page: bytes, found: bool) -> None:
    """Unit serial number, of the length that the page says and no more than is read; a page of another kind is none."""
    (tmp_path / "sda/device").mkdir(parents=True)
    (tmp_path / "sda1").mkdir()
    (tmp_path / "sda/device/vpd_pg80").write_bytes(page)
    assert devices.with_serial(serial_of("data"), tmp_path) == ([Path("/dev/sda")] if found else [])


def test_a_disk_that_does_not_come_is_not_waited_for_long(block) -> None:
    """The wait ends at its time, and names the serial number."""
    with pytest.raises(TimedOut, match="jd-none"):
        devices.wait_for_serial(serial_of("none"), 0.0, block)


def test_volumes_have_links_that_udev_makes_again(tmp_path) -> None:
    """For the time before udev, and in rules that it reads."""
    node, links, rules = tmp_path / "nbd1", tmp_path / "disk/by-jindisk", tmp_path / "rules.d/61.rules"
    node.touch()
    udev.link_volume("data", node, links, rules)
    mapper = tmp_path / "mapped"
    mapper.symlink_to(tmp_path / "dm-3")
    (tmp_path / "dm-3").touch()
    udev.link_volume("logs", mapper, links, rules)
    assert (links / "data").resolve() == node
    assert (links / "logs").resolve() == tmp_path / "dm-3"
    assert rules.read_text() == (
        'SUBSYSTEM=="block", KERNEL=="nbd1", SYMLINK+="disk/by-jindisk/data"\n'
        'SUBSYSTEM=="block", KERNEL=="dm-3", ENV{DM_NAME}="$attr{dm/name}", SYMLINK+="disk/by-jindisk/logs"\n'
    )


@pytest.mark.parametrize(
    "volumes",
    [
        (DataVolume(name="data", resource="r"),),
        (VOLUME,) * (MAX_VOLUMES + 1),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(volumes, tmp_path) -> None:
    """A volume without an expectation would be whatever the host attaches."""
    path = tmp_path / "guest.json"
    path.write_bytes(document.dump(config(volumes=(VOLUME,))))
    assert agent.measured_config(path).volumes == (VOLUME,)
    path.write_bytes(document.dump(config(volumes=volumes)))
    with pytest.raises(GuestFailure) as failure:
        agent.measured_config(path)
    assert failure.value.code is Code.CONFIG


def test_what_can_still_be_written_to_is_known() -> None:
    """By the text of /proc/self/mounts; what lies elsewhere does not count."""
    text = (
        "/dev/nbd0 /oldroot ext4 ro,relatime 0 0\n"
        "/dev/nbd1 /oldroot/srv/a\\040b ext4 rw,relatime 0 0\n"
        "/dev/mapper/jindisk-logs /oldroot/srv/logs ext4 ro 0 0\n"
        "/dev/nbd2 /elsewhere ext4 rw 0 0\n"
        "tmpfs /oldroot/tmp tmpfs rw 0 0\n"
    )
    assert shutdown.writable_devices(text, Path("/oldroot")) == {"nbd1", "tmpfs"}


def test_volumes_that_are_written_to_stay_open(monkeypatch) -> None:
    """Of three, one is still mounted for writing: the others are closed, the root's last."""
    asked = []
    monkeypatch.setattr(shutdown, "unmount_all", lambda _top: False)
    monkeypatch.setattr(shutdown, "make_read_only", lambda _place: False)
    monkeypatch.setattr(shutdown, "writable_devices", lambda _text, _top: {"nbd1"})
    monkeypatch.setattr(storage, "running", lambda: ["nbd2", "nbd1", "nbd0"])
    monkeypatch.setattr(storage, "ask_to_close", lambda path: asked.append(path.name))
    shutdown.close_volumes()
    assert asked == ["nbd2", "nbd0"]


def test_the_roots_process_is_asked_last(tmp_path) -> None:
    """Those that run are known by their sockets."""
    assert storage.running(tmp_path / "none") == []
    (tmp_path / "file").touch()
    listeners = [storage.listen(tmp_path / name) for name in ("nbd0", "nbd2", "nbd1")]
    assert storage.running(tmp_path) == ["nbd2", "nbd1", "nbd0"]
    for listener in listeners:
        listener.close()


MOUNTING = """
import ctypes, os, sys
from pathlib import Path
from jindiskd.guest import kernel, mounts
kernel.unshare(kernel.CLONE_NEWNS)
kernel.mount("", Path("/"), "", kernel.MS_REC | kernel.MS_PRIVATE)
root = Path(sys.argv[1])
kernel.mount("tmpfs", root, "tmpfs", 0)
(root / "var/real").mkdir(parents=True)
(root / "srv").symlink_to("/var/real")
(root / "mnt").mkdir()
kernel.mount("", root, "", kernel.MS_REMOUNT | kernel.MS_RDONLY)
for place in ("/srv/data", "/mnt", "/mnt/deep/er"):
    mounts.mount_data("tmpfs", root, place, kind="tmpfs", options="rw,nodev", root_options="ro")
print(os.getcwd())
for line in open("/proc/self/mounts"):
    source, where, kind, options, *_ = line.split()
    if where.startswith(str(root)):
        print(where.removeprefix(str(root)) or "/", options.split(",")[0], "nodev" in options)
"""


def test_places_are_made_and_links_followed_inside_the_root(tmp_path) -> None:
    """An absolute link of the system's is one within it; the root is read-only again, and this process where it was."""
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    done = subprocess.run(
        [sys.executable, "-c", MOUNTING, tmp_path], capture_output=True, text=True, check=False, cwd="/"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "/", "/ ro False", "/var/real/data rw True", "/mnt rw True", "/mnt/deep/er rw True",
    ]  # fmt: skip
    assert not Path("/var/real").exists()


ENDING = """
import sys, socket
from pathlib import Path
from jindiskd.guest import kernel, shutdown
kernel.unshare(kernel.CLONE_NEWNS)
kernel.mount("", Path("/"), "", kernel.MS_REC | kernel.MS_PRIVATE)
root = Path(sys.argv[1])
kernel.mount("tmpfs", root, "tmpfs", 0)
(root / "run").mkdir()
kernel.mount("tmpfs", root / "run", "tmpfs", 0)
listener = socket.socket(socket.AF_UNIX)
listener.bind(str(root / "run/socket"))
print(shutdown.unmount_all(root), str(root) in open("/proc/self/mounts").read())
"""


def test_a_socket_does_not_hold_the_old_root(tmp_path) -> None:
    """A process that listens below the old /run keeps that in use, and nothing else."""
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    done = subprocess.run(
        [sys.executable, "-c", ENDING, tmp_path], capture_output=True, text=True, check=False, cwd="/"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["True", "False"]


class Idle:
    """A volume that nothing asks for."""

    size_bytes = 1 << 20

    def close(self) -> None:
        """Nothing is there."""


def test_who_serves_a_device_never_waits_for_its_requests(tmp_path, monkeypatch) -> None:
    """Its queue is set from outside, once it is being served: newer kernels wait there for the requests that are under
    way, which a udev may have made as soon as the device had its size."""
    serving, asked = tmp_path / "serving", []
    for name in ("harden", "listen"):
        monkeypatch.setattr(storage, name, lambda *_: None)
    monkeypatch.setattr(storage.nbd_kernel, "attach", lambda *_, **__: None)
    monkeypatch.setattr(storage, "read_ahead", lambda device: asked.append((device, os.getpid())))

    def serve(*_: object) -> None:
        serving.write_text(f"{len(asked)}")

    monkeypatch.setattr(storage, "serve", serve)
    process = storage.start(Idle, lambda exc: repr(exc).encode(), timeout_s=300, number=2)
    assert os.waitpid(process, 0) == (process, 0)
    assert serving.read_text() == "0", "not by the process that serves"
    assert asked == [(Path("/dev/nbd2"), os.getpid())]
