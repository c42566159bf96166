"""What others do to domains of ours, without our hook and without a word to us: the list says what is."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import libvirt
import libvirtd
import pytest

from jindiskd.domain import connection, inventory, reconciler
from jindiskd.domain.binding import Bindings
from jindiskd.domain.check import DomainRefused
from jindiskd.errors import Busy, NotFound, NotSupported

from .conftest import Bench

NAMESPACE = "https://jindisk.org/xmlns/libvirt/domain/1"
OTHER_UUID = "1c1d0000-5e70-4000-8000-0000000000aa"
DEFINITIONS = Path("/etc/libvirt/qemu")


def virsh(*words: str, given: str = "") -> str:
    """What virsh prints; an AssertionError with its words where it fails."""
    done = subprocess.run(
        ["virsh", "-q", "-c", "qemu:///system", *words], input=given, capture_output=True, text=True, check=False,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def without_vsock(text: str) -> str:
    """A definition that starts although nothing was prepared for it."""
    start, end = text.index("<qemu:commandline>"), text.index("</qemu:commandline>")
    return text[:start] + text[end + len("</qemu:commandline>") :]


@pytest.fixture
def watchful(monkeypatch: pytest.MonkeyPatch) -> None:
    """Domains are looked at, and libvirt is looked for, more often than in earnest."""
    monkeypatch.setattr(reconciler, "LOOK_AGAIN_S", (0.3,))
    monkeypatch.setattr(connection, "RETRY_S", 0.1)


_S, _P = libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PAUSED_USER


@pytest.mark.parametrize(
    ("state", "why", "said"),
    [
        (_S, _P, "virsh resume web"),
        (_S, libvirt.VIR_DOMAIN_PAUSED_IOERROR, "disk could not be read or written"),
        (_S, libvirt.VIR_DOMAIN_PAUSED_STARTING_UP, ""),
        (libvirt.VIR_DOMAIN_PMSUSPENDED, 0, "dompmwakeup web"),
        (libvirt.VIR_DOMAIN_CRASHED, 0, "crashed"),
        (libvirt.VIR_DOMAIN_RUNNING, 1, ""),
        (libvirt.VIR_DOMAIN_SHUTOFF, 1, ""),
        (libvirt.VIR_DOMAIN_SHUTDOWN, 1, ""),
    ],
)
def test_what_keeps_an_active_domain_still(state: int, why: int, said: str) -> None:
    """By libvirt's numbers; what runs, and what is off, is not said to stand still."""
    found = inventory.halted(state, why, "web")
    assert said in found
    assert bool(found) is bool(said)


def test_one_that_cannot_be_read_is_there() -> None:
    """libvirtd ends between the list and a domain's definition: that domain is not gone, nor is its record."""

    class Domain:
        def UUIDString(self) -> str:
            return OTHER_UUID

        def XMLDesc(self) -> str:
            raise libvirt.libvirtError("Cannot recv data: Connection reset by peer")

    class Conn:
        def listAllDomains(self) -> list[Domain]:
            return [Domain()]

    assert inventory.read(Conn(), lambda _uuid: True) == ((), frozenset({OTHER_UUID}))


@pytest.mark.host
async def test_one_that_is_suspended_saved_and_reset(bench: Bench) -> None:
    """It stands still, goes on, cannot be saved; a service that comes meanwhile knows, too."""
    service = await bench.service()
    view = await bench.launch(service)
    assert view.halted == ""
    await asyncio.to_thread(virsh, "suspend", "demo")
    await bench.until(lambda: "virsh resume demo" in service.get("demo").halted)
    assert service.get("demo").state == "running"
    await service.stop()
    again = await bench.service()
    assert "virsh resume demo" in again.get("demo").halted
    await asyncio.to_thread(virsh, "resume", "demo")
    await bench.until(lambda: again.get("demo").halted == "")
    for verb in (("managedsave", "demo"), ("save", "demo", str(bench.directory / "saved"))):
        with pytest.raises(AssertionError, match=r"(?i)migrat"):  # its device cannot be taken along
            await asyncio.to_thread(virsh, *verb)
    await bench.until(lambda: again.get("demo").halted == "")
    assert again.get("demo").state == "running"
    await asyncio.to_thread(virsh, "suspend", "demo")
    await bench.until(lambda: again.get("demo").halted != "")
    await asyncio.to_thread(virsh, "destroy", "demo")
    await bench.until(lambda: again.get("demo").state == "stopped")
    assert again.get("demo").halted == ""
    await bench.until(lambda: bench.strays() == [])


