"""The simulated SEV platform against recorded launches that libvirt's tool accepted, and against the owner's side."""

from __future__ import annotations

import base64
import json
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from jindiskd.attest.model import EvidenceRefused
from jindiskd.attest.sev import LaunchReport, SevSession, session_blob
from jindiskd.attest.sev_certs import ARK_SHA256, encode_pdh, verify_platform
from jindiskd.base.secret import Secret
from jindiskd.sim.sev_firmware import BAD_MEASUREMENT, INVALID_PARAMETER, INVALID_STATE, SevLaunch, SevRefused
from jindiskd.sim.sev_platform import API, BUILD, SevPlatformKeys


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> SevPlatformKeys:
    path = tmp_path_factory.mktemp("sev") / "platform.json"
    found = SevPlatformKeys.load_or_create(path)
    assert SevPlatformKeys.load_or_create(path) == found
    assert path.stat().st_mode & 0o777 == 0o600
    return found


@pytest.fixture(scope="module")
def recorded(vectors: Path) -> SevPlatformKeys:
    found = json.loads((vectors / "libvirt/sev-platform.json").read_text())
    authorities = base64.b64decode(found["ask_ark"])
    return SevPlatformKeys(
        pdh=base64.b64decode(found["pdh"]),
        chain=base64.b64decode(found["cert_chain"]),
        cek=base64.b64decode(found["cek_signed"]),
        ask=authorities[:1600],
        ark=authorities[1600:],
        pdh_private=int(found["pdh_private"], 16).to_bytes(48, "big"),
    )


@pytest.fixture(scope="module")
def cases(vectors: Path) -> dict[str, Any]:
    return json.loads((vectors / "libvirt/sev-launch/cases.json").read_text())


def report(launch: SevLaunch, measurement: bytes) -> LaunchReport:
    return LaunchReport(measurement=measurement, api_major=API[0], api_minor=API[1], build=BUILD, policy=launch.policy)


def test_its_chain_is_followed_where_it_is_trusted_and_nowhere_else(made: SevPlatformKeys) -> None:
    """The real verifier, with the simulated root; with AMD's roots it is refused by its root."""
    assert made.verified().generation == "simulated"
    with pytest.raises(EvidenceRefused, match="none of AMD's"):
        verify_platform(made.pdh, made.chain, ask=made.ask, ark=made.ark, cek=made.cek, ark_sha256=ARK_SHA256)


def test_the_recorded_platform_is_of_the_same_form(recorded: SevPlatformKeys) -> None:
    """Another implementation's certificates pass by the same code."""
    assert recorded.verified().generation == "simulated"


@pytest.mark.parametrize("policy", [0xB, 0xF])
def test_owner_and_firmware_agree(made: SevPlatformKeys, policy: int) -> None:
    """Session, measurement, secret; another digest, another policy, another launch are refused."""
    digest = bytes(range(32))
    with SevSession(made.verified(), policy=policy) as owner, SevSession(made.verified(), policy=policy) as other:
        launch = SevLaunch(made, policy=policy, dh_certificate=owner.dh_certificate, session=owner.session)
        with pytest.raises(SevRefused) as early:
            launch.open_secret(bytes(52), bytes(16))
        assert early.value.status == INVALID_STATE
        measured = report(launch, launch.measure(digest))
        with pytest.raises(EvidenceRefused, match="not the expected ones"):
            owner.verify(measured, launch_digests={"image": bytes(32)})
        with pytest.raises(EvidenceRefused):
            other.verify(measured, launch_digests={"image": digest})
        verified = owner.verify(measured, launch_digests={"image": digest})
        sealed = owner.seal_keys(verified, Secret(b"k" * 32), {})
        assert b"k" * 32 in launch.open_secret(sealed.header, sealed.payload)
        with pytest.raises(SevRefused) as again:
            launch.measure(digest)
        assert again.value.status == INVALID_STATE
        for changed in (
            {"policy": policy ^ 16},
            {"session": other.session},
            {"dh_certificate": other.dh_certificate},
            {"session": owner.session[:-1] + bytes([owner.session[-1] ^ 1])},
        ):
            given = {"policy": policy, "dh_certificate": owner.dh_certificate, "session": owner.session, **changed}
            with pytest.raises(SevRefused) as caught:
                SevLaunch(made, **given)  # type: ignore[arg-type]  # the table above
            assert caught.value.status == BAD_MEASUREMENT


