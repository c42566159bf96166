"""Debian systems to install the packages in: a root of a release, and a boot of it with systemd as process 1."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from distribution import copy_system

ROOT = Path(__file__).resolve().parents[2]
SERVICES = "systemd-sysv,dbus,polkitd,udev"
MASKED = ("systemd-networkd-wait-online.service", "apt-daily.timer", "apt-daily-upgrade.timer")


class System:
    """A Debian system in a directory."""

    def __init__(self, release: str, directory: Path) -> None:
        self.release, self.root = release, directory / "root"
        self.out = directory / "out"
        self.out.mkdir()
        copy_system(release, SERVICES, self.root)
        self.run("apt-get", "-q", "update")

    def run(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """A program in the system, which is not booted."""
        done = subprocess.run(
            [ROOT / "scripts/in-root", self.root, *words], capture_output=True, text=True, timeout=1200, check=False
        )
        assert not check or done.returncode == 0, f"{words}: {done.stdout[-3000:]}{done.stderr[-3000:]}"
        return done

    def bring(self, packages: list[Path]) -> list[str]:
        """Copy packages in; returns their paths there."""
        inside = self.root / "packages"
        shutil.rmtree(inside, ignore_errors=True)
        inside.mkdir()
        return ["/packages/" + Path(shutil.copy(package, inside)).name for package in packages]

    def boot(self, script: str, *, timeout_s: int = 600) -> str:
        """Boot the system in a container, run a shell script in it as root, which must succeed; returns its output."""
        (self.out / "script").write_text("set -ex\n" + script)
        for name in ("log", "rc"):
            (self.out / name).unlink(missing_ok=True)
        units = self.root / "etc/systemd/system"
        for unit in MASKED:
            (units / unit).unlink(missing_ok=True)
            (units / unit).symlink_to("/dev/null")
        (units / "smoke.service").write_text(
            "[Unit]\nWants=dbus.socket\nAfter=basic.target dbus.socket\n"
            "SuccessAction=poweroff-force\nFailureAction=poweroff-force\n"
            f"[Service]\nType=oneshot\nTimeoutStartSec={timeout_s}\n"
            "ExecStart=/bin/sh -c '/bin/bash /smoke/script >/smoke/log 2>&1; echo $$? >/smoke/rc'\n"
        )
        container = (
            f"systemd-nspawn -q --register=no --keep-unit -D {self.root} --private-network -M jindisk-smoke "
            f"--bind={self.out}:/smoke -b systemd.unit=smoke.service"
        )
        with (self.out / "console").open("wb") as console:
            # A terminal is needed for the console even when nobody looks.
            subprocess.run(
                ["unshare", "--mount", "--propagation", "private", "script", "-qec", container, "/dev/null"],
                stdin=subprocess.DEVNULL, stdout=console, stderr=console, timeout=timeout_s + 60, check=False,
            )  # fmt: skip
        log = self.out / "log"
        said = log.read_text() if log.exists() else (self.out / "console").read_text(errors="replace")
        rc = self.out / "rc"
        assert rc.exists() and rc.read_text().strip() == "0", said[-5000:]  # noqa: PT018 (one claim)
        return said


@pytest.fixture(scope="module", params=["bookworm", "trixie"])
def release(request: pytest.FixtureRequest) -> str:
    if os.geteuid() != 0:
        pytest.skip("making a system needs root")
    return str(request.param)


@pytest.fixture(scope="module")
def packages(release: str) -> list[Path]:
    """The packages for the release, built in a clean root; those in `$JINDISK_PACKAGES/RELEASE` where that is set."""
    target = Path(os.environ.get("JINDISK_PACKAGES", ROOT / "build/packages")) / release
    if "JINDISK_PACKAGES" not in os.environ:
        quick = os.environ | {"DPKG_DEB_COMPRESSOR_LEVEL": "1"}  # what is built for others is packed well, for minutes
        subprocess.run([ROOT / "scripts/build-packages", release, target], check=True, timeout=1800, env=quick)
    return sorted(target.glob("*.deb"))


@pytest.fixture(scope="module")
def system(release: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    made = System(release, tmp_path_factory.mktemp(release))
    yield made
    shutil.rmtree(made.root, ignore_errors=True)
