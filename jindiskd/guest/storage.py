"""The storage processes: each serves the block device of one volume from user space, from before it is mounted until
after it is unmounted; the root's is the first.

It is forked from the agent, keeps the initrd as its root directory, and survives the change of root and the end of all
other processes: its command line begins with `@` (systemd, "Root Storage Daemons"). Nothing it needs is on the root it
serves: its modules are loaded, its memory is locked, and the kernel is told that it must not wait for writing out its
own dirty pages (PR_SET_IO_FLUSHER). At shutdown it is told over a control socket to close the volume.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import resource
import selectors
import signal
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, Protocol

from jindiskd.guest import kernel, nbd
from jindiskd.jindisk import nbd_kernel

CONTROLS = Path("/run/jindisk")
"""Where each has its control socket, by the name of its device."""
BLOCK_BYTES = 4096
ROOT_GROUPS = tuple(Path("/sys/fs/cgroup", *name, "cgroup.procs") for name in ((), ("unified",), ("systemd",)))
READ_AHEAD_KIB = 1024
OOM_NEVER = "-1000"
READY = b"R"
CLOSE = b"close"
DONE = b"done"
FAILED = b"failed"
PEER = struct.Struct("3i")  # struct ucred: pid, uid, gid
CONTROL_TIMEOUT_S = 2.0
CLOSE_TIMEOUT_S = 30.0

Forget = Callable[[], None]
"""Run in the new process, drops what it has inherited and must not keep."""


class Served(nbd.Volume, Protocol):
    """An open volume."""

    def close(self) -> None:
        """Make everything durable, close the volume for good, and tell who must know. Raises on failure."""


class StorageFailed(Exception):
    """The storage process did not come up. Carries what it said about itself."""

    def __init__(self, said: bytes) -> None:
        """`said` is what its opening function's failure was turned into, or empty."""
        super().__init__("the storage process did not start")
        self.said = said


def node(number: int) -> Path:
    """The block device of a volume; the root's number is 0."""
    return Path(f"/dev/nbd{number}")


def control(number: int) -> Path:
    """The control socket of a volume's storage process."""
    return CONTROLS / node(number).name


def start(
    open_volume: Callable[[], Served], explain: Callable[[Exception], bytes], *, timeout_s: float, number: int = 0
) -> int:
    """Fork a storage process, have it open its volume and attach it as `node(number)`; returns its process id.

    Args:
        open_volume: runs in the new process, which then is the only one with what it makes.
        explain: turns what `open_volume` raised into bytes for the caller, at most 16.
        timeout_s: for all of it.
        number: of the volume.

    Raises:
        StorageFailed: it failed; the process has ended.
    """
    ours, theirs = socket.socketpair()
    process = os.fork()
    if process == 0:
        ours.close()
        _run(open_volume, explain, theirs, number)
    theirs.close()
    with ours:
        ours.settimeout(timeout_s)
        try:
            said = ours.recv(16)
        except OSError:
            said = b""
    if said != READY:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        raise StorageFailed(said)
    read_ahead(node(number))
    return process


def _run(
    open_volume: Callable[[], Served], explain: Callable[[Exception], bytes], report: socket.socket, number: int
) -> NoReturn:
    """The life of a storage process."""
    status = 1
    try:
        try:
            harden()
            volume = open_volume()
            ours, kernels = socket.socketpair()
            nbd_kernel.attach([kernels.fileno()], volume.size_bytes, BLOCK_BYTES, nbd.FLAGS, index=number)
            kernels.close()
            asked = listen(control(number))
        except Exception as exc:  # noqa: BLE001 - the agent turns it into a code
            report.sendall(explain(exc)[:16] or b"?")
        else:
            report.sendall(READY)
            report.close()
            serve(ours, asked, volume)
            status = 0
    finally:
        os._exit(status)


def harden() -> None:
    """Make this process one that survives, stays in memory and leaves no dump."""
    mark_survivor()
    leave_unit()
    os.setsid()
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGQUIT, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    kernel.prctl(kernel.PR_SET_NAME, b"jindisk-storage")
    kernel.prctl(kernel.PR_SET_DUMPABLE, 0)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    Path("/proc/self/oom_score_adj").write_text(OOM_NEVER, encoding="ascii")
    kernel.lock_memory()
    kernel.prctl(kernel.PR_SET_IO_FLUSHER, 1)


