"""The helper as a process: who may ask, what hostile packets get, and what its worker may do.

What needs the kernel's network block device or device mapper is tested in a guest (test_devices_guest.py).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import devicevolumes
import pytest

from jindiskd.base import document
from jindiskd.base.listening import is_listening
from jindiskd.base.secret import Secret
from jindiskd.device.helper_client import key_file
from jindiskd.errors import Busy, NotFound
from jindiskd.helper import lower, worker
from jindiskd.helper.lower import Places
from jindiskd.helper.protocol import Answer, Below, Close, Kind, List, Open, dump
from jindiskd.jindisk.errors import VolumeUnauthentic

SERVICE = "games"
"""Stands for the service's user: it is on every Debian machine."""
NOBODY = 65534


@pytest.fixture
def helper() -> Iterator[tuple[Path, subprocess.Popen[bytes]]]:
    """A helper that listens by itself, where every user reaches it."""
    if os.geteuid() != 0:
        pytest.skip("the helper is root: run the tests as root")
    with tempfile.TemporaryDirectory(prefix="jindisk-helper-") as folder:
        Path(folder).chmod(0o755)
        yield from helper_in(Path(folder))


def helper_in(tmp_path: Path) -> Iterator[tuple[Path, subprocess.Popen[bytes]]]:
    path = tmp_path / "helper"
    words = ["--user", SERVICE, "--run", tmp_path / "run", "--states", tmp_path / "states", "--listen", path]
    process = subprocess.Popen([sys.executable, "-I", "-m", "jindiskd.helper", *words])
    limit = time.monotonic() + 120
    while not is_listening(path):
        assert process.poll() is None
        assert time.monotonic() < limit
        time.sleep(0.02)
    yield path, process
    process.kill()
    process.wait()


