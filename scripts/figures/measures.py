"""What service and broker take, measured on a bus and in directories of its own."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import rawbus
from brokerprocess import DIGEST, KEY, RESOURCE, BrokerProcess
from crowd import Crowd
from messagebus import message_bus
from serviceprocess import Daemon
from smallroot import root_archive
from suite.lanes import ROOT

from jindiskd.sim.firmware import SimulatedSnpFirmware
from jindiskd.sim.pki import SimulatedRoot

FIRMWARE = ROOT / "build/tools/usr/share/ovmf/OVMF.amdsev.fd"
NOBODY = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
LIFE_S = 20
"""Of the broker's sessions."""


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What was measured."""

    lines: Sequence[str]
    """For the page."""
    sound: bool = True
    """Whether it is as it must be; no matter how fast the machine is."""


def rss_kib(pid: int) -> int:
    """Resident memory of a process."""
    return int(Path(f"/proc/{pid}/status").read_text().split("VmRSS:")[1].split()[0])


def processor_s(pid: int) -> float:
    """Processor time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def grown(pair: Sequence[int]) -> str:
    """Memory before and after, in KiB."""
    return f"{pair[0] / 1024:.1f} → {pair[1] / 1024:.1f} MiB ({(pair[1] - pair[0]) / 1024:+.1f})"


def kept(pair: Sequence[int]) -> bool:
    """Whether so many descriptors more are no leak."""
    return pair[1] <= pair[0] + 20


def descriptors(pid: int) -> int:
    """Open file descriptors of a process."""
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


