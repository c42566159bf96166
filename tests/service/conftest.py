"""The whole service as a process on a bus of its own, and the real command line against it."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from serviceprocess import Daemon
from smallroot import root_archive

from jindiskd.sim.pki import SimulatedRoot


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
def simulated_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Takes seconds to make: made once."""
    path = tmp_path_factory.mktemp("pki") / "root"
    SimulatedRoot.load_or_create(path)
    return path


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
