"""Random calls of every member of the service, well and badly typed, by a client that shares no code with it.

`python busfuzz.py ADDRESS CALLS SEED` makes them as the user that it runs as, and prints what became of them as JSON.
"""

import json
import os
import random
import sys
import time
import xml.etree.ElementTree as ET
from collections import Counter
from typing import Any

import rawbus

STANDARD = frozenset(
    f"org.freedesktop.DBus.Error.{name}"
    for name in (
        "AccessDenied", "InteractiveAuthorizationRequired", "InvalidArgs", "LimitsExceeded", "PropertyReadOnly",
        "UnknownInterface", "UnknownMethod", "UnknownObject", "UnknownProperty",
        "NotSupported",  # what the bus daemon itself answers where a message is wrong
    )
)  # fmt: skip
DESTRUCTIVE = frozenset(("Remove",))
"""Of the image that everything is tried on."""


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


def fuzz(address: str, calls: int, seed: int) -> dict[str, Any]:
    """Make the calls; returns how many got which answer, how many were badly typed, and the slowest, in seconds."""
    raw = rawbus.RawBus(address)
    reading, writing = os.pipe()
    os.close(writing)  # at its end: an import would wait for the rest of a stream as long as somebody may send it
    fds = (os.open("/", os.O_RDONLY), os.open("/dev/null", os.O_RDONLY), reading)
    fuzzer = Fuzzer(seed, fds)
    targets = [target for target in members(raw) if target[2] not in DESTRUCTIVE]
    answers: Counter[str] = Counter()
    mistyped, slowest = 0, 0.0
    for _ in range(calls):
        path, interface, member, signature = fuzzer.random.choice(targets)
        if fuzzer.random.random() < 0.15:
            signature = fuzzer.random.choice(("", "s", "v", "a{sv}", "aav", "(su)", "ssv", "h"))
            mistyped += 1
        body = tuple(fuzzer.value(part) for part in rawbus.split(signature))
        passed = fuzzer.random.choices(fds, k=signature.count("h"))
        began = time.monotonic()
        error, answer = raw.call(interface, member, signature, body, path=path, fds=tuple(passed))
        slowest = max(slowest, time.monotonic() - began)
        answers[error or "answered"] += 1
        if "Traceback" in str(answer):
            answers["with a traceback"] += 1
    for fd in fds:
        os.close(fd)
    raw.close()
    return {
        "calls": calls,
        "members": len(targets),
        "mistyped": mistyped,
        "answers": dict(answers),
        "strange": sorted(
            name
            for name in answers
            if name != "answered" and name not in STANDARD
            and (not name.startswith("org.jindisk1.Error.") or name.endswith(".Internal"))
        ),
        "slowest_s": slowest,
    }  # fmt: skip


if __name__ == "__main__":
    print(json.dumps(fuzz(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))