def ask(path: Path, packet: bytes, fds: list[int]) -> Answer | None:
    """Send one packet; None if the helper closes without an answer."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stream:
        stream.settimeout(120)
        stream.connect(os.fspath(path))
        socket.send_fds(stream, [packet], fds)
        data = stream.recv(65536)
    return document.load(Answer, data, document="answer") if data else None


def as_user(uid: int, path: Path) -> Answer:
    """Ask for the list as somebody else."""
    ours, theirs = socket.socketpair()
    process = os.fork()
    if process == 0:
        try:
            os.setgroups([])
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
            answer = ask(path, dump(List()), [])
            theirs.sendall(document.dump(answer) if answer else b"none")
        finally:
            os._exit(0)
    theirs.close()
    os.waitpid(process, 0)
    with ours:
        return document.load(Answer, ours.recv(65536), document="answer")


def test_root_and_the_service_may_ask_and_nobody_else(helper):
    path, _ = helper
    assert ask(path, dump(List()), []) == Answer()
    uid = int(subprocess.check_output(["id", "-u", SERVICE]))
    assert as_user(uid, path) == Answer()
    assert as_user(NOBODY, path).error == "NotAuthorized"


def request(below: Below, kind: Kind = Kind.JINDISK2, **more) -> Open:
    uuid = "" if kind is Kind.JINDISK1 else devicevolumes.UUID
    return Open(kind=kind, below=below, owner=0, read_only=more.pop("read_only", False), uuid=uuid, **more)


LOOP = Below(major=7, minor=0, sequence=1)


def test_hostile_packets_are_refused_and_leave_nothing(helper):
    """Wrong descriptors, too many, too long, no key, a key that could change: a code each; no descriptor is kept."""
    path, process = helper
    with Secret(bytes(32)) as secret:
        good = key_file(secret)
    unsealed = os.memfd_create("k", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
    os.write(unsealed, bytes(32))
    empty = os.memfd_create("k", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
    with Secret(bytes(65)) as secret:
        large = key_file(secret)
    pipe, _ = os.pipe()
    directory = os.open("/", os.O_RDONLY)
    opening = dump(request(LOOP))
    before = len(list(Path(f"/proc/{process.pid}/fd").iterdir()))
    for packet, fds, error in (
        (opening, [], "MalformedRequest"),
        (opening, [good, good], "MalformedRequest"),
        (opening, [good] * 50, "MalformedRequest"),
        (dump(List()), [good], "MalformedRequest"),
        (dump(Close(node="nbd0", mark="x")), [good], "MalformedRequest"),
        (opening + b" " * 9000, [good], "MalformedRequest"),
        (opening, [unsealed], "MalformedRequest"),
        (opening, [empty], "MalformedRequest"),
        (opening, [large], "MalformedRequest"),
        (opening, [pipe], "MalformedRequest"),
        (opening, [directory], "MalformedRequest"),
        (b"\0" * 100, [], "MalformedRequest"),
        (dump(Close(node="nbd0", mark="jindisk:x")), [], "NotFound"),
        (opening, [good], "DeviceNotOurs"),
    ):
        answer = ask(path, packet, fds)
        assert answer is not None, packet
        assert answer.error == error, (packet[:40], answer)
    for _ in range(20):  # connections that say nothing, or leave at once
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stream:
            stream.connect(os.fspath(path))
    assert ask(path, dump(List()), []) == Answer()
    limit = time.monotonic() + 200  # it closes a connection after it has answered
    while (now := len(list(Path(f"/proc/{process.pid}/fd").iterdir()))) != before and time.monotonic() < limit:
        time.sleep(0.01)
    assert now == before
    for fd in (good, unsealed, empty, large, pipe, directory):
        os.close(fd)


# A real block device


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[tuple[str, Below, Places]]:
    """A loop device with a volume of JinDisk 2, tagged by a record of udev's that the test wrote."""
    file = devicevolumes.make_jindisk2(tmp_path / "disk", 16 << 20)
    done = subprocess.run(["losetup", "-f", "--show", file], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no loop device: {done.stderr.strip()}")
    node = done.stdout.strip()
    number = Path(node).stat().st_rdev
    sequence = int(Path(f"/sys/block/{Path(node).name}/diskseq").read_text())
    below = Below(major=os.major(number), minor=os.minor(number), sequence=sequence)
    places = Places(udev=tmp_path / "udev")
    places.udev.mkdir()
    (places.udev / f"b{below}").write_text("I:1\nE:JINDISK_KIND=jindisk2\nG:jindisk\nQ:jindisk\nV:1\n")
    yield node, below, places
    subprocess.run(["losetup", "-d", node], check=True)


def test_a_device_is_opened_by_its_numbers_if_udev_tagged_it(disk):
    node, below, places = disk
    fd = lower.open_below(below, places, writable=True, exclusive=True)
    assert os.fstat(fd).st_rdev == Path(node).stat().st_rdev
    with pytest.raises(Busy):
        lower.open_below(below, places, writable=False, exclusive=True)
    os.close(fd)


def test_another_device_is_not(disk):
    """Another disk in its place, a record without the tag, an old tag, a record that leads out of /dev."""
    _, below, places = disk
    later = Below(major=below.major, minor=below.minor, sequence=below.sequence + 1)
    with pytest.raises(NotFound):
        lower.open_below(later, places, writable=False, exclusive=False)
    for text in ("", "E:JINDISK_KIND=jindisk2\n", "G:jindisk\nQ:systemd\n", "G:jindisk2\n", "Q:xjindisk\n"):
        (places.udev / f"b{below}").write_text(text)
        with pytest.raises(lower.DeviceNotOurs):
            lower.open_below(below, places, writable=False, exclusive=False)
    (places.udev / f"b{below}").write_text("G:jindisk\n")
    sysfs = places.udev / "sys"
    (sysfs / "dev/block" / str(below)).mkdir(parents=True)
    for name in ("../etc/shadow", "/etc/shadow", "a/../../etc", "null", "", "loop0 x"):
        (sysfs / "dev/block" / str(below) / "uevent").write_text(f"MAJOR=7\nDEVNAME={name}\n")
        with pytest.raises(NotFound):
            lower.open_below(below, Places(udev=places.udev, sys=sysfs), writable=False, exclusive=False)


@contextlib.contextmanager
def serving(disk, asked: Open, key: bytes = devicevolumes.KEY) -> Iterator[tuple[int, socket.socket]]:
    """A worker, which is nobody."""
    node, below, places = disk
    fd = lower.open_below(below, places, writable=not asked.read_only, exclusive=True)
    secret = Secret(key)

    def body(parent: socket.socket) -> None:
        worker.serve(asked, fd, secret, node, Path("/nowhere"), parent)

    process, ours = worker.start(body, worker.User(uid=NOBODY, gid=NOBODY))
    os.close(fd)
    secret.close()
    ours.settimeout(120)
    yield process, ours
    ours.close()


def test_a_worker_serves_without_any_rights(disk):
    """It reads and writes the device that it was given; it can open nothing itself, and nobody can look into it."""
    asked = request(disk[1])
    with serving(disk, asked) as (process, ours):
        said, (kernels,) = worker.hear(ours)
        assert (said.size_bytes, said.failed) == (16 << 20, None)
        status = dict(line.split(":", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines())
        assert status["Uid"].split() == [str(NOBODY)] * 4
        assert status["Groups"].split() == []
        assert {int(status[name], 16) for name in ("CapEff", "CapPrm", "CapInh", "CapAmb")} == {0}
        assert Path(f"/proc/{process}/environ").stat().st_uid == 0  # not dumpable
        ours.send(worker.GO)
        kernel = devicevolumes.Kernel(kernels)
        assert kernel.ask(1, 8192, data=b"x" * 4096) == (0, b"")
        assert kernel.ask(3) == (0, b"")
        assert kernel.ask(0, 8192, 4096) == (0, b"x" * 4096)
        kernel.stream.close()
        assert os.waitpid(process, 0)[1] == 0
    read_again = request(disk[1], read_only=True)
    with serving(disk, read_again) as (process, ours):
        said, (kernels,) = worker.hear(ours)
        assert said.flags & 2  # read only
        ours.send(worker.GO)
        kernel = devicevolumes.Kernel(kernels)
        assert kernel.ask(0, 8192, 4096) == (0, b"x" * 4096)
        error, _ = kernel.ask(1, 0, data=bytes(4096))
        assert error
        kernel.stream.close()
        assert os.waitpid(process, 0)[1] == 0


def test_a_worker_whose_parent_goes_closes_the_volume(disk):
    """Killed between opening and attaching, the helper leaves no process and no lock."""
    with serving(disk, request(disk[1])) as (process, ours):
        _, (kernels,) = worker.hear(ours)
        ours.close()
        os.close(kernels)
        os.waitpid(process, 0)
    _, below, places = disk
    os.close(lower.open_below(below, places, writable=True, exclusive=True))


def test_a_wrong_key_is_said_in_words(disk):
    """By the error that the command line knows, and without the key."""
    with serving(disk, request(disk[1]), key=bytes(32)) as (process, ours):
        said, fds = worker.hear(ours)
        os.waitpid(process, 0)
    assert not fds
    assert said.failed is not None
    assert said.failed.error == VolumeUnauthentic.code
    assert said.failed.exit_code == VolumeUnauthentic.exit_code


def test_a_service_that_is_away_means_that_nothing_is_written(disk, monkeypatch):
    """A session must be adopted before anything is written; there is nobody who could."""
    monkeypatch.setattr(worker.ServiceKeeper, "_ask", lambda *_: (_ for _ in ()).throw(OSError("nobody")))
    monkeypatch.setitem(sys.modules["jindiskd.helper.states"].PATIENCE_S, "adopt", 0.0)
    before = Path(disk[0]).read_bytes()
    with serving(disk, request(disk[1], session=bytes(32))) as (process, ours):
        said, _ = worker.hear(ours)
        os.waitpid(process, 0)
    assert said.failed is not None
    assert said.failed.error
    assert Path(disk[0]).read_bytes() == before


@pytest.mark.parametrize(
    "packet",
    [
        b"",
        b"x",
        b"{}" + b" " * 5000,
        b'{"size_bytes": -1}',
        b'{"size_bytes": 1e3}',
        b'{"flags": 1048576}',
        b'{"node": "sda"}',
    ],
)
def test_a_worker_that_was_taken_over_cannot_lie_to_its_parent(packet):
    """Its packets are as strictly parsed as the service's."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        if packet:
            theirs.send(packet)
        theirs.shutdown(socket.SHUT_WR)
        with pytest.raises((worker.MalformedRequest, document.MalformedDocument)):
            worker.hear(ours)


def test_a_key_file_cannot_be_changed():
    """Whoever gets it reads what was written."""
    with Secret(b"k" * 32) as secret:
        fd = key_file(secret)
    with pytest.raises(PermissionError):
        os.write(fd, b"x")
    with pytest.raises(PermissionError):
        os.ftruncate(fd, 1)
    assert fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SEAL
    os.close(fd)
