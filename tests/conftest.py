"""What all tests share."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests/support"))

from messagebus import message_bus  # noqa: E402 (as below)
from processes import own_children  # noqa: E402 (found by the line above)
from recorder import Recorder  # noqa: E402 (as above)


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--regenerate` rewrites golden files, so that their difference is reviewed with the change."""
    parser.addoption("--regenerate", action="store_true", help="rewrite golden files instead of comparing with them")
    parser.addoption("--record", type=Path, metavar="FILE", help="put each test's result into this file when it ends")


def pytest_configure(config: pytest.Config) -> None:
    """With `--record`, have results written down."""
    if path := config.getoption("--record"):
        config.pluginmanager.register(Recorder(path.absolute(), ROOT))


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[Path, str], None]:
    """Compare a text with a golden file, or write it."""

    def compare(path: Path, text: str) -> None:
        if request.config.getoption("--regenerate"):
            path.write_text(text)
        assert path.read_text() == text, f"{path.name} differs; `pytest --regenerate` rewrites it"

    return compare


@pytest.fixture(scope="session")
def vectors() -> Path:
    """The folder of recorded data to test against; a test that needs it is skipped where it is not there."""
    found = Path(os.environ.get("JINDISK_VECTORS", ROOT.parent / "shared" / "vectors"))
    if not found.is_dir():
        pytest.skip(f"the recorded test data is not at {found}; set JINDISK_VECTORS to its folder")
    return found


@pytest.fixture(scope="session")
def firmware() -> Path:
    """Firmware with a page for kernel hashes, which `scripts/setup` puts there."""
    found = Path(os.environ.get("JINDISK_OVMF", ROOT / "build/tools/usr/share/ovmf")) / "OVMF.amdsev.fd"
    if not found.is_file():
        pytest.skip(f"no firmware for confidential guests at {found}: run scripts/setup, or set JINDISK_OVMF")
    return found


@pytest.fixture
def left_processes() -> Callable[[], set[int]]:
    """Child processes that the test has started and not ended; services that other tests share do not count."""
    before = own_children()
    return lambda: own_children() - before


@pytest.fixture
def bus_of_one() -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A message bus for one test: address and process."""
    with message_bus() as found:
        yield found


@pytest.fixture
def private_bus(bus_of_one: tuple[str, subprocess.Popen[bytes]]) -> str:
    """Address of the message bus of this test."""
    return bus_of_one[0]


@pytest.fixture
def bus_process(bus_of_one: tuple[str, subprocess.Popen[bytes]]) -> subprocess.Popen[bytes]:
    """The message bus of this test."""
    return bus_of_one[1]


@pytest.fixture(scope="session")
def session_bus() -> Iterator[str]:
    """Address of a message bus for tests that leave nothing on it."""
    with message_bus() as found:
        yield found[0]
