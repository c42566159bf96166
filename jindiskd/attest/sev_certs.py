"""The certificates of a SEV platform: is the Diffie-Hellman key that the host shows really a processor's?

    PDH <- PEK <- OCA (self-signed, whoever owns the platform) and <- CEK <- ASK <- ARK (pinned)

Without this check the host could give a key of its own and read the session's keys. Binary formats; integers are
little-endian, numbers of keys and signatures too. Source: AMD 55766 "Secure Encrypted Virtualization API", chapter 2
and appendix C (certificate formats, signing), for API 0.17 and later.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

from jindiskd.attest.model import EvidenceRefused, Finding, MalformedEvidence

CERTIFICATE_BYTES = 2084
SIGNED_BYTES = 0x414
SIGNATURE_BYTES = 520
CHAIN_BYTES = 3 * CERTIFICATE_BYTES
CA_SIZES = {2048: 832, 4096: 1600}
USAGE_ARK, USAGE_ASK, USAGE_NONE = 0x0, 0x13, 0x1000
USAGE_OCA, USAGE_PEK, USAGE_PDH, USAGE_CEK = 0x1001, 0x1002, 0x1003, 0x1004
NAMES = {
    USAGE_ARK: "ARK",
    USAGE_ASK: "ASK",
    USAGE_OCA: "OCA",
    USAGE_PEK: "PEK",
    USAGE_PDH: "PDH",
    USAGE_CEK: "CEK",
}
ALGORITHM_RSA, ALGORITHM_ECDSA, ALGORITHM_ECDH = 1, 2, 3
WITH_SHA384 = 0x100
CURVES: Mapping[int, type[ec.EllipticCurve]] = {1: ec.SECP256R1, 2: ec.SECP384R1}

ARK_SHA256: Mapping[str, str] = {
    "dedabca561e1dece8cc00b7bda864cf5f20b95017864408cfe18eaee0dce24b9": "Naples",
    "865977b268c16d5b27772b00aaefb4e737ba9499e818ed8e9f65b0cecefbc529": "Rome",
    "1246469862b78a7a8625579b0378d1f8e975eb8b82a1623b579d7968a5969888": "Milan",
    "8f4e3fd36589c23f1fe0c8338465bac7e2e066d97fc92f228bbee4fd356fb674": "Genoa",
    "f6405e5096a6eee1eb7d5df75c49f9b9f7c8357a31c7fff150149d68588a7bf7": "Turin",
}
"""SHA-256 of AMD's SEV root certificates; those of Milan and later have the keys of the SEV-SNP roots."""
GENERATIONS = tuple(ARK_SHA256.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Signature:
    """One of the two signatures a SEV certificate has room for."""

    usage: int
    """Of the signing key; `USAGE_NONE` where there is none."""
    algorithm: int
    raw: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class SevCertificate:
    """A certificate of 2084 bytes with a key on an elliptic curve; not believed."""

    usage: int
    algorithm: int
    api: tuple[int, int]
    key: ec.EllipticCurvePublicKey
    body: bytes
    signatures: tuple[Signature, Signature]


@dataclass(frozen=True, slots=True, kw_only=True)
class AuthorityCertificate:
    """ARK or ASK, in AMD's form for authorities; not believed."""

    usage: int
    key_id: bytes
    certifying_id: bytes
    key: rsa.RSAPublicKey
    body: bytes
    signature: bytes
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SevPlatform:
    """A platform whose chain was followed to AMD. Only `verify_platform` makes these."""

    generation: str
    pdh: ec.EllipticCurvePublicKey
    pdh_algorithm: int
    api: tuple[int, int]


def _number(data: bytes, at: int, size: int = 4) -> int:
    return int.from_bytes(data[at : at + size], "little")


def parse_sev_certificate(blob: bytes) -> SevCertificate:
    """Read a SEV certificate.

    Raises:
        MalformedEvidence: not 2084 bytes, another version than 1, a usage or curve that is not known, no point on it.
    """
    what = "SEV certificate"
    if len(blob) != CERTIFICATE_BYTES:
        raise MalformedEvidence(what, f"it has {len(blob)} bytes instead of {CERTIFICATE_BYTES}")
    usage = _number(blob, 8)
    if _number(blob, 0) != 1 or usage not in NAMES:
        raise MalformedEvidence(what, f"version {_number(blob, 0)}, usage 0x{usage:x} is not known")
    curve = CURVES.get(_number(blob, 0x10))
    if curve is None:
        raise MalformedEvidence(what, f"the {NAMES[usage]}'s key is of an unknown kind")
    numbers = ec.EllipticCurvePublicNumbers(_number(blob, 0x14, 72), _number(blob, 0x5C, 72), curve())
    try:
        key = numbers.public_key()
    except ValueError as exc:
        raise MalformedEvidence(what, f"the {NAMES[usage]}'s key is not a point of its curve") from exc
    if any(blob[0xA4:SIGNED_BYTES]):
        raise MalformedEvidence(what, f"the {NAMES[usage]} has reserved bytes set")
    signatures = [
        Signature(usage=_number(blob, at), algorithm=_number(blob, at + 4), raw=blob[at + 8 : at + SIGNATURE_BYTES])
        for at in (SIGNED_BYTES, SIGNED_BYTES + SIGNATURE_BYTES)
    ]
    return SevCertificate(
        usage=usage,
        algorithm=_number(blob, 0xC),
        api=(blob[4], blob[5]),
        key=key,
        body=blob[:SIGNED_BYTES],
        signatures=(signatures[0], signatures[1]),
    )


def parse_authority(blob: bytes) -> AuthorityCertificate:
    """Read an ARK or ASK.

    Raises:
        MalformedEvidence: another size, version, usage, or key size than AMD's have.
    """
    what = "SEV authority certificate"
    bits = _number(blob, 0x3C)
    if len(blob) != CA_SIZES.get(bits) or _number(blob, 0x38) != bits or _number(blob, 0) != 1:
        raise MalformedEvidence(what, f"{len(blob)} bytes with a key of {bits} bits is not a form that AMD uses")
    usage = _number(blob, 0x24)
    if usage not in {USAGE_ARK, USAGE_ASK}:
        raise MalformedEvidence(what, f"its usage 0x{usage:x} is neither ARK nor ASK")
    size = bits // 8
    exponent, modulus = _number(blob, 0x40, size), _number(blob, 0x40 + size, size)
    try:
        if modulus.bit_length() != bits:
            raise ValueError("short modulus")
        key = rsa.RSAPublicNumbers(exponent, modulus).public_key()
    except ValueError as exc:
        raise MalformedEvidence(what, "its key is not usable") from exc
    return AuthorityCertificate(
        usage=usage,
        key_id=blob[4:0x14],
        certifying_id=blob[0x14:0x24],
        key=key,
        body=blob[: 0x40 + 2 * size],
        signature=blob[0x40 + 2 * size :],
        sha256=hashlib.sha256(blob).hexdigest(),
    )


def split_chain(chain: bytes) -> tuple[SevCertificate, SevCertificate, SevCertificate]:
    """PEK, OCA and CEK of a host's `cert-chain` (`virNodeGetSEVInfo`), in this order.

    Raises:
        MalformedEvidence: another length or order.
    """
    if len(chain) != CHAIN_BYTES:
        raise MalformedEvidence("SEV certificate chain", f"it has {len(chain)} bytes instead of {CHAIN_BYTES}")
    found = [
        parse_sev_certificate(chain[at : at + CERTIFICATE_BYTES]) for at in range(0, CHAIN_BYTES, CERTIFICATE_BYTES)
    ]
    if [certificate.usage for certificate in found] != [USAGE_PEK, USAGE_OCA, USAGE_CEK]:
        raise MalformedEvidence("SEV certificate chain", "it is not PEK, OCA and CEK")
    return found[0], found[1], found[2]


def halves(blob: bytes) -> tuple[bytes, bytes]:
    """The two certificates of AMD's file of ASK and ARK, in this order; not believed.

    Raises:
        MalformedEvidence: another length.
    """
    if len(blob) not in {2 * size for size in CA_SIZES.values()}:
        raise MalformedEvidence("SEV authorities", f"{len(blob)} bytes are not an ASK and an ARK")
    return blob[: len(blob) // 2], blob[len(blob) // 2 :]


def parse_pair(blob: bytes, generation: str) -> tuple[bytes, bytes]:
    """ASK and ARK of a generation out of AMD's file of both.

    Raises:
        MalformedEvidence: another length, other certificates, or another generation's.
    """
    what = f"{generation}'s SEV authorities"
    pair = halves(blob)
    ask, ark = map(parse_authority, pair)
    if (ask.usage, ark.usage) != (USAGE_ASK, USAGE_ARK):
        raise MalformedEvidence(what, "they are not an ASK and an ARK")
    if ARK_SHA256.get(ark.sha256) != generation:
        raise MalformedEvidence(what, f"the root {ark.sha256[:16]}… is not AMD's for {generation}")
    large = ark.key.key_size == 4096
    if ask.certifying_id != ark.key_id or not authority_signed(ark, ask.body, ask.signature, sha384=large):
        raise MalformedEvidence(what, "the root did not sign the ASK")
    return pair


def parse_cek(blob: bytes) -> SevCertificate:
    """Read the CEK of a processor as AMD gives it: signed by an ASK, which is not verified here.

    Raises:
        MalformedEvidence: it is another certificate, or unsigned as hosts show theirs.
    """
    cek = parse_sev_certificate(blob)
    if cek.usage != USAGE_CEK:
        raise MalformedEvidence("SEV certificate", f"it is a {NAMES[cek.usage]}, not a CEK")
    if not any(signature.usage == USAGE_ASK for signature in cek.signatures):
        raise MalformedEvidence("SEV certificate", "no ASK signed the CEK")
    return cek


def signed_by(ask: bytes, cek: bytes) -> bool:
    """Whether an ASK signed a CEK.

    Raises:
        MalformedEvidence: one of them is not in its format.
    """
    return _chip_signed(parse_authority(ask), parse_sev_certificate(cek))


def authority_signed(issuer: AuthorityCertificate, body: bytes, signature: bytes, *, sha384: bool) -> bool:
    """True where the RSASSA-PSS signature (little-endian, padded with zeros) over `body` is the issuer's."""
    size = issuer.key.key_size // 8
    if any(signature[size:]):
        return False
    digest: hashes.HashAlgorithm = hashes.SHA384() if sha384 else hashes.SHA256()
    try:
        issuer.key.verify(
            signature[:size][::-1], body, padding.PSS(padding.MGF1(digest), padding.PSS.DIGEST_LENGTH), digest
        )
    except InvalidSignature:
        return False
    return True


def platform_signed(issuer: SevCertificate, signed: SevCertificate) -> bool:
    """True where one of the signatures of `signed` is named and made by `issuer`, by ECDSA."""
    for signature in signed.signatures:
        if signature.usage != issuer.usage or signature.algorithm & ~WITH_SHA384 != ALGORITHM_ECDSA:
            continue
        digest: hashes.HashAlgorithm = hashes.SHA384() if signature.algorithm & WITH_SHA384 else hashes.SHA256()
        pair = encode_dss_signature(_number(signature.raw, 0, 72), _number(signature.raw, 72, 72))
        try:
            issuer.key.verify(pair, signed.body, ec.ECDSA(digest))
        except InvalidSignature:
            continue
        return True
    return False


def _chip_signed(ask: AuthorityCertificate, cek: SevCertificate) -> bool:
    return any(
        signature.usage == USAGE_ASK
        and signature.algorithm & ~WITH_SHA384 == ALGORITHM_RSA
        and authority_signed(ask, cek.body, signature.raw, sha384=bool(signature.algorithm & WITH_SHA384))
        for signature in cek.signatures
    )


def verify_platform(
    pdh: bytes,
    chain: bytes,
    *,
    ask: bytes,
    ark: bytes,
    cek: bytes | None = None,
    ark_sha256: Mapping[str, str] = ARK_SHA256,
) -> SevPlatform:
    """Follow a platform's Diffie-Hellman key to AMD.

    Args:
        pdh: as the host shows it, 2084 bytes.
        chain: PEK, OCA and CEK as the host shows them.
        ask: AMD's intermediate for the processor's generation.
        ark: AMD's root.
        cek: the CEK as AMD's key server gives it for the processor (`cpu0-id`): hosts show theirs unsigned.
        ark_sha256: roots that are trusted, by SHA-256 to a name.

    Raises:
        MalformedEvidence: one of them is not in its format.
        EvidenceRefused: the chain does not hold: `sev.chain.root`, `.ark`, `.ask`, `.cek`, `.oca`, `.pek`, `.pdh`.
    """
    pek, oca, shown = split_chain(chain)
    signed = parse_sev_certificate(cek) if cek is not None else shown
    leaf, root, intermediate = parse_sev_certificate(pdh), parse_authority(ark), parse_authority(ask)
    generation = ark_sha256.get(root.sha256)
    large = root.key.key_size == 4096
    checks = (
        (generation is not None, "root", f"the root {root.sha256[:16]}… is none of AMD's"),
        (
            root.usage == USAGE_ARK and authority_signed(root, root.body, root.signature, sha384=large),
            "ark",
            "the root did not sign itself",
        ),
        (
            intermediate.usage == USAGE_ASK
            and intermediate.certifying_id == root.key_id
            and authority_signed(root, intermediate.body, intermediate.signature, sha384=large),
            "ask",
            "the root did not sign the ASK",
        ),
        (
            signed.usage == USAGE_CEK
            and signed.key.public_numbers() == shown.key.public_numbers()
            and _chip_signed(intermediate, signed),
            "cek",
            "the ASK did not sign this processor's CEK: fetch the signed one from AMD's key server",
        ),
        (platform_signed(oca, oca), "oca", "the platform owner's certificate (OCA) did not sign itself"),
        (platform_signed(oca, pek) and platform_signed(signed, pek), "pek", "OCA and CEK did not both sign the PEK"),
        (leaf.usage == USAGE_PDH and platform_signed(pek, leaf), "pdh", "the PEK did not sign the PDH"),
    )
    findings = [Finding(f"sev.chain.{name}", text) for holds, name, text in checks if not holds]
    if findings:
        raise EvidenceRefused(findings)
    return SevPlatform(generation=generation or "", pdh=leaf.key, pdh_algorithm=leaf.algorithm, api=leaf.api)


def encode_pdh(key: ec.EllipticCurvePublicKey, *, api: tuple[int, int]) -> bytes:
    """The owner's Diffie-Hellman key (P-384) as an unsigned certificate of the PDH form: libvirt's `dhCert`."""
    numbers = key.public_numbers()
    head = b"".join(value.to_bytes(4, "little") for value in (USAGE_PDH, ALGORITHM_ECDH, 2))
    point = numbers.x.to_bytes(72, "little") + numbers.y.to_bytes(72, "little")
    body = (b"\1\0\0\0" + bytes([*api, 0, 0]) + head + point).ljust(SIGNED_BYTES, b"\0")
    empty = USAGE_NONE.to_bytes(4, "little").ljust(SIGNATURE_BYTES, b"\0")
    return body + empty + empty
