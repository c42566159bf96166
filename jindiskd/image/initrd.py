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
import importlib.util
import json
import marshal
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import jindiskd
from jindiskd.base import document, files
from jindiskd.base.platform import Platform, Tee
from jindiskd.errors import JindiskError
from jindiskd.guest import config as guest_config
from jindiskd.guest.config import GuestConfig
from jindiskd.image import kmod
from jindiskd.image.cpio import Archive

ENTRY = "jindiskd.guest.agent"
WITHOUT_PCLMULQDQ = "os.environ['OPENSSL_ia32cap'] = '~0x200000000'\n"
"""Bit 33 of OpenSSL's capability vector, OPENSSL_ia32cap(3); read when its library is loaded."""
SHUTDOWN_ENTRY = "jindiskd.guest.shutdown"
STORAGE_ENTRIES = (SHUTDOWN_ENTRY, "jindiskd.guest.jindisk_root")
"""For a root that a process of ours serves."""
KEY_PROGRAM_ENTRY = "jindiskd.guest.script"
KEY_PROGRAM = "etc/jindisk/key-program"
"""Where `guest.script` looks for it."""
JINDISK1_ENTRY = "jindiskd.guest.jindisk1_root"
LATE_IMPORTS = (
    # What is imported only when it is needed, and would be missed then.
    "encodings.ascii",
    "encodings.idna",
    "encodings.latin_1",
)
DATA_PACKAGES = ("cryptography", "_cffi_backend")

MERGED = ("bin", "lib", "lib64", "sbin")
"""Directories of the root that are links into /usr."""
EMPTY = ("dev", "proc", "run", "sys", "sysroot", "tmp")
TOOL_TIMEOUT_S = 120

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

# Prints the modules that an import set needs: name to file, for those that come from a file.
_LISTER = """
import sys, json
directories, names = json.loads(sys.argv[1])
sys.path += directories
import importlib, importlib.machinery
for name in names:
    importlib.import_module(name)
found = {}
for name, module in list(sys.modules.items()):
    spec = getattr(module, "__spec__", None)
    if spec is None and "." in name:
        # cryptography replaces modules that have deprecated names by wrappers without a spec.
        path = getattr(sys.modules[name.rpartition(".")[0]], "__path__", None)
        spec = importlib.machinery.PathFinder.find_spec(name, path) if path else None
    if spec is None or spec.name != name or not spec.has_location or name.startswith("_frozen_importlib"):
        continue
    found[name] = [spec.origin, spec.submodule_search_locations is not None]
json.dump(found, sys.stdout)
"""


