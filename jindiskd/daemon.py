"""`jindiskd`: the service. Builds all parts, hands them to each other, and stops them in the opposite order.

Everything else in the package receives its collaborators; here alone they are made.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import click
import structlog

import jindiskd
from jindiskd.attest.collateral import CollateralCache, Entry, warnings_of
from jindiskd.attest.collecting import Collector, genuine_verifiers
from jindiskd.attest.plugins import plugged_in
from jindiskd.attest.snp import SnpVerifier
from jindiskd.attest.vendors import Vendors
from jindiskd.backend.guests import GuestsBackend
from jindiskd.backend.images import ImagesBackend
from jindiskd.base import log as logs
from jindiskd.base.endpoint import Endpoint, parse_endpoint
from jindiskd.base.notify import take_sockets
from jindiskd.broker.identity import TlsIdentity
from jindiskd.broker.listener import listen_unix
from jindiskd.broker.relay import Relay, RelayLimits
from jindiskd.broker.service import Broker, BrokerEvent, BrokerLimits, Peer
from jindiskd.broker.sev import SevOwner
from jindiskd.bus.jobs import microseconds
from jindiskd.bus.lib import BusType
from jindiskd.bus.ports import Keys, ServiceFacts
from jindiskd.bus.service import BusService
from jindiskd.bus.transport import Connection, connect_to
from jindiskd.cli.serving import daemon_command
from jindiskd.config import DEFAULT_FILE, Config, Deployment, Loaded, VsockMode, load
from jindiskd.custody import KeyPort, KeysBackend
from jindiskd.decisions import DecisionsBackend
from jindiskd.devices import DevicesBackend, HostDevices
from jindiskd.diagnosis import DiagnosisBackend
from jindiskd.doctor.host import Surroundings
from jindiskd.domain import switch
from jindiskd.domain.guest import OpenBroker
from jindiskd.domain.judge import KeyProblem
from jindiskd.domain.service import Closing, DomainService, DomainSettings
from jindiskd.domain.state import ACTIVE
from jindiskd.errors import EXIT_UNAVAILABLE, InvalidArgument, NotFound, NotSupported
from jindiskd.handed import HandedKeys, OwnersKeys
from jindiskd.image.service import ImageService
from jindiskd.image.store import ImageStore
from jindiskd.jobs.job import Change
from jindiskd.jobs.manager import JobManager
from jindiskd.keys.handover import BrokerCard, read_card
from jindiskd.keys.kek import KekPlace, open_store, rotate_kek, seal_kek
from jindiskd.keys.store import KeyState, Store
from jindiskd.program import credentials_directory, keep_memory_private, run_program, signals, until_first
from jindiskd.sim.pki import SimulatedRoot
from jindiskd.sim.sev_platform import SevPlatformKeys

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class StateFiles:
    """What lies in the state directory.

    ::

        kek                32 bytes, mode 0600: the key-encryption key, unless the unit's credential or the TPM has it
        tpm2/              the key-encryption key sealed to this machine's TPM, where it was (`keys.tpm`)
        keys.db            the key store and audit log (SQLite, mode 0600), unless configured elsewhere
        broker.pem         the key that guests pin, mode 0600
        handover/          instead of the three: keys sealed for the owner's broker, where the deployment is a relay
        simulated-root/    the root of the simulated platform, where that is allowed
        simulated-sev.json the simulated SEV platform, once it was needed
        sev/               AMD's certificates of this host's processor, for SEV and SEV-ES (`broker.sev`)
        console/           what guests write on their consoles
        collateral/        certificates and revocation lists of the processors' makers
        images/            the image store, unless configured elsewhere
    """

    root: Path

    @property
    def identity(self) -> Path:
        """The broker's TLS key and certificate."""
        return self.root / "broker.pem"

    @property
    def simulated_root(self) -> Path:
        """The simulated platform's root."""
        return self.root / "simulated-root"

    @property
    def handover(self) -> Path:
        """Keys sealed for the owner's broker."""
        return self.root / "handover"

    @property
    def console(self) -> Path:
        """Console logs."""
        return self.root / "console"


def kek_place(config: Config) -> KekPlace:
    """Where the key-encryption key is."""
    return config.keys.place(config.service.state_dir, credentials_directory())


