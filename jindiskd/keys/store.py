"""The key store and the audit log: one SQLite database, one transaction a decision.

    images   image_id, name, platform, resource, state, launch digests, wrapped key, created
    audit    number, time, kind, image_id, peer, simulated, measurement, detail (JSON), previous digest, digest

A key leaves by `release` alone, which writes its audit row in the same transaction before the key leaves. Audit rows
are chained: a row's digest covers the digest before it, so a row that was changed or taken out shows.
Calls block; call them in a thread.
"""

from __future__ import annotations

import enum
import hashlib
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa

from jindiskd.base.platform import Platform
from jindiskd.base.secret import Secret
from jindiskd.errors import EXIT_INTEGRITY, EXIT_REFUSED, AlreadyExists, JindiskError, NotFound
from jindiskd.keys import wrap

PURPOSE = "volume key"
_META = sa.MetaData()
_IMAGES = sa.Table(
    "images",
    _META,
    sa.Column("image_id", sa.String, primary_key=True),
    sa.Column("name", sa.String, nullable=False, unique=True),
    sa.Column("platform", sa.String, nullable=False),
    sa.Column("resource", sa.String, nullable=False, unique=True),
    sa.Column("state", sa.String, nullable=False),
    sa.Column("launch_digests", sa.JSON, nullable=False),
    sa.Column("wrapped", sa.LargeBinary, nullable=False),
    sa.Column("created", sa.String, nullable=False),
)
_AUDIT = sa.Table(
    "audit",
    _META,
    sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("time", sa.String, nullable=False),
    sa.Column("kind", sa.String, nullable=False),
    sa.Column("image_id", sa.String, nullable=False),
    sa.Column("peer", sa.String, nullable=False),
    sa.Column("simulated", sa.Boolean, nullable=False),
    sa.Column("measurement", sa.String, nullable=False),
    sa.Column("detail", sa.String, nullable=False),
    sa.Column("previous", sa.String, nullable=False),
    sa.Column("digest", sa.String, nullable=False),
)
_CHAINED = ("number", "time", "kind", "image_id", "peer", "simulated", "measurement", "detail", "previous")


class KeyState(enum.StrEnum):
    """Whether a key may be released."""

    PENDING = "pending"  # its image is being built
    ACTIVE = "active"
    REVOKED = "revoked"


class ReleaseRefused(JindiskError, code="ReleaseRefused", exit_code=EXIT_REFUSED):
    """The store does not give this key."""

    def __init__(self, image_id: str, state: KeyState) -> None:
        """`state` is why."""
        super().__init__(f"the key of image {image_id} is {state}: it is not released")


class AuditBroken(JindiskError, code="AuditBroken", exit_code=EXIT_INTEGRITY):
    """The audit log was altered."""

    def __init__(self, number: int) -> None:
        """`number` of the first row that does not fit."""
        super().__init__(f"the audit log does not fit from row {number} on: rows were changed, added or taken out")


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageRecord:
    """What the store knows of an image, without its key."""

    image_id: str
    name: str
    platform: Platform
    resource: str
    state: KeyState
    launch_digests: tuple[bytes, ...]
    created: str


