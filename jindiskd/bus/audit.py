"""The audit log on the bus: pages of it, its check, and the news that it grew."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Sequence
from datetime import UTC, datetime

from jindiskd.bus.collection import Follower
from jindiskd.bus.contract import ROOT_PATH
from jindiskd.bus.jobs import job_path
from jindiskd.bus.objects import Object, ObjectPath, Options, Row, number, text
from jindiskd.bus.peers import Caller
from jindiskd.bus.ports import Audit, AuditOrder
from jindiskd.bus.server import Server
from jindiskd.errors import InvalidArgument
from jindiskd.jobs.job import Job, Operation
from jindiskd.jobs.manager import JobManager

AUDIT_PATH = ObjectPath(f"{ROOT_PATH}/audit")
ROWS_DEFAULT, ROWS_LIMIT = 100, 1000
PAGE_BYTES = 1 << 20
"""About as much as one answer carries: guests decide how long their findings are."""
NAME_LIMIT = 128
GUEST = re.compile(r"[0-9A-Fa-f-]{1,128}")
VERDICTS = ("released", "refused", "waiting")
EXPLAINED_AT_ONCE = 2
"""Each takes a processor for a while."""
LATEST = 253_402_300_799_000_000
"""The end of the year 9999, microseconds: the last moment that a row can have."""


class AuditObject(Object, spec="org.jindisk1.Audit"):
    """The log."""

    def __init__(self, audit: Audit, jobs: JobManager) -> None:
        self._audit, self._jobs = audit, jobs
        self._last = 0
        self._explaining = asyncio.Semaphore(EXPLAINED_AT_ONCE)

    def _reached(self, last: int) -> None:
        """Tell of a newest row, if it is one."""
        if last > self._last:
            self._last = last
            self.signal("Appended", last)

    async def list(self, caller: Caller, options: Options) -> tuple[Sequence[Row], bool]:  # noqa: ARG002 (the contract)
        """A page of it."""
        order = audit_order(options)
        rows, more = await self._audit.rows(order)
        kept = bounded(rows, forward=order.after is not None)
        return kept, more or len(kept) < len(rows)

    async def verify(self, caller: Caller, options: Options) -> ObjectPath:  # noqa: ARG002 (as above)
        """Check its chain."""
        job = self._jobs.start(Operation.AUDIT_VERIFY, ["audit"], caller.uid, self._audit.verify)
        return job_path(job.number)

    async def explain(self, caller: Caller, options: Options) -> ObjectPath:
        """Say why a guest was refused."""
        image, domain = bounded_name(options, "image"), bounded_name(options, "domain")
        row = number(options, "row")

        async def work(job: Job) -> str:
            job.progress("waiting")
            async with self._explaining:
                return await self._audit.explain(image_id=image or None, domain=domain or None, row=row, job=job)

        job = self._jobs.start(Operation.REFUSAL_EXPLAIN, [image or domain or "refusal"], caller.uid, work)
        return job_path(job.number)

    @property
    def last(self) -> int:
        """Where it ends."""
        return self._last


class AuditOnBus:
    """Keeps the log's object, and tells when it grew. `subscribe` has a function called when it may have."""

    def __init__(
        self, server: Server, audit: Audit, jobs: JobManager, subscribe: Callable[[Callable[[], None]], None]
    ) -> None:
        self._server, self._audit, self._subscribe = server, audit, subscribe
        self._object = AuditObject(audit, jobs)
        self._follower = Follower(self._look, "the end of the audit log")

    async def start(self) -> None:
        """Export it, and follow it from now on."""
        self._subscribe(self._follower.news)
        await self._look()
        self._server.export(AUDIT_PATH, self._object)
        self._follower.start()

    async def close(self) -> None:
        """Follow it no longer."""
        await self._follower.close()

    async def _look(self) -> None:
        self._object._reached(await self._audit.last())  # noqa: SLF001 (one thing in two classes)


def bounded(rows: Sequence[Row], *, forward: bool) -> Sequence[Row]:
    """As many of a page's rows as one message should carry, at least one, without a gap to where the page began."""
    kept: list[Row] = []
    size = 0
    for row in rows if forward else reversed(rows):
        size += sum(len(key) + len(str(value)) for key, value in row.items())
        if kept and size > PAGE_BYTES:
            break
        kept.append(row)
    return kept if forward else kept[::-1]


def bounded_name(options: Options, name: str) -> str:
    """An option that names something; raises `InvalidArgument` where it is too long to name anything."""
    value = text(options, name)
    if len(value) > NAME_LIMIT:
        raise InvalidArgument(name, value[:100], f"it has {NAME_LIMIT} characters at most")
    return value


def audit_order(options: Options) -> AuditOrder:
    """The options of List as a value.

    Raises:
        InvalidArgument: one is out of its range.
    """
    limit = number(options, "limit")
    limit = ROWS_DEFAULT if limit is None else limit
    if not 1 <= limit <= ROWS_LIMIT:
        raise InvalidArgument("limit", limit, f"give 1 to {ROWS_LIMIT}, and read on by after or before")
    guest, verdict = text(options, "guest"), text(options, "verdict")
    if guest and not GUEST.fullmatch(guest):
        raise InvalidArgument("guest", guest[:100], "give the UUID of a domain, or a REPORT_ID in hexadecimal")
    if verdict and verdict not in VERDICTS:
        raise InvalidArgument("verdict", verdict[:100], f"it is one of {', '.join(VERDICTS)}")
    after, before = number(options, "after"), number(options, "before")
    for name, value in (("after", after), ("before", before)):
        if value is not None and value >= 1 << 63:
            raise InvalidArgument(name, value, "give the number of a row")
    return AuditOrder(
        limit=limit,
        after=after,
        before=before,
        image_id=bounded_name(options, "image") or None,
        guest=guest.lower(),
        verdict=verdict,
        since=_moment(options, "since"),
        until=_moment(options, "until"),
    )


def _moment(options: Options, name: str) -> datetime | None:
    value = number(options, name)
    if value is None:
        return None
    if value > LATEST:
        raise InvalidArgument(name, value, "give microseconds since 1970-01-01 UTC, until the year 9999")
    return datetime.fromtimestamp(value // 1_000_000, tz=UTC).replace(microsecond=value % 1_000_000)
