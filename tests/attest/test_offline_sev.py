"""SEV launches in files: the recorded measurements and chains, and every way in which they fall short."""

import base64
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from jindiskd.attest.model import MalformedEvidence
from jindiskd.attest.offline import Verdict, verify_files
from jindiskd.attest.offline_sev import SevExpectations, parse_launch
from jindiskd.base.platform import Tee
from jindiskd.cli.main import main
from jindiskd.errors import NotFound

FROM_MEMBER = {
    "sev-measurement": "measurement",
    "sev-api-major": "api_major",
    "sev-api-minor": "api_minor",
    "sev-build-id": "build_id",
    "sev-policy": "policy",
}


def cases(attestation: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((attestation / "sev/measurement/cases.json").read_text())["cases"]
    return found


def written(path: Path, case: dict[str, Any], **changes: Any) -> Path:
    told = {member: case[name] for member, name in FROM_MEMBER.items()}
    path.write_text(json.dumps({**told, **changes}))
    return path


def judged(attestation: Path, tmp_path: Path, case: dict[str, Any], **options: Any) -> Any:
    given: dict[str, Any] = {
        "certificates": [attestation / "sev/certs/rome"],
        "session_key": attestation / "sev/measurement/tik.bin",
        "policy": SevExpectations(launch_digests=frozenset({bytes.fromhex(case["launch_digest"])}), allow_send=True),
        "tee": Tee.SEV,
        "changes": {},
        **options,
    }
    path = written(tmp_path / "launch.json", case, **given.pop("changes"))
    tee = given.pop("tee")


    return verify_files(tee, path, collateral=None, at=datetime.now(UTC), **given)


def test_recorded_launches(attestation, tmp_path):
    """Each recorded measurement is accepted with its own digest, session key and platform; SEV-ES ones as SEV-ES."""
    for case in cases(attestation):
        found = judged(attestation, tmp_path, case)
        shared = set() if case["policy"] & 2 else {"sev.policy.sharing"}
        assert {finding.id for finding in found.findings} == shared, case["name"]
        assert found.fields["generation"] == "Rome"
        assert found.fields["launch_digest"] == case["launch_digest"]
        found = judged(attestation, tmp_path, case, tee=Tee.SEV_ES)
        lacking = set() if case["policy"] & 4 else {"sev.policy.es"}
        assert {finding.id for finding in found.findings} == shared | lacking


@pytest.mark.parametrize(
    ("options", "finding"),
    [
        ({"policy": SevExpectations()}, "sev.unchecked.measurement"),
        ({"policy": None}, "sev.unchecked.measurement"),
        ({"session_key": None}, "sev.unchecked.session"),
        ({"certificates": []}, "sev.unchecked.platform"),
        ({"policy": SevExpectations(launch_digests=frozenset({bytes(32)}), allow_send=True)}, "sev.measurement"),
        ({"changes": {"sev-build-id": 41}}, "sev.measurement"),
        ({"changes": {"sev-policy": 0}}, "sev.policy.debug"),
        ({"changes": {"sev-policy": 1}}, "sev.policy.sharing"),
        ({"tee": Tee.SEV_ES}, "sev.policy.es"),
    ],
    ids=str,
)
def test_each_shortcoming(attestation, tmp_path, options, finding):
    """Refused by its own finding; what could not be checked did not pass."""
    case = next(case for case in cases(attestation) if not case["policy"] & 4)
    found = judged(attestation, tmp_path, case, **options)
    assert found.verdict is Verdict.REFUSED
    assert finding in {item.id for item in found.findings}


def test_versions_and_sending(attestation, tmp_path):
    """A least API version, and a policy that forbids to send the guest elsewhere."""
    case = cases(attestation)[0]
    digests = frozenset({bytes.fromhex(case["launch_digest"])})
    for wanted, finding in (
        (SevExpectations(launch_digests=digests, minimum_api=(1, 99, 0), allow_send=True), "sev.api.too_old"),
        (SevExpectations(launch_digests=digests), "sev.policy.send"),
    ):
        assert finding in {item.id for item in judged(attestation, tmp_path, case, policy=wanted).findings}


def test_forms(attestation, tmp_path):
    """virsh's lines say the same as JSON; anything else is malformed, not an exception of another kind."""
    case = cases(attestation)[0]
    data = written(tmp_path / "x", case).read_bytes()
    lines = "\n".join(f"{member:16}: {case[name]}" for member, name in FROM_MEMBER.items())
    assert parse_launch(data) == parse_launch(lines.encode())
    bad = [b"", b"{", b"[]", b"\xff" * 90, data[:40], data.replace(b'"sev-policy": ', b'"sev-policy": 9999999999')]
    bad += [json.dumps({**json.loads(data), name: value}).encode() for name, value in (
        ("sev-measurement", "??"), ("sev-api-major", 256), ("sev-api-minor", -1), ("sev-build-id", "x"),
        ("sev-policy", True), ("sev-policy", None), ("sev-policy", [1]),
    )]  # fmt: skip
    for blob in bad:
        with pytest.raises(MalformedEvidence):
            parse_launch(blob)
    short = base64.b64encode(bytes(47)).decode()
    with pytest.raises(MalformedEvidence):
        judged(attestation, tmp_path, case, changes={"sev-measurement": short})
    (tmp_path / "tik").write_bytes(bytes(15))
    with pytest.raises(MalformedEvidence):
        judged(attestation, tmp_path, case, session_key=tmp_path / "tik")
    with pytest.raises(NotFound):
        judged(attestation, tmp_path, case, certificates=[tmp_path / "none"])


def test_the_host_s_chain_in_one_file(attestation, tmp_path):
    """As hosts show it; ASK and ARK too; of another platform it is refused."""
    case, certs = cases(attestation)[0], attestation / "sev/certs"
    for generation in ("rome", "naples"):
        folder = certs / generation
        chain = tmp_path / f"{generation}.chain"
        chain.write_bytes(b"".join((folder / f"{name}.cert").read_bytes() for name in ("pek", "oca", "cek")))
        authorities = tmp_path / f"{generation}.authorities"
        authorities.write_bytes((folder / "ask.cert").read_bytes() + (folder / "ark.cert").read_bytes())
        files = [certs / "rome/pdh.cert", chain, authorities]
        found = judged(attestation, tmp_path, case, certificates=files)
        if generation == "rome":
            assert found.verdict is Verdict.ACCEPTED
        else:
            assert {item.id for item in found.findings} == {"sev.chain.pdh"}


def test_the_command(attestation, tmp_path, capsys):
    """All kinds by the same options; a policy in a file; many certificates after one option; 7 for a refusal."""
    case = cases(attestation)[0]
    launch = written(tmp_path / "launch.json", case)
    certs = [str(path) for path in sorted((attestation / "sev/certs/rome").glob("*.cert"))]
    words = ["--json", "attest", "verify", "--tee", "sev", "--evidence", str(launch), "--certificates", *certs]
    words += ["--session-key", str(attestation / "sev/measurement/tik.bin"), "--measurement", case["launch_digest"]]
    assert main(words) == 7
    shown = json.loads(capsys.readouterr().out)
    assert [item["id"] for item in shown["findings"]] == ["sev.policy.send"]
    assert shown["findings"][0]["remedy"]
    policy = tmp_path / "p.toml"
    policy.write_text('[sev]\nallow_send = true\nminimum_api = "1.40"\n')
    assert main([*words, "--policy", str(policy)]) == 0
    assert json.loads(capsys.readouterr().out)["verdict"] == "accepted"
    policy.write_text("[sev]\nallow_send = 1\nminimum_ap = 1\n")
    assert main([*words, "--policy", str(policy)]) == 2
    assert main([*words, "--rtmr", "1=any"]) == 2
    assert main(["attest", "verify"]) == 2
    capsys.readouterr()


def test_snp_and_tdx_by_policy(attestation, tmp_path, capsys):
    """The policy decides about providers, lists, statuses and registers."""
    folder = attestation / "snp/milan-v2-vlek-vmpl1"
    roots = str(attestation / "amd-roots/milan")
    words = ["--json", "attest", "verify", "--evidence", str(folder / "report.bin")]
    words += ["--at", "2024-06-04T21:14:27Z", "--certificates", str(folder / "vek.der"), roots]
    policy = tmp_path / "p.toml"
    policy.write_text("")
    assert main([*words, "--policy", str(policy)]) == 7
    shown = json.loads(capsys.readouterr().out)
    assert {"snp.signer.vlek", "snp.crl.missing", "snp.vmpl", "snp.tcb.too_old"} <= {i["id"] for i in shown["findings"]}
    said = shown["fields"]
    policy.write_text(f"""
[revocation]
required = false
[snp]
vmpl = 1
allow_provisional_firmware = true
known_minimum_tcb = false
providers = ["CN=cc-us-east-2.amazonaws.com"]
host_data = ["{said["host_data"]}"]
measurements = ["{said["measurement"]}"]
""")
    assert main([*words, "--policy", str(policy)]) == 0
    capsys.readouterr()
    folder = attestation / "tdx/v4-gcp-ccel"
    words = ["--json", "attest", "verify", "--tee", "tdx", "--evidence", str(folder / "quote.bin")]
    words += ["--collateral", str(folder / "collateral.json"), "--at", "2025-02-05T11:57:03Z"]
    assert main(words) == 0
    said = json.loads(capsys.readouterr().out)["fields"]
    rtmrs = "\n".join(f'rtmr{number} = ["{value}"]' for number, value in enumerate(said["rtmrs"]))
    policy.write_text(f'[tdx]\nmr_td = ["{said["mr_td"]}"]\nmr_owner = ["{said["mr_owner"]}"]\n{rtmrs}\n')
    status = main([*words, "--policy", str(policy)])
    shown = json.loads(capsys.readouterr().out)
    assert (status, shown["verdict"]) == (0, "accepted"), shown["findings"]


@pytest.mark.parametrize(
    ("text", "number"), [("08", 8), ("0x0b", 11), ("007", 7), ("0o7", None), ("0b1", None), ("-1", None)]
)
def test_numbers(text, number):
    """Decimal, also with zeros before it, and hexadecimal; nothing else, and never another exception."""
    blob = f"sev-measurement: AAAA\nsev-api-major: 1\nsev-api-minor: 1\nsev-build-id: 1\nsev-policy: {text}\n".encode()
    if number is None:
        with pytest.raises(MalformedEvidence):
            parse_launch(blob)
    else:
        assert parse_launch(blob).policy == number
