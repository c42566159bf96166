"""A host with block devices of its own for a service: real udevd, real rules, real helper, loop devices.

udevd, helper and service have a network namespace and a /run/udev of their own: the machine's udevd, if there is one,
and its records are not touched.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
BIN = ROOT / ".venv/bin"
UDEVD = Path("/lib/systemd/systemd-udevd")
# The rules that a packaged system has, with the program of this tree; and nothing that fills /dev of the machine.
START = """
set -e
mkdir -p /run/udev /dev/disk
mount -t tmpfs tmpfs /run/udev
mount -t tmpfs tmpfs /dev/disk
mkdir /run/udev/rules.d
sed 's,@LIBEXEC@,{bin},' {rules} >/run/udev/rules.d/62-jindisk.rules
env -u NOTIFY_SOCKET {udevd} --daemon >{folder}/udevd.log 2>&1
udevadm trigger --action=change --subsystem-match=block --sysname-match="loop*"
udevadm settle --timeout=60
env -u NOTIFY_SOCKET {python} -I -m jindiskd.helper --user root --run {folder}/helper --states {folder}/run/states \\
    --listen {folder}/helper.socket &
exec "$@"
"""


class DeviceHost:
    """The service among its devices."""

    def __init__(self, daemon: Any) -> None:
        self.daemon = daemon
        folder = daemon.folder
        with daemon.configuration.open("a") as file:
            file.write(f'[devices]\nhelper = "{folder}/helper.socket"\n')
        self.script = folder / "start"
        values = {"bin": BIN, "python": BIN / "python", "udevd": UDEVD, "folder": folder}
        self.script.write_text(START.format(rules=ROOT / "udev/62-jindisk.rules", **values))
        self.loops: list[str] = []
        self.watching: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        prefix = ["unshare", "--mount", "--propagation", "private", "--net", "--pid", "--fork", "--kill-child",
                  "--mount-proc", "sh", str(self.script)]  # fmt: skip
        self.daemon.start(prefix=prefix)

    def kill(self) -> None:
        """Service, helper and udevd at once: their namespace ends."""
        self.daemon.process.kill()
        self.daemon.process.wait()

    def plug(self, file: Path, *, offset: int = 0, size: int = 0) -> str:
        window = ["--offset", str(offset), "--sizelimit", str(size)] if size else []
        done = subprocess.run(["losetup", "-f", "--show", *window, file], capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"no loop device: {done.stderr.strip()}")
        self.loops.append(done.stdout.strip())
        return self.loops[-1]

    def unplug(self, node: str) -> None:
        subprocess.run(["losetup", "-d", node], check=True)
        self.loops.remove(node)

    def monitor(self, path: Path) -> None:
        """Have another program write down which objects come and go."""
        rule = "type='signal',interface='org.freedesktop.DBus.ObjectManager'"
        with path.open("wb") as file:
            self.watching = subprocess.Popen(["dbus-monitor", "--address", self.daemon.address, rule], stdout=file)

    def close(self) -> None:
        for node in list(self.loops):
            self.unplug(node)
        if self.watching is not None:
            self.watching.kill()
            self.watching.wait()

    def devices(self) -> dict[str, dict[str, object]]:
        return {item["Node"]: item for item in self.daemon.json("device", "list")["devices"]}

    def until(self, condition: Callable[[], object], what: str) -> None:
        limit = time.monotonic() + 240
        while not condition():
            assert time.monotonic() < limit, f"{what}: {self.devices()}\n{self.daemon.log.read_text()[-3000:]}"
            time.sleep(0.1)

    def anchor(self) -> tuple[bool, int]:
        """Open or closed, and the sequence number, of the one volume."""
        (volume,) = self.daemon.json("key", "show", "web")["volumes"]
        return volume


def root_of(disk: Path) -> tuple[int, int]:
    """Where the encrypted root lies, by another program."""
    table = json.loads(subprocess.check_output(["sfdisk", "--json", disk]))["partitiontable"]
    part = next(part for part in table["partitions"] if part["name"] == "jindisk-rootfs")
    return part["start"] * 512, part["size"] * 512
