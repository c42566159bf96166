"""The initrd as a file: deterministic, complete, small, and without anything that is not needed."""

import dataclasses
import gzip
import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import cryptography
import pytest

from jindiskd.base import document
from jindiskd.errors import JindiskError
from jindiskd.guest.config import BrokerPin, GuestConfig, JindiskExpectation, Luks2Expectation, RootVolume
from jindiskd.image import initrd, python_closure
from jindiskd.image.initrd import build_initrd
from jindiskd.image.python_closure import InitrdFailed, closure, library_place

CLOSURE = Path(__file__).with_name("closure.txt")
ROOT = Path(__file__).resolve().parents[2]

LUKS2 = Luks2Expectation(
    header_bytes=1 << 20,
    header_sha256=bytes(32),
    uuid="5a9d1a7e-62a1-4a4c-8f4e-0c2f27bd6d1e",
    cipher="aes-xts-plain64",
    key_bytes=64,
    sector_bytes=4096,
)
CONFIG = GuestConfig(
    schema=1,
    image_id="5a9d1a7e-62a1-4a4c-8f4e-0c2f27bd6d1e",
    platform="simulated-snp",
    broker=BrokerPin(spki_sha256=bytes(range(32))),
    root=RootVolume(device="/dev/vda3", resource="default/x/root", luks2=LUKS2),
    modules=(),
)


@pytest.fixture(scope="module")
def built(kernel_modules, tmp_path_factory) -> tuple[Path, GuestConfig]:
    output = tmp_path_factory.mktemp("initrd") / "initrd"
    return output, build_initrd(config=CONFIG, modules_dir=kernel_modules, output=output)


def listing(output: Path) -> dict[str, list[str]]:
    """What cpio(1) sees: name to the columns of `ls -l`."""
    if not shutil.which("cpio"):
        pytest.skip("the program cpio is missing; install the package cpio")
    shown = subprocess.run(["cpio", "-itv"], input=gzip.decompress(output.read_bytes()), capture_output=True)
    assert shown.returncode == 0
    return {line.split(" -> ")[0].split()[-1]: line.split() for line in shown.stdout.decode().splitlines()}


def extract(output: Path, name: str) -> bytes:
    command = ["cpio", "-i", "--to-stdout", "--quiet", name]
    return subprocess.run(command, input=gzip.decompress(output.read_bytes()), capture_output=True).stdout


def test_two_builds_are_equal(built, kernel_modules, tmp_path) -> None:
    """Another process, another hash seed, another directory, another umask: the same bytes."""
    program = (
        "import os, sys; os.umask(0o077)\n"
        "from pathlib import Path\n"
        "import this, decimal, sqlite3\n"  # something that interns other strings
        "from jindiskd.base import document\n"
        "from jindiskd.guest.config import GuestConfig\n"
        "from jindiskd.image.initrd import build_initrd\n"
        "config = document.load(GuestConfig, sys.stdin.buffer.read(), document='x')\n"
        "build_initrd(config=config, modules_dir=Path(sys.argv[1]), output=Path(sys.argv[2]))\n"
    )
    output = tmp_path / "again"
    subprocess.run(
        [sys.executable, "-c", program, os.fspath(kernel_modules), os.fspath(output)],
        input=document.dump(CONFIG),
        check=True,
        stdout=subprocess.DEVNULL,
        cwd=tmp_path,
        env={**os.environ, "PYTHONHASHSEED": "4711"},
    )
    assert output.read_bytes() == built[0].read_bytes()


def test_configuration_is_inside(built) -> None:
    """The file says what was asked for, with the modules filled in, each of which is in the archive."""
    output, config = built
    assert document.load(GuestConfig, extract(output, "etc/jindisk/guest.json"), document="x") == config
    assert dataclasses.replace(config, modules=()) == CONFIG
    names = listing(output)
    assert config.modules
    for module in config.modules:
        assert module.lstrip("/") in names
    assert set(config.modules) == {f"/{name}" for name in names if name.endswith(".ko")}


def test_nothing_else_is_inside(built) -> None:
    """No shell, no second program, no writable or setuid file, no certificate, no network tool."""
    names = listing(built[0])
    programs = [name for name in names if name.startswith(("usr/bin/", "usr/sbin/"))]
    assert programs == [f"usr/bin/{python_closure.python_name()}"]
    for name, columns in names.items():
        assert columns[0][0] in "-dlc", name
        assert not set(columns[0]) & set("sStT"), name
        if columns[0][0] not in "lc":
            assert columns[0][5] == columns[0][8] == "-", name
        assert columns[2:4] == ["root", "root"], name
    assert [name for name, columns in names.items() if columns[0][0] == "c"] == ["dev/console", "dev/null"]
    suffixes = {Path(name).suffix for name, columns in names.items() if columns[0][0] == "-" and ".so" not in name}
    assert suffixes == {".pyc", ".ko", ".json", ".11", ""}
    plain = [name for name, columns in names.items() if columns[0][0] == "-" and not Path(name).suffix]
    assert plain == ["init"]


