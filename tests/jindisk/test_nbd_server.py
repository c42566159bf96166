"""The NBD server on real volumes: against other people's clients, and against a model."""

import errno
import json
import random
import shutil
import struct
import subprocess
import threading
from pathlib import Path

import pytest
from nbd_client import Client
from nbd_volume import (
    DF,
    FAST,
    FLUSH,
    FUA,
    NO_HOLE,
    SIZE,
    TRIM,
    ZERO,
    served,
)

from jindiskd.errors import Busy, InvalidArgument
from jindiskd.jindisk.geometry import BLOCK, default_geometry
from jindiskd.jindisk.nbd_server import Server, listen


def uri(path: Path) -> str:
    return f"nbd+unix:///?socket={path}"


def run(*words: object, status: int = 0, cwd: Path | None = None) -> str:
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, timeout=120, cwd=cwd)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def plain(tmp_path) -> Path:
    """A raw image: data, holes, data that is zero, and an end that is data."""
    path = tmp_path / "plain"
    generator = random.Random(5)
    with path.open("wb") as file:
        file.truncate(SIZE)
        for offset, data in ((0, generator.randbytes(300_000)), (4 << 20, bytes(1 << 20)), (9 << 20, b"x" * 5000)):
            file.seek(offset)
            file.write(data)
        file.seek(SIZE - 4096)
        file.write(generator.randbytes(4096))
    return path


# Other people's clients


def test_nbdinfo_describes_the_export(tmp_path) -> None:
    """Size, abilities and block sizes, as a client of others understands them; a read-only one says so."""
    with served(tmp_path / "v", name="disk") as (path, _):
        (export,) = json.loads(run("nbdinfo", "--json", uri(path)))["exports"]
        expected = {
            "export-name": "disk", "export-size": SIZE, "is_read_only": False, "can_flush": True, "can_fua": True,
            "can_trim": True, "can_zero": True, "can_multi_conn": True, "can_df": True, "can_fast_zero": True,
            "block_size_minimum": 4096, "block_size_maximum": 32 << 20, "contexts": ["base:allocation"],
        }  # fmt: skip
        assert {name: export[name] for name in expected} == expected
        assert [
            item["export-name"] for item in json.loads(run("nbdinfo", "--list", "--json", uri(path)))["exports"]
        ] == ["disk"]
        assert run("nbdinfo", "--size", f"nbd+unix:///disk?socket={path}").strip() == str(SIZE)
        run("nbdinfo", f"nbd+unix:///other?socket={path}", status=1)
    with served(tmp_path / "v", create=False, writable=False) as (path, _):
        (export,) = json.loads(run("nbdinfo", "--json", uri(path)))["exports"]
        assert export["is_read_only"]
        assert not export["can_trim"]


def test_nbdcopy_there_and_back(plain, tmp_path) -> None:
    """With several connections; holes stay holes, on the way in and in what the server tells."""
    with served(tmp_path / "v") as (path, _):
        run("nbdcopy", "--connections=4", "--requests=32", "--flush", plain, uri(path))
        run("nbdcopy", "--connections=4", uri(path), tmp_path / "back")
        assert (tmp_path / "back").read_bytes() == plain.read_bytes()
        extents = json.loads(run("nbdinfo", "--map", "--json", uri(path)))
        data = [(item["offset"], item["length"]) for item in extents if item["type"] == 0]
        assert data == [(0, 303_104), (9 << 20, 8192), (SIZE - 4096, 4096)]
        assert sum(item["length"] for item in extents) == SIZE
    assert (tmp_path / "v").stat().st_blocks * 512 < 4 << 20, "zeros were stored"
    with served(tmp_path / "v", create=False, writable=False) as (path, _):
        run("nbdcopy", uri(path), tmp_path / "again")
        assert (tmp_path / "again").read_bytes() == plain.read_bytes()


