"""Hearing the states of volumes that are open on this host, from the processes that serve them.

A socket of packets; each message has a connection of its own (`jindiskd.helper.states` has the other end). Only root
and the service's own user may speak, whose such processes are; where the service was started as root by hand, they are
nobody's. The session identifier says for which volume.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import pwd
import socket
import struct
from collections.abc import Awaitable, Callable
from pathlib import Path

import structlog

from jindiskd.helper.states import PACKET_BYTES

log = structlog.get_logger(__name__)
PEER = struct.Struct("3i")
CONNECTIONS = 64
MESSAGE_S = 10.0
VERBS = ("adopt", "report", "close", "stale")
NOBODY = "nobody"

Tell = Callable[[str, bytes], Awaitable[bytes]]
"""Takes a verb and a body; gives `helper.states.OK`, `FENCED` or `LATER`."""


class StatesListener:
    """Listens from `start` to `stop`."""

    def __init__(self, path: Path, tell: Tell) -> None:
        """Nothing is bound yet."""
        self._path, self._tell = path, tell
        self._may_speak = {0, os.geteuid()}
        if os.geteuid() == 0:
            self._may_speak.add(pwd.getpwnam(NOBODY).pw_uid)
        self._listener: socket.socket | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        """Bind the socket, in place of one that an ended service left.

        Raises:
            OSError: it cannot be bound.
        """
        self._path.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        try:
            before = os.umask(0o111 if os.geteuid() == 0 else 0o177)
            try:
                listener.bind(os.fspath(self._path))
            finally:
                os.umask(before)
            listener.listen(CONNECTIONS)
        except BaseException:
            listener.close()
            raise
        self._listener = listener
        asyncio.get_running_loop().add_reader(listener.fileno(), self._accept)

    async def stop(self) -> None:
        """Answer nobody any more; whoever waits tries the next service."""
        if self._listener is not None:
            asyncio.get_running_loop().remove_reader(self._listener.fileno())
            self._listener.close()
            self._listener = None
            self._path.unlink(missing_ok=True)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _accept(self) -> None:
        assert self._listener is not None
        with contextlib.suppress(OSError):
            stream, _ = self._listener.accept()
            _, uid, _ = PEER.unpack(stream.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, PEER.size))
            if uid not in self._may_speak or len(self._tasks) >= CONNECTIONS:
                stream.close()
                return
            stream.setblocking(False)
            task = asyncio.get_running_loop().create_task(self._serve(stream))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _serve(self, stream: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        with stream, contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(MESSAGE_S):
                packet = await loop.sock_recv(stream, PACKET_BYTES + 1)
            verb, _, body = packet.partition(b" ")
            if len(packet) > PACKET_BYTES or verb.decode(errors="replace") not in VERBS:
                return
            answer = await self._tell(verb.decode(), body)
            async with asyncio.timeout(MESSAGE_S):
                await loop.sock_sendall(stream, answer)
