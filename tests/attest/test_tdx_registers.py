"""RTMR1 and RTMR2: the digest of real signed kernels, the constants of a recorded log, and what is refused."""

import hashlib
import sys
from pathlib import Path

import pytest

from jindiskd.attest.ccel import parse_event_log, replay
from jindiskd.attest.model import MalformedEvidence
from jindiskd.attest.tdx_registers import CALLING, LEAVING, SEPARATOR, authenticode, rtmr1, rtmr2
from jindiskd.errors import NotFound

sys.path.insert(0, str(Path(__file__).parents[1] / "guest"))
import qemu_kernel


@pytest.fixture(scope="session")
def kernel(tmp_path_factory) -> bytes:
    """A distribution's kernel, signed for Secure Boot."""
    found = qemu_kernel.find_kernel(tmp_path_factory.mktemp("kernel"))
    if found is None:
        pytest.skip(qemu_kernel.MISSING)
    return found.kernel.read_bytes()


def certificates(image: bytes) -> tuple[int, int, int]:
    """Where the entry of the certificates is, and what it says: offset and length."""
    entry = int.from_bytes(image[0x3C:0x40], "little") + 24 + 144
    offset, length = (int.from_bytes(image[at : at + 4], "little") for at in (entry, entry + 4))
    return entry, offset, length


def test_the_digest_is_what_the_distribution_signed(kernel: bytes) -> None:
    """Its signature has the digest in it; and without the signature, or with another checksum, it is the same."""
    entry, offset, length = certificates(kernel)
    assert length > 1000
    digest = authenticode(kernel, "sha256")
    assert digest in kernel[offset : offset + length]
    bare = bytearray(kernel[:offset])
    bare[entry : entry + 8] = bytes(8)
    bare[entry - 80 : entry - 76] = b"\x01\x02\x03\x04"
    assert authenticode(bytes(bare), "sha256") == digest
    for at in (2, offset // 2, offset - 1):
        changed = bytearray(kernel)
        changed[at] ^= 1
        assert authenticode(bytes(changed), "sha256") != digest


def test_rtmr1_is_the_recorded_sequence_with_our_kernel(kernel: bytes, tmp_path: Path, vectors: Path) -> None:
    """What a real machine's firmware said around what it started is what is said here; the rest is the kernel."""
    log = parse_event_log((vectors / "attestation/ccel/gcp-cos-113/ccel.bin").read_bytes())
    theirs = [event for event in log if event.register == 2]
    said = [hashlib.sha384(text).digest() for text in (CALLING, SEPARATOR, *LEAVING)]
    started = [event for event in theirs if event.digest not in said]
    assert [event.digest for event in theirs if event.digest in said] == said
    assert len(started) == len(theirs) - 4
    (tmp_path / "kernel").write_bytes(kernel)
    register = bytes(48)
    for digest in (authenticode(kernel), *said):
        register = hashlib.sha384(register + digest).digest()
    assert rtmr1(tmp_path / "kernel") == register
    assert replay(log)[1] != register


def test_rtmr2(tmp_path: Path) -> None:
    """Two events: the options as the kernel's stub gets them, with what the firmware adds and the end; the initrd."""
    (tmp_path / "initrd").write_bytes(b"an initrd")
    options = b"".join(bytes([letter, 0]) for letter in b"quiet initrd=initrd\0")
    first = hashlib.sha384(bytes(48) + hashlib.sha384(options).digest()).digest()
    assert rtmr2("quiet", tmp_path / "initrd") == hashlib.sha384(
        first + hashlib.sha384(b"an initrd").digest()
    ).digest()
    assert rtmr2("quiet ", tmp_path / "initrd") != rtmr2("quiet", tmp_path / "initrd")
    with pytest.raises(NotFound):
        rtmr2("quiet", tmp_path / "none")


def test_what_is_no_kernel(kernel: bytes, tmp_path: Path) -> None:
    """Cut anywhere in its headers, or with headers that lie, it is refused; never another error."""
    (tmp_path / "kernel").write_bytes(b"not one")
    with pytest.raises(MalformedEvidence):
        rtmr1(tmp_path / "kernel")
    header = int.from_bytes(kernel[0x3C:0x40], "little")
    for end in (0, 1, 0x3C, 0x3F, header, header + 4, header + 30, header + 200, 5000):
        with pytest.raises(MalformedEvidence):
            authenticode(kernel[:end])
    for at, value in (
        (0x3C, b"\xff\xff\xff\xff"), (header, b"NE\0\0"), (header + 6, b"\xff\xff"), (header + 24, b"\x0b\x01"),
        (header + 84, b"\xff\xff\xff\x7f"), (header + 84, bytes(4)), (header + 24 + 148, b"\xff\xff\xff\x7f"),
    ):  # fmt: skip
        changed = bytearray(kernel)
        changed[at : at + len(value)] = value
        with pytest.raises(MalformedEvidence):
            authenticode(bytes(changed))
