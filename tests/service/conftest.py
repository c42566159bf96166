"""The whole service as a process on a bus of its own, and the real command line against it."""

import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from smallroot import root_archive

from jindiskd.sim.pki import SimulatedRoot

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPTS = Path(sys.executable).parent
@pytest.fixture(scope="session")
def rootfs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small root file system as a tar archive."""
    missing = [name for name in ("mke2fs", "debugfs", "mkfs.vfat", "mcopy") if not shutil.which(name)]
    if missing:
        pytest.skip(f"these programs are not installed: {', '.join(missing)}")
    path = tmp_path_factory.mktemp("base") / "root.tar"
    path.write_bytes(root_archive(padding_bytes=0))
    return path


@pytest.fixture(scope="session")
def large_rootfs(rootfs: Path) -> Path:
    """One that takes seconds to build."""
    path = rootfs.with_name("large.tar")
    path.write_bytes(root_archive(padding_bytes=300 << 20))
    return path


@pytest.fixture(scope="session")
def firmware(vectors: Path) -> Path:
    """Firmware with a page for kernel hashes."""
    found = vectors / "attestation/measure/ovmf_AmdSev_suffix.bin"
    if not found.is_file():
        pytest.skip(f"the recorded firmware is not at {found}")
    return found


@pytest.fixture(scope="session")
def simulated_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Takes seconds to make: made once."""
    path = tmp_path_factory.mktemp("pki") / "root"
    SimulatedRoot.load_or_create(path)
    return path


class Daemon:
    """A jindiskd of one's own."""

    def __init__(self, folder: Path, address: str, firmware: Path, simulated_root: Path) -> None:
        self.folder, self.address = folder, address
        self.state, self.log = folder / "state", folder / "log"
        self.configuration = folder / "jindiskd.toml"
        self.state.mkdir()
        shutil.copytree(simulated_root, self.state / "simulated-root")
        self.configuration.write_text(
            f"""
[service]
state_dir = "{self.state}"
runtime_dir = "{folder}/run"
log_level = "debug"
[images]
firmware = "{firmware}"
platform = "simulated-snp"
[broker]
allow_simulated = true
[domains]
libvirt_uri = "test:///none"
"""
        )
        self.environment = {"PATH": os.environ["PATH"], "DBUS_SYSTEM_BUS_ADDRESS": address, "LC_ALL": "C.UTF-8"}
        self.notifications = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.notifications.bind(str(folder / "notify"))
        (folder / "notify").chmod(0o666)
        self.process: subprocess.Popen[bytes] | None = None

    def start(
        self, *, uid: int | None = None, wait: bool = True, prefix: Sequence[str] = (), **environment: str
    ) -> None:
        """Start it, by another program if there is a prefix, and wait until it says that it is ready."""
        variables = {**self.environment, "NOTIFY_SOCKET": str(self.folder / "notify"), **environment}
        words = [*prefix, str(SCRIPTS / "jindiskd"), "--config", str(self.configuration)]
        if uid is not None:
            words = ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", *words]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(words, env=variables, stdout=log, stderr=log, cwd="/")
        if wait:
            self.told("READY=1")

    def told(self, line: str, seconds: float = 120) -> None:
        """Wait until the service manager would have been told something."""
        while True:
            readable, _, _ = select.select([self.notifications], [], [], seconds)
            assert readable, f"no {line}; the log says:\n{self.log.read_text()}"
            if line in self.notifications.recv(4096).decode().split("\n"):
                return

    def stop(self, number: int = signal.SIGTERM) -> int:
        """End it; returns its exit status."""
        assert self.process is not None
        self.process.send_signal(number)
        status = self.process.wait(timeout=120)
        self.process = None
        return status

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
        self.notifications.close()

    def spawn(self, *words: str, **more: Any) -> subprocess.Popen[str]:
        """Start jindiskctl."""
        return subprocess.Popen(
            [str(SCRIPTS / "jindiskctl"), *words],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **more,
        )

    def ctl(self, *words: str, status: int = 0) -> str:
        """Run jindiskctl; returns its standard output, or with another status than 0 its standard error, if any."""
        with self.spawn(*words) as process:
            out, err = process.communicate(timeout=300)
        assert process.returncode == status, f"{words}: {process.returncode}\n{out}\n{err}\n{self.log.read_text()}"
        return out if status == 0 or not err else err

    def json(self, *words: str) -> Any:
        """What jindiskctl --json prints."""
        return json.loads(self.ctl("--json", *words))


@pytest.fixture
def unstarted(private_bus: str, firmware: Path, simulated_root: Path) -> Iterator[Daemon]:
    """A service that is not running yet. Its folder can be reached by every user."""
    with tempfile.TemporaryDirectory(prefix="jindiskd-test-") as folder:
        Path(folder).chmod(0o755)
        found = Daemon(Path(folder), private_bus, firmware, simulated_root)
        yield found
        found.close()


@pytest.fixture
def daemon(unstarted: Daemon) -> Daemon:
    """A running service."""
    unstarted.start()
    return unstarted


@pytest.fixture(scope="session")
def shared(session_bus: str, firmware: Path, simulated_root: Path) -> Iterator[Daemon]:
    """A running service for tests that leave nothing in it."""
    with tempfile.TemporaryDirectory(prefix="jindiskd-test-") as folder:
        found = Daemon(Path(folder), session_bus, firmware, simulated_root)
        found.start()
        yield found
        found.stop()
        found.close()


@pytest.fixture(scope="session")
def stock(shared: Daemon, rootfs: Path) -> Daemon:
    """The shared service, with an image `stock`, for tests that only look."""
    shared.ctl("image", "build", "stock", "--rootfs", str(rootfs), "--vcpus", "2")
    return shared
