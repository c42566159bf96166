"""The base of an image: opening what the caller gave, and finding the root file system in it.

Everything here is read from a descriptor that the caller opened: a path would be opened with our rights instead of his.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from jindiskd.base.process import ToolFailed
from jindiskd.errors import InvalidArgument
from jindiskd.image import ext4, gpt
from jindiskd.image.debugfs import FileSystem
from jindiskd.image.refusals import (
    AlreadyEncrypted,
    BaseChanged,
    BaseTruncated,
    ImageFormatRefused,
    NoPartitionTable,
    NoRootPartition,
    RootDamaged,
    RootNotExt4,
)
from jindiskd.image.sparse import copy_ranges, data_ranges, path_of, unlinked_file
from jindiskd.image.tools import tool

QCOW2_MAGIC = b"QFI\xfb"
_QCOW2 = struct.Struct(">4sIQIIQIIQQIIQQQQII")
_QCOW2_EXTERNAL_DATA = 0x4
MAX_DISK_BYTES = 16 << 40

LUKS_MAGIC = b"LUKS\xba\xbe"
JINDISK_MAGIC = b"JinDisk2"
_OTHERS = ((0, b"XFSB", "XFS"), (0x10040, b"_BHRfS_M", "btrfs"), (0x400, b"\x10\x20\xf5\xf2", "F2FS"))
OS_RELEASE = ("/etc/os-release", "/usr/lib/os-release")


@dataclass(frozen=True, slots=True, kw_only=True)
class Root:
    """A root file system found in a base."""

    fd: int
    offset_bytes: int
    partition_bytes: int
    superblock: ext4.Superblock
    others: tuple[int, ...]
    """Offsets of the other ext4 file systems of the disk; the kernel may be on one of them."""


class Digest:
    """SHA-256 of a file, holes included, computed beside other work in a thread; finds out if the file changed.

    A range that is a hole is hashed as zeros without being read.
    """

    def __init__(self, fd: int) -> None:
        self._fd, self._before = fd, self._look(fd)
        self._digest: bytes | None = None
        self._failure: OSError | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @staticmethod
    def _look(fd: int) -> tuple[int, int, int]:
        found = os.fstat(fd)
        return found.st_size, found.st_mtime_ns, found.st_ctime_ns

    def _run(self) -> None:
        state, at, zeros = hashlib.sha256(), 0, bytes(1 << 20)
        try:
            size = self._before[0]
            for start, length in (*data_ranges(self._fd), (size, 0)):
                for hole in range(at, start, len(zeros)):
                    state.update(memoryview(zeros)[: min(len(zeros), start - hole)])
                    if self._stop.is_set():
                        return
                at, end = start, start + length
                while at < end and not self._stop.is_set():
                    piece = os.pread(self._fd, min(len(zeros), end - at), at)
                    if not piece:
                        break
                    state.update(piece)
                    at += len(piece)
            self._digest = state.digest()
        except OSError as exc:
            self._failure = exc

    def stop(self) -> None:
        """Give up; for when the build failed."""
        self._stop.set()
        self._thread.join()

    def result(self) -> bytes:
        """Wait for the digest.

        Raises:
            BaseChanged: the file was written to since the start.
        """
        self._thread.join()
        if self._look(self._fd) != self._before:
            raise BaseChanged
        if self._failure is not None:
            raise self._failure
        if self._digest is None:
            raise BaseChanged
        return self._digest


def open_disk(base_fd: int, scratch: Path) -> int:
    """A descriptor of the base as a raw disk: the same for raw, an unlinked conversion for qcow2.

    Args:
        base_fd: a regular file opened for reading.
        scratch: a directory on whose file system the conversion may take room.

    Raises:
        InvalidArgument: no regular file.
        ImageFormatRefused: a qcow2 image with a backing file, an external data file, or encryption.
        BaseTruncated: a qcow2 image that qemu-img cannot read to its end.
    """
    if not stat.S_ISREG(os.fstat(base_fd).st_mode):
        raise InvalidArgument("base", "descriptor", "a regular file with a disk image is needed")
    if os.pread(base_fd, 4, 0) != QCOW2_MAGIC:
        return base_fd
    # The copy is what is examined and what is converted: the caller could change his file in between.
    private = unlinked_file(scratch)
    try:
        os.truncate(private, os.fstat(base_fd).st_size)
        copy_ranges(base_fd, private, data_ranges(base_fd))
        size = _check_qcow2(private)
        raw = unlinked_file(scratch)
        try:
            os.truncate(raw, size)
            tool(
                [*("qemu-img", "convert", "-n", "--target-is-zero", "-f", "qcow2", "-O", "raw"),
                 path_of(private), path_of(raw)],
                pass_fds=(private, raw),
            )  # fmt: skip
        except ToolFailed as exc:
            os.close(raw)
            raise ImageFormatRefused(f"that qemu-img cannot read ({exc.stderr.strip()[-200:]})") from exc
        except BaseException:
            os.close(raw)
            raise
    finally:
        os.close(private)
    return raw


def _check_qcow2(fd: int) -> int:
    """Refuse an image that refers to other files or is encrypted; return its virtual size in bytes."""
    head = os.pread(fd, _QCOW2.size, 0)
    if len(head) < _QCOW2.size:
        raise BaseTruncated("the qcow2 header", _QCOW2.size, len(head))
    (_, version, backing, backing_size, _, size, crypt, *_rest) = _QCOW2.unpack(head)
    if version not in {2, 3}:
        raise ImageFormatRefused(f"of the unknown version {version}")
    if backing or backing_size:
        raise ImageFormatRefused("with a backing file")
    if crypt:
        raise ImageFormatRefused("that is encrypted")
    if version == 3 and struct.unpack_from(">Q", head, 72)[0] & _QCOW2_EXTERNAL_DATA:
        raise ImageFormatRefused("with an external data file")
    if not 0 < size <= MAX_DISK_BYTES:
        raise ImageFormatRefused(f"of {size} bytes")
    # qemu-img's own reading must agree; the header extensions are not looked into above.
    try:
        out = tool(["qemu-img", "info", "-U", "--output=json", "-f", "qcow2", path_of(fd)], pass_fds=(fd,))
    except ToolFailed as exc:
        raise ImageFormatRefused(f"that qemu-img cannot open ({exc.stderr.strip()[-200:]})") from exc
    info = json.loads(out)
    if info.get("backing-filename") or info.get("format-specific", {}).get("data", {}).get("data-file"):
        raise ImageFormatRefused("with a backing file or an external data file")
    # What lies behind the end of the file would be converted as zeros, without an error.
    checked = json.loads(
        tool(["qemu-img", "check", "-U", "--output=json", "-f", "qcow2", path_of(fd)], pass_fds=(fd,), ok=(0, 2, 3))
    )
    length = os.fstat(fd).st_size
    if checked["image-end-offset"] >= length + info["cluster-size"]:
        raise BaseTruncated("the qcow2 image", checked["image-end-offset"], length)
    if checked.get("corruptions") or checked.get("check-errors"):
        raise ImageFormatRefused("that is corrupt")
    return int(size)


def find_root(fd: int) -> Root:
    """The root file system of a raw disk: the partition of its type, else the largest ext4 that looks like one.

    Raises:
        BaseRefused: one of the family, saying what is wrong.
    """
    size = os.fstat(fd).st_size
    _refuse_encrypted(fd, 0)
    try:
        entries = gpt.read_table(fd, size)
    except NoPartitionTable:
        if ext4.read_superblock(fd) is not None:
            raise NoPartitionTable("a file system without partitions") from None
        raise
    systems: list[tuple[gpt.Entry, ext4.Superblock]] = []
    damaged: RootDamaged | None = None
    for entry in entries:
        try:
            found = ext4.read_superblock(fd, entry.offset_bytes)
        except RootDamaged as exc:
            damaged = exc
            continue
        if found is not None:
            systems.append((entry, found))
    ranked = sorted(systems, key=lambda item: (item[0].type_uuid != gpt.TYPE_ROOT_X86_64, -item[0].size_bytes))
    for entry, found in ranked:
        if entry.type_uuid == gpt.TYPE_ROOT_X86_64 or _looks_like_root(fd, entry):
            ext4.require_ext4(found, entry.size_bytes)
            others = tuple(other.offset_bytes for other, _ in systems if other is not entry)
            return Root(
                fd=fd,
                offset_bytes=entry.offset_bytes,
                partition_bytes=entry.size_bytes,
                superblock=found,
                others=others,
            )
    for entry in sorted(entries, key=lambda entry: -entry.size_bytes):
        _refuse_encrypted(fd, entry.offset_bytes)
    if damaged is not None:
        raise damaged
    for entry in entries:
        for at, magic, kind in _OTHERS:
            if os.pread(fd, len(magic), entry.offset_bytes + at) == magic:
                raise RootNotExt4(kind)
    raise NoRootPartition


def _refuse_encrypted(fd: int, offset: int) -> None:
    head = os.pread(fd, 16, offset)
    if head.startswith(LUKS_MAGIC):
        raise AlreadyEncrypted("LUKS")
    if head.startswith(JINDISK_MAGIC):
        raise AlreadyEncrypted("JinDisk 2")


def _looks_like_root(fd: int, entry: gpt.Entry) -> bool:
    system = FileSystem(fd, entry.offset_bytes)
    return bool(system.list("/etc").keys() & {"os-release", "fstab"})


def copy_root(root: Root, target: int, progress: Callable[[int, int], None]) -> None:
    """Copy the root file system to the start of `target` and leave it sound: journal replayed, checked.

    Only used blocks are copied where the base's bitmaps can be believed, else all data there is.

    Raises:
        RootDamaged: e2fsck cannot put it right by itself.
    """
    size = root.superblock.size_bytes
    os.truncate(target, size)
    base = FileSystem(root.fd, root.offset_bytes, now=root.superblock.write_time)
    sound = root.superblock.clean and base.check() is None
    if sound:
        ranges = ext4.used_ranges(root.fd, root.superblock, root.offset_bytes)
    else:
        found = data_ranges(root.fd, root.offset_bytes, size)
        ranges = [(start - root.offset_bytes, length) for start, length in found]
    total, done = sum(length for _, length in ranges), 0
    for start, length in ranges:
        copied = copy_ranges(root.fd, target, [(start, min(length, size - start))], source_offset=root.offset_bytes)
        if copied < min(length, size - start):
            raise BaseTruncated("the root file system", size, start + copied)
        done += copied
        progress(done, total)
    if not sound:
        problem = FileSystem(target, now=root.superblock.write_time).check(repair=True)
        if problem is not None:
            raise RootDamaged(problem)


def distribution(system: FileSystem) -> str:
    """PRETTY_NAME of the os-release file, else an empty string; at most 100 printable characters."""
    for path in OS_RELEASE:
        for line in (system.read(path, 65536) or b"").decode(errors="replace").splitlines():
            key, _, value = line.partition("=")
            if key.strip() == "PRETTY_NAME":
                return "".join(c for c in value.strip().strip("\"'") if c.isprintable())[:100]
    return ""
