"""`jindiskd`: the service. Builds all parts, hands them to each other, and stops them in the opposite order.

Everything else in the package receives its collaborators; here alone they are made.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

import click
import structlog

import jindiskd
from jindiskd import standing
from jindiskd.backend.guests import GuestsBackend
from jindiskd.backend.images import ImagesBackend
from jindiskd.base import log as logs
from jindiskd.base.notify import take_sockets
from jindiskd.bus.lib import BusType
from jindiskd.bus.ports import ServiceFacts
from jindiskd.bus.service import BusService
from jindiskd.bus.transport import Connection, connect_to
from jindiskd.cli.serving import daemon_command
from jindiskd.config import DEFAULT_FILE, Config, Deployment, Loaded, VsockMode, load
from jindiskd.devices import DevicesBackend, HostDevices
from jindiskd.diagnosis import DiagnosisBackend
from jindiskd.doctor.host import Surroundings
from jindiskd.domain import switch
from jindiskd.domain.service import DomainService, DomainSettings
from jindiskd.domain.state import ACTIVE
from jindiskd.errors import EXIT_UNAVAILABLE, NotFound, NotSupported
from jindiskd.image.service import ImageService
from jindiskd.image.store import ImageStore
from jindiskd.jobs.job import Change
from jindiskd.jobs.manager import JobManager
from jindiskd.keys.opening import rotate_kek, seal_kek
from jindiskd.program import keep_memory_private, run_program, signals, until_first
from jindiskd.side import Side, StateFiles, embedded, kek_place, relay_settings, relayed

log = structlog.get_logger(__name__)


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
        relay = config.broker.deployment is Deployment.RELAY
        side = await (relayed(config) if relay else embedded(config, stack))

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
            approvals=decisions,
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
                status=lambda: standing.status(config),
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
