"""Who is on the other side: the caller of a method, its credentials, its descriptors, and news of its leaving."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from jindiskd.bus.contract import FDO
from jindiskd.bus.faults import ACCESS_DENIED, INVALID_ARGS, BusFault
from jindiskd.bus.incoming import close_all
from jindiskd.bus.lib import Message, MessageType
from jindiskd.bus.transport import Connection
from jindiskd.errors import ServiceUnavailable

Authorize = Callable[["Caller", str, Mapping[str, str]], Awaitable[None]]
"""Raises unless the caller has the right (a polkit action); the mapping fills the placeholders of its message."""
KNOWN_LIMIT = 1024


class Descriptor:
    """A file descriptor on its way over the bus. Closed by the dispatcher unless somebody takes it."""

    __slots__ = ("_fd",)

    def __init__(self, fd: int) -> None:
        self._fd: int | None = fd

    def take(self) -> int:
        """The descriptor; the taker closes it."""
        if self._fd is None:
            raise BusFault(INVALID_ARGS, "the same file descriptor is used twice")
        fd, self._fd = self._fd, None
        return fd

    def fileno(self) -> int:
        """The descriptor, still to be closed here."""
        if self._fd is None:
            raise BusFault(INVALID_ARGS, "the file descriptor is closed already")
        return self._fd

    def close(self) -> None:
        """Close it if nobody took it."""
        if self._fd is not None:
            os.close(self.take())


class Descriptors:
    """The descriptors that came with one call."""

    def __init__(self, fds: Sequence[int]) -> None:
        self._all = [Descriptor(fd) for fd in fds]

    def at(self, index: int) -> Descriptor:
        """The one that an argument of type `h` points to."""
        if index >= len(self._all):
            raise BusFault(INVALID_ARGS, "there is no such file descriptor in the message")
        return self._all[index]

    def __len__(self) -> int:
        return len(self._all)

    def close(self) -> None:
        """Close all that nobody took."""
        for descriptor in self._all:
            descriptor.close()


class Peers:
    """Credentials of the peers on the bus, from the bus daemon, and the news that one of them left."""

    def __init__(self, bus: Connection) -> None:
        self._bus = bus
        self._uids: dict[str, int] = {}
        self._watches: dict[str, list[list[Callable[[], None]]]] = {}

    async def start(self) -> None:
        """Have the bus daemon tell who leaves."""
        rule = (
            f"type='signal',sender='{FDO}',interface='{FDO}',"
            "path='/org/freedesktop/DBus',member='NameOwnerChanged',arg2=''"
        )
        await self._ask("AddMatch", rule)

    async def _ask(self, member: str, argument: str) -> Any:
        question = Message(
            destination=FDO,
            path="/org/freedesktop/DBus",
            interface=FDO,
            member=member,
            signature="s",
            body=[argument],
        )
        try:
            reply = await self._bus.call(question)
        except TimeoutError as exc:
            raise ServiceUnavailable("the D-Bus message bus", "it does not answer; try again") from exc
        close_all(reply.unix_fds or ())  # newer bus daemons add a process descriptor
        if reply.message_type is MessageType.ERROR:
            raise BusFault(ACCESS_DENIED, "the caller has left")
        return reply.body[0] if reply.body else None

    async def uid(self, name: str) -> int:
        """User id of the peer with this unique name."""
        known = self._uids.get(name)
        if known is not None:
            return known
        found = await self._ask("GetConnectionCredentials", name)
        uid = found.get("UnixUserID")
        if uid is None:
            raise BusFault(ACCESS_DENIED, "the bus does not know who the caller is")
        if len(self._uids) >= KNOWN_LIMIT:
            self._uids.clear()
        self._uids[name] = int(uid.value)
        return self._uids[name]

    def watch(self, name: str, gone: Callable[[], None]) -> Callable[[], None]:
        """Have `gone()` called once when the peer leaves; the function returned ends the watch."""
        entry = [gone]
        self._watches.setdefault(name, []).append(entry)

        def end() -> None:
            entries = self._watches.get(name, [])
            if entry in entries:
                entries.remove(entry)
                if not entries:
                    del self._watches[name]

        return end

    def presence(self, name: str) -> Presence:
        """Whether the peer is still there, from now on. To be asked for when its message is taken from the socket:

        the news that it left comes after that, and would be missed by whoever begins to listen later.
        """
        return Presence(self, name)

    def on_signal(self, message: Any) -> None:
        """Look at a signal; the bus daemon lets nobody else sign as itself."""
        if (message.sender, message.member, message.signature) != (FDO, "NameOwnerChanged", "sss"):
            return
        name, _, new_owner = message.body
        if not new_owner:
            self._uids.pop(name, None)
            for entry in self._watches.pop(name, []):
                entry[0]()


class Presence:
    """Whether a peer has left the bus since this was made; `end` it when that no longer matters."""

    def __init__(self, peers: Peers, name: str) -> None:
        self.peers, self.name = peers, name
        self.left = False
        self.end = peers.watch(name, self._gone)

    def _gone(self) -> None:
        self.left = True


class Caller:
    """Who calls a method."""

    def __init__(self, *, uid: int, interactive: bool, presence: Presence, authorize: Authorize) -> None:
        self.sender, self.uid, self.interactive = presence.name, uid, interactive
        self._presence, self._authorize = presence, authorize

    async def authorize(self, action: str, details: Mapping[str, str]) -> None:
        """Raise unless the caller has the right `action`."""
        await self._authorize(self, action, details)

    def on_leave(self, gone: Callable[[], None]) -> Callable[[], None]:
        """Have `gone()` called once when the caller leaves the bus, soon if it has; the function returned ends that."""
        if self._presence.left:
            return asyncio.get_running_loop().call_soon(gone).cancel
        return self._presence.peers.watch(self.sender, gone)