def mark_survivor() -> None:
    """Begin our command line with `@`, in place: the kernel shows others the bytes that are there."""
    fields = Path("/proc/self/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
    ctypes.memset(int(fields[45]), ord("@"), 1)  # arg_start, field 48 of proc(5); the split begins at field 3


def leave_unit() -> None:
    """Belong to no unit, where an init that has units runs already: stopping the unit would end us."""
    for group in ROOT_GROUPS:
        with contextlib.suppress(OSError):  # there are none, as in our own initrd
            group.write_text("0", encoding="ascii")


def read_ahead(device: Path) -> None:
    """Have the kernel ask for more at a time than its default: each request costs a change of process.

    Never called by the process that serves the device: kernels of 6.12 and later wait here until no request is under
    way, and a udev that runs asks for the first ones as soon as the device has a size.
    """
    with contextlib.suppress(OSError):  # slower without, and nothing else
        Path("/sys/class/block", device.name, "queue/read_ahead_kb").write_text(str(READ_AHEAD_KIB), encoding="ascii")


def listen(path: Path) -> socket.socket:
    """The control socket, for root alone."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(os.fspath(path))
    path.chmod(0o600)
    listener.listen(4)
    return listener


def serve(requests: socket.socket, asked: socket.socket, volume: Served) -> None:
    """Serve the kernel's requests and the control socket until the volume is closed and the kernel let go.

    A volume that was closed answers every request with an error, so nothing can be lost silently after that.
    """
    closed = False
    with selectors.DefaultSelector() as selector:
        selector.register(requests, selectors.EVENT_READ)
        selector.register(asked, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fileobj is asked:
                    closed = _control(asked, volume, closed)
                    continue
                try:
                    nbd.serve_one(requests, Closed(volume.size_bytes) if closed else volume)
                except nbd.Disconnected:
                    if not closed:
                        volume.close()
                    return


class Closed:
    """A volume after its end."""

    def __init__(self, size_bytes: int) -> None:
        """As large as it was."""
        self.size_bytes = size_bytes

    def read(self, offset: int, length: int) -> bytes:
        """Fail: offset and length do not matter any more."""
        raise OSError(errno.EIO, f"closed: {length} bytes at {offset}")

    def write(self, offset: int, data: bytes) -> None:
        """Fail."""
        self.read(offset, len(data))

    def flush(self) -> None:
        """Nothing is left to be made durable."""

    def discard(self, offset: int, length: int) -> None:
        """Fail."""
        self.read(offset, length)


def _control(asked: socket.socket, volume: Served, closed: bool) -> bool:
    """Take one control connection; returns whether the volume is closed."""
    try:
        stream, _ = asked.accept()
    except OSError:
        return closed
    with stream:
        stream.settimeout(CONTROL_TIMEOUT_S)
        try:
            _, user, _ = PEER.unpack(stream.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, PEER.size))
            if user != 0 or stream.recv(16) != CLOSE:
                return closed
            answer = DONE
            if not closed:
                try:
                    volume.close()
                    closed = True
                except Exception:  # noqa: BLE001 - it stays open, and the one who asked is told
                    answer = FAILED
            stream.send(answer)
        except OSError:
            return closed
    return closed


def running(controls: Path = CONTROLS) -> list[str]:
    """The names of the devices that storage processes serve, the root's last."""
    try:
        return sorted((path.name for path in controls.iterdir() if path.is_socket()), reverse=True)
    except OSError:
        return []


def ask_to_close(path: Path, timeout_s: float = CLOSE_TIMEOUT_S) -> bool:
    """Have a storage process close its volume; whether it did. Called when that is unmounted."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stream:
            stream.settimeout(timeout_s)
            stream.connect(os.fspath(path))
            stream.send(CLOSE)
            return stream.recv(16) == DONE
    except OSError:
        return False
