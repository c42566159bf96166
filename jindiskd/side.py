"""The two deployments: a broker and keys of our own in the service, or the owner's behind a relay.

What differs between them is made here, as a `Side`; the rest of the service does not ask which it is.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from jindiskd.attest.collateral import CollateralCache
from jindiskd.attest.collecting import Collector, genuine_verifiers
from jindiskd.attest.plugins import plugged_in
from jindiskd.attest.snp import SnpVerifier
from jindiskd.attest.vendors import Vendors
from jindiskd.base.endpoint import Endpoint, parse_endpoint
from jindiskd.broker.identity import TlsIdentity
from jindiskd.broker.listener import listen_unix
from jindiskd.broker.relay import Relay, RelayLimits
from jindiskd.broker.service import Broker, BrokerEvent, BrokerLimits, Peer
from jindiskd.broker.sev import SevSide
from jindiskd.broker.sev_owner import SevOwner
from jindiskd.broker.sev_remote import RemoteOwner
from jindiskd.bus.ports import Keys
from jindiskd.config import Config
from jindiskd.custody import KeyPort, KeysBackend
from jindiskd.decisions import DecisionsBackend
from jindiskd.domain.guest import OpenBroker
from jindiskd.domain.judge import KeyProblem
from jindiskd.domain.service import Closing, DomainService
from jindiskd.errors import InvalidArgument, NotFound
from jindiskd.handed import HandedKeys, OwnersKeys
from jindiskd.image.service import ImageService
from jindiskd.keys.handover import BrokerCard, read_card
from jindiskd.keys.kek import KekPlace
from jindiskd.keys.opening import open_store
from jindiskd.keys.store import KeyState, Store
from jindiskd.program import credentials_directory
from jindiskd.sim.pki import SimulatedRoot
from jindiskd.sim.sev_platform import SevPlatformKeys


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
        sev/               AMD's certificates of this host's processor, put there by hand (`broker.sev`); with a relay
                           the owner's broker has them
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
    sev: SevSide
    """The owner's side of SEV and SEV-ES launches."""
    relay: Relay | None = None
    store: Store | None = None
    """The key store, where it is here."""
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


async def embedded(config: Config, stack: contextlib.AsyncExitStack) -> Side:
    """Keys and a broker of our own, which listens for each domain alone."""
    state = StateFiles(root=config.service.state_dir)
    store = await asyncio.to_thread(open_store, kek_place(config), config.database_url, config.database_file)
    stack.callback(store.close)
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
        limits=BrokerLimits(session_lifetime_s=config.broker.session_lifetime_s, sessions=config.broker.max_sessions),
        on_event=lambda event: tell_domains(side.domains[0], event),
    )

    async def open_broker(path: Path, domain_uuid: str, image_id: str) -> Closing:
        peer = Peer(description=f"domain {domain_uuid}", domain_uuid=domain_uuid, image_id=image_id)
        return await listen_unix(broker, identity, path, peer)

    simulated = state.root / "simulated-sev.json"
    sev = SevOwner(
        store,
        certificates=state.root / "sev",
        collector=collector,
        simulated=(lambda: SevPlatformKeys.load_or_create(simulated).root) if config.broker.allow_simulated else None,
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


async def relayed(config: Config) -> Side:
    """The owner's broker: its keys are handed over, and guests passed on."""
    state = StateFiles(root=config.service.state_dir)
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
        sev=RemoteOwner(relay, card.spki_sha256),
        relay=relay,
    )


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
    elif event.kind == "waiting":
        domains.on_waiting(uuid, event.approval)
    elif event.kind == "released":
        domains.on_released(uuid)
    elif event.kind == "refused":
        domains.on_refused(uuid, "; ".join(str(finding) for finding in event.findings))