class InitrdFailed(JindiskError, code="InitrdFailed"):
    """The initrd cannot be made from this installation."""

    def __init__(self, problem: str) -> None:
        """`problem` says what is wrong and what to do."""
        super().__init__(f"the guest's initrd cannot be made: {problem}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Module:
    """A Python module of the closure."""

    name: str
    file: Path
    package: bool


def base_interpreter() -> Path:
    """The real interpreter below a virtual environment, for example `/usr/bin/python3.11`."""
    return Path(os.path.realpath(getattr(sys, "_base_executable", sys.executable)))


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
    if config.root.jindisk is not None:
        names += STORAGE_ENTRIES
        archive.file("shutdown", shutdown_script(), 0o755)
    elif config.root.jindisk1 is not None:
        names.append(JINDISK1_ENTRY)
    if config.report_source:
        names.append(config.report_source.partition(":")[0])
    if key_program is not None:
        names.append(KEY_PROGRAM_ENTRY)
        archive.file(KEY_PROGRAM, key_program, 0o755)
    config = dataclasses.replace(config, key_program=key_program is not None)
    add_python(archive, tuple(names))
    loaded = []
    for file in wanted_modules(config, modules_dir):
        relative = file.relative_to(modules_dir)
        stem = relative.name.partition(".ko")[0]
        path = f"usr/lib/modules/{modules_dir.name}/{relative.parent.as_posix()}/{stem}.ko"
        archive.file(path, kmod.module_bytes(file))
        loaded.append(f"/{path}")
    config = dataclasses.replace(config, modules=tuple(loaded))
    archive.file(guest_config.PATH, document.dump(config))
    archive.file("init", init_script(emulated=Platform(config.platform).simulated), 0o755)
    files.replace_file(output, archive.to_gzip(source_date_epoch))
    return config


def init_script(*, emulated: bool = False) -> bytes:
    """The first program: `-I` ignores environment and user directories, `-S` loads no site, `-B` writes no bytecode.

    `emulated`: the guest will run without hardware of its own. Emulators interpret PCLMULQDQ bit by bit, and OpenSSL's
    tables are three times as fast there (measured with QEMU 7.2: 177 µs instead of 576 µs for 4 KiB of AES-GCM).
    """
    return _script(ENTRY, WITHOUT_PCLMULQDQ if emulated else "")


def shutdown_script() -> bytes:
    """What systemd-shutdown runs at the very end, when the initrd is kept for a served root."""
    return _script(SHUTDOWN_ENTRY)


def _script(entry: str, first: str = "") -> bytes:
    """A program that imports one module and runs its `main`, after the line `first`.

    The console is taken from its standard streams before anything can fail: the words of an interpreter on a fault are
    not for the host. The node is the initrd's own, so that no file system mounted later is kept busy by it.
    """
    return (
        f"#!/usr/bin/{python_name()} -ISB\n"
        "import os\n"
        "null = os.open('/dev/null', os.O_RDWR)\n"
        "for descriptor in range(3):\n"
        "    os.dup2(null, descriptor)\n"
        f"{first}"
        f"from {entry} import main\n"
        "main()\n"
    ).encode()


def python_name() -> str:
    """The name of the interpreter in the archive, for example `python3.11`."""
    return f"python{sys.version_info.major}.{sys.version_info.minor}"


def wanted_modules(config: GuestConfig, modules_dir: Path) -> tuple[Path, ...]:
    """The kernel module files that this guest loads, in order."""
    must, may = [*BASE_MODULES], [*BASE_OPTIONAL]
    if config.root.device.startswith("/dev/sd"):
        must += SCSI_MODULES
    if config.root.luks2 is not None:
        must += LUKS2_MODULES
        may += LUKS2_OPTIONAL
    if config.root.jindisk is not None:
        must += JINDISK_MODULES
    if config.root.jindisk1 is not None:
        must += JINDISK1_MODULES
    must.append(config.root.filesystem)
    platform = Platform(config.platform)
    if platform.measured_before:
        may += SECRET_OPTIONAL
    if not platform.simulated:
        must += TEE_MODULES.get(platform.tee, ())
        may += TEE_OPTIONAL
    return kmod.needed_modules(modules_dir, must, optional=may)


def add_python(archive: Archive, names: Iterable[str]) -> None:
    """Add the interpreter, the modules `names` and all they import, and the shared libraries of both."""
    library = f"usr/lib/{python_name()}"
    interpreter = base_interpreter()
    archive.file(f"usr/bin/{python_name()}", interpreter.read_bytes(), 0o755)
    binaries = [interpreter]
    # The interpreter finds its library by these two (Modules/getpath.py); it has `os` itself frozen inside.
    archive.file(f"{library}/os.pyc", compiled(Path(os.__file__), f"/{library}/os.py"))
    archive.directory(f"{library}/lib-dynload")
    for module in closure(tuple(names)):
        stem = module.name.replace(".", "/")
        if module.file.suffix == ".so":
            folder = "lib-dynload/" if module.file.parent.name == "lib-dynload" else f"{stem.rpartition('/')[0]}/"
            binaries.append(module.file)
            archive.file(f"{library}/{folder.lstrip('/')}{module.file.name}", module.file.read_bytes(), 0o755)
        else:
            path = f"{library}/{stem}/__init__" if module.package else f"{library}/{stem}"
            archive.file(f"{path}.pyc", compiled(module.file, f"/{path}.py"))
    for found in shared_libraries(binaries):
        archive.file(library_place(found), Path(found).read_bytes(), 0o755)


def compiled(source: Path, shown: str) -> bytes:
    """The bytecode file of a source file, which the interpreter takes without looking for the source (PEP 552).

    Marshal format 2 has no back references: those depend on how often an object happened to be used elsewhere in the
    compiling process, and the bytes must not.
    """
    code = compile(source.read_bytes(), shown, "exec", dont_inherit=True, optimize=0)
    unchecked_hash = (0b01).to_bytes(4, "little") + bytes(8)
    return importlib.util.MAGIC_NUMBER + unchecked_hash + marshal.dumps(code, 2)


def closure(names: tuple[str, ...]) -> tuple[Module, ...]:
    """The Python modules that importing `names` loads from files, by name, as a fresh interpreter says.

    Raises:
        InitrdFailed: they cannot be imported, or come from elsewhere than the known places.
    """
    places = {Path(jindiskd.__file__).parent.parent}
    tops = {name.partition(".")[0] for name in names} - sys.stdlib_module_names - {"jindiskd"}
    for package in (*DATA_PACKAGES, *sorted(tops)):
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise InitrdFailed(f"Python package {package} is not installed")
        places.add(Path(spec.origin).parent.parent if spec.submodule_search_locations else Path(spec.origin).parent)
    request = json.dumps([[os.fspath(place) for place in sorted(places)], list(names)])
    answer = _tool([os.fspath(base_interpreter()), "-ISB", "-c", _LISTER, request])
    found = [
        Module(name=name, file=Path(file), package=package) for name, (file, package) in json.loads(answer).items()
    ]
    for module in found:
        if module.file.suffix not in {".py", ".so"}:
            raise InitrdFailed(f"module {module.name} comes from {module.file}, which is neither source nor a library")
    return tuple(sorted(found, key=lambda module: module.name))


def shared_libraries(binaries: Iterable[Path]) -> tuple[str, ...]:
    """The paths of all shared libraries that the binaries need, and of the loader, as the loader itself finds them.

    Raises:
        InitrdFailed: one is missing.
    """
    found: set[str] = set()
    for binary in binaries:
        for line in _tool(["ldd", os.fspath(binary)]).decode().splitlines():
            if "not found" in line:
                raise InitrdFailed(f"{binary} needs a shared library that is missing: {line.strip()}")
            # «name => /path (address)» or «/path (address)»; the kernel's own vdso has no path.
            match = re.search(r"(/\S+) \(0x[0-9a-f]+\)$", line.strip())
            if match:
                found.add(match[1])
    return tuple(sorted(found))


def library_place(path: str) -> str:
    """Where a shared library found at `path` goes in the archive, as a relative name."""
    folder, _, name = path.rpartition("/")
    for merged in MERGED:
        if folder == f"/{merged}" or folder.startswith(f"/{merged}/"):
            return f"usr{folder}/{name}"
    if folder == "/usr" or folder.startswith("/usr/"):
        return f"{folder.removeprefix('/')}/{name}"
    # From an interpreter outside the system's directories; the loader looks here as well.
    return f"usr/lib/{name}"


def _tool(argv: list[str]) -> bytes:
    """Run a program of the build host's own. The builder is a synchronous worker, so a plain subprocess does."""
    try:
        done = subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=True,
            timeout=TOOL_TIMEOUT_S,
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8"},
        )
    except (OSError, subprocess.TimeoutExpired) as exc:
        raise InitrdFailed(f"{argv[0]} could not be run") from exc
    except subprocess.CalledProcessError as exc:
        raise InitrdFailed(f"{argv[0]} failed: {exc.stderr.decode(errors='replace')[-300:]}") from exc
    return done.stdout
