"""The protocol's cryptography against recorded exchanges and against an independent JOSE implementation."""

import json
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from jwcrypto import jwe as other_jwe
from jwcrypto import jwk as other_jwk

from jindiskd.kbs import binding, evidence, jwe, jwk
from jindiskd.kbs.messages import MalformedMessage, check_resource, parse_attestation, parse_request

CASES = ("ecdh-p256", "ecdh-p521", "rsa-oaep-256", "ecdh-p256-with-sampledevice")


@pytest.fixture(scope="session")
def cases(vectors: Path) -> dict[str, dict[str, Any]]:
    return {case["name"]: case for case in json.loads((vectors / "kbs/kbs-0.4.0.json").read_text())["cases"]}


@pytest.mark.parametrize("name", CASES)
def test_report_data_is_the_recorded_digest(cases: dict[str, dict[str, Any]], name: str) -> None:
    """Nonce and key are bound exactly as the reference does."""
    case = cases[name]
    document = json.loads(case["runtime"]["primary_canonical"])
    found = binding.report_data(case["nonce"], case["tee_pubkey"], document["additional-evidence"])
    assert found[:48].hex() == case["runtime"]["primary_sha384"]
    assert found[48:] == bytes(16)


@pytest.mark.parametrize("name", CASES[:3])
def test_recorded_answers_open(cases: dict[str, dict[str, Any]], name: str) -> None:
    """An answer of the reference opens with its recorded key, for each kind of key."""
    case = cases[name]
    key = load_pem_private_key(case["tee_private_pkcs8"].encode(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey)
    opened = jwe.open_(json.dumps(case["response"]).encode(), key)
    assert bytes(opened.reveal()) == case["plaintext_utf8"].encode()


@pytest.mark.parametrize("member", ["protected", "encrypted_key", "iv", "ciphertext", "tag"])
def test_a_changed_answer_does_not_open(cases: dict[str, dict[str, Any]], member: str) -> None:
    """Every member is authenticated."""
    case = cases["ecdh-p256"]
    key = load_pem_private_key(case["tee_private_pkcs8"].encode(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    text = case["response"][member]
    changed = ("A" if text[0] != "A" else "B") + text[1:]
    with pytest.raises(MalformedMessage):
        jwe.open_(json.dumps({**case["response"], member: changed}).encode(), key)


def test_our_answer_opens_elsewhere_and_has_the_reference_clients_order() -> None:
    """An independent implementation opens what we seal, and the header is in the order the reference client needs."""
    key = other_jwk.JWK.generate(kty="EC", crv="P-256")
    public = {**json.loads(key.export_public()), "alg": jwk.EC_ALG}
    public.pop("kid", None)
    text = jwe.seal(b"\x00\n the key", public)
    token = other_jwe.JWE()
    token.deserialize(text, key)
    assert token.payload == b"\x00\n the key"
    header = json.loads(other_jwe.base64url_decode(json.loads(text)["protected"]))
    assert list(header) == ["alg", "enc", "epk"]
    assert list(header["epk"]) == ["crv", "kty", "x", "y"]
    # The reference client takes its own serialisation of the header as additional data: compact, or it cannot open.
    again = json.dumps(header, separators=(",", ":"))
    assert other_jwe.base64url_decode(json.loads(text)["protected"]).decode() == again


def test_weak_and_foreign_keys_are_refused(cases: dict[str, dict[str, Any]]) -> None:
    """RSA1_5, extra members, points off the curve and short RSA keys are not accepted."""
    good = cases["ecdh-p256"]["tee_pubkey"]
    jwk.public_key(good)
    small = rsa.generate_private_key(65537, 1024).public_key().public_numbers()
    n = other_jwe.base64url_encode(small.n.to_bytes(128, "big"))
    short = {"kty": "RSA", "alg": "RSA-OAEP-256", "e": "AQAB", "n": n}
    bad: list[dict[str, str]] = [
        {**good, "kid": "1"},
        {**good, "x": good["y"]},
        {**good, "alg": "ECDH-ES"},
        {**cases["rsa-oaep-256"]["tee_pubkey"], "alg": "RSA1_5"},
        short,
        {},
    ]
    for key in bad:
        with pytest.raises(MalformedMessage):
            jwk.public_key(key)


def test_evidence_of_a_real_machine_survives_the_conversion(vectors: Path) -> None:
    """JSON to report bytes and back gives the same evidence; the bytes are those that the machine signed."""
    recorded = json.loads((vectors / "kbs/snp-evidence-v3-genoa.json").read_text())
    recorded = recorded.get("evidence", recorded)
    report, certificates = evidence.snp_from_json(recorded)
    assert len(report) == evidence.REPORT_BYTES
    assert len(certificates) == 1
    again = evidence.snp_to_json(report)["attestation_report"]
    for name, value in recorded["attestation_report"].items():
        assert again[name] == value, name


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b'{"version":"0.4.0","version":"0.4.0","tee":"snp"}',
        b'{"version":0.4,"tee":"snp"}',
        b'{"version":"0.4.0"}',
        b'{"version":"0.4.0","tee":"snp","extra-params":' + b"[" * 40 + b"]" * 40 + b"}",
        b'{"version":"0.4.0","tee":"' + b"x" * (1 << 20) + b'"}',
        b"\xff\xfe",
        b"[" * 100_000,
    ],
)
def test_hostile_requests_are_malformed_and_nothing_else(body: bytes) -> None:
    """Whatever a guest sends ends in one kind of error."""
    for parse in (parse_request, parse_attestation):
        with pytest.raises(MalformedMessage):
            parse(body)


@pytest.mark.parametrize("path", ["a/b", "a/b/c/d", "../b/c", "a//c", "a/b/%2e", ".a/b/c", "a/b/c\n"])
def test_resource_paths_have_three_plain_segments(path: str) -> None:
    """Nothing that a path could be abused with passes."""
    from jindiskd.errors import InvalidArgument

    with pytest.raises(InvalidArgument):
        check_resource(path)
