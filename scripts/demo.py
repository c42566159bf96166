"""The main job, shown: build, launch, attest, release, unlock, boot; then a refusal. Run by `make demo`.

Runs inside `scripts/testenv`: a real system bus, a real libvirtd, QEMU by emulation. The platform is simulated: its
reports have the real format and are verified by the real code, under a root made on this machine. They prove nothing.
"""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STATE = Path("/var/lib/jindiskd-demo")  # a throw-away copy of /var/lib in this environment
CTL = [str(ROOT / ".venv/bin/jindiskctl")]
CONFIG = f"""
[service]
state_dir = "{STATE}"
runtime_dir = "/run/jindiskd"
[images]
platform = "simulated-snp"
cpu_model = "EPYC-Milan"
firmware = "{{tools}}/OVMF.fd"
firmware_dirs = ["{{tools}}"]
[broker]
allow_simulated = true
[domains]
vhost_device_vsock = "{{tools}}/vhost-device-vsock"
"""


def say(text: str) -> None:
    print(f"\n\033[1m== {text}\033[0m" if sys.stdout.isatty() else f"\n== {text}", flush=True)


def ctl(*words: str, expect: int = 0, quiet: bool = False) -> str:
    """Run jindiskctl and show it; the demonstration ends where it does something else than it should."""
    print("$ jindiskctl", *words, flush=True)
    done = subprocess.run([*CTL, *words], capture_output=True, text=True, timeout=400, check=False)
    if not quiet:
        print(done.stdout + done.stderr, end="", flush=True)
    if done.returncode != expect:
        print(done.stdout + done.stderr)
        raise SystemExit(f"demo: jindiskctl {words[0]} ended with status {done.returncode}, not {expect}")
    return done.stdout + done.stderr


def witness(name: str) -> str:
    """Wait for what the guest's own system says about its root on the console."""
    for _ in range(240):
        text = subprocess.run([*CTL, "domain", "console", name], capture_output=True, text=True, check=True).stdout
        if "witness: done" in text:
            return "\n".join(line.strip() for line in text.splitlines() if "witness:" in line)
        time.sleep(0.5)
    raise SystemExit(f"demo: the guest's system did not report within 120 s; its console:\n{text[-3000:]}")


def main() -> None:
    tools = STATE / "tools"  # where QEMU's user can read it
    tools.mkdir(parents=True, mode=0o755)
    STATE.chmod(0o711)
    shutil.copy(ROOT / "build/tools/usr/share/ovmf/OVMF.fd", tools / "OVMF.fd")
    shutil.copy(ROOT / "build/tools/usr/bin/vhost-device-vsock", tools / "vhost-device-vsock")
    config = STATE / "jindiskd.toml"
    config.write_text(CONFIG.replace("{tools}", str(tools)))
    log = (ROOT / "build/demo.log").open("wb")
    daemon = subprocess.Popen([ROOT / ".venv/bin/jindiskd", "--config", str(config)], stdout=log, stderr=log)
    try:
        for _ in range(100):
            if subprocess.run([*CTL, "status", "--json"], capture_output=True, check=False).returncode == 0:
                break
            time.sleep(0.1)
        say("The service")
        ctl("status")
        say("Build: a Debian image becomes one with an encrypted root")
        ctl("image", "build", "demo", "--base", str(ROOT / "build/base/debian.img"))
        ctl("image", "list")
        say("Launch: the guest attests, gets its key, opens its root and boots")
        begun = time.monotonic()
        ctl("launch", "demo")
        print(f"({time.monotonic() - begun:.1f} s from the command to the system's init)")
        say("Inside the guest: what / is")
        seen = witness("demo")
        print(seen)
        if "/dev/mapper/root (crypt)" not in seen:
            raise SystemExit("demo: the guest's root is not on the encrypted volume")
        ctl("domain", "list")
        ctl("domain", "stop", "demo", "--force", "--yes")
        say("Refusal: one word is added to the kernel command line behind the owner's back")
        cmdline = STATE / "images/demo/cmdline"
        original = cmdline.read_text()
        cmdline.write_text(original + " single")
        ctl("launch", "demo", expect=7)
        cmdline.write_text(original)
        say("The audit log has both decisions")
        ctl("audit", "list")
        ctl("domain", "undefine", "demo", "--yes")
        ctl("image", "remove", "demo", "--yes")
        say("Done: build, launch, attest, release, unlock, boot; and a refusal. Everything was simulated.")
    except BaseException:
        log.flush()
        print("\nThe service's log ends with:\n" + (ROOT / "build/demo.log").read_text()[-3000:], file=sys.stderr)
        raise
    finally:
        daemon.terminate()
        daemon.wait(20)


if __name__ == "__main__":
    os.environ["PATH"] += ":/usr/sbin:/sbin"
    main()
