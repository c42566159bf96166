"""Guest policies against hosts made of files: each demand that a host fails is named, with what to do about it."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

from jindiskd.attest import guest_policy
from jindiskd.base.platform import Tee
from jindiskd.doctor.check import Check, Verdict
from jindiskd.doctor.host import Surroundings
from jindiskd.doctor.policy import OLD_BITS, examine, firmware_api, kvm_bits


def put(root: Path, name: str, text: str) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def found(
    root: Path, words: str, tee: Tee = Tee.SNP, *, bits: int = OLD_BITS, api: tuple[int, int] = (1, 55)
) -> dict[str, Check]:
    return looked(root, guest_policy.read(words, tee), tee, bits=bits, api=api)


def looked(
    root: Path, policy: int, tee: Tee, *, bits: int = OLD_BITS, api: tuple[int, int] = (1, 55)
) -> dict[str, Check]:
    checks = list(
        examine(policy, tee, Surroundings(root=root), kvm=lambda _where: bits, firmware=lambda _where, _tee: api)
    )
    assert len({check.id for check in checks}) == len(checks)
    for check in checks:
        assert not check.found.endswith("."), check.id
        assert check.remedy or check.verdict is Verdict.OK, f"{check.id} has no remedy"
        assert check.tees == {tee}
    return {check.id: check for check in checks}


def test_the_default_demands_nothing_that_a_host_could_lack(tmp_path: Path) -> None:
    """Of each platform; TDX has no policy to compare."""
    for tee in (Tee.SNP, Tee.SEV):
        assert {check.verdict for check in looked(tmp_path, guest_policy.default(tee), tee).values()} == {Verdict.OK}
    assert looked(tmp_path, 0, Tee.TDX) == {}


@pytest.mark.parametrize(
    ("active", "control", "verdict"),
    [("1", "on", "problem"), ("0", "notsupported", "ok"), ("0", "forceoff", "unknown"), ("0", "on", "ok")],
)
def test_multithreading(tmp_path: Path, active: str, control: str, verdict: str) -> None:
    """As the kernel tells it; what it has switched off itself may be on for the processor."""
    put(tmp_path, "sys/devices/system/cpu/smt/active", active + "\n")
    put(tmp_path, "sys/devices/system/cpu/smt/control", control + "\n")
    check = found(tmp_path, "no-smt")["policy.smt"]
    assert check.verdict == verdict
    assert found(tmp_path, "")["policy.smt"].verdict is Verdict.OK
    if verdict == "problem":
        assert "firmware setup" in check.remedy
        assert "no-smt" in check.remedy


def test_multithreading_that_cannot_be_read(tmp_path: Path) -> None:
    assert found(tmp_path, "no-smt")["policy.smt"].verdict is Verdict.UNKNOWN


def test_sockets(tmp_path: Path) -> None:
    """By the packages of the processors, of which several share one."""
    assert found(tmp_path, "single-socket")["policy.socket"].verdict is Verdict.UNKNOWN
    for cpu in range(4):
        put(tmp_path, f"sys/devices/system/cpu/cpu{cpu}/topology/physical_package_id", "0\n")
    assert found(tmp_path, "single-socket")["policy.socket"].verdict is Verdict.OK
    put(tmp_path, "sys/devices/system/cpu/cpu4/topology/physical_package_id", "1\n")
    check = found(tmp_path, "single-socket")["policy.socket"]
    assert check.verdict is Verdict.PROBLEM
    assert "has 2" in check.found
    assert "policy.socket" not in found(tmp_path, "")


def test_what_kvm_takes(tmp_path: Path) -> None:
    """Bits that it does not know are named by their words, and a migration agent that no image of ours has."""
    assert found(tmp_path, "single-socket")["policy.kernel"].verdict is Verdict.OK
    check = found(tmp_path, "aes-256-xts,rapl-off")["policy.kernel"]
    assert check.verdict is Verdict.PROBLEM
    assert "aes-256-xts, rapl-off" in check.found
    assert found(tmp_path, "aes-256-xts", bits=(1 << 26) - 1)["policy.kernel"].verdict is Verdict.OK
    agent = looked(tmp_path, guest_policy.SNP_DEFAULT | 1 << 18 | 1 << 40, Tee.SNP)["policy.kernel"]
    assert "a migration agent, bit 40" in agent.found


def test_what_only_the_firmware_knows(tmp_path: Path) -> None:
    check = found(tmp_path, "aes-256-xts,no-page-swap")["policy.firmware"]
    assert check.verdict is Verdict.UNKNOWN
    assert "aes-256-xts, no-page-swap" in check.found
    assert found(tmp_path, "ciphertext-hiding")["policy.ciphertext"].verdict is Verdict.PROBLEM
    put(tmp_path, "sys/module/kvm_amd/parameters/ciphertext_hiding_asids", "0\n")
    assert found(tmp_path, "ciphertext-hiding")["policy.ciphertext"].verdict is Verdict.PROBLEM
    put(tmp_path, "sys/module/kvm_amd/parameters/ciphertext_hiding_asids", "15\n")
    assert found(tmp_path, "ciphertext-hiding")["policy.ciphertext"].verdict is Verdict.OK


@pytest.mark.parametrize("tee", [Tee.SNP, Tee.SEV])
def test_the_least_firmware_interface(tmp_path: Path, tee: Tee) -> None:
    """The two parts are compared as versions are."""
    for words, verdict in (("abi=1.55", "ok"), ("abi=1.56", "problem"), ("abi=2.0", "problem"), ("abi=0.99", "ok")):
        assert found(tmp_path, words, tee)["policy.abi"].verdict == verdict, words
    assert "policy.abi" not in found(tmp_path, "", tee)


def test_encrypted_registers_and_sending(tmp_path: Path) -> None:
    """SEV-ES is a bit of the policy; what an adopted domain permits is told too."""
    assert found(tmp_path, "", Tee.SEV_ES)["policy.es"].verdict is Verdict.PROBLEM
    put(tmp_path, "sys/module/kvm_amd/parameters/sev_es", "Y\n")
    checks = found(tmp_path, "", Tee.SEV_ES)
    assert (checks["policy.es"].verdict, checks["policy.migration"].verdict) == (Verdict.OK, Verdict.OK)
    assert looked(tmp_path, 0x3, Tee.SEV)["policy.migration"].verdict is Verdict.NOTE


def test_devices_that_cannot_be_asked(tmp_path: Path) -> None:
    """None, and a file in its place: unknown, where it matters at all."""
    for text in ("", "x"):
        if text:
            put(tmp_path, "dev/kvm", text)
            put(tmp_path, "dev/sev", text)
        where = Surroundings(root=tmp_path)
        checks = {
            check.id: check.verdict
            for check in examine(guest_policy.read("rapl-off,abi=1.55", Tee.SNP), Tee.SNP, where)
        }
        assert (checks["policy.kernel"], checks["policy.abi"]) == (Verdict.UNKNOWN, Verdict.UNKNOWN)


def test_this_hosts_devices() -> None:
    """Whatever they are: they answer in the form that is expected, or an error of the system is told."""
    with contextlib.suppress(OSError):
        assert kvm_bits(Surroundings()) & OLD_BITS
    with contextlib.suppress(OSError):
        assert firmware_api(Surroundings(), Tee.SNP) > (0, 0)
