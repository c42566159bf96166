"""The library's connection with its transport faults mended.

Mended: a full socket no longer ends the connection; a lost connection closes its socket, so that the bus name is free
at once; one malformed or unknown message concerns that message alone; oversized requests are skipped unparsed; every
call has a time limit; descriptors that nobody takes are closed, and none is inherited by programs we start; a burst of
messages does not starve other tasks; output that the bus does not take is bounded, and stops input meanwhile.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import os
import socket
import struct
from asyncio import Future
from collections.abc import Iterable
from typing import Any

import structlog

from jindiskd.bus.lib import (
    AuthAnonymous,
    HeaderField,
    InvalidMessageError,
    MarshallerStreamEndError,
    Message,
    MessageBus,
    MessageFlag,
    MessageType,
    MessageWriter,
    SignatureTree,
    Unmarshaller,
)
from jindiskd.errors import ServiceUnavailable

log = structlog.get_logger(__name__)

KINDS = frozenset(kind.value for kind in MessageType)
REPLIES = frozenset((MessageType.METHOD_RETURN.value, MessageType.ERROR.value))
HEADER_FIELDS = SignatureTree._get("a(yv)").types[0]  # noqa: SLF001 (the library has no public parser of signatures)
MAX_REQUEST_BYTES = 256 * 1024
"""Body of an incoming call or signal."""
MAX_REPLY_BYTES = 16 * 1024 * 1024
"""Body of an answer to a call of ours."""
MAX_OUTGOING_BYTES = 16 * 1024 * 1024
"""The system bus drops a sender of more than 32 MiB."""
PAUSE_ABOVE_BYTES = 4 * 1024 * 1024
"""Queued output that stops reading …"""
RESUME_BELOW_BYTES = 1024 * 1024
"""… and starts it again."""
GIVE_UP_ABOVE_BYTES = 64 * 1024 * 1024
STUCK_S = 60.0
"""The bus takes nothing more from whose messages fill its memory, because others do not read them, until they do.
After that long without a byte taken the connection is given up: a new one is taken from at once."""
MESSAGES_PER_WAKEUP = 64
MAX_FDS = 253
"""SCM_MAX_FD of the kernel: descriptors one datagram can carry."""
DROPPED = "dropped a message from the bus"


class MessageTooLarge(Exception):
    """An answer or call of ours is larger than the bus takes."""


def close_all(fds: Iterable[int]) -> None:
    """Close descriptors that nobody took."""
    for fd in fds:
        os.close(fd)


class _Writer(MessageWriter):  # type: ignore[misc]  # the library has no types
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


class _Closed:
    """Stands in for the socket while a message is parsed: parsing never reads on."""

    @staticmethod
    def recvmsg(*_: object) -> None:
        raise InvalidMessageError("the body is shorter than its signature says")


class _Unmarshaller(Unmarshaller):  # type: ignore[misc]  # the library has no types
    """Frames first and parses afterwards, so what is wrong with a message concerns that message alone.

    Unknown types and header fields are passed over, oversized bodies are read past.
    """

    sock: Any
    unix_fds: list[int]

    def __init__(self, stream: Any, sock: socket.socket) -> None:
        super().__init__(stream, sock)
        self._skip: int | None = None
        self._serial = self._body_at = 0
        self._oversized = self._has_body = False

    def read(self, n: int, prefetch: bool = False) -> int:  # noqa: FBT001, FBT002, RUF100 (the library's signature)
        missing = n - (len(self.buf) - self.offset)
        while missing > 0:
            data = self._receive(missing)
            self.buf.extend(data)
            missing -= len(data)
        at = self.offset
        if not prefetch:
            self.offset += n
        return int(at)

    def _receive(self, length: int) -> bytes:
        room = socket.CMSG_SPACE(MAX_FDS * array.array("i").itemsize)
        try:
            data, ancillary, *_ = self.sock.recvmsg(length, room, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            raise MarshallerStreamEndError from None
        for level, kind, payload in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                fds = array.array("i")
                fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
                self.unix_fds.extend(fds)
        if not data:
            raise EOFError("the bus closed the connection")
        return bytes(data)

    def unmarshall(self) -> bool:
        """True once a message is through; `message` is None if it had to be dropped."""
        try:
            self._frame()
        except MarshallerStreamEndError:
            return False
        try:
            self.message = self._parse()
        except Exception as exc:  # noqa: BLE001 (the parser's faults on hostile input are of any kind)
            log.warning(DROPPED, problem=type(exc).__name__)
        if self.message is None:
            self.close_fds()
        return True

    def close_fds(self) -> None:
        """Close the descriptors of a message that is not handed on."""
        close_all(self.unix_fds)
        self.unix_fds = []

    def _frame(self) -> None:
        self.offset = 0
        self.read(16, prefetch=True)
        self.endian = self.buf[0]
        if self.endian not in b"lB" or self.buf[3] != 1:
            raise InvalidMessageError("lost the thread of the stream")
        order = "<III" if self.endian == ord("l") else ">III"
        body, self._serial, header = struct.unpack_from(order, self.buf, 4)
        if header > MAX_REQUEST_BYTES:
            raise InvalidMessageError("the header is larger than any real one")
        self._body_at = 16 + header + (-header & 7)
        self._oversized = body > (MAX_REPLY_BYTES if self.buf[1] in REPLIES else MAX_REQUEST_BYTES)
        self._has_body = bool(body) and not self._oversized
        self.read(self._body_at + (body if self._has_body else 0), prefetch=True)
        if self._oversized:
            self._skip = body if self._skip is None else self._skip
            while self._skip:
                self._skip -= len(self._receive(min(self._skip, 65536)))

    def _parse(self) -> Any:
        kind = self.buf[1]
        if kind not in KINDS or (self._oversized and kind != MessageType.METHOD_CALL.value):
            return None
        self.sock = _Closed
        self.offset = 12
        fields = {code: variant.value for code, variant in self.read_argument(HEADER_FIELDS)}
        signature = fields.get(HeaderField.SIGNATURE.value, "") if self._has_body else ""
        tree = SignatureTree._get(signature)  # noqa: SLF001 (the library has no public parser of signatures)
        self.offset = self._body_at
        message = Message(
            message_type=MessageType(kind),
            flags=MessageFlag(self.buf[2] & 7),
            serial=self._serial,
            path=fields.get(HeaderField.PATH.value),
            interface=fields.get(HeaderField.INTERFACE.value),
            member=fields.get(HeaderField.MEMBER.value),
            error_name=fields.get(HeaderField.ERROR_NAME.value),
            reply_serial=fields.get(HeaderField.REPLY_SERIAL.value),
            sender=fields.get(HeaderField.SENDER.value),
            destination=fields.get(HeaderField.DESTINATION.value),
            unix_fds=self.unix_fds,
            signature=tree,
            body=[self.read_argument(argument) for argument in tree.types],
        )
        message.oversized = self._oversized
        return message


class Connection(MessageBus):  # type: ignore[misc]  # the library has no types
    """A connection to a bus. Needs a running loop; made by `connect_to`."""

    _unmarshaller: Any

    def __init__(self, *, carries_fds: bool = True, **options: Any) -> None:
        super().__init__(negotiate_unix_fd=carries_fds, **options)
        self.carries_fds = carries_fds
        self._writer = _Writer(self)
        self._paused = False

    def _create_unmarshaller(self) -> _Unmarshaller:
        return _Unmarshaller(self._stream, self._sock)

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
