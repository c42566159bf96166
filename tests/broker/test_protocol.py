"""Conformance to KBS 0.4.0 as a client of the reference would see it: cookie, statuses, error bodies, token, sizes."""

import asyncio
import base64
import json
import re
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import pytest
from brokerbench import DIGEST, IMAGE, KEY, OTHER, REQUEST, bench, claims, kind, opened
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from jwcrypto import jwk as other_jwk
from jwcrypto import jwt as other_jwt

from jindiskd.kbs import encoding, initdata, jwk
from jindiskd.kbs.binding import report_data
from jindiskd.policy.rules import ReleaseRules
from jindiskd.sim.firmware import SimulatedSnpFirmware
from jindiskd.sim.pki import SimulatedRoot

RESOURCE = f"/kbs/v0/resource/default/{IMAGE}/root"


async def test_the_cookie_is_the_references(root: SimulatedRoot, tmp_path: Path) -> None:
    """A version-4 UUID without dashes, a date, nothing else; sent again by /attest."""
    async with bench(root, tmp_path) as b:
        _, headers, answer = await b.ask("POST", "/kbs/v0/auth", REQUEST)
        shape = r"kbs-session-id=([0-9a-f]{12}4[0-9a-f]{3}[89ab][0-9a-f]{15}); Expires=([A-Z][^;]*GMT)"
        found = re.fullmatch(shape, headers["set-cookie"])
        assert found is not None
        life = parsedate_to_datetime(found[2]) - datetime.now(UTC)
        assert timedelta(seconds=50) < life <= timedelta(seconds=60)
        told = json.loads(answer)
        assert set(told) == {"nonce", "extra-params"}
        assert len(base64.b64decode(told["nonce"], validate=True)) == 32
        cookie = f"kbs-session-id={found[1]}"
        _, headers, _ = await b.ask("POST", "/kbs/v0/attest", b.attestation(told["nonce"]), cookie=cookie)
        assert headers["set-cookie"].startswith(cookie + "; ")


@pytest.mark.parametrize("extra", ['""', "{}", "null", "[]", '{"supported-hash-algorithms":["sha256","sha384"]}', "7"])
async def test_extra_parameters_may_be_anything(root: SimulatedRoot, tmp_path: Path, extra: str) -> None:
    """Readers must not insist on an object."""
    async with bench(root, tmp_path) as b:
        body = b'{"version":"0.4.0","tee":"snp","extra-params":%s}' % extra.encode()
        assert (await b.ask("POST", "/kbs/v0/auth", body))[0] == 200


@pytest.mark.parametrize(
    ("method", "where", "status", "expected"),
    [
        ("GET", RESOURCE, 401, "TokenNotFound"),
        ("GET", "/kbs/v0/resource/a/b", 401, "TokenNotFound"),
        ("POST", RESOURCE, 401, "AdminAuthAccess"),
        ("DELETE", RESOURCE, 401, "AdminAuthAccess"),
        ("POST", "/kbs/v0/resource-policy", 404, "PluginNotFound"),
        ("GET", "/kbs/v0/nebula-ca/credential", 404, "PluginNotFound"),
        ("GET", "/kbs/v0/auth", 404, "PluginNotFound"),
        ("GET", "/metrics", 404, "InvalidRequestPath"),
        ("GET", "/", 404, "InvalidRequestPath"),
        ("POST", "/kbs/v0/attest", 401, "TokenNotFound"),
        ("POST", "/kbs/v0/auth", 401, "AttestationError"),
    ],
)
async def test_errors_have_the_references_form(
    root: SimulatedRoot, tmp_path: Path, method: str, where: str, status: int, expected: str
) -> None:
    """401 for everything but paths that do not exist, and a type to tell them apart."""
    async with bench(root, tmp_path) as b:
        found, headers, body = await b.ask(method, where)
        assert (found, kind(body)) == (status, expected)
        assert set(json.loads(body)) == {"type", "detail"}
        assert json.loads(body)["type"].startswith("https://github.com/confidential-containers/kbs/errors/")
        assert headers["content-type"].startswith("application/json")


