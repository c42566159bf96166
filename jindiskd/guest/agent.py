"""The agent in the guest's initrd, as PID 1: report, key, root, hand-over; or a fixed code and power off.

Imports the standard library, cryptography, and of jindiskd only errors, base.secret, base.document, base.platform,
kbs, jindisk, luks2 and guest. It starts no program and reads no configuration but the measured file. Every module is
imported before the initrd's files are deleted, where they are.
"""

from __future__ import annotations

import contextlib
import os
import resource
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn, cast

from jindiskd.base import document
from jindiskd.base.platform import Platform
from jindiskd.guest import config as guest_config
from jindiskd.guest import devices, kernel, modules, mounts, power, secret, switch_root
from jindiskd.guest.broker import GuestBroker, failing_with
from jindiskd.guest.codes import Code, GuestFailure
from jindiskd.guest.config import (
    GuestConfig,
    Jindisk1Expectation,
    JindiskExpectation,
    Luks2Expectation,
    SecretArea,
)
from jindiskd.guest.luks_root import LuksRoot
from jindiskd.guest.progress import Progress, Stage

SYSROOT = Path("/sysroot")
PRINTK = Path("/proc/sys/kernel/printk")
PANIC_ON_OOPS = Path("/proc/sys/kernel/panic_on_oops")
PANIC = Path("/proc/sys/kernel/panic")

# Kept back from the broker's time for what comes after the key, when the image allows enough.
AFTER_KEY_S = 10.0
DEVICE_WAIT_S = 15.0


class Agent:
    """One boot."""

    def __init__(self, progress: Progress | None = None) -> None:
        self.progress = progress or Progress()
        self._began_s = time.monotonic()

    def run(self) -> NoReturn:
        """Boot the system.

        Raises:
            GuestFailure: it cannot be booted, or not safely.
        """
        with failing_with(Code.MOUNTS):
            mounts.mount_kernel_filesystems()
        config = measured_config()
        watchdog = power.Watchdog(config.timeout_s, self.progress)
        settings = harden_kernel()
        node = self.open_root(config)
        with failing_with(Code.ROOT_MOUNT):
            mounts.mount_root(os.fspath(node), SYSROOT, config.root.filesystem, config.root.options)
        if not switch_root.find_init(SYSROOT, config.init):
            raise GuestFailure(Code.INIT_MISSING)
        with failing_with(Code.SWITCH_ROOT):
            soften_kernel(settings)
            self.progress.stage(Stage.RUNNING)
            self.progress.close()
            kept = config.root.luks2 is None  # JinDisk volumes of both kinds are closed by the initrd's own program
            if kept:
                switch_root.keep_initrd()
            switch_root.move_mounts(SYSROOT)
            old = switch_root.enter(SYSROOT)
            if not kept:
                switch_root.delete_files(old)
            os.close(old)
            watchdog.stop()
            switch_root.start_init(config.init)

    def open_root(self, config: GuestConfig) -> Path:
        """Load the modules, attest, and open the root volume; returns the node of the block device.

        Raises:
            GuestFailure: with the code for what went wrong.
        """
        platform = Platform(config.platform)
        luks2, jindisk, jindisk1 = config.root.luks2, config.root.jindisk, config.root.jindisk1
        with failing_with(Code.MODULES):
            modules.load_modules(Path(module) for module in config.modules)
        if platform in {Platform.SNP, Platform.TDX}:
            # Without configfs the older device may still be there, and the report says what is missing.
            with contextlib.suppress(OSError):
                mounts.mount_configfs()
        self.progress.stage(Stage.BOOT)
        device = Path(config.root.device)
        with failing_with(Code.DEVICE_MISSING):
            devices.wait_for_device(device, time.monotonic() + min(DEVICE_WAIT_S, config.timeout_s / 2))
        broker = self._key_source(config, platform)
        if platform.measured_before:
            if luks2 is None:
                raise GuestFailure(Code.CONFIG)  # a JinDisk volume's anchor comes from the broker
            node = self._open_by_secret(config, luks2)
        elif luks2 is not None:
            node = self._open_luks(config, luks2, broker)
        elif jindisk is not None:
            node = self._open_jindisk(config, jindisk, broker)
        else:
            assert jindisk1 is not None, "checked with the configuration"
            node = self._open_jindisk1(config, jindisk1, broker)
        self.progress.stage(Stage.UNLOCKED)
        return node

    def _key_source(self, config: GuestConfig, platform: Platform) -> GuestBroker:
        """Where the key comes from: the broker, or a program that takes its place for volumes with a raw key."""
        if not config.key_program:
            return GuestBroker(config.broker, platform, config.report_source)
        if config.root.jindisk is not None:
            raise GuestFailure(Code.CONFIG)
        # Only here, so that it is not part of the initrd, and of what is measured, where it is not used.
        from jindiskd.guest import script

        luks2 = config.root.luks2
        volume = luks2.uuid if luks2 is not None else config.root.resource
        return cast("GuestBroker", script.KeyProgram(f"/{script.PATH}", config.image_id, volume))

    def _open_luks(self, config: GuestConfig, expectation: Luks2Expectation, broker: GuestBroker) -> Path:
        """Check the header before anything is asked of the broker: a wrong disk never causes a release."""
        with failing_with(Code.HEADER):
            volume = LuksRoot(Path(config.root.device), expectation)
        with broker.fetch(config.root.resource, self._broker_deadline_s(config), self._reported) as key:
            self._released()
            with failing_with(Code.KEY):
                volume_key = volume.unlock(key)
        with volume_key, failing_with(Code.ACTIVATION):
            return volume.activate(volume_key, config.root.mapping)

    def _open_by_secret(self, config: GuestConfig, expectation: Luks2Expectation) -> Path:
        """The guest was judged before it ran, and has its key."""
        with failing_with(Code.HEADER):
            volume = LuksRoot(Path(config.root.device), expectation)
        with contextlib.suppress(OSError):  # a kernel without securityfs has no efi_secret either
            mounts.mount_securityfs()
        area = config.secret or SecretArea(address=0, size_bytes=0)
        with failing_with(Code.SECRET):
            key = secret.disk_key(area.address, area.size_bytes)
        with key:
            self._released()
            with failing_with(Code.KEY):
                volume_key = volume.unlock(key)
        with volume_key, failing_with(Code.ACTIVATION):
            return volume.activate(volume_key, config.root.mapping)

    def _open_jindisk(self, config: GuestConfig, expectation: JindiskExpectation, broker: GuestBroker) -> Path:
        """The same order; freshness is decided by the anchor that comes with the key."""
        # Only here, so that the engine is not part of the initrd, and of what is measured, where it is not used.
        from jindiskd.guest import jindisk_root

        device = Path(config.root.device)
        with failing_with(Code.VOLUME):
            jindisk_root.check_identification(device, expectation)
        grant = broker.release(config.root.resource, expectation.uuid, self._broker_deadline_s(config), self._reported)
        self._released()
        left_s = self._began_s + config.timeout_s - time.monotonic()
        return jindisk_root.serve(
            device, expectation, grant, broker, timeout_s=max(left_s, 1.0), forget=self.progress.close
        )

    def _open_jindisk1(self, config: GuestConfig, expectation: Jindisk1Expectation, broker: GuestBroker) -> Path:
        """The same order; a kernel that cannot open the volume is told before a key is asked for."""
        from jindiskd.guest import jindisk1_root

        with failing_with(Code.VOLUME):
            volume = jindisk1_root.Jindisk1Root(Path(config.root.device), expectation)
        with broker.fetch(config.root.resource, self._broker_deadline_s(config), self._reported) as key:
            self._released()
            with failing_with(Code.KEY):
                layout = volume.unlock(key)
            with failing_with(Code.ACTIVATION):
                return volume.activate(key, layout, config.root.mapping)

    def _broker_deadline_s(self, config: GuestConfig) -> float:
        return self._began_s + config.timeout_s - min(AFTER_KEY_S, config.timeout_s / 4)

    def _reported(self) -> None:
        self.progress.stage(Stage.REPORT)

    def _released(self) -> None:
        self.progress.stage(Stage.ATTESTED)
        self.progress.stage(Stage.KEY)


