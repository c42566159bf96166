"""Hostile callers: whatever they send, they get a known error quickly, and the service loses nothing."""

import importlib.util
import os
import random
import signal
import sys
import time
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

import jindiskd.daemon  # noqa: F401 (registers the errors of all its parts)
from jindiskd.bus import faults
from jindiskd.errors import JindiskError


def _load():
    spec = importlib.util.spec_from_file_location("rawbus", Path(__file__).with_name("rawbus.py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules["rawbus"] = module
    spec.loader.exec_module(module)
    return module


rawbus = _load()
MANAGER = "org.jindisk1.Manager"
STANDARD = {value for name, value in vars(faults).items() if name.isupper() and isinstance(value, str)} | {
    # What the bus daemon itself answers where a message is wrong.
    "org.freedesktop.DBus.Error.NotSupported",
}


@pytest.fixture
def raw(shared):
    found = rawbus.RawBus(shared.address)
    yield found
    found.close()


def open_descriptors(daemon) -> int:
    return len(list(Path(f"/proc/{daemon.process.pid}/fd").iterdir()))


def resident_kib(daemon) -> int:
    status = Path(f"/proc/{daemon.process.pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0])


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("directory", "regular file"),
        ("device", "regular file"),
        ("pipe", "regular file"),
        ("socket", "regular file"),
        ("write-only", "not open for reading"),
        ("path-only", "not open for reading"),
        ("missing", "no such file descriptor"),
    ],
)
def test_a_base_must_be_a_file_that_the_caller_may_read(shared, raw, tmp_path, how, words):
    """Everything else that can be a descriptor is refused, and closed."""
    before = open_descriptors(shared)
    other = -1
    if how == "directory":
        fd = os.open(tmp_path, os.O_RDONLY)
    elif how == "device":
        fd = os.open("/dev/zero", os.O_RDONLY)
    elif how == "pipe":
        fd, other = os.pipe()
    elif how == "socket":
        fd = os.dup(raw.sock.fileno())
    else:
        (tmp_path / "x").write_bytes(b"x")
        fd = os.open(tmp_path / "x", os.O_PATH if how == "path-only" else os.O_WRONLY)
    try:
        index = 5 if how == "missing" else 0
        error, body = raw.call(MANAGER, "BuildImage", "sha{sv}", ("x", index, {}), fds=(fd,))
    finally:
        os.close(fd)
        if other >= 0:
            os.close(other)
    assert error == faults.INVALID_ARGS
    assert words in body[0]
    assert open_descriptors(shared) <= before


def test_a_job_ends_with_its_caller_if_that_is_wanted(shared, large_rootfs):
    """With bind-to-caller, the build is cancelled when the bus says that its starter has left."""
    with large_rootfs.open("rb") as base:
        raw = rawbus.RawBus(shared.address)
        options = {"bind-to-caller": ("b", True), "base-kind": ("s", "rootfs")}
        error, body = raw.call(MANAGER, "BuildImage", "sha{sv}", ("bound", 0, options), fds=(base.fileno(),))
        assert error == "", body
    raw.close()
    number = body[0].rsplit("/", 1)[1]
    assert "cancelled" in shared.ctl("job", "show", number, "--wait", status=130)


def test_signals_to_the_service_are_ignored(shared, raw):
    """Even ones that pretend to be from the bus daemon: the bus signs them with their real sender."""
    for _ in range(50):
        raw.send("org.freedesktop.DBus", "NameOwnerChanged", "sss", (raw.name, raw.name, ""), kind=rawbus.SIGNAL)
    assert raw.call("org.freedesktop.DBus.Peer", "Ping") == ("", [])


def test_a_service_that_was_stopped_answers_all_that_came_meanwhile(shared):
    """Ten clients with 120 calls each: its answers are more than its socket holds at once."""
    clients = [rawbus.RawBus(shared.address) for _ in range(10)]
    shared.process.send_signal(signal.SIGSTOP)
    try:
        asked = [
            {client.send("org.freedesktop.DBus.Introspectable", "Introspect") for _ in range(120)} for client in clients
        ]
    finally:
        shared.process.send_signal(signal.SIGCONT)
    for client, serials in zip(clients, asked, strict=True):
        refused = 0
        while serials:
            kind, fields, _ = client.receive()
            if fields.get(5) in serials:
                serials.discard(fields[5])
                refused += kind == rawbus.ERROR
        assert refused <= 120 - 32  # what is more than allowed at once gets an answer too
        client.close()
    shared.ctl("status")


class Fuzzer:
    """Values by signature, chosen to hurt."""

    TEXTS = (
        "",
        "../../etc/passwd",
        "x" * 70_000,
        "\x01\x02\n\x1b[2J",
        "demo",
        "stock",
        "/",
        "ä" * 100,
        "%s%n",
        "'; --",
    )
    NAMES = ("platform", "size", "limit", "image", "force", "base-kind", "seed", "vcpus", "nonsense", "bind-to-caller")

    def __init__(self, seed: int, fds: tuple[int, ...]) -> None:
        self.random, self.fds = random.Random(seed), fds

    def value(self, kind: str, depth: int = 0):
        r = self.random
        if kind == "b":
            return r.randrange(2)
        if kind == "d":
            return r.choice((0.0, -1.0, float("nan"), float("inf"), 1e308))
        if kind == "h":
            return r.choice((*range(len(self.fds)), len(self.fds), 0xFFFFFFFF))
        if kind in rawbus.FIXED:
            size = rawbus.FIXED[kind][1] * 8
            low, high = (-(1 << size - 1), (1 << size - 1) - 1) if kind in "nix" else (0, (1 << size) - 1)
            return r.choice((low, high, 0, 1, 7, r.randint(low, high)))
        if kind == "o":
            return r.choice(("/", "/org/jindisk1", "/org/jindisk1/job/1", "/a" * 100))
        if kind == "g":
            return r.choice(("", "s", "a{sv}", "(ii)"))
        if kind == "s":
            return r.choice(self.TEXTS)
        if kind == "v":
            inner = r.choice("sutbdoghv" if depth < 20 else "s")
            return inner, self.value(inner, depth + 1)
        if kind == "a{sv}":
            return {r.choice(self.NAMES): self.value("v", depth) for _ in range(r.choice((0, 0, 1, 3)))}
        if kind[0] == "a":
            return [self.value(kind[1:], depth + 1) for _ in range(r.choice((0, 1, 50)))]
        return tuple(self.value(part, depth + 1) for part in rawbus.split(kind[1:-1]))


def members(raw) -> list[tuple[str, str, str, str]]:
    """Every method of every object: path, interface, member, signature of its arguments."""
    found, paths = [], ["/org/jindisk1"]
    while paths:
        path = paths.pop()
        _, body = raw.call("org.freedesktop.DBus.Introspectable", "Introspect", path=path)
        node = ET.fromstring(body[0])
        for interface in node.findall("interface"):
            for method in interface.findall("method"):
                signature = "".join(a.get("type") for a in method.findall("arg") if a.get("direction", "in") == "in")
                found.append((path, interface.get("name"), method.get("name"), signature))
        paths += [f"{path}/{child.get('name')}" for child in node.findall("node")]
    return found


def settle(raw) -> None:
    """Wait until no job runs."""
    until = time.monotonic() + 120
    while time.monotonic() < until:
        _, body = raw.call("org.freedesktop.DBus.ObjectManager", "GetManagedObjects")
        jobs = [there["org.jindisk1.Job"] for there in body[0].values() if "org.jindisk1.Job" in there]
        if not [job for job in jobs if job["State"] in {"running", "cancelling"}]:
            return
        time.sleep(0.1)
    raise AssertionError("jobs do not end")


def test_random_calls_find_nothing(stock, raw):
    """4,000 calls of every member with values that hurt, some of wrong type: only known errors, no internal one."""
    seed = int(os.environ.get("JINDISK_FUZZ_SEED", str(random.randrange(1 << 32))))
    print(f"JINDISK_FUZZ_SEED={seed}")
    reading, writing = os.pipe()
    fds = (os.open("/", os.O_RDONLY), os.open("/dev/null", os.O_RDONLY), reading)
    fuzzer = Fuzzer(seed, fds)
    # The image of the other tests stays: its removal is not among what is tried.
    targets = [target for target in members(raw) if target[2] != "Remove"]
    known = STANDARD | {f"org.jindisk1.Error.{code}" for code in JindiskError.by_code} - {"org.jindisk1.Error.Internal"}
    before, memory, slowest = open_descriptors(stock), 0, 0.0
    for count in range(4000):
        if count == 3000:
            # Threads, caches and kept jobs are there by now. Measuring reads files into memory, several at once, so it
            # would hide what is looked for.
            targets = [target for target in targets if target[2] != "Measure"]
            settle(raw)
            memory = resident_kib(stock)
        path, interface, member, signature = fuzzer.random.choice(targets)
        if fuzzer.random.random() < 0.15:
            signature = fuzzer.random.choice(("", "s", "v", "a{sv}", "aav", "(su)", "ssv", "h"))
        body = tuple(fuzzer.value(part) for part in rawbus.split(signature))
        began = time.monotonic()
        passed = fuzzer.random.choices(fds, k=signature.count("h"))
        error, answer = raw.call(interface, member, signature, body, path=path, fds=tuple(passed))
        slowest = max(slowest, time.monotonic() - began)
        assert error == "" or error in known, (member, signature, body, error, answer)
        assert "Traceback" not in str(answer)
    for fd in (*fds, writing):
        os.close(fd)
    raw.call(MANAGER, "ListImages", "a{sv}", ({},))
    settle(raw)
    assert slowest < 60
    # The key store's pool may have opened a few more connections, three descriptors each; a leak would be thousands.
    assert open_descriptors(stock) <= before + 20
    assert resident_kib(stock) - memory < 4 * 1024
    assert "fault in a bus method" not in stock.log.read_text()
    stock.ctl("key", "reinstate", "stock")
