"""SEV launches judged by a broker elsewhere: what the host between can do, and what it cannot."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from brokerbench import REQUEST
from sev_place import DIGESTS, IMAGE, KEYS, OTHER, PEER, POLICY, Place, cookie_of, report

from jindiskd.attest.collateral import CollateralCache
from jindiskd.attest.collecting import Collector
from jindiskd.attest.model import EvidenceRefused
from jindiskd.base import document
from jindiskd.base.platform import Platform
from jindiskd.base.secret import Secret
from jindiskd.broker.peer import BrokerLimits
from jindiskd.broker.relay import RelayState
from jindiskd.broker.sessions import SessionKeeper
from jindiskd.broker.sev import ReleaseWaits
from jindiskd.broker.sev_messages import (
    dump_approve,
    parse_begun,
    parse_sealed,
)
from jindiskd.broker.sev_remote import LaunchForgotten, RemoteOwner
from jindiskd.broker.sev_steps import LONGEST_WAIT_S
from jindiskd.broker.shared import DatabaseSessions
from jindiskd.broker_config import BrokerConfig, Config
from jindiskd.brokerd import launch_judge
from jindiskd.errors import InvalidArgument, NotSupported
from jindiskd.guest.secret import DISK_KEY, entries
from jindiskd.kbs.client import BrokerMisbehaved, BrokerNotTrusted, BrokerRefused, BrokerUnreachable
from jindiskd.kbs.messages import MalformedMessage
from jindiskd.keys.database import sessions_table
from jindiskd.policy.rules import ReleaseRules
from jindiskd.sim.pki import SimulatedRoot
from jindiskd.sim.sev_firmware import SevRefused
from jindiskd.sim.sev_platform import CPU_ID, SevPlatformKeys


@pytest.fixture(scope="module")
def other() -> SevPlatformKeys:
    return SevPlatformKeys.generate()


async def test_a_launch_is_judged_through_the_host(place: Place) -> None:
    """The secret opens in that launch alone; the audit row is as any release's, and nothing on the way is the key."""
    async with place.listening() as owner:
        turn, launch, told = await place.measured(owner)
        sealed = await turn.approve(told)
        assert bytes(entries(launch.open_secret(sealed.header, sealed.payload))[DISK_KEY]) == KEYS[IMAGE]
        assert KEYS[IMAGE] not in turn.session + turn.dh_certificate + sealed.header + sealed.payload
        _turn, other, _told = await place.measured(owner)
        with pytest.raises(SevRefused):
            other.open_secret(sealed.header, sealed.payload)
        assert owner._relay.total.state is RelayState.IDLE
    row = place.store.audit_rows()[-1]
    assert (row["kind"], row["simulated"], row["measurement"]) == ("released", True, DIGESTS[IMAGE].hex())
    assert row["peer"] == "tcp 127.0.0.1"
    assert row["detail"]["chip"] == CPU_ID.hex()
    assert len(row["detail"]["guest"]) == 64
    assert row["detail"]["token"]
    assert [event.kind for event in place.events][:3] == ["challenged", "attested", "released"]


async def test_a_measurement_counts_once(place: Place) -> None:
    """The same one again, at the same session or at another, also at the same time."""
    async with place.listening() as owner:
        turn, _launch, told = await place.measured(owner)
        found = await asyncio.gather(*(turn.approve(told) for _ in range(8)), return_exceptions=True)
        assert sorted(type(one).__name__ for one in found) == ["LaunchForgotten"] * 7 + ["SealedSecret"]
        assert place.kinds() == ["released"]
        again = await owner.begin(PEER, POLICY, place.host)
        with pytest.raises(EvidenceRefused):
            await again.approve(told)
        assert place.findings() == ["sev.measurement"]
        with pytest.raises(LaunchForgotten):
            await again.approve(told)


async def test_a_refused_launch_is_not_judged_again(place: Place) -> None:
    """A measurement that was wrong cannot be mended; the row has the launch and the reason, the host neither."""
    async with place.listening() as owner:
        turn = await owner.begin(PEER, POLICY, place.host)
        launch = place.start(turn)
        with pytest.raises(EvidenceRefused) as caught:
            await turn.approve(report(launch.measure(bytes(32))))
        assert "measure" not in str(caught.value)
        assert place.findings() == ["sev.measurement"]
        with pytest.raises(LaunchForgotten):
            await turn.approve(report(place.start(turn).measure(DIGESTS[IMAGE])))
    assert place.kinds() == ["refused"]


