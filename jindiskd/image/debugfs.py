"""Looking into an ext4 file system and altering it, by debugfs: no mount, no privilege.

Paths given here are within the file system, absolute, of names that debugfs can be told (`sayable`). debugfs follows
links to directories inside the file system only, and never leaves it. It reports errors in words, not by its status,
so that every line it prints that is not expected is an error here.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jindiskd.errors import JindiskError
from jindiskd.image.sparse import path_of
from jindiskd.image.tools import tool

MAX_READ_BYTES = 1 << 20
MAX_COMMAND_BYTES = 8000  # debugfs reads lines of 8191 bytes, and takes the rest of a longer one for a command
_LINE = re.compile(rb"/(\d+)/([0-7]{6})/(\d+)/(\d+)/(.*)/(\d*)/")
_QUIET = re.compile(rb"debugfs( 1\.[0-9.]+ \(.*\)|: .*)|Allocated inode: \d+|")
_ATTRIBUTE = re.compile(r"([a-z]+\.\S+) \(\d+\)( = .*)?")


class FileSystemNotWritten(JindiskError, code="FileSystemNotWritten"):
    """An alteration inside the root file system failed."""

    def __init__(self, problem: str) -> None:
        """`problem` is what debugfs said."""
        super().__init__(f"the root file system could not be altered: {problem}; a larger size may help if it is full")


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A directory entry and what its inode says."""

    name: str
    inode: int
    mode: int
    """Type and permission bits, as in `st_mode`."""
    uid: int
    gid: int
    size_bytes: int

    @property
    def is_regular(self) -> bool:
        """True for a plain file."""
        return stat.S_ISREG(self.mode)

    @property
    def is_directory(self) -> bool:
        """True for a directory."""
        return stat.S_ISDIR(self.mode)


def sayable(path: str) -> bool:
    """Whether a path can be passed to debugfs: its commands are lines, and a carriage return ends them too."""
    return not any(character in path for character in "\n\r\0")


def quote(path: str) -> str:
    """A path as one word of a debugfs command."""
    assert sayable(path), path
    return '"' + path.replace('"', '""') + '"'


