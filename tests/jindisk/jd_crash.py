"""Stopping the machine at every point: a device that records, and what must be true of each image it could leave."""

import copy
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from jd import KEY, UUID1, ZERO, Audit, Broker, MemoryDevice, World, content, world

from jindiskd.base.anchor import Anchor, State
from jindiskd.base.secret import Secret
from jindiskd.jindisk.anchor import Reporting
from jindiskd.jindisk.check import check_volume
from jindiskd.jindisk.geometry import BLOCK, JOURNAL_START
from jindiskd.jindisk.recovery import recover
from jindiskd.jindisk.session import Session
from jindiskd.jindisk.superblock import SLOT_START
from jindiskd.jindisk.tree import ref_raw
from jindiskd.jindisk.volume import Volume, anchor_of

SECTOR = 512
BLOCKS = 4096
Content = tuple[int, ...]
"""Of every logical block, the number of what was written there; 0 for zeros."""
_numbers: dict[bytes, int] = {}


def numbered(number: int) -> bytes:
    """A block's content by number, to be recognised by `decode`."""
    block = content(number)
    _numbers[block[:32]] = number
    return block


def decode(data: bytes) -> Content:
    """Which contents these blocks are; fails on anything that nobody wrote."""
    found = []
    for at in range(0, len(data), BLOCK):
        block = data[at : at + BLOCK]
        number = 0 if block == ZERO else _numbers[block[:32]]
        assert number == 0 or block[:32] * 128 == block, "a block that nobody wrote"
        found.append(number)
    return tuple(found)


def referenced(device: MemoryDevice, state: State) -> set[int]:
    """The raw blocks that a durable state needs, found by opening it from the disk."""
    anchor = anchor_of(state, still_open=False)
    found = recover(device, key=Secret(KEY), uuid=UUID1, anchor=anchor, where="the copy")
    volume = Volume(device, found, key=Secret(KEY))
    raws = {SLOT_START + found.superblock.slot}
    raws |= set(range(JOURNAL_START, JOURNAL_START + sum(len(c.blocks) for c in found.commits)))
    for tree in volume.trees.values():
        raws |= {ref_raw(ref) for _, _, ref in tree.interior_refs()}
    for _, page in volume.leaves():
        raws |= {int.from_bytes(page[at : at + 8], "little") for at in range(0, 170 * 24, 24)}
    return raws - {0}


