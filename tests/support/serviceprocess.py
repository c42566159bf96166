"""The service as a process on a bus of its own, and the command line against it."""

import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonout import check

SCRIPTS = Path(sys.executable).parent


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

    def ctl(self, *words: str, status: int | None = 0) -> str:
        """Run jindiskctl; returns its standard output, or with another status than 0 its standard error, if any.

        With None any status but 0 is as good as another.
        """
        with self.spawn(*words) as process:
            out, err = process.communicate(timeout=300)
        fits = process.returncode == status if status is not None else process.returncode != 0
        assert fits, f"{words}: {process.returncode}\n{out}\n{err}\n{self.log.read_text()}"
        return out if status == 0 or not err else err

    def json(self, *words: str) -> Any:
        """What jindiskctl --json prints, held against the schema of the command."""
        found = json.loads(self.ctl("--json", *words))
        check(words, found)
        return found
