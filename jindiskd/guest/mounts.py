"""The kernel's file systems in the initrd, and the root file system's mount options."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from jindiskd.guest import kernel

SAFE = kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC

KERNEL_MOUNTS: Sequence[tuple[str, str, int, str]] = (
    ("proc", "/proc", SAFE, ""),
    ("sysfs", "/sys", SAFE, ""),
    ("devtmpfs", "/dev", kernel.MS_NOSUID | kernel.MS_NOEXEC, "mode=0755"),
    # systemd looks for an existing /run; no noexec, because /run/initramfs/shutdown is run from there.
    ("tmpfs", "/run", kernel.MS_NOSUID | kernel.MS_NODEV, "mode=0755"),
)
CONFIGFS = Path("/sys/kernel/config")
SECURITYFS = Path("/sys/kernel/security")

FLAGS = {
    "ro": kernel.MS_RDONLY,
    "rw": 0,
    "defaults": 0,
    "nosuid": kernel.MS_NOSUID,
    "nodev": kernel.MS_NODEV,
    "noexec": kernel.MS_NOEXEC,
    "noatime": kernel.MS_NOATIME,
}


def mount_kernel_filesystems() -> None:
    """Mount proc, sysfs, devtmpfs and a tmpfs on /run. A kernel that has mounted devtmpfs itself is no error."""
    for kind, target, flags, options in KERNEL_MOUNTS:
        path = Path(target)
        path.mkdir(mode=0o755, exist_ok=True)
        try:
            kernel.mount(kind, path, kind, flags, options)
        except OSError as exc:
            if exc.errno != errno.EBUSY:
                raise


def mount_configfs() -> None:
    """Mount configfs, for which its module must be loaded."""
    kernel.mount("configfs", CONFIGFS, "configfs", SAFE)


def mount_securityfs() -> None:
    """Mount securityfs, where efi_secret shows what was injected."""
    kernel.mount("securityfs", SECURITYFS, "securityfs", SAFE)


def split_options(options: str) -> tuple[int, str]:
    """Mount options as (mount(2) flags, what is left for the file system itself)."""
    flags, rest = 0, []
    for option in filter(None, options.split(",")):
        if option in FLAGS:
            flags |= FLAGS[option]
        else:
            rest.append(option)
    return flags, ",".join(rest)


def mount_data(device: str, root: Path, place: str, *, kind: str, options: str, root_options: str) -> None:
    """Mount a data volume's file system at `place` of the system that is mounted at `root`.

    Links on the way are taken as the system would take them. A place that is not there is made, for which the root is
    writable for a moment.
    """
    with _inside(root):
        there = os.path.realpath(place)
        missing = not Path(there).is_dir()
    target = root / there.lstrip("/")
    if missing:
        flags, rest = split_options(root_options)
        kernel.mount("", root, "", kernel.MS_REMOUNT | (flags & ~kernel.MS_RDONLY), rest)
        try:
            target.mkdir(mode=0o755, parents=True)
        finally:
            kernel.mount("", root, "", kernel.MS_REMOUNT | flags, rest)
    flags, rest = split_options(options)
    kernel.mount(device, target, kind, flags, rest)


@contextlib.contextmanager
def _inside(root: Path) -> Iterator[None]:
    """With another directory as this process's root."""
    outside = os.open("/", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.chroot(root)
        os.chdir("/")
        yield
    finally:
        os.fchdir(outside)
        os.chroot(".")
        os.close(outside)


def mount_root(device: str, target: Path, kind: str, options: str) -> None:
    """Mount the root file system."""
    target.mkdir(mode=0o755, exist_ok=True)
    flags, rest = split_options(options)
    kernel.mount(device, target, kind, flags, rest)
