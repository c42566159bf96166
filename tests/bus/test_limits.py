"""What one client or one user may hold of the service, and what becomes of it when he leaves."""

import asyncio
import os
import signal
import socket
import struct
import sys
from pathlib import Path

import pytest

from jindiskd.bus import outgoing
from jindiskd.bus.server import CALLS_PER_PEER, CALLS_PER_USER, Server

RAWBUS = Path(__file__).resolve().parents[1] / "support/rawbus.py"
NOBODY = 65534

FLOOD = f"""
import runpy, sys
rawbus = runpy.run_path({str(RAWBUS)!r})
clients = [rawbus["RawBus"](sys.argv[1]) for _ in range(4)]
where = dict(destination="org.example.Probe", path="/org/example/probe")
for client in clients:
    for _ in range({CALLS_PER_PEER}):
        client.send("org.example.Probe", "WhoAmI", "d", (float(sys.argv[2]),), **where)
print("sent", flush=True)
refused = 0
for client in clients:
    left = {CALLS_PER_PEER}
    while left:
        kind, fields, body = client.receive()
        if fields.get(5) in (1, None):  # the answer to Hello, and signals
            continue
        left -= 1
        if kind == rawbus["ERROR"]:
            assert fields[4].endswith("LimitsExceeded"), fields
            assert "of this user" in body[0], body
            refused += 1
print(refused)
"""


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


async def until(condition) -> None:
    async with asyncio.timeout(120):
        while not condition():  # noqa: ASYNC110 (what is waited for has no event)
            await asyncio.sleep(0.02)


@pytest.mark.skipif(os.getuid() != 0, reason="needs root to become another user")
async def test_a_user_with_many_connections_leaves_room_for_others(probe, client, message, private_bus):
    """Four connections with 32 calls each hold 64; root, and everybody else, is answered meanwhile."""
    words = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", sys.executable, "-c", FLOOD]
    process = await asyncio.create_subprocess_exec(*words, private_bus, "10", stdout=asyncio.subprocess.PIPE, cwd="/")
    assert process.stdout is not None
    async with asyncio.timeout(120):
        assert await process.stdout.readline() == b"sent\n"
        replies = await asyncio.gather(*(client.call(message("WhoAmI", "d", 0.01)) for _ in range(CALLS_PER_PEER)))
        assert {reply.body[0] for reply in replies} == {f"{client.unique_name} 0"}
        out, _ = await process.communicate()
    assert int(out) == 4 * CALLS_PER_PEER - CALLS_PER_USER


async def test_more_descriptors_than_a_method_takes_are_refused_at_once(probe, client, message):
    """Before polkit is asked, which may take minutes; none is left."""
    reply = await client.call(message("WhoAmI", "d", 0.0))
    before = open_descriptors()
    null = os.open("/dev/null", os.O_RDONLY)
    try:
        for member, signature, body, count in (
            ("WhoAmI", "d", (5.0,), 1),
            ("Guarded", "", (), 16),
            ("Swap", "h", (0,), 2),
        ):
            fds = [null] * count
            reply = await client.call(message(member, signature, *body, unix_fds=fds))
            assert reply.error_name == "org.freedesktop.DBus.Error.InvalidArgs"
            assert "fewer file descriptors" in reply.body[0]
    finally:
        os.close(null)
    assert probe._ran == []
    assert open_descriptors() == before


async def test_who_left_while_he_was_asked_for_is_known_to_have_left(connect, message, probe, private_bus):
    """The news comes before the handler runs: what it binds to its caller ends nevertheless."""
    bus = await connect()
    asked, decided = asyncio.Event(), asyncio.Event()

    async def authorize(caller: object, action: str, details: object) -> None:
        asked.set()
        await decided.wait()

    server = Server(bus, root="/org/example", authorize=authorize)
    await server.start()
    item = type(probe)()
    server.export("/org/example/probe", item)
    leaver = await connect()
    call = message("Guarded")
    call.destination = bus.unique_name
    pending = asyncio.ensure_future(leaver.call(call))
    async with asyncio.timeout(120):
        await asked.wait()
    name = leaver.unique_name
    await leaver.aclose()
    await asyncio.gather(pending, return_exceptions=True)
    await until(lambda: name not in server.peers._watches)  # the news was heard
    decided.set()
    await until(lambda: "left" in item._ran)
    assert item._ran == ["guarded", "left"]
    assert server.peers._watches == {}
    await server.close()


async def test_nothing_is_remembered_of_callers_that_left(probe, connect, message):
    """A hundred peers that called and went: no watch, no count, no identity is kept."""
    server = probe._server
    for _ in range(10):
        peers = [await connect() for _ in range(10)]
        await asyncio.gather(*(peer.call(message("Guarded")) for peer in peers))
        for peer in peers:
            await peer.aclose()
    await until(lambda: not server.peers._uids)
    assert (server._per_peer, server._per_user, server.peers._watches) == ({}, {}, {})


async def test_a_bus_that_takes_nothing_more_is_given_up(probe, monkeypatch):
    """However little is queued: others' unread messages may keep the bus from ever reading from us again."""
    bus = probe.__dict__["_test_bus"]
    monkeypatch.setattr(outgoing, "STUCK_S", 0.5)
    credentials = bus._sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid = struct.unpack("3i", credentials)[0]
    os.kill(pid, signal.SIGSTOP)
    try:
        for number in range(400):
            probe.signal("Tick", number, "x" * 1000)
        async with asyncio.timeout(120):
            assert "does not take our messages" in await bus.wait_disconnected()
    finally:
        os.kill(pid, signal.SIGCONT)
    assert not bus.connected


async def test_a_slow_bus_is_not_given_up(probe, client, monkeypatch):
    """As long as it takes something, and when it takes all again, nothing was lost."""
    bus = probe.__dict__["_test_bus"]
    monkeypatch.setattr(outgoing, "STUCK_S", 0.5)
    for number in range(20):
        probe.signal("Tick", number, "x" * 50_000)
        await asyncio.sleep(0.1)
    await until(lambda: not bus._writer.queued)
    await asyncio.sleep(1)
    assert bus.connected
    assert bus._writer._watch is None
