"""The real polkitd on a bus of a test's own, and the command line by other users."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
POLKITD = Path("/usr/lib/polkit-1/polkitd")
POLICY = ROOT / "dbus/org.jindisk1.policy"
NOBODY, SERVICE = 65534, 5

# In its own mount namespace polkitd finds our actions and rules, and knows the service's user by its name.
START = """
set -e
mount --bind {folder}/actions /usr/share/polkit-1/actions
mount --bind {folder}/rules.d /etc/polkit-1/rules.d
mount --bind {folder}/passwd /etc/passwd
exec {polkitd} --no-debug
"""


class Rules:
    """What the administrator decided."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "rules.d/50-test.rules"

    def write(self, body: str) -> None:
        """Decide by the body of a rule."""
        self.file.write_text(f"polkit.addRule(function (action, subject) {{ {body} }});\n")


@contextlib.contextmanager
def polkitd(daemon: Any, bus: str, body: str = "") -> Iterator[Rules]:
    """polkitd on a bus, with our actions alone and the body of a rule."""
    folder = daemon.folder / "polkit"
    for name in ("actions", "rules.d"):
        (folder / name).mkdir(parents=True)
    shutil.copy(POLICY, folder / "actions")
    lines = [line for line in Path("/etc/passwd").read_text().splitlines() if f":{SERVICE}:" not in line]
    lines.append(f"jindiskd:x:{SERVICE}:{SERVICE}::/:/usr/sbin/nologin")
    (folder / "passwd").write_text("\n".join(lines) + "\n")
    rules = Rules(folder)
    rules.write(body)
    with (folder / "log").open("wb") as log:
        words = ["unshare", "--mount", "sh", "-c", START.format(folder=folder, polkitd=POLKITD)]
        process = subprocess.Popen(words, env=daemon.environment, stdout=log, stderr=log)
    try:
        until = time.monotonic() + 120
        listing = ["busctl", f"--address={bus}", "list", "--no-legend"]
        while b"org.freedesktop.PolicyKit1" not in subprocess.run(listing, capture_output=True).stdout:
            assert process.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < until, (folder / "log").read_text()
            time.sleep(0.05)
        yield rules
    finally:
        process.kill()
        process.wait()


def ctl(daemon: Any, *words: str, uid: int = NOBODY) -> tuple[int, str]:
    """jindiskctl as somebody else: status and all its output."""
    program = Path(sys.executable).with_name("jindiskctl")
    user = ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups"]
    out = subprocess.run(
        [*user, program, *words], env=daemon.environment, stdin=subprocess.DEVNULL, capture_output=True, text=True,
        timeout=300, cwd="/",
    )  # fmt: skip
    return out.returncode, out.stdout + out.stderr
