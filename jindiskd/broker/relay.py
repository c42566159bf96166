"""The relay: passes a guest's stream to the broker of its owner, byte for byte, and understands nothing of it.

Guest and broker speak TLS 1.3 through it, and the guest knows the broker by a digest in its measured configuration: the
relay can delay or drop, and nothing else. It opens connections to the one configured broker alone. What a guest may use
is bounded: connections at once and per minute, bytes, idle time and life of each; a guest over a bound is cut off, and
others do not notice. While the broker cannot be reached, guests are told so at once by the end of their connection, and
the broker is tried again after a while that doubles.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import structlog

from jindiskd.base.endpoint import Endpoint

log = structlog.get_logger(__name__)
CHUNK_BYTES = 64 << 10
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.25, 15.0
LOG_S = 60.0


class RelayState(enum.StrEnum):
    """How the way to the broker is."""

    IDLE = "idle"  # nothing is open
    OPEN = "open"  # at least one connection is passed on
    UNREACHABLE = "unreachable"  # the broker did not answer the last time


@dataclass(frozen=True, slots=True, kw_only=True)
class RelayLimits:
    """What one guest may use, and all together."""

    connections: int = 8
    """At once, of one guest."""
    connections_in_all: int = 512
    starts_per_minute: int = 120
    """Connections begun by one guest within a minute."""
    bytes: int = 64 << 20
    """Of one connection, in each direction."""
    connect_s: float = 10.0
    idle_s: float = 75.0
    life_s: float = 600.0


@dataclass(slots=True, kw_only=True)
class RelayView:
    """What is told of one guest's way, or of all together."""

    state: RelayState = RelayState.IDLE
    reason: str = ""
    """Why it is unreachable, or why a connection was cut off last; empty while all is well."""
    open: int = 0
    connections: int = 0
    """Begun since the guest is served."""
    refused: int = 0
    """Of these, not passed on."""
    bytes_up: int = 0
    """From the guest to the broker."""
    bytes_down: int = 0


class _Over(Exception):
    """A bound is reached."""


