"""A simulated root of trust in the shape of AMD's: ARK, ASK, chip certificates, a revocation list.

It lets the whole flow run without hardware, in the real formats and past the real verifier. It vouches for nothing:
whoever can read its directory can sign any report. Every subject says "Simulated", and verifiers accept it only where
they were given `SimulatedRoot.roots`, which is marked as simulated in all that follows.

The directory (0700, made whole or not at all by renaming it into place; files 0600)::

    ark.pem      self-signed root            crl.der      empty revocation list signed by it
    ask.pem      intermediate                ask-key.pem  its key, from which chip keys are derived

The root's key is thrown away once it has signed these three.
"""

from __future__ import annotations

import hashlib
import secrets
import shutil
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.x509.oid import NameOID

from jindiskd.attest import der
from jindiskd.attest.model import MalformedEvidence
from jindiskd.attest.snp import P384_ORDER
from jindiskd.attest.snp_certs import PSS, parse_certificate, parse_crl, signed_by, to_der
from jindiskd.attest.snp_endorsement import (
    OID_BOOTLOADER,
    OID_FMC,
    OID_HARDWARE_ID,
    OID_MICROCODE,
    OID_PRODUCT,
    OID_RESERVED_SPL,
    OID_SNP,
    OID_STRUCTURE_VERSION,
    OID_TEE,
)
from jindiskd.attest.snp_report import Product, Tcb
from jindiskd.attest.snp_roots import SIMULATED_MARK, SnpRoots
from jindiskd.base.files import rename_new, replace_file
from jindiskd.errors import EXIT_INTEGRITY, JindiskError

ORGANIZATION = "Simulated, proves nothing (jindiskd)"
AUTHORITY_LIFE = timedelta(days=25 * 365)
CHIP_LIFE = timedelta(days=7 * 365)
CLOCK_SKEW = timedelta(days=1)
KEY_BITS = 4096


