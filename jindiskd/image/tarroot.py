"""An ext4 root file system from a tar stream: no privilege, no mount, nothing of the stream ever a named file here.

The stream is first spooled to an unlinked file, so that sizes and links are known; then debugfs makes every entry with
owner, mode, time, attributes and device number. The same stream gives the same bytes.

Not kept: fractions of seconds, sockets, access times. Refused: names that debugfs cannot be told (with line ends), and
streams that contradict themselves.
"""

from __future__ import annotations

import hashlib
import os
import stat
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from jindiskd.errors import InvalidArgument
from jindiskd.image.amend import memory_files
from jindiskd.image.debugfs import About, FileSystem, inode_commands, quote, sayable, write_commands
from jindiskd.image.refusals import TarRefused
from jindiskd.image.sparse import copy_range, path_of, unlinked_file
from jindiskd.image.tarstream import XATTR_PREFIX
from jindiskd.image.tools import tool

MAX_STREAM_BYTES = 1 << 40
MAX_ENTRIES = 5_000_000
MAX_NAME_BYTES = 255
MAX_PATH_BYTES = 4095
MAX_ATTRIBUTE_BYTES = 4096 - 64
BATCH_FILES = 400
"""Files whose content one debugfs gets; each is a descriptor, and 1024 are open by default."""
BATCH_COMMANDS = 20_000
_PIECE = 1 << 20
_MIN_BYTES = 32 << 20
_FREE_BYTES = 64 << 20


@dataclass(slots=True, kw_only=True)
class Item:
    """One entry of the tree to be made."""

    path: str
    """Absolute."""
    info: tarfile.TarInfo
    links: list[str] = field(default_factory=list)
    """Other names of the same file."""


def spool(stream_fd: int, scratch: Path) -> tuple[int, bytes]:
    """Copy a stream to an unlinked file; returns the descriptor and the SHA-256 of the stream.

    Raises:
        TarRefused: it is longer than a tebibyte.
    """
    fd, state, size = unlinked_file(scratch), hashlib.sha256(), 0
    while piece := os.read(stream_fd, _PIECE):
        state.update(piece)
        view = memoryview(piece)
        while view:
            view = view[os.write(fd, view) :]
        size += len(piece)
        if size > MAX_STREAM_BYTES:
            raise TarRefused(f"it is longer than {MAX_STREAM_BYTES} bytes")
    return fd, state.digest()


def read_items(spooled: int) -> list[Item]:
    """The tree that a spooled stream describes, parents before children, sorted; a later entry replaces an earlier.

    Raises:
        TarRefused: no tar stream, an entry that cannot be made, or a link to nothing.
    """
    found: dict[str, Item] = {}
    try:
        with os.fdopen(os.dup(spooled), "rb") as raw:
            length = raw.seek(0, os.SEEK_END)
            raw.seek(0)
            with tarfile.open(fileobj=raw, mode="r:", errors="surrogateescape") as tar:
                for count, info in enumerate(tar):
                    if count >= MAX_ENTRIES:
                        raise TarRefused(f"it has more than {MAX_ENTRIES} entries")
                    path = _path(info.name)
                    if info.islnk():
                        target = found.get(_path(info.linkname))
                        if target is None or target.info.isdir():
                            raise TarRefused(f"{path!r} is a link to {info.linkname!r}, which is no earlier file")
                        target.links.append(path)
                        continue
                    _check(path, info, length)
                    found[path] = Item(path=path, info=info)
    except (tarfile.TarError, EOFError, ValueError, OverflowError) as exc:
        raise TarRefused(f"it is not a tar stream that can be read ({exc})") from exc
    if not found.keys() - {"/"}:
        raise TarRefused("it has no entries; compressed streams must be decompressed first")
    _check_tree(found)
    return [found[path] for path in sorted(found, key=lambda path: PurePosixPath(path).parts)]


