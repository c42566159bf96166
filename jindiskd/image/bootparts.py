"""The two clear partitions of an image: `boot` with copies of what is started, and a small `UEFI` system partition.

Neither is trusted by anything: a guest is started by direct boot from the files in the store, which are measured. They
are there so that the disk has the shape that tools and people expect, and for guests started in other ways.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from pathlib import Path

from jindiskd.image.debugfs import About, FileSystem, write_commands
from jindiskd.image.sparse import path_of, unlinked_file
from jindiskd.image.tools import tool

UEFI_BYTES = 16 << 20
_SLACK_BYTES = 4 << 20
README = b"This machine is started by measured direct boot; nothing on this partition is used for that.\r\n"


def make_boot(files: Mapping[str, Path], uuid: str, time: int, scratch: Path) -> int:
    """An ext4 file system with `files` in its root, in an unlinked file of whole mebibytes; returns the descriptor.

    Args:
        files: name in the file system to file on this host.
        uuid: of the file system; also seeds its directory hashes, so that equal inputs give equal bytes.
        time: seconds since the epoch, for everything in it.
        scratch: a directory on the file system to use.
    """
    content = sum(path.stat().st_size for path in files.values())
    size = -(-(content + content // 20 + _SLACK_BYTES) // (1 << 20)) << 20
    fd = unlinked_file(scratch)
    os.truncate(fd, size)
    system = FileSystem(fd, now=time)
    tool(
        [
            *("mke2fs", "-q", "-F", "-t", "ext4", "-b", "4096", "-m", "0", "-L", "boot", "-U", uuid),
            *("-O", "^has_journal,^resize_inode", "-E", f"hash_seed={uuid},root_owner=0:0,lazy_itable_init=0"),
            path_of(fd),
        ],
        pass_fds=(fd,),
        env=system.environment,
    )
    opened: list[int] = []
    try:
        commands = []
        about = About(mode=stat.S_IFREG | 0o644, uid=0, gid=0, time=time)
        for name, path in sorted(files.items()):
            opened.append(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
            commands += write_commands(f"/{name}", opened[-1], about)
        system.alter(commands, opened)
    finally:
        for source in opened:
            os.close(source)
    return fd


def make_uefi(volume_id: bytes, time: int, scratch: Path) -> int:
    """A FAT file system with an empty `EFI/BOOT` and a note, in an unlinked file; returns the descriptor.

    Args:
        volume_id: 4 bytes.
        time: seconds since the epoch; FAT begins in 1980, so earlier times become that.
        scratch: a directory on the file system to use.
    """
    fd = unlinked_file(scratch)
    os.truncate(fd, UEFI_BYTES)
    path = path_of(fd)
    tool(["mkfs.vfat", "--invariant", "-F", "16", "-n", "UEFI", "-i", volume_id.hex(), path], pass_fds=(fd,))
    # mtools read no configuration of the user's, and write the time of SOURCE_DATE_EPOCH.
    env = {
        "MTOOLSRC": os.devnull,
        "SOURCE_DATE_EPOCH": str(max(time, 315532800)),
        "TZ": "UTC",
        "MTOOLS_SKIP_CHECK": "1",
    }
    tool(["mmd", "-i", path, "::/EFI", "::/EFI/BOOT"], pass_fds=(fd,), env=env)
    tool(["mcopy", "-i", path, "-", "::/README.TXT"], pass_fds=(fd,), env=env, stdin=README)
    return fd
