"""Seconds from power-on to the system's init, with and without the unlock, for one kernel and one root.

    .venv/bin/python bench/startup/boot.py [--runs 3] [--json]

Four ways to the same small root, in turns, under emulation (TCG), with a virtio disk and real AF_VSOCK in the guest:

* `plain`: our initrd's interpreter and kernel modules, and a few lines that mount the disk as it is. No broker, no
  key: the difference to the next two is what attestation, release and unlock cost.
* `luks2`, `jindisk`: our initrd with the agent; the broker is the real one, the firmware the simulated one.
* `debian`: the initrd that Debian's own kernel package made, with the plain disk: what people are used to.

Power-on is the start of QEMU, and init is the first line that the root's own init prints on the console.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import structlog

from jindiskd.attest.snp import SnpVerifier
from jindiskd.base import files
from jindiskd.base.platform import Platform
from jindiskd.base.secret import Secret
from jindiskd.broker.identity import TlsIdentity
from jindiskd.broker.listener import listen_unix
from jindiskd.broker.service import Broker, BrokerLimits, Peer
from jindiskd.guest.config import BrokerPin, GuestConfig, JindiskExpectation, RootVolume
from jindiskd.image import initrd, python_closure
from jindiskd.image.cpio import Archive
from jindiskd.keys.store import Store
from jindiskd.keys.volumes import Volumes
from jindiskd.sim.firmware import SimulatedSnpFirmware
from jindiskd.sim.pki import SimulatedRoot
from jindiskd.sim.process import answer

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests/guest"))

import qemu
import qemu_kernel
import testroot

DIGEST = bytes(48)
LIMIT_S = 300
SIGN = "ROOT-SEES"
PLAIN = """#!/usr/bin/{python} -ISB
import os, time
from pathlib import Path
from jindiskd.guest import modules, mounts, rootdisk, switch_root
mounts.mount_kernel_filesystems()
modules.load_modules(map(Path, {modules!r}))
rootdisk.find("/dev/vda", time.monotonic() + 60, lambda node: node)
mounts.mount_root("/dev/vda", Path("/sysroot"), "ext4", "ro")
switch_root.move_mounts(Path("/sysroot"))
old = switch_root.enter(Path("/sysroot"))
switch_root.delete_files(old)
os.close(old)
switch_root.start_init("/sbin/init")
"""


class Bench:
    """One kernel, one root in the clear and in both encrypted forms, and a broker with both keys."""

    def __init__(self, folder: Path) -> None:
        kernel = qemu_kernel.find_kernel(folder / "kernel")
        if kernel is None or qemu.find_qemu() is None or qemu.find_vsock_device() is None:
            raise SystemExit(f"{qemu_kernel.MISSING}; QEMU and vhost-device-vsock are needed too")
        self.folder, self.kernel = folder, kernel
        clear = folder / "clear"
        clear.mkdir()
        self.clear = testroot.make_root(clear)
        self.luks = testroot.encrypt_root(self.clear, folder / "luks.img")
        self.jindisk = testroot.jindisk_root(self.clear, folder / "jindisk.img")
        self.root = SimulatedRoot.load_or_create(folder / "pki")
        self.identity = TlsIdentity.load_or_create(folder / "identity.pem")
        self.store = Store.open(f"sqlite:///{folder}/keys.db", Secret.random(32))
        for name, key in (("luks2", self.luks.key), ("jindisk", self.jindisk.key)):
            self.store.add_image(name, name, Platform.SIMULATED_SNP, f"default/{name}/root", key)
            self.store.activate(name, [DIGEST])
        Volumes(self.store).add(testroot.UUID, "jindisk", self.jindisk.anchor)

    def initrd(self, way: str) -> Path:
        """The initrd of one of our ways."""
        expectation = {
            "luks2": {"luks2": self.luks.expectation},
            "jindisk": {"jindisk": JindiskExpectation(version=2, uuid=testroot.UUID)},
        }.get(way, {"luks2": self.luks.expectation})
        config = GuestConfig(
            schema=1,
            image_id=testroot.UUID,
            platform="simulated-snp",
            modules=(),
            broker=BrokerPin(spki_sha256=self.identity.spki_sha256),
            root=RootVolume(device="/dev/vda", resource=f"default/{way}/root", options="ro", **expectation),
            timeout_s=LIMIT_S,
        )
        path = self.folder / f"initrd-{way}"
        made = initrd.build_initrd(config=config, modules_dir=self.kernel.modules, output=path)
        if way == "plain":
            # The same archive, and another archive behind it with another /init: the kernel unpacks both in turn.
            text = PLAIN.format(python=python_closure.python_name(), modules=made.modules)
            archive = Archive()
            archive.file("init", text.encode(), 0o755)
            files.replace_file(path, path.read_bytes() + archive.to_gzip(0))
        return path

    def broker_ports(self) -> _Served:
        return _Served(self)


class _Served:
    """Broker and firmware on the sockets of one machine, in an event loop of their own."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()

    def serve(self, directory: Path) -> None:
        asyncio.run_coroutine_threadsafe(self._listen(directory), self._loop).result(60)

    async def _listen(self, directory: Path) -> None:
        bench = self._bench
        broker = Broker(
            store=bench.store,
            verifiers=[SnpVerifier(roots=bench.root.roots, crls=[bench.root.crl])],
            allow_simulated=True,
            limits=BrokerLimits(),
        )
        self._listener = await listen_unix(broker, bench.identity, directory / "vsock_19012", Peer(description="guest"))

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self._listener.close(), self._loop).result(60)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


