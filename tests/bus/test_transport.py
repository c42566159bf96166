"""The transport keeps its promises under load, with hostile peers and with a bus that stands still."""

import array
import asyncio
import os
import signal
import socket
import struct
import time
from pathlib import Path
from typing import Any

import pytest

from jindiskd.bus import outgoing, transport
from jindiskd.bus.incoming import Incoming
from jindiskd.bus.lib import InvalidMessageError, Message, MessageFlag, MessageType, Variant
from jindiskd.bus.transport import Connection


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def bus_pid(bus: Connection) -> int:
    """Process id of the bus daemon at the other end."""
    credentials = bus._sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return int(struct.unpack("3i", credentials)[0])


async def test_senders_are_never_mixed_up(probe, connect, message):
    """160 calls from ten peers at once, of different length: each is answered with its own caller's name."""
    clients = [await connect() for _ in range(10)]
    calls = [(peer, peer.call(message("WhoAmI", "d", (i * 7 % 5) / 100))) for i in range(16) for peer in clients]
    replies = await asyncio.gather(*(pending for _, pending in calls))
    assert [r.body[0] for r in replies] == [f"{peer.unique_name} {os.getuid()}" for peer, _ in calls]


async def test_more_calls_than_allowed_are_refused_and_the_rest_answered(probe, client, message):
    """A peer with 100 calls under way gets 32 answers and 68 LimitsExceeded."""
    replies = await asyncio.gather(*(client.call(message("WhoAmI", "d", 0.2)) for _ in range(100)))
    names = [r.error_name for r in replies if r.message_type is MessageType.ERROR]
    assert names == ["org.freedesktop.DBus.Error.LimitsExceeded"] * 68


async def test_unforeseen_errors_carry_a_reference_only(probe, client, message, capfd):
    """What was not raised on purpose reaches the caller as a number; text and traceback stay here."""
    reply = await client.call(message("Fail", "s", "oops"))
    assert reply.error_name == "org.jindisk1.Error.Internal"
    assert "private" not in reply.body[0]
    assert "Traceback" not in reply.body[0]
    reference = reply.body[0].split()[-1]
    assert len(reference) == 8
    reply = await client.call(message("Fail", "s", "typed"))
    assert (reply.error_name, reply.body) == ("org.jindisk1.Error.Busy", ["the probe is busy: it is being tested"])


async def test_no_reply_where_none_is_wanted(probe, client, message):
    """A call marked so gets none, not even an error."""
    got: list[Any] = []
    client.add_message_handler(lambda m: got.append(m) if m.reply_serial else None)
    for member in ("WhoAmI", "Nonsense"):
        await client.call(message(member, flags=MessageFlag.NO_REPLY_EXPECTED))
    await client.call(message("WhoAmI", "d", 0.0))
    assert len(got) == 1


async def test_descriptors_travel_and_none_is_left(probe, client, message):
    """In and out work; unknown methods, failures, pings, signals and late answers leave no descriptor open."""
    await client.call(message("WhoAmI", "d", 0.0))
    before = open_descriptors()
    for member, signature, body, interface in (
        ("Swap", "h", [0], None),
        ("Nonsense", "h", [0], None),
        ("Fail", "s", ["oops"], None),
        ("Swap", "h", [7], None),
        ("Ping", "", [], "org.freedesktop.DBus.Peer"),
    ):
        reading, writing = os.pipe()
        fields = {"interface": interface} if interface else {}
        reply = await client.call(message(member, signature, *body, unix_fds=[reading], **fields))
        os.close(reading)
        if reply.unix_fds:
            os.write(writing, b"through")
            assert os.read(reply.unix_fds[0], 10) == b"through"
            assert not os.get_inheritable(reply.unix_fds[0])
            os.close(reply.unix_fds[0])
        os.close(writing)
    # A signal for the service alone, with a descriptor.
    unicast = Message.new_signal("/org/example", "org.example.Else", "Hello", "h", [0])
    unicast.destination, unicast.unix_fds = "org.example.Probe", [0]
    await client.send(unicast)
    # An answer that comes after its caller has given up.
    with pytest.raises(TimeoutError):
        await client.call(message("WhoAmI", "d", 0.1), timeout_s=0.01)
    await asyncio.sleep(0.2)
    await client.call(message("WhoAmI", "d", 0.0))
    assert open_descriptors() == before
    assert not client._method_return_handlers


