"""The connection to libvirt: calls in one owned thread, events from another that only passes them on."""

from __future__ import annotations

import asyncio
import contextlib
import re
import threading
from collections.abc import Callable
from typing import Any, TypeVar
from urllib.parse import urlsplit

import libvirt
import structlog

from jindiskd.domain.thread import CallThread
from jindiskd.errors import AlreadyExists, JindiskError, NotFound, NotSupported, ServiceUnavailable

log = structlog.get_logger(__name__)
T = TypeVar("T")
# virDomainEventType
STARTED, SUSPENDED, RESUMED, STOPPED, SLEEPING, CRASHED = 2, 3, 4, 5, 7, 8
RETRY_S = 2.0
CLOSE_S = 5.0
MAX_SENTENCE, MAX_LINES = 600, 3
_STAMP = re.compile(r"\d{4}-\d\d-\d\dT[\d:.]+Z ")
UNREACHABLE = frozenset({libvirt.VIR_ERR_SYSTEM_ERROR, libvirt.VIR_ERR_RPC, libvirt.VIR_ERR_NO_CONNECT})


class LibvirtFailed(JindiskError, code="LibvirtFailed"):
    """libvirt or QEMU refused."""

    def __init__(self, what: str, said: str) -> None:
        """`what` was tried, `said` is libvirt's sentence."""
        super().__init__(f"{what} failed: {said}")


def sentence(message: str) -> str:
    """libvirt's message on one line, without the warnings that QEMU prints before it says what is wrong."""
    lines = [_STAMP.sub("", line).strip() for line in message.splitlines()]
    kept = [line for line in lines if line and ": warning: " not in line]
    if kept and len(kept) < len(lines) and kept[-1] != lines[0]:
        kept = kept[-MAX_LINES:]
    return " ".join(kept or lines[-1:])[-MAX_SENTENCE:]


def translate(exc: libvirt.libvirtError, what: str, *, alive: bool = True) -> JindiskError:
    """The typed error for an error of libvirt, by its code and never by its text.

    `alive`: whether the connection still stands. One that does not has errors of its own for every call.
    """
    code = exc.get_error_code()
    said = sentence(str(exc.get_error_message() or exc))
    if code == libvirt.VIR_ERR_NO_DOMAIN:
        return NotFound("domain", what)
    if code in UNREACHABLE or not alive:
        return ServiceUnavailable("libvirtd", f"{what} failed: {said}; start it, or set domains.libvirt_uri")
    if code == libvirt.VIR_ERR_OPERATION_FAILED and "already exists" in said:
        return AlreadyExists("domain", what)
    return LibvirtFailed(what, said)


