"""The bus as the command line sees it: calls, properties, signals, and errors with their exit status."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import click

from jindiskd.bus.contract import BUS_NAME, ERROR_PREFIX, FDO, ROOT_PATH, interface
from jindiskd.bus.incoming import close_all
from jindiskd.bus.lib import BusType, Message, MessageFlag, MessageType, Variant
from jindiskd.bus.transport import Connection, connect_to
from jindiskd.cli import elsewhere
from jindiskd.cli.app import App
from jindiskd.cli.exits import BY_CODE, BY_NAME
from jindiskd.errors import EXIT_FAILED, JindiskError, ServiceUnavailable

AUDIT, AUDIT_PATH = "org.jindisk1.Audit", f"{ROOT_PATH}/audit"
TIMEOUT_S = 30.0
INTERACTIVE_TIMEOUT_S = 300.0
AGENT = Path("/usr/bin/pkttyagent")


class RemoteError(JindiskError, code="RemoteError"):
    """An error that the service answered with; keeps its name, its sentence and its exit status."""

    def __init__(self, name: str, message: str) -> None:
        super().__init__(message or name)
        self.name = name
        self.code = name.removeprefix(ERROR_PREFIX)  # type: ignore[misc]  # this one class stands for many codes
        exit_code = (
            BY_CODE.get(self.code, EXIT_FAILED) if name.startswith(ERROR_PREFIX) else BY_NAME.get(name, EXIT_FAILED)
        )
        self.exit_code = exit_code  # type: ignore[misc]  # as above


def plain(value: Any) -> Any:
    """A value without its variants."""
    if isinstance(value, Variant):
        return plain(value.value)
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    return value


class Client:
    """A connection to the service."""

    def __init__(
        self, bus: Connection, *, auto_start: bool = True, interactive: bool = True, host: str = ""
    ) -> None:
        """`host`: whose service it is, if not this machine's."""
        self._bus, self.auto_start, self.host = bus, auto_start, host
        self._signals: asyncio.Queue[Any] = asyncio.Queue()
        self._owner: str | None = None
        self._interactive = interactive and sys.stdin.isatty()
        bus.add_message_handler(self._on_message)

    def _on_message(self, message: Any) -> bool:
        """Keep the signals that are to be believed: a bus hands over what any of its users sends to us by name."""
        if message.message_type is not MessageType.SIGNAL:
            return False
        if message.sender == FDO:
            if message.member == "NameOwnerChanged" and message.body[0] == BUS_NAME:
                self._owner = message.body[2]
                self._signals.put_nowait(message)
        elif self._owner and message.sender == self._owner:
            self._signals.put_nowait(message)
        return False

    async def _send(
        self,
        destination: str,
        path: str,
        iface: str,
        member: str,
        signature: str,
        body: list[Any],
        fds: Sequence[int] = (),
    ) -> Any:
        flags = MessageFlag.ALLOW_INTERACTIVE_AUTHORIZATION if self._interactive else MessageFlag.NONE
        if not self.auto_start:
            flags |= MessageFlag.NO_AUTOSTART
        message = Message(
            destination=destination,
            path=path,
            interface=iface,
            member=member,
            signature=signature,
            body=body,
            flags=flags,
            unix_fds=list(fds),
        )
        try:
            reply = await self._bus.call(message, INTERACTIVE_TIMEOUT_S if self._interactive else TIMEOUT_S)
        except TimeoutError as exc:
            raise ServiceUnavailable("jindiskd.service", "it does not answer; look at its journal") from exc
        if reply.message_type is MessageType.ERROR:
            close_all(reply.unix_fds or ())
            text = reply.body[0] if reply.body and isinstance(reply.body[0], str) else ""
            if reply.error_name in {FDO + ".Error.ServiceUnknown", FDO + ".Error.NameHasNoOwner"}:
                raise ServiceUnavailable("jindiskd.service", "start it with: systemctl start jindiskd")
            raise RemoteError(reply.error_name, text)
        return reply

    async def call(self, path: str, iface: str, member: str, *arguments: Any, fds: Sequence[int] = ()) -> Any:
        """Call a method of the contract; returns its result, or a tuple of several, or None."""
        method = interface(iface).methods[member]
        if not self._bus.carries_fds and (fds or "h" in method.out_signature):
            elsewhere.refuse_files(self.host, member)
        reply = await self._send(BUS_NAME, path, iface, member, method.in_signature, list(arguments), fds)
        if method.out_signature == "h":
            return reply.unix_fds[reply.body[0]]
        close_all(reply.unix_fds or ())
        results = [plain(value) for value in reply.body]
        return None if not results else results[0] if len(results) == 1 else tuple(results)

    async def properties(self, path: str, iface: str) -> dict[str, Any]:
        """All properties of an object."""
        reply = await self._send(BUS_NAME, path, FDO + ".Properties", "GetAll", "s", [iface])
        found: dict[str, Any] = plain(reply.body[0])
        return found

    async def managed(self) -> dict[str, dict[str, dict[str, Any]]]:
        """All objects but the service itself: interface to path to properties."""
        reply = await self._send(BUS_NAME, ROOT_PATH, FDO + ".ObjectManager", "GetManagedObjects", "", [])
        found: dict[str, dict[str, dict[str, Any]]] = {}
        for path, there in plain(reply.body[0]).items():
            for iface, properties in there.items():
                found.setdefault(iface, {})[path] = properties
        return found

    async def objects(self, iface: str) -> dict[str, dict[str, Any]]:
        """All objects with an interface: path to properties."""
        return (await self.managed()).get(iface, {})

    async def subscribe(self) -> None:
        """Have the bus deliver our service's signals, and the news that it is gone. Before the call they belong to."""
        rules = (
            f"type='signal',sender='{BUS_NAME}',path_namespace='{ROOT_PATH}'",
            f"type='signal',sender='{FDO}',interface='{FDO}',member='NameOwnerChanged',arg0='{BUS_NAME}'",
        )
        for rule in rules:
            await self._send(FDO, "/org/freedesktop/DBus", FDO, "AddMatch", "s", [rule])
        owner = ""
        with contextlib.suppress(ServiceUnavailable):  # nobody has the name yet
            reply = await self._send(FDO, "/org/freedesktop/DBus", FDO, "GetNameOwner", "s", [BUS_NAME])
            owner = reply.body[0]
        if self._owner is None:  # otherwise the bus has told since then who it is
            self._owner = owner

    async def signals(self) -> AsyncIterator[tuple[str, str, list[Any]]]:
        """The signals as they come: path, member, arguments.

        Raises:
            ServiceUnavailable: the service has gone.
        """
        async for path, member, body in self.news():
            if not path and not body[2]:
                raise ServiceUnavailable("jindiskd.service", "it has stopped meanwhile; look at its journal")
            if path:
                yield path, member, body

    async def news(self) -> AsyncIterator[tuple[str, str, list[Any]]]:
        """The signals as they come: path, member, arguments; and with an empty path that the service came or went.

        That is NameOwnerChanged with the bus name, its owner before, and its owner now; empty for none.
        """
        while True:
            message = await self._signals.get()
            if message.sender == FDO:
                yield "", message.member, message.body
            elif message.path.startswith(ROOT_PATH):
                yield message.path, message.member, plain(message.body)

    async def ended(self) -> str:
        """Wait until the connection to the bus has ended; why."""
        return await self._bus.wait_disconnected()


