"""Where keys come from: files of raw bytes, standard input, or a terminal. Never the command line."""

from __future__ import annotations

import errno
import os
import stat
import sys
from pathlib import Path

import click

from jindiskd.base.files import fsync_directory
from jindiskd.base.secret import Secret
from jindiskd.cli.app import App
from jindiskd.errors import AlreadyExists, InvalidArgument

STDIN = Path("-")
PASSWORD_LIMIT = 1024


def read_key(app: App, path: Path | None, length: int, *, what: str = "key") -> Secret:
    """The key: `length` raw bytes of a file or of standard input (`-`), else hexadecimal digits from the terminal.

    Raises:
        InvalidArgument: it has another length, or there is neither file nor terminal.
        OSError: the file cannot be read.
    """
    if path is None:
        return _asked(length, what)
    if path == STDIN:
        return _exact(bytearray(sys.stdin.buffer.read(length + 1)), length, "standard input", what)
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        found = os.fstat(fd)
        if stat.S_ISDIR(found.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
        if stat.S_ISREG(found.st_mode) and found.st_mode & 0o077:
            app.say(f"warning: others may read the {what} file {path}; chmod 600 it")
        data = bytearray()
        while len(data) <= length and (part := os.read(fd, length + 1 - len(data))):
            data += part
    finally:
        os.close(fd)
    return _exact(data, length, os.fspath(path), what)


def read_password(path: Path | None) -> Secret:
    """A password: the bytes of a file or of standard input as they are, or what is typed at the terminal.

    Raises:
        InvalidArgument: it is empty or too long, or there is neither file nor terminal.
        OSError: the file cannot be read.
    """
    if path is None:
        if not (sys.stdin.isatty() and sys.stderr.isatty()):
            raise InvalidArgument("no password", "", "name a file that holds it, or - for standard input")
        return Secret(bytearray(click.prompt("Password", hide_input=True, err=True).encode()))
    if path == STDIN:
        data = bytearray(sys.stdin.buffer.read(PASSWORD_LIMIT + 1))
    else:
        with path.open("rb") as file:
            data = bytearray(file.read(PASSWORD_LIMIT + 1))
    if not 0 < len(data) <= PASSWORD_LIMIT:
        raise InvalidArgument("the password from", os.fspath(path), f"it has 1 to {PASSWORD_LIMIT} bytes")
    return Secret(data)


def _exact(data: bytearray, length: int, where: str, what: str) -> Secret:
    count = len(data)
    secret = Secret(data)
    if count != length:
        secret.close()
        had = f"{count} bytes" if count <= length else f"more than {length} bytes"
        raise InvalidArgument(f"the {what} from", where, f"it has {had}, and must be exactly {length} raw bytes")
    return secret


def _asked(length: int, what: str) -> Secret:
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise InvalidArgument(f"no {what}", "", f"name a file of {length} raw bytes, or - for standard input")
    text = click.prompt(f"{what.capitalize()} ({2 * length} hexadecimal digits)", hide_input=True, err=True)
    try:
        data = bytearray.fromhex(text)
    except ValueError:
        raise InvalidArgument(f"the {what}", "as typed", f"it is {2 * length} hexadecimal digits") from None
    return _exact(data, length, "the terminal", what)


def generate_key(path: Path, length: int) -> Secret:
    """Draw a key and keep it in a new file that only its owner may read; durable before it is used.

    Raises:
        AlreadyExists: there is a file already.
        OSError: it cannot be written.
    """
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError as exc:
        raise AlreadyExists("the key file", os.fspath(path)) from exc
    key = Secret.random(length)
    try:
        os.write(fd, key.reveal())
        os.fsync(fd)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    finally:
        os.close(fd)
    fsync_directory(path.absolute().parent)
    return key
