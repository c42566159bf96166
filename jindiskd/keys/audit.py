"""The audit log: append-only rows, each with the digest of the one before, so that what was altered shows.

Whoever can write the database can also write a new chain; compare the last digest with one noted elsewhere.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa

from jindiskd.errors import EXIT_INTEGRITY, JindiskError
from jindiskd.keys.database import Database, audit_table

CHAINED = ("number", "time", "kind", "image_id", "peer", "simulated", "measurement", "detail", "previous")


class AuditBroken(JindiskError, code="AuditBroken", exit_code=EXIT_INTEGRITY):
    """The audit log was altered."""

    def __init__(self, number: int) -> None:
        """`number` of the first row that does not fit."""
        super().__init__(f"the audit log does not fit from row {number} on: rows were changed, added or taken out")


@dataclass(frozen=True, slots=True, kw_only=True)
class Requester:
    """Who asks, as far as transport and evidence show it."""

    peer: str
    """As the transport knows it."""
    measurement: bytes = b""
    """The launch digest, 48 bytes; empty where none was verified."""
    simulated: bool = False
    guest: str = ""
    """The report's REPORT_ID, hexadecimal: one launch of one guest."""
    chip: str = ""
    """The report's CHIP_ID, hexadecimal."""
    token: str = ""
    """Identifier of the attestation token."""

    def named(self) -> dict[str, str]:
        """What goes into a row's detail."""
        return {name: value for name in ("guest", "chip", "token") if (value := getattr(self, name))}


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditQuery:
    """Which rows are wanted; what is None or empty does not matter."""

    limit: int = 100
    """Rows at most."""
    after: int | None = None
    """Rows with a higher number, the lowest of them first; without it the highest numbers are wanted."""
    before: int | None = None
    """Rows with a lower number."""
    image_id: str | None = None
    guest: str = ""
    """UUID of a domain, or the REPORT_ID of one launch of a guest, hexadecimal."""
    kind: str = ""
    since: datetime | None = None
    """Not older; with a zone."""
    until: datetime | None = None
    """Older; with a zone."""

    def conditions(self) -> list[sa.ColumnElement[bool]]:
        """What the rows must meet. Times are stored as RFC 3339 in UTC, which sorts as text."""
        row = audit_table.c
        found: list[sa.ColumnElement[bool]] = []
        if self.after is not None:
            found.append(row.number > self.after)
        if self.before is not None:
            found.append(row.number < self.before)
        if self.image_id is not None:
            found.append(row.image_id == self.image_id)
        if self.kind:
            found.append(row.kind == self.kind)
        if self.guest:
            launch = row.detail.contains(f'"guest": {json.dumps(self.guest)}', autoescape=True)
            found.append(sa.or_(row.peer == f"domain {self.guest}", launch))
        if self.since is not None:
            found.append(row.time >= self.since.astimezone(UTC).isoformat())
        if self.until is not None:
            found.append(row.time < self.until.astimezone(UTC).isoformat())
        return found


class AuditLog:
    """The log in one database."""

    def __init__(self, database: Database) -> None:
        """Read nothing yet."""
        self._database = database

    def append(
        self,
        connection: sa.Connection,
        kind: str,
        image_id: str,
        requester: Requester | None = None,
        detail: Mapping[str, object] | None = None,
    ) -> int:
        """Add a row within the caller's write transaction, with which it stands or falls; returns its number."""
        last = connection.execute(
            sa.select(audit_table.c.number, audit_table.c.digest).order_by(audit_table.c.number.desc()).limit(1)
        ).first()
        who = requester or Requester(peer="")
        row: dict[str, Any] = {
            "number": last.number + 1 if last else 1,
            "time": self._database.now().isoformat(),
            "kind": kind,
            "image_id": image_id,
            "peer": who.peer,
            "simulated": who.simulated,
            "measurement": who.measurement.hex(),
            "detail": json.dumps({**who.named(), **(detail or {})}, sort_keys=True),
            "previous": last.digest if last else "",
        }
        connection.execute(audit_table.insert().values({**row, "digest": _digest(row)}))
        return int(row["number"])

    def rows(self, limit: int, image_id: str | None = None) -> list[dict[str, Any]]:
        """The last `limit` rows, oldest first, with `detail` as a dictionary."""
        return self.page(AuditQuery(limit=limit, image_id=image_id))[0]

    def page(self, query: AuditQuery) -> tuple[list[dict[str, Any]], bool]:
        """Some rows, oldest first, with `detail` as a dictionary; and whether there are more beyond `limit`."""
        forward = query.after is not None
        number = audit_table.c.number
        wanted = sa.select(audit_table).where(*query.conditions()).limit(query.limit + 1)
        with self._database.read() as connection:
            found = connection.execute(wanted.order_by(number if forward else number.desc())).mappings()
            rows = [dict(row) for row in found]
        more = len(rows) > query.limit
        del rows[query.limit :]
        for row in rows:
            row["detail"] = json.loads(row["detail"])
        return (rows if forward else rows[::-1]), more

    def last(self) -> int:
        """Number of the newest row; 0 if there is none."""
        with self._database.read() as connection:
            return int(connection.scalar(sa.select(sa.func.max(audit_table.c.number))) or 0)

    def verify(self, progress: Callable[[int], None] = lambda _rows: None) -> tuple[int, str]:
        """Check the whole chain: number of rows and digest of the last.

        Args:
            progress: told the number of rows checked, every thousand; what it raises ends the check.

        Raises:
            AuditBroken: names the first row that does not fit.
        """
        expected, previous = 1, ""
        query = sa.select(audit_table).order_by(audit_table.c.number)
        with self._database.read() as connection:
            for row in connection.execute(query.execution_options(yield_per=1000)).mappings():
                if row["number"] != expected or row["previous"] != previous or row["digest"] != _digest(row):
                    raise AuditBroken(expected)
                if not expected % 1000:
                    progress(expected)
                expected, previous = expected + 1, row["digest"]
        return expected - 1, previous


def _digest(row: Mapping[Any, Any]) -> str:
    return hashlib.sha256(json.dumps([row[name] for name in CHAINED]).encode()).hexdigest()
