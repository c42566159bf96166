"""ID blocks: the recorded ones hold, what is signed here holds, and nothing altered does."""

import hashlib
import json
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given
from hypothesis import strategies as st

from jindiskd.attest.id_block import AUTH_BYTES, IdBlock, check, decode_key, encode_key, load_key, sign
from jindiskd.attest.model import MalformedEvidence
from jindiskd.errors import InvalidArgument, NotFound


def test_the_recorded_block(attestation: Path) -> None:
    """Made by another program with these keys: same block, same digests; its signatures hold."""
    folder = attestation / "id-block"
    case = json.loads((folder / "case.json").read_text())
    block = IdBlock(launch_digest=bytes.fromhex(case["launch_digest"]))
    id_key, author_key = load_key(folder / "id-key.pem"), load_key(folder / "author-key.pem")
    signed = sign(block, id_key, author_key)
    assert signed.block == (folder / "id-block.bin").read_bytes()
    assert signed.id_key_digest.hex() == case["id_key_digest"]
    assert signed.author_key_digest.hex() == case["author_key_digest"]
    recorded = (folder / "id-auth.bin").read_bytes()
    found = check(signed.block, recorded)
    assert (found.id_key_digest, found.author_key_digest) == (signed.id_key_digest, signed.author_key_digest)
    # All but the signatures is determined.
    for begin, end in ((0, 0x40), (0x240, 0x680), (0x880, AUTH_BYTES)):
        assert signed.auth[begin:end] == recorded[begin:end]
    again = check(signed.block, signed.auth)
    assert again.id_key_digest == signed.id_key_digest


def test_every_altered_byte_that_counts(attestation: Path) -> None:
    """In the block, in both signatures and in both keys."""
    folder = attestation / "id-block"
    block, auth = (folder / "id-block.bin").read_bytes(), (folder / "id-auth.bin").read_bytes()
    for at in range(0, 96, 5):
        with pytest.raises(MalformedEvidence):
            check(block[:at] + bytes([block[at] ^ 1]) + block[at + 1 :], auth)
    for at in (0, 4, 8, 0x3F, 0x40, 0x90, 0xF0, 0x240, 0x244, 0x290, 0x300, 0x650, 0x680, 0x6D0, 0x880, 0x884, 0x8D0):
        with pytest.raises(MalformedEvidence):
            check(block, auth[:at] + bytes([auth[at] ^ 1]) + auth[at + 1 :])
    for bad in (b"", block[:-1]):
        with pytest.raises(MalformedEvidence):
            check(bad, auth)


def test_without_an_author_key() -> None:
    """Its digest is zeros, and its places are empty."""
    signed = sign(IdBlock(launch_digest=bytes(48), guest_svn=7), ec.generate_private_key(ec.SECP384R1()))
    assert check(signed.block, signed.auth).author_key_digest == bytes(48)
    assert not any(signed.auth[0x680:])
    assert signed.block[84:88] == b"\7\0\0\0"


@pytest.mark.parametrize(
    "wrong",
    [
        {"launch_digest": bytes(47)},
        {"family_id": b""},
        {"image_id": bytes(17)},
        {"guest_svn": 1 << 32},
        {"guest_svn": -1},
        {"policy": 0x10000},
        {"policy": 1 << 64},
    ],
)
def test_members_out_of_range(wrong: dict) -> None:
    """Named, with what would be right."""
    with pytest.raises(InvalidArgument):
        IdBlock(**{"launch_digest": bytes(48), **wrong}).encode()


def test_key_files(tmp_path: Path) -> None:
    """Only a P-384 private key in PEM will do."""
    with pytest.raises(NotFound):
        load_key(tmp_path / "none")
    (tmp_path / "x").write_text("-----BEGIN PRIVATE KEY-----\n-----END PRIVATE KEY-----\n")
    with pytest.raises(InvalidArgument):
        load_key(tmp_path / "x")
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    other = ec.generate_private_key(ec.SECP256R1())
    (tmp_path / "y").write_bytes(other.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    with pytest.raises(InvalidArgument, match="P-384"):
        load_key(tmp_path / "y")


@given(blob=st.binary(max_size=0x404))
def test_keys_of_any_bytes(blob: bytes) -> None:
    """A key or a clear refusal."""
    try:
        key = decode_key(blob)
    except MalformedEvidence:
        return
    assert encode_key(key) == blob
    assert hashlib.sha384(blob).digest()
