"""The kernel's vsock at the host's end. Unix sockets stand for it here, since this host's kernel may have none; the
real one is in the tests of the packages, in a guest that is a host.
"""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jindiskd.config import VsockMode
from jindiskd.daemon import kernel_vsock
from jindiskd.domain import console, switch, xml
from jindiskd.domain.guests import DomainSettings
from jindiskd.domain.switch import CONNECTIONS_PER_GUEST, PORTS, Switch
from jindiskd.domain.vsock import socket_path
from jindiskd.errors import NotSupported
from jindiskd.guest.config import KBS_PORT, PROGRESS_PORT


class Kernel:
    """Stands for AF_VSOCK: a listening socket a port; who connects next has the context id `cid`."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.cid = directory, 3
        self.servers: list[asyncio.Server] = []

    async def serve(self, client: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Any], path: Path) -> None:
        """Listen until the test is over."""
        self.servers.append(await asyncio.start_unix_server(client, path))

    def listen(self) -> dict[int, socket.socket]:
        found = {}
        for port in PORTS:
            found[port] = socket.socket(socket.AF_UNIX)
            found[port].bind(str(self.directory / str(port)))
            found[port].listen(64)
            # Python itself treats those of AF_VSOCK otherwise, their options above all, and so it shall here.
            found[port] = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM, fileno=found[port].detach())
        return found

    def cid_of(self, _taken: socket.socket) -> int:
        return self.cid

    async def connect(self, port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_unix_connection(self.directory / str(port))


class Home:
    """A domain's directory with a listener that tells what it got and then answers with its name."""

    def __init__(self, kernel: Kernel, name: str) -> None:
        self.kernel, self.path, self.name = kernel, kernel.directory / name, name
        self.path.mkdir()
        self.ended = asyncio.Event()

    async def listen(self, port: int = KBS_PORT) -> Home:
        await self.kernel.serve(self._serve, socket_path(self.path, port))
        return self

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while line := await reader.readline():
                writer.write(self.name.encode() + b" " + line)
                await writer.drain()
        except ConnectionError:
            pass
        finally:
            self.ended.set()
            writer.close()


@pytest.fixture
async def kernel(tmp_path: Path) -> AsyncIterator[Kernel]:
    made = Kernel(tmp_path)
    yield made
    for server in made.servers:
        server.close()
        await server.wait_closed()


@pytest.fixture
async def board(kernel: Kernel) -> AsyncIterator[Switch]:
    made = Switch(kernel.listen, kernel.cid_of)
    yield made
    await made.close()


async def talk(kernel: Kernel, cid: int, port: int = KBS_PORT) -> bytes:
    """What a guest with this context id is answered; empty if it is not served."""
    kernel.cid = cid
    reader, writer = await kernel.connect(port)
    try:
        writer.write(b"hello\n")
        async with asyncio.timeout(60):
            return await reader.readline()
    except ConnectionError:
        return b""
    finally:
        writer.close()


async def test_a_context_id_leads_to_its_domain_alone(kernel: Kernel, board: Switch) -> None:
    """Each guest comes to its own listeners; strangers, closed ports and former holders to nothing."""
    first, second = await Home(kernel, "first").listen(), await Home(kernel, "second").listen()
    board.connect(3, first.path)
    board.connect(4, second.path)
    assert await talk(kernel, 3) == b"first hello\n"
    assert await talk(kernel, 4) == b"second hello\n"
    assert await talk(kernel, 5) == b""
    assert await talk(kernel, 1) == b""  # a program of the host itself, by the loopback
    assert await talk(kernel, 3, PROGRESS_PORT) == b""  # nobody listens there
    board.connect(3, second.path)  # libvirt gives the lowest free id to the next machine
    assert await talk(kernel, 3) == b"second hello\n"
    await board.disconnect(first.path)
    assert await talk(kernel, 3) == b"second hello\n"
    await board.disconnect(second.path)
    assert await talk(kernel, 3) == b""
    assert await talk(kernel, 4) == b""