def status(config: Config) -> dict[str, object]:
    """What Manager.Status tells. Blocks on files."""
    relayed = config.broker.deployment is Deployment.RELAY
    kek = kek_place(config)
    entries = [] if relayed else CollateralCache(config.collateral_dir).entries()
    expiries = [entry.expires for entry in entries if entry.expires is not None]
    return {
        "key-encryption": "owner" if relayed else kek.found,
        "collateral": len(entries),
        "collateral-expires": microseconds(min(expiries)) if expiries else 0,
        "warnings": list(warnings(config, kek, collateral=entries)),
    }


def warnings(config: Config, kek: KekPlace, *, collateral: Sequence[Entry]) -> Iterator[str]:
    """What an administrator should know, a sentence each."""
    relayed = config.broker.deployment is Deployment.RELAY
    if relayed:
        yield "the key of an image that is built here is in this host's memory meanwhile: build where you trust"
    else:
        yield "the key broker runs in this service: whoever rules this host can read the keys of its images"
    if not relayed and (warning := kek.warning()):
        yield warning
    if config.broker.allow_simulated:
        yield "reports of simulated firmware are accepted (broker.allow_simulated): they prove nothing"
    if not relayed:
        yield from (f"collateral: {line}" for line in warnings_of(collateral, datetime.now(UTC)))
    if os.geteuid() == 0:
        yield "the service runs as root: nothing it does needs that; use its unit"


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """Everything that depends on where the broker is."""

    images: HandedKeys | KeyPort
    keys: Callable[[DomainService], Keys]
    decisions: Callable[[ImageService], DecisionsBackend | OwnersKeys]
    open_broker: OpenBroker
    key_problem: KeyProblem
    key_here: Callable[[str], bool]
    """Whether the broker that guests reach can have the key of an image id; blocks."""
    spki_sha256: bytes
    """Of the broker: what new images pin."""
    relay: Relay | None = None
    store: Store | None = None
    """The key store, where it is here."""
    sev: SevOwner | None = None
    """The owner's side of SEV launches; with a relay it is elsewhere, and cannot be asked."""
    domains: list[DomainService] = field(default_factory=list)
    """The domains once they are made, which the broker tells what it decided."""


def relay_settings(config: Config) -> tuple[Endpoint, BrokerCard]:
    """Where the owner's broker is, and its card.

    Raises:
        InvalidArgument: a setting is missing or cannot be used. MalformedDocument: the card is none.
    """
    broker = parse_endpoint(config.relay.broker, "relay.broker")
    if config.relay.card is None:
        remedy = "name the file with the card of the owner's broker, as jindiskctl broker card prints it"
        raise InvalidArgument("relay.card", None, remedy)
    try:
        return broker, read_card(config.relay.card.read_bytes())
    except OSError as exc:
        raise InvalidArgument("relay.card", str(config.relay.card), f"it cannot be read: {exc.strerror}") from exc


