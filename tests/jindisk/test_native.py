"""The compiled loop over the blocks of loads and exports does what the interpreted one does, and no more."""

from __future__ import annotations

import hashlib
import os
import platform
import random
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import BinaryIO

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from jd import KEY, UUID1

from jindiskd.base.anchor import Anchor
from jindiskd.base.secret import Secret
from jindiskd.jindisk import bulk, export, native, pieces
from jindiskd.jindisk.bulk import bulk_load
from jindiskd.jindisk.crypto import Generator, SealingKey
from jindiskd.jindisk.device import FileDevice
from jindiskd.jindisk.errors import VolumeError, VolumeFenced
from jindiskd.jindisk.export import bulk_export
from jindiskd.jindisk.native import RUN, Blocks, Native
from jindiskd.jindisk.runs import SealingRun
from jindiskd.jindisk.v1 import export as export1
from jindiskd.jindisk.v1 import load as load1
from jindiskd.jindisk.v1 import volume as volume1
from jindiskd.jindisk.volume import open_volume

BLOCK, TAG = 4096, 16
WHOLE = 2**64


def has_instructions() -> bool:
    flags = Path("/proc/cpuinfo").read_text().partition("flags")[2].partition("\n")[0].split()
    return platform.machine() == "x86_64" and {"aes", "pclmulqdq"} <= set(flags)


@pytest.fixture(scope="module")
def loop() -> Native:
    """The compiled loop. Where the machine has what it needs, its absence is a fault of the installation."""
    if not has_instructions():
        pytest.skip("this processor has no instructions for AES-GCM")
    found = native.native()
    assert found is not None, "it was not built: is libipsec-mb-dev installed, and was scripts/setup run again?"
    return found


def by_one(blocks: Blocks, plain: bytes) -> tuple[bytes, bytes]:
    """Ciphertexts and tags as `cryptography` makes them, one after the other."""
    sealed, tags, index = b"", b"", 0
    for first, count in RUN.iter_unpack(blocks.runs):
        for number in range(first, first + count):
            key = blocks.keys[index * blocks.key_bytes :][: blocks.key_bytes] or blocks.keys
            key = key if len(blocks.keys) > blocks.key_bytes else blocks.keys
            nonce = bytes(12) if blocks.nonce is None else struct.pack("<QI", (blocks.nonce + index) % WHOLE, 0)
            aad = struct.pack("<Q", number).ljust(blocks.aad_bytes, b"\0")
            at = (number - blocks.base) * BLOCK
            found = AESGCM(key).encrypt(nonce, plain[at : at + BLOCK], aad)
            sealed, tags, index = sealed + found[:BLOCK], tags + found[BLOCK:], index + 1
    return sealed, tags


def seal(loop: Native, blocks: Blocks, plain: bytes, count: int) -> tuple[bytes, bytes]:
    sealed, tags = bytearray(count * BLOCK), bytearray(count * TAG)
    assert loop.seal(blocks, plain, memoryview(sealed), memoryview(tags)) == count
    return bytes(sealed), bytes(tags)


@pytest.mark.parametrize("seed", range(12))
def test_it_seals_and_opens_as_the_other_library_does(loop: Native, seed: int) -> None:
    """Some blocks of a buffer, under one key and counted nonces or a key each, of both lengths, at any number."""
    rng = random.Random(seed)
    total, base = rng.randrange(1, 20), rng.choice([0, 7, 2**40, WHOLE - 20])
    chosen = sorted(rng.sample(range(total), rng.randrange(1, total + 1)))
    runs = b"".join(RUN.pack(base + at, 1) for at in chosen)
    if seed % 3 == 0:
        chosen, runs = list(range(total)), RUN.pack(base, total)
    key_bytes = 32 if seed % 2 else 16
    keys = rng.randbytes(key_bytes * (len(chosen) if seed % 4 < 2 else 1))
    nonce, aad_bytes = (None, 20) if seed % 4 < 2 else (rng.randrange(2**63), 8)
    blocks, plain = Blocks(keys, key_bytes, nonce, runs, base, aad_bytes), rng.randbytes(total * BLOCK)
    sealed, tags = seal(loop, blocks, plain, len(chosen))
    assert (sealed, tags) == by_one(blocks, plain)
    for step in (TAG, 24):
        apart = b"".join(tags[at : at + TAG].ljust(step, b"x") for at in range(0, len(tags), TAG))
        opened = bytearray(total * BLOCK)
        assert loop.unseal(blocks, sealed, apart, memoryview(opened), tag_step=step) == len(chosen)
        for at in range(total):
            want = plain[at * BLOCK : (at + 1) * BLOCK] if at in chosen else bytes(BLOCK)
            assert opened[at * BLOCK : (at + 1) * BLOCK] == want


