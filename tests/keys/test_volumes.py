"""Anchors of volumes: the messages of the format document's section 13 against a model of its rules, and one by one."""

import random
import sqlite3
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from jindiskd.base.anchor import Anchor
from jindiskd.base.platform import Platform
from jindiskd.base.secret import Secret
from jindiskd.errors import AlreadyExists, NotFound
from jindiskd.kbs.freshness import VolumeGrant, VolumeState
from jindiskd.keys.store import ReleaseRefused, Requester, Store
from jindiskd.keys.volumes import BuiltVolume, LeaseHeld, SessionRefused, Volumes
from jindiskd.policy.rules import ReleaseRules

IMAGE, VOLUME = "11111111-1111-4111-8111-111111111111", "33333333-3333-4333-8333-333333333333"
WHO = Requester(peer="test", measurement=bytes(48))
KEY = bytes(range(32))
FIRST = Anchor(open=False, session=b"\1" * 32, sequence=7, root=b"\7" * 32)


def root_of(sequence: int) -> bytes:
    return bytes([sequence]) * 32


class Bench:
    """A store with one image and one volume, and a clock."""

    def __init__(self, path: Path, anchor: Anchor | None = FIRST) -> None:
        self.now = datetime(2026, 1, 1, tzinfo=UTC)
        self.path = path
        self.store = Store.open(f"sqlite:///{path}", Secret.random(32), lambda: self.now)
        self.store.add_image(IMAGE, "web", Platform.SNP, f"default/{IMAGE}/root", Secret(KEY))
        self.store.activate(IMAGE, [bytes(48)])
        self.volumes = Volumes(self.store)
        self.volumes.add(VOLUME, IMAGE, anchor)

    def release(self) -> VolumeGrant:
        return self.volumes.release(VOLUME, IMAGE, WHO)

    def adopt(self, session: bytes, sequence: int, root: bytes | None = None) -> None:
        self.volumes.adopt(state(session, sequence, root), WHO)

    def report(self, session: bytes, sequence: int, root: bytes | None = None) -> None:
        self.volumes.report(state(session, sequence, root))

    def close(self, session: bytes, sequence: int, root: bytes | None = None) -> None:
        self.volumes.close(state(session, sequence, root), WHO)

    @property
    def anchor(self) -> Anchor:
        found = self.volumes.get(VOLUME).anchor
        assert found is not None
        return found

    def running(self) -> bytes:
        """A session that has adopted the first state."""
        session = self.release().session
        self.adopt(session, FIRST.sequence)
        return session


def state(session: bytes, sequence: int, root: bytes | None = None) -> VolumeState:
    return VolumeState(volume=VOLUME, session=session, sequence=sequence, root=root or root_of(sequence))


@pytest.fixture
def b(tmp_path: Path) -> Bench:
    return Bench(tmp_path / "keys.db")


def test_the_anchor_has_the_bytes_of_the_format() -> None:
    """u8 mode, session, u64 little-endian sequence number, root: 73 bytes."""
    packed = Anchor(open=True, session=b"s" * 32, sequence=0x0102, root=b"r" * 32).pack()
    assert packed == b"\1" + b"s" * 32 + b"\2\1" + bytes(6) + b"r" * 32
    assert Anchor.unpack(packed).pack() == packed
    for bad in (packed[:-1], b"\2" + packed[1:]):
        with pytest.raises(Exception, match="anchor"):
            Anchor.unpack(bad)


def test_a_release_gives_key_anchor_and_a_fresh_session(b: Bench) -> None:
    """And survives the way to the guest."""
    one, two = b.release(), b.release()
    assert one.anchor == FIRST
    assert bytes(one.key.reveal()) == KEY
    assert len(one.session) == 32
    assert one.session != two.session
    again = VolumeGrant.unpack(Secret(two.pack()))
    assert (again.anchor, again.session, again.lease_s) == (two.anchor, two.session, 0)
    assert bytes(again.key.reveal()) == KEY
    assert [row["kind"] for row in b.store.audit_rows()][-2:] == ["released", "released"]


