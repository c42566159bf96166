"""What all tests share."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def vectors() -> Path:
    """The folder of recorded data to test against; a test that needs it is skipped where it is not there."""
    found = Path(os.environ.get("JINDISK_VECTORS", ROOT.parent / "shared" / "vectors"))
    if not found.is_dir():
        pytest.skip(f"the recorded test data is not at {found}; set JINDISK_VECTORS to its folder")
    return found


BUS_CONFIGURATION = """<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig>
  <type>system</type>
  <listen>unix:path={socket}</listen>
  <auth>EXTERNAL</auth>
  <policy context="default">
    <allow user="*"/>
    <allow own="*"/>
    <allow send_destination="*" eavesdrop="false"/>
    <allow send_type="*"/>
    <allow receive_type="*"/>
  </policy>
</busconfig>
"""


@pytest.fixture
def private_bus(tmp_path: Path) -> Iterator[str]:
    """Address of a message bus of one's own, whose policy lets everybody do everything."""
    if shutil.which("dbus-daemon") is None:
        pytest.skip("dbus-daemon is not installed")
    socket = tmp_path / "bus"
    configuration = tmp_path / "bus.conf"
    configuration.write_text(BUS_CONFIGURATION.format(socket=socket))
    tmp_path.chmod(0o755)  # other users of the bus must get at its socket
    with subprocess.Popen(
        ["dbus-daemon", f"--config-file={configuration}", "--nofork", "--nopidfile", "--print-address=1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as daemon:
        try:
            assert daemon.stdout is not None
            address = daemon.stdout.readline().decode().strip()
            assert address, "dbus-daemon did not start"
            yield address
        finally:
            daemon.terminate()
            daemon.wait(timeout=10)
