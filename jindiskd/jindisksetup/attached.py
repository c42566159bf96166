"""Volumes attached as block devices of the kernel: who serves them, and how they are let go.

    /run/jindisksetup/NAME.json     who serves it and as which device; of root alone
    /dev/jindisk/NAME               a link to the device

The record is made before the device and goes after it. What a killed server left behind is found by its record.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import select
import socket
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from jindiskd.base import document
from jindiskd.base.files import rename_new, replace_file
from jindiskd.errors import AlreadyExists, Busy, InvalidArgument, JindiskError, NotFound, NotSupported, TimedOut
from jindiskd.jindisk import nbd_kernel
from jindiskd.jindisk.geometry import BLOCK
from jindiskd.jindisk.nbd_handshake import Agreed
from jindiskd.jindisk.nbd_server import Server, flags_of
from jindiskd.jindisk.served import Served

RUN = Path("/run/jindisksetup")
LINKS = Path("/dev/jindisk")
NAMES = re.compile(r"[A-Za-z0-9_+:@][A-Za-z0-9_+:@.-]{0,63}")
CLOSE_S = 120.0


class VolumeNotClosed(JindiskError, code="VolumeNotClosed"):
    """The device is gone, but the volume was not closed well."""

    def __init__(self, name: str, why: str) -> None:
        """`why` in words."""
        super().__init__(f"{name} was not closed well: {why}; what was flushed before is there, check the volume")


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """An attached volume."""

    name: str
    process: int
    started: int
    """Clock ticks between boot and the start of the process: its number may be another's later."""
    index: int
    """Of `/dev/nbd<index>`; -1 before it is known."""
    fault: str
    """How closing failed; empty while it has not."""

    @property
    def node(self) -> Path:
        """The device."""
        return Path(f"/dev/nbd{self.index}")

    @property
    def link(self) -> Path:
        """The device by the volume's name."""
        return LINKS / self.name


def check_name(name: str) -> str:
    """The name itself. Raises `InvalidArgument` unless it is one."""
    if not NAMES.fullmatch(name):
        raise InvalidArgument("the name", name, "it has 1 to 64 letters, digits and _+:@.-, the first no dot and no -")
    return name


def started(process: int) -> int | None:
    """When a process began; None if there is none."""
    try:
        text = Path(f"/proc/{process}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    return int(text.rpartition(")")[2].split()[19])  # starttime, field 22 of proc(5)


def own_record(name: str) -> Record:
    """A record of this process, which has no device yet."""
    process = os.getpid()
    return Record(name=name, process=process, started=started(process) or 0, index=-1, fault="")


class Registry:
    """The records of attached volumes."""

    def __init__(self, directory: Path = RUN) -> None:
        """`directory` is made when it is needed."""
        self._directory = directory

    def _path(self, name: str) -> Path:
        return self._directory / f"{check_name(name)}.json"

    def find(self, name: str) -> Record:
        """The record of a name.

        Raises:
            NotFound: no such volume is attached.
            MalformedDocument: the record is damaged.
        """
        try:
            data = self._path(name).read_bytes()
        except FileNotFoundError as exc:
            raise NotFound("attached volume", name) from exc
        return document.load(Record, data, document=f"the record of {name}")

    def all(self) -> list[Record]:
        """Every record, by name."""
        found = []
        for name in sorted(path.stem for path in self._directory.glob("*.json") if NAMES.fullmatch(path.stem)):
            with contextlib.suppress(NotFound):  # closed meanwhile
                found.append(self.find(name))
        return found

    def put(self, record: Record) -> None:
        """Write a record."""
        replace_file(self._path(record.name), document.dump(record), 0o600)

    def remove(self, name: str) -> None:
        """Forget a record."""
        self._path(name).unlink(missing_ok=True)

    def take(self, name: str) -> None:
        """Take a name that is free, in this process's name until `put`; forget what a killed server left of it.

        Raises:
            AlreadyExists: it is in use.
        """
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        with contextlib.suppress(NotFound):
            found = self.find(name)
            if started(found.process) == found.started:
                raise AlreadyExists("an attached volume", name)
            release(found)
            self.remove(name)
        path = self._path(name)
        staged = path.with_name(f".{path.name}.{os.getpid()}")
        replace_file(staged, document.dump(own_record(name)), 0o600)
        try:
            rename_new(staged, path)
        except FileExistsError as exc:
            staged.unlink(missing_ok=True)
            raise AlreadyExists("an attached volume", name) from exc


