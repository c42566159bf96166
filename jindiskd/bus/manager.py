"""The manager object: building, launching, finding, and what there is to know of the service."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Mapping, Sequence

from jindiskd.bus.devices import DevicesOnBus, device_path
from jindiskd.bus.domains import DomainsOnBus, bounded_timeout, domain_path
from jindiskd.bus.images import ImagesOnBus, image_path
from jindiskd.bus.jobs import start_bound
from jindiskd.bus.keyfd import document_descriptor, read_secret, take_regular_file, take_stream
from jindiskd.bus.keys import KeysOnBus, key_path, policy_path, user
from jindiskd.bus.objects import Object, ObjectPath, Options, Row, number, text
from jindiskd.bus.peers import Caller, Descriptor
from jindiskd.bus.ports import BuildOrder, Diagnosis, Guests, Images, ImportOrder, Keys, LaunchOrder, ServiceFacts
from jindiskd.errors import AlreadyExists, InvalidArgument, NotFound
from jindiskd.jobs.job import Job, Operation
from jindiskd.jobs.manager import JobManager

DOMAIN_LIMIT = 128
PEM_LIMIT_BYTES = 1 << 16
MEBIBYTE = 1 << 20
MEMORY_LIMIT_BYTES = 16 << 40
HOST_DATA = re.compile(r"([0-9a-fA-F]{64}|[0-9a-fA-F]{96})?")
DOMAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
"""The name becomes part of messages, listings and libvirt's file names."""


class ManagerObject(Object, spec="org.jindisk1.Manager"):
    """The service itself."""

    def __init__(
        self,
        *,
        images: Images,
        guests: Guests,
        keys: Keys,
        diagnosis: Diagnosis,
        jobs: JobManager,
        facts: ServiceFacts,
        images_on_bus: ImagesOnBus,
        domains_on_bus: DomainsOnBus,
        keys_on_bus: KeysOnBus,
        devices_on_bus: DevicesOnBus,
    ) -> None:
        self._images, self._guests, self._keys, self._jobs, self._facts = images, guests, keys, jobs, facts
        self._diagnosis, self._keys_on_bus = diagnosis, keys_on_bus
        self._images_on_bus, self._domains_on_bus = images_on_bus, domains_on_bus
        self._devices_on_bus = devices_on_bus

    def polkit_details(self) -> Mapping[str, str]:
        """What its methods are about where no single image is: keys of all of them."""
        return {"image": "all images"}

    async def build_image(self, caller: Caller, name: str, base: Descriptor, options: Options) -> ObjectPath:
        """Build an image."""
        order = self._images.checked(build_order(name, options))
        with contextlib.suppress(NotFound):
            self._images_on_bus.find(name)
            raise AlreadyExists("image", name)
        taken = Descriptor(take_regular_file(base))
        fd = taken.fileno()

        async def work(job: Job) -> str:
            try:
                return await self._images.build(order, fd, job)
            finally:
                await self._images_on_bus.refresh()

        return start_bound(self._jobs, caller, Operation.IMAGE_BUILD, [name], work, options, at_end=taken.close)

    async def import_image(self, caller: Caller, source: Descriptor, options: Options) -> ObjectPath:
        """Take an image from a stream."""
        order = ImportOrder(name=text(options, "name"), firmware=text(options, "firmware"))
        taken = Descriptor(take_stream(source, writing=False))
        fd = taken.fileno()

        async def work(job: Job) -> str:
            try:
                return await self._images.import_(order, fd, job)
            finally:
                await self._images_on_bus.refresh()

        names = [order.name or "stream"]
        return start_bound(self._jobs, caller, Operation.IMAGE_IMPORT, names, work, options, at_end=taken.close)

    async def launch(self, caller: Caller, image: str, options: Options) -> ObjectPath:
        """Start a guest."""
        order = launch_order(self._images_on_bus.find(image).name, options)

        async def work(job: Job) -> str:
            return await self._guests.launch(order, job)

        return start_bound(self._jobs, caller, Operation.DOMAIN_LAUNCH, [order.image], work, options)

    async def describe_domain(self, caller: Caller, image: str, options: Options) -> str:  # noqa: ARG002 (as below)
        """What a launch would define."""
        return await self._guests.plan(launch_order(self._images_on_bus.find(image).name, options))

    async def adopt_domain(self, caller: Caller, domain: str, image: str, options: Options) -> ObjectPath:
        """Bind a domain that somebody else made to an image."""
        if not domain or len(domain) > DOMAIN_LIMIT or not domain.isprintable():
            remedy = f"give its name or UUID, {DOMAIN_LIMIT} printable characters at most"
            raise InvalidArgument("domain", domain[:100], remedy)
        name = self._images_on_bus.find(image).name

        async def work(job: Job) -> str:
            job.progress("adopting")
            return await self._guests.adopt(domain, name)

        return start_bound(self._jobs, caller, Operation.DOMAIN_ADOPT, [domain], work, options)

    async def get_image(self, caller: Caller, name: str) -> ObjectPath:  # noqa: ARG002 (the contract's arguments)
        """Find an image."""
        return image_path(self._images_on_bus.find(name).image_id)

    async def get_domain(self, caller: Caller, name: str) -> ObjectPath:  # noqa: ARG002 (as above)
        """Find a domain."""
        return domain_path(self._domains_on_bus.find(name).uuid)

    async def get_device(self, caller: Caller, name: str) -> ObjectPath:  # noqa: ARG002 (as above)
        """Find a device."""
        return device_path(self._devices_on_bus.find(name).device_id)

    async def list_devices(self, caller: Caller, options: Options) -> Sequence[ObjectPath]:  # noqa: ARG002 (as above)
        """All devices."""
        return [device_path(view.device_id) for view in self._devices_on_bus.all()]

    async def list_images(self, caller: Caller, options: Options) -> Sequence[ObjectPath]:  # noqa: ARG002 (as above)
        """All images."""
        return [image_path(view.image_id) for view in self._images_on_bus.all()]

    async def list_domains(self, caller: Caller, options: Options) -> Sequence[ObjectPath]:  # noqa: ARG002 (as above)
        """All domains."""
        return [domain_path(view.uuid) for view in self._domains_on_bus.all()]

    async def get_key(self, caller: Caller, name: str) -> ObjectPath:  # noqa: ARG002 (as above)
        """Find an image's keys."""
        return key_path(self._keys_on_bus.find(name).image_id)

    async def get_policy(self, caller: Caller, name: str) -> ObjectPath:  # noqa: ARG002 (as above)
        """Find an image's policy."""
        return policy_path(self._keys_on_bus.find(name).image_id)

    async def get_card(self, caller: Caller, options: Options) -> str:  # noqa: ARG002 (as above)
        """Which broker has the keys."""
        return await self._keys.card()

    async def set_recovery_key(self, caller: Caller, key: Descriptor, options: Options) -> None:  # noqa: ARG002
        """Choose what recovery copies are sealed to."""
        with await read_secret(key, limit_bytes=PEM_LIMIT_BYTES) as pem:
            await self._keys.set_recovery_key(bytes(pem.reveal()), user(caller))

    async def recovery_copy(self, caller: Caller, options: Options) -> Descriptor:  # noqa: ARG002 (as above)
        """All keys, sealed."""
        return document_descriptor("recovery", await self._keys.recovery_copy(user(caller)))

    async def diagnose(self, caller: Caller, options: Options) -> Sequence[Row]:  # noqa: ARG002 (as above)
        """What is wrong, and what to do."""
        image, domain, platform = (text(options, name) for name in ("image", "domain", "platform"))
        return await self._diagnosis.diagnose(image=image, domain=domain, platform=platform)

    async def status(self, caller: Caller, options: Options) -> Options:  # noqa: ARG002 (as above)
        """How the service is."""
        return await asyncio.to_thread(self._facts.status)

    async def configuration(self, caller: Caller, options: Options) -> Sequence[tuple[str, str, str]]:  # noqa: ARG002
        """The settings in effect."""
        return self._facts.settings

    @property
    def version(self) -> str:
        """Version of the service."""
        return self._facts.version

    @property
    def deployment(self) -> str:
        """Where the broker is."""
        return self._facts.deployment

    @property
    def relay_broker(self) -> str:
        """The owner's broker."""
        return self._facts.relay_broker

    @property
    def allow_simulated(self) -> bool:
        """Whether simulated reports are accepted."""
        return self._facts.allow_simulated

    @property
    def broker_spki_sha256(self) -> str:
        """What new images pin."""
        return self._facts.broker_spki_sha256.hex()

    @property
    def libvirt_connected(self) -> bool:
        """Whether libvirt is connected."""
        return self._guests.connected


