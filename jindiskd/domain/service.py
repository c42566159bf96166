"""The domains of our images: launching them, following them, and telling the truth about them.

What libvirt says is re-read at start and after each reconnect; an event is only a reason to look. Everything here runs
in the event loop; libvirt is called in a thread of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import structlog

from jindiskd.base.platform import Platform
from jindiskd.broker.sev import SevOwner
from jindiskd.domain import connection as events
from jindiskd.domain import console, inventory, machine, vsock, xml
from jindiskd.domain.adopter import Adopter
from jindiskd.domain.binding import Binding, Bindings
from jindiskd.domain.connection import Connection
from jindiskd.domain.guest import Closing, Guest, OpenBroker
from jindiskd.domain.guests import DomainSettings, Guests
from jindiskd.domain.hook import HookListener
from jindiskd.domain.judge import Judge, KeyProblem
from jindiskd.domain.launch import Launcher
from jindiskd.domain.starts import Starts
from jindiskd.domain.state import ACTIVE, DomainState, DomainView
from jindiskd.domain.switch import Switch, listening_sockets
from jindiskd.errors import Busy, JindiskError, NotSupported, TimedOut
from jindiskd.guest.codes import Code
from jindiskd.image.store import ImageStore

__all__ = ["Closing", "DomainService", "DomainSettings", "OpenBroker"]

log = structlog.get_logger(__name__)
HOOK_SOCKET = "hook.sock"
"""Below the runtime directory; the hook looks for it in /run/jindiskd."""
START_OVERDUE = timedelta(seconds=60)
"""By when a start by others has come to something, whatever became of the hook."""
SETTLE_S = 3.0
SHUTDOWN_S = 90.0
UNFINISHED = "the service ended while the domain was starting; launch it again"


class DomainService:
    """Launches and follows the domains of images."""

    def __init__(
        self,
        *,
        uri: str,
        images: ImageStore,
        open_broker: OpenBroker,
        settings: DomainSettings,
        key_problem: KeyProblem = lambda _image_id: "",
        sev: SevOwner | None = None,
        sockets: Sequence[socket.socket] = (),
    ) -> None:
        """Nothing is connected or opened before `start`. `key_problem` tells why a key would not be released, `sev`
        judges platforms that are measured before they run, `sockets` are those that guests come to already.
        """
        self._open_broker, self._settings = open_broker, settings
        self._bindings = Bindings(settings.bindings)
        self._guests = Guests(settings)
        self._tasks: set[asyncio.Task[None]] = set()
        self._reading = asyncio.Lock()
        self.ready = asyncio.Event()
        """Set once the domains have been read for the first time."""
        self.connection = Connection(uri, on_event=self._on_event, on_connected=self._on_connected)
        self._switch = Switch(lambda: listening_sockets(sockets))
        self._listened_for = any(sock.family == socket.AF_VSOCK for sock in sockets)
        self._judge = Judge(images, key_problem=key_problem, simulation=settings.simulated_root is not None)
        self._starts = Starts(
            guests=self._guests,
            bindings=self._bindings,
            judge=self._judge,
            open_broker=open_broker,
            settings=settings,
            switch=self._switch,
            heard=self._on_word,
            ended=lambda guest: self._spawn(self._ended, guest),
            give_up=self._give_up,
        )
        self._hook = HookListener(settings.runtime_dir / HOOK_SOCKET, self._starts.answer)
        self._launcher = Launcher(
            connection=self.connection,
            images=images,
            guests=self._guests,
            bindings=self._bindings,
            open_broker=open_broker,
            settings=settings,
            judge=self._judge,
            sev=sev,
            switch=self._switch,
            heard=self._on_word,
        )
        self._adopter = Adopter(
            connection=self.connection,
            images=images,
            guests=self._guests,
            bindings=self._bindings,
            settings=settings,
            launcher=self._launcher,
        )

    async def start(self) -> None:
        """Connect in the background; domains appear once libvirt answers."""
        self._settings.vsock_dir.mkdir(mode=0o711, parents=True, exist_ok=True)
        self._settings.console_dir.mkdir(mode=0o711, parents=True, exist_ok=True)
        if self._listened_for:  # whoever is in the queue already is answered, strangers too
            self._switch.start()
        await self._hook.start()
        await self.connection.start()

    async def stop(self) -> None:
        """Close listeners and the connection. Guests go on; their vsock devices too."""
        await self._hook.close()
        await self._starts.stop()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for guest in self._guests:
            await guest.close()
        await self._switch.close()
        await self.connection.stop()

    def list(self) -> Sequence[DomainView]:
        """All domains of ours."""
        return self._guests.views()

    def get(self, key: str) -> DomainView:
        """One domain by UUID or name."""
        return self._guests.find(key).view

    def subscribe(self, changed: Callable[[], None]) -> None:
        """Have `changed()` called in the event loop whenever a view changes."""
        self._guests.subscribe(changed)

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
        return await self._launcher.launch(
            image_name, name=name, memory_mib=memory_mib, timeout_s=timeout_s, progress=progress
        )

    async def adopt(self, key: str, image_name: str) -> DomainView:
        """Bind a domain that somebody else made, by name or UUID, to an image; again to take over a rebuilt image.

        Raises:
            NotFound: no such domain or image.
            Busy: the domain runs.
            DomainRefused, NotSupported: it cannot become a guest of this image.
        """
        return await self._adopter.adopt(key, image_name)

    async def problem(self, key: str) -> str:
        """Why a domain would not attest if it were started as it is defined now; empty if nothing is known against it.

        Raises:
            NotFound: no such domain of ours.
            LibvirtFailed: it cannot be read.
        """
        guest = self._guests.find(key)
        binding = self._bindings.get(guest.view.uuid)
        if binding is None:
            return "it is not bound to an image any more"
        found = await machine.definition(self.connection, guest.view.uuid)
        return await asyncio.to_thread(self._judge.problem, xml.parse(found.text), binding, guest.view.name)

    async def host_problem(self, platform: Platform) -> str:
        """Why libvirt, QEMU and kernel cannot start a guest of a platform; empty if they can.

        Raises:
            LibvirtFailed: libvirt cannot be asked.
        """
        try:
            await self._launcher.can_start(platform)
        except NotSupported as exc:
            return str(exc)
        return ""

    async def stop_domain(self, key: str, *, force: bool) -> None:
        """Shut a guest down and wait for it; `force` switches it off.

        Raises:
            NotFound, LibvirtFailed: nothing to stop. TimedOut: it did not shut down; use `force`.
        """
        guest = self._guests.find(key)
        if guest.view.state not in ACTIVE:
            return
        if force:
            await self._power_off(guest)
        else:
            await machine.shut_down(self.connection, guest.view.name, guest.view.uuid)
        try:
            async with asyncio.timeout(SHUTDOWN_S):
                while guest.view.state in ACTIVE:
                    guest.changed.clear()
                    await guest.changed.wait()
        except TimeoutError as exc:
            raise TimedOut(f"the shutdown of domain {guest.view.name!r}", SHUTDOWN_S) from exc

    async def undefine(self, key: str) -> None:
        """Remove a domain that is off; its image stays."""
        guest = self._guests.find(key)
        if guest.view.state in ACTIVE:
            raise Busy(f"domain {guest.view.name!r}", "it is running; stop it first")
        await machine.undefine(self.connection, guest.view.name, guest.view.uuid)
        await self._forget(guest)
        self._guests.notify()

    async def _power_off(self, guest: Guest) -> None:
        await machine.power_off(self.connection, guest.view.name, guest.view.uuid)

    # What others tell us

    def on_attested(self, domain_uuid: str) -> None:
        """The broker accepted a guest's report."""
        self._guests.advance(domain_uuid, DomainState.ATTESTED)

    def on_released(self, domain_uuid: str) -> None:
        """The broker gave a guest its key."""
        self._guests.advance(domain_uuid, DomainState.RELEASED)

    def on_refused(self, domain_uuid: str, reason: str) -> None:
        """The broker refused; `reason` is its findings in one sentence."""
        guest = self._guests.get(domain_uuid)
        if guest is not None and guest.view.state in ACTIVE - {DomainState.RUNNING, DomainState.UNLOCKED}:
            self._guests.set(guest, DomainState.REFUSED, reason)
            self._spawn(self._settle, guest)

    def _on_word(self, guest: Guest, word: str) -> None:
        if not self._guests.holds(guest):
            return  # it was launched anew: what an earlier machine still says is not about the present one
        state = guest.view.state
        if word == "boot" and guest.view.platform.measured_before:
            return  # it was attested before that, and is never reset in place
        if word == "boot" and state is not DomainState.STARTED:
            self._guests.advance(guest.view.uuid, DomainState.STARTED)  # the guest was reset: it attests again
        elif word == "attested" and self._settings.relayed:
            self._guests.advance(guest.view.uuid, DomainState.ATTESTED)
        elif word == "key" and self._settings.relayed:
            self._guests.advance(guest.view.uuid, DomainState.RELEASED)
        elif word == "unlocked":
            self._guests.advance(guest.view.uuid, DomainState.UNLOCKED)
        elif word == "running":
            self._guests.advance(guest.view.uuid, DomainState.RUNNING)
            if guest.view.state is DomainState.RUNNING:
                guest.mark_running()
        elif word.startswith("fail ") and state in ACTIVE - {DomainState.STARTING}:
            code = word.removeprefix("fail ")
            refused = self._settings.relayed and code in {Code.EVIDENCE_REFUSED, Code.POLICY_DENIED}
            end = DomainState.REFUSED if refused else DomainState.FAILED
            self._guests.set(guest, end, console.sentence(code))
            self._spawn(self._settle, guest)

    def _give_up(self, guest: Guest, reason: str) -> None:
        if guest.view.state in ACTIVE:
            self._guests.set(guest, DomainState.FAILED, reason)
        self._spawn(self._settle, guest)

    def _on_event(self, domain_uuid: str, event: int) -> None:
        guest = self._guests.get(domain_uuid)
        if guest is None:
            return
        if event in {events.STOPPED, events.CRASHED}:
            self._spawn(self._ended, guest)
        elif event == events.STARTED and guest.by_others:
            self._starts.started(guest)
        elif event in {events.DEFINED, events.UNDEFINED, events.STARTED} and guest.view.state not in ACTIVE:
            self._spawn(self._reconcile)

    async def _ended(self, guest: Guest) -> None:
        """The machine seems to be off: look; if so, say so, and close what was open for it."""
        if guest.view.state is DomainState.STARTING:
            return  # an earlier machine of this name; the launch under way looks after itself
        if await machine.is_on(self.connection, guest.view.name, guest.view.uuid) or not self._guests.holds(guest):
            return  # it runs, or was launched anew meanwhile
        if guest.view.state in ACTIVE:
            came_up = guest.view.state is DomainState.RUNNING
            reason = "" if came_up else await asyncio.to_thread(console.diagnose, Path(guest.view.console))
            if not came_up and not reason:
                reason = "the guest stopped before its system ran; see its console log"
            if guest.view.state in ACTIVE:
                self._guests.set(guest, DomainState.STOPPED if came_up else DomainState.FAILED, reason)
        await guest.clear()

    async def _settle(self, guest: Guest) -> None:
        """A refused guest powers itself off; one that does not is switched off."""
        await asyncio.sleep(SETTLE_S)
        if guest.view.state not in ACTIVE and self._guests.holds(guest):
            with contextlib.suppress(JindiskError):
                await machine.end(self.connection, guest)

    # Reading everything anew

    def _on_connected(self) -> None:
        self._spawn(self._begin)

    async def _begin(self) -> None:
        """After connecting: what the hook will need of the host is asked now, since it must not ask libvirt."""
        if any(not binding.platform.simulated for binding in self._bindings.all()):
            with contextlib.suppress(NotSupported):
                self._judge.host = await machine.host(self.connection, "kvm")
        await self._reconcile()

    async def _reconcile(self) -> None:
        """Read all domains: adopt what runs, note what ended, drop what is gone, clear what was left behind."""
        async with self._reading:
            before = [(guest, guest.view) for guest in self._guests]
            found = await self.connection.call(
                "listing domains", lambda conn: inventory.read(conn, lambda uuid: self._bindings.get(uuid) is not None)
            )
            for item in found:
                known = self._guests.get(item.uuid)
                binding = self._bindings.get(item.uuid)
                if binding is None:
                    log.info("a domain claims an image but was not made by us", domain=item.name)
                elif known is None:
                    await self._adopt(item, binding)
                elif item.active and known.must_be_off:
                    await machine.end(self.connection, known)
                elif known.view.state in ACTIVE:
                    await self._recheck(known, item)
                elif item.active and known.view.state in {DomainState.DEFINED, DomainState.STOPPED}:
                    await self._adopt(item, binding)  # started without our hook
                elif not item.active:
                    await self._look_at(known, item, binding)
            there = {item.uuid for item in found}
            for guest, view in before:
                same = self._guests.holds(guest) and guest.view is view
                if same and view.uuid not in there and view.state is not DomainState.STARTING:
                    log.info("a domain is gone", domain=view.name)
                    await self._forget(guest)
            for identity in self._bindings.uuids() - there:
                if self._guests.get(identity) is None:  # its launch ended before libvirt knew of it
                    self._bindings.drop(identity)
            for home in self._settings.vsock_dir.iterdir():
                known = self._guests.get(home.name)
                if known is None or known.view.state not in ACTIVE:
                    log.info("cleared what an ended domain left behind", domain=home.name)
                    vsock.clear(home)
            self.ready.set()
            self._guests.notify()

    async def _recheck(self, guest: Guest, item: inventory.Found) -> None:
        """What we take to run: does it, and did the start by others come to something?"""
        if not item.active and guest.by_others and guest.view.state is DomainState.STARTING:
            if datetime.now(UTC) - guest.view.since > START_OVERDUE:
                await self._starts.abandon(guest)
        elif not item.active:
            await self._ended(guest)
        elif not item.coming_up:
            self._starts.started(guest)

    async def _look_at(self, guest: Guest, item: inventory.Found, binding: Binding) -> None:
        """A domain that is off: say beforehand what would keep it from being started; somebody may have edited it."""
        problem = await asyncio.to_thread(self._judge.problem, item.root, binding, item.name)
        if guest.view.state in {DomainState.DEFINED, DomainState.STOPPED} and self._guests.holds(guest):
            self._guests.amend(guest, name=item.name, reason=problem)

    async def _adopt(self, item: inventory.Found, binding: Binding) -> None:
        """Take over a domain that an earlier process of this service made or adopted."""
        record = vsock.read_record(self._settings.vsock_dir / item.uuid) if item.active else None
        state, reason = (DomainState.RUNNING, "") if item.active else (DomainState.DEFINED, "")
        if item.active and record is None:
            reason = "its vsock device is not known to this service; it cannot attest again"
        interrupted = record is not None and not record.running
        if interrupted:
            state, reason = DomainState.FAILED, UNFINISHED
        cid = (record.cid or xml.kernel_cid(item.root) or 0) if record and not interrupted else 0
        view = replace(self._guests.off(item.uuid, item.name, binding), state=state, reason=reason, cid=cid)
        guest = self._guests.add(view)
        log.info("found a domain", domain=item.name, state=state.value, simulated=view.simulated)
        try:
            if interrupted:
                await machine.end(self.connection, guest)
                await guest.clear()
            elif record is not None:
                await guest.listen(self._open_broker, lambda word: self._on_word(guest, word))
                if cid and not record.cid:
                    guest.attach(self._switch, cid)
                if item.boot is not None:
                    await guest.start_firmware(item.boot, self._settings.simulated_root)
            elif not item.active:
                await self._look_at(guest, item, binding)
        except (JindiskError, OSError) as exc:
            log.warning("a running domain was found but is not served", domain=item.name, problem=str(exc))

    async def _forget(self, guest: Guest) -> None:
        # Cleared first: one that is cancelled in the middle is still in the table, and `stop` closes it.
        await guest.clear()
        if self._guests.holds(guest):
            self._guests.remove(guest)
            self._bindings.drop(guest.view.uuid)

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