async def test_other_launches_do_not_help(place: Place) -> None:
    """Another domain's session, another image's launch, and one whose machine has another policy."""
    async with place.listening() as owner:
        _mine, _launch, told = await place.measured(owner)
        theirs, _launch, _theirs = await place.measured(owner, OTHER)
        with pytest.raises(EvidenceRefused):
            await theirs.approve(told)
        assert place.findings() == ["sev.measurement"]
        wrong = await owner.begin(PEER, POLICY, place.host)
        with pytest.raises(EvidenceRefused):  # the digest of the other image, in a session for this one
            await wrong.approve(report(place.start(wrong).measure(DIGESTS[OTHER])))
        lax = await owner.begin(PEER, POLICY, place.host)
        with pytest.raises(SevRefused):  # the processor itself does not take another policy than the session's
            place.start(lax, policy=0x3)
        with pytest.raises(EvidenceRefused):
            await lax.approve(report(place.start(lax).measure(DIGESTS[IMAGE]), policy=0x3))
        assert place.findings() == ["sev.measurement", "sev.policy.mismatch"]
    assert "released" not in place.kinds()


@pytest.mark.parametrize(
    ("change", "finding"),
    [
        (lambda keys, other: {"pdh": other.pdh}, "sev.chain.pdh"),
        (lambda keys, other: {"pdh": other.pdh, "chain": other.chain}, "sev.chain.cek"),
        (lambda keys, other: {"chain": keys.chain[:2084] + other.chain[2084:]}, "sev.chain.cek"),
    ],
    ids=["the key alone", "a whole platform", "half a chain"],
)
async def test_a_platform_of_the_hosts_own(
    place: Place,
    other: SevPlatformKeys,
    change: Callable[[SevPlatformKeys, SevPlatformKeys], dict[str, bytes]],
    finding: str,
) -> None:
    """No session is made for a key that does not lead to the root: the host could read what it protects."""
    async with place.listening() as owner:
        with pytest.raises(EvidenceRefused):
            await owner.begin(PEER, POLICY, replace(place.host, **change(place.keys, other)))
        assert finding in place.findings()
        assert place.broker._sessions.count() == 0


@pytest.mark.parametrize(("policy", "finding"), [(0xA, "debug"), (0x9, "sharing"), (0x3, "send")])
async def test_a_policy_that_allows_too_much(place: Place, policy: int, finding: str) -> None:
    """No session is made for it."""
    async with place.listening() as owner:
        with pytest.raises(EvidenceRefused):
            await owner.begin(PEER, policy, place.host)
    assert place.findings() == [f"sev.policy.{finding}"]


async def test_what_is_refused_for_its_image(place: Place, tmp_path: Path) -> None:
    """An image that is not here, of another platform, or without certificates; a key that was revoked meanwhile."""
    snp, real = "33333333-3333-4333-8333-333333333333", "44444444-4444-4444-8444-444444444444"
    for image, platform in ((snp, Platform.SIMULATED_SNP), (real, Platform.SEV)):
        place.store.add_image(image, image, platform, f"default/{image}/root", Secret(KEYS[IMAGE]))
        place.store.activate(image, [DIGESTS[IMAGE]])
    cases = (("no-such", "resource.unknown"), (snp, "platform.kind"), (real, "sev.chain.missing"))
    async with place.listening() as owner:
        for image, finding in cases:
            with pytest.raises(EvidenceRefused):
                await owner.begin(replace(PEER, image_id=image), POLICY, place.host)
            assert place.findings() == [finding]
        turn, _launch, told = await place.measured(owner)
        place.store.revoke(IMAGE)
        with pytest.raises(EvidenceRefused):
            await turn.approve(told)
        assert place.findings() == ["key.state"]


async def test_sessions_of_guests_and_of_launches_are_not_each_others(place: Place) -> None:
    """A guest's cookie judges no launch, a launch's attests nothing and gets nothing; another address has neither."""
    async with place.listening() as owner:
        turn, _launch, told = await place.measured(owner)
        body, cookie = dump_approve(told), cookie_of(turn)
        assert (await place.http("POST", "/kbs/v0/attest", b"{}", cookie))[0] == 401
        assert (await place.http("GET", f"/kbs/v0/resource/default/{IMAGE}/root", b"", cookie))[0] == 401
        _status, guests = await place.http("POST", "/kbs/v0/auth", REQUEST)
        assert guests is not None
        for name, source in ((guests, "127.0.0.1"), ("0" * 32, "127.0.0.1"), (cookie, "127.0.0.2")):
            with pytest.raises(BrokerRefused) as caught:
                await place.raw("sev-approve", body, name, source)
            assert caught.value.kind == "TokenNotFound"
        with pytest.raises(BrokerRefused):
            await place.raw("sev-approve", body, None)
        assert (await turn.approve(told)).payload
    assert place.kinds() == ["released"]


