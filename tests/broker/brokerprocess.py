"""jindisk-broker as a process, jindiskctl against it, and guests that ask it over TCP."""

import io
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import jsonout
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from jindiskd.base import document
from jindiskd.base.platform import Platform
from jindiskd.base.secret import Secret
from jindiskd.cli.main import main
from jindiskd.kbs.client import KbsClient
from jindiskd.kbs.evidence import snp_to_json
from jindiskd.keys import handover
from jindiskd.keys.handover import HandedVolume, Handover
from jindiskd.sim.firmware import SimulatedSnpFirmware
from jindiskd.sim.pki import SimulatedRoot

SCRIPTS = Path(sys.executable).parent
DIGEST = bytes(range(48))
IMAGE = "11111111-1111-4111-8111-111111111111"
RESOURCE = f"default/{IMAGE}/root"
KEY = b"\x00the key that must not be seen.\n\xff"


class BrokerProcess:
    """One broker. Its folder holds all it has."""

    def __init__(self, folder: Path, root: SimulatedRoot, **settings: Mapping[str, Any]) -> None:
        self.folder, self.log, self.configuration = folder, folder / "log", folder / "broker.toml"
        folder.mkdir(exist_ok=True)
        ark = folder / "ark.pem"
        ark.write_bytes(x509.load_der_x509_certificate(root.ark).public_bytes(Encoding.PEM))
        sections: dict[str, dict[str, Any]] = {
            "service": {"state_dir": f"{folder}/state", "runtime_dir": f"{folder}/run", "log_level": "debug"},
            "listen": {"guests": "127.0.0.1:0", "admin": "127.0.0.1:0", "metrics": "127.0.0.1:0"},
            "broker": {"allow_simulated": True, "simulated_root": str(ark)},
        }
        for name, changes in settings.items():
            sections[name] = {**sections.get(name, {}), **changes}
        lines = []
        for name, section in sections.items():
            lines += [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in section.items())]
        self.configuration.write_text("\n".join(lines))
        self.environment = {"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8"}
        self.notifications = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.notifications.bind(str(folder / "notify"))
        self.process: subprocess.Popen[bytes] | None = None
        self.ports: dict[str, int] = {}

    def begin(self, **environment: str) -> None:
        """Start it, and do not wait."""
        variables = {**self.environment, "NOTIFY_SOCKET": str(self.folder / "notify"), **environment}
        words = [str(SCRIPTS / "jindisk-broker"), "--config", str(self.configuration)]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(words, env=variables, stdout=log, stderr=log, cwd="/")

    def start(self, **environment: str) -> "BrokerProcess":
        """Start it, and wait until it says that it is ready."""
        self.begin(**environment)
        while True:
            readable, _, _ = select.select([self.notifications], [], [], 60)
            assert readable, f"the broker did not come up:\n{self.log.read_text()}"
            if "READY=1" in self.notifications.recv(4096).decode().split("\n"):
                break
        listen = self.json("status")["listen"]
        self.ports = {name: int(found[0].rsplit(":", 1)[1]) for name, found in listen.items() if ":" in found[0]}
        return self

    def stop(self, number: int = signal.SIGTERM) -> int:
        assert self.process is not None
        self.process.send_signal(number)
        status = self.process.wait(timeout=60)
        self.process = None
        return status

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
        self.notifications.close()

    def ctl(self, *words: str, status: int | None = 0, server: bool = True, stdin: bytes = b"") -> str:
        """Run `jindiskctl broker`; its standard output, or with another status than 0 its standard error.

        In this process, which spares it the second in which Python loads everything.
        """
        where = ["--server", f"{self.folder}/run/admin.sock"] if server else []
        out, err = io.TextIOWrapper(io.BytesIO()), io.StringIO()
        given = io.TextIOWrapper(io.BytesIO(stdin))
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
            patch.setattr(sys, "stdin", given)
            found = main(["broker", *words, *where])
        out.seek(0)
        said, complained = out.read(), err.getvalue()
        assert status in {None, found}, f"{words}: {found}\n{said}\n{complained}\n{self.log.read_text()[-3000:]}"
        return said if status in {0, None} else complained

    def json(self, *words: str, **more: Any) -> Any:
        printed = json.loads(self.ctl(*words, "--json", **more))
        jsonout.check(["broker", *words], printed)
        return printed

    @property
    def card(self) -> handover.BrokerCard:
        return handover.read_card(self.ctl("card").encode())

    def hand_over(self, **changes: Any) -> Path:
        """A file with a handover of one image for this broker."""
        path = self.folder / "handover.json"
        path.write_bytes(document.dump(handed(self.card.transfer_key, **changes)))
        return path

    def client(self, port: int | None = None, within_s: float = 60, pin: bytes | None = None) -> KbsClient:
        return client(port or self.ports["guests"], pin or self.card.spki_sha256, within_s)


def handed(
    recipient: Mapping[str, str],
    *,
    keys: Mapping[str, bytes] | None = None,
    volumes: Mapping[str, str] | None = None,
    **changes: Any,
) -> Handover:
    """A handover of the image that the guests here measure as."""
    told = {
        "image_id": IMAGE,
        "name": "web",
        "platform": Platform.SIMULATED_SNP,
        "resource": RESOURCE,
        "launch_digests": (DIGEST,),
        "created": "2026-01-01T00:00:00Z",
        "volumes": tuple(HandedVolume(volume=v, resource=r) for v, r in (volumes or {}).items()),
        **changes,
    }
    sealed = {resource: Secret(key) for resource, key in (keys or {RESOURCE: KEY}).items()}
    return handover.seal(Handover(**told), sealed, {}, recipient)


def client(port: int, pin: bytes, within_s: float = 60) -> KbsClient:
    """A guest's client that reaches the broker (or a relay) at a port of this machine."""
    return KbsClient(lambda: connected(port), spki_sha256=pin, deadline=time.monotonic() + within_s)


def connected(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=10)


def evidence(firmware: SimulatedSnpFirmware) -> Callable[[bytes], Mapping[str, Any]]:
    return lambda data: snp_to_json(firmware.report(data), firmware.certificate_table())


def fetched(kbs: KbsClient, firmware: SimulatedSnpFirmware, resource: str = RESOURCE) -> bytes:
    with kbs.fetch("snp", resource, evidence(firmware)) as key:
        return bytes(key.reveal())
