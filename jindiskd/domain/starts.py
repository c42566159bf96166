"""Domains that libvirt starts at somebody else's word: `virsh start`, virt-manager, autostart.

The hook tells of each step; nothing here calls libvirt, see `domain.hook`. What was opened for a start that came to
nothing is closed when the hook tells of the release, and by the next look at all domains where no hook tells.
"""

from __future__ import annotations

import asyncio
import contextlib
import xml.etree.ElementTree as ET
from collections.abc import Callable

import structlog

from jindiskd.base.platform import Tee
from jindiskd.domain import xml
from jindiskd.domain.binding import Binding, Bindings
from jindiskd.domain.guest import Guest, OpenBroker
from jindiskd.domain.guests import DomainSettings, Guests
from jindiskd.domain.judge import Judge
from jindiskd.domain.state import DomainState
from jindiskd.domain.switch import Switch
from jindiskd.errors import JindiskError

log = structlog.get_logger(__name__)
NOT_COMPLETED = "libvirt did not complete its start; see libvirt's message"
FIRMWARE_WAIT_S = 1.2


class Starts:
    """Prepares, follows and clears starts by others."""

    def __init__(
        self,
        *,
        guests: Guests,
        bindings: Bindings,
        judge: Judge,
        open_broker: OpenBroker,
        settings: DomainSettings,
        switch: Switch,
        heard: Callable[[Guest, str], None],
        ended: Callable[[Guest], None],
        give_up: Callable[[Guest, str], None],
    ) -> None:
        """
        Args:
            guests, bindings, judge, open_broker, settings, switch: as the service has them.
            heard: is told each progress word of a guest.
            ended: looks at a guest whose machine seems to be off, later and elsewhere.
            give_up: fails a guest and switches it off, later and elsewhere.
        """
        self._guests, self._bindings, self._judge = guests, bindings, judge
        self._open_broker, self._settings, self._heard = open_broker, settings, heard
        self._switch = switch
        self._ended, self._give_up = ended, give_up
        self._firmware: dict[str, asyncio.Task[None]] = {}

    async def answer(self, operation: str, uuid: str, name: str, root: ET.Element) -> str:
        """What the hook is told; see `hook.Answer`."""
        guest = self._guests.get(uuid)
        if operation == "prepare":
            return await self._prepare(uuid, name, root)
        if guest is None or not guest.by_others:
            return ""
        if operation == "start":
            cid = xml.kernel_cid(root)
            if cid is not None:
                guest.attach(self._switch, cid)
            await self._firmware_ready(uuid)
        elif operation == "started":
            self.started(guest)
        elif operation in {"stopped", "release"}:
            await self._released(guest)
        return ""

    def started(self, guest: Guest) -> None:
        """Its machine is there."""
        if guest.by_others and guest.view.state is DomainState.STARTING:
            self._guests.set(guest, DomainState.STARTED)

    async def abandon(self, guest: Guest) -> None:
        """A start came to nothing: say so, and close what was open for it."""
        if guest.view.state is DomainState.STARTING:
            self._guests.set(guest, DomainState.FAILED, NOT_COMPLETED)
        await self._end_firmware(guest.view.uuid)
        await guest.clear()

    async def stop(self) -> None:
        """End what is under way."""
        for uuid in list(self._firmware):
            await self._end_firmware(uuid)

    async def _prepare(self, uuid: str, name: str, root: ET.Element) -> str:
        known = self._guests.get(uuid)
        if known is not None and known.view.state is DomainState.STARTING and not known.by_others:
            return ""  # a launch of ours, which has prepared everything
        binding = self._bindings.get(uuid)
        if binding is None:
            claim = xml.binding_of(root)
            image = claim.image if claim is not None else "IMAGE"
            return f"it claims an image and was never adopted: run 'jindiskctl domain adopt {name} {image}'"
        problem = await asyncio.to_thread(self._judge.problem, root, binding, name)
        if problem:
            return problem
        if binding.platform.tee in {Tee.SEV, Tee.SEV_ES}:
            # Between QEMU's launch and its first instruction no hook runs, and no hook can put a session into it.
            command = f"jindiskctl launch {binding.image} --name {name}"
            return f"a SEV guest is measured before it runs, which 'virsh start' leaves no room for: run '{command}'"
        return await self._open(uuid, name, binding, root)

    async def _open(self, uuid: str, name: str, binding: Binding, root: ET.Element) -> str:
        old = self._guests.get(uuid)
        guest = self._guests.claim(
            name, image=binding.image, image_id=binding.image_id, platform=binding.platform, uuid=uuid
        )
        guest.by_others = True
        try:
            if old is not None:
                await old.retire()
            await guest.start_device(self._settings.device_program(root))
            await guest.listen(self._open_broker, lambda word: self._heard(guest, word))
        except BaseException as exc:
            await asyncio.shield(self.abandon(guest))
            if isinstance(exc, OSError):
                return f"its vsock device cannot be made ({exc.strerror or exc})"
            raise
        boot = xml.boot_inputs(root)

        async def firmware() -> None:
            try:
                await guest.start_firmware(boot, self._settings.simulated_root)
            except JindiskError as exc:
                self._give_up(guest, str(exc))

        if guest.view.simulated:
            self._firmware[uuid] = asyncio.get_running_loop().create_task(firmware())
        log.info("prepared a start by others", domain=name, image=binding.image, simulated=guest.view.simulated)
        return ""

    async def _firmware_ready(self, uuid: str) -> None:
        """Wait a little for the simulated firmware; a guest takes longer to ask for it than it takes to come up."""
        task = self._firmware.get(uuid)
        if task is not None:
            await asyncio.wait({task}, timeout=FIRMWARE_WAIT_S)

    async def _released(self, guest: Guest) -> None:
        if guest.view.state is DomainState.STARTING:
            await self.abandon(guest)
        else:
            self._ended(guest)

    async def _end_firmware(self, uuid: str) -> None:
        task = self._firmware.pop(uuid, None)
        if task is not None:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
