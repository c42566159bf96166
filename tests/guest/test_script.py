"""A key from a program: the contract, each status, and programs that break it."""

import stat
import sys
import time
import uuid
from pathlib import Path

import pytest

from jindiskd.guest.codes import Code, GuestFailure
from jindiskd.guest.script import KeyProgram

EXAMPLE = Path(__file__).resolve().parents[2] / "docs/examples/key-program"
IMAGE, VOLUME = "11111111-1111-4111-8111-111111111111", str(uuid.UUID(int=7))


@pytest.fixture
def program(tmp_path: Path):
    def make(body: str) -> str:
        path = tmp_path / "program"
        path.write_text(f"#!{sys.executable} -ISB\nimport os, sys, time\n{body}\n")
        path.chmod(0o755)
        return str(path)

    return make


def fetch(path: str, seconds: float = 30.0) -> bytes:
    told: list[int] = []
    key = KeyProgram(path, IMAGE, VOLUME).fetch("ignored", time.monotonic() + seconds, lambda: told.append(1))
    assert told == [1]
    with key:
        return bytes(key.reveal())


def refused(path: str, seconds: float = 30.0) -> Code:
    with pytest.raises(GuestFailure) as found:
        fetch(path, seconds)
    return found.value.code


def test_the_key_is_what_was_printed(program) -> None:
    """Byte for byte; the program knows the guest and the volume, and nothing else of its surroundings."""
    path = program(
        "assert sorted(os.environ) in (['JINDISK_VM', 'JINDISK_VOLUME', 'PATH'],"
        " ['JINDISK_VM', 'JINDISK_VOLUME', 'LC_CTYPE', 'PATH']), os.environ\n"
        f"assert (os.environ['JINDISK_VM'], os.environ['JINDISK_VOLUME']) == ('{IMAGE}', '{VOLUME}')\n"
        "assert sys.stdin.read() == ''\n"
        "sys.stderr.write('unheard')\n"
        "sys.stdout.buffer.write(bytes(range(256)) + b'\\n\\0')"
    )
    assert fetch(path) == bytes(range(256)) + b"\n\0"


def test_later(program, tmp_path: Path) -> None:
    """75 is asked again; the third time it has the key. Where there is no time left, that is told."""
    count = tmp_path / "count"
    body = f"n = os.path.getsize({str(count)!r})\n"
    body += f"open({str(count)!r}, 'a').write('x')\n"
    body += "sys.exit(75) if n < 2 else sys.stdout.write('key')"
    count.write_text("")
    assert fetch(program(body)) == b"key"
    assert count.read_text() == "xxx"
    assert refused(program("sys.exit(75)"), 1.0) is Code.BROKER_UNREACHABLE


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ("sys.exit(1)", Code.POLICY_DENIED),
        ("sys.stdout.write('half'); sys.stdout.flush(); sys.exit(2)", Code.POLICY_DENIED),
        ("os.kill(os.getpid(), 9)", Code.POLICY_DENIED),
        ("pass", Code.BROKER_MISBEHAVED),
        ("sys.stdout.write('x' * 4097)", Code.BROKER_MISBEHAVED),
        ("while True: sys.stdout.write('x' * 4096)", Code.BROKER_MISBEHAVED),
    ],
)
def test_refusals_and_breaches(program, body: str, code: Code) -> None:
    """No key comes of them."""
    assert refused(program(body)) is code


def test_one_that_hangs_is_ended_with_its_children(program, tmp_path: Path) -> None:
    """When its time is over, and not before what it started."""
    pid = tmp_path / "pid"
    body = f"child = os.fork()\nopen({str(pid)!r}, 'w').write(str(child)) if child else None\ntime.sleep(600)"
    begun = time.monotonic()
    assert refused(program(body), 3.0) is Code.BROKER_UNREACHABLE
    assert time.monotonic() - begun < 120
    child = Path("/proc") / pid.read_text()
    until = time.monotonic() + 60
    while child.exists() and (child / "stat").read_text().split()[2] != "Z":
        assert time.monotonic() < until, "it still runs"
        time.sleep(0.01)


def test_what_is_no_program(tmp_path: Path) -> None:
    """Nothing there, or not to be run."""
    assert refused(str(tmp_path / "none")) is Code.BROKER_MISBEHAVED
    (tmp_path / "file").write_text("x")
    assert refused(str(tmp_path / "file")) is Code.BROKER_MISBEHAVED


def test_nothing_is_left_open(program) -> None:
    """No descriptor more than before."""
    before = len(list(Path("/proc/self/fd").iterdir()))
    fetch(program("sys.stdout.write('key')"))
    refused(program("sys.exit(3)"))
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_the_example(tmp_path: Path) -> None:
    """The sample of the documents keeps the contract."""
    path, disk = tmp_path / "key-program", tmp_path / "disk"
    text = EXAMPLE.read_text().replace("#!/usr/bin/python3.11", f"#!{sys.executable}")
    path.write_text(text.replace('"/dev/vdb"', repr(str(disk))))
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    assert refused(str(path), 1.0) is Code.BROKER_UNREACHABLE
    disk.write_bytes(uuid.UUID(VOLUME).bytes + b"k" * 32)
    assert fetch(str(path)) == b"k" * 32
    disk.write_bytes(uuid.UUID(int=9).bytes + b"k" * 32)
    assert refused(str(path)) is Code.POLICY_DENIED
