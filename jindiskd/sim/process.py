"""The simulated firmware of one guest as a process: `python -m jindiskd.sim.process`.

**Standard input** (a pipe) gets one line of JSON, a `Request`, and stays open: the process ends when it is closed, or
on SIGTERM. **Standard output** gets one line:
`{"ready": true, "launch_digest": hex, "chip_id": hex, "simulated": true}`, or `{"error": code, "message": text}`
before it ends with that error's exit code. The launch digest is computed here from the files themselves, as hardware
measures what it is given, not what somebody says was given.

**The guest's side**, on a unix stream socket (a VMM connects it to vsock port 19013); integers are little-endian, one
request a connection, which then is closed:

| request | bytes |
|---|---|
| magic `JSIM` | 4 |
| version, 1 | 4 |
| report data | 64 |

| reply | bytes |
|---|---|
| status: 0 done, 1 malformed request, 2 unknown version, 3 busy | 4 |
| length of the report (0 unless done) | 4 |
| report, as `outblob` of the kernel's configfs-tsm | 1184 |
| length of the certificate table (0 unless done) | 4 |
| certificate table, as `auxblob` | at most 65536 |

A peer gets 5 seconds for its request and 5 for taking the reply; at most 8 are served at a time, a
ninth is told so, and past 32 connections are dropped.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import stat
import struct
import sys
from dataclasses import dataclass
from pathlib import Path

from jindiskd.attest.guest_policy import SNP_DEFAULT
from jindiskd.attest.id_block import check
from jindiskd.attest.measure import LaunchInputs, snp_launch_digest
from jindiskd.base import document
from jindiskd.errors import InvalidArgument, JindiskError
from jindiskd.sim.firmware import SimulatedSnpFirmware
from jindiskd.sim.pki import SimulatedRoot

MAGIC = b"JSIM"
VERSION = 1
REQUEST_BYTES = 72
IDLE_S = 5.0
MAX_PEERS = 8
MAX_CONNECTIONS = 32
MAX_REQUEST_LINE = 1 << 16
DONE, MALFORMED, UNKNOWN_VERSION, BUSY = range(4)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """The line on standard input. Exactly one of `socket` and `listen_fd` is given."""

    firmware: str
    kernel: str
    initrd: str
    cmdline: str
    vcpus: int
    cpu_model: str
    root: str
    """Directory of the simulated root; made if it is not there."""
    socket: str | None = None
    """Path to listen on; a socket left there by a dead process is replaced. Mode 0600."""
    listen_fd: int | None = None
    """Number of an inherited socket that listens already."""
    guest_features: int = 1
    policy: int = SNP_DEFAULT
    id_block: bytes = b""
    """With `id_auth`: the launch is refused unless it is as the block says, as hardware does."""
    id_auth: bytes = b""
    host_data: bytes = bytes(32)
    platform: str = "default"


def reply(status: int, report: bytes = b"", table: bytes = b"") -> bytes:
    """The bytes of a reply."""
    return struct.pack("<II", status, len(report)) + report + struct.pack("<I", len(table)) + table


def answer(request: bytes, firmware: SimulatedSnpFirmware) -> bytes:
    """The reply to one request, whatever it is."""
    if len(request) != REQUEST_BYTES or request[:4] != MAGIC:
        return reply(MALFORMED)
    if int.from_bytes(request[4:8], "little") != VERSION:
        return reply(UNKNOWN_VERSION)
    return reply(DONE, firmware.report(request[8:]), firmware.certificate_table())


def prepare(request: Request) -> SimulatedSnpFirmware:
    """Measure the launch and make the firmware. Reads files and computes; call it off the event loop.

    Raises:
        JindiskError: the inputs cannot be measured, or the root is damaged.
    """
    inputs = LaunchInputs(
        firmware=Path(request.firmware),
        kernel=Path(request.kernel),
        initrd=Path(request.initrd),
        cmdline=request.cmdline,
        vcpus=request.vcpus,
        cpu_model=request.cpu_model,
        guest_features=request.guest_features,
    )
    digest = snp_launch_digest(inputs)
    root = SimulatedRoot.load_or_create(Path(request.root))
    signed = check(request.id_block, request.id_auth) if request.id_block or request.id_auth else None
    return SimulatedSnpFirmware(
        root, digest, platform=request.platform, policy=request.policy, host_data=request.host_data, signed=signed
    )


def listen(request: Request) -> socket.socket:
    """The listening socket that the request names.

    Raises:
        InvalidArgument: both or none are named, or it cannot be used.
    """
    if (request.socket is None) == (request.listen_fd is None):
        raise InvalidArgument("request", "", "it names either a socket or a descriptor")
    if request.listen_fd is not None:
        try:
            inherited = socket.socket(fileno=request.listen_fd)
            listening = inherited.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        except OSError as exc:
            raise InvalidArgument("descriptor", request.listen_fd, "it is a listening stream socket") from exc
        if not listening or inherited.type != socket.SOCK_STREAM:
            raise InvalidArgument("descriptor", request.listen_fd, "it is a listening stream socket")
        return inherited
    path = Path(request.socket or "")
    with contextlib.suppress(FileNotFoundError):
        if stat.S_ISSOCK(path.lstat().st_mode):
            path.unlink()
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    before = os.umask(0o177)
    try:
        made.bind(os.fspath(path))
    except OSError as exc:
        made.close()
        reason = exc.strerror or "the path is too long"
        raise InvalidArgument("socket", os.fspath(path), f"a socket can be made there ({reason})") from exc
    finally:
        os.umask(before)
    made.listen(MAX_PEERS)
    return made


async def serve(firmware: SimulatedSnpFirmware, listening: socket.socket, ended: asyncio.Event) -> None:
    """Answer requests until `ended` is set; what is being answered then is broken off."""
    peers: set[asyncio.Task[None]] = set()

    async def peer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        busy = len(peers) >= MAX_PEERS
        peers.add(task)
        try:
            if len(peers) > MAX_CONNECTIONS:
                raise ConnectionAbortedError
            # Also a busy answer waits for the request: a close with unread bytes would reset the connection.
            async with asyncio.timeout(IDLE_S):
                request = await reader.readexactly(REQUEST_BYTES)
            writer.write(reply(BUSY) if busy else answer(request, firmware))
            async with asyncio.timeout(IDLE_S):
                await writer.drain()
        except asyncio.IncompleteReadError:
            writer.write(reply(MALFORMED))
        except (TimeoutError, OSError):
            writer.transport.abort()
        finally:
            peers.discard(task)
            writer.close()

    server = await asyncio.start_unix_server(peer, sock=listening, limit=REQUEST_BYTES * 2)
    try:
        await ended.wait()
    finally:
        server.close()
        for task in list(peers):
            task.cancel()
        await asyncio.gather(*peers, return_exceptions=True)


async def _main() -> int:
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ended.set)
    reader = asyncio.StreamReader(limit=MAX_REQUEST_LINE)
    transport, _protocol = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    try:
        line = await reader.readline()
        request = document.load(Request, line, document="request", limit_bytes=MAX_REQUEST_LINE)
        firmware = await asyncio.to_thread(prepare, request)
        listening = listen(request)
    except (JindiskError, ValueError) as exc:
        error = exc if isinstance(exc, JindiskError) else InvalidArgument("request", "", "it is one line of JSON")
        _say({"error": error.code, "message": str(error)})
        transport.close()
        return error.exit_code
    made = firmware.template
    ready = {"launch_digest": made.measurement.hex(), "chip_id": made.chip_id.hex(), "simulated": True}
    watcher = asyncio.create_task(_until_closed(reader, ended))
    _say({"ready": True, **ready})
    try:
        await serve(firmware, listening, ended)
    finally:
        watcher.cancel()
        transport.close()
        if request.socket is not None:
            await asyncio.to_thread(Path(request.socket).unlink, missing_ok=True)
    return 0


async def _until_closed(reader: asyncio.StreamReader, ended: asyncio.Event) -> None:
    while await reader.read(4096):
        pass
    ended.set()


def _say(message: dict[str, object]) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(asyncio.run(_main()))
