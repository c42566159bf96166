"""`jindisksetup` on volumes that the reference module wrote: read, exported and converted as they are."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from jd1 import Vector

from jindiskd.jindisksetup.main import main

Unpack = Callable[[str], Vector]


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@pytest.mark.parametrize("name", ["01-fresh", "02-sequential", "04-ext4", "06-password", "07-reopened"])
def test_convert(name: str, vector: Unpack, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The converted volume has the recorded content, checks clean, and stores no more blocks than were written."""
    found = vector(name)
    key = tmp_path / "key"
    if "password" in found.entry:
        key.write_bytes(found.entry["password"].encode())
        words = ["--key-file", str(key), "--kdf", "auto"]
    else:
        key.write_bytes(bytes.fromhex(found.entry["key"] + found.entry["iv"]))
        words = ["--key-file", str(key)]
    key.chmod(0o600)
    new = ["--generate-key", str(tmp_path / "new"), "--anchor", str(tmp_path / "a")]
    assert main(["convert", str(found.path), str(tmp_path / "v2"), *words, *new]) == 0
    access = [str(tmp_path / "v2"), "--key-file", str(tmp_path / "new"), "--anchor", str(tmp_path / "a")]
    capsys.readouterr()
    assert main(["--json", "check", "--data", *access]) == 0
    report = json.loads(capsys.readouterr().out)["check"]
    assert report["mapped_blocks"] <= found.entry["mapped_blocks"]
    assert main(["export", access[0], str(tmp_path / "out"), *access[1:]]) == 0
    assert sha256(tmp_path / "out") == found.entry["plaintext_sha256"]


def test_measure_and_export(vector: Unpack, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The recorded measurement and content, by version 1's own commands."""
    found = vector("04-ext4")
    key = tmp_path / "key"
    key.write_bytes(bytes.fromhex(found.entry["key"] + found.entry["iv"]))
    key.chmod(0o600)
    words = ["--key-file", str(key), "--format-version", "1"]
    assert main(["measure", str(found.path), *words]) == 0
    assert capsys.readouterr().out.strip() == found.entry["measurement"]
    assert main(["export", str(found.path), str(tmp_path / "out"), *words]) == 0
    assert sha256(tmp_path / "out") == found.entry["plaintext_sha256"]
    assert main(["check", "--data", str(found.path), *words]) == 0
