"""What udev is told of a disk: what is ours, nothing of what is not, and nothing that a disk could put in its mouth."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import devicevolumes as known
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jindiskd.device import probe
from jindiskd.luks2 import layout

ALPHABET = re.compile(r"[A-Za-z0-9#+\-.:=@_/\\]*")


def test_a_jindisk2_volume(jindisk2):
    found = probe.probe(jindisk2[: probe.HEAD_BYTES])
    assert found == probe.Found(kind="jindisk2", uuid=known.UUID, size_bytes=16 << 20, label=known.LABEL)
    told = found.properties()
    assert set(told) == {"JINDISK_KIND", "JINDISK_UUID", "JINDISK_SIZE", "JINDISK_LABEL_ENC"}
    assert all(ALPHABET.fullmatch(value) for value in told.values()), told
    assert probe.decoded(told["JINDISK_LABEL_ENC"]) == known.LABEL


def test_a_luks2_volume_of_ours(luks2):
    found = probe.probe(luks2[: probe.HEAD_BYTES])
    assert found == probe.Found(kind="luks2", uuid=known.UUID, size_bytes=8 << 20)


def test_luks2_of_others_is_not_ours(tmp_path):
    """As cryptsetup makes it, which is valid LUKS2."""
    path = tmp_path / "luks"
    with path.open("wb") as file:
        file.truncate(32 << 20)
    words = ["cryptsetup", "luksFormat", "-q", "--type=luks2", "--pbkdf=pbkdf2", "--pbkdf-force-iterations=1000",
             "--key-file=/dev/zero", "--keyfile-size=32", path]  # fmt: skip
    subprocess.run(words, check=True, capture_output=True)
    head = path.read_bytes()[: probe.HEAD_BYTES]
    assert head.startswith(layout.MAGIC_PRIMARY)
    assert probe.probe(head) is None


def test_every_changed_byte_of_the_first_block_is_noticed(jindisk2):
    """The checksum covers all of what is believed."""
    for at in range(0, 512, 7):
        head = bytearray(jindisk2[: probe.HEAD_BYTES])
        head[at] ^= 0x20
        assert probe.probe(bytes(head)) is None, at


@pytest.mark.parametrize("head", [b"", b"JinDisk2", b"LUKS\xba\xbe" + bytes(5000), bytes(4096), b"\xff" * 16384])
def test_nonsense_is_nothing(head):
    assert probe.probe(head) is None


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(
    values=st.fixed_dictionaries(
        {},
        optional={
            name: JSON_VALUES | st.fixed_dictionaries({"0": JSON_VALUES})
            for name in ("keyslots", "segments", "tokens", "digests")
        },
    )
)
def test_any_json_area_with_a_right_checksum_is_survived(values):
    """Whoever writes a disk makes checksums right."""
    area = json.dumps(values).encode().ljust(layout.JSON_BYTES, b"\0")
    if len(area) > layout.JSON_BYTES:
        return
    head = layout.BinaryHeader(primary=True, uuid=known.UUID, salt=bytes(64)).pack(area)
    assert probe.probe(head) is None


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=64))
def test_a_label_survives_its_way_and_only_known_characters_travel(text):
    coded = probe.encoded(text)
    assert ALPHABET.fullmatch(coded)
    assert probe.decoded(coded) == text


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-IB", "-m", "jindiskd.device.probe", *words],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def test_the_program_is_silent_about_what_is_no_device(tmp_path):
    """Regular files, directories and devices of characters are not read, and an error is no reason to fail an event."""
    (tmp_path / "fifo").touch()
    for words in ((), ("/nowhere",), (str(tmp_path),), ("/dev/zero",), (str(tmp_path / "fifo"),), ("a", "b")):
        done = run(*words)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", ""), words


def test_it_imports_no_cryptography_and_ends_by_itself():
    """udev starts it for many devices."""
    code = "import sys, jindiskd.device.probe; print(sorted(m for m in sys.modules if m.startswith('cryptography')))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
    assert "signal.alarm(LIMIT_S)" in Path(probe.__file__).read_text()
