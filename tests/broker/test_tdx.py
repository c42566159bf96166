"""TDX guests at the broker: quotes made for the challenge, judged and decided by the image's rules."""

import base64
import hashlib
import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from brokerbench import KEY, OTHER, Bench, bench, kind, opened
from cryptography.hazmat.primitives.asymmetric import ec
from tdxbench import NAME, AsGenuine, QuoteMaker

from jindiskd.attest.kept import keep, restore
from jindiskd.attest.verifier import Evidence
from jindiskd.base.platform import Platform, Tee
from jindiskd.base.secret import Secret
from jindiskd.broker.listener import listen_unix
from jindiskd.broker.peer import BrokerLimits
from jindiskd.broker.shared import DatabaseSessions
from jindiskd.kbs import jwk
from jindiskd.kbs.binding import report_data
from jindiskd.kbs.evidence import tdx_to_json
from jindiskd.policy.rules import ReleaseRules
from jindiskd.sim.pki import SimulatedRoot

NOW = datetime.fromisoformat("2026-07-15T00:00:00Z")
TDX_IMAGE = "33333333-3333-4333-8333-333333333333"
REQUEST = b'{"version":"0.4.0","tee":"tdx","extra-params":""}'


@pytest.fixture(scope="module")
def quotes(vectors: Path) -> QuoteMaker:
    entries = json.loads((vectors / "attestation/manifest.json").read_text())["entries"]
    entry = next(entry for entry in entries if entry["file"] == f"tdx-test-pki/{NAME}.bin")
    return QuoteMaker(vectors / "attestation", entry["collateral"])


def rules(quotes: QuoteMaker, **changes: Any) -> ReleaseRules:
    rtmr0, rtmr1, rtmr2, rtmr3 = quotes.parsed.rtmrs
    given = {"tdx_rtmr0": (rtmr0,), "tdx_rtmr1": (rtmr1,), "tdx_rtmr2": (rtmr2,), "tdx_rtmr3": (rtmr3,)}
    quote = quotes.parsed
    given |= {"tdx_mr_config_id": (quote.mr_config_id,), "tdx_mr_owner": (quote.mr_owner,)}
    return ReleaseRules(**{**given, **changes})


def prepared(root: SimulatedRoot, tmp_path: Path, quotes: QuoteMaker, **options: Any) -> Any:
    return bench(
        root,
        tmp_path,
        verifiers=[AsGenuine(quotes.judge(**options.pop("judge", {})))],
        now=lambda: NOW,
        allow_simulated=False,
        **options,
    )


async def ask(
    b: Bench, quotes: QuoteMaker, *, log: bytes = b"", fresh: bool = True, init_data: str = "", **registers: bytes
) -> tuple:
    """What a TDX guest gets: status and body of the answer to its last request, and its key."""
    status, headers, answer = await b.ask("POST", "/kbs/v0/auth", REQUEST)
    assert status == 200, answer
    cookie, nonce = headers["set-cookie"].split(";")[0], json.loads(answer)["nonce"]
    key = ec.generate_private_key(ec.SECP256R1())
    bound = report_data(nonce if fresh else "another", jwk.tee_jwk(key.public_key()))
    evidence = tdx_to_json(quotes.quote(bound, **registers), log)
    told: dict[str, Any] = {"tee-evidence": {"primary_evidence": evidence, "additional_evidence": ""}}
    if init_data:
        told["init-data"] = {"format": "toml", "body": init_data}
    body = b.attestation(nonce, key, **told)
    status, _, answer = await b.ask("POST", "/kbs/v0/attest", body, cookie=cookie)
    if status == 200:
        resource = f"/kbs/v0/resource/default/{TDX_IMAGE}/root"
        status, _, answer = await b.ask("GET", resource, cookie=cookie)
    return status, answer, key


def add(b: Bench, quotes: QuoteMaker, given: ReleaseRules) -> None:
    b.peer = type(b.peer)(description="domain tdx", domain_uuid=None, image_id=TDX_IMAGE)
    b.store.add_image(TDX_IMAGE, "tdx", Platform.TDX, f"default/{TDX_IMAGE}/root", Secret(KEY), given)
    b.store.activate(TDX_IMAGE, [quotes.parsed.mr_td])


async def listening(b: Bench) -> Any:
    b.path = b.path.with_name("tdx_19012")
    return await listen_unix(b.broker, b.identity, b.path, b.peer)


async def test_init_data_is_bound_by_mrconfigid(
    root: SimulatedRoot, tmp_path: Path, quotes: QuoteMaker, vectors: Path
) -> None:
    """The recorded placement in MRCONFIGID; other text is refused, and the rules say which launch is the image's."""
    case = json.loads((vectors / "kbs/kbs-0.4.0.json").read_text())["init_data"][0]
    text, bound = case["toml"], bytes.fromhex(case["tdx_mrconfigid_hex"])
    async with prepared(root, tmp_path, quotes) as b:
        add(b, quotes, rules(quotes, tdx_mr_config_id=(bound,)))
        listener = await listening(b)
        status, body, key = await ask(b, quotes, init_data=text, at184=bound)
        assert status == 200, (body, b.store.audit_rows())
        assert opened(body, key) == KEY
        assert (await ask(b, quotes, init_data=text + "\n", at184=bound))[0] == 401
        assert b.last_findings() == ["init_data.other"]
        other = hashlib.sha384(b"another launch").digest()
        assert (await ask(b, quotes, at184=other))[0] == 401
        assert b.last_findings() == ["tdx.mr_config_id"]
        await listener.close()


