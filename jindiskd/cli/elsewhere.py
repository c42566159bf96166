"""`jindiskctl --host`: the service of another machine, over ssh, as systemctl reaches other machines' service managers.

There, `systemd-stdio-bridge` passes the messages on to the system bus, on which the caller is the user that ssh logged
in as. Descriptors do not come through: what hands files to the service, or gets them from it, is refused.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import subprocess
from collections.abc import AsyncIterator, Sequence

from jindiskd.base.process import ToolMissing
from jindiskd.bus.transport import Connection, connect_through
from jindiskd.errors import InvalidArgument, NotSupported, ServiceUnavailable

SSH = "ssh"
BRIDGE = "systemd-stdio-bridge"
LOGIN_S = 300.0
"""Until the other machine answers; somebody may have to type a password."""
END_S = 5.0
_DESTINATION = re.compile(r"[^\s\x00-\x1f\x7f-][^\s\x00-\x1f\x7f]{0,254}")
HERE = {
    "attest verify": "it looks at files of this machine",
    "broker": "the owner's broker is reached by its own address (--broker)",
    "collateral": "that is this machine's",
    "completion": "that is this machine's shell",
    "system-files": "they are this machine's",
}
"""Commands, or nouns, that do not ask the service at all, and why."""
FILES = frozenset({
    "device open", "domain console", "image build", "image export", "image import", "image update", "key export",
    "key recovery copy", "key recovery set-key", "key rotate",
})  # fmt: skip
"""Commands whose files the service reads or writes by descriptors."""


def check_destination(text: str) -> str:
    """What ssh takes as destination: `host`, `user@host`, a name of its configuration, or `ssh://user@host:port`.

    Raises:
        InvalidArgument: it is none.
    """
    if not _DESTINATION.fullmatch(text):
        remedy = "name a machine as ssh takes it: [user@]host, or ssh://user@host:port"
        raise InvalidArgument("--host", text[:100], remedy)
    return text


def refuse_here(host: str, words: Sequence[str]) -> None:
    """Refuse a command that would do its work on this machine, or hand files to the other's service.

    Args:
        host: of `--host`.
        words: the command's names, such as `image`, `export`.

    Raises:
        NotSupported: with what to do instead.
    """
    command = " ".join(words)
    for prefix, why in HERE.items():
        if f"{command} ".startswith(f"{prefix} "):
            raise NotSupported(f"'jindiskctl {command}' with --host", f"{why}: leave --host out")
    if command in FILES:
        refuse_files(host, command)


def refuse_files(host: str, command: str) -> None:
    """Say what to do instead of handing a file over. Raises `NotSupported`."""
    remedy = f"files do not come through to its service: run it there, 'ssh {host} jindiskctl {command} ...'"
    if command in {"image export", "image import"}:
        remedy += f"; 'jindiskctl image export IMAGE - | ssh {host} jindiskctl image import -' takes an image there"
    raise NotSupported(f"'jindiskctl {command}' with --host", remedy)


@contextlib.asynccontextmanager
async def bus_of(host: str) -> AsyncIterator[Connection]:
    """The system bus of another machine.

    Raises:
        ToolMissing: there is no ssh here. ServiceUnavailable: there is no way to its bus.
    """
    ours, theirs = socket.socketpair()
    try:
        # Not through `base.process.run`: it must live beside us, and may ask on our terminal.
        words, end = [SSH, "-xT", "--", host, BRIDGE], theirs.fileno()
        process = subprocess.Popen(words, stdin=end, stdout=end)  # noqa: ASYNC220 - does not wait
    except FileNotFoundError as exc:
        ours.close()
        raise ToolMissing(SSH) from exc
    finally:
        theirs.close()
    try:
        try:
            async with asyncio.timeout(LOGIN_S):
                bus = await connect_through(ours)
        except (ConnectionError, TimeoutError) as exc:
            remedy = f"'ssh {host} {BRIDGE}' must work (ssh says above why not), and its system bus run"
            raise ServiceUnavailable(f"the D-Bus message bus of {host}", remedy) from exc
        try:
            yield bus
        finally:
            await bus.aclose()
    finally:
        await asyncio.to_thread(_end, process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """ssh ends with its input."""
    try:
        process.wait(END_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
