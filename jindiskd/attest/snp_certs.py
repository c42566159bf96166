"""AMD's certificates, revocation lists and certificate tables: reading them, and checking one signature at a time.

Sources: AMD 57230 "VCEK Certificate and KDS Interface Specification" chapter 3 (certificates and extensions), RFC 5280
(lists), GHCB specification 4.1.8.1 (table). Nothing here trusts anything; `jindiskd.attest.snp` builds the chain.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.serialization import load_der_public_key

from jindiskd.attest import der
from jindiskd.attest.model import MalformedEvidence
from jindiskd.attest.snp_report import Product, Tcb
from jindiskd.errors import NotFound

MAX_CERTIFICATE_BYTES = 1 << 16
MAX_TABLE_BYTES = 1 << 16
MAX_FILES = 64

OID_COMMON_NAME = "2.5.4.3"
OID_BASIC_CONSTRAINTS = "2.5.29.19"
OID_CRL_NUMBER = "2.5.29.20"
OID_RSASSA_PSS = "1.2.840.113549.1.1.10"
OID_MGF1 = "1.2.840.113549.1.1.8"
OID_SHA384 = "2.16.840.1.101.3.4.2.2"

OID_AMD = "1.3.6.1.4.1.3704.1"
OID_STRUCTURE_VERSION = f"{OID_AMD}.1"
OID_PRODUCT = f"{OID_AMD}.2"
OID_BOOTLOADER = f"{OID_AMD}.3.1"
OID_TEE = f"{OID_AMD}.3.2"
OID_SNP = f"{OID_AMD}.3.3"
OID_RESERVED_SPL = tuple(f"{OID_AMD}.3.{number}" for number in (4, 5, 6, 7))
OID_MICROCODE = f"{OID_AMD}.3.8"
OID_FMC = f"{OID_AMD}.3.9"
OID_HARDWARE_ID = f"{OID_AMD}.4"
OID_CSP_ID = f"{OID_AMD}.5"

PSS = padding.PSS(padding.MGF1(hashes.SHA384()), 48)
AMD_KEY_BITS = 4096

TABLE_GUIDS: Mapping[str, str] = {
    "c0b406a4-a803-4952-9743-3fb6014cd0ae": "ARK",
    "4ab7b379-bbac-4fe4-a02f-05aef327c782": "ASK",
    "63da758d-e664-4564-adc5-f4b93be8accd": "VCEK",
    "a8074bc2-a25a-483e-aae6-39c045a0b8a1": "VLEK",
    "92f81bc3-5811-4d3d-97ff-d19f88dc67ea": "CRL",
}


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
    sha256: str = field(init=False)
    """Digest of the whole certificate in hexadecimal: what is pinned, cached and logged."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "sha256", hashlib.sha256(self.der).hexdigest())

    @property
    def is_authority(self) -> bool:
        """True where basicConstraints says that it may sign certificates."""
        _critical, value = self.extensions.get(OID_BASIC_CONSTRAINTS, (False, b""))
        if not value:
            return False
        first = der.Fields(der.whole(value, der.SEQUENCE, "basicConstraints"), "basicConstraints").optional(der.BOOLEAN)
        return first is not None and der.boolean(first)


