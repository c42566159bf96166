"""Hosts made of files: what each lacks is named, with what to do about it."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from jindiskd.base.platform import Platform, Tee
from jindiskd.diagnosis import relevant
from jindiskd.doctor.check import Check, Verdict
from jindiskd.doctor.host import Surroundings, examine

HOOK = Path(__file__).resolve().parents[2] / "libvirt-hooks/qemu"


def found(root: Path, **more: object) -> dict[str, Check]:
    checks = list(examine(Surroundings(root=root, vhost_device_vsock=root / "none", **more)))  # type: ignore[arg-type]
    assert len({check.id for check in checks}) == len(checks)
    for check in checks:
        assert check.found, check.id
        assert not check.found.endswith("."), check.id
        assert check.remedy or check.verdict is not Verdict.PROBLEM, f"{check.id} has no remedy"
    return {check.id: check for check in checks}


def put(root: Path, name: str, text: str = "") -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_an_empty_host(tmp_path: Path) -> None:
    """Nothing is there: everything that is needed is a problem with a remedy, and nothing is called right."""
    checks = found(tmp_path)
    assert not [check.id for check in checks.values() if check.verdict is Verdict.OK]
    assert checks["host.vsock"].verdict is Verdict.PROBLEM
    assert checks["host.hook"].verdict is Verdict.NOTE


@pytest.mark.parametrize(("value", "verdict"), [("Y", "ok"), ("1", "ok"), ("N", "problem"), ("0", "problem")])
def test_module_parameters(tmp_path: Path, value: str, verdict: str) -> None:
    """As the kernel writes them, booleans and numbers."""
    put(tmp_path, "sys/module/kvm_amd/parameters/sev_snp", value + "\n")
    put(tmp_path, "sys/module/kvm_intel/parameters/tdx", value + "\n")
    checks = found(tmp_path)
    assert checks["host.snp.kernel"].verdict == verdict
    assert checks["host.tdx.kernel"].verdict == verdict
    assert checks["host.sev.kernel"].verdict is Verdict.PROBLEM


def test_processor_flags(tmp_path: Path) -> None:
    """`sev_es` does not stand for `sev_snp`, nor a part of a word for the word."""
    put(tmp_path, "proc/cpuinfo", "processor\t: 0\nflags\t\t: fpu sev sev_es sev_snpx\n")
    checks = found(tmp_path)
    assert checks["host.sev.cpu"].verdict is Verdict.OK
    assert checks["host.sev-es.cpu"].verdict is Verdict.OK
    assert checks["host.snp.cpu"].verdict is Verdict.PROBLEM


def test_a_file_in_place_of_a_device(tmp_path: Path) -> None:
    """Something that can be opened and is not KVM's device is told apart."""
    put(tmp_path, "dev/kvm")
    check = found(tmp_path)["host.kvm"]
    assert check.verdict is Verdict.PROBLEM
    assert "not KVM's device" in check.found


def test_quote_generation_service(tmp_path: Path) -> None:
    """It must answer; a socket file that nobody listens on is not enough."""
    path = tmp_path / "qgs.socket"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        assert found(tmp_path, qgs_socket="qgs.socket")["host.tdx.qgs"].verdict is Verdict.PROBLEM
        listener.listen()
        assert found(tmp_path, qgs_socket="qgs.socket")["host.tdx.qgs"].verdict is Verdict.OK


def test_hook(tmp_path: Path) -> None:
    """Ours is known by its content, alone or beside others, and must be executable."""
    put(tmp_path, "etc/libvirt/hooks/qemu", "#!/bin/sh\n")
    put(tmp_path, "etc/libvirt/hooks/qemu.d/50-jindiskd", HOOK.read_text())
    assert found(tmp_path)["host.hook"].verdict is Verdict.PROBLEM
    (tmp_path / "etc/libvirt/hooks/qemu.d/50-jindiskd").chmod(0o755)
    assert found(tmp_path)["host.hook"].verdict is Verdict.OK


def test_firmware(tmp_path: Path) -> None:
    """A descriptor that leads nowhere is a problem, as is an image that is none."""
    descriptor = (
        '{"interface-types": ["uefi"], "mapping": {"device": "memory", "filename": "/fw.fd"},'
        '"features": ["amd-sev-snp"], "targets": [{"architecture": "x86_64", "machines": ["pc-q35-*"]}]}'
    )
    put(tmp_path, "usr/share/qemu/firmware/60-x.json", descriptor)
    assert found(tmp_path)["host.firmware.snp"].verdict is Verdict.PROBLEM
    put(tmp_path, "fw.fd", "x" * 8192)
    check = found(tmp_path)["host.firmware.snp"]
    assert check.verdict is Verdict.NOTE
    assert "not known" in check.found


def test_what_matters(tmp_path: Path) -> None:
    """Asked about one platform, only that counts; asked about none, no platform's lack is a problem of the host."""
    checks = list(found(tmp_path).values())
    snp = relevant(checks, Platform.SNP)
    assert all(not check.tees or Tee.SNP in check.tees for check in snp)
    assert any(check.id == "host.snp.kernel" and check.verdict is Verdict.PROBLEM for check in snp)
    assert all(not check.tees for check in relevant(checks, Platform.SIMULATED_SNP))
    assert all(check.verdict is not Verdict.PROBLEM for check in relevant(checks, None) if check.tees)


def test_this_host() -> None:
    """Whatever machine this is: it can be looked at, and every finding is whole."""
    found(Path("/"))