class Service:
    """The parts of the service, started and stopped together."""

    def __init__(self, loaded: Loaded[Config], sockets: Sequence[socket.socket] = ()) -> None:
        """Start nothing yet; `sockets` are the service manager's."""
        self._loaded, self._config, self._sockets = loaded, loaded.config, sockets
        self._state = StateFiles(root=self._config.service.state_dir)
        self._stack = contextlib.AsyncExitStack()
        self.bus: Connection | None = None
        self._devices: HostDevices | None = None

    async def start(self) -> Connection:
        """Start everything; when this returns, calls are answered.

        Raises:
            JindiskError, OSError: something is in the way; `stop` undoes what was started.
        """
        config, state, stack = self._config, self._state, self._stack
        for directory in (state.root, config.service.runtime_dir, config.images_dir):
            directory.mkdir(parents=True, exist_ok=True, mode=0o711)
        images = ImageStore(config.images_dir)
        stack.enter_context(images.owned())
        side = await (self._relayed() if config.broker.deployment is Deployment.RELAY else self._embedded())

        jobs = JobManager(keep_s=config.service.job_keep_s)
        image_service = ImageService(images, side.images, broker_spki_sha256=side.spki_sha256)
        domains = self._domains(images, side)
        await image_service.reconcile()
        devices = self._devices = HostDevices(
            images,
            side.store,
            helper=config.devices.helper,
            running=lambda image_id: running_domain(domains, image_id),
            runtime_dir=config.service.runtime_dir,
            watch=config.devices.watch,
        )
        jobs.watch(lambda _job, change, _line: devices.service.poke() if change is Change.STATE else None)

        bus = self.bus = await connect_to(BusType.SYSTEM)
        stack.push_async_callback(bus.aclose)
        decisions = side.decisions(image_service)
        on_bus = BusService(
            bus,
            images=ImagesBackend(image_service, side.images, domains, config),
            guests=GuestsBackend(domains, side.relay),
            keys=side.keys(domains),
            policies=decisions,
            audit=decisions,
            devices=DevicesBackend(devices.service),
            diagnosis=DiagnosisBackend(
                image_service,
                domains,
                surroundings=Surroundings(vhost_device_vsock=config.domains.vhost_device_vsock),
                broker_spki_sha256=side.spki_sha256,
                key_problem=side.key_problem,
            ),
            jobs=jobs,
            facts=ServiceFacts(
                version=jindiskd.__version__,
                deployment=config.broker.deployment.value,
                allow_simulated=config.broker.allow_simulated,
                broker_spki_sha256=side.spki_sha256,
                status=lambda: status(config),
                relay_broker=config.relay.broker if side.relay is not None else "",
                settings=tuple((item.name, item.value, item.origin) for item in self._loaded.settings),
            ),
        )
        stack.push_async_callback(on_bus.close)
        # Before the bus goes: what jobs made is undone, and clients learn of it.
        stack.push_async_callback(jobs.close)
        await devices.start()
        stack.push_async_callback(devices.stop)
        await on_bus.start()
        await domains.start()
        stack.push_async_callback(domains.stop)
        return bus

    async def _embedded(self) -> Side:
        """Keys and a broker of our own, which listens for each domain alone."""
        config, state = self._config, self._state
        store = await asyncio.to_thread(open_store, kek_place(config), config.database_url, config.database_file)
        self._stack.callback(store.close)
        identity = await asyncio.to_thread(TlsIdentity.load_or_create, state.identity)
        cache = CollateralCache(config.collateral_dir)
        collector = Collector(cache, Vendors() if config.collateral.fetch else None)
        verifiers = [*genuine_verifiers(collector), *plugged_in(config.broker.verifiers, collector)]
        if config.broker.allow_simulated:
            root = await asyncio.to_thread(SimulatedRoot.load_or_create, state.simulated_root)
            verifiers.append(SnpVerifier(roots=root.roots))
        broker = Broker(
            store=store,
            verifiers=verifiers,
            allow_simulated=config.broker.allow_simulated,
            limits=BrokerLimits(
                session_lifetime_s=config.broker.session_lifetime_s, sessions=config.broker.max_sessions
            ),
            on_event=lambda event: tell_domains(side.domains[0], event),
        )

        async def open_broker(path: Path, domain_uuid: str, image_id: str) -> Closing:
            peer = Peer(description=f"domain {domain_uuid}", domain_uuid=domain_uuid, image_id=image_id)
            return await listen_unix(broker, identity, path, peer)

        simulated = state.root / "simulated-sev.json"
        sev = SevOwner(
            store,
            certificates=state.root / "sev",
            simulated=(lambda: SevPlatformKeys.load_or_create(simulated)) if config.broker.allow_simulated else None,
            on_event=lambda event: tell_domains(side.domains[0], event),
        )
        side = Side(
            images=KeyPort(store),
            keys=lambda domains: KeysBackend(store, identity.spki_sha256, domains),
            store=store,
            decisions=lambda images: DecisionsBackend(images, store, config),
            open_broker=open_broker,
            sev=sev,
            key_problem=lambda image_id: key_problem(store, image_id),
            key_here=lambda image_id: key_here(store, image_id),
            spki_sha256=identity.spki_sha256,
        )
        return side

    async def _relayed(self) -> Side:
        """The owner's broker: its keys are handed over, and guests passed on."""
        config, state = self._config, self._state
        broker, card = relay_settings(config)
        if config.broker.allow_simulated:
            await asyncio.to_thread(SimulatedRoot.load_or_create, state.simulated_root)
        relay = Relay(
            broker,
            limits=RelayLimits(
                connections=config.relay.max_connections_per_guest,
                connections_in_all=config.relay.max_connections,
                starts_per_minute=config.relay.max_starts_per_minute,
                bytes=config.relay.max_bytes,
                idle_s=config.relay.idle_s,
                life_s=config.relay.life_s,
            ),
        )

        async def open_broker(path: Path, domain_uuid: str, image_id: str) -> Closing:  # noqa: ARG001 (the owner asks)
            return await relay.open(path, domain_uuid)

        keys = await asyncio.to_thread(HandedKeys, state.handover, card)
        theirs = OwnersKeys(keys)
        return Side(
            images=keys,
            keys=lambda _domains: theirs,
            decisions=lambda _images: theirs,
            open_broker=open_broker,
            key_problem=lambda _image_id: "",
            key_here=lambda _image_id: True,  # the owner's broker knows
            spki_sha256=card.spki_sha256,
            relay=relay,
        )

    def _domains(self, images: ImageStore, side: Side) -> DomainService:
        config, state = self._config, self._state
        found = DomainService(
            uri=config.domains.libvirt_uri,
            images=images,
            open_broker=side.open_broker,
            key_problem=lambda image_id: self._image_problem(side, image_id),
            key_here=side.key_here,
            sev=side.sev,
            sockets=self._sockets,
            settings=DomainSettings(
                runtime_dir=config.service.runtime_dir,
                console_dir=state.console,
                simulated_root=state.simulated_root if config.broker.allow_simulated else None,
                vhost_device_vsock=config.domains.vhost_device_vsock,
                kernel_vsock=kernel_vsock(config.domains.vsock),
                memory_mib=config.domains.memory_mib,
                launch_timeout_s=config.domains.launch_timeout_s,
                relayed=side.relay is not None,
            ),
        )
        side.domains.append(found)
        return found

    def _image_problem(self, side: Side, image_id: str) -> str:
        """Why no guest may start from an image, as the end of a sentence; empty if one may. Blocks."""
        in_use = self._devices.service.in_use(image_id) if self._devices is not None else ""
        return in_use or side.key_problem(image_id)

    async def stop(self) -> None:
        """Stop everything that was started, last first."""
        await self._stack.aclose()