def test_what_was_touched_does_not_open(loop: Native) -> None:
    """Each bit that counts: of ciphertext, tag, number, nonce, key; and nothing of that block is handed out."""
    key, plain, count = os.urandom(32), os.urandom(3 * BLOCK), 3
    blocks = Blocks(key, 32, 5, RUN.pack(9, count), 9)
    sealed, tags = seal(loop, blocks, plain, count)
    flipped = bytes([key[0] ^ 1]) + key[1:]
    cases = [
        (sealed, tags, blocks._replace(nonce=6), 0),
        (sealed, tags, blocks._replace(runs=RUN.pack(10, count), base=10), 0),
        (sealed, tags, blocks._replace(keys=flipped), 0),
        (sealed, tags, blocks._replace(aad_bytes=9), 0),
    ]
    for bit in (0, 1000, BLOCK * 8 - 1, BLOCK * 8, BLOCK * 8 * 2 + 77, BLOCK * 24 - 1):
        changed = bytearray(sealed)
        changed[bit // 8] ^= 1 << bit % 8
        cases.append((bytes(changed), tags, blocks, bit // (BLOCK * 8)))
    for bit in range(0, count * TAG * 8, 5):
        changed = bytearray(tags)
        changed[bit // 8] ^= 1 << bit % 8
        cases.append((sealed, bytes(changed), blocks, bit // (TAG * 8)))
    for data, marks, with_what, bad in cases:
        opened = bytearray(b"?" * count * BLOCK)
        assert loop.unseal(with_what, data, marks, memoryview(opened), tag_step=TAG) == bad
        assert opened[: bad * BLOCK] == plain[: bad * BLOCK]
        assert opened[bad * BLOCK :] == bytes(BLOCK) + b"?" * (count - bad - 1) * BLOCK


def bad_blocks() -> Iterator[tuple[str, Blocks, int, int]]:
    """What is wrong, the blocks, how many the buffer of plaintexts has, and for how many there is room."""
    good = Blocks(bytes(32), 32, 0, RUN.pack(10, 4), 10)
    yield "a block before the plaintexts", good._replace(base=11), 8, 8
    yield "a block behind the plaintexts", good, 3, 8
    yield "a number far away", good._replace(runs=RUN.pack(WHOLE - 1, 1)), 8, 8
    yield "numbers that wrap around", good._replace(runs=RUN.pack(WHOLE - 1, 2**32 - 1), base=WHOLE - 1), 8, 8
    yield "a length that wraps around", good._replace(runs=RUN.pack(10, 2**32 - 1)), 8, 8
    yield "too little room", good, 8, 3
    yield "too little room for the second run", good._replace(runs=RUN.pack(10, 4) + RUN.pack(10, 4)), 8, 7
    yield "a run that is cut off", good._replace(runs=RUN.pack(10, 4)[:-1]), 8, 8
    yield "no key", good._replace(keys=b""), 8, 8
    yield "half a key", good._replace(keys=bytes(48)), 8, 8
    yield "too few keys", good._replace(keys=bytes(96)), 8, 8
    yield "a key of another length", good._replace(keys=bytes(24), key_bytes=24), 8, 8
    yield "too little associated data", good._replace(aad_bytes=7), 8, 8
    yield "too much associated data", good._replace(aad_bytes=25), 8, 8


@pytest.mark.parametrize(("blocks", "plain", "room"), [pytest.param(*c[1:], id=c[0]) for c in bad_blocks()])
def test_nothing_outside_the_buffers_is_touched(loop: Native, blocks: Blocks, plain: int, room: int) -> None:
    """Refused before the first byte is written."""
    texts, sealed, tags = bytearray(plain * BLOCK), bytearray(room * BLOCK), bytearray(room * TAG)
    with pytest.raises(ValueError):
        loop.seal(blocks, texts, memoryview(sealed), memoryview(tags))
    with pytest.raises(ValueError):
        loop.unseal(blocks, sealed, tags, memoryview(texts), tag_step=TAG)
    assert not any(texts)
    assert not any(sealed)
    assert not any(tags)


def test_short_tags_and_read_only_rooms_are_refused(loop: Native) -> None:
    """Tags need 16 bytes each, the last included; what is written to can be written."""
    blocks = Blocks(bytes(32), 32, 0, RUN.pack(0, 2), 0)
    text = memoryview(bytearray(2 * BLOCK))
    for tags, step in ((bytes(31), 16), (bytes(24 + 15), 24), (bytes(32), 15)):
        with pytest.raises(ValueError):
            loop.unseal(blocks, bytes(2 * BLOCK), tags, text, tag_step=step)
    with pytest.raises(BufferError):
        loop.seal(blocks, text, memoryview(bytes(2 * BLOCK)), memoryview(bytearray(32)))
    with pytest.raises(ValueError):
        loop.following(bytes(24), 1, step=7)


def test_it_tells_runs_of_data(loop: Native) -> None:
    """As the interpreted code does: of every pattern of ten blocks, where one byte, the first or last, makes data."""
    rng = random.Random(3)
    for pattern in range(1 << 10):
        room = pieces.PieceBuffer()
        for at in range(10):
            if pattern >> at & 1:
                room.view[at * BLOCK + rng.choice((0, 1, 8, BLOCK - 1))] = rng.randrange(1, 256)
        want = b"".join(RUN.pack(5 + start, length) for start, length in room.runs(10))
        assert loop.data_runs(room.view[: 10 * BLOCK], 5) == want
    assert loop.data_runs(b"", 5) == b""


def test_it_counts_entries_that_follow_each_other(loop: Native) -> None:
    """No more than there are, and no more than asked for."""
    entries = b"".join(struct.pack("<Q16x", raw) for raw in (7, 8, 9, 11, 12, 12))
    assert loop.following(entries, 99, step=24) == 3
    assert loop.following(entries, 2, step=24) == 2
    assert loop.following(entries[3 * 24 :], 99, step=24) == 2
    assert loop.following(entries[5 * 24 :], 99, step=24) == 1
    assert loop.following(b"", 99, step=24) == 0
    assert loop.following(struct.pack("<Q", WHOLE - 1) + bytes(8), 99, step=8) == 2, "as a number of 64 bits"


def image(path: Path, size: int) -> Path:
    """Long runs, single blocks, zeros and holes."""
    rng = random.Random(11)
    with path.open("wb") as file:
        file.truncate(size)
        for start, length in ((0, 3 << 20), (5 << 20, 700 * BLOCK)):
            file.seek(start)
            file.write(rng.randbytes(length))
        for _ in range(300):
            file.seek((9 << 20) + rng.randrange(1000) * BLOCK)
            file.write(rng.randbytes(BLOCK))
        file.write(bytes(1 << 20))
    return path


def volume2(source: Path, target: Path, size: int) -> Callable[[BinaryIO, BinaryIO], object]:
    """Load a volume; returns what exports it."""
    with source.open("rb") as fd, target.open("x+b") as room:
        anchor: Anchor = bulk_load(
            fd.fileno(), room.fileno(), size_bytes=size, key=Secret(KEY), uuid=UUID1, session_id=b"s" * 32, timestamp=5,
            workers=2, entropy=lambda n: b"e" * n,
        )  # fmt: skip

    def exported(volume: BinaryIO, out: BinaryIO) -> None:
        device = FileDevice(volume.fileno(), name="volume")
        bulk_export(open_volume(device, key=Secret(KEY), uuid=UUID1, anchor=anchor), out.fileno(), workers=1)

    return exported


def volume_of_version_1(source: Path, target: Path, size: int) -> Callable[[BinaryIO, BinaryIO], object]:
    """As `volume2`."""
    key, drawn = Secret(bytes(range(28))), random.Random(5)
    with source.open("rb") as fd, target.open("x+b") as room:
        load1.bulk_load(fd.fileno(), room.fileno(), size_bytes=size, key=key, workers=2, entropy=drawn.randbytes)

    def exported(volume: BinaryIO, out: BinaryIO) -> None:
        opened = volume1.open_volume(FileDevice(volume.fileno(), name="volume"), key=key)
        export1.bulk_export(opened, out.fileno(), workers=1)

    return exported


def content(path: Path) -> dict[int, bytes]:
    """Digests of the blocks that are not zero. A volume of version 1 is many GiB of hole."""
    found = {}
    with path.open("rb") as file:
        for first, count in pieces.data_pieces(file.fileno(), 0, path.stat().st_size // BLOCK):
            data = os.pread(file.fileno(), count * BLOCK, first * BLOCK)
            for at in range(0, len(data), BLOCK):
                if any(data[at : at + BLOCK]):
                    found[first * BLOCK + at] = hashlib.sha256(data[at : at + BLOCK]).digest()
    return found


@pytest.mark.parametrize("make", [volume2, volume_of_version_1])
def test_a_volume_is_the_same_with_it_and_without(
    loop: Native, make: Callable[..., Callable[[BinaryIO, BinaryIO], object]], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Block for block; and each exports the same, and finds the same damage."""
    source, volumes = image(tmp_path / "image", 32 << 20), []
    exporting: list[Callable[[BinaryIO, BinaryIO], object]] = []
    choices = (lambda: loop, lambda: None)

    def choose(number: int) -> None:
        for module in (bulk, export, load1, export1):
            monkeypatch.setattr(module, "native", choices[number])

    for number in range(2):
        choose(number)
        volumes.append(tmp_path / f"volume{number}")
        exporting.append(make(source, volumes[-1], 32 << 20))
    blocks = content(volumes[0])
    assert blocks == content(volumes[1])

    def exported(number: int) -> bytes | str:
        choose(number)
        with volumes[0].open("rb") as volume, (tmp_path / "out").open("w+b") as out:
            try:
                exporting[number](volume, out)
            except VolumeError as exc:
                return str(exc)
            out.seek(0)
            return out.read()

    assert exported(0) == exported(1) == source.read_bytes()
    rng, found = random.Random(1), list[bytes | str]()
    for _ in range(6):
        at = rng.choice(list(blocks)) + rng.randrange(BLOCK)
        with volumes[0].open("r+b") as volume:
            (byte,) = os.pread(volume.fileno(), 1, at)
            os.pwrite(volume.fileno(), bytes([byte ^ 1 << rng.randrange(8)]), at)
            found.append(exported(0))
            assert found[-1] == exported(1)
            os.pwrite(volume.fileno(), bytes([byte]), at)
    assert sum(" block " in words for words in found if isinstance(words, str)) > 2, "too little was met"


def test_a_key_given_away_seals_no_more(loop: Native) -> None:
    """The rule of keys holds for the compiled loop as well."""
    key, room = Generator(Secret(KEY), b"s" * 32, os.urandom).sealing_key(), SealingRun(2)
    plain, runs = memoryview(bytes(2 * BLOCK)), memoryview(RUN.pack(0, 2))
    assert key.seal_blocks(loop, 1, runs, base=0, plain=plain, room=room) == 2
    given = key.hand_over()
    with pytest.raises(VolumeFenced):
        key.seal_blocks(loop, 3, runs, base=0, plain=plain, room=room)
    assert SealingKey.take_over(given).seal_blocks(loop, 3, runs, base=0, plain=plain, room=room) == 2


@pytest.mark.parametrize("fault", ["not built", "no instructions", "seals wrongly", "opens anything"])
def test_without_it_or_where_it_errs_everything_goes_on(
    loop: Native, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is looked at once, before it is used: what does not agree with `cryptography` is left alone."""
    real = native.importlib.import_module("jindiskd.jindisk._native")

    class Wrong:
        def __getattr__(self, name: str) -> object:
            if name == "ready" and fault == "no instructions":
                return lambda: 0
            if name == "seal" and fault == "seals wrongly":
                return lambda *_: None
            if name == "unseal" and fault == "opens anything":
                return lambda *_: 1
            return getattr(real.lib, name)

    def importing(_name: str) -> object:
        if fault == "not built":
            raise ImportError
        return SimpleNamespace(ffi=real.ffi, lib=Wrong())

    monkeypatch.setattr(native, "importlib", SimpleNamespace(import_module=importing))
    assert native.native.__wrapped__() is None
