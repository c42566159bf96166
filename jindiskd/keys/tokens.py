"""Tokens by which a broker is administered over the network. The database has their digests, a person has the token.

A token is `jdt_` and 43 characters of base64url, 256 bits; so a plain digest of it is enough. Calls block.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import sqlalchemy as sa

from jindiskd.errors import AlreadyExists, InvalidArgument, NotFound
from jindiskd.keys.audit import AuditLog, Requester
from jindiskd.keys.database import Database, tokens_table
from jindiskd.keys.roles import Role

PREFIX = "jdt_"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
MOST_LIFE_S = 10 * 366 * 86400


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRecord:
    """What is known of a token."""

    name: str
    role: Role
    created: str
    expires: float
    """Seconds since the epoch."""


class Tokens:
    """The tokens in one database."""

    def __init__(self, database: Database, audit: AuditLog) -> None:
        """Read nothing yet."""
        self._database, self._audit = database, audit

    def add(self, name: str, role: Role, life_s: int, by: Requester) -> str:
        """Make a token; it is returned once and kept nowhere.

        Raises:
            AlreadyExists: the name is taken. InvalidArgument: name or life cannot be.
        """
        if not NAME.fullmatch(name):
            remedy = "it has 1 to 63 letters, digits, '.', '_' or '-', and begins with a letter or digit"
            raise InvalidArgument("token name", name[:100], remedy)
        if not 1 <= life_s <= MOST_LIFE_S:
            raise InvalidArgument("life of the token", life_s, f"it is 1 to {MOST_LIFE_S} seconds")
        token, now = PREFIX + secrets.token_urlsafe(32), self._database.now()
        row = {
            "name": name,
            "digest": digest_of(token),
            "role": role.value,
            "created": now.isoformat(),
            "expires": now.timestamp() + life_s,
        }
        try:
            with self._database.write() as connection:
                connection.execute(tokens_table.insert().values(row))
                self._audit.append(connection, "token added", "", by, {"name": name, "role": role.value})
        except sa.exc.IntegrityError as exc:
            raise AlreadyExists("token", name) from exc
        return token

    def remove(self, name: str, by: Requester) -> None:
        """Make a token worthless at once; raises `NotFound`."""
        with self._database.write() as connection:
            if not connection.execute(tokens_table.delete().where(tokens_table.c.name == name)).rowcount:
                raise NotFound("token", name)
            self._audit.append(connection, "token removed", "", by, {"name": name})

    def list(self) -> Sequence[TokenRecord]:
        """All of them, by name."""
        with self._database.read() as connection:
            rows = connection.execute(sa.select(tokens_table).order_by(tokens_table.c.name)).mappings().all()
        return [
            TokenRecord(name=row["name"], role=Role(row["role"]), created=row["created"], expires=row["expires"])
            for row in rows
        ]

    def find(self, token: str) -> TokenRecord | None:
        """Whose token it is; None for one that is not known or is over."""
        query = sa.select(tokens_table).where(tokens_table.c.digest == digest_of(token))
        with self._database.read() as connection:
            row = connection.execute(query).mappings().first()
        if row is None or row["expires"] <= self._database.now().timestamp():
            return None
        return TokenRecord(name=row["name"], role=Role(row["role"]), created=row["created"], expires=row["expires"])


def digest_of(token: str) -> str:
    """As kept."""
    return hashlib.sha256(token.encode()).hexdigest()
