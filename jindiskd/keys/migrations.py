"""From the tables of earlier releases to those of this one, a function a version; with Alembic's operations.

Of Alembic the operations alone are used, which write one change for SQLite and PostgreSQL. Its own table of versions is
not: our `meta` table has had the version from the start, earlier releases read it there to refuse what they do not
know, and all steps must be one transaction with the check of the key-encryption key.
"""

from __future__ import annotations

from collections.abc import Callable

import sqlalchemy as sa
from alembic.migration import MigrationContext
from alembic.operations import Operations


def run(connection: sa.Connection, found: int) -> None:
    """Take every step from version `found` on, within the caller's write transaction."""
    operations = Operations(MigrationContext.configure(connection))
    for version, step in STEPS:
        if version > found:
            step(operations)


def _to_2(op: Operations) -> None:
    """Rules and revisions of images; volumes, releases, approvals, sessions; a table that says its version."""
    op.add_column("images", sa.Column("rules", sa.String, nullable=False, server_default=""))
    op.add_column("images", sa.Column("revision", sa.Integer, nullable=False, server_default="0"))
    op.create_table(
        "meta",
        sa.Column("name", sa.String, primary_key=True),
        sa.Column("value", sa.LargeBinary, nullable=False),
    )
    op.create_table(
        "volumes",
        sa.Column("volume", sa.String, primary_key=True),
        sa.Column("image_id", sa.String, nullable=False),
        sa.Column("anchor", sa.LargeBinary),
        sa.Column("pending", sa.LargeBinary),
        sa.Column("accept_any", sa.Boolean, nullable=False),
        sa.Column("pending_any", sa.Boolean, nullable=False),
        sa.Column("lease_until", sa.Float, nullable=False),
    )
    op.create_index("ix_volumes_image_id", "volumes", ["image_id"])
    op.create_table(
        "releases",
        sa.Column("number", sa.Integer, primary_key=True),
        sa.Column("image_id", sa.String, nullable=False),
        sa.Column("guest", sa.String, nullable=False),
        sa.Column("at", sa.Float, nullable=False),
    )
    op.create_index("releases_by_time", "releases", ["image_id", "at"])
    op.create_index("releases_by_guest", "releases", ["image_id", "guest"])
    op.create_table(
        "approvals",
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
    op.create_table(
        "sessions",
        sa.Column("session_id", sa.String, primary_key=True),
        sa.Column("peer", sa.String, nullable=False),
        sa.Column("nonce", sa.String, nullable=False),
        sa.Column("stage", sa.String, nullable=False),
        sa.Column("expires", sa.Float, nullable=False),
        sa.Column("asked", sa.Integer, nullable=False),
        sa.Column("tee_pubkey", sa.JSON, nullable=False),
        sa.Column("facts", sa.JSON, nullable=False),
        sa.Column("report", sa.LargeBinary, nullable=False),
    )
    op.create_index("ix_sessions_peer", "sessions", ["peer"])
    op.create_index("ix_sessions_expires", "sessions", ["expires"])


def _to_3(op: Operations) -> None:
    """Several keys an image, and which of them a volume and a release is about; tokens of administrators."""
    op.create_table(
        "keys",
        sa.Column("resource", sa.String, primary_key=True),
        sa.Column("image_id", sa.String, nullable=False),
        sa.Column("wrapped", sa.LargeBinary, nullable=False),
        sa.Column("created", sa.String, nullable=False),
    )
    op.create_index("ix_keys_image_id", "keys", ["image_id"])
    for table in ("volumes", "releases"):
        op.add_column(table, sa.Column("resource", sa.String, nullable=False, server_default=""))
    op.create_table(
        "tokens",
        sa.Column("name", sa.String, primary_key=True),
        sa.Column("digest", sa.String, nullable=False, unique=True),
        sa.Column("role", sa.String, nullable=False),
        sa.Column("created", sa.String, nullable=False),
        sa.Column("expires", sa.Float, nullable=False),
    )


STEPS: tuple[tuple[int, Callable[[Operations], None]], ...] = ((2, _to_2), (3, _to_3))
