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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from jindiskd.base import document
from jindiskd.base.platform import Platform
from jindiskd.guest import config as guest_config
from jindiskd.guest import kernel, modules, mounts, power, switch_root
from jindiskd.guest.broker import failing_with
from jindiskd.guest.codes import Code, GuestFailure
from jindiskd.guest.config import GuestConfig
from jindiskd.guest.opening import Opening
from jindiskd.guest.progress import Progress, Stage

SYSROOT = Path("/sysroot")
PRINTK = Path("/proc/sys/kernel/printk")
PANIC_ON_OOPS = Path("/proc/sys/kernel/panic_on_oops")
PANIC = Path("/proc/sys/kernel/panic")

class Agent:
    """One boot."""

    def __init__(self, progress: Progress | None = None) -> None:
        self.progress = progress or Progress()
        self.opening: Opening | None = None
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
        nodes = self.open_volumes(config)
        with failing_with(Code.ROOT_MOUNT):
            mounts.mount_root(os.fspath(nodes[0]), SYSROOT, config.root.filesystem, config.root.options)
        if not switch_root.find_init(SYSROOT, config.init):
            raise GuestFailure(Code.INIT_MISSING)
        mount_volumes(config, nodes[1:], SYSROOT)
        with failing_with(Code.SWITCH_ROOT):
            soften_kernel(settings)
            self.progress.stage(Stage.RUNNING)
            self.progress.close()
            kept = config.ends_volumes
            if kept:
                switch_root.keep_initrd()
            switch_root.move_mounts(SYSROOT)
            old = switch_root.enter(SYSROOT)
            if not kept:
                switch_root.delete_files(old)
            os.close(old)
            watchdog.stop()
            switch_root.start_init(config.init)

    def open_volumes(self, config: GuestConfig) -> list[Path]:
        """Load the modules, attest, and open all volumes; returns the nodes of the block devices, the root's first.

        Raises:
            GuestFailure: with the code for what went wrong.
        """
        with failing_with(Code.MODULES):
            modules.load_modules(Path(module) for module in config.modules)
        if Platform(config.platform) in {Platform.SNP, Platform.TDX}:
            # Without configfs the older device may still be there, and the report says what is missing.
            with contextlib.suppress(OSError):
                mounts.mount_configfs()
        self.progress.stage(Stage.BOOT)
        self.opening = Opening(config, self.progress, self._began_s)
        return self.opening.run()


def mount_volumes(config: GuestConfig, nodes: Sequence[Path], root: Path) -> None:
    """Mount the file systems of the further volumes in the system that is mounted at `root`, those above others first.

    Args:
        config: the measured configuration.
        nodes: of their open block devices, in the order of the configuration.
        root: where the system's root is mounted.

    Raises:
        GuestFailure: one cannot be mounted.
    """
    mounted = [(volume, node) for volume, node in zip(config.volumes, nodes, strict=True) if volume.mount]
    for volume, node in sorted(mounted, key=lambda one: Path(one[0].mount).parts):
        with failing_with(Code.DATA_MOUNT):
            mounts.mount_data(
                os.fspath(node),
                root,
                volume.mount,
                kind=volume.filesystem,
                options=volume.options,
                root_options=config.root.options,
            )


def measured_config(path: Path = Path("/", guest_config.PATH)) -> GuestConfig:
    """The configuration in the initrd.

    Raises:
        GuestFailure: `CONFIG`: it is missing, or not what this agent understands.
    """
    with failing_with(Code.CONFIG):
        config = document.load(GuestConfig, path.read_bytes(), document="guest configuration")
        Platform(config.platform)
        root = config.root
        sound = [root.luks2, root.jindisk, root.jindisk1].count(None) == 2
        sound &= all((volume.luks2 is None) != (volume.jindisk is None) for volume in config.volumes)
        if config.schema != guest_config.SCHEMA or not sound or len(config.volumes) > guest_config.MAX_VOLUMES:
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
    try:
        if agent.opening is not None:
            agent.opening.abandon()
    finally:
        power.give_up(code, agent.progress)
