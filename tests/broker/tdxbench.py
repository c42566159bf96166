"""Quotes made for a challenge, under the recorded test root whose keys are known."""

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

from jindiskd.attest.tdx import TdxVerifier, VerifiedTdx
from jindiskd.attest.tdx_quote import parse_quote
from jindiskd.attest.verifier import TdxJudge
from jindiskd.base.platform import Tee

REPORT_DATA_AT = 48 + 520
NAME = "v4-uptodate"


class QuoteMaker:
    """Makes quotes as the recorded one, for other report data."""

    def __init__(self, attestation: Path, collateral: str) -> None:
        self.pki = attestation / "tdx-test-pki"
        self.template = (self.pki / f"{NAME}.bin").read_bytes()
        self.parsed = parse_quote(self.template)
        key = serialization.load_pem_private_key((self.pki / "keys/attestation-key.pem").read_bytes(), None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        self._key = key
        self.collateral = (attestation / collateral).read_bytes()

    def quote(self, report_data: bytes, **registers: bytes) -> bytes:
        """A quote for these 64 bytes; registers by offset in the body, for example `at136=…` for MRTD."""
        out = bytearray(self.template)
        out[REPORT_DATA_AT : REPORT_DATA_AT + 64] = report_data
        for name, value in registers.items():
            at = 48 + int(name.removeprefix("at"))
            out[at : at + len(value)] = value
        signed = self.parsed.signed_bytes
        r, s = decode_dss_signature(self._key.sign(bytes(out[:signed]), ec.ECDSA(hashes.SHA256())))
        out[signed + 4 : signed + 68] = r.to_bytes(32, "big") + s.to_bytes(32, "big")
        return bytes(out)

    def judge(self, **options: Any) -> TdxJudge:
        """A verifier that trusts the test root."""
        verifier = TdxVerifier(root_ca_der=(self.pki / "root_ca.der").read_bytes())
        return TdxJudge(verifier, options.get("collateral", lambda _quote: self.collateral))


class AsGenuine:
    """Takes the mark of simulation off, so that the way of genuine evidence is gone to its end."""

    tee = Tee.TDX

    def __init__(self, judge: TdxJudge) -> None:
        self._judge = judge

    def judge(self, *arguments: Any, **options: Any) -> VerifiedTdx:
        return replace(self._judge.judge(*arguments, **options), simulated=False)


def digest(text: bytes) -> bytes:
    return hashlib.sha384(text).digest()