@pytest.mark.parametrize(("cert", "session"), [(b"", bytes(128)), (bytes(2084), bytes(128)), (None, bytes(127))])
def test_what_is_no_session(made: SevPlatformKeys, cert: bytes | None, session: bytes) -> None:
    """Wrong lengths and forms are refused as parameters."""
    given = cert if cert is not None else encode_pdh(ec.generate_private_key(ec.SECP384R1()).public_key(), api=API)
    with pytest.raises(SevRefused) as caught:
        SevLaunch(made, policy=3, dh_certificate=given, session=session)
    assert caught.value.status == INVALID_PARAMETER


@pytest.mark.parametrize("name", ["sev", "sev-es"])
def test_a_recorded_session_opens(recorded: SevPlatformKeys, vectors: Path, name: str) -> None:
    """The keys inside are the recorded ones."""
    element = ET.parse(vectors / f"libvirt/domain-{name}.xml").getroot().find("launchSecurity")
    assert element is not None
    keys = json.loads((vectors / "libvirt/manifest.json").read_text())["domains"][f"domain-{name}.xml"]
    launch = SevLaunch(
        recorded,
        policy=keys["policy"],
        dh_certificate=base64.b64decode(element.findtext("dhCert", "")),
        session=base64.b64decode(element.findtext("session", "")),
    )
    assert (launch._encryption.hex(), launch._integrity.hex()) == (keys["tek"], keys["tik"])


def started(platform: SevPlatformKeys, cases: dict[str, Any], case: dict[str, Any]) -> SevLaunch:
    """A launch with the recorded keys and nonce."""
    owner = ec.generate_private_key(ec.SECP384R1())
    blob = session_blob(
        owner.exchange(ec.ECDH(), platform.verified().pdh),
        nonce=b"n" * 16,
        iv=b"i" * 16,
        encryption_key=bytes.fromhex(cases["tek"]),
        integrity_key=bytes.fromhex(cases["tik"]),
        policy=case["policy"],
    )
    return SevLaunch(
        platform,
        policy=case["policy"],
        dh_certificate=encode_pdh(owner.public_key(), api=API),
        session=blob,
        random=lambda _size: bytes.fromhex(case["mnonce"]),
    )


def test_recorded_launches(recorded: SevPlatformKeys, cases: dict[str, Any]) -> None:
    """Measurements and secret packets that libvirt's tool accepted or made, byte for byte."""
    for case in cases["cases"]:
        assert (case["api_major"], case["api_minor"], case["build_id"]) == (*API, BUILD)
        launch = started(recorded, cases, case)
        measured = launch.measure(bytes.fromhex(case["launch_digest"]))
        assert measured == base64.b64decode(case["measurement"])
        packet = {name: base64.b64decode(case["secret"][name]) for name in ("header", "payload", "table")}
        assert launch.open_secret(packet["header"], packet["payload"]) == packet["table"]


def test_recorded_refusals(recorded: SevPlatformKeys, cases: dict[str, Any]) -> None:
    """Altered packets get the firmware's number."""
    case = next(case for case in cases["cases"] if case["name"] == cases["bad_packets_for"])
    launch = started(recorded, cases, case)
    launch.measure(bytes.fromhex(case["launch_digest"]))
    for packet in cases["bad_packets"]:
        with pytest.raises(SevRefused) as caught:
            launch.open_secret(base64.b64decode(packet["header"]), base64.b64decode(packet["payload"]))
        assert caught.value.status == packet["firmware_error"], packet["why"]
