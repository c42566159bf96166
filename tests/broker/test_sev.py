"""The broker's side of SEV launches, against the simulated secure processor: who gets a sealed key, and who not."""

from __future__ import annotations

import base64
import uuid
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from vendorbench import Played

from jindiskd.attest.collateral import CollateralCache
from jindiskd.attest.collecting import Collector
from jindiskd.attest.model import EvidenceRefused, MalformedEvidence
from jindiskd.attest.sev import LaunchReport
from jindiskd.attest.vendors import Vendors
from jindiskd.base.platform import Platform
from jindiskd.base.secret import Secret
from jindiskd.broker.peer import BrokerEvent, Peer
from jindiskd.broker.sev import HostPlatform, ReleaseWaits, SevCertificateMissing, SevTurn
from jindiskd.broker.sev_owner import SevOwner
from jindiskd.errors import NotFound
from jindiskd.guest.secret import DISK_KEY, entries, volume_key
from jindiskd.keys.audit import Requester
from jindiskd.keys.registry import Registry
from jindiskd.keys.store import Store
from jindiskd.policy.rules import ReleaseRules
from jindiskd.sim.sev_firmware import SevLaunch, SevRefused
from jindiskd.sim.sev_platform import API, BUILD, CPU_ID, SevPlatformKeys

IMAGE = "11111111-1111-4111-8111-111111111111"
KEY = bytes(range(32))
DIGEST = b"\x5a" * 32
PEER = Peer(description="domain d", domain_uuid="d", image_id=IMAGE)


class Owner:
    """A store with one image, and its owner's side."""

    def __init__(
        self,
        path: Path,
        keys: SevPlatformKeys,
        platform: Platform,
        *,
        simulation: bool = True,
        vendors: Vendors | None = None,
    ) -> None:
        self.store = Store.open(f"sqlite:///{path}/keys.db", Secret.random(32))
        self.store.add_image(IMAGE, "web", platform, f"default/{IMAGE}/root", Secret(KEY))
        self.store.activate(IMAGE, [DIGEST])
        self.events: list[BrokerEvent] = []
        self.side = SevOwner(
            self.store,
            certificates=path / "sev",
            collector=Collector(CollateralCache(path / "collateral"), vendors),
            simulated=(lambda: keys.root) if simulation else None,
            on_event=self.events.append,
        )

    def last(self) -> tuple[str, list[str]]:
        row = self.store.audit_rows()[-1]
        return row["kind"], [found["id"] for found in row["detail"].get("findings", [])]


def shown(keys: SevPlatformKeys) -> HostPlatform:
    return HostPlatform(pdh=keys.pdh, chain=keys.chain, cpu_id=CPU_ID)


def report(policy: int, measurement: bytes) -> LaunchReport:
    return LaunchReport(measurement=measurement, api_major=API[0], api_minor=API[1], build=BUILD, policy=policy)


@pytest.mark.parametrize(("platform", "policy"), [(Platform.SIMULATED_SEV, 0xB), (Platform.SIMULATED_SEV_ES, 0xF)])
async def test_a_good_launch_gets_the_sealed_key(
    tmp_path: Path, keys: SevPlatformKeys, platform: Platform, policy: int
) -> None:
    """It opens in that launch alone; the audit row says simulated, and was there first."""
    owner = Owner(tmp_path, keys, platform)
    turn = await owner.side.begin(PEER, policy, shown(keys))
    launch = SevLaunch(keys, policy=policy, dh_certificate=turn.dh_certificate, session=turn.session)
    sealed = await turn.approve(report(policy, launch.measure(DIGEST)))
    turn.close()
    assert bytes(entries(launch.open_secret(sealed.header, sealed.payload))[DISK_KEY]) == KEY
    assert KEY not in sealed.header + sealed.payload
    row = owner.store.audit_rows()[-1]
    assert (row["kind"], row["simulated"], row["measurement"]) == ("released", True, DIGEST.hex())
    assert [event.kind for event in owner.events] == ["challenged", "attested", "released"]
    again = await owner.side.begin(PEER, policy, shown(keys))
    other = SevLaunch(keys, policy=policy, dh_certificate=again.dh_certificate, session=again.session)
    other.measure(DIGEST)
    with pytest.raises(SevRefused):
        other.open_secret(sealed.header, sealed.payload)
    assert turn.session != again.session
    again.close()


