"""Messages to the bus: a bounded queue, which waits while the bus takes nothing, and gives up at last."""

from __future__ import annotations

import array
import asyncio
import os
import socket
from asyncio import Future
from typing import TYPE_CHECKING, Any

from jindiskd.bus.incoming import close_all
from jindiskd.bus.lib import MessageWriter

if TYPE_CHECKING:
    from jindiskd.bus.transport import Connection

MAX_OUTGOING_BYTES = 16 * 1024 * 1024
"""The system bus drops a sender of more than 32 MiB."""
STUCK_S = 60.0
"""The bus takes nothing more from whose messages fill its memory, because others do not read them, until they do.
After that long without a byte taken the connection is given up: a new one is taken from at once."""


class MessageTooLarge(Exception):
    """An answer or call of ours is larger than the bus takes."""


class Outgoing(MessageWriter):  # type: ignore[misc]  # the library has no types
    """The queue of outgoing messages. Owns duplicates of their descriptors until they are sent."""

    buf: Any
    offset: int
    unix_fds: Any
    fut: Any

    def __init__(self, bus: Connection) -> None:
        super().__init__(bus)
        self.queued = 0
        self._taken = 0
        self._watch: asyncio.TimerHandle | None = None

    def buffer_message(self, msg: Any, future: Future[None] | None = None) -> None:
        """Queue a message; `future` is done once the kernel has it."""
        data = msg._marshall(negotiate_unix_fd=True)  # noqa: SLF001 (what the method overridden does)
        if len(data) > MAX_OUTGOING_BYTES:
            raise MessageTooLarge(f"{len(data)} bytes")
        fds = [os.dup(fd) for fd in msg.unix_fds or ()]
        self.queued += len(data)
        self.messages.put_nowait((data, fds, future))
        if self._watch is None:
            self._watch = self.loop.call_later(STUCK_S, self._look, self._taken)
        self.bus.throttle()

    def _end_watch(self) -> None:
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None

    def _look(self, taken: int) -> None:
        """Give up if nothing was taken since `taken` bytes were."""
        if self._taken == taken:
            self.bus._finalize(BufferError("the bus does not take our messages any more"))  # noqa: SLF001 (ours)
        else:
            self._watch = self.loop.call_later(STUCK_S, self._look, self._taken)

    def write_callback(self) -> None:
        """Send as much as the kernel takes now."""
        try:
            while self.buf is not None or self._next():
                try:
                    sent = self._send()
                except (BlockingIOError, InterruptedError):
                    return  # the loop calls again once there is room
                self.offset += sent
                self._taken += sent
                if self.offset < len(self.buf):
                    return
                self.queued -= len(self.buf)
                self.buf = None
                if self.fut is not None and not self.fut.done():
                    self.fut.set_result(None)
                self.bus.throttle()
            self.loop.remove_writer(self.fd)
            self._end_watch()
        except Exception as exc:  # noqa: BLE001 (whatever it is, the connection is over and says so)
            self.bus._finalize(exc)  # noqa: SLF001 (ours)

    def _next(self) -> bool:
        if self.messages.empty():
            return False
        data, self.unix_fds, self.fut = self.messages.get_nowait()
        self.buf, self.offset = memoryview(data), 0
        return True

    def _send(self) -> int:
        if not self.unix_fds:
            return int(self.sock.send(self.buf[self.offset :]))
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", self.unix_fds))
        sent = int(self.sock.sendmsg([self.buf[self.offset :]], [rights]))
        self._close_fds()
        return sent

    def _close_fds(self) -> None:
        close_all(self.unix_fds or ())
        self.unix_fds = None

    def abort(self, error: BaseException) -> None:
        """Drop what is queued, and tell who waits for it."""
        self._end_watch()
        self._close_fds()
        waiting = [self.fut]
        while not self.messages.empty():
            _, fds, future = self.messages.get_nowait()
            waiting.append(future)
            close_all(fds)
        for future in waiting:
            if future is not None and not future.done():
                future.set_exception(error)
                future.exception()  # marks it as seen: few wait for their message to be out
        self.buf, self.queued = None, 0
