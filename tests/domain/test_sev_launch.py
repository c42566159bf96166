"""SEV and SEV-ES launches on a real libvirtd whose emulator stands in for one with SEV; the guest's part is played."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import libvirt
import pytest
import sevhost
import sevmounts

from jindiskd.attest.firmware import inspect_firmware
from jindiskd.attest.measure import LaunchInputs, launch_digest
from jindiskd.base import document
from jindiskd.base.platform import Platform
from jindiskd.base.secret import Secret
from jindiskd.broker.sev_owner import SevOwner
from jindiskd.domain.security import default_security
from jindiskd.domain.state import LaunchRefused
from jindiskd.guest.secret import TABLE
from jindiskd.image.manifest import Manifest
from jindiskd.keys.store import Store
from jindiskd.sim.sev_platform import SevPlatformKeys

from .conftest import ROOT, Bench, make_manifest

pytestmark = pytest.mark.host
FIRMWARE = ROOT / "build/tools/usr/share/ovmf/OVMF.amdsev.fd"


@pytest.fixture(scope="module")
def keys(host: None) -> Iterator[SevPlatformKeys]:
    """The platform of this host, as long as the tests of this file run."""
    made = SevPlatformKeys.generate()
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    socket = Path("/run/sev-processor-domain.sock")
    processor = sevhost.SevHost(made, socket)
    asyncio.run_coroutine_threadsafe(processor.start(), loop).result(60)
    with sevmounts.sev_host(Path("/run/sev-mounts-domain"), socket):
        yield made
    asyncio.run_coroutine_threadsafe(processor.stop(), loop).result(60)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(60)
    loop.close()


class SevBench:
    """A bench with an image for SEV, and its owner's side."""

    def __init__(self, bench: Bench, keys: SevPlatformKeys) -> None:
        self.bench = bench
        self.directory = bench.images.root / "demo"
        self.store = Store.open(f"sqlite:///{bench.directory}/keys.db", Secret.random(32))
        bench.sev = SevOwner(self.store, certificates=bench.directory / "sev", simulated=lambda: keys.root)

    def image(self, platform: Platform) -> Manifest:
        """Make `demo` an image of this platform, with its key in the store."""
        firmware = self.bench.directory / FIRMWARE.name
        shutil.copy(FIRMWARE, firmware)
        manifest = make_manifest(self.directory, "demo", platform, firmware)
        (self.directory / "manifest.json").write_bytes(document.dump(manifest))
        inputs = LaunchInputs(
            firmware=firmware,
            kernel=self.directory / "vmlinuz",
            initrd=self.directory / "initrd",
            cmdline=(self.directory / "cmdline").read_text(),
            vcpus=1,
            cpu_model="EPYC-Milan",
        )
        self.store.add_image(manifest.image_id, "demo", platform, "default/x/root", Secret(b"k" * 32))
        self.store.activate(manifest.image_id, [launch_digest(platform.tee, inputs)])
        return manifest


@pytest.fixture
async def sev(bench: Bench, keys: SevPlatformKeys) -> AsyncIterator[SevBench]:
    made = SevBench(bench, keys)
    yield made
    made.store.close()


def guest_memory(address: int, size_bytes: int) -> bytes:
    """What the machine has at an address, by its own monitor."""
    done = subprocess.run(
        ["virsh", "qemu-monitor-command", "demo", "--hmp", f"xp /{size_bytes}xb {address}"],
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    return bytes(
        int(word, 16) for line in done.stdout.splitlines() if ":" in line for word in line.split(":")[1].split()
    )


@pytest.mark.parametrize("platform", [Platform.SIMULATED_SEV, Platform.SIMULATED_SEV_ES])
async def test_a_launch_is_measured_approved_and_given_its_secret(sev: SevBench, platform: Platform) -> None:
    """Paused until it is approved; then the secret lies where the firmware looks for it, and the guest runs."""
    sev.image(platform)
    service = await sev.bench.service()
    stages: list[str] = []
    task = asyncio.create_task(service.launch("demo", progress=stages.append))
    await sev.bench.until(lambda: task.done() or any(view.state == "released" for view in service.list()))
    if task.done():
        await task
    area = inspect_firmware(FIRMWARE).secret_address
    assert area is not None
    assert guest_memory(area, 16) == TABLE.bytes_le
    await sev.bench.say(service.get("demo").uuid, "boot\nunlocked\nrunning\n")
    assert (await task).state == "running"
    assert stages == ["starting", "started", "attested", "released", "unlocked", "running"]
    row = sev.store.audit_rows()[-1]
    assert (row["kind"], row["simulated"]) == ("released", True)
    conn = libvirt.open("qemu:///system")
    info = conn.lookupByName("demo").launchSecurityInfo()
    conn.close()
    security = default_security(platform)
    assert security is not None
    assert info["sev-policy"] == security.policy
    await service.stop_domain("demo", force=True)
    await sev.bench.until(lambda: sev.bench.strays() == [])


async def test_another_kernel_never_runs(sev: SevBench) -> None:
    """The measurement says so, nothing was injected, and the machine is off without having run."""
    sev.image(Platform.SIMULATED_SEV)
    (sev.directory / "vmlinuz").write_bytes((sev.directory / "vmlinuz").read_bytes() + b"\0")
    service = await sev.bench.service()
    with pytest.raises(LaunchRefused, match="not the expected ones"):
        await service.launch("demo")
    assert service.get("demo").state == "refused"
    assert sev.store.audit_rows()[-1]["kind"] == "refused"
    assert all(row["kind"] != "released" for row in sev.store.audit_rows())
    await sev.bench.until(lambda: sev.bench.strays() == [])
