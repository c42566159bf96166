"""`jindisksetup open` and `close` in a real kernel: a file system on its NBD device, trims, a killed server."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import testroot

from jindiskd.image import cpio, initrd, kmod, python_closure

AGENT = Path(__file__).with_name("setup_agent.py")
PROGRAM = Path(sys.executable).with_name("jindisksetup")
KEY = bytes(range(32))
SIZE = 64 << 20


def make_initrd(target: Path, modules_dir: Path) -> Path:
    """An initrd with the whole program."""
    archive = cpio.Archive()
    for directory in initrd.EMPTY:
        archive.directory(directory)
    for name in python_closure.MERGED:
        archive.directory(f"usr/{name}")
        archive.link(name, f"usr/{name}")
    archive.node("dev/console", 5, 1)
    archive.node("dev/null", 1, 3)
    entries = (
        "jindiskd.jindisksetup.main", "jindiskd.jindisksetup.format1", "jindiskd.jindisksetup.format2",
        "jindiskd.guest.modules", "jindiskd.guest.mounts", "ctypes", "json", "click.shell_completion", "encodings.idna",
    )  # fmt: skip
    python_closure.add_python(archive, (*entries, *python_closure.LATE_IMPORTS))
    listed = []
    for file in kmod.needed_modules(modules_dir, [*initrd.BASE_MODULES, "nbd", "ext4", "dm_mod"]):
        listed.append(f"/mod/{file.name.partition('.ko')[0]}.ko")
        archive.file(listed[-1][1:], kmod.module_bytes(file))
    archive.file("modules.list", "\n".join(listed).encode())
    (brd,) = (file for file in kmod.needed_modules(modules_dir, ["brd"]) if file.name.startswith("brd.ko"))
    archive.file("brd.ko", kmod.module_bytes(brd))
    archive.file("key", KEY, 0o600)
    archive.file("agent/setup_agent.py", AGENT.read_bytes())
    script = "import sys; sys.path.append('/agent')\nfrom setup_agent import main\nmain()\n"
    archive.file("init", f"#!/usr/bin/{python_closure.python_name()} -ISB\n{script}".encode(), 0o755)
    target.write_bytes(archive.to_gzip())
    return target


@pytest.mark.guest
@pytest.mark.slow
def test_open_and_close(machine, guest_kernel, tmp_path) -> None:
    """All of its life; afterwards the volume is whole, and its file system too."""
    root = testroot.make_root(tmp_path)
    os.truncate(root, SIZE)
    (tmp_path / "key").write_bytes(KEY)
    (tmp_path / "key").chmod(0o600)
    access = ["--key-file", tmp_path / "key"]
    subprocess.run([PROGRAM, "load", root, tmp_path / "vol", *access], check=True, capture_output=True)
    guest = machine(initrd=make_initrd(tmp_path / "initrd", guest_kernel.modules), disk=tmp_path / "vol", vsock=False)
    guest.start()
    guest.wait(180)
    line = next((line for line in guest.console.splitlines() if "SETUP-SEES" in line), None)
    assert line is not None, guest.console
    facts = json.loads(line.partition("SETUP-SEES ")[2])
    assert facts.pop("trimmed", 0) >= 4 << 20, guest.console
    assert facts == {
        "held": 6, "open": 0, "list": 0, "again": 6, "node": True, "sectors": SIZE // 512, "block": 4096,
        "discard": True, "secret": "inside", "read": True, "after trim": True, "busy": 6, "close": 0, "gone": True,
        "close again": 3, "read-only": 0, "ro": "1", "close read-only": 0, "reopen": 0, "durable": True, "end": 0,
        "bad name": 2, "no target": 1, "no target, open": 1, "targets": ["linear"], "mapped": True,
        "close other": 3, "removed": True, "ram format": 0, "ram check": 0, "too large": 2, "ram load": 0,
        "ram held": 6, "ram export": 0, "ram content": True, "ram rest": True, "small target": 2,
    }, guest.console  # fmt: skip
    assert guest.console.count("everybody on this machine can see the password") == 2
    assert "--via nbd" in guest.console
    assert any(line.split()[:2] == ["vol", "/dev/nbd0"] for line in guest.console.splitlines())
    done = subprocess.run(
        [PROGRAM, "check", "--data", tmp_path / "vol", *access, "--unanchored"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout
    words = [PROGRAM, "export", tmp_path / "vol", tmp_path / "back", *access, "--unanchored"]
    subprocess.run(words, check=True, capture_output=True)
    checked = subprocess.run(["/usr/sbin/e2fsck", "-fn", tmp_path / "back"], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout
    shown = subprocess.run(["/usr/sbin/debugfs", "-R", "cat /durable", tmp_path / "back"], capture_output=True)
    assert shown.stdout == b"flushed" * 1000
