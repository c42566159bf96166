#!/usr/bin/python3
"""Runs in the guest that is a host, as root, and tells what it sees: a line of JSON a check, on the second serial port
of a guest, or in the file that `$PORT` names.

`host_driver.py CHECK,...`: the checks, in this order; each is a function below. A check that fails is told and does not
keep the others from being made. Standard library alone.
"""

import gzip
import json
import os
import pwd
import re
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path

PORT = Path(os.environ.get("PORT", "/dev/ttyS1"))
CONFIG = Path("/etc/jindiskd/jindiskd.toml")
PACKAGES = Path("/packages")
STATE = Path("/var/lib/jindiskd")
RULE = Path("/etc/polkit-1/rules.d/50-test.rules")
DROP_IN = Path("/run/systemd/system/jindiskd.service.d/test.conf")
CREDENTIAL = Path("/etc/credstore.encrypted/jindisk.kek")
UNIT = "jindiskd.service"
LONG_S = 3000


def run(*words, status=0, user="", timeout=600, stdin=None):
    """A program's standard output; its status must be the one given."""
    argv = ["runuser", "-u", user, "--", *words] if user else list(words)
    done = subprocess.run(argv, capture_output=True, text=True, timeout=timeout, input=stdin)
    if status is not None and done.returncode != status:
        raise AssertionError(
            f"{argv}: status {done.returncode}, not {status}: {done.stdout[-1500:]}{done.stderr[-1500:]}"
        )
    return done.stdout if status == 0 else done.stdout + done.stderr


def shown(name, unit=UNIT):
    return run("systemctl", "show", "-P", name, unit).strip()


def until(condition, what, seconds=600):
    end = time.monotonic() + seconds
    while True:
        found = condition()
        if found:
            return found
        assert time.monotonic() < end, f"{what} did not come"
        time.sleep(0.5)


def ctl(*words, **more):
    return run("jindiskctl", *words, **more)


def objects(*words):
    return json.loads(ctl(*words, "--json"))


def warnings():
    return objects("status")["warnings"]


# What the packages do


def installed():
    """The packages configure themselves under a running systemd; nothing is left half done; a rule of udev too much."""
    run("dpkg", "-i", *sorted(map(str, PACKAGES.glob("*.deb"))), timeout=LONG_S)
    assert run("dpkg", "--audit") == ""
    assert run("systemctl", "is-enabled", UNIT).strip() == "enabled"
    owner = pwd.getpwnam("jindiskd")
    assert (STATE.stat().st_uid, STATE.stat().st_mode & 0o777) == (owner.pw_uid, 0o711)
    assert "libvirt" in run("id", "-nG", "jindiskd").split()
    return sorted(path.name for path in PACKAGES.glob("*.deb"))


def activated():
    """An ordinary user's first call starts the service, by the bus, in its sandbox."""
    run("systemctl", "stop", UNIT)
    run("useradd", "--create-home", "alice")
    run("useradd", "--create-home", "bob")
    said = json.loads(run("jindiskctl", "status", "--json", user="alice"))
    assert said["service"]["Version"]
    assert shown("ActiveState") == "active"
    pid = shown("MainPID")
    status = Path(f"/proc/{pid}/status").read_text()
    facts = {
        "user": run("ps", "-o", "user=", "-p", pid).strip(),
        **{
            name: re.search(rf"^{name}:\s*(\S+)", status, re.MULTILINE)[1]
            for name in ("NoNewPrivs", "Seccomp", "CapEff", "CapBnd")
        },
    }
    assert facts == {"user": "jindiskd", "NoNewPrivs": "1", "Seccomp": "2", "CapEff": "0" * 16, "CapBnd": "0" * 16}, (
        facts
    )
    inside = Path(f"/proc/{pid}/root")
    assert not os.access(inside / "home/alice/x", os.F_OK)
    assert "ro" in re.search(r" / \S+ (\S+)", Path(f"/proc/{pid}/mounts").read_text())[1].split(",")
    return facts


CLAIM = """
<domain type='qemu'>
  <name>claims</name>
  <metadata>
    <jd:domain xmlns:jd='https://jindisk.org/xmlns/libvirt/domain/1'>
      <jd:image name='web' id='00000000-0000-4000-8000-000000000001' platform='simulated-snp'/>
    </jd:domain>
  </metadata>
  <memory unit='MiB'>64</memory>
  <os><type arch='x86_64' machine='q35'>hvm</type></os>
</domain>
"""


