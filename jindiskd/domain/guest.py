"""One domain of ours and what is open for it on the host: vsock device, broker, progress, simulated firmware."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from jindiskd.base.files import space_for
from jindiskd.broker.sev import SevTurn
from jindiskd.domain import console, vsock
from jindiskd.domain.firmware import FirmwareProcess
from jindiskd.domain.progress import ProgressListener
from jindiskd.domain.spec import BootInputs
from jindiskd.domain.state import DomainView, LaunchFailed
from jindiskd.domain.switch import Switch
from jindiskd.guest.config import FIRMWARE_PORT, KBS_PORT, PROGRESS_PORT


class Closing(Protocol):
    """Something that listens."""

    async def close(self) -> None:
        """Stop listening."""


OpenBroker = Callable[[Path, str, str], Awaitable[Closing]]
"""Opens the broker (or the relay to one) on a unix socket for the guest of a domain: path, domain UUID, image id."""


class Guest:
    """The view of a domain, and its resources; owned by the service, used in its event loop."""

    def __init__(self, view: DomainView, home: Path) -> None:
        """`home` is the domain's directory below the runtime directory; nothing is made yet."""
        self.view, self.home = view, home
        self.changed = asyncio.Event()
        self.follower: Callable[[str], None] | None = None
        """Told each state's name as it is reached, while somebody waits for the launch."""
        self.must_be_off = False
        """Whether its machine was to be switched off, and libvirt has not said yet that it is."""
        self.by_others = False
        """Whether libvirt started this machine at somebody else's word; see `domain.starts`."""
        self.turn: SevTurn | None = None
        """The owner's side of a launch that is measured before it runs."""
        self._lock = asyncio.Lock()
        self._retired = False
        self._broker: Closing | None = None
        self._progress: ProgressListener | None = None
        self._firmware: FirmwareProcess | None = None
        self._switch: Switch | None = None

    async def start_device(self, program: Path | None) -> None:
        """Make the home directory, and start the vsock device in it. Without `program` the device is the kernel's, made
        by libvirt; `attach` follows once its context id is known.

        Raises:
            NoSpace: a file system is full.
            ToolMissing, ToolFailed, TimedOut: the device did not come up.
        """
        with space_for(Path(self.view.console)):
            await asyncio.to_thread(console.prepare, Path(self.view.console))
        record = vsock.Record(uuid=self.view.uuid, image=self.view.image, cid=self.view.cid if program else 0)
        with space_for(self.home):
            if program is None:
                vsock.write_record(self.home, record)
            else:
                await vsock.start_device(program, self.home, record)

    def attach(self, switch: Switch, cid: int) -> None:
        """Have what comes from a context id of the kernel's vsock, which is this machine's, passed to our sockets.

        Raises:
            NotSupported: guests cannot be listened for.
        """
        switch.connect(cid, self.home)
        self._switch = switch
        if cid != self.view.cid:
            self.view = replace(self.view, cid=cid)

    async def listen(self, open_broker: OpenBroker, heard: Callable[[str], None]) -> None:
        """Open the broker and the progress port for this guest alone."""
        self._broker = await open_broker(vsock.socket_path(self.home, KBS_PORT), self.view.uuid, self.view.image_id)
        self._progress = ProgressListener(vsock.socket_path(self.home, PROGRESS_PORT), heard)
        await self._progress.start()

    async def start_firmware(self, boot: BootInputs, simulated_root: Path | None) -> None:
        """Start the simulated firmware over what the machine boots; for other platforms nothing.

        Raises:
            LaunchFailed: simulation is off, or the files cannot be measured.
        """
        if not self.view.simulated or self.view.platform.measured_before:
            return
        if simulated_root is None:
            raise LaunchFailed(self.view.name, "its platform is simulated, and broker.allow_simulated is off")
        self._firmware = await FirmwareProcess.start(
            self.view.name, boot, root=simulated_root, socket=vsock.socket_path(self.home, FIRMWARE_PORT)
        )

    @property
    def device_socket(self) -> Path:
        """Where QEMU finds the vsock device."""
        return vsock.device_path(self.home)

    def mark_running(self) -> None:
        """Record that the guest came up, for a later process of this service."""
        vsock.mark_running(self.home)

    async def close(self) -> None:
        """Stop listening and end the firmware. The vsock device stays: it belongs to the machine."""
        async with self._lock:
            await self._close()

    async def clear(self) -> None:
        """Close, end the vsock device, and remove the home directory: the machine is off."""
        async with self._lock:
            if not self._retired:
                await self._close()
                vsock.clear(self.home)  # a few files in memory, and no gap in which a new machine could come up

    async def _close(self) -> None:
        if self.turn is not None:
            self.turn.close()
            self.turn = None
        # Forgotten only once closed: whoever calls again after a cancellation finishes the work.
        if self._switch is not None:
            await self._switch.disconnect(self.home)
            self._switch = None
        if self._broker is not None:
            await self._broker.close()
            self._broker = None
        if self._progress is not None:
            await self._progress.close()
            self._progress = None
        if self._firmware is not None:
            await self._firmware.stop()
            self._firmware = None

    async def retire(self) -> None:
        """Clear for the last time: from now on the home directory belongs to a new machine of this domain."""
        await self.clear()
        self._retired = True
