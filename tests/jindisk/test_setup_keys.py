"""Keys and anchors of `jindisksetup`: where they come from, what is changed, and what is stale."""

import os
import pty
import subprocess
from uuid import UUID

import pytest
from jd import KEY
from jd_setup import PROGRAM, change, contents

from jindiskd.base.anchor import State
from jindiskd.jindisk import anchor_file
from jindiskd.jindisk.anchor_file import AnchorFileDamaged, FileKeeper
from jindiskd.jindisk.errors import VolumeFenced

# Keys


def test_keys(setup, key, tmp_path, monkeypatch) -> None:
    """Exactly so many raw bytes, from a file or standard input; a wrong one opens nothing; none of it is shown."""
    setup("format", tmp_path / "v", "--size", "16M", "--key-file", key)
    words = ["measure", tmp_path / "v", "--unanchored"]
    for wrong in (KEY[:-1], KEY + b"\n", b"", KEY * 100):
        (tmp_path / "wrong").write_bytes(wrong)
        setup(*words, "--key-file", tmp_path / "wrong", status=2)
        assert "32 raw bytes" in setup.said
    (tmp_path / "wrong").write_bytes(bytes(32))
    setup(*words, "--key-file", tmp_path / "wrong", status=8)
    assert "others may read" in setup.said
    setup(*words, "--key-file", tmp_path / "absent", status=1)
    command = [PROGRAM, *map(str, words), "--key-file", "-"]
    assert subprocess.run(command, input=KEY, capture_output=True).returncode == 0
    done = subprocess.run(command, input=KEY + b"x", capture_output=True)
    assert done.returncode == 2
    done = subprocess.run(command[:-2], stdin=subprocess.DEVNULL, capture_output=True)
    assert done.returncode == 2
    assert b"--key-file" in done.stderr or b"32 raw bytes" in done.stderr


def test_a_key_typed_at_a_terminal(setup, key, tmp_path) -> None:
    """Asked for in hexadecimal, and not echoed."""
    setup("format", tmp_path / "v", "--size", "16M", "--key-file", key)
    main_end, terminal = pty.openpty()
    process = subprocess.Popen(
        [PROGRAM, "measure", tmp_path / "v", "--unanchored"],
        stdin=terminal, stdout=subprocess.PIPE, stderr=terminal, start_new_session=True,
    )  # fmt: skip
    os.close(terminal)
    seen = b""
    while b"hexadecimal" not in seen:
        seen += os.read(main_end, 1000)
    os.write(main_end, KEY.hex().encode() + b"\n")
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert len(out.split()) == 2
    try:
        seen += os.read(main_end, 10_000)
    except OSError:
        pass
    os.close(main_end)
    assert KEY.hex().encode() not in seen


def test_rekey(setup, key, plain, tmp_path) -> None:
    """The new key opens, the old one does not, the data are the same, the anchor follows."""
    setup("load", plain, tmp_path / "v", "--key-file", key, "--anchor", tmp_path / "a")
    before = contents(tmp_path / "v")
    access = [tmp_path / "v", "--anchor", tmp_path / "a", "--key-file"]
    setup("rekey", *access, key, status=2)
    (tmp_path / "bad").write_bytes(bytes(32))
    setup("rekey", *access, tmp_path / "bad", "--generate-key", tmp_path / "new", status=8)
    assert not (tmp_path / "new").exists()
    setup("rekey", *access, key, "--generate-key", tmp_path / "new")
    setup("measure", *access, key, status=8)
    setup("check", "--data", *access, tmp_path / "new")
    assert contents(tmp_path / "v", (tmp_path / "new").read_bytes()) == before


# Freshness