async def test_what_a_guest_is_told_of_a_refusal(root: SimulatedRoot, tmp_path: Path) -> None:
    """Nothing: the texts are the same whatever the reason was."""
    async with bench(root, tmp_path) as b:
        texts = set()
        for wrong in (bytes(48), DIGEST[::-1]):
            b.firmware = SimulatedSnpFirmware(root, wrong)
            cookie, _, _ = await b.attested()
            texts.add((await b.ask("GET", RESOURCE, cookie=cookie))[2])
        b.firmware = SimulatedSnpFirmware(root, DIGEST)
        for image in (OTHER, "nobody"):
            cookie, _, _ = await b.attested()
            texts.add((await b.ask("GET", f"/kbs/v0/resource/default/{image}/root", cookie=cookie))[2])
        assert len(texts) == 1
        [text] = texts
        assert json.loads(text)["detail"] == "Access denied by policy"


async def test_the_token_is_an_ear_document_that_others_can_verify(root: SimulatedRoot, tmp_path: Path) -> None:
    """An independent implementation verifies it; it says what was measured, and that the platform is simulated."""
    async with bench(root, tmp_path) as b:
        cookie, token, key = await b.attested()
        header = json.loads(encoding.decode(token.split(".")[0], "header"))
        assert (header["typ"], header["alg"]) == ("JWT", "ES256")
        other_jwt.JWT(jwt=token, key=other_jwk.JWK(**{n: v for n, v in header["jwk"].items() if n != "alg"}))
        told = claims(token)
        assert told["exp"] - told["iat"] == 300
        cpu = told["submods"]["cpu0"]
        found = cpu["ear.veraison.annotated-evidence"]
        assert found["runtime_data_claims"]["tee-pubkey"] == jwk.tee_jwk(key.public_key())
        assert found["snp"]["measurement"] == DIGEST.hex()
        assert found["snp"]["simulated"] is True
        assert cpu["ear.status"] == "contraindicated"
        assert cookie.partition("=")[2] not in json.dumps(told), "the cookie is a secret, the token is not"
        assert opened((await b.ask("GET", RESOURCE, cookie=cookie))[2], key) == KEY
        assert b.store.audit_rows()[-1]["detail"]["token"] == told["jti"]


async def test_a_bearer_token_fetches_as_the_cookie_does(root: SimulatedRoot, tmp_path: Path) -> None:
    """What it fetches is encrypted to the key in it; a token that was altered or signed elsewhere fetches nothing."""
    async with bench(root, tmp_path) as b:
        _, token, key = await b.attested()

        async def fetch(bearer: str) -> tuple[int, bytes]:
            status, _, body = await b.ask("GET", RESOURCE, headers={"Authorization": f"Bearer {bearer}"})
            return status, body

        status, body = await fetch(token)
        assert (status, opened(body, key)) == (200, KEY)
        head, payload, signature = token.split(".")
        changed = json.loads(encoding.decode(payload, "payload"))
        changed["submods"]["cpu0"]["ear.veraison.annotated-evidence"]["snp"]["simulated"] = False
        forged = encoding.encode(json.dumps(changed).encode())
        foreign = other_jwk.JWK.generate(kty="EC", crv="P-256")
        signed = other_jwt.JWT(header={"alg": "ES256", "typ": "JWT"}, claims=claims(token))
        signed.make_signed_token(foreign)
        none = encoding.encode(b'{"alg":"none"}') + f".{payload}."
        for bad in (f"{head}.{forged}.{signature}", signed.serialize(), none, "", "a.b.c", "a" * 5000):
            status, body = await fetch(bad)
            assert (status, kind(body)) == (401, "TokenVerifierError")


async def test_a_token_ends(root: SimulatedRoot, tmp_path: Path) -> None:
    """With its own life, and with its session."""
    clock = [datetime.now(UTC)]
    async with bench(root, tmp_path, now=lambda: clock[0]) as b:
        _, token, _ = await b.attested()
        clock[0] += timedelta(minutes=5, seconds=1)
        status, _, body = await b.ask("GET", RESOURCE, headers={"Authorization": f"Bearer {token}"})
        assert (status, kind(body)) == (401, "TokenVerifierError")


