"""A guest's console, both ways: libvirt's stream of it, joined to a socket that somebody else reads and writes.

Everything here runs in libvirt's event thread, which never waits: what one side does not take is kept, up to a limit
beyond which the other side is not read. One stream is open on a console at a time; libvirt sees to that.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable
from typing import Any

import libvirt
import structlog

from jindiskd.domain.connection import Connection
from jindiskd.errors import Busy

log = structlog.get_logger(__name__)
BLOCK_BYTES = 16384
LIMIT_BYTES = 1 << 17
"""Kept for a side that does not take it."""
READABLE, WRITABLE = libvirt.VIR_STREAM_EVENT_READABLE, libvirt.VIR_STREAM_EVENT_WRITABLE
BROKEN = libvirt.VIR_STREAM_EVENT_ERROR | libvirt.VIR_STREAM_EVENT_HANGUP
# The events of descriptors have the same numbers (virEventHandleType).
NOT_NOW = -2
"""What libvirt's calls give where they would have to wait."""


async def attach(
    connection: Connection, name: str, uuid: str, *, force: bool, ended: Callable[[ConsoleStream], None]
) -> tuple[ConsoleStream, socket.socket]:
    """Open the console of a machine that runs.

    Args:
        connection: to libvirt.
        name: of the domain, for messages.
        uuid: of it.
        force: take the console from whoever has it.
        ended: called in libvirt's thread when the console, or whoever has the socket, has gone.

    Returns:
        The stream, and the socket's other end, which is the caller's.

    Raises:
        Busy: somebody else has it. NotFound, LibvirtFailed: there is no such machine, or it is off.
    """

    def call(conn: libvirt.virConnect) -> tuple[ConsoleStream, socket.socket]:
        dom = conn.lookupByUUIDString(uuid)
        stream = conn.newStream(libvirt.VIR_STREAM_NONBLOCK)
        flags = libvirt.VIR_DOMAIN_CONSOLE_SAFE | (libvirt.VIR_DOMAIN_CONSOLE_FORCE if force else 0)
        try:
            dom.openConsole(None, stream, flags)
        except libvirt.libvirtError as exc:
            if force or exc.get_error_code() != libvirt.VIR_ERR_OPERATION_FAILED:
                raise
            raise Busy(f"the console of domain {name!r}", "somebody is attached to it; --force takes it away") from exc
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        found = ConsoleStream(stream, ours, ended)
        found.start()
        return found, theirs

    return await connection.call(f"attaching to the console of domain {name!r}", call)


class ConsoleStream:
    """One attachment. Use `attach`."""

    def __init__(self, stream: Any, ours: socket.socket, ended: Callable[[ConsoleStream], None]) -> None:
        self._stream, self._socket, self._ended = stream, ours, ended
        self._lock = threading.RLock()
        self._to_guest, self._to_client = bytearray(), bytearray()
        self._silent = self._over = False
        self._watch = -1
        self.closed = False
        """Whether it has ended."""

    def start(self) -> None:
        """Pass on what comes, from now on."""
        with self._lock:  # the first event may come before this is done
            self._stream.eventAddCallback(READABLE | BROKEN, self._on_stream, None)
            self._watch = libvirt.virEventAddHandle(self._socket.fileno(), READABLE | BROKEN, self._on_socket, None)

    def close(self) -> None:
        """End it. Blocks for a moment; from any thread."""
        with self._lock:
            if self.closed:
                return
            self.closed = True
            with contextlib.suppress(libvirt.libvirtError):
                libvirt.virEventRemoveHandle(self._watch)
            with contextlib.suppress(libvirt.libvirtError):
                self._stream.eventRemoveCallback()
            with contextlib.suppress(libvirt.libvirtError):
                self._stream.abort()
            self._socket.close()
        self._ended(self)

    def _on_stream(self, _stream: Any, events: int, _opaque: Any) -> None:
        self._handle(events, 0)

    def _on_socket(self, _watch: int, _fd: int, events: int, _opaque: Any) -> None:
        self._handle(0, events)

    def _handle(self, of_stream: int, of_socket: int) -> None:
        """Do what can be done without waiting. Nothing may be raised into libvirt."""
        try:
            with self._lock:
                if self.closed:
                    return
                if of_stream & (READABLE | BROKEN):
                    self._receive(ending=bool(of_stream & BROKEN))
                if of_socket & READABLE:
                    self._read()
                self._write()
                self._send()
                gone = of_socket & BROKEN or (self._over and not self._to_client)
                if not gone:
                    self._listen()
            if gone:
                self.close()
        except (OSError, libvirt.libvirtError):
            self.close()
        except Exception:
            log.exception("fault at a console")
            self.close()

    def _receive(self, *, ending: bool) -> None:
        """From the guest."""
        while len(self._to_client) < LIMIT_BYTES:
            data = self._stream.recv(BLOCK_BYTES)
            if data == NOT_NOW:
                break
            if not data:
                ending = True
                break
            self._to_client += data
        self._over |= ending

    def _read(self) -> None:
        """From the client; one that has nothing more to say may still listen."""
        while len(self._to_guest) < LIMIT_BYTES and not self._silent:
            try:
                data = self._socket.recv(BLOCK_BYTES)
            except BlockingIOError:
                break
            if not data:
                self._silent = True
            self._to_guest += data

    def _write(self) -> None:
        """To the client."""
        while self._to_client:
            try:
                del self._to_client[: self._socket.send(self._to_client)]
            except BlockingIOError:
                break

    def _send(self) -> None:
        """To the guest."""
        while self._to_guest and not self._over:
            sent = self._stream.send(bytes(self._to_guest[:BLOCK_BYTES]))
            if sent == NOT_NOW:
                break
            del self._to_guest[:sent]

    def _listen(self) -> None:
        """Ask for the events that mean something now."""
        if self._over:
            with contextlib.suppress(libvirt.libvirtError):
                self._stream.eventRemoveCallback()
        else:
            more = READABLE if len(self._to_client) < LIMIT_BYTES else 0
            self._stream.eventUpdateCallback(more | BROKEN | (WRITABLE if self._to_guest else 0))
        more = READABLE if len(self._to_guest) < LIMIT_BYTES and not self._silent else 0
        libvirt.virEventUpdateHandle(self._watch, more | BROKEN | (WRITABLE if self._to_client else 0))
