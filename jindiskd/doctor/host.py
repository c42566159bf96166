"""The host: processor, kernel, devices, firmware, vsock, hook. Reads files and opens devices; changes nothing.

Every path is taken below a root, so that captured hosts are inputs of the tests. Sources: libvirt notes section 8;
Linux Documentation/virt/kvm/x86/amd-memory-encryption.rst, intel-tdx.rst; linux/kvm.h.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from jindiskd.attest import descriptors
from jindiskd.attest.firmware import FirmwareUnsuitable, inspect_firmware
from jindiskd.base.platform import Tee
from jindiskd.doctor.check import Check, note, ok, problem, unknown
from jindiskd.domain import switch
from jindiskd.errors import JindiskError

KVM_GET_API_VERSION = 0xAE00  # linux/kvm.h: _IO(KVMIO, 0x00)
KVM_CHECK_EXTENSION = 0xAE03  # linux/kvm.h: _IO(KVMIO, 0x03)
KVM_CAP_VM_TYPES = 235
KVM_VM_TYPE_TDX = 5
KVM_API_VERSION = 12
AMD = (Tee.SEV, Tee.SEV_ES, Tee.SNP)
REAL = (*AMD, Tee.TDX)
FLAGS: Mapping[Tee, str] = {Tee.SEV: "sev", Tee.SEV_ES: "sev_es", Tee.SNP: "sev_snp"}
GUEST_DEVICES = ("dev/sev-guest", "dev/tdx_guest")
QGS_SOCKET = "var/run/tdx-qgs/qgs.socket"
HOOKS = ("etc/libvirt/hooks/qemu", "etc/libvirt/hooks/qemu.d")
HOOK_MARK = b"jindisk.org/xmlns/libvirt/domain/1"
PROBE_BYTES = 64 << 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """Where to look."""

    root: Path = Path("/")
    vhost_device_vsock: Path = Path("vhost-device-vsock")
    """The program that stands in for vhost-vsock."""
    qgs_socket: str = QGS_SOCKET

    def path(self, name: str) -> Path:
        """Below the root."""
        return self.root / name


def examine(where: Surroundings) -> Iterator[Check]:
    """Everything about the host, for every platform."""
    yield from _kvm(where)
    yield from _guest(where)
    yield from _amd(where)
    yield from _tdx(where)
    yield from _firmware(where)
    yield from _vsock(where)
    yield from _hook(where)


def _openable(path: Path, flags: int = os.O_RDWR) -> str:
    """Empty, or why it cannot be opened."""
    try:
        os.close(os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK))
    except OSError as exc:
        return exc.strerror or str(exc)
    return ""


def _kvm(where: Surroundings) -> Iterator[Check]:
    path = where.path("dev/kvm")
    remedy = "enable SVM or VT-x in the machine's firmware setup and load kvm_amd or kvm_intel"
    if not path.exists():
        yield problem("host.kvm", f"{path} is not there", remedy, REAL)
        return
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as exc:
        yield problem(
            "host.kvm", f"{path} cannot be opened: {exc.strerror}", "add this user to the group of /dev/kvm", REAL
        )
        return
    try:
        version = fcntl.ioctl(fd, KVM_GET_API_VERSION)
    except OSError as exc:
        yield problem("host.kvm", f"{path} is not KVM's device: {exc.strerror}", remedy, REAL)
    else:
        if version == KVM_API_VERSION:
            yield ok("host.kvm", f"{path} answers with interface {version}", REAL)
        else:
            yield problem("host.kvm", f"{path} has interface {version}, not {KVM_API_VERSION}", remedy, REAL)
    finally:
        os.close(fd)


def _guest(where: Surroundings) -> Iterator[Check]:
    for name in GUEST_DEVICES:
        if where.path(name).exists():
            yield note("host.is_guest", f"/{name} is there: this machine is itself a confidential guest")


def _flags(where: Surroundings) -> frozenset[str] | None:
    try:
        for line in where.path("proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.startswith("flags"):
                return frozenset(line.partition(":")[2].split())
    except OSError:
        return None
    return frozenset()


def parameter(where: Surroundings, module: str, name: str) -> str:
    """The value of a kernel module's parameter, or an empty string."""
    try:
        return where.path(f"sys/module/{module}/parameters/{name}").read_text().strip()
    except OSError:
        return ""


def _amd(where: Surroundings) -> Iterator[Check]:
    flags = _flags(where)
    for tee, flag in FLAGS.items():
        name, kind = f"host.{tee.value}", tee.value.upper()
        if flags is None:
            yield unknown(f"{name}.cpu", "the processor's flags cannot be read", "mount /proc", [tee])
        elif flag in flags:
            yield ok(f"{name}.cpu", f"the processor has {kind}", [tee])
        else:
            yield problem(
                f"{name}.cpu",
                f"the processor's flags have no {flag}",
                f"use a machine with {kind}, and enable SMEE and SEV in its firmware setup",
                [tee],
            )
        value = parameter(where, "kvm_amd", flag)
        if value[:1] in {"1", "Y", "y"}:
            yield ok(f"{name}.kernel", f"kvm_amd.{flag} is on", [tee])
        else:
            more = "; SNP needs Linux 6.11, the IOMMU on and an RMP table (firmware setup)" if tee is Tee.SNP else ""
            found = f"kvm_amd.{flag} is {'off' if value else 'not there'}"
            yield problem(f"{name}.kernel", found, f"load kvm_amd with {flag}=1{more}", [tee])
    path = where.path("dev/sev")
    if not path.exists():
        yield problem("host.sev.device", "/dev/sev is not there", "load ccp, and update the PSP's firmware", AMD)
    elif why := _openable(path):
        yield note("host.sev.device", f"/dev/sev cannot be opened by this user ({why}); libvirt's must be able to")
    else:
        yield ok("host.sev.device", "/dev/sev can be opened", AMD)


