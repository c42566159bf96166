"""What a hostile guest can say: progress words and console output are bounded and believed for display only."""

from __future__ import annotations

import asyncio
import random

import pytest

from jindiskd.domain import console, progress
from jindiskd.domain.connection import sentence
from jindiskd.domain.progress import MAX_CONNECTIONS, MAX_LINES, ProgressListener


@pytest.fixture
async def port(tmp_path):
    heard: list[str] = []
    listener = ProgressListener(tmp_path / "port", heard.append)
    await listener.start()
    yield tmp_path / "port", heard
    await listener.close()


async def talk(path, data: bytes) -> None:
    """Send, and wait until the listener hangs up."""
    reader, writer = await asyncio.open_unix_connection(path)
    try:
        writer.write(data)
        writer.write_eof()
        async with asyncio.timeout(60):
            assert await reader.read() == b""
    except ConnectionError:
        pass
    finally:
        writer.close()


async def test_known_words_are_heard(port) -> None:
    """All of them, in order, also over several connections."""
    path, heard = port
    await talk(path, b"boot\nreport\nattested\nkey\nunlocked\n")
    await talk(path, b"running\nfail E41\n")
    assert heard == ["boot", "report", "attested", "key", "unlocked", "running", "fail E41"]


@pytest.mark.parametrize(
    "data", [b"x" * 100000, b"Boot\n", b"boot", b"fail E4\n", b"\0\n", b"boot\x1b[2J\n", b"\xff\n"]
)
async def test_anything_else_ends_the_connection(port, data) -> None:
    """Unheard."""
    path, heard = port
    await talk(path, data)
    assert heard == []


async def test_closing_hangs_up(tmp_path) -> None:
    """Nobody speaks on for a machine that is off."""
    heard: list[str] = []
    told = asyncio.Event()

    def hear(word: str) -> None:
        heard.append(word)
        told.set()

    listener = ProgressListener(tmp_path / "port", hear)
    await listener.start()
    streams = [await asyncio.open_unix_connection(tmp_path / "port") for _ in range(MAX_CONNECTIONS)]
    streams[0][1].write(b"boot\n")
    async with asyncio.timeout(60):
        await told.wait()
        await listener.close()
        for reader, writer in streams:
            assert await reader.read() == b""
            writer.close()
    assert heard == ["boot"]


async def test_lines_and_connections_are_bounded(port) -> None:
    """A guest cannot keep the host busy."""
    path, heard = port
    await talk(path, b"boot\n" * 10000)
    assert len(heard) == MAX_LINES
    held = [await asyncio.open_unix_connection(path) for _ in range(MAX_CONNECTIONS)]
    await talk(path, b"boot\n")
    assert len(heard) == MAX_LINES
    for _, writer in held:
        writer.close()


async def test_words_without_end_are_heard_slowly(port, monkeypatch: pytest.MonkeyPatch) -> None:
    """A guest that goes through all states again and again fills no journal; over several connections neither."""
    monkeypatch.setattr(progress, "WORDS_PER_S", 1e-9)
    path, heard = port
    for _ in range(progress.BURST // MAX_LINES):
        await talk(path, b"boot\n" * MAX_LINES)
    waiting = [await asyncio.open_unix_connection(path) for _ in range(2)]
    for _, writer in waiting:
        writer.write(b"running\n" * MAX_LINES)
        await writer.drain()
    await talk(path, b"nonsense\n")  # the others were read before
    assert heard == ["boot"] * progress.BURST
    for _, writer in waiting:
        writer.close()


async def test_noise(port) -> None:
    """Random bytes from many connections never disturb the listener."""
    path, heard = port
    noise = random.Random(7)
    for _ in range(50):
        await talk(path, noise.randbytes(noise.randrange(300)))
    heard.clear()
    await talk(path, b"boot\n")
    assert heard == ["boot"]


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (b"", ""),
        (b"all is well\n", ""),
        (b"x\r\njindisk: E41\r\n", "header"),
        (b"jindisk: E77\n", "not known"),
        (b"[    1.0] Kernel panic - not syncing: VFS: Unable to mount root fs\r\n", "VFS: Unable to mount root fs"),
        (b"Kernel panic - not syncing: a\x1b[31mb\n", "stopped: a"),
        (b"jindisk: E41\n" + bytes(1 << 20), ""),
    ],
)
def test_the_console_is_read_from_its_end(tmp_path, written, expected) -> None:
    """Fixed codes and a panic's printable words; escapes never reach the terminal."""
    (tmp_path / "log").write_bytes(written)
    found = console.diagnose(tmp_path / "log")
    assert expected in found if expected else not found
    assert found.isprintable()


def test_libvirts_message_without_the_noise() -> None:
    """QEMU warns first and then says what is wrong; that must survive the limit."""
    noise = "".join(
        f"2026-01-01T00:00:00.{i:06}Z qemu-system-x86_64: warning: TCG doesn't support requested feature: {i}\n"
        for i in range(50)
    )
    message = f"internal error: process exited while connecting to monitor: {noise}qemu: could not load kernel\n"
    assert "could not load kernel" in sentence(message)
    assert "TCG" not in sentence(message)
    assert len(sentence("x" * 5000)) <= 600
