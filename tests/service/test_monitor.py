"""`jindiskctl monitor` and `status`: what they show, through a restart of the service, and in which form."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

DEADLINE_S = 240


class Reader:
    """JSON lines of a monitor, in a list, until one fits."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process, self.seen = process, []

    def until(self, **wanted: Any) -> dict[str, Any]:
        """The next line whose fields, or those of its data, are these."""
        too_late = threading.Timer(DEADLINE_S, self.process.kill)
        too_late.start()
        try:
            while line := self.process.stdout.readline():
                found = json.loads(line)
                self.seen.append(found)
                if all({**found["data"], **found}.get(name) == value for name, value in wanted.items()):
                    return found
        finally:
            too_late.cancel()
        raise AssertionError((wanted, self.seen))


def test_the_monitor_tells_what_happens_and_survives_a_restart(daemon: Any, rootfs: Any) -> None:
    """A build, a decision, kill -9, the service again, and a decision of afterwards: each once, as a line of JSON."""
    process = daemon.spawn("--json", "monitor")
    try:
        reader = Reader(process)
        up = reader.until(event="service", action="up")
        assert (up["data"]["Deployment"], up["data"]["AllowSimulated"]) == ("embedded", True)
        daemon.ctl("image", "build", "demo", "--rootfs", str(rootfs))
        assert reader.until(event="job", action="added")["data"]["Operation"] == "image-build"
        ended = reader.until(event="job", action="changed", State="succeeded")
        assert "State" in ended["changed"]
        assert any("launch digest" in item["data"]["Line"] for item in reader.seen if item["event"] == "log")
        daemon.ctl("key", "revoke", "demo")
        revoked = reader.until(event="decision", kind="revoked")
        assert daemon.stop(signal.SIGKILL) == -signal.SIGKILL
        reader.until(event="service", action="down")
        daemon.start()
        reader.until(event="service", action="up")
        daemon.ctl("key", "reinstate", "demo")
        row = reader.until(event="decision", kind="reinstated")
        assert (row["action"], row["data"]["number"]) == ("added", revoked["data"]["number"] + 1)
        numbers = [item["data"]["number"] for item in reader.seen if item["event"] == "decision"]
        assert numbers == sorted(set(numbers)), "no row is told twice, and none is missing"
        assert numbers == list(range(numbers[0], numbers[-1] + 1))
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=120)
    assert process.returncode == 130


def test_the_monitor_waits_for_a_service_that_is_not_there(unstarted: Any) -> None:
    """It says so in words where no terminal is, and goes on once the service is there."""
    process = unstarted.spawn("monitor")
    try:
        assert "is down" in process.stdout.readline()
        unstarted.start()
        line = process.stdout.readline()
        assert re.fullmatch(r"\d\d:\d\d:\d\d  jindiskd \S+ is up, broker embedded\n", line)
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=120)


def on_terminal(daemon: Any, *words: str, until: bytes, **environment: str) -> bytes:
    """What jindiskctl prints on a terminal, until these bytes came or it ended."""
    master, slave = pty.openpty()
    variables = {**daemon.environment, "TERM": "xterm-256color", "COLUMNS": "140", "LINES": "40", **environment}
    program = Path(sys.executable).with_name("jindiskctl")
    with subprocess.Popen([program, *words], env=variables, stdin=slave, stdout=slave, stderr=slave) as process:
        os.close(slave)
        out, deadline = b"", time.monotonic() + DEADLINE_S
        try:
            while until not in out and time.monotonic() < deadline:
                try:
                    out += os.read(master, 65536)
                except OSError:  # the other end is closed
                    break
        finally:
            process.send_signal(signal.SIGINT)
            drain = time.monotonic() + DEADLINE_S
            while process.poll() is None and time.monotonic() < drain:
                if select.select([master], [], [], 0.1)[0]:
                    try:
                        os.read(master, 65536)
                    except OSError:
                        break
            os.close(master)
    return out


COLOUR = re.compile(rb"\x1b\[[0-9;]*3[0-7]")


@pytest.mark.parametrize("no_color", [False, True])
def test_on_a_terminal_it_is_a_picture(stock: Any, no_color: bool) -> None:
    """On the other screen, with colours unless NO_COLOR is set; the terminal is left as it was."""
    stock.ctl("key", "revoke", "stock")
    stock.ctl("key", "reinstate", "stock")
    more = {"NO_COLOR": "1"} if no_color else {}
    out = on_terminal(stock, "monitor", until=b"reinstated", **more)
    for words in (b"jindiskd", b"broker embedded", b"DOMAINS", b"JOBS", b"EVENTS", b"they prove nothing"):
        assert words in out, words
    assert b"\x1b[?1049h" in out
    assert bool(COLOUR.search(out)) is not no_color


@pytest.mark.parametrize("no_color", [False, True])
def test_the_status_says_plainly_how_things_are(stock: Any, no_color: bool) -> None:
    """Mode, simulation, key-encryption key, collateral, libvirt, domains and jobs; in colours where they are wanted."""
    more = {"NO_COLOR": "1"} if no_color else {}
    out = on_terminal(stock, "status", until=b"no such thing", **more)
    assert bool(COLOUR.search(out)) is not no_color
    text = stock.ctl("status")
    assert "\x1b" not in text
    for words in (
        "in this service (embedded): this host can read the keys",
        "simulated reports: accepted: they prove nothing",
        "key-encryption key: a file beside the keys",
        "collateral: none: jindiskctl collateral fetch",
        "libvirt: not connected",
        "1 image, 1 of them simulated",
        "jobs: 0 running",
        "warning: the key broker runs in this service",
    ):
        assert words in text, text
    told = stock.json("status")
    assert (told["key_encryption"], told["collateral"], told["collateral_expires"]) == ("file", 0, None)
    assert told["images_simulated"] == 1
