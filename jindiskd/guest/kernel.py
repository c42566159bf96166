"""System calls that Python's `os` module lacks, and the constants for them. x86-64 and arm64 Linux.

Each function raises `OSError` with the kernel's error number, like its relatives in `os`.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

# sys/mount.h
MS_RDONLY = 1
MS_NOSUID = 2
MS_NODEV = 4
MS_NOEXEC = 8
MS_REMOUNT = 32
MS_NOATIME = 1024
MS_BIND = 4096
MS_MOVE = 8192
MS_REC = 16384
MS_PRIVATE = 1 << 18
CLONE_NEWNS = 0x00020000  # linux/sched.h
MNT_DETACH = 2

# linux/reboot.h; the C library's reboot() supplies the magic numbers.
REBOOT_POWER_OFF = 0x4321FEDC
REBOOT_RESTART = 0x01234567
REBOOT_HALT = 0xCDEF0123
REBOOT_KEXEC = 0x45584543

# linux/prctl.h
PR_SET_DUMPABLE = 4
PR_SET_NAME = 15
PR_SET_IO_FLUSHER = 57

# sys/mman.h
MCL_CURRENT = 1
MCL_FUTURE = 2

# linux/magic.h
RAMFS_MAGIC = 0x858458F6
TMPFS_MAGIC = 0x01021994

FINIT_MODULE = {"x86_64": 313, "aarch64": 273}  # asm/unistd.h

_libc = ctypes.CDLL(None, use_errno=True)


def _call(name: str, *arguments: object) -> int:
    ctypes.set_errno(0)
    result = int(getattr(_libc, name)(*arguments))
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
    return result


def mount(source: str, target: Path, kind: str, flags: int = 0, options: str = "") -> None:
    """mount(2): `kind` is the file system's type, `options` what it alone understands."""
    _call(
        "mount",
        os.fsencode(source),
        os.fsencode(target),
        os.fsencode(kind) if kind else None,
        ctypes.c_ulong(flags),
        os.fsencode(options) if options else None,
    )


def unmount(target: Path, flags: int = 0) -> None:
    """umount2(2)."""
    _call("umount2", os.fsencode(target), flags)


def unshare(flags: int) -> None:
    """unshare(2), which Python's `os` has from 3.12."""
    _call("unshare", flags)


def load_module(descriptor: int, parameters: str = "") -> None:
    """finit_module(2): load the module in an open file; `parameters` as `name=value` separated by spaces."""
    _call("syscall", FINIT_MODULE[os.uname().machine], descriptor, parameters.encode(), 0)


def reboot(command: int) -> None:
    """reboot(2): returns only if the kernel cannot do it. Nothing is synced."""
    _call("reboot", ctypes.c_int(ctypes.c_uint32(command).value - (1 << 32) if command >> 31 else command))


def prctl(option: int, value: int | bytes) -> None:
    """prctl(2) with one argument."""
    argument: object = ctypes.c_char_p(value) if isinstance(value, bytes) else ctypes.c_ulong(value)
    _call("prctl", option, argument, ctypes.c_ulong(0), ctypes.c_ulong(0), ctypes.c_ulong(0))


def lock_memory() -> None:
    """mlockall(2): all memory, present and future, stays in RAM."""
    _call("mlockall", MCL_CURRENT | MCL_FUTURE)


class _Statfs(ctypes.Structure):
    """The head of `struct statfs`, bits/statfs.h; the rest is reserved so that the kernel may write it."""

    _fields_ = (("type", ctypes.c_ulong), ("rest", ctypes.c_ubyte * 248))


def filesystem_magic(path: Path) -> int:
    """The type of the file system that `path` is on, as in linux/magic.h."""
    found = _Statfs()
    _call("statfs", os.fsencode(path), ctypes.byref(found))
    return int(found.type)