@contextlib.contextmanager
def service() -> Iterator[Daemon]:
    """The service with one image, on a bus of its own."""
    with message_bus() as (address, _), tempfile.TemporaryDirectory(prefix="jindiskd-reliability-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        SimulatedRoot.load_or_create(folder / "root")
        daemon = Daemon(folder, address, FIRMWARE, folder / "root")
        try:
            daemon.start()
            archive = folder / "root.tar"
            archive.write_bytes(root_archive())
            daemon.ctl("image", "build", "one", "--rootfs", str(archive))
            yield daemon
        finally:
            daemon.close()


def fuzz(arguments: argparse.Namespace) -> Figures:
    """Random calls by root and by nobody, half of them each."""
    found: dict[str, Any] = {}
    with service() as daemon:
        assert daemon.process is not None
        pid = daemon.process.pid
        for who, user in (("root", []), ("an ordinary user", NOBODY)):
            seed, before, memory = random.randrange(1 << 32), descriptors(pid), rss_kib(pid)
            words = [*user, sys.executable, str(ROOT / "tests/support/busfuzz.py"), daemon.address]
            out = subprocess.run(
                [*words, str(arguments.calls // 2), str(seed)], capture_output=True, text=True, cwd="/"
            )
            if out.returncode:
                raise SystemExit(out.stderr)
            found[who] = {
                **json.loads(out.stdout),
                "seed": seed,
                "descriptors": [before, descriptors(pid)],
                "rss_kib": [memory, rss_kib(pid)],
            }
        daemon.ctl("status")
        strange = daemon.log.read_text().count("fault in a bus method")
    strange += sum(len(one["strange"]) for one in found.values())
    lines = [
        "| caller | calls | mistyped | answered | refused | slowest | descriptors | memory |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for who, one in found.items():
        answered, before, after = one["answers"].get("answered", 0), *one["descriptors"]
        lines.append(
            f"| {who} | {one['calls']} of {one['members']} members | {one['mistyped']} | {answered} | "
            f"{one['calls'] - answered} | {one['slowest_s']:.2f} s | {before} → {after} | {grown(one['rss_kib'])} |"
        )
    lines += [
        "",
        f"Errors that nobody foresaw: {strange}. Memory of root's calls: whoever may measure images has",
        "their files read, in as many threads as there are; it is used again, and thirty measurements more take none.",
    ]
    return Figures(lines=lines, sound=not strange)


def calls(arguments: argparse.Namespace) -> Figures:
    """Ordinary calls of one client, after a tenth as many to warm up."""
    with service() as daemon:
        assert daemon.process is not None
        pid, raw = daemon.process.pid, rawbus.RawBus(daemon.address)
        _, body = raw.call("org.jindisk1.Manager", "GetKey", "s", ("one",))
        asked: tuple[tuple[Any, ...], ...] = (
            ("org.freedesktop.DBus.ObjectManager", "GetManagedObjects", "", (), "/org/jindisk1"),
            ("org.freedesktop.DBus.Properties", "GetAll", "s", ("org.jindisk1.Manager",), "/org/jindisk1"),
            ("org.jindisk1.Key", "Describe", "a{sv}", ({},), body[0]),
            ("org.jindisk1.Audit", "List", "a{sv}", ({},), "/org/jindisk1/audit"),
            ("org.jindisk1.Manager", "GetImage", "s", ("one",), "/org/jindisk1"),
        )

        def many(count: int) -> None:
            for number in range(count):
                interface, member, signature, given, path = asked[number % len(asked)]
                error, answer = raw.call(interface, member, signature, given, path=path)
                assert error == "", (member, error, answer)

        many(arguments.calls // 10)
        before = rss_kib(pid), descriptors(pid)
        began = time.monotonic()
        many(arguments.calls)
        seconds = time.monotonic() - began
        memory, opened = (before[0], rss_kib(pid)), (before[1], descriptors(pid))
    line = f"{arguments.calls} calls, {arguments.calls / seconds:.0f} a second; memory {grown(memory)}; "
    return Figures(lines=[f"{line}descriptors {opened[0]} → {opened[1]}."], sound=kept(opened))


def sessions(arguments: argparse.Namespace) -> Figures:
    """Guests that attest and get their key from one broker, after a tenth as many to warm up."""
    with tempfile.TemporaryDirectory(prefix="jindiskd-reliability-") as name:
        root = SimulatedRoot.load_or_create(Path(name) / "root")
        # All these guests have one address, which may have so many; a session counts until its life is over.
        settings = {"session_lifetime_s": LIFE_S, "max_sessions": 65536, "max_sessions_per_peer": 65536}
        broker = BrokerProcess(Path(name) / "broker", root, service={"log_level": "info"}, broker=settings)
        try:
            broker.start()
            assert broker.process is not None
            pid = broker.process.pid
            broker.ctl("image", "import", str(broker.hand_over()))
            broker.ctl("image", "limits", "web", "--per-hour", "0")
            firmware = SimulatedSnpFirmware(root, DIGEST)

            async def many(count: int) -> int:
                crowd = Crowd([broker.ports["guests"]], broker.card.spki_sha256,
                              firmware, RESOURCE, at_once=16)  # fmt: skip
                turn = asyncio.Semaphore(16)

                async def one() -> bool:
                    async with turn:
                        return (await crowd.guest(1, DIGEST, 600)).key == KEY

                served = sum(await asyncio.gather(*(one() for _ in range(count))))
                await asyncio.sleep(LIFE_S + 5)  # until what is kept of the last is gone
                return served

            asyncio.run(many(arguments.sessions // 10))
            before = rss_kib(pid), descriptors(pid)
            began = time.monotonic()
            served = asyncio.run(many(arguments.sessions))
            seconds = time.monotonic() - began - LIFE_S - 5
            after = rss_kib(pid), descriptors(pid)
            rows = broker.json("audit", "verify")["rows"]
        finally:
            broker.close()
    memory, opened = (before[0], after[0]), (before[1], after[1])
    rate = arguments.sessions / seconds
    line = (
        f"{served} of {arguments.sessions} served, {rate:.1f} a second; memory {grown(memory)}; "
        f"descriptors {opened[0]} → {opened[1]}; the audit log of {rows} rows is whole."
    )
    return Figures(lines=[line], sound=served == arguments.sessions and kept(opened))


def recovery(arguments: argparse.Namespace) -> Figures:
    """kill -9 during calls, start again at once; seconds until the first call is answered."""
    taken, worked = [], []
    with service() as daemon:
        for _ in range(arguments.kills):
            daemon.stop(9)
            began = time.monotonic()
            daemon.start()
            raw = rawbus.RawBus(daemon.address)
            error, _ = raw.call("org.jindisk1.Manager", "GetImage", "s", ("one",))
            assert error == "", error
            taken.append(time.monotonic() - began)
            assert daemon.process is not None
            worked.append(processor_s(daemon.process.pid))
            raw.close()
        daemon.ctl("audit", "verify")
        daemon.ctl("image", "measure", "one")
    loading = "import time, jindiskd.daemon; print(time.process_time())"
    load = subprocess.run([sys.executable, "-c", loading], capture_output=True, text=True, check=True, cwd="/")
    line = (
        f"{len(taken)} kills: the first call is answered after {statistics.median(taken):.1f} s (median; fastest "
        f"{min(taken):.1f} s, slowest {max(taken):.1f} s). Until then the service has used "
        f"{statistics.median(worked):.1f} s of a processor; {float(load.stdout):.1f} s are what it takes to load its "
        "modules. Audit log and image are whole."
    )
    return Figures(lines=[line])
