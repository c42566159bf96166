"""What is done without any rights: reading a hostile disk, and serving an open volume.

A child of the helper's process for one volume. It inherits the open device and the key, becomes the service's user, who
has no rights on devices, and speaks with its parent over a socket of packets: what it needs attached or mapped.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import stat
import sys
import syslog
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn
from uuid import UUID

from jindiskd.base import document
from jindiskd.base.anchor import Anchor
from jindiskd.base.secret import Secret
from jindiskd.errors import JindiskError
from jindiskd.helper.protocol import Answer, Kind, MalformedRequest, Open, broken, failed
from jindiskd.helper.states import ServiceKeeper
from jindiskd.jindisk.anchor import UNANCHORED, Reporting
from jindiskd.jindisk.device import FileDevice
from jindiskd.jindisk.errors import VolumeStale
from jindiskd.jindisk.nbd_handshake import Agreed
from jindiskd.jindisk.nbd_server import Server, flags_of
from jindiskd.jindisk.served import Served, ServedSession, ServedVolume
from jindiskd.jindisk.session import Session
from jindiskd.jindisk.v1.served import ServedVersion1
from jindiskd.jindisk.v1.session import open_session
from jindiskd.jindisk.v1.volume import open_volume as open_version1
from jindiskd.jindisk.volume import open_volume
from jindiskd.jindisksetup import server_process
from jindiskd.luks2 import check, layout
from jindiskd.luks2.layout import Luks2HeaderRefused

LOOK_S = 0.2
REPORT_INTERVAL_S = 60.0
PACKET_BYTES = 4096
GO = b"go"


@dataclass(frozen=True, slots=True, kw_only=True)
class User:
    """Who a worker becomes."""

    uid: int
    gid: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """What a worker tells its parent when the volume is open; an error in place of the rest."""

    size_bytes: int = 0
    flags: int = 0
    """Transmission flags of the network block device."""
    data_offset_bytes: int = 0
    """LUKS2; the 64 bytes of the volume key follow in a packet of their own."""
    failed: Answer | None = None


def close_sockets(keep: int) -> None:
    """Close what was inherited: while a worker had the asker's connection too, nobody would notice the helper's end."""
    syslog.closelog()  # the C library's own; it must not be closed behind its back
    for path in list(Path("/proc/self/fd").iterdir()):
        with contextlib.suppress(OSError):  # the listing's own descriptor
            if int(path.name) != keep and stat.S_ISSOCK(os.fstat(int(path.name)).st_mode):
                os.close(int(path.name))


def drop_rights(user: User) -> None:
    """Become the user, for good; the kernel takes every capability away with it."""
    os.setgroups([])
    os.setresgid(user.gid, user.gid, user.gid)
    os.setresuid(user.uid, user.uid, user.uid)


def start(body: Callable[[socket.socket], None], user: User | None) -> tuple[int, socket.socket]:
    """Fork a worker that runs `body` without rights; returns its process and the socket to it.

    `user` is None where the helper itself runs as nobody special, in tests.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    process = os.fork()
    if process == 0:
        ours.close()
        _run(body, theirs, user)
    theirs.close()
    return process, ours


def _run(body: Callable[[socket.socket], None], parent: socket.socket, user: User | None) -> NoReturn:
    """The life of a worker; it ends here in every case."""
    status = 1
    try:
        close_sockets(keep=parent.fileno())
        server_process.harden(io_flusher=user is not None)
        if user is not None:
            drop_rights(user)
            server_process.harden(io_flusher=False)  # the kernel made it dumpable anew
        os.chdir("/")
        body(parent)
        status = 0
    except JindiskError as exc:
        _complain(parent, failed(exc))
    except OSError as exc:
        _complain(parent, broken(f"the device or the kernel refuses: {exc.strerror or exc}"))
    except BaseException as exc:  # noqa: BLE001 - the class alone: its text may hold anything
        _complain(parent, broken(f"a fault of the program: {type(exc).__name__}"))
    finally:
        sys.stderr.flush()
        os._exit(status)


def _complain(parent: socket.socket, answer: Answer) -> None:
    with contextlib.suppress(OSError):
        parent.send(document.dump(Said(failed=answer)))


