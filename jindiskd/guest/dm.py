"""The device mapper's ioctl interface, as far as opening one mapping needs it, and asking which targets there are.

Source: linux/dm-ioctl.h, interface version 4. Integers are of the machine's byte order, which is little-endian on
every platform we support.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

CONTROL = Path("/dev/mapper/control")
VERSION = (4, 0, 0)
SECTOR_BYTES = 512

HEADER = struct.Struct("<3IIIIiIIIQ128s129s7x")  # struct dm_ioctl
TARGET = struct.Struct("<QQiI16s")  # struct dm_target_spec
VERSIONS = struct.Struct("<IIII")  # struct dm_target_versions: offset of the next one, version; a name follows
NAME_BYTES = 128
UUID_BYTES = 129

# _IOWR(0xfd, n, struct dm_ioctl)
DM_DEV_CREATE = 0xC138FD03
DM_DEV_REMOVE = 0xC138FD04
DM_DEV_SUSPEND = 0xC138FD06
DM_DEV_STATUS = 0xC138FD07
DM_TABLE_LOAD = 0xC138FD09
DM_LIST_VERSIONS = 0xC138FD0D

DM_READONLY_FLAG = 1 << 0
DM_PERSISTENT_DEV_FLAG = 1 << 3
DM_BUFFER_FULL_FLAG = 1 << 8
DM_SECURE_DATA_FLAG = 1 << 15  # the kernel wipes its copy of the buffer
PRIMARY_SOURCE = 0x40 << 16
"""The flag of libdevmapper.h by which udev's rules know a mapping that was activated properly, as an event's number."""

# Above 1024 bytes Python hands the kernel our buffer itself; below, a copy of its own that nobody wipes.
BUFFER_BYTES = 4096
LIST_BYTES = 65_536

Ioctl = Callable[[int, int, bytearray], int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Mapping:
    """A mapping that is active."""

    name: str
    major: int
    minor: int

    @property
    def node(self) -> Path:
        """The node that devtmpfs makes for it."""
        return Path(f"/dev/dm-{self.minor}")


def pack_header(
    name: str, *, uuid: str = "", targets: int = 0, flags: int = 0, event: int = 0, total_bytes: int
) -> bytes:
    """A `struct dm_ioctl`, 312 bytes, for a buffer of `total_bytes` whose payload begins right behind it.

    Raises:
        ValueError: the name or UUID does not fit with its NUL.
    """
    raw_name, raw_uuid = name.encode(), uuid.encode()
    if len(raw_name) >= NAME_BYTES or len(raw_uuid) >= UUID_BYTES:
        raise ValueError("the name or UUID of a mapping is too long")
    return HEADER.pack(*VERSION, total_bytes, HEADER.size, targets, 0, flags, event, 0, 0, raw_name, raw_uuid)


def pack_table(name: str, sectors: int, kind: str, parameters: bytearray, *, flags: int = 0) -> bytearray:
    """The buffer for loading a table of one target over `sectors` sectors of 512 bytes, starting at 0.

    `parameters` may hold a key in hexadecimal. The caller wipes it and the returned buffer.
    """
    need = HEADER.size + TARGET.size + len(parameters) + 1
    buffer = bytearray(max(BUFFER_BYTES, need + -need % 8))
    buffer[: HEADER.size] = pack_header(
        name, targets=1, flags=DM_SECURE_DATA_FLAG | flags, total_bytes=len(buffer)
    )
    # A single target's `next` is not followed, and zero says so.
    buffer[HEADER.size : HEADER.size + TARGET.size] = TARGET.pack(0, sectors, 0, 0, kind.encode())
    start = HEADER.size + TARGET.size
    buffer[start : start + len(parameters)] = parameters
    return buffer


def crypt_parameters(cipher: str, key: bytearray, device: str, *, offset_sectors: int, sector_bytes: int) -> bytearray:
    """The parameters of a `crypt` target, Documentation/admin-guide/device-mapper/dm-crypt.rst.

    Args:
        cipher: for example `aes-xts-plain64`.
        key: the volume key; appears in hexadecimal in the result, which the caller wipes.
        device: `major:minor` of the device below.
        offset_sectors: where the data begins on it, in sectors of 512 bytes. The IV counts from 0 there, as in LUKS.
        sector_bytes: unit of encryption, 512 to 4096.
    """
    digits = b"0123456789abcdef"
    parameters = bytearray(f"{cipher} ".encode())
    # Room is taken at once, because a growing bytearray leaves copies of the key behind.
    at = len(parameters)
    tail = f" 0 {device} {offset_sectors} 1 sector_size:{sector_bytes}".encode()
    parameters += bytes(2 * len(key)) + tail
    for index, value in enumerate(key):
        parameters[at + 2 * index] = digits[value >> 4]
        parameters[at + 2 * index + 1] = digits[value & 15]
    return parameters


def jindisk_parameters(key: bytearray, device: str, *, make: bool = False) -> bytearray:
    """The parameters of a `jindisk` target, for a JinDisk 1 volume (`docs/formats/jindisk1.md`, section 13).

    That format protects nothing against whoever holds the disk.

    Args:
        key: 28 bytes, root key and root IV; appear in hexadecimal in the result, which the caller wipes.
        device: path of the node of the device below; without spaces, which part the parameters.
        make: format the device; it is opened otherwise.

    Raises:
        ValueError: the key has another length, or the path has a space.
    """
    if len(key) != 28 or any(character.isspace() for character in device):
        raise ValueError("a jindisk target takes 28 bytes of key and a path without spaces")
    digits = b"0123456789abcdef"
    parameters = bytearray(2 * len(key) + 1) + f" {device} {int(make)}".encode()
    for index, value in enumerate(key):
        at = 2 * index + (index >= 16)  # a space between key and IV
        parameters[at], parameters[at + 1] = digits[value >> 4], digits[value & 15]
    parameters[32] = ord(" ")
    return parameters


def _ioctl(descriptor: int, request: int, buffer: bytearray) -> int:
    return int(fcntl.ioctl(descriptor, request, buffer, True))


def activate(
    name: str,
    uuid: str,
    *,
    sectors: int,
    kind: str,
    parameters: bytearray,
    read_only: bool = False,
    control: Path = CONTROL,
    ioctl: Ioctl = _ioctl,
) -> Mapping:
    """Create mapping `name` with a table of one target and resume it; `parameters` is wiped.

    Raises:
        OSError: the kernel refused; no mapping is left behind.
    """
    descriptor = os.open(control, os.O_RDWR | os.O_CLOEXEC)
    table = pack_table(name, sectors, kind, parameters, flags=DM_READONLY_FLAG if read_only else 0)
    try:
        ioctl(descriptor, DM_DEV_CREATE, _padded(pack_header(name, uuid=uuid, total_bytes=BUFFER_BYTES)))
        try:
            ioctl(descriptor, DM_TABLE_LOAD, table)
            answer = _padded(pack_header(name, event=PRIMARY_SOURCE, total_bytes=BUFFER_BYTES))
            ioctl(descriptor, DM_DEV_SUSPEND, answer)  # without DM_SUSPEND_FLAG this resumes
        except OSError:
            ioctl(descriptor, DM_DEV_REMOVE, _padded(pack_header(name, total_bytes=BUFFER_BYTES)))
            raise
    finally:
        table[:] = bytes(len(table))
        parameters[:] = bytes(len(parameters))
        os.close(descriptor)
    device = HEADER.unpack_from(answer)[10]
    # The number is in the kernel's huge encoding, linux/kdev_t.h; Python's functions know it.
    return Mapping(name=name, major=os.major(device), minor=os.minor(device))


def remove(name: str, uuid: str, *, control: Path = CONTROL, ioctl: Ioctl = _ioctl) -> None:
    """Take a mapping away, if it still is the one of this UUID.

    Raises:
        OSError: ENXIO if it is not there or another; the kernel refused.
    """
    descriptor = os.open(control, os.O_RDWR | os.O_CLOEXEC)
    try:
        there = _padded(pack_header(name, total_bytes=BUFFER_BYTES))
        ioctl(descriptor, DM_DEV_STATUS, there)
        if HEADER.unpack_from(there)[12].rstrip(b"\0") != uuid.encode():
            raise OSError(errno.ENXIO, "another mapping has the name")
        ioctl(descriptor, DM_DEV_REMOVE, _padded(pack_header(name, total_bytes=BUFFER_BYTES)))
    finally:
        os.close(descriptor)


def wipe(name: str, sectors: int, *, control: Path = CONTROL, ioctl: Ioctl = _ioctl) -> None:
    """Put the target that only gives errors in the place of a mapping's own, which ends orderly before this returns.

    That can be done while the mapping is open. Everything that is read or written afterwards fails.

    Raises:
        OSError: there is no such mapping, or the kernel refused.
    """
    descriptor = os.open(control, os.O_RDWR | os.O_CLOEXEC)
    try:
        ioctl(descriptor, DM_TABLE_LOAD, pack_table(name, sectors, "error", bytearray()))
        # Resuming takes the loaded table for the live one, which is waited for and then destroyed.
        ioctl(descriptor, DM_DEV_SUSPEND, _padded(pack_header(name, total_bytes=BUFFER_BYTES)))
    finally:
        os.close(descriptor)


def targets(*, control: Path = CONTROL, ioctl: Ioctl | None = None) -> dict[str, tuple[int, int, int]]:
    """The kinds of targets that the kernel has now, with their versions. A module that is not loaded does not count.

    Raises:
        OSError: there is no device mapper, or it does not answer.
    """
    descriptor = os.open(control, os.O_RDWR | os.O_CLOEXEC)
    buffer = bytearray(pack_header("", total_bytes=LIST_BYTES).ljust(LIST_BYTES, b"\0"))
    try:
        (ioctl or _ioctl)(descriptor, DM_LIST_VERSIONS, buffer)
    finally:
        os.close(descriptor)
    fields = HEADER.unpack_from(buffer)
    at, end, flags = fields[4], min(fields[3], LIST_BYTES), fields[7]
    if flags & DM_BUFFER_FULL_FLAG:
        raise OSError(errno.EMSGSIZE, "the device mapper's list of targets is longer than any kernel's")
    found: dict[str, tuple[int, int, int]] = {}
    while at + VERSIONS.size < end:
        following, *version = VERSIONS.unpack_from(buffer, at)
        name, _, _ = buffer[at + VERSIONS.size : end].partition(b"\0")
        if name:
            found[name.decode("ascii", errors="replace")] = (version[0], version[1], version[2])
        if not following:
            break
        at += following
    return found


def _padded(header: bytes) -> bytearray:
    return bytearray(header.ljust(BUFFER_BYTES, b"\0"))