def _path(name: str) -> str:
    parts = [part for part in name.split("/") if part not in {"", "."}]
    path = "/" + "/".join(parts)
    if ".." in parts:
        raise TarRefused(f"{name!r} leads out of the tree")
    if not sayable(path) or any(len(os.fsencode(part)) > MAX_NAME_BYTES for part in parts):
        raise TarRefused(f"{name!r} has a line end in it, or a name longer than {MAX_NAME_BYTES} bytes")
    if len(os.fsencode(path)) > MAX_PATH_BYTES:
        raise TarRefused(f"{name[:80]!r}… is longer than {MAX_PATH_BYTES} bytes")
    return path


def _check(path: str, info: tarfile.TarInfo, stream_bytes: int) -> None:
    if not (info.isreg() or info.isdir() or info.issym() or info.ischr() or info.isblk() or info.isfifo()):
        raise TarRefused(f"{path!r} is of the unknown type {info.type!r}")
    if info.isreg() and (info.size < 0 or info.offset_data + info.size > stream_bytes):
        raise TarRefused(f"it ends within {path!r}")
    if not (0 <= info.devmajor < 1 << 12 and 0 <= info.devminor < 1 << 20):
        raise TarRefused(f"{path!r} has a device number out of range")
    if info.issparse():
        raise TarRefused(f"{path!r} is stored as a sparse file; make the stream without --sparse")
    if not (0 <= info.uid < 1 << 32 and 0 <= info.gid < 1 << 32 and 0 <= int(info.mtime) < 1 << 33):
        raise TarRefused(f"{path!r} has an owner or a time out of range")
    if info.issym() and not (sayable(info.linkname) and 0 < len(os.fsencode(info.linkname)) <= MAX_PATH_BYTES):
        raise TarRefused(f"{path!r} is a link whose target cannot be stored")
    for key, value in _attributes(info).items():
        if not sayable(key) or len(value) > MAX_ATTRIBUTE_BYTES:
            raise TarRefused(f"{path!r} has the extended attribute {key!r}, which is too long or oddly named")


def _check_tree(found: dict[str, Item]) -> None:
    """Every parent must be a directory of the stream, or is made as an empty one of root's."""
    taken: set[str] = set()
    for item in list(found.values()):
        for path in (item.path, *item.links):
            if path in taken or (path in found and found[path] is not item):
                raise TarRefused(f"{path!r} is there twice, once as a link")
            taken.add(path)
            parent = path.rpartition("/")[0]
            while parent and parent not in found:
                info = tarfile.TarInfo(parent)
                info.type, info.mode = tarfile.DIRTYPE, 0o755
                found[parent] = Item(path=parent, info=info)
                parent = parent.rpartition("/")[0]
            if parent and not found[parent].info.isdir():
                raise TarRefused(f"{path!r} lies below {parent!r}, which is no directory")


def _attributes(info: tarfile.TarInfo) -> dict[str, bytes]:
    return {
        key.removeprefix(XATTR_PREFIX): os.fsencode(value)
        for key, value in info.pax_headers.items()
        if key.startswith(XATTR_PREFIX)
    }


