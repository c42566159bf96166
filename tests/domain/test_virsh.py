"""What people do with virsh to domains of ours: the real hook in a real libvirtd, and the service that answers it."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import SimpleNamespace

import libvirtd
import pytest

from jindiskd.base.platform import Platform
from jindiskd.domain import judge, vsock
from jindiskd.domain.binding import Binding, Bindings
from jindiskd.domain.check import DomainRefused
from jindiskd.domain.judge import StartRefused
from jindiskd.domain.service import DomainService
from jindiskd.domain.state import DomainView
from jindiskd.errors import Busy, NotFound, NotSupported

from .conftest import Bench, add_image

pytestmark = [pytest.mark.host]
HOOK = Path(__file__).resolve().parents[2] / "libvirt-hooks/qemu"
RUN = Path("/run/jindiskd")


@pytest.fixture(scope="module", autouse=True)
def hook(host: None) -> Iterator[Path]:
    """The hook, installed; libvirtd looks for it on SIGHUP."""
    folder = Path("/etc/libvirt/hooks")
    folder.mkdir(parents=True, exist_ok=True)
    installed = folder / "qemu"
    shutil.copy(HOOK, installed)
    installed.chmod(0o755)
    found = libvirtd.pid()
    assert found is not None
    os.kill(found, signal.SIGHUP)
    end = time.monotonic() + 120
    while "refused" not in probe():  # until libvirtd has found it
        assert time.monotonic() < end, "libvirtd does not call the hook"
        time.sleep(0.1)
    yield installed
    installed.unlink()


def probe() -> str:
    """Start a domain that claims to be ours while no service is there."""
    text = """<domain type='qemu'><name>probe</name><memory>1024</memory><metadata>
    <jd:domain xmlns:jd='https://jindisk.org/xmlns/libvirt/domain/1'/></metadata><os><type>hvm</type></os></domain>"""
    done = subprocess.run(
        ["virsh", "-c", "qemu:///system", "create", "/dev/stdin", "--paused"],
        input=text, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    if done.returncode == 0:
        virsh("destroy", "probe")
        return ""
    return "refused" if "jindisk: domain 'probe' is not started" in done.stderr else done.stderr


def virsh(*words: str) -> SimpleNamespace:
    done = subprocess.run(
        ["virsh", "-c", "qemu:///system", *words], capture_output=True, text=True, check=False, timeout=300
    )
    return SimpleNamespace(ok=done.returncode == 0, out=done.stdout, err=done.stderr.strip())


async def virsh_(*words: str) -> SimpleNamespace:
    """In a thread: the hook that runs meanwhile is answered by this event loop."""
    return await asyncio.to_thread(virsh, *words)


@pytest.fixture
async def here(host: None, directory: Path) -> AsyncIterator[Bench]:
    """Surroundings whose runtime directory is the one that the hook knows, with an image and a domain of others."""
    made = Bench(directory)
    made.settings = type(made.settings)(
        runtime_dir=RUN,
        console_dir=made.settings.console_dir,
        simulated_root=made.settings.simulated_root,
        vhost_device_vsock=made.settings.vhost_device_vsock,
        memory_mib=256,
    )
    add_image(made.images, "demo")
    foreign(made, "theirs")
    yield made
    for service in made.services:
        await service.stop()
    for name in virsh("list", "--all", "--name").out.split():
        virsh("destroy", name)
        virsh("undefine", name)
    for writer in made.writers:
        writer.close()
    for home in (RUN / "vsock").glob("*"):
        vsock.clear(home)
    shutil.rmtree(RUN, ignore_errors=True)


def foreign(bench: Bench, name: str, *extra: str) -> None:
    """A domain as virt-install makes it, of the image's disk."""
    disk = bench.images.root / "demo/disk.img"
    words = [
        "virt-install", "--connect", "qemu:///system", "--name", name, "--memory", "256", "--virt-type", "qemu",
        "--import", "--osinfo", "generic", "--machine", "q35", "--graphics", "none", "--network", "none",
        "--disk", f"path={disk},format=raw,bus=virtio", "--print-xml", "--check", "all=off", *extra,
    ]  # fmt: skip
    text = subprocess.run(words, capture_output=True, text=True, check=True, timeout=120).stdout
    subprocess.run(
        ["virsh", "-c", "qemu:///system", "define", "/dev/stdin"], input=text, check=True, text=True,
        capture_output=True, timeout=300,
    )  # fmt: skip


