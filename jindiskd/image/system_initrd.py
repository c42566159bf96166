"""The initrd that a base's own system made, taken as it is: found, looked into, and given the measured configuration.

The kernel unpacks archives one after the other into the same tree, so that ours, with the configuration alone, goes
behind the system's (Documentation/driver-api/early-userspace/buffer-format.rst). Nothing of the system's is unpacked
here: its names are read, to see whether the agent is in it.
"""

from __future__ import annotations

import gzip
import io
import lzma
import os
import re
import subprocess
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from jindiskd.base import document
from jindiskd.base.files import replace_file
from jindiskd.errors import EXIT_USAGE
from jindiskd.guest import config as guest_config
from jindiskd.guest.config import GuestConfig
from jindiskd.image.cpio import ALIGNMENT, NAME_LIMIT, TRAILER, Archive
from jindiskd.image.initramfs_files import MOUNT_VOLUMES, UNLOCK
from jindiskd.image.kernel import Kernel
from jindiskd.image.refusals import BaseRefused

CONFIG_FOLDER = f"/{guest_config.PATH.rpartition('/')[0]}"
"""The package of the hooks makes it."""
MAX_BYTES = 512 << 20
MAX_UNPACKED_BYTES = 4 << 30
MAX_NAMES = 1_000_000
PIECE = 1 << 20
HEADER_BYTES = 110
_HEADER = re.compile(rb"07070[12](?:[0-9A-Fa-f]{8}){13}")
CPIO, ZSTD, GZIP, XZ = b"07070", b"\x28\xb5\x2f\xfd", b"\x1f\x8b", b"\xfd7zXZ"
MEMORY_MIB = 256


class InitramfsRefused(BaseRefused, code="InitramfsRefused", exit_code=EXIT_USAGE):
    """The initramfs that the base's system made cannot be started with."""

    def __init__(self, problem: str) -> None:
        """`problem` says what is wrong and what to do."""
        super().__init__(f"the initramfs of the base's own system: {problem}; or build with our own initrd")


class _Readable(Protocol):
    def read(self, size: int, /) -> bytes | None: ...


def extract(kernel: Kernel, target: Path) -> str:
    """Copy the initramfs that belongs to `kernel` out to the file `target`, and return its path in the base.

    Raises:
        InitramfsRefused: there is none, or it is of no reasonable size.
    """
    folder, _, name = kernel.path.rpartition("/")
    names = [f"initrd.img-{kernel.release}", f"initramfs-{kernel.release}.img", f"initrd-{kernel.release}"]
    if name == "vmlinuz":  # beside its modules
        names = ["initrd", "initramfs.img"]
    there = kernel.system.list(folder or "/")
    for name in names:
        node = there.get(name)
        if node is None or not node.is_regular:
            continue
        path = f"{folder}/{name}"
        if not 0 < node.size_bytes <= MAX_BYTES or not kernel.system.dump(path, target):
            raise InitramfsRefused(f"{path} is of no reasonable size or cannot be read; make it anew in the base")
        return path
    raise InitramfsRefused(f"there is no {names[0]} beside its kernel; run update-initramfs or dracut in it")


def require_agent(file: Path, path: str, *, volumes: bool = False) -> bool:
    """Refuse an initramfs without the agent: nothing would open the root.

    Args:
        file: the initramfs.
        path: what it is called in messages.
        volumes: the agent must know data volumes.

    Returns:
        Whether it does; then it finds the root on any disk, too.

    Raises:
        InitramfsRefused: it has none, or none that knows them, or cannot be read through.
    """
    with file.open("rb", buffering=0) as stream:
        found = {UNLOCK, MOUNT_VOLUMES}.intersection(_names(stream, path))
    if UNLOCK not in found:
        text = "does not have the agent: install the package jindisk-initramfs in the base, which makes it anew"
        raise InitramfsRefused(f"{path} {text}")
    if volumes and MOUNT_VOLUMES not in found:
        text = "has an agent that knows no data volumes: install a newer package jindisk-initramfs in the base"
        raise InitramfsRefused(f"{path} {text}")
    return MOUNT_VOLUMES in found


