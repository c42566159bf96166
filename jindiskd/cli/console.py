"""`jindiskctl domain console`: what a guest writes on its console, once or as it comes, and the console itself."""

from __future__ import annotations

import asyncio
import codecs
import contextlib
import os
import socket
import sys
import termios
import tty
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from jindiskd.bus.lib import Variant
from jindiskd.cli.app import App, common, pass_app, run
from jindiskd.cli.client import Client, RemoteError, connected
from jindiskd.cli.completion import domains
from jindiskd.cli.domain import DOMAIN, DOMAINS

INTERVAL_S = 0.3
LAST_S = 1.0
"""For how long a log may still grow after the guest's end: the logger is another process."""
BLOCK_BYTES = 65536
ESCAPE = b"\x1d"
"""^], as of virsh."""
OFF = frozenset(("defined", "refused", "failed", "stopped"))


@click.command()
@click.argument("name", shell_complete=domains)
@click.option("--follow", is_flag=True, help="Go on with what it writes until it is off, or until ^C.")
@click.option("--attach", is_flag=True, help="Use the console itself, both ways; ^] leaves it.")
@click.option("--force", is_flag=True, help="With --attach: take it from whoever is attached.")
@common
@pass_app
def console(app: App, name: str, follow: bool, attach: bool, force: bool) -> None:
    """Print what a guest has written on its console. It is the guest's own text: do not trust it.

    What could steer your terminal is left out, but not with --attach, where the guest's programs need it.
    """
    if follow and attach:
        raise click.UsageError("--attach follows the console anyway: leave out --follow")
    if force and not attach:
        raise click.UsageError("--force is for --attach")
    if app.json and (follow or attach):
        raise click.UsageError("--json is for what has been written so far: leave out --follow and --attach")
    run(_attach(app, name, force) if attach else _follow(app, name) if follow else _print(app, name))


async def _print(app: App, name: str) -> None:
    async with connected() as client:
        path, _ = await DOMAINS.find(client, name)
        fd: int = await client.call(path, DOMAIN, "OpenConsole", {})
    with os.fdopen(fd, "rb") as log:
        text = log.read()
    if app.json:
        app.show({"console": text.decode(errors="replace")}, str)
    else:
        sys.stdout.write(Printable().clean(text, final=True))


class Printable:
    """Console output without the control sequences by which a guest could steer the terminal of its reader."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._return = False

    def clean(self, block: bytes, *, final: bool = False) -> str:
        """A block after those before it; characters and line ends may lie across two."""
        text = ("\r" if self._return else "") + self._decoder.decode(block, final)
        self._return = text.endswith("\r") and not final
        text = text.removesuffix("\r") if self._return else text
        text = text.replace("\r\n", "\n").replace("\r", "\n")
        return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)


# Following the log


class Log:
    """A console's log file, through what libvirt's logger does with it: another file under its name, a new start."""

    def __init__(self, fd: int) -> None:
        """The descriptor is this object's from now on."""
        self._fd = fd
        self._name = self._where()

    def _where(self) -> str:
        return str(Path(f"/proc/self/fd/{self._fd}").readlink())

    def read(self) -> bytes:
        """All that is new; of a file that was emptied, all."""
        if os.fstat(self._fd).st_size < os.lseek(self._fd, 0, os.SEEK_CUR):
            os.lseek(self._fd, 0, os.SEEK_SET)
        parts = []
        while part := os.read(self._fd, BLOCK_BYTES):
            parts.append(part)
        return b"".join(parts)

    @property
    def moved(self) -> bool:
        """Whether the file has another name now, so that it is at its end and another has begun."""
        return self._where() != self._name

    def replace(self, fd: int) -> None:
        """Go on with another file."""
        os.close(self._fd)
        self._fd = fd
        self._name = self._where()

    def close(self) -> None:
        """Give the file back."""
        os.close(self._fd)


