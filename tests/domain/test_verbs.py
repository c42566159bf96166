"""Starting, showing and releasing domains, holding images, and a libvirt of another machine: on a real libvirtd."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import xml.etree.ElementTree as ET

import pytest

from jindiskd.domain import adoption, machine, xml
from jindiskd.domain.connection import Connection, is_remote, shown
from jindiskd.errors import Busy, NotFound, NotSupported, TimedOut

from .conftest import Bench

SOCKET = "/run/libvirt/libvirt-sock"


@pytest.mark.parametrize(
    ("uri", "remote"),
    [
        ("qemu:///system", False),
        ("qemu:///session", False),
        ("qemu+unix:///system?socket=/run/other/libvirt-sock", False),
        ("test:///default", False),
        ("qemu+ssh://root@host.example/system", True),
        ("qemu+tls://host.example:16514/system", True),
        ("qemu+tcp://127.0.0.1:7777/system", True),
        ("qemu://host.example/system", True),
        ("qemu+tcp://[::1]/system", True),
    ],
)
def test_a_uri_tells_whether_libvirt_is_here(uri: str, remote: bool) -> None:
    """By its host: a forwarded port may be anybody's."""
    assert is_remote(uri) is remote
    assert "root@" not in shown(uri)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<memory unit='KiB'>1048576</memory>", 1024),
        ("<memory>1048577</memory>", 1025),
        ("<memory unit='b'>1</memory>", 1),
        ("<memory unit='GiB'>2</memory>", 2048),
        ("<memory unit='quux'>2</memory>", None),
        ("<memory>many</memory>", None),
        ("", None),
    ],
)
def test_memory_is_read_in_its_unit(text: str, expected: int | None) -> None:
    """As libvirt writes it, rounded up."""
    assert xml.memory_mib(xml.parse(f"<domain>{text}</domain>")) == expected


def test_releasing_takes_away_ours_alone() -> None:
    """Our metadata and device; other metadata and other arguments stay."""
    text = f"""<domain xmlns:qemu='{xml.QEMU_URI}'><metadata>
      <jd:domain xmlns:jd='{xml.METADATA_URI}'><jd:image name='a' id='b' platform='snp'/></jd:domain>
      <o:os xmlns:o='http://other.example/'/></metadata>
      <qemu:commandline><qemu:arg value='-chardev'/><qemu:arg value='socket,id=jdvsock,path=/x'/>
      <qemu:arg value='-device'/><qemu:arg value='vhost-user-vsock-pci,id=jdvsock0,chardev=jdvsock'/>
      <qemu:arg value='-global'/><qemu:arg value='ICH9-LPC.disable_s3=1'/></qemu:commandline></domain>"""
    left = xml.parse(adoption.release(text))
    assert xml.binding_of(left) is None
    assert [child.tag for child in left.find("metadata")] == ["{http://other.example/}os"]
    arguments = [item.get("value") for item in left.iter(f"{{{xml.QEMU_URI}}}arg")]
    assert arguments == ["-global", "ICH9-LPC.disable_s3=1"]
    bare = xml.parse(adoption.release(text.replace("-global", "-chardev").replace("ICH9-LPC.disable_s3=1", "jdvsock")))
    assert bare.find(f"{{{xml.QEMU_URI}}}commandline") is None


async def running(bench: Bench, service, task: asyncio.Task, name: str = "demo"):
    """Play broker and guest of a start until its system runs."""
    await bench.until(lambda: task.done() or any(v.name == name and v.state == "started" for v in service.list()))
    if not task.done():
        uuid = service.get(name).uuid
        service.on_attested(uuid)
        service.on_released(uuid)
        await bench.say(uuid, "report\nattested\nkey\nunlocked\nrunning\n")
    return await task


