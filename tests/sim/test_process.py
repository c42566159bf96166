"""The simulated firmware's process: its protocol, its limits, and its end."""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import struct
import sys
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from jindiskd.attest.measure import LaunchInputs, snp_launch_digest
from jindiskd.attest.snp import SnpVerifier
from jindiskd.attest.snp_table import table_certificates

NOW = datetime(2026, 7, 15, tzinfo=UTC)
DATA = bytes(range(64))


@pytest.fixture
def request_line(tmp_path: Path, firmware: Path, root_directory: Path) -> dict:
    for name in ("kernel", "initrd"):
        (tmp_path / name).write_bytes(name.encode())
    return {
        "firmware": str(firmware),
        "kernel": str(tmp_path / "kernel"),
        "initrd": str(tmp_path / "initrd"),
        "cmdline": "quiet",
        "vcpus": 2,
        "cpu_model": "EPYC-Milan",
        "root": str(root_directory),
        "socket": str(tmp_path / "fw.sock"),
    }


def mode(path: str) -> int | None:
    """Permissions of what is at `path`, None if nothing is."""
    return Path(path).stat().st_mode & 0o777 if Path(path).exists() else None


@contextlib.asynccontextmanager
async def started(request: dict | bytes, **options) -> AsyncIterator[tuple[asyncio.subprocess.Process, dict]]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "jindiskd.sim.process",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        **options,
    )
    try:
        process.stdin.write(request if isinstance(request, bytes) else json.dumps(request).encode() + b"\n")
        async with asyncio.timeout(20):
            yield process, json.loads(await process.stdout.readline())
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def ask(path: str, request: bytes, *, end: bool = False) -> tuple[int, bytes, bytes]:
    reader, writer = await asyncio.open_unix_connection(path)
    try:
        writer.write(request)
        if end:
            writer.write_eof()
        async with asyncio.timeout(10):
            reply = await reader.read()
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
    status, length = struct.unpack_from("<II", reply)
    report = reply[8 : 8 + length]
    (size,) = struct.unpack_from("<I", reply, 8 + length)
    table = reply[12 + length :]
    assert len(table) == size
    return status, report, table


async def test_a_report_over_the_socket(request_line, root):
    """The digest is computed from the files, the report verifies for the data asked for, and closing stdin ends it."""
    async with started(request_line) as (process, ready):
        inputs = LaunchInputs(
            **{name: Path(request_line[name]) for name in ("firmware", "kernel", "initrd")},
            **{name: request_line[name] for name in ("cmdline", "vcpus", "cpu_model")},
        )
        assert ready["simulated"] is True
        assert snp_launch_digest(inputs).hex() == ready["launch_digest"]
        assert mode(request_line["socket"]) == 0o600
        ids = set()
        for _ in range(2):
            status, report, table = await ask(request_line["socket"], b"JSIM" + struct.pack("<I", 1) + DATA)
            assert status == 0
            verified = SnpVerifier(roots=root.roots).verify(
                report, table_certificates(table)[0], report_data=DATA, now=NOW
            )
            assert ready["launch_digest"] == verified.report.measurement.hex()
            assert ready["chip_id"] == verified.report.chip_id.hex()
            ids.add(verified.report.report_id)
        assert len(ids) == 1
        process.stdin.close()
        assert await process.wait() == 0
    assert mode(request_line["socket"]) is None


async def test_hostile_guests(request_line):
    """Wrong, short and excessive requests get a status, and the next honest one a report."""
    good = b"JSIM" + struct.pack("<I", 1) + DATA
    async with started(request_line) as (process, _ready):
        path = request_line["socket"]
        assert await ask(path, b"XSIM" + good[4:]) == (1, b"", b"")
        assert await ask(path, b"JSIM" + struct.pack("<I", 2) + DATA) == (2, b"", b"")
        assert await ask(path, good[:30], end=True) == (1, b"", b"")
        assert await ask(path, b"", end=True) == (1, b"", b"")
        with contextlib.ExitStack() as idle:
            for _ in range(8):
                quiet = idle.enter_context(socket.socket(socket.AF_UNIX))
                quiet.connect(path)
            assert await ask(path, good) == (3, b"", b"")
        for _ in range(500):
            status, _report, _table = await ask(path, good)
            if status == 0:
                break
        assert status == 0
        process.send_signal(signal.SIGTERM)
        assert await process.wait() == 0


async def test_idle_guests_are_dropped(request_line):
    """A guest that connects and says nothing is dropped after five seconds."""
    async with started(request_line):
        reader, writer = await asyncio.open_unix_connection(request_line["socket"])
        begun = asyncio.get_running_loop().time()
        with contextlib.suppress(ConnectionResetError):
            assert await reader.read() == b""
        assert 4.5 < asyncio.get_running_loop().time() - begun < 8
        writer.close()


async def test_inherited_socket(request_line, tmp_path):
    """A socket that the parent already listens on is served, and left in place at the end."""
    path = str(tmp_path / "own.sock")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listening:
        listening.bind(path)
        listening.listen()
        request = {**request_line, "socket": None, "listen_fd": listening.fileno()}
        async with started(request, pass_fds=[listening.fileno()]) as (process, ready):
            assert ready["ready"]
            assert (await ask(path, b"JSIM" + struct.pack("<I", 1) + DATA))[0] == 0
            process.send_signal(signal.SIGTERM)
            assert await process.wait() == 0
    assert mode(path) is not None


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"firmware": "/nonexistent"}, "NotFound"),
        ({"cpu_model": "host-passthrough"}, "UnknownCpuModel"),
        ({"firmware": os.fspath(Path(shutil.which("sh")).resolve())}, "FirmwareUnsuitable"),
        ({"socket": None}, "InvalidArgument"),
        ({"socket": "/nonexistent/x"}, "InvalidArgument"),
        ({"listen_fd": 0}, "InvalidArgument"),
        ({"socket": None, "listen_fd": 0}, "InvalidArgument"),
        ({"surprise": 1}, "MalformedDocument"),
    ],
)
async def test_refused_requests(request_line, changes, code):
    """A request that cannot be met is answered with its error's code, text and exit code."""
    async with started({**request_line, **changes}) as (process, said):
        assert code == said["error"]
        assert said["message"]
        assert 0 < await process.wait() < 64


async def test_no_request():
    """A line that is no document, or too long, ends it with an error."""
    for line in (b"\n", b"{" * 100000 + b"\n"):
        async with started(line) as (process, said):
            assert said["error"] in {"MalformedDocument", "InvalidArgument"}
            assert 0 < await process.wait() < 64
