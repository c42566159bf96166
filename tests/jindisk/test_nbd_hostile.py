"""Hostile clients of the NBD server: junk in every phase, requests without sense, answers not taken, too many."""

import errno
import os
import random
import socket
import struct
import threading
import time
from uuid import UUID

import pytest
from jd import KEY, UUID1
from nbd_client import Client, Refused
from nbd_volume import (
    CACHE,
    DF,
    FAST,
    FLUSH,
    FUA,
    NO_HOLE,
    READ,
    REQ_ONE,
    SIZE,
    TRIM,
    WRITE,
    ZERO,
    Memory,
    served,
)

from jindiskd.base.secret import Secret
from jindiskd.jindisk import nbd_protocol
from jindiskd.jindisk.anchor import UNANCHORED
from jindiskd.jindisk.device import OpenFile
from jindiskd.jindisk.geometry import BLOCK
from jindiskd.jindisk.nbd_connection import Connection
from jindiskd.jindisk.nbd_handshake import Agreed
from jindiskd.jindisk.nbd_server import Server
from jindiskd.jindisk.volume import open_volume

# Hostile clients


@pytest.fixture
def target(tmp_path):
    """A served volume; in the end it still serves."""
    told: list[str] = []
    with served(tmp_path / "v", clients=6, handshake_s=2.0, tell=told.append) as (sock, server):
        with Client(sock) as client:
            client.go()
            assert client.write(0, b"good" * 1024) == 0
        yield sock, server, told
        patience = time.monotonic() + 30
        while server.connected and time.monotonic() < patience:
            time.sleep(0.01)  # whoever closed last may still be counted
        with Client(sock) as client:
            client.go()
            assert client.read(0, 4) == b"good"


@pytest.mark.parametrize(
    "junk",
    [
        b"GET / HTTP/1.1\r\n\r\n" * 8,
        struct.pack(">I", 0xFFFFFFFF),
        struct.pack(">I", 3) + b"\0" * 64,
        struct.pack(">IQII", 3, 0x49484156454F5054, 7, 0xFFFFFFFF),
        struct.pack(">IQII", 3, 0x49484156454F5054, 7, 16385),
        struct.pack(">IQII", 2, 0x49484156454F5054, 3, 0),
        struct.pack(">IQII", 3, 0x49484156454F5054, 1, 5) + b"other",
        struct.pack(">I", 3) + struct.pack(">QII", 0x49484156454F5054, 99, 0) * 100,
        b"",
        b"\0",
    ],
    ids=["http", "flags", "magic", "huge", "large", "unfixed", "name", "many", "silent", "partial"],
)
def test_junk_instead_of_a_handshake(target, junk, request) -> None:
    """The connection ends at once, or at the time limit."""
    sock, _, told = target
    with Client(sock) as client:
        client.receive(18)
        try:
            client.stream.sendall(junk)
        except ConnectionError:
            pass
        assert client.closed()
    deadline = time.monotonic() + 30
    while not told and time.monotonic() < deadline:
        time.sleep(0.01)
    words = {
        "flags": "unknown flags", "http": "unknown flags", "magic": "wrong magic", "huge": " bytes", "large": " bytes",
        "unfixed": "without having agreed", "name": "not here", "many": "too many options",
    }  # fmt: skip
    assert words.get(request.node.callspec.id, "time limit") in told[0]


NAME = struct.pack(">I", 0)
INVALID, UNKNOWN, UNSUPPORTED, TOO_BIG = 3, 6, 1, 9


