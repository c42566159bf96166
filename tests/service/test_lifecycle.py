"""Starting, being watched, and ending: what a service manager and an administrator see."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from jindiskd.bus import contract
from jindiskd.daemon import main
from jindiskd.system_files import INTERFACES

PROGRAM = Path(sys.executable).with_name("jindiskd")
CONTRACT = Path(contract.__file__).resolve().parents[2] / "dbus"


def canonical(element: ET.Element) -> str:
    for item in element.iter():
        item.text = item.tail = None
    return ET.canonicalize(ET.tostring(element, encoding="unicode"))


def shipped(name: str) -> str:
    return canonical(ET.parse(CONTRACT / f"{name}.xml").getroot().find("interface"))


def test_what_runs_is_what_the_contract_says(stock):
    """Seen by another implementation of D-Bus, every introspection is the XML in dbus/ (devices: test_devices)."""

    def look(path: str) -> ET.Element:
        words = ["gdbus", "introspect", "--xml", "--address", stock.address, "--dest", "org.jindisk1"]
        return ET.fromstring(subprocess.run([*words, "--object-path", path], check=True, capture_output=True).stdout)

    with stock.spawn(
        "launch", "stock"
    ) as process:  # without libvirt it fails, and leaves a domain and a job to look at
        _, err = process.communicate(timeout=120)
    assert process.returncode not in {0, 2, 3}, err
    found = {}
    paths = ["/org/jindisk1"]
    while paths:
        path = paths.pop()
        node = look(path)
        for interface in node.findall("interface"):
            if interface.get("name").startswith("org.jindisk1."):
                found[interface.get("name")] = canonical(interface)
        paths += [f"{path}/{child.get('name')}" for child in node.findall("node")]
    assert set(found) == {f"org.jindisk1.{name}" for name in INTERFACES if name not in {"Approval", "Device"}}
    for name, text in found.items():
        assert text == shipped(name)


def test_properties_read_as_an_independent_client_sees_them(stock):
    """busctl understands every object, and its values are those that the command line shows."""
    image = stock.json("image", "list")["images"][0]
    path = subprocess.run(
        ["busctl", f"--address={stock.address}", "--json=short", "call", "org.jindisk1", "/org/jindisk1",
         "org.jindisk1.Manager", "GetImage", "s", "stock"],
        check=True, capture_output=True,
    ).stdout  # fmt: skip
    path = json.loads(path)["data"][0]
    for name, value in image.items():
        out = subprocess.run(
            ["busctl", f"--address={stock.address}", "--json=short", "get-property", "org.jindisk1", path,
             "org.jindisk1.Image", name],
            check=True, capture_output=True,
        ).stdout  # fmt: skip
        assert json.loads(out)["data"] == value


def test_it_is_watched(unstarted):
    """Signs of life come twice in the time that the service manager allows, and only if it asks for them."""
    unstarted.start(WATCHDOG_USEC="400000")
    began = time.monotonic()
    for _ in range(4):
        unstarted.told("WATCHDOG=1", seconds=60)
    assert 0.3 < time.monotonic() - began < 60


BLOCKED = """
import asyncio, time
from jindiskd.program import until_first
async def main():
    asyncio.get_running_loop().call_later(1.0, lambda: (print("blocked", flush=True), time.sleep(3600)))
    await until_first(ended=asyncio.Event())