def test_an_orderly_life(b: Bench) -> None:
    """Adopt, report, close; each may be repeated, and the next session begins exactly where this one ended."""
    session = b.running()
    b.adopt(session, 7)
    b.report(session, 8)
    b.report(session, 8)
    b.report(session, 11)
    b.close(session, 12)
    b.close(session, 12)
    assert b.anchor == Anchor(open=False, session=session, sequence=12, root=root_of(12))
    with pytest.raises(SessionRefused):
        b.report(session, 13)
    second = b.release()
    assert second.anchor == b.anchor
    with pytest.raises(SessionRefused):
        b.adopt(second.session, 11)
    with pytest.raises(SessionRefused):
        b.adopt(second.session, 13)
    b.adopt(second.session, 12)


def test_after_a_crash_a_later_state_of_the_session_is_accepted_and_no_earlier_one(b: Bench) -> None:
    """Open mode: the reported state or one after it."""
    session = b.running()
    b.report(session, 9)
    with pytest.raises(SessionRefused):
        b.adopt(b.release().session, 8)
    with pytest.raises(SessionRefused):
        b.adopt(b.release().session, 9, b"x" * 32)
    b.adopt(b.release().session, 10)


def test_the_newer_session_fences_the_older(b: Bench) -> None:
    """From its adoption on, not from its release."""
    old = b.running()
    new = b.release().session
    b.report(old, 8)
    b.adopt(new, 8)
    for message in (b.report, b.close):
        with pytest.raises(SessionRefused):
            message(old, 9)
    with pytest.raises(SessionRefused):
        b.adopt(old, 8)
    b.report(new, 9)


def test_an_older_release_is_forgotten(b: Bench) -> None:
    """At most one session is pending."""
    first, second = b.release().session, b.release().session
    with pytest.raises(SessionRefused):
        b.adopt(first, 7)
    b.adopt(second, 7)


def test_reports_go_forward_only(b: Bench) -> None:
    """The same number with another root is a fork."""
    session = b.running()
    b.report(session, 9)
    for sequence, root in ((8, None), (9, b"x" * 32)):
        with pytest.raises(SessionRefused):
            b.report(session, sequence, root)
    with pytest.raises(SessionRefused):
        b.report(b"?" * 32, 10)


def test_a_rollback_is_accepted_once_and_written_down(b: Bench) -> None:
    """After a restored backup; the session after the next is strict again."""
    b.close(b.running(), 20)
    b.volumes.accept_rollback(VOLUME, "restored from the backup of Monday")
    lost = b.release()
    assert lost.anchor is None
    session = b.release().session  # the guest before died before it adopted: the acceptance still stands
    b.adopt(session, 3)
    assert b.anchor.sequence == 3
    b.close(session, 4)
    assert b.release().anchor == b.anchor
    with pytest.raises(SessionRefused):
        b.adopt(b.release().session, 2)
    rows = {row["kind"]: row["detail"] for row in b.store.audit_rows()}
    assert rows["rollback accepted"]["reason"] == "restored from the backup of Monday"
    assert rows["rollback accepted"]["sequence"] == 20


def test_a_volume_without_anchor_needs_a_decision(tmp_path: Path) -> None:
    """A broker that knows nothing of a volume does not pretend."""
    b = Bench(tmp_path / "keys.db", anchor=None)
    with pytest.raises(ReleaseRefused) as refused:
        b.release()
    assert refused.value.finding == "volume.no_anchor"
    b.volumes.accept_rollback(VOLUME, "new here")
    b.adopt(b.release().session, 5)
    assert b.anchor.sequence == 5


def test_a_lease_keeps_the_next_session_waiting(b: Bench) -> None:
    """Until it has run out with its margin; an orderly end needs no waiting."""
    b.store.set_rules(IMAGE, ReleaseRules(lease_s=30))
    grant = b.release()
    assert grant.lease_s == 30
    b.adopt(grant.session, 7)
    new = b.release().session
    b.now += timedelta(seconds=35)
    with pytest.raises(LeaseHeld):
        b.adopt(new, 8)
    b.report(grant.session, 8)
    b.now += timedelta(seconds=39)
    with pytest.raises(LeaseHeld):
        b.adopt(new, 8)
    b.now += timedelta(seconds=2)
    b.adopt(new, 8)
    b.close(new, 9)
    b.adopt(b.release().session, 9)


def test_revoked_and_foreign_images(b: Bench) -> None:
    """A revoked key begins no session, but one that runs may end in order; another image's volume is nobody's."""
    session, pending = b.running(), b.release().session
    b.store.revoke(IMAGE)
    with pytest.raises(ReleaseRefused):
        b.release()
    with pytest.raises(SessionRefused):
        b.adopt(pending, 7)
    b.close(session, 9)
    with pytest.raises(SessionRefused) as refused:
        b.volumes.report(state(session, 10), "another image")
    assert refused.value.finding == "peer.image"
    b.store.forget(IMAGE)
    with pytest.raises(NotFound):
        b.volumes.get(VOLUME)


def test_a_volume_is_remembered_once(b: Bench) -> None:
    """And only for an image that is there."""
    with pytest.raises(AlreadyExists):
        b.volumes.add(VOLUME, IMAGE, FIRST)
    with pytest.raises(NotFound):
        b.volumes.add("44444444-4444-4444-8444-444444444444", "nobody", FIRST)


def test_sessions_are_not_in_the_database_in_clear(b: Bench) -> None:
    """Whoever reads it cannot speak for a session."""
    session, pending = b.running(), b.release().session
    b.store.close()
    data = b.path.read_bytes() + b"".join(p.read_bytes() for p in b.path.parent.glob("keys.db-*"))
    for secret in (session, pending, FIRST.session, KEY):
        assert secret not in data
        assert secret.hex().encode() not in data


def test_an_anchor_of_another_volume_does_not_fit(b: Bench) -> None:
    """Rows cannot be exchanged in the database."""
    other = "44444444-4444-4444-8444-444444444444"
    b.volumes.add(other, IMAGE, Anchor(open=False, session=bytes(32), sequence=1, root=bytes(32)))
    with sqlite3.connect(b.path) as raw:
        raw.execute("UPDATE volumes SET anchor = (SELECT anchor FROM volumes WHERE volume = ?)", (other,))
    raw.close()
    with pytest.raises(Exception, match="does not open"):
        b.volumes.get(VOLUME)


@pytest.mark.parametrize("seed", range(6))
def test_against_a_model_of_the_rules(tmp_path: Path, seed: int) -> None:
    """Random messages of several sessions: what is accepted, and the anchor after it, are those of section 13.2."""
    draw, b = random.Random(seed), Bench(tmp_path / "keys.db")
    anchor, pending = FIRST, None
    sessions = [FIRST.session]
    accepted = 0
    for _ in range(150):
        verb = draw.choice(("release", "adopt", "adopt", "report", "report", "report", "close"))
        if verb == "release":
            pending = b.release().session
            sessions.append(pending)
            continue
        sid = draw.choice(sessions[-3:])
        sequence = max(0, anchor.sequence + draw.choice((-1, 0, 0, 1, 2)))
        root = root_of(sequence % 250) if draw.random() < 0.9 else b"!" * 32
        new = Anchor(open=verb != "close", session=sid, sequence=sequence, root=root)
        follows = sequence > anchor.sequence or (sequence, root) == (anchor.sequence, anchor.root)
        if verb == "adopt":
            same = (sequence, root) == (anchor.sequence, anchor.root)
            good = new == anchor or (sid == pending and (same or (anchor.open and sequence > anchor.sequence)))
        else:
            good = new == anchor or (sid == anchor.session and anchor.open and follows)
        try:
            getattr(b, verb)(sid, sequence, root)
        except SessionRefused:
            assert not good, (verb, new, anchor)
        else:
            assert good, (verb, new, anchor)
            accepted += 1
            if verb == "adopt" and new != anchor:
                pending = None
            anchor = new
        assert b.anchor == anchor
    assert accepted > 5
    b.store.close()


def test_an_old_copy_is_written_down_and_ends_the_session(b: Bench) -> None:
    """What a guest tells of a stale disk is a refusal in the audit log; only the released session can say it, once."""
    running = b.running()
    b.report(running, 12)
    session = b.release().session
    for wrong in (running, b"\x09" * 32):
        with pytest.raises(SessionRefused, match="not the one released last"):
            b.volumes.stale(state(wrong, 8), WHO)
    with pytest.raises(SessionRefused, match="another image"):
        b.volumes.stale(state(session, 8), WHO, "another")
    found = b.volumes.stale(state(session, 8), WHO, IMAGE)
    assert (found.image_id, found.simulated, found.finding.id) == (IMAGE, False, "volume.stale")
    row = b.store.audit_rows()[-1]
    assert (row["kind"], row["image_id"], row["detail"]["sequence"]) == ("refused", IMAGE, 8)
    (written,) = row["detail"]["findings"]
    assert written == {"id": "volume.stale", "text": found.finding.text}
    for words in ("holds state 8", "known is 12", "key accept-rollback web"):
        assert words in written["text"]
    # The session that was released for the old disk is over, the one that runs is not.
    with pytest.raises(SessionRefused):
        b.volumes.stale(state(session, 8), WHO)
    with pytest.raises(SessionRefused, match="not the one released last"):
        b.adopt(session, 12)
    b.report(running, 13)
    b.store.verify_audit()


def test_rows_of_simulated_sessions_say_so(b: Bench) -> None:
    """Adopting and closing come from a guest whose report proved nothing: the rows say it as the release's does."""
    other, volume = "55555555-5555-4555-8555-555555555555", "66666666-6666-4666-8666-666666666666"
    b.store.add_image(other, "sim", Platform.SIMULATED_SNP, f"default/{other}/root", Secret(KEY))
    b.volumes.activate(other, [bytes(48)], [BuiltVolume(volume=volume, anchor=FIRST)])
    session = b.volumes.release(volume, other, WHO).session
    tell = {"volume": volume, "session": session}
    b.volumes.adopt(VolumeState(**tell, sequence=FIRST.sequence, root=FIRST.root), WHO)
    b.volumes.close(VolumeState(**tell, sequence=9, root=bytes(32)), WHO)
    rows = {row["kind"]: row["simulated"] for row in b.store.audit_rows() if row["image_id"] == other}
    assert rows["adopted"]
    assert rows["closed"]


def test_a_key_and_its_volume_become_known_in_one_step(b: Bench) -> None:
    """A volume that is known already keeps the key pending; a repetition changes nothing."""
    other = "55555555-5555-4555-8555-555555555555"
    b.store.add_image(other, "other", Platform.SNP, f"default/{other}/root", Secret(KEY))
    with pytest.raises(AlreadyExists):
        b.volumes.activate(other, [bytes(48)], [BuiltVolume(volume=VOLUME, anchor=FIRST)])
    assert b.store.image(other).state == "pending"
    assert b.volumes.of_image(other) == []
    fresh = "66666666-6666-4666-8666-666666666666"
    for _ in range(2):
        b.volumes.activate(other, [bytes(48)], [BuiltVolume(volume=fresh, anchor=FIRST)])
    (record,) = b.volumes.of_image(other)
    assert (record.volume, record.anchor) == (fresh, FIRST)
    assert b.store.image(other).state == "active"


def test_volumes_of_one_image_are_kept_apart(b: Bench) -> None:
    """Each has a key, a state and a session of its own; one that is stale, or accepted, says nothing of the other."""
    other, resource = "66666666-6666-4666-8666-666666666666", f"default/{IMAGE}/data"
    with b.store.database.write() as connection:
        b.store.insert_key(connection, IMAGE, resource, Secret(b"d" * 32))
    b.volumes.add(other, IMAGE, FIRST, resource=resource)
    first = b.running()
    granted = b.volumes.release(other, IMAGE, WHO, resource=resource)
    assert bytes(granted.key.reveal()) == b"d" * 32
    for volume, wrong in ((other, None), (VOLUME, resource)):
        with pytest.raises(ReleaseRefused, match="does not belong to this volume"):
            b.volumes.release(volume, IMAGE, WHO, resource=wrong)
    tell = {"volume": other, "session": granted.session}
    found = b.volumes.stale(VolumeState(sequence=3, root=root_of(3), **tell), WHO, IMAGE)
    assert "the disk of its volume 'data' is not in the latest state" in found.finding.text
    assert found.finding.text.endswith("`jindiskctl key accept-rollback web --volume data`")
    b.volumes.accept_rollback(other, "restored")
    assert [record.accept_any for record in b.volumes.of_image(IMAGE)] == [False, True]
    with pytest.raises(SessionRefused):
        b.volumes.report(VolumeState(volume=other, session=first, sequence=9, root=root_of(9)))
    b.report(first, 9)
    b.store.forget(IMAGE)
    assert b.volumes.list() == []