async def test_approval_limits_and_time(place: Place) -> None:
    """As for other releases: it waits for a person, for a while, and counts."""
    place.store.set_rules(IMAGE, replace(ReleaseRules(), approval=True, releases_per_hour=1))
    async with place.listening() as owner:
        turn, _launch, told = await place.measured(owner)
        for _ in range(2):
            with pytest.raises(ReleaseWaits):
                await turn.approve(told)
        (waiting,) = place.store.approvals.list()
        assert waiting.measurement == DIGESTS[IMAGE].hex()
        place.store.approvals.grant(waiting.number)
        assert (await turn.approve(told)).payload
        second, _launch, told = await place.measured(owner)
        with pytest.raises(EvidenceRefused):
            await second.approve(told)
        assert place.findings() == ["limit.image"]
        place.store.set_rules(IMAGE, replace(ReleaseRules(), approval=True))
        third, _launch, told = await place.measured(owner)
        assert place.broker._launches is not None
        place.broker._launches._now = lambda: time.time() + LONGEST_WAIT_S + 1
        with pytest.raises(ReleaseWaits):
            await third.approve(told)
        with pytest.raises(LaunchForgotten):
            await third.approve(told)


async def test_too_many_launches_of_a_host(tmp_path: Path, keys: SevPlatformKeys, root: SimulatedRoot) -> None:
    """It is told to come again, and the owner's guests are not locked out."""
    made = Place(tmp_path, keys, root, limits=BrokerLimits(launches_per_peer=2, launch_lifetime_s=3600))
    async with made.listening() as owner:
        for _ in range(2):
            await owner.begin(PEER, POLICY, made.host)
        with pytest.raises(BrokerRefused, match="PluginInternalError"):
            await owner.begin(PEER, POLICY, made.host)
        assert [row["kind"] for row in made.store.audit_rows()][-1] == "activated"
        assert (await made.http("POST", "/kbs/v0/auth", REQUEST))[0] == 200
    made.store.close()


@pytest.mark.parametrize("shared", [False, True], ids=["one", "several"])
async def test_a_broker_that_ends_between_the_steps(
    tmp_path: Path, keys: SevPlatformKeys, root: SimulatedRoot, shared: bool
) -> None:
    """Alone it forgets the launch, which is begun anew; of several brokers the next one knows it, once."""
    made = Place(tmp_path, keys, root)

    def sessions() -> dict[str, SessionKeeper]:
        return {"sessions": DatabaseSessions(made.store.database, BrokerLimits())} if shared else {}

    async with made.listening(made.another(**sessions())) as owner:
        turn, launch, told = await made.measured(owner)
        port = made.port
    with pytest.raises(BrokerUnreachable, match=f"127.0.0.1:{port}"):
        await asyncio.wait_for(_within(owner, lambda: turn.approve(told)), 60)
    assert owner._relay.total.state is RelayState.UNREACHABLE
    async with made.listening(made.another(**sessions()), port):
        if shared:
            sealed = await turn.approve(told)
            assert bytes(entries(launch.open_secret(sealed.header, sealed.payload))[DISK_KEY]) == KEYS[IMAGE]
        with pytest.raises(LaunchForgotten):
            await turn.approve(told)
        turn, _launch, told = await made.measured(owner)
        assert (await turn.approve(told)).payload
    if shared:  # nothing of what could open the secrets is left
        with made.store.database.read() as connection:
            kept = connection.execute(sa.select(sessions_table.c.stage, sessions_table.c.facts)).all()
        assert [(row.stage, row.facts.get("launch")) for row in kept] == [("ended", None)] * 2
    made.store.close()


async def _within(owner: RemoteOwner, call: Callable[[], Any]) -> Any:
    """Make a step give up soon."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jindiskd.broker.sev_remote.STEP_S", 1.0)
        return await call()


async def test_whoever_answers_in_the_brokers_place(place: Place, tmp_path: Path) -> None:
    """Another key is not spoken to; a broker that judges no launches says so; nonsense is none of an answer."""
    async with place.listening():
        with pytest.raises(BrokerNotTrusted):
            await place.owner(bytes(32)).begin(PEER, POLICY, place.host)
    async with place.listening(place.another(sev=None)) as owner:
        with pytest.raises(NotSupported, match="jindisk-broker"):
            await owner.begin(PEER, POLICY, place.host)
    for parse, body in ((parse_begun, b'{"dh-cert":"AAAA","session":"AAAA"}'), (parse_sealed, b'{"header":""}')):
        with pytest.raises(MalformedMessage):
            parse(body)
    async with place.listening() as owner:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("jindiskd.broker.sev_steps.dump_begun", lambda *_: {"dh-cert": "AAAA", "session": ""})
            with pytest.raises(BrokerMisbehaved):
                await owner.begin(PEER, POLICY, place.host)


def test_a_simulated_platform_that_cannot_be_read(tmp_path: Path, place: Place, keys: SevPlatformKeys) -> None:
    """The setting is named; the file with the platform's secret is not taken for its public part."""
    for content in (None, b"{}", document.dump(keys)):
        file = tmp_path / "platform.json"
        if content is not None:
            file.write_bytes(content)
        config = Config(broker=BrokerConfig(allow_simulated=True, simulated_sev=file))
        with pytest.raises(InvalidArgument, match="simulated_sev"):
            launch_judge(config, place.store, Collector(CollateralCache(tmp_path)))
    file.write_bytes(document.dump(keys.root))
    launch_judge(config, place.store, Collector(CollateralCache(tmp_path)))
