"""The freshness messages over the wire: our client, real TLS and attestation, and who may not speak."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from brokerbench import DIGEST, IMAGE, KEY, OTHER, Bench, bench, kind

from jindiskd.base.anchor import Anchor
from jindiskd.kbs.client import BrokerRefused, BrokerUnreachable, Fenced
from jindiskd.kbs.freshness import VolumeGrant
from jindiskd.keys.volumes import Volumes
from jindiskd.policy.rules import ReleaseRules
from jindiskd.sim.firmware import SimulatedSnpFirmware
from jindiskd.sim.pki import SimulatedRoot

VOLUME, FOREIGN = "33333333-3333-4333-8333-333333333333", "44444444-4444-4444-8444-444444444444"
FIRST = Anchor(open=False, session=b"\1" * 32, sequence=7, root=b"\7" * 32)


def with_volumes(b: Bench) -> Volumes:
    volumes = Volumes(b.store)
    volumes.add(VOLUME, IMAGE, FIRST)
    volumes.add(FOREIGN, OTHER, FIRST)
    return volumes


async def release(b: Bench, volume: str = VOLUME, image: str = IMAGE, within_s: float = 10) -> VolumeGrant:
    client = b.client(within_s=within_s)
    return await asyncio.to_thread(client.release, "snp", f"default/{image}/root", volume, b.evidence)


async def tell(b: Bench, verb: str, *arguments: Any, within_s: float = 5) -> None:
    await asyncio.to_thread(getattr(b.client(within_s=within_s), verb), *arguments)


async def test_a_session_from_release_to_close(root: SimulatedRoot, tmp_path: Path) -> None:
    """As a guest does it; a second guest then begins where the first ended, and the first is fenced."""
    async with bench(root, tmp_path) as b:
        volumes = with_volumes(b)
        grant = await release(b)
        assert (bytes(grant.key.reveal()), grant.anchor) == (KEY, FIRST)
        await tell(b, "adopt", VOLUME, grant.session, 7, FIRST.root)
        await tell(b, "report", VOLUME, grant.session, 9, b"\x09" * 32)
        second = await release(b)
        assert second.anchor == Anchor(open=True, session=grant.session, sequence=9, root=b"\x09" * 32)
        await tell(b, "adopt", VOLUME, second.session, 9, b"\x09" * 32)
        with pytest.raises(Fenced):
            await tell(b, "report", VOLUME, grant.session, 10, b"\x0a" * 32)
        await tell(b, "close", VOLUME, second.session, 12, b"\x0c" * 32)
        anchor = volumes.get(VOLUME).anchor
        assert anchor == Anchor(open=False, session=second.session, sequence=12, root=b"\x0c" * 32)
        kinds = [row["kind"] for row in b.store.audit_rows()]
        assert kinds[-6:] == ["released", "adopted", "released", "adopted", "fenced", "closed"]
        assert b.store.audit_rows()[-6]["detail"]["volume"] == VOLUME


async def test_a_stale_disk_is_refused_with_a_finding(root: SimulatedRoot, tmp_path: Path) -> None:
    """The guest says it over the wire; whoever follows guests hears of a refusal, and the broker counts it."""
    async with bench(root, tmp_path) as b:
        with_volumes(b)
        grant = await release(b)
        await tell(b, "stale", VOLUME, grant.session, 3, bytes(32))
        event = b.events[-1]
        assert (event.kind, event.image_id, event.simulated) == ("refused", IMAGE, True)
        assert [finding.id for finding in event.findings] == ["volume.stale"]
        assert b.store.audit_rows()[-1]["kind"] == "refused"
        assert b.store.audit_rows()[-1]["simulated"]
        with pytest.raises(Fenced):
            await tell(b, "stale", VOLUME, grant.session, 3, bytes(32))
        with pytest.raises(Fenced):
            await tell(b, "adopt", VOLUME, grant.session, 7, FIRST.root)
        assert b.store.audit_rows()[-1]["kind"] == "fenced"


async def test_the_anchor_is_remembered_by_the_next_broker(root: SimulatedRoot, tmp_path: Path) -> None:
    """A restart in the middle of a session is nothing that the guest notices."""
    async with bench(root, tmp_path) as b:
        with_volumes(b)
        grant = await release(b)
        await tell(b, "adopt", VOLUME, grant.session, 7, FIRST.root)
        kek, database = b.kek, b.database
    from jindiskd.keys.store import Store

    store = Store.open(f"sqlite:///{database}", kek)
    anchor = Volumes(store).get(VOLUME).anchor
    assert anchor is not None
    assert (anchor.open, anchor.session) == (True, grant.session)
    store.close()


async def test_a_guest_that_measures_otherwise_gets_no_session(root: SimulatedRoot, tmp_path: Path) -> None:
    """And what is pending for the good one stays."""
    async with bench(root, tmp_path) as b:
        with_volumes(b)
        grant = await release(b)
        b.firmware = SimulatedSnpFirmware(root, bytes([1]) + DIGEST[1:])
        with pytest.raises(BrokerRefused):
            await release(b)
        await tell(b, "adopt", VOLUME, grant.session, 7, FIRST.root)


@pytest.mark.parametrize(("volume", "image"), [(FOREIGN, IMAGE), (FOREIGN, OTHER), (VOLUME, OTHER)])
async def test_another_images_volume_is_refused(root: SimulatedRoot, tmp_path: Path, volume: str, image: str) -> None:
    """Whichever of resource and volume is the other's."""
    async with bench(root, tmp_path) as b:
        with_volumes(b)
        with pytest.raises(BrokerRefused) as refused:
            await release(b, volume, image)
        assert refused.value.kind == "PolicyDeny"


