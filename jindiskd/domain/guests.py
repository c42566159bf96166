"""The domains of ours in one table: who holds which name, image and context id, and who is told when a state changes.

Used in the event loop alone. It calls nothing: neither libvirt nor files.
"""

from __future__ import annotations

import contextlib
import shutil
import uuid as uuid_module
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import structlog

from jindiskd.base.platform import Platform
from jindiskd.base.process import ENVIRONMENT
from jindiskd.domain import switch, vsock
from jindiskd.domain.binding import Binding
from jindiskd.domain.guest import Guest
from jindiskd.domain.state import ACTIVE, NEXT, DomainState, DomainView
from jindiskd.errors import Busy, NotFound, NotSupported

log = structlog.get_logger(__name__)
FIRST_CID = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainSettings:
    """What the host decides."""

    runtime_dir: Path
    console_dir: Path
    simulated_root: Path | None
    """Directory of the simulated platform's root; None where simulation is off."""
    vhost_device_vsock: Path
    """The program that stands in for the kernel's vhost-vsock."""
    kernel_vsock: bool = False
    """Whether new definitions get their vsock device from the kernel."""
    memory_mib: int = 1024
    launch_timeout_s: int = 300
    relayed: bool = False
    """Whether another's broker decides, of which the host sees nothing: how far a guest is, it says itself."""
    bindings_dir: Path | None = None
    """Where it is recorded which domain is of which image; `domains` beside `console_dir` if None."""

    @property
    def vsock_dir(self) -> Path:
        """Holds a directory for each domain that is on."""
        return self.runtime_dir / "vsock"

    @property
    def bindings(self) -> Path:
        """Where the bindings are."""
        return self.bindings_dir or self.console_dir.parent / "domains"

    def device_socket(self, uuid: str) -> Path | None:
        """The vhost-user socket of a domain that is to be defined; None where the kernel has the device."""
        return None if self.kernel_vsock else vsock.device_path(self.vsock_dir / uuid)

    def device_program(self, root: ET.Element) -> Path | None:
        """The program to start for a definition; None where it asks libvirt for the kernel's device.

        Raises:
            NotSupported: it asks for the kernel's, and the kernel has none; or there is no such program.
        """
        problem = switch.why_not()
        if root.find("devices/vsock") is not None:
            if problem:
                what = f"the kernel's vsock device, which the definition asks for, ({problem})"
                raise NotSupported(what, switch.REMEDY)
            return None
        if shutil.which(self.vhost_device_vsock, path=ENVIRONMENT["PATH"]) is None:
            remedy = "install the program, or load the module vhost_vsock and adopt or launch the domain anew"
            if not problem:  # it was made for another kernel, or by another setting
                remedy = "install the program, or adopt or launch the domain anew: the kernel has vhost-vsock now"
            raise NotSupported(f"a vsock device by {self.vhost_device_vsock}, which is not installed,", remedy)
        return self.vhost_device_vsock

    def console(self, uuid: str) -> Path:
        """Where a domain's console log is."""
        return self.console_dir / f"{uuid}.log"


