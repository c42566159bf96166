"""The bytes are those of the format document: golden volumes, and a second reader that shares no code (section 22)."""

import hashlib
import json
import os
import random
import struct
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from jd import KEY, UUID1, ZERO, MemoryDevice, small_geometry
from jd_crash import Run, anchored, crashes
from jd_reader import Reader, Wrong

from jindiskd.base.anchor import Anchor
from jindiskd.base.secret import Secret
from jindiskd.jindisk import crypto
from jindiskd.jindisk.anchor import UNANCHORED
from jindiskd.jindisk.bulk import bulk_load
from jindiskd.jindisk.create import create_volume
from jindiskd.jindisk.device import FileDevice
from jindiskd.jindisk.errors import VolumeStale
from jindiskd.jindisk.export import bulk_export
from jindiskd.jindisk.geometry import BLOCK, default_geometry
from jindiskd.jindisk.recovery import recover
from jindiskd.jindisk.session import Session
from jindiskd.jindisk.volume import open_volume

GOLDEN = Path(__file__).parent / "golden.json"
SESSION = b"\xa5" * 32


def read_all(reader: Reader, count: int) -> bytes:
    return b"".join(reader.read(lba) for lba in range(count))


def tuple_of(anchor: Anchor) -> tuple[bool, bytes, int, bytes]:
    return anchor.open, anchor.session, anchor.sequence, anchor.root


def plain(number: int) -> bytes:
    return bytes((number * 31 + 7 * i) % 251 for i in range(BLOCK))


def scripted() -> dict[str, dict[str, str]]:
    """A fixed volume at five points of its life: the digest of each region of the disk."""
    geometry = small_geometry()
    device = MemoryDevice(geometry.end * BLOCK)
    found = {}

    regions = {
        "identification": (0, 1),
        "superblock 0": (1, 2),
        "superblock 1": (2, 3),
        "journal": (3, geometry.meta_start),
        "pages": (geometry.meta_start, geometry.data_start),
        "data": (geometry.data_start, geometry.end),
    }

    def note(name: str) -> None:
        found[name] = {
            region: hashlib.sha256(device.pread(start * BLOCK, (end - start) * BLOCK)).hexdigest()
            for region, (start, end) in regions.items()
        }

    session = create_volume(
        device, geometry=geometry, key=Secret(KEY), uuid=UUID1, session_id=SESSION, label="golden",
        entropy=bytes, clock=lambda: 1_700_000_000, ordered_placement=True,
    )  # fmt: skip
    note("formatted")
    session.write(0, b"".join(map(plain, range(200))))
    session.write(4000 * BLOCK + 100, b"in part")
    session.flush()
    session.zero(5 * BLOCK, 180 * BLOCK)
    session.write(3 * BLOCK, plain(1000))
    session.flush()
    note("two commits, one ordered")
    session.checkpoint()
    note("a checkpoint")
    session.write(170 * BLOCK, b"".join(map(plain, range(300, 340))))
    session.flush()
    session.close()
    note("closed")
    again = Session(
        open_volume(device, key=Secret(KEY), uuid=UUID1, anchor=UNANCHORED),
        session_id=b"\x5a" * 32, entropy=bytes, clock=lambda: 1_700_000_001, ordered_placement=True,
    )  # fmt: skip
    again.begin()
    again.write(9 * BLOCK, plain(9))
    again.flush()
    note("a second session")
    return found


def loaded(folder: Path) -> str:
    """The digest of a whole volume that was loaded from a fixed image."""
    image = folder / "image"
    with image.open("wb") as file:
        file.truncate(20 << 20)
        for start, count in ((0, 100), (1000, 1500), (5000, 1)):
            file.seek(start * BLOCK)
            file.write(b"".join(map(plain, range(start, start + count))))
    with image.open("rb") as source, (folder / "volume").open("w+b") as target:
        bulk_load(
            source.fileno(), target.fileno(), size_bytes=20 << 20, key=Secret(KEY), uuid=UUID1, session_id=SESSION,
            timestamp=1_700_000_000, entropy=bytes, workers=1, ordered_placement=True,
        )  # fmt: skip
        target.seek(0)
        return hashlib.file_digest(target, "sha256").hexdigest()


