"""Launches on a real libvirtd: QEMU, firmware and the vsock device are real; broker and guest are played."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import libvirt
import libvirtd
import pytest
from processes import own_children

from jindiskd.domain import connection, machine, reconciler
from jindiskd.domain.state import LaunchFailed, LaunchRefused
from jindiskd.errors import AlreadyExists, Busy, ServiceUnavailable, TimedOut

pytestmark = pytest.mark.host


def virsh(*words: str) -> str:
    done = subprocess.run(["virsh", "-q", *words], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


async def test_a_launch_runs_through_its_states(bench) -> None:
    """From nothing to `running` in order; the domain is virsh's too; off again, nothing is left."""
    service = await bench.service()
    stages: list[str] = []
    view = await bench.launch(service, progress=stages.append)
    assert stages == ["starting", "started", "attested", "released", "unlocked", "running"]
    assert view.simulated
    assert view.cid == 3
    assert "running" in virsh("list")
    assert Path(view.console).exists()
    assert bench.opened[0][1:] == (view.uuid, view.image_id)
    home = bench.settings.runtime_dir / "vsock" / view.uuid
    assert {path.name for path in home.iterdir()} >= {"guest_19012", "guest_19013", "guest_19014", "binding.json"}
    await service.stop_domain("demo", force=True)
    assert service.get("demo").state == "stopped"
    await bench.until(lambda: not home.exists())
    await bench.until(lambda: bench.strays() == [])
    await service.undefine("demo")
    assert service.list() == []
    assert virsh("list", "--all").strip() == ""


async def test_the_simulated_firmware_measures_what_libvirt_started(bench) -> None:
    """A file that changed after the build is measured as it is, and the report says so: refusing is the broker's."""
    from jindiskd.attest.measure import LaunchInputs, snp_launch_digest
    from jindiskd.attest.snp_report import parse_report

    initrd = bench.images.root / "demo" / "initrd"
    initrd.write_bytes(initrd.read_bytes() + b"!")
    service = await bench.service()
    view = await bench.launch(service)
    home = bench.settings.runtime_dir / "vsock" / view.uuid
    reader, writer = await asyncio.open_unix_connection(home / "guest_19013")
    writer.write(b"JSIM" + (1).to_bytes(4, "little") + bytes(64))
    answer = await reader.read()
    writer.close()
    directory = bench.images.root / "demo"
    shape = bench.images.get("demo").manifest.shape
    expected = snp_launch_digest(
        LaunchInputs(
            firmware=Path(shape.firmware),
            kernel=directory / "vmlinuz",
            initrd=initrd,
            cmdline=(directory / "cmdline").read_text(),
            vcpus=shape.vcpus,
            cpu_model=shape.cpu_model,
            guest_features=1,
        )
    )
    assert parse_report(answer[8 : 8 + 1184]).measurement == expected


async def test_one_image_runs_once(bench) -> None:
    """A second launch of an image, and one under a name that runs, are refused before anything is made."""
    service = await bench.service()
    await bench.launch(service)
    with pytest.raises(Busy, match="demo"):
        await service.launch("demo", name="other")
    bench.add_image("second")
    with pytest.raises(Busy, match="demo"):
        await service.launch("second", name="demo")
    assert len(service.list()) == 1


async def test_two_images_run_side_by_side(bench) -> None:
    """Each domain has its own context id and its own listeners."""
    bench.add_image("second")
    service = await bench.service()
    first, second = await bench.launch(service), await bench.launch(service, "second")
    assert {first.cid, second.cid} == {3, 4}
    assert len({path for path, _, _ in bench.opened}) == 2


async def test_a_refusal_is_told_and_the_machine_is_off(bench) -> None:
    """The broker's findings reach the caller in one sentence; nothing goes on running."""
    service = await bench.service()
    task = asyncio.create_task(service.launch("demo"))
    await bench.until(lambda: any(view.state == "started" for view in service.list()))
    service.on_refused(service.get("demo").uuid, "the launch digest is not one of this image's")
    with pytest.raises(LaunchRefused, match="launch digest"):
        await task
    assert service.get("demo").state == "refused"
    assert virsh("list").strip() == ""
    await bench.until(lambda: bench.strays() == [])


