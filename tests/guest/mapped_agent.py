"""Runs in a guest: a root below which a mapping of the kernel's lies, as with a JinDisk 1 volume; and its end."""

import errno
import json
import os
import sys
import time
from pathlib import Path

from jindiskd.guest import agent, devices, dm, kernel, modules, mounts, power, rootdisk, shutdown, switch_root, udev

HELD = Path("/held")
END_MAPPING = shutdown.end_mapping


def sectors_of(device: str) -> int:
    with Path(device).open("rb") as opened:
        return devices.size_bytes(opened.fileno()) // 512


def mapping(name: str, device: str) -> dm.Mapping:
    """A `linear` mapping of a whole device."""
    number = Path(device).stat().st_rdev
    below = bytearray(f"{os.major(number)}:{os.minor(number)} 0".encode())
    return dm.activate(name, f"TEST-{name}", sectors=sectors_of(device), kind="linear", parameters=below)


def main(device: str, init: str) -> None:
    try:
        mounts.mount_kernel_filesystems()
        modules.load_modules(Path(line) for line in Path("/modules.list").read_text().split())
        rootdisk.find(device, time.monotonic() + 200, lambda node: node)
        udev.publish(mapping("root", device))
        shutdown.remember_mapping("root", "TEST-root", sectors_of(device), Path(device))
        # Written now: at the end everything is read-only.
        shutdown.remember_mapping("held", "TEST-held", sectors_of("/dev/vda1"), Path("/dev/vda1"), HELD)
        mounts.mount_root("/dev/mapper/root", agent.SYSROOT, "ext4", "rw")
        switch_root.keep_initrd()
        switch_root.move_mounts(agent.SYSROOT)
        os.close(switch_root.enter(agent.SYSROOT))
        switch_root.start_init(init)
    except BaseException as exc:  # noqa: BLE001 (PID 1 may not end)
        os.write(2, f"\nMAPPED-AGENT {exc!r} {sys.exc_info()[2].tb_lineno}\n".encode())
        kernel.reboot(kernel.REBOOT_POWER_OFF)
        power.power_off()


def mapped() -> list[str]:
    return sorted(path.name for path in Path("/sys/block").glob("dm-*"))


def held() -> list[object]:
    """What becomes of a mapping that somebody has open: of another one, made now."""
    descriptor = os.open(mapping("held", "/dev/vda1").node, os.O_RDONLY)
    ended = END_MAPPING(HELD, limit_s=0.5)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.pread(descriptor, 4096, 0)
    except OSError as exc:
        return [ended, errno.errorcode[exc.errno]]
    return [ended, "read"]


def say(words: str) -> None:
    with Path("/dev/console").open("wb", buffering=0) as console:
        console.write(f"\n{words}\n".encode())


def end() -> None:
    """The shutdown program, which also says what it meets and leaves."""
    def noting() -> bool:
        try:
            text = Path("/proc/self/mounts").read_text()
            seen: dict[str, object] = {
                "mounts": [str(path) for path in shutdown.mounts_below(text, shutdown.OLD_ROOT)],
                "before": mapped(),
                "ended": END_MAPPING(),
                "after": mapped(),
            }
            seen["held"] = held()
            say(f"MAPPING-ENDED {json.dumps(seen)}")
        except BaseException as exc:  # noqa: BLE001 (the machine goes off next)
            say(f"END-FAILED {exc!r} line {exc.__traceback__.tb_lineno if exc.__traceback__ else 0}")
        return True

    shutdown.end_mapping = noting
    shutdown.main()