def hooked():
    """libvirt, which ran before the packages came, asks us about a domain that claims to be ours."""
    run("virsh", "-c", "qemu:///system", "define", "/dev/stdin", stdin=CLAIM)
    said = run("virsh", "-c", "qemu:///system", "start", "claims", status=1)
    run("virsh", "-c", "qemu:///system", "undefine", "claims")
    assert "never adopted: run 'jindiskctl domain adopt claims web'" in said, said
    return said.strip()


def exposure():
    """`systemd-analyze security` of the units as this system runs them."""
    found = {}
    for unit in (UNIT, "jindisk-broker.service"):
        found[unit] = run("systemd-analyze", "security", "--no-pager", unit).strip().splitlines()[-1]
        assert float(re.search(r": ([0-9.]+) ", found[unit])[1]) <= 2.5, found
    return found


def polkit():
    """An ordinary user is denied; a rule of the administrator allows one of them, and still denies the other."""
    denied = run("jindiskctl", "audit", "list", user="alice", status=5)
    RULE.write_text(
        "polkit.addRule(function (action, subject) {\n"
        '    if (action.id == "org.jindisk1.inspect" && subject.user == "alice") return polkit.Result.YES;\n'
        "});\n"
    )
    until(lambda: run("jindiskctl", "audit", "list", user="alice", status=None) is not None, "polkit's answer")
    run("jindiskctl", "audit", "list", user="alice")
    run("jindiskctl", "audit", "list", user="bob", status=5)
    ctl("audit", "list")
    return denied.strip()


# systemd, point by point


def credential():
    """The key-encryption key from the service manager: it opens the keys, and no file beside them has it."""
    assert any("better give the unit" in line for line in warnings())
    run("systemctl", "stop", UNIT)
    run("rm", "-rf", *map(str, STATE.glob("*")))
    CREDENTIAL.parent.mkdir(mode=0o700, exist_ok=True)
    sealed = f"systemd-creds encrypt --with-key=host --name=jindisk.kek - {CREDENTIAL}"
    run("sh", "-ec", f"head -c 32 /dev/urandom | {sealed}")
    run("systemctl", "start", UNIT)
    assert not any("better give the unit" in line for line in warnings())
    assert not (STATE / "kek").exists()
    ctl("audit", "verify")
    # Without it the keys are shut: the service says so instead of drawing another, and is not started over and over.
    run("systemctl", "stop", UNIT)
    away = CREDENTIAL.rename(CREDENTIAL.with_suffix(".away"))
    try:
        run("systemctl", "start", UNIT, status=None)
        until(lambda: shown("ActiveState") == "failed", "the end of a service without its key")
        journal = run("journalctl", "-u", UNIT, "-n", "30", "--no-pager", "-o", "cat")
        assert "keys are stored: restore it from its backup" in journal, journal
        assert not (STATE / "kek").exists()
    finally:
        away.replace(CREDENTIAL)
    run("systemctl", "reset-failed", UNIT)
    run("systemctl", "start", UNIT)
    ctl("audit", "verify")


def watchdog():
    """A service that gives no sign of life is ended and started again, with its threads' stacks in the journal."""
    DROP_IN.parent.mkdir(parents=True, exist_ok=True)
    DROP_IN.write_text("[Service]\nWatchdogSec=20s\nTimeoutAbortSec=60s\n")
    run("systemctl", "daemon-reload")
    run("systemctl", "restart", UNIT)
    before = shown("MainPID")
    began = time.monotonic()
    time.sleep(50)  # it lives through more than two of its periods
    assert shown("MainPID") == before, "it was restarted while it lived"
    os.kill(int(before), 19)
    until(lambda: shown("MainPID") not in {before, "0"} and shown("ActiveState") == "active", "the restart")
    journal = run("journalctl", "-u", UNIT, "--no-pager", "-o", "cat")
    assert "Watchdog timeout" in journal, journal[-2000:]
    ctl("status")
    DROP_IN.unlink()
    run("systemctl", "daemon-reload")
    run("systemctl", "restart", UNIT)
    return {
        "restarts": shown("NRestarts"),
        "seconds": round(time.monotonic() - began),
        "stacks": "Thread 0x" in journal,
    }


