"""The library's connection with its transport faults mended.

Mended: a full socket no longer ends the connection; a lost connection closes its socket, so that the bus name is free
at once; one malformed or unknown message concerns that message alone; oversized requests are skipped unparsed; every
call has a time limit; descriptors that nobody takes are closed, and none is inherited by programs we start; a burst of
messages does not starve other tasks; output that the bus does not take is bounded, and stops input meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from asyncio import Future
from typing import Any

from jindiskd.bus.incoming import Incoming, close_all
from jindiskd.bus.lib import AuthAnonymous, Message, MessageBus, MessageFlag, MessageType
from jindiskd.bus.outgoing import Outgoing
from jindiskd.errors import ServiceUnavailable

PAUSE_ABOVE_BYTES = 4 * 1024 * 1024
"""Queued output that stops reading …"""
RESUME_BELOW_BYTES = 1024 * 1024
"""… and starts it again."""
GIVE_UP_ABOVE_BYTES = 64 * 1024 * 1024
MESSAGES_PER_WAKEUP = 64


class Connection(MessageBus):  # type: ignore[misc]  # the library has no types
    """A connection to a bus. Needs a running loop; made by `connect_to`."""

    _unmarshaller: Any

    def __init__(self, *, carries_fds: bool = True, **options: Any) -> None:
        super().__init__(negotiate_unix_fd=carries_fds, **options)
        self.carries_fds = carries_fds
        self._writer = Outgoing(self)
        self._paused = False

    def _create_unmarshaller(self) -> Incoming:
        return Incoming(self._stream, self._sock)

    def _message_reader(self) -> None:
        try:
            for _ in range(MESSAGES_PER_WAKEUP):  # the loop's selector is level-triggered: the rest comes next turn
                if self._paused or not self._unmarshaller.unmarshall():
                    return
                message = self._unmarshaller.message
                self._unmarshaller = self._create_unmarshaller()
                if message is None:
                    continue
                if message.reply_serial and message.reply_serial not in self._method_return_handlers:
                    close_all(message.unix_fds)  # the answer to a call given up
                    continue
                self._on_message(message)
                if message.message_type is MessageType.SIGNAL:
                    close_all(message.unix_fds)  # no signal that we listen to carries any
        except Exception as exc:  # noqa: BLE001 (whatever it is, the connection is over and says so)
            self._finalize(exc)

    def throttle(self) -> None:
        """Stop reading while much is queued for writing, start again later, give up if that does not help."""
        if self.unique_name is None or self._disconnected:
            return
        queued = self._writer.queued
        if queued > GIVE_UP_ABOVE_BYTES:
            self._loop.call_soon(self._finalize, BufferError("the bus does not take our messages"))
        elif not self._paused and queued > PAUSE_ABOVE_BYTES:
            self._paused = True
            self._loop.remove_reader(self._fd)
        elif self._paused and queued < RESUME_BELOW_BYTES:
            self._paused = False
            self._loop.add_reader(self._fd, self._message_reader)

    def _finalize(self, err: BaseException | None = None) -> None:
        if self._disconnected:
            return
        super()._finalize(err)
        if self._disconnect_future.done() and not self._disconnect_future.cancelled():
            self._disconnect_future.exception()  # marks it as seen; who waits gets it all the same
        self._writer.abort(err or ConnectionError("disconnected from the bus"))
        if self._unmarshaller is not None:
            self._unmarshaller.close_fds()
        for closing in (self._stream.close, self._sock.close):  # frees the bus name at once
            with contextlib.suppress(OSError):
                closing()

    async def call(self, msg: Any, timeout_s: float = 25.0) -> Any:
        """Send a call and return its answer, which may be an error message.

        Raises:
            ConnectionError: not connected, or the connection ended meanwhile.
            TimeoutError: no answer within `timeout_s`.
        """
        if not self.connected:
            raise ConnectionError("not connected to the bus")
        msg.serial = msg.serial or self.next_serial()
        gone = self._disconnect_future
        answer = asyncio.ensure_future(super().call(msg))
        try:
            async with asyncio.timeout(timeout_s):
                await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
            if gone.done():
                if answer.done() and not answer.cancelled():
                    answer.exception()  # marks it as seen: it says less than the error below
                raise ConnectionError("the connection to the bus ended")
            return answer.result()
        finally:
            answer.cancel()
            self._method_return_handlers.pop(msg.serial, None)

    def send(self, msg: Any) -> Future[None]:
        """Queue a message; the future is done when the kernel has it."""
        if self._disconnected:
            future: Future[None] = self._loop.create_future()
            future.set_exception(ConnectionError("not connected to the bus"))
            future.exception()
            return future
        sent: Future[None] = super().send(msg)
        return sent

    async def wait_disconnected(self) -> str:
        """Wait until the connection has ended; return why, or an empty string if we ended it."""
        await asyncio.wait({self._disconnect_future})
        exc = self._disconnect_future.exception()
        return "" if exc is None else str(exc) or type(exc).__name__

    async def aclose(self) -> None:
        """Send what is queued (for a second at most), then close."""
        if not self._disconnected:
            done: Future[None] = self._loop.create_future()
            if self._writer.queued:
                # The queue is first in, first out: when a message sent now is out, all others are.
                done = self.send(
                    Message(
                        destination="org.freedesktop.DBus",
                        path="/org/freedesktop/DBus",
                        interface="org.freedesktop.DBus.Peer",
                        member="Ping",
                        flags=MessageFlag.NO_REPLY_EXPECTED,
                    )
                )
                await asyncio.wait({done}, timeout=1)
            self._user_disconnect = True
            self._finalize(None)


class _Anonymous(AuthAnonymous):  # type: ignore[misc]  # the library has no types
    """Says who it is at once: without that, some servers ask for it first, which the library does not expect."""

    def _authentication_start(self, negotiate_unix_fd: bool = False) -> str:  # noqa: FBT001, FBT002, RUF100 (the library's signature)
        return f"{super()._authentication_start(negotiate_unix_fd)} {b'jindiskctl'.hex()}"


class _Tunnel(Connection):
    """A connection to a bus at the other end of a stream, which vouches for us and carries no descriptors."""

    def __init__(self, stream: socket.socket) -> None:
        self._given = stream
        super().__init__(carries_fds=False, bus_address="unix:path=/dev/null", auth=_Anonymous())

    def _setup_socket(self) -> None:
        self._sock = self._given
        self._sock.setblocking(False)
        self._stream, self._fd = self._sock.makefile("rwb"), self._sock.fileno()


async def connect_through(stream: socket.socket) -> Connection:
    """Speak to a bus through a stream, which is ours from now on.

    Raises:
        ConnectionError: whoever is at its other end is not the way to a bus, or has gone.
    """
    connection = _Tunnel(stream)
    try:
        await connection.connect()
    except BaseException as exc:
        connection._finalize(None)  # noqa: SLF001 (ours: closes the stream)
        if isinstance(exc, Exception):
            raise ConnectionError(str(exc) or type(exc).__name__) from exc
        raise
    return connection


async def connect_to(bus: Any, address: str = "") -> Connection:
    """Connect to the bus of type `bus` (`BusType`), or to the one at `address`.

    Raises:
        ServiceUnavailable: there is no bus, or it refuses us.
    """
    try:
        connection = Connection(bus_address=address) if address else Connection(bus_type=bus)
        try:
            await connection.connect()
        except BaseException:
            connection._finalize(None)  # noqa: SLF001 (ours: closes the socket that the constructor opened)
            raise
    except Exception as exc:
        raise ServiceUnavailable("the D-Bus message bus", "start dbus.service, or look at its address") from exc
    return connection