def kernel_vsock(mode: VsockMode) -> bool:
    """Whether new definitions get their vsock device from the kernel.

    Where the setting leaves it open, they do if the kernel has it. A definition keeps what it was given.
    """
    if mode is VsockMode.AUTO:
        return not switch.why_not()
    return mode is VsockMode.KERNEL


def running_domain(domains: DomainService, image_id: str) -> str:
    """Name of a domain that runs from an image; empty if none does."""
    for view in domains.list():
        if view.image_id == image_id and view.state in ACTIVE:
            return view.name
    return ""


def key_problem(store: Store, image_id: str) -> str:
    """Why the key of an image is not released, as the end of a sentence; empty if it may be. Blocks."""
    try:
        record = store.image(image_id)
    except NotFound:
        return "is not in the key store"
    if record.state is KeyState.REVOKED:
        return f"is revoked: 'jindiskctl key reinstate {record.name}' undoes that"
    return "" if record.state is KeyState.ACTIVE else "is not released before its build is done"


def key_here(store: Store, image_id: str) -> bool:
    """Whether the key store knows an image at all. Blocks."""
    try:
        store.image(image_id)
    except NotFound:
        return False
    return True


def tell_domains(domains: DomainService, event: BrokerEvent) -> None:
    """Tell the domains what the broker decided about one of them."""
    uuid = event.peer.domain_uuid
    if uuid is None:
        return
    if event.kind == "attested":
        domains.on_attested(uuid)
    elif event.kind == "released":
        domains.on_released(uuid)
    elif event.kind == "refused":
        domains.on_refused(uuid, "; ".join(str(finding) for finding in event.findings))


async def serve(loaded: Loaded[Config], path: Path) -> int:
    """Run until a signal ends it (status 0) or the bus does (69)."""
    service = Service(loaded, take_sockets())
    async with signals(lambda: load(path)) as ended:
        try:
            bus = await service.start()
            log.info("ready", version=jindiskd.__version__)
            if await until_first(bus.wait_disconnected(), ended=ended) is not None:
                log.error("the connection to the bus was lost")
                return EXIT_UNAVAILABLE
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
    loaded = load(path or DEFAULT_FILE)
    if loaded.config.broker.deployment is Deployment.RELAY:
        relay_settings(loaded.config)
    if show_config:
        click.echo(json.dumps({"settings": loaded.plain()}, indent=2))
    if check_config or show_config:
        return 0
    keep_memory_private()
    config = loaded.config
    logs.setup(config.service.log_level.value)
    if seal or new_kek is not None:
        if config.broker.deployment is Deployment.RELAY:
            raise NotSupported("a key-encryption key", "no keys are here: they are at the guests' owner")
        place, database = kek_place(config), config.database_file
        click.echo(
            rotate_kek(place, config.database_url, database, new_kek)
            if new_kek is not None
            else seal_kek(place, database)
        )
        return 0
    return asyncio.run(serve(loaded, path or DEFAULT_FILE))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit status."""
    return run_program("jindiskd", daemon_command(run), arguments)


if __name__ == "__main__":
    sys.exit(main())
