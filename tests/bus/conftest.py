"""A connection to a bus of one's own, and an object that does what transports and dispatchers have to get right."""

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from jindiskd.bus import contract
from jindiskd.bus.lib import BusType, Message
from jindiskd.bus.objects import Object, Options
from jindiskd.bus.peers import Caller, Descriptor
from jindiskd.bus.server import Server
from jindiskd.bus.transport import Connection, connect_to
from jindiskd.errors import Busy

ROOT = "/org/example"
NAME = "org.example.Probe"
PROBE = contract.parse(
    """<node><interface name="org.example.Probe">
    <method name="WhoAmI">
      <arg name="delay" type="d" direction="in"/><arg name="sender" type="s" direction="out"/>
    </method>
    <method name="Fail"><arg name="how" type="s" direction="in"/></method>
    <method name="Swap"><arg name="given" type="h" direction="in"/><arg name="back" type="h" direction="out"/></method>
    <method name="Big"><arg name="count" type="u" direction="in"/><arg name="text" type="s" direction="out"/></method>
    <method name="Choose">
      <annotation name="org.jindisk1.Options" value="colour:s size:u"/>
      <arg name="options" type="a{sv}" direction="in"/>
    </method>
    <method name="Guarded"><annotation name="org.jindisk1.Action" value="org.jindisk1.inspect"/></method>
    <signal name="Tick"><arg name="n" type="u"/><arg name="padding" type="s"/></signal>
    <property name="Level" type="u" access="read"/>
    <property name="Costly" type="s" access="read">
      <annotation name="org.freedesktop.DBus.Property.EmitsChangedSignal" value="invalidates"/>
    </property>
    </interface></node>"""
)[NAME]


class Probe(Object, spec=PROBE):
    def __init__(self) -> None:
        self._level = 0
        self._ran: list[str] = []

    async def who_am_i(self, caller: Caller, delay: float) -> str:
        await asyncio.sleep(delay)
        return f"{caller.sender} {caller.uid}"

    async def fail(self, caller: Caller, how: str) -> None:
        if how == "typed":
            raise Busy("the probe", "it is being tested")
        raise RuntimeError(f"secret text of /some/private/path {how}")

    async def swap(self, caller: Caller, given: Descriptor) -> Descriptor:
        fd = given.take()
        try:
            return Descriptor(os.dup(fd))
        finally:
            os.close(fd)

    async def big(self, caller: Caller, count: int) -> str:
        return "x" * count

    async def choose(self, caller: Caller, options: Options) -> None:
        self._ran.append(repr(dict(options)))

    async def guarded(self, caller: Caller) -> None:
        self._ran.append("guarded")
        caller.on_leave(lambda: self._ran.append("left"))

    @property
    def level(self) -> int:
        return self._level

    @property
    def costly(self) -> str:
        return "dear"


async def nobody_is_asked(caller: Caller, action: str, details: object) -> None:
    """Stands for polkit where authorisation is not what a test is about."""


@pytest.fixture
async def connect(private_bus: str) -> AsyncIterator[Callable[[], Awaitable[Connection]]]:
    """Makes connections to the private bus, closed at the end."""
    made: list[Connection] = []

    async def one() -> Connection:
        made.append(await connect_to(BusType.SYSTEM, private_bus))
        return made[-1]

    yield one
    for connection in made:
        await connection.aclose()


@pytest.fixture
async def probe(connect: Callable[[], Awaitable[Connection]]) -> AsyncIterator[Probe]:
    """A probe on the bus as org.example.Probe, at /org/example/probe."""
    bus = await connect()
    server = Server(bus, root=ROOT, authorize=nobody_is_asked)
    await server.start()
    item = Probe()
    server.export(ROOT + "/probe", item)
    await bus.request_name(NAME)
    item.__dict__["_test_bus"] = bus
    yield item
    await server.close()


@pytest.fixture
async def client(connect: Callable[[], Awaitable[Connection]]) -> Connection:
    """A client of the probe."""
    return await connect()


def call(member: str, signature: str = "", *body: Any, **fields: Any) -> Any:
    """A message to the probe."""
    fields.setdefault("interface", NAME)
    fields.setdefault("path", ROOT + "/probe")
    return Message(destination=NAME, member=member, signature=signature, body=list(body), **fields)


@pytest.fixture
def message() -> Callable[..., Any]:
    """Makes messages to the probe."""
    return call
