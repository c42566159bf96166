"""Changes of an image's volumes that are under way: a key comes or goes, and the image measures otherwise afterwards.

The image's files and the key store cannot change in one step. So a change is written down first, with the new key; then
the image is exchanged; then one transaction makes the key store follow. What is written down lets whoever comes after a
crash finish it, or take it back, by what the image has become. Calls block; call them in a thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import sqlalchemy as sa

from jindiskd.base import document
from jindiskd.base.secret import Secret
from jindiskd.errors import Busy, NotFound
from jindiskd.keys.audit import Requester
from jindiskd.keys.database import CHANGE_PREFIX, images_table, keys_table, meta_table, volumes_table
from jindiskd.keys.records import KeyState, ReleaseRefused, record_of
from jindiskd.keys.store import Store
from jindiskd.keys.volumes import BuiltVolume, Volumes

ROOT_READ = "root read"
"""Kind of the audit row where the root's key is taken for a change."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A change of one image: either of these is empty."""

    image_id: str
    added: str = ""
    """Resource of the key that comes."""
    removed: str = ""
    """Resource of the key that goes."""
    by: str = ""
    """Who does it, for the audit log."""
    before: tuple[bytes, ...] = ()
    """The launch digests that the image's keys are released to before it."""


class Changes:
    """The changes that are under way in a store."""

    def __init__(self, store: Store) -> None:
        """Read nothing yet."""
        self._store, self._database, self._volumes = store, store.database, Volumes(store)

    def begin(self, change: Change, key: Secret | None) -> None:
        """Write a change down, with the key that comes; nothing that is released changes yet.

        Raises:
            NotFound: there is no such image, or no key to be removed. ReleaseRefused: its keys are not active.
            AlreadyExists: the resource is taken. Busy: a change is under way.
        """
        with self._database.write() as connection:
            query = sa.select(images_table).where(images_table.c.image_id == change.image_id)
            row = connection.execute(query).mappings().first()
            if row is None:
                raise NotFound("key of image", change.image_id)
            record = record_of(row)
            if record.state is not KeyState.ACTIVE:
                raise ReleaseRefused(change.image_id, "key.state", f"is {record.state}")
            if _find(connection, change.image_id) is not None:
                raise Busy(f"image {record.name!r}", "a change of its volumes was not finished; restart the service")
            if change.removed:
                self._store.stored_key(connection, row, change.removed)
            if change.added:
                assert key is not None, "a key that comes"
                self._store.insert_key(connection, change.image_id, change.added, key)
            value = document.dump(change)
            connection.execute(meta_table.insert().values(name=f"{CHANGE_PREFIX}{change.image_id}", value=value))

    def finish(self, change: Change, launch_digests: Sequence[bytes], built: Sequence[BuiltVolume]) -> bool:
        """The image has changed: its keys are released to these digests alone. Repeating it changes nothing.

        Args:
            change: what was begun.
            launch_digests: of the image as it is now; empty where its platform has none before the launch.
            built: the new volume as its builder closed it, where it is one whose state is remembered.

        Returns:
            Whether the rules of its release name measurements of their own, which stay.
        """
        image_id, digests = change.image_id, [digest.hex() for digest in launch_digests]
        with self._database.write() as connection:
            if _find(connection, image_id) is not None:
                self._store.change(connection, image_id, {"launch_digests": digests})
                detail: dict[str, object] = {"launch_digests": digests}
                who = Requester(peer=change.by)
                if change.removed:
                    detail["removed"] = change.removed
                    for table in (keys_table, volumes_table):
                        mine = (table.c.image_id == image_id, table.c.resource == change.removed)
                        connection.execute(table.delete().where(*mine))
                if change.added:
                    detail["added"] = change.added
                for one in built:
                    self._volumes.insert(connection, one.volume, image_id, one.anchor, one.resource)
                self._store.audit.append(connection, "volumes changed", image_id, who, detail)
                _drop(connection, image_id)
        return bool(self._store.image(image_id).rules.measurements)

    def undo(self, image_id: str) -> None:
        """The image has not changed: forget the key that was to come. No error where nothing is under way."""
        with self._database.write() as connection:
            change = _find(connection, image_id)
            if change is None:
                return
            if change.added:
                mine = (keys_table.c.image_id == image_id, keys_table.c.resource == change.added)
                connection.execute(keys_table.delete().where(*mine))
            _drop(connection, image_id)

    def list(self) -> list[Change]:
        """All that are under way."""
        query = sa.select(meta_table.c.value).where(meta_table.c.name.startswith(CHANGE_PREFIX))
        with self._database.read() as connection:
            return [_read(value) for value in connection.scalars(query).all()]


def _find(connection: sa.Connection, image_id: str) -> Change | None:
    value = connection.scalar(sa.select(meta_table.c.value).where(meta_table.c.name == f"{CHANGE_PREFIX}{image_id}"))
    return None if value is None else _read(value)


def _drop(connection: sa.Connection, image_id: str) -> None:
    connection.execute(meta_table.delete().where(meta_table.c.name == f"{CHANGE_PREFIX}{image_id}"))


def _read(value: object) -> Change:
    assert isinstance(value, bytes | memoryview)
    return document.load(Change, bytes(value), document="a change under way")
