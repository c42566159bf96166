"""The archive writer, against cpio(1) and the format's own words."""

import gzip
import random
import shutil
import stat
import subprocess

import pytest

from jindiskd.image.cpio import Archive


def sample(order: list[int]) -> Archive:
    archive = Archive()
    steps = [
        lambda: archive.file("usr/bin/tool", b"#!/bin/sh\n" * 100, 0o755),
        lambda: archive.file("etc/empty", b""),
        lambda: archive.link("bin", "usr/bin"),
        lambda: archive.directory("proc", 0o555),
        lambda: archive.node("dev/console", 5, 1),
        lambda: archive.file("usr-x", b"x"),
    ]
    for index in order:
        steps[index]()
    return archive


def test_order_of_adding_does_not_matter() -> None:
    """The same entries give the same bytes, in whatever order they were added."""
    first = sample(list(range(6))).to_gzip()
    for seed in range(5):
        order = list(range(6))
        random.Random(seed).shuffle(order)
        assert sample(order).to_gzip() == first


def test_gzip_has_no_name_and_no_time() -> None:
    """RFC 1952: flags 0, mtime 0; and it unpacks to the plain archive."""
    packed = sample(list(range(6))).to_gzip()
    assert packed[:8] == b"\x1f\x8b\x08\0\0\0\0\0"
    assert gzip.decompress(packed) == sample(list(range(6))).to_bytes()


def test_cpio_agrees(tmp_path) -> None:
    """cpio(1) lists the same names, types, sizes and owners."""
    if not shutil.which("cpio"):
        pytest.skip("the program cpio is missing; install the package cpio")
    archive = sample(list(range(6)))
    listed = subprocess.run(["cpio", "-itv", "--numeric-uid-gid"], input=archive.to_bytes(), capture_output=True)
    assert listed.returncode == 0, listed.stderr
    lines = listed.stdout.decode().splitlines()
    assert [line.split(" -> ")[0].split()[-1] for line in lines] == list(archive.entries)
    assert [line.split()[0] for line in lines] == [stat.filemode(entry.mode) for entry in archive.entries.values()]
    assert {tuple(line.split()[2:4]) for line in lines} == {("0", "0")}
    assert all("1970" in line for line in lines)
    unpacked = subprocess.run(
        ["cpio", "-id", "--no-absolute-filenames", "usr/*", "bin", "etc/*"],
        input=archive.to_bytes(),
        cwd=tmp_path,
        capture_output=True,
    )
    assert unpacked.returncode == 0, unpacked.stderr
    assert (tmp_path / "bin/tool").read_bytes() == b"#!/bin/sh\n" * 100
    assert (tmp_path / "bin/tool").stat().st_mode & 0o777 == 0o755


def test_fields_by_hand() -> None:
    """The header of one file, written out from the kernel's description of the format."""
    archive = Archive()
    archive.file("a", b"hello", 0o600)
    fields = ["00000001", "00008180", "0" * 8, "0" * 8, "00000001", "00000007", "00000005"]
    fields += ["0" * 8, "0" * 8, "0" * 8, "0" * 8, "00000002", "0" * 8]
    head = ("070701" + "".join(fields)).encode() + b"a\0"
    assert len(head) == 112
    assert archive.to_bytes(7).startswith(head + b"hello\0\0\0" + b"070701")


def test_parents_come_first() -> None:
    """The kernel needs a directory before what is in it, also where a sibling sorts between them as text."""
    names = list(sample(list(range(6))).entries)
    assert names.index("usr") < names.index("usr/bin") < names.index("usr/bin/tool") < names.index("usr-x")


@pytest.mark.parametrize("name", ["/etc/x", "../x", "a/../b", "a//b", "./a", "", ".", "TRAILER!!!", "x" * 4096])
def test_odd_names_are_refused(name) -> None:
    """Only normal relative names get in."""
    with pytest.raises(ValueError):
        Archive().file(name, b"")


def test_contradictions_are_refused() -> None:
    """A name has one meaning, and nothing is below a file or a link."""
    archive = Archive()
    archive.file("a", b"1")
    archive.file("a", b"1")
    archive.link("lib", "usr/lib")
    for step in (
        lambda: archive.file("a", b"2"),
        lambda: archive.file("a/b", b"2"),
        lambda: archive.file("lib/b", b"2"),
    ):
        with pytest.raises(ValueError):
            step()
