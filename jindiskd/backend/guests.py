"""The domains for the bus, and the way of each to its owner's broker where that is another's."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path

from jindiskd.broker.relay import Relay, RelayView
from jindiskd.bus.manager import MEBIBYTE
from jindiskd.bus.ports import GuestView, LaunchOrder
from jindiskd.domain.console import open_log
from jindiskd.domain.service import DomainService
from jindiskd.domain.state import DomainView
from jindiskd.jobs.job import Job


class GuestsBackend:
    """The domains, and the way of each to its owner's broker where that is another's."""

    def __init__(self, service: DomainService, relay: Relay | None = None) -> None:
        self._service, self._relay = service, relay

    @property
    def connected(self) -> bool:
        """Whether libvirt is connected."""
        return self._service.connection.connected

    def views(self) -> Sequence[GuestView]:
        """All domains of ours."""
        return [self._guest(view) for view in self._service.list()]

    def _guest(self, view: DomainView) -> GuestView:
        way = self._relay.view(view.uuid) if self._relay is not None else None
        return _guest(view, way)

    def subscribe(self, changed: Callable[[], None]) -> None:
        """Have `changed()` called when a domain appears, changes or goes, and when libvirt comes."""
        self._service.subscribe(changed)
        if self._relay is not None:
            self._relay.changed = changed

    async def launch(self, order: LaunchOrder, job: Job) -> str:
        """Start one and follow it until it runs."""
        memory = order.memory_bytes
        view = await self._service.launch(
            order.image,
            name=order.name,
            memory_mib=memory // MEBIBYTE if memory else None,
            timeout_s=order.timeout_s,
            progress=job.progress,
            host_data=order.host_data,
        )
        said = ", attested by simulated firmware, which proves nothing" if view.simulated else ""
        job.log(f"domain {view.name} ({view.uuid}) runs from its encrypted root{said}")
        return view.uuid

    async def adopt(self, domain: str, image: str) -> str:
        """Bind a domain that somebody else made to an image."""
        return (await self._service.adopt(domain, image)).uuid

    async def start(self, uuid: str, timeout_s: int | None, job: Job) -> str:
        """Start one that is off, as it is defined, and follow it until it runs."""
        return (await self._service.start_domain(uuid, timeout_s=timeout_s, progress=job.progress)).uuid

    async def release(self, uuid: str) -> None:
        """Let go of one that was adopted."""
        await self._service.release(uuid)

    async def definition(self, uuid: str) -> str:
        """Its XML as libvirt keeps it, without secrets."""
        return await self._service.definition(uuid)

    async def plan(self, order: LaunchOrder) -> str:
        """The XML that a launch would define."""
        memory = order.memory_bytes
        return await self._service.plan(
            order.image,
            name=order.name,
            memory_mib=memory // MEBIBYTE if memory else None,
            host_data=order.host_data,
        )

    async def stop(self, uuid: str, *, force: bool, timeout_s: int | None) -> None:
        """End one."""
        await self._service.stop_domain(uuid, force=force, timeout_s=timeout_s)

    async def undefine(self, uuid: str) -> None:
        """Remove one that is off."""
        await self._service.undefine(uuid)

    async def open_console(self, uuid: str) -> int:
        """A readable descriptor of its console log."""
        view = self._service.get(uuid)
        return await asyncio.to_thread(open_log, Path(view.console), view.name)

    async def attach_console(self, uuid: str, *, force: bool) -> int:
        """A socket that is its console, both ways."""
        return await self._service.attach_console(uuid, force=force)


def _guest(view: DomainView, way: RelayView | None) -> GuestView:
    return GuestView(
        uuid=view.uuid,
        name=view.name,
        image=view.image,
        image_id=view.image_id,
        platform=view.platform.value,
        simulated=view.simulated,
        state=view.state.value,
        reason=view.halted or view.reason or view.layer,
        since=view.since,
        cid=view.cid,
        relay_state=way.state.value if way is not None else "",
        relay_reason=way.reason if way is not None else "",
    )
