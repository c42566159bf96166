"""The broker's TLS identity: a key that guests pin by digest, and a certificate that merely carries it."""

from __future__ import annotations

import hashlib
import ssl
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from cryptography.x509.oid import NameOID

from jindiskd.base.files import replace_file
from jindiskd.errors import EXIT_INTEGRITY, JindiskError

LIFE = timedelta(days=36500)  # nobody looks at dates: guests have no clock to trust, and pin the key


class IdentityDamaged(JindiskError, code="IdentityDamaged", exit_code=EXIT_INTEGRITY):
    """The stored identity cannot be read."""

    def __init__(self, path: Path) -> None:
        """`path` of the file."""
        super().__init__(
            f"{path} is not the broker's key and certificate: restore it from a backup, for every image pins this key"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsIdentity:
    """Key and certificate in one PEM file, mode 0600."""

    path: Path
    spki_sha256: bytes
    """SHA-256 of the DER SubjectPublicKeyInfo: what guests pin."""

    @classmethod
    def load_or_create(cls, path: Path) -> TlsIdentity:
        """Read the identity, or make one.

        Raises:
            IdentityDamaged: the file is there and is not one.
        """
        if not path.exists():
            replace_file(path, _generate(), 0o600)
        try:
            certificate = x509.load_pem_x509_certificate(path.read_bytes())
        except (ValueError, x509.InvalidVersion) as exc:
            raise IdentityDamaged(path) from exc
        spki = certificate.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        return cls(path=path, spki_sha256=hashlib.sha256(spki).digest())

    def ssl_context(self) -> ssl.SSLContext:
        """A server's context: TLS 1.3 only.

        Raises:
            IdentityDamaged: key and certificate do not belong together.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        try:
            context.load_cert_chain(self.path)
        except (ssl.SSLError, OSError) as exc:
            raise IdentityDamaged(self.path) from exc
        return context


def _generate() -> bytes:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "JinDisk key broker")])
    start = datetime.now(UTC) - timedelta(days=1)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(start + LIFE)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return private + certificate.public_bytes(Encoding.PEM)
