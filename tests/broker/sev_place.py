"""An owner's broker and a host that reaches it, for launches of SEV."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from jindiskd.attest.collateral import CollateralCache
from jindiskd.attest.collecting import Collector
from jindiskd.attest.sev import LaunchReport
from jindiskd.attest.snp import SnpVerifier
from jindiskd.base.endpoint import Endpoint
from jindiskd.base.platform import Platform
from jindiskd.base.secret import Secret
from jindiskd.broker.identity import TlsIdentity
from jindiskd.broker.listener import listen_tcp
from jindiskd.broker.peer import BrokerEvent, Peer
from jindiskd.broker.relay import Relay
from jindiskd.broker.service import Broker
from jindiskd.broker.sev import HostPlatform, SevJudge, SevTurn
from jindiskd.broker.sev_remote import RemoteOwner, SevClient
from jindiskd.keys.store import Store
from jindiskd.sim.pki import SimulatedRoot
from jindiskd.sim.sev_firmware import SevLaunch
from jindiskd.sim.sev_platform import API, BUILD, CPU_ID, SevPlatformKeys

IMAGE, OTHER = "11111111-1111-4111-8111-111111111111", "22222222-2222-4222-8222-222222222222"
KEYS = {IMAGE: bytes(range(32)), OTHER: bytes(range(32, 64))}
DIGESTS = {IMAGE: b"\x5a" * 32, OTHER: b"\xa5" * 32}
POLICY = 0xB
PEER = Peer(description="domain d", domain_uuid="d", image_id=IMAGE)


class Place:
    """An owner's broker on TCP, and a host that reaches it."""

    def __init__(self, path: Path, keys: SevPlatformKeys, root: SimulatedRoot, **more: Any) -> None:
        self.keys, self.now = keys, [time.time()]
        self.store = Store.open(f"sqlite:///{path}/keys.db", Secret.random(32))
        for image, name in ((IMAGE, "web"), (OTHER, "db")):
            self.store.add_image(image, name, Platform.SIMULATED_SEV, f"default/{image}/root", Secret(KEYS[image]))
            self.store.activate(image, [DIGESTS[image]])
        self.identity = TlsIdentity.load_or_create(path / "broker.pem")
        self.events: list[BrokerEvent] = []
        self._arguments = {
            "store": self.store,
            "verifiers": [SnpVerifier(roots=root.roots)],
            "allow_simulated": True,
            "on_event": self.events.append,
            "sev": SevJudge(
                self.store,
                certificates=path / "sev",
                collector=Collector(CollateralCache(path / "collateral")),
                simulated=lambda: keys.root,
            ),
            **more,
        }
        self.broker = self.another()
        self.port = 0

    def another(self, **more: Any) -> Broker:
        """A broker of the same owner."""
        return Broker(**{**self._arguments, **more})

    @contextlib.asynccontextmanager
    async def listening(self, broker: Broker | None = None, port: int = 0) -> AsyncIterator[RemoteOwner]:
        listener = await listen_tcp(broker or self.broker, self.identity, "127.0.0.1", port)
        self.port = listener.addresses[0][1]
        try:
            yield self.owner()
        finally:
            await listener.close()

    def owner(self, pin: bytes | None = None) -> RemoteOwner:
        return RemoteOwner(Relay(Endpoint(host="127.0.0.1", port=self.port)), pin or self.identity.spki_sha256)

    @property
    def host(self) -> HostPlatform:
        return HostPlatform(pdh=self.keys.pdh, chain=self.keys.chain, cpu_id=CPU_ID)

    def start(self, turn: SevTurn, policy: int = POLICY) -> SevLaunch:
        """The host's processor, with the owner's session."""
        return SevLaunch(self.keys, policy=policy, dh_certificate=turn.dh_certificate, session=turn.session)

    async def measured(self, owner: RemoteOwner, image: str = IMAGE) -> tuple[SevTurn, SevLaunch, LaunchReport]:
        """A launch that is paused, and measures as it should."""
        turn = await owner.begin(replace(PEER, image_id=image), POLICY, self.host)
        launch = self.start(turn)
        return turn, launch, report(launch.measure(DIGESTS[image]))

    async def raw(self, verb: str, body: bytes, cookie: str | None = None, source: str = "127.0.0.1") -> bytes:
        """What a host of its own making asks."""

        def connect() -> socket.socket:
            return socket.create_connection(("127.0.0.1", self.port), timeout=60, source_address=(source, 0))

        client = SevClient(connect, spki_sha256=self.identity.spki_sha256, deadline=time.monotonic() + 60)
        return (await asyncio.to_thread(client.ask, verb, body, cookie))[0]

    async def http(self, method: str, path: str, body: bytes, cookie: str | None = None) -> tuple[int, str | None]:
        """One request of a guest; status and new session."""

        def exchange() -> tuple[int, str | None]:
            connect = lambda: socket.create_connection(("127.0.0.1", self.port), timeout=60)  # noqa: E731 (once)
            client = SevClient(connect, spki_sha256=self.identity.spki_sha256, deadline=time.monotonic() + 60)
            with client._channel() as channel:
                status, _answer, session = channel.request(method, path, body, cookie)
            return status, session

        return await asyncio.to_thread(exchange)

    def kinds(self) -> list[str]:
        return [row["kind"] for row in self.store.audit_rows() if row["kind"] in {"released", "refused", "waiting"}]

    def findings(self) -> list[str]:
        row = self.store.audit_rows()[-1]
        assert row["kind"] == "refused"
        return [found["id"] for found in row["detail"]["findings"]]


def report(measurement: bytes, **changes: int) -> LaunchReport:
    told = LaunchReport(measurement=measurement, api_major=API[0], api_minor=API[1], build=BUILD, policy=POLICY)
    return replace(told, **changes)


def cookie_of(turn: SevTurn) -> str:
    found = turn._cookie  # type: ignore[attr-defined]  # what a hostile host has in its hands
    assert isinstance(found, str)
    return found