@contextmanager
def machine(bench: Bench, way: str, archive: Path) -> Iterator[qemu.Machine]:
    """A machine that goes one way, with all that it talks to."""
    disks = {"luks2": bench.luks.path, "jindisk": bench.jindisk.path}
    directory = Path(tempfile.mkdtemp(dir=bench.folder))
    more = " root=/dev/vda ro rootfstype=ext4 init=/sbin/init" if way == "debian" else ""
    disk, cmdline = disks.get(way, bench.clear), qemu.CMDLINE + more
    made = qemu.Machine(directory=directory, kernel=bench.kernel.kernel, initrd=archive, disk=disk, cmdline=cmdline)
    served = None
    if way in disks:
        made.record_progress()
        firmware = SimulatedSnpFirmware(bench.root, DIGEST)

        def report(stream: socket.socket) -> None:
            stream.sendall(answer(stream.recv(72, socket.MSG_WAITALL), firmware))

        made.serve(19013, report)
        served = bench.broker_ports()
        served.serve(directory)
    try:
        yield made
    finally:
        made.close()
        if served is not None:
            served.close()
        shutil.rmtree(directory)


def seconds_to_init(bench: Bench, way: str, archive: Path) -> float:
    """One boot."""
    with machine(bench, way, archive) as made:
        made.start()
        made.wait_for(SIGN, LIMIT_S)
        taken = time.monotonic() - made.began
        made.wait(LIMIT_S)
        return taken


def debian_initrd(folder: Path, kernel: Path) -> Path:
    """The initrd that Debian's package made for this kernel, out of the base image."""
    made = kernel.parent / kernel.name.replace("vmlinuz-", "initrd.img-")
    return Path(shutil.copy(made, folder / "initrd-debian"))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    os.environ["PATH"] += ":/usr/sbin:/sbin"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bench = Bench(folder)
        archives = {way: bench.initrd(way) for way in ("plain", "luks2", "jindisk")}
        archives["debian"] = debian_initrd(folder, bench.kernel.kernel)
        taken: dict[str, list[float]] = {way: [] for way in archives}
        for _ in range(arguments.runs):
            for way, archive in archives.items():
                taken[way].append(seconds_to_init(bench, way, archive))
        bench.store.close()
    median = {way: statistics.median(values) for way, values in taken.items()}
    if arguments.json:
        print(json.dumps({"runs": arguments.runs, "seconds": taken, "median": median}, indent=2))
        return 0
    version = subprocess.run([qemu.find_qemu() or "", "--version"], capture_output=True, text=True, check=True).stdout
    print(f"power-on to init, median of {arguments.runs}, {version.splitlines()[0]}, TCG")
    print(f"{'way':>8} {'seconds':>8} {'of plain':>9} {'unlock s':>9}")
    for way, value in median.items():
        print(f"{way:>8} {value:>8.2f} {value / median['plain']:>9.2f} {value - median['plain']:>9.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
