"""A directory as a tar stream, as the command line passes a root file system to the service.

PAX format, in one fixed order, with everything a root file system consists of: owners by number, all mode bits, links,
devices, times to the second, and extended attributes (capabilities, labels, ACLs) as `SCHILY.xattr.*`, which GNU tar
and libarchive use too. The same tree gives the same bytes. Reading other people's files needs the rights of whoever
calls this; the service only ever sees the stream.
"""

from __future__ import annotations

import contextlib
import os
import stat
import tarfile
from collections.abc import Iterator
from pathlib import Path

XATTR_PREFIX = "SCHILY.xattr."
_TYPES = {
    stat.S_IFREG: tarfile.REGTYPE,
    stat.S_IFDIR: tarfile.DIRTYPE,
    stat.S_IFLNK: tarfile.SYMTYPE,
    stat.S_IFCHR: tarfile.CHRTYPE,
    stat.S_IFBLK: tarfile.BLKTYPE,
    stat.S_IFIFO: tarfile.FIFOTYPE,
}


def stream_directory(path: Path, out_fd: int) -> None:
    """Write the tree below `path` to `out_fd` as a tar stream; stays on one file system, leaves sockets out.

    Args:
        path: the root of the tree.
        out_fd: a file, pipe or socket; it stays open.

    Raises:
        OSError: something cannot be read, or the reader went away.
    """
    with os.fdopen(os.dup(out_fd), "wb") as out, tarfile.open(fileobj=out, mode="w|", format=tarfile.PAX_FORMAT) as tar:
        seen: dict[tuple[int, int], str] = {}
        for name, found in _walk(path):
            _add(tar, path / name if name else path, name, found, seen)


def _walk(root: Path) -> Iterator[tuple[str, os.stat_result]]:
    """Names relative to the root and what they are, parents first, each directory sorted by bytes."""
    top = os.stat(root)  # noqa: PTH116 (one call style for both)
    yield "", top
    pending = [""]
    while pending:
        directory = pending.pop()
        inner = []
        for raw in sorted(os.listdir(os.fsencode(root / directory))):  # noqa: PTH208 (sorted as bytes)
            name = f"{directory}/{os.fsdecode(raw)}".lstrip("/")
            found = os.lstat(root / name)
            if stat.S_IFMT(found.st_mode) not in _TYPES:
                continue
            yield name, found
            if stat.S_ISDIR(found.st_mode) and found.st_dev == top.st_dev:
                inner.append(name)
        pending.extend(reversed(inner))


def _add(tar: tarfile.TarFile, path: Path, name: str, found: os.stat_result, seen: dict[tuple[int, int], str]) -> None:
    info = tarfile.TarInfo(name or ".")
    info.type = _TYPES[stat.S_IFMT(found.st_mode)]
    info.mode, info.uid, info.gid = stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid
    info.mtime = int(found.st_mtime)
    identity = (found.st_dev, found.st_ino)
    if not stat.S_ISDIR(found.st_mode) and found.st_nlink > 1:
        if identity in seen:
            info.type, info.linkname = tarfile.LNKTYPE, seen[identity]
            tar.addfile(info)
            return
        seen[identity] = name
    if info.issym():
        info.linkname = str(path.readlink())
    if info.ischr() or info.isblk():
        info.devmajor, info.devminor = os.major(found.st_rdev), os.minor(found.st_rdev)
    info.pax_headers = {XATTR_PREFIX + key: os.fsdecode(value) for key, value in _attributes(path).items()}
    if info.isreg():
        info.size = found.st_size
        with path.open("rb") as content:
            tar.addfile(info, content)
    else:
        tar.addfile(info)


def _attributes(path: Path) -> dict[str, bytes]:
    found = {}
    # A file system without extended attributes has none to preserve.
    with contextlib.suppress(OSError):
        for key in sorted(os.listxattr(path, follow_symlinks=False)):
            found[key] = os.getxattr(path, key, follow_symlinks=False)
    return found