async def test_bytes_and_their_end_are_passed_both_ways(kernel: Kernel, board: Switch, tmp_path: Path) -> None:
    """As much as is sent, while the other side reads slowly; the end of one direction leaves the other."""
    home = tmp_path / "home"
    home.mkdir()
    size = 3 << 20

    async def count(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        got = 0
        while data := await reader.read(4096):
            got += len(data)
        writer.write(str(got).encode())
        await writer.drain()
        writer.close()

    await kernel.serve(count, socket_path(home, KBS_PORT))
    board.connect(3, home)
    reader, writer = await kernel.connect(KBS_PORT)
    writer.write(bytes(size))
    writer.write_eof()
    async with asyncio.timeout(120):
        assert await reader.read() == str(size).encode()
    writer.close()


async def test_a_guest_has_its_places_and_no_more(kernel: Kernel, board: Switch) -> None:
    """One that opens many is refused further ones; another is served meanwhile; places come back."""
    greedy, other = await Home(kernel, "greedy").listen(), await Home(kernel, "other").listen()
    board.connect(3, greedy.path)
    board.connect(4, other.path)
    kernel.cid = 3
    held = []
    for _ in range(CONNECTIONS_PER_GUEST):
        reader, writer = await kernel.connect(KBS_PORT)
        writer.write(b"here\n")
        async with asyncio.timeout(60):
            assert await reader.readline() == b"greedy here\n"
        held.append(writer)
    assert await talk(kernel, 3) == b""
    assert await talk(kernel, 4) == b"other hello\n"
    held.pop().close()
    async with asyncio.timeout(60):
        await greedy.ended.wait()
        while await talk(kernel, 3) != b"greedy hello\n":  # noqa: ASYNC110 - what the switch has noticed has no event
            await asyncio.sleep(0.01)
    for writer in held:
        writer.close()


async def test_what_is_open_ends_with_the_domain(kernel: Kernel, board: Switch) -> None:
    """Both sides see the end."""
    home = await Home(kernel, "home").listen()
    board.connect(3, home.path)
    kernel.cid = 3
    reader, writer = await kernel.connect(KBS_PORT)
    writer.write(b"here\n")
    async with asyncio.timeout(60):
        assert await reader.readline() == b"home here\n"
        await board.disconnect(home.path)
        assert await reader.read() == b""
        await home.ended.wait()
    writer.close()


async def test_a_port_that_is_taken_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The broker of another program, say; nothing is left open."""
    made: list[socket.socket] = []

    class Taken:
        def __init__(self, *_words: int) -> None:
            self.closed = False
            made.append(self)  # type: ignore[arg-type]  # what is asked of it below, it has

        def bind(self, _address: object) -> None:
            raise OSError(98, "Address already in use")

        def close(self) -> None:
            self.closed = True

    monkeypatch.setattr(socket, "socket", Taken)
    with pytest.raises(NotSupported, match=f"port {KBS_PORT} .*vhost-user"):
        switch.listening_sockets()
    assert [one.closed for one in made] == [True]  # type: ignore[attr-defined]  # as above


def test_what_the_service_manager_listens_on_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """All ports, or none: then it would have failed for a reason that is worth telling."""

    class Given:
        def __init__(self, family: int, port: int) -> None:
            self.family, self.port = family, port

        def getsockname(self) -> tuple[int, int]:
            return 4294967295, self.port

    given: Any = [Given(socket.AF_VSOCK, port) for port in reversed(PORTS)]
    stranger: Any = Given(socket.AF_UNIX, 0)
    assert switch.listening_sockets([stranger, *given]) == dict(zip(PORTS, reversed(given), strict=True))

    def none(*_words: int) -> socket.socket:
        raise OSError(97, "Address family not supported by protocol")

    monkeypatch.setattr(socket, "socket", none)
    with pytest.raises(NotSupported, match="AF_VSOCK"):
        switch.listening_sockets(given[:1])


def test_the_kernel_is_chosen_where_it_can(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` follows what the kernel has; the others are the administrator's word."""
    assert "no vhost-vsock" in switch.why_not(tmp_path)
    (tmp_path / switch.LOADED).mkdir(parents=True)
    assert "no vhost-vsock" not in switch.why_not(tmp_path)
    for problem in ("", "the kernel has none"):
        monkeypatch.setattr(switch, "why_not", lambda problem=problem: problem)
        assert kernel_vsock(VsockMode.AUTO) is (not problem)
        assert kernel_vsock(VsockMode.KERNEL)
        assert not kernel_vsock(VsockMode.VHOST_USER)


def test_a_definition_keeps_what_it_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the setting is by now: an adopted domain says itself which device it has."""
    program = Path("/bin/true")
    settings = DomainSettings(
        runtime_dir=tmp_path, console_dir=tmp_path, simulated_root=None, vhost_device_vsock=program
    )
    without = replace(settings, vhost_device_vsock=Path("no-such-program"))
    of_kernel = xml.parse("<domain><devices><vsock model='virtio'><cid auto='yes'/></vsock></devices></domain>")
    assert xml.kernel_cid(of_kernel) is None
    monkeypatch.setattr(switch, "why_not", lambda: "")
    assert settings.device_program(of_kernel) is None
    of_program = xml.parse("<domain><devices/></domain>")
    assert settings.device_program(of_program) == program
    with pytest.raises(NotSupported, match=r"no-such-program, .*: the kernel has vhost-vsock now"):
        without.device_program(of_program)
    monkeypatch.setattr(switch, "why_not", lambda: "the kernel has none")
    with pytest.raises(NotSupported, match="the kernel has none"):
        settings.device_program(of_kernel)
    with pytest.raises(NotSupported, match=r"no-such-program, .*load the module vhost_vsock"):
        without.device_program(of_program)


@pytest.mark.parametrize(
    ("address", "cid"), [("3", 3), ("4294967295", 4294967295), ("", None), ("-1", None), ("٣", None), ("9" * 99, None)]
)
def test_the_context_id_of_a_definition(address: str, cid: int | None) -> None:
    """As libvirt writes it, and nothing else."""
    text = f"<domain><devices><vsock><cid auto='yes' address='{address}'/></vsock></devices></domain>"
    assert xml.kernel_cid(xml.parse(text)) == cid


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become other users")
def test_a_service_without_rights_admits_the_user_of_qemu_alone(tmp_path: Path) -> None:
    """By an access list, which the kernel keeps to: who may not give its socket away may still name who connects."""
    script = """
import os, socket, sys
from pathlib import Path
from jindiskd.domain.vsock import ACL, acl_for
made = socket.socket(socket.AF_UNIX); made.bind(sys.argv[1]); made.listen()
os.chmod(sys.argv[1], 0o600)
os.setgid(12345); os.chown(sys.argv[1], 12345, 12345); os.setuid(12345)
os.setxattr(sys.argv[1], ACL, acl_for(54321))
print("listening", flush=True); sys.stdin.read()
"""
    connect = "import os, socket, sys; os.setgid(1); os.setuid(int(sys.argv[2])); socket.socket(1).connect(sys.argv[1])"
    with tempfile.TemporaryDirectory(dir="/run") as folder:
        Path(folder).chmod(0o755)
        path = f"{folder}/socket"
        words = [sys.executable, "-c", script, path]
        with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"listening\n"
            for uid, admitted in ((54321, True), (54322, False), (12345, True)):
                done = subprocess.run(
                    ["/usr/bin/python3", "-c", connect, path, str(uid)], check=False, capture_output=True
                )
                assert (done.returncode == 0) is admitted, (uid, done.stderr)
            process.kill()


def test_the_console_log_is_ours(tmp_path: Path) -> None:
    """It is there, and empty, before libvirt's logger looks for it."""
    log = tmp_path / "console/one.log"
    console.prepare(log)
    assert log.stat().st_mode & 0o777 == 0o600
    log.write_text("before")
    console.prepare(log)
    assert log.read_text() == ""


async def test_a_fault_with_one_guest_does_not_shut_out_others(kernel: Kernel) -> None:
    """Whatever goes wrong while a connection is taken, the next one is taken."""
    faults = [ValueError("planted")]

    def cid_of(taken: socket.socket) -> int:
        if faults:
            raise faults.pop()
        return kernel.cid_of(taken)

    board = Switch(kernel.listen, cid_of)
    home = await Home(kernel, "first").listen()
    board.connect(3, home.path)
    try:
        assert await talk(kernel, 3) == b""
        assert await talk(kernel, 3) == b"first hello\n"
    finally:
        await board.close()


async def test_places_of_connections_that_were_ended_at_once_are_free_again(kernel: Kernel, board: Switch) -> None:
    """Though nothing of them was passed on yet."""
    home = await Home(kernel, "first").listen()
    for _ in range(CONNECTIONS_PER_GUEST):
        board.connect(3, home.path)
        kernel.cid = 3
        near, far = socket.socketpair()
        board._admit(KBS_PORT, near)
        await board.disconnect(home.path)
        far.close()
        near.close()
    board.connect(3, home.path)
    assert await talk(kernel, 3) == b"first hello\n"
