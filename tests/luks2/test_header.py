"""Headers of ours are LUKS2 to cryptsetup, the same for the same randomness, and open with their key only."""

import hashlib
import json
import os
import random
import shutil
import struct
import subprocess
import uuid as uuids

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given, settings
from hypothesis import strategies as st

from jindiskd.base.secret import Secret
from jindiskd.errors import InvalidArgument
from jindiskd.guest.config import Luks2Expectation
from jindiskd.luks2 import antiforensic, check, header, layout
from jindiskd.luks2.layout import Luks2HeaderRefused

UUID = "6f8e7c9a-1b2c-4d3e-8f90-a1b2c3d4e5f6"
DATA_BYTES = 64 << 20
KEY = bytes(range(64))
PASSPHRASE = b"\x00\n" + bytes(range(100, 130))  # a NUL and a newline must survive


def make(seed: int = 1, **changes: object) -> bytes:
    arguments = {
        "volume_key": Secret(KEY),
        "passphrase": Secret(PASSPHRASE),
        "uuid": UUID,
        "data_bytes": DATA_BYTES,
        "rng": random.Random(seed).randbytes,
    }
    return header.make_header(**{**arguments, **changes})


def expect(blob: bytes, **changes: object) -> Luks2Expectation:
    values = {
        "header_bytes": len(blob),
        "header_sha256": hashlib.sha256(blob).digest(),
        "uuid": UUID,
        "cipher": "aes-xts-plain64",
        "key_bytes": 64,
        "sector_bytes": 4096,
    }
    return Luks2Expectation(**{**values, **changes})


GOOD = make()
BINARY_FIELDS = (
    (6, 2), (8, 8), (16, 8), (24, 48), (72, 32), (168, 40), (208, 48), (256, 8), (264, 184), (512, 3584),
)  # fmt: skip


def json_of(blob: bytes) -> dict:
    return json.loads(blob[4096:16384].rstrip(b"\0"))


def with_json(values: dict, blob: bytes = GOOD, dumps=lambda v: header.encode(v)) -> bytes:
    """The header with another JSON area and right checksums: what a host can make without any key."""
    area = dumps(values)
    first, _ = layout.parse_copy(blob[:16384], primary=True)
    second, _ = layout.parse_copy(blob[16384:32768], primary=False)
    return first.pack(area) + second.pack(area) + blob[32768:]


def leaves(value: object, path: tuple = ()) -> list[tuple]:
    if isinstance(value, dict):
        return [path] * (path != ()) + [leaf for name in value for leaf in leaves(value[name], (*path, name))]
    return [path]


def at(values: dict, path: tuple) -> object:
    for name in path:
        values = values[name]
    return values


def mutations(value: object) -> list[object]:
    if isinstance(value, str):
        return [value + "0", "x" + value[1:], "", 5, None, value.upper() + "=", "0" + value]
    if isinstance(value, int):
        return [value + 1, value * 1000, 0, -1, str(value), float(value), True]
    if isinstance(value, list):
        return [[], [*value, "1"], "0", None]
    return [{**value, "1": {}}, {**value, "flags": ["x"]}, [], None]


def test_same_randomness_gives_same_bytes() -> None:
    """The header is a function of its arguments; other randomness gives another header."""
    assert make(1) == make(1)
    assert make(1) != make(2)
    assert len(GOOD) == 1 << 20


def test_cryptsetup_accepts_and_agrees(tmp_path) -> None:
    """cryptsetup validates the header and reports the fields we meant."""
    if shutil.which("cryptsetup") is None:
        pytest.skip("cryptsetup is not installed")
    path = tmp_path / "volume"
    path.write_bytes(GOOD)
    os.truncate(path, len(GOOD) + DATA_BYTES)
    subprocess.run(["cryptsetup", "isLuks", "--type", "luks2", path], check=True)
    assert subprocess.check_output(["cryptsetup", "luksUUID", path], text=True).strip() == UUID
    dumped = json.loads(subprocess.check_output(["cryptsetup", "luksDump", "--dump-json-metadata", path]))
    assert dumped == json_of(GOOD)
    text = subprocess.check_output(["cryptsetup", "luksDump", "--debug", path], text=True, stderr=subprocess.STDOUT)
    for line in ("cipher: aes-xts-plain64", "sector: 4096 [bytes]", "offset: 1048576 [bytes]", "PBKDF:      pbkdf2"):
        assert line in text
    assert text.count("LUKS2 header version 2 of size 16384 bytes, checksum sha256.") == 2
    assert "error" not in text.lower()


