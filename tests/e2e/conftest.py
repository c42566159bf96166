"""The whole service on a throw-away host: real bus, real libvirtd, real guests by emulation."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jsonout
import pytest
from played import Played
from smallroot import idle_kernel, root_archive

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "broker"))
from brokerprocess import BrokerProcess

from jindiskd.sim.pki import SimulatedRoot

ROOT = Path(__file__).resolve().parent.parent.parent
TOOLS = ROOT / "build/tools/usr"
BASE = ROOT / "build/base/debian.img"
CONFIG = """
[service]
state_dir = "{state}"
runtime_dir = "/run/jindiskd"
[images]
platform = "simulated-snp"
cpu_model = "EPYC-Milan"
firmware = "{state}/tools/OVMF.fd"
firmware_dirs = ["{state}/tools"]
[broker]
allow_simulated = true
[domains]
vhost_device_vsock = "{state}/tools/vhost-device-vsock"
launch_timeout_s = 900
"""


ROOT_TYPE = "4F68BCE3-E8CD-4DB1-96E7-FBCAF984B709"
"""Linux root (x86-64), Discoverable Partitions Specification."""
NOT_STARTED = (
    *(f"modprobe@{module}.service" for module in ("configfs", "dm_mod", "drm", "efi_pstore", "fuse", "loop")),
    "dev-hugepages.mount", "dev-mqueue.mount", "proc-sys-fs-binfmt_misc.automount", "sys-fs-fuse-connections.mount",
    "sys-kernel-config.mount", "sys-kernel-debug.mount", "sys-kernel-tracing.mount", "getty.target", "timers.target",
    "kmod-static-nodes.service", "systemd-journal-flush.service", "systemd-machine-id-commit.service",
    "systemd-modules-load.service", "systemd-pstore.service", "systemd-random-seed.service",
    "systemd-sysusers.service", "systemd-update-utmp.service", "systemd-update-utmp-runlevel.service",
    "systemd-user-sessions.service",
)  # fmt: skip
"""Units of Debian that no guest of a test is asked for: a fifth of what an emulator does for a boot."""


class Host:
    """The service and its command line."""

    def __init__(self, state: Path) -> None:
        self.state = state
        self.log = state / "jindiskd.log"
        (state / "tools").mkdir(parents=True)
        state.chmod(0o711)
        shutil.copy(TOOLS / "share/ovmf/OVMF.fd", state / "tools/OVMF.fd")
        shutil.copy(TOOLS / "bin/vhost-device-vsock", state / "tools/vhost-device-vsock")
        self.configuration.write_text(CONFIG.format(state=state))
        self.daemon: subprocess.Popen[bytes] | None = None
        self._ids: dict[str, str] = {}

    @property
    def configuration(self) -> Path:
        """The service's configuration file."""
        return self.state / "jindiskd.toml"

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.daemon = subprocess.Popen(
                [ROOT / ".venv/bin/jindiskd", "--config", str(self.state / "jindiskd.toml")], stdout=log, stderr=log
            )
        end = time.monotonic() + 120
        owned = ["busctl", "call", "org.freedesktop.DBus", "/org/freedesktop/DBus", "org.freedesktop.DBus"]
        owned += ["NameHasOwner", "s", "org.jindisk1"]
        # The command line itself takes of the processor what the service needs to start.
        while "true" not in subprocess.run(owned, capture_output=True, text=True, check=False).stdout or (
            self.ctl("status", check=False).returncode
        ):
            assert self.daemon.poll() is None, f"the service ended:\n{self.log.read_text()[-3000:]}"
            assert time.monotonic() < end, f"the service did not come up:\n{self.log.read_text()[-3000:]}"
            time.sleep(0.1)

    def stop(self) -> None:
        if self.daemon is not None:
            self.daemon.terminate()
            assert self.daemon.wait(120) == 0
            self.daemon = None

    def kill(self) -> None:
        assert self.daemon is not None
        self.daemon.send_signal(signal.SIGKILL)
        self.daemon.wait()
        self.daemon = None

    def ctl(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [ROOT / ".venv/bin/jindiskctl", *words], capture_output=True, text=True, timeout=1000, check=False
        )
        if check:
            assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}\n{self.log.read_text()[-3000:]}"
        return done

    def json(self, *words: str) -> Any:
        found = json.loads(self.ctl(*words, "--json").stdout)
        jsonout.check(words, found)
        return found

    def image(self, name: str) -> Path:
        return self.state / "images" / name

    def wait_console(self, name: str, text: str, times: int = 1, within_s: float = 900) -> str:
        """Wait until the guest has printed `text` so many times since it was started; returns all it has printed."""
        found = self.json("domain", "list")["domains"]
        uuid = next(domain["Uuid"] for domain in found if domain["Name"] == name)
        log = self.state / "console" / f"{uuid}.log"  # what `domain console` prints, without a process for each look
        end = time.monotonic() + within_s
        while True:
            said = log.read_text(errors="replace")
            if said.count(text) >= times:
                return said
            assert time.monotonic() < end, f"the guest did not say {text!r} {times} times:\n{said[-3000:]}"
            time.sleep(0.5)

    def wait_off(self, name: str, within_s: float = 900) -> None:
        """Wait until a domain has stopped."""
        end = time.monotonic() + within_s
        while self.json("domain", "show", name)["domain"]["State"] != "stopped":
            assert time.monotonic() < end, f"domain {name} did not stop:\n{self.log.read_text()[-3000:]}"
            time.sleep(0.5)

    def spawn(self, *words: str) -> subprocess.Popen[str]:
        """Start jindiskctl."""
        return subprocess.Popen(
            [ROOT / ".venv/bin/jindiskctl", *words],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def until(self, condition: Callable[[], Any], what: str, within_s: float = 120) -> None:
        """Wait for a condition."""
        end = time.monotonic() + within_s
        while not condition():
            assert time.monotonic() < end, f"{what} did not come:\n{self.log.read_text()[-3000:]}"
            time.sleep(0.05)

    def domain(self, name: str) -> dict[str, Any]:
        """What the service tells of a domain; nothing where it knows none."""
        found = [item for item in self.json("domain", "list")["domains"] if item["Name"] == name]
        return found[0] if found else {"State": ""}

    def play(self, name: str, launch: subprocess.Popen[str]) -> Played:
        """The guest of a domain, once its machine runs."""

        def there() -> bool:
            assert launch.poll() is None, f"the launch ended: {launch.communicate()}"
            return bool(self.domain(name)["State"] == "started")

        self.until(there, f"domain {name}")
        pin = bytes.fromhex(self.json("status")["service"]["BrokerSpkiSha256"])
        return Played(Path("/run/jindiskd/vsock") / self.domain(name)["Uuid"], pin)

    def resource(self, name: str) -> str:
        """Where the broker has the key of an image."""
        return str(json.loads((self.image(name) / "manifest.json").read_text())["resource"])

    def build_brisk(self, name: str, *words: str) -> None:
        """An image of the base whose guest leaves out the units of `NOT_STARTED`; `words` are more of its build."""
        base, script = self.state / "base.img", self.state / "mask"
        subprocess.run(["cp", "--sparse=always", BASE, base], check=True)
        table = json.loads(subprocess.check_output(["/usr/sbin/sfdisk", "--json", base]))["partitiontable"]
        (start,) = (part["start"] for part in table["partitions"] if part["type"] == ROOT_TYPE)
        folder = "/etc/systemd/system"
        script.write_text("".join(f"symlink {folder}/{unit} /dev/null\n" for unit in NOT_STARTED))
        command = ["/usr/sbin/debugfs", "-w", "-f", script, f"{base}?offset={start * table['sectorsize']}"]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        assert len(done.stderr.splitlines()) == 1, done.stderr  # its version, and no error
        self.ctl("image", "build", name, "--base", str(base), *words)
        base.unlink()

    def build_idle(self, name: str) -> None:
        """An image whose machine does nothing: its guest is played by the test."""
        archive = self.state / "root.tar"
        archive.write_bytes(root_archive(kernel=idle_kernel()))
        self.ctl("image", "build", name, "--rootfs", str(archive), "--format", "luks2")

    def strays(self) -> list[str]:
        """Processes that belong to machines of ours."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                except OSError:
                    continue
                if "vhost-device-vsock --vm" in line or "jindiskd.sim.process" in line or "qemu-system" in line[:40]:
                    found.append(line[:200])
        return found

    def clear(self) -> None:
        """Remove all domains, whatever state they are in."""
        for domain in self.json("domain", "list")["domains"]:
            self.ctl("domain", "stop", domain["Name"], "--force", "--yes", check=False)
            self.ctl("domain", "undefine", domain["Name"], "--yes", check=False)

    def refusal(self) -> list[str]:
        """The findings of the last refusal in the audit log."""
        row = self.rows()[-1]
        assert row["kind"] == "refused"
        return list(row["findings"])

    def rows(self, image: str | None = None) -> list[dict[str, Any]]:
        """The audit log, of one image if it is named."""
        if image and image not in self._ids:
            self._ids[image] = self.json("image", "show", image)["image"]["ImageId"]
        words = ["--image", self._ids[image]] if image else []
        return list(self.json("audit", "list", "--limit", "1000", *words)["rows"])

    def key(self, image: str) -> dict[str, Any]:
        """What is known of an image's key and volume."""
        return dict(self.json("key", "show", image)["key"])


def started(kind: str) -> Host:
    """A service of one's own, with a state directory of its own, or a skipped test."""
    needed(TOOLS / "bin/vhost-device-vsock", BASE)
    made = placed(kind)
    made.start()
    return made


def placed(kind: str) -> Host:
    """A service that is not started, with a state directory of its own."""
    return Host(Path(tempfile.mkdtemp(prefix=f"jindiskd-{kind}-", dir="/var/lib")))


def needed(*files: Path) -> None:
    """Skip where this is no throw-away host, or the set-up has not made these."""
    if os.environ.get("JD_TESTENV") != "1":
        pytest.skip("this needs a throw-away host: run it by scripts/testenv")
    for file in files:
        if not file.exists():
            pytest.skip(f"{file.name} is not there: scripts/setup and scripts/make-base-image make it")


def relay_to(made: Host, port: int) -> None:
    """Have guests passed on to a broker at this port of this machine, whose card is in the host's state directory."""
    text = made.configuration.read_text().replace("[broker]", '[broker]\ndeployment = "relay"')
    made.configuration.write_text(
        f'{text}\n[relay]\nbroker = "127.0.0.1:{port}"\ncard = "{made.state}/card.json"\n'
    )


@contextlib.contextmanager
def relaying(
    made: Host,
    folder: Path,
    image: str,
    *words: str,
    broker: Mapping[str, Any] | None = None,
    machine: contextlib.AbstractContextManager[object] | None = None,
) -> Iterator[BrokerProcess]:
    """An owner's broker, to which a host relays, with an image whose keys it has.

    Args:
        made: the host, not started.
        folder: for the broker's own.
        image: name of the image.
        words: more of its build.
        broker: settings of the broker.
        machine: around the host.
    """
    root = SimulatedRoot.load_or_create(made.state / "simulated-root")
    owner = BrokerProcess(folder / "broker", root, broker=broker or {})
    try:
        owner.start()
        owner.ctl("card", "--output", str(made.state / "card.json"))
        relay_to(made, owner.ports["guests"])
        with machine or contextlib.nullcontext():
            made.start()
            try:
                made.build_brisk(image, *words)
                made.ctl("key", "export", image, "--output", str(made.state / f"{image}.json"))
                owner.ctl("image", "import", str(made.state / f"{image}.json"))
                yield owner
            finally:
                made.clear()
                made.stop()
    finally:
        owner.close()


@contextlib.contextmanager
def cleared(made: Host) -> Iterator[Host]:
    """No domain is left behind, and the service is stopped, however the tests ended."""
    try:
        yield made
    finally:
        try:
            if made.daemon is None:
                made.start()
            made.clear()
        finally:
            made.stop()
            for name in virsh("list", "--all", "--name").split():
                virsh("destroy", name, check=False)
                virsh("undefine", name, "--nvram", check=False)


def virsh(*words: str, check: bool = True) -> str:
    command = ["virsh", "-q", "-c", "qemu:///system", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0 or not check, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    """A service with a Debian image, `web`."""
    with cleared(started("debian")) as made:
        made.build_brisk("web")
        yield made


@pytest.fixture(scope="module")
def bare() -> Iterator[Host]:
    """A service with two images, `one` and `two`, whose guests are played by the tests."""
    with cleared(started("played")) as made:
        made.build_idle("one")
        made.build_idle("two")
        yield made
