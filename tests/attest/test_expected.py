"""What a launch will measure as, on every platform, by the command and by the functions behind it."""

import hashlib
import json
import struct
import uuid
from pathlib import Path

import pytest

from jindiskd.attest.expected import expected
from jindiskd.attest.firmware import FOOTER_GUID, TDX_METADATA_GUID, FirmwareUnsuitable
from jindiskd.attest.measure import LaunchInputs, sev_launch_digest, snp_launch_digest
from jindiskd.attest.tdx_measure import mr_td, read_tdx_sections
from jindiskd.cli.main import main

GENERAL = Path("/usr/share/ovmf/OVMF.fd")


def image(sections: list[tuple[int, int, int, int, int, int]], size: int = 4 * 4096) -> bytes:
    """A firmware image with TDX metadata: contents 0, 1, 2 …, the metadata, the GUID table."""
    body = bytearray(index % 251 for index in range(size))
    metadata = b"TDVF" + struct.pack("<III", 16 + 32 * len(sections), 1, len(sections))
    metadata += b"".join(struct.pack("<IIQQII", *section) for section in sections)
    at = size - 1024
    body[at : at + len(metadata)] = metadata
    entry = struct.pack("<I", size - at) + struct.pack("<H", 22) + uuid.UUID(TDX_METADATA_GUID).bytes_le
    table = entry + struct.pack("<H", len(entry) + 18) + uuid.UUID(FOOTER_GUID).bytes_le
    body[size - 32 - len(table) : size - 32] = table
    return bytes(body)


def test_mrtd_step_by_step(tmp_path: Path) -> None:
    """Two sections, one measured and one of zero pages only added; permanent memory is not added at all."""
    path = tmp_path / "tdvf.fd"
    sections = [(4096, 4096, 0x1000, 8192, 0, 1), (0, 0, 0x9000, 4096, 3, 0), (0, 0, 0x100000, 1 << 40, 4, 2)]
    data = image(sections)
    path.write_bytes(data)
    by_hand = hashlib.sha384()
    for page in (0x1000, 0x2000):
        by_hand.update(b"MEM.PAGE.ADD".ljust(16, b"\0") + struct.pack("<Q", page) + bytes(104))
        contents = data[4096:8192] if page == 0x1000 else bytes(4096)
        for chunk in range(0, 4096, 256):
            by_hand.update(b"MR.EXTEND".ljust(16, b"\0") + struct.pack("<Q", page + chunk) + bytes(104))
            by_hand.update(contents[chunk : chunk + 256])
    by_hand.update(b"MEM.PAGE.ADD".ljust(16, b"\0") + struct.pack("<Q", 0x9000) + bytes(104))
    assert mr_td(path) == by_hand.digest()
    changed = bytearray(data)
    changed[4096 + 5] ^= 1
    path.write_bytes(changed)
    assert mr_td(path) != by_hand.digest()
    changed = bytearray(data)
    changed[5] ^= 1
    path.write_bytes(changed)
    assert mr_td(path) == by_hand.digest()


@pytest.mark.parametrize(
    "section",
    [
        (1 << 20, 4096, 0, 4096, 0, 1),
        (0, 8192, 0, 4096, 0, 1),
        (0, 0, 1, 4096, 0, 1),
        (0, 0, 0, 100, 0, 1),
        (0, 0, 0, 1 << 40, 3, 0),
    ],
)
def test_sections_that_cannot_be(tmp_path: Path, section: tuple[int, int, int, int, int, int]) -> None:
    """Refused, and nothing large is made of them."""
    path = tmp_path / "tdvf.fd"
    path.write_bytes(image([section]))
    with pytest.raises(FirmwareUnsuitable):
        mr_td(path)
    path.write_bytes(image([])) if section[0] else path.write_bytes(bytes(8192))
    with pytest.raises(FirmwareUnsuitable):
        mr_td(path)


