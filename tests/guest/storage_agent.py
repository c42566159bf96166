"""Runs in a guest: a root served by the storage process from a volume without any encryption."""

import contextlib
import os
import sys
import time
from pathlib import Path

from jindiskd.guest import agent, devices, kernel, modules, mounts, power, rootdisk, storage, switch_root


class Plain:
    """A disk as it is. Says on the console when it is closed, and with how many requests of each kind."""

    def __init__(self, path: str) -> None:
        self.fd = os.open(path, os.O_RDWR)
        self.size_bytes = devices.size_bytes(self.fd)
        self.console = os.open("/dev/console", os.O_WRONLY | os.O_NOCTTY)
        self.counts = {"read": 0, "write": 0, "flush": 0, "discard": 0}

    def read(self, offset: int, length: int) -> bytes:
        self.counts["read"] += 1
        return os.pread(self.fd, length, offset)

    def write(self, offset: int, data: bytes) -> None:
        self.counts["write"] += 1
        if os.pwrite(self.fd, data, offset) != len(data):
            raise OSError(5, "short write")

    def flush(self) -> None:
        self.counts["flush"] += 1
        os.fdatasync(self.fd)

    def discard(self, offset: int, length: int) -> None:
        self.counts["discard"] += 1

    def close(self) -> None:
        self.flush()
        with contextlib.suppress(OSError):
            os.write(self.console, f"\nVOLUME-CLOSED {self.counts}\n".encode())


def main(device: str, init: str) -> None:
    try:
        mounts.mount_kernel_filesystems()
        modules.load_modules(Path(line) for line in Path("/modules.list").read_text().split())
        rootdisk.find(device, time.monotonic() + 200, lambda node: node)
        storage.start(lambda: Plain(device), lambda exc: type(exc).__name__.encode(), timeout_s=20)
        mounts.mount_root(os.fspath(storage.node(0)), agent.SYSROOT, "ext4", "ro")
        switch_root.keep_initrd()
        switch_root.move_mounts(agent.SYSROOT)
        os.close(switch_root.enter(agent.SYSROOT))
        switch_root.start_init(init)
    except BaseException as exc:  # noqa: BLE001 (PID 1 may not end)
        os.write(2, f"\nSTORAGE-AGENT {exc!r} {getattr(exc, 'said', b'')!r} {sys.exc_info()[2].tb_lineno}\n".encode())
        kernel.reboot(kernel.REBOOT_POWER_OFF)
        power.power_off()