class FileSystem:
    """An ext4 file system in an open file, at an offset.

    Args:
        fd: the file; it need not have a name.
        offset_bytes: where the file system begins in it.
        now: the time, in seconds since the epoch, that alterations carry.
    """

    def __init__(self, fd: int, offset_bytes: int = 0, *, now: int = 0) -> None:
        self.fd, self.now = fd, now
        self._where = path_of(fd) + (f"?offset={offset_bytes}" if offset_bytes else "")

    @property
    def where(self) -> str:
        """How e2fsprogs are told which file system to open."""
        return self._where

    @property
    def environment(self) -> dict[str, str]:
        """What makes e2fsprogs write our time instead of the clock's; zero would mean the clock's."""
        return {"E2FSPROGS_FAKE_TIME": str(max(self.now, 1))}

    def list(self, directory: str) -> dict[str, Node]:
        """The entries of a directory by name, without `.` and `..`; empty if there is no such directory."""
        out = self._ask(f"ls -p {quote(directory.rstrip('/') + '/.')}")
        nodes = {}
        for line in out.splitlines():
            match = _LINE.fullmatch(line)
            if match is None or match[1] == b"0":
                continue
            name = os.fsdecode(match[5])
            nodes[name] = Node(
                name=name,
                inode=int(match[1]),
                mode=int(match[2], 8),
                uid=int(match[3]),
                gid=int(match[4]),
                size_bytes=int(match[6] or b"0"),
            )
        return {name: node for name, node in nodes.items() if name not in {".", ".."}}

    def find(self, path: str) -> Node | None:
        """What is at `path`, a link itself and not its target; None if nothing is."""
        parent, _, name = path.rpartition("/")
        return self.list(parent or "/").get(name)

    def read(self, path: str, limit_bytes: int = MAX_READ_BYTES) -> bytes | None:
        """The content of a plain file, or None if it is absent, no plain file, or longer than `limit_bytes`."""
        node = self.find(path)
        if node is None or not node.is_regular or node.size_bytes > limit_bytes:
            return None
        data = self._ask(f"cat {quote(path)}")
        return data if len(data) == node.size_bytes else None

    def dump(self, path: str, target: Path) -> bool:
        """Copy a plain file out to `target`; False if it is absent, no plain file, or could not be read whole."""
        node = self.find(path)
        if node is None or not node.is_regular:
            return False
        self._ask(f"dump {quote(path)} {quote(os.fspath(target))}")
        return target.is_file() and target.stat().st_size == node.size_bytes

    def attributes(self, path: str) -> dict[str, bytes]:
        """The extended attributes of what is at `path` by full name, without what holds a small file's content."""
        found = {}
        for line in self._ask(f"ea_list {quote(path)}").decode(errors="surrogateescape").splitlines():
            match = _ATTRIBUTE.fullmatch(line.strip())
            if match is not None and match[1] != "system.data":
                found[match[1]] = self._attribute(path, match[1])
        return found

    def _attribute(self, path: str, name: str) -> bytes:
        with os.fdopen(os.memfd_create("attribute", 0), "rb") as value:
            self._ask(f"ea_get -f {path_of(value.fileno())} {quote(path)} {quote(name)}", (value.fileno(),))
            return value.read()

    def _ask(self, command: str, fds: Sequence[int] = ()) -> bytes:
        return tool(["debugfs", "-R", command, self._where], pass_fds=(self.fd, *fds), env=self.environment)

    def alter(self, commands: Sequence[str], fds: Sequence[int] = ()) -> None:
        """Run debugfs commands that write.

        Args:
            commands: one a line; content comes from descriptors, named by `sparse.path_of`.
            fds: those descriptors.

        Raises:
            FileSystemNotWritten: debugfs complained about one.
        """
        lines = [os.fsencode(command) + b"\n" for command in commands]
        if too_long := [line for line in lines if len(line) > MAX_COMMAND_BYTES]:
            raise FileSystemNotWritten(f"the names in {os.fsdecode(too_long[0][:80])!r} are too long")
        with os.fdopen(os.memfd_create("commands", 0), "wb") as script:
            script.write(b"".join(lines))
            script.flush()
            # Errors come on standard error, and only in the order of the commands if both go to one place.
            shell = ["sh", "-c", 'exec debugfs "$@" 2>&1', "debugfs"]
            out = tool(
                [*shell, "-w", "-f", path_of(script.fileno()), self._where],
                pass_fds=(self.fd, script.fileno(), *fds),
                env=self.environment,
            )
        for line in out.splitlines():
            if not _QUIET.fullmatch(line):
                raise FileSystemNotWritten(line.decode(errors="replace"))

    def check(self, *, repair: bool = False) -> str | None:
        """Run e2fsck; None if it is sound (with `repair`: now), else what it said."""
        mode = ["-fp", "-E", "fixes_only"] if repair else ["-fn"]
        shell = ["sh", "-c", 'e2fsck "$@" 2>&1; echo "status $?"', "e2fsck"]
        out = tool([*shell, *mode, self._where], pass_fds=(self.fd,), env=self.environment).decode(errors="replace")
        said, _, status = out.rstrip().rpartition("status ")
        if status == "0" or (repair and status == "1"):
            return None
        return " ".join(said.split())[-400:]


@dataclass(frozen=True, slots=True, kw_only=True)
class About:
    """What an inode shall say."""

    mode: int
    """Type and permission bits."""
    uid: int
    gid: int
    time: int
    """All four times, seconds since the epoch."""
    attributes: tuple[tuple[str, int], ...] = ()
    """Extended attributes by full name, each with a descriptor of a file that holds the value."""


def write_commands(path: str, fd: int, about: About) -> list[str]:
    """Commands that make the plain file `path`, which must not exist, with the content of `fd`."""
    parent, _, name = path.rpartition("/")
    return [
        f"cd {quote(parent or '/')}",
        f"write {path_of(fd)} {quote(name)}",
        *inode_commands(name, about),
    ]


def inode_commands(name: str, about: About) -> list[str]:
    """Commands that set what the inode of `name`, in the current directory, says."""
    # With "./" in front no name is taken for an option (-x) or for the number of an inode (<5>).
    word = quote(f"./{name}")
    values = {"mode": f"0{about.mode:o}", "uid": about.uid, "gid": about.gid}
    times = dict.fromkeys(("atime", "ctime", "mtime", "crtime"), f"@{about.time}")
    return [
        *(f"sif {word} {field} {value}" for field, value in {**values, **times}.items()),
        *(f"ea_set -f {path_of(fd)} {word} {quote(key)}" for key, fd in about.attributes),
    ]
