"""SEV and SEV-ES: chains, sessions, measurements and secrets, against recorded ones and the firmware's own side."""

import base64
import hmac
import json
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from jindiskd.attest.model import EvidenceRefused, MalformedEvidence
from jindiskd.attest.sev import (
    LaunchReport,
    SevSession,
    appraise_policy,
    derive,
    expected_measurement,
    launch_digest_of,
    seal,
    secret_table,
    session_blob,
    transport_keys,
)
from jindiskd.attest.sev_certs import (
    SevPlatform,
    authority_signed,
    parse_authority,
    parse_sev_certificate,
    verify_platform,
)
from jindiskd.base.secret import Secret
from jindiskd.errors import InvalidArgument


def certificates(attestation: Path, generation: str) -> dict[str, bytes]:
    return {path.stem: path.read_bytes() for path in (attestation / "sev/certs" / generation).glob("*.cert")}


def platform_chain(given: dict[str, bytes]) -> bytes:
    return given["pek"] + given["oca"] + given["cek"]


@pytest.mark.parametrize("generation", ["naples", "rome"])
def test_platform_chains(attestation, generation):
    """Real platforms lead to AMD's root; a change in any certificate, or a foreign one, is refused for that link."""
    given = certificates(attestation, generation)
    found = verify_platform(given["pdh"], platform_chain(given), ask=given["ask"], ark=given["ark"])
    assert generation.capitalize() == found.generation
    again = verify_platform(given["pdh"], platform_chain(given), ask=given["ask"], ark=given["ark"], cek=given["cek"])
    assert found == again
    links = {"pdh": "pdh", "pek": "pek", "oca": "oca", "cek": "cek", "ask": "ask", "ark": "root"}
    for name, link in links.items():
        for place in (6, len(given[name]) // 2 + 8, 0x41C + 3 if len(given[name]) == 2084 else len(given[name]) - 9):
            changed = {**given, name: bytearray(given[name])}
            changed[name][place] ^= 1
            changed[name] = bytes(changed[name])
            if changed[name][place] == given[name][place]:
                continue
            try:
                verify_platform(changed["pdh"], platform_chain(changed), ask=changed["ask"], ark=changed["ark"])
            except MalformedEvidence:
                continue
            except EvidenceRefused as exc:
                assert f"sev.chain.{link}" in {finding.id for finding in exc.findings}, (name, place)  # noqa: PT017
            else:
                pytest.fail(f"{name} changed at {place} was accepted")


def test_chains_of_different_platforms_do_not_mix(attestation):
    """Each certificate exchanged for that of another platform is refused."""
    naples, rome = certificates(attestation, "naples"), certificates(attestation, "rome")
    for name in ("pdh", "pek", "oca", "cek", "ask", "ark"):
        mixed = {**rome, name: naples[name]}
        with pytest.raises(EvidenceRefused, match=r"sev\.chain"):
            verify_platform(mixed["pdh"], platform_chain(mixed), ask=mixed["ask"], ark=mixed["ark"])
    with pytest.raises(EvidenceRefused, match=r"sev\.chain\.root"):
        verify_platform(rome["pdh"], platform_chain(rome), ask=rome["ask"], ark=rome["ark"], ark_sha256={})
    with pytest.raises(EvidenceRefused, match=r"sev\.chain\.cek"):
        verify_platform(
            rome["pdh"], platform_chain(rome), ask=rome["ask"], ark=rome["ark"], cek=naples["cek"]
        )


def test_authorities(attestation):
    """Every recorded authority is signed by its root; the damaged one is refused."""
    for generation in ("naples", "rome", "milan", "genoa", "turin"):
        given = certificates(attestation, generation)
        root, intermediate = parse_authority(given["ark"]), parse_authority(given["ask"])
        large = root.key.key_size == 4096
        assert authority_signed(root, root.body, root.signature, sha384=large)
        assert authority_signed(root, intermediate.body, intermediate.signature, sha384=large)
    with pytest.raises(MalformedEvidence):
        parse_authority((attestation / "sev/certs/naples/ark.cert.bad").read_bytes())


def test_session_keys(attestation):
    """Derived keys and the session blob are the recorded ones."""
    case = json.loads((attestation / "sev/session/case.json").read_text())
    check = case["kdf_check"]
    derived = derive(
        bytes.fromhex(check["key"]), check["label"].encode(), bytes.fromhex(check["context"]), check["bits"]
    )
    assert check["out"] == derived.hex()
    owner = load_pem_private_key(case["guest_owner_private_key"].encode(), None)
    firmware = load_pem_private_key(case["platform_dh_private_key"].encode(), None)
    shared = owner.exchange(ec.ECDH(), firmware.public_key())
    assert case["shared_secret_z"] == shared.hex()
    kek, kik = transport_keys(shared, bytes.fromhex(case["nonce"]))
    assert (case["kek"], case["kik"]) == (kek.hex(), kik.hex())
    blob = session_blob(
        shared,
        nonce=bytes.fromhex(case["nonce"]),
        iv=bytes.fromhex(case["wrap_iv"]),
        encryption_key=bytes.fromhex(case["tek"]),
        integrity_key=bytes.fromhex(case["tik"]),
        policy=case["policy"],
    )
    assert case["session"] == blob.hex()


def test_measurements(attestation):
    """Recorded measurements are reproduced from keys, digests and the parts of the digests."""
    folder = attestation / "sev/measurement"
    recorded = json.loads((folder / "cases.json").read_text())
    for case in recorded["cases"]:
        digest = bytes.fromhex(case["launch_digest"])
        nonce = base64.b64decode(case["nonce"])
        report = LaunchReport(
            measurement=base64.b64decode(case["measurement"]),
            api_major=case["api_major"],
            api_minor=case["api_minor"],
            build=case["build_id"],
            policy=case["policy"],
        )
        key = (folder / recorded["tik"]).read_bytes()
        assert report.measurement == expected_measurement(key, report, digest, nonce) + nonce
        if "firmware" in case:
            states = [(folder / case["vmsa_cpu0"]).read_bytes()] if "vmsa_cpu0" in case else []
            states += [(folder / case["vmsa_other"]).read_bytes()] * (case["vcpus"] - 1) if states else []
            table = bytes.fromhex(case.get("kernel_hashes_table", ""))
            assert digest == launch_digest_of((folder / case["firmware"]).read_bytes(), table, states)


def test_secrets(attestation):
    """Recorded secret tables, headers and payloads are reproduced."""
    folder = attestation / "sev/secret"
    recorded = json.loads((folder / "cases.json").read_text())
    for case in recorded["cases"]:
        table = secret_table([(entry["guid"], bytes.fromhex(entry["hex"])) for entry in case["secrets"]])
        assert case["plaintext_table"] == table.hex()
        sealed = seal(
            table,
            encryption_key=(folder / recorded["tek"]).read_bytes(),
            integrity_key=(folder / recorded["tik"]).read_bytes(),
            mac=base64.b64decode(case["launch_measure_blob"])[:32],
            iv=base64.b64decode(case["iv"]),
        )
        assert case["header"] == base64.b64encode(sealed.header).decode()
        assert case["payload"] == base64.b64encode(sealed.payload).decode()
    with pytest.raises(InvalidArgument):
        secret_table([])
    with pytest.raises(InvalidArgument):
        secret_table([("736869e5-84f0-4973-92ec-06879ce3da0b", bytes(20000))])


class Firmware:
    """The platform's side of a launch, from the specification: opens the session, measures, opens the secret."""

    def __init__(self) -> None:
        self.key = ec.generate_private_key(ec.SECP384R1())
        self.platform = SevPlatform(generation="Test", pdh=self.key.public_key(), pdh_algorithm=3, api=(1, 55))

    def launch(self, session: SevSession, digest: bytes, policy: int, api=(1, 55, 9)) -> LaunchReport:
        shared = self.key.exchange(ec.ECDH(), parse_sev_certificate(session.dh_certificate).key)
        nonce, wrapped, iv = session.session[:16], session.session[16:48], session.session[48:64]
        kek, kik = transport_keys(shared, nonce)
        assert session.session[64:96] == hmac.digest(kik, wrapped, "sha256")
        keys = Cipher(algorithms.AES(kek), modes.CTR(iv)).decryptor().update(wrapped)
        self.tek, self.tik = keys[:16], keys[16:]
        assert session.session[96:] == hmac.digest(self.tik, session.policy.to_bytes(4, "little"), "sha256")
        report = LaunchReport(measurement=b"", api_major=api[0], api_minor=api[1], build=api[2], policy=policy)
        mac = expected_measurement(self.tik, report, digest, b"n" * 16)
        return replace(report, measurement=mac + b"n" * 16)

    def open(self, header: bytes, payload: bytes, mac: bytes) -> bytes:
        length = len(payload).to_bytes(4, "little")
        wanted = hmac.digest(self.tik, b"\1" + header[:20] + length + length + payload + mac, "sha256")
        assert wanted == header[20:]
        return Cipher(algorithms.AES(self.tek), modes.CTR(header[4:20])).decryptor().update(payload)


def test_a_launch():
    """A session made for a platform is opened by it, its measurement accepted, and the disk key arrives."""
    firmware = Firmware()
    with SevSession(firmware.platform, policy=0xF) as session:
        report = firmware.launch(session, b"d" * 32, 0xF)
        verified = session.verify(
            report, launch_digests={"old": b"x" * 32, "new": b"d" * 32}, minimum_api=(1, 55, 9)
        )
        assert verified.launch_digest == b"d" * 32
        assert verified.encrypted_state
        sealed = session.seal_keys(verified, Secret(b"K" * 32), {})
        again = session.seal_keys(verified, Secret(b"K" * 32), {})
        table = firmware.open(sealed.header, sealed.payload, report.measurement[:32])
        assert b"K" * 32 in table
        assert sealed.payload != again.payload
    with SevSession(firmware.platform, policy=0xF) as other:
        assert other.session != session.session
        assert other.dh_certificate != session.dh_certificate


@pytest.mark.parametrize(
    ("changes", "finding"),
    [
        ({"policy": 0xE}, "sev.policy.mismatch"),
        ({"api_major": 0}, "sev.api.too_old"),
        ({"build": 8}, "sev.api.too_old"),
        ({"api_minor": 56}, "sev.measurement"),
        ({"measurement": bytes(48)}, "sev.measurement"),
    ],
)
def test_launches_that_are_refused(changes, finding):
    """What the host says about a launch is bound: any other value is refused."""
    firmware = Firmware()
    with SevSession(firmware.platform, policy=0xF) as session:
        report = replace(firmware.launch(session, b"d" * 32, 0xF), **changes)
        with pytest.raises(EvidenceRefused) as info:
            session.verify(report, launch_digests={"it": b"d" * 32}, minimum_api=(1, 55, 9))
        assert finding in {one.id for one in info.value.findings}
        with pytest.raises(EvidenceRefused):
            session.verify(report, launch_digests={})
        with pytest.raises(MalformedEvidence):
            session.verify(replace(report, measurement=bytes(47)), launch_digests={"it": b"d" * 32})
        with pytest.raises(MalformedEvidence):
            session.verify(replace(report, build=256), launch_digests={"it": b"d" * 32})


def test_policies():
    """Policies that let the host in are refused before there is a session."""
    for policy, bad in ((0x0, {"debug", "sharing", "send"}), (0xB, set()), (0x3, {"send"}), (0xA, {"debug"})):
        assert {f"sev.policy.{name}" for name in bad} == {
            finding.id for finding in appraise_policy(policy, encrypted_state=False)
        }
    assert [finding.id for finding in appraise_policy(0xB, encrypted_state=True)] == ["sev.policy.es"]
    assert appraise_policy(0x7, encrypted_state=True, allow_send=True) == []
    with pytest.raises(EvidenceRefused):
        SevSession(Firmware().platform, policy=0x8)