async def test_oversized_requests_are_skipped_unparsed(probe, client, message, monkeypatch):
    """31 MiB of an array that takes seconds to parse are refused in a moment, and the service goes on."""
    monkeypatch.setattr(outgoing, "MAX_OUTGOING_BYTES", 1 << 26)
    monkeypatch.setattr(transport, "GIVE_UP_ABOVE_BYTES", 1 << 27)
    request = message("WhoAmI", "ay", b"x" * (31 << 20))
    began = time.monotonic()
    reply = await client.call(request)
    assert reply.error_name == "org.freedesktop.DBus.Error.LimitsExceeded"
    assert (await client.call(message("WhoAmI", "d", 0.0))).message_type is MessageType.METHOD_RETURN
    assert time.monotonic() - began < 30


async def test_answers_too_large_for_the_bus_become_errors(probe, client, message):
    """The bus would drop us for it."""
    reply = await client.call(message("Big", "u", 17 << 20))
    assert reply.error_name == "org.freedesktop.DBus.Error.LimitsExceeded"
    reply = await client.call(message("Big", "u", 1 << 20))
    assert len(reply.body[0]) == 1 << 20


async def test_a_bus_that_stands_still_loses_nothing(probe, client, message):
    """Six MiB of signals queue while the bus is stopped, reading pauses, and later every one of them is delivered."""
    bus: Connection = probe.__dict__["_test_bus"]
    await client.call(
        Message(
            destination="org.freedesktop.DBus",
            path="/org/freedesktop/DBus",
            interface="org.freedesktop.DBus",
            member="AddMatch",
            signature="s",
            body=["type='signal',interface='org.example.Probe'"],
        )
    )
    got: asyncio.Queue[int] = asyncio.Queue()
    client.add_message_handler(lambda m: got.put_nowait(m.body[0]) if m.member == "Tick" else None)
    pid = bus_pid(bus)
    os.kill(pid, signal.SIGSTOP)
    try:
        for n in range(6000):
            probe.signal("Tick", n, "x" * 1000)
        await asyncio.sleep(0.05)
        assert bus._paused
    finally:
        os.kill(pid, signal.SIGCONT)
    async with asyncio.timeout(20):
        assert [await got.get() for _ in range(6000)] == list(range(6000))
    assert not bus._paused
    assert (await client.call(message("WhoAmI", "d", 0.0))).message_type is MessageType.METHOD_RETURN


async def test_a_bus_stuck_for_good_is_given_up(probe, monkeypatch):
    """More output than will ever be taken ends the connection, and who waits for the end learns why."""
    bus: Connection = probe.__dict__["_test_bus"]
    monkeypatch.setattr(transport, "GIVE_UP_ABOVE_BYTES", 1 << 20)
    pid = bus_pid(bus)
    os.kill(pid, signal.SIGSTOP)
    try:
        for n in range(2000):
            probe.signal("Tick", n, "x" * 1000)
        async with asyncio.timeout(5):
            assert "does not take" in await bus.wait_disconnected()
    finally:
        os.kill(pid, signal.SIGCONT)


async def test_the_end_of_the_bus_is_noticed_and_calls_under_way_fail(private_bus, connect):
    """A call waiting for its answer does not wait for its timeout."""
    bus, other = await connect(), await connect()
    pending = asyncio.ensure_future(
        bus.call(
            Message(destination=other.unique_name, path="/x", interface="a.b", member="Never"),
        )
    )
    other.add_message_handler(lambda _: True)
    await asyncio.sleep(0.05)
    os.kill(bus_pid(bus), signal.SIGTERM)
    async with asyncio.timeout(5):
        assert await bus.wait_disconnected()
        with pytest.raises(ConnectionError):
            await pending
    with pytest.raises(ConnectionError):
        await bus.call(Message(destination="a.b", path="/x", interface="a.b", member="Late"))


