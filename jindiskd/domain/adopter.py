"""Taking a domain that somebody else made into our records: definition, binding and view, or none of them."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import replace

import structlog

from jindiskd.domain import adoption, machine
from jindiskd.domain.binding import Bindings
from jindiskd.domain.connection import Connection
from jindiskd.domain.guest import Guest
from jindiskd.domain.guests import DomainSettings, Guests
from jindiskd.domain.launch import Launcher, compare
from jindiskd.domain.spec import from_manifest
from jindiskd.domain.state import ACTIVE, DomainView
from jindiskd.errors import Busy, JindiskError, NotSupported
from jindiskd.image.store import ImageStore

log = structlog.get_logger(__name__)


class Adopter:
    """Adopts domains; one adoption is one call of `adopt`."""

    def __init__(
        self,
        *,
        connection: Connection,
        images: ImageStore,
        guests: Guests,
        bindings: Bindings,
        settings: DomainSettings,
        launcher: Launcher,
    ) -> None:
        """`launcher` tells what this host can start."""
        self._connection, self._images, self._guests, self._bindings = connection, images, guests, bindings
        self._settings, self._launcher = settings, launcher

    async def adopt(self, key: str, image_name: str) -> DomainView:
        """Bind a domain, by name or UUID, to an image; see `DomainService.adopt`."""
        self._connection.require_local("adopting a domain")
        stored = await asyncio.to_thread(self._images.get, image_name)
        found = await machine.definition(self._connection, key)
        known = self._guests.get(found.uuid)
        if found.active or (known is not None and known.view.state in ACTIVE):
            raise Busy(f"domain {found.name!r}", "it is running; stop it first")
        if found.saved:
            remedy = f"its machine is saved: start and stop it, or drop that by 'virsh managedsave-remove {found.name}'"
            raise Busy(f"domain {found.name!r}", remedy)
        await self._launcher.can_start(stored.manifest.platform)
        spec = from_manifest(
            stored.manifest,
            stored.path,
            name=found.name,
            uuid=found.uuid,
            memory_mib=self._settings.memory_mib,
            console_log=self._settings.console(found.uuid),
            vsock=self._settings.device_socket(found.uuid),
        )
        text = adoption.adopt(found.text, spec)
        before = self._bindings.get(found.uuid)
        binding = replace(spec.binding, adopted=before.adopted if before else True)
        self._bindings.put(found.uuid, binding)  # first: a binding without metadata starts nothing
        try:
            compare(found.name, text, await machine.define(self._connection, found.name, text))
        except BaseException:
            if before is None:
                self._bindings.drop(found.uuid)
            else:
                self._bindings.put(found.uuid, before)
            with contextlib.suppress(JindiskError):
                await asyncio.shield(machine.define(self._connection, found.name, found.text))
            raise
        if known is not None:
            await known.retire()
        log.info("adopted a domain", domain=found.name, image=image_name, simulated=binding.platform.simulated)
        return self._guests.add(self._guests.off(found.uuid, found.name, binding)).view

    async def release(self, guest: Guest) -> None:
        """Let go of a domain that was adopted; see `DomainService.release`."""
        view, binding = guest.view, self._bindings.get(guest.view.uuid)
        if binding is None or not binding.adopted:
            text = "it was made here, and is nothing without its image: remove it by 'jindiskctl domain undefine'"
            raise NotSupported(f"releasing domain {view.name!r}", text)
        found = await machine.definition(self._connection, view.uuid)
        if found.active or view.state in ACTIVE:
            raise Busy(f"domain {view.name!r}", "it is running; stop it first")
        await machine.define(self._connection, found.name, adoption.release(found.text))
        await guest.retire()
        # Last: while the record is there, the domain is shown, and can be released again.
        self._bindings.drop(view.uuid)
        self._guests.remove(guest)
        self._guests.notify()
        log.info("released a domain", domain=found.name, image=binding.image)
