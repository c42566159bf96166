"""Two brokers, as processes, on one PostgreSQL: whatever one of them does or suffers, they are one broker to guests."""

import asyncio
import queue
import shutil
import signal
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from brokerprocess import DIGEST, IMAGE, KEY, RESOURCE, BrokerProcess, connected, evidence, fetched
from crowd import Crowd, Denied, Guest, gathered
from postgres import Cluster, cluster

from jindiskd.attest.sev import LaunchReport
from jindiskd.base import document
from jindiskd.base.platform import Platform
from jindiskd.base.secret import Secret
from jindiskd.broker.sev import HostPlatform
from jindiskd.broker.sev_messages import BeginRequest, dump_approve, parse_begun, parse_sealed
from jindiskd.broker.sev_remote import SevClient
from jindiskd.guest.secret import DISK_KEY, entries
from jindiskd.kbs.client import BrokerRefused
from jindiskd.keys import wrap
from jindiskd.keys.database import META
from jindiskd.keys.store import Store
from jindiskd.policy.rules import ReleaseRules
from jindiskd.sim.firmware import SimulatedSnpFirmware
from jindiskd.sim.pki import SimulatedRoot
from jindiskd.sim.sev_firmware import SevLaunch
from jindiskd.sim.sev_platform import API, BUILD, CPU_ID, SevPlatformKeys

WRONG = bytes(48)
MANY = {"max_sessions": 65536, "max_sessions_per_peer": 65536, "session_lifetime_s": 600}
WIDE = {"max_connections": 4096, "max_connections_per_peer": 4096}


@pytest.fixture(scope="module")
def postgres() -> Iterator[Cluster]:
    with cluster() as made:
        yield made


class Pair:
    """Two brokers on one database, with one image registered. The database's URL is `url`."""

    def __init__(self, folder: Path, root: SimulatedRoot, url: str) -> None:
        self.url = url
        settings: dict[str, Any] = {"keys": {"database": url}, "broker": {**MANY, **WIDE}}
        settings["service"] = {"log_level": "info"}
        self.both = [BrokerProcess(folder / name, root, **settings) for name in ("a", "b")]
        self.a, self.b = self.both

    def start(self) -> "Pair":
        self.a.start()
        self.share()
        self.b.start()
        self.a.ctl("image", "import", str(self.a.hand_over()))
        return self

    def share(self) -> None:
        """Give the second broker the first one's key-encryption key and identity, as an administrator does."""
        (self.b.folder / "state").mkdir(mode=0o700, exist_ok=True)
        for name in ("kek", "broker.pem"):
            shutil.copy(self.a.folder / "state" / name, self.b.folder / "state" / name)

    @property
    def ports(self) -> list[int]:
        return [broker.ports["guests"] for broker in self.both]

    def rows(self, url: str) -> list[dict[str, Any]]:
        kek = Secret((self.a.folder / "state/kek").read_bytes())
        store = Store.open(url, kek)
        try:
            store.verify_audit()
            return store.audit_rows(1_000_000)
        finally:
            store.close()

    def close(self) -> None:
        for broker in self.both:
            broker.close()


@pytest.fixture
def pair(postgres: Cluster, root: SimulatedRoot, tmp_path: Path) -> Iterator[Pair]:
    made = Pair(tmp_path, root, postgres.database(f"broker_{time.monotonic_ns()}"))
    try:
        yield made.start()
    finally:
        made.close()


@pytest.fixture
def firmware(root: SimulatedRoot) -> SimulatedSnpFirmware:
    return SimulatedSnpFirmware(root, DIGEST)


def test_they_have_one_identity_one_store_and_one_log(pair: Pair, firmware: SimulatedSnpFirmware) -> None:
    """What is done at one is so at the other, at once; the key-encryption key of one opens for the other alone."""
    assert pair.a.card == pair.b.card
    assert fetched(pair.a.client(), firmware) == fetched(pair.b.client(), firmware) == KEY
    pair.b.ctl("key", "revoke", "web")
    assert pair.a.json("image", "show", "web")["state"] == "revoked"
    pair.a.ctl("key", "reinstate", "web")
    for broker in pair.both:
        assert [row["kind"] for row in broker.json("audit", "list")["rows"]] == [
            "registered", "released", "released", "revoked", "reinstated"
        ]  # fmt: skip
        assert broker.json("audit", "verify")["rows"] == 5
        assert broker.json("status")["database"] == "postgresql"
    assert "postgresql://" not in pair.a.log.read_text() + pair.a.ctl("status")


