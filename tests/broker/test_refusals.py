"""A guest that is refused and tries without end: few audit rows, no work, a plain sentence, others served."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from brokerbench import DIGEST, IMAGE, KEY, OTHER, REQUEST, Bench, bench, kind

from jindiskd.broker import service
from jindiskd.broker.listener import listen_unix
from jindiskd.broker.peer import BrokerLimits, Peer
from jindiskd.broker.refusals import MAX_PEERS, SHARED_FACTOR, Refusals
from jindiskd.kbs.client import BrokerRefused
from jindiskd.sim.firmware import SimulatedSnpFirmware
from jindiskd.sim.pki import SimulatedRoot

LIMITS = BrokerLimits(
    refusals=3, refusal_pause_s=60, longest_refusal_pause_s=900, sessions_per_peer=10_000, sessions=10_000
)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def refusals(b: Bench) -> list[dict]:
    return [row for row in b.store.audit_rows(10_000) if row["kind"] == "refused"]


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One item for each evidence that was looked at."""
    found, real = [], service.judge

    def counting(*arguments: object) -> object:
        found.append(1)
        return real(*arguments)

    monkeypatch.setattr(service, "judge", counting)
    return found


async def attempt(b: Bench) -> str:
    """One refused attestation; where it ended."""
    status, headers, body = await b.ask("POST", "/kbs/v0/auth", REQUEST)
    if status != 200:
        assert kind(body) == "AttestationError"
        return "turned away"
    cookie = headers["set-cookie"].split(";")[0]
    status, _, body = await b.ask("POST", "/kbs/v0/attest", b"{}", cookie=cookie)
    assert (status, kind(body)) == (401, "AttestationError")
    return "judged"


async def test_a_loop_of_refusals_is_bounded(root: SimulatedRoot, tmp_path: Path, judged: list[int]) -> None:
    """Three, then pauses of 1, 2, 4 … 15 minutes with one judgement between them; nothing is written meanwhile."""
    clock = Clock()
    async with bench(root, tmp_path, limits=LIMITS, monotonic=clock) as b:
        assert [await attempt(b) for _ in range(6)] == ["judged"] * 3 + ["turned away"] * 3
        assert len(refusals(b)) == len(judged) == 3
        assert refusals(b)[-1]["detail"]["pause_s"] == 60
        for pause in (60, 120, 240, 480, 900, 900):
            clock.now += pause - 1
            assert await attempt(b) == "turned away"
            clock.now += 1
            assert await attempt(b) == "judged"
        assert len(refusals(b)) == len(judged) == 9
        told = [event for event in b.events if event.kind == "refused"][-2]
        assert told.findings[0].id == "peer.refusals"
        assert told.findings[0].text == "it was refused 8 times; it is judged again in 1 s"
        # Quiet for long enough, it is a guest like any other, and an honest one gets its key at once.
        clock.now += 1801
        assert await b.fetch() == KEY


async def test_only_the_guest_itself_waits(root: SimulatedRoot, tmp_path: Path) -> None:
    """Another domain is served; the one that waits gets no key even for good evidence, until the pause is over."""
    clock = Clock()
    async with bench(root, tmp_path, limits=LIMITS, monotonic=clock) as b:
        while await attempt(b) == "judged":
            pass
        with pytest.raises(BrokerRefused, match="AttestationError"):
            await b.fetch()
        peer = Peer(description="domain two", domain_uuid=OTHER, image_id=OTHER)
        other = await listen_unix(b.broker, b.identity, tmp_path / "other", peer)
        own, b.path = b.path, tmp_path / "other"
        assert await b.fetch(OTHER) == KEY
        b.path = own
        clock.now += 60
        assert await b.fetch() == KEY
        await other.close()


async def test_refused_keys_count_too(root: SimulatedRoot, tmp_path: Path, judged: list[int]) -> None:
    """Genuine evidence with a digest that is not allowed: refused at the key, and as bounded."""
    async with bench(root, tmp_path, limits=LIMITS, monotonic=Clock()) as b:
        b.firmware = SimulatedSnpFirmware(root, DIGEST[::-1])
        for _ in range(6):
            with pytest.raises(BrokerRefused):
                await b.fetch()
        assert len(refusals(b)) == len(judged) == 3


async def test_many_at_once_are_no_way_around(root: SimulatedRoot, tmp_path: Path) -> None:
    """Sessions opened before the limit was reached and used together: three rows, and the next tells of the rest."""
    clock = Clock()
    # Guests and broker share this loop's threads: enough for both.
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(40))
    async with bench(root, tmp_path, limits=LIMITS, monotonic=clock) as b:
        cookies = [(await b.session())[0] for _ in range(12)]
        await asyncio.gather(*(b.ask("POST", "/kbs/v0/attest", b"{}", cookie=cookie) for cookie in cookies))
        assert len(refusals(b)) == 3
        clock.now += 60
        assert await attempt(b) == "judged"
        # Those that came when the pause had begun were not even judged; those in work then are told of here.
        assert refusals(b)[-1]["detail"].get("omitted", 0) <= 9
        assert len(refusals(b)) == 4


async def test_an_address_may_be_many_guests(root: SimulatedRoot, tmp_path: Path, judged: list[int]) -> None:
    """It is always judged, so that one bad guest does not keep the others from their keys; its rows become fewer."""
    async with bench(root, tmp_path, limits=LIMITS, monotonic=Clock()) as b:
        other = await listen_unix(b.broker, b.identity, tmp_path / "other", Peer(description="tcp 192.0.2.1"))
        b.path = tmp_path / "other"
        count = 3 * SHARED_FACTOR + 5
        assert {await attempt(b) for _ in range(count)} == {"judged"}
        assert len(judged) == count
        assert len(refusals(b)) == 3 * SHARED_FACTOR
        assert await b.fetch(IMAGE) == KEY
        await other.close()


def test_peers_without_end_are_forgotten() -> None:
    """The table has a size."""
    found = Refusals(LIMITS, Clock())
    for number in range(MAX_PEERS + 100):
        found.note(Peer(description=f"peer {number}", domain_uuid="x"))
    assert len(found._of_peer) == MAX_PEERS