def needed_bytes(items: Sequence[Item]) -> int:
    """How large a file system for the tree is made when nobody says: content and half as much again."""
    content = sum(-(-item.info.size // 4096) * 4096 + 4096 for item in items)
    size = max(_MIN_BYTES, content + content // 2 + _FREE_BYTES)
    return -(-size // (1 << 20)) << 20


def make_root(spooled: int, items: Sequence[Item], *, size_bytes: int, uuid: str, scratch: Path) -> int:
    """Make the file system in an unlinked file and return its descriptor.

    Args:
        spooled: the stream, for the content of files.
        items: of `read_items`.
        size_bytes: of the file system.
        uuid: of the file system; also seeds its directory hashes.
        scratch: a directory on the file system to use.

    Raises:
        InvalidArgument: the size does not hold the tree.
        FileSystemNotWritten: an entry could not be made.
    """
    content = sum(item.info.size for item in items)
    if content >= size_bytes:
        raise InvalidArgument("size of the root file system", size_bytes, f"the tree alone has {content} bytes")
    time = int(max((item.info.mtime for item in items), default=1)) or 1
    fd = unlinked_file(scratch)
    os.truncate(fd, size_bytes)
    system = FileSystem(fd, now=time)
    inodes = max(len(items) * 5 // 4 + 64, size_bytes // 16384)
    tool(
        [
            *("mke2fs", "-q", "-F", "-t", "ext4", "-b", "4096", "-I", "256", "-N", str(inodes), "-L", "root"),
            *("-U", uuid, "-E", f"hash_seed={uuid},root_owner=0:0,lazy_itable_init=0,lazy_journal_init=0"),
            path_of(fd),
        ],
        pass_fds=(fd,),
        env=system.environment,
    )
    if all(item.path != "/lost+found" for item in items):
        system.alter(["rmdir /lost+found"])
    for batch in _batches(items):
        _make_batch(system, spooled, batch, scratch)
    if links := list(_link_commands(items)):
        system.alter(links)
    return fd


def _batches(items: Sequence[Item]) -> Iterator[list[Item]]:
    batch: list[Item] = []
    files = commands = 0
    for item in items:
        count = (1 if item.info.isreg() else 0) + len(_attributes(item.info))
        if batch and (files + count > BATCH_FILES or commands > BATCH_COMMANDS):
            yield batch
            batch, files, commands = [], 0, 0
        batch.append(item)
        files, commands = files + count, commands + 10
    if batch:
        yield batch


def _make_batch(system: FileSystem, spooled: int, batch: Sequence[Item], scratch: Path) -> None:
    opened: list[int] = []
    commands: list[str] = []
    values = {f"{at} {key}": v for at, item in enumerate(batch) for key, v in _attributes(item.info).items()}
    with memory_files(values) as value_fds:
        try:
            for at, item in enumerate(batch):
                attributes = tuple((key, value_fds[f"{at} {key}"]) for key in _attributes(item.info))
                if item.info.isreg():
                    opened.append(_content(spooled, item.info, scratch))
                commands += _commands(item, opened[-1] if item.info.isreg() else -1, attributes)
            system.alter(commands, [*opened, *value_fds.values()])
        finally:
            for fd in opened:
                os.close(fd)


def _content(spooled: int, info: tarfile.TarInfo, scratch: Path) -> int:
    fd = unlinked_file(scratch)
    if copy_range(spooled, fd, info.size, info.offset_data, 0) != info.size:
        os.close(fd)
        raise TarRefused(f"it ends within {info.name!r}")
    return fd


def _commands(item: Item, content: int, attributes: tuple[tuple[str, int], ...]) -> list[str]:
    info = item.info
    parent, _, name = item.path.rpartition("/")
    word = quote(name)

    def about(kind: int) -> About:
        mode = 0o777 if info.issym() else stat.S_IMODE(info.mode)
        return About(mode=kind | mode, uid=info.uid, gid=info.gid, time=int(info.mtime), attributes=attributes)

    if item.path == "/":
        return ["cd /", *inode_commands(".", about(stat.S_IFDIR))]
    if info.isreg():
        return write_commands(item.path, content, about(stat.S_IFREG))
    if info.isdir():
        kind, make = stat.S_IFDIR, f"mkdir {word}"
    elif info.issym():
        kind, make = stat.S_IFLNK, f"symlink {word} {quote(info.linkname)}"
    elif info.isfifo():
        kind, make = stat.S_IFIFO, f"mknod {word} p"
    else:
        kind, letter = (stat.S_IFCHR, "c") if info.ischr() else (stat.S_IFBLK, "b")
        make = f"mknod {word} {letter} {info.devmajor} {info.devminor}"
    return [f"cd {quote(parent or '/')}", make, *inode_commands(name, about(kind))]


def _link_commands(items: Sequence[Item]) -> Iterator[str]:
    """Further names, when all directories are there; debugfs leaves the count of links to its caller."""
    for item in items:
        if item.links:
            yield from (f"ln {quote(item.path)} {quote(link)}" for link in item.links)
            yield f"sif {quote(item.path)} links_count {1 + len(item.links)}"