def build_order(name: str, options: Options) -> BuildOrder:
    """The options of BuildImage as a value."""
    return BuildOrder(
        name=name,
        base_kind=text(options, "base-kind") or "disk",
        platform=text(options, "platform"),
        format=text(options, "format"),
        initrd=text(options, "initrd"),
        vcpus=number(options, "vcpus"),
        cpu_model=text(options, "cpu-model"),
        firmware=text(options, "firmware"),
        size_bytes=number(options, "size"),
        cmdline=text(options, "cmdline"),
        seed=text(options, "seed") or None,
        debug=options.get("debug") is True,
        guest_policy=text(options, "guest-policy"),
        vouch_firmware=options.get("vouch-firmware") is True,
        # An empty text is an answer here: the platform's own way, and the broker, whatever is configured.
        report_source=text(options, "report-source") if "report-source" in options else None,
        key_program=text(options, "key-program") if "key-program" in options else None,
        volumes=volumes(options),
        disk_bus=text(options, "disk-bus"),
    )


def volumes(options: Options) -> Sequence[tuple[str, int, str, str]]:
    """The data volumes asked for; the dispatcher has checked the type."""
    given = options.get("volumes", [])
    assert isinstance(given, list)
    return [(str(name), int(size), str(form), str(mount)) for name, size, form, mount in given]


def launch_order(image: str, options: Options) -> LaunchOrder:
    """The options of Launch as a value.

    Raises:
        InvalidArgument: one is out of its range.
    """
    name, memory, timeout_s = text(options, "name"), number(options, "memory"), bounded_timeout(options)
    if name and not DOMAIN_NAME.fullmatch(name):
        remedy = "it has 1 to 63 letters, digits, '.', '_' or '-', and begins with a letter or digit"
        raise InvalidArgument("domain name", name[:100], remedy)
    if memory is not None and (memory % MEBIBYTE or not MEBIBYTE <= memory <= MEMORY_LIMIT_BYTES):
        raise InvalidArgument("memory", memory, f"give whole MiB, {MEMORY_LIMIT_BYTES} bytes at most")
    given = text(options, "host-data")
    if not HOST_DATA.fullmatch(given):
        raise InvalidArgument("host data", given[:20], "give 32 (SEV-SNP) or 48 (TDX) bytes in hexadecimal")
    data = bytes.fromhex(given)
    return LaunchOrder(image=image, name=name, memory_bytes=memory, timeout_s=timeout_s, host_data=data)