@pytest.mark.skipif(not GENERAL.exists(), reason="Debian's ovmf is not installed")
def test_a_real_firmware_for_tdx() -> None:
    """Debian's image has the sections that edk2 gives it: the measured firmware below 4 GiB, then variables."""
    found = read_tdx_sections(GENERAL.read_bytes(), GENERAL)
    assert [section.kind for section in found][:2] == [0, 1]
    assert found[0].attributes == 1
    assert found[0].address + found[0].size_bytes == 1 << 32
    assert len(mr_td(GENERAL)) == 48


@pytest.fixture
def inputs(attestation: Path, tmp_path: Path) -> LaunchInputs:
    (tmp_path / "kernel").write_bytes(b"kernel")
    (tmp_path / "initrd").write_bytes(b"initrd")
    return LaunchInputs(
        firmware=attestation / "measure/ovmf_AmdSev_suffix.bin",
        kernel=tmp_path / "kernel",
        initrd=tmp_path / "initrd",
        cmdline="quiet",
        vcpus=3,
        cpu_model="EPYC-Milan",
    )


def test_every_platform(inputs: LaunchInputs) -> None:
    """Digests as of the single functions; a reason where there is none; and all that entered them."""
    found = expected(inputs)
    measured = found["measurements"]
    assert measured["snp"]["digest"] == snp_launch_digest(inputs).hex()
    assert measured["sev"]["digest"] == sev_launch_digest(inputs, encrypted_state=False).hex()
    assert measured["sev-es"]["digest"] == sev_launch_digest(inputs, encrypted_state=True).hex()
    assert "TDX section outside" in measured["tdx"]["problem"]  # the recorded file is the end of an image
    assert found["inputs"]["kernel_sha256"] == hashlib.sha256(b"kernel").hexdigest()
    assert found["inputs"]["cpu_signature"] == "00a00f11"
    if GENERAL.exists():
        from dataclasses import replace

        other = expected(replace(inputs, firmware=GENERAL, cpu_model="host"))["measurements"]
        assert "page for kernel hashes" in other["snp"]["problem"]
        assert other["tdx"]["digest"] == mr_td(GENERAL).hex()


def test_the_command(inputs: LaunchInputs, tmp_path: Path, attestation: Path, capsys) -> None:
    """Of files, with init-data and a signature; what does not belong together is usage."""
    files = ["--firmware", str(inputs.firmware), "--kernel", str(inputs.kernel), "--initrd", str(inputs.initrd)]
    words = ["--json", "image", "measure", *files, "--cmdline", "quiet", "--vcpus", "3", "--cpu-model", "EPYC-Milan"]
    keys = attestation / "id-block"
    (tmp_path / "init.toml").write_text('algorithm = "sha256"\nversion = "0.1.0"\n[data]\nvm = "web"\n')
    out = tmp_path / "out"
    out.mkdir()
    more = ["--init-data", str(tmp_path / "init.toml"), "--id-key", str(keys / "id-key.pem"), "--guest-svn", "0x10"]
    more += ["--author-key", str(keys / "author-key.pem"), "--output", str(out)]
    assert main([*words, *more]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == {**expected(inputs), "init_data": found["init_data"], "id_block": found["id_block"]}
    digest = hashlib.sha256((tmp_path / "init.toml").read_bytes()).hexdigest()
    assert found["init_data"]["host_data"] == digest
    assert found["init_data"]["mr_config_id"] == digest + "00" * 16
    block = (out / "id-block").read_bytes()
    assert block[:48] == snp_launch_digest(inputs)
    assert block[84] == 0x10
    case = json.loads((keys / "case.json").read_text())
    assert found["id_block"]["id_key_digest"] == case["id_key_digest"]
    assert main(words[1:]) == 0
    assert "none: the firmware has a TDX section outside" in capsys.readouterr().out
    for wrong in ([], ["x", *files], files[:2], [*files, "--output", str(out)], [*files, "--author-key", "/etc/hosts"]):
        assert main(["image", "measure", *wrong]) == 2
    (tmp_path / "init.toml").write_text("x")
    assert main([*words, "--init-data", str(tmp_path / "init.toml")]) != 0
    capsys.readouterr()