@dataclass(frozen=True, slots=True, kw_only=True)
class Endorsement:
    """What a VCEK or VLEK certificate vouches for, from its extensions."""

    product: Product
    tcb: Tcb
    hardware_id: bytes | None
    """VCEK: 64 bytes, or 8 from Turin on. None for a VLEK."""
    csp_id: str | None
    """VLEK: the provider, such as `CN=cc-us-east-2.amazonaws.com`. None for a VCEK."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RevocationList:
    """A certificate revocation list; not believed until its signature was checked."""

    tbs: bytes
    issuer: bytes
    this_update: datetime
    next_update: datetime | None
    revoked: frozenset[int]
    signature: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class TableEntry:
    """One entry of a certificate table that came with a report."""

    guid: str
    kind: str | None
    """ARK, ASK (also an ASVK), VCEK, VLEK or CRL; None for an identifier we do not know."""
    data: bytes


def to_der(blob: bytes, what: str = "certificate") -> list[bytes]:
    """The DER structures in `blob`, which is one DER structure or any number of PEM blocks.

    Padding with zero bytes or white space after them is ignored: hosts store both forms that way.

    Raises:
        MalformedEvidence: neither, or longer than 64 KiB.
    """
    if len(blob) > MAX_CERTIFICATE_BYTES:
        raise MalformedEvidence(what, f"it is longer than {MAX_CERTIFICATE_BYTES} bytes")
    if blob[:1] == bytes([der.SEQUENCE]):
        _element, end = der.read(blob)
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
def _common_name(name: der.Element) -> str:
    names = []
    for relative in der.children(name):
        for attribute in der.children(relative):
            kind, value = der.Fields(attribute, "name").take(der.OID), der.children(attribute)[-1]
            if der.oid(kind) == OID_COMMON_NAME:
                names.append(der.text(value))
    if len(names) != 1:
        raise MalformedEvidence("certificate", f"a name has {len(names)} common names instead of one")
    return names[0]


@lru_cache(maxsize=32)
def _check_algorithm(algorithm: der.Element, what: str) -> None:
    """Require RSASSA-PSS with SHA-384, MGF1 with SHA-384 and a salt of 48 bytes (RFC 4055 section 3.1)."""
    parts = der.Fields(algorithm, what)
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
    for entry in der.children(der.whole(holder.content, der.SEQUENCE, "extensions")):
        parts = der.Fields(entry, "extension")
        name = der.oid(parts.take(der.OID))
        critical = parts.optional(der.BOOLEAN)
        value = parts.take(der.OCTET_STRING).content
        parts.end()
        if name in found:
            raise MalformedEvidence("certificate", f"it has the extension {name} twice")
        found[name] = (critical is not None and der.boolean(critical), value)
    return found


def parse_certificate(blob: bytes) -> Certificate:
    """Read an X.509 version 3 certificate (DER) signed with RSASSA-PSS as AMD does it.

    Raises:
        MalformedEvidence: anything else, or bytes after its end.
    """
    what = "certificate"
    outer = der.Fields(der.whole(blob, der.SEQUENCE, what), what)
    tbs = outer.take(der.SEQUENCE)
    algorithm = outer.take(der.SEQUENCE)
    signature = der.bit_string(outer.take(der.BIT_STRING))
    outer.end()
    parts = der.Fields(tbs, what)
    version = der.read(parts.take(der.context(0)).content)[0]
    if der.integer(version) != 2:
        raise MalformedEvidence(what, "it is not of X.509 version 3")
    serial = der.integer(parts.take(der.INTEGER))
    if parts.take(der.SEQUENCE).raw != algorithm.raw:
        raise MalformedEvidence(what, "its two signature algorithms differ")
    _check_algorithm(algorithm, what)
    issuer = parts.take(der.SEQUENCE)
    validity = der.Fields(parts.take(der.SEQUENCE), what)
    dates = [validity.optional(der.UTC_TIME, der.GENERALIZED_TIME) for _ in range(2)]
    validity.end()
    if dates[0] is None or dates[1] is None:
        raise MalformedEvidence(what, "its validity is not two dates")
    subject = parts.take(der.SEQUENCE)
    spki = parts.take(der.SEQUENCE)
    extensions = _extensions(parts.optional(der.context(3)))
    parts.end()
    return Certificate(
        der=bytes(blob),
        tbs=tbs.raw,
        serial=serial,
        issuer=issuer.raw,
        subject=subject.raw,
        issuer_cn=_common_name(issuer),
        subject_cn=_common_name(subject),
        not_before=der.time(dates[0]),
        not_after=der.time(dates[1]),
        spki=spki.raw,
        extensions=extensions,
        signature=signature,
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
    _check_algorithm(algorithm, what)
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
        key.verify(signed.signature, signed.tbs, PSS, hashes.SHA384())
    except InvalidSignature:
        return False
    return True


def _spl(certificate: Certificate, name: str) -> int:
    _critical, value = certificate.extensions[name]
    number = der.integer(der.whole(value, der.INTEGER, "certificate extension"))
    if not 0 <= number <= 255:
        raise MalformedEvidence("certificate", f"the security version {name} is {number}")
    return number


def parse_endorsement(certificate: Certificate) -> Endorsement:
    """Read AMD's extensions of a VCEK or VLEK certificate.

    Raises:
        MalformedEvidence: one is missing, of another form, or critical; an unknown product; reserved versions set.
    """
    what = "endorsement certificate"
    kind = certificate.subject_cn
    if kind not in {"SEV-VCEK", "SEV-VLEK"}:
        raise MalformedEvidence(what, f"its subject {kind!r} is neither SEV-VCEK nor SEV-VLEK")
    critical = [name for name, (important, _value) in certificate.extensions.items() if important]
    if critical:
        raise MalformedEvidence(what, f"the critical extension {critical[0]} is not known")
    try:
        _flag, raw_name = certificate.extensions[OID_PRODUCT]
        name = der.text(der.whole(raw_name, der.IA5_STRING, what))
        product = Product(name.partition("-")[0])
        version = _spl(certificate, OID_STRUCTURE_VERSION)
        tcb = Tcb(
            fmc=_spl(certificate, OID_FMC) if product.has_fmc else None,
            bootloader=_spl(certificate, OID_BOOTLOADER),
            tee=_spl(certificate, OID_TEE),
            snp=_spl(certificate, OID_SNP),
            microcode=_spl(certificate, OID_MICROCODE),
        )
        hardware_id = csp_id = None
        if kind == "SEV-VCEK":
            _flag, hardware_id = certificate.extensions[OID_HARDWARE_ID]
        else:
            _flag, raw_csp = certificate.extensions[OID_CSP_ID]
            csp_id = der.text(der.whole(raw_csp, der.IA5_STRING, what))
    except KeyError as exc:
        raise MalformedEvidence(what, f"the extension {exc.args[0]} is missing") from exc
    except ValueError as exc:
        raise MalformedEvidence(what, f"the product {name!r} is not known") from exc
    if version > 1:
        raise MalformedEvidence(what, f"its structure version {version} is not known")
    if any(_spl(certificate, reserved) for reserved in OID_RESERVED_SPL if reserved in certificate.extensions):
        raise MalformedEvidence(what, "a reserved security version is not zero")
    if not product.has_fmc and OID_FMC in certificate.extensions:
        raise MalformedEvidence(what, f"it has an FMC security version, which {product} does not have")
    if (OID_CSP_ID if csp_id is None else OID_HARDWARE_ID) in certificate.extensions:
        raise MalformedEvidence(what, "it names both a chip and a provider")
    if hardware_id is not None:
        size = 8 if product.has_fmc else 64
        if len(hardware_id) == size + 2 and hardware_id[:2] == bytes([der.OCTET_STRING, size]):
            hardware_id = hardware_id[2:]
        if len(hardware_id) != size:
            raise MalformedEvidence(what, f"its hardware identity has {len(hardware_id)} bytes instead of {size}")
    return Endorsement(product=product, tcb=tcb, hardware_id=hardware_id, csp_id=csp_id)


def parse_certificate_table(blob: bytes) -> list[TableEntry]:
    """Split a certificate table: what the host gives with a report (`auxblob`). May be empty.

    Entries of 24 bytes (GUID in RFC 4122 byte order, offset u32, length u32, from the start of the table) end with a
    zero entry. The host wrote it: every bound is checked.

    Raises:
        MalformedEvidence: longer than 64 KiB, no end, or an entry outside the table.
    """
    what = "certificate table"
    if len(blob) > MAX_TABLE_BYTES:
        raise MalformedEvidence(what, f"it is longer than {MAX_TABLE_BYTES} bytes")
    found: list[TableEntry] = []
    if not blob.strip(b"\0"):
        return found
    for at in range(0, 24 * MAX_FILES, 24):
        entry = blob[at : at + 24]
        if len(entry) < 24:
            raise MalformedEvidence(what, "its entries have no end")
        if not any(entry):
            break
        guid = str(uuid.UUID(bytes=entry[:16]))
        offset, length = int.from_bytes(entry[16:20], "little"), int.from_bytes(entry[20:24], "little")
        if offset + length > len(blob):
            raise MalformedEvidence(what, f"the entry {guid} points outside of it")
        found.append(TableEntry(guid=guid, kind=TABLE_GUIDS.get(guid), data=blob[offset : offset + length]))
    else:
        raise MalformedEvidence(what, f"it has more than {MAX_FILES - 1} entries")
    if sum(len(entry.data) for entry in found) > MAX_TABLE_BYTES:
        raise MalformedEvidence(what, "its entries overlap")
    return found


def table_certificates(blob: bytes) -> tuple[list[bytes], list[bytes]]:
    """Certificates and revocation lists of a certificate table, as DER; unknown entries are left out."""
    certificates: list[bytes] = []
    lists: list[bytes] = []
    for entry in parse_certificate_table(blob):
        if entry.kind is not None and entry.data:
            (lists if entry.kind == "CRL" else certificates).extend(to_der(entry.data))
    return certificates, lists


def encode_certificate_table(entries: Sequence[tuple[str, bytes]]) -> bytes:
    """A certificate table with `entries` of (kind, DER), kinds as in `TableEntry`."""
    guids = {kind: guid for guid, kind in TABLE_GUIDS.items()}
    offset = 24 * (len(entries) + 1)
    head, body = b"", b""
    for kind, data in entries:
        head += uuid.UUID(guids[kind]).bytes + (offset + len(body)).to_bytes(4, "little")
        head += len(data).to_bytes(4, "little")
        body += data
    return head + bytes(24) + body
