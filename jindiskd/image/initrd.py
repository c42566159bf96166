"""Our own initrd: a Python interpreter, the agent's modules, kernel modules, one configuration file. Nothing else.

The interpreter is the one that the builder itself runs on, with exactly those modules that the agent imports, compiled.
No shell, no other program, no certificate store. The same inputs give the same bytes, so that anyone with the same
packages can recompute the measurement.

Layout of the archive (usr-merged)::

    init                                  a script for the interpreter; the kernel runs it as PID 1
    etc/jindisk/guest.json                the configuration
    usr/bin/python3.N                     the interpreter
    usr/lib/python3.N/                    the standard library's part, cryptography and jindiskd, as .pyc
    usr/lib/…                             shared libraries
    usr/lib/modules/<release>/kernel/…    modules, uncompressed
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path

from jindiskd.base import document, files
from jindiskd.base.platform import Platform, Tee
from jindiskd.guest import config as guest_config
from jindiskd.guest.config import GuestConfig
from jindiskd.image import kmod
from jindiskd.image.cpio import Archive, MalformedArchive
from jindiskd.image.python_closure import LATE_IMPORTS, MERGED, add_python, script

ENTRY = "jindiskd.guest.agent"
WITHOUT_PCLMULQDQ = "os.environ['OPENSSL_ia32cap'] = '~0x200000000'\n"
"""Bit 33 of OpenSSL's capability vector, OPENSSL_ia32cap(3); read when its library is loaded."""
SHUTDOWN_ENTRY = "jindiskd.guest.shutdown"
STORAGE_ENTRIES = (SHUTDOWN_ENTRY, "jindiskd.guest.jindisk_root")
"""For volumes that a process of ours serves."""
KEY_PROGRAM_ENTRY = "jindiskd.guest.script"
KEY_PROGRAM = "etc/jindisk/key-program"
"""Where `guest.script` looks for it."""
JINDISK1_ENTRIES = (SHUTDOWN_ENTRY, "jindiskd.guest.jindisk1_root")
"""For a root on the kernel's target, which is removed at the end."""
EMPTY = ("dev", "oldroot", "proc", "run", "sys", "sysroot", "tmp")
"""`oldroot` is where systemd-shutdown moves the system's root; it cannot make it, since all is read-only by then, and
would hide the root instead, which then could not be unmounted."""

BASE_MODULES = ("virtio_pci", "virtio_blk", "vmw_vsock_virtio_transport")
BASE_OPTIONAL = ("virtio_rng", "crc32c_intel", "crc32c_generic")
SCSI_MODULES = ("virtio_scsi", "sd_mod")
LUKS2_MODULES = ("dm_mod", "dm_crypt", "xts")
LUKS2_OPTIONAL = ("ecb", "aes_generic", "aesni_intel", "aes_ce_blk")
JINDISK_MODULES = ("nbd",)
JINDISK1_MODULES = ("dm_mod", "dm_jindisk")
"""Debian's kernels lack the second: it comes from the reference."""
TEE_MODULES = {Tee.SNP: ("sev_guest",), Tee.TDX: ("tdx_guest",)}
"""Without these a guest on the real platform gets no report; Debian 12's kernels lack both."""
SECRET_OPTIONAL = ("efi_secret",)
TEE_OPTIONAL = ("configfs", "tsm", "tsm_report")


def build_initrd(
    *,
    config: GuestConfig,
    modules_dir: Path,
    output: Path,
    source_date_epoch: int = 0,
    key_program: bytes | None = None,
) -> GuestConfig:
    """Write the initrd for one image.

    Args:
        config: what the guest shall know; `modules` is filled in here.
        modules_dir: the `lib/modules/<release>` directory of the image's kernel.
        output: the file to write; replaced if it exists.
        source_date_epoch: the time of all entries, in seconds since 1970.
        key_program: a program that gives the key instead of the broker (`guest.script`): one that needs nothing but
            itself, or a Python script for the interpreter in the archive.

    Returns:
        The configuration as it is in the archive.

    Raises:
        ModulesUnusable: the kernel lacks a module, or one is damaged.
        InitrdFailed: this installation cannot supply the agent.
    """
    config, archive = make_initrd(config, module_files(config, modules_dir), key_program)
    files.replace_file(output, archive.to_gzip(source_date_epoch))
    return config