def test_a_third_one_without_the_key_encryption_key_does_not_start(
    pair: Pair, root: SimulatedRoot, tmp_path: Path
) -> None:
    """It draws none of its own, which would open nothing, and leaves none behind."""
    third = BrokerProcess(tmp_path / "c", root, keys={"database": pair.url})
    third.begin()
    assert third.process is not None
    assert third.process.wait(120) == 8
    assert "restore it from its backup" in third.log.read_text()
    assert not (tmp_path / "c/state/kek").exists()
    third.close()


def test_limits_hold_over_both(pair: Pair, firmware: SimulatedSnpFirmware) -> None:
    """Of many guests at both at once exactly as many are served as the rules say; of one guest's requests one."""
    pair.a.ctl("image", "limits", "web", "--per-hour", "7")

    async def rush(count: int, report_id: bytes | None) -> list[object]:
        crowd = Crowd(pair.ports, pair.a.card.spki_sha256, firmware, RESOURCE)

        async def one(number: int) -> object:
            try:
                return await crowd.attempt(Guest(number=1), DIGEST, report_id or number.to_bytes(32, "big"))
            except Denied:
                return None

        return await asyncio.gather(*(one(number) for number in range(count)))

    found = asyncio.run(rush(20, None))
    assert Counter(found) == {KEY: 7, None: 13}
    pair.b.ctl("image", "limits", "web", "--per-hour", "0", "--per-guest", "1")
    found = asyncio.run(rush(10, b"g" * 32))
    assert Counter(found) == {KEY: 1, None: 9}


def test_a_database_that_is_away_is_waited_for(
    root: SimulatedRoot, tmp_path: Path, firmware: SimulatedSnpFirmware
) -> None:
    """Guests are told to try again, the load balancer is told too; afterwards all is as before."""
    with cluster() as own:
        pair = Pair(tmp_path, root, own.database("broker"))
        try:
            pair.start()
            own.stop()
            health = f"http://127.0.0.1:{pair.a.ports['metrics']}/healthz"
            with pytest.raises(urllib.error.HTTPError) as told:
                urllib.request.urlopen(health, timeout=60)
            assert told.value.code == 503
            told.value.close()
            pair.a.ctl("image", "list", status=69)
            with pytest.raises(Exception, match=r"PluginInternalError|in time"):
                fetched(pair.a.client(within_s=3), firmware)
            own.start()
            assert fetched(pair.a.client(), firmware) == KEY
            assert fetched(pair.b.client(), firmware) == KEY
            pair.b.json("audit", "verify")
        finally:
            pair.close()


VERSION_1 = """
CREATE TABLE images (image_id VARCHAR NOT NULL PRIMARY KEY, name VARCHAR NOT NULL UNIQUE, platform VARCHAR NOT NULL,
  resource VARCHAR NOT NULL UNIQUE, state VARCHAR NOT NULL, launch_digests JSON NOT NULL, wrapped BYTEA NOT NULL,
  created VARCHAR NOT NULL);
CREATE TABLE audit (number SERIAL NOT NULL PRIMARY KEY, time VARCHAR NOT NULL, kind VARCHAR NOT NULL,
  image_id VARCHAR NOT NULL, peer VARCHAR NOT NULL, simulated BOOLEAN NOT NULL, measurement VARCHAR NOT NULL,
  detail VARCHAR NOT NULL, previous VARCHAR NOT NULL, digest VARCHAR NOT NULL);
"""


def test_tables_of_earlier_releases_are_brought_up(postgres: Cluster) -> None:
    """By several brokers at once too: one does it; the tables are then those of a fresh database."""
    url = postgres.database("old")
    kek = Secret.random(32)
    wrapped = wrap.wrap(kek, Secret(KEY), purpose="volume key", owner=IMAGE)
    engine = sa.create_engine(url.replace("postgresql:", "postgresql+psycopg:"))
    with engine.begin() as connection:
        connection.exec_driver_sql(VERSION_1)
        row = {"i": IMAGE, "r": RESOURCE, "w": wrapped, "d": f'["{DIGEST.hex()}"]'}
        query = "INSERT INTO images VALUES (:i, 'web', 'simulated-snp', :r, 'active', CAST(:d AS JSON), :w, 'x')"
        connection.execute(sa.text(query), row)
    with ThreadPoolExecutor(4) as pool:
        stores = list(pool.map(lambda _: Store.open(url, Secret(bytes(kek.reveal()))), range(4)))
    for store in stores:
        with store.release(IMAGE, peer="test", measurement=DIGEST, simulated=True) as key:
            assert bytes(key.reveal()) == KEY
    with engine.connect() as connection:
        ours = {"compare_type": True, "include_name": lambda name, kind, _: kind != "table" or name in META.tables}
        assert compare_metadata(MigrationContext.configure(connection, opts=ours), META) == []
    assert stores[0].verify_audit()[0] == 4
    for store in stores:
        store.close()
    engine.dispose()


