"""The audit log: append-only rows, each with the digest of the one before, so that what was altered shows.

Whoever can write the database can also write a new chain; compare the last digest with one noted elsewhere.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
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
        query = sa.select(audit_table).order_by(audit_table.c.number.desc()).limit(limit)
        if image_id is not None:
            query = query.where(audit_table.c.image_id == image_id)
        with self._database.read() as connection:
            rows = [dict(row) for row in connection.execute(query).mappings()]
        for row in rows:
            row["detail"] = json.loads(row["detail"])
        return rows[::-1]

    def verify(self) -> tuple[int, str]:
        """Check the whole chain: number of rows and digest of the last.

        Raises:
            AuditBroken: names the first row that does not fit.
        """
        expected, previous = 1, ""
        query = sa.select(audit_table).order_by(audit_table.c.number)
        with self._database.read() as connection:
            for row in connection.execute(query.execution_options(yield_per=1000)).mappings():
                if row["number"] != expected or row["previous"] != previous or row["digest"] != _digest(row):
                    raise AuditBroken(expected)
                expected, previous = expected + 1, row["digest"]
        return expected - 1, previous


def _digest(row: Mapping[Any, Any]) -> str:
    return hashlib.sha256(json.dumps([row[name] for name in CHAINED]).encode()).hexdigest()
