"""SEV and SEV-ES launches on a real libvirtd whose emulator stands in for one with SEV; the guest's part is played."""

from __future__ import annotations

import asyncio
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime
from pathlib import Path

import libvirt
import pytest
import sevmounts

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "broker"))
from brokerprocess import BrokerProcess

from jindiskd.attest.collateral import CollateralCache
from jindiskd.attest.collecting import Collector
from jindiskd.attest.firmware import inspect_firmware
from jindiskd.attest.measure import LaunchInputs, launch_digest
from jindiskd.base import document
from jindiskd.base.endpoint import Endpoint
from jindiskd.base.platform import Platform
from jindiskd.base.secret import Secret
from jindiskd.broker.relay import Relay
from jindiskd.broker.sev_owner import SevOwner
from jindiskd.broker.sev_remote import RemoteOwner
from jindiskd.domain.security import default_security
from jindiskd.domain.state import DomainView, LaunchRefused
from jindiskd.guest.secret import TABLE
from jindiskd.image.manifest import Manifest
from jindiskd.kbs.client import BrokerUnreachable
from jindiskd.keys.store import Store
from jindiskd.policy.rules import ReleaseRules
from jindiskd.sim.pki import SimulatedRoot
from jindiskd.sim.sev_platform import SevPlatformKeys

from .conftest import ROOT, Bench, make_manifest

pytestmark = pytest.mark.host
FIRMWARE = ROOT / "build/tools/usr/share/ovmf/OVMF.amdsev.fd"


@pytest.fixture(scope="module")
def keys(host: None) -> Iterator[SevPlatformKeys]:
    """The platform of this host, as long as the tests of this file run."""
    made = SevPlatformKeys.generate()
    with sevmounts.sev_machine("domain", made):
        yield made


class SevBench:
    """A bench with an image for SEV, and its owner's side."""

    def __init__(self, bench: Bench, keys: SevPlatformKeys) -> None:
        self.bench, self.keys = bench, keys
        self.directory = bench.images.root / "demo"
        self.store = Store.open(f"sqlite:///{bench.directory}/keys.db", Secret.random(32))
        bench.sev = SevOwner(
            self.store,
            certificates=bench.directory / "sev",
            collector=Collector(CollateralCache(bench.directory / "collateral")),
            simulated=lambda: keys.root,
        )

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


@pytest.fixture(scope="module")
def root() -> SimulatedRoot:
    return SimulatedRoot.generate(now=datetime.now(UTC))


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


async def waiting(sev: SevBench, task: asyncio.Task[DomainView]) -> int:
    """The approval that a launch waits for, as the domain's reason names it; granted."""
    service = sev.bench.services[-1]
    await sev.bench.until(lambda: task.done() or any(view.reason for view in service.list()))
    if task.done():
        await task
    (approval,) = sev.store.approvals.list()
    view = service.get("demo")
    assert view.state == "starting"
    assert f"jindiskctl approval approve {approval.number}" in view.reason
    sev.store.approvals.grant(approval.number)
    return approval.number


@pytest.mark.parametrize("platform", [Platform.SIMULATED_SEV, Platform.SIMULATED_SEV_ES])
async def test_a_launch_is_measured_approved_and_given_its_secret(sev: SevBench, platform: Platform) -> None:
    """Paused until it is approved; then the secret lies where the firmware looks for it, and the guest runs."""
    image_id, by_hand = sev.image(platform).image_id, platform is Platform.SIMULATED_SEV
    sev.store.set_rules(image_id, ReleaseRules(approval=by_hand))
    service = await sev.bench.service()
    stages: list[str] = []
    task = asyncio.create_task(service.launch("demo", progress=stages.append))
    waits = [f"waiting for approval {await waiting(sev, task)}"] if by_hand else []
    await sev.bench.until(lambda: task.done() or any(view.state == "released" for view in service.list()))
    if task.done():
        await task
    area = inspect_firmware(FIRMWARE).secret_address
    assert area is not None
    assert guest_memory(area, 16) == TABLE.bytes_le
    await sev.bench.say(service.get("demo").uuid, "boot\nunlocked\nrunning\n")
    assert (await task).state == "running"
    assert stages == ["starting", *waits, "started", "attested", "released", "unlocked", "running"]
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


