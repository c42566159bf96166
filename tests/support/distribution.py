"""A Debian system whose own tools make its initramfs, as a disk image to build from."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = "systemd-sysv,udev,dbus,kmod,passwd,python3,zstd,linux-image-cloud-amd64"
DISK_MIB = 1400
FSTAB = "LABEL=cloudimg-rootfs / ext4 defaults,discard 0 1\n"


def in_root(root: Path, *words: str) -> str:
    """A program in a system that is not booted; returns what it printed."""
    done = subprocess.run(
        [ROOT / "scripts/in-root", root, *words],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=1200,
    )  # fmt: skip
    assert done.returncode == 0, f"{words}: {done.stdout[-3000:]}"
    return done.stdout


def base_system(release: str, wanted: str) -> Path:
    """A root of a Debian release with packages (comma-separated) of its own: kept from run to run, so to be copied,
    and never booted or changed."""
    root = ROOT / "build/systems" / f"{release}-{hashlib.sha256(wanted.encode()).hexdigest()[:12]}"
    if not root.exists():
        root.parent.mkdir(parents=True, exist_ok=True)
        making = root.with_name(root.name + ".making")
        shutil.rmtree(making, ignore_errors=True)
        subprocess.run([ROOT / "scripts/debian-root", release, making, wanted], check=True, timeout=1800)
        making.rename(root)
    return root


def copy_system(release: str, wanted: str, root: Path) -> None:
    """Such a system in a directory that is not there yet."""
    subprocess.run(["cp", "-a", "--reflink=auto", base_system(release, wanted), root], check=True, timeout=600)


def packages(release: str) -> Path:
    """The directory of this checkout's packages for a release: what was built since its last change, or built now."""
    made = Path(os.environ.get("JINDISK_PACKAGES", ROOT / "build/packages")) / release
    if "JINDISK_PACKAGES" not in os.environ:
        built = [path.stat().st_mtime for path in made.glob("jindisk-initramfs_*.deb")]
        command = ["git", "-C", ROOT, "ls-files", "-z", "jindiskd", "initramfs", "debian", "pyproject.toml"]
        files = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\0")
        changed = max((ROOT / name).stat().st_mtime for name in files if (ROOT / name).is_file())
        if not built or built[0] < changed:
            quick = os.environ | {"DPKG_DEB_COMPRESSOR_LEVEL": "1"}
            subprocess.run([ROOT / "scripts/build-packages", release, made], check=True, timeout=1800, env=quick)
    return made


def make_system(release: str, maker: str, directory: Path) -> Path:
    """A root with a kernel, `maker` of its initramfs (`initramfs-tools`, `dracut`), our package, and the witness.

    Installing the package has the system make its initramfs anew, as on any machine.
    """
    root = directory / "root"
    copy_system(release, f"{PACKAGES},{maker}", root)
    (package,) = packages(release).glob("jindisk-initramfs_*.deb")
    shutil.copy(package, root / "package.deb")
    print(in_root(root, "dpkg", "-i", "/package.deb"))
    (root / "package.deb").unlink()
    finish(root)
    return root


def finish(root: Path) -> None:
    """What a stock image has besides, and what says on the console what the system sees."""
    in_root(root, "passwd", "-dl", "root")
    (root / "etc/fstab").write_text(FSTAB)
    shutil.copy(ROOT / "scripts/guest-witness", root / "usr/local/sbin/guest-witness")
    (root / "usr/local/sbin/guest-witness").chmod(0o755)
    units = root / "etc/systemd/system"
    shutil.copy(ROOT / "scripts/guest-witness.service", units)
    (units / "multi-user.target.wants").mkdir(exist_ok=True)
    (units / "multi-user.target.wants/guest-witness.service").symlink_to("../guest-witness.service")
    # As after a first boot: what is done once for a new system takes minutes by emulation.
    in_root(root, "systemd-machine-id-setup")
    in_root(root, "touch", "/etc/.updated", "/var/.updated")


def make_initramfs(root: Path) -> Path:
    """Have the system make its initramfs anew; returns its file."""
    (release,) = (path.name for path in (root / "usr/lib/modules").iterdir())
    if (root / "usr/bin/dracut").exists():  # our package has a folder for it in any system
        in_root(root, "dracut", "--force", f"/boot/initrd.img-{release}", release)
    else:
        in_root(root, "update-initramfs", "-u", "-k", release)
    return root / f"boot/initrd.img-{release}"


def make_disk(root: Path, disk: Path) -> None:
    """A disk image with a GPT and the root as its one partition."""
    shutil.rmtree(root / "var/cache/apt", ignore_errors=True)
    shutil.rmtree(root / "var/lib/apt/lists", ignore_errors=True)
    with disk.open("wb") as file:
        file.truncate(DISK_MIB << 20)
    table = "label: gpt\nfirst-lba: 2048\nstart=2048, type=4F68BCE3-E8CD-4DB1-96E7-FBCAF984B709, name=root\n"
    subprocess.run(["sfdisk", "-q", disk], input=table, text=True, check=True)
    blocks = (DISK_MIB - 2) << 8
    words = ["mke2fs", "-q", "-t", "ext4", "-b", "4096", "-L", "cloudimg-rootfs", "-d", root, "-E", "offset=1048576"]
    subprocess.run([*words, disk, str(blocks)], check=True)
