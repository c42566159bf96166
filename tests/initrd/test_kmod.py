"""Kernel modules: dependency order, compression, hostile indexes."""

import gzip
import lzma
import shutil
import subprocess
from pathlib import Path

import pytest

from jindiskd.image import kmod
from jindiskd.image.kmod import ModulesUnusable, needed_modules

ELF = b"\x7fELF" + bytes(60)


@pytest.fixture
def tree(tmp_path) -> Path:
    """A release with modules in all forms; depmod writes dependencies in the order of removal."""
    root = tmp_path / "6.1.0-test"
    (root / "kernel").mkdir(parents=True)
    for name, data in {
        "base.ko": ELF,
        "mid-one.ko.xz": lzma.compress(ELF),
        "top.ko.gz": gzip.compress(ELF),
        "extra.ko": ELF,
    }.items():
        (root / "kernel" / name).write_bytes(data)
    (root / "modules.dep").write_text(
        "kernel/base.ko:\n"
        "kernel/mid-one.ko.xz: kernel/base.ko\n"
        "kernel/top.ko.gz: kernel/mid-one.ko.xz kernel/base.ko\n"
        "kernel/extra.ko:\n"
    )
    (root / "modules.builtin").write_text("kernel/fs/ext4/ext4.ko\n")
    (root / "modules.softdep").write_text("# soft\nsoftdep top pre: extra missing post: base\nsoftdep base post: top\n")
    return root


def names(paths) -> list[str]:
    return [path.name for path in paths]


def test_order_of_loading(tree) -> None:
    """Dependencies first, each once, soft ones too where they exist; `-` and `_` are the same."""
    assert names(needed_modules(tree, ["top", "mid_one"])) == ["extra.ko", "base.ko", "mid-one.ko.xz", "top.ko.gz"]
    assert names(needed_modules(tree, ["mid-one"])) == ["base.ko", "mid-one.ko.xz"]


def test_builtin_and_optional(tree) -> None:
    """A built-in module needs no file; a missing one is an error only if it must be there."""
    assert needed_modules(tree, ["ext4"], optional=["nonesuch"]) == ()
    with pytest.raises(ModulesUnusable, match="nonesuch"):
        needed_modules(tree, ["nonesuch"])


def test_circular_dependencies_end(tree) -> None:
    """A hostile or broken index does not make us loop."""
    (tree / "modules.dep").write_text("kernel/base.ko: kernel/extra.ko\nkernel/extra.ko: kernel/base.ko\n")
    assert sorted(names(needed_modules(tree, ["base"]))) == ["base.ko", "extra.ko"]


@pytest.mark.parametrize("line", ["kernel/base.ko", "kernel/base.txt:", "kernel/base.ko: nothing", "\udce9"])
def test_odd_index_lines(tree, line) -> None:
    """A line of another form is an error that shows it."""
    (tree / "modules.dep").write_text(line, errors="surrogateescape")
    with pytest.raises(ModulesUnusable):
        needed_modules(tree, ["base"])


@pytest.mark.parametrize("path", ["../../etc/base.ko", "/etc/base.ko"])
def test_paths_outside_are_refused(tree, path) -> None:
    """The index comes from an image that may be hostile; the files of the build host are not its to name."""
    (tree / "modules.dep").write_text(f"{path}:\n")
    with pytest.raises(ModulesUnusable, match="outside"):
        needed_modules(tree, ["base"])


def test_missing_index(tmp_path) -> None:
    """Without modules.dep the remedy is named."""
    with pytest.raises(ModulesUnusable, match="depmod"):
        needed_modules(tmp_path, ["base"])


def test_decompression(tree) -> None:
    """All forms give the module's bytes."""
    for path in needed_modules(tree, ["top"]):
        assert kmod.module_bytes(path) == ELF


def test_zstandard(tree) -> None:
    """Zstandard goes through the program."""
    if not shutil.which("zstd"):
        pytest.skip("the program zstd is missing; install the package zstd")
    file = tree / "kernel/z.ko.zst"
    file.write_bytes(subprocess.run(["zstd", "-cq"], input=ELF, capture_output=True, check=True).stdout)
    assert kmod.module_bytes(file) == ELF
    file.write_bytes(b"garbage")
    with pytest.raises(ModulesUnusable):
        kmod.module_bytes(file)


@pytest.mark.parametrize("suffix", [".ko", ".ko.gz", ".ko.xz"])
def test_damaged_modules(tree, suffix) -> None:
    """What is no module is refused, and so is a decompression bomb."""
    file = tree / f"kernel/bad{suffix}"
    file.write_bytes(b"garbage" * 10)
    with pytest.raises(ModulesUnusable):
        kmod.module_bytes(file)


def test_bomb(tree, monkeypatch) -> None:
    """Decompression stops at the limit."""
    monkeypatch.setattr(kmod, "MODULE_LIMIT", 1000)
    file = tree / "kernel/bomb.ko.gz"
    file.write_bytes(gzip.compress(ELF + bytes(100000)))
    with pytest.raises(ModulesUnusable):
        kmod.module_bytes(file)


def test_against_modprobe(kernel_modules) -> None:
    """modprobe(8) would load the same files in an order with the same dependencies."""
    if not shutil.which("modprobe"):
        pytest.skip("the program modprobe is missing; install the package kmod")
    for name in ("dm_crypt", "virtio_pci", "vmw_vsock_virtio_transport", "nbd"):
        command = ["modprobe", "-d", str(kernel_modules.parents[2]), "-S", kernel_modules.name, "--show-depends", name]
        shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        expected = [Path(line.split()[1]).name for line in shown.splitlines() if line.startswith("insmod")]
        assert names(needed_modules(kernel_modules, [name])) == expected
