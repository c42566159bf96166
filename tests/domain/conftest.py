"""What the domain tests share: an image in a store of their own, and a service on the libvirtd of scripts/testenv."""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from pathlib import Path

import libvirt
import pytest
from smallroot import idle_kernel

from jindiskd.base import document
from jindiskd.base.platform import Platform
from jindiskd.broker.sev import SevSide
from jindiskd.domain import following, launch, vsock
from jindiskd.domain.service import DomainService, DomainSettings
from jindiskd.domain.state import DomainView
from jindiskd.image.manifest import SCHEMA, BootFile, Manifest, Shape, Volume
from jindiskd.image.store import ImageStore

ROOT = Path(__file__).resolve().parents[2]
FIRMWARE = ROOT / "build/tools/usr/share/ovmf/OVMF.fd"
VSOCK = ROOT / "build/tools/usr/bin/vhost-device-vsock"
URI = "qemu:///system"


def make_manifest(
    directory: Path, name: str = "demo", platform: Platform = Platform.SIMULATED_SNP, firmware: Path = FIRMWARE
) -> Manifest:
    """A manifest for whatever files are in `directory`."""

    def entry(file: str) -> BootFile:
        data = (directory / file).read_bytes()
        return BootFile(file=file, size_bytes=len(data), sha256=hashlib.sha256(data).digest())

    return Manifest(
        schema=SCHEMA,
        image_id=f"00000000-0000-4000-8000-{hashlib.sha256(name.encode()).hexdigest()[:12]}",
        name=name,
        created="2026-01-01T00:00:00Z",
        platform=platform,
        base_sha256=bytes(32),
        base_kind="disk",
        distribution="",
        kernel_release="6.1",
        disk_size_bytes=(directory / "disk.img").stat().st_size,
        partitions=(),
        volume=Volume(format="luks2", uuid="", cipher=""),
        kernel=entry("vmlinuz"),
        initrd=entry("initrd"),
        cmdline=entry("cmdline"),
        shape=Shape(
            firmware=str(firmware),
            firmware_sha256=hashlib.sha256(firmware.read_bytes()).digest() if firmware.exists() else bytes(32),
            vcpus=1,
            cpu_model="EPYC-Milan",
        ),
        launch_digest=b"",
        broker_spki_sha256=bytes(32),
        resource="default/x/root",
    )


def add_image(store: ImageStore, name: str) -> Manifest:
    """An image whose guest does nothing: broker and guest are played by the tests."""
    directory = store.root / name
    directory.mkdir(mode=0o755)
    (directory / "disk.img").write_bytes(bytes(1 << 20))
    (directory / "vmlinuz").write_bytes(idle_kernel())
    (directory / "initrd").write_bytes(b"no initrd" * 1000)
    (directory / "cmdline").write_text("console=ttyS0 panic=5 <&'\">")
    # A copy: the user that QEMU runs as cannot read a checkout in somebody's home directory.
    firmware = store.root.parent / FIRMWARE.name
    if not firmware.exists():
        shutil.copy(FIRMWARE, firmware)
    manifest = make_manifest(directory, name, firmware=firmware)
    (directory / "manifest.json").write_bytes(document.dump(manifest))
    return manifest


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    """A manifest whose files are in the test's directory."""
    for file in ("disk.img", "vmlinuz", "initrd", "cmdline"):
        (tmp_path / file).write_text(file)
    return make_manifest(tmp_path)


@pytest.fixture(scope="session")
def host() -> None:
    """Only where libvirtd is a throw-away one."""
    if os.environ.get("JD_TESTENV") != "1":
        pytest.skip("needs a libvirtd of its own; run inside scripts/testenv")
    for needed in (FIRMWARE, VSOCK):
        if not needed.exists():
            pytest.skip(f"{needed} is missing; run scripts/setup")


class Listener:
    """Stands where the broker listens."""

    def __init__(self) -> None:
        self.server: asyncio.Server | None = None

    async def close(self) -> None:
        if self.server is not None:
            self.server.close()