async def test_a_guest_that_gives_up_is_explained(bench) -> None:
    """A code from the guest becomes its sentence."""
    service = await bench.service()
    task = asyncio.create_task(service.launch("demo"))
    await bench.until(lambda: any(view.state == "started" for view in service.list()))
    await bench.say(service.get("demo").uuid, "boot\nfail E41\n")
    with pytest.raises(LaunchFailed, match=r"header.*E41"):
        await task
    await bench.until(lambda: bench.strays() == [])


async def test_a_machine_that_is_killed_is_noticed(bench) -> None:
    """Somebody else's `virsh destroy` during a launch fails it; after it, the view says stopped."""
    service = await bench.service()
    task = asyncio.create_task(service.launch("demo"))
    await bench.until(lambda: any(view.state == "started" for view in service.list()))
    virsh("destroy", "demo")
    with pytest.raises(LaunchFailed, match="stopped before"):
        await task
    await bench.launch(service)
    virsh("destroy", "demo")
    await bench.until(lambda: service.get("demo").state == "stopped")
    await bench.until(lambda: bench.strays() == [])


async def test_time_runs_out(bench) -> None:
    """A guest that never says anything is ended when its time is over, and the sentence says how far it came."""
    service = await bench.service()
    with pytest.raises(TimedOut, match=r"as far as (starting|started)"):
        await service.launch("demo", timeout_s=3)
    assert service.get("demo").state == "failed"
    await bench.until(lambda: bench.strays() == [])


async def test_a_cancelled_launch_leaves_nothing(bench) -> None:
    """Whenever the cancellation comes."""
    service = await bench.service()
    for delay in (0.0, 0.1, 0.3, 0.6, 1.0, 1.5):
        task = asyncio.create_task(service.launch("demo"))
        await asyncio.sleep(delay)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert virsh("list").strip() == ""
        await bench.until(lambda: bench.strays() == [])
        assert not list((bench.settings.runtime_dir / "vsock").iterdir())


async def test_a_reset_guest_attests_again(bench) -> None:
    """A simulated guest is reset in place: same machine, same listeners, and the view follows it around again."""
    service = await bench.service()
    view = await bench.launch(service)
    virsh("reset", "demo")
    await bench.say(view.uuid, "boot\n")
    await bench.until(lambda: service.get("demo").state == "started")
    service.on_attested(view.uuid)
    service.on_released(view.uuid)
    await bench.say(view.uuid, "unlocked\nrunning\n")
    await bench.until(lambda: service.get("demo").state == "running")
    assert service.get("demo").uuid == view.uuid


async def test_a_name_that_is_taken(bench) -> None:
    """A foreign domain of that name is not touched."""
    conn = libvirt.open("qemu:///system")
    dom = conn.defineXML("<domain type='qemu'><name>demo</name><memory>1024</memory><os><type>hvm</type></os></domain>")
    service = await bench.service()
    try:
        with pytest.raises(AlreadyExists):
            await service.launch("demo")
        assert [d.name() for d in conn.listAllDomains()] == ["demo"]
    finally:
        dom.undefine()
        conn.close()


async def test_a_new_service_finds_its_domains(bench) -> None:
    """After a restart the running guest is served as before: broker, progress, firmware; the off one is known."""
    bench.add_image("second")
    service = await bench.service()
    view = await bench.launch(service)
    await bench.launch(service, "second")
    await service.stop_domain("second", force=True)
    await service.stop()
    again = await bench.service()
    assert again.get("demo").state == "running"
    assert again.get("demo").cid == view.cid
    assert again.get("second").state == "defined"
    home = bench.settings.runtime_dir / "vsock" / view.uuid
    reader, writer = await asyncio.open_unix_connection(home / "guest_19013")
    writer.write(b"JSIM" + (1).to_bytes(4, "little") + bytes(64))
    assert (await reader.read())[:4] == bytes(4)
    writer.close()
    await bench.launch(again, "second")


