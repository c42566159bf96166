"""`jindisksetup serve`: a real process, clients of others, and its ends, violent ones included."""

import json
import os
import random
import select
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from jd import KEY
from nbd_client import Client

from jindiskd.jindisk import anchor_file
from jindiskd.jindisk.geometry import BLOCK
from jindiskd.jindisksetup.main import main

PROGRAM = Path(sys.executable).with_name("jindisksetup")
SIZE = 16 << 20
FLUSH, TRIM, FUA = 3, 4, 1


@pytest.fixture
def volume(tmp_path) -> Path:
    """A volume with its key and anchor file beside it."""
    key = tmp_path / "key"
    key.write_bytes(KEY)
    key.chmod(0o600)
    words = ["format", tmp_path / "v", "--size", "16M", "--key-file", key, "--anchor", tmp_path / "a"]
    assert main([str(word) for word in words]) == 0
    return tmp_path / "v"


def access(volume: Path) -> list[str]:
    return [str(volume), "--key-file", str(volume.with_name("key")), "--anchor", str(volume.with_name("a"))]


@contextmanager
def serving(volume: Path, *words: str):
    """The server in the foreground, once it has said that it serves."""
    sock = volume.with_name("sock")
    process = subprocess.Popen(
        [PROGRAM, "serve", *access(volume), "--socket", sock, *words], stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stderr is not None
        said = process.stderr.readline()
        assert said.startswith("serving "), said + process.stderr.read()
        yield process, sock
    finally:
        if process.poll() is None:
            process.kill()
        process.wait(60)
        process.stderr.close()


def measured(volume: Path, *, status: int = 0) -> dict:
    done = subprocess.run([PROGRAM, "--json", "measure", *access(volume)], capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    return json.loads(done.stdout)["state"] if not status else {}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_ends_gently(volume, number) -> None:
    """The volume is closed, what was written without a flush included; the anchor file has exactly this state."""
    with serving(volume) as (process, sock):
        with Client(sock) as client:
            client.go()
            assert client.write(0, b"written" * 100) == 0
            process.send_signal(number)
            assert client.closed()
        assert process.wait(60) == 0
        assert not sock.exists()
    state = measured(volume)
    assert state["closed"]
    assert anchor_file.read(volume.with_name("a")).anchor.pack().hex() == state["anchor"]
    with serving(volume, "--read-only") as (_, sock), Client(sock) as client:
        client.go()
        assert client.read(0, 7) == b"written"


def test_killed_in_the_middle_of_writes(volume) -> None:
    """kill -9, several times, with writers on several connections: whatever was flushed is there after reopening."""
    generator = random.Random(17)
    rounds, regions = 2, 3
    model = [bytearray(1 << 20) for _ in range(regions)]
    for turn in range(rounds):
        with serving(volume) as (process, sock):
            enough = threading.Event()
            unsure: list[dict[int, list[bytes]]] = [{} for _ in range(regions)]

            def write(region: int, seed: int, path: Path, unsure=unsure, enough=enough) -> None:
                """Write blocks of one region; what a flush covers becomes certain."""
                mine = random.Random(seed)
                try:
                    with Client(path) as client:
                        client.go()
                        count = 0
                        while True:
                            for _ in range(mine.randrange(1, 20)):
                                block, data = mine.randrange(256), mine.randbytes(32) * 128
                                unsure[region].setdefault(block, []).append(data)
                                if client.write((region << 20) + block * BLOCK, data) != 0:
                                    return
                            if client.ask(FLUSH) != 0:
                                return
                            for block, written in unsure[region].items():
                                model[region][block * BLOCK : (block + 1) * BLOCK] = written[-1]
                            unsure[region].clear()
                            count += 1
                            if count == 5:
                                enough.set()
                except ConnectionError:
                    return

            writers = [
                threading.Thread(target=write, args=(n, generator.getrandbits(32), sock)) for n in range(regions)
            ]
            for writer in writers:
                writer.start()
            assert enough.wait(120)
            process.kill()
            process.wait(60)
            for writer in writers:
                writer.join(60)
        state = measured(volume)
        assert not state["closed"]
        with serving(volume) as (process, sock), Client(sock) as client:
            client.go()
            for region in range(regions):
                found = client.read(region << 20, 1 << 20)
                assert isinstance(found, bytes)
                for block in range(256):
                    have = found[block * BLOCK : (block + 1) * BLOCK]
                    sure = bytes(model[region][block * BLOCK : (block + 1) * BLOCK])
                    assert have in [sure, *unsure[region].get(block, ())], (turn, region, block)
                model[region][:] = found
            process.terminate()
            assert process.wait(60) == 0
    done = subprocess.run([PROGRAM, "check", "--data", *access(volume)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_every_commit_may_be_reported(volume) -> None:
    """With `--report commit` the anchor file has the state before the flush is answered: nothing can be set back."""
    with serving(volume, "--report", "commit") as (process, sock), Client(sock) as client:
        client.go()
        client.write(0, b"first", flags=FUA)
        between = volume.read_bytes()
        first = anchor_file.read(volume.with_name("a")).anchor
        client.write(0, b"other", flags=FUA)
        second = anchor_file.read(volume.with_name("a")).anchor
        assert (first.open, second.open) == (True, True)
        assert second.sequence == first.sequence + 1
        process.kill()
        process.wait(60)
    assert measured(volume)["sequence"] == second.sequence
    volume.write_bytes(between)
    measured(volume, status=8)


def test_a_flush_of_one_client_covers_all(volume) -> None:
    """What another connection was told is written is durable after it, and what was trimmed is gone."""
    with serving(volume) as (process, sock), Client(sock) as first, Client(sock) as second:
        for client in (first, second):
            client.go()
        assert first.write(0, b"a" * 3 * BLOCK, flags=FUA) == 0
        assert first.write(1 << 20, b"first") == 0
        assert first.ask(TRIM, BLOCK, BLOCK) == 0
        assert second.ask(FLUSH) == 0
        process.kill()
        process.wait(60)
    with serving(volume, "--read-only") as (_, sock), Client(sock) as client:
        client.go()
        assert client.read(1 << 20, 5) == b"first"
        assert client.read(0, 3 * BLOCK) == b"a" * BLOCK + bytes(BLOCK) + b"a" * BLOCK


def test_the_state_is_kept_at_intervals(volume) -> None:
    """Without anybody closing or flushing more: the anchor file follows the last commit."""
    with serving(volume, "--interval", "1") as (process, sock), Client(sock) as client:
        client.go()
        begun = anchor_file.read(volume.with_name("a")).anchor.sequence
        assert client.write(0, b"data", flags=FUA) == 0
        deadline = time.monotonic() + 120
        while anchor_file.read(volume.with_name("a")).anchor.sequence <= begun:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.kill()
        process.wait(60)
    state = measured(volume)
    assert (state["closed"], state["sequence"] > begun) == (False, True)


def test_one_server_at_a_time(volume, tmp_path) -> None:
    """A second one is told what is busy, and changes nothing; readers may share."""
    with serving(volume) as (_, sock), Client(sock) as client:
        client.go()
        for other in (sock, tmp_path / "other"):
            done = subprocess.run(
                [PROGRAM, "serve", *access(volume), "--socket", other], capture_output=True, text=True, timeout=60
            )
            assert done.returncode == 6, done.stderr
            assert "busy" in done.stderr
        assert not (tmp_path / "other").exists()
        assert client.write(0, b"still", flags=FUA) == 0
    with serving(volume, "--read-only") as (_, sock), Client(sock) as client:
        client.go()
        assert client.read(0, 5) == b"still"
        measured(volume)


def test_in_the_background(volume, tmp_path) -> None:
    """Returns when clients can connect; the files say so and go with it; errors are those of the foreground."""
    sock, pid, ready = tmp_path / "sock", tmp_path / "pid", tmp_path / "ready"
    files = ["--socket", "sock", "--pid-file", "pid", "--ready-file", "ready"]
    done = subprocess.run(
        [PROGRAM, "--json", "serve", *access(volume), "--daemon", *files],
        cwd=tmp_path, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    server = json.loads(done.stdout)["server"]
    process = int(pid.read_text())
    assert (server["pid"], server["uri"]) == (process, ready.read_text().strip())
    status = Path(f"/proc/{process}/status").read_text()
    assert f"PPid:\t{os.getpid()}\n" not in status
    with Client(sock) as client:
        client.go()
        assert client.write(0, b"daemon") == 0
    again = subprocess.run(
        [PROGRAM, "serve", *access(volume), "--daemon", "--socket", tmp_path / "s2"],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert again.returncode == 6
    assert "busy" in again.stderr
    watched = os.pidfd_open(process)
    os.kill(process, signal.SIGTERM)
    assert select.select([watched], [], [], 60)[0]
    os.close(watched)
    assert [path.name for path in tmp_path.iterdir() if path.name in {"sock", "pid", "ready"}] == []
    assert measured(volume)["closed"]


def test_secrets_stay_inside(volume) -> None:
    """No core, no tracing by others of our user, and neither arguments nor environment have the key."""
    with serving(volume) as (process, _):
        proc = Path(f"/proc/{process.pid}")
        limits = (proc / "limits").read_text()
        assert any(line.split()[:6] == ["Max", "core", "file", "size", "0", "0"] for line in limits.splitlines())
        # An undumpable process's files in /proc belong to root, whoever runs it; root sees it by its own means.
        for name in ("cmdline", "environ"):
            data = (proc / name).read_bytes()
            assert KEY not in data
            assert KEY.hex().encode() not in data


def test_qemu_and_nbdcopy_at_once(volume, tmp_path) -> None:
    """Two programs on one volume, each on its own connections and its own part."""
    plain = tmp_path / "plain"
    plain.write_bytes(random.Random(2).randbytes(4 << 20) + bytes(SIZE - (4 << 20)))
    with serving(volume) as (process, sock):
        uri = f"nbd+unix:///?socket={sock}"
        copy = subprocess.Popen(["nbdcopy", "--connections=2", "--flush", plain, uri])
        words = ["-c", "write -P 7 12M 1M", "-c", "flush", "-c", "read -P 7 12M 1M"]
        assert subprocess.run(["nbdinfo", uri], capture_output=True, timeout=60).returncode == 0
        assert copy.wait(60) == 0
        done = subprocess.run(["qemu-io", "-f", "raw", *words, uri], capture_output=True, text=True, timeout=60)
        assert "failed" not in done.stdout
        process.terminate()
        assert process.wait(60) == 0
    subprocess.run([PROGRAM, "export", *access(volume), tmp_path / "out"], check=True)
    expected = bytearray(plain.read_bytes())
    expected[12 << 20 : 13 << 20] = b"\x07" * (1 << 20)
    assert (tmp_path / "out").read_bytes() == expected
