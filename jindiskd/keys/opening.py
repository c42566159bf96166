"""Opening the store with its key-encryption key, and what is done to that key while no service runs."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from jindiskd.base.secret import Secret
from jindiskd.errors import InvalidArgument, NotFound
from jindiskd.keys.database import KekWrong
from jindiskd.keys.kek import KekPlace
from jindiskd.keys.store import Store
from jindiskd.keys.wrap import KEK_BYTES, KekMissing, KekUnusable


def _is_fresh(database: Path) -> bool:
    """Whether a SQLite file holds nothing yet."""
    return not database.exists() or database.stat().st_size == 0


def open_store(place: KekPlace, url: str, database: Path | None) -> Store:
    """Open the key store. Blocks.

    Args:
        place: of the key-encryption key.
        url: of the database.
        database: the SQLite file that `url` names, which is made readable for us alone before anything is in it; None
            for another database. With a shared database a key is drawn for the first service alone: the next one must
            be given a copy.

    Raises:
        KekMissing, KekUnusable, KekNotUnsealed, KekWrong: the key is not there, or not that of the store.
    """
    fresh = True
    if database is not None:
        fresh = _is_fresh(database)
        os.close(os.open(database, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    had = place.file.exists()
    kek = place.load(create=fresh)
    try:
        return Store.open(url, kek)
    except KekWrong as exc:
        if had or not place.file.exists():
            raise
        place.file.unlink()  # it was drawn just now, for a database that has one already
        raise KekMissing(str(place.file)) from exc


def seal_kek(place: KekPlace, database: Path | None) -> str:
    """Seal the key of the file to the TPM, while the service is stopped; says what to do next. See `KekPlace.seal`."""
    place.file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    return place.seal(create=database is not None and _is_fresh(database))


def rotate_kek(place: KekPlace, url: str, database: Path | None, file: Path) -> str:
    """Wrap everything in the store anew by the key in `file`; says what to do next. All services on it are stopped.

    Raises:
        NotFound, InvalidArgument, KekUnusable: the file is not there, is readable by others, or holds no key.
        Others as `open_store`.
    """
    try:
        mode = file.stat().st_mode
        new = Secret(bytearray(file.read_bytes()))
    except FileNotFoundError as exc:
        raise NotFound("file of the new key", str(file)) from exc
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise InvalidArgument("the file of the new key", str(file), "make it readable by its owner alone: chmod 600")
    if len(new) != KEK_BYTES:
        raise KekUnusable(str(file))
    store = open_store(place, url, database)
    try:
        changed = store.database.change_kek(new)
        with store.database.write() as connection:
            store.audit.append(connection, "key-encryption key changed", "", detail={"values": changed})
    finally:
        store.close()
    return f"{changed} values are wrapped by the new key. Put {file} in the old one's place, then start again."