async def test_what_virsh_removes_is_gone(bench) -> None:
    """`virsh undefine` takes a domain off the list."""
    service = await bench.service()
    await bench.launch(service)
    await service.stop_domain("demo", force=True)
    virsh("undefine", "demo")
    await bench.until(lambda: service.list() == [])


async def test_a_service_that_ends_while_it_forgets_leaves_nothing(bench) -> None:
    """Whenever it is stopped after a guest's end: the processes that were made for the guest end."""
    for delay in (0.0, 0.02, 0.1):
        service = await bench.service()
        await bench.launch(service)
        virsh("destroy", "demo")
        virsh("undefine", "demo")
        await asyncio.sleep(delay)
        await service.stop()
        await bench.until(lambda: not [pid for pid in own_children() if _is_firmware(pid)])


def _is_firmware(pid: int) -> bool:
    try:
        return b"jindiskd.sim.process" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


DAEMON = """
import asyncio, functools, os, signal, sys
from pathlib import Path
sys.path[:0] = sys.argv[4:]
from conftest import Bench
from jindiskd.domain import binding, firmware, guest, machine, vsock

PLACES = {
    "device": (vsock, "start_device"),
    "device process": (vsock.os, "posix_spawn"),
    "listen": (guest.Guest, "listen"),
    "binding": (binding.Bindings, "put"),
    "define": (machine, "define"),
    "start": (machine, "start_paused"),
    "firmware": (firmware.FirmwareProcess, "start"),
    "resume": (machine, "resume"),
}

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def dying(function, after):
    if asyncio.iscoroutinefunction(function):
        async def wrapped(*args, **options):
            if not after:
                die()
            await function(*args, **options)
            die()
    else:
        def wrapped(*args, **options):
            if not after:
                die()
            function(*args, **options)
            die()
    return wrapped

holder, name = PLACES[sys.argv[2]]
found = getattr(holder, name)
setattr(holder, name, dying(found, sys.argv[3] == "after"))

async def main():
    bench = Bench(Path(sys.argv[1]))
    service = await bench.service()
    await service.launch("demo")
asyncio.run(main())
"""
PLACES = ("device", "device process", "listen", "binding", "define", "start", "firmware", "resume")


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
async def test_killed_at_every_step(bench, directory, place: str) -> None:
    """SIGKILL before and after each step of making a machine: the next start ends it and all that was made for it."""
    here = Path(__file__).parent
    for moment in ("before", "after"):
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", DAEMON, str(directory), place, moment, str(here), str(here.parent / "support"),
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )  # fmt: skip
        async with asyncio.timeout(120):
            _, said = await process.communicate()
        assert process.returncode == -signal.SIGKILL, said.decode()[-2000:]
        service = await bench.service()
        await bench.until(lambda: bench.strays() == [])  # what is killed takes a moment to be gone
        assert virsh("list").strip() == ""
        assert not list((bench.settings.runtime_dir / "vsock").iterdir())
        defined = virsh("list", "--all", "--name").split()
        assert [view.name for view in service.list()] == defined
        assert {view.state for view in service.list()} <= {"defined", "failed"}
        assert len(list((directory / "state/domains").iterdir())) == len(defined)
        await service.stop()
    service = await bench.service()
    await bench.launch(service)


@pytest.fixture
def impatient(monkeypatch) -> None:
    """Libvirt is looked for, and asked, more often than in earnest."""
    monkeypatch.setattr(connection, "RETRY_S", 0.1)
    monkeypatch.setattr(reconciler, "LOOK_AGAIN_S", (0.1,))


async def test_libvirtd_restarts_under_a_launch(bench, impatient) -> None:
    """A launch that waits for its guest goes on; the machine, its listeners and its end are followed as before."""
    service = await bench.service(launch_timeout_s=300)
    task = asyncio.create_task(service.launch("demo"))
    await bench.until(lambda: task.done() or any(view.state == "started" for view in service.list()))
    await asyncio.to_thread(libvirtd.stop, signal.SIGTERM)
    await bench.until(lambda: not service.connection.connected)
    with pytest.raises(ServiceUnavailable, match="libvirtd"):
        await service.stop_domain("demo", force=True)
    uuid = service.get("demo").uuid
    service.on_attested(uuid)
    service.on_released(uuid)
    await asyncio.to_thread(libvirtd.start)
    await bench.until(lambda: service.connection.connected)
    assert not task.done()
    await bench.say(uuid, "unlocked\nrunning\n")
    assert (await task).state == "running"
    virsh("destroy", "demo")
    await bench.until(lambda: service.get("demo").state == "stopped")
    await bench.until(lambda: bench.strays() == [])


