"""SEV and SEV-ES: attestation before the guest runs. The owner makes a session, checks a measurement, seals a secret.

There is no report from inside, so all freshness is the session's: its two keys are made for one launch and used for no
other. SEV without ES leaves the guest's registers readable to the host, and neither has integrity protection: allow
them by explicit configuration only.

Source: AMD 55766 "Secure Encrypted Virtualization API" chapters 2 (key derivation) and 6 (launch). Integers are
little-endian; the shared secret of Diffie-Hellman is the x coordinate in big-endian order.

Findings: `sev.policy.<what>`, `sev.policy.mismatch`, `sev.api.too_old`, `sev.measurement`.
"""

from __future__ import annotations

import enum
import hashlib
import hmac
import secrets
import struct
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from jindiskd.attest.model import EvidenceRefused, Finding, MalformedEvidence
from jindiskd.attest.sev_certs import SevPlatform, encode_pdh
from jindiskd.base.secret import Secret
from jindiskd.errors import InvalidArgument

DISK_KEY_GUID = "736869e5-84f0-4973-92ec-06879ce3da0b"
SECRET_TABLE_GUID = "1e74f542-71dd-4d66-963e-ef4287ff173b"  # noqa: S105 (an identifier of a table)
MAX_SECRET_BYTES = 16 << 10
MEASUREMENT_BYTES = 48
SESSION_BYTES, HEADER_BYTES = 128, 52
NONCE_BYTES = KEY_BYTES = 16
LAUNCH_MEASURE, LAUNCH_SECRET = b"\x04", b"\x01"
_PACKED = struct.Struct("<4sI16s16s")
_MAGIC = b"JDS1"


def volume_guid(resource: str) -> str:
    """Of the table's entry that is the key of a data volume, by the key's resource path: a UUID of version 5."""
    return str(uuid.uuid5(uuid.UUID(DISK_KEY_GUID), resource))


class SevPolicy(enum.IntFlag):
    """The guest's policy: what the host may not do, and the least API version in bits 16 to 31."""

    NODBG = 1 << 0
    NOKS = 1 << 1
    ES = 1 << 2
    NOSEND = 1 << 3
    DOMAIN = 1 << 4
    SEV = 1 << 5


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchReport:
    """What the host says of a launch (`virDomainGetLaunchSecurityInfo`); the measurement binds all of it."""

    measurement: bytes
    """48 bytes: MAC 32, MNONCE 16."""
    api_major: int
    api_minor: int
    build: int
    policy: int


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifiedSevLaunch:
    """A launch that measured as expected. Only `SevSession.verify` makes these."""

    report: LaunchReport
    launch_digest: bytes
    encrypted_state: bool
    generation: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SealedSecret:
    """A secret that only this launch's firmware can open (`virDomainSetLaunchSecurityState`)."""

    header: bytes
    payload: bytes