async def adopted(bench: Bench) -> tuple[DomainService, DomainView]:
    service = await bench.service()
    return service, await service.adopt("theirs", "demo")


async def come_up(bench: Bench, service: DomainService, uuid: str) -> None:
    """Play the guest and the broker."""
    await bench.until(lambda: service.get(uuid).state == "started")
    service.on_attested(uuid)
    service.on_released(uuid)
    await bench.say(uuid, "report\nattested\nkey\nunlocked\nrunning\n")
    await bench.until(lambda: service.get(uuid).state == "running")


async def test_virsh_starts_and_ends_an_adopted_domain(here: Bench) -> None:
    """Twice: each time with fresh listeners, and nothing is left when it is off."""
    service, view = await adopted(here)
    assert (view.name, view.image, view.state) == ("theirs", "demo", "defined")
    for _ in range(2):
        started = await virsh_("start", "theirs")
        assert started.ok, started.err
        await come_up(here, service, view.uuid)
        assert service.get("theirs").cid >= 3
        assert (await virsh_("destroy", "theirs")).ok
        await here.until(lambda: service.get("theirs").state == "stopped")
        await here.until(lambda: here.strays() == [] and not list((RUN / "vsock").iterdir()))
    assert [image for _, _, image in here.opened] == [view.image_id] * 2


async def test_the_simulated_firmware_is_there_when_the_guest_asks(here: Bench) -> None:
    """`start` waits for it; it measures what libvirt boots."""
    service, view = await adopted(here)
    assert (await virsh_("start", "theirs")).ok
    socket = RUN / "vsock" / view.uuid / "guest_19013"
    await here.until(socket.exists)
    reader, writer = await asyncio.open_unix_connection(socket)
    writer.write(b"JSIM" + (1).to_bytes(4, "little") + bytes(64))
    assert (await reader.read())[:4] == bytes(4)
    writer.close()
    await service.stop_domain("theirs", force=True)


@pytest.mark.parametrize(
    ("file", "said"), [("vmlinuz", "its kernel"), ("initrd", "its initrd"), ("cmdline", "its kernel command line")]
)
async def test_a_changed_boot_file_is_refused_by_virsh(here: Bench, file: str, said: str) -> None:
    """In our sentence, before QEMU is there; put back, it starts."""
    service, view = await adopted(here)
    path = here.images.root / "demo" / file
    original = path.read_bytes()
    if file == "cmdline":  # what libvirt boots is in the definition
        text = virsh("dumpxml", "--inactive", "theirs").out.replace("console=ttyS0", "console=ttyS0 init=/bin/sh")
        assert define(text)
    else:
        path.write_bytes(original + b"\0")
    done = await virsh_("start", "theirs")
    assert not done.ok
    assert f"jindisk: domain 'theirs' is not started: {said}" in done.err
    assert "jindiskctl domain adopt theirs demo" in done.err
    assert service.get("theirs").state == "defined"
    assert here.strays() == []
    path.write_bytes(original)
    await service.adopt("theirs", "demo")
    assert (await virsh_("start", "theirs")).ok
    await service.stop_domain(view.uuid, force=True)


def define(text: str) -> bool:
    """Define a domain; a replaced one keeps its UUID."""
    done = subprocess.run(
        ["virsh", "-c", "qemu:///system", "define", "/dev/stdin"], input=text, check=False, text=True,
        capture_output=True, timeout=300,
    )  # fmt: skip
    return done.returncode == 0


async def test_what_was_edited_is_noticed_before_the_start(here: Bench) -> None:
    """The list says what the start would say; undone, it says nothing; a removed binding is named too."""
    service, _view = await adopted(here)
    before = virsh("dumpxml", "--inactive", "theirs").out
    assert define(before.replace("EPYC-Milan", "EPYC-Rome"))
    await here.until(lambda: "processor model, EPYC-Rome" in service.get("theirs").reason)
    assert define(before)
    await here.until(lambda: service.get("theirs").reason == "")
    assert (await virsh_("metadata", "theirs", "https://jindisk.org/xmlns/libvirt/domain/1", "--remove", "--config")).ok
    without = virsh("dumpxml", "--inactive", "theirs").out
    assert define(without)
    await here.until(lambda: "no longer names its image" in service.get("theirs").reason)


