"""Asking the privileged helper. One connection a request; a request that is given up is undone by the helper."""

from __future__ import annotations

import asyncio
import fcntl
import os
import socket
from collections.abc import Sequence
from pathlib import Path

from jindiskd.base import document
from jindiskd.base.secret import Secret
from jindiskd.errors import ServiceUnavailable, TimedOut
from jindiskd.helper.protocol import ANSWER_BYTES, Answer, Close, HelperFailed, List, Open, Request, Serving, dump

SOCKET = Path("/run/jindisk-helper.socket")
OPEN_S, CLOSE_S, LIST_S = 660.0, 180.0, 60.0
UNIT = "jindisk-helper.socket"
REMEDY = "start it with: systemctl enable --now jindisk-helper.socket"


def key_file(key: Secret) -> int:
    """A sealed memory file that holds a key; the caller closes it."""
    fd = os.memfd_create("key", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.write(fd, key.reveal())
        seals = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    except BaseException:
        os.close(fd)
        raise
    return fd


class HelperClient:
    """The helper behind a socket."""

    def __init__(self, path: Path = SOCKET) -> None:
        """Nothing is connected before it is asked."""
        self._path = path

    async def open(self, request: Open, key: Secret) -> str:
        """Map a volume; the mapped node's name. Raises as `ask`."""
        fd = key_file(key)
        try:
            return (await self._ask(request, [fd], OPEN_S)).node
        finally:
            os.close(fd)

    async def close(self, request: Close) -> None:
        """Take a mapping away. Raises as `ask`."""
        await self._ask(request, [], CLOSE_S)

    async def serving(self) -> Sequence[Serving]:
        """What is mapped. Raises as `ask`."""
        return (await self._ask(List(), [], LIST_S)).serving

    async def _ask(self, request: Request, fds: list[int], timeout_s: float) -> Answer:
        """Ask, and wait for the answer.

        Raises:
            HelperFailed: with the error of the helper.
            ServiceUnavailable: there is no helper, or it ended without an answer.
            TimedOut: no answer came.
        """
        loop = asyncio.get_running_loop()
        with socket.socket(
            socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
        ) as stream:
            try:
                async with asyncio.timeout(timeout_s):
                    await loop.sock_connect(stream, os.fspath(self._path))
                    socket.send_fds(stream, [dump(request)], fds)
                    packet = await loop.sock_recv(stream, ANSWER_BYTES + 1)
            except TimeoutError as exc:
                raise TimedOut("an answer of the helper", timeout_s) from exc
            except OSError as exc:
                raise ServiceUnavailable(UNIT, REMEDY) from exc
        if not packet:
            raise ServiceUnavailable("jindisk-helper", "it ended without an answer; look at its journal")
        answer = document.load(Answer, packet, document="the helper's answer", limit_bytes=ANSWER_BYTES)
        if answer.error:
            raise HelperFailed(answer)
        return answer
