"""HTTP as guests may use it: one server object a connection, bodies bounded in size and time, answers of the protocol.

Section 9 of the protocol: every error is status 401 with a type, but for paths that do not exist.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

from aiohttp import web

from jindiskd.kbs.messages import COOKIE, ERROR_TYPE, MalformedMessage

BODY_TIME_S = 20.0
IDLE_S = 30.0
LINGER_S = 2.0
MAX_LINE_BYTES = 4096
SMALL_BODY_BYTES = 16 << 10
"""Of everything but evidence and what administrators send: anybody may send it, so it must cost little to read."""
Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]

# What a guest sends can make the HTTP library log; a hostile one must not fill the journal.
_QUIET = logging.getLogger("jindiskd.broker.http")
_QUIET.setLevel(logging.CRITICAL)


class Refusal(Exception):
    """An answer of the protocol that is not 200. `detail` tells a guest only what it knows itself."""

    def __init__(self, kind: str, detail: str, status: int = 401) -> None:
        """`kind` is the last part of the error's type."""
        super().__init__(detail)
        self.kind, self.detail, self.status = kind, detail, status


class Connection(web.Server):
    """The HTTP server of one connection; a protocol factory for asyncio."""

    def __init__(self, handler: Handler) -> None:
        """`handler` answers each request."""
        super().__init__(
            handler,
            access_log=None,
            logger=_QUIET,
            keepalive_timeout=IDLE_S,
            lingering_time=LINGER_S,
            max_line_size=MAX_LINE_BYTES,
            auto_decompress=False,  # a small body must not become a large one
        )
        self.lost = asyncio.Event()

    def connection_lost(self, handler: web.RequestHandler, exc: BaseException | None = None) -> None:
        """The transport is closed."""
        super().connection_lost(handler, exc)
        self.lost.set()


async def body_of(request: web.BaseRequest, limit: int = SMALL_BODY_BYTES) -> bytes:
    """The whole body, plain; no more than `limit` bytes of it are ever kept.

    Raises:
        MalformedMessage: too long, too slow, or encoded.
    """
    if (request.content_length or 0) > limit or "Content-Encoding" in request.headers:
        raise MalformedMessage("the body", f"longer than {limit} bytes, or encoded")
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_TIME_S):
            async for part in request.content.iter_any():
                body += part
                if len(body) > limit:
                    raise MalformedMessage("the body", f"longer than {limit} bytes")
    except TimeoutError as exc:
        raise MalformedMessage("the body", f"it did not arrive within {BODY_TIME_S:g} s") from exc
    return bytes(body)


def answer(body: object) -> web.Response:
    """200 with JSON."""
    return web.Response(text=json.dumps(body), content_type="application/json")


def with_cookie(response: web.Response, name: str, lifetime_s: float) -> web.Response:
    """Add the session's cookie as the reference writes it: a date and no path, so the default path is the prefix."""
    expires = format_datetime(datetime.now(UTC) + timedelta(seconds=lifetime_s), usegmt=True)
    response.headers["Set-Cookie"] = f"{COOKIE}={name}; Expires={expires}"
    return response


def error(kind: str, detail: str, status: int = 401) -> web.Response:
    """An error of the protocol."""
    body = json.dumps({"type": ERROR_TYPE + kind, "detail": detail})
    return web.Response(status=status, text=body, content_type="application/json")
