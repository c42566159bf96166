"""A simulated SEV platform: keys and certificates in AMD's formats, ending in a root that says nothing about hardware.

    PDH <- PEK <- OCA (self-signed) and <- CEK <- ASK <- ARK, all made here

Whoever can read its file can measure anything as anything. A verifier accepts it only where it is given
`SevPlatformKeys.ark_sha256`. One file, mode 0600, JSON: certificates and the PDH's private key in hexadecimal; the
other keys are thrown away once they have signed. Source: AMD 55766 chapter 2 and appendix C, as `attest.sev_certs`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

from jindiskd.attest import sev_certs as certs
from jindiskd.attest.sev_certs import SevPlatform, verify_platform
from jindiskd.base import document
from jindiskd.base.files import replace_file

API = (1, 55)
BUILD = 21
CPU_ID = b"SIMULATED-SEV-PLATFORM--NOT-REAL".ljust(64, b"\0")
GENERATION = "simulated"
KEY_BITS = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class SevPlatformRoot:
    """The public part of a simulated platform: what a broker elsewhere needs to accept it, and no other."""

    cek: bytes
    ask: bytes
    ark: bytes

    @property
    def ark_sha256(self) -> Mapping[str, str]:
        """The root, as `verify_platform` wants it."""
        return {hashlib.sha256(self.ark).hexdigest(): GENERATION}

    @classmethod
    def load(cls, path: Path) -> SevPlatformRoot:
        """Read the file; raises `MalformedDocument`, OSError."""
        return document.load(cls, path.read_bytes(), document=path.name)


@dataclass(frozen=True, slots=True, kw_only=True)
class SevPlatformKeys:
    """A simulated platform. Certificates as `attest.sev_certs` reads them."""

    pdh: bytes
    """2084 bytes."""
    chain: bytes
    """PEK, OCA and CEK, the last unsigned, as a host shows them."""
    cek: bytes
    """The CEK signed by the ASK, as AMD's key server gives it."""
    ask: bytes
    ark: bytes
    pdh_private: bytes
    """The PDH's private number, 48 bytes, big-endian."""

    @property
    def root(self) -> SevPlatformRoot:
        """What may be shown to everybody."""
        return SevPlatformRoot(cek=self.cek, ask=self.ask, ark=self.ark)

    @property
    def ark_sha256(self) -> Mapping[str, str]:
        """What a verifier needs to accept this platform, and no other."""
        return self.root.ark_sha256

    def shared_secret(self, dh_certificate: bytes) -> bytes:
        """The secret (48 bytes) shared with the owner of a `dhCert`; raises `MalformedEvidence` for another form."""
        owner = certs.parse_sev_certificate(dh_certificate)
        private = ec.derive_private_key(int.from_bytes(self.pdh_private, "big"), ec.SECP384R1())
        return private.exchange(ec.ECDH(), owner.key)

    def verified(self) -> SevPlatform:
        """As a verifier that trusts it sees it."""
        return verify_platform(
            self.pdh, self.chain, ask=self.ask, ark=self.ark, cek=self.cek, ark_sha256=self.ark_sha256
        )

    @classmethod
    def load_or_create(cls, path: Path) -> SevPlatformKeys:
        """Read the file, or make one. Takes seconds the first time."""
        try:
            return document.load(cls, path.read_bytes(), document=path.name)
        except FileNotFoundError:
            made = cls.generate()
            replace_file(path, document.dump(made), 0o600)
            return made

    @classmethod
    def generate(cls) -> SevPlatformKeys:
        """A new platform."""
        ark_key, ask_key = (rsa.generate_private_key(65537, KEY_BITS) for _ in range(2))
        pdh, pek, oca, cek = (ec.generate_private_key(ec.SECP384R1()) for _ in range(4))
        ark_id, ask_id = (_key_id(key.public_key()) for key in (ark_key, ask_key))
        ark = _authority(certs.USAGE_ARK, ark_id, ark_id, ark_key.public_key(), ark_key)
        ask = _authority(certs.USAGE_ASK, ask_id, ark_id, ask_key.public_key(), ark_key)
        cek_body = _body(certs.USAGE_CEK, certs.ALGORITHM_ECDSA, cek.public_key())
        signed_cek = cek_body + _by_authority(ask_key, cek_body) + _none()
        oca_body = _body(certs.USAGE_OCA, certs.ALGORITHM_ECDSA, oca.public_key())
        pek_body = _body(certs.USAGE_PEK, certs.ALGORITHM_ECDSA, pek.public_key())
        pdh_body = _body(certs.USAGE_PDH, certs.ALGORITHM_ECDH, pdh.public_key())
        chain = (
            pek_body
            + _by(oca, certs.USAGE_OCA, pek_body)
            + _by(cek, certs.USAGE_CEK, pek_body)
            + (oca_body + _by(oca, certs.USAGE_OCA, oca_body) + _none())
            + (cek_body + _none() + _none())
        )
        return cls(
            pdh=pdh_body + _by(pek, certs.USAGE_PEK, pdh_body) + _none(),
            chain=chain,
            cek=signed_cek,
            ask=ask,
            ark=ark,
            pdh_private=pdh.private_numbers().private_value.to_bytes(48, "big"),
        )


def _key_id(key: rsa.RSAPublicKey) -> bytes:
    return hashlib.sha256(str(key.public_numbers().n).encode()).digest()[:16]


def _body(usage: int, algorithm: int, key: ec.EllipticCurvePublicKey) -> bytes:
    numbers = key.public_numbers()
    head = b"\1\0\0\0" + bytes([*API, 0, 0]) + b"".join(value.to_bytes(4, "little") for value in (usage, algorithm, 2))
    return (head + numbers.x.to_bytes(72, "little") + numbers.y.to_bytes(72, "little")).ljust(certs.SIGNED_BYTES, b"\0")


def _slot(usage: int, algorithm: int, raw: bytes) -> bytes:
    head = usage.to_bytes(4, "little") + algorithm.to_bytes(4, "little")
    return (head + raw).ljust(certs.SIGNATURE_BYTES, b"\0")


def _none() -> bytes:
    return certs.USAGE_NONE.to_bytes(4, "little").ljust(certs.SIGNATURE_BYTES, b"\0")


def _by(key: ec.EllipticCurvePrivateKey, usage: int, body: bytes) -> bytes:
    r, s = decode_dss_signature(key.sign(body, ec.ECDSA(hashes.SHA384())))
    raw = r.to_bytes(72, "little") + s.to_bytes(72, "little")
    return _slot(usage, certs.ALGORITHM_ECDSA | certs.WITH_SHA384, raw)


def _by_authority(key: rsa.RSAPrivateKey, body: bytes) -> bytes:
    return _slot(certs.USAGE_ASK, certs.ALGORITHM_RSA | certs.WITH_SHA384, _pss(key, body))


def _pss(key: rsa.RSAPrivateKey, body: bytes) -> bytes:
    digest = hashes.SHA384()
    return key.sign(body, padding.PSS(padding.MGF1(digest), padding.PSS.DIGEST_LENGTH), digest)[::-1]


def _authority(usage: int, key_id: bytes, issuer_id: bytes, key: rsa.RSAPublicKey, issuer: rsa.RSAPrivateKey) -> bytes:
    numbers, size = key.public_numbers(), KEY_BITS // 8
    words = KEY_BITS.to_bytes(4, "little")
    head = (1).to_bytes(4, "little") + key_id + issuer_id + usage.to_bytes(4, "little") + bytes(16) + words + words
    body = head + numbers.e.to_bytes(size, "little") + numbers.n.to_bytes(size, "little")
    return body + _pss(issuer, body)
