"""A message bus of one's own."""

import contextlib
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

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


@contextlib.contextmanager
def message_bus() -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A message bus whose policy lets everybody do everything: address and process."""
    if shutil.which("dbus-daemon") is None:
        pytest.skip("dbus-daemon is not installed")
    with tempfile.TemporaryDirectory(prefix="jindiskd-bus-") as name:
        folder = Path(name)
        folder.chmod(0o755)  # other users of the bus must get at its socket
        configuration = folder / "bus.conf"
        configuration.write_text(BUS_CONFIGURATION.format(socket=folder / "bus"))
        words = ["dbus-daemon", f"--config-file={configuration}", "--nofork", "--nopidfile", "--print-address=1"]
        with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as daemon:
            try:
                assert daemon.stdout is not None
                address = daemon.stdout.readline().decode().strip()
                assert address, "dbus-daemon did not start"
                yield address, daemon
            finally:
                daemon.terminate()
                daemon.wait(timeout=10)