def serve(request: Open, device_fd: int, key: Secret, name: str, states: Path, parent: socket.socket) -> None:
    """Open a volume of JinDisk and serve it to the kernel until it lets go, then close it.

    Says `Said` with the kernel's end of the connection, and begins when the parent answers `GO`.

    Raises:
        JindiskError, OSError: it was not opened, or not closed well.
    """
    volume = _open(request, FileDevice(device_fd, name=name), key, states)
    server = Server(None, volume)
    try:
        ours, kernels = socket.socketpair()
        with kernels:
            said = Said(size_bytes=volume.size_bytes, flags=flags_of(volume))
            socket.send_fds(parent, [document.dump(said)], [kernels.fileno()])
        server.adopt(ours, Agreed(structured=False, allocation=False))
        if parent.recv(16) != GO:
            return  # the kernel did not take it; the volume is closed again
        told: list[str] = []

        def goes_on() -> bool:
            if volume.fault is not None and not told:
                told.append(volume.fault)
                _complain(parent, broken(volume.fault))
            return server.connected > 0

        server_process.wait(volume, server_process.to_syslog, goes_on=goes_on, look_s=LOOK_S)
    finally:
        server_process.end(server, volume)


def _open(request: Open, device: FileDevice, key: Secret, states: Path) -> Served:
    if request.kind is Kind.JINDISK1:
        if request.read_only:
            return ServedVersion1(open_version1(device, key=key))
        return ServedVersion1(open_session(device, key=key))
    keeper = ServiceKeeper(request.uuid, request.session, states) if request.session else None
    anchor = Anchor.unpack(request.anchor) if request.anchor else UNANCHORED
    try:
        volume = open_volume(device, key=key, uuid=UUID(request.uuid), anchor=anchor, name=device.name)
    except VolumeStale as exc:
        if exc.newest is not None and keeper is not None:
            with contextlib.suppress(Exception):  # nothing was opened, whoever hears of it
                keeper.stale(exc.newest)
        raise
    if request.read_only:
        return ServedVolume(volume)
    session = Session(
        volume,
        session_id=request.session or secrets.token_bytes(32),
        keeper=keeper,
        reporting=Reporting.INTERVAL,
        interval_s=REPORT_INTERVAL_S,
        lease_s=float(request.lease_s),
    )
    session.begin()
    return ServedSession(session)


def measure(request: Open, device_fd: int, key: Secret, parent: socket.socket) -> None:
    """Say how large a volume of JinDisk 1 is, if the key opens it. Raises as `serve`."""
    volume = open_version1(FileDevice(device_fd, name=f"device {request.below}"), key=key)
    parent.send(document.dump(Said(size_bytes=volume.size_bytes)))


def unlock(request: Open, device_fd: int, key: Secret, parent: socket.socket) -> None:
    """Check a LUKS2 header from a copy in memory, and say where the data lie and by which key.

    Raises:
        JindiskError, OSError: it is refused, or the key does not open it.
    """
    copy = FileDevice(device_fd, name="the device").pread(0, layout.DATA_OFFSET_BYTES)
    if request.header_sha256:
        checked = check.parse_and_check(copy, _Expected(uuid=request.uuid, header_sha256=request.header_sha256))
    else:
        checked = check.parse(copy)
        if checked.uuid != request.uuid:
            raise Luks2HeaderRefused("uuid", f"is {checked.uuid} instead of {request.uuid}")
    with check.unlock(copy, key) as volume_key:
        said = Said(size_bytes=checked.data_bytes, data_offset_bytes=checked.data_offset_bytes)
        parent.send(document.dump(said))
        parent.send(volume_key.reveal())


@dataclass(frozen=True, slots=True, kw_only=True)
class _Expected:
    """What our own images' headers are like."""

    uuid: str
    header_sha256: bytes
    header_bytes: int = layout.DATA_OFFSET_BYTES
    cipher: str = layout.CIPHER
    key_bytes: int = layout.KEY_BYTES
    sector_bytes: int = layout.SECTOR_BYTES


def hear(worker: socket.socket) -> tuple[Said, list[int]]:
    """What a worker says, strictly parsed: it may have been taken over by a hostile disk. Its descriptors too.

    Raises:
        MalformedRequest: it says nonsense, or ended.
    """
    data, fds, flags, _ = socket.recv_fds(worker, PACKET_BYTES, 2)
    try:
        if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC) or not data or len(fds) > 1:
            raise MalformedRequest("its worker ended, or sent too much")
        said = document.load(Said, data, document="the worker's packet", limit_bytes=PACKET_BYTES)
        if not (0 <= said.size_bytes < 1 << 63 and 0 <= said.flags < 1 << 16 and 0 <= said.data_offset_bytes < 1 << 40):
            raise MalformedRequest("its worker sent numbers out of range")
        return said, fds
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise
