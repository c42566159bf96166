"""The key store: nothing in clear, nothing without its row, no row altered unseen."""

import sqlite3
from pathlib import Path

import pytest

from jindiskd.base.platform import Platform
from jindiskd.base.secret import Secret
from jindiskd.errors import AlreadyExists, NotFound
from jindiskd.keys.database import KekWrong
from jindiskd.keys.store import AuditBroken, KeyState, ReleaseRefused, Requester, Store
from jindiskd.keys.wrap import KekMissing, KekUnusable, KeyUnreadable, load_kek
from jindiskd.policy.rules import ReleaseRules

IMAGE = "11111111-1111-4111-8111-111111111111"
KEY = bytes(range(32))


def filled(path: Path, kek: Secret) -> Store:
    store = Store.open(f"sqlite:///{path}", kek)
    store.add_image(IMAGE, "web", Platform.SNP, f"default/{IMAGE}/root", Secret(KEY))
    return store


def give(store: Store) -> bytes:
    return bytes(store.release(IMAGE, peer="test", measurement=bytes(48), simulated=False).reveal())


def test_only_an_active_key_is_released(tmp_path: Path) -> None:
    """Pending and revoked keys stay; forgotten ones are gone."""
    store = filled(tmp_path / "keys.db", Secret.random(32))
    with pytest.raises(ReleaseRefused):
        give(store)
    store.activate(IMAGE, [b"\1" * 48])
    assert give(store) == KEY
    store.revoke(IMAGE)
    with pytest.raises(ReleaseRefused):
        give(store)
    store.reinstate(IMAGE)
    assert give(store) == KEY
    store.forget(IMAGE)
    with pytest.raises(NotFound):
        give(store)
    assert [row["kind"] for row in store.audit_rows()] == [
        "activated", "released", "revoked", "reinstated", "released", "forgotten",
    ]
    store.close()


@pytest.mark.parametrize(
    ("rules", "finding"),
    [
        (ReleaseRules(not_after="2001-01-01T00:00:00Z"), "policy.too_late"),
        (ReleaseRules(not_before="2999-01-01T00:00:00Z"), "policy.too_early"),
    ],
)
def test_the_times_of_the_rules_hold_for_whoever_asks(tmp_path: Path, rules: ReleaseRules, finding: str) -> None:
    """Not for guests alone, which are judged before: a volume that is opened on the host is given its key here too."""
    store = filled(tmp_path / "keys.db", Secret.random(32))
    store.activate(IMAGE, [bytes(48)])
    store.set_rules(IMAGE, rules)
    for ask in (lambda: give(store), lambda: store.release_volumes(IMAGE, Requester(peer="test"))):
        with pytest.raises(ReleaseRefused) as refused:
            ask()
        assert refused.value.finding == finding
    assert "released" not in [row["kind"] for row in store.audit_rows()]
    store.close()


def test_activation_of_a_revoked_key_does_not_revive_it(tmp_path: Path) -> None:
    """A build that is finished after a crash must not undo a revocation."""
    store = filled(tmp_path / "keys.db", Secret.random(32))
    store.activate(IMAGE, [bytes(48)])
    store.revoke(IMAGE)
    store.activate(IMAGE, [bytes(48)])
    assert store.image(IMAGE).state is KeyState.REVOKED
    store.close()


def test_names_are_taken_once(tmp_path: Path) -> None:
    """Two images of one name would be one image to people."""
    store = filled(tmp_path / "keys.db", Secret.random(32))
    with pytest.raises(AlreadyExists):
        store.add_image("other", "web", Platform.SNP, "default/other/root", Secret(KEY))
    store.close()


def test_another_key_encryption_key_opens_nothing(tmp_path: Path) -> None:
    """The database alone is useless."""
    store = filled(tmp_path / "keys.db", Secret.random(32))
    store.activate(IMAGE, [bytes(48)])
    store.close()
    with pytest.raises(KekWrong):
        Store.open(f"sqlite:///{tmp_path / 'keys.db'}", Secret.random(32))


def test_a_key_that_does_not_open_is_not_written_down_as_released(tmp_path: Path) -> None:
    """What did not happen is not in the log; and one row's key does not open in another row's place."""
    store = filled(tmp_path / "keys.db", Secret.random(32))
    store.add_image("other", "mail", Platform.SNP, "default/other/root", Secret(KEY))
    store.activate(IMAGE, [bytes(48)])
    with sqlite3.connect(tmp_path / "keys.db") as raw:
        raw.execute("UPDATE images SET wrapped = (SELECT wrapped FROM images WHERE image_id = 'other')")
    raw.close()
    with pytest.raises(KeyUnreadable):
        give(store)
    assert [row["kind"] for row in store.audit_rows()] == ["activated"]
    store.close()


@pytest.mark.parametrize("column", ["time", "kind", "image_id", "peer", "measurement", "detail", "previous"])
def test_an_altered_audit_row_shows(tmp_path: Path, column: str) -> None:
    """Whichever field was changed, the first bad row is named."""
    path = tmp_path / "keys.db"
    store = filled(path, Secret.random(32))
    store.activate(IMAGE, [bytes(48)])
    give(store)
    assert store.verify_audit()[0] == 2
    with sqlite3.connect(path) as raw:
        raw.execute(f"UPDATE audit SET {column} = 'x' WHERE number = 1")
    raw.close()
    with pytest.raises(AuditBroken, match="row 1"):
        store.verify_audit()
    store.close()


def test_a_missing_audit_row_shows(tmp_path: Path) -> None:
    """Taking a row out breaks the chain."""
    path = tmp_path / "keys.db"
    store = filled(path, Secret.random(32))
    store.activate(IMAGE, [bytes(48)])
    give(store)
    with sqlite3.connect(path) as raw:
        raw.execute("DELETE FROM audit WHERE number = 1")
    raw.close()
    with pytest.raises(AuditBroken):
        store.verify_audit()
    store.close()


def test_the_key_encryption_key_is_made_once_for_its_owner_alone(tmp_path: Path) -> None:
    """Mode 0600, the same key each time; a credential goes first; damage is an error."""
    file = tmp_path / "kek"
    first = load_kek(file, None)
    assert file.stat().st_mode & 0o777 == 0o600
    assert load_kek(file, None) == first
    (tmp_path / "jindisk.kek").write_bytes(b"k" * 32)
    assert load_kek(file, tmp_path) == Secret(b"k" * 32)
    with pytest.raises(KekMissing):
        load_kek(tmp_path / "absent", None, create=False)
    file.write_bytes(b"short")
    with pytest.raises(KekUnusable):
        load_kek(file, None)