@pytest.mark.parametrize("shared", [False, True])
async def test_a_good_quote_gets_the_key(root: SimulatedRoot, tmp_path: Path, quotes: QuoteMaker, shared: bool) -> None:
    """Fresh, genuine, as the rules say; with sessions in memory, and in the database that brokers share."""
    async with prepared(root, tmp_path, quotes) as b:
        if shared:
            b.broker._sessions = DatabaseSessions(b.store.database, BrokerLimits())
        add(b, quotes, rules(quotes))
        listener = await listening(b)
        status, body, key = await ask(b, quotes)
        await listener.close()
        assert status == 200, (body, b.store.audit_rows())
        assert opened(body, key) == KEY
        row = b.store.audit_rows()[-1]
        assert (row["kind"], row["measurement"], row["simulated"]) == ("released", quotes.parsed.mr_td.hex(), False)


@pytest.mark.parametrize(
    ("change", "ask_with", "finding"),
    [
        ({"tdx_rtmr1": (bytes(48),)}, {}, "tdx.rtmr1"),
        ({"tdx_rtmr2": ()}, {}, "tdx.rtmr2"),
        ({"tdx_mr_config_id": (b"x" * 48,)}, {}, "tdx.mr_config_id"),
        ({"tdx_minimum_tcb_evaluation": 1_000_000}, {}, "tdx.tcb_evaluation"),
        ({"tdx_mr_seam": ()}, {}, "tdx.mr_seam"),
        ({"tdx_ppids": ()}, {}, "tdx.ppid"),
        ({"tdx_statuses": ("OutOfDate",)}, {}, "tdx.status"),
        ({}, {"at136": b"z" * 48}, "tdx.mr_td"),
        ({}, {"fresh": False}, "tdx.report_data"),
        ({}, {"at120": bytes([1, 0, 0, 0x10, 0, 0, 0, 0])}, "tdx.debug"),
        ({}, {"at120": bytes(8)}, "tdx.sept_ve"),
    ],
    ids=str,
)
async def test_each_reason_refuses(
    root: SimulatedRoot,
    tmp_path: Path,
    quotes: QuoteMaker,
    change: dict[str, Any],
    ask_with: dict[str, Any],
    finding: str,
) -> None:
    """By its own finding, which is recorded with the quote."""
    async with prepared(root, tmp_path, quotes) as b:
        add(b, quotes, rules(quotes, **change))
        listener = await listening(b)
        status, body, _key = await ask(b, quotes, **ask_with)
        await listener.close()
        assert status == 401, body
        assert finding in b.last_findings()
        kept = b.store.refusals.find(image_id=TDX_IMAGE).evidence
        assert kept is not None
        assert kept.tee is Tee.TDX


async def test_without_collateral_or_with_another_log(root: SimulatedRoot, tmp_path: Path, quotes: QuoteMaker) -> None:
    """Nothing passes because it could not be checked."""
    async with prepared(root, tmp_path, quotes, judge={"collateral": lambda _quote: None}) as b:
        add(b, quotes, rules(quotes))
        listener = await listening(b)
        assert (await ask(b, quotes))[0] == 401
        assert b.last_findings() == ["tdx.collateral.missing"]
        await listener.close()
    log = (quotes.pki.parent / "ccel/gcp-cos-113/ccel.bin").read_bytes()
    second = tmp_path / "second"
    second.mkdir()
    async with prepared(root, second, quotes) as b:
        add(b, quotes, rules(quotes))
        listener = await listening(b)
        assert (await ask(b, quotes, log=log))[0] == 401
        assert set(b.last_findings()) == {"tdx.event_log"}
        await listener.close()


async def test_other_kinds_and_garbage(root: SimulatedRoot, tmp_path: Path, quotes: QuoteMaker) -> None:
    """A broker that judges TDX alone takes no SNP guest; what is no quote is refused by name; nor another's key."""
    async with prepared(root, tmp_path, quotes) as b:
        add(b, quotes, rules(quotes))
        listener = await listening(b)
        status, _, body = await b.ask("POST", "/kbs/v0/auth", REQUEST.replace(b"tdx", b"snp"))
        assert (status, kind(body)) == (401, "AttestationError")
        for evidence in (None, {}, {"quote": "?"}, {"quote": base64.b64encode(b"x" * 700).decode()}, {"quote": 7}):
            _, headers, answer = await b.ask("POST", "/kbs/v0/auth", REQUEST)
            cookie, nonce = headers["set-cookie"].split(";")[0], json.loads(answer)["nonce"]
            told = {"tee-evidence": {"primary_evidence": evidence, "additional_evidence": ""}}
            status, _, _ = await b.ask("POST", "/kbs/v0/attest", b.attestation(nonce, **told), cookie=cookie)
            assert status == 401
            assert b.last_findings() == ["evidence.malformed"]
        assert b.store.image(OTHER).platform is Platform.SIMULATED_SNP
        await listener.close()


def test_what_is_kept_is_what_was_found(quotes: QuoteMaker) -> None:
    """Through plain JSON and back."""
    evidence = Evidence(tee=Tee.TDX, blob=quotes.quote(bytes(64)))
    verified = quotes.judge().judge(evidence, report_data=bytes(64), now=NOW)
    kept = keep(verified)
    again = restore(type(kept)(tee=kept.tee, blob=kept.blob, facts=json.loads(json.dumps(dict(kept.facts)))))
    assert again == verified
