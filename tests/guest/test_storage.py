"""The root storage process in a real kernel: it outlives the change of root, systemd's killing, and closes last."""

import json
import subprocess
from pathlib import Path

import pytest
import testroot

from jindiskd.image import cpio, initrd, kmod, python_closure

AGENT = Path(__file__).with_name("storage_agent.py")
MAPPED_AGENT = Path(__file__).with_name("mapped_agent.py")

# An init that behaves as systemd-shutdown does: end all processes but survivors, remount, pivot, run /shutdown.
SHUTTING_DOWN = """#!/usr/bin/{python} -ISB
import ctypes, json, os, signal, time
libc = ctypes.CDLL(None, use_errno=True)
def check(result):
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result
def mount(source, target, kind, flags):
    check(libc.mount(source, target, kind, ctypes.c_ulong(flags), None))
seen = {{}}
try:
    for name in os.listdir("/proc"):
        if name.isdigit() and int(name) > 1:
            line = open(f"/proc/{{name}}/cmdline").read()
            if line:
                seen[name] = [line[0], open(f"/proc/{{name}}/oom_score_adj").read().strip(),
                              os.readlink(f"/proc/{{name}}/root"),
                              [l for l in open(f"/proc/{{name}}/status") if l.startswith(("VmLck", "VmRSS"))]]
    mount(b"/dev/nbd0", b"/", b"ext4", 32)
    for number in range(40):
        with open(f"/written-{{number}}", "wb") as file:
            file.write(os.urandom(1 << 18))
    os.remove("/written-0")
    os.sync()
    open("/proc/sys/vm/drop_caches", "w").write("3")
    total = sum(len(open(f"/written-{{n}}", "rb").read()) for n in range(1, 40))
    for name in seen:
        if seen[name][0] != "@":
            os.kill(int(name), signal.SIGKILL)
        else:
            os.kill(int(name), signal.SIGTERM)
    os.write(1, ("\\nROOT-SEES " + json.dumps([seen, total]) + "\\n").encode())
    mount(None, b"/", None, 1 | 32)
    mount(b"/run/initramfs", b"/run/initramfs", None, 4096)
    mount(None, b"/run/initramfs", None, 1 << 18)
    os.makedirs("/run/initramfs/oldroot", exist_ok=True)
    for name in ("dev", "proc", "sys", "run"):
        mount(f"/{{name}}".encode(), f"/run/initramfs/{{name}}".encode(), None, 4096)
    os.chdir("/run/initramfs")
    check(libc.syscall(155, b".", b"oldroot"))
    os.chroot(".")
    os.chdir("/")
    os.execv("/shutdown", ["/shutdown", "poweroff"])
except BaseException as exc:
    os.write(1, f"\\nINIT-FAILED {{exc!r}} {{exc.__traceback__.tb_lineno}}\\n".encode())
    libc.reboot(0x4321FEDC)
"""


def make_initrd(target: Path, modules_dir: Path, device: str, init: str, *, mapped: bool = False) -> Path:
    """An initrd around `storage_agent.py`; `mapped`: around `mapped_agent.py`, at the end too."""
    archive = cpio.Archive()
    for directory in initrd.EMPTY:
        archive.directory(directory)
    for name in python_closure.MERGED:
        archive.directory(f"usr/{name}")
        archive.link(name, f"usr/{name}")
    archive.node("dev/console", 5, 1)
    archive.node("dev/null", 1, 3)
    python_closure.add_python(archive, (initrd.ENTRY, *initrd.STORAGE_ENTRIES, *python_closure.LATE_IMPORTS))
    listed = []
    below = ["dm_mod"] if mapped else initrd.JINDISK_MODULES
    for file in kmod.needed_modules(modules_dir, [*initrd.BASE_MODULES, *below, "ext4"]):
        listed.append(f"/mod/{file.name.partition('.ko')[0]}.ko")
        archive.file(listed[-1][1:], kmod.module_bytes(file))
    archive.file("modules.list", "\n".join(listed).encode())
    agent = MAPPED_AGENT if mapped else AGENT
    archive.file(f"agent/{agent.name}", agent.read_bytes())
    start = f"#!/usr/bin/{python_closure.python_name()} -ISB\nimport sys; sys.path.append('/agent')\n"
    start += f"from {agent.stem} import "
    archive.file("init", f"{start}main\nmain({device!r}, {init!r})\n".encode(), 0o755)
    archive.file("shutdown", f"{start}end\nend()\n".encode() if mapped else initrd.shutdown_script(), 0o755)
    target.write_bytes(archive.to_gzip())
    return target