@pytest.mark.parametrize(
    ("option", "data", "error"),
    [
        (3, b"x", INVALID),
        (8, b"x", INVALID),
        (7, b"", INVALID),
        (7, struct.pack(">I", 0xFFFFFFFF), INVALID),
        (7, struct.pack(">I", 9) + b"x", INVALID),
        (7, struct.pack(">IH", 0, 0xFFFF), INVALID),
        (7, struct.pack(">IHH", 0, 0, 0), INVALID),
        (7, struct.pack(">I", 5000) + b"x" * 5000 + b"\0\0", INVALID),
        (7, struct.pack(">I", 2) + b"\xff\xff\0\0", INVALID),
        (7, struct.pack(">I", 1) + b"\0\0\0", INVALID),
        (6, struct.pack(">I", 5) + b"other\0\0", UNKNOWN),
        (10, NAME + struct.pack(">I", 0), INVALID),
        (5, b"", UNSUPPORTED),
        (11, b"", UNSUPPORTED),
        (0xFFFFFFFF, b"y" * 100, UNSUPPORTED),
    ],
)
def test_options_that_make_no_sense(target, option, data, error) -> None:
    """Each gets its error, and the client may go on."""
    with Client(target[0]) as client:
        client.greet()
        with pytest.raises(Refused) as caught:
            client.option(option, data)
        assert caught.value.args == (error,)
        assert client.option(6, NAME + b"\0\0")


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (NAME, INVALID),
        (NAME + struct.pack(">I", 0xFFFFFFFF), TOO_BIG),
        (NAME + struct.pack(">II", 1, 0xFFFFFFFF), INVALID),
        (NAME + struct.pack(">II", 1, 4) + b"none", INVALID),
        (NAME + struct.pack(">II", 2, 6) + b"base:a", INVALID),
        (struct.pack(">I", 5) + b"other" + struct.pack(">I", 0), UNKNOWN),
    ],
)
def test_contexts_that_make_no_sense(target, data, error) -> None:
    """The context chosen before is forgotten, as the protocol wants."""
    with Client(target[0]) as client:
        client.greet()
        client.option(8)
        query = struct.pack(">II", 1, 15) + b"base:allocation"
        assert len(client.option(10, NAME + query)) == 1
        assert len(client.option(9, NAME + struct.pack(">I", 0))) == 1
        assert len(client.option(9, NAME + struct.pack(">II", 1, 5) + b"base:")) == 1
        assert client.option(9, NAME + struct.pack(">II", 1, 7) + b"other:x") == []
        with pytest.raises(Refused) as caught:
            client.option(10, data)
        assert caught.value.args == (error,)
        client.option(7, NAME + b"\0\0")
        client.structured = True
        assert client.status(0, BLOCK) == errno.EINVAL


@pytest.mark.parametrize("structured", [False, True])
def test_requests_that_make_no_sense(target, structured) -> None:
    """Each gets the error that the protocol names, and the connection goes on."""
    with Client(target[0]) as client:
        client.go(structured=structured)
        past = (1 << 64) - BLOCK
        for offset, length in ((SIZE, 1), (SIZE - 1, 2), (past, BLOCK), (past, 2 * BLOCK), (0, (32 << 20) + 1)):
            assert client.read(offset, length) == errno.EINVAL
            assert client.ask(TRIM, offset, length) == errno.EINVAL
            assert client.ask(ZERO, offset, length) == errno.ENOSPC
        assert client.write(SIZE - 1, b"xx") == errno.ENOSPC
        assert client.write(past, b"xx") == errno.ENOSPC
        assert client.ask(TRIM, 0, 0xFFFFFFFF) == errno.EINVAL
        assert client.ask(FLUSH, 1, 0) == errno.EINVAL
        for kind in (CACHE, 8, 99, 0xFFFF):
            assert client.ask(kind, 0, BLOCK) == errno.EINVAL
        for kind, flags in ((TRIM, NO_HOLE), (FLUSH, FAST), (ZERO, 0x8000)):
            assert client.ask(kind, 0, 0, flags=flags) == errno.EINVAL
        assert client.read(0, 4, flags=DF) == (b"good" if structured else errno.EINVAL)
        assert client.read(0, 4, flags=NO_HOLE) == errno.EINVAL
        assert client.read(0, 0) == b""
        assert client.write(0, b"") == 0
        assert client.ask(TRIM, SIZE, 0) == 0
        assert client.read(0, 4) == b"good"


@pytest.mark.parametrize(
    ("name", "junk"),
    [
        ("magic", b"\0" * 28),
        ("magic of others", struct.pack(">IHHQQI", 0x25609514, 0, FLUSH, 1, 0, 0)),
        ("huge", struct.pack(">IHHQQI", 0x25609513, 0, 1, 1, 0, (32 << 20) + 1)),
        ("disconnect", struct.pack(">IHHQQI", 0x25609513, 0, 2, 1, 0, 0)),
        ("cut", struct.pack(">IHHQQI", 0x25609513, 0, 1, 1, BLOCK, 100) + b"x" * 99),
        ("half", struct.pack(">IHHQQI", 0x25609513, 0, 1, 1, BLOCK, 100)[:-1]),
    ],
)
def test_junk_in_transmission(target, name, junk) -> None:
    """The connection ends; of a write that did not arrive whole nothing is written."""
    with Client(target[0]) as client:
        client.go()
        client.stream.sendall(junk)
        if name in {"cut", "half"}:
            client.stream.shutdown(socket.SHUT_WR)
        assert client.stream.recv(1) == b"", "it is not answered, and the server ends it"
    with Client(target[0]) as client:
        client.go()
        assert client.read(BLOCK, 100) == bytes(100)


