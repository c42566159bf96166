"""What the owner does with images and keys: take them over, rotate them, add further ones, and hand them on.

Each of these is one transaction with its audit row, which names who did it. Calls block; call them in a thread.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from jindiskd.base.secret import Secret
from jindiskd.errors import AlreadyExists, InvalidArgument, JindiskError, NotFound
from jindiskd.kbs.messages import check_resource
from jindiskd.keys import handover, wrap
from jindiskd.keys.audit import Requester
from jindiskd.keys.database import (
    AMENDED_PREFIX,
    KEY_PURPOSE,
    Database,
    images_table,
    keys_table,
    meta_table,
    volumes_table,
)
from jindiskd.keys.handover import AlreadyTakenOver, HandedVolume, Handover, HandoverUnusable, Opened
from jindiskd.keys.store import ImageRecord, KeyState, ReleaseRefused, Store, record_of
from jindiskd.keys.volumes import Volumes
from jindiskd.policy import rules as release_rules
from jindiskd.policy.rules import ReleaseRules

RECOVERY = "recovery"


class NoRecoveryKey(JindiskError, code="NoRecoveryKey"):
    """There is nothing to seal a recovery copy to."""

    def __init__(self) -> None:
        """Say what to do."""
        super().__init__("no recovery key is set: give this broker the public half of one kept offline")


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyRecord:
    """A further key of an image, without the key."""

    resource: str
    image_id: str
    created: str


class Registry:
    """The owner's side of a store."""

    def __init__(self, store: Store) -> None:
        """Read nothing yet."""
        self._store, self._volumes = store, Volumes(store)

    @property
    def _database(self) -> Database:
        return self._store.database

    def register(self, opened: Opened, by: Requester, *, replaces: str | None = None) -> ImageRecord:
        """Take over an image that is not known yet: its keys are released from now on, by its rules.

        Args:
            opened: the image and its keys.
            by: who does it.
            replaces: id of an image that was built before under the same name: its keys are revoked, its name gets
                the first part of its id added, and its rules count for the new one unless that brings its own.

        Raises:
            AlreadyExists: its name, identity, a resource or a volume is; nothing was changed.
            NotFound: there is none to be replaced.
            InvalidArgument, MalformedDocument: its rules are none.
        """
        told = opened.handover
        if told.amends is not None:
            raise HandoverUnusable("is of a change, not of an image", "have it take the change over instead")
        rules = release_rules.load(told.rules) if told.rules else None
        row: dict[str, Any] = {
            "image_id": told.image_id,
            "name": told.name,
            "platform": told.platform.value,
            "resource": told.resource,
            "state": KeyState.ACTIVE.value,
            "launch_digests": [digest.hex() for digest in told.launch_digests],
            "wrapped": self._wrapped(told.image_id, opened.keys[told.resource]),
            "created": told.created,
            "revision": 0,
        }
        try:
            with self._database.write() as connection:
                if replaces is not None:
                    old = self._retire(connection, replaces, told.image_id, by)
                    rules = rules or old.rules  # as they are in this transaction
                row["rules"] = (rules or ReleaseRules()).dump()
                connection.execute(images_table.insert().values(row))
                self._insert_others(connection, opened)
                detail = {"launch_digests": row["launch_digests"], "keys": sorted(opened.keys)}
                self._store.audit.append(connection, "registered", told.image_id, by, detail)
        except sa.exc.IntegrityError as exc:
            raise AlreadyExists("image", told.name) from exc
        return self._store.image(told.image_id)

    def rotate(self, opened: Opened, by: Requester) -> ImageRecord:
        """Put new keys and launch digests in place of an image's old ones, which are gone; state and rules stay.

        The volumes that the handover names are remembered as it says; others of the image are forgotten.

        Raises:
            NotFound: the image is not known.
            HandoverUnusable: it is of another platform or resource than the image.
            AlreadyExists: a resource or volume belongs to another image; nothing was changed.
        """
        told = opened.handover
        if told.amends is not None:
            raise HandoverUnusable("is of a change, and has not all keys", "take it over by broker image import")
        values = {
            "launch_digests": [digest.hex() for digest in told.launch_digests],
            "wrapped": self._wrapped(told.image_id, opened.keys[told.resource]),
        }
        try:
            with self._database.write() as connection:
                record = self._record(connection, told.image_id)
                if (record.platform, record.resource) != (told.platform, told.resource):
                    raise HandoverUnusable("is of another platform or resource than the image", "register it as new")
                self._store.change(connection, told.image_id, values)
                for table in (keys_table, volumes_table):
                    connection.execute(table.delete().where(table.c.image_id == told.image_id))
                self._insert_others(connection, opened)
                detail = {"launch_digests": values["launch_digests"], "keys": sorted(opened.keys)}
                self._store.audit.append(connection, "rotated", told.image_id, by, detail)
        except sa.exc.IntegrityError as exc:
            raise AlreadyExists("resource or volume of image", told.name) from exc
        return self._store.image(told.image_id)

    def amend(self, opened: Opened, by: Requester) -> ImageRecord:
        """Take over a change of an image's data volumes: its keys are released to the digests in it alone.

        A change is taken over once: the broker remembers it, so that an older one cannot be played again.

        Raises:
            NotFound: the image is not known, or no key that goes.
            HandoverUnusable: it is of another platform, resource or state than the image; nothing was changed.
            AlreadyTakenOver: it was. AlreadyExists: its resource or volume is taken; nothing was changed.
            ReleaseRefused: the image's keys are not active.
        """
        told, amends = opened.handover, opened.handover.amends
        assert amends is not None, "a change"
        digests, image_id = [digest.hex() for digest in told.launch_digests], told.image_id
        try:
            with self._database.write() as connection:
                record = self._record(connection, image_id)
                if (record.platform, record.resource) != (told.platform, told.resource):
                    raise HandoverUnusable("is of another platform or resource than the image", "look where it is from")
                mark = f"{AMENDED_PREFIX}{image_id} {told.digest.hex()}"
                if connection.scalar(sa.select(meta_table.c.name).where(meta_table.c.name == mark)) is not None:
                    raise AlreadyTakenOver(record.name)
                if record.state is not KeyState.ACTIVE:
                    raise ReleaseRefused(image_id, "key.state", f"is {record.state}")
                if not set(amends.before) & set(record.launch_digests):
                    before = ", ".join(digest.hex() for digest in amends.before)
                    problem = f"changes the image that measures as {before}, which is not what is allowed here"
                    raise HandoverUnusable(problem, "take the changes over in their order")
                if amends.removed:
                    self._remove_key(connection, image_id, amends.removed)
                self._insert_others(connection, opened)
                self._store.change(connection, image_id, {"launch_digests": digests})
                connection.execute(meta_table.insert().values(name=mark, value=b""))
                changed = {"added": amends.added} if amends.added else {"removed": amends.removed}
                detail = {"launch_digests": digests, **changed}
                self._store.audit.append(connection, "volumes changed", image_id, by, detail)
        except sa.exc.IntegrityError as exc:
            raise AlreadyExists("resource or volume of image", told.name) from exc
        return self._store.image(image_id)

    def add_key(self, image_id: str, resource: str, key: Secret, by: Requester) -> None:
        """Add a further key to an image; guests that get the root's key can get this one.

        Raises:
            NotFound: no such image. AlreadyExists: the resource is taken. InvalidArgument: it is none, or the key's
            length is out of range.
        """
        check_resource(resource)
        if not handover.KEY_BYTES[0] <= len(key) <= handover.KEY_BYTES[1]:
            raise InvalidArgument("length of the key", len(key), f"it has 1 to {handover.KEY_BYTES[1]} bytes")
        try:
            with self._database.write() as connection:
                self._record(connection, image_id)
                self._store.insert_key(connection, image_id, resource, key)
                self._store.change(connection, image_id, {"image_id": image_id})
                self._store.audit.append(connection, "key added", image_id, by, {"resource": resource})
        except sa.exc.IntegrityError as exc:
            raise AlreadyExists("key", resource) from exc

    def remove_key(self, image_id: str, resource: str, by: Requester) -> None:
        """Delete a further key for good, with the anchors of its volumes. Raises `NotFound`."""
        with self._database.write() as connection:
            self._remove_key(connection, image_id, resource)
            self._store.change(connection, image_id, {"image_id": image_id})
            self._store.audit.append(connection, "key removed", image_id, by, {"resource": resource})

    def keys(self, image_id: str) -> Sequence[KeyRecord]:
        """The further keys of an image."""
        query = sa.select(keys_table.c.resource, keys_table.c.image_id, keys_table.c.created)
        with self._database.read() as connection:
            rows = connection.execute(query.where(keys_table.c.image_id == image_id).order_by(keys_table.c.resource))
            return [KeyRecord(**row) for row in rows.mappings()]

    def export(self, image_id: str, recipient: Mapping[str, str], by: Requester, why: str = "exported") -> Handover:
        """Seal all keys of an image to a recipient; the audit row is durable before anything leaves.

        Raises:
            NotFound, KeyUnreadable, InvalidArgument: nothing leaves.
        """
        handover.check_recipient(recipient)
        taken = self.take(image_id, by, why)
        try:
            return handover.seal(taken.handover, taken.keys, taken.anchors, recipient)
        finally:
            taken.close()

    def take(self, image_id: str, by: Requester, why: str, *, active: bool = False) -> Opened:
        """All keys of an image and what is remembered of its volumes; the audit row is durable before they leave.

        Args:
            image_id: the image.
            by: who takes them.
            why: the kind of the audit row.
            active: only where its keys may be released.

        Raises:
            NotFound, KeyUnreadable, ReleaseRefused: nothing leaves.
        """
        keys: dict[str, Secret] = {}
        try:
            with self._database.write() as connection:
                query = sa.select(images_table).where(images_table.c.image_id == image_id)
                row = connection.execute(query).mappings().first()
                if row is None:
                    raise NotFound("key of image", image_id)
                record = record_of(row)
                if active and record.state is not KeyState.ACTIVE:
                    raise ReleaseRefused(image_id, "key.state", f"is {record.state}")
                further = sa.select(keys_table.c.resource).where(keys_table.c.image_id == image_id)
                for resource in [row["resource"], *connection.scalars(further)]:
                    keys[resource] = self._store.open_key(self._store.stored_key(connection, row, resource))
                self._store.audit.append(connection, why, image_id, by, {"keys": sorted(keys)})
            volumes = [volume for volume in self._volumes.list() if volume.image_id == image_id]
            told = Handover(
                image_id=record.image_id,
                name=record.name,
                platform=record.platform,
                resource=record.resource,
                launch_digests=record.launch_digests,
                created=record.created,
                volumes=tuple(
                    HandedVolume(volume=volume.volume, resource=volume.resource or record.resource)
                    for volume in volumes
                ),
                rules=row["rules"],
            )
            anchors = {volume.volume: volume.anchor for volume in volumes if volume.anchor is not None}
            return Opened(handover=told, keys=keys, anchors=anchors)
        except BaseException:
            for key in keys.values():
                key.close()
            raise

    # Recovery

    def recovery_key(self) -> dict[str, str] | None:
        """The public key that recovery copies are sealed to."""
        stored = self._database.setting(RECOVERY)
        return None if stored is None else handover.recipient_of_pem(stored)

    def set_recovery_key(self, pem: bytes, by: Requester) -> None:
        """Have recovery copies sealed to this public key from now on. Raises `InvalidArgument`."""
        handover.recipient_of_pem(pem)
        with self._database.write() as connection:
            self._database.set_setting(connection, RECOVERY, pem)
            self._store.audit.append(connection, "recovery key set", "", by)

    def recovery_copy(self, by: Requester) -> Sequence[Handover]:
        """All images with their keys, sealed to the recovery key.

        Raises:
            NoRecoveryKey: none is set.
        """
        recipient = self.recovery_key()
        if recipient is None:
            raise NoRecoveryKey
        images = [record.image_id for record in self._store.images() if record.state is not KeyState.PENDING]
        return [self.export(image_id, recipient, by, "recovery copy") for image_id in images]

    # Parts

    def _retire(self, connection: sa.Connection, image_id: str, by_image: str, by: Requester) -> ImageRecord:
        """Revoke an image and give its name free; the record that it had."""
        record = self._record(connection, image_id)
        # No longer than names are: it is still exported, and is among the recovery copies.
        values = {"state": KeyState.REVOKED.value, "name": f"{record.name[:54]}.{image_id[:8]}"}
        self._store.change(connection, image_id, values)
        self._store.audit.append(connection, "replaced", image_id, by, {"by": by_image})
        return record

    def _record(self, connection: sa.Connection, image_id: str) -> ImageRecord:
        query = sa.select(images_table).where(images_table.c.image_id == image_id)
        row = connection.execute(query).mappings().first()
        if row is None:
            raise NotFound("key of image", image_id)
        return record_of(row)

    def _remove_key(self, connection: sa.Connection, image_id: str, resource: str) -> None:
        mine = (keys_table.c.image_id == image_id, keys_table.c.resource == resource)
        if not connection.execute(keys_table.delete().where(*mine)).rowcount:
            raise NotFound("key", resource)
        connection.execute(volumes_table.delete().where(volumes_table.c.resource == resource))

    def _wrapped(self, owner: str, key: Secret) -> bytes:
        return wrap.wrap(self._database.kek, key, purpose=KEY_PURPOSE, owner=owner)

    def _insert_others(self, connection: sa.Connection, opened: Opened) -> None:
        """Further keys and volumes of an image whose row is there."""
        told = opened.handover
        root = told.resource
        if connection.scalar(sa.select(keys_table.c.image_id).where(keys_table.c.resource == root)) is not None:
            raise AlreadyExists("key", root)
        for resource, key in opened.keys.items():
            if resource != root:
                self._store.insert_key(connection, told.image_id, resource, key)
        for volume in told.volumes:
            anchor = opened.anchors.get(volume.volume)
            self._volumes.insert(connection, volume.volume, told.image_id, anchor, volume.resource)
