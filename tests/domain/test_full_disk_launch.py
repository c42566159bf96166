"""Launches while there is no space for the record of a domain: an error that says so, and nothing is left or lost."""

from __future__ import annotations

import asyncio
import subprocess

import pytest
from fulldisk import small_disk

from jindiskd.domain import vsock
from jindiskd.domain.binding import Bindings
from jindiskd.errors import NoSpace

from .conftest import Bench

pytestmark = pytest.mark.host


def domains() -> list[str]:
    """What libvirt has, by name."""
    words = ["virsh", "-q", "-c", "qemu:///system", "list", "--all", "--name"]
    return subprocess.run(words, capture_output=True, text=True, check=True, timeout=300).stdout.split()


async def nothing_left(bench: Bench) -> None:
    """No process, no directory below the runtime directory, nothing half written beside the records."""
    await bench.until(lambda: bench.strays() == [])
    assert not list(bench.settings.vsock_dir.iterdir())
    assert not [path for path in bench.settings.bindings.iterdir() if path.suffix != ".json"]


async def test_a_launch_on_a_full_disk(bench: Bench) -> None:
    """A first launch defines nothing; one of a domain that is known keeps its record; with space both work."""
    with small_disk(bench.directory / "state", 16) as disk:
        (bench.directory / "state").chmod(0o755)
        service = await bench.service()
        disk.fill()
        with pytest.raises(NoSpace, match="state/domains"):
            await service.launch("demo")
        assert service.get("demo").state == "failed"
        assert "no space left" in service.get("demo").reason
        assert domains() == []
        await nothing_left(bench)
        disk.free()
        view = await bench.launch(service)
        await service.stop_domain("demo", force=True)
        record = Bindings(bench.settings.bindings).get(view.uuid)
        disk.fill()
        with pytest.raises(NoSpace):
            await service.launch("demo")
        assert Bindings(bench.settings.bindings).get(view.uuid) == record
        assert domains() == ["demo"]
        await nothing_left(bench)
        disk.free()
        again = await bench.launch(service)
        assert (again.uuid, again.state) == (view.uuid, "running")
        disk.fill()  # while it runs; what ends then ends as always
        await service.stop_domain("demo", force=True)
        assert service.get("demo").state == "stopped"
        await service.undefine("demo")
        assert domains() == []
        assert Bindings(bench.settings.bindings).uuids() == set()
        await service.stop()


async def test_an_adoption_on_a_full_disk(bench: Bench) -> None:
    """The definition stays its owner's."""
    disk_file = bench.images.root / "demo/disk.img"
    text = f"""<domain type='qemu'><name>theirs</name><memory unit='MiB'>256</memory><vcpu>1</vcpu>
      <os><type arch='x86_64' machine='q35'>hvm</type></os><devices><disk type='file' device='disk'>
      <driver name='qemu' type='raw'/><source file='{disk_file}'/><target dev='vda' bus='virtio'/></disk>
      </devices></domain>"""
    with small_disk(bench.directory / "state", 16) as disk:
        service = await bench.service()
        await asyncio.to_thread(_virsh, "define", "/dev/stdin", given=text)
        before = await asyncio.to_thread(_virsh, "dumpxml", "theirs")
        disk.fill()
        with pytest.raises(NoSpace):
            await service.adopt("theirs", "demo")
        assert await asyncio.to_thread(_virsh, "dumpxml", "theirs") == before
        assert service.list() == []
        disk.free()
        assert (await service.adopt("theirs", "demo")).state == "defined"
        await service.stop()


async def test_a_full_runtime_directory(bench: Bench) -> None:
    """The record of what is open for a machine: without it none is started; one that runs is not ended for it."""
    with small_disk(bench.directory / "run", 16) as disk:
        service = await bench.service()
        disk.fill()
        with pytest.raises(NoSpace, match="run/vsock"):
            await service.launch("demo")
        await nothing_left(bench)
        disk.free()
        task = asyncio.create_task(service.launch("demo"))
        await bench.until(lambda: task.done() or service.get("demo").state == "started")
        uuid = service.get("demo").uuid
        disk.fill()
        service.on_attested(uuid)
        service.on_released(uuid)
        await bench.say(uuid, "unlocked\nrunning\n")
        assert (await task).state == "running"
        assert vsock.read_record(bench.settings.vsock_dir / uuid) is not None
        await service.stop_domain("demo", force=True)
        await nothing_left(bench)
        await service.stop()


def _virsh(*words: str, given: str = "") -> str:
    done = subprocess.run(
        ["virsh", "-q", "-c", "qemu:///system", *words], input=given, capture_output=True, text=True, check=False,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout
