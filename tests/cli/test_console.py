"""Consoles on the command line: what is shown of them, and a log that is followed through its logger's doings."""

from __future__ import annotations

import contextlib
import os
import pty
import subprocess
import sys
import tempfile
import termios
from pathlib import Path

import pytest

from jindiskd.cli.console import Log, Printable
from jindiskd.cli.main import main
from jindiskd.domain.console import open_log
from jindiskd.errors import NotFound


@pytest.mark.parametrize("size", [1, 2, 3, 1000])
def test_what_steers_a_terminal_is_left_out(size: int) -> None:
    """However the blocks lie: characters of several bytes and line ends across two of them."""
    text = "a\r\nb\rc\n\x1b[2Jd\u00e9\u20ac\tf\x9b1m".encode()
    show = Printable()
    shown = "".join(show.clean(text[at : at + size]) for at in range(0, len(text), size)) + show.clean(b"", final=True)
    assert shown == "a\nb\nc\n\ufffd[2Jd\u00e9\u20ac\tf\ufffd1m"


def test_a_line_that_waits_for_its_end() -> None:
    """A return at the very end is one line end, and half a character is shown as none."""
    show = Printable()
    assert show.clean(b"a\r") + show.clean(b"\xc3", final=True) == "a\n\ufffd"


def test_a_log_is_read_through_rotation_and_a_new_start(tmp_path: Path) -> None:
    """As the logger does it: the file gets another name, another begins; a new start of the domain empties it."""
    path = tmp_path / "d.log"
    path.write_bytes(b"one")
    with contextlib.closing(Log(os.open(path, os.O_RDONLY))) as log:
        assert log.read() == b"one"
        with path.open("ab") as more:
            more.write(b"two")
            path.rename(tmp_path / "d.log.0")
            more.write(b"three")
        assert log.moved
        assert log.read() == b"twothree"
        path.write_bytes(b"four")
        log.replace(os.open(path, os.O_RDONLY))
        assert (log.moved, log.read(), log.read()) == (False, b"four", b"")
        path.write_bytes(b"5")
        assert log.read() == b"5"


@pytest.mark.skipif(os.getuid() != 0, reason="needs root to be somebody else")
def test_a_log_of_the_loggers_own_is_a_typed_error(tmp_path: Path) -> None:
    """With what to do; a log that is not there is another."""
    with pytest.raises(NotFound, match="console log of domain 'web'"):
        open_log(tmp_path / "none", "web")
    code = (
        "import os, sys\nfrom pathlib import Path\nfrom jindiskd.domain import console\n"
        "os.setgroups([])\nos.setuid(65534)\n"
        "try:\n    console.open_log(Path(sys.argv[1]), 'web')\n"
        "except console.ConsoleNotReadable as exc:\n    print(exc)\n"
    )
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o711)
        path = Path(folder) / "root.log"
        path.touch(mode=0o600)
        done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
    assert "'web' has grown" in done.stdout
    assert "virtlogd.conf" in done.stdout


JOINED = """
import asyncio, socket, sys, threading
from jindiskd.cli import console

ours, theirs = socket.socketpair()

def guest():
    while (data := theirs.recv(100)) and data != b"\\x03":
        theirs.sendall(data.upper())
    theirs.close()

threading.Thread(target=guest).start()
with ours, console.raw_terminal():
    print("ready", flush=True)
    left = asyncio.run(console._joined(ours))
print("left" if left else "ended")
"""


@pytest.mark.parametrize(("key", "end"), [(b"\x1d", b"left"), (b"\x03", b"ended")])
def test_every_key_goes_to_the_guest_but_one(key: bytes, end: bytes) -> None:
    """^C too, on a terminal that is afterwards as it was; ^] leaves, and what the guest ends is ended."""
    master, slave = pty.openpty()
    before = termios.tcgetattr(slave)
    with subprocess.Popen([sys.executable, "-c", JOINED], stdin=slave, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"ready\n"
        os.write(master, b"h\xc3\xa9i")
        said = b""
        while b"I" not in said:
            said += process.stdout.read(1)
        assert said == b"H\xc3\xa9I"
        os.write(master, key)
        assert process.stdout.read().strip() == end
        assert process.wait(120) == 0
    assert termios.tcgetattr(slave) == before
    os.close(master)
    os.close(slave)


@pytest.mark.parametrize(
    "words", [["--follow", "--attach"], ["--force"], ["--json", "--follow"], ["--json", "--attach"]]
)
def test_options_that_do_not_go_together(words: list[str]) -> None:
    """Are refused before anything is asked."""
    assert main(["domain", "console", "web", *words]) == 2