class Store:
    """The database. Use `open`."""

    def __init__(self, engine: sa.Engine, kek: Secret, now: Callable[[], datetime]) -> None:
        """Use `open`."""
        self._engine, self._kek, self._now = engine, kek, now
        self._writing = threading.Lock()

    @classmethod
    def open(cls, url: str, kek: Secret, now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> Store:
        """Open the database at an SQLAlchemy URL, with its tables made if they are not there."""
        engine = sa.create_engine(url)
        if engine.dialect.name == "sqlite":

            @sa.event.listens_for(engine, "connect")
            def durable(connection: Any, _record: object) -> None:
                cursor = connection.cursor()
                cursor.execute("PRAGMA journal_mode=WAL")
                cursor.execute("PRAGMA synchronous=FULL")  # a decision is on the disk before it is acted upon
                cursor.close()

        _META.create_all(engine)
        return cls(engine, kek, now)

    def close(self) -> None:
        """Close the database."""
        self._engine.dispose()

    # Images

    def add_image(self, image_id: str, name: str, platform: Platform, resource: str, key: Secret) -> None:
        """Store the key of an image that is being built: pending.

        Raises:
            AlreadyExists: an image has that name.
        """
        wrapped = wrap.wrap(self._kek, key, purpose=PURPOSE, owner=image_id)
        row: dict[str, Any] = {
            "image_id": image_id,
            "name": name,
            "platform": platform.value,
            "resource": resource,
            "state": KeyState.PENDING.value,
            "launch_digests": [],
            "wrapped": wrapped,
            "created": self._now().isoformat(),
        }
        try:
            with self._writing, self._engine.begin() as connection:
                connection.execute(_IMAGES.insert().values(row))
        except sa.exc.IntegrityError as exc:
            raise AlreadyExists("image", name) from exc

    def activate(self, image_id: str, launch_digests: Sequence[bytes]) -> None:
        """Allow release to guests with one of these launch digests. Repeating it is no error, and changes nothing.

        Raises:
            NotFound: no such image.
        """
        values = {"state": KeyState.ACTIVE.value, "launch_digests": [digest.hex() for digest in launch_digests]}
        with self._writing, self._engine.begin() as connection:
            changed = connection.execute(
                _IMAGES.update()
                .where(_IMAGES.c.image_id == image_id, _IMAGES.c.state == KeyState.PENDING.value)
                .values(values)
            )
            if changed.rowcount:
                self._audit(connection, "activated", image_id, detail={"launch_digests": values["launch_digests"]})
        self.image(image_id)

    def forget(self, image_id: str) -> None:
        """Delete a key for good; no error if it is not there."""
        with self._writing, self._engine.begin() as connection:
            if connection.execute(_IMAGES.delete().where(_IMAGES.c.image_id == image_id)).rowcount:
                self._audit(connection, "forgotten", image_id)

    def revoke(self, image_id: str) -> None:
        """Stop release of a key."""
        self._change(image_id, KeyState.REVOKED, "revoked")

    def reinstate(self, image_id: str) -> None:
        """Allow release of a revoked key again."""
        self._change(image_id, KeyState.ACTIVE, "reinstated")

    def _change(self, image_id: str, state: KeyState, kind: str) -> None:
        with self._writing, self._engine.begin() as connection:
            found = connection.execute(
                _IMAGES.update()
                .where(_IMAGES.c.image_id == image_id, _IMAGES.c.state != KeyState.PENDING.value)
                .values(state=state.value)
            )
            if not found.rowcount:
                raise NotFound("key of image", image_id)
            self._audit(connection, kind, image_id)

    def images(self) -> list[ImageRecord]:
        """All records, by name."""
        with self._engine.connect() as connection:
            rows = connection.execute(sa.select(_IMAGES).order_by(_IMAGES.c.name)).mappings().all()
        return [_record(row) for row in rows]

    def image(self, image_id: str) -> ImageRecord:
        """One record.

        Raises:
            NotFound: no such image.
        """
        return self._one(_IMAGES.c.image_id == image_id, image_id)

    def by_resource(self, resource: str) -> ImageRecord:
        """The record whose key is at a resource path.

        Raises:
            NotFound: no such resource.
        """
        return self._one(_IMAGES.c.resource == resource, resource)

    def _one(self, condition: sa.ColumnElement[bool], name: str) -> ImageRecord:
        with self._engine.connect() as connection:
            row = connection.execute(sa.select(_IMAGES).where(condition)).mappings().first()
        if row is None:
            raise NotFound("key of image", name)
        return _record(row)

    # Decisions

    def release(self, image_id: str, *, peer: str, measurement: bytes, simulated: bool) -> Secret:
        """Give a key out; the audit row is durable before the key leaves.

        Raises:
            NotFound, ReleaseRefused, KeyUnreadable: no key leaves.
        """
        with self._writing, self._engine.begin() as connection:
            row = connection.execute(sa.select(_IMAGES).where(_IMAGES.c.image_id == image_id)).mappings().first()
            if row is None:
                raise NotFound("key of image", image_id)
            if row["state"] != KeyState.ACTIVE.value:
                raise ReleaseRefused(image_id, KeyState(row["state"]))
            # A key that does not open is not released: the row must not say so. One that does leaves after the commit.
            key = wrap.unwrap(self._kek, bytes(row["wrapped"]), purpose=PURPOSE, owner=image_id)
            self._audit(connection, "released", image_id, peer=peer, simulated=simulated, measurement=measurement)
        return key

    def record_refusal(
        self,
        image_id: str,
        *,
        peer: str,
        findings: Sequence[tuple[str, str]],
        simulated: bool = False,
        measurement: bytes = b"",
    ) -> None:
        """Write down why a guest got no key; `findings` are (id, text)."""
        with self._writing, self._engine.begin() as connection:
            self._audit(
                connection,
                "refused",
                image_id,
                peer=peer,
                simulated=simulated,
                measurement=measurement,
                detail={"findings": [{"id": name, "text": text} for name, text in findings]},
            )

    # Audit

    def _audit(
        self,
        connection: sa.Connection,
        kind: str,
        image_id: str,
        *,
        peer: str = "",
        simulated: bool = False,
        measurement: bytes = b"",
        detail: Mapping[str, object] | None = None,
    ) -> None:
        last = connection.execute(
            sa.select(_AUDIT.c.number, _AUDIT.c.digest).order_by(_AUDIT.c.number.desc()).limit(1)
        ).first()
        row: dict[str, Any] = {
            "number": last.number + 1 if last else 1,
            "time": self._now().isoformat(),
            "kind": kind,
            "image_id": image_id,
            "peer": peer,
            "simulated": simulated,
            "measurement": measurement.hex(),
            "detail": json.dumps(detail or {}, sort_keys=True),
            "previous": last.digest if last else "",
        }
        connection.execute(_AUDIT.insert().values({**row, "digest": _digest(row)}))

    def audit_rows(self, limit: int = 100, image_id: str | None = None) -> list[dict[str, Any]]:
        """The last `limit` rows, oldest first."""
        query = sa.select(_AUDIT).order_by(_AUDIT.c.number.desc()).limit(limit)
        if image_id is not None:
            query = query.where(_AUDIT.c.image_id == image_id)
        with self._engine.connect() as connection:
            rows = [dict(row) for row in connection.execute(query).mappings()]
        for row in rows:
            row["detail"] = json.loads(row["detail"])
        return rows[::-1]

    def verify_audit(self) -> tuple[int, str]:
        """Check the whole chain: number of rows and digest of the last. Compare the digest with one noted elsewhere.

        Raises:
            AuditBroken: names the first row that does not fit.
        """
        expected, previous = 1, ""
        with self._engine.connect() as connection:
            for row in connection.execute(sa.select(_AUDIT).order_by(_AUDIT.c.number)).mappings():
                if row["number"] != expected or row["previous"] != previous or row["digest"] != _digest(row):
                    raise AuditBroken(expected)
                expected, previous = expected + 1, row["digest"]
        return expected - 1, previous


def _record(row: Mapping[Any, Any]) -> ImageRecord:
    return ImageRecord(
        image_id=row["image_id"],
        name=row["name"],
        platform=Platform(row["platform"]),
        resource=row["resource"],
        state=KeyState(row["state"]),
        launch_digests=tuple(bytes.fromhex(digest) for digest in row["launch_digests"]),
        created=row["created"],
    )


def _digest(row: Mapping[Any, Any]) -> str:
    return hashlib.sha256(json.dumps([row[name] for name in _CHAINED]).encode()).hexdigest()
