"""`jindisksetup` with version 1: never silently, with the reference's keys, and out of it into version 2."""

import hashlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from jd import KEY
from nbd_client import Client

from jindiskd.jindisk import anchor_file
from jindiskd.jindisksetup.main import main

PROGRAM = Path(sys.executable).with_name("jindisksetup")
KEY1 = bytes(range(100, 128))
WORDS = ["--format-version", "1"]


@pytest.fixture
def setup(capsys):
    """Runs the program in this process: the parsed output; what it told is in `said`."""

    def run(*words: object, status: int = 0) -> dict:
        capsys.readouterr()
        assert main(["--json", *(str(word) for word in words)]) == status
        out, run.said = capsys.readouterr()
        return json.loads(out) if out else {}

    run.said = ""
    return run


@pytest.fixture
def key(tmp_path) -> Path:
    path = tmp_path / "key1"
    path.write_bytes(KEY1)
    path.chmod(0o600)
    return path


@pytest.fixture
def plain(tmp_path) -> Path:
    path, generator = tmp_path / "plain", random.Random(4)
    with path.open("wb") as file:
        file.truncate(20 << 20)
        for offset in (0, 3 << 20, (20 << 20) - 4096):
            file.seek(offset)
            file.write(generator.randbytes(4096 * 3)[: (20 << 20) - offset])
    return path


def pieces(path: Path) -> list[tuple[int, int]]:
    """Where a file is no hole."""
    found, at = [], 0
    with path.open("rb") as file:
        while True:
            try:
                start = os.lseek(file.fileno(), at, os.SEEK_DATA)
            except OSError:
                return found
            at = os.lseek(file.fileno(), start, os.SEEK_HOLE)
            found.append((start, at))


def digest(path: Path) -> bytes:
    """Of what is in a large, sparse file."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        for start, end in pieces(path):
            file.seek(start)
            found.update(b"%d" % start + file.read(end - start))
    return found.digest()


def test_it_says_what_it_does_not_protect(setup, key, plain, tmp_path) -> None:
    """Every command with version 1 does; and version 2 is never taken for it, nor the other way round."""
    setup("load", plain, tmp_path / "v1", "--key-file", key, *WORDS)
    assert "protects nothing" in setup.said
    for words in (["measure"], ["dump"], ["check"], ["check", "--data"]):
        setup(*words, tmp_path / "v1", "--key-file", key, *WORDS)
        assert "protects nothing" in setup.said
    setup("dump", tmp_path / "v1", "--header-only", *WORDS)
    setup("dump", tmp_path / "v1", "--header-only", status=1)
    (tmp_path / "key2").write_bytes(KEY)
    setup("measure", tmp_path / "v1", "--key-file", tmp_path / "key2", "--unanchored", status=1)
    setup("measure", tmp_path / "v1", "--key-file", tmp_path / "key2", *WORDS, status=2)
    for words in (["--anchor", tmp_path / "a"], ["--save", tmp_path / "a"]):
        setup("measure", tmp_path / "v1", "--key-file", key, *WORDS, *words, status=2)
    setup("rekey", tmp_path / "v1", "--key-file", key, *WORDS, "--new-key-file", key, status=1)
    assert "convert" in setup.said
    setup("format", tmp_path / "w", "--size", "8M", "--key-file", key, *WORDS, "--label", "x", status=2)
    setup("format", tmp_path / "w", "--size", "8M", "--key-file", key, *WORDS, "--anchor", tmp_path / "a", status=2)
    assert not (tmp_path / "w").exists()


def test_load_export_and_serve(setup, key, plain, tmp_path) -> None:
    """The bytes come back; written through the server they are there afterwards."""
    made = setup("load", plain, tmp_path / "v1", "--key-file", key, *WORDS)["volume"]
    assert made["size_bytes"] == 20 << 20
    setup("export", tmp_path / "v1", tmp_path / "back", "--key-file", key, *WORDS)
    assert (tmp_path / "back").read_bytes() == plain.read_bytes()
    words = [PROGRAM, "serve", tmp_path / "v1", "--key-file", key, *WORDS, "--socket", tmp_path / "sock"]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        while not (said := process.stderr.readline()).startswith("serving"):
            assert said.startswith("warning: "), said
        with Client(tmp_path / "sock") as client:
            client.go()
            assert client.write(4096, b"new" * 2000) == 0
            assert client.ask(6, 0, 4096) == 0
            assert client.ask(6, 0, 4096, flags=16) == 95, "zeroes are not fast here"
            assert client.ask(3) == 0
        process.terminate()
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait(60)
        process.stderr.close()
    setup("check", "--data", tmp_path / "v1", "--key-file", key, *WORDS)
    setup("export", tmp_path / "v1", tmp_path / "again", "--key-file", key, *WORDS)
    expected = bytearray(plain.read_bytes())
    expected[0:4096], expected[4096:10096] = bytes(4096), b"new" * 2000
    assert (tmp_path / "again").read_bytes() == expected


def test_passwords(setup, tmp_path) -> None:
    """Each tool's derivation opens what it made, and nothing else; the password comes from a file."""
    (tmp_path / "pw").write_bytes(b"correct horse battery staple")
    (tmp_path / "pw").chmod(0o600)
    for kdf, other in (("c", "rust"), ("rust", "c")):
        path = tmp_path / kdf
        setup("format", path, "--size", "8M", *WORDS, "--kdf", kdf, "--key-file", tmp_path / "pw")
        setup("measure", path, *WORDS, "--kdf", kdf, "--key-file", tmp_path / "pw")
        setup("measure", path, *WORDS, "--kdf", other, "--key-file", tmp_path / "pw", status=8)
        setup("measure", path, *WORDS, "--kdf", "auto", "--key-file", tmp_path / "pw")
    (tmp_path / "wrong").write_bytes(b"incorrect horse")
    setup("measure", tmp_path / "c", *WORDS, "--kdf", "auto", "--key-file", tmp_path / "wrong", status=8)
    setup("format", tmp_path / "d", "--size", "8M", *WORDS, "--kdf", "auto", "--key-file", tmp_path / "pw", status=2)
    # The C tool's, by the format document.
    (tmp_path / "raw").write_bytes(bytes.fromhex("ac053bd7569684ec0ab80398412910ba7271fac8c7b5cfe9648142c4"))
    setup("measure", tmp_path / "c", *WORDS, "--key-file", tmp_path / "raw")
    setup("measure", tmp_path / "c", "--kdf", "c", "--key-file", tmp_path / "pw", status=2)
    (tmp_path / "pw").write_bytes(b"")
    setup("measure", tmp_path / "c", *WORDS, "--kdf", "c", "--key-file", tmp_path / "pw", status=2)