class Guests:
    """The table."""

    def __init__(self, settings: DomainSettings) -> None:
        """Nobody is in it yet."""
        self._settings = settings
        self._guests: dict[str, Guest] = {}
        self._subscribers: list[Callable[[], None]] = []
        self._held: dict[str, str] = {}

    def __iter__(self) -> Iterator[Guest]:
        return iter(tuple(self._guests.values()))

    def views(self) -> Sequence[DomainView]:
        """All of them, to be shown."""
        return [guest.view for guest in self]

    def get(self, uuid: str) -> Guest | None:
        """One by its UUID; None where there is none."""
        return self._guests.get(uuid)

    def named(self, name: str) -> Guest | None:
        """One by its name; None where there is none."""
        return next((guest for guest in self if guest.view.name == name), None)

    def find(self, key: str) -> Guest:
        """One by UUID or name.

        Raises:
            NotFound: there is none.
        """
        found = self.get(key) or self.named(key)
        if found is None:
            raise NotFound("domain", key)
        return found

    def holds(self, guest: Guest) -> bool:
        """Whether it is still the one of its UUID: another takes its place when the domain is launched anew."""
        return self._guests.get(guest.view.uuid) is guest

    def claim(self, name: str, *, image: str, image_id: str, platform: Platform, uuid: str = "") -> Guest:
        """A new guest in `starting`, which holds its name, its image and a context id from now on.

        A domain of that name which is off is launched anew: it keeps its UUID. With `uuid`, that decides instead.

        Raises:
            Busy: the name or the image is in use.
        """
        if image_id in self._held:
            raise Busy(f"image {image!r}", self._held[image_id])
        for other in self:
            if other.view.state in ACTIVE:
                if other.view.image_id == image_id:
                    raise Busy(f"image {image!r}", f"domain {other.view.name!r} uses it; stop that first")
                if other.view.name == name:
                    raise Busy(f"domain {name!r}", f"it runs with image {other.view.image!r}; stop it first")
        old = self.named(name)
        identity = uuid or (old.view.uuid if old else str(uuid_module.uuid4()))
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
            console=str(self._settings.console(identity)),
        )
        return self.add(view)

    @contextlib.contextmanager
    def hold(self, image: str, image_id: str, why: str) -> Iterator[None]:
        """Keep any domain from starting from an image, whose files are being read or removed.

        Args:
            image: its name.
            image_id: its identity.
            why: what others are told, with the remedy.

        Raises:
            Busy: a domain runs from it, or it is held already.
        """
        for other in self:
            if other.view.state in ACTIVE and other.view.image_id == image_id:
                raise Busy(f"image {image!r}", f"domain {other.view.name!r} runs from it; stop that first")
        if image_id in self._held:
            raise Busy(f"image {image!r}", self._held[image_id])
        self._held[image_id] = why
        try:
            yield
        finally:
            del self._held[image_id]

    def add(self, view: DomainView) -> Guest:
        """Put one in the table, in the place of another with its UUID."""
        guest = self._guests[view.uuid] = Guest(view, self._settings.vsock_dir / view.uuid)
        self._tell(guest)
        return guest

    def off(self, uuid: str, name: str, binding: Binding) -> DomainView:
        """The view of a bound domain that is off and was not started by us since."""
        return DomainView(
            uuid=uuid,
            name=name,
            image=binding.image,
            image_id=binding.image_id,
            platform=binding.platform,
            state=DomainState.DEFINED,
            reason="",
            since=datetime.now(UTC),
            cid=0,
            console=str(self._settings.console(uuid)),
        )

    def remove(self, guest: Guest) -> None:
        """Take it out, unless another has taken its place; nobody is told yet."""
        if self.holds(guest):
            del self._guests[guest.view.uuid]

    def set(self, guest: Guest, state: DomainState, reason: str = "") -> None:
        """Change its state and tell everybody; a state that may not follow is a fault of ours."""
        old = guest.view.state
        if state not in NEXT[old]:
            raise RuntimeError(f"{old} cannot become {state}")
        on = state in ACTIVE
        guest.view = replace(
            guest.view,
            state=state,
            reason=reason,
            since=datetime.now(UTC),
            cid=guest.view.cid if on else 0,
            halted=guest.view.halted if on else "",
        )
        log.info("domain", domain=guest.view.name, state=state.value, reason=reason, simulated=guest.view.simulated)
        if guest.follower is not None:
            guest.follower(state.value)
        self._tell(guest)

    def amend(self, guest: Guest, *, name: str, reason: str) -> None:
        """Note what somebody changed in the definition of a domain that is off; tells only of what is new."""
        if (guest.view.name, guest.view.reason) != (name, reason):
            guest.view = replace(guest.view, name=name, reason=reason)
            self._tell(guest)

    def wait(self, guest: Guest, approval: int | None) -> None:
        """Note that a guest's release waits for a person; told once, until its state changes.

        Args:
            guest: one that is on.
            approval: its number; 0 where so many wait that it has none, None where the broker that knows is another's.
        """
        if approval is None:
            reason = "its release waits, for its owner's approval perhaps (there: jindiskctl broker approval list)"
        elif approval:
            reason = f"it waits for a person's approval (jindiskctl approval approve {approval})"
        else:
            reason = "it waits for a person's approval (so many wait already: jindiskctl approval list)"
        if guest.view.reason != reason:
            guest.view = replace(guest.view, reason=reason)
            log.info("domain", domain=guest.view.name, waits=reason, simulated=guest.view.simulated)
            if guest.follower is not None:
                guest.follower(f"waiting for approval {approval}" if approval else "waiting for an approval")
            self._tell(guest)

    def halt(self, guest: Guest, why: str) -> None:
        """Note that the processors of a domain stand still, or, with an empty `why`, that they go on."""
        if guest.view.halted != why:
            guest.view = replace(guest.view, halted=why)
            log.info("domain", domain=guest.view.name, halted=why, simulated=guest.view.simulated)
            self._tell(guest)

    def layer(self, guest: Guest, told: str) -> None:
        """Note that a disk of a domain's image goes on in another file, or, with an empty `told`, that none does."""
        if guest.view.layer != told:
            guest.view = replace(guest.view, layer=told)
            log.info("domain", domain=guest.view.name, layer=told, simulated=guest.view.simulated)
            self._tell(guest)

    def advance(self, uuid: str, state: DomainState) -> None:
        """Change a state by what a guest or the broker says; what may not follow is not believed."""
        guest = self.get(uuid)
        if (
            guest is not None
            and state in NEXT[guest.view.state]
            and guest.view.state in ACTIVE - {DomainState.STARTING}
        ):
            self.set(guest, state)

    def subscribe(self, changed: Callable[[], None]) -> None:
        """Have `changed()` called whenever a view changes."""
        self._subscribers.append(changed)

    def notify(self) -> None:
        """Tell the subscribers."""
        for subscriber in self._subscribers:
            subscriber()

    def _tell(self, guest: Guest) -> None:
        guest.changed.set()
        self.notify()

    def _free_cid(self) -> int:
        used = {guest.view.cid for guest in self if guest.view.state in ACTIVE}
        return next(cid for cid in range(FIRST_CID, FIRST_CID + len(used) + 1) if cid not in used)
