"""`jindisk-broker`: the key broker as a service of its own, on the machine of the guests' owner.

The same broker as the one embedded in jindiskd, without images, domains and bus. Builds all parts, hands them to each
other, and stops them in the opposite order.

What lies in the state directory::

    kek          32 bytes, mode 0600: the key-encryption key, unless it comes from a credential or a TPM
    keys.db      the key store and audit log (SQLite, mode 0600), unless configured elsewhere
    sev/         AMD's certificates of a host's processor, put there by hand (`broker.sev`)
    broker.pem   the key that guests pin, mode 0600: every image of this owner pins it; brokers that share a database
                 share it
"""

from __future__ import annotations

import asyncio
import contextlib
import grp
import json
import os
import pwd
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import structlog
from cryptography.hazmat.primitives.serialization import load_der_private_key

import jindiskd
from jindiskd.attest.collateral import CollateralCache
from jindiskd.attest.collecting import Collector, genuine_verifiers
from jindiskd.attest.plugins import plugged_in
from jindiskd.attest.snp import SnpVerifier
from jindiskd.attest.snp_certs import to_der
from jindiskd.attest.snp_roots import SnpRoots
from jindiskd.attest.vendors import Vendors
from jindiskd.attest.verifier import Verifier
from jindiskd.base import log as logs
from jindiskd.base.document import MalformedDocument
from jindiskd.base.endpoint import Endpoint, parse_endpoint
from jindiskd.broker.admin import Admin
from jindiskd.broker.identity import TlsIdentity
from jindiskd.broker.listener import Listener, Serves, listen_local, listen_tcp, listen_unix, listen_vsock
from jindiskd.broker.metrics import Metrics
from jindiskd.broker.metrics_page import MetricsPage
from jindiskd.broker.peer import BrokerLimits, Peer
from jindiskd.broker.service import Broker
from jindiskd.broker.sev import SevJudge
from jindiskd.broker.shared import DatabaseSessions
from jindiskd.broker_config import DEFAULT_FILE, Config
from jindiskd.cli.serving import broker_command
from jindiskd.config import Loaded, load_as
from jindiskd.errors import InvalidArgument, JindiskError, NotFound
from jindiskd.keys import handover
from jindiskd.keys.kek import KekPlace
from jindiskd.keys.opening import open_store, rotate_kek, seal_kek
from jindiskd.keys.store import Store
from jindiskd.program import credentials_directory, keep_memory_private, run_program, signals, until_first
from jindiskd.sim.sev_platform import SevPlatformRoot

log = structlog.get_logger(__name__)
IDENTITY = "broker.pem"
SEV_CERTIFICATES = "sev"


def kek_place(config: Config) -> KekPlace:
    """Where the key-encryption key is."""
    return config.keys.place(config.service.state_dir, credentials_directory())


def warnings(config: Config) -> tuple[str, ...]:
    """What an administrator should know, a sentence each."""
    found = []
    if kek := kek_place(config).warning():
        found.append(kek)
    if config.broker.allow_simulated:
        found.append("reports of simulated firmware are accepted (broker.allow_simulated): they prove nothing")
    if os.geteuid() == 0:
        found.append("the broker runs as root: nothing it does needs that; use its unit")
    return tuple(found)


def collector_of(config: Config) -> Collector:
    """What gives the collateral. One is enough, and counts how often the makers are asked."""
    return Collector(CollateralCache(config.collateral_dir), Vendors() if config.collateral.fetch else None)


def verifiers_of(config: Config, collector: Collector) -> list[Verifier]:
    """Verifiers for AMD's and Intel's roots, and one for the simulated root where that is allowed."""
    found = [*genuine_verifiers(collector), *plugged_in(config.broker.verifiers, collector)]
    if config.broker.allow_simulated:
        path = config.broker.simulated_root
        if path is None:
            remedy = "name the ark.pem of the simulated platform, from the host's state directory"
            raise InvalidArgument("broker.simulated_root", "unset", remedy)
        try:
            ark = to_der(path.read_bytes(), "simulated root")[0]
        except OSError as exc:
            raise InvalidArgument("broker.simulated_root", str(path), f"it cannot be read: {exc.strerror}") from exc
        found.append(SnpVerifier(roots=SnpRoots.simulated_from(ark)))
    return found


