"""Leaving the initrd: move the mounts, delete the initrd's files, change the root, run the system's init."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import NoReturn

from jindiskd.guest import kernel

MOVED = ("dev", "proc", "sys", "run")
MAX_LINKS = 40  # as the kernel's limit for following symbolic links


class NotAnInitrd(Exception):
    """`/` is not the initrd's file system: deleting its files would be a disaster."""


def find_init(root: Path, init: str) -> bool:
    """Whether `init` names an executable file inside `root`, with symbolic links taken as inside `root`."""
    parts = [part for part in reversed(init.split("/")) if part]
    at: list[str] = []
    for _ in range(MAX_LINKS * 8):
        if not parts:
            break
        part = parts.pop()
        if part == ".":
            continue
        if part == "..":
            at = at[:-1]
            continue
        try:
            mode = root.joinpath(*at, part).lstat().st_mode
        except OSError:
            return False
        if not stat.S_ISLNK(mode):
            at.append(part)
            continue
        target = os.fspath(root.joinpath(*at, part).readlink())
        if target.startswith("/"):
            at = []
        parts += [piece for piece in reversed(target.split("/")) if piece]
    else:
        return False
    found = root.joinpath(*at).lstat().st_mode
    return stat.S_ISREG(found) and bool(found & 0o111)


def keep_initrd(at: Path = Path("/run/initramfs")) -> None:
    """Keep the initrd's files reachable: systemd-shutdown goes back there, and runs `shutdown` in it.

    The initrd is in memory already, so it is bound there, not copied. The storage process has it as its root as well.
    """
    at.mkdir(mode=0o755)
    kernel.mount("/", at, "", kernel.MS_BIND)


def move_mounts(target: Path) -> None:
    """Move /dev, /proc, /sys and /run to the same names below `target`; what has no place there is detached."""
    for name in MOVED:
        source = Path("/") / name
        try:
            kernel.mount(os.fspath(source), target / name, "", kernel.MS_MOVE)
        except OSError:
            kernel.unmount(source, kernel.MNT_DETACH)


def enter(target: Path) -> int:
    """Make the file system mounted at `target` the root; a descriptor of the old root is returned.

    Raises:
        NotAnInitrd: the old root is a real file system, so something is badly wrong.
    """
    in_memory = kernel.filesystem_magic(Path("/")) in {kernel.RAMFS_MAGIC, kernel.TMPFS_MAGIC}
    if not in_memory or not Path("/init").is_file():
        raise NotAnInitrd
    old = os.open("/", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    os.chdir(target)
    kernel.mount(".", Path("/"), "", kernel.MS_MOVE)
    os.chroot(".")
    os.chdir("/")
    return old


def delete_files(directory: int, device: int | None = None) -> None:
    """Delete everything below an open directory without leaving its file system. Errors cost memory, nothing else."""
    if device is None:
        device = os.fstat(directory).st_dev
    for entry in os.listdir(directory):
        try:
            found = os.lstat(entry, dir_fd=directory)
            if found.st_dev != device:
                continue
            if not stat.S_ISDIR(found.st_mode):
                os.unlink(entry, dir_fd=directory)
                continue
            inner = os.open(entry, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
            try:
                delete_files(inner, device)
            finally:
                os.close(inner)
            os.rmdir(entry, dir_fd=directory)
        except OSError:
            continue


def start_init(init: str) -> NoReturn:
    """Replace this process by the system's init, with the console as its standard streams and no other descriptor.

    Raises:
        OSError: it cannot be run.
    """
    console = os.open("/dev/console", os.O_RDWR | os.O_NOCTTY)
    for descriptor in range(3):
        os.dup2(console, descriptor, inheritable=True)
    if console > 2:
        os.close(console)
    os.execve(init, [init], {"HOME": "/", "TERM": "linux"})  # noqa: S606 - handing over to init is our purpose
