"""The kernel's vsock: all guests come to the same ports of the host, and their context ids tell them apart.

Where the kernel has vhost-vsock, there is no device process for each domain (`domain.vsock`). One listener a port takes
the connections of all, and passes each to the unix socket of the domain that holds the peer's context id, where broker,
progress and simulated firmware listen in either case. The kernel vouches for the id: no guest can take another's, nor
one of a machine that runs. A connection from an id that is nobody's is ended at once. Each guest has so many places
and no more; what it does with them is bounded by those who listen.

Source: vsock(7); Linux drivers/vhost/vsock.c.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import structlog

from jindiskd.domain.vsock import socket_path
from jindiskd.errors import NotSupported
from jindiskd.guest.config import FIRMWARE_PORT, KBS_PORT, PROGRESS_PORT

log = structlog.get_logger(__name__)
PORTS = (KBS_PORT, FIRMWARE_PORT, PROGRESS_PORT)
CONNECTIONS_PER_GUEST = 16
CHUNK_BYTES = 64 << 10
BACKLOG = 128
PAUSE_S = 0.2
REMEDY = "load the module vhost_vsock (and name it in /etc/modules-load.d), or set domains.vsock to vhost-user"
LOADED = Path("sys/class/misc/vhost-vsock")


def why_not(root: Path = Path("/")) -> str:
    """Why guests cannot have vsock from this host's kernel, as the end of a sentence; empty if they can.

    The device itself is libvirt's to open, not ours: that the kernel has registered it is what counts.
    """
    if not (root / LOADED).exists():
        return f"the kernel has no vhost-vsock ({root / LOADED} is not there)"
    try:
        socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM).close()
    except OSError as exc:
        return f"the kernel gives no AF_VSOCK socket ({exc.strerror})"
    return ""


def _cid_of(taken: socket.socket) -> int:
    return int(taken.getpeername()[0])


def listening_sockets(given: Sequence[socket.socket] = ()) -> dict[int, socket.socket]:
    """A listening socket for each port, on every context id of this host: those `given` by the service manager, or new.

    Raises:
        NotSupported: the kernel has no vsock, or another program has a port.
    """
    ports = {sock.getsockname()[1]: sock for sock in given if sock.family == socket.AF_VSOCK}
    if ports.keys() >= set(PORTS):
        return {port: ports[port] for port in PORTS}
    found: dict[int, socket.socket] = {}
    try:
        for port in PORTS:
            found[port] = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
            found[port].bind((socket.VMADDR_CID_ANY, port))
            found[port].listen(BACKLOG)
    except OSError as exc:
        for sock in found.values():
            sock.close()
        taken = f"listening on vsock port {port} ({exc.strerror})" if found else f"AF_VSOCK ({exc.strerror})"
        raise NotSupported(taken, REMEDY) from exc
    return found


class Switch:
    """Takes the guests' connections and passes them to their domains' sockets."""

    def __init__(
        self,
        listen: Callable[[], Mapping[int, socket.socket]] = listening_sockets,
        cid_of: Callable[[socket.socket], int] = _cid_of,
    ) -> None:
        """Listen nowhere before the first guest. `listen` makes the sockets by port, `cid_of` tells who connected."""
        self._listen, self._cid_of = listen, cid_of
        self._homes: dict[int, Path] = {}
        self._open: Counter[Path] = Counter()
        self._sockets: list[socket.socket] = []
        self._accepting: list[asyncio.Task[None]] = []
        self._passing: dict[asyncio.Task[None], Path] = {}

    def start(self) -> None:
        """Listen, if it does not yet.

        Raises:
            NotSupported: it cannot.
        """
        if self._sockets:
            return
        for port, sock in self._listen().items():
            sock.setblocking(False)
            self._sockets.append(sock)
            self._accepting.append(asyncio.get_running_loop().create_task(self._accept(port, sock)))

    def connect(self, cid: int, home: Path) -> None:
        """From now on the context id is that of the domain with this home directory, and of no other.

        Raises:
            NotSupported: guests cannot be listened for.
        """
        self.start()
        before = self._homes.get(cid)
        if before not in {None, home}:
            log.info("a context id has a new holder", cid=cid, domain=home.name, before=before and before.name)
        self._homes[cid] = home

    async def disconnect(self, home: Path) -> None:
        """The domain's machine is off, or not served any more: end what it has open and forget its context id."""
        for cid in [cid for cid, other in self._homes.items() if other == home]:
            del self._homes[cid]
        await self._end([task for task, other in self._passing.items() if other == home])

    async def close(self) -> None:
        """Stop listening and end what is passed on."""
        await self._end([*self._accepting, *self._passing])
        for sock in self._sockets:
            sock.close()
        self._sockets.clear()
        self._accepting.clear()

    @staticmethod
    async def _end(tasks: list[asyncio.Task[None]]) -> None:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _accept(self, port: int, sock: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                taken, _ = await loop.sock_accept(sock)
            except OSError as exc:  # too many descriptors, or the peer went away again
                log.warning("a guest's connection could not be accepted", problem=exc.strerror)
                await asyncio.sleep(PAUSE_S)
                continue
            try:
                self._admit(port, taken)
            except Exception:  # a fault with one guest must not shut out the others
                log.exception("fault while taking a guest's connection")
                taken.close()

    def _admit(self, port: int, taken: socket.socket) -> None:
        """Pass a new connection on, or end it: it is nobody's, or its guest has enough."""
        home = None
        with contextlib.suppress(OSError):  # it went away before it could be asked for its name
            home = self._homes.get(self._cid_of(taken))
        if home is None or self._open[home] >= CONNECTIONS_PER_GUEST:
            taken.close()
            return
        self._open[home] += 1
        task = asyncio.get_running_loop().create_task(self._pass_on(taken, home, port))
        self._passing[task] = home
        task.add_done_callback(self._passed)

    def _passed(self, task: asyncio.Task[None]) -> None:
        """A connection has ended, perhaps before anything was passed on."""
        home = self._passing.pop(task)
        self._open[home] -= 1
        if not self._open[home]:
            del self._open[home]

    async def _pass_on(self, taken: socket.socket, home: Path, port: int) -> None:
        """One connection, to its end."""
        ends: list[asyncio.StreamWriter] = []
        try:
            far, far_end = await asyncio.open_unix_connection(os.fspath(socket_path(home, port)), limit=CHUNK_BYTES)
            ends.append(far_end)
            near, near_end = await asyncio.open_connection(sock=taken, limit=CHUNK_BYTES)
            ends.append(near_end)
            async with asyncio.TaskGroup() as both:
                both.create_task(_copy(near, far_end))
                both.create_task(_copy(far, near_end))
        except OSError as exc:  # nobody listens there (any more)
            log.debug("a guest's connection leads nowhere", domain=home.name, port=port, problem=exc.strerror)
        except ExceptionGroup as group:
            # That one end went away is no fault: the other is ended below.
            if group.split(OSError)[1] is not None:
                raise
        finally:
            for end in ends:
                if end.transport.get_write_buffer_size():
                    end.transport.abort()
                else:
                    end.close()
            if len(ends) < 2:
                taken.close()


async def _copy(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
    """One direction, until its end, which is passed on too."""
    while data := await source.read(CHUNK_BYTES):
        target.write(data)
        await target.drain()
    with contextlib.suppress(OSError):
        target.write_eof()