class RecordingDevice(MemoryDevice):
    """Keeps every write, barrier and mark in order, and holds the engine to W1."""

    def __init__(self, size_bytes: int, blocks: dict[int, bytes] | None = None) -> None:
        super().__init__(size_bytes, blocks)
        self.base = dict(self.blocks)
        self.events: list[tuple[int, bytes] | str | Mark] = []
        self.session: Session | None = None
        self.meanwhile: Callable[[], None] | None = None
        """What the guest does during a barrier."""
        self._guarded: State | None = None
        self._needed: set[int] = set()

    def pwrite(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        if self.session is not None:
            if self._guarded != self.session.durable:
                self._guarded = self.session.durable
                self._needed = referenced(self, self._guarded)
            overwritten = self._needed & set(range(offset // BLOCK, (offset + len(data)) // BLOCK))
            assert not overwritten, f"W1: raw blocks {overwritten} of the last durable state are overwritten"
        self.events.append((offset, bytes(data)))
        super().pwrite(offset, data)

    def flush(self) -> None:
        if self.meanwhile is not None:
            self.meanwhile()  # its writes are under this barrier or not, as it pleases the device
        self.events.append("barrier")
        if self.meanwhile is not None:
            self.meanwhile()


@dataclass(frozen=True, kw_only=True)
class Mark:
    """What the world knew at a point."""

    begun: int
    """The last request that had begun."""
    acknowledged: int
    """The last request that an acknowledged flush covers."""
    broker: Broker


@dataclass(kw_only=True)
class Recorded:
    """A run: what the device saw, and what the volume held after each request."""

    device: RecordingDevice
    world: World
    contents: list[Content]
    first: Mark
    span: int
    """Logical blocks that requests were about."""
    cleaned: bool = False
    """Whether live blocks were moved."""


class MarkingBroker(Broker):
    """Notes each change of its memory among the device's events."""

    run: "Run | None" = None

    def adopt(self, state: State, session: bytes) -> None:
        super().adopt(state, session)
        if self.run is not None:
            self.run.mark()

    def _follow(self, state: State, still_open: bool) -> None:
        super()._follow(state, still_open)
        if self.run is not None:
            self.run.mark()


@dataclass(kw_only=True)
class Run:
    """A seeded run of random requests on a recording device."""

    seed: int
    audit: Audit | None = None
    full: bool = False
    """Fill the volume first, so that every write has to be made room for."""
    reporting: Reporting = Reporting.INTERVAL
    span: int = 300
    contents: list[Content] = field(default_factory=list)
    acknowledged: int = 0
    waiting: bool = False

    def record(self, requests: int) -> Recorded:
        self.random = random.Random(self.seed)
        base = world(seed=self.seed, audit=self.audit)
        if self.full:
            self.span = BLOCKS
        session, now, self.number = base.create(), [0] * self.span, 0
        if self.full:
            for lba in range(0, BLOCKS, 64):
                session.write(lba * BLOCK, self.fresh(now, lba, 64))
        session.close()
        self.prefilled = self.number
        self.contents = [tuple(now)]
        device = RecordingDevice(base.device.size_bytes, base.device.blocks)
        broker = MarkingBroker()
        broker.__dict__.update(base.broker.__dict__)
        self.world = base.fork(device, broker)
        self.device, self.world.broker = device, broker
        first = Mark(begun=0, acknowledged=0, broker=self.remembered())
        broker.run = self
        session = self.world.begin(reporting=self.reporting)
        device.session = session
        device.meanwhile = lambda: self.write_during_barrier(session, now)
        for _ in range(requests):
            self.request(session, now)
        broker.run = device.meanwhile = None
        cleaned = session.appender.written_blocks > self.number - self.prefilled
        return Recorded(
            device=device, world=self.world, contents=self.contents, first=first, span=self.span, cleaned=cleaned
        )

    def remembered(self) -> Broker:
        found = Broker()
        found.__dict__.update(self.world.broker.__dict__)
        found.__dict__.pop("run", None)
        return found

    def mark(self) -> None:
        begun = len(self.contents) - 1
        self.device.events.append(Mark(begun=begun, acknowledged=self.acknowledged, broker=self.remembered()))

    def fresh(self, now: list[int], lba: int, count: int) -> bytes:
        data = b""
        for at in range(lba, lba + count):
            self.number += 1
            now[at] = self.number
            data += numbered(self.number)
        return data

    def write_during_barrier(self, session: Session, now: list[int]) -> None:
        """A request that meets a flush or checkpoint under way, down to the device, if there is room without another.

        Not while another request waits for room: the order of the two would be open.
        """
        if self.waiting or self.random.random() < 0.8 or not session.room.suffices(2):
            return
        lba = self.random.randrange(self.span - 2)
        data = self.fresh(now, lba, 2)
        self.contents.append(tuple(now))
        self.mark()
        session.write(lba * BLOCK, data)
        with session.volume.lock:
            session.appender.seal_pending()

    def request(self, session: Session, now: list[int]) -> None:
        choice = self.random.random()
        if choice < 0.25:
            covered = len(self.contents) - 1
            session.flush()
            self.acknowledged = covered
            self.mark()
        elif choice < 0.28:
            session.checkpoint()
        elif choice < 0.30:
            session.reporter.report(session.durable)
        elif choice < 0.31:
            session.checkpoint()
            session.cleaner.clean(len(session.appender.free) + 1)
        else:
            count = self.random.choice((1, 1, 2, 5, 30))
            lba = self.random.randrange(self.span - count)
            if choice < 0.38:
                count = self.random.choice((1, 100, 200)) if not self.full else 1
                count = min(count, self.span - lba)
                now[lba : lba + count] = [0] * count
                self.contents.append(tuple(now))
                self.mark()
                self.waiting = True
                session.discard(lba * BLOCK, count * BLOCK)
            else:
                data = self.fresh(now, lba, count)
                self.contents.append(tuple(now))
                self.mark()
                self.waiting = True
                session.write(lba * BLOCK, data)
            self.waiting = False


@dataclass(frozen=True, kw_only=True)
class Crash:
    """An image that a stop could leave, and what was known then."""

    blocks: dict[int, bytes]
    mark: Mark
    point: int
    """Index among the events."""
    kind: str


def crashes(recorded: Recorded, rng: random.Random, *, share: float, subsets: int, exhaustive: bool) -> Iterator[Crash]:
    """Images for each point between two writes (a seeded `share` of the points).

    Everything before the last barrier is there. Of what came later: all in order; all but the end of the last write;
    and seeded `subsets` of the 512-byte sectors, or with `exhaustive` every subset where there are at most ten.
    """
    durable, since, mark = dict(recorded.device.base), [], recorded.first
    for point, event in enumerate([*recorded.device.events, "end"]):
        if isinstance(event, Mark):
            mark = event
            continue
        if since and rng.random() < share:
            for kind, chosen in _choices(_sectors(since), rng, subsets=subsets, exhaustive=exhaustive):
                yield Crash(blocks=_applied(durable, chosen), mark=mark, point=point, kind=kind)
        if isinstance(event, tuple):
            since.append(event)
        elif event == "barrier":
            durable, since = _applied(durable, _sectors(since)), []


Sector = tuple[int, bytes]


def _sectors(writes: list[tuple[int, bytes]]) -> list[Sector]:
    found = []
    for offset, data in writes:
        found += [((offset + at) // SECTOR, data[at : at + SECTOR]) for at in range(0, len(data), SECTOR)]
    return found


def _choices(
    sectors: list[Sector], rng: random.Random, *, subsets: int, exhaustive: bool
) -> Iterator[tuple[str, list[Sector]]]:
    yield "all", sectors
    torn = rng.randrange(1, 8)
    yield f"torn by {torn} sectors", sectors[:-torn]
    if exhaustive and len(sectors) <= 10:
        for bits in range(1 << len(sectors)):
            yield f"subset {bits:b}", [s for at, s in enumerate(sectors) if bits >> at & 1]
        return
    for _ in range(subsets):
        kept = rng.choice((0.5, 0.9, 0.99))
        yield f"subset of {kept}", [s for s in sectors if rng.random() < kept]
    # The end arrived, the beginning did not.
    yield "last block first", sectors[-8:]


def _applied(durable: dict[int, bytes], sectors: list[Sector]) -> dict[int, bytes]:
    blocks, changed = dict(durable), {}
    for number, data in sectors:
        raw, at = divmod(number * SECTOR, BLOCK)
        if raw not in changed:
            changed[raw] = bytearray(blocks.get(raw, ZERO))
        changed[raw][at : at + SECTOR] = data
    for raw, block in changed.items():
        blocks[raw] = bytes(block)
    return blocks


def verify(
    recorded: Recorded, crash: Crash, rng: random.Random, *, inside: int = 0, check: bool = False, onward: bool = True
) -> None:
    """Recover from an image; the state must be one that is not older than what was acknowledged.

    Args:
        recorded: the run.
        crash: the image.
        rng: chooses what happens next.
        inside: also stop at so many points of the recovery, where this must hold again.
        check: run the checker.
        onward: also go on writing, close, and reopen.
    """
    said = f"crash at event {crash.point} ({crash.kind})"
    device = RecordingDevice(recorded.device.size_bytes, crash.blocks)
    here = recorded.world.fork(device, crash.mark.broker)
    session = here.begin()
    begun = len(device.events)
    found = decode(session.read(0, recorded.span * BLOCK))
    allowed = recorded.contents[crash.mark.acknowledged : crash.mark.begun + 1]
    assert found in allowed, f"{said}: not a state since the acknowledged one"
    if not onward:
        return
    device.session = session
    lba = rng.randrange(recorded.span)
    session.write(lba * BLOCK, numbered(lba + 1_000_000))
    if rng.random() < 0.5:
        session.flush()
    session.close()
    volume = here.open()
    after = decode(volume.read(0, recorded.span * BLOCK))
    assert after == (*found[:lba], lba + 1_000_000, *found[lba + 1 :]), f"{said}: closed and reopened, it differs"
    if check:
        report = check_volume(volume, data=True)
        assert not report.faults, f"{said}: {report.faults[0]}"
    if inside:
        # The machine stops again, somewhere in the recovery and what followed it.
        adopted = copy.copy(crash.mark.broker)
        adopted.pending = session.session_id
        adopted.adopt(anchored(recorded, crash), session.session_id)
        again = Recorded(
            device=device,
            world=here,
            contents=[found],
            first=Mark(begun=0, acknowledged=0, broker=adopted),
            span=recorded.span,
        )
        device.events = device.events[:begun]
        for second in crashes(again, rng, share=1.0, subsets=1, exhaustive=False):
            if rng.random() < inside / max(1, 4 * begun):
                verify(again, second, rng)


def anchored(recorded: Recorded, crash: Crash) -> State:
    """The state that recovery finds in an image, without writing."""
    anchor: Anchor | None = crash.mark.broker.anchor
    assert anchor is not None
    device = MemoryDevice(recorded.device.size_bytes, crash.blocks)
    return recover(device, key=Secret(KEY), uuid=UUID1, anchor=anchor, where="the copy").state
