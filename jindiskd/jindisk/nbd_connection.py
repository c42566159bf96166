"""The transmission phase of one NBD client.

A few threads take turns: one reads a request, lets the next one read, does its own and answers it. So slow requests,
flushes above all, do not hold up others, and answers come in any order. What a client sends is bounded by the threads:
each holds at most one request, and together they hold at most one payload of the greatest size, or several small ones.
"""

from __future__ import annotations

import errno
import socket
import threading
from dataclasses import dataclass

from jindiskd.jindisk import nbd_protocol as nbd
from jindiskd.jindisk.nbd_handshake import CONTEXT_ID, Agreed
from jindiskd.jindisk.served import Served

THREADS = 4
BUFFER_BYTES = 1 << 16
ALLOWED_FLAGS = {
    nbd.READ: nbd.FUA | nbd.DF,
    nbd.WRITE: nbd.FUA,
    nbd.FLUSH: nbd.FUA,
    nbd.TRIM: nbd.FUA,
    nbd.WRITE_ZEROES: nbd.FUA | nbd.NO_HOLE | nbd.FAST_ZERO,
    nbd.BLOCK_STATUS: nbd.FUA | nbd.REQ_ONE,
}
"""Flags that a request may have. What is mapped is no promise of room here, so `NO_HOLE` changes nothing: no write of
a client ever fails for want of room within the volume."""


class Ended(Exception):
    """The client left, or broke the protocol so that what follows cannot be understood."""


@dataclass(frozen=True, slots=True)
class Request:
    """A request as it was received."""

    kind: int
    flags: int
    cookie: int
    offset: int
    length: int
    data: bytearray | None


class Budget:
    """So many bytes of payload may be in memory at a time; whoever wants more waits."""

    def __init__(self, size: int) -> None:
        self._size = self._left = size
        self._changed = threading.Condition()

    def take(self, count: int) -> None:
        """Wait until there is room for `count` bytes, at most all of it."""
        with self._changed:
            self._changed.wait_for(lambda: self._left >= count)
            self._left -= count

    def give(self, count: int) -> None:
        """Give back what was taken."""
        with self._changed:
            self._left += count
            self._changed.notify_all()


class Receiver:
    """Reads a stream through a buffer: many small requests with one call. One thread at a time."""

    def __init__(self, stream: socket.socket) -> None:
        self._stream = stream
        self._buffer = bytearray(BUFFER_BYTES)
        self._view = memoryview(self._buffer)
        self._at = self._end = 0

    def header(self) -> tuple[int, ...]:
        """The fields of the next request's header. Raises `Ended`."""
        size = nbd.REQUEST.size
        if self._end - self._at < size:
            left = self._end - self._at
            self._view[:left] = self._view[self._at : self._end]
            self._at, self._end = 0, left
            while self._end < size:
                self._end += self._receive(self._view[self._end :])
        fields: tuple[int, ...] = nbd.REQUEST.unpack_from(self._buffer, self._at)
        self._at += size
        return fields

    def payload(self, length: int) -> bytearray:
        """The next `length` bytes. Raises `Ended`."""
        data = bytearray(length)
        done = min(length, self._end - self._at)
        data[:done] = self._view[self._at : self._at + done]
        self._at += done
        with memoryview(data) as view:
            while done < length:
                done += self._receive(view[done:])
        return data

    def _receive(self, view: memoryview) -> int:
        try:
            count = self._stream.recv_into(view)
        except OSError as exc:
            raise Ended from exc
        if not count:
            raise Ended
        return count


