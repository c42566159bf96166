"""The helper's process: one connection, one request, one answer.

The socket unit hands over the accepted connection. Who is at its other end the kernel tells: the service's user or
root, nobody else. The request is one packet with one descriptor at most; more, less or longer is refused, and closed.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import pwd
import socket
import stat
import struct
import syslog

from jindiskd.base import document
from jindiskd.base.secret import Secret
from jindiskd.errors import InvalidArgument, JindiskError, NotAuthorized
from jindiskd.helper import protocol, verbs
from jindiskd.helper.protocol import (
    ANSWER_BYTES,
    KEY_BYTES,
    MESSAGE_BYTES,
    Answer,
    Close,
    MalformedRequest,
    Open,
    Request,
)
from jindiskd.helper.verbs import Settings
from jindiskd.helper.worker import User

PEER = struct.Struct("3i")  # struct ucred: pid, uid, gid
REQUEST_S = 10.0
MOST_FDS = 8


def user_of(name: str) -> User:
    """The service's user.

    Raises:
        InvalidArgument: there is none of this name.
    """
    try:
        found = pwd.getpwnam(name)
    except KeyError as exc:
        raise InvalidArgument("the service's user", name, "create it: systemd-sysusers jindiskd.conf") from exc
    return User(uid=found.pw_uid, gid=found.pw_gid)


def peer_uid(stream: socket.socket) -> int:
    """Who is at the other end of a unix socket, as the kernel knows."""
    _, uid, _ = PEER.unpack(stream.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, PEER.size))
    return int(uid)


def receive(stream: socket.socket, may_ask: frozenset[int]) -> tuple[Request, int | None]:
    """The request, and the descriptor that came with it, which the caller closes.

    Raises:
        NotAuthorized: another user than those asks; as with all errors, every descriptor is closed.
        MalformedRequest: it is none.
        OSError: none came in time.
    """
    stream.settimeout(REQUEST_S)
    # Taken first, whoever asks: closing a socket with a packet unread would take the answer away from its other end.
    data, fds, flags, _ = socket.recv_fds(stream, MESSAGE_BYTES, MOST_FDS)
    try:
        if peer_uid(stream) not in may_ask:
            raise NotAuthorized("the helper's verbs")
        if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
            raise MalformedRequest("it is too long, or has too many descriptors")
        request = protocol.parse(data)
        if len(fds) != isinstance(request, Open):
            raise MalformedRequest("it has another number of descriptors")
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise
    return request, fds[0] if fds else None


def read_key(fd: int) -> Secret:
    """The key from a memory file; nothing else is read, for it could block or change meanwhile.

    Raises:
        MalformedRequest: it is no memory file that is sealed, or of a length that no key has.
    """
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError as exc:
        raise MalformedRequest("the key is not in a memory file") from exc
    found = os.fstat(fd)
    wanted = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
    if not stat.S_ISREG(found.st_mode) or seals & wanted != wanted or not 0 < found.st_size <= KEY_BYTES:
        raise MalformedRequest("the key is not in a sealed memory file of its length")
    buffer = bytearray(found.st_size)
    if os.preadv(fd, [buffer], 0) != len(buffer):
        raise MalformedRequest("the key's memory file is shorter than it was")
    return Secret(buffer)


def handle(stream: socket.socket, settings: Settings) -> None:
    """Serve one connection to its end."""

    def reply(answer: Answer) -> None:
        stream.send(document.dump(answer)[:ANSWER_BYTES])
        stream.close()

    try:
        request, fd = receive(stream, frozenset((0, settings.service_uid)))
        if isinstance(request, Open):
            assert fd is not None  # receive has counted
            try:
                key = read_key(fd)
            finally:
                os.close(fd)
            with key:
                verbs.open_(request, key, reply, settings)
        elif isinstance(request, Close):
            verbs.close(request, settings)
            reply(Answer())
        else:
            reply(verbs.list_(settings))
    except Exception as exc:  # noqa: BLE001 - the asker is told, or the log where it has been answered
        error = verbs.as_error(exc)
        syslog.syslog(syslog.LOG_WARNING, f"{type(exc).__name__}: {error}"[:1000])
        with contextlib.suppress(OSError):
            reply(protocol.failed(error))


def listen(path: str, settings: Settings) -> None:
    """Accept connections, a process each: where no service manager does that."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(path)
        os.chmod(path, 0o666)  # noqa: PTH101, S103 - the kernel tells who comes, and `handle` looks
        listener.listen(socket.SOMAXCONN)
        while True:
            stream, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                status = 1
                try:
                    os.setsid()
                    handle(stream, settings)
                    status = 0
                finally:
                    os._exit(status)
            stream.close()
            with contextlib.suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass


def failure(exc: JindiskError) -> int:
    """Tell the log why the helper does not even start; the exit status."""
    syslog.syslog(syslog.LOG_ERR, str(exc))
    return exc.exit_code
