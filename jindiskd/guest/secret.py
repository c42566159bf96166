"""The secret that was injected into a SEV or SEV-ES guest before it ran: a table in memory that the firmware keeps.

Where the kernel has `efi_secret` its entries are files below `COCO`; Debian's kernels are built without, so that the
table is else read from memory, at the address that the measured configuration names: it is the firmware build's.
Only the owner could seal it to this launch; without SEV-SNP the host can still damage it: it is parsed as hostile.

    table   GUID 1e74f542-71dd-4d66-963e-ef4287ff173b (16), length (u32, all of it), entries, padding to 16
    entry   GUID (16), length (u32, with this head), data

GUIDs have their first three fields little-endian. Source: Linux drivers/virt/coco/efi_secret; libvirt notes section 8.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping
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


def disk_key(address: int, size_bytes: int, *, coco: Path = COCO, memory: Path = MEMORY) -> Secret:
    """The disk key, and no copy of it left where it was as far as that can be had.

    Args:
        address: guest physical address of the table, by the measured configuration.
        size_bytes: room of the area there.
        coco: where `efi_secret` shows entries.
        memory: physical memory as a file.

    Raises:
        NoSecret: it is not there.
    """
    file = coco / str(DISK_KEY)
    if file.exists():
        key = _of_file(file)
        file.unlink()  # the module wipes the entry
    else:
        key = _of_memory(address, size_bytes, memory)
    if not 0 < len(key) <= MAX_KEY_BYTES:
        raise NoSecret(f"its key has {len(key)} bytes")
    return Secret(key)


def _of_file(file: Path) -> bytearray:
    try:
        with file.open("rb", buffering=0) as stream:
            return bytearray(stream.read(MAX_KEY_BYTES + 1))
    except OSError as exc:
        raise NoSecret(f"error {exc.errno} while it was read") from exc


def _of_memory(address: int, size_bytes: int, memory: Path) -> bytearray:
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
        key = entries(table).get(DISK_KEY)
    finally:
        table[:] = bytes(len(table))
    if key is None:
        raise NoSecret("the table has no disk key")
    return key