async def test_the_keys_of_all_volumes_are_sealed(tmp_path: Path, keys: SevPlatformKeys) -> None:
    """Each under a name of its own, all of them or none; further keys of another kind are for whoever asks for them."""
    owner = Owner(tmp_path, keys, Platform.SIMULATED_SEV)
    registry, who = Registry(owner.store), Requester(peer="owner")
    data = {f"default/{IMAGE}/{name}": bytes([number]) * 32 for number, name in enumerate(("data", "logs"), 1)}
    for resource, key in data.items():
        registry.add_key(IMAGE, resource, Secret(key), who)
    registry.add_key(IMAGE, "default/certificates/web", Secret(b"c" * 4096), who)

    async def launched() -> Mapping[uuid.UUID, bytearray]:
        turn = await owner.side.begin(PEER, 0xB, shown(keys))
        launch = SevLaunch(keys, policy=0xB, dh_certificate=turn.dh_certificate, session=turn.session)
        try:
            sealed = await turn.approve(report(0xB, launch.measure(DIGEST)))
        finally:
            turn.close()
        return entries(launch.open_secret(sealed.header, sealed.payload))

    assert await launched() == {DISK_KEY: KEY, **{volume_key(resource): key for resource, key in data.items()}}
    rows = [row for row in owner.store.audit_rows() if row["kind"] == "released"]
    assert [row["detail"].get("resource") for row in rows] == [None, *data]
    owner.store.set_rules(IMAGE, replace(ReleaseRules(), releases_in_all=1))
    with pytest.raises(EvidenceRefused, match="given out as often"):
        await launched()
    owner.store.set_rules(IMAGE, ReleaseRules())
    for number in range(6):
        registry.add_key(IMAGE, f"default/{IMAGE}/more-{number}", Secret(bytes(32)), who)
    with pytest.raises(EvidenceRefused, match="more than 8 volumes"):
        await launched()
    assert len([row for row in owner.store.audit_rows() if row["kind"] == "released"]) == 3


@pytest.mark.parametrize(
    ("policy", "cut", "findings"),
    [(0xB, 48, ["sev.measurement"]), (0xF, 48, ["sev.measurement", "sev.policy.mismatch"]), (0xB, 47, None)],
    ids=["kernel", "policy", "short"],
)
async def test_another_measurement_gets_nothing(
    tmp_path: Path, keys: SevPlatformKeys, policy: int, cut: int, findings: list[str] | None
) -> None:
    """A changed kernel; a changed policy; one that is none. The right one comes too late then."""
    owner = Owner(tmp_path, keys, Platform.SIMULATED_SEV)
    turn = await owner.side.begin(PEER, 0xB, shown(keys))
    launch = SevLaunch(keys, policy=0xB, dh_certificate=turn.dh_certificate, session=turn.session)
    with pytest.raises(MalformedEvidence if findings is None else EvidenceRefused):
        await turn.approve(report(policy, launch.measure(bytes(32))[:cut]))
    if findings is not None:
        assert owner.last() == ("refused", findings)
    other = SevLaunch(keys, policy=0xB, dh_certificate=turn.dh_certificate, session=turn.session)
    with pytest.raises(EvidenceRefused, match="judged already"):
        await turn.approve(report(0xB, other.measure(DIGEST)))
    turn.close()
    assert all(row["kind"] != "released" for row in owner.store.audit_rows())


async def test_the_rules_for_the_platform_count(tmp_path: Path, keys: SevPlatformKeys) -> None:
    """The least firmware, and simulation that this image does not accept."""
    owner = Owner(tmp_path, keys, Platform.SIMULATED_SEV)
    owner.store.set_rules(IMAGE, replace(ReleaseRules(), sev_minimum_api="1.56"))
    turn = await owner.side.begin(PEER, 0xB, shown(keys))
    launch = SevLaunch(keys, policy=0xB, dh_certificate=turn.dh_certificate, session=turn.session)
    with pytest.raises(EvidenceRefused, match=r"below 1\.56"):
        await turn.approve(report(0xB, launch.measure(DIGEST)))
    assert owner.last() == ("refused", ["sev.api.too_old"])
    owner.store.set_rules(IMAGE, replace(ReleaseRules(), allow_simulated=False))
    with pytest.raises(EvidenceRefused):
        await owner.side.begin(PEER, 0xB, shown(keys))
    assert owner.last() == ("refused", ["platform.simulation"])
    owner.store.set_rules(IMAGE, replace(ReleaseRules(), sev_allow_send=True))
    (await owner.side.begin(PEER, 0x3, shown(keys))).close()