class SimulatedRootDamaged(JindiskError, code="SimulatedRootDamaged", exit_code=EXIT_INTEGRITY):
    """The files of a simulated root do not belong together."""

    def __init__(self, path: Path, problem: str) -> None:
        """`path` is its directory."""
        super().__init__(f"the simulated root in {path} {problem}: remove the directory, and a new one is made")


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedRoot:
    """The simulated authorities, with the intermediate's key. Made by `generate` or `load_or_create`."""

    product: Product
    ark: bytes
    """DER, as the others."""
    ask: bytes
    crl: bytes
    ask_key: rsa.RSAPrivateKey
    created: datetime

    @property
    def roots(self) -> SnpRoots:
        """What a verifier needs to accept reports made under this root, and no others."""
        return SnpRoots.simulated_from(self.ark)

    @classmethod
    def load_or_create(
        cls, path: Path, *, now: datetime | None = None, product: Product = Product.MILAN
    ) -> SimulatedRoot:
        """Read the root in directory `path`, or make one there. Takes seconds the first time: call it off the loop.

        Two processes that make it at the same time agree on one: the loser reads the winner's.

        Args:
            path: the directory; its parent must exist.
            now: when the certificates begin to be valid (less a day); the clock's time if not given.
            product: for a new one, Milan, Genoa or Turin.

        Raises:
            SimulatedRootDamaged: the directory is there, but not what belongs in it.
        """
        if path.exists():
            return cls._load(path)
        made = cls.generate(now=now or datetime.now(UTC), product=product)
        staged = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
        staged.mkdir(mode=0o700)
        try:
            key = made.ask_key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
            for name, data in (
                ("ark.pem", _pem(made.ark)),
                ("ask.pem", _pem(made.ask)),
                ("crl.der", made.crl),
                ("ask-key.pem", key),
            ):
                replace_file(staged / name, data, 0o600)
            rename_new(staged, path)
        except FileExistsError:
            shutil.rmtree(staged)
            return cls._load(path)
        except BaseException:
            shutil.rmtree(staged, ignore_errors=True)
            raise
        return made

    @classmethod
    def generate(cls, *, now: datetime, product: Product = Product.MILAN) -> SimulatedRoot:
        """Make a new root in memory. Generates two RSA keys of 4096 bits, which takes seconds."""
        ark_key = rsa.generate_private_key(65537, KEY_BITS)
        ask_key = rsa.generate_private_key(65537, KEY_BITS)
        created = now.replace(microsecond=0)
        ark_name, ask_name = (_name(f"{kind}-{SIMULATED_MARK}{product}") for kind in ("ARK", "SEV"))
        ark = _authority(ark_name, ark_key, ark_name, ark_key, serial=0x10000, path_length=None, created=created)
        ask = _authority(ask_name, ask_key, ark_name, ark_key, serial=0x10001, path_length=0, created=created)
        crl = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(ark_name)
            .last_update(created - CLOCK_SKEW)
            .next_update(created + AUTHORITY_LIFE)
            .sign(ark_key, hashes.SHA384(), rsa_padding=PSS)
            .public_bytes(serialization.Encoding.DER)
        )
        return cls(product=product, ark=ark, ask=ask, crl=crl, ask_key=ask_key, created=created)

    @classmethod
    def _load(cls, path: Path) -> SimulatedRoot:
        try:
            ark, ask = (to_der((path / name).read_bytes())[0] for name in ("ark.pem", "ask.pem"))
            crl = (path / "crl.der").read_bytes()
            key = serialization.load_pem_private_key((path / "ask-key.pem").read_bytes(), None)
            root, intermediate = parse_certificate(ark), parse_certificate(ask)
            roots = SnpRoots.simulated_from(ark)
            product = Product(next(iter(roots.ark_sha256)))
            signed = signed_by(root, root) and signed_by(intermediate, root) and signed_by(parse_crl(crl), root)
        except (OSError, ValueError, TypeError, MalformedEvidence) as exc:
            raise SimulatedRootDamaged(path, f"cannot be read ({type(exc).__name__})") from exc
        if not isinstance(key, rsa.RSAPrivateKey) or not signed or _spki(key.public_key()) != intermediate.spki:
            raise SimulatedRootDamaged(path, "has files that do not belong together")
        created = intermediate.not_before + CLOCK_SKEW
        return cls(product=product, ark=ark, ask=ask, crl=crl, ask_key=key, created=created)

    def chip_id(self, platform: str) -> bytes:
        """CHIP_ID (64 bytes) of a simulated machine of this root; Turin's have 8 bytes and zeros."""
        digest = hashlib.sha512(b"jindiskd simulated chip\0" + hashlib.sha256(self.ark).digest() + platform.encode())
        return digest.digest()[:8].ljust(64, b"\0") if self.product.has_fmc else digest.digest()

    def chip_key(self, chip_id: bytes, tcb: Tcb) -> ec.EllipticCurvePrivateKey:
        """The VCEK of a chip at a TCB. As in hardware it is a function of these two and a secret: ours is ASK's key."""
        secret = self.ask_key.private_bytes(
            serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        info = b"jindiskd simulated VCEK\0" + chip_id + str(tcb).encode()
        seed = HKDF(hashes.SHA384(), 64, salt=None, info=info).derive(secret)
        return ec.derive_private_key(int.from_bytes(seed, "big") % (P384_ORDER - 1) + 1, ec.SECP384R1())

    def chip_certificate(self, chip_id: bytes, tcb: Tcb) -> bytes:
        """The VCEK certificate (DER) for `chip_key` of the same arguments: serial number 0 and all of AMD's extensions.

        The signature is randomised, so two calls give different bytes for the same key.
        """
        hardware_id = chip_id[:8] if self.product.has_fmc else chip_id
        numbers = {OID_STRUCTURE_VERSION: int(self.product.has_fmc), OID_BOOTLOADER: tcb.bootloader, OID_TEE: tcb.tee}
        numbers |= {OID_SNP: tcb.snp, OID_MICROCODE: tcb.microcode}
        numbers |= dict.fromkeys(OID_RESERVED_SPL[1:] if self.product.has_fmc else OID_RESERVED_SPL, 0)
        if tcb.fmc is not None:
            numbers[OID_FMC] = tcb.fmc
        extensions = {oid: _integer(value) for oid, value in numbers.items()}
        extensions[OID_PRODUCT] = der.encode(der.IA5_STRING, self.product.encode())
        extensions[OID_HARDWARE_ID] = hardware_id
        builder = (
            x509.CertificateBuilder()
            .subject_name(_name("SEV-VCEK"))
            .issuer_name(x509.load_der_x509_certificate(self.ask).subject)
            .public_key(self.chip_key(chip_id, tcb).public_key())
            .serial_number(1)
            .not_valid_before(self.created - CLOCK_SKEW)
            .not_valid_after(self.created + CHIP_LIFE)
        )
        for oid, value in sorted(extensions.items()):
            builder = builder.add_extension(
                x509.UnrecognizedExtension(x509.ObjectIdentifier(oid), value), critical=False
            )
        return self._with_serial_zero(builder.sign(self.ask_key, hashes.SHA384(), rsa_padding=PSS))

    def _with_serial_zero(self, certificate: x509.Certificate) -> bytes:
        """The certificate signed again with serial number 0, as AMD's have; the library refuses to write that."""
        parts = der.children(der.whole(certificate.tbs_certificate_bytes, der.SEQUENCE, "certificate"))
        parts[1] = der.read(_integer(0))[0]
        tbs = der.encode(der.SEQUENCE, b"".join(part.raw for part in parts))
        signature = self.ask_key.sign(tbs, PSS, hashes.SHA384())
        return der.encode(der.SEQUENCE, tbs + parts[2].raw + der.encode(der.BIT_STRING, b"\0" + signature))


def _integer(value: int) -> bytes:
    return der.encode(der.INTEGER, value.to_bytes(value.bit_length() // 8 + 1, "big"))


def _spki(key: rsa.RSAPublicKey) -> bytes:
    return key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)


def _pem(certificate: bytes) -> bytes:
    return x509.load_der_x509_certificate(certificate).public_bytes(serialization.Encoding.PEM)


def _name(common_name: str) -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, "Simulated"),
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, ORGANIZATION),
            x509.NameAttribute(NameOID.COMMON_NAME, common_name),
        ]
    )


def _authority(
    subject: x509.Name,
    key: rsa.RSAPrivateKey,
    issuer: x509.Name,
    issuer_key: rsa.RSAPrivateKey,
    *,
    serial: int,
    path_length: int | None,
    created: datetime,
) -> bytes:
    usage = x509.KeyUsage(
        key_cert_sign=True,
        crl_sign=path_length is None,
        digital_signature=False,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(serial)
        .not_valid_before(created - CLOCK_SKEW)
        .not_valid_after(created + AUTHORITY_LIFE)
        .add_extension(x509.BasicConstraints(ca=True, path_length=path_length), critical=True)
        .add_extension(usage, critical=True)
        .sign(issuer_key, hashes.SHA384(), rsa_padding=PSS)
    )
    return certificate.public_bytes(serialization.Encoding.DER)
