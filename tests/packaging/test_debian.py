"""The Debian packages in clean systems: what installing, running, upgrading, removing and purging them does."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from .conftest import System

pytestmark = [pytest.mark.long, pytest.mark.host]

APT = ("apt-get", "-qy", "--no-install-recommends", "-o", "Dpkg::Options::=--force-unsafe-io")

# Run as root in the booted system. What is printed between markers is read by the tests.
FIRST_START = """
systemctl is-enabled jindiskd.service jindiskd.socket
! systemctl is-active --quiet jindiskd.service || systemctl stop jindiskd.service
test "$(stat -c '%U %a' /var/lib/jindiskd)" = 'jindiskd 711'
# D-Bus activation, by an ordinary user.
runuser -u nobody -- jindiskctl status --json >/smoke/status.json
systemctl is-active jindiskd.service
test "$(stat -c %U "/proc/$(systemctl show -P MainPID jindiskd.service)")" = jindiskd
busctl introspect org.jindisk1 /org/jindisk1 org.jindisk1.Manager >/smoke/introspect
status=0
runuser -u nobody -- jindiskctl audit list || status=$?
test $status = 5
jindiskctl image list --json >/smoke/images.json
systemd-analyze security jindiskd.service --no-pager | tail -n 1 >/smoke/security
test "$(stat -c '%U %a' /var/lib/jindiskd/kek)" = 'jindiskd 600'
sha256sum /var/lib/jindiskd/kek /var/lib/jindiskd/broker.pem >/smoke/identity
begun=$(date +%s)
systemctl stop jindiskd.service
test $(($(date +%s) - begun)) -lt 60
test "$(systemctl show -P Result jindiskd.service)" = success
systemctl start jindiskd.service
jindiskctl audit verify
systemctl start jindisk-broker.service
test "$(stat -c %U "/proc/$(systemctl show -P MainPID jindisk-broker.service)")" = jindisk-broker
systemctl stop jindisk-broker.service
"""
AFTER_UPGRADE = """
systemctl start jindiskd.service
jindiskctl status
sha256sum --check /smoke/identity
"""
AFTER_REMOVAL = """
! systemctl cat jindiskd.service
test -e /var/lib/jindiskd/kek
"""


def test_lintian(packages: list[Path], release: str, capsys: pytest.CaptureFixture[str]) -> None:
    """No error and no warning that is not overridden with its reason; what it says is in the output of the tests."""
    changes = list(packages[0].parent.glob("*.changes"))
    words = ["lintian", "--allow-root", "--fail-on", "error,warning", *map(str, changes)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=600, check=False)
    found = [sum(line.startswith(f"{kind}:") for line in done.stdout.splitlines()) for kind in "EW"]
    with capsys.disabled():
        print(f"\nlintian, packages for {release}: {found[0]} errors, {found[1]} warnings\n{done.stdout}".rstrip())
    assert done.returncode == 0, done.stdout + done.stderr


def test_maintainer_scripts_know_the_units(packages: list[Path]) -> None:
    """Units in a place that debhelper does not look at would be shipped and never enabled, silently."""
    package = next(path for path in packages if path.name.startswith("jindiskd_"))
    shown = subprocess.run(["dpkg", "-I", package, "postinst"], capture_output=True, text=True, check=True).stdout
    assert "deb-systemd-helper" in shown
    assert "systemd-sysusers" in shown


def test_life(system: System, packages: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    """Install, start by the bus in its sandbox, upgrade, remove, purge: keys and images outlive all of it."""
    system.run(*APT, "install", *system.bring(packages))
    system.run("dpkg", "--verify")
    assert system.run("jindiskctl", "--version").stdout
    assert "JinDisk" in system.run("jindisksetup", "--help").stdout
    system.boot(FIRST_START)
    out = system.out
    assert json.loads((out / "status.json").read_text())
    assert json.loads((out / "images.json").read_text()) == {"images": []}
    with capsys.disabled():
        print(f"\n{system.release}: {(out / 'security').read_text().strip()}")
    assert float(re.findall(r": ([0-9.]+) ", (out / "security").read_text())[0]) <= 2.5

    newer = [later(path, system.out) for path in packages]
    system.run(*APT, "install", *system.bring(newer))
    assert "0.1.0+later" in system.run("dpkg-query", "-W", "jindiskd").stdout
    system.boot(AFTER_UPGRADE)

    names = [path.name.split("_")[0] for path in packages]
    system.run(*APT, "remove", *names)
    assert not (system.root / "usr/bin/jindiskctl").is_symlink()
    assert not (system.root / "usr/lib/jindisk/bin").exists()
    system.boot(AFTER_REMOVAL)
    system.run("dpkg", "--purge", *names)  # apt knows no name of a package that left nothing behind
    assert (system.root / "var/lib/jindiskd/kek").exists()
    assert not (system.root / "etc/libvirt/hooks/qemu.d/50-jindiskd").exists()
    assert "deinstall" not in system.run("dpkg-query", "-W", "-f", "${Status}", "jindiskd", check=False).stdout


def later(package: Path, directory: Path) -> Path:
    """The same package with a later version."""
    tree = directory / package.stem
    subprocess.run(["dpkg-deb", "-R", package, tree], check=True)
    control = tree / "DEBIAN/control"
    control.write_text(control.read_text().replace("0.1.0", "0.1.0+later"))
    made = directory / package.name.replace("0.1.0", "0.1.0+later")
    subprocess.run(["dpkg-deb", "--root-owner-group", "-Zgzip", "-z1", "-b", tree, made], check=True)
    shutil.rmtree(tree)
    return made
