"""libvirtd, the service and the guest's machine, killed at random moments of launches: nothing strays, nobody lies."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import libvirtd
import pytest

from jindiskd.domain.state import ACTIVE

from .conftest import Bench

pytestmark = [pytest.mark.host, pytest.mark.slow]
SEED = 20260101
VICTIMS = ("libvirtd", "service", "guest")
SUPPORT = Path(__file__).resolve().parents[1] / "support"
SERVICE = """
import asyncio, sys
from pathlib import Path
sys.path[:0] = sys.argv[2:]
from conftest import Bench
async def main():
    bench = Bench(Path(sys.argv[1]))
    service = await bench.service()
    try:
        view = await bench.launch(service)
        print("end", view.state, flush=True)
    except Exception as exc:
        print("end", service.get("demo").state if service.list() else "none", type(exc).__name__, flush=True)
    await asyncio.sleep(3600)
asyncio.run(main())
"""


def machine(directory: Path) -> int | None:
    """The QEMU process of this bench."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                words = (entry / "cmdline").read_bytes()
                if b"qemu-system" in words.split(b"\0")[0] and os.fsencode(directory) in words:
                    return int(entry.name)
    return None


def listed(*words: str) -> list[str]:
    done = subprocess.run(["virsh", "-q", "list", *words], capture_output=True, text=True, check=True, timeout=60)
    return done.stdout.split()


def running() -> list[str]:
    return listed("--name")


async def round_(bench: Bench, victim: str, delay_s: float) -> str:
    """One launch in a service of its own, in which the victim dies; what the service said in the end, if it could."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-uc", SERVICE, str(bench.directory), str(Path(__file__).parent), str(SUPPORT),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert process.stdout is not None
    said = ""
    try:
        async with asyncio.timeout(120):
            while b"launch " not in (line := await process.stdout.readline()):
                assert line, "the service ended before its launch began"
        await asyncio.sleep(delay_s)
        if victim == "libvirtd":
            await asyncio.to_thread(libvirtd.restart)
        elif victim == "guest":
            found = machine(bench.directory)
            if found is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(found, signal.SIGKILL)
        if victim != "service":
            async with asyncio.timeout(120):
                while not said.startswith("end"):
                    line = await process.stdout.readline()
                    assert line, f"the service ended by itself; it said {said!r} last"
                    said = line.decode().strip()
            state = said.split()[1]
            on = "demo" in running()
            # A launch that did not get there may still be switching off; what claims to run does run.
            assert on or state not in ACTIVE or victim == "guest", f"it claims {said!r} and nothing runs"
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        process._transport.close()  # type: ignore[attr-defined]  # unread output keeps it open
    return said


async def rounds(bench: Bench, count: int, seed: int, victims: tuple[str, ...] = VICTIMS) -> None:
    """Launches in which one of the victims dies; after each, what is left and what is shown are looked at."""
    chance = random.Random(seed)
    for number in range(count):
        victim = chance.choice(victims)
        delay_s = chance.uniform(0, 2)
        said = await round_(bench, victim, delay_s)
        story = f"round {number}: {victim} killed after {delay_s:.2f} s; {said or 'the service said nothing'}"
        service = await bench.service()
        for view in service.list():
            on = view.name in running()
            assert view.state not in ACTIVE or on, f"{story}; it is shown as {view.state} and is off"
            await service.stop_domain(view.uuid, force=True)
        try:
            await bench.until(lambda: bench.strays() == [] and running() == [])
            await bench.until(lambda: not list((bench.settings.runtime_dir / "vsock").iterdir()))
        except TimeoutError:
            raise AssertionError(f"{story}; left: {bench.strays()}, {running()}, {service.list()}") from None
        assert all(view.state not in ACTIVE for view in service.list()), f"{story}; {service.list()}"
        defined = await asyncio.to_thread(listed, "--all", "--uuid")
        assert {path.stem for path in bench.settings.bindings.glob("*.json")} <= set(defined), story
        await service.stop()
        assert not (bench.settings.runtime_dir / "hook.sock").exists()
        print(story, flush=True)


async def test_five_times(bench: Bench) -> None:
    """The short form; the seed is fixed, so that a failure can be had again."""
    await rounds(bench, 5, SEED)


@pytest.mark.long
@pytest.mark.parametrize("part", range(5))
@pytest.mark.parametrize("victim", VICTIMS)
async def test_fifty_times_each(bench: Bench, victim: str, part: int) -> None:
    """The long form: five times ten kills of each victim."""
    await rounds(bench, 10, SEED + 1 + part, (victim,))