def test_payloads_of_one_client_are_bounded(tmp_path, monkeypatch) -> None:
    """While a write waits, no other that would exceed the limit is taken from the stream; others go on."""
    monkeypatch.setattr(nbd_protocol, "PAYLOAD_LIMIT", 3 * BLOCK)
    going = threading.Event()

    class Slow(Memory):
        taken = 0

        def write(self, offset: int, data: bytearray) -> None:
            Slow.taken += 1
            assert going.wait(60)
            super().write(offset, data)

        def zero(self, offset: int, length: int) -> None:
            """Done at once."""

        discard = zero

    ours, theirs = socket.socketpair()
    volume = Slow()
    connection = Connection(ours, volume, Agreed(structured=False, allocation=False))
    thread = threading.Thread(target=connection.run)
    thread.start()
    try:
        theirs.settimeout(60)
        requests = [(ZERO, 60_000), (TRIM, 60_000), (WRITE, 2 * BLOCK), (WRITE, 2 * BLOCK)]
        for cookie, (kind, length) in enumerate(requests):
            theirs.sendall(struct.pack(">IHHQQI", 0x25609513, 0, kind, cookie, 0, length))
            if kind == WRITE:
                theirs.sendall(b"w" * length)
        assert {theirs.recv(16)[8:] for _ in range(2)} == {struct.pack(">Q", n) for n in (0, 1)}
        deadline = time.monotonic() + 60
        while not volume.taken and time.monotonic() < deadline:
            time.sleep(0.01)
        assert connection._budget._left == BLOCK
        assert volume.taken == 1
        going.set()
        assert {theirs.recv(16)[8:] for _ in range(2)} == {struct.pack(">Q", n) for n in (2, 3)}
        deadline = time.monotonic() + 60
        while connection._budget._left < 3 * BLOCK and time.monotonic() < deadline:
            time.sleep(0.01)
        assert connection._budget._left == 3 * BLOCK, "nothing is held, and nothing was given back twice"
    finally:
        going.set()
        theirs.close()
        thread.join(60)
        ours.close()


def test_a_client_may_be_silent_as_long_as_it_likes(target) -> None:
    """The time limit is the handshake's alone."""
    with Client(target[0]) as client:
        client.go()
        assert client.read(0, 4) == b"good"
        assert {stream.gettimeout() for stream in target[1]._running.values()} == {None}


def test_one_extent_where_one_is_asked_for(target) -> None:
    with Client(target[0]) as client:
        client.go(structured=True, status=True)
        assert client.write(8 * BLOCK, b"more" * 1024) == 0
        mapped, hole = (BLOCK, 0), (7 * BLOCK, 3)
        assert client.status(0, 9 * BLOCK) == [mapped, hole, mapped]
        assert client.status(0, 9 * BLOCK, flags=REQ_ONE) == [mapped]
        assert client.status(BLOCK + 100, 9 * BLOCK, flags=REQ_ONE) == [(7 * BLOCK - 100, 3)]
        assert client.status(8 * BLOCK + 1, BLOCK) == [(BLOCK - 1, 0), (1, 3)]
        assert client.read(0, 0) == b""
        assert client.status(0, 0) == errno.EINVAL


def test_what_is_durable_at_once() -> None:
    """FUA of each change, and flush: the volume is told to flush, after the change, before the answer."""

    class Told(Memory):
        def __init__(self) -> None:
            super().__init__()
            self.done: list[str] = []

        def write(self, offset: int, data: bytearray) -> None:
            self.done.append("change")
            super().write(offset, data)

        def flush(self) -> None:
            self.done.append("flush")

    ours, theirs = socket.socketpair()
    volume = Told()
    thread = threading.Thread(target=Connection(ours, volume, Agreed(structured=True, allocation=False)).run)
    thread.start()
    try:
        theirs.settimeout(60)
        for kind, flags, done in (
            (WRITE, 0, ["change"]), (WRITE, FUA, ["change", "flush"]), (TRIM, 0, ["change"]),
            (TRIM, FUA, ["change", "flush"]), (ZERO, NO_HOLE, ["change"]), (ZERO, FUA | NO_HOLE, ["change", "flush"]),
            (FLUSH, 0, ["flush"]), (FLUSH, FUA, ["flush"]),
        ):  # fmt: skip
            volume.done.clear()
            length = 0 if kind == FLUSH else 4
            data = b"data" if kind == WRITE else b""
            theirs.sendall(struct.pack(">IHHQQI", 0x25609513, flags, kind, 9, 0, length) + data)
            assert struct.unpack(">IIQ", theirs.recv(16)) == (0x67446698, 0, 9)
            assert volume.done == done, kind
    finally:
        theirs.close()
        thread.join(60)
        ours.close()


