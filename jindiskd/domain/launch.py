"""One launch: from an image to a running system, or to nothing at all."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from pathlib import Path
from uuid import uuid4

import structlog

from jindiskd.attest.model import EvidenceRefused
from jindiskd.attest.sev import LaunchReport, SealedSecret
from jindiskd.base.platform import Platform
from jindiskd.broker.peer import Peer
from jindiskd.broker.sev import HostPlatform, ReleaseWaits, SevSide, SevTurn
from jindiskd.domain import capabilities, check, layers, machine, xml
from jindiskd.domain.binding import Binding, Bindings
from jindiskd.domain.connection import Connection
from jindiskd.domain.guest import Guest, OpenBroker
from jindiskd.domain.guests import DomainSettings, Guests
from jindiskd.domain.judge import Judge
from jindiskd.domain.security import with_session
from jindiskd.domain.spec import from_manifest
from jindiskd.domain.state import ACTIVE, DomainState, DomainView, LaunchFailed, LaunchRefused
from jindiskd.domain.switch import Switch
from jindiskd.errors import Busy, JindiskError, NotFound, NotSupported, TimedOut
from jindiskd.image.manifest import Manifest
from jindiskd.image.measurement import require_launch_firmware
from jindiskd.image.signing import policy_of
from jindiskd.image.store import ImageStore

log = structlog.get_logger(__name__)


KEY_ELSEWHERE = (
    "its key is not in this service's key store, but at the broker that the image pins: have guests passed on to that "
    "broker ([broker] deployment = 'relay')"
)
WAITING_PAUSE_S = 3.0
"""How often it is asked whether the owner has approved a launch."""


class Launcher:
    """Launches images; one launch is one call of `launch`."""

    def __init__(
        self,
        *,
        connection: Connection,
        images: ImageStore,
        guests: Guests,
        bindings: Bindings,
        open_broker: OpenBroker,
        settings: DomainSettings,
        judge: Judge,
        sev: SevSide | None,
        switch: Switch,
        heard: Callable[[Guest, str], None],
        key_here: Callable[[str], bool],
    ) -> None:
        """`heard` hears each progress word of a guest; `key_here` tells whether the broker can know an image's key."""
        self._connection, self._images, self._guests, self._bindings = connection, images, guests, bindings
        self._open_broker, self._settings, self._judge, self._heard = open_broker, settings, judge, heard
        self._sev, self._switch, self._key_here = sev, switch, key_here

    async def launch(
        self,
        image_name: str,
        *,
        name: str,
        memory_mib: int | None,
        timeout_s: int | None,
        progress: Callable[[str], None],
        host_data: bytes = b"",
    ) -> DomainView:
        """Define and start a domain for an image and follow it until its system runs; see `DomainService.launch`."""
        self._connection.require_local("launching a guest")
        stored = await asyncio.to_thread(self._images.get, image_name)
        manifest = stored.manifest
        if not await asyncio.to_thread(self._key_here, manifest.image_id):
            raise NotSupported(f"launching image {image_name!r} here", KEY_ELSEWHERE)
        name = name or image_name
        old = self._guests.named(name)
        guest = self._guests.claim(name, image=manifest.name, image_id=manifest.image_id, platform=manifest.platform)
        guest.follower = progress
        progress(guest.view.state.value)
        log.info("launch", domain=name, image=image_name, simulated=guest.view.simulated)
        seconds = timeout_s or self._settings.launch_timeout_s
        try:
            async with asyncio.timeout(seconds):
                if old is not None:
                    await old.retire()
                    if old.must_be_off:
                        await machine.end(self._connection, old)
                memory = memory_mib or self._settings.memory_mib
                text = await self._define(guest, stored.path, manifest, memory, host_data)
                await self._power_on(guest, text)
                await self._follow(guest)
        except BaseException as exc:
            reached, waited = guest.view.state, guest.view.reason
            guest.follower = None
            await asyncio.shield(self._abandon(guest, exc))
            if isinstance(exc, TimeoutError):
                far = waited or f"it came as far as {reached}"
                raise TimedOut(f"the startup of domain {name!r} ({far})", seconds) from exc
            raise
        guest.follower = None
        return guest.view

    async def plan(self, image_name: str, name: str, memory_mib: int, host_data: bytes) -> str:
        """The XML that a launch of an image would define; nothing is made."""
        stored = await asyncio.to_thread(self._images.get, image_name)
        binding = Binding(
            image=stored.manifest.name, image_id=stored.manifest.image_id, platform=stored.manifest.platform
        )
        old = self._guests.named(name)
        view = self._guests.off(old.view.uuid if old else str(uuid4()), name, binding)
        return self._made(view, stored.path, stored.manifest, memory_mib, host_data)

    async def _define(
        self, guest: Guest, directory: Path, manifest: Manifest, memory_mib: int, host_data: bytes
    ) -> str:
        """Make libvirt's definition what is to be started; returns its XML."""
        view = guest.view
        await self.can_start(manifest.platform)
        await asyncio.to_thread(require_launch_firmware, manifest)
        turn = await self._turn(guest, manifest)
        binding = self._bindings.get(view.uuid)
        if binding is not None and binding.adopted:
            if host_data:
                text = "it was adopted: its definition says what it has (virsh edit, <launchSecurity>)"
                raise NotSupported(f"host data for domain {view.name!r}", text)
            text = await self._adopted(view, binding)
        else:
            if binding is not None and binding.image_id == view.image_id:
                await self._refuse_layers(view)
            text = self._made(view, directory, manifest, memory_mib, host_data)
        if turn is not None:
            text = with_session(text, turn.dh_certificate, turn.session)
        await guest.start_device(self._settings.device_program(xml.parse(text)))
        await guest.listen(self._open_broker, lambda word: self._heard(guest, word))
        if binding is None or not binding.adopted:
            self._bindings.put(view.uuid, Binding(image=view.image, image_id=view.image_id, platform=view.platform))
        if turn is not None or binding is None or not binding.adopted:
            compare(view.name, text, await machine.define(self._connection, view.name, text))
        return text

    async def _turn(self, guest: Guest, manifest: Manifest) -> SevTurn | None:
        """For a platform that is measured before it runs, the owner's session; the guest closes it."""
        view = guest.view
        if not view.platform.measured_before:
            return None
        assert self._sev is not None  # the service has one wherever its broker is
        policy = policy_of(manifest)
        host = HostPlatform.read(await machine.sev_platform(self._connection))
        peer = Peer(description=f"domain {view.uuid}", domain_uuid=view.uuid, image_id=view.image_id)
        try:
            guest.turn = await self._sev.begin(peer, policy, host)
        except EvidenceRefused as exc:
            raise self._refused(guest, exc) from exc
        return guest.turn

    async def _approved(self, guest: Guest, turn: SevTurn) -> None:
        """Have the paused machine measured, judged and given its secret."""
        view = guest.view
        report = await machine.sev_measurement(self._connection, view.name, view.uuid)
        try:
            sealed = await self._sealed(guest, turn, report)
        except EvidenceRefused as exc:
            raise self._refused(guest, exc) from exc
        await machine.inject(self._connection, view.name, view.uuid, sealed)

    def _refused(self, guest: Guest, exc: EvidenceRefused) -> LaunchRefused:
        """What a refusal of the owner's side means for the domain."""
        reason = "; ".join(finding.text for finding in exc.findings)
        if guest.view.state is DomainState.STARTING:  # unless the broker's event was faster
            self._guests.set(guest, DomainState.REFUSED, reason)
        return LaunchRefused(guest.view.name, reason)

    async def _sealed(self, guest: Guest, turn: SevTurn, report: LaunchReport) -> SealedSecret:
        """The sealed secret, once its owner has approved the launch where that is wanted."""
        while True:
            try:
                return await turn.approve(report)
            except ReleaseWaits as exc:
                self._guests.wait(guest, exc.approval)
            await asyncio.sleep(WAITING_PAUSE_S)

    def _made(
        self, view: DomainView, directory: Path, manifest: Manifest, memory_mib: int, host_data: bytes
    ) -> str:
        """The definition of a domain that is ours alone."""
        spec = from_manifest(
            manifest,
            directory,
            name=view.name,
            uuid=view.uuid,
            memory_mib=memory_mib,
            console_log=Path(view.console),
            vsock=self._settings.device_socket(view.uuid),
            host_data=host_data,
        )
        text = xml.write(spec)
        check.refuse(xml.parse(text), simulated=view.simulated)
        return text

    async def _adopted(self, view: DomainView, binding: Binding) -> str:
        """The definition of a domain that somebody else made and may have changed."""
        text = (await machine.definition(self._connection, view.uuid)).text
        if binding.image_id != view.image_id:
            raise Busy(f"domain {view.name!r}", f"it was adopted for image {binding.image!r}; choose another --name")
        await asyncio.to_thread(self._judge.refuse, xml.parse(text), binding, view.name)
        return text

    async def _refuse_layers(self, view: DomainView) -> None:
        """Keep a definition that has a snapshot's file before a disk of the image: made anew, what it has was lost."""
        try:
            root = xml.parse((await machine.definition(self._connection, view.uuid)).text)
        except NotFound:
            return  # removed meanwhile
        layer = next(layers.of_image(root), None)
        if layer is not None and view.platform.measured_before:
            remedy = (
                f"its disk {layer.target} goes on in {layer.file!r}, by a snapshot perhaps: 'qemu-img commit' puts "
                f"that back while it is off, and 'virsh edit {view.name}' the image's disk (raw) into its definition"
            )
            raise NotSupported(f"making domain {view.name!r} anew", remedy)
        if layer is not None:
            remedy = f"'virsh start {view.name}' starts it as it is; {layer.told(view.name)}"
            raise NotSupported(f"making domain {view.name!r} anew", remedy)

    async def can_start(self, platform: Platform) -> None:
        """Refuse a platform that this host cannot start, before anything is made."""
        if platform is Platform.SIMULATED_SNP:
            return  # an ordinary domain to libvirt
        host = await machine.host(self._connection, "qemu" if platform.simulated else "kvm")
        if not platform.simulated:
            self._judge.host = host
        capabilities.require(host, platform)

    async def _power_on(self, guest: Guest, text: str) -> None:
        """Start the machine paused, measure what libvirt really has, then let it run."""
        view = guest.view
        live = await machine.start_paused(self._connection, view.name, view.uuid)
        compare(view.name, text, live)
        root = xml.parse(live)
        cid = xml.kernel_cid(root)
        if cid is not None:
            guest.attach(self._switch, cid)
        await guest.start_firmware(xml.boot_inputs(root), self._settings.simulated_root)
        turn = guest.turn
        if turn is not None:
            await self._approved(guest, turn)
        await machine.resume(self._connection, view.name, view.uuid)
        self._guests.set(guest, DomainState.STARTED)
        if turn is not None:  # decided before it ran
            self._guests.set(guest, DomainState.ATTESTED)
            self._guests.set(guest, DomainState.RELEASED)

    @staticmethod
    async def _follow(guest: Guest) -> None:
        """Wait for a state in which the launch is decided."""
        while True:
            view = guest.view
            if view.state is DomainState.RUNNING:
                return
            if view.state is DomainState.REFUSED:
                raise LaunchRefused(view.name, view.reason)
            if view.state not in ACTIVE:
                raise LaunchFailed(view.name, view.reason or "it stopped before its system ran; see its console log")
            guest.changed.clear()
            await guest.changed.wait()

    async def _abandon(self, guest: Guest, why: BaseException) -> None:
        """End a launch that did not get there."""
        with contextlib.suppress(JindiskError):
            await machine.end(self._connection, guest)
        await guest.clear()
        if guest.view.state in ACTIVE:
            reason = str(why) if isinstance(why, JindiskError) else "the launch was given up"
            self._guests.set(guest, DomainState.FAILED, reason)


def compare(name: str, wanted: str, got: str) -> None:
    """Refuse a definition of which libvirt dropped or changed something that is measured or protects.

    Raises:
        LaunchFailed: naming the elements.
    """
    different = xml.differences(xml.parse(wanted), xml.parse(got))
    if different:
        raise LaunchFailed(name, f"libvirt has another {', '.join(different)} than was asked for; see `virsh dumpxml`")
