"""What `jindiskctl monitor` knows of the service while it watches: its objects, kept by signals; and what is news.

The service may come and go. While it is away nothing is known; when it is back everything is read again.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from jindiskd.bus.contract import ROOT_PATH
from jindiskd.cli.approval import APPROVAL
from jindiskd.cli.audit import after, page
from jindiskd.cli.client import AUDIT_PATH, Client, RemoteError
from jindiskd.cli.domain import DOMAIN
from jindiskd.cli.jobs import JOB
from jindiskd.cli.objects import MANAGER
from jindiskd.errors import EXIT_NOT_AUTHORIZED, EXIT_NOT_FOUND, ServiceUnavailable

KINDS = {DOMAIN: "domain", JOB: "job", APPROVAL: "approval"}


@dataclass(frozen=True, slots=True, kw_only=True)
class News:
    """One thing that happened, or, when watching begins, one thing that is there."""

    event: str
    """`service`, `domain`, `job`, `approval`, `log` (a line of a job) or `decision` (a row of the audit log)."""
    action: str
    """`present`, `added`, `changed`, `removed`; of a service `up` or `down`."""
    data: dict[str, Any] = field(default_factory=dict)
    """All that is known of the thing."""
    changed: tuple[str, ...] = ()
    """Names of the properties that changed."""
    at: datetime = field(default_factory=lambda: datetime.now(UTC))


class Watched:
    """The service as it is known now. Follow it by `news`."""

    def __init__(self, client: Client, *, rows: int) -> None:
        """`rows` of the audit log are told of when watching begins, if it may be read."""
        self._client, self._rows = client, rows
        self.up = False
        self.service: dict[str, Any] = {}
        self.domains: dict[str, dict[str, Any]] = {}
        self.jobs: dict[str, dict[str, Any]] = {}
        self.approvals: dict[str, dict[str, Any]] = {}
        self.may_read_log = True
        self._last: int | None = None

    def _things(self, kind: str) -> dict[str, dict[str, Any]]:
        return {DOMAIN: self.domains, JOB: self.jobs, APPROVAL: self.approvals}[kind]

    async def news(self) -> AsyncIterator[News]:
        """Everything, as it happens; begins with what is there. Ends with an error when the bus itself ends.

        Raises:
            ServiceUnavailable: the bus is gone.
        """
        await self._client.subscribe()
        async for item in self._read():
            yield item
        self._client.auto_start = False  # whoever stops the service wants it stopped
        signals = self._client.news()
        gone = asyncio.ensure_future(self._client.ended())
        try:
            while True:
                following = asyncio.ensure_future(anext(signals))
                await asyncio.wait({following, gone}, return_when=asyncio.FIRST_COMPLETED)
                if not following.done():
                    following.cancel()
                    raise ServiceUnavailable("the D-Bus message bus", "it has ended; start dbus.service")
                path, member, body = following.result()
                async for item in self._heard(path, member, body):
                    yield item
        finally:
            gone.cancel()

    async def _heard(self, path: str, member: str, body: list[Any]) -> AsyncIterator[News]:
        if not path:  # the name has another owner, or none
            if self.up:
                yield self._lost()
            if body[2]:
                async for item in self._read():
                    yield item
        elif self.up and path == AUDIT_PATH and member == "Appended":
            for row in await self._grown():
                yield News(event="decision", action="added", data=row)
        elif self.up and (told := self._told(path, member, body)) is not None:
            yield told

    def _told(self, path: str, member: str, body: list[Any]) -> News | None:
        """What a signal of or about a domain, a job or an approval means."""
        if path == ROOT_PATH and member == "InterfacesAdded":
            for kind in KINDS.keys() & body[1].keys():
                known = body[0] in self._things(kind)  # it was there when everything was read
                self._things(kind)[body[0]] = body[1][kind]
                return None if known else News(event=KINDS[kind], action="added", data=dict(body[1][kind]))
        elif path == ROOT_PATH and member == "InterfacesRemoved":
            for kind in KINDS.keys() & set(body[1]):
                was = self._things(kind).pop(body[0], None)
                return None if was is None else News(event=KINDS[kind], action="removed", data=was)
        elif member == "PropertiesChanged" and body[0] in KINDS and path in self._things(body[0]):
            thing = self._things(body[0])[path]
            thing.update(body[1])
            return News(event=KINDS[body[0]], action="changed", data=dict(thing), changed=tuple(sorted(body[1])))
        elif member == "LogMessage" and path in self.jobs:
            return News(event="log", action="added", data={"Id": self.jobs[path]["Id"], "Line": body[1]})
        return None

    def _lost(self) -> News:
        self.up = False
        for kind in KINDS:
            self._things(kind).clear()
        return News(event="service", action="down", data=self.service)

    async def _read(self) -> AsyncIterator[News]:
        """Read everything; what is missing because the service goes again is told by the next signal."""
        try:
            self.service = await self._client.properties(ROOT_PATH, MANAGER)
            objects = await self._client.managed()
        except ServiceUnavailable:
            yield self._lost()
            return
        except RemoteError as exc:
            if not exc.name.startswith("org.freedesktop.DBus.Error."):
                raise
            return  # it went while it was asked
        for kind in KINDS:
            self._things(kind).clear()
            self._things(kind).update(objects.get(kind, {}))
        again = self._last is not None
        self.up = True
        yield News(event="service", action="up", data=self.service)
        for kind, name in KINDS.items():
            for thing in list(self._things(kind).values()):
                yield News(event=name, action="present", data=dict(thing))
        for row in await (self._grown() if again else self._first_rows()):
            yield News(event="decision", action="added" if again else "present", data=row)

    async def _first_rows(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        with self._permitted():
            # One row is asked for even if none is to be told of: what is new is known by the number of the last.
            rows, _ = await page(self._client, {}, max(self._rows, 1))
            self._last = rows[-1]["number"] if rows else 0
        return rows[-self._rows :] if self._rows else []

    async def _grown(self) -> list[dict[str, Any]]:
        if not self.may_read_log or self._last is None:
            return []
        rows: list[dict[str, Any]] = []
        with self._permitted():
            rows = await after(self._client, {}, self._last)
        if rows:
            self._last = rows[-1]["number"]
        return rows

    @contextlib.contextmanager
    def _permitted(self) -> Iterator[None]:
        """Go without the log where it may not be read, is the owner's, or the service goes while it is asked."""
        try:
            yield
        except RemoteError as exc:
            if exc.exit_code in {EXIT_NOT_AUTHORIZED, EXIT_NOT_FOUND} or exc.code == "NotSupported":
                self.may_read_log = False
            elif not exc.name.startswith("org.freedesktop.DBus.Error."):
                raise
        except ServiceUnavailable:
            pass
