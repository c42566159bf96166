"""What the relay costs a guest: attestations with release through it, beside the same straight to the broker.

Broker and relay are processes of their own on this machine; TLS, verification and the database are the real ones.
"""

import asyncio
import multiprocessing
import os
import socket
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

DIGEST = bytes(48)
IMAGE = "11111111-1111-4111-8111-111111111111"
RESOURCE = f"default/{IMAGE}/root"
ROUNDS = 60
MEGABYTES = 64
FORK = multiprocessing.get_context("fork")


def serve(folder: Path, root_dir: Path, port: Any) -> None:
    """The broker, on a TCP port that it tells."""
    import structlog

    from jindiskd.attest.snp import SnpVerifier
    from jindiskd.base.platform import Platform
    from jindiskd.base.secret import Secret
    from jindiskd.broker.identity import TlsIdentity
    from jindiskd.broker.listener import listen_tcp
    from jindiskd.broker.service import Broker, BrokerLimits
    from jindiskd.keys.store import Store
    from jindiskd.sim.pki import SimulatedRoot

    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))

    async def main() -> None:
        root = SimulatedRoot.load_or_create(root_dir)
        store = Store.open(f"sqlite:///{folder}/keys.db", Secret.random(32))
        store.add_image(IMAGE, "bench", Platform.SIMULATED_SNP, RESOURCE, Secret.random(32))
        store.activate(IMAGE, [DIGEST])
        broker = Broker(
            store=store,
            verifiers=[SnpVerifier(roots=root.roots, crls=[root.crl])],
            allow_simulated=True,
            limits=BrokerLimits(sessions_per_peer=100000, sessions=100000),
        )
        listener = await listen_tcp(broker, TlsIdentity.load_or_create(folder / "identity.pem"), "127.0.0.1", 0)
        port.value = listener.addresses[0][1]
        await asyncio.Event().wait()

    asyncio.run(main())


def relay(folder: Path, port: int, name: str, ready: Any) -> None:
    """The relay, from a unix socket to a port."""
    from jindiskd.base.endpoint import Endpoint
    from jindiskd.broker.relay import Relay, RelayLimits

    async def main() -> None:
        limits = RelayLimits(starts_per_minute=1_000_000, bytes=1 << 40)
        await Relay(Endpoint(host="127.0.0.1", port=port), limits=limits).open(folder / name, IMAGE)
        ready.set()
        await asyncio.Event().wait()

    asyncio.run(main())


def sink(port: Any) -> None:
    """Takes bytes, and answers one at the end."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port.value = server.getsockname()[1]
        while True:
            taken, _ = server.accept()
            with taken:
                while taken.recv(1 << 20):
                    pass
                taken.sendall(b"x")


def releases(folder: Path, root_dir: Path, port: int) -> dict[str, list[float]]:
    """Seconds of each release, both ways in turn, so that both see the same machine."""
    from jindiskd.broker.identity import TlsIdentity
    from jindiskd.kbs.client import KbsClient
    from jindiskd.kbs.evidence import snp_to_json
    from jindiskd.sim.firmware import SimulatedSnpFirmware
    from jindiskd.sim.pki import SimulatedRoot

    firmware = SimulatedSnpFirmware(SimulatedRoot.load_or_create(root_dir), DIGEST)
    pin = TlsIdentity.load_or_create(folder / "identity.pem").spki_sha256
    ways = {"direct": lambda: socket.create_connection(("127.0.0.1", port)), "relayed": lambda: unix(folder / "guest")}
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(ROUNDS + 5):
        for name, connect in ways.items():
            begun = time.perf_counter()
            client = KbsClient(connect, spki_sha256=pin, deadline=time.monotonic() + 60)
            table = firmware.certificate_table()
            client.fetch("snp", RESOURCE, lambda data, table=table: snp_to_json(firmware.report(data), table)).close()
            if turn >= 5:
                taken[name].append(time.perf_counter() - begun)
    return taken


def unix(path: Path) -> socket.socket:
    stream = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    stream.connect(os.fspath(path))
    return stream


def throughput(connect: Any) -> float:
    """Megabytes a second, up."""
    block = bytes(1 << 20)
    begun = time.perf_counter()
    with connect() as stream:
        for _ in range(MEGABYTES):
            stream.sendall(block)
        stream.shutdown(socket.SHUT_WR)
        assert stream.recv(1) == b"x"
    return MEGABYTES / (time.perf_counter() - begun)


def main() -> None:
    from jindiskd.sim.pki import SimulatedRoot

    with tempfile.TemporaryDirectory() as name:
        folder, root_dir = Path(name), Path(name) / "root"
        SimulatedRoot.load_or_create(root_dir)
        ports = [FORK.Value("i", 0) for _ in range(2)]
        helpers = [FORK.Process(target=serve, args=(folder, root_dir, ports[0]), daemon=True)]
        helpers += [FORK.Process(target=sink, args=(ports[1],), daemon=True)]
        for helper in helpers:
            helper.start()
        while not all(port.value for port in ports):
            time.sleep(0.05)
        for socket_name, port in (("guest", ports[0].value), ("bytes", ports[1].value)):
            ready = FORK.Event()
            helpers.append(FORK.Process(target=relay, args=(folder, port, socket_name, ready), daemon=True))
            helpers[-1].start()
            ready.wait(60)
        taken = releases(folder, root_dir, ports[0].value)
        medians = {way: statistics.median(values) * 1e3 for way, values in taken.items()}
        print(f"release: direct {medians['direct']:.1f} ms, relayed {medians['relayed']:.1f} ms,", end=" ")
        print(f"ratio {medians['relayed'] / medians['direct']:.2f}")
        direct = throughput(lambda: socket.create_connection(("127.0.0.1", ports[1].value)))
        relayed = throughput(lambda: unix(folder / "bytes"))
        print(f"bytes: direct {direct:.0f} MB/s, relayed {relayed:.0f} MB/s, ratio {direct / relayed:.1f}")
        for helper in helpers:
            helper.kill()


if __name__ == "__main__":
    main()