class Connection:
    """A client in the transmission phase; `run` serves it until it leaves."""

    def __init__(self, stream: socket.socket, volume: Served, agreed: Agreed, *, threads: int = THREADS) -> None:
        """`stream` is the caller's to close; `volume` may be shared with other connections."""
        self._stream, self._volume, self._agreed = stream, volume, agreed
        self._threads = threads
        self._receiver = Receiver(stream)
        self._receiving, self._sending = threading.Lock(), threading.Lock()
        self._budget = Budget(nbd.PAYLOAD_LIMIT)
        self._ended = False

    def run(self) -> None:
        """Serve until the client leaves or the stream is shut down; requests received are answered before."""
        self._stream.settimeout(None)
        others = [threading.Thread(target=self._serve, daemon=True) for _ in range(self._threads - 1)]
        for thread in others:
            thread.start()
        self._serve()
        for thread in others:
            thread.join()

    def _serve(self) -> None:
        while True:
            with self._receiving:
                if self._ended:
                    return
                try:
                    request = self._next()
                except (Ended, MemoryError):
                    self._ended = True
                    return
            try:
                self._answer(request)
            except BaseException as exc:
                self._ended = True
                self._shut()  # so that the one who reads notices
                if isinstance(exc, OSError):
                    return  # the client does not take answers
                raise
            finally:
                self._budget.give(_held(request))

    def _shut(self) -> None:
        try:
            self._stream.shutdown(socket.SHUT_RDWR)
        except OSError:
            return

    def _next(self) -> Request:
        """Receive a request, with what it brings. Raises `Ended`."""
        magic, flags, kind, cookie, offset, length = self._receiver.header()
        if magic != nbd.REQUEST_MAGIC or kind == nbd.DISCONNECT:
            raise Ended
        held = length if kind in {nbd.READ, nbd.WRITE} else 0
        if held > nbd.PAYLOAD_LIMIT:
            if kind == nbd.WRITE:
                raise Ended  # its data would have to be taken from the stream
            held = 0
        self._budget.take(held)
        try:
            data = self._receiver.payload(length) if kind == nbd.WRITE else None
        except BaseException:
            self._budget.give(held)
            raise
        return Request(kind, flags, cookie, offset, length, data)

    def _answer(self, request: Request) -> None:
        try:
            self._check(request)
            if request.kind == nbd.READ:
                parts = self._read(request)
            elif request.kind == nbd.BLOCK_STATUS:
                parts = self._status(request)
            else:
                self._change(request)
                parts = [nbd.REPLY.pack(nbd.REPLY_MAGIC, 0, request.cookie)]
        except OSError as exc:
            parts = [self._failure(request, nbd.error_number(exc))]
        with self._sending:
            _send(self._stream, parts)

    def _check(self, request: Request) -> None:
        """Raise what the protocol says about requests that make no sense."""
        kind, size = request.kind, self._volume.size_bytes
        allowed = ALLOWED_FLAGS.get(kind)
        if allowed is None or request.flags & ~allowed:
            raise OSError(errno.EINVAL, "an unknown request or flag")
        if kind in {nbd.WRITE, nbd.TRIM, nbd.WRITE_ZEROES} and self._volume.read_only:
            raise OSError(errno.EPERM, "the export is read-only")
        if kind == nbd.FLUSH:
            if request.offset or request.length:
                raise OSError(errno.EINVAL, "a flush has no range")
        elif request.offset > size or request.length > size - request.offset:
            beyond = errno.ENOSPC if kind in {nbd.WRITE, nbd.WRITE_ZEROES} else errno.EINVAL
            raise OSError(beyond, "beyond the end")
        if kind == nbd.WRITE_ZEROES and request.flags & nbd.FAST_ZERO and not self._volume.zeroes_fast:
            raise OSError(errno.EOPNOTSUPP, "no faster than writing")
        unagreed = request.flags & nbd.DF and not self._agreed.structured
        if kind == nbd.READ and (request.length > nbd.PAYLOAD_LIMIT or unagreed):
            raise OSError(errno.EINVAL, "too long, or a flag that was not agreed")
        if kind == nbd.BLOCK_STATUS and (not self._agreed.allocation or not request.length):
            raise OSError(errno.EINVAL, "no status was agreed")

    def _read(self, request: Request) -> list[bytes]:
        data = self._volume.read(request.offset, request.length)
        if not self._agreed.structured:
            return [nbd.REPLY.pack(nbd.REPLY_MAGIC, 0, request.cookie), data]
        if not data:
            return [nbd.CHUNK.pack(nbd.CHUNK_MAGIC, nbd.DONE, nbd.CHUNK_NONE, request.cookie, 0)]
        payload = nbd.U64.size + len(data)
        head = nbd.CHUNK.pack(nbd.CHUNK_MAGIC, nbd.DONE, nbd.CHUNK_OFFSET_DATA, request.cookie, payload)
        return [head + nbd.U64.pack(request.offset), data]

    def _status(self, request: Request) -> list[bytes]:
        found = self._volume.extents(request.offset, request.length)
        if request.flags & nbd.REQ_ONE:
            found = found[:1]
        words = b"".join(
            nbd.EXTENT.pack(length, 0 if mapped else nbd.STATE_HOLE | nbd.STATE_ZERO) for length, mapped in found
        )
        payload = nbd.U32.pack(CONTEXT_ID) + words
        head = nbd.CHUNK.pack(nbd.CHUNK_MAGIC, nbd.DONE, nbd.CHUNK_BLOCK_STATUS, request.cookie, len(payload))
        return [head + payload]

    def _change(self, request: Request) -> None:
        volume = self._volume
        match request.kind:
            case nbd.WRITE:
                volume.write(request.offset, request.data or b"")
            case nbd.TRIM:
                volume.discard(request.offset, request.length)
            case nbd.WRITE_ZEROES:
                volume.zero(request.offset, request.length)
        if request.kind == nbd.FLUSH or request.flags & nbd.FUA:
            volume.flush()

    def _failure(self, request: Request, number: int) -> bytes:
        if self._agreed.structured and request.kind in {nbd.READ, nbd.BLOCK_STATUS}:
            head = nbd.CHUNK.pack(nbd.CHUNK_MAGIC, nbd.DONE, nbd.CHUNK_ERROR_TYPE, request.cookie, nbd.CHUNK_ERROR.size)
            return head + nbd.CHUNK_ERROR.pack(number, 0)
        return nbd.REPLY.pack(nbd.REPLY_MAGIC, number, request.cookie)


def _held(request: Request) -> int:
    """What of the budget a request holds."""
    if request.kind == nbd.WRITE or (request.kind == nbd.READ and request.length <= nbd.PAYLOAD_LIMIT):
        return request.length
    return 0


def _send(stream: socket.socket, parts: list[bytes]) -> None:
    """Send all parts. Raises `OSError`."""
    done = stream.sendmsg(parts)
    for part in parts:
        if done < len(part):
            stream.sendall(memoryview(part)[done:])
            done = 0
        else:
            done -= len(part)
