"""Checking a LUKS2 header that a hostile host supplies, and taking the volume key out of it.

The metadata of LUKS2 is not authenticated by the key: whoever holds the disk can keep the genuine key slot and turn the
data segment into `cipher_null`, and the genuine passphrase still opens it (CVE-2025-59054, CVE-2025-58356). So the
guest copies the header into memory once, checks that copy against what was recorded at build, and uses nothing but the
copy from then on. The digest over all bytes settles it; the structural check says the same again in words, needs no
trust in that digest being of a sound header, and admits exactly the form that `luks2.header` writes.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import re
from dataclasses import dataclass
from typing import Any, Protocol

from jindiskd.base.secret import Secret
from jindiskd.errors import EXIT_REFUSED, JindiskError
from jindiskd.luks2 import antiforensic, header, layout, xts
from jindiskd.luks2.layout import Luks2HeaderRefused

_DECIMAL = re.compile(r"[1-9][0-9]{0,17}")


class Expectation(Protocol):
    """What was recorded at build; `guest.config.Luks2Expectation` is one."""

    @property
    def header_bytes(self) -> int:
        """Length of the header area."""

    @property
    def header_sha256(self) -> bytes:
        """Digest over the header area."""

    @property
    def uuid(self) -> str:
        """Of the volume."""

    @property
    def cipher(self) -> str:
        """Of the data, for example `aes-xts-plain64`."""

    @property
    def key_bytes(self) -> int:
        """Length of the volume key."""

    @property
    def sector_bytes(self) -> int:
        """Unit of encryption of the data."""


class WrongKey(JindiskError, code="WrongKey", exit_code=EXIT_REFUSED):
    """The key does not open the volume."""

    def __init__(self, uuid: str) -> None:
        """`uuid` is the volume's."""
        super().__init__(f"the key does not open LUKS2 volume {uuid}: the key of this very image is needed")


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedHeader:
    """A header that has the one form we write. Made only by this module's checks."""

    uuid: str
    cipher: str
    sector_bytes: int
    key_bytes: int
    data_offset_bytes: int
    data_bytes: int
    slot_salt: bytes
    digest_salt: bytes
    digest: bytes


def parse_and_check(blob: bytes, expectation: Expectation) -> CheckedHeader:
    """Check the copied header area of a volume against what was recorded when it was built.

    Args:
        blob: the first `expectation.header_bytes` bytes of the volume, read once.
        expectation: from the measured configuration.

    Raises:
        Luks2HeaderRefused: any difference, naming the field.
    """
    if len(blob) != expectation.header_bytes:
        raise Luks2HeaderRefused("header", f"is {len(blob)} bytes long instead of {expectation.header_bytes}")
    if not hmac.compare_digest(hashlib.sha256(blob).digest(), expectation.header_sha256):
        raise Luks2HeaderRefused("header", "has another digest than the measured configuration")
    checked = parse(blob)
    for field, found, wanted in (
        ("uuid", checked.uuid, expectation.uuid),
        ("segments.0.encryption", checked.cipher, expectation.cipher),
        ("keyslots.0.key_size", checked.key_bytes, expectation.key_bytes),
        ("segments.0.sector_size", checked.sector_bytes, expectation.sector_bytes),
    ):
        if found != wanted:
            raise Luks2HeaderRefused(field, f"is {found} instead of {wanted}")
    return checked


