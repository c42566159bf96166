"""The key store: images, their rules, and the one way by which a key leaves.

A key leaves by `release_to` (or `Volumes.release`, which takes the same steps) alone: state, limits and approval are
looked at and the audit row is written in one transaction, and the key is handed over after that is durable.
Calls block; call them in a thread.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa

from jindiskd.attest.kept import Kept
from jindiskd.base.platform import Platform
from jindiskd.base.secret import Secret
from jindiskd.errors import AlreadyExists, NotFound
from jindiskd.keys import wrap
from jindiskd.keys.approvals import Approvals
from jindiskd.keys.audit import AuditBroken, AuditLog, Requester
from jindiskd.keys.database import (
    AMENDED_PREFIX,
    CHANGE_PREFIX,
    KEY_PURPOSE,
    Database,
    images_table,
    keys_table,
    meta_table,
    releases_table,
    volumes_table,
)
from jindiskd.keys.records import (
    ApprovalWaiting,
    ImageRecord,
    KeyState,
    RecordChanged,
    ReleaseRefused,
    StoredKey,
    record_of,
)
from jindiskd.keys.refusals import Refusals
from jindiskd.policy.rules import ReleaseRules, window

__all__ = [
    "ApprovalWaiting",
    "AuditBroken",
    "ImageRecord",
    "KeyState",
    "RecordChanged",
    "ReleaseRefused",
    "Requester",
    "Store",
    "record_of",
]
PURPOSE = KEY_PURPOSE
HOUR_S = 3600.0
MOST_VOLUMES = 7
"""Further keys that are given out in one step: of as many volumes as an image can have besides its root."""


class Store:
    """Images and keys in one database. Use `open`.

    Attributes:
        database: the database, for the other parts that live in it.
        approvals: the guests that wait for a person.
        refusals: what refused guests sent.
    """

    def __init__(self, database: Database) -> None:
        """Use `open`."""
        self.database, self._engine = database, database.engine
        self.audit = AuditLog(database)
        self.approvals = Approvals(database, self.audit)
        self.refusals = Refusals(database)

    @classmethod
    def open(cls, url: str, kek: Secret, now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> Store:
        """Open the database at an SQLAlchemy URL; raises as `Database.open`."""
        return cls(Database.open(url, kek, now))

    def close(self) -> None:
        """Close the database."""
        self.database.close()

    # Images

    def add_image(
        self,
        image_id: str,
        name: str,
        platform: Platform,
        resource: str,
        key: Secret,
        rules: ReleaseRules | None = None,
        others: Mapping[str, Secret] | None = None,
    ) -> None:
        """Store the keys of an image that is being built: pending.

        Args:
            image_id: the image.
            name: the image's.
            platform: what it is for.
            resource: of its root's key.
            key: its root's.
            rules: of their release; the strict defaults if not given.
            others: further keys by their resources.

        Raises:
            AlreadyExists: an image has that name, id or resource.
        """
        row: dict[str, Any] = {
            "image_id": image_id,
            "name": name,
            "platform": platform.value,
            "resource": resource,
            "state": KeyState.PENDING.value,
            "launch_digests": [],
            "wrapped": wrap.wrap(self.database.kek, key, purpose=KEY_PURPOSE, owner=image_id),
            "created": self.database.now().isoformat(),
            "rules": (rules or ReleaseRules()).check().dump(),
            "revision": 0,
        }
        try:
            with self.database.write() as connection:
                connection.execute(images_table.insert().values(row))
                for other, further in (others or {}).items():
                    self.insert_key(connection, image_id, other, further)
        except sa.exc.IntegrityError as exc:
            raise AlreadyExists("image", name) from exc

    def insert_key(self, connection: sa.Connection, image_id: str, resource: str, key: Secret) -> None:
        """Store a further key of an image, within a write transaction; raises `AlreadyExists`."""
        if connection.scalar(sa.select(images_table.c.name).where(images_table.c.resource == resource)) is not None:
            raise AlreadyExists("key", resource)
        row = {
            "resource": resource,
            "image_id": image_id,
            "wrapped": wrap.wrap(self.database.kek, key, purpose=KEY_PURPOSE, owner=resource),
            "created": self.database.now().isoformat(),
        }
        connection.execute(keys_table.insert().values(row))

    def activate(
        self,
        image_id: str,
        launch_digests: Sequence[bytes],
        also: Callable[[sa.Connection], None] = lambda _connection: None,
    ) -> None:
        """Allow release to guests with one of these launch digests. Repeating it is no error, and changes nothing.

        Args:
            image_id: the image.
            launch_digests: 48 bytes each.
            also: runs within the transaction, if this is no repetition.

        Raises:
            NotFound: no such image.
        """
        digests = [digest.hex() for digest in launch_digests]
        values = {"state": KeyState.ACTIVE.value, "launch_digests": digests}
        with self.database.write() as connection:
            if self.change(connection, image_id, values, images_table.c.state == KeyState.PENDING.value):
                self.audit.append(connection, "activated", image_id, detail={"launch_digests": digests})
                also(connection)
        self.image(image_id)

    def forget(self, image_id: str, by: Requester | None = None) -> None:
        """Delete an image's keys and its volumes' anchors for good; no error if it is not there."""
        with self.database.write() as connection:
            if connection.execute(images_table.delete().where(images_table.c.image_id == image_id)).rowcount:
                for table in (keys_table, volumes_table):
                    connection.execute(table.delete().where(table.c.image_id == image_id))
                connection.execute(meta_table.delete().where(meta_table.c.name == f"{CHANGE_PREFIX}{image_id}"))
                amended = meta_table.c.name.startswith(f"{AMENDED_PREFIX}{image_id} ", autoescape=True)
                connection.execute(meta_table.delete().where(amended))
                self.approvals.forget(connection, image_id)
                self.audit.append(connection, "forgotten", image_id, by)

    def revoke(self, image_id: str, by: Requester | None = None) -> None:
        """Stop release of an image's keys. Raises `NotFound` if it is not there or was never active."""
        self._change_state(image_id, KeyState.REVOKED, "revoked", by)

    def reinstate(self, image_id: str, by: Requester | None = None) -> None:
        """Allow release of a revoked image's keys again. Raises as `revoke`."""
        self._change_state(image_id, KeyState.ACTIVE, "reinstated", by)

    def set_rules(self, image_id: str, rules: ReleaseRules, by: Requester | None = None) -> None:
        """Replace the rules of an image; they count from the next decision on.

        Raises:
            NotFound, InvalidArgument: nothing was changed.
        """
        with self.database.write() as connection:
            if not self.change(connection, image_id, {"rules": rules.check().dump()}):
                raise NotFound("key of image", image_id)
            self.audit.append(connection, "rules", image_id, by, {"rules": rules.digest})

    def _change_state(self, image_id: str, state: KeyState, kind: str, by: Requester | None) -> None:
        with self.database.write() as connection:
            values = {"state": state.value}
            if not self.change(connection, image_id, values, images_table.c.state != KeyState.PENDING.value):
                raise NotFound("key of image", image_id)
            self.audit.append(connection, kind, image_id, by)

    @staticmethod
    def change(
        connection: sa.Connection, image_id: str, values: Mapping[str, Any], *conditions: sa.ColumnElement[bool]
    ) -> bool:
        """Change columns of an image and count its revision, in a write transaction; False if it is not there."""
        changed = connection.execute(
            images_table.update()
            .where(images_table.c.image_id == image_id, *conditions)
            .values({**values, "revision": images_table.c.revision + 1})
        )
        return bool(changed.rowcount)

    def images(self) -> list[ImageRecord]:
        """All records, by name."""
        with self.database.read() as connection:
            rows = connection.execute(sa.select(images_table).order_by(images_table.c.name)).mappings().all()
        return [record_of(row) for row in rows]

    def image(self, image_id: str) -> ImageRecord:
        """One record.

        Raises:
            NotFound: no such image.
        """
        return self._one(images_table.c.image_id == image_id, image_id)

    def by_resource(self, resource: str) -> ImageRecord:
        """The record whose key is at a resource path.

        Raises:
            NotFound: no such resource.
        """
        others = sa.select(keys_table.c.image_id).where(keys_table.c.resource == resource).scalar_subquery()
        return self._one(sa.or_(images_table.c.resource == resource, images_table.c.image_id == others), resource)

    def _one(self, condition: sa.ColumnElement[bool], name: str) -> ImageRecord:
        with self.database.read() as connection:
            row = connection.execute(sa.select(images_table).where(condition)).mappings().first()
        if row is None:
            raise NotFound("key of image", name)
        return record_of(row)

    # Decisions

    def release(self, image_id: str, *, peer: str, measurement: bytes, simulated: bool) -> Secret:
        """Give a key to a peer of which no more is known; raises as `release_to`."""
        return self.release_to(image_id, Requester(peer=peer, measurement=measurement, simulated=simulated))

    def release_to(
        self, image_id: str, requester: Requester, *, revision: int | None = None, resource: str | None = None
    ) -> Secret:
        """Give a key out; the audit row is durable before the key leaves.

        Args:
            image_id: the image.
            requester: who asks; goes into the audit row.
            revision: of the record by which it was decided; None where nothing was decided by a record.
            resource: which of the image's keys; its root's if None.

        Raises:
            NotFound, ReleaseRefused, RecordChanged, ApprovalWaiting, KeyUnreadable: no key leaves.
        """
        waiting = None
        with self.database.write() as connection:
            record, stored = self.for_release(connection, image_id, requester, revision, resource)
            waiting = self.approvals.needed(connection, record.image_id, requester) if record.rules.approval else None
            if waiting is None:
                # A key that does not open is not released: the row must not say so.
                key = self.open_key(stored)
                self.released(connection, record, requester, {}, stored.resource)
        if waiting is not None:
            raise ApprovalWaiting(waiting)
        return key

    def release_volumes(self, image_id: str, requester: Requester, *, revision: int | None = None) -> dict[str, Secret]:
        """Give out the keys of all of an image's volumes in one step, by resource; all of them, or none.

        Those are the root's, and further ones beside it: whose resources differ in the last part alone. Others that its
        owner has added are for whoever asks for them. Arguments and errors as of `release_to`.
        """
        waiting, keys = None, dict[str, Secret]()
        try:
            with self.database.write() as connection:
                record, root = self.for_release(connection, image_id, requester, revision)
                beside = f"{root.resource.rpartition('/')[0]}/"
                query = sa.select(keys_table.c.resource).where(keys_table.c.image_id == image_id)
                names = [name for name in connection.scalars(query) if name.startswith(beside)]
                if len(names) > MOST_VOLUMES:
                    raise ReleaseRefused(image_id, "key.count", f"is one of more than {MOST_VOLUMES + 1} volumes")
                others = [self.for_release(connection, image_id, requester, revision, name)[1] for name in names]
                if record.rules.approval:
                    waiting = self.approvals.needed(connection, record.image_id, requester)
                if waiting is None:
                    for stored in (root, *others):
                        keys[stored.resource] = self.open_key(stored)
                        self.released(connection, record, requester, {}, stored.resource)
        except BaseException:
            for key in keys.values():
                key.close()
            raise
        if waiting is not None:
            raise ApprovalWaiting(waiting)
        return keys

    def for_release(
        self,
        connection: sa.Connection,
        image_id: str,
        requester: Requester,
        revision: int | None,
        resource: str | None = None,
    ) -> tuple[ImageRecord, StoredKey]:
        """The record and wrapped key, if state, times and limits allow a release now; within a write transaction."""
        row = connection.execute(sa.select(images_table).where(images_table.c.image_id == image_id)).mappings().first()
        if row is None:
            raise NotFound("key of image", image_id)
        record = record_of(row)
        if record.state is not KeyState.ACTIVE:
            raise ReleaseRefused(image_id, "key.state", f"is {record.state}")
        if revision is not None and revision != record.revision:
            raise RecordChanged(image_id)
        for finding in window(record.rules, self.database.now()):
            raise ReleaseRefused(image_id, finding.id, "has times in its policy, and this is none of them")
        stored = self.stored_key(connection, row, resource)
        self._check_limits(connection, record, requester, stored.resource)
        return record, stored

    @staticmethod
    def stored_key(connection: sa.Connection, row: Mapping[Any, Any], resource: str | None = None) -> StoredKey:
        """The key of an image (by its row) at a resource; its root's if None. Raises `NotFound`."""
        if resource is None or resource == row["resource"]:
            return StoredKey(owner=row["image_id"], resource=row["resource"], wrapped=bytes(row["wrapped"]))
        mine = (keys_table.c.resource == resource, keys_table.c.image_id == row["image_id"])
        wrapped = connection.scalar(sa.select(keys_table.c.wrapped).where(*mine))
        if wrapped is None:
            raise NotFound("key", resource)
        return StoredKey(owner=resource, resource=resource, wrapped=bytes(wrapped))

    def open_key(self, stored: StoredKey) -> Secret:
        """Unwrap; raises `KeyUnreadable`."""
        return wrap.unwrap(self.database.kek, stored.wrapped, purpose=KEY_PURPOSE, owner=stored.owner)

    def released(
        self,
        connection: sa.Connection,
        record: ImageRecord,
        requester: Requester,
        detail: Mapping[str, object],
        resource: str,
    ) -> None:
        """Write a release down, within the transaction that decides it."""
        detail = {"rules": record.rules.digest, **detail}
        if resource != record.resource:
            detail["resource"] = resource
        number = self.audit.append(connection, "released", record.image_id, requester, detail)
        connection.execute(
            releases_table.insert().values(
                number=number,
                image_id=record.image_id,
                guest=requester.guest,
                at=self.database.now().timestamp(),
                resource=resource,
            )
        )

    def _check_limits(
        self, connection: sa.Connection, record: ImageRecord, requester: Requester, resource: str
    ) -> None:
        # Each key of an image is counted for itself; releases of before there were several say no resource.
        this = releases_table.c.resource.in_([resource, ""] if resource == record.resource else [resource])
        limits = (
            (
                "limit.guest",
                record.rules.releases_per_guest,
                releases_table.c.guest == requester.guest,
                "was given to this launch of the guest as often as its rules allow",
            ),
            (
                "limit.used",
                record.rules.releases_in_all,
                sa.true(),
                "was given out as often as its rules allow in all",
            ),
            (
                "limit.image",
                record.rules.releases_per_hour,
                releases_table.c.at > self.database.now().timestamp() - HOUR_S,
                "was given out within the hour as often as its rules allow",
            ),
        )
        for finding, limit, condition, reason in limits:
            if limit is None:
                continue
            query = sa.select(sa.func.count()).where(releases_table.c.image_id == record.image_id, this, condition)
            if (connection.scalar(query) or 0) >= limit:
                raise ReleaseRefused(record.image_id, finding, reason)

    def record_refusal(
        self,
        image_id: str,
        requester: Requester,
        findings: Sequence[tuple[str, str]],
        evidence: Kept | None = None,
        *,
        detail: Mapping[str, object] | None = None,
    ) -> int:
        """Write down why a guest got no key, and keep what it sent; returns the number of the audit row.

        Args:
            image_id: whose key it wanted, empty where that is not known.
            requester: who asked.
            findings: (id, text) of each reason.
            evidence: what it sent, as far as it could be read.
            detail: what else the row says.
        """
        reasons = [{"id": name, "text": text} for name, text in findings]
        told: dict[str, object] = {**(detail or {}), "findings": reasons}
        if evidence is not None:
            told |= {"tee": evidence.tee.value, "evidence": hashlib.sha256(evidence.blob).hexdigest()}
        with self.database.write() as connection:
            number = self.audit.append(connection, "refused", image_id, requester, told)
            if evidence is not None:
                self.refusals.add(connection, number, image_id, requester.peer, evidence)
        return number

    # Audit

    def audit_rows(self, limit: int = 100, image_id: str | None = None) -> list[dict[str, Any]]:
        """The last `limit` rows, oldest first."""
        return self.audit.rows(limit, image_id)

    def verify_audit(self) -> tuple[int, str]:
        """Check the whole chain: number of rows and digest of the last. Compare the digest with one noted elsewhere.

        Raises:
            AuditBroken: names the first row that does not fit.
        """
        return self.audit.verify()