def test_secondary_copy_alone_is_found_by_cryptsetup(tmp_path) -> None:
    """Both copies are good: with the first destroyed, cryptsetup still reads the second."""
    if shutil.which("cryptsetup") is None:
        pytest.skip("cryptsetup is not installed")
    path = tmp_path / "volume"
    path.write_bytes(bytes(4096) + GOOD[4096:])
    os.truncate(path, len(GOOD) + DATA_BYTES)
    assert subprocess.check_output(["cryptsetup", "luksUUID", path], text=True).strip() == UUID


def test_unlock_returns_the_volume_key() -> None:
    """The passphrase opens the slot; any other does not, and the error does not show either."""
    check.parse_and_check(GOOD, expect(GOOD))
    assert check.unlock(GOOD, Secret(PASSPHRASE)) == Secret(KEY)
    with pytest.raises(check.WrongKey) as caught:
        check.unlock(GOOD, Secret(PASSPHRASE[:-1] + b"?"))
    assert PASSPHRASE.hex() not in str(caught.value)
    assert UUID in str(caught.value)


def test_slot_opens_by_an_independent_path() -> None:
    """A second, literal reading of the format recovers the same volume key from the bytes."""
    values = json_of(GOOD)
    slot = values["keyslots"]["0"]
    import base64

    kek = hashlib.pbkdf2_hmac(
        "sha256", PASSPHRASE, base64.b64decode(slot["kdf"]["salt"]), slot["kdf"]["iterations"], 64
    )
    start, size = int(slot["area"]["offset"]), int(slot["area"]["size"])
    plain = b""
    for number in range(size // 512):
        context = Cipher(algorithms.AES(kek), modes.XTS(struct.pack("<QQ", number, 0))).decryptor()
        plain += context.update(GOOD[start + 512 * number : start + 512 * (number + 1)])
    state = bytes(64)
    for stripe in range(4000):
        state = bytes(a ^ b for a, b in zip(state, plain[64 * stripe : 64 * (stripe + 1)], strict=True))
        if stripe < 3999:
            state = b"".join(
                hashlib.sha256(struct.pack(">I", i) + state[32 * i : 32 * (i + 1)]).digest() for i in range(2)
            )
    assert state == KEY


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"volume_key": Secret(bytes(32))}, "volume key"),
        ({"passphrase": Secret(b"letmein")}, "random"),
        ({"uuid": UUID.upper()}, "UUID"),
        ({"uuid": "x"}, "UUID"),
        ({"data_bytes": 4095}, "data length"),
        ({"data_bytes": 0}, "data length"),
    ],
)
def test_unfit_arguments_are_refused(changes: dict, word: str) -> None:
    """Lengths and UUID are checked before anything is made."""
    with pytest.raises(InvalidArgument, match=word):
        make(**changes)


def believe(blob: bytes) -> None:
    """Open a header whose digest the host could choose."""
    check.parse_and_check(blob, expect(blob))
    check.unlock(blob, Secret(PASSPHRASE))


def test_every_json_member_is_checked() -> None:
    """A host that rewrites any member (right checksums, even the recorded digest) opens nothing with the true key."""
    count = 0
    for path in leaves(json_of(GOOD)):
        for value in mutations(at(json_of(GOOD), path)):
            values = json_of(GOOD)
            if value == at(values, path) and type(value) is type(at(values, path)):
                continue
            at(values, path[:-1])[path[-1]] = value
            blob = with_json(values)
            if path != ("segments", "0", "size"):  # only the digest knows the right length of the data
                with pytest.raises((Luks2HeaderRefused, check.WrongKey)):
                    believe(blob)
            with pytest.raises(Luks2HeaderRefused):
                check.parse_and_check(blob, expect(GOOD))
            count += 1
    assert count > 150


def test_every_json_member_is_required() -> None:
    """Leaving a member out is refused by its name."""
    for path in leaves(json_of(GOOD)):
        values = json_of(GOOD)
        del at(values, path[:-1])[path[-1]]
        blob = with_json(values)
        with pytest.raises(Luks2HeaderRefused, match=path[-1] if path[-1] != "0" else "0|missing"):
            check.parse_and_check(blob, expect(blob))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("cipher_null", lambda v: v["segments"]["0"].update(encryption="cipher_null-ecb")),
        ("linear", lambda v: v["segments"].update({"0": {"type": "linear", "offset": "1048576", "size": "dynamic"}})),
        ("second segment", lambda v: v["segments"].update({"1": dict(v["segments"]["0"])})),
        ("dynamic size", lambda v: v["segments"]["0"].update(size="dynamic")),
        ("reencrypt", lambda v: v["config"].update(requirements={"mandatory": ["online-reencrypt-v2"]})),
        ("integrity", lambda v: v["segments"]["0"].update(integrity={"type": "none"})),
        ("segment flags", lambda v: v["segments"]["0"].update(flags=["backup-final"])),
        ("config flags", lambda v: v["config"].update(flags=["allow-discards"])),
        ("token", lambda v: v["tokens"].update({"0": {"type": "systemd-tpm2", "keyslots": ["0"]}})),
        ("huge argon2", lambda v: v["keyslots"]["0"].update(
            kdf={"type": "argon2id", "time": 4, "memory": 1 << 30, "cpus": 4, "salt": v["keyslots"]["0"]["kdf"]["salt"]}
        )),
        ("huge pbkdf2", lambda v: v["keyslots"]["0"]["kdf"].update(iterations=1 << 31)),
        ("unbound slot", lambda v: v["keyslots"]["0"].update(type="luks2", priority=0)),
    ],
)  # fmt: skip
def test_known_attacks_are_refused(name: str, change) -> None:
    """The forms of CVE-2025-59054 and CVE-2025-58356, and what else a host might try, by structure alone."""
    values = json_of(GOOD)
    change(values)
    blob = with_json(values)
    with pytest.raises(Luks2HeaderRefused):
        check.parse_and_check(blob, expect(blob))


