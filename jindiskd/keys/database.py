"""The database of keys, volumes and audit rows: its tables, its versions, and how it is read and written.

SQLite for one broker; PostgreSQL where several share it. All writing is one transaction at a time, over all brokers: an
audit row's number and digest follow from the row before, and a decision and its row are one transaction. With SQLite
that is `BEGIN IMMEDIATE` with `synchronous=FULL`; with PostgreSQL an advisory lock held to the end of the transaction.
Calls block; call them in a thread.

    meta       version of these tables; a check value for the key-encryption key; the broker's own keys, wrapped
    images     name, platform, resource, state, launch digests, rules, revision, wrapped key
    keys       further keys of an image: resource, wrapped key
    volumes    resource of its key, anchor, pending session (both wrapped), once-only acceptance of any state, lease
    audit      numbered, chained rows (`keys.audit`)
    releases   one row a release: image, resource, guest, time; what the limits count
    approvals  guests that wait for a person
    sessions   attestation sessions, where several brokers share them (`broker.shared`)
    tokens     who may administer over the network: digests of their tokens (`keys.tokens`)

`keys.migrations` brings the tables of earlier releases to this form.
"""

from __future__ import annotations

import contextlib
import secrets
import threading
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from jindiskd.base.secret import Secret
from jindiskd.errors import EXIT_INTEGRITY, EXIT_UNAVAILABLE, JindiskError, NotSupported
from jindiskd.keys import wrap
from jindiskd.keys.news import CHANNEL, News

VERSION = 3
LOCK = 0x6A696E6469736B64  # "jindiskd"
KEK_CHECK = b"jindiskd key-encryption key"
WAIT_S = 10.0
META = sa.MetaData()

