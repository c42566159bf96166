"""A root file system, as a directory and as a tar archive, taken through build, launch, attestation and boot."""

from __future__ import annotations

import json
import shutil
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from .conftest import Host, cleared, started

sys.path.insert(0, str(Path(__file__).parents[1] / "guest"))

import qemu_kernel
import testroot

pytestmark = [pytest.mark.guest, pytest.mark.host, pytest.mark.slow]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with Debian's kernel and modules, an interpreter, and an init that says what it sees."""
    folder = tmp_path_factory.mktemp("rootfs")
    kernel = qemu_kernel.find_kernel(folder / "debian")
    if kernel is None:
        pytest.skip(qemu_kernel.MISSING)
    testroot.make_root(folder)
    root = folder / "tree"
    (root / "boot").mkdir()
    shutil.copy(kernel.kernel, root / "boot")
    shutil.copytree(kernel.modules, root / "usr/lib/modules" / kernel.modules.name, symlinks=True)
    (root / "etc/fstab").write_text("LABEL=cloudimg-rootfs / ext4 defaults 0 1\n")
    (root / "etc/os-release").write_text('NAME="Small"\nPRETTY_NAME="Small Linux 1"\n')
    return root


@pytest.fixture(scope="module")
def host(tree: Path) -> Iterator[Host]:
    with cleared(started("rootfs")) as made:
        yield made


@pytest.mark.parametrize(
    ("kind", "volume"),
    [("directory", "luks2"), ("tar", "jindisk"), pytest.param("tar", "luks2", marks=pytest.mark.long)],
)
def test_a_root_file_system_boots(host: Host, tree: Path, kind: str, volume: str) -> None:
    """From inside: / is the encrypted volume, and holds what the root file system held."""
    source = tree
    if kind == "tar":
        source = host.state / "root.tar"
        with tarfile.open(source, "w", format=tarfile.PAX_FORMAT) as archive:
            archive.add(tree, arcname=".")
    name = f"{kind}-{volume}"
    host.ctl("image", "build", name, "--rootfs", str(source), "--format", volume)
    done = host.ctl("launch", name)
    assert "runs from its encrypted root" in done.stdout
    said = host.wait_console(name, "ROOT-SEES")
    line = next(line for line in said.splitlines() if "ROOT-SEES" in line)
    seen = json.loads(line.partition("ROOT-SEES ")[2])
    assert seen["pid"] == 1
    assert seen["secret"] == "inside"
    device = {"luks2": "/dev/mapper/root", "jindisk": "/dev/nbd0"}[volume]
    assert [mount[:3] for mount in seen["mounts"] if mount[1] == "/"] == [[device, "/", "ext4"]]
    # It switches itself off, which is an end in order.
    host.until(lambda: host.domain(name)["State"] == "stopped", "the end of the guest", within_s=300)
    rows = [row["kind"] for row in host.rows()]
    assert rows.count("released") >= 1
    host.ctl("domain", "undefine", name, "--yes")
    host.ctl("image", "remove", name, "--yes")
