"""The agent as files for a distribution's initramfs: complete, beside what is there, and kept whole for the end."""

from __future__ import annotations

import dataclasses
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from jindiskd.base import document
from jindiskd.errors import JindiskError
from jindiskd.guest import unlock
from jindiskd.guest.config import PATH, BrokerPin, GuestConfig, JindiskExpectation, RootVolume
from jindiskd.image import initramfs_files
from jindiskd.image.python_closure import python_name

ROOT = Path(__file__).resolve().parents[2]
CONFIG = GuestConfig(
    schema=1,
    image_id="5a9d1a7e-62a1-4a4c-8f4e-0c2f27bd6d1e",
    platform="simulated-snp",
    broker=BrokerPin(spki_sha256=bytes(range(32))),
    root=RootVolume(
        device="/dev/vda3",
        resource="default/x/root",
        jindisk=JindiskExpectation(version=2, uuid="5a9d1a7e-62a1-4a4c-8f4e-0c2f27bd6d1e"),
    ),
    modules=(),
)
SCRIPTS = ROOT / "initramfs"


@pytest.fixture(scope="module")
def initramfs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tree that has directories, links and a library already, as mkinitramfs leaves them to hooks."""
    target = tmp_path_factory.mktemp("initramfs")
    (target / "usr/lib").mkdir(parents=True)
    (target / "lib").symlink_to("usr/lib")
    (target / "etc").mkdir()
    initramfs_files.write_tree(target, document.dump(CONFIG), SCRIPTS)
    return target


def imported(root: Path, program: str) -> subprocess.CompletedProcess[str]:
    """A line of Python in the tree as a root of its own. Never a program of the tree: those switch the machine off."""
    if os.geteuid() != 0:
        pytest.skip("changing the root needs root")
    command = ["unshare", "--mount", "chroot", root, f"/usr/bin/{python_name()}", "-ISB", "-c", program]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


PROGRAM = "import jindiskd.guest.agent, jindiskd.guest.unlock, jindiskd.guest.jindisk_root, jindiskd.guest.shutdown"


def test_everything_the_agent_imports_is_there(initramfs: Path) -> None:
    """In the tree alone, without the machine's libraries, the agent loads; also what is imported late."""
    done = imported(initramfs, PROGRAM)
    assert done.returncode == 0, done.stderr
    assert document.load(GuestConfig, (initramfs / PATH).read_bytes(), document="x") == CONFIG


def test_programs_are_executable_and_silent(initramfs: Path) -> None:
    """Each takes the console from its streams first; each is for the interpreter that is there, by its whole name."""
    for name in ("unlock", "shutdown", "give-up-agent", "mount-volumes", "running"):
        path = initramfs / "usr/lib/jindisk" / name
        assert stat.S_IMODE(path.stat().st_mode) == 0o755
        first, second, third, *_ = path.read_text().splitlines()
        assert first == f"#!/usr/bin/{python_name()} -ISB"
        assert (second, third) == ("import os", "null = os.open('/dev/null', os.O_RDWR)")
    for name in ("give-up", "load-modules"):
        assert (initramfs / "usr/lib/jindisk" / name).read_bytes() == (SCRIPTS / name).read_bytes()


def test_what_was_there_stays(tmp_path: Path, initramfs: Path) -> None:
    """A link of the distribution's to a library is not replaced by the library; a second run changes nothing."""
    target = shutil.copytree(initramfs, tmp_path / "again", symlinks=True)
    library = next((target / "usr/lib").rglob("libc.so.6"))
    library.rename(library.with_name("libc-2.so"))
    library.symlink_to("libc-2.so")
    before = {path: path.lstat().st_mtime_ns for path in target.rglob("*") if path.is_file()}
    (target / "usr/lib/jindisk/unlock").write_text("old")
    initramfs_files.write_tree(target, document.dump(CONFIG), SCRIPTS)
    assert library.is_symlink()
    changed = [path for path, time in before.items() if path.lstat().st_mtime_ns != time]
    assert [path.name for path in changed] == ["unlock"]


