"""An NBD server for one volume on a unix socket.

A thread for each client and a few for its requests; clients share the volume, so a flush of one makes the writes of all
durable. Stopping is gentle: nothing new is read, what was received is answered, then the volume may be closed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path

from jindiskd.errors import Busy, InvalidArgument
from jindiskd.jindisk import nbd_protocol as nbd
from jindiskd.jindisk.geometry import BLOCK
from jindiskd.jindisk.nbd_connection import THREADS, Connection
from jindiskd.jindisk.nbd_handshake import Agreed, ExportInfo, Gone, Handshake
from jindiskd.jindisk.served import Served

CLIENTS = 16
HANDSHAKE_S = 20.0
STOP_S = 10.0
PATH_BYTES = 107
"""`sun_path` of unix(7), without the NUL."""
Tell = Callable[[str], None]
"""Takes a sentence for the log."""


def listen(path: Path, *, mode: int = 0o600) -> socket.socket:
    """A listening unix socket; a socket that nobody listens on any more is replaced.

    Raises:
        Busy: somebody listens there.
        InvalidArgument: something else lies there, or the path is too long.
        OSError: as of bind(2).
    """
    if len(os.fsencode(path)) > PATH_BYTES:
        raise InvalidArgument("the socket", os.fspath(path), f"its path has at most {PATH_BYTES} bytes")
    _clear(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # The socket must not be there for others even for a moment.
        before = os.umask(0o777 & ~mode)
        try:
            listener.bind(os.fspath(path))
        except OSError as exc:
            raise OSError(exc.errno, exc.strerror, os.fspath(path)) from exc
        finally:
            os.umask(before)
        listener.listen(CLIENTS)
    except BaseException:
        listener.close()
        raise
    return listener


def _clear(path: Path) -> None:
    try:
        found = path.lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(found.st_mode):
        raise InvalidArgument("the socket", os.fspath(path), "something else lies there; choose another path")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(2)
        try:
            probe.connect(os.fspath(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
            return
        except FileNotFoundError:
            return
        except (TimeoutError, BlockingIOError):
            pass
    raise Busy(os.fspath(path), "another server listens there; stop it, or choose another socket")


def flags_of(volume: Served) -> int:
    """The transmission flags of a volume."""
    flags = nbd.HAS_FLAGS | nbd.SEND_FLUSH | nbd.SEND_FUA | nbd.CAN_MULTI_CONN
    if volume.read_only:
        return flags | nbd.READ_ONLY
    flags |= nbd.SEND_TRIM | nbd.SEND_WRITE_ZEROES
    return flags | nbd.SEND_FAST_ZERO if volume.zeroes_fast else flags


class Server:
    """Serves a volume to the clients of a listening socket, from `start` to `stop`."""

    def __init__(
        self,
        listener: socket.socket | None,
        volume: Served,
        *,
        name: str = "",
        clients: int = CLIENTS,
        threads: int = THREADS,
        handshake_s: float = HANDSHAKE_S,
        tell: Tell = lambda _: None,
    ) -> None:
        """Nothing is started yet.

        Args:
            listener: belongs to the server from now on; None where clients come by `adopt` alone.
            volume: stays the caller's, who closes it after `stop`.
            name: of the export, beside the empty one.
            clients: connections at a time; more are turned away at once.
            threads: requests of one client worked on at a time.
            handshake_s: time limit of a handshake.
            tell: is told about clients that broke the protocol.
        """
        self._listener, self._volume, self._clients, self._threads = listener, volume, clients, threads
        self._export = ExportInfo(name=name, size_bytes=volume.size_bytes, flags=flags_of(volume), block_bytes=BLOCK)
        self._handshake_s, self._tell = handshake_s, tell
        self._lock = threading.Lock()
        self._running: dict[threading.Thread, socket.socket] = {}
        self._stopping = False
        self._accepting = threading.Thread(target=self._accept, name="accept", daemon=True)

    @property
    def connected(self) -> int:
        """Clients at the moment."""
        with self._lock:
            return len(self._running)

    def start(self) -> None:
        """Accept clients from now on."""
        self._accepting.start()

    def adopt(self, stream: socket.socket, agreed: Agreed | None = None) -> None:
        """Serve a client that came some other way; the stream belongs to the server from now on.

        `agreed` is what was negotiated with it by other means; None if the handshake is still to come.
        """
        thread = threading.Thread(target=self._serve, args=(stream, agreed), name="client", daemon=True)
        with self._lock:
            if self._stopping or len(self._running) >= self._clients:
                stream.close()
                return
            self._running[thread] = stream
            thread.start()

    def stop(self, *, grace_s: float = STOP_S) -> None:
        """Accept nobody and read no requests any more, answer what was received, and let the clients go.

        Who does not take its answers within `grace_s` is cut off. Afterwards no thread uses the volume.
        """
        with self._lock:
            self._stopping = True
        if self._listener is not None:
            _shut(self._listener, socket.SHUT_RDWR)
            self._accepting.join()
            self._listener.close()
        deadline = time.monotonic() + grace_s
        with self._lock:
            running = dict(self._running)
        for stream in running.values():
            _shut(stream, socket.SHUT_RD)
        for thread in running:
            thread.join(max(0.0, deadline - time.monotonic()))
        for thread, stream in running.items():
            if thread.is_alive():
                _shut(stream, socket.SHUT_RDWR)
                thread.join()

    def _accept(self) -> None:
        while self._listener is not None:
            try:
                stream, _ = self._listener.accept()
            except OSError as exc:
                if self._stopping or exc.errno in {errno.EINVAL, errno.EBADF}:
                    return
                time.sleep(0.1)  # out of descriptors or memory: some may come back
                continue
            self.adopt(stream)

    def _serve(self, stream: socket.socket, agreed: Agreed | None) -> None:
        try:
            with stream:
                agreed = agreed or Handshake(stream, self._export, timeout_s=self._handshake_s).run()
                if agreed is not None:
                    Connection(stream, self._volume, agreed, threads=self._threads).run()
        except Gone as exc:
            if not self._stopping and not exc.left:
                self._tell(str(exc))
        finally:
            with self._lock:
                self._running.pop(threading.current_thread(), None)


def _shut(stream: socket.socket, how: int) -> None:
    with contextlib.suppress(OSError):
        stream.shutdown(how)