def append(file: Path, config: GuestConfig, output: Path) -> None:
    """Write `output`: the system's initramfs in `file`, and behind it the measured configuration. Deterministic."""
    archive = Archive()
    archive.file(guest_config.PATH, document.dump(config))
    system = file.read_bytes()
    replace_file(output, system + bytes(-len(system) % ALIGNMENT) + archive.to_bytes())


def _names(stream: io.FileIO, path: str) -> Iterator[str]:
    """All names in the archives of a file, in the order of the kernel; a compressed archive is the last."""
    reader = _Reader(stream, path)
    while head := reader.next_member():
        if head.startswith(CPIO):
            yield from reader.archive(head)
            continue
        stream.seek(-len(head), os.SEEK_CUR)
        with _unpacked(stream, head, path) as inner:
            unpacked = _Reader(inner, path)
            while more := unpacked.next_member():
                if not more.startswith(CPIO):
                    raise unpacked.refusal("holds something that is no cpio archive")
                yield from unpacked.archive(more)
        return


@contextmanager
def _unpacked(stream: io.FileIO, head: bytes, path: str) -> Iterator[_Readable]:
    """What the compressed member at the stream's position unpacks to."""
    if head.startswith(ZSTD):
        # Python before 3.14 has no Zstandard. The program goes with this process, and when enough was read.
        words = ["setpriv", "--pdeathsig", "KILL", "--", "zstd", "-dcq", f"--memory={MEMORY_MIB}MB"]
        with subprocess.Popen(words, stdin=stream, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
            try:
                assert process.stdout is not None
                yield process.stdout
            finally:
                process.kill()
    elif head.startswith(GZIP):
        with gzip.GzipFile(fileobj=stream) as unpacked:
            yield unpacked
    elif head.startswith(XZ):
        with lzma.LZMAFile(stream) as unpacked:
            yield unpacked
    else:
        text = "is compressed in a way that is not read here: set COMPRESS or compress to zstd, gzip or xz in the base"
        raise InitramfsRefused(f"{path} {text}")


class _Reader:
    """A stream that is read once, up to a limit."""

    def __init__(self, stream: _Readable, path: str) -> None:
        self._stream, self._path, self._left, self._at = stream, path, MAX_UNPACKED_BYTES, 0

    def refusal(self, problem: str) -> InitramfsRefused:
        return InitramfsRefused(f"{self._path} {problem}: make it anew in the base")

    def next_member(self) -> bytes:
        """The first six bytes of what comes after zeros; empty at the end."""
        while word := self._read(ALIGNMENT):
            if any(word):
                return word + self._read(len(CPIO) + 1 - ALIGNMENT)
        return b""

    def archive(self, head: bytes) -> Iterator[str]:
        """The names of an archive that begins with `head`, up to its end."""
        for _ in range(MAX_NAMES):
            header = head + self._exactly(HEADER_BYTES - len(head))
            if not _HEADER.fullmatch(header):
                raise self.refusal("has a header that is none")
            file_bytes, name_bytes = int(header[54:62], 16), int(header[94:102], 16)
            if not 1 < name_bytes <= NAME_LIMIT:
                raise self.refusal("has a name of no reasonable length")
            name = self._exactly(name_bytes)[:-1].decode(errors="surrogateescape")
            self._skip(-self._at % ALIGNMENT)
            if name == TRAILER:
                return
            yield name.removeprefix("./")
            self._skip(file_bytes + -file_bytes % ALIGNMENT)
            head = b""
        raise self.refusal(f"has more than {MAX_NAMES} names")

    def _read(self, length: int) -> bytes:
        """Up to `length` bytes; fewer at the end only."""
        if length > self._left:
            raise self.refusal("unpacks to more than any")
        found = bytearray()
        try:
            while len(found) < length and (part := self._stream.read(length - len(found))):
                found += part
        except (OSError, EOFError, zlib.error, lzma.LZMAError):
            raise self.refusal("is damaged") from None
        self._left -= len(found)
        self._at += len(found)
        return bytes(found)

    def _exactly(self, length: int) -> bytes:
        found = self._read(length)
        if len(found) < length:
            raise self.refusal("is cut short")
        return found

    def _skip(self, length: int) -> None:
        while length > 0:
            length -= len(self._exactly(min(length, PIECE)))
