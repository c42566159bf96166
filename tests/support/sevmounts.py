"""A host with SEV, as far as files show it: the stand-in emulator in QEMU's place, and a platform device.

Inside scripts/testenv alone: the mounts are of its namespace, and nobody else sees them.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import stat
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import sevhost

from jindiskd.sim.sev_platform import SevPlatformKeys

EMULATOR = Path("/usr/bin/qemu-system-x86_64")
DEVICE = Path("/dev/sev")
CAPABILITIES = Path("/var/cache/libvirt/qemu/capabilities")


def _overlay(target: str, scratch: Path) -> None:
    name = target.strip("/").replace("/", "-")
    for part in ("up", "work"):
        (scratch / f"{name}.{part}").mkdir(parents=True)
    options = f"lowerdir={target},upperdir={scratch / name}.up,workdir={scratch / name}.work"
    subprocess.run(["mount", "-t", "overlay", "overlay", "-o", options, target], check=True)


@contextlib.contextmanager
def _uncovered(scratch: Path) -> Iterator[None]:
    """What is mounted below /dev, out of the way: libvirt moves each such mount it reads of, and must find it."""
    lines = Path("/proc/mounts").read_text().splitlines()
    places = [line.split()[1] for line in lines if line.split()[1].startswith("/dev/")]
    kept = [scratch / "moved" / str(number) for number in range(len(places))]
    for place, keep in reversed(list(zip(places, kept, strict=True))):  # the last is the topmost
        if Path(place).is_dir():
            keep.mkdir(parents=True, exist_ok=True)
        else:
            keep.parent.mkdir(parents=True, exist_ok=True)
            keep.touch()
        subprocess.run(["mount", "--move", place, keep], check=True)
    try:
        yield
    finally:
        for place, keep in zip(places, kept, strict=True):
            subprocess.run(["mount", "--move", keep, place], check=True)


@contextlib.contextmanager
def sev_host(scratch: Path, processor: Path) -> Iterator[None]:
    """The stand-in emulator asks the simulated secure processor at `processor`; everything is as before afterwards."""
    assert os.environ.get("JD_TESTENV") == "1", "the machine's own files are left alone"
    scratch.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=755", "tmpfs", scratch], check=True)
    try:
        with _uncovered(scratch):
            _overlay("/dev", scratch)
        os.mknod(DEVICE, stat.S_IFCHR | 0o600, os.makedev(1, 3))
        _overlay("/usr/bin", scratch)
        real = EMULATOR.with_name("qemu-system-x86_64.real")
        EMULATOR.rename(real)
        sevhost.install(EMULATOR, qemu=real, processor=processor)
        yield
    finally:
        subprocess.run(["umount", "-l", "/usr/bin"], check=False)
        if DEVICE.exists():
            with _uncovered(scratch):
                subprocess.run(["umount", "-l", "/dev"], check=True)
        subprocess.run(["umount", "-l", scratch], check=False)
        shutil.rmtree(CAPABILITIES, ignore_errors=True)


@contextlib.contextmanager
def sev_machine(name: str, keys: SevPlatformKeys) -> Iterator[None]:
    """The same with a processor of this platform, in a thread of this process. `name` is one that nobody else uses."""
    socket = Path(f"/run/sev-processor-{name}.sock")
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    processor = sevhost.SevHost(keys, socket)
    try:
        asyncio.run_coroutine_threadsafe(processor.start(), loop).result(60)
        with sev_host(Path(f"/run/sev-mounts-{name}"), socket):
            yield
    finally:
        asyncio.run_coroutine_threadsafe(processor.stop(), loop).result(60)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(60)
        loop.close()