def killed():
    """Killed, it is started again, and its state is as it was."""
    before = shown("MainPID")
    run("systemctl", "kill", "--signal=KILL", "--kill-whom=main", UNIT)
    until(lambda: shown("MainPID") not in {before, "0"} and shown("ActiveState") == "active", "the restart")
    ctl("status")
    return shown("NRestarts")


def stopped():
    """It stops within its limit and in order; a reload with a wrong file is refused in words, and changes nothing."""
    began = time.monotonic()
    run("systemctl", "stop", UNIT)
    took = time.monotonic() - began
    assert shown("Result") == "success", shown("Result")
    assert took < 60, took
    assert Path("/run/jindiskd").is_dir()
    run("systemctl", "start", UNIT)
    wrong = Path("/etc/jindiskd/jindiskd.toml.d/x.toml")
    wrong.parent.mkdir(exist_ok=True)
    wrong.write_text("[broker]\nallow_simulatd = true\n")
    run("systemctl", "reload", UNIT)
    journal = until(
        lambda: (said := run("journalctl", "-u", UNIT, "--no-pager", "-o", "cat")) and "did you mean" in said and said,
        "the word about the wrong setting",
    )
    assert "allow_simulated" in journal
    wrong.unlink()
    ctl("status")
    return f"{took:.1f} s"


def broker():
    """The owner's broker in its own sandbox."""
    run("systemctl", "start", "jindisk-broker.service")
    card = ctl("broker", "card", timeout=600)
    run("systemctl", "stop", "jindisk-broker.service")
    assert shown("Result", "jindisk-broker.service") == "success"
    return card[:200]


# The real flow, with vsock from this kernel, by the words of the manual

PAGE = Path("/usr/share/man/man7/jindisk.7.gz")
SLOW = """
[domains]
memory_mib = 512
launch_timeout_s = 1500
"""


def quick_start():
    """The commands of the page, as they are shown."""
    text = gzip.decompress(PAGE.read_bytes()).decode()
    section = text.partition(".SH QUICK START\n")[2].partition("\n.SH ")[0]
    plain = section.replace("\\-", "-").replace("\\(aq", "'").replace("\\e", "\\")
    return [line.removeprefix("# ") for line in plain.splitlines() if line.startswith("# ")]


def typed(commands):
    """Run commands of the page; what each said, and how long it took."""
    said = {}
    for command in commands:
        if command.startswith(("apt-get", "mmdebstrap", "jindiskctl domain stop")):
            continue
        began = time.monotonic()
        status = None if "doctor" in command else 0  # there is no KVM here, and it says so
        try:
            out = run("sh", "-c", command, timeout=1600, status=status)
        except AssertionError as exc:
            raise AssertionError(f"{exc}\n{ctl('domain', 'console', 'demo', status=None)[-1500:]}") from exc
        said[command] = f"{out.strip()[-400:]} ({time.monotonic() - began:.0f} s)"
    return said


def parts():
    """The page's commands before the guest is launched, and from there on."""
    commands = quick_start()
    at = next(number for number, command in enumerate(commands) if command.startswith("jindiskctl launch"))
    return commands[:at], commands[at:]


def built():
    """What the manual page says, word for word, leads from the packages to an image.

    Of two commands the results are here already, since there is no network: firmware, and a root file system, which is
    a small one. The emulation in the emulation is slow, which the settings allow for.
    """
    slow = CONFIG.with_name("jindiskd.toml.d") / "slow.toml"
    slow.parent.mkdir(parents=True, exist_ok=True)
    slow.write_text(SLOW)
    return typed(parts()[0])


def launched():
    """What it says next leads to a guest that runs from its encrypted root."""
    return typed(parts()[1])


def newcomer():
    """All of it on one machine."""
    return {**built(), **launched()}


