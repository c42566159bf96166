"""The database: old versions are brought up, newer and foreign ones refused, limits hold, all is wrapped anew."""

import sqlite3
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from jindiskd.base.anchor import Anchor
from jindiskd.base.platform import Platform
from jindiskd.base.secret import Secret
from jindiskd.errors import InvalidArgument, NotFound, NotSupported
from jindiskd.keys import wrap
from jindiskd.keys.database import META, DatabaseNewer, KekWrong
from jindiskd.keys.store import ApprovalWaiting, RecordChanged, ReleaseRefused, Requester, Store
from jindiskd.keys.volumes import Volumes
from jindiskd.policy import rules
from jindiskd.policy.rules import MinimumTcb, ReleaseRules

IMAGE = "11111111-1111-4111-8111-111111111111"
KEY = bytes(range(32))
VERSION_1 = """
CREATE TABLE images (image_id VARCHAR NOT NULL PRIMARY KEY, name VARCHAR NOT NULL UNIQUE, platform VARCHAR NOT NULL,
  resource VARCHAR NOT NULL UNIQUE, state VARCHAR NOT NULL, launch_digests JSON NOT NULL, wrapped BLOB NOT NULL,
  created VARCHAR NOT NULL);
CREATE TABLE audit (number INTEGER NOT NULL PRIMARY KEY, time VARCHAR NOT NULL, kind VARCHAR NOT NULL,
  image_id VARCHAR NOT NULL, peer VARCHAR NOT NULL, simulated BOOLEAN NOT NULL, measurement VARCHAR NOT NULL,
  detail VARCHAR NOT NULL, previous VARCHAR NOT NULL, digest VARCHAR NOT NULL);
"""


def guest(name: str) -> Requester:
    return Requester(peer="test", measurement=bytes(48), guest=name)


def filled(path: Path, kek: Secret, now: list[datetime] | None = None) -> Store:
    clock = now or [datetime(2026, 1, 1, tzinfo=UTC)]
    store = Store.open(f"sqlite:///{path}", kek, lambda: clock[0])
    store.add_image(IMAGE, "web", Platform.SNP, f"default/{IMAGE}/root", Secret(KEY))
    store.activate(IMAGE, [bytes(48)])
    return store


def test_a_database_of_version_1_is_brought_up(tmp_path: Path) -> None:
    """With its key and state; a wrong key-encryption key is noticed before anything is changed."""
    path, kek = tmp_path / "keys.db", Secret.random(32)
    wrapped = wrap.wrap(kek, Secret(KEY), purpose="volume key", owner=IMAGE)
    with sqlite3.connect(path) as raw:
        raw.executescript(VERSION_1)
        raw.execute("INSERT INTO images VALUES (?,'web','snp','a/b/c','active','[]',?,'x')", (IMAGE, wrapped))
    raw.close()
    before = path.read_bytes()
    with pytest.raises(wrap.KeyUnreadable):
        Store.open(f"sqlite:///{path}", Secret.random(32))
    assert path.read_bytes()[100:] == before[100:]
    for _ in range(2):
        store = Store.open(f"sqlite:///{path}", kek)
        assert bytes(store.release_to(IMAGE, guest("a")).reveal()) == KEY
        assert store.image(IMAGE).rules == ReleaseRules()
        store.close()


def test_the_steps_lead_to_the_tables_of_a_fresh_database(tmp_path: Path) -> None:
    """Alembic's comparison finds no difference between what was brought up and what is made anew."""
    path = tmp_path / "keys.db"
    with sqlite3.connect(path) as raw:
        raw.executescript(VERSION_1)
    raw.close()
    store = Store.open(f"sqlite:///{path}", Secret.random(32))
    with store.database.read() as connection:
        # What makes its table itself is no matter of versions.
        ours = {"compare_type": True, "include_name": lambda name, kind, _: kind != "table" or name in META.tables}
        context = MigrationContext.configure(connection, opts=ours)
        assert compare_metadata(context, META) == []
    store.close()


def test_a_newer_database_and_other_kinds_are_refused(tmp_path: Path) -> None:
    """A newer one may mean something else by the same columns."""
    path, kek = tmp_path / "keys.db", Secret.random(32)
    filled(path, kek).close()
    with sqlite3.connect(path) as raw:
        raw.execute("UPDATE meta SET value = X'3939' WHERE name = 'version'")
    raw.close()
    with pytest.raises(DatabaseNewer):
        Store.open(f"sqlite:///{path}", kek)
    with pytest.raises(NotSupported):
        Store.open("mysql://nobody/nothing", kek)


def test_everything_is_wrapped_anew(tmp_path: Path) -> None:
    """With the new key-encryption key all opens, with the old one nothing."""
    path, old, new = tmp_path / "keys.db", Secret.random(32), Secret.random(32)
    store = filled(path, old)
    anchor = Anchor(open=False, session=b"s" * 32, sequence=1, root=b"r" * 32)
    volume = "33333333-3333-4333-8333-333333333333"
    Volumes(store).add(volume, IMAGE, anchor)
    Volumes(store).release(volume, IMAGE, guest("a")).close()
    with store.database.signing_key(lambda: b"signing") as signing:
        assert bytes(signing.reveal()) == b"signing"
    assert store.database.change_kek(new) == 5
    store.close()
    with pytest.raises(KekWrong):
        Store.open(f"sqlite:///{path}", old)
    store = Store.open(f"sqlite:///{path}", new)
    assert bytes(store.release_to(IMAGE, guest("a")).reveal()) == KEY
    assert Volumes(store).get(volume).anchor == anchor
    with store.database.signing_key(lambda: b"another") as signing:
        assert bytes(signing.reveal()) == b"signing"
    store.close()


