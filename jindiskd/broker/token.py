"""The attestation token (protocol section 10): what the session found, signed with a key of this process.

Our own guests fetch by session, and no other service is asked to trust the token: its key is made anew at each start.
"""

from __future__ import annotations

import hashlib
import json
from datetime import datetime, timedelta

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

from jindiskd.attest.snp import VerifiedSnp
from jindiskd.broker.sessions import Session
from jindiskd.kbs import encoding, jwk

LIFE = timedelta(minutes=5)
PROFILE = "tag:github.com,2024:confidential-containers/Trustee"


class TokenMaker:
    """Signs tokens, ES256."""

    def __init__(self) -> None:
        """Draw the key."""
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._jwk = {**jwk.coordinates(self._key.public_key()), "alg": "ES256"}

    def make(self, session: Session, verified: VerifiedSnp, now: datetime) -> str:
        """A compact JWS about one attested session."""
        report = verified.report
        runtime = {"additional-evidence": "", "nonce": session.nonce, "tee-pubkey": session.tee_pubkey}
        claims = {
            "eat_profile": PROFILE,
            "iss": "jindisk-broker",
            "jti": hashlib.sha256(session.name.encode()).hexdigest()[:32],
            "iat": int(now.timestamp()),
            "exp": int((now + LIFE).timestamp()),
            "submods": {
                "cpu0": {
                    "ear.appraisal-policy-id": "jindisk",
                    "ear.veraison.annotated-evidence": {
                        "report_data": report.report_data.hex(),
                        "init_data": report.host_data.hex(),
                        "runtime_data_claims": runtime,
                        "snp": {"measurement": report.measurement.hex(), "simulated": verified.simulated},
                    },
                }
            },
        }
        header = {"typ": "JWT", "alg": "ES256", "jwk": self._jwk}
        parts = [encoding.encode(json.dumps(part, separators=(",", ":")).encode()) for part in (header, claims)]
        r, s = decode_dss_signature(self._key.sign(".".join(parts).encode(), ec.ECDSA(hashes.SHA256())))
        return ".".join([*parts, encoding.encode(r.to_bytes(32, "big") + s.to_bytes(32, "big"))])