def test_size(built) -> None:
    """Unpacked it stays below 40 MiB: the crypto library and the interpreter are most of it."""
    assert len(gzip.decompress(built[0].read_bytes())) < 40 << 20


def test_lsinitramfs_agrees(built) -> None:
    """The distribution's own tool lists the same names."""
    tool = shutil.which("lsinitramfs")
    if tool is None:
        pytest.skip("the program lsinitramfs is missing; install the package initramfs-tools-core")
    shown = subprocess.check_output([tool, os.fspath(built[0])], text=True).splitlines()
    assert sorted(name for name in shown if name != ".") == sorted(listing(built[0]))


def test_closure_is_pinned() -> None:
    """These modules of others are in the initrd. If a change is wanted, JINDISK_REGENERATE=1 writes it down."""
    names = [module.name for module in closure((initrd.ENTRY, *initrd.STORAGE_ENTRIES, *python_closure.LATE_IMPORTS))]
    names = [name for name in names if name.partition(".")[0] != "jindiskd"]
    versions = f"# Python {sys.version_info.major}.{sys.version_info.minor}, cryptography {cryptography.__version__}"
    text = "\n".join([versions, *names]) + "\n"
    if os.environ.get("JINDISK_REGENERATE"):
        CLOSURE.write_text(text)
    pinned = CLOSURE.read_text()
    if pinned.partition("\n")[0] != versions:
        pytest.skip(f"the closure is pinned for {pinned.partition(chr(10))[0][2:]}, not for {versions[2:]}")
    assert text == pinned


def test_closure_respects_the_layers() -> None:
    """Of our own packages the guest has only those that the agent may import, and no heavy library."""
    names = [module.name for module in closure((initrd.ENTRY, *initrd.STORAGE_ENTRIES, *python_closure.LATE_IMPORTS))]
    ours = {".".join(name.split(".")[:2]) for name in names if name.startswith("jindiskd.")}
    assert ours <= {f"jindiskd.{name}" for name in ("errors", "base", "guest", "kbs", "luks2", "jindisk")}
    assert not {"jindiskd.base.log", "jindiskd.base.process", "jindiskd.luks2.populate"} & set(names)
    top = {name.partition(".")[0] for name in names}
    assert not top & {"structlog", "aiohttp", "asyncio", "subprocess", "libvirt", "sqlalchemy", "click", "rich"}


def test_engine_only_where_it_is_used(built, kernel_modules, tmp_path) -> None:
    """A LUKS2 image measures no JinDisk engine, and has no shutdown program; a JinDisk image has both."""
    names = listing(built[0])
    assert "shutdown" not in names
    assert not [name for name in names if "/jindiskd/jindisk/" in name]
    root = dataclasses.replace(CONFIG.root, luks2=None, jindisk=JindiskExpectation(version=2, uuid="u"))
    build_initrd(config=dataclasses.replace(CONFIG, root=root), modules_dir=kernel_modules, output=tmp_path / "initrd")
    names = listing(tmp_path / "initrd")
    assert names["shutdown"][0] == "-rwxr-xr-x"
    assert f"usr/lib/{python_closure.python_name()}/jindiskd/jindisk/session.pyc" in names


def test_module_choice(kernel_modules) -> None:
    """LUKS2 brings dm-crypt, JinDisk brings nbd, SCSI disks bring SCSI; a simulated platform no TEE driver."""

    def names(**changes) -> set[str]:
        config = dataclasses.replace(CONFIG, **changes)
        return {path.name.partition(".")[0] for path in initrd.wanted_modules(config, kernel_modules)}

    assert {"dm-crypt", "xts", "virtio_blk", "vmw_vsock_virtio_transport"} <= names()
    assert not {"nbd", "sev-guest", "sd_mod"} & names()
    jindisk = dataclasses.replace(CONFIG.root, luks2=None, jindisk=JindiskExpectation(version=2, uuid="u"))
    assert "nbd" in names(root=jindisk)
    assert "dm-crypt" not in names(root=jindisk)
    assert "sd_mod" in names(root=dataclasses.replace(CONFIG.root, device="/dev/sda3"))


def test_real_platform_needs_its_driver(kernel_modules, tmp_path) -> None:
    """A kernel that cannot get the report is refused at build; one that can has its driver loaded."""
    config = dataclasses.replace(CONFIG, platform="snp")
    tree = tmp_path / kernel_modules.name
    tree.mkdir()
    for name in ("modules.builtin", "modules.softdep", "modules.dep"):
        text = kernel_modules.joinpath(name).read_text()
        lines = [line for line in text.splitlines() if "sev-guest" not in line]
        tree.joinpath(name).write_text("\n".join(lines) + "\n")
    with pytest.raises(JindiskError, match="sev_guest"):
        initrd.wanted_modules(config, tree)
    with tree.joinpath("modules.dep").open("a") as file:
        file.write("kernel/drivers/virt/coco/sev-guest.ko:\n")
    names = [path.name for path in initrd.wanted_modules(config, tree)]
    assert "sev-guest.ko" in names
    assert "configfs.ko" in names


