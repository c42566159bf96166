"""The packages on a whole Debian host, systemd as process 1, polkit and libvirtd, judged from inside by `host_driver`.

What needs no kernel of its own is tried in a container. vhost-vsock is tried in a guest with a guest in it, which is
emulated and slow. Devices have a guest of their own, in tests/device.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "guest"))

import qemu_kernel
import testroot
from distribution import copy_system

from .conftest import MASKED, ROOT

pytestmark = [pytest.mark.long, pytest.mark.guest]

RELEASE = "bookworm"
SYSTEM = (
    "systemd-sysv,dbus,polkitd,udev,kmod,initramfs-tools,zstd,linux-image-amd64,libvirt-daemon-system,"
    "libvirt-daemon-driver-qemu,libvirt-clients,qemu-system-x86,qemu-utils,dosfstools,mtools,e2fsprogs,python3,ovmf,"
    "fdisk,gdisk,cryptsetup-bin,nbd-client,libnbd-bin,procps"
)
"""What our packages depend on, since the guest has no network, and what the checks use."""
DISK_BYTES = 6 << 30
MEMORY = "3G"
FIRMWARE = ROOT / "build/tools/usr/share/ovmf/OVMF.fd"
VSOCK = ROOT / "build/tools/usr/bin/vhost-device-vsock"
BOOT_S = 2700
IDLE = (
    "cron.service", "e2scrub_reap.service", "fstrim.timer", "getty@tty1.service", "libvirt-guests.service",
    "man-db.timer", "dpkg-db-backup.timer", "e2scrub_all.timer", "logrotate.timer", "systemd-timesyncd.service",
    "systemd-pstore.service", "serial-getty@ttyS0.service",
)  # fmt: skip
"""Units that an emulated machine would spend its time on, and that nothing here is about."""
CONTAINER_S = 900
CMDLINE = "root=/dev/vda rw console=ttyS0 quiet noresume no_timer_check"
KEPT = {"virtio", "block", "hw_random", "md", "vmw_vsock", "crypto", "ext4", "jbd2", "lib", "dax", "x86"}
"""Folders of kernel modules that a guest may need."""
NAP = "import time\nwhile True:\n    time.sleep(60)\n"
QEMU = """#!/bin/sh
# Emulation in emulation takes an hour; the virtualisation of the emulated processor serves as well. The guest's
# firmware writes CR8 in each interrupt, which QEMU's emulation of SVM answers with a failed assertion while another
# interrupt waits. With the interrupt controller out of the kernel, KVM intercepts these writes.
if [ -w /dev/kvm ]; then
    for word; do
        shift
        [ "$word" != tcg ] || word=kvm
        set -- "$@" "$word"
    done
    set -- "$@" -machine kernel-irqchip=off
fi
exec /usr/bin/qemu-system-x86_64.real "$@"
"""
DRIVER = """[Unit]
Wants=multi-user.target
After=multi-user.target libvirtd.service
[Service]
Type=oneshot
ExecStart=/usr/bin/python3 /root/host_driver.py ${CHECKS}
PassEnvironment=CHECKS PORT
TimeoutStartSec=infinity
"""


def results(told: Path, console: Path) -> dict[str, dict[str, object]]:
    """What the driver told, by check; it must have come to its end."""
    lines = [json.loads(line) for line in told.read_text().splitlines()] if told.exists() else []
    for line in lines:
        print(json.dumps(line, indent=1))
    assert lines, console.read_text(errors="replace")[-4000:]
    assert lines[-1] == {"done": True}, f"{lines}\n{console.read_text(errors='replace')[-4000:]}"
    return {line["check"]: line for line in lines[:-1]}


def passed(found: dict[str, dict[str, object]], *checks: str) -> None:
    """Each check was made and found what it should."""
    assert list(found) == list(checks)
    assert {name: line["found"] for name, line in found.items() if not line["ok"]} == {}


class HostContainer:
    """The system in a container, with this machine's kernel."""

    def __init__(self, directory: Path) -> None:
        self.root, self.out = directory / "root", directory / "out"
        self.out.mkdir()

    def boot(self, *checks: str) -> dict[str, dict[str, object]]:
        """Boot, have the checks made, and wait for the end; returns what each found."""
        container = (
            f"systemd-nspawn -q --register=no --keep-unit -D {self.root} --private-network -M jindisk-host "
            f"--bind={self.out}:/out -b systemd.unit=driver.service "
            f"systemd.setenv=PORT=/out/told systemd.setenv=CHECKS={','.join(checks)}"
        )
        with (self.out / "console").open("wb") as console:
            # A terminal is needed for the console even when nobody looks.
            subprocess.run(
                ["unshare", "--mount", "--propagation", "private", "script", "-qec", container, "/dev/null"],
                stdin=subprocess.DEVNULL, stdout=console, stderr=console, timeout=CONTAINER_S, check=False,
            )  # fmt: skip
        return results(self.out / "told", self.out / "console")


