"""What refused guests sent: kept beside the audit log, so that a refusal can be explained, and another policy tried.

The audit row has the findings and the digest of the evidence, for ever; the evidence itself is kept for the newest
refusals only (`KEPT`, and `KEPT_PER_IMAGE` so that one image's guests do not push out another's), since guests decide
how many there are. The table is an addition and makes itself: databases of other releases need not know it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from jindiskd.attest.kept import Kept
from jindiskd.base.platform import Tee
from jindiskd.errors import NotFound
from jindiskd.keys.database import Database, audit_table

KEPT, KEPT_PER_IMAGE = 1000, 100
MAX_EVIDENCE_BYTES = 64 << 10
OWN = sa.MetaData()

refusals_table = sa.Table(
    "refusals",
    OWN,
    sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("image_id", sa.String, nullable=False, index=True),
    sa.Column("peer", sa.String, nullable=False, index=True),
    sa.Column("tee", sa.String, nullable=False),
    sa.Column("facts", sa.JSON, nullable=False),
    sa.Column("evidence", sa.LargeBinary, nullable=False),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredRefusal:
    """One refusal."""

    number: int
    """Of its audit row."""
    time: str
    """RFC 3339, UTC."""
    image_id: str
    """Empty where it was not known which image the guest wanted."""
    peer: str
    simulated: bool
    findings: tuple[tuple[str, str], ...]
    """Id and text."""
    evidence: Kept | None
    """None where none came, or where it is no longer kept."""


class Refusals:
    """The refusals in one database."""

    def __init__(self, database: Database) -> None:
        """Make the table where it is not there yet."""
        self._database = database
        with database.write() as connection:
            OWN.create_all(connection)

    @staticmethod
    def add(connection: sa.Connection, number: int, image_id: str, peer: str, evidence: Kept) -> None:
        """Keep the evidence of an audit row just written, within its transaction, and drop what is too old."""
        table = refusals_table
        if len(evidence.blob) > MAX_EVIDENCE_BYTES:
            return
        connection.execute(
            table.insert().values(
                number=number,
                image_id=image_id,
                peer=peer,
                tee=evidence.tee.value,
                facts=dict(evidence.facts),
                evidence=evidence.blob,
            )
        )
        for limit, condition in ((KEPT, sa.true()), (KEPT_PER_IMAGE, table.c.image_id == image_id)):
            newest = sa.select(table.c.number).where(condition).order_by(table.c.number.desc())
            last = connection.scalar(newest.offset(limit).limit(1))
            if last is not None:
                connection.execute(table.delete().where(condition, table.c.number <= last))

    def find(self, *, number: int | None = None, image_id: str | None = None, peer: str | None = None) -> StoredRefusal:
        """The refusal of an audit row, or the last one of an image, of a peer, or of all.

        Raises:
            NotFound: there is none.
        """
        audit, table = audit_table, refusals_table
        query = sa.select(audit, table.c.tee, table.c.facts, table.c.evidence).where(audit.c.kind == "refused")
        query = query.join_from(audit, table, table.c.number == audit.c.number, isouter=True)
        for column, value in ((audit.c.number, number), (audit.c.image_id, image_id), (audit.c.peer, peer)):
            if value is not None:
                query = query.where(column == value)
        with self._database.read() as connection:
            row = connection.execute(query.order_by(audit.c.number.desc()).limit(1)).mappings().first()
        if row is None:
            raise NotFound("refusal", f"of row {number}" if number is not None else image_id or peer or "any")
        return _refusal(row)


def _refusal(row: Any) -> StoredRefusal:
    told = json.loads(row["detail"]).get("findings", [])
    kept = None
    if row["tee"] is not None:
        kept = Kept(tee=Tee(row["tee"]), blob=bytes(row["evidence"]), facts=row["facts"])
    return StoredRefusal(
        number=row["number"],
        time=row["time"],
        image_id=row["image_id"],
        peer=row["peer"],
        simulated=bool(row["simulated"]),
        findings=tuple((finding["id"], finding["text"]) for finding in told),
        evidence=kept,
    )