def launch_judge(config: Config, store: Store, collector: Collector) -> SevJudge:
    """What judges SEV and SEV-ES launches, of the simulated platform where that is allowed and known.

    Raises:
        InvalidArgument: the file of the simulated platform cannot be used.
    """
    path = config.broker.simulated_sev
    simulated = None
    if config.broker.allow_simulated and path is not None:
        try:
            simulated = SevPlatformRoot.load(path)
        except (OSError, MalformedDocument) as exc:
            remedy = f"name the file with the public part of the simulated platform ({exc})"
            raise InvalidArgument("broker.simulated_sev", str(path), remedy) from exc
    return SevJudge(
        store,
        certificates=config.service.state_dir / SEV_CERTIFICATES,
        collector=collector,
        simulated=None if simulated is None else lambda: simulated,
    )


class Service:
    """The parts of the broker, started and stopped together."""

    def __init__(self, config: Config) -> None:
        """Open nothing yet."""
        self._config, self._stack = config, contextlib.AsyncExitStack()
        self.listeners: dict[str, Listener] = {}

    async def start(self) -> None:
        """Start everything; when this returns, guests and administrators are answered.

        Raises:
            JindiskError, OSError: something is in the way; `stop` undoes what was started.
        """
        config, stack = self._config, self._stack
        for directory, mode in ((config.service.state_dir, 0o700), (config.service.runtime_dir, 0o755)):
            directory.mkdir(parents=True, exist_ok=True, mode=mode)
        collector = collector_of(config)
        verifiers = verifiers_of(config, collector)
        store = await asyncio.to_thread(open_store, kek_place(config), config.database_url, config.database_file)
        stack.callback(store.close)
        identity = await asyncio.to_thread(TlsIdentity.load_or_create, config.service.state_dir / IDENTITY)
        limits = BrokerLimits(
            session_lifetime_s=config.broker.session_lifetime_s,
            sessions=config.broker.max_sessions,
            sessions_per_peer=config.broker.max_sessions_per_peer,
            connections=config.broker.max_connections,
            connections_per_peer=config.broker.max_connections_per_peer,
        )
        metrics = Metrics()
        broker = await asyncio.to_thread(
            lambda: Broker(
                store=store,
                verifiers=verifiers,
                allow_simulated=config.broker.allow_simulated,
                limits=limits,
                sessions=DatabaseSessions(store.database, limits) if store.database.shared else None,
                metrics=metrics,
                sev=launch_judge(config, store, collector),
            )
        )
        admin = await asyncio.to_thread(self._admin, store, identity, metrics)
        await self._listen(broker, admin, MetricsPage(metrics, _health(store)), identity)

    def _admin(self, store: Store, identity: TlsIdentity, metrics: Metrics) -> Admin:
        config = self._config
        with store.database.transfer_key(handover.draw_transfer_key) as key:
            card = handover.card(identity.spki_sha256, key)
            private = load_der_private_key(bytes(key.reveal()), None)

        def facts() -> dict[str, Any]:
            return {
                "allow_simulated": config.broker.allow_simulated,
                "warnings": list(warnings(config)),
                "listen": {name: [_address(a) for a in found.addresses] for name, found in self.listeners.items()},
            }

        return Admin(store, card, private, metrics, facts)  # type: ignore[arg-type]  # an EC key, as it was drawn

    async def _listen(self, broker: Broker, admin: Admin, page: MetricsPage, identity: TlsIdentity) -> None:
        config = self._config
        listen = config.listen

        async def opened(name: str, listener: Listener) -> None:
            self._stack.push_async_callback(listener.close)
            self.listeners[name] = listener
            log.info("listening", what=name, where=[_address(address) for address in listener.addresses])

        group = group_of(config)
        local = await listen_local(admin, config.admin_socket, local_users(group), 0o600 if group is None else 0o660)
        await opened("admin socket", local)
        if group is not None:
            os.chown(config.admin_socket, -1, group)
        if listen.guests:
            await opened("guests", await self._tcp(broker, identity, "guests"))
        if listen.unix is not None:
            peer = Peer(description="unix socket")
            await opened("guests, unix", await listen_unix(broker, identity, listen.unix, peer, 0o666))
        if listen.vsock_port:
            port, of_cid = listen.vsock_port, lambda cid: Peer(description=f"vsock {cid}")
            await opened("guests, vsock", await listen_vsock(broker, identity, port, of_cid))
        if listen.admin:
            await opened("admin", await self._tcp(admin, identity, "admin"))
        if listen.metrics:
            await opened("metrics", await self._tcp(page, None, "metrics"))

    async def _tcp(self, service: Serves, identity: TlsIdentity | None, name: str) -> Listener:
        """Listen where a setting says."""
        text = getattr(self._config.listen, name)
        where = parse_endpoint(text, f"listen.{name}")
        try:
            return await listen_tcp(service, identity, where.host, where.port)
        except OSError as exc:
            raise InvalidArgument(f"listen.{name}", text, f"{exc.strerror or exc}") from exc

    async def stop(self) -> None:
        """Stop everything that was started, last first."""
        await self._stack.aclose()


