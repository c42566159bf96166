"""The main job, shown: build, launch, attest, release, unlock, boot, reboot; then two refusals. Run by `make demo`.

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


def witness(boot: int) -> list[str]:
    """Wait for what the guest's own system says on the console in its boot number `boot`; print and return it."""
    (log,) = (STATE / "console").iterdir()  # what `jindiskctl domain console` prints
    end = time.monotonic() + 300
    while time.monotonic() < end:
        text = log.read_text(errors="replace")
        if text.count("witness: done") >= boot:
            lines = [line.strip() for line in text.splitlines() if "witness: " in line]
            ends = [-1, *(at for at, line in enumerate(lines) if "witness: done" in line)]
            said = [line[line.index("witness: ") :] for line in lines[ends[boot - 1] + 1 : ends[boot]]]
            print("\n".join(said), flush=True)
            return said
        time.sleep(0.5)
    raise SystemExit(f"demo: the guest's system did not report within 300 s; its console:\n{text[-3000:]}")


def expect(fact: bool, problem: str) -> None:
    if not fact:
        raise SystemExit(f"demo: {problem}")


def copy(source: Path, target: Path) -> None:
    """As whoever rules the host can: the bytes, holes left out."""
    print(f"$ cp --sparse=always {source} {target}", flush=True)
    subprocess.run(["cp", "--sparse=always", source, target], check=True)


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
        say("Build: a Debian image becomes one with an encrypted root, JinDisk 2")
        ctl("image", "build", "demo", "--base", str(ROOT / "build/base/debian.img"))
        ctl("image", "list")
        disk, yesterday = STATE / "images/demo/disk.img", STATE / "yesterday.img"
        copy(disk, yesterday)
        say("Launch: the guest attests, gets its key and the last known state of its disk, opens its root and boots")
        begun = time.monotonic()
        ctl("launch", "demo")
        print(f"({time.monotonic() - begun:.1f} s from the command to the system's init)")
        say("Inside the guest: what / is, and a first write")
        said = witness(1)
        expect(any("/ is /dev/nbd0 " in line for line in said), "the guest's root is not on the encrypted volume")
        expect(any("served by jindisk-storage" in line for line in said), "/ is not served by the storage process")
        wrote = [line.removeprefix("witness: wrote ") for line in said if "witness: wrote " in line]
        say("Reboot, by virsh: the volume is closed in order, and the guest attests again")
        print("$ virsh reboot demo", flush=True)
        subprocess.run(["virsh", "-q", "-c", "qemu:///system", "reboot", "demo"], check=True, timeout=60)
        said = witness(2)
        expect(f"witness: read {wrote[0]}" in said, f"what the first boot wrote, {wrote[0]}, was not read back")
        ctl("domain", "list")
        ctl("domain", "stop", "demo")
        ctl("key", "show", "demo")
        say("Refusal: one word is added to the kernel command line behind the owner's back")
        cmdline = STATE / "images/demo/cmdline"
        original = cmdline.read_text()
        cmdline.write_text(original + " single")
        told = ctl("launch", "demo", expect=7)
        expect("launch digest" in told, "the refusal has another reason")
        cmdline.write_text(original)
        say("Refusal: yesterday's copy of the disk, authentic in every byte, is put in the place of today's")
        copy(yesterday, disk)
        told = ctl("launch", "demo", expect=7)
        expect("volume.stale" in told, "the refusal has another reason")
        say("The audit log has every decision")
        ctl("audit", "list")
        ctl("audit", "verify")
        ctl("domain", "undefine", "demo", "--yes")
        ctl("image", "remove", "demo", "--yes")
        say(
            "Done: build, launch, attest, release, unlock, boot, write, reboot, read; and two refusals.\n"
            "Simulated: the platform, that is the report and the root it is verified under. Real: everything else."
        )
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