class HostGuest:
    """The machine; its disk stays from boot to boot."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.disk = directory, directory / "disk.img"

    def boot(self, *checks: str) -> dict[str, dict[str, object]]:
        """Boot, have the checks made, and wait for the end; returns what each found."""
        told, console = self.directory / "told", self.directory / "console"
        for path in (told, console):
            path.unlink(missing_ok=True)
        words = [
            "qemu-system-x86_64", "-machine", "q35", "-accel", "tcg,thread=multi,tb-size=512", "-cpu", "EPYC-Milan",
            "-smp", "2", "-m", MEMORY, "-nodefaults", "-display", "none", "-no-reboot",
            "-device", "virtio-rng-pci", "-serial", f"file:{console}", "-serial", f"file:{told}",
            "-kernel", self.directory / "vmlinuz", "-initrd", self.directory / "initrd",
            "-append", f"{CMDLINE} systemd.unit=driver.service systemd.setenv=CHECKS={','.join(checks)}",
            "-drive", f"if=virtio,format=raw,cache=unsafe,file={self.disk}",
        ]  # fmt: skip
        try:
            subprocess.run(words, check=True, timeout=BOOT_S, stdin=subprocess.DEVNULL)
        except subprocess.TimeoutExpired:
            pass  # what it told until then says more
        return results(told, console)


def nested_root(directory: Path) -> Path:
    """The root of the guest in the guest, as an archive: an init that says what it sees, and stays."""
    kernel = qemu_kernel.find_kernel(directory / "debian")
    assert kernel is not None, qemu_kernel.MISSING
    init = testroot.INIT[: testroot.INIT.rindex("ctypes.CDLL(None).reboot")] + NAP
    testroot.make_root(directory, init=init)
    root = directory / "tree"
    (root / "boot").mkdir()
    shutil.copy(kernel.kernel, root / "boot")
    shutil.copytree(kernel.modules, root / "usr/lib/modules" / kernel.modules.name, symlinks=True)
    kernel_modules = root / "usr/lib/modules"
    for module in kernel_modules.rglob("*.ko*"):
        if not KEPT.intersection(module.relative_to(kernel_modules).parts):
            module.unlink()  # reading and encrypting them takes the emulated host minutes
    (root / "etc/fstab").write_text("LABEL=root / ext4 defaults 0 1\n")
    (root / "etc/os-release").write_text('NAME="Small"\nPRETTY_NAME="Small Linux 1"\n')
    with tarfile.open(directory / "root.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        archive.add(root, arcname=".")
    return directory / "root.tar"


@pytest.fixture(scope="module")
def release() -> str:
    if os.geteuid() != 0:
        pytest.skip("making a system needs root")
    return RELEASE


def furnish(root: Path, packages: list[Path]) -> None:
    """A copy of the base system with our packages in /packages, not installed, and the driver."""
    copy_system(RELEASE, SYSTEM, root)
    (root / "packages").mkdir()
    for package in packages:
        shutil.copy(package, root / "packages")
    shutil.copy(Path(__file__).with_name("host_driver.py"), root / "root")
    units = root / "etc/systemd/system"
    for unit in MASKED:
        (units / unit).symlink_to("/dev/null")
    (units / "driver.service").write_text(DRIVER)


def bring(root: Path, scratch: Path) -> None:
    """What the manual has a newcomer bring by the network, which these systems do not have."""
    scratch.mkdir(exist_ok=True)
    shutil.copy(nested_root(scratch), root / "var/tmp/root.tar")
    shutil.copy(FIRMWARE, root / "usr/share/ovmf/OVMF.fd")


@pytest.fixture
def container(packages: list[Path], tmp_path: Path) -> Iterator[HostContainer]:
    """The container, never booted."""
    made = HostContainer(tmp_path)
    furnish(made.root, packages)
    bring(made.root, tmp_path / "nested")
    shutil.copy(VSOCK, made.root / "usr/bin")
    # No container may make devices or control groups for its guests.
    (made.root / "etc/libvirt/qemu.conf").write_text("namespaces = []\ncgroup_controllers = []\n")
    yield made
    shutil.rmtree(made.root)


def prepare(root: Path, directory: Path, packages: list[Path]) -> None:
    """In a container on this machine, whose processor is not emulated: the packages installed under a running systemd,
    and the image built, as the manual says."""
    furnish(root, [path for path in packages if not path.name.startswith("jindisk-initramfs_")])
    bring(root, directory)
    container = HostContainer(directory)
    checks = ("installed", "built")
    passed(container.boot(*checks), *checks)


@pytest.fixture(scope="module")
def host(packages: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[HostGuest]:
    """The machine, never booted, with the packages installed and the image built, which takes an emulated one an hour.

    With `JINDISK_HOST_GUEST=DIR` it is kept there, and used again as the last run left it.
    """
    kept = os.environ.get("JINDISK_HOST_GUEST")
    directory = Path(kept) if kept else tmp_path_factory.mktemp("host")
    if (directory / "initrd").exists():
        yield HostGuest(directory)
        return
    directory.mkdir(exist_ok=True)
    root = directory / "root"
    prepare(root, directory, packages)
    emulator = root / "usr/bin/qemu-system-x86_64"
    emulator.rename(emulator.with_suffix(".real"))
    emulator.write_text(QEMU)
    emulator.chmod(0o755)
    units = root / "etc/systemd/system"
    for unit in ("jindiskd", "jindisk-broker"):
        (units / f"{unit}.service.d").mkdir()
        (units / f"{unit}.service.d/slow.conf").write_text("[Service]\nTimeoutStartSec=900s\nWatchdogSec=600s\n")
    for unit in IDLE:
        (units / unit).unlink(missing_ok=True)
        (units / unit).symlink_to("/dev/null")
    (root / "etc/fstab").write_text("/dev/vda / ext4 defaults 0 1\n")
    (root / "etc/hostname").write_text("host\n")
    (root / "etc/initramfs-tools/modules").write_text("virtio_pci\nvirtio_blk\next4\n")
    settings = root / "etc/initramfs-tools/initramfs.conf"
    settings.write_text(settings.read_text().replace("MODULES=most", "MODULES=list"))
    subprocess.run(
        [ROOT / "scripts/in-root", root, "update-initramfs", "-u", "-k", "all"],
        check=True, timeout=600, capture_output=True,
    )  # fmt: skip
    made = HostGuest(directory)
    with made.disk.open("wb") as file:
        file.truncate(DISK_BYTES)
    subprocess.run(["mke2fs", "-q", "-t", "ext4", "-d", root, made.disk], check=True, timeout=600)
    for name in ("vmlinuz", "initrd"):
        shutil.copy((root / name if name != "initrd" else root / "initrd.img").resolve(), directory / name)
    shutil.rmtree(root)
    yield made
    if not kept:
        made.disk.unlink()


def test_the_service_as_it_ships(container: HostContainer) -> None:
    """Installed, started by the bus in its sandbox, asked by ordinary users through polkit, watched, and stopped."""
    checks = (
        "installed",
        "activated",
        "hooked",
        "exposure",
        "polkit",
        "stopped",
        "killed",
        "watchdog",
        "credential",
        "broker",
    )
    passed(container.boot(*checks), *checks)


def test_from_the_packages_to_an_encrypted_guest_by_the_manual(container: HostContainer) -> None:
    """What jindisk(7) says, word for word, on a host whose kernel gives guests no vsock; restarts find the guest."""
    checks = ("installed", "newcomer", "attested", "outlived", "refused")
    passed(container.boot(*checks), *checks)


def test_the_kernels_vsock(host: HostGuest) -> None:
    """On a host whose kernel does: a guest in the guest, of an image that was built before the host was booted.

    What is refused is seen in the container: the hook refuses what the service does not answer within two seconds, and
    an emulated one often does not.
    """
    checks = ("launched", "vsock", "attested", "outlived", "sockets")
    passed(host.boot(*checks), *checks)