def test_a_context_counts_for_the_name_it_was_chosen_for(tmp_path) -> None:
    """And only until the next attempt to choose; by both ways into transmission."""
    query = struct.pack(">II", 1, 15) + b"base:allocation"
    disk = struct.pack(">I", 4) + b"disk"
    with served(tmp_path / "v", name="disk") as (sock, _):
        for first, second, good in ((NAME, NAME, True), (NAME, disk, False), (disk, disk, True), (disk, NAME, False)):
            for by_go in (True, False):
                with Client(sock) as client:
                    client.greet()
                    client.option(8)
                    client.structured = True
                    assert len(client.option(10, first + query)) == 1
                    if by_go:
                        client.option(7, second + b"\0\0")
                    else:
                        client.stream.sendall(struct.pack(">QII", 0x49484156454F5054, 1, len(second) - 4) + second[4:])
                        client.receive(10)
                    found = client.status(0, BLOCK)
                    assert found == ([(BLOCK, 3)] if good else errno.EINVAL)
        with Client(sock) as client:
            client.greet()
            client.option(8)
            client.structured = True
            client.option(10, NAME + query)
            with pytest.raises(Refused):
                client.option(10, b"junk")
            client.option(7, NAME + b"\0\0")
            assert client.status(0, BLOCK) == errno.EINVAL
        with Client(sock) as client:  # who has not agreed to do without gets padding
            client.greet(flags=1)
            client.stream.sendall(struct.pack(">QII", 0x49484156454F5054, 1, 0))
            assert client.receive(134)[10:] == bytes(124)
            assert client.read(0, 4) == bytes(4)


def test_who_takes_no_answers_holds_nobody_up(target) -> None:
    """Clients that ask for much and read nothing, and one that promises a payload, do not stop the others."""
    sock, server, _ = target
    clients = []
    for _ in range(3):
        client = Client(sock)
        client.go()
        for _ in range(8):
            client.send(READ, 0, 8 << 20)
        clients.append(client)
    lazy = Client(sock)
    lazy.go()
    lazy.stream.sendall(struct.pack(">IHHQQI", 0x25609513, 0, 1, 1, 0, 32 << 20))
    clients.append(lazy)
    with Client(sock) as good:
        good.go()
        for _ in range(20):
            assert good.read(0, 4) == b"good"
            assert good.write(8 << 20, os.urandom(BLOCK)) == 0
    for client in clients:
        client.stream.close()
    _settle(server)


def _settle(server: Server) -> None:
    deadline = time.monotonic() + 30
    while server.connected and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not server.connected


def test_too_many_clients_are_turned_away(target) -> None:
    """And as soon as one leaves there is room again."""
    sock, server, _ = target
    _settle(server)
    clients = [Client(sock) for _ in range(6)]
    for client in clients:
        client.go()
    with Client(sock) as more:
        assert more.stream.recv(1) == b"", "not even greeted"
    clients[0].stream.close()
    deadline = time.monotonic() + 30
    while True:
        try:
            with Client(sock) as next_one:
                next_one.go()
                assert next_one.read(0, 4) == b"good"
            break
        except ConnectionError:  # the server has not noticed yet that one left
            assert time.monotonic() < deadline
            time.sleep(0.01)
    for client in clients[1:]:
        client.stream.close()


def test_stopping_cuts_off_who_does_not_take_answers(tmp_path) -> None:
    """After the grace; the volume is closed whole, with what was flushed."""
    with served(tmp_path / "v") as (sock, server):
        client = Client(sock)
        client.go()
        assert client.write(0, b"kept" * 1024) == 0
        for _ in range(8):
            client.send(READ, 0, 8 << 20)
        server.stop(grace_s=0.5)
        client.stream.close()
    with OpenFile(tmp_path / "v", writable=False) as device:
        volume = open_volume(device, key=Secret(KEY), uuid=UUID(int=UUID1.int), anchor=UNANCHORED)
        assert volume.superblock.closed
        assert volume.read(0, 4) == b"kept"


def test_random_bytes(target) -> None:
    """After a good beginning, in any phase: the server lives on."""
    generator = random.Random(11)
    for _ in range(60):
        with Client(target[0]) as client:
            stage = generator.randrange(3)
            try:
                if stage == 0:
                    client.receive(18)
                elif stage == 1:
                    client.greet()
                    client.stream.sendall(
                        struct.pack(">QII", 0x49484156454F5054, generator.randrange(12), generator.randrange(40))
                    )
                else:
                    client.go(structured=generator.random() < 0.5)
                    # Never a write that could be good: the first block is looked at in the end.
                    flags, kind = generator.getrandbits(16), generator.choice((0, 2, 3, 5, 7, 9))
                    place = generator.getrandbits(64), generator.getrandbits(generator.choice((20, 64)))
                    client.stream.sendall(struct.pack(">IHHQQI", 0x25609513, flags, kind, *place, 1 << 19))
                client.stream.sendall(generator.randbytes(generator.randrange(1, 200)))
                client.stream.shutdown(socket.SHUT_WR)
            except (OSError, Refused):
                pass
            assert client.closed()