def release(record: Record) -> None:
    """Have the kernel let go of a device whose server is gone, and take the link away.

    The device may be another server's by now: the kernel tells whose it is.
    """
    try:
        owner = int(Path(f"/sys/block/{record.node.name}/pid").read_text(encoding="ascii"))
    except (OSError, ValueError):
        owner = -1
    if owner == record.process:
        with contextlib.suppress(OSError):
            nbd_kernel.detach(record.index)
    _unlink(record)


def _unlink(record: Record) -> None:
    if record.link.is_symlink() and record.link.readlink() == record.node:
        record.link.unlink(missing_ok=True)


@contextlib.contextmanager
def attach(volume: Served, name: str, registry: Registry) -> Iterator[Server]:
    """Attach a volume as a device of the kernel while the block runs; its server, whose one client is the kernel.

    Raises:
        NotSupported: the kernel has no nbd.
        OSError: it refuses.
    """
    record = own_record(name)
    registry.put(record)
    server = Server(None, volume)
    try:
        ours, kernels = socket.socketpair()
        with kernels:
            try:
                index = nbd_kernel.attach([kernels.fileno()], volume.size_bytes, BLOCK, flags_of(volume))
            except OSError as exc:
                ours.close()
                if exc.errno == errno.ENOENT:
                    raise NotSupported("a network block device", "load the kernel's nbd module: modprobe nbd") from exc
                raise
        record = replace(record, index=index)
        registry.put(record)
        server.adopt(ours, Agreed(structured=False, allocation=False))
        LINKS.mkdir(mode=0o755, parents=True, exist_ok=True)
        record.link.unlink(missing_ok=True)
        record.link.symlink_to(record.node)
        yield server
    finally:
        if server.connected and record.index >= 0:  # else the kernel has let go, and the device may be another's
            with contextlib.suppress(OSError):
                nbd_kernel.detach(record.index)
        _unlink(record)
        try:
            server.stop()
            volume.close()
        except JindiskError as exc:
            registry.put(replace(record, fault=str(exc)))
            raise
        registry.remove(name)


def close(name: str, registry: Registry) -> bool:
    """Let go of an attached volume and wait until it is closed; False if its server had been killed before.

    Raises:
        NotFound: no such volume is attached.
        Busy: the device is in use, or not there yet; nothing was changed.
        VolumeNotClosed: the device is gone, but its volume's closing failed.
        TimedOut: closing takes too long; it goes on.
        OSError: writing back failed.
    """
    record = registry.find(name)
    if started(record.process) != record.started:
        fault = record.fault
        release(record)
        registry.remove(name)
        if fault:
            raise VolumeNotClosed(name, fault)
        return False
    if record.index < 0:
        raise Busy(os.fspath(record.link), "it is just being opened")
    watched = os.pidfd_open(record.process)
    try:
        _write_back(record)
        nbd_kernel.detach(record.index)
        if not select.select([watched], [], [], CLOSE_S)[0]:
            raise TimedOut(f"closing {name}", CLOSE_S)
    finally:
        os.close(watched)
    with contextlib.suppress(NotFound):
        left = registry.find(name)
        registry.remove(name)
        raise VolumeNotClosed(name, left.fault or "its server ended early")
    return True


def _write_back(record: Record) -> None:
    """Make what was written to the device durable, if nobody uses it."""
    try:
        fd = os.open(record.node, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC)
    except OSError as exc:
        if exc.errno == errno.EBUSY:
            raise Busy(os.fspath(record.link), "it is mounted, or another device lies on it") from exc
        raise
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
