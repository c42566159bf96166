"""I/O over NBD: our server beside `nbdkit file` on a plain file and qemu's LUKS driver behind qemu-nbd.

    .venv/bin/python bench/jindisk/nbd.py [--size-mib 512] [--seconds 5] [--runs 3] [--scratch DIR]

Prints one JSON object: for each server and load the requests or MiB a second and the server's processor time in
microseconds for each request, medians of the runs, and the ratios of ours to the others'. All servers serve the same
content from files in the page cache, one after the other, in turns, with fio as the client; so a busy machine slows
all of them, and the ratios remain. Our volume is twice as large as the part that is used: cleaning a volume that is
full to the brim is another question. Runs on the same cores as the client: what the client costs is in all figures.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

PROGRAM = Path(sys.executable).with_name("jindisksetup")
LOADS = {
    "random read 4 KiB, one at a time": ["--rw=randread", "--bs=4k", "--iodepth=1"],
    "random read 4 KiB, 16 outstanding": ["--rw=randread", "--bs=4k", "--iodepth=16"],
    "random write 4 KiB, 16 outstanding": ["--rw=randwrite", "--bs=4k", "--iodepth=16"],
    "random write 4 KiB, flush after each 16": ["--rw=randwrite", "--bs=4k", "--iodepth=16", "--fsync=16"],
    "sequential read 128 KiB": ["--rw=read", "--bs=128k", "--iodepth=4"],
    "sequential write 128 KiB": ["--rw=write", "--bs=128k", "--iodepth=4"],
}
Server = Callable[[Path, Path, Path], list[str]]


def prepare_ours(plain: Path, folder: Path) -> None:
    size = str(2 * plain.stat().st_size)  # half full, as a disk in use is
    words = [PROGRAM, "load", plain, folder / "volume", "--generate-key", folder / "key", "--size", size]
    subprocess.run(words, check=True, capture_output=True)


def ours(_plain: Path, folder: Path, sock: Path) -> list[str]:
    words = [PROGRAM, "serve", folder / "volume", "--key-file", folder / "key", "--unanchored", "--socket", sock]
    return [os.fspath(word) for word in words]


def prepare_file(plain: Path, folder: Path) -> None:
    subprocess.run(["cp", "--sparse=always", plain, folder / "file"], check=True)


def nbdkit(_plain: Path, folder: Path, sock: Path) -> list[str]:
    return ["nbdkit", "--foreground", "--unix", os.fspath(sock), "file", os.fspath(folder / "file")]


SECRET = "secret,id=s,data=password"


def prepare_luks(plain: Path, folder: Path) -> None:
    image = f"driver=luks,key-secret=s,file.filename={folder / 'luks'}"
    size = str(plain.stat().st_size)
    create = ["qemu-img", "create", "-q", "--object", SECRET, "-f", "luks", "-o", "key-secret=s,iter-time=10"]
    subprocess.run([*create, folder / "luks", size], check=True)
    convert = ["qemu-img", "convert", "-n", "--object", SECRET, "--target-image-opts", "-f", "raw", plain, image]
    subprocess.run(convert, check=True)


def qemu_luks(_plain: Path, folder: Path, sock: Path) -> list[str]:
    image = f"driver=luks,key-secret=s,file.filename={folder / 'luks'}"
    words = ["qemu-nbd", "--object", SECRET, "--persistent", "--shared=8", "--cache=writeback", "--discard=unmap"]
    return [*words, "--socket", os.fspath(sock), "--image-opts", image]


SERVERS: dict[str, tuple[Callable[[Path, Path], None], Server]] = {
    "jindisk": (prepare_ours, ours),
    "nbdkit file": (prepare_file, nbdkit),
    "qemu-nbd luks": (prepare_luks, qemu_luks),
}


@contextlib.contextmanager
def serving(words: list[str], sock: Path) -> Iterator[int]:
    """Run a server until the block ends; its process number."""
    sock.unlink(missing_ok=True)
    process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        while subprocess.run(["nbdinfo", "--size", uri(sock)], capture_output=True).returncode:
            assert process.poll() is None, process.stderr.read() if process.stderr else ""
            time.sleep(0.05)
        yield process.pid
    finally:
        process.terminate()
        process.communicate()


def uri(sock: Path) -> str:
    return f"nbd+unix:///?socket={sock}"


def cpu_seconds(process: int) -> float:
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def load(sock: Path, process: int, words: list[str], seconds: float, size_mib: int) -> dict[str, float]:
    """One load on a running server."""
    before = cpu_seconds(process)
    command = ["fio", "--name=b", "--ioengine=nbd", f"--uri={uri(sock)}", *words, f"--size={size_mib}m"]
    command += ["--randrepeat=0", "--time_based", f"--runtime={seconds}", "--output-format=json"]
    out = subprocess.run(command, check=True, capture_output=True, text=True, cwd=sock.parent).stdout
    job = json.loads(out[out.index("{") :])["jobs"][0]
    spent = cpu_seconds(process) - before
    sides = [job["read"], job["write"]]
    requests = sum(side["total_ios"] for side in sides)
    return {
        "requests_a_second": sum(side["iops"] for side in sides),
        "mib_a_second": sum(side["bw_bytes"] for side in sides) / (1 << 20),
        "server_cpu_us_a_request": spent * 1e6 / max(requests, 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--size-mib", type=int, default=512)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--scratch", type=Path, default=Path("/var/tmp"))
    arguments = parser.parse_args()
    found: dict[str, dict[str, list[dict[str, float]]]] = {name: {} for name in SERVERS}
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as name:
        folder = Path(name)
        plain, sock = folder / "plain", folder / "sock"
        with plain.open("wb") as file:
            for _ in range(arguments.size_mib):
                file.write(os.urandom(1 << 20))
        for prepare, _ in SERVERS.values():
            prepare(plain, folder)
        for _ in range(arguments.runs):
            for label, words in LOADS.items():
                for server, (_, command) in SERVERS.items():
                    with serving(command(plain, folder, sock), sock) as process:
                        got = load(sock, process, words, arguments.seconds, arguments.size_mib)
                    found[server].setdefault(label, []).append(got)
    report = {
        server: {
            label: {key: round(statistics.median(run[key] for run in runs), 1) for key in runs[0]}
            for label, runs in loads.items()
        }
        for server, loads in found.items()
    }
    ratios = {
        f"jindisk to {other}": {
            label: round(report["jindisk"][label]["requests_a_second"] / report[other][label]["requests_a_second"], 3)
            for label in LOADS
        }
        for other in SERVERS
        if other != "jindisk"
    }
    print(json.dumps({"size_mib": arguments.size_mib, "servers": report, "ratios": ratios}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