def test_qemu_img_converts_both_ways(plain, tmp_path) -> None:
    """Through qcow2 and back, and it finds the two equal."""
    with served(tmp_path / "v") as (path, _):
        run("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", plain, uri(path))
        run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", uri(path), tmp_path / "q.qcow2")
        assert "identical" in run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", plain, tmp_path / "q.qcow2")
        mapped = json.loads(run("qemu-img", "map", "--output=json", "-f", "raw", uri(path)))
        assert [item["start"] for item in mapped if item["data"]] == [0, 9 << 20, SIZE - 4096]


def test_qemu_io_writes_what_it_reads(tmp_path) -> None:
    """Unaligned writes, FUA, zeroes with and without holes, trims and flushes."""
    with served(tmp_path / "v") as (path, _):
        script = [
            "write -P 1 0 1M", "write -P 2 1000 5000", "write -f -P 3 65536 4096", "write -z 8192 4096",
            "write -z -u 16384 8192", "discard 131072 65536", "flush", "read -P 1 0 1000", "read -P 2 1000 5000",
            "read -P 1 6000 2192", "read -P 0 8192 4096", "read -P 1 12288 4096", "read -P 0 16384 8192",
            "read -P 3 65536 4096", "read -P 0 131072 65536", "read -P 1 196608 4096",
        ]  # fmt: skip
        words = [word for line in script for word in ("-c", line)]
        out = run("qemu-io", "-f", "raw", *words, uri(path))
        assert "verification failed" not in out, out
        assert "failed" not in out, out


@pytest.mark.slow
def test_fio_verifies(tmp_path) -> None:
    """Random writes at depth 16 with checksums in the blocks, read back by fio."""
    if shutil.which("fio") is None:
        pytest.skip("fio is missing; run scripts/setup")
    with served(tmp_path / "v") as (path, _):
        run(
            "fio", "--name=v", "--ioengine=nbd", f"--uri={uri(path)}", "--rw=randwrite", "--bs=4k-64k", "--iodepth=16",
            "--size=16m", "--verify=crc32c", "--verify_fatal=1", "--fsync=64", cwd=tmp_path,
        )  # fmt: skip


# Against a model


