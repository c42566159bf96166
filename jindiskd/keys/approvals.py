"""Guests that wait until a person approves the release: where the image's rules ask for it.

An approval is for one launch of one guest (its REPORT_ID) and counts for a short while, in which the guest may ask
again, since an answer can be lost. Waiting ends by itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import sqlalchemy as sa

from jindiskd.errors import NotFound
from jindiskd.keys.audit import AuditLog, Requester
from jindiskd.keys.database import Database, approvals_table

LIFE_S = 900.0
MOST_WAITING = 64
NOT_RECORDED = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Approval:
    """One guest that waits, or was approved."""

    number: int
    image_id: str
    guest: str
    peer: str
    measurement: str
    simulated: bool
    granted: bool
    expires: float
    """Seconds since the epoch."""


class Approvals:
    """The approvals in one database."""

    def __init__(self, database: Database, audit: AuditLog) -> None:
        """Read nothing yet."""
        self._database, self._audit = database, audit

    def needed(self, connection: sa.Connection, image_id: str, requester: Requester) -> int | None:
        """None where this guest is approved, else the number of what it waits for; in a write transaction.

        `NOT_RECORDED` where so many guests of the image wait already that this one is not put on the list.
        """
        table, now = approvals_table, self._database.now().timestamp()
        connection.execute(table.delete().where(table.c.expires <= now))
        mine = (table.c.image_id == image_id, table.c.guest == requester.guest)
        row = connection.execute(sa.select(table.c.number, table.c.granted).where(*mine)).first()
        if row is not None:
            return None if row.granted else int(row.number)
        waiting = connection.scalar(sa.select(sa.func.count()).where(table.c.image_id == image_id)) or 0
        if waiting >= MOST_WAITING:
            return NOT_RECORDED
        # The audit row's number is never used again, unlike that of a row which was deleted.
        number = self._audit.append(connection, "waiting", image_id, requester)
        connection.execute(
            table.insert().values(
                number=number,
                image_id=image_id,
                guest=requester.guest,
                peer=requester.peer,
                measurement=requester.measurement.hex(),
                simulated=requester.simulated,
                granted=False,
                expires=now + LIFE_S,
            )
        )
        return number

    def list(self) -> list[Approval]:
        """All that wait or still count, oldest first."""
        table, now = approvals_table, self._database.now().timestamp()
        query = sa.select(table).where(table.c.expires > now).order_by(table.c.number)
        with self._database.read() as connection:
            return [Approval(**row) for row in connection.execute(query).mappings()]

    def grant(self, number: int, by: Requester | None = None) -> None:
        """Approve one.

        Raises:
            NotFound: it does not wait, or no longer.
        """
        self._decide(number, by, granted=True)

    def deny(self, number: int, by: Requester | None = None) -> None:
        """Take one off the list; the guest may ask again, and waits again. Raises as `grant`."""
        self._decide(number, by, granted=False)

    def _decide(self, number: int, by: Requester | None, *, granted: bool) -> None:
        table, one = approvals_table, approvals_table.c.number == number
        with self._database.write() as connection:
            now = self._database.now().timestamp()  # after the wait for the transaction: it may have taken long
            query = sa.select(table.c.image_id, table.c.guest).where(one, table.c.expires > now)
            row = connection.execute(query).first()
            if row is None:
                raise NotFound("approval", str(number))
            if granted:
                connection.execute(table.update().where(one).values(granted=True, expires=now + LIFE_S))
            else:
                connection.execute(table.delete().where(one))
            detail = {"approval": number, "guest": row.guest}
            self._audit.append(connection, "approved" if granted else "not approved", row.image_id, by, detail)

    @staticmethod
    def forget(connection: sa.Connection, image_id: str) -> None:
        """Drop those of an image, within the caller's write transaction."""
        connection.execute(approvals_table.delete().where(approvals_table.c.image_id == image_id))
