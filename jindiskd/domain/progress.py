"""What a guest says of its boot: fixed words over vsock port 19014. Hostile: bounded, and believed for display only."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
from collections.abc import Callable
from pathlib import Path

MAX_LINE_BYTES = 64
MAX_LINES = 32
MAX_CONNECTIONS = 4
IDLE_S = 300.0
BURST, WORDS_PER_S = 64, 0.5
"""So many words are heard at once, and in the long run so many a second: each may be a line of the journal, and a
signal to all who watch. A boot has seven at most."""
_WORD = re.compile(rb"(boot|report|attested|key|unlocked|running|fail (E\d\d))")


class ProgressListener:
    """Listens on one domain's socket; `heard(word)` runs in the event loop for each known line."""

    def __init__(self, path: Path, heard: Callable[[str], None]) -> None:
        """Listen nowhere yet."""
        self._path, self._heard = path, heard
        self._next_s = float("-inf")
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Listen; a socket left there is replaced."""
        self._path.unlink(missing_ok=True)
        self._server = await asyncio.start_unix_server(self._connected, os.fspath(self._path), limit=MAX_LINE_BYTES)
        self._path.chmod(0o600)

    async def close(self) -> None:
        """Stop listening, and hang up on whoever is connected."""
        if self._server is not None:
            self._server.close()
            self._path.unlink(missing_ok=True)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.get_running_loop().create_task(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _wait_s(self) -> float:
        """Count one word; how long it must wait. Nothing is lost: whoever talks without end waits."""
        now = asyncio.get_running_loop().time()
        self._next_s = max(self._next_s, now - BURST / WORDS_PER_S) + 1 / WORDS_PER_S
        return max(self._next_s - now, 0.0)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            if len(self._tasks) > MAX_CONNECTIONS:
                return
            for _ in range(MAX_LINES):
                async with asyncio.timeout(IDLE_S):
                    line = await reader.readuntil(b"\n")
                found = _WORD.fullmatch(line.strip())
                if found is None:
                    return
                await asyncio.sleep(self._wait_s())
                self._heard(found[1].decode())
        except (TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, ConnectionError):
            return
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()