async def test_a_launch_waits_for_approval(tmp_path: Path, keys: SevPlatformKeys) -> None:
    """The same measurement again, once a person has granted it; the grant is for this launch alone."""
    owner = Owner(tmp_path, keys, Platform.SIMULATED_SEV)
    owner.store.set_rules(IMAGE, replace(ReleaseRules(), approval=True))

    async def begun() -> tuple[SevTurn, LaunchReport]:
        turn = await owner.side.begin(PEER, 0xB, shown(keys))
        launch = SevLaunch(keys, policy=0xB, dh_certificate=turn.dh_certificate, session=turn.session)
        return turn, report(0xB, launch.measure(DIGEST))

    turn, told = await begun()
    for _ in range(2):
        with pytest.raises(ReleaseWaits) as waits:
            await turn.approve(told)
    (waiting,) = owner.store.approvals.list()
    assert waits.value.approval == waiting.number
    owner.store.approvals.grant(waiting.number)
    assert (await turn.approve(told)).payload
    other, its = await begun()
    with pytest.raises(ReleaseWaits):
        await other.approve(its)


async def test_a_key_that_is_withheld_between_the_two_steps(tmp_path: Path, keys: SevPlatformKeys) -> None:
    """Revoked while the machine was made: the store has the last word, in the transaction of the release."""
    owner = Owner(tmp_path, keys, Platform.SIMULATED_SEV)
    turn = await owner.side.begin(PEER, 0xB, shown(keys))
    launch = SevLaunch(keys, policy=0xB, dh_certificate=turn.dh_certificate, session=turn.session)
    owner.store.revoke(IMAGE)
    with pytest.raises(EvidenceRefused, match="revoked"):
        await turn.approve(report(0xB, launch.measure(DIGEST)))
    turn.close()
    assert owner.last() == ("refused", ["key.state"])


async def test_rules_that_change_between_the_two_steps(tmp_path: Path, keys: SevPlatformKeys) -> None:
    """What the launch's policy may let the host do is for the rules in force when the key is asked for."""
    owner = Owner(tmp_path, keys, Platform.SIMULATED_SEV)
    owner.store.set_rules(IMAGE, replace(ReleaseRules(), sev_allow_send=True))
    turn = await owner.side.begin(PEER, 0x3, shown(keys))
    launch = SevLaunch(keys, policy=0x3, dh_certificate=turn.dh_certificate, session=turn.session)
    owner.store.set_rules(IMAGE, ReleaseRules())
    with pytest.raises(EvidenceRefused, match="send the guest elsewhere"):
        await turn.approve(report(0x3, launch.measure(DIGEST)))
    turn.close()
    assert owner.last() == ("refused", ["sev.policy.send"])


@pytest.mark.parametrize(
    ("platform", "policy", "simulation", "finding"),
    [
        (Platform.SIMULATED_SEV, 0xB, False, "platform.simulation"),
        (Platform.SIMULATED_SNP, 0xB, True, "platform.kind"),
        (Platform.SIMULATED_SEV_ES, 0xB, True, "platform.kind"),
        (Platform.SIMULATED_SEV, 0x3, True, "sev.policy.send"),
        (Platform.SIMULATED_SEV, 0xA, True, "sev.policy.debug"),
    ],
)
async def test_what_is_refused_before_a_session(
    tmp_path: Path, keys: SevPlatformKeys, platform: Platform, policy: int, simulation: bool, finding: str
) -> None:
    """Simulation that is off, the wrong kind of image, a policy that allows too much: all in the audit log."""
    owner = Owner(tmp_path, keys, platform, simulation=simulation)
    with pytest.raises(EvidenceRefused):
        await owner.side.begin(PEER, policy, shown(keys))
    assert owner.last() == ("refused", [finding])


