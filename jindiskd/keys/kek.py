"""Where a service's key-encryption key is, and opening the store with it: the same for jindiskd and jindisk-broker.

The key is the unit's credential, a file, or sealed to a TPM. A key is drawn for a new store alone: beside keys that are
stored already it would open none of them.
"""

from __future__ import annotations

import enum
import os
import stat
from dataclasses import dataclass
from pathlib import Path

from jindiskd.base.secret import Secret
from jindiskd.errors import InvalidArgument, NotFound
from jindiskd.keys.database import KekWrong
from jindiskd.keys.store import Store
from jindiskd.keys.tpm import Tpm
from jindiskd.keys.wrap import CREDENTIAL, KEK_BYTES, KekMissing, KekUnusable, load_kek


class KekSource(enum.StrEnum):
    """Where the key-encryption key comes from."""

    AUTO = "auto"
    CREDENTIAL = "credential"
    FILE = "file"
    TPM2 = "tpm2"


@dataclass(frozen=True, slots=True, kw_only=True)
class KekPlace:
    """Where one service's key-encryption key is."""

    source: KekSource
    file: Path
    tpm2_dir: Path
    tpm2_tcti: str
    tpm2_pcrs: str
    credentials: Path | None
    """The unit's credentials directory; None where the service manager gave none."""

    @property
    def tpm(self) -> Tpm:
        """The TPM. Raises `InvalidArgument`."""
        return Tpm(self.tpm2_dir, self.tpm2_tcti, self.tpm2_pcrs)

    @property
    def found(self) -> str:
        """Where it is taken from now: `tpm2`, `credential` or `file`."""
        if self.source is KekSource.AUTO:
            return (KekSource.CREDENTIAL if self._credential else KekSource.FILE).value
        return self.source.value

    @property
    def _credential(self) -> bool:
        return self.credentials is not None and (self.credentials / CREDENTIAL).exists()

    def load(self, *, create: bool) -> Secret:
        """The key; drawn where it may be (`create`), is a file, and none is there yet. Blocks, with a TPM for a second.

        Raises:
            KekMissing, KekUnusable: it is not there, or none. KekNotUnsealed: the TPM refuses.
        """
        if self.source is KekSource.TPM2:
            return self.tpm.unseal()
        if self.source is KekSource.CREDENTIAL and not self._credential:
            raise KekMissing(f"the unit's credential {CREDENTIAL}")
        create = create and self.source is not KekSource.CREDENTIAL
        return load_kek(self.file, None if self.source is KekSource.FILE else self.credentials, create=create)

    def seal(self, *, create: bool) -> str:
        """Seal the key of the file to the TPM, drawing one if there is none and it may be; says what to do next.

        Raises:
            AlreadyExists: one is sealed already. KekMissing, KekUnusable, ToolFailed, ToolMissing.
        """
        with load_kek(self.file, None, create=create) as kek:
            self.tpm.seal(kek)
        return (
            f'Sealed in {self.tpm2_dir}. Now set kek = "tpm2" in [keys], keep a copy of {self.file} offline, and '
            "delete that file."
        )

    def warning(self) -> str:
        """What an administrator should know of it, a sentence; empty where nothing."""
        if self.found == KekSource.FILE:
            return (
                f"the key-encryption key is a file, {self.file}: better give the unit the credential {CREDENTIAL}, or "
                "seal it to the TPM (--seal-kek)"
            )
        return ""


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
