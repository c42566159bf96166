"""Domains on the bus."""

from __future__ import annotations

from collections.abc import Mapping

from jindiskd.bus.collection import Collection, Item, named
from jindiskd.bus.contract import ROOT_PATH, path_label
from jindiskd.bus.jobs import job_path, start_bound
from jindiskd.bus.objects import ObjectPath, Options, number
from jindiskd.bus.peers import Caller, Descriptor
from jindiskd.bus.ports import Guests, GuestView
from jindiskd.bus.server import Server
from jindiskd.errors import InvalidArgument
from jindiskd.jobs.job import Job, Operation
from jindiskd.jobs.manager import JobManager

TIMEOUT_LIMIT_S = 86_400


def domain_path(uuid: str) -> ObjectPath:
    """Where a domain is exported."""
    return ObjectPath(f"{ROOT_PATH}/domain/{path_label(uuid)}")


def bounded_timeout(options: Options) -> int | None:
    """The option `timeout`, in seconds.

    Raises:
        InvalidArgument: it is out of its range.
    """
    timeout_s = number(options, "timeout")
    if timeout_s is not None and not 1 <= timeout_s <= TIMEOUT_LIMIT_S:
        raise InvalidArgument("timeout", timeout_s, f"give 1 to {TIMEOUT_LIMIT_S} seconds")
    return timeout_s


class DomainObject(Item[GuestView], spec="org.jindisk1.Domain", view=GuestView):
    """One domain."""

    def __init__(self, view: GuestView, guests: Guests, jobs: JobManager) -> None:
        super().__init__(view)
        self._guests, self._jobs = guests, jobs

    def polkit_details(self) -> Mapping[str, str]:
        """Its name and image, for the question."""
        return {"domain": self._view.name, "image": self._view.image}

    async def start(self, caller: Caller, options: Options) -> ObjectPath:
        """Start the guest."""
        view, timeout_s = self._view, bounded_timeout(options)

        async def work(job: Job) -> str:
            return await self._guests.start(view.uuid, timeout_s, job)

        return start_bound(self._jobs, caller, Operation.DOMAIN_START, [view.name], work, options)

    async def release(self, caller: Caller, options: Options) -> ObjectPath:  # noqa: ARG002 (the contract's arguments)
        """Let go of an adopted domain."""
        view = self._view

        async def work(job: Job) -> None:
            job.progress("releasing")
            await self._guests.release(view.uuid)

        job = self._jobs.start(Operation.DOMAIN_RELEASE, [view.name], caller.uid, work, cancelable=False)
        return job_path(job.number)

    async def get_xml(self, caller: Caller, options: Options) -> str:  # noqa: ARG002 (the contract's arguments)
        """Its definition."""
        return await self._guests.definition(self._view.uuid)

    async def stop(self, caller: Caller, options: Options) -> ObjectPath:
        """End the guest."""
        view, force, timeout_s = self._view, options.get("force") is True, bounded_timeout(options)

        async def work(job: Job) -> None:
            job.progress("powering off" if force else "shutting down")
            await self._guests.stop(view.uuid, force=force, timeout_s=timeout_s)

        return job_path(self._jobs.start(Operation.DOMAIN_STOP, [view.name], caller.uid, work).number)

    async def undefine(self, caller: Caller, options: Options) -> ObjectPath:  # noqa: ARG002 (the contract's arguments)
        """Remove its definition; the image stays."""
        view = self._view

        async def work(job: Job) -> None:
            job.progress("removing")
            await self._guests.undefine(view.uuid)

        job = self._jobs.start(Operation.DOMAIN_UNDEFINE, [view.name], caller.uid, work, cancelable=False)
        return job_path(job.number)

    async def open_console(self, caller: Caller, options: Options) -> Descriptor:  # noqa: ARG002 (as above)
        """Its console log."""
        return Descriptor(await self._guests.open_console(self._view.uuid))

    async def attach_console(self, caller: Caller, options: Options) -> Descriptor:  # noqa: ARG002 (as above)
        """Its console itself."""
        force = options.get("force") is True
        return Descriptor(await self._guests.attach_console(self._view.uuid, force=force))


class DomainsOnBus:
    """Keeps the domain objects as the domains are."""

    def __init__(self, server: Server, guests: Guests, jobs: JobManager) -> None:
        self._guests = guests
        self._shown = Collection[GuestView, DomainObject](
            server,
            identity=lambda view: view.uuid,
            path=domain_path,
            make=lambda view: DomainObject(view, guests, jobs),
        )
        guests.subscribe(self.refresh)

    def refresh(self) -> None:
        """Show the domains as they are."""
        self._shown.show(self._guests.views())

    def find(self, name: str) -> GuestView:
        """The domain with this name or UUID.

        Raises:
            NotFound: there is none of ours.
        """
        return named("domain", name, {view.uuid: view for view in self._guests.views()}, lambda view: view.name)

    def all(self) -> list[GuestView]:
        """All domains, by name."""
        return sorted(self._guests.views(), key=lambda view: view.name)