class OwnersBroker:
    """A broker of the owner's as a process of its own, which has the key of `demo`."""

    def __init__(self, sev: SevBench, root: SimulatedRoot, platform: Platform) -> None:
        manifest = sev.image(platform)
        public = sev.bench.directory / "simulated-sev-public.json"
        public.write_bytes(document.dump(sev.keys.root))
        settings = {"allow_simulated": True, "simulated_sev": str(public)}
        self.process = BrokerProcess(sev.bench.directory / "owner", root, broker=settings)
        self.process.start()
        digest = sev.store.image(manifest.image_id).launch_digests
        self.process.ctl(
            "image",
            "import",
            str(
                self.process.hand_over(
                    image_id=manifest.image_id, name="demo", platform=platform, launch_digests=digest
                )
            ),
        )
        sev.store.forget(manifest.image_id)
        self.owner = self.reached(sev)

    def reached(self, sev: SevBench) -> RemoteOwner:
        """As the host reaches it: by address and card."""
        relay = Relay(Endpoint(host="127.0.0.1", port=self.process.ports["guests"]))
        sev.bench.sev = RemoteOwner(relay, self.process.card.spki_sha256)
        return sev.bench.sev

    def rows(self) -> list[dict[str, object]]:
        return list(self.process.json("audit", "list")["rows"])


async def test_a_launch_that_the_owners_broker_judges(
    sev: SevBench, root: SimulatedRoot, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process, over TLS: refused for another kernel, held for approval, released, and gone in the middle."""
    owner = await asyncio.to_thread(OwnersBroker, sev, root, Platform.SIMULATED_SEV_ES)
    try:
        service = await sev.bench.service()
        kernel = (sev.directory / "vmlinuz").read_bytes()
        (sev.directory / "vmlinuz").write_bytes(kernel + b"\0")
        with pytest.raises(LaunchRefused, match="its audit log has the reasons"):
            await service.launch("demo")
        (sev.directory / "vmlinuz").write_bytes(kernel)
        assert service.get("demo").state == "refused"
        assert owner.rows()[-1]["detail"]["findings"][0]["id"] == "sev.measurement"  # type: ignore[index]  # JSON
        owner.process.ctl("image", "limits", "demo", "--approval")
        task = asyncio.create_task(service.launch("demo"))

        def waits() -> bool:
            # In this thread: while it runs, standard output is the command's, and nobody else may log there.
            return task.done() or bool(owner.process.json("approval", "list")["approvals"])

        await sev.bench.until(waits, seconds=300)
        if task.done():
            await task
        await sev.bench.until(lambda: "broker approval list" in service.get("demo").reason)
        assert service.get("demo").state == "starting"
        number = owner.process.json("approval", "list")["approvals"][0]["number"]
        owner.process.ctl("approval", "grant", str(number))
        await sev.bench.until(lambda: task.done() or any(view.state == "released" for view in service.list()))
        if task.done():
            await task
        area = inspect_firmware(FIRMWARE).secret_address
        assert area is not None
        assert guest_memory(area, 16) == TABLE.bytes_le
        assert service.get("demo").reason == ""
        await sev.bench.say(service.get("demo").uuid, "boot\nunlocked\nrunning\n")
        assert (await task).state == "running"
        released = owner.rows()[-1]
        assert (released["kind"], released["simulated"]) == ("released", True)
        await service.stop_domain("demo", force=True)
        owner.process.ctl("key", "revoke", "demo")
        with pytest.raises(LaunchRefused, match="its audit log has the reasons"):
            await service.launch("demo")
        assert service.get("demo").state == "refused"  # before a machine was made
        owner.process.stop(signal.SIGKILL)
        monkeypatch.setattr("jindiskd.broker.sev_remote.STEP_S", 2.0)
        with pytest.raises(BrokerUnreachable, match=r"at 127\.0\.0\.1:"):
            await service.launch("demo")
        assert service.get("demo").state == "failed"
        await sev.bench.until(lambda: sev.bench.strays() == [])
    finally:
        owner.process.close()