def _address(address: Any) -> str:
    """Of a socket, as the kernel names it, for people: a path, or host:port."""
    if isinstance(address, str):
        return address
    return str(Endpoint(host=address[0], port=address[1])) if isinstance(address[0], str) else str(address)


def group_of(config: Config) -> int | None:
    """The group whose members may administer; raises `InvalidArgument`."""
    if not config.admin.group:
        return None
    try:
        return grp.getgrnam(config.admin.group).gr_gid
    except KeyError as exc:
        raise InvalidArgument("admin.group", config.admin.group, "there is no such group") from exc


def local_users(group: int | None) -> Callable[[int, int], Peer | None]:
    """Who may administer by the socket: root, our own user, and a group's members."""

    def who(uid: int, gid: int) -> Peer | None:
        members = set(grp.getgrgid(group).gr_mem) if group is not None else set()
        if uid in {0, os.geteuid()} or gid == group or _name(uid) in members:
            return Peer(description=f"user {_name(uid)} ({uid})", local=True)
        return None

    return who


def _name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return "?"


def _health(store: Store) -> Callable[[], asyncio.Future[bool]]:
    def probe() -> bool:
        try:
            with store.database.read():
                return True
        except JindiskError:
            return False

    return lambda: asyncio.ensure_future(asyncio.to_thread(probe))


async def serve(config: Config, path: Path) -> int:
    """Run until a signal ends it."""
    service = Service(config)
    async with signals(lambda: load_as(Config, path)) as ended:
        try:
            await service.start()
            for warning in warnings(config):
                log.warning(warning)
            log.info("ready", version=jindiskd.__version__)
            await until_first(ended=ended)
            return 0
        finally:
            await service.stop()
            log.info("stopped")


def run(
    path: Path | None, check_config: bool, show_config: bool, seal: bool = False, new_kek: Path | None = None
) -> int:
    """What the command line asks for; returns the exit status."""
    if path is not None and not path.exists():
        raise NotFound("configuration file", str(path))
    loaded: Loaded[Config] = load_as(Config, path or DEFAULT_FILE)
    config = loaded.config
    for name in ("guests", "admin", "metrics"):
        if text := getattr(config.listen, name):
            parse_endpoint(text, f"listen.{name}")
    if show_config:
        click.echo(json.dumps({"settings": loaded.plain()}, indent=2))
    if check_config or show_config:
        return 0
    keep_memory_private()
    logs.setup(config.service.log_level.value)
    if seal or new_kek is not None:
        place, database = kek_place(config), config.database_file
        click.echo(
            rotate_kek(place, config.database_url, database, new_kek)
            if new_kek is not None
            else seal_kek(place, database)
        )
        return 0
    return asyncio.run(serve(config, path or DEFAULT_FILE))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit status."""
    return run_program("jindisk-broker", broker_command(run), arguments)


if __name__ == "__main__":
    sys.exit(main())
