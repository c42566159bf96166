"""The secret that was injected into a SEV or SEV-ES guest before it ran: a table in memory that the firmware keeps.

Where the kernel has `efi_secret` its entries are files below `COCO`; Debian's kernels are built without, so that the
table is else read from memory, at the address that the measured configuration names: it is the firmware build's.
Only the owner could seal it to this launch; without SEV-SNP the host can still damage it: it is parsed as hostile.

    table   GUID 1e74f542-71dd-4d66-963e-ef4287ff173b (16), length (u32, all of it), entries, padding to 16
    entry   GUID (16), length (u32, with this head), data

The root's key is the entry `DISK_KEY`; that of a data volume has a UUID of version 5 of the key's resource path, in the
name space of the former. GUIDs have their first three fields little-endian.
Source: Linux drivers/virt/coco/efi_secret; libvirt notes section 8.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

from jindiskd.base.secret import Secret
from jindiskd.errors import EXIT_REFUSED, JindiskError

COCO = Path("/sys/kernel/security/secrets/coco")
MEMORY = Path("/dev/mem")
TABLE = uuid.UUID("1e74f542-71dd-4d66-963e-ef4287ff173b")
DISK_KEY = uuid.UUID("736869e5-84f0-4973-92ec-06879ce3da0b")
HEAD_BYTES = 20
MAX_TABLE_BYTES = 16 << 10
MAX_KEY_BYTES = 64


class NoSecret(JindiskError, code="NoSecret", exit_code=EXIT_REFUSED):
    """There is no secret for this guest where it should be."""

    def __init__(self, problem: str) -> None:
        """`problem` says what is there instead; nothing of it."""
        super().__init__(f"no disk key was injected into this guest: {problem}; start it by its owner's service")


def entries(table: bytes | bytearray | memoryview) -> Mapping[uuid.UUID, bytearray]:
    """The entries of a table; what follows the table is not looked at.

    Raises:
        NoSecret: it is none, or its lengths contradict each other.
    """
    if len(table) < HEAD_BYTES or uuid.UUID(bytes_le=bytes(table[:16])) != TABLE:
        raise NoSecret("the memory named by the image holds no table")
    length = int.from_bytes(table[16:20], "little")
    if not HEAD_BYTES <= length <= min(len(table), MAX_TABLE_BYTES):
        raise NoSecret("the table has an impossible length")
    found: dict[uuid.UUID, bytearray] = {}
    at = HEAD_BYTES
    while at < length:
        size = int.from_bytes(table[at + 16 : at + 20], "little")
        if length - at < HEAD_BYTES or not HEAD_BYTES <= size <= length - at:
            raise NoSecret("an entry of the table has an impossible length")
        name = uuid.UUID(bytes_le=bytes(table[at : at + 16]))
        if name in found:
            raise NoSecret("an entry of the table stands there twice")
        found[name] = bytearray(table[at + HEAD_BYTES : at + size])
        at += size
    return found


def volume_key(resource: str) -> uuid.UUID:
    """Which entry is the key of a data volume, by the key's resource path; the root's is `DISK_KEY`."""
    return uuid.uuid5(DISK_KEY, resource)


def disk_keys(
    wanted: Sequence[uuid.UUID], address: int, size_bytes: int, *, coco: Path = COCO, memory: Path = MEMORY
) -> list[Secret]:
    """The keys of the guest's disks, and no copy of them left where they were as far as that can be had.

    Args:
        wanted: which entries, that of the root first.
        address: guest physical address of the table, by the measured configuration.
        size_bytes: room of the area there.
        coco: where `efi_secret` shows entries.
        memory: physical memory as a file.

    Raises:
        NoSecret: one is not there.
    """
    found: Mapping[uuid.UUID, bytearray]
    if (coco / str(wanted[0])).exists():
        found = {name: _of_file(coco / str(name)) for name in wanted}
    else:
        found = _of_memory(address, size_bytes, memory)
    try:
        for name in wanted:
            length = len(found.get(name, b""))
            if not 0 < length <= MAX_KEY_BYTES:
                raise NoSecret(f"a key has {length} bytes" if name in found else "one of its keys is missing")
        return [Secret(bytes(found[name])) for name in wanted]
    finally:
        for data in found.values():
            data[:] = bytes(len(data))


def _of_file(file: Path) -> bytearray:
    try:
        with file.open("rb", buffering=0) as stream:
            key = bytearray(stream.read(MAX_KEY_BYTES + 1))
        file.unlink()  # the module wipes the entry
        return key
    except OSError as exc:
        raise NoSecret(f"error {exc.errno} while it was read") from exc


def _of_memory(address: int, size_bytes: int, memory: Path) -> Mapping[uuid.UUID, bytearray]:
    if not address or not HEAD_BYTES <= size_bytes <= MAX_TABLE_BYTES:
        raise NoSecret("the image names no memory for it")
    try:
        descriptor = os.open(memory, os.O_RDONLY | os.O_CLOEXEC)
        try:
            table = bytearray(os.pread(descriptor, size_bytes, address))
        finally:
            os.close(descriptor)
    except OSError as exc:
        raise NoSecret(f"error {exc.errno} while memory was read") from exc
    try:
        return entries(table)
    finally:
        table[:] = bytes(len(table))
