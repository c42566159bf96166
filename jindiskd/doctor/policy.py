"""A guest policy against the host: what the image or domain demands of it, and would be refused at launch for.

Sources: AMD 56860 section 4.3 (guest policy), section 8.3 (SNP_PLATFORM_STATUS); AMD 55766 chapter 3;
linux/psp-sev.h; Linux Documentation/virt/kvm/x86/amd-memory-encryption.rst; linux/kvm.h.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
from collections.abc import Callable, Iterator

from jindiskd.attest import guest_policy
from jindiskd.attest.sev import SevPolicy
from jindiskd.attest.snp_report import GuestPolicy
from jindiskd.base.platform import Tee
from jindiskd.doctor.check import Check, note, ok, problem, unknown
from jindiskd.doctor.host import Surroundings, parameter

SMT = "sys/devices/system/cpu/smt"
CPUS = "sys/devices/system/cpu"
SEV_ISSUE_CMD = 0xC0105300  # linux/psp-sev.h: _IOWR('S', 0, struct sev_issue_cmd)
STATUS_COMMAND = {Tee.SNP: 9, Tee.SEV: 1, Tee.SEV_ES: 1}
"""SNP_PLATFORM_STATUS, SEV_PLATFORM_STATUS; both answers begin with the API version, major and minor, a byte each."""
STATUS_BYTES = 64
KVM_GET_DEVICE_ATTR = 0x4018AEE2  # linux/kvm.h: _IOW(KVMIO, 0xe2, struct kvm_device_attr)
KVM_X86_GRP_SEV, KVM_X86_SNP_POLICY_BITS = 1, 1
OLD_BITS = 0xFFFF | int(
    GuestPolicy.SMT | GuestPolicy.RESERVED_ONE | GuestPolicy.DEBUG | GuestPolicy.SINGLE_SOCKET
)
"""What a KVM takes that does not say which bits it takes."""
UNSEEN = GuestPolicy.MEM_AES_256_XTS | GuestPolicy.RAPL_DIS | GuestPolicy.PAGE_SWAP_DISABLE
"""Demands whose fulfilment the firmware knows alone."""
NAMES = {
    int(GuestPolicy.MIGRATE_MA): "a migration agent",
    **{int(bit): word for word, bit in guest_policy.SNP_WORDS.items()},
}
BUILD = "or build the image without {word} ('image build --guest-policy')"


def kvm_bits(where: Surroundings) -> int:
    """The bits of SNP policies that KVM takes.

    Raises:
        OSError: KVM cannot be asked.
    """
    fd = os.open(where.path("dev/kvm"), os.O_RDWR | os.O_CLOEXEC)
    try:
        value = ctypes.c_uint64()
        asked = struct.pack("=IIQQ", 0, KVM_X86_GRP_SEV, KVM_X86_SNP_POLICY_BITS, ctypes.addressof(value))
        fcntl.ioctl(fd, KVM_GET_DEVICE_ATTR, asked)
        return value.value
    except OSError as exc:
        if exc.errno == errno.ENXIO:
            return OLD_BITS
        raise
    finally:
        os.close(fd)


def firmware_api(where: Surroundings, tee: Tee) -> tuple[int, int]:
    """The version of the processor's firmware interface for a platform, major and minor.

    Raises:
        OSError: it cannot be asked.
    """
    fd = os.open(where.path("dev/sev"), os.O_RDONLY | os.O_CLOEXEC)
    try:
        status = ctypes.create_string_buffer(STATUS_BYTES)
        fcntl.ioctl(fd, SEV_ISSUE_CMD, struct.pack("=IQI", STATUS_COMMAND[tee], ctypes.addressof(status), 0))
        return status.raw[0], status.raw[1]
    finally:
        os.close(fd)


def examine(
    policy: int,
    tee: Tee,
    where: Surroundings,
    *,
    kvm: Callable[[Surroundings], int] = kvm_bits,
    firmware: Callable[[Surroundings, Tee], tuple[int, int]] = firmware_api,
) -> Iterator[Check]:
    """Each demand of a guest policy that a host may fail; nothing for TDX, which has none.

    Args:
        policy: as in `<launchSecurity>`.
        tee: the platform it is for.
        where: the host's files.
        kvm: asks KVM.
        firmware: asks the processor's firmware.
    """
    if tee is Tee.TDX:
        return
    if tee is Tee.SNP:
        yield from _smt(policy, where)
        yield from _sockets(policy, where)
        yield from _kernel(policy, lambda: kvm(where))
        yield from _unseen(policy)
        yield from _ciphertext(policy, where)
    else:
        yield from _encrypted_state(policy, tee, where)
        yield from _migration(policy, tee)
    yield from _abi(policy, tee, lambda: firmware(where, tee))


def _smt(policy: int, where: Surroundings) -> Iterator[Check]:
    name = "policy.smt"
    if policy & GuestPolicy.SMT:
        yield ok(name, "the policy allows multithreading, on or off", [Tee.SNP])
        return
    try:
        active = where.path(f"{SMT}/active").read_text().strip()
        control = where.path(f"{SMT}/control").read_text().strip()
    except OSError as exc:
        found = f"the policy forbids multithreading, and whether it is on cannot be read ({exc.strerror})"
        yield unknown(name, found, f"look at /{SMT}/active", [Tee.SNP])
        return
    setup = "turn it off in the machine's firmware setup (SMT control)"
    if active != "0":
        found = "the policy forbids multithreading, which is on here: the processor refuses the launch"
        yield problem(name, found, f"{setup}, {BUILD.format(word=guest_policy.NO_SMT)}", [Tee.SNP])
    elif control in {"off", "forceoff"}:
        found = "the policy forbids multithreading, which the kernel has switched off: the processor may still have it"
        yield unknown(name, found, setup, [Tee.SNP])
    else:
        yield ok(name, "the policy forbids multithreading, and there is none here", [Tee.SNP])


def _sockets(policy: int, where: Surroundings) -> Iterator[Check]:
    name = "policy.socket"
    if not policy & GuestPolicy.SINGLE_SOCKET:
        return
    found = set()
    for path in where.path(CPUS).glob("cpu[0-9]*/topology/physical_package_id"):
        try:
            found.add(path.read_text().strip())
        except OSError:  # a processor that went offline
            continue
    if not found:
        text = "the policy demands one socket, and their number cannot be read"
        yield unknown(name, text, f"look at /{CPUS}", [Tee.SNP])
    elif len(found) > 1:
        yield problem(
            name,
            f"the policy demands one socket, and this host has {len(found)}",
            f"run it on a host with one, {BUILD.format(word='single-socket')}",
            [Tee.SNP],
        )
    else:
        yield ok(name, "the policy demands one socket, and this host has one", [Tee.SNP])


def _kernel(policy: int, ask: Callable[[], int]) -> Iterator[Check]:
    name = "policy.kernel"
    try:
        takes = ask()
    except OSError as exc:
        if policy & ~OLD_BITS:
            found = f"the policy has {_words(policy & ~OLD_BITS)}, and KVM cannot be asked for it ({exc.strerror})"
            yield unknown(name, found, "see host.kvm, and run this as root", [Tee.SNP])
        return
    if policy & ~takes:
        words = _words(policy & ~takes)
        remedy = f"run a kernel whose KVM knows it, {BUILD.format(word=words)}"
        yield problem(name, f"the policy has {words}, which this kernel's KVM refuses", remedy, [Tee.SNP])
    else:
        yield ok(name, "KVM takes every bit of the policy", [Tee.SNP])


def _words(bits: int) -> str:
    found = [number for number in range(64) if bits >> number & 1]
    return ", ".join(NAMES.get(1 << number, f"bit {number}") for number in found)


def _unseen(policy: int) -> Iterator[Check]:
    if policy & UNSEEN:
        found = f"whether the processor's firmware fulfils {_words(policy & UNSEEN)} cannot be seen from here"
        remedy = "if a launch is refused: see the machine's firmware setup"
        yield unknown("policy.firmware", found, remedy, [Tee.SNP])


def _ciphertext(policy: int, where: Surroundings) -> Iterator[Check]:
    if not policy & GuestPolicy.CIPHERTEXT_HIDING_DRAM:
        return
    name, value = "policy.ciphertext", parameter(where, "kvm_amd", "ciphertext_hiding_asids")
    if value.isdecimal() and int(value):
        yield ok(name, f"kvm_amd hides ciphertext for {value} guests", [Tee.SNP])
    else:
        yield problem(
            name,
            f"the policy demands ciphertext hiding, and kvm_amd.ciphertext_hiding_asids is {value or 'not there'}",
            "load a kvm_amd that has it with ciphertext_hiding_asids=N (the number of such guests), "
            + BUILD.format(word="ciphertext-hiding"),
            [Tee.SNP],
        )


def _encrypted_state(policy: int, tee: Tee, where: Surroundings) -> Iterator[Check]:
    name = "policy.es"
    if not policy & SevPolicy.ES:
        return
    value = parameter(where, "kvm_amd", "sev_es")
    if value[:1] in {"1", "Y", "y"}:
        yield ok(name, "the policy demands encrypted registers, and kvm_amd.sev_es is on", [tee])
    else:
        yield problem(
            name,
            f"the policy demands encrypted registers, and kvm_amd.sev_es is {'off' if value else 'not there'}",
            "load kvm_amd with sev_es=1, and set aside ASIDs for SEV-ES in the firmware setup",
            [tee],
        )


def _migration(policy: int, tee: Tee) -> Iterator[Check]:
    """QEMU migrates no such guest; what a policy permits is for others than our hosts."""
    if policy & SevPolicy.NOSEND:
        yield ok("policy.migration", "the policy forbids sending the guest to another machine", [tee])
    else:
        yield note(
            "policy.migration",
            "the policy permits sending the guest to another machine, with its memory: no broker of ours takes it",
            "define it with bit 3 of the policy set: 'jindiskctl domain adopt' does",
            [tee],
        )


def _abi(policy: int, tee: Tee, ask: Callable[[], tuple[int, int]]) -> Iterator[Check]:
    name, least = "policy.abi", guest_policy.abi(policy, tee)
    if not any(least):
        return
    wanted = f"the policy demands firmware interface {least[0]}.{least[1]}"
    try:
        has = ask()
    except OSError as exc:
        remedy = "look for 'API' in the lines of ccp in the kernel's log"
        yield unknown(name, f"{wanted}, and /dev/sev cannot be asked for the one here ({exc.strerror})", remedy, [tee])
        return
    if has < least:
        yield problem(
            name,
            f"{wanted}, and {has[0]}.{has[1]} is here: the processor refuses the launch",
            f"update the processor's firmware (amd_sev_*.sbin, or the machine's), {BUILD.format(word='abi=')}",
            [tee],
        )
    else:
        yield ok(name, f"{wanted}, and {has[0]}.{has[1]} is here", [tee])