meta_table = sa.Table(
    "meta",
    META,
    sa.Column("name", sa.String, primary_key=True),
    sa.Column("value", sa.LargeBinary, nullable=False),
)
images_table = sa.Table(
    "images",
    META,
    sa.Column("image_id", sa.String, primary_key=True),
    sa.Column("name", sa.String, nullable=False, unique=True),
    sa.Column("platform", sa.String, nullable=False),
    sa.Column("resource", sa.String, nullable=False, unique=True),
    sa.Column("state", sa.String, nullable=False),
    sa.Column("launch_digests", sa.JSON, nullable=False),
    sa.Column("wrapped", sa.LargeBinary, nullable=False),
    sa.Column("created", sa.String, nullable=False),
    sa.Column("rules", sa.String, nullable=False, server_default=""),
    sa.Column("revision", sa.Integer, nullable=False, server_default="0"),
)
keys_table = sa.Table(
    "keys",
    META,
    sa.Column("resource", sa.String, primary_key=True),
    sa.Column("image_id", sa.String, nullable=False, index=True),
    sa.Column("wrapped", sa.LargeBinary, nullable=False),
    sa.Column("created", sa.String, nullable=False),
)
audit_table = sa.Table(
    "audit",
    META,
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
volumes_table = sa.Table(
    "volumes",
    META,
    sa.Column("volume", sa.String, primary_key=True),
    sa.Column("image_id", sa.String, nullable=False, index=True),
    sa.Column("anchor", sa.LargeBinary),
    sa.Column("pending", sa.LargeBinary),
    sa.Column("accept_any", sa.Boolean, nullable=False),
    sa.Column("pending_any", sa.Boolean, nullable=False),
    sa.Column("lease_until", sa.Float, nullable=False),
    sa.Column("resource", sa.String, nullable=False, server_default=""),
)
releases_table = sa.Table(
    "releases",
    META,
    sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("image_id", sa.String, nullable=False),
    sa.Column("guest", sa.String, nullable=False),
    sa.Column("at", sa.Float, nullable=False),
    sa.Column("resource", sa.String, nullable=False, server_default=""),
    sa.Index("releases_by_time", "image_id", "at"),
    sa.Index("releases_by_guest", "image_id", "guest"),
)
approvals_table = sa.Table(
    "approvals",
    META,
    sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("image_id", sa.String, nullable=False),
    sa.Column("guest", sa.String, nullable=False),
    sa.Column("peer", sa.String, nullable=False),
    sa.Column("measurement", sa.String, nullable=False),
    sa.Column("simulated", sa.Boolean, nullable=False),
    sa.Column("granted", sa.Boolean, nullable=False),
    sa.Column("expires", sa.Float, nullable=False),
    sa.UniqueConstraint("image_id", "guest"),
)
sessions_table = sa.Table(
    "sessions",
    META,
    sa.Column("session_id", sa.String, primary_key=True),
    sa.Column("peer", sa.String, nullable=False, index=True),
    sa.Column("nonce", sa.String, nullable=False),
    sa.Column("stage", sa.String, nullable=False),
    sa.Column("expires", sa.Float, nullable=False, index=True),
    sa.Column("asked", sa.Integer, nullable=False),
    sa.Column("tee_pubkey", sa.JSON, nullable=False),
    sa.Column("facts", sa.JSON, nullable=False),
    sa.Column("report", sa.LargeBinary, nullable=False),
)
tokens_table = sa.Table(
    "tokens",
    META,
    sa.Column("name", sa.String, primary_key=True),
    sa.Column("digest", sa.String, nullable=False, unique=True),
    sa.Column("role", sa.String, nullable=False),
    sa.Column("created", sa.String, nullable=False),
    sa.Column("expires", sa.Float, nullable=False),
)


class DatabaseNewer(JindiskError, code="DatabaseNewer", exit_code=EXIT_INTEGRITY):
    """The tables were made by a later release."""

    def __init__(self, found: int) -> None:
        """`found` is their version."""
        super().__init__(
            f"the key store has version {found}, this program knows {VERSION}: run the release that used it last"
        )


class KekWrong(JindiskError, code="KekWrong", exit_code=EXIT_INTEGRITY):
    """The key-encryption key is not the one of this database."""

    def __init__(self) -> None:
        """Nothing more can be said."""
        super().__init__("the key-encryption key is not the one that this key store was made with: restore that one")


class DatabaseFailed(JindiskError, code="DatabaseFailed", exit_code=EXIT_UNAVAILABLE):
    """The database did not do what it was asked; nothing was changed."""

    def __init__(self, problem: str) -> None:
        """`problem` as the driver says it; it holds no values."""
        super().__init__(f"the key store's database failed: {problem.strip()}; see its log, then try again")


class Database:
    """An open database. Use `open`.

    Attributes:
        kek: the key-encryption key in force.
        now: the clock.
    """

    def __init__(self, engine: sa.Engine, kek: Secret, now: Callable[[], datetime]) -> None:
        """Use `open`."""
        self.engine, self.kek, self.now = engine, kek, now
        self._writing = threading.Lock()
        self._watchers: list[Callable[[], None]] = []
        self._name = secrets.token_hex(8)
        self._news: News | None = None

    @classmethod
    def open(cls, url: str, kek: Secret, now: Callable[[], datetime]) -> Database:
        """Open the database at an SQLAlchemy URL; make its tables, or bring them up to this version.

        Raises:
            NotSupported: another kind of database than SQLite and PostgreSQL.
            DatabaseNewer: a later release made it.
            KekWrong, KeyUnreadable: another key-encryption key made it.
        """
        database = cls(_engine(url), kek, now)
        try:
            with database.write() as connection:
                _upgrade(connection, kek)
        except BaseException:
            database.close()
            raise
        return database

    def watch(self, changed: Callable[[], None]) -> None:
        """Have `changed()` called after each write that is durable, in the thread that wrote.

        It must not block or raise. What other brokers on a shared database write is told within seconds, in another
        thread, until the database is closed.
        """
        self._watchers.append(changed)
        if self.shared and self._news is None:
            self._news = News(self.engine, self._name, self._tell)

    def _tell(self) -> None:
        for changed in self._watchers:
            changed()

    @property
    def shared(self) -> bool:
        """Whether other brokers may be using it too."""
        return self.engine.dialect.name == "postgresql"

    def close(self) -> None:
        """Close all connections."""
        if self._news is not None:
            self._news.close()
            self._news = None
        self.engine.dispose()

    @contextlib.contextmanager
    def write(self) -> Iterator[sa.Connection]:
        """A transaction that is alone in writing, and durable when it ends without an exception."""
        engine = self.engine.execution_options(jindiskd_writes=True)
        with self._writing, _plain_errors(), engine.begin() as connection:
            if self.shared:
                connection.execute(sa.text("SET LOCAL synchronous_commit = on"))
                notice = sa.func.pg_notify(CHANNEL, self._name)  # sent when the transaction is durable
                connection.execute(sa.select(sa.func.pg_advisory_xact_lock(LOCK), notice))
            yield connection
        self._tell()

    @contextlib.contextmanager
    def alone(self) -> Iterator[sa.Connection]:
        """A transaction that writes rows whose own locks suffice: nothing of the audit log, nothing counted."""
        if not self.shared:
            with self.write() as connection:
                yield connection
            return
        with _plain_errors(), self.engine.begin() as connection:
            yield connection

    @contextlib.contextmanager
    def read(self) -> Iterator[sa.Connection]:
        """A transaction for reading: one consistent view."""
        with _plain_errors(), self.engine.connect() as connection, connection.begin():
            yield connection

    def change_kek(self, new: Secret) -> int:
        """Wrap everything anew, in one transaction; returns the number of values. Then `new` is in force here.

        Other brokers on the database cannot open anything until they are started with the new one.

        Raises:
            KeyUnreadable: something does not open with the one in force; nothing was changed.
        """
        changed = 0
        with self.write() as connection:
            for table, column, purpose, owner in WRAPPED:
                query = sa.select(owner, column).where(column.is_not(None))
                if table is meta_table:
                    query = query.where(owner.in_([KEK, SIGNING, TRANSFER]))
                for name, wrapped in connection.execute(query).all():
                    with wrap.unwrap(self.kek, bytes(wrapped), purpose=purpose, owner=name) as value:
                        again = wrap.wrap(new, value, purpose=purpose, owner=name)
                    connection.execute(sa.update(table).where(owner == name).values({column.name: again}))
                    changed += 1
        self.kek = new
        return changed

    def signing_key(self, make: Callable[[], bytes]) -> Secret:
        """The key that signs tokens, shared by all brokers on this database; `make` draws it the first time."""
        return self._own_key(SIGNING, make)

    def transfer_key(self, make: Callable[[], bytes]) -> Secret:
        """The key that image keys are encrypted to on their way here; shared and made as the other."""
        return self._own_key(TRANSFER, make)

    def _own_key(self, name: str, make: Callable[[], bytes]) -> Secret:
        with self.write() as connection:
            stored = connection.scalar(sa.select(meta_table.c.value).where(meta_table.c.name == name))
            if stored is not None:
                return wrap.unwrap(self.kek, bytes(stored), purpose=META_PURPOSE, owner=name)
            key = Secret(bytearray(make()))
            wrapped = wrap.wrap(self.kek, key, purpose=META_PURPOSE, owner=name)
            connection.execute(meta_table.insert().values(name=name, value=wrapped))
            return key

    def setting(self, name: str) -> bytes | None:
        """A value that is no secret, kept for all brokers on this database; None where it was never set."""
        with self.read() as connection:
            stored = connection.scalar(sa.select(meta_table.c.value).where(meta_table.c.name == f"setting {name}"))
        return bytes(stored) if stored is not None else None

    @staticmethod
    def set_setting(connection: sa.Connection, name: str, value: bytes) -> None:
        """Keep such a value, within a write transaction."""
        stored = f"setting {name}"
        connection.execute(meta_table.delete().where(meta_table.c.name == stored))
        connection.execute(meta_table.insert().values(name=stored, value=value))


KEY_PURPOSE, ANCHOR_PURPOSE, PENDING_PURPOSE, META_PURPOSE = "volume key", "volume anchor", "pending session", "broker"
KEK, SIGNING, TRANSFER, VERSION_NAME = "kek", "signing-key", "transfer-key", "version"
CHANGE_PREFIX = "change "
"""Of the names in `meta` of changes that are under way (`keys.changes`), before the image's id."""
AMENDED_PREFIX = "amended "
"""Of the names in `meta` of amendments that were taken over, before the image's id, a blank and their digest."""
WRAPPED: tuple[tuple[sa.Table, sa.Column[Any], str, sa.Column[Any]], ...] = (
    (images_table, images_table.c.wrapped, KEY_PURPOSE, images_table.c.image_id),
    (keys_table, keys_table.c.wrapped, KEY_PURPOSE, keys_table.c.resource),
    (volumes_table, volumes_table.c.anchor, ANCHOR_PURPOSE, volumes_table.c.volume),
    (volumes_table, volumes_table.c.pending, PENDING_PURPOSE, volumes_table.c.volume),
    (meta_table, meta_table.c.value, META_PURPOSE, meta_table.c.name),
)


@contextlib.contextmanager
def _plain_errors() -> Iterator[None]:
    """The driver's errors as ours; a value that is taken already is for the caller."""
    try:
        yield
    except sa.exc.IntegrityError:
        raise
    except sa.exc.DBAPIError as exc:
        raise DatabaseFailed(str(exc.orig)) from exc


def _engine(url: str) -> sa.Engine:
    parsed = sa.make_url(url)
    if parsed.drivername == "postgresql":
        parsed = parsed.set(drivername="postgresql+psycopg")
    kind = parsed.get_backend_name()
    if kind == "postgresql":
        limit_ms = int(WAIT_S * 1000)
        arguments = {
            "connect_timeout": int(WAIT_S),
            "options": f"-c lock_timeout={limit_ms} -c statement_timeout={limit_ms}",
        }
        # A server that was restarted is noticed when a connection is taken out, not by a guest.
        return sa.create_engine(parsed, connect_args=arguments, pool_pre_ping=True, hide_parameters=True)
    if kind != "sqlite":
        raise NotSupported(f"a key store in {kind}", "use SQLite, or PostgreSQL for several brokers")
    engine = sa.create_engine(parsed, connect_args={"timeout": WAIT_S}, hide_parameters=True)

    @sa.event.listens_for(engine, "connect")
    def durable(connection: Any, _record: object) -> None:
        connection.isolation_level = None  # the driver begins no transactions of its own; `begin` below does
        cursor = connection.cursor()
        cursor.execute("PRAGMA journal_mode=WAL")
        cursor.execute("PRAGMA synchronous=FULL")  # a decision is on the disk before it is acted upon
        cursor.close()

    @sa.event.listens_for(engine, "begin")
    def begin(connection: sa.Connection) -> None:
        # IMMEDIATE: what a writer has read cannot be changed by another process before it writes.
        writes = connection.get_execution_options().get("jindiskd_writes")
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine


def _upgrade(connection: sa.Connection, kek: Secret) -> None:
    """Bring the tables to `VERSION`. Version 1 had images and audit alone, and no table that said so."""
    present = set(sa.inspect(connection).get_table_names())
    found = 1 if "images" in present else 0
    if "meta" in present:
        stored = connection.scalar(sa.select(meta_table.c.value).where(meta_table.c.name == VERSION_NAME))
        found = int(bytes(stored)) if stored is not None else found
    if found > VERSION:
        raise DatabaseNewer(found)
    if found == 1:
        # There is no check value yet: one of its keys tells whether the key-encryption key is right.
        query = sa.select(images_table.c.image_id, images_table.c.wrapped).limit(1)
        one = connection.execute(query).first()
        if one is not None:
            wrap.unwrap(kek, bytes(one.wrapped), purpose=KEY_PURPOSE, owner=one.image_id).close()
    if found == 0:
        META.create_all(connection)
    elif found < VERSION:
        # Here, since Alembic takes a seventh of the time that the service needs to start, for what is done once.
        from jindiskd.keys import migrations

        migrations.run(connection, found)
    if found < 2:
        check = wrap.wrap(kek, Secret(KEK_CHECK), purpose=META_PURPOSE, owner=KEK)
        connection.execute(meta_table.insert().values(name=KEK, value=check))
        connection.execute(meta_table.insert().values(name=VERSION_NAME, value=b""))
    stored = connection.scalar(sa.select(meta_table.c.value).where(meta_table.c.name == KEK))
    try:
        wrap.unwrap(kek, bytes(stored or b""), purpose=META_PURPOSE, owner=KEK).close()
    except wrap.KeyUnreadable as exc:
        raise KekWrong from exc
    if found < VERSION:
        version = meta_table.update().where(meta_table.c.name == VERSION_NAME)
        connection.execute(version.values(value=str(VERSION).encode()))
