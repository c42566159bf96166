"""The process that serves one volume: how it becomes one, waits, and ends.

It holds the volume's keys, so it leaves no core dump and nobody may trace it. Signals arrive in one thread, which does
nothing else; SIGTERM and SIGINT end the process gently. Whatever kills it otherwise costs what was not flushed.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import signal
import syslog
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

from jindiskd.base.files import replace_file
from jindiskd.errors import EXIT_FAILED, JindiskError
from jindiskd.guest import kernel
from jindiskd.jindisk.nbd_server import Server, Tell
from jindiskd.jindisk.served import Served

ENDING = frozenset((signal.SIGTERM, signal.SIGINT, signal.SIGHUP))
LOOK_S = 1.0
M_ARENA_MAX = -8  # malloc.h
Ready = Callable[[], None]
"""Says that everything has begun; afterwards nobody waits for this process."""


class ServerNotStarted(JindiskError):
    """The server's process ended before it served; has the code and exit status of what went wrong there."""

    def __init__(self, code: str, status: int, text: str) -> None:
        super().__init__(text)
        self.__dict__.update(code=code, exit_code=status)  # of this one, not of the class


def harden(*, io_flusher: bool) -> None:
    """No dump, no tracing; with `io_flusher` the kernel does not wait for dirty pages that this process shall write.

    And one heap for all threads: blocks go from thread to thread here, and heaps of their own would only keep them.
    """
    with contextlib.suppress(AttributeError):  # another C library than GNU's
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    kernel.prctl(kernel.PR_SET_DUMPABLE, 0)
    if io_flusher:
        with contextlib.suppress(PermissionError):
            kernel.prctl(kernel.PR_SET_IO_FLUSHER, 1)


def hold_signals() -> None:
    """Keep the signals that end us for `wait`. Before any thread is started, for threads inherit this."""
    signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)


def wait(volume: Served, tell: Tell, *, goes_on: Callable[[], bool] = lambda: True, look_s: float = LOOK_S) -> None:
    """Return when a signal or `goes_on` asks for the end. Tells once if nothing can be written any more."""
    told = False
    while goes_on():
        if signal.sigtimedwait(ENDING, look_s) is not None:
            return
        fault = volume.fault
        if fault is not None and not told:
            tell(f"the volume is not written any more: {fault}")
            told = True


def end(server: Server, volume: Served) -> None:
    """Answer what was received, then close the volume. Raises what closing raises."""
    try:
        server.stop()
    finally:
        volume.close()


@contextlib.contextmanager
def announced(path: Path | None, text: str) -> Iterator[None]:
    """A file that is there while the block runs."""
    if path is None:
        yield
        return
    replace_file(path, text.encode())
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def daemonize(body: Callable[[Ready], None], *, name: str) -> int:
    """Run `body` in a process of its own, in the background; returns its number when `body` says that it is ready.

    Args:
        body: runs in the new process; what it raises before it is ready is raised here.
        name: for the system's log, where later errors go.

    Raises:
        ServerNotStarted: `body` failed.
    """
    ours, theirs = os.pipe2(os.O_CLOEXEC)
    process = os.fork()
    if process == 0:
        os.close(ours)
        _run(body, theirs, name)
    os.close(theirs)
    with open(ours, "rb") as report:  # noqa: PTH123 - a descriptor
        said = report.read()
    if said == b"ready":
        return process
    os.waitpid(process, 0)
    try:
        word = json.loads(said)
    except ValueError:
        raise ServerNotStarted("Failed", EXIT_FAILED, "the server ended before it served; see the log") from None
    raise ServerNotStarted(word["code"], word["status"], word["text"])


def _run(body: Callable[[Ready], None], report: int, name: str) -> NoReturn:
    """The life of the new process; it ends here in every case, so that nothing of its parent's runs twice."""
    status, is_ready = EXIT_FAILED, False

    def ready() -> None:
        nonlocal is_ready
        is_ready = True
        null = os.open(os.devnull, os.O_RDWR)
        for number in (0, 1, 2):
            os.dup2(null, number)
        os.write(report, b"ready")
        os.close(report)

    try:
        syslog.openlog(name, syslog.LOG_PID, syslog.LOG_DAEMON)
        os.setsid()
        os.chdir("/")
        body(ready)
        status = 0
    except BaseException as exc:  # noqa: BLE001 - the parent or the log is told
        known = isinstance(exc, JindiskError | OSError)
        code = exc.code if isinstance(exc, JindiskError) else "OSError"
        status = exc.exit_code if isinstance(exc, JindiskError) else EXIT_FAILED
        text = str(exc) if known else f"a fault of the program: {type(exc).__name__}"
        if is_ready:
            syslog.syslog(syslog.LOG_ERR, text)
        else:
            os.write(report, json.dumps({"code": code, "status": status, "text": text}).encode())
    finally:
        os._exit(status)


def to_syslog(sentence: str) -> None:
    """A sentence for the system's log."""
    syslog.syslog(syslog.LOG_WARNING, sentence)