async def test_the_images_rules_count(tmp_path: Path, keys: SevPlatformKeys) -> None:
    """An image that is not released any more."""
    owner = Owner(tmp_path, keys, Platform.SIMULATED_SEV)
    owner.store.set_rules(IMAGE, replace(ReleaseRules(), not_after="2001-01-01T00:00:00Z"))
    with pytest.raises(EvidenceRefused):
        await owner.side.begin(PEER, 0xB, shown(keys))
    assert owner.last() == ("refused", ["policy.too_late"])


async def test_a_platform_that_is_not_the_one(tmp_path: Path, keys: SevPlatformKeys) -> None:
    """A host that shows a key of its own; and a real image on the simulated platform, for which certificates lack."""
    owner = Owner(tmp_path, keys, Platform.SIMULATED_SEV)
    stranger = SevPlatformKeys.generate()
    with pytest.raises(EvidenceRefused):
        await owner.side.begin(PEER, 0xB, replace(shown(keys), pdh=stranger.pdh))
    assert owner.last() == ("refused", ["sev.chain.pdh"])
    real = tmp_path / "real"
    real.mkdir()
    owner = Owner(real, keys, Platform.SEV)
    with pytest.raises(NotFound, match=rf"collateral fetch --sev-processor {CPU_ID.hex()}'"):
        await owner.side.begin(PEER, 0xB, shown(keys))
    (real / "sev").mkdir()
    for name, data in (("ask", keys.ask), ("ark", keys.ark), (f"cek-{CPU_ID.hex()[:16]}", keys.cek)):
        (real / "sev" / f"{name}.cert").write_bytes(data)
    with pytest.raises(EvidenceRefused, match="none of AMD's"):
        await owner.side.begin(PEER, 0xB, shown(keys))
    assert owner.last() == ("refused", ["sev.chain.root"])


@pytest.mark.parametrize("generation", ["naples", "rome"])
async def test_amds_certificates_are_fetched(
    tmp_path: Path, keys: SevPlatformKeys, vectors: Path, generation: str
) -> None:
    """A recorded platform is followed to AMD by what its key service says, asked once, and without it from then on."""
    attestation = vectors / "attestation"
    if not attestation.is_dir():
        pytest.skip(f"the recorded evidence is not at {attestation}")
    folder = attestation / "sev/certs" / generation
    there = {path.stem: path.read_bytes() for path in folder.glob("*.cert")}
    host = HostPlatform(pdh=there["pdh"], chain=there["pek"] + there["oca"] + there["cek"], cpu_id=CPU_ID)
    with Played(tmp_path) as services:
        services.play_sev(attestation)
        services.add(f"/cek/id/{CPU_ID.hex()}", there["cek"])
        vendors = Vendors(kds=services.url, sev=f"{services.url}/sev", context=services.context())
        for _ in range(2):
            owner = Owner(tmp_path, keys, Platform.SEV, vendors=vendors)
            turn = await owner.side.begin(PEER, 0xB, host)
            assert len(turn.session) == 128
            turn.close()
            owner.store.close()
            (tmp_path / "keys.db").unlink()
        assert set(services.asked.values()) == {1}
        assert services.asked[f"/sev/ask_ark_{generation}.cert"] == 1
    owner = Owner(tmp_path, keys, Platform.SEV)
    (await owner.side.begin(PEER, 0xB, host)).close()
    with pytest.raises(SevCertificateMissing):
        await owner.side.begin(PEER, 0xB, replace(host, cpu_id=bytes(64)))


@pytest.mark.parametrize(
    "change",
    [{"pdh": None}, {"pdh": "?"}, {"pdh": "AAAA"}, {"cert-chain": "AAAA"}, {"cpu0-id": ""}, {"cpu0-id": "A" * 1000}],
    ids=["missing", "not base64", "short", "chain", "no id", "long id"],
)
def test_what_a_host_may_show(keys: SevPlatformKeys, change: Mapping[str, str | None]) -> None:
    """Each part has its length."""
    good = {"pdh": keys.pdh, "cert-chain": keys.chain, "cpu0-id": CPU_ID}
    info: dict[str, object] = {name: base64.b64encode(data).decode() for name, data in good.items()}
    assert HostPlatform.read(info) == shown(keys)
    for name, value in change.items():
        if value is None:
            del info[name]
        else:
            info[name] = value
    with pytest.raises(MalformedEvidence):
        HostPlatform.read(info)
