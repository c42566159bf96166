"""The attestation token (protocol section 10): what a session found, as a signed EAR document.

A guest may present it instead of its cookie; what that fetches is encrypted to the key in it. The signing key is kept
in the key store, so that brokers on one database read each other's tokens. No other service is asked to trust it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_der_private_key,
)

import jindiskd
from jindiskd.attest.appraise import SnpExpectations, appraise_snp
from jindiskd.attest.kept import Verified
from jindiskd.attest.snp import VerifiedSnp
from jindiskd.attest.tdx import TdxExpectations, appraise_tdx
from jindiskd.broker.sessions import Session
from jindiskd.errors import JindiskError
from jindiskd.kbs import encoding, jwk
from jindiskd.kbs.messages import MalformedMessage, read_object

LIFE = timedelta(minutes=5)
PROFILE = "tag:github.com,2024:confidential-containers/Trustee"
MAX_TOKEN = 16 << 10
# AR4SI, as the EAR profile writes it: 0 says nothing, from 2 affirms, from 32 warns, from 96 contradicts.
NOTHING, AFFIRMS, WARNS, CONTRADICTS = 0, 2, 36, 97
LAX_SNP = SnpExpectations(any_measurement=True, any_host_data=True, allow_simulated=True)
LAX_TDX = TdxExpectations(any_measurement=True, allow_simulated=True)


class TokenRefused(JindiskError, code="TokenRefused"):
    """A bearer token is not one of ours, or is over."""

    def __init__(self, problem: str) -> None:
        """`problem` says what is wrong; nothing of the token is quoted."""
        super().__init__(f"the token {problem}: attest again")


def draw_signing_key() -> bytes:
    """A new key, PKCS #8 in DER."""
    return ec.generate_private_key(ec.SECP256R1()).private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())


class TokenMaker:
    """Signs and reads tokens, ES256. `key` is PKCS #8 in DER."""

    def __init__(self, key: bytes | bytearray) -> None:
        """Read the key."""
        private = load_der_private_key(bytes(key), None)
        assert isinstance(private, ec.EllipticCurvePrivateKey)
        self._key, self._public = private, private.public_key()
        self._jwk = {**jwk.coordinates(self._public), "alg": "ES256"}

    def make(
        self, session: Session, verified: Verified, now: datetime, init_data: Mapping[str, str] | None = None
    ) -> str:
        """A compact JWS about one attested session. It says whether the platform is simulated."""
        evidence: dict[str, Any] = {
            "runtime_data_claims": {
                "additional-evidence": "",
                "nonce": session.nonce,
                "tee-pubkey": session.tee_pubkey,
            },
            **_claims(verified),
        }
        if init_data is not None:
            evidence["init_data_claims"] = dict(init_data)
        vector = trust_vector(verified, now)
        claims = {
            "eat_profile": PROFILE,
            "iss": "jindisk-broker",
            "jti": session.session_id,
            "iat": int(now.timestamp()),
            "exp": int((now + LIFE).timestamp()),
            "ear.verifier-id": {"developer": "jindiskd", "build": f"jindisk-broker {jindiskd.__version__}"},
            "submods": {
                "cpu0": {
                    "ear.status": status(vector),
                    "ear.trustworthiness-vector": vector,
                    "ear.appraisal-policy-id": "jindisk",
                    "ear.veraison.annotated-evidence": evidence,
                }
            },
        }
        header = {"typ": "JWT", "alg": "ES256", "jwk": self._jwk}
        parts = [encoding.encode(json.dumps(part, separators=(",", ":")).encode()) for part in (header, claims)]
        r, s = decode_dss_signature(self._key.sign(".".join(parts).encode(), ec.ECDSA(hashes.SHA256())))
        return ".".join([*parts, encoding.encode(r.to_bytes(32, "big") + s.to_bytes(32, "big"))])

    def session_of(self, token: str, now: datetime) -> str:
        """The session id in a token that we signed and that is not over. The key in its header is not looked at.

        Raises:
            TokenRefused: it is another one.
        """
        parts = token.split(".")
        if len(token) > MAX_TOKEN or len(parts) != 3:
            raise TokenRefused("is not a compact JWS")
        try:
            header = read_object(encoding.decode(parts[0], "the token"), "the token")
            claims = read_object(encoding.decode(parts[1], "the token"), "the token")
            raw = encoding.decode(parts[2], "the token", 64)
        except MalformedMessage as exc:
            raise TokenRefused("cannot be read") from exc
        if header.get("alg") != "ES256":
            raise TokenRefused("is signed with another algorithm than ES256")
        signature = encode_dss_signature(int.from_bytes(raw[:32], "big"), int.from_bytes(raw[32:], "big"))
        try:
            self._public.verify(signature, f"{parts[0]}.{parts[1]}".encode(), ec.ECDSA(hashes.SHA256()))
        except InvalidSignature as exc:
            raise TokenRefused("was not signed by this broker") from exc
        expires, found = claims.get("exp"), claims.get("jti")
        if type(expires) is not int or not isinstance(found, str) or expires <= now.timestamp():
            raise TokenRefused("is over")
        return found


def _claims(verified: Verified) -> dict[str, Any]:
    """What the evidence says, under the name of its kind."""
    if isinstance(verified, VerifiedSnp):
        report = verified.report
        return {
            "report_data": report.report_data.hex(),
            "init_data": report.host_data.hex(),
            "snp": {
                "measurement": report.measurement.hex(),
                "product": verified.product.value,
                "chip_id": report.chip_id.hex(),
                "report_id": report.report_id.hex(),
                "simulated": verified.simulated,
            },
        }
    quote = verified.quote
    return {
        "report_data": quote.report_data.hex(),
        "init_data": quote.mr_config_id.hex(),
        "tdx": {
            "mr_td": quote.mr_td.hex(),
            **{f"rtmr_{number}": value.hex() for number, value in enumerate(quote.rtmrs)},
            "mr_seam": quote.mr_seam.hex(),
            "tcb_status": verified.status,
            "advisory_ids": sorted(verified.advisory_ids),
            "simulated": verified.simulated,
        },
    }


def _doubts(verified: Verified, now: datetime) -> bool:
    """Whether the strict defaults object to something that is no matter of which image it is."""
    if isinstance(verified, VerifiedSnp):
        return bool(appraise_snp(verified, LAX_SNP))
    return bool(appraise_tdx(verified, LAX_TDX, now=now))


def trust_vector(verified: Verified, now: datetime) -> dict[str, int]:
    """What the evidence shows by itself. Which image it is, is decided when a resource is asked for: no assertion."""
    return {
        "instance-identity": NOTHING,
        "configuration": WARNS if _doubts(verified, now) else AFFIRMS,
        "executables": NOTHING,
        "file-system": NOTHING,
        "hardware": CONTRADICTS if verified.simulated else AFFIRMS,
        "runtime-opaque": NOTHING,
        "storage-opaque": NOTHING,
        "sourced-data": NOTHING,
    }


def status(vector: Mapping[str, int]) -> str:
    """The worst of a trust vector, in words."""
    worst = max(vector.values())
    if worst == NOTHING:
        return "none"
    return "affirming" if worst < 32 else "warning" if worst < 96 else "contraindicated"