@pytest.mark.guest
@pytest.mark.slow
def test_life_and_end(machine, guest_kernel, tmp_path) -> None:
    """Marked, locked, on the initrd's root; reads and writes go through; it is closed after the root is unmounted."""
    disk = testroot.make_root(tmp_path, init=SHUTTING_DOWN)
    archive = make_initrd(tmp_path / "initrd", guest_kernel.modules, "/dev/vda", "/sbin/init")
    guest = machine(initrd=archive, disk=disk, vsock=False)
    guest.start()
    guest.wait(60)
    line = next((line for line in guest.console.splitlines() if "ROOT-SEES" in line), None)
    assert line is not None, guest.console
    seen, total = json.loads(line.partition("ROOT-SEES ")[2])
    assert total == 39 << 18
    assert [(mark, adjusted) for mark, adjusted, _, _ in seen.values()] == [("@", "-1000")]
    ((_, _, _, memory),) = seen.values()
    assert all(int(text.split()[1]) > 10_000 for text in memory if text.startswith("VmLck"))
    assert "VOLUME-CLOSED" in guest.console, guest.console
    assert "reboot: Power down" in guest.console
    checked = subprocess.run(["/usr/sbin/e2fsck", "-fn", disk], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout
    shown = subprocess.run(["/usr/sbin/dumpe2fs", "-h", disk], capture_output=True, text=True).stdout
    assert "needs_recovery" not in shown


@pytest.mark.guest
@pytest.mark.slow
def test_systemd_shuts_down_through_us(machine, guest_kernel, tmp_path) -> None:
    """A real systemd comes up on the served root, shuts down, and the volume is closed clean at the very end."""
    from qemu_kernel import BASE_IMAGE

    if not BASE_IMAGE.exists():
        pytest.skip("the base image is missing; run scripts/make-base-image")
    disk = tmp_path / "disk.img"
    subprocess.run(["cp", "--sparse=always", "--reflink=auto", BASE_IMAGE, disk], check=True)
    archive = make_initrd(tmp_path / "initrd", guest_kernel.modules, "/dev/vda2", "/sbin/init")
    cmdline = "console=ttyS0 quiet panic=5 noresume root=/dev/nbd0 systemd.gpt_auto=0"
    cmdline += " systemd.show_status=0 systemd.run=/bin/true systemd.run_success_action=poweroff"
    guest = machine(initrd=archive, disk=disk, vsock=False, cmdline=cmdline)
    guest.start()
    guest.wait(550)
    assert "VOLUME-CLOSED" in guest.console, guest.console
    assert guest.console.rindex("VOLUME-CLOSED") < guest.console.rindex("reboot: Power down")
    command = ["/usr/sbin/e2fsck", "-fn", f"{disk}?offset={34816 * 512}"]
    checked = subprocess.run(command, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


@pytest.mark.guest
@pytest.mark.slow
def test_a_mapping_below_the_root_is_removed_at_the_end(machine, guest_kernel, tmp_path) -> None:
    """With a real systemd, and with the kernel's `linear` target where a JinDisk 1 root has the `jindisk` one.

    Removing is what makes that target write its index. One mapping that is held open loses its target all the same.
    """
    from qemu_kernel import BASE_IMAGE

    if not BASE_IMAGE.exists():
        pytest.skip("the base image is missing; run scripts/make-base-image")
    disk = tmp_path / "disk.img"
    subprocess.run(["cp", "--sparse=always", "--reflink=auto", BASE_IMAGE, disk], check=True)
    archive = make_initrd(tmp_path / "initrd", guest_kernel.modules, "/dev/vda2", "/sbin/init", mapped=True)
    cmdline = "console=ttyS0 quiet panic=5 noresume no_timer_check root=/dev/mapper/root systemd.gpt_auto=0"
    cmdline += " systemd.show_status=0 systemd.run=/bin/true systemd.run_success_action=poweroff"
    guest = machine(initrd=archive, disk=disk, vsock=False, cmdline=cmdline)
    guest.start()
    guest.wait(240)
    line = next((line for line in guest.console.splitlines() if "MAPPING-ENDED" in line), None)
    assert line is not None, guest.console
    seen = json.loads(line.partition("MAPPING-ENDED ")[2])
    assert seen["mounts"] == []
    assert seen["before"] == ["dm-0"]
    assert seen["ended"] is True
    assert seen["after"] == []
    assert seen["held"] == [True, "EIO"]
    command = ["/usr/sbin/e2fsck", "-fn", f"{disk}?offset={34816 * 512}"]
    checked = subprocess.run(command, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout
