"""Small parts of the agent that need no guest."""

import contextlib
import os
import socket
import threading
import time
from pathlib import Path

import pytest

from jindiskd.guest import devices, kernel, mounts, power, switch_root, udev
from jindiskd.guest.codes import Code
from jindiskd.guest.dm import Mapping
from jindiskd.guest.progress import BUDGET_S, Progress, Stage


def test_mount_options() -> None:
    """What the kernel has flags for becomes flags, the rest goes to the file system."""
    assert mounts.split_options("ro,noatime,data=ordered,nosuid,x=1") == (
        kernel.MS_RDONLY | kernel.MS_NOATIME | kernel.MS_NOSUID,
        "data=ordered,x=1",
    )
    assert mounts.split_options("") == mounts.split_options("defaults,rw") == (0, "")


def tree(root: Path) -> Path:
    (root / "usr/lib/systemd").mkdir(parents=True)
    (root / "usr/lib/systemd/systemd").touch(0o755)
    (root / "usr/sbin").mkdir()
    (root / "usr/sbin/init").symlink_to("../lib/systemd/systemd")
    (root / "sbin").symlink_to("usr/sbin")
    (root / "absolute").symlink_to("/sbin/init")
    (root / "loop").symlink_to("loop")
    (root / "loop2").symlink_to("/loop2/x")
    (root / "up").symlink_to("../../../../usr/../absolute")
    (root / "plain").write_text("")
    (root / "outside").symlink_to("/bin/sh")
    return root


@pytest.mark.parametrize(
    ("name", "found"),
    [("/sbin/init", True), ("/absolute", True), ("/up", True), ("//usr/./lib/systemd/systemd", True)]
    + [(name, False) for name in ("/loop", "/loop2", "/plain", "/usr", "/none", "/outside", "/plain/x", "/")],
)
def test_find_init(tmp_path, name, found) -> None:
    """Links are followed inside the root, as they will be after the change of root, and never outside."""
    assert switch_root.find_init(tree(tmp_path), name) is found


def test_delete_files(tmp_path) -> None:
    """Everything goes, links are not followed."""
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "file").touch()
    target = tmp_path / "target"
    (target / "a/b/c").mkdir(parents=True)
    (target / "a/file").touch()
    (target / "link").symlink_to(kept)
    descriptor = os.open(target, os.O_RDONLY)
    try:
        switch_root.delete_files(descriptor)
    finally:
        os.close(descriptor)
    assert not list(target.iterdir())
    assert (kept / "file").exists()


def test_enter_refuses_a_real_root() -> None:
    """On a machine whose root is a disk, nothing is deleted or moved."""
    if kernel.filesystem_magic(Path("/")) in {kernel.RAMFS_MAGIC, kernel.TMPFS_MAGIC}:
        pytest.skip("the root of this machine is in memory itself")
    with pytest.raises(switch_root.NotAnInitrd):
        switch_root.enter(Path("/nonexistent"))


def test_read_head(tmp_path) -> None:
    """Exactly so many bytes, or an error."""
    file = tmp_path / "disk"
    file.write_bytes(bytes(range(256)) * 10)
    with file.open("rb") as disk:
        assert devices.read_head(disk.fileno(), 300) == (bytes(range(256)) * 2)[:300]
        assert devices.size_bytes(disk.fileno()) == 2560
        with pytest.raises(EOFError):
            devices.read_head(disk.fileno(), 2561)


def test_progress_lines() -> None:
    """One connection, one line each."""
    ours, theirs = socket.socketpair()
    progress = Progress(lambda: ours)
    progress.stage(Stage.BOOT)
    progress.failed(Code.HEADER)
    with theirs:
        assert theirs.makefile().read() == "boot\nfail E41\n"


def test_progress_is_bounded() -> None:
    """A host that does not read, or does not answer, costs a second at most, and the next lines nothing."""
    ours, theirs = socket.socketpair()
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    with theirs, ours:
        ours.setblocking(False)
        try:
            while True:
                ours.send(bytes(100))
        except BlockingIOError:
            pass
        progress = Progress(lambda: ours)
        began = time.monotonic()
        for _ in range(5):
            progress.stage(Stage.BOOT)
        assert time.monotonic() - began < BUDGET_S + 60


def test_progress_without_host() -> None:
    """No listener is no error, and it is asked for once."""
    attempts = []

    def connect() -> socket.socket:
        attempts.append(1)
        raise ConnectionRefusedError

    progress = Progress(connect)
    progress.stage(Stage.BOOT)
    progress.stage(Stage.KEY)
    assert len(attempts) == 1
    progress.failed(Code.KEY)
    assert len(attempts) == 2


def test_udev_record(tmp_path) -> None:
    """The record that 10-dm.rules import has the property they ask for."""
    udev.remember_mapping(Mapping(name="root", major=253, minor=7), tmp_path / "data")
    assert "E:DM_UDEV_PRIMARY_SOURCE_FLAG=1\n" in (tmp_path / "data/b253:7").read_text()


def test_a_mapping_is_published_once(tmp_path, monkeypatch) -> None:
    """With a udev running, link and record are its own; without, both are made; a link that is there is no error."""
    monkeypatch.setattr(udev, "MAPPER", tmp_path / "mapper")
    monkeypatch.setattr(udev, "CONTROL", tmp_path / "control")
    told: list[Mapping] = []
    monkeypatch.setattr(udev, "remember_mapping", told.append)
    (tmp_path / "mapper").mkdir()
    mapping = Mapping(name="root", major=254, minor=3)
    path = udev.publish(mapping)
    assert path == tmp_path / "mapper/root"
    assert os.path.normpath(tmp_path / "mapper" / path.readlink()) == "/dev/dm-3"
    assert told == [mapping]
    (tmp_path / "control").touch()
    assert udev.publish(mapping) == path
    assert told == [mapping]


def test_a_code_waits_for_its_turn_on_the_console(tmp_path, monkeypatch) -> None:
    """A console that takes nothing at the moment gets the code when it does; one that never does holds nobody long."""
    fifo = tmp_path / "console"
    os.mkfifo(fifo)
    monkeypatch.setattr(power, "CONSOLE", fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    filler = os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(filler, b"x" * 4096)
    began = time.monotonic()
    power.announce(Code.INITRAMFS)
    assert time.monotonic() - began >= power.ANNOUNCE_S
    monkeypatch.setattr(power, "ANNOUNCE_S", 60.0)
    thread = threading.Thread(target=power.announce, args=(Code.INITRAMFS,))
    thread.start()
    found = b""
    while b"jindisk: E47\r\n" not in found:
        with contextlib.suppress(BlockingIOError):
            found += os.read(reader, 65536)
    thread.join()
    os.close(filler)
    os.close(reader)
