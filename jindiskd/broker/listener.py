"""Where the broker listens: a unix socket for each guest (the host's end of its vsock), AF_VSOCK, or TCP; and where its
administration and metrics do.

Connections are counted before TLS begins, the handshake and the whole connection have a time limit, and each has its
own HTTP server object; so a peer that never speaks, speaks slowly or speaks garbage costs one of its own few places.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import ssl
import struct
from collections import Counter, deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import structlog

from jindiskd.broker.http import Connection, Handler
from jindiskd.broker.identity import TlsIdentity
from jindiskd.broker.metrics import Metrics
from jindiskd.broker.peer import BrokerLimits, Peer
from jindiskd.errors import NotSupported

log = structlog.get_logger(__name__)
HANDSHAKE_S = 10.0
LIFETIME_S = 300.0
BACKLOG = 128
PAUSE_S = 0.2
CLOSE_S = 1.0
Who = Callable[[socket.socket], Peer | None]
_UCRED = struct.Struct("3i")  # struct ucred, linux/socket.h: pid, uid, gid


class Serves(Protocol):
    """What answers requests: the broker, its administration, or its metrics."""

    metrics: Metrics
    limits: BrokerLimits

    def handler(self, peer: Peer) -> Handler:
        """What answers the requests of one peer."""


class Listener:
    """Open sockets that serve guests; close it when its guest is gone.

    Attributes:
        addresses: of the sockets, as the kernel names them.
    """

    def __init__(
        self,
        broker: Serves,
        context: ssl.SSLContext | None,
        sockets: Sequence[socket.socket],
        who: Who,
        path: Path | None = None,
    ) -> None:
        """Begin to accept; use the functions below. `who` says who is at the other end, None for a stranger.

        Without `context` there is no TLS: for sockets of this machine alone.
        """
        self._broker, self._context, self._sockets, self._who, self._path = broker, context, list(sockets), who, path
        self.addresses = [sock.getsockname() for sock in self._sockets]
        self._open: Counter[str] = Counter()
        self._started: dict[str, deque[float]] = {}
        """By guest, of which a listener has one, or those of AF_VSOCK."""
        self._connections: set[asyncio.Task[None]] = set()
        self._accepting = [asyncio.get_running_loop().create_task(self._accept(sock)) for sock in self._sockets]

    async def close(self) -> None:
        """Stop listening and end what is under way."""
        tasks = [*self._accepting, *self._connections]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for sock in self._sockets:
            sock.close()
        if self._path is not None:
            self._path.unlink(missing_ok=True)

    async def _accept(self, sock: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                taken, _ = await loop.sock_accept(sock)
            except OSError as exc:  # too many descriptors, or the peer went away again
                log.warning("a connection could not be accepted", problem=exc.strerror)
                await asyncio.sleep(PAUSE_S)
                continue
            peer = self._admit(taken)
            if peer is None:
                taken.close()
                continue
            self._open[peer.description] += 1
            self._broker.metrics.count("jindisk_broker_connections")
            task = loop.create_task(self._serve(taken, peer))
            self._connections.add(task)
            task.add_done_callback(self._connections.discard)

    def _admit(self, taken: socket.socket) -> Peer | None:
        peer, limits = None, self._broker.limits
        with contextlib.suppress(OSError):  # it went away before it could be asked for its name
            peer = self._who(taken)
        if peer is None or not self._may_start(peer):
            return None
        if self._open[peer.description] < limits.connections_per_peer and self._open.total() < limits.connections:
            return peer
        self._broker.metrics.count("jindisk_broker_connections_refused_total")
        log.debug("a connection was refused: too many", peer=peer.description)
        return None

    def _may_start(self, peer: Peer) -> bool:
        """Whether a guest may begin one more connection: a handshake costs more than asking for it."""
        if peer.domain_uuid is None:
            return True  # an address may be many guests; a firewall knows more of it
        now = asyncio.get_running_loop().time()
        started = self._started.setdefault(peer.description, deque(maxlen=self._broker.limits.starts_per_minute))
        if len(started) == started.maxlen and started[0] > now - 60:
            self._broker.metrics.count("jindisk_broker_connections_refused_total")
            return False
        started.append(now)
        return True

    async def _serve(self, taken: socket.socket, peer: Peer) -> None:
        """One connection, to its end."""
        loop = asyncio.get_running_loop()
        server = Connection(self._broker.handler(peer))
        transport = None
        try:
            async with asyncio.timeout(LIFETIME_S):
                times = {"ssl_handshake_timeout": HANDSHAKE_S, "ssl_shutdown_timeout": CLOSE_S} if self._context else {}
                transport, _ = await loop.connect_accepted_socket(server, taken, ssl=self._context, **times)
                await server.lost.wait()
        except TimeoutError:
            log.debug("a connection was ended: it took too long", peer=peer.description)
        except (OSError, ssl.SSLError) as exc:
            log.debug("a connection failed", peer=peer.description, problem=type(exc).__name__)
        finally:
            self._open[peer.description] -= 1
            if not self._open[peer.description]:
                del self._open[peer.description]
            self._broker.metrics.count("jindisk_broker_connections", -1)
            if transport is None:
                taken.close()
            else:
                await asyncio.shield(server.shutdown(CLOSE_S))
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(2 * CLOSE_S):  # TLS gives up on its peer after CLOSE_S
                        await server.lost.wait()


async def listen_unix(broker: Serves, identity: TlsIdentity, path: Path, peer: Peer, mode: int = 0o600) -> Listener:
    """Serve one peer on a unix socket, with TLS; a socket left there is replaced."""
    return _listen_unix(broker, identity, path, lambda _taken: peer, mode)


async def listen_local(service: Serves, path: Path, who: Callable[[int, int], Peer | None], mode: int) -> Listener:
    """Serve users of this machine on a unix socket, without TLS; a socket left there is replaced.

    Args:
        service: what answers.
        path: of the socket.
        who: the peer for a user id and group id, as the kernel tells them; None for one who may not.
        mode: of the socket.
    """

    def of_user(taken: socket.socket) -> Peer | None:
        _pid, uid, gid = _UCRED.unpack(taken.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
        return who(uid, gid)

    return _listen_unix(service, None, path, of_user, mode)


def _listen_unix(broker: Serves, identity: TlsIdentity | None, path: Path, who: Who, mode: int) -> Listener:
    path.unlink(missing_ok=True)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        os.fchmod(sock.fileno(), mode)  # the name appears with this mode, or a narrower one
        sock.bind(os.fspath(path))
        path.chmod(mode)
        return _listening(broker, identity, [sock], who, path)
    except BaseException:
        sock.close()
        raise


async def listen_tcp(
    broker: Serves, identity: TlsIdentity | None, host: str, port: int, peer: Peer | None = None
) -> Listener:
    """Serve on a TCP port; without `peer`, each address that connects is one. Without `identity` there is no TLS."""
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    sockets: list[socket.socket] = []
    try:
        for family, kind, proto, _, address in found:
            sock = socket.socket(family, kind, proto)
            sockets.append(sock)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.bind(address)

        def who(taken: socket.socket) -> Peer:
            return peer or Peer(description=f"tcp {taken.getpeername()[0]}")

        return _listening(broker, identity, sockets, who)
    except BaseException:
        for sock in sockets:
            sock.close()
        raise


async def listen_vsock(
    broker: Serves, identity: TlsIdentity, port: int, who: Callable[[int], Peer | None]
) -> Listener:
    """Serve guests on AF_VSOCK; `who` tells the peer from the context id that the kernel gives, None for a stranger.

    Raises:
        NotSupported: the kernel has no vsock.
    """
    try:
        sock = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
    except OSError as exc:
        raise NotSupported("AF_VSOCK", "load the module vhost_vsock, or give guests vhost-user vsock") from exc
    try:
        sock.bind((socket.VMADDR_CID_ANY, port))
        return _listening(broker, identity, [sock], lambda taken: who(taken.getpeername()[0]))
    except BaseException:
        sock.close()
        raise


def _listening(
    broker: Serves, identity: TlsIdentity | None, sockets: Sequence[socket.socket], who: Who, path: Path | None = None
) -> Listener:
    context = identity.ssl_context() if identity is not None else None
    for sock in sockets:
        sock.setblocking(False)
        sock.listen(BACKLOG)
    return Listener(broker, context, sockets, who, path)
