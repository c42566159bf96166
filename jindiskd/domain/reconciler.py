"""Reading all domains anew, after connecting and whenever something may have changed: libvirt is right."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import chain, repeat

import structlog

from jindiskd.domain import inventory, layers, machine, vsock, xml
from jindiskd.domain.binding import Binding, Bindings
from jindiskd.domain.connection import Connection
from jindiskd.domain.following import Follower
from jindiskd.domain.guest import Guest, OpenBroker
from jindiskd.domain.guests import DomainSettings, Guests
from jindiskd.domain.judge import Judge
from jindiskd.domain.starts import Starts
from jindiskd.domain.state import ACTIVE, DomainState
from jindiskd.domain.switch import Switch
from jindiskd.errors import JindiskError, NotSupported

log = structlog.get_logger(__name__)
LOOK_AGAIN_S = (1.0, 4.0, 10.0, 20.0)
"""Pauses between looks at all domains, after connecting; the last is repeated.

A libvirtd that has just started lists as running what ran when it ended, and says nothing when it finds that one of
them is gone; and some changes of definitions, `virsh metadata` and what `--config` does among them, it tells nobody of.
"""
START_OVERDUE = timedelta(seconds=60)
"""By when a start by others has come to something, whatever became of the hook."""
UNFINISHED = "the service ended while the domain was starting; launch it again"


class Reconciler:
    """Makes the table of domains what libvirt says; one reading at a time."""

    def __init__(
        self,
        *,
        connection: Connection,
        guests: Guests,
        bindings: Bindings,
        judge: Judge,
        starts: Starts,
        follower: Follower,
        open_broker: OpenBroker,
        settings: DomainSettings,
        switch: Switch,
    ) -> None:
        """Read nothing yet."""
        self._connection, self._guests, self._bindings, self._judge = connection, guests, bindings, judge
        self._starts, self._follower, self._open_broker, self._settings = starts, follower, open_broker, settings
        self._switch = switch
        self._reading = asyncio.Lock()
        self._connections = 0
        self._strangers: set[str] = set()  # told of once
        self.ready = asyncio.Event()
        """Set once the domains have been read for the first time."""

    async def begin(self) -> None:
        """After connecting: what the hook will need of the host is asked now, since it must not ask libvirt."""
        if any(not binding.platform.simulated for binding in self._bindings.all()):
            with contextlib.suppress(NotSupported):
                self._judge.host = await machine.host(self._connection, "kvm")
        self._connections += 1
        mine = self._connections
        await self.reconcile()
        for pause in chain(LOOK_AGAIN_S, repeat(LOOK_AGAIN_S[-1])):
            await asyncio.sleep(pause)
            if self._connections != mine or not self._connection.connected:
                return  # the next connection has looks of its own
            try:
                await self.reconcile()
            except JindiskError as exc:  # the next look may tell
                log.debug("the domains could not be looked at", problem=str(exc))

    async def reconcile(self) -> None:
        """Read all domains: adopt what runs, note what ended, drop what is gone, clear what was left behind."""
        async with self._reading:
            before = [(guest, guest.view) for guest in self._guests]
            found, unread = await self._connection.call(
                "listing domains", lambda conn: inventory.read(conn, lambda uuid: self._bindings.get(uuid) is not None)
            )
            for item in found:
                known = self._guests.get(item.uuid)
                # What runs on another machine is shown as its metadata claims; nothing is done by that.
                binding = self._bindings.get(item.uuid) or (item.claim if self._connection.remote else None)
                if binding is None:
                    self._tell_of_stranger(item)
                elif known is None:
                    await self._adopt(item, binding)
                elif item.active and known.must_be_off:
                    await machine.end(self._connection, known)
                elif known.view.state in ACTIVE:
                    await self._recheck(known, item)
                elif item.active and not known.home.exists():
                    await self._adopt(item, binding)  # its last machine is gone: this one was started without our hook
                elif not item.active:
                    await self._look_at(known, item, binding)
            self._note_layers(found)
            there = unread.union(item.uuid for item in found)
            self._strangers &= there
            for guest, view in before:
                same = self._guests.holds(guest) and guest.view is view
                if same and view.uuid not in there and view.state is not DomainState.STARTING:
                    log.info("a domain is gone", domain=view.name)
                    await self.forget(guest)
            for identity in self._bindings.uuids() - there:
                if self._guests.get(identity) is None:  # its launch ended before libvirt knew of it
                    self._bindings.drop(identity)
            for home in self._settings.vsock_dir.iterdir():
                known = self._guests.get(home.name)
                if home.name not in unread and (known is None or known.view.state not in ACTIVE):
                    log.info("cleared what an ended domain left behind", domain=home.name)
                    vsock.clear(home)
            self.ready.set()
            self._guests.notify()

    def _note_layers(self, found: Iterable[inventory.Found]) -> None:
        for item in found:
            guest = self._guests.get(item.uuid)
            if guest is not None and not item.coming_up:
                self._guests.layer(guest, layers.told(item.root, item.name))

    def _tell_of_stranger(self, item: inventory.Found) -> None:
        if item.uuid not in self._strangers:
            log.info("a domain claims an image but was not made by us", domain=item.name)
            self._strangers.add(item.uuid)

    async def _recheck(self, guest: Guest, item: inventory.Found) -> None:
        """What we take to run: does it, and did the start by others come to something?"""
        if not item.active and guest.by_others and guest.view.state is DomainState.STARTING:
            if datetime.now(UTC) - guest.view.since > START_OVERDUE:
                await self._starts.abandon(guest)
        elif not item.active:
            await self._follower.ended(guest)
        elif not item.coming_up:
            self._starts.started(guest)
            if guest.view.state is not DomainState.STARTING:  # a launch of ours halts its machine itself
                self._guests.halt(guest, item.halted)

    async def _look_at(self, guest: Guest, item: inventory.Found, binding: Binding) -> None:
        """A domain that is off: say beforehand what would keep it from being started; somebody may have edited it."""
        if self._connection.remote:
            return  # its files are there
        problem = await asyncio.to_thread(self._judge.problem, item.root, binding, item.name)
        if guest.view.state not in ACTIVE and self._guests.holds(guest):
            told = guest.view.state in {DomainState.REFUSED, DomainState.FAILED}  # how its last start ended
            self._guests.amend(guest, name=item.name, reason=guest.view.reason if told else problem)

    async def _adopt(self, item: inventory.Found, binding: Binding) -> None:
        """Take over a domain that an earlier process of this service made or adopted."""
        record = vsock.read_record(self._settings.vsock_dir / item.uuid) if item.active else None
        state, reason = (DomainState.RUNNING, "") if item.active else (DomainState.DEFINED, "")
        if item.active and record is None and self._connection.remote:
            reason = "it runs on another machine, whose service knows more of it"
        elif item.active and record is None:
            reason = "its vsock device is not known to this service; it cannot attest again"
        interrupted = record is not None and not record.running
        if interrupted:
            state, reason = DomainState.FAILED, UNFINISHED
        cid = (record.cid or xml.kernel_cid(item.root) or 0) if record and not interrupted else 0
        off = self._guests.off(item.uuid, item.name, binding)
        halted = item.halted if state in ACTIVE else ""
        view = replace(off, state=state, reason=reason, cid=cid, halted=halted)
        guest = self._guests.add(view)
        log.info("found a domain", domain=item.name, state=state.value, simulated=view.simulated)
        try:
            if interrupted:
                await machine.end(self._connection, guest)
                await guest.clear()
            elif record is not None:
                await guest.listen(self._open_broker, lambda word: self._follower.heard(guest, word))
                if cid and not record.cid:
                    guest.attach(self._switch, cid)
                if item.boot is not None:
                    await guest.start_firmware(item.boot, self._settings.simulated_root)
            elif not item.active:
                await self._look_at(guest, item, binding)
        except (JindiskError, OSError) as exc:
            log.warning("a running domain was found but is not served", domain=item.name, problem=str(exc))

    async def forget(self, guest: Guest) -> None:
        """Take a domain that is gone out of the table, with its record and what was open for it."""
        # Cleared first: one that is cancelled in the middle is still in the table, and `stop` closes it.
        await guest.clear()
        if self._guests.holds(guest):
            self._guests.remove(guest)
            self._bindings.drop(guest.view.uuid)
