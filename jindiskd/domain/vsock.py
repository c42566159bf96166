"""AF_VSOCK for a guest on a host whose kernel has no vhost-vsock: one `vhost-device-vsock` process a domain.

Where it has, libvirt makes the device, and `domain.switch` stands at the host's end. A domain's directory below the
runtime directory, while it runs:

    <uuid>/binding.json   image, context id, pid and start time of the device; written before the device is started
    <uuid>/device.sock    vhost-user, QEMU connects; not there where the kernel has the device
    <uuid>/guest          prefix: the guest's connection to port P of context 2 arrives at `guest_P`

The device outlives this service, since the guest would lose its device otherwise; a restart finds it by the record.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import pwd
import shutil
import signal
import struct
from dataclasses import dataclass, replace
from pathlib import Path

from jindiskd.base import document
from jindiskd.base.files import replace_file
from jindiskd.base.listening import is_listening
from jindiskd.base.process import ENVIRONMENT, ToolFailed, ToolMissing
from jindiskd.errors import TimedOut

READY_S = 30.0
RECORD = "binding.json"
LOG = "device.log"
QEMU_USER = "libvirt-qemu"
ACL = "system.posix_acl_access"


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What a restart needs to know."""

    uuid: str
    image: str
    cid: int
    """0 where the kernel has the device: then the live definition tells."""
    pid: int = 0
    start_time: int = 0
    """Clock ticks since boot, field 22 of /proc/PID/stat: with the pid it names one process for good."""
    running: bool = False
    """Whether the guest reported a running system since its machine was made."""


def socket_path(directory: Path, port: int) -> Path:
    """Where a guest's connections to a port of the host arrive."""
    return directory / f"guest_{port}"


def device_path(directory: Path) -> Path:
    """Where QEMU connects to the device."""
    return directory / "device.sock"


def start_time(pid: int) -> int:
    """Start time of a process, 0 if there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0
    return int(stat.rsplit(")", 1)[1].split()[19])


def read_record(directory: Path) -> Record | None:
    """The record in a domain's directory; None if there is none that can be read."""
    try:
        return document.load(Record, (directory / RECORD).read_bytes(), document=RECORD)
    except (OSError, document.MalformedDocument):
        return None


def mark_running(directory: Path) -> None:
    """Note in the record that the guest came up."""
    record = read_record(directory)
    if record is not None and not record.running:
        replace_file(directory / RECORD, document.dump(replace(record, running=True)), 0o600)


def write_record(directory: Path, record: Record) -> None:
    """Make a domain's directory, with its record alone."""
    directory.mkdir(mode=0o711, parents=True, exist_ok=True)
    replace_file(directory / RECORD, document.dump(record), 0o600)


async def start_device(program: Path, directory: Path, record: Record) -> Record:
    """Start the device of a domain in `directory`, which is made; returns once it listens.

    Raises:
        ToolMissing, ToolFailed, TimedOut: it did not come up, or ended before it listened; nothing is left of it.
    """
    write_record(directory, record)
    device = device_path(directory)
    device.unlink(missing_ok=True)
    argv = [
        os.fspath(program),
        "--vm",
        f"guest-cid={record.cid},socket={device},uds-path={directory / 'guest'}",
    ]
    found = shutil.which(argv[0], path=ENVIRONMENT["PATH"])
    if found is None:
        raise ToolMissing(argv[0])
    # Not a child of the event loop, which would want to see it end: the device outlives this service.
    quiet = (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0)
    said = (os.POSIX_SPAWN_OPEN, 1, os.fspath(directory / LOG), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    streams = [quiet, said, (os.POSIX_SPAWN_DUP2, 1, 2)]
    pid = os.posix_spawn(found, argv, ENVIRONMENT, file_actions=streams, setsid=True)  # noqa: ASYNC221 - does not wait
    started = replace(record, pid=pid, start_time=start_time(pid))
    replace_file(directory / RECORD, document.dump(started), 0o600)
    try:
        async with asyncio.timeout(READY_S):
            while not (device.exists() and is_listening(device)):
                ended, status = os.waitpid(pid, os.WNOHANG)  # noqa: ASYNC222 - does not wait
                if ended:
                    tail = (directory / LOG).read_text(errors="replace")[-500:]
                    raise ToolFailed(argv, os.waitstatus_to_exitcode(status), tail)
                await asyncio.sleep(0.02)
    except TimeoutError as exc:
        end_device(started)
        raise TimedOut("the start of vhost-device-vsock", READY_S) from exc
    _admit_qemu(device)
    return started


def _admit_qemu(device: Path) -> None:
    """Let the user that QEMU runs as connect, and nobody else."""
    device.chmod(0o600)
    with contextlib.suppress(KeyError):
        user = pwd.getpwnam(QEMU_USER)
        if os.geteuid() == 0:
            os.chown(device, user.pw_uid, -1)
        else:  # who may not give files away may admit a user by name
            os.setxattr(device, ACL, acl_for(user.pw_uid))


def acl_for(uid: int) -> bytes:
    """An access list: the owner and one user read and write, nobody else.

    Source: linux/posix_acl_xattr.h: version 2, then entries of tag, permissions and id; little-endian.
    """
    nobody, rw, none = 0xFFFFFFFF, 6, 0
    entries = ((0x01, rw, nobody), (0x02, rw, uid), (0x04, none, nobody), (0x10, rw, nobody), (0x20, none, nobody))
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


def end_device(record: Record) -> None:
    """End the device of a record, if it is still that process."""
    if record.pid and record.start_time and start_time(record.pid) == record.start_time:
        _kill(record.pid)


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):  # the child of an earlier process of this service is not ours to reap
        os.waitpid(pid, 0)


def _unrecorded(directory: Path) -> int | None:
    """The pid of a device that was started for `directory` by a process that died before it could write it down.

    Anybody may call a process of his what he likes: one of another user is none of ours.
    """
    mark = f"socket={device_path(directory)},".encode()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                words = (entry / "cmdline").read_bytes().split(b"\0")
                ours = entry.stat().st_uid == os.geteuid()
                if ours and words[1:2] == [b"--vm"] and mark in words[2]:
                    return int(entry.name)
    return None


def clear(directory: Path) -> None:
    """End the device of a directory and remove all of it; what is not there is no error."""
    record = read_record(directory)
    if record is not None:
        end_device(record)
    if directory.exists() and (record is None or not record.pid):
        pid = _unrecorded(directory)
        if pid is not None:
            _kill(pid)
    shutil.rmtree(directory, ignore_errors=True)