class Relay:
    """The way of all guests to one broker.

    Args:
        broker: where it is.
        limits: what guests may use.
        changed: called in the event loop when a state has changed.
        clock: monotonic, seconds.
    """

    def __init__(
        self,
        broker: Endpoint,
        *,
        limits: RelayLimits | None = None,
        changed: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Connect nothing yet."""
        self.broker, self.limits, self.changed, self.clock = broker, limits or RelayLimits(), changed, clock
        self.total = RelayView()
        self._guests: dict[str, RelayListener] = {}
        self._retry_at, self._pause_s = 0.0, FIRST_PAUSE_S

    def view(self, domain_uuid: str) -> RelayView:
        """How one guest's way is."""
        found = self._guests.get(domain_uuid)
        return found.view if found is not None else RelayView()

    async def open(self, path: Path, domain_uuid: str) -> RelayListener:
        """Listen on a unix socket for one guest; a socket left there is replaced."""
        listener = RelayListener(self, path, domain_uuid)
        await listener.start()
        self._guests[domain_uuid] = listener
        return listener

    def forget(self, listener: RelayListener) -> None:
        """A guest's listener was closed."""
        if self._guests.get(listener.domain_uuid) is listener:
            del self._guests[listener.domain_uuid]

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection to the broker.

        Raises:
            OSError: it cannot be reached, or could not a moment ago.
        """
        if self.clock() < self._retry_at:
            raise OSError(self.total.reason)
        try:
            async with asyncio.timeout(self.limits.connect_s):
                streams = await asyncio.open_connection(self.broker.host, self.broker.port, limit=CHUNK_BYTES)
        except (OSError, TimeoutError) as exc:
            why = f"no answer within {self.limits.connect_s:g} s" if isinstance(exc, TimeoutError) else _reason(exc)
            raise OSError(self.missed(why)) from exc
        self.reached()
        return streams

    def missed(self, why: str) -> str:
        """Note that the broker did not answer, and why; returns what is told of that."""
        self._retry_at = self.clock() + self._pause_s
        self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)
        reason = f"the broker at {self.broker} cannot be reached: {why}"
        if self.total.state is not RelayState.UNREACHABLE:
            log.warning("the owner's broker cannot be reached", broker=str(self.broker), problem=why)
        self.total.state, self.total.reason = RelayState.UNREACHABLE, reason
        self.changed()
        return reason

    def reached(self) -> None:
        """Note that the broker answered."""
        if self.total.state is RelayState.UNREACHABLE:
            log.info("the owner's broker is reached again", broker=str(self.broker))
        self._retry_at, self._pause_s = 0.0, FIRST_PAUSE_S
        self.total.state, self.total.reason = RelayState.OPEN if self.total.open else RelayState.IDLE, ""
        self.changed()

    def count(self, view: RelayView, by: int) -> None:
        """A connection of a guest was opened or closed."""
        for one in (view, self.total):
            one.open += by
            if one.state is not RelayState.UNREACHABLE:
                one.state = RelayState.OPEN if one.open else RelayState.IDLE
        self.changed()


class RelayListener:
    """One guest's way. Close it when the guest is gone."""

    def __init__(self, relay: Relay, path: Path, domain_uuid: str) -> None:
        """Listen nowhere yet."""
        self.domain_uuid, self.view = domain_uuid, RelayView()
        self._relay, self._path = relay, path
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._started: list[float] = []
        self._next_log = 0.0

    async def start(self) -> None:
        """Begin to listen."""
        self._path.unlink(missing_ok=True)
        self._server = await asyncio.start_unix_server(self._accepted, os.fspath(self._path), limit=CHUNK_BYTES)
        self._path.chmod(0o600)

    async def close(self) -> None:
        """Stop listening, and end what is passed on."""
        if self._server is not None:
            self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._relay.forget(self)
        self._path.unlink(missing_ok=True)

    def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # Counted before the first step of a task: a burst must not pass between.
        problem = self._problem()
        self.view.connections += 1
        if problem:
            self._refuse(problem)
            writer.transport.abort()
            return
        self._relay.count(self.view, 1)
        task = asyncio.get_running_loop().create_task(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _problem(self) -> str:
        """Why a new connection is not passed on; empty if it is."""
        limits, now = self._relay.limits, self._relay.clock()
        self._started = [at for at in self._started if at > now - 60]
        if self.view.open >= limits.connections:
            return f"the guest has {limits.connections} connections open"
        if self._relay.total.open >= limits.connections_in_all:
            return f"all guests together have {limits.connections_in_all} connections open"
        if len(self._started) >= limits.starts_per_minute:
            return f"the guest began {limits.starts_per_minute} connections within a minute"
        self._started.append(now)
        return ""

    def _refuse(self, why: str) -> None:
        """Note that a connection was not passed on, or no longer; a guest that provokes it must not fill the log."""
        self.view.refused += 1
        self.view.reason = why
        now = self._relay.clock()
        if now >= self._next_log:
            self._next_log = now + LOG_S
            log.warning("a guest's connection was not passed on", domain=self.domain_uuid, problem=why)
        self._relay.changed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, to its end."""
        upstream: asyncio.StreamWriter | None = None
        try:
            try:
                far, upstream = await self._relay.connect()
            except OSError as exc:
                self.view.state = RelayState.UNREACHABLE
                self._refuse(str(exc))
                return
            self.view.state, self.view.reason = RelayState.OPEN, ""
            async with asyncio.timeout(self._relay.limits.life_s), asyncio.TaskGroup() as both:
                both.create_task(self._pass(reader, upstream, up=True))
                both.create_task(self._pass(far, writer, up=False))
        except TimeoutError:
            self._refuse(f"a connection was open for {self._relay.limits.life_s:g} s")
        except ExceptionGroup as group:
            over, rest = group.split(_Over)
            if over is not None:
                self._refuse(str(over.exceptions[0]))
            # That one end went away is no fault: the other is closed below.
            if rest is not None and rest.split((OSError, EOFError))[1] is not None:
                raise
        finally:
            for end in (upstream, writer):
                if end is not None and end.transport.get_write_buffer_size():
                    end.transport.abort()
                elif end is not None:
                    end.close()
            self._relay.count(self.view, -1)

    async def _pass(self, source: asyncio.StreamReader, target: asyncio.StreamWriter, *, up: bool) -> None:
        """One direction, until its end, which is passed on too."""
        limits, passed = self._relay.limits, 0
        while True:
            try:
                async with asyncio.timeout(limits.idle_s):
                    data = await source.read(CHUNK_BYTES)
                    target.write(data)
                    await target.drain()
            except TimeoutError as exc:
                raise _Over(f"a connection was idle for {limits.idle_s:g} s") from exc
            passed += len(data)
            if passed > limits.bytes:
                raise _Over(f"a connection passed more than {limits.bytes} bytes")
            for view in (self.view, self._relay.total):
                if up:
                    view.bytes_up += len(data)
                else:
                    view.bytes_down += len(data)
            if not data:
                with contextlib.suppress(OSError):
                    target.write_eof()
                return


def _reason(exc: OSError) -> str:
    """What the system says, without what it repeats of the address."""
    return exc.strerror or str(exc) or type(exc).__name__