def test_what_is_kept_is_whole(tmp_path: Path, initramfs: Path) -> None:
    """The copy for /run/initramfs loads the same modules in a root of its own, and has what systemd-shutdown runs."""
    kept = tmp_path / "kept"
    kept.mkdir()
    lines = (initramfs / "usr/lib/jindisk/files").read_text().splitlines()
    unlock.copy_agent(kept, lines, initramfs)
    done = imported(kept, PROGRAM)
    assert done.returncode == 0, done.stderr
    assert {"dev", "oldroot", "proc", "run", "sys"} <= {path.name for path in kept.iterdir()}
    assert not (kept / "etc").exists()


def test_an_unusable_configuration_stops_the_making(tmp_path: Path) -> None:
    """Rather no new initramfs than one that cannot boot; nothing is written."""
    broken = document.dump(CONFIG).replace(b'"schema"', b'"shema"')
    with pytest.raises(JindiskError, match="guest"):
        initramfs_files.write_tree(tmp_path, broken, SCRIPTS)
    assert list(tmp_path.iterdir()) == []


def test_without_a_configuration_the_tree_has_none(tmp_path: Path) -> None:
    """A system that was not made into an image: the agent is there and will not be run."""
    initramfs_files.write_tree(tmp_path, None, SCRIPTS)
    assert not (tmp_path / PATH).exists()
    assert (tmp_path / initramfs_files.UNLOCK).exists()


def test_the_package_stands_alone(tmp_path: Path) -> None:
    """What a package of it holds is enough for its program, beside the interpreter's own library."""
    package = tmp_path / "package"
    words = [sys.executable, "-m", "jindiskd.image.initramfs_files", "--package", package]
    subprocess.run(words, check=True, timeout=300)
    for name in ("cryptography", "cffi"):
        assert list(package.glob(f"{name}-*.dist-info/licenses/*"))
    target = tmp_path / "tree"
    program = f"import sys; sys.path.insert(0, {os.fspath(package)!r})\n"
    program += "from jindiskd.image.initramfs_files import main\nmain()"
    options = ["--config", tmp_path / "none", "--scripts", SCRIPTS]
    subprocess.run(["/usr/bin/python3", "-ISB", "-c", program, target, *options], check=True)
    assert (target / initramfs_files.UNLOCK).exists()
    done = imported(target, PROGRAM)
    assert done.returncode == 0, done.stderr


def test_the_hooks_are_sound_shell() -> None:
    """As initramfs-tools demands: executable, `sh -n`, and an answer to `prereqs` that runs nothing."""
    folder = ROOT / "initramfs/initramfs-tools"
    scripts = [path for path in folder.rglob("*") if path.is_file()]
    assert len(scripts) == 5
    others = [SCRIPTS / "give-up", SCRIPTS / "load-modules", *(SCRIPTS / "dracut/90jindisk").glob("*.sh")]
    for path in scripts + others:
        subprocess.run(["bash" if "module-setup" in path.name else "sh", "-n", path], check=True)
        assert os.access(path, os.X_OK)
    for path in scripts:
        said = subprocess.run([path, "prereqs"], capture_output=True, text=True, check=True, env={"PATH": "/nowhere"})
        assert said.stdout.strip() == ""


def test_simulation_is_seen_before_openssl_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The variable is set for simulated platforms alone; a configuration that is none is an error."""
    path = tmp_path / "guest.json"
    for platform, value in (("snp", None), ("simulated-snp", "~0x200000000")):
        monkeypatch.delenv("OPENSSL_ia32cap", raising=False)
        path.write_bytes(document.dump(dataclasses.replace(CONFIG, platform=platform)))
        unlock.spare_the_emulator(path)
        assert dict(os.environ).get("OPENSSL_ia32cap") == value
    monkeypatch.delenv("OPENSSL_ia32cap", raising=False)
    for text in (b"", b"{}", b"[]", b"\xff"):
        path.write_bytes(text)
        with pytest.raises((ValueError, LookupError, TypeError)):
            unlock.spare_the_emulator(path)
