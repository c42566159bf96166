"""AMD's certificates and revocation lists: reading them, and checking one signature at a time.

Sources: AMD 57230 "VCEK Certificate and KDS Interface Specification" chapter 3, RFC 5280. Nothing here trusts anything;
`attest.snp_chain` builds the chain, and `attest.snp_endorsement` reads what AMD's own extensions say.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import itertools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.serialization import load_der_public_key

from jindiskd.attest import der
from jindiskd.attest.model import MalformedEvidence
from jindiskd.errors import NotFound

MAX_CERTIFICATE_BYTES = 1 << 16
MAX_FILES = 64

OID_COMMON_NAME = "2.5.4.3"
OID_BASIC_CONSTRAINTS = "2.5.29.19"
OID_CRL_NUMBER = "2.5.29.20"
OID_RSASSA_PSS = "1.2.840.113549.1.1.10"
OID_MGF1 = "1.2.840.113549.1.1.8"
OID_SHA384 = "2.16.840.1.101.3.4.2.2"

SIGNED_FORM = (der.SEQUENCE, der.SEQUENCE, der.BIT_STRING)
EXTENSION_FORMS = ((der.OID, der.OCTET_STRING), (der.OID, der.BOOLEAN, der.OCTET_STRING))
CERTIFICATE_FORMS = tuple(
    (der.context(0), der.INTEGER, *[der.SEQUENCE] * 5, *extensions) for extensions in ((der.context(3),), ())
)
"""Version, serial number, algorithm, issuer, validity, subject, key, and extensions (RFC 5280 section 4.1)."""
VALIDITY_FORMS = tuple(itertools.product((der.UTC_TIME, der.GENERALIZED_TIME), repeat=2))
VERSION_3 = der.encode(der.INTEGER, b"\x02")
SHA384 = hashes.SHA384()
PSS = padding.PSS(padding.MGF1(SHA384), 48)
AMD_KEY_BITS = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificate:
    """The parts of an X.509 certificate that a chain check needs; none of them believed."""

    der: bytes
    tbs: bytes
    serial: int
    issuer: bytes
    subject: bytes
    issuer_cn: str
    subject_cn: str
    not_before: datetime
    not_after: datetime
    spki: bytes
    extensions: Mapping[str, tuple[bool, bytes]]
    """By dotted identifier: whether critical, and the bytes inside."""
    signature: bytes
    sha256: str
    """Digest of the whole certificate in hexadecimal: what is pinned, cached and logged."""

    @property
    def is_authority(self) -> bool:
        """True where basicConstraints says that it may sign certificates."""
        _critical, value = self.extensions.get(OID_BASIC_CONSTRAINTS, (False, b""))
        if not value:
            return False
        first = der.Fields(der.whole(value, der.SEQUENCE, "basicConstraints"), "basicConstraints").optional(der.BOOLEAN)
        return first is not None and der.boolean(first)


@dataclass(frozen=True, slots=True, kw_only=True)
class RevocationList:
    """A certificate revocation list; not believed until its signature was checked."""

    tbs: bytes
    issuer: bytes
    this_update: datetime
    next_update: datetime | None
    revoked: frozenset[int]
    signature: bytes
    sha256: str
    """Digest of the whole list in hexadecimal."""


def to_der(blob: bytes, what: str = "certificate") -> list[bytes]:
    """The DER structures in `blob`, which is one DER structure or any number of PEM blocks.

    Padding with zero bytes or white space after them is ignored: hosts store both forms that way.

    Raises:
        MalformedEvidence: neither, or longer than 64 KiB.
    """
    if len(blob) > MAX_CERTIFICATE_BYTES:
        raise MalformedEvidence(what, f"it is longer than {MAX_CERTIFICATE_BYTES} bytes")
    if blob[:1] == bytes([der.SEQUENCE]):
        end = der.ends_at(blob)
        if end == len(blob):
            return [blob]
        if blob[end:].strip(b"\0"):
            raise MalformedEvidence(what, "something follows the DER structure")
        return [blob[:end]]
    pattern = re.compile(rb"-----BEGIN (CERTIFICATE|X509 CRL)-----\s([A-Za-z0-9+/=\s]*)-----END \1-----")
    found = []
    for match in pattern.finditer(blob):
        try:
            found.append(base64.b64decode(b"".join(match[2].split()), validate=True))
        except binascii.Error as exc:
            raise MalformedEvidence(what, "a PEM block is not base64") from exc
    if not found:
        raise MalformedEvidence(what, "it is neither DER nor PEM")
    return found


def read_files(paths: Iterable[Path]) -> list[bytes]:
    """Certificates and lists of files, in DER or PEM, each as DER; a directory stands for the files in it.

    Raises:
        NotFound: a path that does not exist.
        MalformedEvidence: a file that holds neither, or more than 64 files.
    """
    files: list[Path] = []
    for path in paths:
        if not path.exists():
            raise NotFound("certificate file", str(path))
        files += sorted(child for child in path.iterdir() if child.is_file()) if path.is_dir() else [path]
    if len(files) > MAX_FILES:
        raise MalformedEvidence("set of certificates", f"it has more than {MAX_FILES} files")
    found = []
    for path in files:
        with path.open("rb") as stream:
            found += to_der(stream.read(MAX_CERTIFICATE_BYTES + 1), f"certificate file {path}")
    return found


@lru_cache(maxsize=128)
def _common_name(raw: bytes) -> str:
    names = []
    for relative in der.children(der.whole(raw, der.SEQUENCE, "name")):
        for attribute in der.children(relative):
            kind, value = der.Fields(attribute, "name").take(der.OID), der.children(attribute)[-1]
            if der.oid(kind) == OID_COMMON_NAME:
                names.append(der.text(value))
    if len(names) != 1:
        raise MalformedEvidence("certificate", f"a name has {len(names)} common names instead of one")
    return names[0]


@lru_cache(maxsize=32)
def _check_algorithm(raw: bytes, what: str) -> None:
    """Require RSASSA-PSS with SHA-384, MGF1 with SHA-384 and a salt of 48 bytes (RFC 4055 section 3.1)."""
    parts = der.Fields(der.whole(raw, der.SEQUENCE, what), what)
    if der.oid(parts.take(der.OID)) != OID_RSASSA_PSS:
        raise MalformedEvidence(what, "it is not signed with RSASSA-PSS")
    parameters = der.Fields(parts.take(der.SEQUENCE), what)
    parts.end()
    found: dict[int, der.Element] = {}
    for number in range(4):
        element = parameters.optional(der.context(number))
        if element is not None:
            found[number] = der.read(element.content)[0]
    parameters.end()

    def is_sha384(element: der.Element) -> bool:
        return der.oid(der.children(element)[0]) == OID_SHA384

    good = set(found) >= {0, 1, 2} and all(der.children(found[number]) for number in (0, 1))
    if good:
        mask = der.children(found[1])
        good = (
            is_sha384(found[0])
            and len(mask) == 2
            and der.oid(mask[0]) == OID_MGF1
            and bool(der.children(mask[1]))
            and is_sha384(mask[1])
            and der.integer(found[2]) == 48
            and (3 not in found or der.integer(found[3]) == 1)
        )
    if not good:
        raise MalformedEvidence(what, "its RSASSA-PSS parameters are not SHA-384, MGF1 with SHA-384, salt 48")


def _extensions(holder: der.Element | None) -> dict[str, tuple[bool, bytes]]:
    found: dict[str, tuple[bool, bytes]] = {}
    if holder is None:
        return found
    data = der.whole(holder.content, der.SEQUENCE, "extensions").content
    at, size, count = 0, len(data), 0
    while at < size:
        plain = der.short_extension(data, at)
        if plain is not None:
            name, critical, value, at = plain
            extension = (critical, value)
        else:
            entry, at = der.read(data, at)
            if entry.tag != der.SEQUENCE:
                raise MalformedEvidence("certificate", "an extension is not a SEQUENCE")
            parts = der.sequence(entry, "extension", *EXTENSION_FORMS)
            name = der.oid(parts[0])
            extension = (len(parts) == 3 and der.boolean(parts[1]), parts[-1].content)
        if name in found:
            raise MalformedEvidence("certificate", f"it has the extension {name} twice")
        found[name] = extension
        count += 1
        if count > der.MAX_CHILDREN:
            raise MalformedEvidence("certificate", f"it has more than {der.MAX_CHILDREN} extensions")
    return found


def parse_certificate(blob: bytes, sha256: bytes | None = None) -> Certificate:
    """Read an X.509 version 3 certificate (DER) signed with RSASSA-PSS as AMD does it.

    Args:
        blob: the certificate.
        sha256: its digest, where the caller has just taken it.

    Raises:
        MalformedEvidence: anything else, or bytes after its end.
    """
    what = "certificate"
    tbs, algorithm, signature = der.sequence(der.whole(blob, der.SEQUENCE, what), what, SIGNED_FORM)
    version, serial, inner, issuer, validity, subject, spki, *more = der.sequence(tbs, what, *CERTIFICATE_FORMS)
    if version.content != VERSION_3:
        raise MalformedEvidence(what, "it is not of X.509 version 3")
    if inner.raw != algorithm.raw:
        raise MalformedEvidence(what, "its two signature algorithms differ")
    _check_algorithm(algorithm.raw, what)
    not_before, not_after = der.sequence(validity, what, *VALIDITY_FORMS)
    return Certificate(
        der=blob,
        tbs=tbs.raw,
        serial=der.integer(serial),
        issuer=issuer.raw,
        subject=subject.raw,
        issuer_cn=_common_name(issuer.raw),
        subject_cn=_common_name(subject.raw),
        not_before=der.time(not_before),
        not_after=der.time(not_after),
        spki=spki.raw,
        extensions=_extensions(more[0] if more else None),
        signature=der.bit_string(signature),
        sha256=(sha256 or hashlib.sha256(blob).digest()).hex(),
    )


def parse_crl(blob: bytes) -> RevocationList:
    """Read a certificate revocation list (DER), RFC 5280 section 5.1, signed as AMD does it.

    Raises:
        MalformedEvidence: anything else, or a critical extension, which could narrow what the list covers.
    """
    what = "revocation list"
    outer = der.Fields(der.whole(blob, der.SEQUENCE, what), what)
    tbs = outer.take(der.SEQUENCE)
    algorithm = outer.take(der.SEQUENCE)
    signature = der.bit_string(outer.take(der.BIT_STRING))
    outer.end()
    parts = der.Fields(tbs, what)
    parts.optional(der.INTEGER)
    if parts.take(der.SEQUENCE).raw != algorithm.raw:
        raise MalformedEvidence(what, "its two signature algorithms differ")
    _check_algorithm(algorithm.raw, what)
    issuer = parts.take(der.SEQUENCE)
    this_update = parts.optional(der.UTC_TIME, der.GENERALIZED_TIME)
    next_update = parts.optional(der.UTC_TIME, der.GENERALIZED_TIME)
    listed = parts.optional(der.SEQUENCE)
    extensions = _extensions(parts.optional(der.context(0)))
    parts.end()
    if this_update is None:
        raise MalformedEvidence(what, "it has no date")
    if any(critical for critical, _value in extensions.values()):
        raise MalformedEvidence(what, "it has a critical extension")
    entries = der.children(listed) if listed else []
    revoked = {der.integer(der.Fields(entry, what).take(der.INTEGER)) for entry in entries}
    return RevocationList(
        tbs=tbs.raw,
        issuer=issuer.raw,
        this_update=der.time(this_update),
        next_update=der.time(next_update) if next_update else None,
        revoked=frozenset(revoked),
        signature=signature,
        sha256=hashlib.sha256(blob).hexdigest(),
    )


@lru_cache(maxsize=32)
def _authority_key(spki: bytes) -> rsa.RSAPublicKey | None:
    try:
        key = load_der_public_key(spki)
    except (UnsupportedAlgorithm, ValueError):
        return None
    return key if isinstance(key, rsa.RSAPublicKey) and key.key_size == AMD_KEY_BITS else None


def signed_by(signed: Certificate | RevocationList, issuer: Certificate) -> bool:
    """True where `issuer` is named as the issuer and its 4096-bit key made the signature."""
    if signed.issuer != issuer.subject:
        return False
    key = _authority_key(issuer.spki)
    if key is None:
        return False
    try:
        key.verify(signed.signature, signed.tbs, PSS, SHA384)
    except InvalidSignature:
        return False
    return True
