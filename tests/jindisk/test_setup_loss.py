"""`jindisksetup`: what was there is not lost by accident, and what is half done is never taken for whole."""

import errno
import json
import os
import signal
import subprocess
from pathlib import Path

import pytest
from jd import KEY
from jd_setup import PROGRAM, SIZE, contents

from jindiskd.jindisksetup.main import main

KEY1 = bytes(range(100, 128))


@pytest.mark.parametrize("name", ["v", "same", "link"])
def test_a_volume_is_not_exported_into_itself(setup, key, plain, tmp_path, name) -> None:
    """Not even with --force, by whatever name: the target is emptied before anything is read."""
    setup("load", plain, tmp_path / "v", "--key-file", key)
    os.link(tmp_path / "v", tmp_path / "same")
    (tmp_path / "link").symlink_to("v")
    before = (tmp_path / "v").read_bytes()
    words = ["--key-file", key, "--unanchored", "--force", "--yes"]
    setup("export", tmp_path / "v", tmp_path / name, *words, status=2)
    assert "it is the source itself" in setup.said
    assert (tmp_path / "v").read_bytes() == before


def test_an_export_has_the_volumes_length(setup, key, plain, tmp_path) -> None:
    """Over a longer file too: a raw image ends where its content does."""
    setup("load", plain, tmp_path / "v", "--key-file", key)
    (tmp_path / "old").write_bytes(b"x" * (SIZE + 5000))
    setup("export", tmp_path / "v", tmp_path / "old", "--key-file", key, "--unanchored", "--yes")
    assert (tmp_path / "old").read_bytes() == plain.read_bytes().ljust(SIZE, b"\0")


@pytest.mark.parametrize("how", ["no directory", "a file as directory", "a directory", "the target", "the key"])
@pytest.mark.parametrize("verb", ["load", "format"])
def test_where_the_state_cannot_be_kept_nothing_is_overwritten(setup, plain, tmp_path, how, verb) -> None:
    """An hour of loading must not end so: it is seen before the first write, and the old content stays."""
    target, anchors = tmp_path / "v", {"no directory": tmp_path / "none" / "a", "a file as directory": plain / "a"}
    anchors |= {"a directory": tmp_path / "d", "the target": target, "the key": tmp_path / "k"}
    target.write_bytes(b"old" * (10 << 20))
    before = target.read_bytes()
    (tmp_path / "d").mkdir()
    words = [verb, *([plain] if verb == "load" else []), target, "--generate-key", tmp_path / "k", "--force", "--yes"]
    status = 1 if "directory" in how and how != "a directory" else 2
    setup(*words, "--anchor", anchors[how], status=status)
    assert str(anchors[how]) in setup.said or str(anchors[how].parent) in setup.said
    assert target.read_bytes() == before
    assert not (tmp_path / "k").exists()


@pytest.mark.parametrize("verb", ["load", "convert"])
def test_killed_in_the_middle_nothing_opens(setup, key, plain, tmp_path, verb) -> None:
    """SIGKILL leaves a target that is no volume, not one with half the content; it can be begun again."""
    target, given = tmp_path / "v", ["--new-key-file", key]
    if verb == "load":
        words, given = ["load", "-", target, "--size", "64M", "--key-file", key], ["--key-file", key]
    else:
        (tmp_path / "key1").write_bytes(KEY1)
        (tmp_path / "key1").chmod(0o600)
        with (tmp_path / "large").open("wb") as file:
            file.write(os.urandom(48 << 20))
        old = ["--format-version", "1", "--key-file", tmp_path / "key1"]
        setup("load", tmp_path / "large", tmp_path / "v1", *old)
        (tmp_path / "large").unlink()
        words = ["convert", tmp_path / "v1", target, "--key-file", tmp_path / "key1", *given]
    with subprocess.Popen(
        [PROGRAM, "--log-json", *words], stdin=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdin is not None
        assert process.stderr is not None
        if verb == "load":
            process.stdin.write(os.urandom(8 << 20))  # taken but for what a pipe holds
            process.stdin.flush()
        while True:
            event = json.loads(process.stderr.readline())
            assert not event.get("finished"), "it was done before it could be killed"
            if event["type"] == "progress" and event["bytes"]:
                break
        process.send_signal(signal.SIGKILL)
        process.wait(60)
    assert target.exists()
    setup("dump", target, "--header-only", status=1)
    assert "no JinDisk 2 volume" in setup.said
    setup("check", target, "--key-file", key, "--unanchored", status=1)
    setup("load", plain, target, "--key-file", key, "--yes")
    assert contents(target)[:1_000_000] == plain.read_bytes()[:1_000_000]


def test_a_stream_that_ends_early_is_told_of(key, tmp_path) -> None:
    """A volume may be larger than its content, but whoever's pipe broke should know."""
    words = [PROGRAM, "--json", "load", "-", tmp_path / "v", "--size", "16M", "--key-file", key]
    done = subprocess.run(words, input=KEY * 1000, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert b"32000" in done.stderr
    assert b"16777216" in done.stderr
    done = subprocess.run([*words, "--force"], input=bytes(SIZE), capture_output=True, timeout=120)
    assert done.returncode == 0
    assert b"32000" not in done.stderr
    assert b"ended" not in done.stderr


def test_every_error_names_its_thing(setup, key, plain, tmp_path) -> None:
    """Files that cannot be what they are given as."""
    setup("load", plain, tmp_path / "v", "--key-file", key)
    (tmp_path / "d").mkdir()
    for status, thing, words in (
        (1, tmp_path / "d", ["check", tmp_path / "v", "--key-file", tmp_path / "d", "--unanchored"]),
        (2, tmp_path / "d", ["check", tmp_path / "d", "--key-file", key, "--unanchored"]),
        (2, "/dev/zero", ["check", "/dev/zero", "--key-file", key, "--unanchored"]),
        (2, "/dev/full", ["export", tmp_path / "v", "/dev/full", "--key-file", key, "--unanchored"]),
        (1, tmp_path / "d" / "none", ["check", tmp_path / "d" / "none", "--key-file", key, "--unanchored"]),
        (1, tmp_path / "d", ["load", plain, tmp_path / "d", "--key-file", key]),
    ):
        setup(*words, status=status)
        assert f"{thing}" in setup.said, words
    with Path("/dev/full").open("wb") as full:
        words = [PROGRAM, "export", tmp_path / "v", "-", "--key-file", key, "--unanchored"]
        done = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120)
    assert done.returncode == 1
    assert "standard output: No space left on device" in done.stderr


def test_a_device_that_refuses_is_named(key, tmp_path, monkeypatch, capsys) -> None:
    """A store that fails while a volume is made: what failed, and of what."""

    def refused(*_: object) -> int:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "pwrite", refused)
    assert main(["format", str(tmp_path / "v"), "--size", "16M", "--key-file", str(key)]) == 1
    assert f"formatting {tmp_path / 'v'}: Operation not permitted" in capsys.readouterr().err
    assert not (tmp_path / "v").exists()