async def _follow(app: App, name: str) -> None:
    show = Printable()

    def out(block: bytes) -> None:
        sys.stdout.write(show.clean(block))
        sys.stdout.flush()

    async with connected() as client:
        await client.subscribe()
        path, found = await DOMAINS.find(client, name)
        off = asyncio.ensure_future(_until_off(client, path, found["State"]))
        try:
            log = Log(await client.call(path, DOMAIN, "OpenConsole", {}))
            with contextlib.closing(log):
                while not off.done():
                    out(log.read())
                    if log.moved:
                        out(log.read())
                        try:
                            log.replace(await client.call(path, DOMAIN, "OpenConsole", {}))
                        except RemoteError as exc:
                            if exc.code != "ConsoleNotReadable":
                                raise
                            app.say("libvirt's logger has begun a log that is root's: going on with the console itself")
                            await _listen(client, path, out)
                            return
                        continue
                    await asyncio.wait((off,), timeout=INTERVAL_S)
                off.result()
                until = asyncio.get_running_loop().time() + LAST_S
                while asyncio.get_running_loop().time() < until:
                    out(log.read())
                    await asyncio.sleep(INTERVAL_S)
        finally:
            off.cancel()
            sys.stdout.write(show.clean(b"", final=True))


async def _until_off(client: Client, path: str, state: str) -> None:
    """Wait until a domain is off, or gone; raises `ServiceUnavailable` where the service is."""
    signals = client.signals()
    while state not in OFF:
        where, member, body = await anext(signals)
        if where == path and member == "PropertiesChanged":
            state = body[1].get("State", state)
        elif member == "InterfacesRemoved" and body[0] == path:
            return


async def _listen(client: Client, path: str, out: Callable[[bytes], None]) -> None:
    """Print what comes on the console until it ends."""
    with socket.socket(fileno=await client.call(path, DOMAIN, "AttachConsole", {})) as stream:
        stream.setblocking(False)
        loop = asyncio.get_running_loop()
        while block := await loop.sock_recv(stream, BLOCK_BYTES):
            out(block)


# The console itself


async def _attach(app: App, name: str, force: bool) -> None:
    options: dict[str, Any] = {"force": Variant("b", True)} if force else {}
    async with connected() as client:
        path, found = await DOMAINS.find(client, name)
        fd = await client.call(path, DOMAIN, "AttachConsole", options)
    with socket.socket(fileno=fd) as stream:
        if sys.stdin.isatty():
            app.say(f"attached to the console of {found['Name']}; ^] leaves it")
        with raw_terminal():
            left = await _joined(stream)
    if sys.stdin.isatty():
        app.say("\r\nleft the console" if left else "\r\nthe console has ended")


@contextlib.contextmanager
def raw_terminal() -> Iterator[None]:
    """Every key as it is pressed, if somebody sits there; afterwards the terminal is as before."""
    if not sys.stdin.isatty():
        yield
        return
    before = termios.tcgetattr(sys.stdin)
    try:
        tty.setraw(sys.stdin)
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


async def _joined(stream: socket.socket) -> bool:
    """Pass on both ways until the console ends (False) or ^] is pressed (True)."""
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[bool] = loop.create_future()
    stream.setblocking(False)
    keys: asyncio.Queue[bytes] = asyncio.Queue()
    terminal = sys.stdin.isatty()

    def pressed() -> None:
        data = os.read(0, BLOCK_BYTES)
        if terminal and ESCAPE in data:
            data = data[: data.index(ESCAPE)]
            loop.remove_reader(0)
            if not ended.done():
                ended.set_result(True)
        elif not data:
            loop.remove_reader(0)
        keys.put_nowait(data)

    async def send() -> None:
        while data := await keys.get():
            await loop.sock_sendall(stream, data)
        with contextlib.suppress(OSError):
            stream.shutdown(socket.SHUT_WR)

    async def receive() -> None:
        try:
            while block := await loop.sock_recv(stream, BLOCK_BYTES):
                sys.stdout.buffer.write(block)
                sys.stdout.buffer.flush()
        finally:
            if not ended.done():
                ended.set_result(False)

    sending, receiving = loop.create_task(send()), loop.create_task(receive())
    try:
        with _reading(loop, pressed, keys):
            return await ended
    finally:
        for task in (sending, receiving):
            task.cancel()
        await asyncio.gather(sending, receiving, return_exceptions=True)


@contextlib.contextmanager
def _reading(
    loop: asyncio.AbstractEventLoop, pressed: Callable[[], None], keys: asyncio.Queue[bytes]
) -> Iterator[None]:
    """Have `pressed` called when there is input; a file has no readiness, and is read at once."""
    try:
        loop.add_reader(0, pressed)
    except PermissionError:
        while data := os.read(0, BLOCK_BYTES):
            keys.put_nowait(data)
        keys.put_nowait(b"")
    try:
        yield
    finally:
        loop.remove_reader(0)