def test_convert(setup, key, plain, tmp_path) -> None:
    """The same content under a new key, anchored; the old volume is as it was; what fails leaves nothing."""
    setup("load", plain, tmp_path / "v1", "--key-file", key, *WORDS)
    before = digest(tmp_path / "v1")
    new = ["--generate-key", tmp_path / "key2", "--anchor", tmp_path / "a"]
    made = setup("convert", tmp_path / "v1", tmp_path / "v2", "--key-file", key, *new, "--label", "moved")["volume"]
    assert (made["format"], made["label"], made["closed"]) == ("jindisk2", "moved", True)
    assert anchor_file.read(tmp_path / "a").anchor.pack().hex() == made["anchor"]
    access = [tmp_path / "v2", "--key-file", tmp_path / "key2", "--anchor", tmp_path / "a"]
    setup("check", "--data", *access)
    setup("export", *access[:1], tmp_path / "back", *access[1:])
    assert (tmp_path / "back").read_bytes() == plain.read_bytes()
    assert (tmp_path / "v2").stat().st_blocks * 512 < 4 << 20, "zeros were stored"
    assert digest(tmp_path / "v1") == before
    setup("convert", tmp_path / "v1", tmp_path / "v2", "--key-file", key, "--new-key-file", tmp_path / "key2", status=6)
    setup("convert", tmp_path / "v1", tmp_path / "v1", "--key-file", key, "--new-key-file", key, "--force", status=2)
    setup("convert", tmp_path / "v1", tmp_path / "v3", "--key-file", key, status=2)


def test_a_failed_conversion_leaves_nothing_that_opens(setup, key, plain, tmp_path) -> None:
    """A damaged block of the old volume: the error names it, and a target that was there is no volume."""
    setup("load", plain, tmp_path / "v1", "--key-file", key, *WORDS)
    with (tmp_path / "v1").open("r+b") as file:
        # The data region is the last part of the file that was written.
        file.seek(pieces(tmp_path / "v1")[-1][1] - (2 << 20))
        file.write(b"damage" * 1000)
    with (tmp_path / "target").open("wb") as file:
        file.truncate(64 << 20)
    new = ["--generate-key", tmp_path / "key2", "--anchor", tmp_path / "a"]
    setup("convert", tmp_path / "v1", tmp_path / "target", "--key-file", key, *new, status=8)
    assert "not authentic" in setup.said
    assert not (tmp_path / "key2").exists()
    assert not (tmp_path / "a").exists()
    assert (tmp_path / "target").read_bytes()[: 8 * 4096] == bytes(8 * 4096)
    setup("dump", tmp_path / "target", "--header-only", status=1)
    setup("convert", tmp_path / "v1", tmp_path / "fresh", "--key-file", key, *new, status=8)
    assert not (tmp_path / "fresh").exists()
