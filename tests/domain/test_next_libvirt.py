"""Launches on the libvirt and QEMU of Debian's next release, which run in a root of that release; SEV by the stand-in.

The service is ours, outside of that root, and speaks to the libvirtd inside by its socket. `/run` is one for both.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import libvirt
import pytest
import sevhost
from lxml import etree

from jindiskd.base import document
from jindiskd.base.platform import Platform
from jindiskd.domain import capabilities, xml
from jindiskd.domain.state import LaunchRefused
from jindiskd.errors import JindiskError
from jindiskd.sim.sev_platform import SevPlatformKeys

from .conftest import ROOT, Bench, add_image, cleared, make_manifest
from .test_sev_launch import FIRMWARE, SevBench
from .test_xml import CASES

pytestmark = [pytest.mark.host, pytest.mark.long]
RELEASE = "forky"
PACKAGES = "libvirt-daemon-system,libvirt-daemon-driver-qemu,libvirt-clients,qemu-system-x86,python3"
SOCKETS = Path("/run/next-libvirt")
URI = f"qemu+unix:///system?socket={SOCKETS}/libvirt-sock"
PROCESSOR = Path("/run/sev-processor-next.sock")
EMULATOR = Path("usr/bin/qemu-system-x86_64")
READY_S = 300.0
# Its own mounts: the root of the release stays as it was made, whatever is written in it.
START = """
mount -t tmpfs -o mode=755 tmpfs {scratch}
mkdir {scratch}/up {scratch}/work {scratch}/root
mount -t overlay overlay -o lowerdir={base},upperdir={scratch}/up,workdir={scratch}/work {scratch}/root
cd {scratch}/root
mount -t proc proc proc
mount --rbind /sys sys
mount --rbind /run run
mkdir -p run/libvirt {sockets}
mount --bind {sockets} run/libvirt
mount -t tmpfs -o mode=755 tmpfs dev
for node in null zero full random urandom tty kvm; do [ ! -e /dev/$node ] || cp -a /dev/$node dev/; done
[ ! -e dev/kvm ] || chmod 666 dev/kvm
mknod -m 600 dev/sev c 1 3
mkdir dev/pts dev/shm dev/net
mount -t devpts -o newinstance,ptmxmode=666,mode=620 devpts dev/pts
ln -s pts/ptmx dev/ptmx
ln -s /proc/self/fd dev/fd
mount -t tmpfs -o mode=1777 tmpfs dev/shm
mv {emulator} {emulator}.real
cp {standin} {emulator}
printf 'namespaces = []\\nsecurity_driver = "none"\\ncgroup_controllers = []\\n' >etc/libvirt/qemu.conf
chroot . virtlogd --daemon --pid-file /run/libvirt/virtlogd.pid
exec chroot . libvirtd --timeout 0 --pid-file /run/libvirt/libvirtd.pid
"""


def base_root() -> Path:
    """A root of the release, made once and kept; never changed by tests."""
    root = ROOT / "build/next-libvirt/root"
    if not (root / ".complete").exists():
        shutil.rmtree(root, ignore_errors=True)
        root.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run([ROOT / "scripts/debian-root", RELEASE, root, PACKAGES], check=True, timeout=1800)
        (root / ".complete").touch()
    return root


def daemons() -> list[int]:
    """The virtlogd and libvirtd of the release, by the root they run in."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                inside = (entry / "root").readlink() != Path("/")
                if inside and (entry / "comm").read_text().strip() in {"libvirtd", "virtlogd"}:
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


@pytest.fixture(scope="module")
def libvirtd(
    host: None, keys: SevPlatformKeys, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[libvirt.virConnect]:
    """A connection to the libvirtd of the release."""
    base = base_root()
    scratch = Path("/run/next-libvirt-root")
    scratch.mkdir()
    standin = tmp_path_factory.mktemp("next") / "emulator"
    sevhost.install(standin, qemu=Path(f"/{EMULATOR}.real"), processor=PROCESSOR, kvm=True)
    script = START.format(scratch=scratch, base=base, sockets=SOCKETS, emulator=EMULATOR, standin=standin)
    log = (scratch.parent / "next-libvirt.log").open("wb")
    words = ["unshare", "--mount", "--propagation", "private", "sh", "-euc", script]
    process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    end = time.monotonic() + READY_S
    while True:
        said = Path(log.name).read_text(errors="replace")[-2000:]
        assert process.poll() is None, said
        assert time.monotonic() < end, said
        try:
            conn = libvirt.open(URI)
            break
        except libvirt.libvirtError:
            time.sleep(0.2)
    yield conn
    print(Path(log.name).read_text(errors="replace")[-3000:])
    conn.close()
    for pid in daemons():
        os.kill(pid, 15)
    process.wait(60)
    log.close()
    shutil.rmtree(SOCKETS, ignore_errors=True)
    scratch.rmdir()


@pytest.fixture(scope="module")
def keys(host: None) -> Iterator[SevPlatformKeys]:
    """The simulated SEV platform, whose secure processor the stand-in asks."""
    made = SevPlatformKeys.generate()
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    processor = sevhost.SevHost(made, PROCESSOR)
    asyncio.run_coroutine_threadsafe(processor.start(), loop).result(60)
    yield made
    asyncio.run_coroutine_threadsafe(processor.stop(), loop).result(60)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(60)
    loop.close()


@pytest.fixture
async def sev(libvirtd: libvirt.virConnect, directory: Path, keys: SevPlatformKeys) -> AsyncIterator[SevBench]:
    """The surroundings of a service whose libvirt is the release's."""
    bench = Bench(directory, URI)
    add_image(bench.images, "demo")
    made = SevBench(bench, keys)
    yield made
    made.store.close()
    await cleared(bench)


def test_it_is_newer_than_ours(libvirtd: libvirt.virConnect) -> None:
    """And its capabilities list the kinds that the stand-in plays."""
    host = capabilities.read(libvirtd, "kvm")
    print(f"libvirt {host.libvirt}, QEMU {host.qemu}: {sorted(host.sectypes)}")
    assert host.libvirt > capabilities.version(libvirt.getVersion())
    assert host.sectypes >= {"sev", "sev-snp"}
    assert host.qemu >= (9, 1, 0)


@pytest.mark.parametrize("case", CASES)
def test_its_schema_accepts_every_kind(libvirtd: libvirt.virConnect, case: str) -> None:
    """By the schema in that root, and, for what that host can run, by libvirt's own judgement of the definition."""
    schema = etree.RelaxNG(etree.parse(base_root() / "usr/share/libvirt/schemas/domain.rng"))
    text = xml.write(CASES[case])
    schema.assertValid(etree.fromstring(text))
    if case.startswith("tdx"):  # which KVM alone can claim, and no stand-in: libvirt asks the device itself
        with pytest.raises(libvirt.libvirtError, match="'tdx' launch security is not supported"):
            libvirtd.defineXMLFlags(text, libvirt.VIR_DOMAIN_DEFINE_VALIDATE)
        return
    defined = libvirtd.defineXMLFlags(text, libvirt.VIR_DOMAIN_DEFINE_VALIDATE)
    try:
        assert xml.differences(xml.parse(text), xml.parse(defined.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE))) == ()
    finally:
        defined.undefine()