def vsock():
    """The guest came over AF_VSOCK of this kernel, which the unit has loaded, by the context id that libvirt gave."""
    assert Path("/sys/class/misc/vhost-vsock").exists()
    text = run("virsh", "-c", "qemu:///system", "dumpxml", "demo")
    cid = int(re.search(r"<cid auto='yes' address='(\d+)'/>", text)[1])
    assert objects("domain", "show", "demo")["domain"]["Cid"] == cid
    assert "vhost-user-vsock" not in text
    return cid


def attested():
    """From inside the guest, / is the encrypted volume; the key was released once, before."""
    domain = objects("domain", "show", "demo")["domain"]
    assert domain["State"] == "running", domain
    console = until(
        lambda: (seen := ctl("domain", "console", "demo")) and "ROOT-SEES" in seen and seen,
        "the word of the guest's root",
        LONG_S,
    )
    seen = json.loads(next(line for line in console.splitlines() if "ROOT-SEES" in line).partition("ROOT-SEES ")[2])
    mounts = [mount[:3] for mount in seen["mounts"] if mount[1] == "/"]
    assert seen["secret"] == "inside"
    assert mounts == [["/dev/nbd0", "/", "ext4"]], mounts
    rows = objects("audit", "list")["rows"]
    assert [row["kind"] for row in rows].count("released") == 1, rows
    return {"cid": domain["Cid"], "mounts": mounts}


def outlived():
    """A restart of the service finds the guest by its record, with its context id; a kill too."""
    cid = objects("domain", "show", "demo")["domain"]["Cid"]
    for action in (("restart",), ("kill", "--signal=KILL", "--kill-whom=main")):
        before = shown("MainPID")
        run("systemctl", *action, UNIT)
        until(
            lambda before=before: shown("MainPID") not in {before, "0"} and shown("ActiveState") == "active",
            "the restart",
        )
        found = until(lambda: objects("domain", "list")["domains"], "the domain")
        assert [(one["State"], one["Cid"]) for one in found] == [("running", cid)], found
    ctl("domain", "stop", "demo", "--force", "--yes")
    assert objects("domain", "show", "demo")["domain"]["State"] == "stopped"
    assert not list(Path("/run/jindiskd/vsock").iterdir())
    return cid


def refused():
    """`virsh start` of a guest whose command line somebody changed, in one sentence that says what to do."""
    before = run("virsh", "-c", "qemu:///system", "dumpxml", "--inactive", "demo")
    assert before.count("</cmdline>") == 1
    altered = before.replace("</cmdline>", " single</cmdline>")
    try:
        run("virsh", "-c", "qemu:///system", "define", "/dev/stdin", stdin=altered)
        said = run("virsh", "-c", "qemu:///system", "start", "demo", status=1)
    finally:
        run("virsh", "-c", "qemu:///system", "define", "/dev/stdin", stdin=before)
    assert "jindisk: domain 'demo' is not started: its kernel command line is not what image 'demo' was" in said, said
    return said.strip()


def sockets():
    """The service manager listens: who comes while the service is off starts it, and, as a stranger, is sent away.

    The stranger is this host itself, by the loopback.
    """
    assert shown("ActiveState", "jindiskd.socket") == "active"
    run("modprobe", "vsock_loopback")
    run("systemctl", "stop", UNIT)
    with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as stranger:
        stranger.settimeout(600)
        stranger.connect((1, 19012))
        try:
            got = stranger.recv(1)
        except ConnectionResetError:
            got = b""
    assert got == b""
    assert shown("ActiveState") == "active"
    return shown("MainPID")


def main():
    with PORT.open("w") as port:

        def tell(**words):
            port.write(json.dumps(words) + "\n")
            port.flush()

        for name in sys.argv[1].split(","):
            began = time.monotonic()
            try:
                tell(check=name, ok=True, found=globals()[name](), seconds=round(time.monotonic() - began))
            except Exception as exc:  # noqa: BLE001 (whatever it is, it is told, and the next check made)
                journal = subprocess.run(
                    ["journalctl", "-u", UNIT, "-n", "40", "--no-pager", "-o", "cat"], capture_output=True, text=True
                ).stdout
                trace = traceback.format_exc() if not isinstance(exc, AssertionError) else str(exc)
                tell(check=name, ok=False, found=trace[-3000:], journal=journal[-4000:])
        tell(done=True)
    os.sync()
    subprocess.run(["systemctl", "poweroff"])


if __name__ == "__main__":
    main()