def measured_config(path: Path = Path("/", guest_config.PATH)) -> GuestConfig:
    """The configuration in the initrd.

    Raises:
        GuestFailure: `CONFIG`: it is missing, or not what this agent understands.
    """
    with failing_with(Code.CONFIG):
        config = document.load(GuestConfig, path.read_bytes(), document="guest configuration")
        Platform(config.platform)
        root = config.root
        if config.schema != guest_config.SCHEMA or [root.luks2, root.jindisk, root.jindisk1].count(None) != 2:
            raise GuestFailure(Code.CONFIG)
        return config


def harden_kernel() -> Mapping[Path, str]:
    """No core dumps of ours, no limping on after an oops, a quiet console; returns what to put back at the end.

    The kernel cannot switch off in a panic: it restarts after a second, unless the measured command line says
    otherwise. Memory needs no locking, since no swap exists before the system's own init.
    """
    kernel.prctl(kernel.PR_SET_DUMPABLE, 0)
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    settings = {path: path.read_text(encoding="ascii") for path in (PRINTK, PANIC_ON_OOPS, PANIC)}
    PANIC_ON_OOPS.write_text("1", encoding="ascii")
    if settings[PANIC].strip() == "0":
        PANIC.write_text("1", encoding="ascii")
    PRINTK.write_text("3", encoding="ascii")  # what is worse than an error
    return settings


def soften_kernel(settings: Mapping[Path, str]) -> None:
    """Put back what `harden_kernel` returned."""
    for path, value in settings.items():
        path.write_text(value, encoding="ascii")


def main() -> NoReturn:
    """PID 1 of the initrd."""
    agent = Agent()
    code = Code.INTERNAL
    try:
        agent.run()
    except GuestFailure as failure:
        code = failure.code
    except BaseException:  # noqa: BLE001 - PID 1 may not end, and must not show why
        code = Code.INTERNAL
    power.give_up(code, agent.progress)
