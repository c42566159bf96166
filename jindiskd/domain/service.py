"""The domains of our images: launching them, following them, and telling the truth about them.

What libvirt says is re-read at start and after each reconnect; an event is only a reason to look.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid as uuid_module
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

import libvirt
import structlog

from jindiskd.domain import connection as events
from jindiskd.domain import vsock, xml
from jindiskd.domain.connection import Connection
from jindiskd.domain.firmware import FirmwareProcess
from jindiskd.domain.progress import ProgressListener
from jindiskd.domain.state import ACTIVE, NEXT, DomainState, DomainView, LaunchFailed, LaunchRefused
from jindiskd.errors import Busy, JindiskError, NotFound, TimedOut
from jindiskd.guest.codes import Code
from jindiskd.guest.config import FIRMWARE_PORT, KBS_PORT, PROGRESS_PORT
from jindiskd.image.manifest import Manifest
from jindiskd.image.store import ImageStore

log = structlog.get_logger(__name__)
FIRST_CID = 3
SETTLE_S = 3.0
SHUTDOWN_S = 90.0


class Closing(Protocol):
    """Something that listens."""

    async def close(self) -> None:
        """Stop listening."""


OpenBroker = Callable[[Path, str, str], Awaitable[Closing]]
"""Opens the broker (or the relay to one) on a unix socket for the guest of a domain: path, domain UUID, image id."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainSettings:
    """What the host decides."""

    runtime_dir: Path
    console_dir: Path
    simulated_root: Path | None
    """Directory of the simulated platform's root; None where simulation is off."""
    vhost_device_vsock: Path
    memory_mib: int = 1024
    launch_timeout_s: int = 300


class _Guest:
    """One domain of ours and what was opened for it."""

    def __init__(self, view: DomainView) -> None:
        self.view = view
        self.broker: Closing | None = None
        self.progress: ProgressListener | None = None
        self.firmware: FirmwareProcess | None = None
        self.changed = asyncio.Event()