class Wire:
    """The reading side of a connection, fed with bytes."""

    def __init__(self) -> None:
        self.ours, self.theirs = socket.socketpair()
        self.theirs.setblocking(False)
        self.reader = self._new()

    def _new(self) -> Incoming:
        return Incoming(self.theirs.makefile("rb", buffering=0), self.theirs)

    def receive(self) -> Any:
        """The next message; None for one that was dropped; raises if it is not whole or the stream is lost."""
        if not self.reader.unmarshall():
            raise BlockingIOError
        message, reader = self.reader.message, self.reader
        reader.stream.close()
        self.reader = self._new()
        return message

    def close(self) -> None:
        self.reader.stream.close()
        self.ours.close()
        self.theirs.close()


@pytest.fixture
def wire():
    found = Wire()
    yield found
    found.close()


def marshalled(**fields: Any) -> bytearray:
    fields = {"destination": ":1.1", "path": "/a", "interface": "a.b", "member": "C", "serial": 5, **fields}
    return bytearray(Message(**fields)._marshall(negotiate_unix_fd=True))


def with_unknown_field(data: bytearray) -> bytearray:
    """The same message with header field 42, a string, in front of the others."""
    length = struct.unpack_from("<I", data, 12)[0]
    field = b"\x2a\x01s\x00" + struct.pack("<I", 3) + b"odd\x00" + b"\x00" * 4
    assert len(field) % 8 == 0
    out = data[:16] + field + data[16:]
    struct.pack_into("<I", out, 12, length + len(field))
    return out


def test_unknown_header_fields_are_passed_over(wire):
    """They may come from any user where the bus does not strip them, and must not end the connection."""
    wire.ours.sendall(with_unknown_field(marshalled(signature="s", body=["hello"])))
    assert wire.receive().body == ["hello"]


@pytest.mark.parametrize("damage", ["type", "signature", "body", "field"])
def test_a_malformed_message_concerns_itself_alone(wire, damage):
    """It is dropped with its descriptors, and the next one is read."""
    data = marshalled(signature="as", body=[["a", "b"]], unix_fds=[0])
    if damage == "type":
        data[1] = 9
    elif damage == "signature":
        at = data.index(b"as\0")
        data[at : at + 2] = b"((" if damage == "signature" else b"as"
    elif damage == "body":
        struct.pack_into("<I", data, len(data) - 4 - 2 - 4 - 6, 0xFFFF)
    else:
        data[17] = 200
    before = open_descriptors()
    wire.ours.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0]))])
    assert wire.receive() is None
    assert open_descriptors() == before
    wire.ours.sendall(marshalled(signature="v", body=[Variant("s", "next")]))
    assert wire.receive().body[0].value == "next"


def test_a_message_in_pieces_is_put_together(wire):
    """However the stream is cut, no byte is read past the end of a message."""
    data = marshalled(signature="s", body=["x" * 300])
    for byte in data[:-1]:
        wire.ours.sendall(bytes([byte]))
        with pytest.raises(BlockingIOError):
            wire.receive()
    wire.ours.sendall(data[-1:] + marshalled(signature="u", body=[7]))
    assert wire.receive().body == ["x" * 300]
    assert wire.receive().body == [7]


def test_a_lost_stream_ends_the_connection(wire):
    """Bytes that cannot be a message leave nothing to resynchronise on."""
    wire.ours.sendall(b"GET / HTTP/1.1\r\n\r\n")
    with pytest.raises(InvalidMessageError):
        wire.receive()


def test_the_end_of_the_stream_is_an_end(wire):
    """Not a message of no bytes."""
    wire.ours.shutdown(socket.SHUT_WR)
    with pytest.raises(EOFError):
        wire.receive()