@pytest.mark.parametrize(
    "write",
    [
        lambda v: json.dumps(v).encode().ljust(12288, b"\0"),
        lambda v: json.dumps(v, separators=(",", ":")).encode().ljust(12288, b" "),
        lambda v: header.encode(v)[:-1] + b"x",
        lambda v: header.encode(v)[:-12].replace(b'"tokens":{}', b'"tokens":{},"tokens":{}'),
        lambda v: b"[" * 12288,
        lambda v: b"[]".ljust(12288, b"\0"),
        lambda v: bytes(12288),
    ],
)
def test_json_has_one_form(write) -> None:
    """Other spellings, duplicates, depth bombs and non-objects are refused with right checksums."""
    blob = with_json(json_of(GOOD), dumps=write)
    with pytest.raises(Luks2HeaderRefused):
        check.parse_and_check(blob, expect(blob))


def test_copies_must_agree_and_keep_their_places() -> None:
    """Swapped copies, one altered copy, another size and data in unused room are refused."""
    first, second, rest = GOOD[:16384], GOOD[16384:32768], GOOD[32768:]
    values = json_of(GOOD)
    values["segments"]["0"]["size"] = "4096"
    altered = with_json(values)
    for blob in (
        second + first + rest,
        first + first + rest,
        first + altered[16384:32768] + rest,
        altered[:16384] + second + rest,
        first + second + rest[:-1] + b"x",
        GOOD[:-1],
        GOOD + b"\0",
        b"",
        make(3)[:16384] + second + rest,
    ):
        with pytest.raises(Luks2HeaderRefused):
            check.parse_and_check(blob, expect(blob))


@settings(max_examples=200, deadline=None)
@given(offset=st.integers(0, 32767), bit=st.integers(0, 7))
def test_any_flipped_bit_of_both_headers_is_refused(offset: int, bit: int) -> None:
    """A single changed bit in either copy is noticed without the recorded digest."""
    blob = bytearray(GOOD)
    blob[offset] ^= 1 << bit
    with pytest.raises(Luks2HeaderRefused):
        check.parse(bytes(blob))


@settings(max_examples=60, deadline=None)
@given(
    field=st.sampled_from(BINARY_FIELDS),
    data=st.data(),
)
def test_binary_fields_with_right_checksum_are_refused(field: tuple[int, int], data) -> None:
    """Version, size, sequence, label, checksum name, UUID, subsystem, offset and padding, re-checksummed by a host."""
    offset, length = field
    copy = bytearray(GOOD[:16384])
    at = data.draw(st.integers(offset, offset + length - 1))
    copy[at] ^= data.draw(st.integers(1, 255))
    copy[448:512] = bytes(64)
    copy[448:480] = hashlib.sha256(copy).digest()
    with pytest.raises(Luks2HeaderRefused):
        check.parse(bytes(copy) + GOOD[16384:])


@pytest.mark.parametrize(
    ("field", "value"),
    [("uuid", str(uuids.UUID(int=1))), ("cipher", "cipher_null-ecb"), ("key_bytes", 32), ("sector_bytes", 512)],
)
def test_expectation_in_words_is_compared(field: str, value: object) -> None:
    """A header sound in itself but not the expected one is refused, even under its own digest."""
    with pytest.raises(Luks2HeaderRefused):
        check.parse_and_check(GOOD, expect(GOOD, **{field: value}))


@given(key=st.binary(min_size=1, max_size=70), stripes=st.integers(1, 20), seed=st.integers())
def test_antiforensic_splitting_is_reversible(key: bytes, stripes: int, seed: int) -> None:
    """`merge` undoes `split` for every key length and number of stripes."""
    material = antiforensic.split(key, stripes, random.Random(seed).randbytes)
    assert len(material) == len(key) * stripes
    assert antiforensic.merge(material, len(key)) == key