def derive(key: bytes, label: bytes, context: bytes, bits: int) -> bytes:
    """SP 800-108 in counter mode with HMAC-SHA-256, counter and length as little-endian u32, as the firmware has it."""
    out = b""
    for counter in range(1, (bits + 255) // 256 + 1):
        message = counter.to_bytes(4, "little") + label + b"\0" + context + bits.to_bytes(4, "little")
        out += hmac.digest(key, message, "sha256")
    return out[: bits // 8]


def transport_keys(shared: bytes, nonce: bytes) -> tuple[bytes, bytes]:
    """Key encryption key and key integrity key (16 bytes each) of a shared secret (48 bytes) and nonce (16 bytes)."""
    master = derive(shared, b"sev-master-secret", nonce, 128)
    return derive(master, b"sev-kek", b"", 128), derive(master, b"sev-kik", b"", 128)


def counter_mode(key: bytes, iv: bytes, data: bytes) -> bytes:
    """AES-128 in counter mode, which encrypts and decrypts alike."""
    encryptor = Cipher(algorithms.AES(key), modes.CTR(iv)).encryptor()
    return encryptor.update(data) + encryptor.finalize()


def session_blob(
    shared: bytes, *, nonce: bytes, iv: bytes, encryption_key: bytes, integrity_key: bytes, policy: int
) -> bytes:
    """libvirt's `session`, 128 bytes: nonce 16, wrapped keys 32, IV 16, MAC of these keys 32, MAC of the policy 32."""
    kek, kik = transport_keys(shared, nonce)
    wrapped = counter_mode(kek, iv, encryption_key + integrity_key)
    policy_mac = hmac.digest(integrity_key, policy.to_bytes(4, "little"), "sha256")
    return nonce + wrapped + iv + hmac.digest(kik, wrapped, "sha256") + policy_mac


def expected_measurement(
    integrity_key: bytes | bytearray, report: LaunchReport, launch_digest: bytes, nonce: bytes
) -> bytes:
    """The MAC (32 bytes) that the firmware computes for a launch digest (32 bytes) and its nonce (16 bytes)."""
    version = bytes([report.api_major, report.api_minor, report.build])
    message = LAUNCH_MEASURE + version + report.policy.to_bytes(4, "little") + launch_digest + nonce
    return hmac.digest(bytes(integrity_key), message, "sha256")


def secret_table(entries: Sequence[tuple[str, bytes | bytearray]]) -> bytearray:
    """The table the guest's firmware exposes: (GUID, bytes) entries, padded to a multiple of 16.

    Raises:
        InvalidArgument: no entries, or more than 16 KiB of them.
    """
    body = bytearray()
    for guid, data in entries:
        body += uuid.UUID(guid).bytes_le + (20 + len(data)).to_bytes(4, "little") + data
    table = bytearray(uuid.UUID(SECRET_TABLE_GUID).bytes_le + (20 + len(body)).to_bytes(4, "little")) + body
    body[:] = bytes(len(body))
    table += bytes(-len(table) % 16)
    if not entries or len(table) > MAX_SECRET_BYTES:
        raise InvalidArgument("secret table", f"{len(table)} bytes", f"it has 1 to {MAX_SECRET_BYTES} bytes of entries")
    return table


def seal(
    table: bytes | bytearray,
    *,
    encryption_key: bytes | bytearray,
    integrity_key: bytes | bytearray,
    mac: bytes,
    iv: bytes,
) -> SealedSecret:
    """Encrypt a secret table (a multiple of 16 bytes) for one measured launch; `mac` is its measurement's 32 bytes."""
    payload = counter_mode(bytes(encryption_key), iv, bytes(table))
    flags, length = bytes(4), len(payload).to_bytes(4, "little")
    message = LAUNCH_SECRET + flags + iv + length + length + payload + mac
    return SealedSecret(header=flags + iv + hmac.digest(bytes(integrity_key), message, "sha256"), payload=payload)


def appraise_policy(policy: int, *, encrypted_state: bool, allow_send: bool = False) -> list[Finding]:
    """What is wrong with a guest's policy: `sev.policy.debug`, `.sharing`, `.es`, `.send`."""
    flags = SevPolicy(policy & 0x3F)
    rows = (
        (SevPolicy.NODBG in flags, "debug", "lets the host read and change the guest's memory"),
        (SevPolicy.NOKS in flags, "sharing", "lets the host share the guest's key with another guest"),
        (SevPolicy.ES in flags or not encrypted_state, "es", "does not require encrypted registers (SEV-ES)"),
        (SevPolicy.NOSEND in flags or allow_send, "send", "lets the host send the guest elsewhere"),
    )
    return [Finding(f"sev.policy.{name}", f"the policy 0x{policy:x} {text}") for holds, name, text in rows if not holds]


def appraise_launch(
    report: LaunchReport,
    integrity_key: bytes | bytearray,
    launch_digests: Mapping[str, bytes],
    minimum_api: tuple[int, int, int],
) -> tuple[list[Finding], bytes | None]:
    """What is wrong with a launch, and the one of the allowed digests (32 bytes, by a name) that it measured as.

    Raises:
        MalformedEvidence: the measurement has another length, or a number is out of range.
    """
    if len(report.measurement) != MEASUREMENT_BYTES:
        text = f"it has {len(report.measurement)} bytes instead of {MEASUREMENT_BYTES}"
        raise MalformedEvidence("SEV measurement", text)
    numbers = (report.api_major, report.api_minor, report.build)
    if not all(0 <= number <= 255 for number in numbers) or not 0 <= report.policy < 1 << 32:
        raise MalformedEvidence("SEV measurement", "a version number or the policy is out of range")
    findings = []
    if numbers < minimum_api:
        text = f"firmware API {'.'.join(map(str, numbers))} is below {'.'.join(map(str, minimum_api))}: update it"
        findings.append(Finding("sev.api.too_old", text))
    mac, nonce = report.measurement[:32], report.measurement[32:]
    matching = None
    for digest in launch_digests.values():
        if hmac.compare_digest(mac, expected_measurement(integrity_key, report, digest, nonce)):
            matching = digest
    if matching is None:
        known = ", ".join(sorted(launch_digests)) or "none"
        text = f"firmware, kernel, initrd or command line are not the expected ones (known: {known})"
        findings.append(Finding("sev.measurement", text))
    return findings, matching


class SevKeys:
    """The two keys of one launch, and what they were made for. Close it.

    Args:
        integrity: TIK, 16 bytes.
        encryption: TEK, 16 bytes.
        policy: the guest's, which the session binds.
        generation: of the platform.
        random: source of initialization vectors: `random(n)` gives n bytes.
    """

    def __init__(
        self,
        *,
        integrity: Secret,
        encryption: Secret,
        policy: int,
        generation: str,
        random: Callable[[int], bytes] = secrets.token_bytes,
    ) -> None:
        """Take the keys over."""
        self.encrypted_state = bool(policy & SevPolicy.ES)
        self.policy, self.generation = policy, generation
        self._integrity, self._encryption, self._random = integrity, encryption, random

    def pack(self) -> Secret:
        """All of it, to be kept wrapped between the two steps of a launch: `JDS1`, u32 policy, TIK, TEK, generation."""
        head = bytearray(_PACKED.pack(_MAGIC, self.policy, bytes(KEY_BYTES), bytes(KEY_BYTES)))
        head[8:24], head[24:40] = self._integrity.reveal(), self._encryption.reveal()
        head += self.generation.encode()
        return Secret(head)

    @classmethod
    def unpack(cls, packed: Secret) -> SevKeys:
        """Read what `pack` wrote, and wipe it.

        Raises:
            MalformedEvidence: it is not that.
        """
        with packed:
            data = packed.reveal()
            if len(data) < _PACKED.size or data[:4] != _MAGIC or not data[40:].isascii():
                raise MalformedEvidence("a SEV session that was kept", "it has another form")
            # Sliced as bytearray, which the secrets take over and wipe.
            return cls(
                integrity=Secret(data[8:24]),
                encryption=Secret(data[24:40]),
                policy=int.from_bytes(data[4:8], "little"),
                generation=bytes(data[40:]).decode(),
            )

    def verify(
        self,
        report: LaunchReport,
        *,
        launch_digests: Mapping[str, bytes],
        minimum_api: tuple[int, int, int] = (0, 0, 0),
    ) -> VerifiedSevLaunch:
        """Check the measurement of the paused guest.

        Args:
            report: what libvirt says of the launch.
            launch_digests: allowed digests (32 bytes) by a name, from the owner's own files.
            minimum_api: least API major, API minor and build.

        Raises:
            MalformedEvidence: the measurement has another length.
            EvidenceRefused: with every reason.
        """
        findings, matching = appraise_launch(report, self._integrity.reveal(), launch_digests, minimum_api)
        if report.policy != self.policy:
            text = f"the guest was launched with policy 0x{report.policy:x} instead of 0x{self.policy:x}"
            findings.append(Finding("sev.policy.mismatch", text))
        if findings or matching is None:
            raise EvidenceRefused(findings)
        return VerifiedSevLaunch(
            report=report,
            launch_digest=matching,
            encrypted_state=self.encrypted_state,
            generation=self.generation,
        )

    def seal_keys(self, verified: VerifiedSevLaunch, root: Secret, others: Mapping[str, Secret]) -> SealedSecret:
        """Seal the keys of a guest's disks for the measured launch, under a fresh IV.

        Args:
            verified: the launch.
            root: the key of its root.
            others: those of its data volumes, by resource.
        """
        entries = [(volume_guid(resource), key.reveal()) for resource, key in sorted(others.items())]
        table = secret_table([(DISK_KEY_GUID, root.reveal()), *entries])
        try:
            return seal(
                table,
                encryption_key=self._encryption.reveal(),
                integrity_key=self._integrity.reveal(),
                mac=verified.report.measurement[:32],
                iv=self._random(NONCE_BYTES),
            )
        finally:
            table[:] = bytes(len(table))

    def close(self) -> None:
        """Forget the keys."""
        self._integrity.close()
        self._encryption.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()


class SevSession(SevKeys):
    """The owner's side of one launch. Make one for every launch, and close it: it holds two keys.

    Args:
        platform: the host's, verified.
        policy: the guest's policy, which the session binds.
        allow_send: whether the policy may let the host send the guest elsewhere.
        random: source of all keys and nonces: `random(n)` gives n bytes.

    Raises:
        EvidenceRefused: the policy allows what `appraise_policy` objects to.
    """

    def __init__(
        self,
        platform: SevPlatform,
        *,
        policy: int,
        allow_send: bool = False,
        random: Callable[[int], bytes] = secrets.token_bytes,
    ) -> None:
        """Make the keys and both documents for libvirt."""
        findings = appraise_policy(policy, encrypted_state=bool(policy & SevPolicy.ES), allow_send=allow_send)
        if findings:
            raise EvidenceRefused(findings)
        if not isinstance(platform.pdh.curve, ec.SECP384R1):
            raise MalformedEvidence("SEV certificate", "the platform's PDH is not on curve P-384")
        super().__init__(
            integrity=Secret(random(KEY_BYTES)),
            encryption=Secret(random(KEY_BYTES)),
            policy=policy,
            generation=platform.generation,
            random=random,
        )
        ephemeral = ec.generate_private_key(ec.SECP384R1())
        self.dh_certificate = encode_pdh(ephemeral.public_key(), api=platform.api)
        """libvirt's `dhCert`, 2084 bytes, before base64."""
        self.session = session_blob(
            ephemeral.exchange(ec.ECDH(), platform.pdh),
            nonce=random(NONCE_BYTES),
            iv=random(NONCE_BYTES),
            encryption_key=bytes(self._encryption.reveal()),
            integrity_key=bytes(self._integrity.reveal()),
            policy=policy,
        )
        """libvirt's `session`, 128 bytes, before base64."""


def launch_digest_of(firmware: bytes, hashes_table: bytes = b"", processor_states: Sequence[bytes] = ()) -> bytes:
    """LD from its parts: SHA-256 over the firmware, the kernel hashes table, and each processor's state (SEV-ES)."""
    return hashlib.sha256(b"".join((firmware, hashes_table, *processor_states))).digest()
