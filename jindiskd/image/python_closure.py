"""The Python closure: the interpreter, the modules that an import loads, compiled, and the shared libraries of both.

What our own initrd and the initramfs of a distribution have in common. Used in the guest's own system too, when that
makes its initramfs, so it imports little. The same inputs give the same bytes.
"""

from __future__ import annotations

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
from jindiskd.errors import JindiskError
from jindiskd.image.cpio import Archive

LATE_IMPORTS = (
    # What is imported only when it is needed, and would be missed then.
    "encodings.ascii",
    "encodings.idna",
    "encodings.latin_1",
)
DATA_PACKAGES = ("cryptography", "_cffi_backend")
MERGED = ("bin", "lib", "lib64", "sbin")
"""Directories of the root that are links into /usr."""
TOOL_TIMEOUT_S = 120

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


def python_name() -> str:
    """The name of the interpreter in the archive, for example `python3.11`."""
    return f"python{sys.version_info.major}.{sys.version_info.minor}"


def script(entry: str, first: str = "", *, call: str = "main") -> bytes:
    """A program that imports one module and runs its `call`, after the line `first`.

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
        f"from {entry} import {call}\n"
        f"{call}()\n"
    ).encode()


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