@pytest.mark.parametrize("name", ["P-521", "RSA-OAEP-256"])
async def test_other_kinds_of_keys(root: SimulatedRoot, tmp_path: Path, name: str) -> None:
    """The broker seals to whichever key of the protocol the guest has bound."""
    if name == "P-521":
        key: Any = ec.generate_private_key(ec.SECP521R1())
        public = jwk.tee_jwk(key.public_key())
    else:
        key = rsa.generate_private_key(65537, 2048)
        n = key.public_key().public_numbers().n.to_bytes(256, "big")
        public = {"kty": "RSA", "alg": "RSA-OAEP-256", "n": encoding.encode(n), "e": "AQAB"}
    async with bench(root, tmp_path) as b:
        cookie, nonce = await b.session()
        body = b.attestation(
            nonce,
            **{
                "runtime-data": {"nonce": nonce, "tee-pubkey": public},
                "tee-evidence": {
                    "primary_evidence": b.evidence(report_data(nonce, public)),
                    "additional_evidence": "",
                },
            },
        )
        assert (await b.ask("POST", "/kbs/v0/attest", body, cookie=cookie))[0] == 200
        assert opened((await b.ask("GET", RESOURCE, cookie=cookie))[2], key) == KEY


async def test_pkcs1_is_refused_although_it_is_bound(root: SimulatedRoot, tmp_path: Path) -> None:
    """RSA1_5 is still in the reference; it must not be accepted."""
    n = rsa.generate_private_key(65537, 2048).public_key().public_numbers().n.to_bytes(256, "big")
    public = {"kty": "RSA", "alg": "RSA1_5", "n": encoding.encode(n), "e": "AQAB"}
    async with bench(root, tmp_path) as b:
        cookie, nonce = await b.session()
        evidence = {"primary_evidence": b.evidence(report_data(nonce, public)), "additional_evidence": ""}
        told = {"init-data": None, "runtime-data": {"nonce": nonce, "tee-pubkey": public}, "tee-evidence": evidence}
        status, _, _ = await b.ask("POST", "/kbs/v0/attest", json.dumps(told).encode(), cookie=cookie)
        assert status == 401
        assert b.last_findings() == ["evidence.malformed"]


@pytest.mark.parametrize("tee", ["sample", "tdx", "se", "nonsense", "SNP"])
async def test_other_platforms_are_refused_cleanly(root: SimulatedRoot, tmp_path: Path, tee: str) -> None:
    """`sample` has no signature at all: our simulation is in the real format instead."""
    async with bench(root, tmp_path) as b:
        body = json.dumps({"version": "0.4.0", "tee": tee, "extra-params": ""}).encode()
        status, _, answer = await b.ask("POST", "/kbs/v0/auth", body)
        assert (status, kind(answer)) == (401, "AttestationError")


async def test_sample_evidence_is_not_evidence(root: SimulatedRoot, tmp_path: Path) -> None:
    """Neither instead of a report, nor as a device's."""
    async with bench(root, tmp_path) as b:
        for primary, additional in (("sample", ""), ("snp", '{"sampledevice":{"svn":"2","report_data":""}}')):
            cookie, nonce = await b.session()
            public = jwk.tee_jwk(ec.generate_private_key(ec.SECP256R1()).public_key())
            bound = report_data(nonce, public, additional)
            sample = {"svn": "1", "report_data": base64.b64encode(bound[:48]).decode()}
            evidence = {
                "primary_evidence": sample if primary == "sample" else b.evidence(bound),
                "additional_evidence": additional,
            }
            told = {"init-data": None, "runtime-data": {"nonce": nonce, "tee-pubkey": public}, "tee-evidence": evidence}
            assert (await b.ask("POST", "/kbs/v0/attest", json.dumps(told).encode(), cookie=cookie))[0] == 401