@pytest.mark.parametrize("step", ["define", "start_paused", "resume"])
async def test_libvirtd_dies_within_a_launch(bench, impatient, monkeypatch, step: str) -> None:
    """The launch ends with an error that names libvirtd; a machine that runs on is ended as soon as that can be."""
    service = await bench.service(launch_timeout_s=300)
    real = getattr(machine, step)

    async def dies(*arguments: object) -> object:
        if step == "resume":
            await asyncio.to_thread(libvirtd.stop)
        answer = await real(*arguments)
        await asyncio.to_thread(libvirtd.stop)
        return answer

    monkeypatch.setattr(machine, step, dies)
    with pytest.raises(ServiceUnavailable, match="libvirtd"):
        await service.launch("demo")
    assert service.get("demo").state == "failed"
    assert "libvirtd" in service.get("demo").reason
    monkeypatch.setattr(machine, step, real)
    await asyncio.to_thread(libvirtd.start)
    await bench.until(lambda: service.connection.connected)
    await bench.until(lambda: virsh("list").strip() == "")
    await bench.until(lambda: bench.strays() == [])
    await bench.launch(service)


async def test_a_guest_ends_while_libvirtd_is_away(bench, impatient) -> None:
    """No event tells of it: what libvirt says afterwards does."""
    service = await bench.service()
    await bench.launch(service)
    await asyncio.to_thread(libvirtd.stop)
    machines = [entry for entry in Path("/proc").glob("[0-9]*") if _is_machine(entry)]
    assert len(machines) == 1
    os.kill(int(machines[0].name), signal.SIGKILL)
    await asyncio.to_thread(libvirtd.start)
    await bench.until(lambda: service.get("demo").state == "stopped")
    await bench.until(lambda: bench.strays() == [])


async def test_libvirt_says_nothing_of_an_end(bench, impatient) -> None:
    """A libvirtd that was just started may list a machine that is gone, and send no event when it sees that."""
    service = await bench.service()
    await bench.launch(service)
    service.connection._on_event = lambda _uuid, _event: None
    virsh("destroy", "demo")
    await bench.until(lambda: service.get("demo").state == "stopped")
    await bench.until(lambda: bench.strays() == [])


def _is_machine(entry: Path) -> bool:
    try:
        return (entry / "comm").read_text().startswith("qemu-system")
    except OSError:
        return False


async def test_events_do_not_leak_with_connections(bench, impatient) -> None:
    """Each restart of libvirtd leaves as many descriptors open as before."""
    service = await bench.service()
    await asyncio.to_thread(libvirtd.restart)
    await bench.until(lambda: service.connection.connected)
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(2):
        await asyncio.to_thread(libvirtd.stop)
        await bench.until(lambda: not service.connection.connected)
        await asyncio.to_thread(libvirtd.start)
        await bench.until(lambda: service.connection.connected)
    await bench.until(lambda: len(list(Path("/proc/self/fd").iterdir())) <= before)


async def test_a_libvirtd_that_hangs_does_not_keep_the_service(bench, impatient, monkeypatch) -> None:
    """Calls are given up when the connection is; and whatever libvirt does, the service ends."""
    monkeypatch.setattr(connection, "CLOSE_S", 0.5)
    service = await bench.service()
    found = libvirtd.pid()
    assert found is not None
    os.kill(found, signal.SIGSTOP)
    try:
        waiting = asyncio.create_task(service.connection.call("asking", lambda conn: conn.listAllDomains()))
        await asyncio.sleep(0)
        async with asyncio.timeout(60):
            await service.stop()
        waiting.cancel()
    finally:
        os.kill(found, signal.SIGCONT)
