"""The domains of our images: launching them, following them, and telling the truth about them.

What libvirt says is re-read at start and after each reconnect; an event is only a reason to look. Everything here runs
in the event loop; libvirt is called in a thread of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid as uuid_module
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import libvirt
import structlog

from jindiskd.base.platform import Platform
from jindiskd.domain import connection as events
from jindiskd.domain import console, inventory, vsock, xml
from jindiskd.domain.binding import Binding, Bindings
from jindiskd.domain.connection import Connection
from jindiskd.domain.guest import Closing, Guest, OpenBroker
from jindiskd.domain.state import ACTIVE, NEXT, DomainState, DomainView, LaunchFailed, LaunchRefused
from jindiskd.errors import Busy, JindiskError, NotFound, TimedOut
from jindiskd.image.manifest import Manifest
from jindiskd.image.store import ImageStore

__all__ = ["Closing", "DomainService", "DomainSettings", "OpenBroker"]

log = structlog.get_logger(__name__)
_STARTING = DomainState.STARTING
FIRST_CID = 3
SETTLE_S = 3.0
SHUTDOWN_S = 90.0
UNFINISHED = "the service ended while the domain was starting; launch it again"


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
    bindings_dir: Path | None = None
    """Where it is recorded which domain is of which image; `domains` beside `console_dir` if None."""


class DomainService:
    """Launches and follows the domains of images."""

    def __init__(self, *, uri: str, images: ImageStore, open_broker: OpenBroker, settings: DomainSettings) -> None:
        """Nothing is connected or opened before `start`."""
        self._images, self._open_broker, self._settings = images, open_broker, settings
        self._bindings = Bindings(settings.bindings_dir or settings.console_dir.parent / "domains")
        self._guests: dict[str, Guest] = {}
        self._subscribers: list[Callable[[], None]] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._reading = asyncio.Lock()
        self.ready = asyncio.Event()
        """Set once the domains have been read for the first time."""
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
            await guest.close()
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
        name = name or image_name
        old = next((guest for guest in self._guests.values() if guest.view.name == name), None)
        identity = old.view.uuid if old else str(uuid_module.uuid4())
        guest = self._claim(identity, name, manifest.name, manifest.image_id, manifest.platform)
        guest.follower = progress
        progress(guest.view.state.value)
        log.info("launch", domain=name, image=image_name, simulated=guest.view.simulated)
        seconds = timeout_s or self._settings.launch_timeout_s
        try:
            async with asyncio.timeout(seconds):
                if old is not None:
                    await old.retire()
                spec = await self._define(guest, stored.path, manifest, memory_mib or self._settings.memory_mib)
                await self._power_on(guest, spec)
                await self._follow(guest)
        except BaseException as exc:
            reached = guest.view.state
            guest.follower = None
            await asyncio.shield(self._abandon(guest, exc))
            if isinstance(exc, TimeoutError):
                raise TimedOut(f"the startup of domain {name!r} (it came as far as {reached})", seconds) from exc
            raise
        guest.follower = None
        return guest.view

    def _claim(self, identity: str, name: str, image: str, image_id: str, platform: Platform) -> Guest:
        """A new guest in `starting`, which holds its name, its image and a context id from now on.

        Raises:
            Busy: the name or the image is in use.
        """
        for other in self._guests.values():
            if other.view.state in ACTIVE:
                if other.view.image_id == image_id:
                    raise Busy(f"image {image!r}", f"domain {other.view.name!r} uses it; stop that first")
                if other.view.name == name:
                    raise Busy(f"domain {name!r}", f"it runs with image {other.view.image!r}; stop it first")
        view = DomainView(
            uuid=identity,
            name=name,
            image=image,
            image_id=image_id,
            platform=platform,
            state=DomainState.STARTING,
            reason="",
            since=datetime.now(UTC),
            cid=self._free_cid(),
            console=str(self._settings.console_dir / f"{identity}.log"),
        )
        guest = self._guests[identity] = Guest(view, self._vsock_dir / identity)
        self._tell(guest)
        return guest

    async def _define(self, guest: Guest, directory: Path, manifest: Manifest, memory_mib: int) -> xml.DomainSpec:
        view = guest.view
        spec = xml.from_manifest(
            manifest,
            directory,
            name=view.name,
            uuid=view.uuid,
            memory_mib=memory_mib,
            console_log=Path(view.console),
            vsock=guest.device_socket,
        )
        text = xml.write(spec)
        await guest.start_device(self._settings.vhost_device_vsock)
        await guest.listen(self._open_broker, lambda word: self._on_word(guest, word))
        self._bindings.put(view.uuid, spec.binding)

        def define(conn: libvirt.virConnect) -> str:
            dom = conn.defineXMLFlags(text, libvirt.VIR_DOMAIN_DEFINE_VALIDATE)
            return str(dom.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE))

        self._compare(view, text, await self.connection.call(f"defining domain {view.name!r}", define))
        return spec

    async def _power_on(self, guest: Guest, spec: xml.DomainSpec) -> None:
        """Start the machine paused, measure what libvirt really has, then let it run."""
        view = guest.view

        def create(conn: libvirt.virConnect) -> str:
            dom = conn.lookupByUUIDString(view.uuid)
            dom.createWithFlags(libvirt.VIR_DOMAIN_START_PAUSED)
            return str(dom.XMLDesc())

        live = await self.connection.call(f"starting domain {view.name!r}", create)
        self._compare(view, xml.write(spec), live)
        await guest.start_firmware(xml.boot_inputs(xml.parse(live)), self._settings.simulated_root)
        await self.connection.call(
            f"resuming domain {view.name!r}", lambda conn: conn.lookupByUUIDString(view.uuid).resume()
        )
        self._set(guest, DomainState.STARTED)

    @staticmethod
    def _compare(view: DomainView, wanted: str, got: str) -> None:
        different = xml.differences(xml.parse(wanted), xml.parse(got))
        if different:
            raise LaunchFailed(
                view.name, f"libvirt has another {', '.join(different)} than was asked for; see `virsh dumpxml`"
            )

    @staticmethod
    async def _follow(guest: Guest) -> None:
        """Wait for a state in which the launch is decided."""
        while True:
            view = guest.view
            if view.state is DomainState.RUNNING:
                return
            if view.state is DomainState.REFUSED:
                raise LaunchRefused(view.name, view.reason)
            if view.state not in ACTIVE:
                raise LaunchFailed(view.name, view.reason or "it stopped before its system ran; see its console log")
            guest.changed.clear()
            await guest.changed.wait()

    async def _abandon(self, guest: Guest, why: BaseException) -> None:
        """End a launch that did not get there."""
        with contextlib.suppress(JindiskError):
            await self._power_off(guest)
        await guest.clear()
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
        await self._forget(guest)
        self._notify()

    async def _power_off(self, guest: Guest) -> None:
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
            self._spawn(self._settle, guest)

    def _on_word(self, guest: Guest, word: str) -> None:
        state = guest.view.state
        if word == "boot" and state is not DomainState.STARTED:
            self._advance(guest.view.uuid, DomainState.STARTED)  # the guest was reset: it attests again
        elif word == "unlocked":
            self._advance(guest.view.uuid, DomainState.UNLOCKED)
        elif word == "running":
            self._advance(guest.view.uuid, DomainState.RUNNING)
            if guest.view.state is DomainState.RUNNING:
                guest.mark_running()
        elif word.startswith("fail ") and state in ACTIVE - {DomainState.STARTING}:
            self._set(guest, DomainState.FAILED, console.sentence(word.removeprefix("fail ")))
            self._spawn(self._settle, guest)

    def _advance(self, domain_uuid: str, state: DomainState) -> None:
        guest = self._guests.get(domain_uuid)
        if guest is not None and state in NEXT[guest.view.state] and guest.view.state in ACTIVE - {_STARTING}:
            self._set(guest, state)

    def _on_event(self, domain_uuid: str, event: int) -> None:
        guest = self._guests.get(domain_uuid)
        if guest is not None and event in {events.STOPPED, events.CRASHED}:
            self._spawn(self._ended, guest)
        elif guest is not None and event == events.UNDEFINED:
            self._spawn(self._reconcile)

    async def _ended(self, guest: Guest) -> None:
        """The machine seems to be off: look; if so, say so, and close what was open for it."""
        if guest.view.state is DomainState.STARTING:
            return  # an earlier machine of this name; the launch under way looks after itself
        identity = guest.view.uuid

        def active(conn: libvirt.virConnect) -> bool:
            return bool(conn.lookupByUUIDString(identity).isActive())

        with contextlib.suppress(NotFound):
            if await self.connection.call(f"looking at domain {guest.view.name!r}", active):
                return
        if self._guests.get(identity) is not guest:
            return  # launched anew meanwhile
        if guest.view.state in ACTIVE:
            came_up = guest.view.state is DomainState.RUNNING
            reason = "" if came_up else await asyncio.to_thread(console.diagnose, Path(guest.view.console))
            if not came_up and not reason:
                reason = "the guest stopped before its system ran; see its console log"
            if guest.view.state in ACTIVE:
                self._set(guest, DomainState.STOPPED if came_up else DomainState.FAILED, reason)
        await guest.clear()

    async def _settle(self, guest: Guest) -> None:
        """A refused guest powers itself off; one that does not is switched off."""
        await asyncio.sleep(SETTLE_S)
        if guest.view.state not in ACTIVE and self._guests.get(guest.view.uuid) is guest:
            with contextlib.suppress(JindiskError):
                await self._power_off(guest)

    # Reading everything anew

    def _on_connected(self) -> None:
        self._spawn(self._reconcile)

    async def _reconcile(self) -> None:
        """Read all domains: adopt what runs, note what ended, drop what is gone, clear what was left behind."""
        async with self._reading:
            before = {identity: guest.view for identity, guest in self._guests.items()}
            found = await self.connection.call(
                "listing domains", lambda conn: inventory.read(conn, lambda uuid: self._bindings.get(uuid) is not None)
            )
            for item in found:
                guest = self._guests.get(item.uuid)
                binding = self._bindings.get(item.uuid)
                if binding is None:
                    log.info("a domain claims an image but was not made by us", domain=item.name)
                elif guest is None:
                    await self._adopt(item, binding)
                elif not item.active and guest.view.state in ACTIVE:
                    await self._ended(guest)
            there = {item.uuid for item in found}
            for identity, view in before.items():
                guest = self._guests.get(identity)
                if identity not in there and guest is not None and guest.view is view and view.state is not _STARTING:
                    log.info("a domain is gone", domain=view.name)
                    await self._forget(guest)
            for home in self._vsock_dir.iterdir():
                known = self._guests.get(home.name)
                if known is None or known.view.state not in ACTIVE:
                    log.info("cleared what an ended domain left behind", domain=home.name)
                    vsock.clear(home)
            self.ready.set()
            self._notify()

    async def _adopt(self, item: inventory.Found, binding: Binding) -> None:
        """Take over a domain that an earlier process of this service made."""
        home = self._vsock_dir / item.uuid
        record = vsock.read_record(home) if item.active else None
        state, reason = (DomainState.RUNNING, "") if item.active else (DomainState.DEFINED, "")
        if item.active and record is None:
            reason = "its vsock device is not known to this service; it cannot attest again"
        interrupted = record is not None and not record.running
        if interrupted:
            state, reason = DomainState.FAILED, UNFINISHED
        view = DomainView(
            uuid=item.uuid,
            name=item.name,
            image=binding.image,
            image_id=binding.image_id,
            platform=binding.platform,
            state=state,
            reason=reason,
            since=datetime.now(UTC),
            cid=record.cid if record and not interrupted else 0,
            console=str(self._settings.console_dir / f"{item.uuid}.log"),
        )
        guest = self._guests[item.uuid] = Guest(view, home)
        log.info("found a domain", domain=item.name, state=state.value, simulated=view.simulated)
        try:
            if interrupted:
                await self._power_off(guest)
                await guest.clear()
            elif record is not None:
                await guest.listen(self._open_broker, lambda word: self._on_word(guest, word))
                if item.boot is not None:
                    await guest.start_firmware(item.boot, self._settings.simulated_root)
        except (JindiskError, OSError) as exc:
            log.warning("a running domain was found but is not served", domain=item.name, problem=str(exc))

    async def _forget(self, guest: Guest) -> None:
        if self._guests.get(guest.view.uuid) is guest:
            del self._guests[guest.view.uuid]
        self._bindings.drop(guest.view.uuid)
        await guest.clear()

    # Small things

    @property
    def _vsock_dir(self) -> Path:
        return self._settings.runtime_dir / "vsock"

    def _find(self, key: str) -> Guest:
        for guest in self._guests.values():
            if key in {guest.view.uuid, guest.view.name}:
                return guest
        raise NotFound("domain", key)

    def _free_cid(self) -> int:
        used = {guest.view.cid for guest in self._guests.values() if guest.view.state in ACTIVE}
        return next(cid for cid in range(FIRST_CID, FIRST_CID + len(used) + 1) if cid not in used)

    def _set(self, guest: Guest, state: DomainState, reason: str = "") -> None:
        old = guest.view.state
        if state not in NEXT[old]:
            raise RuntimeError(f"{old} cannot become {state}")
        cid = guest.view.cid if state in ACTIVE else 0
        guest.view = replace(guest.view, state=state, reason=reason, since=datetime.now(UTC), cid=cid)
        log.info("domain", domain=guest.view.name, state=state.value, reason=reason, simulated=guest.view.simulated)
        if guest.follower is not None:
            guest.follower(state.value)
        self._tell(guest)

    def _tell(self, guest: Guest) -> None:
        guest.changed.set()
        self._notify()

    def _notify(self) -> None:
        for subscriber in self._subscribers:
            subscriber()

    def _spawn(self, function: Callable[..., Awaitable[None]], *args: Guest) -> None:
        async def guarded() -> None:
            try:
                await function(*args)
            except asyncio.CancelledError:
                raise
            except JindiskError as exc:
                log.warning("a domain could not be followed", problem=str(exc))
            except Exception:  # a fault in following one domain must not stop the others
                log.exception("fault while following a domain")

        task = asyncio.get_running_loop().create_task(guarded())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
