"""A domain's vsock device: it is up when it listens, not when its socket's file is there."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jindiskd.base.listening import is_listening
from jindiskd.base.process import ToolFailed
from jindiskd.domain import vsock
from jindiskd.errors import TimedOut

DEVICE = """#!{python}
import pathlib, socket, sys, time
path = dict(word.split("=", 1) for word in sys.argv[2].split(","))["socket"]
home = pathlib.Path(path).parent
stream = socket.socket(socket.AF_UNIX)
stream.bind(path)
(home / "bound").touch()
while not (home / "go").exists():
    time.sleep(0.01)
if {fails}:
    sys.exit("no memory for queues")
stream.listen()
time.sleep(600)
"""


def device(tmp_path: Path, *, fails: bool = False) -> Path:
    """A program that takes its time between its socket's file and listening."""
    path = tmp_path / "device"
    path.write_text(DEVICE.format(python=sys.executable, fails=fails))
    path.chmod(0o755)
    return path


async def starting(program: Path, home: Path) -> asyncio.Task[vsock.Record]:
    """A start that has come as far as the socket's file."""
    record = vsock.Record(uuid="u", image="demo", cid=4)
    task = asyncio.create_task(vsock.start_device(program, home, record))
    async with asyncio.timeout(200):
        while not (home / "bound").exists():  # noqa: ASYNC110 - another process has no event
            await asyncio.sleep(0.01)
    return task


async def test_up_once_it_listens(tmp_path: Path) -> None:
    home = tmp_path / "a home"
    task = await starting(device(tmp_path), home)
    await asyncio.sleep(0.2)  # ten looks: with the file alone it would be done
    assert not task.done()
    assert not is_listening(vsock.device_path(home))
    (home / "go").touch()
    record = await task
    assert is_listening(vsock.device_path(home))
    assert vsock.read_record(home) == record
    vsock.clear(home)
    assert vsock.start_time(record.pid) == 0


async def test_it_ends_before_it_listens(tmp_path: Path) -> None:
    """The error has its status and what it said."""
    home = tmp_path / "home"
    task = await starting(device(tmp_path, fails=True), home)
    (home / "go").touch()
    with pytest.raises(ToolFailed, match="device ended with status 1: no memory for queues"):
        await task


async def test_it_never_listens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is ended when the time is up."""
    monkeypatch.setattr(vsock, "READY_S", 2.0)
    home = tmp_path / "home"
    task = await starting(device(tmp_path), home)
    with pytest.raises(TimedOut, match="vhost-device-vsock"):
        await task
    record = vsock.read_record(home)
    assert record is not None
    assert vsock.start_time(record.pid) == 0


CALLED = """
import ctypes, sys, time
fields = open("/proc/self/stat").read().rpartition(")")[2].split()
start, end = int(fields[45]), int(fields[46])  # arg_start and arg_end of proc(5)
text = bytes.fromhex(sys.argv[1])
assert len(text) <= end - start
ctypes.memmove(start, text.ljust(end - start, b"\\0"), end - start)
print(flush=True)
time.sleep(600)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become other users")
def test_a_process_of_somebody_else_is_not_the_device_whatever_it_is_called(tmp_path: Path) -> None:
    """It is neither ended, nor in the way of clearing up; one of ours, whose start was not written down, is ended."""
    home = tmp_path / "home"
    home.mkdir()
    called = f"x\0--vm\0guest-cid=3,socket={vsock.device_path(home)},uds-path=y\0".encode().hex()
    for user in (65534, None):
        words = [sys.executable, "-c", CALLED, called]
        with subprocess.Popen(words, user=user, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"\n"
            home.mkdir(exist_ok=True)
            vsock.clear(home)
            assert not home.exists()
            # `clear` reaps what is a child of ours, as the device is.
            gone = vsock.start_time(process.pid) == 0
            assert gone is (user is None)
            process.kill()