def test_an_old_copy_is_stale(setup, key, plain, tmp_path) -> None:
    """With the anchor file it is refused; without, it is opened with a warning, or silently if one says so."""
    setup("load", plain, tmp_path / "v", "--key-file", key, "--anchor", tmp_path / "a")
    old = (tmp_path / "v").read_bytes()
    access = [tmp_path / "v", "--key-file", key]
    setup("rekey", *access, "--anchor", tmp_path / "a", "--new-key-file", key)  # a session like any other
    setup("measure", *access, "--anchor", tmp_path / "a")
    (tmp_path / "v").write_bytes(old)
    setup("measure", *access, "--anchor", tmp_path / "a", status=8)
    assert "set back" in setup.said
    setup("measure", *access)
    assert "older copy" in setup.said
    setup("measure", *access, "--unanchored")
    assert setup.said == ""
    setup("measure", *access, "--unanchored", "--anchor", tmp_path / "a", status=2)
    # The explicit decision to go on from here.
    setup("measure", *access, "--unanchored", "--save", tmp_path / "a", status=6)
    setup("measure", *access, "--unanchored", "--save", tmp_path / "a2")
    setup("measure", *access, "--anchor", tmp_path / "a2")


def test_another_writers_session_is_stale(setup, key, tmp_path) -> None:
    """A state that no session of this anchor file wrote is refused, closed or not."""
    setup("format", tmp_path / "v", "--size", "16M", "--key-file", key, "--anchor", tmp_path / "a")
    for close in (True, False):
        change(tmp_path / "v", b"other", close=close)
        setup("measure", tmp_path / "v", "--key-file", key, "--anchor", tmp_path / "a", status=8)


def test_anchor_files_are_read_strictly(setup, key, tmp_path) -> None:
    """Every byte counts; another volume's file does not fit."""
    setup("format", tmp_path / "v", "--size", "16M", "--key-file", key, "--anchor", tmp_path / "a")
    good = (tmp_path / "a").read_bytes()
    for at in range(len(good)):
        (tmp_path / "a").write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        with pytest.raises(AnchorFileDamaged):
            anchor_file.read(tmp_path / "a")
    for wrong in (b"", good[:-1], good + b"x"):
        (tmp_path / "a").write_bytes(wrong)
        setup("measure", tmp_path / "v", "--key-file", key, "--anchor", tmp_path / "a", status=8)
    setup("format", tmp_path / "w", "--size", "16M", "--key-file", key, "--anchor", tmp_path / "b")
    setup("measure", tmp_path / "v", "--key-file", key, "--anchor", tmp_path / "b", status=8)
    setup("format", tmp_path / "x", "--size", "16M", "--key-file", key, "--anchor", tmp_path / "b", status=6)


def test_a_newer_session_fences_the_older(setup, key, tmp_path) -> None:
    """Two sessions on copies of one volume with one anchor file: only the newer one's states are kept."""
    setup("format", tmp_path / "v", "--size", "16M", "--key-file", key, "--anchor", tmp_path / "a")
    known = anchor_file.read(tmp_path / "a")
    found = State(session=known.anchor.session, sequence=known.anchor.sequence, root=known.anchor.root)
    first, second = (FileKeeper(tmp_path / "a", known.uuid, bytes([n]) * 32) for n in (1, 2))
    first.adopt(found, bytes([1]) * 32)
    ahead = State(session=bytes([1]) * 32, sequence=found.sequence + 1, root=bytes(32))
    first.report(ahead)
    first.report(ahead)
    with pytest.raises(VolumeFenced):
        second.adopt(found, bytes([2]) * 32)  # older than what was reported
    second.adopt(ahead, bytes([2]) * 32)
    for message in (first.report, first.close):
        with pytest.raises(VolumeFenced):
            message(State(session=bytes([1]) * 32, sequence=ahead.sequence + 1, root=bytes(32)))
    after = State(session=bytes([2]) * 32, sequence=ahead.sequence + 1, root=b"r" * 32)
    second.close(after)
    second.close(after)
    with pytest.raises(VolumeFenced):
        second.report(State(session=bytes([2]) * 32, sequence=after.sequence + 1, root=bytes(32)))
    with pytest.raises(VolumeFenced):
        FileKeeper(tmp_path / "a", UUID(int=1), bytes(32)).adopt(after, bytes(32))
    assert anchor_file.read(tmp_path / "a").anchor.open is False
