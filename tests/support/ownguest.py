"""A guest that a test plays against the key store of a running service, without a domain: real TLS, real verification.

The service learns of what is written this way when it next writes itself.
"""

from __future__ import annotations

import asyncio
import json
import socket
import time
from pathlib import Path
from typing import Any

from jindiskd.attest.measure import LaunchInputs
from jindiskd.attest.snp import SnpVerifier
from jindiskd.base.secret import Secret
from jindiskd.broker.identity import TlsIdentity
from jindiskd.broker.listener import listen_unix
from jindiskd.broker.service import Broker, Peer
from jindiskd.kbs.client import KbsClient
from jindiskd.kbs.evidence import snp_to_json
from jindiskd.keys.store import Store
from jindiskd.sim.firmware import SimulatedSnpFirmware
from jindiskd.sim.pki import SimulatedRoot

WITHIN_S = 300.0


def image_of(daemon: Any, name: str) -> tuple[dict[str, Any], LaunchInputs]:
    """Manifest and launch inputs of an image in the service's store."""
    folder = daemon.state / "images" / name
    manifest = json.loads((folder / "manifest.json").read_text())
    shape = manifest["shape"]
    return manifest, LaunchInputs(
        firmware=Path(shape["firmware"]),
        kernel=folder / manifest["kernel"]["file"],
        initrd=folder / manifest["initrd"]["file"],
        cmdline=(folder / manifest["cmdline"]["file"]).read_text(),
        vcpus=shape["vcpus"],
        cpu_model=shape["cpu_model"],
        guest_features=shape["guest_features"],
    )


async def play(daemon: Any, image_id: str, digest: bytes, tmp_path: Path, **peer: str) -> bytes:
    """A guest that measures as `digest` asks for the key of an image: TLS, report, verification, decision."""
    root = SimulatedRoot.load_or_create(daemon.state / "simulated-root")
    firmware = SimulatedSnpFirmware(root, digest)
    store = Store.open(f"sqlite:///{daemon.state}/keys.db", Secret((daemon.state / "kek").read_bytes()))
    identity = TlsIdentity.load_or_create(daemon.state / "broker.pem")
    broker = Broker(store=store, verifiers=[SnpVerifier(roots=root.roots)], allow_simulated=True)
    path = tmp_path / "guest"
    listener = await listen_unix(broker, identity, path, Peer(**{"description": "guest", "image_id": image_id, **peer}))

    def connect() -> socket.socket:
        stream = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        stream.connect(str(path))
        return stream

    def evidence(data: bytes) -> Any:
        return snp_to_json(firmware.report(data), firmware.certificate_table())

    try:
        client = KbsClient(connect, spki_sha256=identity.spki_sha256, deadline=time.monotonic() + WITHIN_S)
        with await asyncio.to_thread(client.fetch, "snp", f"default/{image_id}/root", evidence) as key:
            return bytes(key.reveal())
    finally:
        await listener.close()
        store.close()


def played(daemon: Any, image_id: str, digest: bytes, tmp_path: Path, **peer: str) -> bytes:
    return asyncio.run(play(daemon, image_id, digest, tmp_path, **peer))