class Bench:
    """A service's surroundings; services come and go on it."""

    def __init__(self, directory: Path, uri: str = URI) -> None:
        self.directory, self.uri = directory, uri
        self.images = ImageStore(directory / "images")
        self.opened: list[tuple[Path, str, str]] = []
        self.settings = DomainSettings(
            runtime_dir=directory / "run",
            console_dir=directory / "state" / "consoles",
            simulated_root=directory / "state" / "simulated",
            vhost_device_vsock=VSOCK,
            memory_mib=256,
            launch_timeout_s=120,
        )
        self.services: list[DomainService] = []
        self.sev: SevSide | None = None
        self.writers: list[asyncio.StreamWriter] = []

    def add_image(self, name: str) -> Manifest:
        """Another image in the store."""
        return add_image(self.images, name)

    async def open_broker(self, path: Path, domain_uuid: str, image_id: str) -> Listener:
        """A listener that hangs up on everybody."""
        self.opened.append((path, domain_uuid, image_id))
        listener = Listener()
        path.unlink(missing_ok=True)
        listener.server = await asyncio.start_unix_server(lambda _r, w: w.close(), path)
        return listener

    async def service(self, **changes: object) -> DomainService:
        """A service that is connected and has looked at all domains."""
        service = DomainService(
            uri=self.uri,
            images=self.images,
            open_broker=self.open_broker,
            settings=replace(self.settings, **changes),  # type: ignore[arg-type]  # whatever the test changes
            sev=self.sev,
        )
        self.services.append(service)
        await service.start()
        async with asyncio.timeout(120):
            await service.ready.wait()
        return service

    @staticmethod
    async def until(condition: Callable[[], bool], *, seconds: float = 120.0) -> None:
        """Wait for a condition with a deadline."""
        async with asyncio.timeout(seconds):
            while not condition():  # noqa: ASYNC110 - conditions of other processes have no event
                await asyncio.sleep(0.02)

    async def say(self, uuid: str, words: str) -> None:
        """Say progress words as the guest of a domain would; the connection stays open."""
        _reader, writer = await asyncio.open_unix_connection(self.settings.runtime_dir / "vsock" / uuid / "guest_19014")
        writer.write(words.encode())
        await writer.drain()
        self.writers.append(writer)

    async def launch(self, service: DomainService, name: str = "demo", **options: object) -> DomainView:
        """Launch an image, playing broker and guest up to a running system."""
        task = asyncio.create_task(service.launch(name, **options))  # type: ignore[arg-type]  # as the test gives them
        await self.until(lambda: task.done() or any(v.name == name and v.state == "started" for v in service.list()))
        if task.done():
            await task
        uuid = service.get(name).uuid
        service.on_attested(uuid)
        service.on_released(uuid)
        await self.say(uuid, "report\nattested\nkey\nunlocked\nrunning\n")
        return await task

    def strays(self) -> list[str]:
        """Processes whose arguments name this bench: what may be left behind."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    words = (entry / "cmdline").read_bytes().split(b"\0")
                except OSError:
                    continue
                if any(os.fsencode(self.directory) in word for word in words[1:]):
                    found.append(b" ".join(words).decode(errors="replace")[:200])
        return found


@pytest.fixture
def directory() -> Iterator[Path]:
    """A directory that the user QEMU runs as can search, unlike pytest's own."""
    path = Path(tempfile.mkdtemp(prefix="jd-", dir="/run" if os.access("/run", os.W_OK) else None))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path, ignore_errors=True)


def remove_domains(directory: Path, uri: str) -> None:
    """Take away every domain with files in the directory, whichever service made it."""
    conn = libvirt.open(uri)
    try:
        for dom in conn.listAllDomains():
            if str(directory) in dom.XMLDesc():
                if dom.isActive():
                    dom.destroy()
                dom.undefine()
    finally:
        conn.close()


@pytest.fixture
async def bench(host: None, directory: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Bench]:
    """Surroundings with one image, `demo`; all domains and services are gone afterwards."""
    monkeypatch.setattr(following, "SETTLE_S", 0.3)  # guests that are played do not power themselves off
    monkeypatch.setattr(launch, "WAITING_PAUSE_S", 0.3)
    made = Bench(directory)
    add_image(made.images, "demo")
    yield made
    await cleared(made)


async def cleared(made: Bench) -> None:
    """Take away what a test left."""
    for service in made.services:
        for view in service.list():
            try:
                await service.stop_domain(view.uuid, force=True)
                await service.undefine(view.uuid)
            except Exception:  # noqa: BLE001 - the domain may be gone, the service stopped
                pass
        await service.stop()
    for writer in made.writers:
        writer.close()
    remove_domains(made.directory, made.uri)
    for home in made.settings.vsock_dir.glob("*"):
        vsock.clear(home)