@pytest.mark.host
async def test_one_that_is_undefined_while_it_runs(bench: Bench) -> None:
    """It runs on, and is shown, until it ends; then nothing tells of it, and its image can be launched again."""
    service = await bench.service()
    view = await bench.launch(service)
    await asyncio.to_thread(virsh, "undefine", "demo")
    assert "<name>demo</name>" in await service.definition("demo")
    assert service.get("demo").state == "running"
    await asyncio.to_thread(virsh, "destroy", "demo")
    await bench.until(lambda: service.list() == [])
    assert Bindings(bench.settings.bindings).get(view.uuid) is None
    await bench.until(lambda: bench.strays() == [])
    with pytest.raises(NotFound):
        await service.start_domain("demo")
    assert (await bench.launch(service)).state == "running"
    await asyncio.to_thread(virsh, "undefine", "demo")
    await service.stop_domain("demo", force=True)
    await bench.until(lambda: service.list() == [])


@pytest.mark.host
async def test_ones_that_are_off(bench: Bench, watchful: None) -> None:
    """Renamed, edited without an event, taken back, made again under another UUID."""
    service = await bench.service()
    view = await bench.launch(service)
    before = await asyncio.to_thread(virsh, "dumpxml", "--inactive", "demo")
    # While it runs, for its next start.
    await asyncio.to_thread(virsh, "setvcpus", "demo", "2", "--config", "--maximum")
    await asyncio.to_thread(virsh, "setvcpus", "demo", "2", "--config")
    assert service.get("demo").reason == ""
    await asyncio.to_thread(virsh, "destroy", "demo")
    await bench.until(lambda: "number of processors, 2," in service.get("demo").reason)
    await asyncio.to_thread(virsh, "define", "/dev/stdin", given=before)
    await bench.until(lambda: service.get("demo").reason == "")

    await asyncio.to_thread(virsh, "domrename", "demo", "other")
    await bench.until(lambda: [item.name for item in service.list()] == ["other"])
    assert service.get("other").uuid == view.uuid
    assert (await bench.launch(service)).uuid != view.uuid  # of the name that is free now
    await service.stop_domain("demo", force=True)
    await service.undefine("demo")

    await asyncio.to_thread(virsh, "metadata", "other", NAMESPACE, "--remove", "--config")
    await bench.until(lambda: "no longer names its image" in service.get("other").reason)
    edited = before.replace("<name>demo", "<name>other")
    await asyncio.to_thread(virsh, "define", "/dev/stdin", given=edited)
    await bench.until(lambda: service.get("other").reason == "")

    await asyncio.to_thread(virsh, "undefine", "other")
    await asyncio.to_thread(virsh, "define", "/dev/stdin", given=edited.replace(view.uuid, OTHER_UUID))
    await bench.until(lambda: service.list() == [])
    assert Bindings(bench.settings.bindings).uuids() == set()
    await asyncio.to_thread(virsh, "undefine", "other")


@pytest.mark.host
async def test_one_whose_launch_failed(bench: Bench, watchful: None) -> None:
    """It says how its launch ended, also under another name; started without our hook, it is shown as it is."""
    service = await bench.service()
    task = asyncio.create_task(service.launch("demo"))
    await bench.until(lambda: any(view.state == "started" for view in service.list()))
    await bench.say(service.get("demo").uuid, "fail E41\n")
    with pytest.raises(Exception, match="E41"):
        await task
    await bench.until(lambda: bench.strays() == [])
    await asyncio.to_thread(virsh, "domrename", "demo", "other")
    await bench.until(lambda: [item.name for item in service.list()] == ["other"])
    assert service.get("other").state == "failed"
    assert "E41" in service.get("other").reason
    text = await asyncio.to_thread(virsh, "dumpxml", "--inactive", "other")
    await asyncio.to_thread(virsh, "define", "/dev/stdin", given=without_vsock(text))
    for _ in range(2):  # from `failed`, and from `stopped`
        await asyncio.to_thread(virsh, "start", "other")
        await bench.until(lambda: service.get("other").state == "running")
        assert "vsock device is not known" in service.get("other").reason
        await asyncio.to_thread(virsh, "destroy", "other")
        await bench.until(lambda: service.get("other").state == "stopped")
    # A transient machine of the same identity, beside the definition.
    await asyncio.to_thread(virsh, "create", "/dev/stdin", "--paused", given=without_vsock(text))
    await bench.until(lambda: service.get("other").state == "running" and service.get("other").halted != "")
    await asyncio.to_thread(virsh, "destroy", "other")
    await bench.until(lambda: service.get("other").state == "stopped")


