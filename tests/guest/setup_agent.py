"""Runs in a guest: `jindisksetup open` and `close` with the kernel's own NBD client, a file system on top."""

import ctypes
import fcntl
import json
import os
import signal
import struct
import sys
from pathlib import Path

from jindiskd.guest import kernel, modules, mounts
from jindiskd.jindisksetup import attached, mapped
from jindiskd.jindisksetup.main import main as setup

LINK = Path("/dev/jindisk/vol")
ACCESS = ["--key-file", "/key", "--unanchored"]
FITRIM = 0xC0185879  # linux/fs.h
FACTS: dict[str, object] = {}


def run(*words: str) -> int:
    """The program, in a process of its own: it makes another one, which has to be adopted by init."""
    process = os.fork()
    if process == 0:
        status = 99
        try:
            status = setup(words)
            sys.stdout.flush()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def head(path: Path, offset: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(4096)


def mount(node: Path) -> None:
    Path("/mnt").mkdir(exist_ok=True)
    kernel.mount(os.fspath(node), Path("/mnt"), "ext4", kernel.MS_NOATIME)


def drop_caches() -> None:
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


def work() -> None:
    held = os.open("/dev/vda", os.O_RDONLY | os.O_EXCL)  # as a mount holds it
    FACTS["held"] = run("open", "/dev/vda", "vol", *ACCESS)
    os.close(held)
    FACTS["open"] = run("open", "/dev/vda", "vol", *ACCESS)
    FACTS["list"] = run("list")
    FACTS["again"] = run("open", "/dev/vda", "vol", *ACCESS)
    record = attached.Registry().find("vol")
    name = record.node.name
    FACTS["node"] = os.fspath(LINK.readlink()) == os.fspath(record.node)
    FACTS["sectors"] = int(Path(f"/sys/block/{name}/size").read_text())
    FACTS["block"] = int(Path(f"/sys/block/{name}/queue/logical_block_size").read_text())
    FACTS["discard"] = int(Path(f"/sys/block/{name}/queue/discard_max_bytes").read_text()) > 32 << 20
    mount(LINK)
    FACTS["secret"] = Path("/mnt/etc/secret").read_text()
    for number in range(8):
        Path(f"/mnt/file{number}").write_bytes(bytes([number]) * (1 << 20))
    drop_caches()
    FACTS["read"] = all(Path(f"/mnt/file{n}").read_bytes() == bytes([n]) * (1 << 20) for n in range(8))
    for number in range(4, 8):
        Path(f"/mnt/file{number}").unlink()
    os.sync()
    mounted = os.open("/mnt", os.O_RDONLY)
    trimmed = bytearray(struct.pack("=QQQ", 0, (1 << 64) - 1, 0))
    fcntl.ioctl(mounted, FITRIM, trimmed, True)
    os.close(mounted)
    FACTS["trimmed"] = struct.unpack("=QQQ", trimmed)[1]
    drop_caches()
    FACTS["after trim"] = all(Path(f"/mnt/file{n}").read_bytes() == bytes([n]) * (1 << 20) for n in range(4))
    FACTS["busy"] = run("close", "vol")
    kernel.unmount(Path("/mnt"))
    FACTS["close"] = run("close", "vol")
    os.waitpid(record.process, 0)  # we are init: until now it was there, dead
    FACTS["gone"] = not LINK.is_symlink() and attached.started(record.process) is None
    FACTS["close again"] = run("close", "vol")

    FACTS["read-only"] = run("open", "/dev/vda", "vol", "--read-only", *ACCESS)
    FACTS["ro"] = Path(f"/sys/block/{LINK.readlink().name}/ro").read_text().strip()
    FACTS["close read-only"] = run("close", "vol")

    # Killed: what was flushed is there, and the name can be taken again.
    run("open", "/dev/vda", "vol", *ACCESS)
    mount(LINK)
    fd = os.open("/mnt/durable", os.O_CREAT | os.O_WRONLY)
    os.write(fd, b"flushed" * 1000)
    os.fsync(fd)
    os.close(fd)
    record = attached.Registry().find("vol")
    os.kill(record.process, signal.SIGKILL)
    while attached.started(record.process) is not None:
        try:
            os.waitpid(record.process, 0)
        except ChildProcessError:
            pass
    kernel.unmount(Path("/mnt"), kernel.MNT_DETACH)
    FACTS["reopen"] = run("open", "/dev/vda", "vol", *ACCESS)
    mount(LINK)
    FACTS["durable"] = Path("/mnt/durable").read_bytes() == b"flushed" * 1000
    kernel.unmount(Path("/mnt"))
    FACTS["end"] = run("close", "vol")
    FACTS["bad name"] = run("open", "/dev/vda", "../x", *ACCESS)

    # Block devices as targets: what is there is replaced, and what lies behind it is not touched.
    plain = b"".join(bytes([n % 251]) * 4096 for n in range(1024)) + bytes(12 << 20)
    Path("/run/plain").write_bytes(plain)
    with Path("/dev/ram1").open("wb") as file:
        file.write(b"old" * (24 << 20))
    FACTS["ram format"] = run("format", "/dev/ram0", "--key-file", "/key", "--force")
    FACTS["ram check"] = run("check", "/dev/ram0", *ACCESS)
    FACTS["too large"] = run("load", "/dev/ram1", "/dev/ram0", "--key-file", "/key", "--force")
    FACTS["ram load"] = run("load", "/run/plain", "/dev/ram0", "--key-file", "/key", "--force", "--anchor", "/run/a")
    held = os.open("/dev/ram1", os.O_RDONLY | os.O_EXCL)
    words = ["export", "/dev/ram0", "/dev/ram1", "--key-file", "/key", "--anchor", "/run/a"]
    FACTS["ram held"] = run(*words, "--force")
    os.close(held)
    FACTS["ram export"] = run(*words, "--force")
    with Path("/dev/ram1").open("rb") as file:
        FACTS["ram content"] = file.read(16 << 20) == plain
        behind = file.read(4096)
    FACTS["ram rest"] = behind == (b"old" * 4096)[(16 << 20) % 3 :][:4096]
    FACTS["small target"] = run(*words, "--force", "--target-offset", "60M")

    # The kernel's own means: without the target an error; making and removing mappings, with a target that is there.
    FACTS["no target"] = run("create", "password", "/dev/vda", "old", "--force")
    FACTS["no target, open"] = run("open", "password", "/dev/vda", "old", "--kdf", "rust")
    FACTS["targets"] = sorted(mapped.kernel_targets() & {"linear", "jindisk"})
    link = mapped.activate("test", sectors=2048, table=bytearray(b"/dev/vda 8"), kind="linear")
    FACTS["mapped"] = head(link, 0) == head(Path("/dev/vda"), 4096)
    FACTS["close other"] = run("close", "test")
    mapped.remove("test", kind="linear")
    FACTS["removed"] = not link.is_symlink()


def main() -> None:
    try:
        mounts.mount_kernel_filesystems()
        os.environ.update(PATH="/usr/bin", TERM="dumb")  # no progress bar: its library is not here
        modules.load_modules(Path(line) for line in Path("/modules.list").read_text().split())
        with Path("/brd.ko").open("rb") as module:
            kernel.load_module(module.fileno(), "rd_nr=2 rd_size=73728")
        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # be a reaper, as init is anyway
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        work()
    except BaseException as exc:  # noqa: BLE001 (PID 1 may not end)
        line = exc.__traceback__.tb_next.tb_lineno if exc.__traceback__ and exc.__traceback__.tb_next else 0
        FACTS["failed"] = f"{exc!r} at {line}"
    os.write(1, ("\nSETUP-SEES " + json.dumps(FACTS) + "\n").encode())
    os.sync()
    kernel.reboot(kernel.REBOOT_POWER_OFF)
