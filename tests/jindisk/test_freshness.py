"""Which states are accepted: every anchor of a history against every disk of it (format document, section 13)."""

import copy
from dataclasses import dataclass, field

import pytest
from jd import Audit, Broker, MemoryDevice, World, content, world

from jindiskd.base.anchor import Anchor, State
from jindiskd.jindisk.anchor import Reporting
from jindiskd.jindisk.errors import VolumeFenced, VolumeStale
from jindiskd.jindisk.geometry import BLOCK, JOURNAL_START
from jindiskd.jindisk.session import Session
from jindiskd.jindisk.superblock import SLOT_START


@dataclass(frozen=True, kw_only=True)
class Written:
    """A state and the blocks on the disk that make it, as they were when it was committed."""

    state: State
    epoch: int
    index: int
    """Journal blocks of its epoch."""
    superblock: bytes
    journal: tuple[bytes, ...]
    value: bytes
    """What logical block 0 holds."""

    def shown_by(self, disk: MemoryDevice) -> bool:
        slot = disk.pread((SLOT_START + self.epoch % 2) * BLOCK, BLOCK)
        journal = disk.pread(JOURNAL_START * BLOCK, len(self.journal) * BLOCK)
        return slot == self.superblock and journal == b"".join(self.journal)


@dataclass(kw_only=True)
class History:
    """States, disks and anchors of one volume, forks included."""

    states: list[Written] = field(default_factory=list)
    disks: dict[str, MemoryDevice] = field(default_factory=dict)
    anchors: dict[str, Anchor] = field(default_factory=dict)
    _number: int = 0

    def note(self, name: str, here: World, session: Session, value: bytes) -> None:
        """After a commit, report or close."""
        self.disks[name] = here.device.copy()
        assert here.broker.anchor is not None
        self.anchors[name] = here.broker.anchor
        self.commit(here, session, value)

    def commit(self, here: World, session: Session, value: bytes) -> None:
        index = session.journal.index if session.journal else 0
        block = here.device.pread((SLOT_START + session.epoch % 2) * BLOCK, BLOCK)
        journal = tuple(here.device.pread((JOURNAL_START + i) * BLOCK, BLOCK) for i in range(index))
        self.states.append(
            Written(
                state=session.durable, epoch=session.epoch, index=index, superblock=block, journal=journal, value=value
            )
        )

    def write(self, name: str, here: World, session: Session) -> None:
        self._number += 1
        session.write(0, content(self._number))
        session.flush()
        self.note(name, here, session, content(self._number))

    @property
    def value(self) -> bytes:
        return content(self._number)


def sessions(history: History, here: World, name: str, *, closing: bool, reports: bool = True) -> Session:
    """A session of some commits and checkpoints, reported in between or not."""
    before = here.open(here.broker.anchor).read(0, BLOCK)
    session = here.begin()
    history.note(f"{name} adopted", here, session, before)
    history.write(f"{name} first", here, session)
    if reports:
        session.reporter.report(session.durable)
        history.note(f"{name} reported", here, session, history.value)
    history.write(f"{name} second", here, session)
    session.checkpoint()
    history.note(f"{name} checkpoint", here, session, history.value)
    history.write(f"{name} third", here, session)
    if closing:
        session.close()
        history.note(f"{name} closed", here, session, history.value)
    return session


class Deaf(Broker):
    """A broker whose answers, or whose requests, are lost."""

    def adopt(self, state: State, session: bytes) -> None:
        super().adopt(state, session)
        raise OSError("the answer was lost")


def history(audit: Audit | None = None) -> History:
    """Three sessions, a fork, a lost adopt, a lost close, and stops between messages."""
    found, here = History(), world(audit=audit)
    first = here.create()
    found.note("formatted", here, first, bytes(BLOCK))
    first.close()
    found.note("formatted closed", here, first, bytes(BLOCK))
    sessions(found, here, "one", closing=True)
    forked = here.fork()  # the host keeps a copy
    sessions(found, here, "two", closing=False)  # stops without closing
    # An adoption that the broker has applied, and the guest never heard of: nothing was written.
    deaf = here.fork(here.device)
    deaf.broker = Deaf()
    deaf.broker.__dict__.update(here.broker.__dict__)
    with pytest.raises(OSError, match="lost"):
        deaf.begin()
    assert deaf.broker.anchor is not None
    found.anchors["adopt lost"] = deaf.broker.anchor
    here.broker.__dict__.update(deaf.broker.__dict__)
    # The fork runs with a broker of its own memory, as a host would like it.
    sessions(found, forked, "fork", closing=True)
    # A close that the broker never got: the disk is closed, the anchor open.
    last = sessions(found, here, "three", closing=False, reports=False)
    broker = copy.copy(here.broker)
    last.close()
    found.disks["close lost"] = here.device.copy()
    found.anchors["close lost"] = broker.anchor or found.anchors["formatted"]
    found.commit(here, last, found.value)
    found.anchors["close came"] = here.broker.anchor or found.anchors["formatted"]
    return found