async def test_a_session_of_another_image_is_not_spoken_for(root: SimulatedRoot, tmp_path: Path) -> None:
    """Even with the right session, from another guest's socket."""
    async with bench(root, tmp_path) as b:
        volumes = with_volumes(b)
        session = volumes.release(FOREIGN, OTHER, _who()).session
        with pytest.raises(Fenced):
            await tell(b, "adopt", FOREIGN, session, 7, FIRST.root)


async def test_a_lease_makes_the_next_guest_wait(root: SimulatedRoot, tmp_path: Path) -> None:
    """It goes on asking until its own time is over."""
    async with bench(root, tmp_path) as b:
        with_volumes(b)
        b.store.set_rules(IMAGE, ReleaseRules(lease_s=60))
        first = await release(b)
        assert first.lease_s == 60
        await tell(b, "adopt", VOLUME, first.session, 7, FIRST.root)
        second = await release(b)
        with pytest.raises(BrokerRefused) as refused:
            await tell(b, "adopt", VOLUME, second.session, 8, FIRST.root, within_s=1)
        assert refused.value.kind == "LeaseHeld"
        await tell(b, "close", VOLUME, first.session, 8, FIRST.root)
        await tell(b, "adopt", VOLUME, second.session, 8, FIRST.root)


async def test_release_needs_an_attested_session(root: SimulatedRoot, tmp_path: Path) -> None:
    """Neither no session nor one that has only begun will do."""
    async with bench(root, tmp_path) as b:
        with_volumes(b)
        body = json.dumps({"resource": f"default/{IMAGE}/root", "volume": VOLUME}).encode()
        cookie, _ = await b.session()
        for sent in ("", cookie):
            status, _, answer = await b.ask("POST", "/kbs/v0/jindisk/release", body, cookie=sent)
            assert (status, kind(answer)) == (401, "TokenNotFound")


GOOD = {"volume": VOLUME, "session": "00" * 32, "sequence": 1, "root": "00" * 32}


@pytest.mark.parametrize(
    "changes",
    [
        {"volume": VOLUME.upper().replace("3", "A")},
        {"volume": 1},
        {"session": "00" * 31},
        {"session": "0G" * 32},
        {"session": None},
        {"sequence": -1},
        {"sequence": 1 << 64},
        {"sequence": True},
        {"sequence": "1"},
        {"root": ["00"]},
        {"more": 1},
    ],
)
async def test_malformed_messages_are_refused(root: SimulatedRoot, tmp_path: Path, changes: dict[str, Any]) -> None:
    """And leave no trace in the volume; a well-formed one with a guessed session is fenced."""
    async with bench(root, tmp_path) as b:
        with_volumes(b)
        for verb in ("adopt", "report", "close"):
            where = f"/kbs/v0/jindisk/{verb}"
            status, _, answer = await b.ask("POST", where, json.dumps({**GOOD, **changes}).encode())
            assert (status, kind(answer)) == (401, "SerdeError")
            status, _, answer = await b.ask("POST", where, json.dumps(GOOD).encode())
            assert (status, kind(answer)) == (401, "Fenced")


async def test_a_fenced_guest_cannot_fill_the_audit_log(root: SimulatedRoot, tmp_path: Path) -> None:
    """Nor can anybody with volumes that nobody knows."""
    async with bench(root, tmp_path) as b:
        with_volumes(b)
        b.broker._freshness._fenced_per_peer = 3
        before = len(b.store.audit_rows())
        for volume in (FOREIGN.replace("4", "5"), *[VOLUME] * 6):
            body = json.dumps({**GOOD, "volume": volume}).encode()
            await b.ask("POST", "/kbs/v0/jindisk/report", body)
        assert len(b.store.audit_rows()) == before + 3


async def test_an_absent_broker_is_given_up(root: SimulatedRoot, tmp_path: Path) -> None:
    """A report has its deadline too."""
    made = Bench(root, tmp_path)
    with pytest.raises(BrokerUnreachable):
        await tell(made, "report", VOLUME, bytes(32), 1, bytes(32), within_s=0.5)
    made.store.close()


def _who() -> Any:
    from jindiskd.keys.store import Requester

    return Requester(peer="test")
