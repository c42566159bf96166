"""How fast JinDisk 2 loads, exports, opens and writes, beside the cipher alone, `cp`, and LUKS by `qemu-img`.

    .venv/bin/python bench/jindisk/engine.py [--mib 1024] [--runs 3] [--workers N] [--scratch DIR] [--large]

Each line: MiB a second by the clock, and seconds of processor time for the whole amount; ratios at the end. A load ends
when all is on the disk, and so does what says "flush"; the others leave it in the page cache. Every run reads a source
that is in the page cache; targets are new files, or with "again" files that have their blocks. The fastest of the runs
counts, by clock and by processor: others slow one down, nothing speeds one up. `--large` also makes the map of a full
64 GiB volume, without the data, and measures opening, memory, and random writes on it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from uuid import UUID

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from jindiskd.base.anchor import Anchor
from jindiskd.base.secret import Secret
from jindiskd.jindisk import bulk
from jindiskd.jindisk.anchor import UNANCHORED
from jindiskd.jindisk.bulk import bulk_load
from jindiskd.jindisk.crypto import Generator
from jindiskd.jindisk.device import FileDevice
from jindiskd.jindisk.export import bulk_export
from jindiskd.jindisk.geometry import BLOCK, default_geometry
from jindiskd.jindisk.native import RUN, Blocks, Native, native
from jindiskd.jindisk.pool import Pool
from jindiskd.jindisk.session import Session
from jindiskd.jindisk.volume import open_volume

MIB = 1 << 20
KEY, VOLUME, SESSION = bytes(range(32)), UUID(int=1), bytes(32)
SECRET = "secret,id=key,data=measured"
LUKS_HEADER = 2 * MIB
STEP = 64 * BLOCK
LARGE_BLOCKS = (64 << 30) // BLOCK


def processor_seconds() -> float:
    return sum(
        usage.ru_utime + usage.ru_stime
        for usage in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


class Bench:
    """Runs things, and remembers the best clock and processor time of each."""

    def __init__(self, mib: int, runs: int) -> None:
        self.mib, self.runs = mib, runs
        self.best: dict[str, tuple[float, float]] = {}

    def measure(self, name: str, action: Callable[[], object], before: Callable[[], None] = lambda: None) -> None:
        for _ in range(self.runs):
            before()
            clock, processor = time.monotonic(), processor_seconds()
            action()
            took = time.monotonic() - clock, processor_seconds() - processor
            best = self.best.get(name, took)
            self.best[name] = min(best[0], took[0]), min(best[1], took[1])
        seconds, processor = self.best[name]
        print(f"{name:<44} {self.mib / seconds:8.0f} MiB/s {processor:8.2f} s of processor", flush=True)

    def ratio(self, name: str, peer: str) -> str:
        (clock, processor), (peer_clock, peer_processor) = self.best[name], self.best[peer]
        return f"{name} / {peer}: {peer_clock / clock:.2f} by the clock, {peer_processor / processor:.2f} by processor"


def cipher(source: int, target: int | None, size: int, workers: int, loop: Native | None = None) -> None:
    """AES-256-GCM over the source in blocks of 4096 bytes; with a target, the ciphertext is written too.

    By `cryptography`, a call a block; or by the compiled loop.
    """
    share = -(-size // workers // STEP) * STEP
    plain, sealed, tags = bytearray(STEP), bytearray(STEP + 16), memoryview(bytearray(STEP // 256))

    def by_loop(task: bytes) -> bytes:
        key, start = os.urandom(32), int(task)
        with memoryview(sealed) as out:
            for at in range(start, min(start + share, size), STEP):
                os.preadv(source, [plain], at)
                runs = RUN.pack(at // BLOCK, STEP // BLOCK)
                loop.seal(Blocks(key, 32, at // BLOCK, runs, at // BLOCK), plain, out[:STEP], tags)
        return b""

    def work(task: bytes) -> bytes:
        key, start = AESGCM(os.urandom(32)), int(task)
        with memoryview(plain) as view, memoryview(sealed) as out:
            for at in range(start, min(start + share, size), STEP):
                os.preadv(source, [plain], at)
                for block in range(0, STEP, BLOCK):
                    number = (at + block) // BLOCK
                    key.encrypt_into(
                        number.to_bytes(12, "little"), view[block : block + BLOCK], number.to_bytes(8, "little"),
                        out[block : block + BLOCK + 16],
                    )  # fmt: skip
                if target is not None:
                    os.pwrite(target, out[:STEP], at)
        return b""

    with Pool(work if loop is None else by_loop, workers) as pool:
        for start in range(0, size, share):
            pool.give(b"%d" % start)
        while pool.waiting:
            pool.next()


def images(bench: Bench, folder: Path, workers: int) -> None:
    """Loading and exporting, and the peers."""
    size, source, volume, out = bench.mib * MIB, folder / "source", folder / "volume", folder / "out"
    with source.open("wb") as file:
        for _ in range(bench.mib):
            file.write(os.urandom(MIB))
    sealed, luks = folder / "sealed", folder / "luks"
    anchor: list[Anchor] = []

    def load() -> None:
        with source.open("rb") as a, volume.open("r+b" if volume.exists() else "x+b") as b:
            anchor[:] = [
                bulk_load(
                    a.fileno(), b.fileno(), size_bytes=size, key=Secret(KEY), uuid=VOLUME, session_id=SESSION,
                    timestamp=0, workers=workers,
                )
            ]  # fmt: skip

    def export() -> None:
        with volume.open("rb") as a, out.open("r+b" if out.exists() else "x+b") as b:
            opened = open_volume(
                FileDevice(a.fileno(), name="volume"), key=Secret(KEY), uuid=VOLUME, anchor=anchor[0]
            )
            bulk_export(opened, b.fileno(), workers=workers)

    def with_cipher(target: Path | None, *, flush: bool = False) -> None:
        with source.open("rb") as a:
            if target is None:
                cipher(a.fileno(), None, size, workers)
            else:
                with target.open("r+b" if target.exists() else "x+b") as b:
                    cipher(a.fileno(), b.fileno(), size, workers)
                    if flush:
                        os.fdatasync(b.fileno())

    def run(*command: object) -> None:
        subprocess.run([os.fspath(part) for part in command], check=True)  # type: ignore[call-overload]  # str or Path

    def drop(*paths: Path) -> Callable[[], None]:
        return lambda: [path.unlink(missing_ok=True) for path in paths] and None

    bench.measure("AES-GCM: read, seal", lambda: with_cipher(None))
    if (loop := native()) is not None:

        def with_loop() -> None:
            with source.open("rb") as a:
                cipher(a.fileno(), None, size, workers, loop)

        bench.measure("AES-GCM, compiled loop: read, seal", with_loop)
    bench.measure("AES-GCM: read, seal, write", lambda: with_cipher(sealed), drop(sealed))
    bench.measure("AES-GCM: read, seal, write again", lambda: with_cipher(sealed))
    bench.measure("AES-GCM: read, seal, write, flush", lambda: with_cipher(sealed, flush=True), drop(sealed))
    sealed.unlink()
    bench.measure("JinDisk 2: load", load, drop(volume))
    bench.measure("JinDisk 2: load again", load)
    bench.measure("JinDisk 2: export", export, drop(out))
    bench.measure("JinDisk 2: export again", export)
    assert subprocess.run(["cmp", source, out], check=False).returncode == 0, "the export differs"
    volume.unlink()
    bench.measure("cp", lambda: run("cp", "--sparse=always", "--reflink=never", source, out), drop(out))
    # The header by cryptsetup: QEMU refuses to make one where it cannot time its key derivation.
    format_luks = ("cryptsetup", "luksFormat", "--batch-mode", "--type=luks1", "--pbkdf-force-iterations=1000")

    def new_luks() -> None:
        luks.unlink(missing_ok=True)
        with luks.open("xb") as file:
            file.truncate(size + LUKS_HEADER)
        subprocess.run([*format_luks, "--key-file=-", luks], input=b"measured", check=True)

    options = f"driver=luks,key-secret=key,file.filename={luks}"
    convert = ("qemu-img", "convert", "--object", SECRET)
    to_luks = (*convert, "-n", "-f", "raw", "--target-image-opts", source, options)
    bench.measure("LUKS by qemu-img: load", lambda: run(*to_luks), new_luks)
    from_luks = (*convert, "--image-opts", options, "-O", "raw", out)
    bench.measure("LUKS by qemu-img: export", lambda: run(*from_luks), drop(out))
    assert subprocess.run(["cmp", source, out], check=False).returncode == 0, "LUKS: the export differs"
    for peer in ("AES-GCM: read, seal", "AES-GCM: read, seal, write, flush", "cp", "LUKS by qemu-img: load"):
        print(bench.ratio("JinDisk 2: load", peer))
    for peer in ("AES-GCM: read, seal", "AES-GCM: read, seal, write", "cp", "LUKS by qemu-img: export"):
        print(bench.ratio("JinDisk 2: export", peer))
    print(bench.ratio("JinDisk 2: export again", "AES-GCM: read, seal, write again"))


def full_map(path: Path) -> None:
    """A 64 GiB volume whose every block is mapped. The data themselves are not written."""
    geometry = default_geometry(LARGE_BLOCKS)
    with path.open("x+b") as file:
        file.truncate(geometry.end * BLOCK)
        device = FileDevice(file.fileno(), name="volume")
        loader = bulk._Loader(device, geometry, Generator(Secret(KEY), SESSION, os.urandom), ordered=False)
        size = geometry.segment_blocks
        for lba in range(0, LARGE_BLOCKS, size):
            piece = bulk._Piece(lba + size, list(loader._assign([(lba, size)])))
            loader._take(piece, os.urandom(size * 16))
        loader._place_full(everything=True)
        loader.finish(key=Secret(KEY), uuid=VOLUME, session_id=SESSION, timestamp=0, label="")


LARGE = """
import json, resource, sys, time
sys.path.insert(0, sys.argv[2])
import engine
print(json.dumps(engine.use_large(sys.argv[1])))
"""


def use_large(path: str) -> dict[str, float]:
    """In a process of its own: open, write, checkpoint; seconds and MiB."""
    rng, found = random.Random(1), {}

    def memory() -> float:
        return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)

    def timed(name: str, action: Callable[[], object]) -> object:
        start = time.monotonic()
        result = action()
        found[name] = round(time.monotonic() - start, 3)
        return result

    found["memory before, MiB"] = memory()
    with Path(path).open("r+b") as file:
        device = FileDevice(file.fileno(), name="volume")
        volume = open_volume(device, key=Secret(KEY), uuid=VOLUME, anchor=UNANCHORED)
        start = time.monotonic()
        volume = open_volume(device, key=Secret(KEY), uuid=VOLUME, anchor=UNANCHORED)
        found["open for reading, s"] = round(time.monotonic() - start, 3)
        session = Session(volume, session_id=SESSION)
        timed("begin a session (slots collected, checkpoint), s", session.begin)
        found["memory open, MiB"] = memory()
        data = random.Random(2).randbytes(BLOCK)

        def write() -> None:
            for _ in range(60_000):
                session.write(rng.randrange(LARGE_BLOCKS) * BLOCK, data)
            session.flush()

        timed("60000 random writes, one flush, s", write)
        timed("their checkpoint, s", session.checkpoint)
        timed("60000 more", write)
        timed("their checkpoint", session.checkpoint)
        found["memory after 120000 random writes, MiB"] = memory()
        timed("close, s", session.close)
        timed("open again, s", lambda: open_volume(device, key=Secret(KEY), uuid=VOLUME, anchor=UNANCHORED))
    return found


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--scratch", type=Path, default=Path("/dev/shm"))
    parser.add_argument("--large", action="store_true")
    arguments = parser.parse_args()
    print(f"{arguments.mib} MiB, {arguments.workers} processes, in {arguments.scratch}")
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as folder:
        images(Bench(arguments.mib, arguments.runs), Path(folder), arguments.workers)
    if arguments.large:
        with tempfile.TemporaryDirectory(dir=arguments.scratch) as folder:
            path, start = Path(folder) / "volume", time.monotonic()
            full_map(path)
            print(f"the map of a full 64 GiB volume: {time.monotonic() - start:.1f} s, "
                  f"{path.stat().st_blocks * 512 / MIB:.0f} MiB on the disk")  # fmt: skip
            here = os.fspath(Path(__file__).parent)
            command = [sys.executable, "-c", LARGE, os.fspath(path), here]
            result = subprocess.run(command, check=True, stdout=subprocess.PIPE)
            for name, value in json.loads(result.stdout).items():
                print(f"{name:<52} {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
