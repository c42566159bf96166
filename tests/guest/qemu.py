"""A virtual machine under emulation, with real AF_VSOCK inside, for tests of the guest's part.

`vhost-device-vsock` carries the guest's connections to CID 2, port P to the unix socket `<vsock>_P`.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
VSOCK_PLACES = (
    ROOT / "build/tools/usr/bin/vhost-device-vsock",
    Path(os.environ.get("JINDISK_VHOST_DEVICE_VSOCK", "/usr/bin/vhost-device-vsock")),
)
CMDLINE = "console=ttyS0 quiet panic=5 noresume no_timer_check"
"""The check of the timer counts ticks against a busy machine's clock, and panics where an emulator was held up."""


def find_qemu() -> Path | None:
    found = shutil.which("qemu-system-x86_64")
    return Path(found) if found else None


def find_vsock_device() -> Path | None:
    for place in VSOCK_PLACES:
        if place.is_file():
            return place
    found = shutil.which("vhost-device-vsock")
    return Path(found) if found else None


class Port:
    """A listener for one vsock port; `serve` is called with each connection, in a thread."""

    def __init__(self, path: Path, serve: Callable[[socket.socket], None]) -> None:
        self.connections: list[float] = []
        self._serve = serve
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(os.fspath(path))
        self._listener.listen(16)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while True:
            try:
                stream, _ = self._listener.accept()
            except OSError:
                return
            self.connections.append(time.monotonic())
            threading.Thread(target=self._one, args=(stream,), daemon=True).start()

    def _one(self, stream: socket.socket) -> None:
        with stream:
            try:
                self._serve(stream)
            except OSError:
                return

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(5)


@dataclass
class Machine:
    """One run; everything it leaves is in `directory`."""

    directory: Path
    kernel: Path
    initrd: Path
    disk: Path | None = None
    more_disks: tuple[Path, ...] = ()
    serials: tuple[tuple[str, Path], ...] = ()
    """Disks with serial numbers, or without; they come before the others."""
    cmdline: str = CMDLINE
    memory: str = "1G"
    cid: int = 3
    vsock: bool = True
    began: float = 0.0
    lines: list[tuple[float, str]] = field(default_factory=list)
    ports: list[Port] = field(default_factory=list)
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def console(self) -> str:
        path = self.directory / "console"
        return path.read_text(errors="replace") if path.exists() else ""

    def serve(self, port: int, function: Callable[[socket.socket], None]) -> Port:
        listener = Port(self.directory / f"vsock_{port}", function)
        self.ports.append(listener)
        return listener

    def record_progress(self) -> None:
        """Collect the guest's progress lines with the seconds since power-on."""

        def read(stream: socket.socket) -> None:
            with stream.makefile("r", encoding="ascii") as text:
                for line in text:
                    self.lines.append((time.monotonic() - self.began, line.strip()))

        self.serve(19014, read)

    @property
    def stages(self) -> list[str]:
        return [line for _, line in self.lines]

    def start(self) -> None:
        binary, device = find_qemu(), find_vsock_device()
        assert binary is not None
        arguments = [
            os.fspath(binary), "-machine", "q35,accel=tcg,memory-backend=mem", "-cpu", "max", "-nodefaults",
            "-object", f"memory-backend-memfd,id=mem,size={self.memory},share=on", "-m", self.memory,
            "-display", "none", "-no-reboot", "-serial", f"file:{self.directory / 'console'}",
            "-kernel", os.fspath(self.kernel), "-initrd", os.fspath(self.initrd), "-append", self.cmdline,
        ]  # fmt: skip
        if self.disk is not None:
            arguments += ["-drive", f"if=virtio,format=raw,file={self.disk}"]
        for disk in self.more_disks:
            arguments += ["-drive", f"if=virtio,format=raw,file={disk}"]
        for number, (serial, disk) in enumerate(self.serials):
            # As many as there are may be of one file: nobody else writes it.
            arguments += ["-drive", f"if=none,id=serial{number},format=raw,file={disk},file.locking=off"]
            told = f",serial={serial}" if serial else ""
            arguments += ["-device", f"virtio-blk-pci,drive=serial{number}{told}"]
        if self.vsock:
            assert device is not None
            link = self.directory / "vhost"
            options = f"guest-cid={self.cid},socket={link},uds-path={self.directory / 'vsock'}"
            self._spawn([os.fspath(device), "--vm", options], "vsock.log")
            limit = time.monotonic() + 120
            while not link.exists():
                assert time.monotonic() < limit, self.directory.joinpath("vsock.log").read_text()
                time.sleep(0.02)
            arguments += ["-chardev", f"socket,id=vsock,path={link}", "-device", "vhost-user-vsock-pci,chardev=vsock"]
        self.began = time.monotonic()
        self._spawn(arguments, "qemu.log")

    def _spawn(self, arguments: list[str], name: str) -> None:
        with self.directory.joinpath(name).open("wb") as log:
            self.processes.append(subprocess.Popen(arguments, stdin=subprocess.DEVNULL, stdout=log, stderr=log))

    def wait(self, timeout: float) -> float:
        """Wait until the guest is off; returns how many seconds it ran."""
        try:
            self.processes[-1].wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the guest still runs after {timeout} s; {self.stages}\n{self.console}") from None
        return time.monotonic() - self.began

    def wait_for(self, text: str, timeout: float) -> None:
        """Wait until the guest has printed `text`."""
        limit = time.monotonic() + timeout
        while text not in self.console:
            ended = self.processes[-1].poll() is not None or time.monotonic() >= limit
            assert not ended, f"no {text!r} from the guest; {self.stages}\n{self.console}"
            time.sleep(0.05)

    def close(self) -> None:
        for process in reversed(self.processes):
            if process.poll() is None:
                process.kill()
            process.wait()
        for port in self.ports:
            port.close()
        self.ports.clear()