async def test_a_clone_is_not_adopted_by_its_metadata(here: Bench) -> None:
    """Another UUID: it claims the image, and is told what to do."""
    service, view = await adopted(here)
    text = virsh("dumpxml", "--inactive", "theirs").out.replace(view.uuid, "1c1d0000-5e70-4000-8000-0000000000aa")
    assert define(text.replace("<name>theirs", "<name>clone"))
    done = await virsh_("start", "clone")
    assert not done.ok
    assert "was never adopted: run 'jindiskctl domain adopt clone demo'" in done.err
    assert [known.name for known in service.list()] == ["theirs"]


async def test_a_revoked_image_and_a_rebuilt_one(here: Bench) -> None:
    """The key store's word and the image's identity are looked at before each start."""
    service, _ = await adopted(here)
    service._judge._key_problem = lambda _image: "is revoked"
    done = await virsh_("start", "theirs")
    assert "the key of image 'demo' is revoked" in done.err
    service._judge._key_problem = lambda _image: ""
    manifest = here.images.root / "demo/manifest.json"
    image_id = here.images.get("demo").manifest.image_id
    manifest.write_text(manifest.read_text().replace(image_id, "00000000-0000-4000-8000-000000000000"))
    assert "has been built anew" in (await virsh_("start", "theirs")).err
    manifest.unlink()
    assert "is not in the store" in (await virsh_("start", "theirs")).err


