"""The service's end of the libvirt hook: a unix socket that answers each call of the hook with yes or one sentence.

    request   one line of JSON: {"operation", "name", "xml"}; at most `LIMIT_BYTES`
    answer    one line of JSON: {"allow": true} or {"allow": false, "reason": "one sentence"}

libvirt holds the domain's lock while its hook runs, so that nothing here, and nothing it waits for, may call libvirt.
Only root and our own user may connect. The names of operations are libvirt's (hooks page).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import socket
import struct
import xml.etree.ElementTree as ET
from collections.abc import Awaitable, Callable
from pathlib import Path

import structlog

from jindiskd.domain import xml
from jindiskd.domain.binding import UUID
from jindiskd.errors import JindiskError

log = structlog.get_logger(__name__)
LIMIT_BYTES = 2 * xml.MAX_XML_BYTES + 4096
"""A definition in JSON: escapes may double it."""
ANSWER_S = 1.7
"""The hook waits 2 s in all."""
MAX_CONNECTIONS = 32
_OPERATION = re.compile(r"[a-z]{1,32}")

Answer = Callable[[str, str, str, ET.Element], Awaitable[str]]
"""Operation, domain UUID, domain name, its definition; the sentence that refuses it, or an empty one."""


class HookListener:
    """Listens for the hook."""

    def __init__(self, path: Path, answer: Answer) -> None:
        """Listen nowhere yet."""
        self._path, self._answer = path, answer
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Listen; a socket left there is replaced."""
        self._path.unlink(missing_ok=True)
        self._server = await asyncio.start_unix_server(self._accept, os.fspath(self._path), limit=LIMIT_BYTES)
        self._path.chmod(0o600)

    async def close(self) -> None:
        """Stop listening; calls under way are refused by the hook's own deadline."""
        if self._server is not None:
            self._server.close()
            self._path.unlink(missing_ok=True)
        for task in list(self._open):
            task.cancel()
        await asyncio.gather(*self._open, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._open.add(task)
        try:
            if len(self._open) <= MAX_CONNECTIONS and _trusted(writer):
                reason = await self._serve(reader)
                reply = {"allow": not reason, **({"reason": reason} if reason else {})}
                writer.write(json.dumps(reply).encode() + b"\n")
                await writer.drain()
        except (TimeoutError, ValueError, LookupError, TypeError, asyncio.IncompleteReadError, ConnectionError) as exc:
            log.warning("a call of the libvirt hook was not understood", problem=type(exc).__name__)
        finally:
            self._open.discard(task)
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader) -> str:
        async with asyncio.timeout(ANSWER_S):
            line = await reader.readuntil(b"\n")
        call = json.loads(line)
        operation, name, text = call["operation"], call["name"], call["xml"]
        if not all(isinstance(word, str) for word in (operation, name, text)) or not _OPERATION.fullmatch(operation):
            raise ValueError("not a call of the hook")
        try:
            root = xml.parse(text)
            identity = root.findtext("uuid", "").strip()
            if not UUID.fullmatch(identity):
                return "its definition has no UUID"
            async with asyncio.timeout(ANSWER_S):
                return await self._answer(operation, identity, name, root)
        except TimeoutError:
            return "the service did not get ready in time; try again, and see its journal if that happens again"
        except JindiskError as exc:
            return str(exc)


def _trusted(writer: asyncio.StreamWriter) -> bool:
    """Whether root or our own user is at the other end."""
    sock: socket.socket = writer.get_extra_info("socket")
    _, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    return uid in {0, os.geteuid()}