@pytest.mark.host
async def test_a_snapshot_puts_another_file_before_the_disk(bench: Bench, watchful: None) -> None:
    """The machine runs on, and what is shown says so; its image is not read as if it were all, nor is its definition
    made anew over what was written since. The command that is named puts it back.
    """
    service = await bench.service()
    view = await bench.launch(service)
    files = frozenset({str(bench.images.root / "demo/disk.img")})

    async def users() -> None:
        await service.refuse_users("demo", view.image_id, files)

    with pytest.raises(AssertionError, match="internal snapshot"):  # libvirt has none in raw disks
        await asyncio.to_thread(virsh, "snapshot-create-as", "demo", "inside")
    await users()

    async def snapshot(overlay: Path) -> str:
        disk = f"vda,file={overlay},snapshot=external"
        await asyncio.to_thread(
            virsh, "snapshot-create-as", "demo", "one", "--disk-only", "--no-metadata", "--diskspec", disk
        )
        await bench.until(lambda: str(overlay) in service.get("demo").layer)
        assert service.get("demo").state == "running"
        with pytest.raises(Busy, match="blockcommit demo vda") as said:
            await users()
        return str(said.value)

    (command,) = re.findall(r"'virsh (blockcommit [^']*)'", await snapshot(bench.directory / "first"))
    await asyncio.to_thread(virsh, *command.split(), "--wait")
    await bench.until(lambda: service.get("demo").layer == "")
    await users()
    overlay = bench.directory / "overlay"
    await snapshot(overlay)
    await asyncio.to_thread(virsh, "destroy", "demo")
    await bench.until(lambda: service.get("demo").state == "stopped")
    for start in (service.launch("demo"), service.start_domain("demo")):
        with pytest.raises(NotSupported, match=str(overlay)):
            await start
    with pytest.raises(DomainRefused, match="blockcommit"):
        await service.adopt("demo", "demo")
    assert str(overlay) in await service.definition("demo")
    await bench.until(lambda: str(overlay) in service.get("demo").layer)
    with pytest.raises(Busy, match=str(overlay)):
        await users()
    # The same for whoever does not know the domain, as a stranger's.
    with pytest.raises(Busy, match="on top of its disk"):
        await service.refuse_users("demo", "another", files)
    await asyncio.to_thread(virsh, "undefine", "demo")
    await bench.until(lambda: service.list() == [])
    await users()
    await bench.until(lambda: bench.strays() == [])


@pytest.mark.host
async def test_a_stranger_runs_from_the_disk(bench: Bench) -> None:
    """What it changes is not read by others meanwhile; saved, it is not adopted: it would go on with its own kernel."""
    service = await bench.service()
    disk = bench.images.root / "demo/disk.img"
    text = (
        f"<domain type='qemu'><name>stranger</name><memory unit='MiB'>64</memory><os><type>hvm</type></os><devices>"
        f"<disk type='file'><driver name='qemu' type='raw'/><source file='{disk}'/><target dev='vda' bus='virtio'/>"
        "</disk></devices></domain>"
    )
    await asyncio.to_thread(virsh, "define", "/dev/stdin", given=text)
    await asyncio.to_thread(virsh, "start", "stranger", "--paused")
    with pytest.raises(Busy, match="'stranger', which is not ours"):
        await service.refuse_users("demo", "whatever", frozenset({str(disk)}))
    await asyncio.to_thread(virsh, "managedsave", "stranger")
    with pytest.raises(Busy, match="managedsave-remove stranger"):
        await service.adopt("stranger", "demo")
    await service.refuse_users("demo", "whatever", frozenset({str(disk)}))
    await asyncio.to_thread(virsh, "undefine", "stranger", "--managed-save")
    await bench.until(lambda: bench.strays() == [])  # others count machines


@pytest.mark.host
async def test_while_libvirtd_is_away(bench: Bench, watchful: None) -> None:
    """A definition is removed, another renamed, a machine ends: whatever came of it is shown afterwards."""
    bench.add_image("second")
    service = await bench.service()
    first = await bench.launch(service)
    await service.stop_domain("demo", force=True)
    await bench.launch(service, "second")
    await asyncio.to_thread(virsh, "undefine", "second")  # nothing but its machine is left
    await asyncio.to_thread(libvirtd.stop, signal.SIGTERM)
    await bench.until(lambda: not service.connection.connected)
    assert {view.name: view.state for view in service.list()} == {"demo": "stopped", "second": "running"}
    path = DEFINITIONS / "demo.xml"
    (DEFINITIONS / "other.xml").write_text(path.read_text().replace("<name>demo", "<name>other"))
    path.unlink()
    (machine,) = [int(entry.name) for entry in Path("/proc").glob("[0-9]*") if _is_machine(entry)]
    os.kill(machine, signal.SIGKILL)
    _gone(machine)
    await asyncio.to_thread(libvirtd.start)
    await bench.until(lambda: [(view.name, view.uuid) for view in service.list()] == [("other", first.uuid)])
    await bench.until(lambda: bench.strays() == [])
    assert Bindings(bench.settings.bindings).uuids() == {first.uuid}


def _is_machine(entry: Path) -> bool:
    try:
        return (entry / "comm").read_text().startswith("qemu-system")
    except OSError:
        return False


def _gone(pid: int) -> None:
    end = time.monotonic() + 120
    while Path(f"/proc/{pid}").exists() and "State:\tZ" not in Path(f"/proc/{pid}/status").read_text():
        assert time.monotonic() < end, "the machine does not end"
        time.sleep(0.02)