@contextlib.asynccontextmanager
async def connected(*, agent: bool = True, auto_start: bool = True) -> AsyncIterator[Client]:
    """A client of the service on the system bus; `agent`: ask for a password in the terminal where that is needed.

    With `--host` it is that machine's, where no agent of ours is asked.

    Raises:
        ServiceUnavailable: there is no bus.
    """
    context = click.get_current_context(silent=True)
    app = context.find_object(App) if context is not None else None
    if app is not None and app.host:
        async with elsewhere.bus_of(app.host) as there:
            yield Client(there, auto_start=auto_start, interactive=False, host=app.host)
        return
    bus = await connect_to(BusType.SYSTEM)
    asking = await asyncio.to_thread(_start_agent) if agent else None
    try:
        yield Client(bus, auto_start=auto_start, interactive=agent)
    finally:
        if asking is not None:
            asking.terminate()
            await asyncio.to_thread(asking.wait)
        await bus.aclose()


def _start_agent() -> subprocess.Popen[bytes] | None:
    """The program that asks for a password in a terminal where no desktop would; it is bound to our process."""
    if os.geteuid() == 0 or not sys.stdin.isatty() or not AGENT.exists():
        return None
    told, tell = os.pipe()
    # Not through `base.process.run`: it must live beside us, on our terminal.
    agent = subprocess.Popen([AGENT, "--notify-fd", str(tell), "--process", str(os.getpid())], pass_fds=(tell,))
    os.close(tell)
    os.read(told, 1)  # ends when the agent is registered, or gone
    os.close(told)
    return agent
