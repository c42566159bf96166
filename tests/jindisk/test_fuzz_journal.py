"""Authentic but wrong: journals that a faulty writer sealed (section 22); as test_fuzz.py has the other structures."""

import re
from collections.abc import Callable
from dataclasses import replace

import pytest
from jd import KEY, UUID1, MemoryDevice, content
from jd_attack import device, opened
from jd_disk import FREE, GEOMETRY, TAG, D, free_block, mapped, only_newest
from jd_forge import BLOCK, Forge, entry
from jd_reader import sha256

from jindiskd.base.anchor import Anchor
from jindiskd.base.secret import Secret
from jindiskd.jindisk.anchor import UNANCHORED
from jindiskd.jindisk.errors import (
    VolumeInconsistent,
    VolumeMalformed,
    VolumeStale,
    VolumeUnauthentic,
    VolumeUnrecognised,
)
from jindiskd.jindisk.volume import open_volume

pytestmark = pytest.mark.usefixtures("no_endless_loop")


Case = Callable[[Forge], list[bytes]]
JOURNAL: dict[str, Case] = {
    "another epoch": lambda f: [f.commit([entry(2, 0, 1)], epoch=f.reader.epoch + 2)],
    "another index": lambda f: [f.commit([entry(2, 0, 1)], index=1)],
    "a sequence number ahead": lambda f: [f.commit([entry(2, 0, 1)], sequence=f.reader.sequence + 2)],
    "a sequence number again": lambda f: [f.commit([entry(2, 0, 1)], sequence=f.reader.sequence)],
    "127 entries": lambda f: [f.commit([entry(2, 0, 1)] * 126, count=127)],
    "fewer than there are": lambda f: [f.commit([entry(2, 0, 1)] * 2, count=1)],
    "unknown flags": lambda f: [f.commit([entry(2, 0, 1)], flags=5)],
    "reserved bytes": lambda f: [f.commit([entry(2, 0, 1)], zero=1)],
    "the last reserved byte": lambda f: [f.commit([entry(2, 0, 1)]).ljust(4079, b"\0") + b"\1"],
    "no entries": lambda f: [f.commit([])],
    "type 0": lambda f: [f.commit([entry(0, 0, 1)])],
    "type 5": lambda f: [f.commit([entry(5, 0, 1)])],
    "type 255": lambda f: [f.commit([entry(255, 0, 1)])],
    "MAP beyond L": lambda f: [f.commit([entry(1, 4096, *f.reader.map[0])])],
    "MAP before the data": lambda f: [f.commit([entry(1, 0, D - 1, TAG)])],
    "MAP behind the data": lambda f: [f.commit([entry(1, 0, GEOMETRY.end, TAG)])],
    "MAP far away": lambda f: [f.commit([entry(1, 0, (1 << 64) - 1, TAG)])],
    "MAP into a free segment": lambda f: [f.commit([entry(1, 0, free_block(f), TAG)])],
    "UNMAP of nothing": lambda f: [f.commit([entry(2, 0, 0)])],
    "UNMAP beyond L": lambda f: [f.commit([entry(2, 4000, 97)])],
    "UNMAP far beyond": lambda f: [f.commit([entry(2, 0, (1 << 64) - 1)])],
    "UNMAP with a tag": lambda f: [f.commit([entry(2, 0, 1, TAG)])],
    "SEG beyond S": lambda f: [f.commit([entry(3, GEOMETRY.segments), entry(4, GEOMETRY.segments)])],
    "SEG alone": lambda f: [f.commit([entry(3, 1)])],
    "SEG alone in the end": lambda f: [f.commit([entry(2, 0, 1), entry(3, 1)])],
    "SEG before another and SEGKEY": lambda f: [f.commit([entry(3, 1), entry(2, 0, 1), entry(4, 1)])],
    "SEG twice before SEGKEY": lambda f: [f.commit([entry(3, 1), entry(3, 1), entry(4, 1)])],
    "SEG before another": lambda f: [f.commit([entry(3, 1), entry(2, 0, 1)])],
    "SEGKEY alone": lambda f: [f.commit([entry(4, 1)])],
    "SEGKEY of another": lambda f: [f.commit([entry(3, 1), entry(4, 2)])],
    "SEG with a value": lambda f: [f.commit([entry(3, 1, 1), entry(4, 1)])],
    "SEGKEY with a value": lambda f: [f.commit([entry(3, 1), entry(4, 1, 1)])],
    "SEGKEY in the next block": lambda f: [
        f.commit([entry(3, 1)], flags=0), f.commit([entry(4, 1)], index=1)
    ],
    "a large commit that is not ordered": lambda f: [
        f.commit([mapped(f)] * 126, flags=0), f.commit([mapped(f)] * 126, flags=0, index=1),
        f.commit([mapped(f)] * 5, index=2),
    ],
    "a sequence number within a commit": lambda f: [
        f.commit([mapped(f)], flags=0), f.commit([mapped(f)], index=1, sequence=f.reader.sequence + 2)
    ],
}  # fmt: skip