def make_initrd(
    config: GuestConfig, modules: Iterable[tuple[str, bytes]], key_program: bytes | None = None
) -> tuple[GuestConfig, Archive]:
    """The archive of an initrd, and the configuration as it is in it.

    Args:
        config: what the guest shall know; `modules` and `key_program` are filled in here.
        modules: path in the archive and content of each kernel module, in the order of loading.
        key_program: as of `build_initrd`.

    Raises:
        InitrdFailed: this installation cannot supply the agent.
    """
    archive = Archive()
    for directory in EMPTY:
        archive.directory(directory)
    for name in MERGED:
        archive.directory(f"usr/{name}")
        archive.link(name, f"usr/{name}")
    # Standard streams for the time before devtmpfs is mounted.
    archive.node("dev/console", 5, 1)
    archive.node("dev/null", 1, 3, 0o666)
    names = [ENTRY, *LATE_IMPORTS]
    if config.jindisk:
        names += STORAGE_ENTRIES
    if config.root.jindisk1 is not None:
        names += JINDISK1_ENTRIES
    if config.ends_volumes:
        archive.file("shutdown", shutdown_script(), 0o755)
    if config.report_source:
        names.append(config.report_source.partition(":")[0])
    if key_program is not None:
        names.append(KEY_PROGRAM_ENTRY)
        archive.file(KEY_PROGRAM, key_program, 0o755)
    config = dataclasses.replace(config, key_program=key_program is not None)
    add_python(archive, tuple(names))
    loaded = []
    for path, content in modules:
        archive.file(path, content)
        loaded.append(f"/{path}")
    config = dataclasses.replace(config, modules=tuple(loaded))
    archive.file(guest_config.PATH, document.dump(config))
    archive.file("init", init_script(emulated=Platform(config.platform).simulated), 0o755)
    return config, archive


def module_files(config: GuestConfig, modules_dir: Path) -> list[tuple[str, bytes]]:
    """The kernel modules that a guest loads, as `make_initrd` takes them; arguments and errors as of `build_initrd`."""
    found = []
    for file in wanted_modules(config, modules_dir):
        relative = file.relative_to(modules_dir)
        stem = relative.name.partition(".ko")[0]
        path = f"usr/lib/modules/{modules_dir.name}/{relative.parent.as_posix()}/{stem}.ko"
        found.append((path, kmod.module_bytes(file)))
    return found


def modules_of(archive: Archive, config: GuestConfig) -> list[tuple[str, bytes]]:
    """The kernel modules in an archive that `config` is in, as `make_initrd` takes them.

    Raises:
        MalformedArchive: one is missing.
    """
    entries, found = archive.entries, []
    for path in config.modules:
        entry = entries.get(path.removeprefix("/"))
        if entry is None or not entry.data:
            raise MalformedArchive(f"has no {path}")
        found.append((path.removeprefix("/"), entry.data))
    return found


def init_script(*, emulated: bool = False) -> bytes:
    """The first program: `-I` ignores environment and user directories, `-S` loads no site, `-B` writes no bytecode.

    `emulated`: the guest will run without hardware of its own. Emulators interpret PCLMULQDQ bit by bit, and OpenSSL's
    tables are three times as fast there (measured with QEMU 7.2: 177 µs instead of 576 µs for 4 KiB of AES-GCM).
    """
    return script(ENTRY, WITHOUT_PCLMULQDQ if emulated else "")


def shutdown_script() -> bytes:
    """What systemd-shutdown runs at the very end, when the initrd is kept for a JinDisk volume."""
    return script(SHUTDOWN_ENTRY)


def wanted_modules(config: GuestConfig, modules_dir: Path) -> tuple[Path, ...]:
    """The kernel module files that this guest loads, in order."""
    must, may = [*BASE_MODULES], [*BASE_OPTIONAL]
    if config.root.device.startswith("/dev/sd"):
        must += SCSI_MODULES
    if config.luks2:
        must += LUKS2_MODULES
        may += LUKS2_OPTIONAL
    if config.jindisk:
        must += JINDISK_MODULES
    if config.root.jindisk1 is not None:
        must += JINDISK1_MODULES
    mounted = (volume.filesystem for volume in config.volumes if volume.mount)
    must += dict.fromkeys((config.root.filesystem, *mounted))
    platform = Platform(config.platform)
    if platform.measured_before:
        may += SECRET_OPTIONAL
    if not platform.simulated:
        must += TEE_MODULES.get(platform.tee, ())
        may += TEE_OPTIONAL
    return kmod.needed_modules(modules_dir, must, optional=may)
