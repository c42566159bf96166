"""The table of the reference's kernel target. The target itself is in no kernel that the tests boot."""

import subprocess
import sys
from pathlib import Path

import pytest

from jindiskd.base.secret import Secret
from jindiskd.jindisk.v1.keys import Kdf, derive
from jindiskd.jindisksetup import mapped

PROGRAM = Path(sys.executable).with_name("jindisksetup")


def test_the_table_is_that_of_the_format_document() -> None:
    """Key and IV of the document's password, by both tools, as the kernel parses them."""
    for kdf, key, iv in (
        (Kdf.C, "ac053bd7569684ec0ab80398412910ba", "7271fac8c7b5cfe9648142c4"),
        (Kdf.RUST, "fa306203573c0ff170fbbcbbff7459e0", "d28aa70176fb8a4e4e11a2bb"),
    ):
        with derive(Secret(b"correct horse battery staple"), kdf) as root:
            for create in (False, True):
                table = mapped.parameters(root, Path("/dev/sdz"), create=create)
                assert table.decode() == f"{key} {iv} /dev/sdz {int(create)}"


def test_without_the_kernels_target_it_says_what_to_do(tmp_path) -> None:
    """In the reference's own words and in ours; nothing is touched, and the password is warned about, not repeated."""
    if mapped.TARGET in mapped.kernel_targets():
        pytest.skip("this kernel has the target")
    (tmp_path / "disk").write_bytes(b"content" * 1000)
    for words in (
        ["create", "hunter2", tmp_path / "disk", "name", "--yes"],
        ["open", "hunter2", tmp_path / "disk", "name", "--kdf", "rust"],
        ["open", tmp_path / "disk", "name", "--format-version", "1", "--kdf", "c", "--key-file", tmp_path / "disk"],
    ):
        done = subprocess.run([PROGRAM, *words], capture_output=True, text=True)
        assert done.returncode == 1, done.stderr
        assert "dm-jindisk" in done.stderr
        assert ("everybody on this machine" in done.stderr) == ("hunter2" in words)
        assert "hunter2" not in done.stderr
    assert (tmp_path / "disk").read_bytes() == b"content" * 1000
    done = subprocess.run([PROGRAM, "close", "hunter2", tmp_path / "disk", "name"], capture_output=True, text=True)
    assert done.returncode == 3, done.stderr
    for words in (["open", "x"], ["close", "a", "b"], ["open", "a", "b", "c", "d"], ["open", "/dev/null", "../etc"]):
        assert subprocess.run([PROGRAM, *words], capture_output=True).returncode == 2