asyncio.run(main())
"""


def test_a_loop_that_is_blocked_gives_no_sign_of_life(tmp_path):
    """While other threads of it would live on: so the service manager ends and restarts it."""
    address = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as heard:
        heard.bind(str(address))
        environment = {**os.environ, "NOTIFY_SOCKET": str(address), "WATCHDOG_USEC": "200000"}
        words = [sys.executable, "-c", BLOCKED]
        with subprocess.Popen(words, env=environment, stdout=subprocess.PIPE) as process:
            heard.settimeout(120)
            while heard.recv(4096) != b"WATCHDOG=1":
                pass
            assert process.stdout.readline() == b"blocked\n"
            heard.settimeout(2)
            said = 0
            with contextlib.suppress(TimeoutError):
                while said < 100:  # what it said before that
                    assert heard.recv(4096) == b"WATCHDOG=1"
                    said += 1
            assert said < 100
            process.kill()


TAKEN = """
import fcntl, os, socket, sys
made = socket.socket(socket.AF_UNIX); made.bind(sys.argv[1]); made.listen()
fd = fcntl.fcntl(made, fcntl.F_DUPFD, 10); made.close()
os.dup2(fd, 3)
os.environ.update(LISTEN_PID=str(os.getpid() + int(sys.argv[2])), LISTEN_FDS="1", LISTEN_FDNAMES="guests")
from jindiskd.base.notify import take_sockets
taken = take_sockets()
print([sock.getsockname() for sock in taken], os.get_inheritable(3), [name for name in os.environ if "LISTEN" in name])
"""


@pytest.mark.parametrize("other", [0, 1])
def test_sockets_of_the_service_manager(tmp_path, other):
    """Taken if they are meant for this process, and handed to no other program."""
    words = [sys.executable, "-c", TAKEN, tmp_path / "socket", str(other)]
    out = subprocess.run(words, capture_output=True, text=True, check=True, timeout=120).stdout
    assert out == ("[] True []\n" if other else f"[{str(tmp_path / 'socket')!r}] False []\n")


def test_it_ends_in_order_when_told(daemon):
    """SIGTERM: STOPPING is told, the status is 0, the name is free and the store can be used again."""
    assert daemon.stop() == 0
    daemon.told("STOPPING=1")
    assert "not available" in daemon.ctl("status", status=69)
    daemon.start()
    daemon.ctl("status")


def test_a_reload_checks_the_configuration(daemon):
    """SIGHUP with a wrong file is logged and changes nothing."""
    daemon.configuration.with_name("jindiskd.toml.d").mkdir()
    (daemon.configuration.with_name("jindiskd.toml.d") / "x.toml").write_text("[broker]\nallow_simulatd = true\n")
    daemon.process.send_signal(signal.SIGHUP)
    daemon.told("RELOADING=1")
    daemon.told("READY=1")
    daemon.ctl("status")
    assert "did you mean allow_simulated?" in daemon.log.read_text()


def test_losing_the_bus_ends_it(unstarted, private_bus, bus_process):
    """With a status that makes the service manager start it again."""
    unstarted.start()
    bus_process.terminate()
    assert unstarted.process.wait(timeout=120) == 69
    unstarted.process = None


def test_a_bus_that_does_not_know_us(unstarted, bus_process):
    """Because its policy was read before there was the user, say: what to do is told, and the status says try again."""
    configuration = Path(bus_process.args[1].partition("=")[2])
    text = configuration.read_text()
    configuration.write_text(text.replace("</policy>", '<deny own="org.jindisk1"/></policy>'))
    # One that answers minds the signal; before, it would die of it.
    subprocess.run(["busctl", f"--address={unstarted.address}", "list"], check=True, capture_output=True)
    bus_process.send_signal(signal.SIGHUP)
    words = [PROGRAM, "--config", unstarted.configuration]
    until = time.monotonic() + 300
    while True:  # the bus reads it some time after the signal
        with subprocess.Popen(words, env=unstarted.environment, stderr=subprocess.PIPE, text=True) as process:
            seen = ""
            for line in process.stderr:
                seen += line
                if "event='ready'" in line or "ready" in line.split():
                    process.terminate()
        if process.returncode == 69 and "systemctl reload dbus" in seen:
            break
        assert time.monotonic() < until, seen
    assert "Traceback" not in seen


def test_a_second_service_does_not_start(daemon, unstarted):
    """Neither on the same store nor under the same name."""
    other = subprocess.run(
        [PROGRAM, "--config", daemon.configuration], env=daemon.environment, capture_output=True, timeout=120
    )
    assert other.returncode == 6
    assert b"another service uses it" in other.stderr
    elsewhere = daemon.folder / "other"
    text = daemon.configuration.read_text().replace(str(daemon.state), str(elsewhere))
    elsewhere.mkdir()
    (elsewhere / "x.toml").write_text(text.replace("allow_simulated = true", "allow_simulated = false"))
    other = subprocess.run(
        [PROGRAM, "--config", elsewhere / "x.toml"], env=daemon.environment, capture_output=True, timeout=120
    )
    assert other.returncode == 6
    assert b"org.jindisk1" in other.stderr
    daemon.ctl("status")


@pytest.mark.skipif(os.getuid() != 0, reason="needs root to become another user")
def test_it_runs_without_any_privilege(unstarted, rootfs):
    """As an ordinary user it builds, measures and removes; nobody else can look into its memory or its keys."""
    for path in (unstarted.folder, unstarted.state):
        os.chown(path, 5, 5)
    for path in (unstarted.state / "simulated-root").rglob("*"):
        os.chown(path, 5, 5)
    os.chown(unstarted.state / "simulated-root", 5, 5)
    unstarted.start(uid=5)
    status = Path(f"/proc/{unstarted.process.pid}/status").read_text()
    assert "CapEff:\t0000000000000000" in status
    # The kernel gives the files of a process that cannot be dumped to root.
    assert Path(f"/proc/{unstarted.process.pid}/environ").stat().st_uid == 0
    unstarted.ctl("image", "build", "demo", "--rootfs", str(rootfs))
    unstarted.ctl("image", "measure", "demo")
    assert not [line for line in unstarted.json("status")["warnings"] if "runs as root" in line]
    for secret in ("kek", "keys.db", "broker.pem"):
        assert (unstarted.state / secret).stat().st_mode & 0o077 == 0
        assert (unstarted.state / secret).stat().st_uid == 5
    unstarted.ctl("image", "remove", "demo", "--yes")


@pytest.mark.parametrize("damage", ["kek", "broker.pem"])
def test_damaged_state_is_named_and_not_replaced(unstarted, damage):
    """A key-encryption key or identity that is not one stops the start; making a new one would lose every image."""
    (unstarted.state / damage).write_bytes(b"not it")
    unstarted.start(wait=False)
    assert unstarted.process.wait(timeout=120) == 8
    assert damage in unstarted.log.read_text()
    assert (unstarted.state / damage).read_bytes() == b"not it"
    unstarted.process = None


def test_a_wrong_configuration_stops_it_with_every_fault(unstarted):
    """--check-config shows them too, and exits 2; a right one exits 0."""
    assert main(["--config", str(unstarted.configuration), "--check-config"]) == 0
    unstarted.configuration.write_text("[broker]\nmax_sessions = 0\n[imges]\n")
    assert main(["--config", str(unstarted.configuration), "--check-config"]) == 2
    assert main(["--config", "/nowhere.toml", "--check-config"]) == 3
