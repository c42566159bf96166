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
from jindiskd.errors import Busy, NotFound, NotSupported
from jindiskd.guest import dm
from jindiskd.jindisk.v1.keys import KEY_BYTES, check_root

TARGET = "jindisk"
LINKS = Path("/dev/mapper")
DM_DEV_STATUS = 0xC138FD07
DM_TABLE_STATUS = 0xC138FD0C
DM_LIST_VERSIONS = 0xC138FD0D
DM_STATUS_TABLE_FLAG = 1 << 4
LIST_BYTES = 16384
_VERSION = struct.Struct("<I3I")  # the head of struct dm_target_versions: where the next begins, and the version
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
        with _control(control) as fd:
            buffer = _call(fd, DM_LIST_VERSIONS, "", size=LIST_BYTES)
    except OSError:
        return set()
    found, (at,) = set(), _DATA_START.unpack_from(buffer, _DATA_START_AT)
    while at + _VERSION.size < len(buffer):
        following, *_ = _VERSION.unpack_from(buffer, at)
        found.add(bytes(buffer[at + _VERSION.size :]).partition(b"\0")[0].decode(errors="replace"))
        if not following:
            break
        at += following
    return found


def require_target() -> None:
    """Raise `NotSupported` unless the running kernel has the target."""
    if TARGET not in kernel_targets():
        raise NotSupported(
            "opening a JinDisk 1 volume by the kernel's own means",
            "load its module dm-jindisk, or open the volume with --via nbd, which needs no such module",
        )


def parameters(key: Secret, device: Path, *, create: bool) -> bytearray:
    """What stands behind the target's name in the table; holds the key, so the caller wipes it."""
    tail = f" {device} {int(create)}".encode()
    hexadecimal = bytearray(2 * len(check_root(key)) + 1)
    digits = b"0123456789abcdef"
    at = 0
    for number, value in enumerate(key.reveal()):
        if number == KEY_BYTES:
            hexadecimal[at : at + 1] = b" "
            at += 1
        hexadecimal[at], hexadecimal[at + 1] = digits[value >> 4], digits[value & 15]
        at += 2
    found = bytearray(len(hexadecimal) + len(tail))
    found[: len(hexadecimal)] = hexadecimal
    found[len(hexadecimal) :] = tail
    hexadecimal[:] = bytes(len(hexadecimal))
    return found


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