@pytest.mark.host
async def test_a_domain_is_shown_stopped_and_started_as_it_is(bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its XML is libvirt's; started again it keeps its memory; what runs is not started twice.

    Its power button is pressed until it is off, as long as the caller waits.
    """
    service = await bench.service()
    planned = await service.plan("demo", name="other", memory_mib=300)
    assert ET.fromstring(planned).findtext("name") == "other"
    assert xml.memory_mib(xml.parse(planned)) == 300
    assert service.list() == []
    with pytest.raises(NotFound):
        await service.plan("none")
    with pytest.raises(NotFound):
        await service.start_domain("demo")
    await bench.launch(service, memory_mib=384)
    text = await service.definition("demo")
    assert xml.binding_of(xml.parse(text)).image == "demo"
    with pytest.raises(Busy, match="running already"):
        await service.start_domain("demo")
    with pytest.raises(NotSupported, match="domain undefine"):
        await service.release("demo")
    monkeypatch.setattr("jindiskd.domain.service.PRESS_S", 0.1)
    with pytest.raises(TimedOut, match="within 1 s"):
        await service.stop_domain("demo", force=False, timeout_s=1)  # its kernel does nothing, with the button either
    pressed = []

    async def press(connection: Connection, name: str, uuid: str) -> None:
        pressed.append(name)
        await (machine.power_off if len(pressed) == 3 else press_really)(connection, name, uuid)

    press_really = machine.shut_down
    monkeypatch.setattr(machine, "shut_down", press)
    await service.stop_domain("demo", force=False)  # a system that has come up when it is pressed for the third time
    assert pressed[:3] == ["demo"] * 3
    assert service.get("demo").state == "stopped"
    view = await running(bench, service, asyncio.create_task(service.start_domain("demo")))
    assert view.state == "running"
    assert xml.memory_mib(xml.parse(await service.definition("demo"))) == 384


@pytest.mark.host
async def test_an_image_that_is_read_does_not_start_and_one_that_runs_is_not_read(bench) -> None:
    """Whoever is first; what was refused can be done afterwards."""
    service = await bench.service()
    image = bench.images.get("demo").manifest
    with service.hold("demo", image.image_id, "it is being cloned"):
        with pytest.raises(Busy, match="being cloned"):
            await service.launch("demo")
        with pytest.raises(Busy, match="being cloned"), service.hold("demo", image.image_id, "x"):
            pass
    await bench.launch(service)
    with pytest.raises(Busy, match="runs from it"), service.hold("demo", image.image_id, "x"):
        pass


@pytest.mark.host
async def test_an_adopted_domain_is_released(bench) -> None:
    """Adopted, released: libvirt keeps it without anything of ours, and another service may adopt it again."""
    service = await bench.service()
    disk = bench.images.root / "demo/disk.img"
    text = f"""<domain type='qemu'><name>theirs</name><memory unit='MiB'>256</memory><vcpu>1</vcpu>
      <os><type arch='x86_64' machine='q35'>hvm</type></os><devices><disk type='file' device='disk'>
      <driver name='qemu' type='raw'/><source file='{disk}'/><target dev='vda' bus='virtio'/></disk>
      </devices></domain>"""
    await asyncio.to_thread(
        subprocess.run, ["virsh", "-c", "qemu:///system", "define", "/dev/stdin"], input=text, text=True, check=True,
        capture_output=True, timeout=300,
    )  # fmt: skip
    view = await service.adopt("theirs", "demo")
    await service.release("theirs")
    assert service.list() == []
    with pytest.raises(NotFound):
        await service.release("theirs")
    left = await asyncio.to_thread(
        subprocess.check_output, ["virsh", "-c", "qemu:///system", "dumpxml", "theirs"], text=True, timeout=300
    )
    assert "jdvsock" not in left
    assert xml.binding_of(xml.parse(left)) is None
    assert "<kernel>" in left
    assert (await service.adopt("theirs", "demo")).uuid == view.uuid


async def forward(path: str) -> tuple[asyncio.Server, int]:
    """A port of this machine behind which a libvirtd is, as a tunnel to another one's would be."""

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_unix_connection(path)
        await asyncio.gather(copy(reader, back), copy(there, writer))

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    return server, server.sockets[0].getsockname()[1]


@pytest.mark.host
async def test_a_libvirt_of_another_machine_is_shown_and_not_used(bench) -> None:
    """Domains there are listed by what their metadata claims, and can be stopped; starting needs the service there."""
    service = await bench.service()
    await bench.launch(service)
    uuid = service.get("demo").uuid
    server, port = await forward(SOCKET)
    bench.uri = f"qemu+tcp://127.0.0.1:{port}/system"
    far = await bench.service(bindings_dir=bench.directory / "far", runtime_dir=bench.directory / "far-run")
    try:
        assert far.connection.remote
        view = far.get(uuid)
        assert (view.name, view.image, view.state) == ("demo", "demo", "running")
        assert "another machine" in view.reason
        assert "<name>demo</name>" in await far.definition("demo")
        for refused in (far.launch("demo", name="x"), far.adopt("demo", "demo")):
            with pytest.raises(NotSupported, match="run jindiskd there"):
                await refused
        await far.stop_domain("demo", force=True)
        await bench.until(lambda: service.get("demo").state == "stopped")
        with pytest.raises(NotSupported, match="run jindiskd there"):
            await far.start_domain("demo")
    finally:
        await far.stop()
        bench.services.remove(far)
        bench.uri = "qemu:///system"
        server.close()