WORDS = {
    "another": "it says epoch",
    "a sequence number": "is due",
    "127|fewer|unknown|reserved|the last": "count, flags or reserved bytes",
    "no entries|a large": "an empty commit, or a large one",
    "MAP into": "does not declare|not in use",
    "SEG alone|SEG before|SEG twice|SEGKEY alone|SEGKEY in": "in pairs",
    "type|MAP|UNMAP|SEG": "out of range",
}
"""What the error says of each, by how the case's name begins: another fault would be found by another rule."""


@pytest.mark.parametrize("case", JOURNAL)
def test_journal_blocks(disk: dict[int, bytes], case: str) -> None:
    """A block that opens and violates the rules is an error, and no end of the journal."""
    forge = only_newest(Forge(disk, KEY))
    forge.journal(JOURNAL[case](forge))
    words = next(words for names, words in WORDS.items() if re.match(names, case))
    with pytest.raises(VolumeInconsistent, match=f"journal.*({words})"):
        opened(forge)


def test_a_right_journal_of_the_forge_is_accepted(disk: dict[int, bytes]) -> None:
    """The forge itself makes valid blocks: the cases above fail for what is wrong in them."""
    forge = only_newest(Forge(disk, KEY))
    first = forge.commit([mapped(forge), entry(2, 5, 10)], flags=0)
    forge.journal([first, forge.commit([entry(2, 20, 1)], index=1)])
    volume = opened(forge)
    assert volume.state.sequence == forge.reader.sequence + 1
    assert volume.read(0, 6 * BLOCK) == b"".join(content(n) for n in range(5)) + bytes(BLOCK)


def test_a_journal_may_go_to_its_limits(disk: dict[int, bytes]) -> None:
    """The last values that the rules allow: of blocks, segments, entries, and maps that are not ordered."""
    forge = only_newest(Forge(disk, KEY))
    last = [entry(3, FREE), entry(4, FREE), entry(1, 4095, GEOMETRY.end - 1, TAG), entry(2, 0, 4096), entry(2, 4095, 1)]
    full = [forge.commit([mapped(forge)] * 126, flags=0, index=n, sequence=forge.reader.sequence + 2) for n in (1, 2)]
    rest = forge.commit([mapped(forge)] * 4, index=3, sequence=forge.reader.sequence + 2)
    more = [forge.commit([mapped(forge)] * 126, flags=2, index=n, sequence=forge.reader.sequence + 3) for n in (4, 5)]
    ordered = forge.commit([mapped(forge)] * 5, flags=3, index=6, sequence=forge.reader.sequence + 3)
    forge.journal([forge.commit(last), *full, rest, *more, ordered])
    volume = opened(forge)
    assert volume.state.sequence == forge.reader.sequence + 3
    assert volume.read(0, 2 * BLOCK) == content(0) + bytes(BLOCK)


def wrong(forge: Forge) -> bytes:
    """A MAP whose data do not open."""
    raw, _ = forge.reader.map[0]
    return entry(1, 0, raw, TAG)


def test_the_last_commit_counts_if_its_data_arrived_or_it_cannot_be_otherwise(disk: dict[int, bytes]) -> None:
    """Section 12, R3 c: dropped where its data do not open; kept where it is ordered, or anything came behind it."""
    cases: list[tuple[list[bytes], int]] = []
    forge = only_newest(Forge(disk, KEY))
    sequence = forge.reader.sequence
    good, bad = forge.commit([mapped(forge)]), forge.commit([wrong(forge)])
    behind = [forge.commit([entry(2, 9, 1)], index=1, sequence=sequence + 2, flags=flags) for flags in (0, 1)]
    cases += [([good], 1), ([bad], 0), ([forge.commit([wrong(forge)], flags=3)], 1)]
    cases += [([bad, behind[0]], 1), ([bad, behind[1]], 2)]
    cases.append(([good, forge.commit([wrong(forge)], index=1, sequence=sequence + 2)], 1))
    # One bad block among good ones, in the first of two journal blocks.
    cases.append(([forge.commit([mapped(forge), wrong(forge)], flags=0), forge.commit([mapped(forge)], index=1)], 0))
    for plains, kept in cases:
        forge = only_newest(Forge(disk, KEY))
        forge.journal(plains)
        volume = opened(forge)
        assert volume.state.sequence == sequence + kept
        try:
            assert volume.read(0, BLOCK) == content(0)
        except VolumeUnauthentic:
            assert TAG in plains[0]
            assert kept


def test_an_anchor_on_a_commit_whose_data_are_gone_accepts_nothing_older(disk: dict[int, bytes]) -> None:
    """It was acknowledged: the state before it would be a roll-back, be the anchor open or closed."""
    for before in (0, 1):
        forge = only_newest(Forge(disk, KEY))
        sequence = forge.reader.sequence + before
        plains = [forge.commit([mapped(forge)])] if before else []
        last = forge.commit([wrong(forge)], index=before, sequence=sequence + 1)
        root = forge.journal([*plains, last])
        session = bytes(forge.plain[168:200])
        for still_open in (True, False):
            anchor = Anchor(open=still_open, session=session, sequence=sequence + 1, root=root)
            with pytest.raises(VolumeStale):
                open_volume(device(forge), key=Secret(KEY), uuid=UUID1, anchor=anchor)


def test_the_last_state_that_the_anchor_accepts_is_taken(disk: dict[int, bytes]) -> None:
    """Even where the disk goes on behind it (section 12, R3 d): closed, or of another session, means that one."""
    forge = only_newest(Forge(disk, KEY))
    sequence, session = forge.reader.sequence, bytes(forge.plain[168:200])
    plains = [forge.commit([entry(2, n, 1)], index=n, sequence=sequence + 1 + n) for n in range(3)]
    roots = [sha256(b"JD2R" + forge.blocks[1 + forge.reader.epoch % 2])]
    roots += [forge.journal(plains[: n + 1]) for n in range(3)]
    for at, root in enumerate(roots):
        exact = Anchor(open=False, session=session, sequence=sequence + at, root=root)
        for anchor, expected in (
            (exact, at),
            (replace(exact, open=True, session=bytes(32)), at),
            (replace(exact, open=True), 3),
            (replace(exact, root=bytes(32)), None),
            (replace(exact, root=bytes(32), open=True), 3 if at < 3 else None),
        ):
            if expected is None:
                with pytest.raises(VolumeStale):
                    open_volume(device(forge), key=Secret(KEY), uuid=UUID1, anchor=anchor)
                continue
            volume = open_volume(device(forge), key=Secret(KEY), uuid=UUID1, anchor=anchor)
            assert (volume.state.sequence, volume.state.root) == (sequence + expected, roots[expected])
            assert volume.read(0, 4 * BLOCK) == bytes(expected * BLOCK) + b"".join(map(content, range(expected, 4)))


def test_a_device_that_holds_no_journal_is_too_small(disk: dict[int, bytes]) -> None:
    for blocks in (0, 1, 8):
        with pytest.raises(VolumeMalformed, match="device"):
            open_volume(MemoryDevice(blocks * BLOCK, disk), key=Secret(KEY), uuid=UUID1, anchor=UNANCHORED)
    with pytest.raises(VolumeUnrecognised):
        open_volume(MemoryDevice(9 * BLOCK), key=Secret(KEY), uuid=UUID1, anchor=UNANCHORED)
