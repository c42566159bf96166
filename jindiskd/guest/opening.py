"""Opening a guest's volumes, the root and the others: each disk is looked at before anything is asked of the broker, so
that a wrong disk never causes a release; one attestation gets the keys of all; then each is opened, the root first.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from jindiskd.base.platform import Platform
from jindiskd.base.secret import Secret
from jindiskd.guest import devices, mounts, rootdisk, secret, udev
from jindiskd.guest.broker import GuestBroker, failing_with
from jindiskd.guest.codes import Code, GuestFailure
from jindiskd.guest.config import DataVolume, GuestConfig, RootVolume, SecretArea, serial_of
from jindiskd.guest.luks_root import LuksRoot
from jindiskd.guest.progress import Progress, Stage
from jindiskd.kbs.client import Ask, unpacked

if TYPE_CHECKING:
    from jindiskd.guest.jindisk1_root import Jindisk1Root

# Kept back from the broker's time for what comes after the key, when the image allows enough.
AFTER_KEY_S = 10.0
DEVICE_WAIT_S = 15.0
ABANDON_S = 5.0
"""How long a volume is waited for that is closed because the boot cannot go on."""
NOT_THE_VOLUME = frozenset({Code.HEADER, Code.VOLUME, Code.KEY})


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A volume whose disk seems to be the right one."""

    volume: RootVolume | DataVolume
    number: int
    """0 for the root."""
    device: Path
    checked: LuksRoot | Jindisk1Root | None
    """None for JinDisk 2, of which the key alone can tell more."""

    @property
    def ask(self) -> Ask:
        """What the broker is asked for."""
        if self.volume.jindisk is not None:
            return Ask.release(self.volume.resource, self.volume.jindisk.uuid)
        return Ask.resource(self.volume.resource)