def test_kernel_without_a_filesystem(kernel_modules) -> None:
    """A root file system that the kernel does not know is an error at build, not at boot."""
    config = dataclasses.replace(CONFIG, root=dataclasses.replace(CONFIG.root, filesystem="nonesuchfs"))
    with pytest.raises(JindiskError, match="nonesuchfs"):
        initrd.wanted_modules(config, kernel_modules)


def test_unimportable_entry() -> None:
    """A module that does not import is reported with the interpreter's words."""
    with pytest.raises(InitrdFailed, match="no_such_module_here"):
        closure(("no_such_module_here",))


def test_compiled_form(tmp_path) -> None:
    """Bytecode that is not checked against a source, with the path it will have in the guest."""
    source = tmp_path / "m.py"
    source.write_text("def f():\n    return {'a', 'b', 'c'}, frozenset((1, 2)), 1.5, b'x', ...\n")
    first = python_closure.compiled(source, "/usr/lib/m.py")
    assert first[4:8] == b"\1\0\0\0"
    assert os.fsencode(tmp_path) not in first
    target = tmp_path / "lib" / "m.pyc"
    target.parent.mkdir()
    target.write_bytes(first)
    command = [os.fspath(python_closure.base_interpreter()), "-ISc"]
    program = f"import sys; sys.path = [{os.fspath(target.parent)!r}, *sys.path]; import m; print(sorted(m.f()[0]))"
    assert subprocess.check_output([*command, program], text=True) == "['a', 'b', 'c']\n"


@pytest.mark.parametrize(
    ("path", "place"),
    [
        ("/lib64/ld-linux-x86-64.so.2", "usr/lib64/ld-linux-x86-64.so.2"),
        ("/lib/x86_64-linux-gnu/libc.so.6", "usr/lib/x86_64-linux-gnu/libc.so.6"),
        ("/usr/lib/libz.so.1", "usr/lib/libz.so.1"),
        ("/home/me/python/lib/libpython3.11.so.1.0", "usr/lib/libpython3.11.so.1.0"),
    ],
)
def test_library_places(path, place) -> None:
    """Libraries go where the guest's loader looks, with /usr merged."""
    assert library_place(path) == place


def test_shared_libraries_against_readelf(built) -> None:
    """Each NEEDED name of each binary in the archive is in the archive (readelf as second opinion)."""
    if not shutil.which("readelf"):
        pytest.skip("the program readelf is missing; install the package binutils")
    files = [
        module.file
        for module in closure((initrd.ENTRY, *initrd.STORAGE_ENTRIES, *python_closure.LATE_IMPORTS))
        if module.file.suffix == ".so"
    ]
    present = {Path(name).name for name in listing(built[0])}
    for file in [python_closure.base_interpreter(), *files]:
        shown = subprocess.check_output(["readelf", "-d", os.fspath(file)], text=True)
        needed = [line.partition("[")[2].rstrip("]") for line in shown.splitlines() if "(NEEDED)" in line]
        assert set(needed) <= present, file


def test_types_of_entries(built) -> None:
    """The links of a merged /usr and the mount points are there."""
    names = listing(built[0])
    for name in python_closure.MERGED:
        assert names[name][0][0] == "l"
    for name in initrd.EMPTY:
        assert names[name][0][0] == "d"
    assert names["init"][0] == stat.filemode(0o100755)
    assert json.loads(extract(built[0], "etc/jindisk/guest.json"))["schema"] == 1


def test_plug_ins_of_the_guest(kernel_modules, tmp_path, monkeypatch):
    """A key program and a report source are in the archive, with what they import, and in the configuration."""
    site = tmp_path / "site"
    site.mkdir()
    (site / "sample_source.py").write_text("import colorsys\nclass Reports:\n    pass\n")
    monkeypatch.syspath_prepend(str(site))
    config = dataclasses.replace(CONFIG, report_source="sample_source:Reports")
    output = tmp_path / "initrd"
    told = build_initrd(config=config, modules_dir=kernel_modules, output=output, key_program=b"#!program")
    assert (told.key_program, told.report_source) == (True, "sample_source:Reports")
    assert json.loads(extract(output, "etc/jindisk/guest.json"))["key_program"] is True
    assert extract(output, initrd.KEY_PROGRAM) == b"#!program"
    names = listing(output)
    assert names[initrd.KEY_PROGRAM][0] == "-rwxr-xr-x"
    library = f"usr/lib/{python_closure.python_name()}"
    for module in ("sample_source", "colorsys", "jindiskd/guest/script"):
        assert f"{library}/{module}.pyc" in names
    plain = listing(build_plain(kernel_modules, tmp_path))
    assert f"{library}/jindiskd/guest/script.pyc" not in plain
    assert initrd.KEY_PROGRAM not in plain


def build_plain(kernel_modules: Path, tmp_path: Path) -> Path:
    output = tmp_path / "plain"
    build_initrd(config=CONFIG, modules_dir=kernel_modules, output=output)
    return output