def test_audit_rows_of_many_threads_make_one_chain(tmp_path: Path) -> None:
    """Two stores on one file, as two processes have them."""
    path, kek = tmp_path / "keys.db", Secret.random(32)
    stores = [filled(path, kek), Store.open(f"sqlite:///{path}", kek)]
    faults: list[Exception] = []

    def work(store: Store) -> None:
        try:
            for _ in range(10):
                store.release_to(IMAGE, guest("a")).close()
        except Exception as exc:  # noqa: BLE001 (a thread cannot raise; the test does)
            faults.append(exc)

    threads = [threading.Thread(target=work, args=(store,)) for store in stores * 3]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults
    assert stores[0].verify_audit()[0] == 61
    for store in stores:
        store.close()


def test_limits_of_an_image_and_of_a_guest(tmp_path: Path) -> None:
    """A launch gets the key as often as the rules say; an image so often an hour."""
    clock = [datetime(2026, 1, 1, tzinfo=UTC)]
    store = filled(tmp_path / "keys.db", Secret.random(32), clock)
    store.set_rules(IMAGE, ReleaseRules(releases_per_guest=1, releases_per_hour=2))
    store.release_to(IMAGE, guest("a"))
    for name, finding in (("a", "limit.guest"), ("b", None), ("c", "limit.image")):
        if finding is None:
            store.release_to(IMAGE, guest(name))
            continue
        with pytest.raises(ReleaseRefused) as refused:
            store.release_to(IMAGE, guest(name))
        assert refused.value.finding == finding
    clock[0] += timedelta(hours=1, seconds=1)
    store.release_to(IMAGE, guest("c"))
    with pytest.raises(ReleaseRefused):
        store.release_to(IMAGE, guest("a"))
    store.close()


def test_a_decision_by_an_older_record_does_not_count(tmp_path: Path) -> None:
    """Rules that changed between decision and release are decided by anew."""
    store = filled(tmp_path / "keys.db", Secret.random(32))
    old = store.image(IMAGE).revision
    store.set_rules(IMAGE, ReleaseRules(minimum_guest_svn=2))
    with pytest.raises(RecordChanged):
        store.release_to(IMAGE, guest("a"), revision=old)
    store.release_to(IMAGE, guest("a"), revision=store.image(IMAGE).revision)
    row = store.audit_rows()[-1]
    assert row["detail"]["rules"] == ReleaseRules(minimum_guest_svn=2).digest
    store.close()


def test_a_release_waits_for_its_approval(tmp_path: Path) -> None:
    """For this launch of this guest, and not for ever."""
    clock = [datetime(2026, 1, 1, tzinfo=UTC)]
    store = filled(tmp_path / "keys.db", Secret.random(32), clock)
    store.set_rules(IMAGE, ReleaseRules(approval=True))
    for _ in range(2):
        with pytest.raises(ApprovalWaiting):
            store.release_to(IMAGE, guest("a"))
    [waiting] = store.approvals.list()
    assert (waiting.guest, waiting.image_id, waiting.granted) == ("a", IMAGE, False)
    store.approvals.grant(waiting.number)
    assert bytes(store.release_to(IMAGE, guest("a")).reveal()) == KEY
    with pytest.raises(ApprovalWaiting):
        store.release_to(IMAGE, guest("b"))
    store.approvals.deny(store.approvals.list()[-1].number)
    clock[0] += timedelta(minutes=16)
    with pytest.raises(ApprovalWaiting):
        store.release_to(IMAGE, guest("a"))
    with pytest.raises(NotFound):
        store.approvals.grant(waiting.number)
    kinds = [row["kind"] for row in store.audit_rows()]
    assert kinds[2:] == ["waiting", "approved", "released", "waiting", "not approved", "waiting"]
    store.close()


def test_waiting_guests_do_not_fill_the_database(tmp_path: Path) -> None:
    """A host can launch as many guests as it likes."""
    store = filled(tmp_path / "keys.db", Secret.random(32))
    store.set_rules(IMAGE, ReleaseRules(approval=True))
    for number in range(70):
        with pytest.raises(ApprovalWaiting):
            store.release_to(IMAGE, guest(str(number)))
    assert len(store.approvals.list()) == 64
    store.close()


def test_rules_are_read_strictly() -> None:
    """A rule that is misspelt must not be a rule that is absent."""
    whole = ReleaseRules(minimum_tcb={"Milan": MinimumTcb(snp=8)}, chip_ids=(bytes(64),), releases_per_guest=3)
    assert rules.load(whole.dump()) == whole
    for bad in ('{"aproval": true}', '{"approval": 1}', "[]", '{"minimum_tcb": {"Milan": {"snp": "8"}}}'):
        with pytest.raises(Exception, match="release rules"):
            rules.load(bad)
    for unusable in (
        '{"host_data": []}',
        '{"host_data": ["00"]}',
        '{"minimum_tcb": {"milan": {}}}',
        '{"minimum_tcb": {"Milan": {"snp": 256}}}',
        '{"chip_ids": ["00"]}',
        '{"releases_per_guest": 0}',
        '{"lease_s": -1}',
    ):
        with pytest.raises(InvalidArgument):
            rules.load(unusable)
