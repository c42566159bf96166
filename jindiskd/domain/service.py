"""The domains of our images: launching them, following them, and telling the truth about them.

What libvirt says is re-read at start and after each reconnect; an event is only a reason to look. Everything here runs
in the event loop; libvirt is called in a thread of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable, Sequence

import structlog

from jindiskd.base.platform import Platform
from jindiskd.broker.sev import SevSide
from jindiskd.domain import connection as events
from jindiskd.domain import layers, machine, xml
from jindiskd.domain.adopter import Adopter
from jindiskd.domain.binding import Bindings
from jindiskd.domain.connection import Connection, LibvirtFailed
from jindiskd.domain.console_stream import ConsoleStream, attach
from jindiskd.domain.following import Follower
from jindiskd.domain.guest import Closing, Guest, OpenBroker
from jindiskd.domain.guests import DomainSettings, Guests
from jindiskd.domain.hook import HookListener
from jindiskd.domain.judge import Judge, KeyProblem
from jindiskd.domain.launch import Launcher
from jindiskd.domain.reconciler import Reconciler
from jindiskd.domain.security import host_data_of
from jindiskd.domain.starts import Starts
from jindiskd.domain.state import ACTIVE, DomainView
from jindiskd.domain.switch import Switch, listening_sockets
from jindiskd.domain.tasks import Tasks
from jindiskd.errors import Busy, NotSupported, ServiceUnavailable, TimedOut
from jindiskd.image.store import ImageStore

__all__ = ["Closing", "DomainService", "DomainSettings", "OpenBroker"]

log = structlog.get_logger(__name__)
HOOK_SOCKET = "hook.sock"
"""Below the runtime directory; the hook looks for it in /run/jindiskd."""
HALTS = frozenset({events.SUSPENDED, events.RESUMED, events.SLEEPING, events.CRASHED})
SHUTDOWN_S = 90.0
"""Until a guest that is asked to shut down must be off, unless the caller says otherwise."""
PRESS_S = 10.0
"""Between two presses of the power button: a system that is booting does not notice one."""


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
        sev: SevSide | None = None,
        key_here: Callable[[str], bool] = lambda _image_id: True,
        sockets: Sequence[socket.socket] = (),
    ) -> None:
        """Nothing is connected or opened before `start`. `key_problem` tells why a key would not be released,
        `key_here` whether the broker that guests reach can have it at all; `sev` judges platforms that are measured
        before they run; `sockets` are those that guests come to already.
        """
        self._open_broker, self._settings = open_broker, settings
        self._bindings = Bindings(settings.bindings)
        self._guests = Guests(settings)
        self._tasks = Tasks()
        self._consoles: set[ConsoleStream] = set()
        self.connection = Connection(uri, on_event=self._on_event, on_connected=self._on_connected)
        self._switch = Switch(lambda: listening_sockets(sockets))
        self._listened_for = any(sock.family == socket.AF_VSOCK for sock in sockets)
        self._judge = Judge(images, key_problem=key_problem, simulation=settings.simulated_root is not None)
        self._follower = Follower(
            connection=self.connection, guests=self._guests, settings=settings, tasks=self._tasks
        )
        self._starts = Starts(
            guests=self._guests,
            bindings=self._bindings,
            judge=self._judge,
            open_broker=open_broker,
            settings=settings,
            switch=self._switch,
            heard=self._follower.heard,
            ended=lambda guest: self._tasks.spawn(self._follower.ended, guest),
            give_up=self._follower.give_up,
        )
        self._reconciler = Reconciler(
            connection=self.connection,
            guests=self._guests,
            bindings=self._bindings,
            judge=self._judge,
            starts=self._starts,
            follower=self._follower,
            open_broker=open_broker,
            settings=settings,
            switch=self._switch,
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
            heard=self._follower.heard,
            key_here=key_here,
        )
        self._adopter = Adopter(
            connection=self.connection,
            images=images,
            guests=self._guests,
            bindings=self._bindings,
            settings=settings,
            launcher=self._launcher,
        )

    @property
    def ready(self) -> asyncio.Event:
        """Set once the domains have been read for the first time."""
        return self._reconciler.ready

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
        await self._tasks.stop()
        for console in list(self._consoles):
            await asyncio.to_thread(console.close)
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

    def hold(self, image: str, image_id: str, why: str) -> contextlib.AbstractContextManager[None]:
        """Keep any domain from starting from an image while its files are read or removed; see `Guests.hold`."""
        return self._guests.hold(image, image_id, why)

    async def refuse_users(self, image: str, image_id: str, files: frozenset[str]) -> None:
        """Refuse to have an image's disks, `files` by path, read or removed while others use them, or while what its
        guest wrote is in other files on top of them. Where libvirt is not connected, what was seen last counts.

        Raises:
            Busy: with the domain, and what to do. LibvirtFailed: it cannot be told.
        """

        def ours(uuid: str) -> bool:
            binding = self._bindings.get(uuid)
            return binding is not None and binding.image_id == image_id

        if self.connection.remote:
            return  # its domains have no files of this machine's
        if self.connection.connected:
            await self.connection.call(
                f"looking for users of image {image!r}", lambda conn: layers.refuse_users(conn, image, files, ours)
            )
            return
        for view in self._guests.views():
            if view.image_id == image_id and view.layer:
                raise Busy(f"image {image!r}", f"of domain {view.name!r}, {view.layer}")

    async def launch(
        self,
        image_name: str,
        *,
        name: str = "",
        memory_mib: int | None = None,
        timeout_s: int | None = None,
        progress: Callable[[str], None] = lambda _stage: None,
        host_data: bytes = b"",
    ) -> DomainView:
        """Define and start a domain for an image and follow it until its system runs.

        Args:
            image_name: an image in the store.
            name: the domain's name; the image's by default.
            memory_mib: memory; as configured by default.
            timeout_s: from here to the running system; as configured by default.
            progress: called with each state's name as it is reached.
            host_data: what the guest's evidence shall show as the host's: 32 bytes for SNP, 48 for TDX.

        Raises:
            InvalidArgument, NotFound, Busy, NotSupported, LibvirtFailed: before anything was started.
            LaunchRefused, LaunchFailed, TimedOut: the guest is off again and nothing is left open.
        """
        return await self._launcher.launch(
            image_name,
            name=name,
            memory_mib=memory_mib,
            timeout_s=timeout_s,
            progress=progress,
            host_data=host_data,
        )

    async def adopt(self, key: str, image_name: str) -> DomainView:
        """Bind a domain that somebody else made, by name or UUID, to an image; again to take over a rebuilt image.

        Raises:
            NotFound: no such domain or image.
            Busy: the domain runs.
            DomainRefused, NotSupported: it cannot become a guest of this image.
        """
        return await self._adopter.adopt(key, image_name)

    async def release(self, key: str) -> None:
        """Let go of an adopted domain that is off: our metadata, our record and the vsock device go, the domain stays.

        Raises:
            NotFound: no such domain of ours. Busy: it runs. NotSupported: it was made here.
        """
        await self._adopter.release(self._guests.find(key))

    async def start_domain(
        self, key: str, *, timeout_s: int | None = None, progress: Callable[[str], None] = lambda _stage: None
    ) -> DomainView:
        """Start a domain of ours that is off, as it is defined, and follow it until its system runs.

        Raises:
            NotFound: no such domain of ours. Busy: it runs.
            LaunchRefused, LaunchFailed, JindiskError: as of `launch`.
        """
        view = self._guests.find(key).view
        if view.state in ACTIVE:
            raise Busy(f"domain {view.name!r}", "it is running already")
        found = await machine.definition(self.connection, view.uuid)
        root, binding = xml.parse(found.text), self._bindings.get(view.uuid)
        return await self._launcher.launch(
            view.image,
            name=view.name,
            memory_mib=xml.memory_mib(root),
            timeout_s=timeout_s,
            progress=progress,
            host_data=b"" if binding is not None and binding.adopted else host_data_of(root),
        )

    async def definition(self, key: str) -> str:
        """A domain's XML as libvirt keeps it, without secrets; raises `NotFound`."""
        view = self._guests.find(key).view
        return await machine.public_definition(self.connection, view.name, view.uuid)

    async def plan(
        self, image_name: str, *, name: str = "", memory_mib: int | None = None, host_data: bytes = b""
    ) -> str:
        """The XML that a launch would define; nothing is made.

        Raises:
            NotFound, DomainRefused, InvalidArgument, NotSupported: there is none.
        """
        memory = memory_mib or self._settings.memory_mib
        return await self._launcher.plan(image_name, name or image_name, memory, host_data)

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

    async def guest_policy(self, key: str) -> int | None:
        """The guest policy in a domain's definition; None where it has none.

        Raises:
            NotFound: no such domain of ours.
            LibvirtFailed, MalformedDomain: it cannot be read.
        """
        found = await machine.definition(self.connection, self._guests.find(key).view.uuid)
        try:
            return xml.stated(xml.parse(found.text)).policy
        except ValueError as exc:
            raise xml.MalformedDomain(f"its launch security cannot be read: {exc}") from exc

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

    async def stop_domain(self, key: str, *, force: bool, timeout_s: int | None = None) -> None:
        """Shut a guest down and wait for it; `force` switches it off.

        Its power button is pressed every `PRESS_S` until it is off, for `timeout_s` or `SHUTDOWN_S`.

        Raises:
            NotFound, LibvirtFailed: nothing to stop. TimedOut: it did not shut down; use `force`.
        """
        guest = self._guests.find(key)
        if guest.view.state not in ACTIVE:
            return
        view, within_s = guest.view, timeout_s or SHUTDOWN_S
        if force:
            await self._power_off(guest)
        else:
            await machine.shut_down(self.connection, view.name, view.uuid)
        try:
            async with asyncio.timeout(within_s):
                while guest.view.state in ACTIVE:
                    try:
                        await asyncio.wait_for(self._off(guest), PRESS_S)
                    except TimeoutError:
                        if not force:
                            # Off in this moment, or libvirt away for another: the next look tells.
                            with contextlib.suppress(LibvirtFailed, ServiceUnavailable):
                                await machine.shut_down(self.connection, view.name, view.uuid)
        except TimeoutError as exc:
            raise TimedOut(f"the shutdown of domain {view.name!r}", within_s) from exc

    @staticmethod
    async def _off(guest: Guest) -> None:
        """Wait until a guest is off."""
        while guest.view.state in ACTIVE:
            guest.changed.clear()
            await guest.changed.wait()

    async def attach_console(self, key: str, *, force: bool) -> int:
        """A socket that is a guest's console, both ways, and the caller's to close.

        It ends with the machine, with this service, and when `force` takes the console for somebody else.

        Raises:
            NotFound: no such domain of ours. Busy: somebody else has it. LibvirtFailed: the machine is off.
        """
        view = self._guests.find(key).view
        made, theirs = await attach(
            self.connection, view.name, view.uuid, force=force, ended=self._consoles.discard
        )
        self._consoles.add(made)
        if made.closed:  # in its thread, before this one knew of it
            self._consoles.discard(made)
        return theirs.detach()

    async def undefine(self, key: str) -> None:
        """Remove a domain that is off; its image stays."""
        guest = self._guests.find(key)
        if guest.view.state in ACTIVE:
            raise Busy(f"domain {guest.view.name!r}", "it is running; stop it first")
        await machine.undefine(self.connection, guest.view.name, guest.view.uuid)
        await self._reconciler.forget(guest)
        self._guests.notify()

    async def _power_off(self, guest: Guest) -> None:
        await machine.power_off(self.connection, guest.view.name, guest.view.uuid)

    # What others tell us

    def on_attested(self, domain_uuid: str) -> None:
        """The broker accepted a guest's report."""
        self._follower.on_attested(domain_uuid)

    def on_waiting(self, domain_uuid: str, approval: int) -> None:
        """The broker lets a guest wait until a person approves this; 0 for an approval without a number."""
        self._follower.on_waiting(domain_uuid, approval)

    def on_released(self, domain_uuid: str) -> None:
        """The broker gave a guest its key."""
        self._follower.on_released(domain_uuid)

    def on_refused(self, domain_uuid: str, reason: str) -> None:
        """The broker refused; `reason` is its findings in one sentence."""
        self._follower.on_refused(domain_uuid, reason)

    def _on_connected(self) -> None:
        self._tasks.spawn(self._reconciler.begin)

    def _on_event(self, domain_uuid: str, event: int) -> None:
        guest = self._guests.get(domain_uuid)
        if guest is None:
            return
        if event in {events.STOPPED, events.CRASHED}:
            self._tasks.spawn(self._ended, guest)
        elif event == events.STARTED and guest.by_others:
            self._starts.started(guest)
        elif event in HALTS or guest.view.state not in ACTIVE:
            self._tasks.spawn(self._reconciler.reconcile)

    async def _ended(self, guest: Guest) -> None:
        """A machine seems to be off. What was changed or removed while it was on counts from now on."""
        await self._follower.ended(guest)
        await self._reconciler.reconcile()
