"""A key from a program in the initrd instead of a broker: the contract of pluggable remote attestation.

The program gets `JINDISK_VM` (the image's identity) and `JINDISK_VOLUME` (the volume's) in its environment and nothing
else, and prints the raw key on its standard output, without a line end. Status 0: that is the key. 75: try again later.
Anything else: refused. Its standard error goes nowhere. The program is part of the initrd and so of what is measured;
what it attests, and to whom, is its own matter, and this project's broker knows nothing of it.

Standard library only; works without the module subprocess, which would be measured with every guest.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from collections.abc import Callable

from jindiskd.base.secret import Secret
from jindiskd.guest.codes import Code, GuestFailure

PATH = "etc/jindisk/key-program"
"""In the initrd."""
MAX_KEY_BYTES = 4096
AGAIN = 75  # EX_TEMPFAIL, sysexits.h
FIRST_WAIT_S, MAX_WAIT_S = 0.5, 8.0


class KeyProgram:
    """Takes the place of the broker for volumes that need a raw key and nothing more."""

    def __init__(self, path: str, image_id: str, volume: str) -> None:
        """`path` of the program; the other two are what it is told."""
        self._path = path
        self._environment = {"JINDISK_VM": image_id, "JINDISK_VOLUME": volume, "PATH": "/usr/bin:/bin"}

    def fetch(self, _resource: str, deadline_s: float, reported: Callable[[], None]) -> Secret:
        """The key; tries again, more and more seldom, while the program asks for that.

        Raises:
            GuestFailure: `POLICY_DENIED` where it refuses, `BROKER_UNREACHABLE` where it came to nothing in time,
                `BROKER_MISBEHAVED` where it breaks the contract.
        """
        reported()
        wait_s = FIRST_WAIT_S
        while True:
            status, key = self._run(deadline_s)
            if status == 0:
                if not 0 < len(key) <= MAX_KEY_BYTES:
                    raise GuestFailure(Code.BROKER_MISBEHAVED)
                return Secret(key)
            key[:] = bytes(len(key))
            if status != AGAIN:
                raise GuestFailure(Code.POLICY_DENIED)
            if time.monotonic() + wait_s >= deadline_s:
                raise GuestFailure(Code.BROKER_UNREACHABLE)
            time.sleep(wait_s)
            wait_s = min(2 * wait_s, MAX_WAIT_S)

    def _run(self, deadline_s: float) -> tuple[int, bytearray]:
        """Exit status and standard output; the program and its children are gone afterwards."""
        theirs_in, theirs_err = os.open("/dev/null", os.O_RDONLY), os.open("/dev/null", os.O_WRONLY)
        ours, theirs = os.pipe2(os.O_CLOEXEC)
        try:
            actions = [
                (os.POSIX_SPAWN_DUP2, theirs_in, 0),
                (os.POSIX_SPAWN_DUP2, theirs, 1),
                (os.POSIX_SPAWN_DUP2, theirs_err, 2),
            ]
            try:
                pid = os.posix_spawn(self._path, [self._path], self._environment, file_actions=actions, setsid=True)
            except OSError:
                raise GuestFailure(Code.BROKER_MISBEHAVED) from None
        except BaseException:
            os.close(ours)
            raise
        finally:
            for descriptor in (theirs_in, theirs_err, theirs):
                os.close(descriptor)
        try:
            return self._listen(pid, ours, deadline_s)
        finally:
            os.close(ours)

    @staticmethod
    def _listen(pid: int, ours: int, deadline_s: float) -> tuple[int, bytearray]:
        told, poller = bytearray(), select.poll()
        poller.register(ours, select.POLLIN)
        ended = False
        try:
            while len(told) <= MAX_KEY_BYTES:
                left_ms = int((deadline_s - time.monotonic()) * 1000)
                if left_ms <= 0 or not poller.poll(left_ms):
                    raise GuestFailure(Code.BROKER_UNREACHABLE)
                part = os.read(ours, 4096)
                if not part:
                    ended = True
                    break
                told += part
        except BaseException:
            told[:] = bytes(len(told))
            raise
        finally:
            if not ended:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)
            # It closed its output: what it still does has no bearing on the key.
            status = _status(pid, deadline_s)
        if not ended:
            told[:] = bytes(len(told))
            raise GuestFailure(Code.BROKER_MISBEHAVED)
        return status, told


def _status(pid: int, deadline_s: float) -> int:
    """Wait for its end, and end what is left of it; -1 where it was killed."""
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            break
        if time.monotonic() >= deadline_s:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
            _done, status = os.waitpid(pid, 0)
            break
        time.sleep(0.01)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(status) if os.WIFEXITED(status) else -1
