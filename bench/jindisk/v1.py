"""How fast JinDisk 1 volumes are loaded and exported, beside the cipher alone on the same bytes and cores.

    .venv/bin/python bench/jindisk/v1.py [--megabytes 512] [--runs 3] [--workers N] [--scratch DIR]

Prints one JSON object: megabytes (10^6) a second, and ratios to the cipher of the same run: one AES-128-GCM call for
each block of 4096 bytes, in as many processes; from memory under one key, and with a key for each block, as the format
has it; and with such keys from file to file ("floor"), which is what a load cannot do without. Loading ends with the
data on the disk, exporting and the floor with them in the page cache.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from jindiskd.base.secret import Secret
from jindiskd.jindisk.device import OpenFile
from jindiskd.jindisk.v1.export import bulk_export
from jindiskd.jindisk.v1.load import bulk_load
from jindiskd.jindisk.v1.session import open_session
from jindiskd.jindisk.v1.volume import open_volume

BLOCK = 4096
STEP = 64
KEY = Secret(bytes(range(28)))


def timed(work: Callable[..., object], *arguments: object, **options: object) -> float:
    start = time.monotonic()
    work(*arguments, **options)
    return time.monotonic() - start


def cipher(blocks: int, workers: int, *, keys: bool) -> None:
    """The floor; `keys`: a new one for each block."""
    children = []
    for _ in range(workers):
        pid = os.fork()
        if pid == 0:
            key, data, aad = AESGCM(bytes(16)), os.urandom(BLOCK), bytes(20)
            for number in range(blocks // workers):
                (AESGCM(data[:16]) if keys else key).encrypt(number.to_bytes(12, "little"), data, aad)
            os._exit(0)
        children.append(pid)
    for pid in children:
        os.waitpid(pid, 0)


def floor(source: int, target: int, blocks: int, workers: int) -> None:
    """Read, seal under a key for each block, write, and nothing else."""
    children = []
    for worker in range(workers):
        pid = os.fork()
        if pid == 0:
            plain, sealed = bytearray(STEP * BLOCK), memoryview(bytearray(STEP * BLOCK + 16))
            parts, keys, aad = memoryview(plain), os.urandom(16 * STEP), bytes(20)
            for at in range(worker * STEP, blocks, workers * STEP):
                os.preadv(source, [plain], at * BLOCK)
                for number in range(STEP):
                    start = number * BLOCK
                    AESGCM(keys[number * 16 : number * 16 + 16]).encrypt_into(
                        bytes(12), parts[start : start + BLOCK], aad, sealed[start : start + BLOCK + 16]
                    )
                os.pwrite(target, sealed[: min(STEP, blocks - at) * BLOCK], at * BLOCK)
            os._exit(0)
        children.append(pid)
    for pid in children:
        os.waitpid(pid, 0)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--megabytes", type=int, default=512)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--scratch", type=Path, default=Path("/var/tmp"))
    arguments = parser.parse_args()
    workers = arguments.workers
    size = arguments.megabytes * 1_000_000 // BLOCK * BLOCK
    times: dict[str, list[float]] = {
        name: [] for name in ("cipher", "cipher_and_keys", "floor", "load", "export", "open", "open_for_writing")
    }
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as name:
        folder = Path(name)
        with (folder / "clear").open("w+b") as clear:
            piece = random.Random(1).randbytes(1 << 20)
            while clear.tell() < size:
                clear.write(piece[: size - clear.tell()])
            clear.flush()
            for _ in range(arguments.runs):
                times["cipher"].append(timed(cipher, size // BLOCK, workers, keys=False))
                times["cipher_and_keys"].append(timed(cipher, size // BLOCK, workers, keys=True))
                with (folder / "sealed").open("w+b") as target:
                    spent = timed(floor, clear.fileno(), target.fileno(), size // BLOCK, workers)
                times["floor"].append(spent)
                (folder / "sealed").unlink()
                with (folder / "volume").open("w+b") as target:
                    options = {"size_bytes": size, "key": KEY, "workers": workers}
                    times["load"].append(timed(bulk_load, clear.fileno(), target.fileno(), **options))
                with OpenFile(folder / "volume", writable=True) as device, (folder / "out").open("w+b") as out:
                    times["open"].append(timed(open_volume, device, key=KEY))
                    volume = open_volume(device, key=KEY)
                    times["export"].append(timed(bulk_export, volume, out.fileno(), workers=workers))
                    times["open_for_writing"].append(timed(open_session, device, key=KEY))
    middle = {name: statistics.median(values) for name, values in times.items()}
    shown = ("cipher", "cipher_and_keys", "floor", "load", "export")
    rates = {name: round(size / middle[name] / 1e6) for name in shown}
    result = {
        "megabytes": size // 1_000_000,
        "workers": workers,
        "mb_per_s": rates,
        "ratio_to_floor": {name: round(middle["floor"] / middle[name], 2) for name in ("load", "export")},
        "ratio_to_cipher": {name: round(middle["cipher"] / middle[name], 2) for name in ("load", "export")},
        "seconds": {name: round(middle[name], 3) for name in ("open", "open_for_writing")},
    }
    print(json.dumps(result, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