def crowd_report(found: list[Guest], seconds: float) -> str:
    taken = sorted(guest.seconds for guest in found)
    return (
        f"{len(found)} guests in {seconds:.1f} s ({len(found) / seconds:.1f} a second); "
        f"median {taken[len(taken) // 2]:.1f} s, slowest {taken[-1]:.1f} s; "
        f"{sum(guest.attempts - 1 for guest in found)} retries by {sum(guest.attempts > 1 for guest in found)} guests; "
        f"{sum(guest.crossed for guest in found)} sessions over both brokers; "
        f"{sum(guest.doubled for guest in found)} attestations sent twice at once"
    )


def survive(pair: Pair, firmware: SimulatedSnpFirmware, count: int, within_s: float) -> str:
    """Send a crowd, kill one broker in the middle, start it again, and check everything that must hold."""
    digests = [WRONG if number % 50 == 7 else DIGEST for number in range(count)]

    async def run() -> tuple[list[Guest], float]:
        crowd = Crowd(pair.ports, pair.a.card.spki_sha256, firmware, RESOURCE)
        begun = time.monotonic()
        async with gathered(crowd, digests, within_s) as found:
            await crowd.reached(count // 3)
            await asyncio.to_thread(pair.a.stop, signal.SIGKILL)
            await crowd.reached(count // 2)
            await asyncio.to_thread(pair.a.start)
            crowd.ports[0] = pair.a.ports["guests"]
        return found, time.monotonic() - begun

    found, seconds = asyncio.run(run())
    assert [guest.number for guest in found if digests[guest.number] == DIGEST and guest.key != KEY] == []
    assert {guest.denied for guest in found if digests[guest.number] == WRONG} == {"PolicyDeny"}
    # Of two equal attestations at once none was accepted twice, and some were accepted.
    doubled = Counter(number for guest in found for number in guest.accepted)
    assert doubled[1] > 0
    assert doubled[2] == 0
    rows = pair.rows(pair.url)  # checks the chain
    released = [row for row in rows if row["kind"] == "released"]
    sessions = Counter(row["detail"]["token"] for row in released)
    assert set(sessions.values()) == {1}  # a nonce, a session, a release
    guests = Counter(row["detail"]["guest"] for row in released)
    good = sum(digest == DIGEST for digest in digests)
    assert len(guests) == good
    assert all(row["measurement"] == DIGEST.hex() and row["simulated"] for row in released)
    # A key that was released twice to one guest is one whose answer was lost with the broker.
    assert len(released) - good <= sum(guest.attempts - 1 for guest in found)
    for broker in pair.both:
        assert broker.json("audit", "verify")["rows"] == len(rows)
    assert sum(guest.crossed for guest in found) > count // 4
    return crowd_report(found, seconds)


def test_a_broker_is_killed_in_a_crowd(pair: Pair, firmware: SimulatedSnpFirmware) -> None:
    """A hundred guests; the long test has two thousand."""
    print(survive(pair, firmware, 100, 300))


@pytest.mark.long
def test_a_broker_is_killed_among_two_thousand_guests(pair: Pair, firmware: SimulatedSnpFirmware) -> None:
    """Every guest served or refused for good reason, no nonce accepted twice, the audit chain whole."""
    print(survive(pair, firmware, 2000, 3000))


def test_a_volume_session_goes_on_at_the_other_broker(pair: Pair, firmware: SimulatedSnpFirmware) -> None:
    """Released at one, adopted at the other, fenced at both."""
    volume = "33333333-3333-4333-8333-333333333333"
    pair.a.ctl("volume", "add", "web", volume)
    pair.a.ctl("volume", "accept-rollback", volume, "--reason", "new", "--yes")
    grant = pair.a.client().release("snp", RESOURCE, volume, evidence(firmware))
    grant.key.close()
    pair.b.client().adopt(volume, grant.session, 5, b"r" * 32)
    again = pair.b.client().release("snp", f"default/{IMAGE}/root", volume, evidence(firmware))
    again.key.close()
    assert again.anchor is not None
    assert again.anchor.sequence == 5
    pair.a.client().report(volume, grant.session, 6, b"s" * 32)
    pair.a.client().adopt(volume, again.session, 6, b"s" * 32)
    with pytest.raises(Exception, match="refused"):
        pair.b.client().report(volume, grant.session, 7, b"t" * 32)


@pytest.mark.long
def test_a_launch_begins_at_one_and_is_judged_at_the_other(
    postgres: Cluster, root: SimulatedRoot, keys: SevPlatformKeys, tmp_path: Path
) -> None:
    """A machine of SEV, whose session is in the database: judged once, and also where its broker was killed."""
    pair = Pair(tmp_path, root, postgres.database(f"broker_{time.monotonic_ns()}"))
    (tmp_path / "sev.json").write_bytes(document.dump(keys.root))
    for broker in pair.both:
        text = broker.configuration.read_text()
        broker.configuration.write_text(text.replace("[broker]", f'[broker]\nsimulated_sev = "{tmp_path}/sev.json"'))
    digest = b"\x5a" * 32
    try:
        pair.a.start()
        pair.share()
        pair.b.start()
        handed = pair.a.hand_over(platform=Platform.SIMULATED_SEV, launch_digests=(digest,), name="sev")
        pair.a.ctl("image", "import", str(handed))
        host = HostPlatform(pdh=keys.pdh, chain=keys.chain, cpu_id=CPU_ID)
        pin = pair.a.card.spki_sha256
        begin = BeginRequest(image_id=IMAGE, policy=0xB, host=host).dump()

        def ask(port: int, verb: str, body: bytes, cookie: str | None = None) -> tuple[bytes, str | None]:
            deadline = time.monotonic() + 120
            return SevClient(lambda: connected(port), spki_sha256=pin, deadline=deadline).ask(verb, body, cookie)

        for kill in (False, True):
            answer, cookie = ask(pair.ports[0], "sev-begin", begin)
            certificate, session = parse_begun(answer)
            launch = SevLaunch(keys, policy=0xB, dh_certificate=certificate, session=session)
            told = LaunchReport(
                measurement=launch.measure(digest), api_major=API[0], api_minor=API[1], build=BUILD, policy=0xB
            )
            if kill:
                pair.a.stop(signal.SIGKILL)
            sealed = parse_sealed(ask(pair.ports[1], "sev-approve", dump_approve(told), cookie)[0])
            assert bytes(entries(launch.open_secret(sealed.header, sealed.payload))[DISK_KEY]) == KEY
            for port in pair.ports[1:] if kill else pair.ports:
                with pytest.raises(BrokerRefused, match="TokenNotFound"):
                    ask(port, "sev-approve", dump_approve(told), cookie)
        assert [row["kind"] for row in pair.rows(pair.url)].count("released") == 2
    finally:
        pair.close()


def test_what_another_broker_writes_is_heard(postgres: Cluster) -> None:
    """What one writes is news at another that wrote nothing; also after the server was away."""
    with Secret.random(32) as kek:
        url = postgres.database("news")
        here, there = Store.open(url, kek), Store.open(url, kek)
        news: queue.Queue[str] = queue.Queue()
        here.database.watch(lambda: news.put(threading.current_thread().name))
        try:
            assert news.get(timeout=200) == "database-news"  # it listens from now on
            there.add_image("i", "web", Platform.SIMULATED_SNP, "default/i/root", Secret(b"k" * 32))
            assert news.get(timeout=200) == "database-news"
            there.set_rules("i", replace(ReleaseRules(), approval=True))
            assert news.get(timeout=200) == "database-news"
            assert here.image("i").rules.approval
            here.set_rules("i", ReleaseRules())  # told by whoever wrote, and not again
            assert news.get(timeout=200) == threading.current_thread().name
            postgres.stop()
            postgres.start()
            assert news.get(timeout=200) == "database-news"  # something may have been missed
            there.activate("i", [DIGEST])
            assert news.get(timeout=200) == "database-news"
            assert here.image("i").state == "active"
            assert news.empty()
        finally:
            here.close()
            there.close()
        assert "database-news" not in {thread.name for thread in threading.enumerate()}
