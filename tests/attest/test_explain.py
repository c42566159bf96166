"""Explanations of digests: each single change and pairs of changes are found, and nothing is invented."""

import itertools
from dataclasses import replace
from pathlib import Path

import pytest

from jindiskd.attest.explain import Alternatives, explain_digest
from jindiskd.attest.firmware import FirmwareUnsuitable
from jindiskd.attest.measure import LaunchInputs, snp_digest, snp_launch_digest


@pytest.fixture
def recorded(attestation: Path, tmp_path: Path) -> LaunchInputs:
    for name in ("kernel", "initrd", "kernel2", "initrd2"):
        (tmp_path / name).write_bytes(name.encode())
    altered = bytearray((attestation / "measure/ovmf_AmdSev_suffix.bin").read_bytes())
    altered[0] ^= 1
    (tmp_path / "other.fd").write_bytes(altered)
    return LaunchInputs(
        firmware=attestation / "measure/ovmf_AmdSev_suffix.bin",
        kernel=tmp_path / "kernel",
        initrd=tmp_path / "initrd",
        cmdline="quiet console=ttyS0",
        vcpus=2,
        cpu_model="EPYC-Milan",
    )


@pytest.fixture
def alternatives(tmp_path: Path, attestation: Path) -> Alternatives:
    return Alternatives(
        firmware=[tmp_path / "other.fd", attestation / "measure/ovmf_OvmfX64_suffix.bin"],
        kernels=[tmp_path / "kernel2"],
        initrds=[tmp_path / "initrd2"],
        cmdlines=["debug"],
        maximum_vcpus=8,
    )


def changes(tmp_path: Path) -> dict[str, object]:
    return {
        "vcpus": 7,
        "cpu_model": "EPYC-Genoa",
        "guest_features": 0x21,
        "firmware": tmp_path / "other.fd",
        "cmdline": "quiet console=ttyS0\n",
        "kernel": tmp_path / "kernel2",
        "initrd": tmp_path / "initrd2",
    }


def test_nothing_to_explain(recorded):
    """The record's own digest needs no change."""
    found = explain_digest(snp_launch_digest(recorded), recorded)
    assert (found.found, found.changes, found.tried) == (True, (), 1)
    assert "the record gives" in str(found)


def test_single_changes(recorded, alternatives, tmp_path):
    """Each single change is found, alone, and named with both values."""
    for name, value in changes(tmp_path).items():
        found = explain_digest(snp_launch_digest(replace(recorded, **{name: value})), recorded, alternatives)
        assert [(name, value)] == [(change.what, change.value) for change in found.changes]
        assert "instead of" in str(found)
    found = explain_digest(snp_digest(recorded, kernel_hashes=False), recorded, alternatives)
    assert [change.what for change in found.changes] == ["kernel_hashes"]


def test_pairs_of_changes(recorded, alternatives, tmp_path):
    """Each pair of changes is found as that pair."""
    for (first, one), (second, two) in itertools.combinations(changes(tmp_path).items(), 2):
        launch = replace(recorded, **{first: one, second: two})
        found = explain_digest(snp_launch_digest(launch), recorded, alternatives)
        assert {first, second} == {change.what for change in found.changes}
    launch = replace(recorded, vcpus=3)
    found = explain_digest(snp_digest(launch, kernel_hashes=False), recorded, alternatives)
    assert {"kernel_hashes", "vcpus"} == {change.what for change in found.changes}


def test_what_is_not_explained(recorded, alternatives):
    """A digest of something else is not explained, and the answer says how much was tried."""
    found = explain_digest(bytes(48), recorded, alternatives)
    assert not found.found
    assert found.tried > 100
    assert "nothing tried" in str(found)


def test_unmeasurable_record(recorded, attestation):
    """A record that cannot be measured itself is an error, not a missing explanation."""
    with pytest.raises(FirmwareUnsuitable):
        explain_digest(bytes(48), replace(recorded, firmware=attestation / "measure/ovmf_OvmfX64_suffix.bin"))