def _tdx(where: Surroundings) -> Iterator[Check]:
    value = parameter(where, "kvm_intel", "tdx")
    if value[:1] in {"1", "Y", "y"}:
        yield ok("host.tdx.kernel", "kvm_intel.tdx is on", [Tee.TDX])
    else:
        yield problem(
            "host.tdx.kernel",
            f"kvm_intel.tdx is {'off' if value else 'not there'}",
            "load kvm_intel with tdx=1 on Linux 6.16 or newer, with TME-MT, TDX and the SEAM loader in firmware setup",
            [Tee.TDX],
        )
    kvm = where.path("dev/kvm")
    try:
        fd = os.open(kvm, os.O_RDWR | os.O_CLOEXEC)
        try:
            types = fcntl.ioctl(fd, KVM_CHECK_EXTENSION, KVM_CAP_VM_TYPES)
        finally:
            os.close(fd)
        if types >> KVM_VM_TYPE_TDX & 1:
            yield ok("host.tdx.kvm", "KVM makes TDX guests", [Tee.TDX])
        else:
            remedy = "look for TDX in the kernel's log: the module must have been started"
            yield problem("host.tdx.kvm", "KVM makes no TDX guests", remedy, [Tee.TDX])
    except OSError:
        yield unknown("host.tdx.kvm", f"{kvm} cannot be asked for TDX", "see host.kvm", [Tee.TDX])
    path = where.path(where.qgs_socket)
    remedy = "install tdx-qgs with port = 0 in /etc/qgs.conf, and let libvirt-qemu reach its socket"
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.settimeout(2)
            probe.connect(os.fspath(path))
        yield ok("host.tdx.qgs", f"the quote generation service answers at {path}", [Tee.TDX])
    except OSError as exc:
        found = f"no quote generation service at {path} ({exc.strerror or exc})"
        yield problem("host.tdx.qgs", found, remedy, [Tee.TDX])


def _firmware(where: Surroundings) -> Iterator[Check]:
    places = [where.path(os.fspath(place).lstrip("/")) for place in descriptors.DIRECTORIES]
    for tee in REAL:
        name = f"host.firmware.{tee.value}"
        package = descriptors.PACKAGES[tee]
        try:
            image = where.path(os.fspath(descriptors.choose(tee, places)).lstrip("/"))
            known = inspect_firmware(image)
        except FirmwareUnsuitable as exc:
            yield problem(name, str(exc), f"install {package} again", [tee])
            continue
        except (JindiskError, OSError):
            yield problem(name, f"no descriptor offers firmware for {tee.value}", f"install {package}", [tee])
            continue
        if tee is Tee.TDX or known.enforces_kernel_hashes:
            yield ok(name, f"{image} ({known.name or 'an unknown build'})", [tee])
        elif known.enforces_kernel_hashes is None:
            yield note(
                name,
                f"{image} is a build that is not known: whether it checks kernel hashes cannot be told",
                f"use the one of {package}, or vouch for it when an image is built",
                [tee],
            )
        else:
            found = f"{image} does not check kernel hashes: it boots any kernel"
            yield problem(name, found, f"install {package}", [tee])


def _vsock(where: Surroundings) -> Iterator[Check]:
    why = switch.why_not(where.root)
    if not why:
        yield ok("host.vsock", "the kernel has vhost-vsock: guests have their vsock device from it")
        return
    program = shutil.which(where.vhost_device_vsock)
    if program is not None:
        yield ok("host.vsock", f"{program} stands in for vhost-vsock: {why}")
        return
    yield problem(
        "host.vsock",
        f"{why}; and there is no program {where.vhost_device_vsock}",
        "load vhost_vsock (and name it in /etc/modules-load.d), or install vhost-device-vsock",
    )


def _hook(where: Surroundings) -> Iterator[Check]:
    file, folder = (where.path(name) for name in HOOKS)
    try:
        candidates = [file, *(sorted(folder.iterdir()) if folder.is_dir() else ())]
    except OSError as exc:
        yield unknown("host.hook", f"{folder} cannot be read ({exc.strerror})", "run this as root")
        return
    for path in candidates:
        try:
            with path.open("rb") as stream:
                ours = HOOK_MARK in stream.read(PROBE_BYTES)
        except OSError as exc:
            if exc.errno in {errno.EACCES, errno.EPERM}:
                yield unknown("host.hook", f"{path} cannot be read ({exc.strerror})", "run this as root")
                return
            continue
        if ours and os.access(path, os.X_OK):
            yield ok("host.hook", f"{path} is installed: virsh start works for adopted domains")
            return
        if ours:
            yield problem("host.hook", f"{path} is not executable", f"run 'chmod 755 {path}' and reload libvirtd")
            return
    yield note(
        "host.hook",
        "libvirt has no hook of ours: only jindiskctl launches guests",
        f"install libvirt-hooks/qemu as /{HOOKS[1]}/50-jindiskd and reload libvirtd, for virsh and virt-manager",
    )
