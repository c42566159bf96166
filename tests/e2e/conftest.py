"""The whole service on a throw-away host: real bus, real libvirtd, real guests by emulation."""

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

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


class Host:
    """The service and its command line."""

    def __init__(self, state: Path) -> None:
        self.state = state
        self.log = state / "jindiskd.log"
        (state / "tools").mkdir(parents=True)
        state.chmod(0o711)
        shutil.copy(TOOLS / "share/ovmf/OVMF.fd", state / "tools/OVMF.fd")
        shutil.copy(TOOLS / "bin/vhost-device-vsock", state / "tools/vhost-device-vsock")
        (state / "jindiskd.toml").write_text(CONFIG.format(state=state))
        self.daemon: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.daemon = subprocess.Popen(
                [ROOT / ".venv/bin/jindiskd", "--config", str(self.state / "jindiskd.toml")], stdout=log, stderr=log
            )
        for _ in range(100):
            if self.ctl("status", check=False).returncode == 0:
                return
            time.sleep(0.1)
        raise AssertionError(f"the service did not come up:\n{self.log.read_text()[-3000:]}")

    def stop(self) -> None:
        if self.daemon is not None:
            self.daemon.terminate()
            assert self.daemon.wait(30) == 0
            self.daemon = None

    def ctl(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [ROOT / ".venv/bin/jindiskctl", *words], capture_output=True, text=True, timeout=1000, check=False
        )
        if check:
            assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}\n{self.log.read_text()[-3000:]}"
        return done

    def json(self, *words: str) -> Any:
        return json.loads(self.ctl(*words, "--json").stdout)

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
            time.sleep(2)

    def refusal(self) -> list[str]:
        """The findings of the last refusal in the audit log."""
        row = self.rows()[-1]
        assert row["kind"] == "refused"
        return list(row["findings"])

    def rows(self, image: str | None = None) -> list[dict[str, Any]]:
        """The audit log, of one image if it is named."""
        words = ["--image", self.json("image", "show", image)["image"]["ImageId"]] if image else []
        rows = self.json("audit", "list", *words)
        return rows if isinstance(rows, list) else next(value for value in rows.values() if isinstance(value, list))

    def key(self, image: str) -> dict[str, Any]:
        """What is known of an image's key and volume."""
        return dict(self.json("key", "show", image)["key"])


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    if os.environ.get("JD_TESTENV") != "1":
        pytest.skip("this needs a throw-away host: run it by scripts/testenv")
    for needed in (TOOLS / "bin/vhost-device-vsock", BASE):
        if not needed.exists():
            pytest.skip(f"{needed.name} is not there: scripts/setup and scripts/make-base-image make it")
    made = Host(Path("/var/lib/jindiskd-e2e"))
    made.start()
    made.ctl("image", "build", "web", "--base", str(BASE))
    try:
        yield made
    finally:
        for domain in made.json("domain", "list")["domains"]:
            made.ctl("domain", "stop", domain["Name"], "--force", "--yes", check=False)
            made.ctl("domain", "undefine", domain["Name"], "--yes", check=False)
        made.stop()