def parse(blob: bytes) -> CheckedHeader:
    """Read a header area of `layout.DATA_OFFSET_BYTES` bytes that has exactly the form `make_header` writes.

    Raises:
        Luks2HeaderRefused: any other form, however valid LUKS2 it may be.
    """
    if len(blob) != layout.DATA_OFFSET_BYTES:
        raise Luks2HeaderRefused("header", f"is {len(blob)} bytes long instead of {layout.DATA_OFFSET_BYTES}")
    size = layout.HEADER_BYTES
    first, area = layout.parse_copy(blob[:size], primary=True)
    second, area2 = layout.parse_copy(blob[size : 2 * size], primary=False)
    if area2 != area:
        raise Luks2HeaderRefused("secondary", "has another JSON area than the primary header")
    if second.uuid != first.uuid or not header.UUID.fullmatch(first.uuid):
        raise Luks2HeaderRefused("uuid", "differs between the two copies or is not a UUID")
    if (first.sequence, second.sequence) != (1, 1):
        raise Luks2HeaderRefused("seqid", "shows that the header was altered after the build")
    if blob[layout.KEYSLOTS_OFFSET_BYTES + layout.SLOT_AREA_BYTES :].strip(b"\0"):
        raise Luks2HeaderRefused("keyslots", "area has data outside the only key slot")
    values = _json(area)
    slot_salt = _bytes(values, layout.SALT_BYTES, "keyslots", "0", "kdf", "salt")
    digest_salt = _bytes(values, layout.SALT_BYTES, "digests", "0", "salt")
    digest = _bytes(values, layout.DIGEST_BYTES, "digests", "0", "digest")
    data_bytes = _size(values, "segments", "0", "size")
    wanted = header.metadata(slot_salt=slot_salt, digest_salt=digest_salt, digest=digest, data_bytes=data_bytes)
    _same(values, wanted, "")
    if header.encode(wanted) != area:
        raise Luks2HeaderRefused("json", "is not written in the one form that is accepted")
    segment = wanted["segments"]["0"]
    return CheckedHeader(
        uuid=first.uuid,
        cipher=segment["encryption"],
        sector_bytes=segment["sector_size"],
        key_bytes=wanted["keyslots"]["0"]["key_size"],
        data_offset_bytes=layout.DATA_OFFSET_BYTES,
        data_bytes=data_bytes,
        slot_salt=slot_salt,
        digest_salt=digest_salt,
        digest=digest,
    )


def unlock(blob: bytes, passphrase: Secret) -> Secret:
    """Take the volume key, 64 bytes, out of a header area; check it with `parse_and_check` first.

    Raises:
        Luks2HeaderRefused: the header is not of our form.
        WrongKey: `passphrase` does not open the key slot.
    """
    checked = parse(blob)
    start = layout.KEYSLOTS_OFFSET_BYTES
    material = xts.decrypt(
        header.slot_key(passphrase, checked.slot_salt),
        blob[start : start + layout.SLOT_AREA_BYTES],
        sector_bytes=layout.AREA_SECTOR_BYTES,
        first_tweak=0,
        step=1,
    )
    volume_key = Secret(antiforensic.merge(material[: layout.KEY_BYTES * layout.STRIPES], layout.KEY_BYTES))
    if not hmac.compare_digest(header.key_digest(volume_key.reveal(), checked.digest_salt), checked.digest):
        volume_key.close()
        raise WrongKey(checked.uuid)
    return volume_key


def _json(area: bytes) -> dict[str, Any]:
    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise Luks2HeaderRefused("json", "names a member twice")
        return found

    try:
        values = json.loads(area.rstrip(b"\0"), object_pairs_hook=no_duplicates)
    except (ValueError, RecursionError) as exc:
        raise Luks2HeaderRefused("json", "cannot be read") from exc
    if not isinstance(values, dict):
        raise Luks2HeaderRefused("json", "is not an object")
    return values


def _text(values: dict[str, Any], *path: str) -> str:
    at: Any = values
    for name in path:
        at = at.get(name) if isinstance(at, dict) else None
    if not isinstance(at, str):
        raise Luks2HeaderRefused(".".join(path), "is missing or not text")
    return at


def _bytes(values: dict[str, Any], length: int, *path: str) -> bytes:
    try:
        found = base64.b64decode(_text(values, *path), validate=True)
    except (binascii.Error, ValueError) as exc:
        raise Luks2HeaderRefused(".".join(path), "is not base64") from exc
    if len(found) != length:
        raise Luks2HeaderRefused(".".join(path), f"has {len(found)} bytes instead of {length}")
    return found


def _size(values: dict[str, Any], *path: str) -> int:
    text = _text(values, *path)
    if not _DECIMAL.fullmatch(text) or int(text) % layout.SECTOR_BYTES:
        raise Luks2HeaderRefused(".".join(path), f"is not a whole number of {layout.SECTOR_BYTES}-byte sectors")
    return int(text)


def _same(found: Any, wanted: Any, path: str) -> None:
    """Compare two JSON values of the same nesting, and name the first member that differs."""
    if type(found) is not type(wanted):
        raise Luks2HeaderRefused(path or "json", "is of another type")
    if isinstance(wanted, dict):
        for name in sorted(found.keys() ^ wanted.keys()):
            raise Luks2HeaderRefused(f"{path}.{name}".lstrip("."), "is unexpected" if name in found else "is missing")
        for name, value in wanted.items():
            _same(found[name], value, f"{path}.{name}".lstrip("."))
    elif found != wanted:
        raise Luks2HeaderRefused(path, f"is not {wanted!r}")
