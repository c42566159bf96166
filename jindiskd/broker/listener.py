"""Where the broker listens: a unix socket for each guest (the host's end of its vsock), or TCP."""

from __future__ import annotations

from pathlib import Path

from aiohttp import web

from jindiskd.broker.identity import TlsIdentity
from jindiskd.broker.service import Broker, Peer

IDLE_S = 30.0


class Listener:
    """An open listener; close it when its guest is gone."""

    def __init__(self, runner: web.AppRunner, path: Path | None) -> None:
        """Use `listen_unix` or `listen_tcp`."""
        self._runner, self._path = runner, path

    async def close(self) -> None:
        """Stop listening and end what is under way."""
        await self._runner.cleanup()
        if self._path is not None:
            self._path.unlink(missing_ok=True)


async def _runner(broker: Broker, peer: Peer) -> web.AppRunner:
    runner = web.AppRunner(
        broker.application(peer), access_log=None, keepalive_timeout=IDLE_S, shutdown_timeout=2.0, handle_signals=False
    )
    await runner.setup()
    return runner


async def listen_unix(broker: Broker, identity: TlsIdentity, path: Path, peer: Peer) -> Listener:
    """Serve one peer on a unix socket, mode 0600; a socket left there is replaced."""
    path.unlink(missing_ok=True)
    runner = await _runner(broker, peer)
    await web.UnixSite(runner, str(path), ssl_context=identity.ssl_context()).start()
    path.chmod(0o600)
    return Listener(runner, path)


async def listen_tcp(broker: Broker, identity: TlsIdentity, host: str, port: int, peer: Peer) -> Listener:
    """Serve on a TCP port."""
    runner = await _runner(broker, peer)
    await web.TCPSite(runner, host, port, ssl_context=identity.ssl_context()).start()
    return Listener(runner, None)
