"""Block devices of this host on the bus."""

from __future__ import annotations

from collections.abc import Mapping

from jindiskd.base.secret import Secret
from jindiskd.bus.collection import Collection, Item
from jindiskd.bus.contract import ROOT_PATH, path_label
from jindiskd.bus.jobs import job_path
from jindiskd.bus.keyfd import read_secret
from jindiskd.bus.objects import ObjectPath, Options
from jindiskd.bus.peers import Caller, Descriptor
from jindiskd.bus.ports import BlockDeviceView, Devices
from jindiskd.bus.server import Server
from jindiskd.jobs.job import Job, Operation
from jindiskd.jobs.manager import JobManager


def device_path(device_id: str) -> ObjectPath:
    """Where a device is exported."""
    return ObjectPath(f"{ROOT_PATH}/device/{path_label(device_id)}")


class DeviceObject(Item[BlockDeviceView], spec="org.jindisk1.Device", view=BlockDeviceView):
    """One device."""

    def __init__(self, view: BlockDeviceView, devices: Devices, jobs: JobManager) -> None:
        super().__init__(view)
        self._devices, self._jobs = devices, jobs

    def polkit_details(self) -> Mapping[str, str]:
        """Its node and image, for the question."""
        view = self._view
        return {"device": view.node or view.mapped_node or view.device_id, "image": view.image or "no image here"}

    async def open(self, caller: Caller, options: Options) -> ObjectPath:
        """Map its volume by its image's key."""
        return self._open(caller, None, options)

    async def open_with_key(self, caller: Caller, key: Descriptor, options: Options) -> ObjectPath:
        """Map its volume by the caller's key."""
        return self._open(caller, await read_secret(key), options)

    def _open(self, caller: Caller, key: Secret | None, options: Options) -> ObjectPath:
        device_id, read_only = self._view.device_id, options.get("read-only") is True

        async def work(job: Job) -> str:
            job.progress("opening")
            return await self._devices.open(device_id, key=key, read_only=read_only, owner=caller.uid)

        def at_end() -> None:
            if key is not None:
                key.close()

        try:
            job = self._jobs.start(Operation.DEVICE_OPEN, [self._name()], caller.uid, work, at_end=at_end)
        except BaseException:
            at_end()
            raise
        return job_path(job.number)

    async def close(self, caller: Caller, options: Options) -> ObjectPath:  # noqa: ARG002 (the contract's arguments)
        """Take the mapping away."""
        device_id = self._view.device_id

        async def work(job: Job) -> None:
            job.progress("closing")
            await self._devices.close(device_id)

        job = self._jobs.start(Operation.DEVICE_CLOSE, [self._name()], caller.uid, work, cancelable=False)
        return job_path(job.number)

    def _name(self) -> str:
        return self._view.node or self._view.mapped_node or self._view.device_id

    @property
    def volume(self) -> str:
        """Identity of that."""
        return self._view.uuid


class DevicesOnBus:
    """Keeps the device objects as the devices are."""

    def __init__(self, server: Server, devices: Devices, jobs: JobManager) -> None:
        self._devices = devices
        self._shown = Collection[BlockDeviceView, DeviceObject](
            server,
            identity=lambda view: view.device_id,
            path=device_path,
            make=lambda view: DeviceObject(view, devices, jobs),
        )
        devices.subscribe(self.refresh)

    def refresh(self) -> None:
        """Show the devices as they are."""
        self._shown.show(self._devices.views())

    def find(self, name: str) -> BlockDeviceView:
        """The device with this node, volume or image.

        Raises:
            NotFound: there is none. InvalidArgument: there are several.
        """
        return self._devices.find(name)

    def all(self) -> list[BlockDeviceView]:
        """All devices, by node."""
        return list(self._devices.views())