def test_golden_volumes(tmp_path: Path) -> None:
    """With a fixed generator, the same bytes as ever: a difference is a change of the format or of the writer's order.

    With JINDISK_REGENERATE=1 in the environment the file is written anew, for its difference to be reviewed.
    """
    found = {"scripted": scripted(), "loaded": loaded(tmp_path)}
    if os.environ.get("JINDISK_REGENERATE") == "1":
        GOLDEN.write_text(json.dumps(found, indent=1) + "\n")
    assert found == json.loads(GOLDEN.read_text())


class Older:
    """The cipher of a cryptography library before it could work in place."""

    def __init__(self, key: bytes) -> None:
        self._aead = AESGCM(key)
        self.encrypt, self.decrypt = self._aead.encrypt, self._aead.decrypt


def test_older_libraries_give_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Distributions ship libraries without sealing in place; what a guest has must not matter."""
    monkeypatch.setattr(crypto, "AESGCM", Older)
    assert {"scripted": scripted(), "loaded": loaded(tmp_path)} == json.loads(GOLDEN.read_text())
    here = (tmp_path / "volume").open("rb")
    with here, (tmp_path / "out").open("w+b") as out:
        device = FileDevice(here.fileno(), name="volume")
        bulk_export(open_volume(device, key=Secret(KEY), uuid=UUID1, anchor=UNANCHORED), out.fileno(), workers=1)
    assert (tmp_path / "out").read_bytes() == (tmp_path / "image").read_bytes()


def test_the_second_reader_reads_a_loaded_volume(tmp_path: Path) -> None:
    loaded(tmp_path)
    raw = (tmp_path / "volume").read_bytes()
    reader = Reader(lambda n: raw[n * BLOCK : (n + 1) * BLOCK], KEY, UUID1.bytes, None)
    assert read_all(reader, 5120) == (tmp_path / "image").read_bytes()
    assert default_geometry(5120).end == reader.end
    # R, which only cleaning needs: every mapped block is pointed back at.
    entries = {n * 512 + at: value for n, page in reader.leaves(2).items() for at, value in enumerate(_u64s(page))}
    assert all(entries[place - reader.data_start] == lba + 1 for lba, (place, _) in reader.map.items())


def _u64s(page: bytes) -> tuple[int, ...]:
    return struct.unpack("<512Q", page)


def test_both_readers_agree_on_what_crashes_leave() -> None:
    """The same state, by sequence number and root, and the same content, whatever of the last writes arrived."""
    for seed, full in ((21, False), (22, True)):
        recorded = Run(seed=seed, full=full).record(80)
        rng, count, tails = random.Random(seed), 0, 0
        for crash in crashes(recorded, rng, share=0.3 if not full else 0.04, subsets=2, exhaustive=False):
            anchor = crash.mark.broker.anchor
            assert anchor is not None
            reader = Reader(lambda n, held=crash.blocks: held.get(n, ZERO), KEY, None, tuple_of(anchor))
            state = anchored(recorded, crash)
            assert (reader.sequence, reader.root) == (state.sequence, state.root)
            device = MemoryDevice(recorded.device.size_bytes, crash.blocks)
            volume = open_volume(device, key=Secret(KEY), uuid=UUID1, anchor=anchor)
            assert read_all(reader, recorded.span) == volume.read(0, recorded.span * BLOCK)
            tails += bool(reader.commits[1:])
            count += 1
        assert count > 15
        assert tails


def test_both_readers_refuse_the_same() -> None:
    """Old disks under new anchors."""
    recorded = Run(seed=23).record(60)
    first, last = recorded.device.base, recorded.world.broker.anchor
    assert last is not None
    with pytest.raises(Wrong, match="stale"):
        Reader(lambda n: first.get(n, ZERO), KEY, None, tuple_of(last))
    device = MemoryDevice(recorded.device.size_bytes, first)
    with pytest.raises(VolumeStale):
        recover(device, key=Secret(KEY), uuid=UUID1, anchor=last, where="here")