async def test_init_data_must_be_what_the_launch_bound(
    root: SimulatedRoot, tmp_path: Path, vectors: Path
) -> None:
    """The placements are the recorded ones; other text is refused, and the rules decide which is accepted."""
    recorded = json.loads((vectors / "kbs/kbs-0.4.0.json").read_text())["init_data"]
    for case in recorded:
        digest, entries = initdata.read(case["toml"])
        assert digest.hex() == case["digest_hex"]
        assert initdata.placed(digest, 32).hex() == case["snp_host_data_hex"]
        assert initdata.placed(digest, 48).hex() == case["tdx_mrconfigid_hex"]
        assert "vm.toml" in entries
    text, host_data = recorded[1]["toml"], bytes.fromhex(recorded[1]["snp_host_data_hex"])
    async with bench(root, tmp_path) as b:
        b.firmware = SimulatedSnpFirmware(root, DIGEST, host_data=host_data)
        cookie, nonce = await b.session()
        other = b.attestation(nonce, **{"init-data": {"format": "toml", "body": text + "\n"}})
        assert (await b.ask("POST", "/kbs/v0/attest", other, cookie=cookie))[0] == 401
        assert b.last_findings() == ["init_data.other"]
        for rules, status in ((ReleaseRules(), 401), (ReleaseRules(host_data=(host_data,)), 200)):
            b.store.set_rules(IMAGE, rules)
            cookie, nonce = await b.session()
            body = b.attestation(nonce, **{"init-data": {"format": "toml", "body": text}})
            found, _, answer = await b.ask("POST", "/kbs/v0/attest", body, cookie=cookie)
            assert found == 200
            evidence = claims(json.loads(answer)["token"])["submods"]["cpu0"]["ear.veraison.annotated-evidence"]
            assert evidence["init_data_claims"] == {"vm.toml": 'vm = "web-1"\n'}
            assert (await b.ask("GET", RESOURCE, cookie=cookie))[0] == status


async def test_an_approval_lets_a_waiting_guest_in(root: SimulatedRoot, tmp_path: Path) -> None:
    """The guest asks again by itself, and gets its key when somebody has looked."""
    async with bench(root, tmp_path) as b:
        b.store.set_rules(IMAGE, ReleaseRules(approval=True))
        fetching = asyncio.create_task(b.fetch(within_s=20))
        for _ in range(100):
            waiting = b.store.approvals.list()
            if waiting:
                break
            await asyncio.sleep(0.05)
        assert waiting[0].measurement == DIGEST.hex()
        assert waiting[0].simulated
        assert not fetching.done()
        b.store.approvals.grant(waiting[0].number)
        assert await fetching == KEY


async def test_a_launch_gets_its_key_as_often_as_the_rules_say(root: SimulatedRoot, tmp_path: Path) -> None:
    """Root in a guest that runs asks again: another report, the same launch. A new launch gets its key."""
    async with bench(root, tmp_path) as b:
        b.store.set_rules(IMAGE, ReleaseRules(releases_per_guest=1))
        assert await b.fetch() == KEY
        cookie, _, _ = await b.attested()
        assert (await b.ask("GET", RESOURCE, cookie=cookie))[0] == 401
        assert b.last_findings() == ["limit.guest"]
        b.firmware = SimulatedSnpFirmware(root, DIGEST)
        assert await b.fetch() == KEY


async def test_metrics_count_what_happened(root: SimulatedRoot, tmp_path: Path) -> None:
    """And the text is what Prometheus reads."""
    async with bench(root, tmp_path) as b:
        await b.fetch()
        cookie, _, _ = await b.attested()
        await b.ask("GET", f"/kbs/v0/resource/default/{OTHER}/root", cookie=cookie)
        text = b.broker.metrics.render()
        assert 'jindisk_broker_releases_total{simulated="true"} 1' in text
        assert 'jindisk_broker_refusals_total{finding="peer.image"} 1' in text
        assert 'jindisk_broker_attestations_total{outcome="simulated"} 2' in text
        assert "jindisk_broker_release_seconds_count 2" in text
        assert "jindisk_broker_sessions 2" in text
        assert 'jindisk_broker_requests_total{status="401",step="resource"} 1' in text
        line = r'(# (HELP|TYPE) \w+ .*|\w+(\{\w+="[^"\\]*"(,\w+="[^"\\]*")*\})? [-+0-9.e]+)'
        assert all(re.fullmatch(line, found) for found in text.strip().split("\n"))
