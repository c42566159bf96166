"""JinDisk 1 volumes in the kernel's own hands: its device-mapper target `jindisk`, where the running kernel has it.

Table: `0 SECTORS jindisk KEY IV DEVICE FLAG`; key and IV in hexadecimal, flag 1 formats, 0 opens
(docs/formats/jindisk1.md, the kernel's interface). The ioctl interface is linux/dm-ioctl.h, version 4.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct
from collections.abc import Iterator
from pathlib import Path

from jindiskd.base.secret import Secret
from jindiskd.errors import Busy, InvalidArgument, NotFound, NotSupported
from jindiskd.guest import dm
from jindiskd.jindisk.v1.keys import check_root

TARGET = "jindisk"
LINKS = Path("/dev/mapper")
DM_DEV_STATUS = 0xC138FD07
DM_TABLE_STATUS = 0xC138FD0C
DM_STATUS_TABLE_FLAG = 1 << 4
_DATA_START = struct.Struct("<I")
_DATA_START_AT = 16  # of struct dm_ioctl


@contextlib.contextmanager
def _control(control: Path) -> Iterator[int]:
    fd = os.open(control, os.O_RDWR | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def _call(fd: int, request: int, name: str, *, size: int = dm.BUFFER_BYTES, flags: int = 0) -> bytearray:
    buffer = bytearray(dm.pack_header(name, total_bytes=size, flags=flags).ljust(size, b"\0"))
    fcntl.ioctl(fd, request, buffer, True)
    return buffer


def kernel_targets(control: Path = dm.CONTROL) -> set[str]:
    """The names of the device-mapper targets that the kernel has loaded; empty if it has no device mapper."""
    try:
        return set(dm.targets(control=control))
    except OSError:
        return set()


def require_target() -> None:
    """Raise `NotSupported` unless the running kernel has the target."""
    if TARGET not in kernel_targets():
        raise NotSupported(
            "opening a JinDisk 1 volume by the kernel's own means",
            "load its module dm-jindisk, or open the volume with --via nbd, which needs no such module",
        )


def parameters(key: Secret, device: Path, *, create: bool) -> bytearray:
    """What stands behind the target's name in the table; holds the key, so the caller wipes it.

    Raises:
        InvalidArgument: the key's length, or spaces in the path, which part the words of a table.
    """
    material = check_root(key).reveal()
    try:
        return dm.jindisk_parameters(material, os.fspath(device), make=create)
    except ValueError as exc:
        raise InvalidArgument("device", os.fspath(device), "a path with spaces cannot stand in a table") from exc


def activate(name: str, *, sectors: int, table: bytearray, kind: str = TARGET) -> Path:
    """Make the mapping NAME and return its link; `table`, the target's parameters, is wiped.

    Raises:
        Busy: there is one of this name, or the device below is in use.
        OSError: the kernel refused; its log says why. No mapping is left.
    """
    try:
        mapping = dm.activate(name, "", sectors=sectors, kind=kind, parameters=table)
    except OSError as exc:
        if exc.errno == errno.EBUSY:
            raise Busy(name, "a mapping of this name exists, or the device below it is in use") from exc
        raise
    link = LINKS / name
    with contextlib.suppress(FileExistsError):  # udev was quicker
        link.symlink_to(mapping.node)
    return link


def remove(name: str, *, kind: str = TARGET) -> None:
    """Take a mapping of the target away, which closes its volume.

    Raises:
        NotFound: there is none of this name and target.
        Busy: it is in use.
        OSError: the kernel refused.
    """
    try:
        with _control(dm.CONTROL) as fd:
            table = _call(fd, DM_TABLE_STATUS, name, flags=DM_STATUS_TABLE_FLAG)
            (at,) = _DATA_START.unpack_from(table, _DATA_START_AT)
            fields = dm.TARGET.unpack_from(table, at)
            if fields[-1].rstrip(b"\0").decode(errors="replace") != kind:
                raise NotFound("attached volume", name)
            _call(fd, dm.DM_DEV_REMOVE, name)
    except FileNotFoundError as exc:
        raise NotFound("attached volume", name) from exc
    except OSError as exc:
        if exc.errno in {errno.ENXIO, errno.ENODEV}:  # no such mapping, or no device mapper at all
            raise NotFound("attached volume", name) from exc
        if exc.errno == errno.EBUSY:
            raise Busy(os.fspath(LINKS / name), "it is mounted, or another device lies on it") from exc
        raise
    link = LINKS / name
    if link.is_symlink() and not link.exists():
        link.unlink(missing_ok=True)