async def test_a_sev_domain_is_refused_with_the_command_that_can(
    here: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No hook runs between QEMU's launch and the guest's first instruction."""
    monkeypatch.setattr(judge, "enforcement_problem", lambda _sha256: "")  # the image is built for emulation
    service, view = await adopted(here)
    manifest = here.images.root / "demo/manifest.json"
    manifest.write_text(manifest.read_text().replace('"simulated-snp"', '"sev"'))
    image_id = here.images.get("demo").manifest.image_id
    Bindings(here.settings.bindings).put(view.uuid, Binding(image="demo", image_id=image_id, platform=Platform.SEV))
    service._judge._host_problem = lambda _platform: ""  # type: ignore[method-assign]
    done = await virsh_("start", "theirs")
    assert not done.ok
    assert "'jindiskctl launch demo --name theirs'" in done.err


async def test_the_service_stopped_and_started_again(here: Bench) -> None:
    """Ours do not start without it, others do; a new service starts ours again, and knows what runs."""
    service, view = await adopted(here)
    await service.stop()
    done = await virsh_("start", "theirs")
    assert not done.ok
    assert "systemctl start jindiskd" in done.err
    plain = "<domain type='qemu'><name>plain</name><memory>1024</memory><os><type>hvm</type></os></domain>"
    assert define(plain)
    assert (await virsh_("start", "plain")).ok
    again = await here.service()
    assert again.get("theirs").state == "defined"
    assert (await virsh_("start", "theirs")).ok
    await come_up(here, again, view.uuid)
    await again.stop()
    third = await here.service()
    assert third.get("theirs").state == "running"
    assert (await virsh_("destroy", "theirs")).ok
    await here.until(lambda: third.get("theirs").state == "stopped")
    await here.until(lambda: here.strays() == [])


async def test_a_slow_service_refuses_in_time(here: Bench) -> None:
    """libvirt would wait for ever; the service gives up before the hook does, and nothing is left open."""
    service, _ = await adopted(here)
    inner = service._judge.problem

    def slow(*words: object) -> str:
        time.sleep(4)
        return inner(*words)  # type: ignore[arg-type]  # passed on

    service._judge.problem = slow  # type: ignore[method-assign]
    done = await virsh_("start", "theirs")
    assert not done.ok
    assert "in time" in done.err or "within 2 s" in done.err
    await here.until(lambda: here.strays() == [])
    assert service.get("theirs").state in {"defined", "failed"}
    service._judge.problem = inner  # type: ignore[method-assign]
    assert (await virsh_("start", "theirs")).ok
    await service.stop_domain("theirs", force=True)


async def test_a_start_that_fails_after_the_hook_leaves_nothing(here: Bench) -> None:
    """QEMU refuses what libvirt accepted: libvirt's own message, and all that was prepared is gone."""
    service, _ = await adopted(here)
    text = virsh("dumpxml", "--inactive", "theirs").out
    assert define(text.replace("value='-chardev'/>", "value='-nonsense'/><qemu:arg value='-chardev'/>", 1))
    done = await virsh_("start", "theirs")
    assert not done.ok
    assert "nonsense" in done.err
    await here.until(lambda: here.strays() == [])
    await here.until(lambda: service.get("theirs").state == "failed")
    assert "libvirt did not complete its start" in service.get("theirs").reason
    assert define(text)
    assert (await virsh_("start", "theirs")).ok
    await service.stop_domain("theirs", force=True)


async def test_launch_starts_an_adopted_domain_as_it_is(here: Bench) -> None:
    """The owner's devices stay; what would not attest is refused with the same sentence."""
    foreign(here, "other", "--watchdog", "i6300esb")
    service = await here.service()
    await service.adopt("other", "demo")
    task = asyncio.create_task(service.launch("demo", name="other"))
    await here.until(lambda: service.get("other").state == "started" or task.done())
    uuid = service.get("other").uuid
    service.on_attested(uuid)
    service.on_released(uuid)
    await here.say(uuid, "report\nattested\nkey\nunlocked\nrunning\n")
    assert (await task).state == "running"
    assert "i6300esb" in virsh("dumpxml", "other").out
    await service.stop_domain("other", force=True)
    path = here.images.root / "demo/vmlinuz"
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(StartRefused, match="its kernel"):
        await service.launch("demo", name="other")


async def test_what_cannot_be_adopted(here: Bench) -> None:
    """No such domain, one that runs, one that libvirt forgets, one with another disk, an image for other hardware."""
    service = await here.service()
    with pytest.raises(NotFound):
        await service.adopt("nonesuch", "demo")
    with pytest.raises(NotFound):
        await service.adopt("theirs", "nonesuch")
    before = virsh("dumpxml", "--inactive", "theirs").out
    assert define(before.replace("disk.img", "other.img"))
    with pytest.raises(DomainRefused, match=r"<disk> with the image's disk, '.*', is not there"):
        await service.adopt("theirs", "demo")
    assert define(before)
    (here.images.root / "demo/disk.img").touch()
    assert (await virsh_("start", "theirs")).ok, "not ours: the hook leaves it alone"
    with pytest.raises(Busy):
        await service.adopt("theirs", "demo")
    assert (await virsh_("destroy", "theirs")).ok
    manifest = here.images.root / "demo/manifest.json"
    manifest.write_text(manifest.read_text().replace('"simulated-snp"', '"snp"'))
    with pytest.raises(NotSupported):
        await service.adopt("theirs", "demo")
    assert service.list() == []
    assert "jindisk.org" not in virsh("dumpxml", "--inactive", "theirs").out


async def test_a_restart_of_libvirtd_harms_no_running_guest(here: Bench) -> None:
    """Its `reconnect` hook succeeds whatever the service does; the view goes on."""
    service, view = await adopted(here)
    assert (await virsh_("start", "theirs")).ok
    await come_up(here, service, view.uuid)
    await asyncio.to_thread(libvirtd.restart)
    await here.until(lambda: service.connection.connected)
    assert "running" in virsh("domstate", "theirs").out
    assert service.get("theirs").state == "running"
    assert (await virsh_("destroy", "theirs")).ok
    await here.until(lambda: service.get("theirs").state == "stopped")


async def test_undefined_by_virsh(here: Bench) -> None:
    """It is off the list, and its binding is forgotten: a domain made again under its UUID is not ours."""
    service, view = await adopted(here)
    assert (await virsh_("undefine", "theirs")).ok
    await here.until(lambda: service.list() == [])
    assert Bindings(here.settings.bindings).get(view.uuid) is None


async def test_a_domain_that_launch_made_is_started_by_virsh_too(here: Bench) -> None:
    """And while it runs, another domain of the same image is told who has it."""
    service = await here.service()
    view = await here.launch(service)
    await service.stop_domain("demo", force=True)
    await service.adopt("theirs", "demo")
    started = await virsh_("start", "demo")
    assert started.ok, started.err
    await come_up(here, service, view.uuid)
    done = await virsh_("start", "theirs")
    assert not done.ok
    assert "image 'demo' is busy: domain 'demo' uses it" in done.err
    await service.stop_domain("demo", force=True)
