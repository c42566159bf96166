"""Sessions in the database, so that several brokers answer for one another: a guest's next request may reach another.

The nonce of a session is used up by one `UPDATE` that only one broker can win. What was verified is stored as the
report itself and what the verifier said of it; the database is the brokers' own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa

from jindiskd.attest.kept import Kept, Verified, keep, restore
from jindiskd.base import document
from jindiskd.base.platform import Tee
from jindiskd.broker.peer import BrokerLimits
from jindiskd.broker.sessions import Session, Stage, TooManySessions, draw
from jindiskd.broker.sev import HeldLaunch
from jindiskd.kbs.messages import VERSION
from jindiskd.keys.database import Database, sessions_table


class DatabaseSessions:
    """The sessions of all brokers on one database; limits are counted over all of them. Times are the wall clock's."""

    blocking = True

    def __init__(self, database: Database, limits: BrokerLimits) -> None:
        """Read nothing yet."""
        self._database, self._limits = database, limits

    def _now(self) -> float:
        return self._database.now().timestamp()

    def new(
        self, peer: str, tee: Tee = Tee.SNP, version: str = VERSION, launch: HeldLaunch | None = None
    ) -> tuple[str, Session]:
        """Begin a session; returns its name too. Raises `TooManySessions`."""
        table, now = sessions_table, self._now()
        life_s = self._limits.session_lifetime_s if launch is None else self._limits.launch_lifetime_s
        name, session = draw(peer, now + life_s, tee, version, launch)
        counts = sa.select(
            sa.func.count(), sa.func.coalesce(sa.func.sum(sa.case((table.c.peer == peer, 1), else_=0)), 0)
        )
        with self._database.write() as connection:
            connection.execute(table.delete().where(table.c.expires <= now))
            total, mine = connection.execute(counts).one()
            if total >= self._limits.sessions or mine >= self._limits.sessions_per_peer:
                raise TooManySessions(peer)
            if launch is not None and self._launches(connection, peer) >= self._limits.launches_per_peer:
                raise TooManySessions(peer)
            connection.execute(
                table.insert().values(
                    session_id=session.session_id,
                    peer=peer,
                    nonce=session.nonce,
                    stage=session.stage.value,
                    expires=session.expires,
                    asked=0,
                    tee_pubkey={},
                    facts={"tee": tee.value, "version": version, "launch": document.to_plain(launch)},
                    report=b"",
                )
            )
        return name, session

    @staticmethod
    def _launches(connection: sa.Connection, peer: str) -> int:
        table = sessions_table
        kinds = [Tee.SEV.value, Tee.SEV_ES.value]
        query = sa.select(sa.func.count()).where(table.c.peer == peer, table.c.facts["tee"].as_string().in_(kinds))
        return int(connection.scalar(query) or 0)

    def renew(self, session: Session) -> None:
        """Let a launch that was spent be asked for again, for as long as a new one."""
        values = {"stage": Stage.CHALLENGED.value, "expires": self._now() + self._limits.launch_lifetime_s}
        self._update(session, values, sessions_table.c.stage == Stage.SPENT.value)

    def find(self, session_id: str, peer: str) -> Session | None:
        """The living session of that id, if this peer began it."""
        table = sessions_table
        mine = (table.c.session_id == session_id, table.c.peer == peer, table.c.expires > self._now())
        with self._database.read() as connection:
            row = connection.execute(sa.select(table).where(*mine)).mappings().first()
        return _session(row) if row is not None else None

    def spend(self, session: Session) -> bool:
        """Use up the nonce; False where it was used before."""
        return self._update(session, {"stage": Stage.SPENT.value}, sessions_table.c.stage == Stage.CHALLENGED.value)

    def verify(self, session: Session, tee_pubkey: dict[str, str], verified: Verified) -> None:
        """The evidence was good."""
        kept = keep(verified)
        values = {
            "tee_pubkey": tee_pubkey,
            "facts": {"tee": kept.tee.value, "verified": dict(kept.facts)},
            "report": kept.blob,
        }
        self._update(session, {"stage": Stage.VERIFIED.value, **values})

    def ask(self, session: Session) -> bool:
        """Count one request of an attested session; False where it may not ask, or no more."""
        table = sessions_table
        allowed = (table.c.stage == Stage.VERIFIED.value, table.c.asked < self._limits.asks_per_session)
        return self._update(session, {"asked": table.c.asked + 1}, *allowed)

    def end(self, session: Session) -> None:
        """Nothing more comes of this session; it counts against the limits until its life is over.

        What was kept of it goes now: with the keys of a launch, whoever has them open later could open what the host
        was given.
        """
        facts = {"tee": session.tee.value, "version": session.version}
        self._update(session, {"stage": Stage.ENDED.value, "tee_pubkey": {}, "facts": facts, "report": b""})

    def count(self) -> int:
        """Living sessions."""
        query = sa.select(sa.func.count()).select_from(sessions_table).where(sessions_table.c.expires > self._now())
        with self._database.read() as connection:
            return int(connection.scalar(query) or 0)

    def _update(self, session: Session, values: Mapping[str, Any], *conditions: sa.ColumnElement[bool]) -> bool:
        one = sessions_table.c.session_id == session.session_id
        # A row's own lock decides between brokers here; the audit log's lock is not needed.
        with self._database.alone() as connection:
            return bool(connection.execute(sessions_table.update().where(one, *conditions).values(values)).rowcount)


def _session(row: Mapping[Any, Any]) -> Session:
    verified = None
    tee = Tee(row["facts"]["tee"])
    if row["stage"] == Stage.VERIFIED.value:
        verified = restore(Kept(tee=tee, blob=bytes(row["report"]), facts=row["facts"]["verified"]))
    launch = row["facts"].get("launch")
    return Session(
        session_id=row["session_id"],
        peer=row["peer"],
        nonce=row["nonce"],
        expires=row["expires"],
        tee=tee,
        version=row["facts"].get("version", VERSION),
        stage=Stage(row["stage"]),
        asked=row["asked"],
        tee_pubkey=row["tee_pubkey"],
        verified=verified,
        launch=HeldLaunch(**{**launch, "wrapped": bytes.fromhex(launch["wrapped"])}) if launch else None,
    )