class Connection:
    """One libvirt connection that comes back by itself.

    `on_event(uuid, event)` and `on_connected()` run in the event loop. After a reconnect everything is to be read anew.
    """

    _events_running = False

    def __init__(self, uri: str, *, on_event: Callable[[str, int], None], on_connected: Callable[[], None]) -> None:
        """Connect nothing yet."""
        self._uri, self._on_event, self._on_connected = uri, on_event, on_connected
        self._calls = CallThread("libvirt")
        self._conn: libvirt.virConnect | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[None] | None = None
        self._lost = asyncio.Event()
        self._registration = -1

    @property
    def remote(self) -> bool:
        """Whether libvirt is another machine's, whose guests reach no socket of this one."""
        return is_remote(self._uri)

    def require_local(self, what: str) -> None:
        """Refuse what needs sockets, devices or files of the host that libvirt runs on.

        Raises:
            NotSupported: libvirt is another machine's.
        """
        if self.remote:
            host = urlsplit(self._uri).hostname
            remedy = (
                "guests reach the sockets of their own host alone: run jindiskd there, with domains.libvirt_uri unset, "
                f"take images there by 'jindiskctl image export IMAGE - | ssh {host} jindiskctl image import -', and "
                f"work with it from here by 'jindiskctl --host {host} ...'"
            )
            raise NotSupported(f"{what} on another machine ({shown(self._uri)})", remedy)

    @property
    def connected(self) -> bool:
        """Whether libvirt answers, as far as known."""
        return self._conn is not None

    async def start(self) -> None:
        """Begin to connect; returns at once."""
        self._loop = asyncio.get_running_loop()
        _start_event_thread()
        self._task = self._loop.create_task(self._keep())

    async def stop(self) -> None:
        """Close the connection; a libvirtd that does not answer is left to itself."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        self._loop = None  # what libvirt's thread still has to say goes nowhere
        if self._conn is not None:
            try:
                async with asyncio.timeout(CLOSE_S):
                    await self._give_back()
            except TimeoutError:
                log.warning("libvirt does not answer: its connection is given up", uri=self._uri)
        self._calls.close()

    async def call(self, what: str, function: Callable[[libvirt.virConnect], T]) -> T:
        """Run `function` with the connection in the libvirt thread; `what` names the thing in errors."""
        conn = self._conn
        if conn is None:
            raise ServiceUnavailable("libvirtd", "it is not connected; start it, or set domains.libvirt_uri")

        def run() -> T:
            try:
                return function(conn)
            except libvirt.libvirtError as exc:
                raise translate(exc, what, alive=_stands(conn)) from exc

        return await self._calls.run(run)

    async def _keep(self) -> None:
        warned = False
        while True:
            self._lost.clear()
            try:
                self._conn = await self._calls.run(self._open)
            except libvirt.libvirtError as exc:
                if not warned:
                    log.warning("libvirt is not reachable", uri=self._uri, problem=str(exc))
                warned = True
                await asyncio.sleep(RETRY_S)
                continue
            warned = False
            log.info("connected to libvirt", uri=self._uri)
            self._on_connected()
            await self._lost.wait()
            log.warning("the connection to libvirt was lost", uri=self._uri)
            await self._give_back()

    def _open(self) -> libvirt.virConnect:
        conn = libvirt.open(self._uri)
        conn.setKeepAlive(5, 3)
        conn.registerCloseCallback(self._closed, None)
        self._registration = conn.domainEventRegisterAny(
            None, libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE, self._lifecycle, None
        )
        return conn

    async def _give_back(self) -> None:
        conn, self._conn = self._conn, None
        if conn is not None:
            await self._calls.run(lambda: self._close(conn))

    def _close(self, conn: libvirt.virConnect) -> None:
        # Registered callbacks hold the connection, so that closing alone would not end it.
        with contextlib.suppress(libvirt.libvirtError):
            conn.domainEventDeregisterAny(self._registration)
            conn.unregisterCloseCallback()
        with contextlib.suppress(libvirt.libvirtError):
            conn.close()

    def _closed(self, _conn: Any, _reason: int, _opaque: Any) -> None:
        self._to_loop(self._lost.set)

    def _lifecycle(self, _conn: Any, dom: Any, event: int, _detail: int, _opaque: Any) -> None:
        self._to_loop(self._on_event, dom.UUIDString(), event)

    def _to_loop(self, function: Callable[..., None], *args: Any) -> None:
        loop = self._loop
        if loop is not None and not loop.is_closed():
            loop.call_soon_threadsafe(function, *args)


def is_remote(uri: str) -> bool:
    """Whether a libvirt URI names a machine. A port that is forwarded from here is another machine's, too.

    Source: libvirt, "Connection URIs": `driver[+transport]://[user@][host][:port]/path`; without a host, and with the
    transport `unix`, it is the machine itself.
    """
    parts = urlsplit(uri)
    return bool(parts.hostname) and not parts.scheme.endswith("+unix")


def shown(uri: str) -> str:
    """A URI without user, password and parameters."""
    parts = urlsplit(uri)
    return f"{parts.scheme}://{parts.hostname or ''}{parts.path}"


def _stands(conn: libvirt.virConnect) -> bool:
    try:
        return bool(conn.isAlive())
    except libvirt.libvirtError:
        return False


def _start_event_thread() -> None:
    """Run libvirt's default event loop, once for the process; it lives as long as the process."""
    if Connection._events_running:  # noqa: SLF001 (this module's own)
        return
    Connection._events_running = True  # noqa: SLF001
    libvirt.registerErrorHandler(lambda _context, _error: None, None)  # the library prints errors otherwise
    libvirt.virEventRegisterDefaultImpl()
    libvirt.virEventAddTimeout(1000, lambda _timer, _opaque: None, None)  # a loop without handles would spin

    def run() -> None:
        while True:
            libvirt.virEventRunDefaultImpl()

    threading.Thread(target=run, name="libvirt-events", daemon=True).start()
