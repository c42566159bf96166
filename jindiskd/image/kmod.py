"""Kernel modules of an image: which files, in what order of loading, uncompressed.

Reads the indexes that depmod(8) left in `lib/modules/<release>` as text; runs nothing of the image.
"""

from __future__ import annotations

import lzma
import shutil
import subprocess
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from jindiskd.errors import JindiskError

SUFFIXES = (".ko", ".ko.gz", ".ko.xz", ".ko.zst")
MODULE_LIMIT = 64 << 20
"""Largest uncompressed module accepted, in bytes."""
ZSTD_TIMEOUT_S = 60


class ModulesUnusable(JindiskError, code="ModulesUnusable"):
    """The image's kernel modules cannot be used."""

    def __init__(self, what: str, problem: str) -> None:
        """`what` is a module or an index file, `problem` says what is wrong and what to do."""
        super().__init__(f"kernel modules of the image: {what} {problem}")


def module_name(file: str) -> str | None:
    """The kernel's name of a module by its file name, or None if it is no module: `dm-crypt.ko.xz` is `dm_crypt`."""
    name = PurePosixPath(file).name
    for suffix in SUFFIXES:
        if name.endswith(suffix):
            return name.removesuffix(suffix).replace("-", "_")
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleIndex:
    """What depmod(8) found out."""

    files: Mapping[str, str]
    """Module name to file, relative to the modules directory."""
    needs: Mapping[str, tuple[str, ...]]
    """Module name to the names that must be loaded before it, in order."""
    wants: Mapping[str, tuple[str, ...]]
    """Module name to the names that should be loaded before it, if they exist (`softdep … pre:`)."""
    builtin: frozenset[str]

    @classmethod
    def read(cls, modules_dir: Path) -> ModuleIndex:
        """Read the indexes of a `lib/modules/<release>` directory.

        Raises:
            ModulesUnusable: an index is missing or has a line of another form.
        """
        files: dict[str, str] = {}
        needs: dict[str, tuple[str, ...]] = {}
        for line in _lines(modules_dir / "modules.dep"):
            file, colon, rest = line.partition(":")
            name = module_name(file)
            dependencies = [module_name(word) for word in rest.split()]
            if not colon or name is None or None in dependencies:
                raise ModulesUnusable("modules.dep", f"has the unusable line {line!r}; run depmod for the image")
            files[name] = file
            # depmod writes them in the order of removal.
            needs[name] = tuple(word for word in reversed(dependencies) if word is not None)
        builtin = frozenset(filter(None, map(module_name, _lines(modules_dir / "modules.builtin"))))
        wants: dict[str, tuple[str, ...]] = {}
        soft = modules_dir / "modules.softdep"
        for line in _lines(soft) if soft.exists() else ():
            words = line.split()
            if len(words) > 2 and words[0] == "softdep" and "pre:" in words:
                first = words.index("pre:") + 1
                last = words.index("post:", first) if "post:" in words[first:] else len(words)
                wants[words[1].replace("-", "_")] = tuple(word.replace("-", "_") for word in words[first:last])
        return cls(files=files, needs=needs, wants=wants, builtin=builtin)


def _lines(file: Path) -> list[str]:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise ModulesUnusable(file.name, "cannot be read; install the image's kernel properly or run depmod") from exc
    return [line for line in map(str.strip, text.splitlines()) if line and not line.startswith("#")]


def needed_modules(modules_dir: Path, names: Iterable[str], *, optional: Iterable[str] = ()) -> tuple[Path, ...]:
    """The module files for `names` and all they depend on, in the order of loading.

    Args:
        modules_dir: a `lib/modules/<release>` directory with the indexes of depmod(8).
        names: module names that the kernel must have, as modules or built in.
        optional: names that are taken where the kernel has them as modules.

    Returns:
        Absolute paths below `modules_dir`, each once; what is built in has none.

    Raises:
        ModulesUnusable: the kernel has no such module, or an index is unusable.
    """
    index = ModuleIndex.read(modules_dir)
    order: dict[str, None] = {}

    def add(name: str, above: tuple[str, ...]) -> None:
        if name in order or name in above or name not in index.files:
            return
        for other in (*index.wants.get(name, ()), *index.needs[name]):
            add(other, (*above, name))
        order[name] = None

    for raw, must in [*((name, True) for name in names), *((name, False) for name in optional)]:
        name = raw.replace("-", "_")
        if must and name not in index.files and name not in index.builtin:
            raise ModulesUnusable(name, f"is not in {modules_dir.name}; use a kernel that has it")
        add(name, ())
    paths = []
    for name in order:
        path = PurePosixPath(index.files[name])
        if path.is_absolute() or ".." in path.parts:
            raise ModulesUnusable("modules.dep", f"names {str(path)!r}, which is outside its directory")
        paths.append(modules_dir / path)
    return tuple(paths)


def module_bytes(file: Path) -> bytes:
    """A module uncompressed, with its signature, which is behind the module's own bytes.

    Raises:
        ModulesUnusable: it cannot be read or decompressed, or is unreasonably large.
    """
    try:
        raw = file.read_bytes()
        if file.name.endswith(".xz"):
            data = lzma.LZMADecompressor(memlimit=1 << 28).decompress(raw, MODULE_LIMIT + 1)
        elif file.name.endswith(".gz"):
            data = zlib.decompressobj(31).decompress(raw, MODULE_LIMIT + 1)
        elif file.name.endswith(".zst"):
            data = _unzstd(raw)
        else:
            data = raw
    except (OSError, lzma.LZMAError, zlib.error) as exc:
        raise ModulesUnusable(file.name, "cannot be read; the image may be damaged") from exc
    if not data.startswith(b"\x7fELF") or len(data) > MODULE_LIMIT:
        raise ModulesUnusable(file.name, "is not a kernel module; the image may be damaged")
    return data


def _unzstd(raw: bytes) -> bytes:
    """Python before 3.14 has no Zstandard. The builder is a synchronous worker, so a plain subprocess does."""
    if shutil.which("zstd") is None:
        raise ModulesUnusable("a file", "is compressed with Zstandard; install the package zstd on the build host")
    try:
        done = subprocess.run(
            ["zstd", "-dcq", "--memory=256MB"], input=raw, capture_output=True, check=True, timeout=ZSTD_TIMEOUT_S
        )
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as exc:
        raise ModulesUnusable("a file", "is not valid Zstandard; the image may be damaged") from exc
    return done.stdout
