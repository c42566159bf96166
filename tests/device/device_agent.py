"""Runs in a machine as root, started by systemd: installs and starts the service, and tries devices with it.

What it wants of whoever holds the machine it prints on the console, and at the end what it found.
"""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

FOUND: dict[str, object] = {}
NODES: list[str] = []
KEY = bytes(range(32))
CONFIG = """
[domains]
libvirt_uri = "test:///none"
"""
LIMIT_S = 400
EVENTS = 100
"""More than the smallest buffer of a watch takes, which is less than ten."""


def tell(word: str) -> None:
    os.write(1, f"\nDEVICE-AGENT {word}\n".encode())


def note(word: str) -> None:
    os.write(1, f"\n{time.monotonic():.0f} s: {word}\n".encode())


def run(*words: str, check: bool = True) -> str:
    done = subprocess.run(words, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    if check and done.returncode:
        raise RuntimeError(f"{words}: {done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def until(condition, what: str, limit_s: float = LIMIT_S):
    limit = time.monotonic() + limit_s
    while True:
        found = condition()
        if found:
            return found
        if time.monotonic() > limit:
            raise RuntimeError(f"{what} did not come")
        time.sleep(0.2)


def install() -> None:
    """As the administrator's guide says."""
    slow = Path("/etc/systemd/system/jindiskd.service.d/emulated.conf")
    slow.parent.mkdir()
    slow.write_text("[Service]\nTimeoutStartSec=infinity\nWatchdogSec=0\n")
    Path("/etc/jindiskd").mkdir(exist_ok=True)
    Path("/etc/jindiskd/jindiskd.toml").write_text(CONFIG)
    for words in (
        ("jindiskctl", "system-files", "install", "--prefix", "/usr", "--libexec", "/usr/bin"),
        ("systemd-sysusers", "jindiskd.conf"),
        ("systemd-tmpfiles", "--create", "jindiskd.conf"),
        ("systemctl", "daemon-reload"),
        ("udevadm", "control", "--reload"),
        ("systemctl", "start", "dbus.service"),
        ("busctl", "call", "org.freedesktop.DBus", "/org/freedesktop/DBus", "org.freedesktop.DBus", "ReloadConfig"),
    ):
        run(*words)
    note("installed")
    exposed = run("systemd-analyze", "security", "--no-pager", "jindisk-helper@0.service", check=False).split("\n")
    line = next(line for line in reversed(exposed) if "exposure level" in line)
    FOUND["helper exposed"] = float(line.split(": ")[1].split()[0])
    run("systemctl", "start", "jindisk-helper.socket", "jindiskd.service")
    note("started")


class Service:
    """The service as a client of the bus sees it."""

    def __init__(self) -> None:
        from jindiskd.cli.client import connected

        self.loop = asyncio.new_event_loop()
        self._connected = connected
        self.connect()

    def connect(self) -> None:
        self._context = self._connected(agent=False)
        self.client = self.loop.run_until_complete(self._context.__aenter__())

    def devices(self) -> dict[str, dict]:
        objects = self.loop.run_until_complete(self.client.objects("org.jindisk1.Device"))
        return {item["Node"] or item["MappedNode"]: {**item, "path": path} for path, item in objects.items()}

    def job(self, path: str) -> str:
        """Wait for a job; empty, or the code of its error."""

        def ended():
            found = self.loop.run_until_complete(self.client.properties(path, "org.jindisk1.Job"))
            return found if found["State"] in {"succeeded", "failed", "cancelled"} else None

        found = until(ended, "the end of a job")
        note(f"{found['Operation']} {found['State']} {found['Message']}")
        return "" if found["State"] == "succeeded" else found["Error"].rpartition(".")[2]

    def open(self, node: str, *, key: bytes = KEY, read_only: bool = False) -> str:
        return self.job(self.opening(node, key=key, read_only=read_only))

    def opening(self, node: str, *, key: bytes = KEY, read_only: bool = False) -> str:
        """The job that opens the volume of a device."""
        from jindiskd.bus.lib import Variant

        reading, writing = os.pipe()
        os.write(writing, key)
        os.close(writing)
        options = {"read-only": Variant("b", True)} if read_only else {}
        path = self.devices()[node]["path"]
        job: str = self.loop.run_until_complete(
            self.client.call(path, "org.jindisk1.Device", "OpenWithKey", 0, options, fds=[reading])
        )
        os.close(reading)
        return job

    def close(self, node: str) -> str:
        path = self.devices()[node]["path"]
        return self.job(self.loop.run_until_complete(self.client.call(path, "org.jindisk1.Device", "Close", {})))


def ours(item: dict) -> dict:
    return {name: value for name, value in item.items() if name != "path"}


def opened(service: Service, node: str) -> str:
    """Where the volume of a device is mapped; opened unless an earlier scene has left it open: each time costs."""
    if service.devices()[node]["State"] != "open":
        assert service.open(node) == "", node
    return service.devices()[node]["MappedNode"]


def life(service: Service, node: str) -> dict[str, object]:
    """Opened, mounted, written, closed, and read again; left open for reading."""
    found: dict[str, object] = {}
    place = Path("/run/places") / Path(node).name
    place.mkdir(parents=True)
    assert service.open(node) == "", node
    found["open"] = ours(service.devices()[node])
    mapped = service.devices()[node]["MappedNode"]
    run("mount", "-t", "ext4", mapped, str(place))
    found["word"] = (place / "word").read_text()
    (place / "written").write_text("x" * 100)
    found["busy"] = service.close(node)
    found["again"] = service.open(node)
    run("umount", str(place))
    assert service.close(node) == ""
    found["closed"] = ours(service.devices()[node])
    assert service.open(node, read_only=True) == ""
    found["read only"] = service.devices()[node]["ReadOnly"]
    mapped = service.devices()[node]["MappedNode"]
    found["read-only file system"] = "read-only" in run(
        "mount", "-t", "ext4", "-o", "rw", mapped, str(place), check=False
    ) or "ro," in run("findmnt", "-no", "OPTIONS", str(place), check=False)
    if not place.is_mount():
        run("mount", "-t", "ext4", "-o", "ro", mapped, str(place))
    found["written"] = (place / "written").read_text()
    run("umount", str(place))
    return found


def helpers() -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if b"jindiskd.helper" in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def mapped_nodes() -> list[str]:
    nbd = [path.parent.name for path in Path("/sys/block").glob("nbd*/pid")]
    return sorted(nbd + [path.name for path in Path("/sys/block").glob("dm-*")])


def overflow(_service: Service) -> None:
    """In a process of our own: the kernel drops events while we do not look."""
    from jindiskd.device.watch import BlockWatch

    heard: list[float] = []

    async def scene() -> None:
        watch = BlockWatch(lambda: heard.append(time.monotonic()), buffer_bytes=4096)
        watch.start()
        event = Path("/sys/block/vda/uevent")
        for _ in range(EVENTS):  # while the loop does not run
            event.write_text("change")
        run("udevadm", "settle", "--timeout=300")
        limit = time.monotonic() + LIMIT_S
        while not watch.overruns and time.monotonic() < limit:  # noqa: ASYNC110 - the watch has no event
            await asyncio.sleep(0.1)
        FOUND["overruns"] = watch.overruns
        FOUND["seen after overrun"] = len(await asyncio.to_thread(watch.look))
        before = len(heard)
        event.write_text("change")
        while len(heard) == before and time.monotonic() < limit:  # noqa: ASYNC110 - as above
            await asyncio.sleep(0.1)
        FOUND["heard after overrun"] = len(heard) > before
        watch.stop()

    asyncio.run(scene())


def plug(service: Service) -> None:
    assert service.devices() == {}
    tell("plug")
    until(lambda: len(service.devices()) == 2, "the disk")
    note("plugged")
    NODES[:] = sorted(service.devices())
    FOUND["plugged"] = [ours(service.devices()[node]) for node in NODES]
    FOUND["lsblk"] = sorted(
        {
            line.split("=", 1)[1]
            for node in NODES
            for line in run("udevadm", "info", "--query=property", f"--name={node}").split("\n")
            if line.startswith("ID_FS_USAGE=") or line == "ID_FS_TYPE=jindisk"
        }
    )
    assert NODES[0] in run("jindiskctl", "device", "list")


def wrong_key(service: Service) -> None:
    jobs = {kind: service.opening(node, key=bytes(32)) for kind, node in zip(("jindisk2", "luks2"), NODES, strict=True)}
    FOUND["wrong key"] = {kind: service.job(job) for kind, job in jobs.items()}


def jindisk2(service: Service) -> None:
    FOUND["jindisk2"] = life(service, NODES[0])


def luks2(service: Service) -> None:
    FOUND["luks2"] = life(service, NODES[1])
    assert service.close(NODES[1]) == ""


def restart(service: Service) -> None:
    first = NODES[0]
    opened(service, first)
    FOUND["before restart"] = ours(service.devices()[first])
    process = run("systemctl", "show", "-P", "MainPID", "jindiskd.service")
    run("systemctl", "kill", "-s", "KILL", "jindiskd.service")
    until(lambda: run("systemctl", "show", "-P", "MainPID", "jindiskd.service") not in {process, "0\n"}, "another")
    until(lambda: run("systemctl", "is-active", "jindiskd.service", check=False).strip() == "active", "the restart")
    service.connect()
    until(lambda: first in service.devices(), "the devices after the restart")
    FOUND["after restart"] = ours(service.devices()[first])
    assert service.close(first) == ""
    FOUND["closed after restart"] = ours(service.devices()[first])


def kill(service: Service) -> None:
    first = NODES[0]
    run("mount", "-t", "ext4", opened(service, first), "/srv")
    Path("/srv/kept").write_text("y" * 100)
    os.sync()
    for process in helpers():
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    until(lambda: not helpers(), "the end of the helper")
    run("umount", "-l", "/srv", check=False)
    run("udevadm", "trigger", "--action=change", f"--name-match={first}")  # an event: look again
    until(lambda: service.devices()[first]["State"] == "failed", "the failure")
    FOUND["killed"] = ours(service.devices()[first])
    until(lambda: service.close(first) in {"", "VolumeNotClosed"}, "closing")
    FOUND["closed after kill"] = ours(service.devices()[first])
    run("mount", "-t", "ext4", opened(service, first), "/srv")
    FOUND["kept after kill"] = Path("/srv/kept").read_text()


def unplug(service: Service) -> None:
    mapped = opened(service, NODES[0])
    if not os.path.ismount("/srv"):
        run("mount", "-t", "ext4", mapped, "/srv")
    Path("/srv/last").write_text("z")
    tell("unplug")
    until(lambda: any(item["State"] == "lost" for item in service.devices().values()), "the loss")
    FOUND["lost"] = ours(next(item for item in service.devices().values() if item["State"] == "lost"))
    run("umount", "-l", "/srv", check=False)

    def gone() -> bool:
        Path("/sys/block/vda/uevent").write_text("change")  # any event: look again
        time.sleep(2)
        return service.devices() == {}

    until(gone, "its end")
    FOUND["after unmount"] = list(service.devices())
    FOUND["left"] = mapped_nodes()


SCENES = {item.__name__: item for item in (plug, wrong_key, jindisk2, luks2, restart, kill, overflow, unplug)}


def scenes() -> None:
    install()
    service = Service()
    for names in Path("/mnt/scenes").read_text().split():
        together = [SCENES[name] for name in names.split("+")]
        if len(together) == 1:
            together[0](service)
        else:
            with ThreadPoolExecutor() as threads:
                for begun in [threads.submit(lambda scene: scene(Service()), scene) for scene in together]:
                    begun.result()
            service = Service()  # of those one may have restarted
        note(f"{names} is done")


def main() -> None:
    try:
        scenes()
    except BaseException:  # noqa: BLE001 - told on the console
        FOUND["fault"] = traceback.format_exc()
        for unit in ("jindiskd.service", "jindisk-helper@*", "systemd-udevd.service", "jindisk-helper.socket"):
            note(run("journalctl", "--no-pager", "-n", "40", "-u", unit, check=False)[-5000:])
        note(run("sh", "-c", "udevadm info -q all /dev/sda1; udevadm info -q all /dev/sda2", check=False))
        note(run("sh", "-c", "dmesg | tail -20; ls -la /run /run/jindisk-helper; mount | head -50", check=False))
    tell("found " + json.dumps(FOUND))


main()
