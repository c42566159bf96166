"""All objects on the bus, put together: what the daemon starts and stops."""

from __future__ import annotations

import structlog

from jindiskd.bus.approvals import ApprovalsOnBus
from jindiskd.bus.audit import AuditOnBus
from jindiskd.bus.contract import BUS_NAME, ROOT_PATH
from jindiskd.bus.devices import DevicesOnBus
from jindiskd.bus.domains import DomainsOnBus
from jindiskd.bus.images import ImagesOnBus
from jindiskd.bus.jobs import JobsOnBus
from jindiskd.bus.keys import KeysOnBus
from jindiskd.bus.lib import DBusError, NameFlag, RequestNameReply
from jindiskd.bus.manager import ManagerObject
from jindiskd.bus.polkit import Authority
from jindiskd.bus.ports import Approvals, Audit, Devices, Diagnosis, Guests, Images, Keys, Policies, ServiceFacts
from jindiskd.bus.server import Server
from jindiskd.bus.transport import Connection
from jindiskd.errors import Busy, ServiceUnavailable
from jindiskd.jobs.manager import JobManager

log = structlog.get_logger(__name__)


class BusService:
    """Manager, images, domains, devices, keys, policies, approvals, audit log and jobs on one connection."""

    def __init__(
        self,
        bus: Connection,
        *,
        images: Images,
        guests: Guests,
        devices: Devices,
        keys: Keys,
        policies: Policies,
        approvals: Approvals,
        audit: Audit,
        diagnosis: Diagnosis,
        jobs: JobManager,
        facts: ServiceFacts,
    ) -> None:
        self._bus = bus
        self._server = Server(bus, root=ROOT_PATH, authorize=Authority(bus))
        self.images = ImagesOnBus(self._server, images, jobs, lambda: self.keys.look())
        self.domains = DomainsOnBus(self._server, guests, jobs)
        self.keys = KeysOnBus(self._server, keys, policies, self.images.look)
        self._audit = AuditOnBus(self._server, audit, jobs, keys.subscribe)
        self.devices = DevicesOnBus(self._server, devices, jobs)
        self.manager = ManagerObject(
            images=images,
            guests=guests,
            keys=keys,
            diagnosis=diagnosis,
            jobs=jobs,
            facts=facts,
            images_on_bus=self.images,
            domains_on_bus=self.domains,
            keys_on_bus=self.keys,
            devices_on_bus=self.devices,
        )
        self._approvals = ApprovalsOnBus(self._server, approvals, keys.subscribe, self.manager.signal)
        self._jobs = JobsOnBus(self._server, jobs, self.manager.signal)

    async def start(self) -> None:
        """Export everything, then take the bus name.

        Raises:
            Busy: another process has the name.
            ServiceUnavailable: the bus does not let us have it.
        """
        await self._server.start()
        self._server.export(ROOT_PATH, self.manager)
        await self.images.look()
        self.domains.refresh()
        await self.keys.look()
        self.keys.start()
        await self._audit.start()
        await self._approvals.start()
        self.devices.refresh()
        try:
            reply = await self._bus.request_name(BUS_NAME, NameFlag.DO_NOT_QUEUE)
        except DBusError as exc:
            remedy = "have the bus read its policy again ('systemctl reload dbus'), or see 'jindiskctl system-files'"
            raise ServiceUnavailable(f"the bus name {BUS_NAME} ({exc})", remedy) from exc
        if reply is not RequestNameReply.PRIMARY_OWNER:
            raise Busy(f"the bus name {BUS_NAME}", "another jindiskd runs on this bus; stop it first")
        log.info("on the bus", name=BUS_NAME, unique=self._bus.unique_name)

    async def close(self) -> None:
        """Refuse new calls and end those under way."""
        await self._approvals.close()
        await self._audit.close()
        await self.keys.close()
        await self._server.close()
        self._jobs.close()
