"""The agent in the guest's initrd, as PID 1: report, key, root, hand-over; or a fixed code and power off.

Imports the standard library, cryptography, and of jindiskd only errors, base.secret, base.document, base.platform,
kbs, jindisk, luks2 and guest. It starts no program and reads no configuration but the measured file. Every module is
imported before the initrd's files are deleted.
"""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NoReturn

from jindiskd.base import document
from jindiskd.base.platform import Platform
from jindiskd.base.secret import Secret
from jindiskd.errors import JindiskError
from jindiskd.guest import config as guest_config
from jindiskd.guest import devices, kernel, modules, mounts, power, report, switch_root
from jindiskd.guest.codes import Code, GuestFailure
from jindiskd.guest.config import GuestConfig
from jindiskd.guest.luks_root import LuksRoot
from jindiskd.guest.progress import Progress, Stage
from jindiskd.kbs import client, evidence

SYSROOT = Path("/sysroot")
PRINTK = Path("/proc/sys/kernel/printk")
PANIC_ON_OOPS = Path("/proc/sys/kernel/panic_on_oops")
PANIC = Path("/proc/sys/kernel/panic")

# Kept back from the broker's time for what comes after the key, when the image allows enough.
AFTER_KEY_S = 10.0
DEVICE_WAIT_S = 15.0
CONNECT_S = 10.0


@contextlib.contextmanager
def failing_with(code: Code) -> Iterator[None]:
    """Any exception inside becomes `GuestFailure(code)`, and its text is lost."""
    try:
        yield
    except GuestFailure:
        raise
    except Exception:  # noqa: BLE001 - whatever it is, the host gets to see the code alone
        raise GuestFailure(code) from None


class Agent:
    """One boot."""

    def __init__(self) -> None:
        self.progress = Progress()
        self._began_s = time.monotonic()

    def run(self) -> NoReturn:
        """Boot the system.

        Raises:
            GuestFailure: it cannot be booted, or not safely.
        """
        with failing_with(Code.MOUNTS):
            mounts.mount_kernel_filesystems()
            power.silence()
        with failing_with(Code.CONFIG):
            config = document.load(
                GuestConfig, Path("/", guest_config.PATH).read_bytes(), document="guest configuration"
            )
            platform = Platform(config.platform)
            if config.schema != guest_config.SCHEMA or (config.root.luks2 is None) == (config.root.jindisk is None):
                raise GuestFailure(Code.CONFIG)
        watchdog = power.Watchdog(config.timeout_s, self.progress)
        printk = harden_kernel()
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
        node = self._open_luks(config, platform, device)
        with failing_with(Code.ROOT_MOUNT):
            mounts.mount_root(os.fspath(node), SYSROOT, config.root.filesystem, config.root.options)
        if not switch_root.find_init(SYSROOT, config.init):
            raise GuestFailure(Code.INIT_MISSING)
        with failing_with(Code.SWITCH_ROOT):
            PRINTK.write_text(printk, encoding="ascii")
            self.progress.stage(Stage.RUNNING)
            self.progress.close()
            switch_root.move_mounts(SYSROOT)
            old = switch_root.enter(SYSROOT)
            switch_root.delete_files(old)
            os.close(old)
            watchdog.stop()
            switch_root.start_init(config.init)

    def _open_luks(self, config: GuestConfig, platform: Platform, device: Path) -> Path:
        """Check the header before anything is asked of the broker: a wrong disk never causes a release."""
        assert config.root.luks2 is not None
        with failing_with(Code.HEADER):
            volume = LuksRoot(device, config.root.luks2)
        with self._fetch(config, platform) as key, failing_with(Code.KEY):
            volume_key = volume.unlock(key)
        with volume_key, failing_with(Code.ACTIVATION):
            node = volume.activate(volume_key, config.root.mapping)
        self.progress.stage(Stage.UNLOCKED)
        return node

    def _fetch(self, config: GuestConfig, platform: Platform) -> Secret:
        """Attest and get the key."""
        with failing_with(Code.REPORT):
            source = report.source_for(platform)

        def prove(data: bytes) -> Mapping[str, object]:
            with failing_with(Code.REPORT):
                found = source.get(data)
                self.progress.stage(Stage.REPORT)
                return evidence.snp_to_json(found.report, found.table)

        def connect() -> socket.socket:
            stream = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
            try:
                stream.settimeout(CONNECT_S)
                stream.connect((config.broker.cid, config.broker.port))
            except OSError:
                stream.close()
                raise
            return stream

        reserve_s = min(AFTER_KEY_S, config.timeout_s / 4)
        with broker_failures():
            broker = client.KbsClient(
                connect,
                spki_sha256=config.broker.spki_sha256,
                deadline=self._began_s + config.timeout_s - reserve_s,
            )
            key = broker.fetch(platform.tee.value, config.root.resource, prove)
        self.progress.stage(Stage.ATTESTED)
        self.progress.stage(Stage.KEY)
        return key


REFUSALS = {
    "AttestationError": Code.EVIDENCE_REFUSED,
    "PolicyDeny": Code.POLICY_DENIED,
}


@contextlib.contextmanager
def broker_failures() -> Iterator[None]:
    """The client's errors as codes."""
    try:
        yield
    except GuestFailure:
        raise
    except client.BrokerNotTrusted:
        raise GuestFailure(Code.BROKER_NOT_TRUSTED) from None
    except client.BrokerUnreachable:
        raise GuestFailure(Code.BROKER_UNREACHABLE) from None
    except client.BrokerRefused as exc:
        raise GuestFailure(REFUSALS.get(exc.kind, Code.BROKER_TROUBLE)) from None
    except (client.BrokerMisbehaved, JindiskError, ValueError, EOFError):
        raise GuestFailure(Code.BROKER_MISBEHAVED) from None
    except OSError:
        raise GuestFailure(Code.BROKER_UNREACHABLE) from None


def harden_kernel() -> str:
    """No core dumps of ours, and no limping on after an oops; returns the console's log levels, to be put back.

    The kernel cannot switch off in a panic: it restarts after a second, unless the measured command line says
    otherwise. Memory needs no locking, since no swap exists before the system's own init.
    """
    kernel.prctl(kernel.PR_SET_DUMPABLE, 0)
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    PANIC_ON_OOPS.write_text("1", encoding="ascii")
    if PANIC.read_text(encoding="ascii").strip() == "0":
        PANIC.write_text("1", encoding="ascii")
    printk = PRINTK.read_text(encoding="ascii")
    PRINTK.write_text("3", encoding="ascii")  # what is worse than an error
    return printk


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
