"""The console of a running machine, both ways, through a real libvirtd; the firmware's menu answers."""

from __future__ import annotations

import asyncio
import socket

import pytest

from jindiskd.domain.connection import LibvirtFailed
from jindiskd.domain.service import DomainService
from jindiskd.errors import Busy, NotFound

from .conftest import Bench

pytestmark = pytest.mark.host
DOWN = b"\x1b[B"
DEADLINE_S = 240.0


class Attached:
    """Whoever has the socket."""

    def __init__(self, fd: int) -> None:
        self.socket = socket.socket(fileno=fd)
        self.socket.setblocking(False)

    async def until_it_answers(self) -> None:
        """Press a key until something comes: the firmware draws its menu anew."""
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(DEADLINE_S):
            while True:
                await loop.sock_sendall(self.socket, DOWN)
                try:
                    data = await asyncio.wait_for(loop.sock_recv(self.socket, 65536), 1.0)
                except TimeoutError:
                    continue
                assert data, "the console ended"
                return

    async def until_it_ends(self) -> None:
        """Read to the end."""
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(DEADLINE_S):
            while await loop.sock_recv(self.socket, 65536):
                pass


async def attached(service: DomainService, *, force: bool = False) -> Attached:
    return Attached(await service.attach_console("demo", force=force))


async def test_a_console_is_used_taken_over_and_ends_with_the_machine(bench: Bench) -> None:
    """One has it at a time; whoever closes it gives it free; nothing of it stays in the service."""
    service = await bench.service()
    with pytest.raises(NotFound):
        await attached(service)
    await bench.launch(service)
    first = await attached(service)
    await first.until_it_answers()
    with pytest.raises(Busy, match="--force"):
        await attached(service)
    second = await attached(service, force=True)
    await first.until_it_ends()
    first.socket.close()
    await second.until_it_answers()
    second.socket.shutdown(socket.SHUT_WR)  # one that only listens from now on
    second.socket.close()
    await bench.until(lambda: not service._consoles)
    third = await attached(service)
    await third.until_it_answers()
    fourth = third.socket  # never read again: what comes is kept up to a limit, and the guest goes on
    await service.stop_domain("demo", force=True)
    await bench.until(lambda: not service._consoles)
    fourth.close()
    with pytest.raises(LibvirtFailed):
        await attached(service)
