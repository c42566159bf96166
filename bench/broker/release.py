"""Attestations with release per second, beside their floor: one P-384 verification and one TLS handshake.

Guests are processes; TLS, verification of the report and the database with its audit row are the real ones.
"""

import multiprocessing
import os
import socket
import ssl
import statistics
import tempfile
import threading
import time
from datetime import UTC, datetime
from pathlib import Path

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

DIGEST = bytes(48)
IMAGE = "11111111-1111-4111-8111-111111111111"
RESOURCE = f"default/{IMAGE}/root"
ROUNDS = {1: 60, 32: 8, 128: 2}
FORK = multiprocessing.get_context("fork")


def serve(folder: Path, root_dir: Path, ready: object) -> None:
    """The broker, in a process of its own."""
    import asyncio

    from jindiskd.attest.snp import SnpVerifier
    from jindiskd.base.platform import Platform
    from jindiskd.base.secret import Secret
    from jindiskd.broker.identity import TlsIdentity
    from jindiskd.broker.listener import listen_unix
    from jindiskd.broker.service import Broker, BrokerLimits, Peer
    from jindiskd.keys.store import Store
    from jindiskd.sim.pki import SimulatedRoot

    async def main() -> None:
        root = SimulatedRoot.load_or_create(root_dir)
        store = Store.open(f"sqlite:///{folder}/keys.db", Secret.random(32))
        store.add_image(IMAGE, "bench", Platform.SIMULATED_SNP, RESOURCE, Secret.random(32))
        store.activate(IMAGE, [DIGEST])
        broker = Broker(
            store=store,
            verifiers=[SnpVerifier(roots=root.roots, crls=[root.crl])],
            allow_simulated=True,
            limits=BrokerLimits(sessions_per_peer=100_000, sessions=100_000, connections_per_peer=1024),
        )
        await listen_unix(
            broker, TlsIdentity.load_or_create(folder / "identity.pem"), folder / "sock", Peer(description="bench")
        )
        ready.set()  # type: ignore[attr-defined]
        await asyncio.Event().wait()

    import structlog

    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))
    asyncio.run(main())


def guest(folder: Path, root_dir: Path, rounds: int, start: object, results: object) -> None:
    """One guest: attest and fetch, `rounds` times."""
    from jindiskd.broker.identity import TlsIdentity
    from jindiskd.kbs.client import KbsClient
    from jindiskd.kbs.evidence import snp_to_json
    from jindiskd.sim.firmware import SimulatedSnpFirmware
    from jindiskd.sim.pki import SimulatedRoot

    firmware = SimulatedSnpFirmware(SimulatedRoot.load_or_create(root_dir), DIGEST)
    pin = TlsIdentity.load_or_create(folder / "identity.pem").spki_sha256

    def connect() -> socket.socket:
        stream = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        stream.settimeout(60)
        stream.connect(str(folder / "sock"))
        return stream

    start.wait()  # type: ignore[attr-defined]
    taken = []
    for _ in range(rounds):
        begun = time.perf_counter()
        client = KbsClient(connect, spki_sha256=pin, deadline=time.monotonic() + 120)
        client.fetch(
            "snp", RESOURCE, lambda data: snp_to_json(firmware.report(data), firmware.certificate_table())
        ).close()
        taken.append(time.perf_counter() - begun)
    results.put(taken)  # type: ignore[attr-defined]


def floor_verification() -> float:
    """Seconds for one ECDSA P-384 verification of 672 bytes."""
    key, message = ec.generate_private_key(ec.SECP384R1()), os.urandom(672)
    signature, public = key.sign(message, ec.ECDSA(hashes.SHA384())), key.public_key()
    begun = time.perf_counter()
    for _ in range(300):
        public.verify(signature, message, ec.ECDSA(hashes.SHA384()))
    return (time.perf_counter() - begun) / 300


def floor_handshake(folder: Path) -> float:
    """Seconds for one TLS 1.3 handshake, both ends on this machine."""
    from jindiskd.broker.identity import TlsIdentity

    server = TlsIdentity.load_or_create(folder / "identity.pem").ssl_context()
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname, client.verify_mode = False, ssl.CERT_NONE
    begun = time.perf_counter()
    for _ in range(100):
        ours, theirs = socket.socketpair()
        thread = threading.Thread(target=lambda end=theirs: server.wrap_socket(end, server_side=True).close())
        thread.start()
        client.wrap_socket(ours).close()
        thread.join()
    return (time.perf_counter() - begun) / 100


def main() -> None:
    from jindiskd.sim.pki import SimulatedRoot

    with tempfile.TemporaryDirectory() as name:
        folder, root_dir = Path(name), Path(name) / "root"
        SimulatedRoot.load_or_create(root_dir, now=datetime.now(UTC))
        ready = FORK.Event()
        server = FORK.Process(target=serve, args=(folder, root_dir, ready), daemon=True)
        server.start()
        ready.wait(60)
        verification, handshake = floor_verification(), floor_handshake(folder)
        floor = verification + handshake
        print(f"floor: P-384 verification {verification * 1e3:.2f} ms + TLS handshake {handshake * 1e3:.2f} ms")
        print(f"{'guests':>7} {'per second':>11} {'p50 ms':>8} {'p99 ms':>8} {'floors each':>12}")
        for guests, rounds in ROUNDS.items():
            start, results = FORK.Event(), FORK.Queue()
            crowd = [FORK.Process(target=guest, args=(folder, root_dir, rounds, start, results)) for _ in range(guests)]
            for one in crowd:
                one.start()
            time.sleep(1 + guests / 64)  # all have read their keys and wait
            begun = time.perf_counter()
            start.set()
            taken = sorted(value for _ in crowd for value in results.get(timeout=300))
            wall = time.perf_counter() - begun
            for one in crowd:
                one.join()
            p99 = taken[min(len(taken) - 1, int(len(taken) * 0.99))]
            rate = len(taken) / wall
            each = wall / len(taken) / floor
            print(f"{guests:>7} {rate:>11.1f} {statistics.median(taken) * 1e3:>8.1f} {p99 * 1e3:>8.1f} {each:>12.1f}")
        server.kill()


if __name__ == "__main__":
    main()
