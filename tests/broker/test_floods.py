"""What a guest that does everything too often costs the broker, its logs, and the guests beside it."""

import asyncio
import contextlib
import functools
import json
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from brokerbench import DIGEST, IMAGE, KEY, REQUEST, Bench, bench, kind
from structlog.testing import capture_logs

from jindiskd.attest.snp import SnpVerifier
from jindiskd.broker import http, service
from jindiskd.broker.pace import LONGEST_WAIT_S, Pace
from jindiskd.broker.peer import BrokerLimits, Peer
from jindiskd.broker.refusals import MAX_PEERS, SHARED_FACTOR
from jindiskd.broker.sessions import MemorySessions, Stage, TooManySessions
from jindiskd.errors import NotFound
from jindiskd.kbs.messages import MAX_BODY_BYTES
from jindiskd.keys.approvals import LIFE_S
from jindiskd.keys.database import DatabaseFailed
from jindiskd.keys.store import ApprovalWaiting, Requester
from jindiskd.policy.rules import ReleaseRules
from jindiskd.sim.pki import SimulatedRoot

GUEST = Peer(description="domain one", domain_uuid=IMAGE)
UNKNOWN = json.dumps(
    {"volume": "99999999-9999-4999-8999-999999999999", "session": "00" * 32, "sequence": 1, "root": "00" * 32}
).encode()
ADDRESS = Peer(description="tcp 192.0.2.1")


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize("where", ["auth", "jindisk/release", "jindisk/report", "jindisk/stale"])
async def test_only_evidence_may_be_long(root: SimulatedRoot, tmp_path: Path, where: str) -> None:
    """Everybody may send the rest: it is refused by its length, announced or not, before it is parsed."""
    long = json.dumps({"version": "0.4.0", "tee": "snp", "extra-params": "x" * http.SMALL_BODY_BYTES}).encode()
    async with bench(root, tmp_path) as b:
        status, _, answer = await b.ask("POST", f"/kbs/v0/{where}", long)
        if where == "jindisk/release":
            assert (status, kind(answer)) == (401, "TokenNotFound")  # without a session nothing is read at all
            cookie, _, _ = await b.attested()
            status, _, answer = await b.ask("POST", f"/kbs/v0/{where}", long, cookie=cookie)
        assert status == 401
        assert "longer than" in json.loads(answer)["detail"]
        lines = f"POST /kbs/v0/{where} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n"
        lines += f"Cookie: {cookie}\r\n" if where == "jindisk/release" else ""
        chunked = b"%x\r\n%s\r\n0\r\n\r\n" % (len(long), long)
        found = await b.raw(lines.encode() + b"\r\n" + chunked)
        assert b"longer than" in found