def expected(history: History, disk: MemoryDevice, anchor: Anchor) -> Written | None:
    """Section 13.3 and the order of R3, from what was recorded, without the engine."""
    shown = [w for w in history.states if w.shown_by(disk)]
    for written in sorted(shown, key=lambda w: (w.epoch, w.index), reverse=True):
        state = written.state
        exact = (state.sequence, state.root) == (anchor.sequence, anchor.root)
        if exact or (anchor.open and state.session == anchor.session and state.sequence > anchor.sequence):
            return written
    return None


def verify_every_pair(audit: Audit | None = None) -> tuple[int, int]:
    """Open every disk under every anchor; returns how many were accepted and refused."""
    found = history(audit)
    accepted = refused = 0
    for disk_name, disk in found.disks.items():
        for anchor_name, anchor in found.anchors.items():
            said = f"disk {disk_name!r}, anchor {anchor_name!r}"
            wanted = expected(found, disk, anchor)
            here = World(device=disk, broker=Broker(), key=world().key)
            if wanted is None:
                try:
                    state = here.open(anchor).state
                except VolumeStale:
                    refused += 1
                    continue
                raise AssertionError(f"{said}: accepted {state.sequence}")
            try:
                volume = here.open(anchor)
            except VolumeStale as exc:
                raise AssertionError(f"{said}: {exc}") from exc
            state = (volume.state.sequence, volume.state.root)
            assert state == (wanted.state.sequence, wanted.state.root), said
            assert volume.read(0, BLOCK) == wanted.value, said
            accepted += 1
    return accepted, refused


def test_exactly_the_states_of_the_rule_are_accepted(audit: Audit) -> None:
    """The table; a fair number of both answers. No nonce comes twice in the forks."""
    accepted, refused = verify_every_pair(audit)
    assert accepted > 30
    assert refused > 100


def test_of_two_engines_on_copies_one_is_fenced_and_its_states_are_never_accepted() -> None:
    """The host runs a copy; a newer session ends the older one, whose later states no anchor accepts."""
    here = world()
    here.create().close()
    old = here.begin(reporting=Reporting.COMMIT)
    old.write(0, content(1))
    old.flush()
    other = World(device=here.device.copy(), broker=here.broker, key=here.key)
    new = other.begin(reporting=Reporting.COMMIT)
    old.write(0, content(2))
    with pytest.raises(VolumeFenced):
        old.flush()
    with pytest.raises(VolumeFenced):
        old.close()
    assert old.fenced
    written = here.device.copy()
    with pytest.raises(VolumeFenced):
        old.write(0, content(3))
    assert written.blocks == here.device.blocks
    new.write(0, content(4))
    new.flush()
    with pytest.raises(VolumeStale):
        here.open(here.broker.anchor)
    new.close()
    with pytest.raises(VolumeStale):
        here.open(here.broker.anchor)
    assert other.open().read(0, BLOCK) == content(4)


def test_nothing_is_written_before_the_adoption_is_acknowledged() -> None:
    """O1, whatever the broker does; the session that got no answer writes nothing afterwards either."""
    here = world()
    running = here.create()
    running.write(0, content(1))
    running.flush()  # not closed: recovery has something to do
    for broker in (Deaf(), Refusing()):
        broker.__dict__.update(here.broker.__dict__)
        before = here.device.copy()
        other = World(device=here.device, broker=broker, key=here.key)
        with pytest.raises((OSError, VolumeFenced)):
            other.begin()
        assert here.device.blocks == before.blocks


class Refusing(Broker):
    def adopt(self, state: State, session: bytes) -> None:
        raise VolumeFenced("no")