def test_random_requests(tmp_path) -> None:
    """Over two connections in turn; after reopening too. What is read is what was written last."""
    generator, model = random.Random(3), bytearray(SIZE)
    path = tmp_path / "v"

    def work(first: Client, second: Client) -> None:
        for _ in range(400):
            client = generator.choice((first, second))
            offset = generator.randrange(0, SIZE - (1 << 18), generator.choice((1, 512, 4096)))
            length = generator.choice((1, 512, 4096, 20_000, 1 << 18))
            match generator.randrange(7):
                case 0 | 1:
                    assert (
                        client.read(offset, length, flags=DF if client.structured else 0)
                        == model[offset : offset + length]
                    )
                case 2 | 3:
                    data = generator.randbytes(length)
                    assert client.write(offset, data, flags=generator.choice((0, FUA))) == 0
                    model[offset : offset + length] = data
                case 4:
                    flags = generator.choice((0, FUA, NO_HOLE, FAST))
                    assert client.ask(ZERO, offset, length, flags=flags) == 0
                    model[offset : offset + length] = bytes(length)
                case 5:
                    assert client.ask(TRIM, offset, length) == 0
                    first_block, end = -(-offset // BLOCK) * BLOCK, (offset + length) // BLOCK * BLOCK
                    if end > first_block:
                        model[first_block:end] = bytes(end - first_block)
                case 6:
                    assert client.ask(FLUSH) == 0

    for create in (True, False):
        with served(path, create=create) as (sock, _), Client(sock) as first, Client(sock) as second:
            first.go()
            second.go(structured=True, status=True)
            work(first, second)
            at, spans = 0, []
            while at < SIZE:
                found = second.status(at, SIZE - at)
                assert isinstance(found, list)
                for length, flags in found:
                    spans.append((at, length, flags))
                    at += length
            assert at == SIZE
            for offset, length, flags in spans:
                if flags:
                    assert flags == 3
                    assert not any(model[offset : offset + length]), "a hole where data is"
            mapped = sum(length for _, length, flags in spans if not flags)
            blocks = sum(model[n : n + BLOCK] != bytes(BLOCK) for n in range(0, SIZE, BLOCK))
            assert mapped == blocks * BLOCK
    with served(path, create=False, writable=False) as (sock, _), Client(sock) as client:
        client.go()
        assert client.read(0, SIZE) == model


def test_a_read_only_export_changes_nothing(tmp_path) -> None:
    """Whatever is asked for: not permitted."""
    with served(tmp_path / "v") as (sock, _), Client(sock) as client:
        client.go()
        client.write(0, b"a" * BLOCK)
    before = (tmp_path / "v").read_bytes()
    with served(tmp_path / "v", create=False, writable=False) as (sock, _), Client(sock) as client:
        info = client.go()
        assert struct.unpack(">QH", info[0])[1] & 2
        for kind in (TRIM, ZERO):
            assert client.ask(kind, 0, BLOCK) == errno.EPERM
        assert client.write(0, b"b" * BLOCK) == errno.EPERM
        assert client.ask(FLUSH) == 0
        assert client.read(0, 1) == b"a"
    assert (tmp_path / "v").read_bytes() == before


class Slow:
    """A block device whose flushes wait until they may."""

    read_only, zeroes_fast, size_bytes = False, True, SIZE

    def __init__(self) -> None:
        self.flushing, self.may = threading.Event(), threading.Event()

    def read(self, offset: int, length: int) -> bytes:
        return bytes(length)

    def flush(self) -> None:
        self.flushing.set()
        assert self.may.wait(60)


def test_a_flush_holds_nobody_up(tmp_path) -> None:
    """Reads of the same client are answered while its flush waits for the disk; stopping answers the flush."""
    volume = Slow()
    server = Server(listen(tmp_path / "sock"), volume)  # type: ignore[arg-type]  # only what is called
    server.start()
    with Client(tmp_path / "sock") as client:
        client.go()
        flush = client.send(FLUSH)
        assert volume.flushing.wait(30)
        for _ in range(10):
            assert client.read(0, BLOCK) == bytes(BLOCK)
        stopping = threading.Thread(target=server.stop, kwargs={"grace_s": 60})
        stopping.start()
        volume.may.set()
        assert client.reply() == (flush, 0)
        stopping.join(60)
        assert not stopping.is_alive()
        assert client.closed()


def test_damage_is_an_error_of_its_request_alone(tmp_path) -> None:
    """A flipped bit on the disk: EIO for that block, the others are read, the connection stays."""
    with served(tmp_path / "v") as (sock, _), Client(sock) as client:
        client.go()
        client.write(0, b"".join(bytes([n]) * BLOCK for n in range(1, 9)), flags=FUA)
        geometry = default_geometry(SIZE // BLOCK)
        before = (tmp_path / "v").read_bytes()
        start = next(
            at for at in range(geometry.data_start * BLOCK, len(before), BLOCK) if any(before[at : at + BLOCK])
        )
        with (tmp_path / "v").open("r+b") as file:
            file.seek(start)
            byte = file.read(1)
            file.seek(start)
            file.write(bytes([byte[0] ^ 1]))
        answers = [client.read(n * BLOCK, BLOCK) for n in range(8)]
        assert answers == [errno.EIO, *(bytes([n]) * BLOCK for n in range(2, 9))]
        assert client.read(0, 8 * BLOCK) == errno.EIO
    with served(tmp_path / "v", create=False) as (sock, _), Client(sock) as client:
        client.go(structured=True)
        assert client.read(0, BLOCK) == errno.EIO
        assert client.read(BLOCK, 1) == b"\x02"


# The socket


def test_sockets(tmp_path) -> None:
    """Private from the first moment; a dead one is replaced, a live one and a file are not."""
    path = tmp_path / "sock"
    first = listen(path)
    assert path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(Busy):
        listen(path)
    first.close()
    second = listen(path, mode=0o660)
    assert path.stat().st_mode & 0o777 == 0o660
    second.close()
    path.unlink()
    path.write_text("precious")
    with pytest.raises(InvalidArgument):
        listen(path)
    assert path.read_text() == "precious"
    with pytest.raises(InvalidArgument):
        listen(tmp_path / ("x" * 120))