class DomainService:
    """Launches and follows the domains of images."""

    def __init__(self, *, uri: str, images: ImageStore, open_broker: OpenBroker, settings: DomainSettings) -> None:
        """Nothing is connected or opened before `start`."""
        self._images, self._open_broker, self._settings = images, open_broker, settings
        self._guests: dict[str, _Guest] = {}
        self._subscribers: list[Callable[[], None]] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self.connection = Connection(uri, on_event=self._on_event, on_connected=self._on_connected)

    async def start(self) -> None:
        """Connect in the background; domains appear once libvirt answers."""
        self._vsock_dir.mkdir(mode=0o711, parents=True, exist_ok=True)
        self._settings.console_dir.mkdir(mode=0o711, parents=True, exist_ok=True)
        await self.connection.start()

    async def stop(self) -> None:
        """Close listeners and the connection. Guests go on; their vsock devices too."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for guest in self._guests.values():
            await self._close(guest)
        await self.connection.stop()

    def list(self) -> Sequence[DomainView]:
        """All domains of ours."""
        return [guest.view for guest in self._guests.values()]

    def get(self, key: str) -> DomainView:
        """One domain by UUID or name."""
        return self._find(key).view

    def subscribe(self, changed: Callable[[], None]) -> None:
        """Have `changed()` called in the event loop whenever a view changes."""
        self._subscribers.append(changed)

    # Launching

    async def launch(
        self,
        image_name: str,
        *,
        name: str = "",
        memory_mib: int | None = None,
        timeout_s: int | None = None,
        progress: Callable[[str], None] = lambda _stage: None,
    ) -> DomainView:
        """Define and start a domain for an image and follow it until its system runs.

        Args:
            image_name: an image in the store.
            name: the domain's name; the image's by default.
            memory_mib: memory; as configured by default.
            timeout_s: from here to the running system; as configured by default.
            progress: called with each state's name as it is reached.

        Raises:
            NotFound, Busy, NotSupported, LibvirtFailed: before anything was started.
            LaunchRefused, LaunchFailed, TimedOut: the guest is off again and nothing is left open.
        """
        stored = await asyncio.to_thread(self._images.get, image_name)
        manifest = stored.manifest
        for other in self._guests.values():
            if other.view.image_id == manifest.image_id and other.view.state in ACTIVE:
                raise Busy(f"image {image_name!r}", f"domain {other.view.name!r} uses it; stop that first")
        name = name or image_name
        old = next((guest.view for guest in self._guests.values() if guest.view.name == name), None)
        identity = old.uuid if old else str(uuid_module.uuid4())
        view = DomainView(
            uuid=identity,
            name=name,
            image=manifest.name,
            image_id=manifest.image_id,
            platform=manifest.platform,
            state=DomainState.STARTING,
            reason="",
            since=datetime.now(UTC),
            cid=self._free_cid(),
            console=str(self._settings.console_dir / f"{identity}.log"),
        )
        guest = self._guests[identity] = _Guest(view)
        self._tell(guest)
        log.info("launch", domain=name, image=image_name, simulated=view.simulated)
        seconds = timeout_s or self._settings.launch_timeout_s
        try:
            async with asyncio.timeout(seconds):
                spec = await self._define(guest, stored.path, manifest, memory_mib or self._settings.memory_mib)
                await self._power_on(guest, spec)
                await self._follow(guest, progress)
        except BaseException as exc:
            await asyncio.shield(self._abandon(guest, exc))
            if isinstance(exc, TimeoutError):
                raise TimedOut(f"the startup of domain {name!r}", seconds) from exc
            raise
        return guest.view

    async def _define(self, guest: _Guest, directory: Path, manifest: Manifest, memory_mib: int) -> xml.DomainSpec:
        view, home = guest.view, self._home(guest)
        spec = xml.from_manifest(
            manifest,
            directory,
            name=view.name,
            uuid=view.uuid,
            memory_mib=memory_mib,
            console_log=Path(view.console),
            vsock=home / "device.sock",
        )
        text = xml.write(spec)
        record = vsock.Record(uuid=view.uuid, image=view.image, cid=view.cid)
        await vsock.start_device(self._settings.vhost_device_vsock, home, record)
        guest.broker = await self._open_broker(vsock.socket_path(home, KBS_PORT), view.uuid, view.image_id)
        guest.progress = ProgressListener(
            vsock.socket_path(home, PROGRESS_PORT), lambda word: self._on_word(guest, word)
        )
        await guest.progress.start()
        await self.connection.call(
            f"defining domain {view.name!r}",
            lambda conn: conn.defineXMLFlags(text, libvirt.VIR_DOMAIN_DEFINE_VALIDATE),
        )
        return spec

    async def _power_on(self, guest: _Guest, spec: xml.DomainSpec) -> None:
        """Start the machine paused, measure what libvirt really has, then let it run."""
        view = guest.view

        def create(conn: libvirt.virConnect) -> str:
            dom = conn.lookupByUUIDString(view.uuid)
            dom.createWithFlags(libvirt.VIR_DOMAIN_START_PAUSED)
            return str(dom.XMLDesc())

        live = await self.connection.call(f"starting domain {view.name!r}", create)
        boot = xml.boot_inputs(xml.parse(live))
        if boot != spec.boot:
            raise LaunchFailed(view.name, "libvirt starts something else than was asked for; see `virsh dumpxml`")
        await self._start_firmware(guest, boot)
        await self.connection.call(
            f"resuming domain {view.name!r}", lambda conn: conn.lookupByUUIDString(view.uuid).resume()
        )
        self._set(guest, DomainState.STARTED)

    async def _start_firmware(self, guest: _Guest, boot: xml.BootInputs) -> None:
        if not guest.view.simulated:
            return
        if self._settings.simulated_root is None:
            raise LaunchFailed(guest.view.name, "its platform is simulated, and broker.allow_simulated is off")
        guest.firmware = await FirmwareProcess.start(
            guest.view.name,
            boot,
            root=self._settings.simulated_root,
            socket=vsock.socket_path(self._home(guest), FIRMWARE_PORT),
        )

    async def _follow(self, guest: _Guest, progress: Callable[[str], None]) -> None:
        told: DomainState | None = None
        while True:
            view = guest.view
            if view.state != told:
                told = view.state
                progress(view.state.value)
            if view.state is DomainState.RUNNING:
                return
            if view.state is DomainState.REFUSED:
                raise LaunchRefused(view.name, view.reason)
            if view.state not in ACTIVE:
                raise LaunchFailed(view.name, view.reason or "it stopped before its system ran; see its console log")
            guest.changed.clear()
            await guest.changed.wait()

    async def _abandon(self, guest: _Guest, why: BaseException) -> None:
        """End a launch that did not get there."""
        with contextlib.suppress(JindiskError):
            await self._power_off(guest)
        await self._close(guest)
        await asyncio.to_thread(vsock.clear, self._home(guest))
        if guest.view.state in ACTIVE:
            reason = str(why) if isinstance(why, JindiskError) else "the launch was given up"
            self._set(guest, DomainState.FAILED, reason)

    # Operating

    async def stop_domain(self, key: str, *, force: bool) -> None:
        """Shut a guest down and wait for it; `force` switches it off.

        Raises:
            NotFound, LibvirtFailed: nothing to stop. TimedOut: it did not shut down; use `force`.
        """
        guest = self._find(key)
        if guest.view.state not in ACTIVE:
            return
        if force:
            await self._power_off(guest)
        else:
            await self.connection.call(
                f"shutting down domain {guest.view.name!r}",
                lambda conn: conn.lookupByUUIDString(guest.view.uuid).shutdown(),
            )
        try:
            async with asyncio.timeout(SHUTDOWN_S):
                while guest.view.state in ACTIVE:
                    guest.changed.clear()
                    await guest.changed.wait()
        except TimeoutError as exc:
            raise TimedOut(f"the shutdown of domain {guest.view.name!r}", SHUTDOWN_S) from exc

    async def undefine(self, key: str) -> None:
        """Remove a domain that is off; its image stays."""
        guest = self._find(key)
        if guest.view.state in ACTIVE:
            raise Busy(f"domain {guest.view.name!r}", "it is running; stop it first")

        def remove(conn: libvirt.virConnect) -> None:
            try:
                conn.lookupByUUIDString(guest.view.uuid).undefine()
            except libvirt.libvirtError as exc:
                if exc.get_error_code() != libvirt.VIR_ERR_NO_DOMAIN:
                    raise

        await self.connection.call(f"removing domain {guest.view.name!r}", remove)
        self._guests.pop(guest.view.uuid, None)
        await asyncio.to_thread(vsock.clear, self._home(guest))
        self._notify()

    async def _power_off(self, guest: _Guest) -> None:
        def destroy(conn: libvirt.virConnect) -> None:
            try:
                dom = conn.lookupByUUIDString(guest.view.uuid)
                if dom.isActive():
                    dom.destroy()
            except libvirt.libvirtError as exc:
                if exc.get_error_code() not in {libvirt.VIR_ERR_NO_DOMAIN, libvirt.VIR_ERR_OPERATION_INVALID}:
                    raise

        await self.connection.call(f"switching off domain {guest.view.name!r}", destroy)

    # What others tell us

    def on_attested(self, domain_uuid: str) -> None:
        """The broker accepted a guest's report."""
        self._advance(domain_uuid, DomainState.ATTESTED)

    def on_released(self, domain_uuid: str) -> None:
        """The broker gave a guest its key."""
        self._advance(domain_uuid, DomainState.RELEASED)

    def on_refused(self, domain_uuid: str, reason: str) -> None:
        """The broker refused; `reason` is its findings in one sentence."""
        guest = self._guests.get(domain_uuid)
        if guest is not None and guest.view.state in ACTIVE - {DomainState.RUNNING, DomainState.UNLOCKED}:
            self._set(guest, DomainState.REFUSED, reason)
            self._spawn(self._settle(guest))

    def _on_word(self, guest: _Guest, word: str) -> None:
        if word == "boot" and guest.view.state in NEXT and guest.view.state is not DomainState.STARTED:
            self._advance(guest.view.uuid, DomainState.STARTED)  # the guest was reset: it attests again
        elif word == "unlocked":
            self._advance(guest.view.uuid, DomainState.UNLOCKED)
        elif word == "running":
            self._advance(guest.view.uuid, DomainState.RUNNING)
        elif word.startswith("fail ") and guest.view.state in ACTIVE:
            code = word.removeprefix("fail ")
            sentence = next((known.sentence for known in Code if known == code), "the guest gave an unknown code")
            self._set(guest, DomainState.FAILED, f"{sentence} ({code})")
            self._spawn(self._settle(guest))

    def _advance(self, domain_uuid: str, state: DomainState) -> None:
        guest = self._guests.get(domain_uuid)
        if guest is not None and state in NEXT[guest.view.state]:
            self._set(guest, state)

    def _on_event(self, domain_uuid: str, event: int) -> None:
        guest = self._guests.get(domain_uuid)
        if guest is not None and event in {events.STOPPED, events.CRASHED}:
            self._spawn(self._ended(guest))

    async def _ended(self, guest: _Guest) -> None:
        """The machine is off: say so, and close what was open for it."""
        if guest.view.state is DomainState.STARTING:
            return  # an earlier machine of this name; the launch under way looks after itself
        if guest.view.state in ACTIVE:
            came_up = guest.view.state is DomainState.RUNNING
            reason = "" if came_up else "the guest stopped before its system ran; see its console log"
            self._set(guest, DomainState.STOPPED if came_up else DomainState.FAILED, reason)
        await self._close(guest)
        await asyncio.to_thread(vsock.clear, self._home(guest))

    async def _settle(self, guest: _Guest) -> None:
        """A refused guest powers itself off; one that does not is switched off."""
        await asyncio.sleep(SETTLE_S)
        if guest.view.state not in ACTIVE:
            with contextlib.suppress(JindiskError):
                await self._power_off(guest)

    def _on_connected(self) -> None:
        self._spawn(self._reconcile())

    async def _reconcile(self) -> None:
        """Read all domains anew: adopt what runs, note what ended, clear what was left behind."""

        def read(conn: libvirt.virConnect) -> Sequence[tuple[str, str, bool, str]]:
            return [(d.UUIDString(), d.name(), bool(d.isActive()), d.XMLDesc()) for d in conn.listAllDomains()]

        try:
            found = await self.connection.call("listing domains", read)
        except JindiskError as exc:
            log.warning("domains could not be listed", problem=str(exc))
            return
        running = set()
        for identity, name, active, text in found:
            root = xml.parse(text)
            binding = xml.binding_of(root)
            if binding is None:
                continue
            if active:
                running.add(identity)
            if identity not in self._guests:
                await self._adopt(identity, name, binding, xml.boot_inputs(root), active=active)
            elif not active and self._guests[identity].view.state in ACTIVE - {DomainState.STARTING}:
                await self._ended(self._guests[identity])
        for home in self._vsock_dir.iterdir():
            known = self._guests.get(home.name)
            if home.name not in running and (known is None or known.view.state not in ACTIVE):
                log.info("cleared what an ended domain left behind", domain=home.name)
                await asyncio.to_thread(vsock.clear, home)
        self._notify()

    async def _adopt(
        self, identity: str, name: str, binding: xml.Binding, boot: xml.BootInputs, *, active: bool
    ) -> None:
        record = vsock.read_record(self._vsock_dir / identity)
        guest = self._guests[identity] = _Guest(
            DomainView(
                uuid=identity,
                name=name,
                image=binding.image,
                image_id=binding.image_id,
                platform=binding.platform,
                # Whether a guest found running got its key was seen by an earlier process; that it runs is known.
                state=DomainState.RUNNING if active else DomainState.STOPPED,
                reason="",
                since=datetime.now(UTC),
                cid=record.cid if record else 0,
                console=str(self._settings.console_dir / f"{identity}.log"),
            )
        )
        if not active or record is None:
            return
        home = self._home(guest)
        try:
            guest.broker = await self._open_broker(vsock.socket_path(home, KBS_PORT), identity, binding.image_id)
            guest.progress = ProgressListener(
                vsock.socket_path(home, PROGRESS_PORT), lambda word: self._on_word(guest, word)
            )
            await guest.progress.start()
            await self._start_firmware(guest, boot)
        except JindiskError as exc:
            log.warning("a running domain was found but not served", domain=name, problem=str(exc))

    # Small things

    @property
    def _vsock_dir(self) -> Path:
        return self._settings.runtime_dir / "vsock"

    def _home(self, guest: _Guest) -> Path:
        return self._vsock_dir / guest.view.uuid

    def _find(self, key: str) -> _Guest:
        for guest in self._guests.values():
            if key in {guest.view.uuid, guest.view.name}:
                return guest
        raise NotFound("domain", key)

    def _free_cid(self) -> int:
        used = {guest.view.cid for guest in self._guests.values() if guest.view.state in ACTIVE}
        return next(cid for cid in range(FIRST_CID, FIRST_CID + len(used) + 1) if cid not in used)

    async def _close(self, guest: _Guest) -> None:
        broker, guest.broker = guest.broker, None
        progress, guest.progress = guest.progress, None
        firmware, guest.firmware = guest.firmware, None
        if broker is not None:
            await broker.close()
        if progress is not None:
            await progress.close()
        if firmware is not None:
            await firmware.stop()

    def _set(self, guest: _Guest, state: DomainState, reason: str = "") -> None:
        old = guest.view.state
        if state not in NEXT[old]:
            raise RuntimeError(f"{old} cannot become {state}")
        cid = guest.view.cid if state in ACTIVE else 0
        guest.view = replace(guest.view, state=state, reason=reason, since=datetime.now(UTC), cid=cid)
        log.info("domain", domain=guest.view.name, state=state.value, reason=reason, simulated=guest.view.simulated)
        self._tell(guest)

    def _tell(self, guest: _Guest) -> None:
        guest.changed.set()
        self._notify()

    def _notify(self) -> None:
        for subscriber in self._subscribers:
            subscriber()

    def _spawn(self, work: Awaitable[None]) -> None:
        async def guarded() -> None:
            try:
                await work
            except asyncio.CancelledError:
                raise
            except Exception:  # a fault in following one domain must not stop the others
                log.exception("fault while following a domain")

        task = asyncio.get_running_loop().create_task(guarded())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