class Opening:
    """The volumes of one boot.

    Args:
        config: the measured configuration.
        progress: whom the host hears.
        began_s: when the agent began, by `time.monotonic()`.
    """

    def __init__(self, config: GuestConfig, progress: Progress, began_s: float) -> None:
        self._config, self._progress, self._began_s = config, progress, began_s
        self._platform = Platform(config.platform)
        self._broker = GuestBroker(config.broker, self._platform, config.report_source)

    def run(self) -> list[Path]:
        """Open all volumes; returns the nodes of their block devices, the root's first.

        Raises:
            GuestFailure: with the code for what went wrong; volumes that are open then stay so.
        """
        until_s = time.monotonic() + min(DEVICE_WAIT_S, self._config.timeout_s / 2)
        found = [self._look(volume, number, until_s) for number, volume in enumerate(self._config.all_volumes)]
        secrets = self._secrets(found)
        try:
            self._progress.stage(Stage.ATTESTED)
            self._progress.stage(Stage.KEY)
            nodes = [self._open(one, secrets) for one in found]
        finally:
            for left in secrets:
                left.close()
        with failing_with(Code.ACTIVATION):
            for volume, node in zip(self._config.volumes, nodes[1:], strict=True):
                udev.link_volume(volume.name, node)
        self._progress.stage(Stage.UNLOCKED)
        return nodes

    def abandon(self) -> None:
        """Have the volumes closed that were opened before it turned out that the boot cannot go on."""
        if self._config.jindisk:
            close_open()

    def _look(self, volume: RootVolume | DataVolume, number: int, until_s: float) -> Found:
        """Find a volume's disk, and see whether it can be the volume."""
        if isinstance(volume, RootVolume):
            root = rootdisk.find(volume.device, until_s, lambda node: (_checked(volume, node),))
            return Found(volume=volume, number=number, device=root.node, checked=root.seen[0])
        with failing_with(Code.DATA_MISSING):
            there = devices.wait_for_serial(serial_of(volume.name), until_s)
        if len(there) > 1:
            raise GuestFailure(Code.DATA_DOUBLE)
        device = there[0]
        with _as_data(number):
            return Found(volume=volume, number=number, device=device, checked=_checked(volume, device))

    def _secrets(self, found: Sequence[Found]) -> list[Secret]:
        """What opens each volume, in their order."""
        config = self._config
        if self._platform.measured_before:
            return self._injected(found)
        broker_until_s = self._began_s + config.timeout_s - min(AFTER_KEY_S, config.timeout_s / 4)
        reported = _telling(self._progress, Stage.REPORT)
        if not config.key_program:
            return self._broker.obtain([one.ask for one in found], broker_until_s, reported)
        if config.jindisk:
            raise GuestFailure(Code.CONFIG)  # the broker remembers a JinDisk 2 volume's state
        return self._programmed(found, broker_until_s, reported)

    def _programmed(self, found: Sequence[Found], until_s: float, reported: Callable[[], None]) -> list[Secret]:
        """What the program in the initrd gives for each volume."""
        # Only here, so that it is not part of the initrd, and of what is measured, where it is not used.
        from jindiskd.guest import script

        keys: list[Secret] = []
        try:
            for one in found:
                luks2 = one.volume.luks2
                volume = luks2.uuid if luks2 is not None else one.volume.resource
                program = script.KeyProgram(f"/{script.PATH}", self._config.image_id, volume)
                keys.append(program.fetch(one.volume.resource, until_s, reported if not keys else _nothing))
        except BaseException:
            for key in keys:
                key.close()
            raise
        return keys

    def _injected(self, found: Sequence[Found]) -> list[Secret]:
        """The guest was judged before it ran, and has its keys."""
        if any(one.volume.luks2 is None for one in found):
            raise GuestFailure(Code.CONFIG)  # a JinDisk volume's anchor comes from the broker, as other keys do
        wanted = [secret.volume_key(one.volume.resource) if one.number else secret.DISK_KEY for one in found]
        with contextlib.suppress(OSError):  # a kernel without securityfs has no efi_secret either
            mounts.mount_securityfs()
        area = self._config.secret or SecretArea(address=0, size_bytes=0)
        with failing_with(Code.SECRET):
            return secret.disk_keys(wanted, area.address, area.size_bytes)

    def _open(self, one: Found, secrets: list[Secret]) -> Path:
        """Open a volume by the first of the secrets, which is taken from them."""
        volume, key = one.volume, secrets.pop(0)
        with key, _as_data(one.number):
            if volume.jindisk is not None:
                return self._serve(one, key, secrets)
            if isinstance(one.checked, LuksRoot):
                with failing_with(Code.KEY):
                    volume_key = one.checked.unlock(key)
                with volume_key, failing_with(Code.ACTIVATION):
                    return one.checked.activate(volume_key, volume.mapping)
            assert one.checked is not None, "as looked at"
            with failing_with(Code.KEY):
                layout = one.checked.unlock(key)
            with failing_with(Code.ACTIVATION):
                return one.checked.activate(key, layout, volume.mapping)

    def _serve(self, one: Found, key: Secret, others: Sequence[Secret]) -> Path:
        """Have a storage process open a JinDisk 2 volume; its freshness is decided by the anchor that came with it."""
        # Only here, so that the engine is not part of the initrd, and of what is measured, where it is not used.
        from jindiskd.guest import jindisk_root

        expectation = one.volume.jindisk
        assert expectation is not None

        def forget() -> None:
            self._progress.close()
            for other in others:
                other.close()

        with failing_with(Code.BROKER_MISBEHAVED):
            grant = unpacked(key)
        left_s = self._began_s + self._config.timeout_s - time.monotonic()
        return jindisk_root.serve(
            one.device,
            expectation,
            grant,
            self._broker,
            timeout_s=max(left_s, 1.0),
            forget=forget,
            number=one.number,
        )


def close_open() -> None:
    """Have the JinDisk 2 volumes closed that are open."""
    # Only here, so that the engine is not part of the initrd where no volume needs it.
    from jindiskd.guest import storage

    names = storage.running()
    if names:
        os.sync()
    for name in names:
        storage.ask_to_close(storage.CONTROLS / name, ABANDON_S)


def _checked(volume: RootVolume | DataVolume, device: Path) -> LuksRoot | Jindisk1Root | None:
    """Look at the beginning of a volume.

    Raises:
        GuestFailure: it is not what the image was built with.
    """
    if volume.luks2 is not None:
        with failing_with(Code.HEADER):
            return LuksRoot(device, volume.luks2)
    if volume.jindisk is not None:
        from jindiskd.guest import jindisk_root

        with failing_with(Code.VOLUME):
            jindisk_root.check_identification(device, volume.jindisk)
        return None
    from jindiskd.guest import jindisk1_root

    assert isinstance(volume, RootVolume)
    assert volume.jindisk1 is not None, "checked with the configuration"
    with failing_with(Code.VOLUME):
        return jindisk1_root.Jindisk1Root(device, volume.jindisk1)


@contextlib.contextmanager
def _as_data(number: int) -> Iterator[None]:
    """Of a volume that is not the root, that it is not the expected one has a code of its own."""
    try:
        yield
    except GuestFailure as failure:
        if number and failure.code in NOT_THE_VOLUME:
            raise GuestFailure(Code.DATA_VOLUME) from None
        raise


def _telling(progress: Progress, stage: Stage) -> Callable[[], None]:
    return lambda: progress.stage(stage)


def _nothing() -> None:
    """Told once is enough."""