@pytest.mark.parametrize("platform", [Platform.SIMULATED_SEV, Platform.SIMULATED_SEV_ES])
async def test_sev_guests_start(sev: SevBench, platform: Platform) -> None:
    """The whole path: paused, measured, approved, given the secret, run."""
    sev.image(platform)
    service = await sev.bench.service()
    stages: list[str] = []
    task = asyncio.create_task(service.launch("demo", progress=stages.append))
    await sev.bench.until(lambda: task.done() or any(view.state == "released" for view in service.list()), seconds=300)
    if task.done():
        await task
    await sev.bench.say(service.get("demo").uuid, "boot\nunlocked\nrunning\n")
    assert (await task).state == "running"
    assert stages == ["starting", "started", "attested", "released", "unlocked", "running"]
    assert sev.store.audit_rows()[-1]["kind"] == "released"
    await service.stop_domain("demo", force=True)
    await sev.bench.until(lambda: sev.bench.strays() == [])


async def test_a_sev_guest_with_another_kernel_does_not(sev: SevBench) -> None:
    """Refused by its measurement, as on the oldest libvirt."""
    sev.image(Platform.SIMULATED_SEV)
    (sev.directory / "vmlinuz").write_bytes((sev.directory / "vmlinuz").read_bytes() + b"\0")
    service = await sev.bench.service()
    with pytest.raises(LaunchRefused, match="not the expected ones"):
        await service.launch("demo")
    await sev.bench.until(lambda: sev.bench.strays() == [])


def snp_image(sev: SevBench) -> None:
    """Make `demo` an image for SEV-SNP itself."""
    firmware = sev.bench.directory / FIRMWARE.name
    shutil.copy(FIRMWARE, firmware)
    manifest = make_manifest(sev.directory, "demo", Platform.SNP, firmware)
    (sev.directory / "manifest.json").write_bytes(document.dump(manifest))


async def test_snp_guests_start(sev: SevBench, libvirtd: libvirt.virConnect, monkeypatch: pytest.MonkeyPatch) -> None:
    """A domain of the real platform, by KVM as libvirt sees it. Attestation comes from inside, and is played here."""
    monkeypatch.setattr(capabilities, "kernel_parameters", lambda _root: {"kvm_amd.sev_snp": True})
    snp_image(sev)
    service = await sev.bench.service()
    view = await sev.bench.launch(service)
    assert (view.state, view.simulated) == ("running", False)
    live = xml.parse(libvirtd.lookupByName("demo").XMLDesc())
    assert live.get("type") == "kvm"
    security = live.find("launchSecurity")
    assert security is not None
    assert (security.get("type"), security.get("kernelHashes")) == ("sev-snp", "yes")
    assert security.findtext("cbitpos") == "51"  # the host's, which libvirt asked the emulator for
    command = next(line for line in sev.bench.strays() if "vhost-device" not in line)
    assert "qemu-system" in command
    await service.stop_domain("demo", force=True)
    await sev.bench.until(lambda: sev.bench.strays() == [])


async def test_an_snp_policy_that_the_firmware_refuses(sev: SevBench, monkeypatch: pytest.MonkeyPatch) -> None:
    """What only the processor finds comes back in its words, and nothing is left."""
    monkeypatch.setattr(capabilities, "kernel_parameters", lambda _root: {"kvm_amd.sev_snp": True})
    snp_image(sev)
    write = xml.write

    def without_bit_17(spec: object) -> str:
        return write(spec).replace("<policy>0x30000</policy>", "<policy>0x10000</policy>")  # type: ignore[arg-type]  # passed on

    monkeypatch.setattr("jindiskd.domain.check.refuse", lambda _root, simulated: None)
    monkeypatch.setattr(xml, "write", without_bit_17)
    service = await sev.bench.service()
    with pytest.raises(JindiskError, match="Policy is not allowed"):
        await service.launch("demo")
    assert service.get("demo").state == "failed"
    await sev.bench.until(lambda: sev.bench.strays() == [])
