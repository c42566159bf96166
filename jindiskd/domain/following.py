"""Following the domains by what others say: the broker's decisions, the guests' words, and the ends of machines."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import structlog

from jindiskd.domain import console, machine
from jindiskd.domain.connection import Connection
from jindiskd.domain.guest import Guest
from jindiskd.domain.guests import DomainSettings, Guests
from jindiskd.domain.state import ACTIVE, DomainState
from jindiskd.domain.tasks import Tasks
from jindiskd.errors import JindiskError
from jindiskd.guest.codes import Code

log = structlog.get_logger(__name__)
SETTLE_S = 3.0


class Follower:
    """Changes the states of domains by what is heard of them; used in the event loop alone."""

    def __init__(self, *, connection: Connection, guests: Guests, settings: DomainSettings, tasks: Tasks) -> None:
        """`tasks` owns what is spawned."""
        self._connection, self._guests, self._settings, self._tasks = connection, guests, settings, tasks

    def on_attested(self, domain_uuid: str) -> None:
        """The broker accepted a guest's report."""
        self._guests.advance(domain_uuid, DomainState.ATTESTED)

    def on_waiting(self, domain_uuid: str, approval: int) -> None:
        """The broker lets a guest wait for a person; said once, until it goes on."""
        guest = self._guests.get(domain_uuid)
        if guest is not None and guest.view.state is DomainState.ATTESTED:
            self._guests.wait(guest, approval)

    def on_released(self, domain_uuid: str) -> None:
        """The broker gave a guest its key."""
        self._guests.advance(domain_uuid, DomainState.RELEASED)

    def on_refused(self, domain_uuid: str, reason: str) -> None:
        """The broker refused; `reason` is its findings in one sentence."""
        guest = self._guests.get(domain_uuid)
        if guest is not None and guest.view.state in ACTIVE - {DomainState.RUNNING, DomainState.UNLOCKED}:
            self._guests.set(guest, DomainState.REFUSED, reason)
            self._tasks.spawn(self._settle, guest)

    def heard(self, guest: Guest, word: str) -> None:
        """A guest said one of the fixed progress words."""
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
                try:
                    guest.mark_running()
                except OSError as exc:
                    log.error("a running guest cannot be recorded", domain=guest.view.name, problem=str(exc))
        elif word.startswith("fail ") and state in ACTIVE - {DomainState.STARTING}:
            code = word.removeprefix("fail ")
            refused = self._settings.relayed and code in {Code.EVIDENCE_REFUSED, Code.POLICY_DENIED}
            end = DomainState.REFUSED if refused else DomainState.FAILED
            self._guests.set(guest, end, console.sentence(code))
            self._tasks.spawn(self._settle, guest)

    def give_up(self, guest: Guest, reason: str) -> None:
        """Fail a guest, and switch it off."""
        if guest.view.state in ACTIVE:
            self._guests.set(guest, DomainState.FAILED, reason)
        self._tasks.spawn(self._settle, guest)

    async def ended(self, guest: Guest) -> None:
        """The machine seems to be off: look; if so, say so, and close what was open for it."""
        if guest.view.state is DomainState.STARTING:
            return  # an earlier machine of this name; the launch under way looks after itself
        if await machine.is_on(self._connection, guest.view.name, guest.view.uuid) or not self._guests.holds(guest):
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
                await machine.end(self._connection, guest)