async def test_a_session_holds_one_body(root: SimulatedRoot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cookie on many connections does not multiply what is kept: the nonce is used before a body is read."""
    reading, most = [0], [0]
    real = service.body_of

    async def counting(request: Any, limit: int = http.SMALL_BODY_BYTES) -> bytes:
        if limit != MAX_BODY_BYTES:
            return await real(request, limit)
        reading[0] += 1
        most[0] = max(most[0], reading[0])
        try:
            return await real(request, limit)
        finally:
            reading[0] -= 1

    monkeypatch.setattr(service, "body_of", counting)
    async with bench(root, tmp_path) as b:
        cookie, nonce = await b.session()
        body = b.attestation(nonce)
        head = f"POST /kbs/v0/attest HTTP/1.1\r\nHost: x\r\nCookie: {cookie}\r\nContent-Length: {len(body)}\r\n\r\n"
        held, answers = threading.Barrier(12), []

        def one() -> None:
            with contextlib.suppress(OSError), b.tls() as stream:
                stream.settimeout(60)
                stream.sendall(head.encode() + body[: len(body) // 2])
                held.wait(60)
                with contextlib.suppress(OSError):
                    stream.sendall(body[len(body) // 2 :])
                answers.append(stream.recv(65536).split(b"\r\n")[0])

        await asyncio.gather(*(asyncio.to_thread(one) for _ in range(4)), *(run(one) for _ in range(8)))
        assert most[0] == 1
        assert sum(b" 200 " in answer for answer in answers) == 1
        assert len(answers) == 12


async def run(work: Callable[[], None]) -> None:
    """In a thread of its own: the loop's are too few for all to stand at a barrier."""
    done = asyncio.get_running_loop().create_future()
    loop = asyncio.get_running_loop()

    def body() -> None:
        work()
        loop.call_soon_threadsafe(done.set_result, None)

    threading.Thread(target=body).start()
    await done


async def test_fencings_fill_no_log(root: SimulatedRoot, tmp_path: Path) -> None:
    """Neither the journal nor the audit log, whatever volume is named; after an hour they are told again."""
    clock = Clock()
    async with bench(root, tmp_path, monotonic=clock) as b:
        b.broker._freshness._fenced_per_peer = 3
        with capture_logs() as lines:
            for _ in range(8):
                status, _, answer = await b.ask("POST", "/kbs/v0/jindisk/report", UNKNOWN)
                assert (status, kind(answer)) == (401, "Fenced"), answer
            assert len([line for line in lines if line["event"] == "fenced"]) == 3
            clock.now += 3601
            await b.ask("POST", "/kbs/v0/jindisk/report", UNKNOWN)
            assert len([line for line in lines if line["event"] == "fenced"]) == 4


async def test_a_fault_of_ours_fills_no_journal(
    root: SimulatedRoot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the database away every request is one: told at once, then once a second, with how many there were."""

    def away(*_: object) -> None:
        raise DatabaseFailed("it is away")

    clock = Clock()
    async with bench(root, tmp_path, monotonic=clock) as b:
        monkeypatch.setattr(b.broker._freshness.volumes, "report", away)
        with capture_logs() as lines:
            for _ in range(5):
                status, _, answer = await b.ask("POST", "/kbs/v0/jindisk/report", UNKNOWN)
                assert (status, kind(answer)) == (401, "PluginInternalError"), answer
            clock.now += 1.5
            await b.ask("POST", "/kbs/v0/jindisk/report", UNKNOWN)
        assert [line["omitted"] for line in lines if line["event"] == service.FAULT] == [0, 4]


async def test_many_addresses_do_not_silence_the_log(root: SimulatedRoot, tmp_path: Path) -> None:
    """The place of whoever was quiet longest is taken, so that new peers are told of too."""
    async with bench(root, tmp_path) as b:
        known = b.broker._freshness._fenced_of
        for number in range(MAX_PEERS + 10):
            known[f"tcp {number}", False] = (b.broker._freshness._clock(), 1)
        with capture_logs() as lines:
            await b.ask("POST", "/kbs/v0/jindisk/report", UNKNOWN)
        assert [line["peer"] for line in lines if line["event"] == "fenced"] == [b.peer.description]
        assert len(known) <= MAX_PEERS


def test_pace() -> None:
    """A burst at once, then the rate; silence earns the burst again; an address has more; strangers are forgotten."""
    clock, limits = Clock(), BrokerLimits(requests_per_s=10, requests_burst=5)
    pace = Pace(limits, clock)
    assert [pace.wait_s(GUEST) for _ in range(7)] == pytest.approx([0, 0, 0, 0, 0, 0.1, 0.2], abs=1e-6)
    clock.now += 0.5
    assert [pace.wait_s(GUEST) for _ in range(3)] == pytest.approx([0, 0, 0], abs=1e-6)
    clock.now += 3600
    assert [pace.wait_s(GUEST) for _ in range(6)] == pytest.approx([0, 0, 0, 0, 0, 0.1], abs=1e-6)
    assert max(pace.wait_s(ADDRESS) for _ in range(5 * SHARED_FACTOR)) < 1e-6
    assert pace.wait_s(ADDRESS) > 1e-3
    assert max(pace.wait_s(GUEST) for _ in range(1000)) == LONGEST_WAIT_S
    for number in range(MAX_PEERS + 5):
        pace.wait_s(Peer(description=str(number)))
    assert len(pace._next) == MAX_PEERS


async def test_a_fast_guest_is_slowed_and_another_is_not(root: SimulatedRoot, tmp_path: Path) -> None:
    """Over its rate a guest's answers come late; none is lost."""
    limits = BrokerLimits(requests_per_s=0.5, requests_burst=2, sessions_per_peer=100)
    async with bench(root, tmp_path, limits=limits) as b:
        other = Peer(description="domain two", domain_uuid="x")
        assert not b.broker._pace.wait_s(b.peer)
        assert not b.broker._pace.wait_s(b.peer)
        loop, begun = asyncio.get_running_loop(), asyncio.get_running_loop().time()
        assert (await b.ask("POST", "/kbs/v0/auth", REQUEST))[0] == 200
        assert loop.time() - begun > 1
        assert b.broker._pace.wait_s(other) == 0
        assert "jindisk_broker_requests_delayed_total 1" in b.broker.metrics.render()


async def test_handshakes_are_counted(root: SimulatedRoot, tmp_path: Path) -> None:
    """A guest that begins connection after connection is cut off before TLS."""
    async with bench(root, tmp_path, limits=BrokerLimits(starts_per_minute=6)) as b:
        for _ in range(6):
            await asyncio.to_thread(lambda: b.tls().close())

        def refused() -> bool:
            try:
                b.tls().close()
            except (OSError, EOFError):
                return True
            return False

        assert await asyncio.to_thread(refused)


def test_a_few_guests_do_not_lock_out_another() -> None:
    """Whoever has no session gets one, at the cost of who has most; sessions in all stay bounded."""
    sessions = MemorySessions(BrokerLimits(sessions=8, sessions_per_peer=4), Clock())
    held = [sessions.new(peer)[1] for peer in ("a", "b") for _ in range(4)]
    sessions.spend(held[0])
    sessions.verify(held[0], {}, None)  # type: ignore[arg-type]  # what was verified is not looked at
    _, mine = sessions.new("c")
    assert sessions.count() == 8
    assert sessions.find(mine.session_id, "c") is not None
    left = [sessions.find(one.session_id, one.peer) for one in held]
    assert left.count(None) == 1
    assert left[0] is not None
    assert left[0].stage is Stage.VERIFIED  # who is attested stays
    with pytest.raises(TooManySessions):
        sessions.new("c")  # has one
    with pytest.raises(TooManySessions):
        sessions.new("a")
    alone = MemorySessions(BrokerLimits(sessions=2), Clock())
    alone.new("a"), alone.new("b")
    with pytest.raises(TooManySessions):
        alone.new("c")  # nobody has more than one


async def test_being_turned_away_is_told_once_a_second(root: SimulatedRoot, tmp_path: Path) -> None:
    """However often the guest asks; but a domain that is started again in the pause hears of it too."""
    limits = BrokerLimits(refusals=1, refusal_pause_s=60, sessions_per_peer=1000)
    clock = Clock()
    async with bench(root, tmp_path, limits=limits, monotonic=clock) as b:
        cookie, _ = await b.session()
        await b.ask("POST", "/kbs/v0/attest", b"{}", cookie=cookie)
        before = len(b.events)
        for _ in range(6):
            status, _, _ = await b.ask("POST", "/kbs/v0/auth", REQUEST)
            assert status == 401
        assert [event.findings[0].id for event in b.events[before:]] == ["peer.refusals"]
        clock.now += 2
        assert (await b.ask("POST", "/kbs/v0/auth", REQUEST))[0] == 401
        assert [event.findings[0].id for event in b.events[before:]] == ["peer.refusals"] * 2


async def test_two_sessions_race_for_a_key_of_single_use(root: SimulatedRoot, tmp_path: Path) -> None:
    """Attested each for itself, asking at the same time: one key leaves, and one row says so."""
    async with bench(root, tmp_path) as b:
        b.store.set_rules(IMAGE, ReleaseRules(releases_in_all=1))
        guests = [await b.attested() for _ in range(4)]  # the clients' threads are the broker's too
        path = f"/kbs/v0/resource/default/{IMAGE}/root"
        answers = await asyncio.gather(*(b.ask("GET", path, cookie=cookie) for cookie, _, _ in guests))
        assert sorted(status for status, _, _ in answers) == [200] + [401] * 3
        kinds = [row["kind"] for row in b.store.audit_rows()]
        assert kinds.count("released") == 1
        b.store.verify_audit()


def test_an_approval_that_ended_while_it_was_granted(root: SimulatedRoot, tmp_path: Path) -> None:
    """The time that counts is that of the transaction, not of the click: a wait for the database gives nobody more."""
    made = Bench(root, tmp_path)
    store, who = made.store, Requester(peer="p", measurement=DIGEST, simulated=True, guest="g")
    now = [datetime.now(UTC)]
    store.database.now = lambda: now[0]  # type: ignore[method-assign]
    store.set_rules(IMAGE, ReleaseRules(approval=True))
    with pytest.raises(ApprovalWaiting) as waiting:
        store.release_to(IMAGE, who)
    real = store.database.write

    @contextlib.contextmanager
    def slow() -> Any:
        with real() as connection:
            now[0] += timedelta(seconds=LIFE_S + 1)  # another transaction held the lock so long
            yield connection

    store.database.write = slow  # type: ignore[method-assign]
    with pytest.raises(NotFound):
        store.approvals.grant(waiting.value.number)
    store.database.write = real  # type: ignore[method-assign]
    with pytest.raises(ApprovalWaiting):
        store.release_to(IMAGE, who)
    assert not [row for row in store.audit_rows() if row["kind"] in {"approved", "released"}]
    store.close()


async def test_a_slow_vendor_keeps_nothing_but_evidence_waiting(root: SimulatedRoot, tmp_path: Path) -> None:
    """As many stuck judgements as there are threads for them; what needs none goes on."""
    stuck, begun = threading.Event(), threading.Semaphore(0)

    class Stuck(SnpVerifier):
        def judge(self, *arguments: Any, **more: Any) -> Any:
            begun.release()
            stuck.wait(120)
            return super().judge(*arguments, **more)

    async with bench(root, tmp_path, verifiers=[Stuck(roots=root.roots, crls=[root.crl])]) as b:
        opened = [await b.session() for _ in range(service.JUDGES + 2)]
        waiting = [
            asyncio.create_task(b.ask("POST", "/kbs/v0/attest", b.attestation(nonce), cookie=cookie))
            for cookie, nonce in opened[:2]
        ]
        bodies = [(b.attestation(nonce), cookie) for cookie, nonce in opened[2:]]
        extra = [asyncio.create_task(run(functools.partial(post, b, *one))) for one in bodies]
        for _ in range(service.JUDGES):
            assert await asyncio.to_thread(begun.acquire, timeout=120)
        async with asyncio.timeout(60):
            assert await asyncio.to_thread(b.store.audit_rows) is not None  # the database's threads are free
            assert (await b.ask("POST", "/kbs/v0/auth", REQUEST))[0] == 200
        stuck.set()
        assert [status for status, _, _ in await asyncio.gather(*waiting)] == [200, 200]
        await asyncio.gather(*extra)
        assert await b.fetch() == KEY


def post(b: Bench, body: bytes, cookie: str) -> None:
    with contextlib.suppress(OSError), b.tls() as stream:
        stream.settimeout(120)
        head = f"POST /kbs/v0/attest HTTP/1.1\r\nHost: x\r\nCookie: {cookie}\r\nContent-Length: {len(body)}\r\n\r\n"
        stream.sendall(head.encode() + body)
        assert b" 200 " in stream.recv(65536).split(b"\r\n")[0]
