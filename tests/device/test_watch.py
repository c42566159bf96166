"""The monitor against a real udevd, in namespaces of its own: events, their loss, and what is there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import devicevolumes
import pytest

from jindiskd.device import probe

ROOT = Path(__file__).resolve().parents[2]
UDEVD = Path("/lib/systemd/systemd-udevd")
START = """
set -e
mkdir -p /run/udev /dev/disk
mount -t tmpfs tmpfs /run/udev
mount -t tmpfs tmpfs /dev/disk
mkdir /run/udev/rules.d
sed 's,@LIBEXEC@,{bin},' {root}/udev/62-jindisk.rules >/run/udev/rules.d/62-jindisk.rules
{udevd} --daemon >/dev/null 2>&1
exec {python} -c '{scene}' {node}
"""
SCENE = """
import asyncio, json, os, subprocess, sys, time
from pathlib import Path
from jindiskd.device.watch import BlockWatch

event, limit = Path("/sys/class/block", os.path.basename(sys.argv[1]), "uevent"), time.monotonic() + 240
heard, found = [], {}

async def until(condition):
    while not condition():
        assert time.monotonic() < limit, found
        await asyncio.sleep(0.05)

async def scene():
    watch = BlockWatch(lambda: heard.append(1), buffer_bytes=4096)
    watch.start()
    found["before any event"] = len(watch.look())
    event.write_text("change")
    await until(lambda: len(watch.look()) == 1)
    found["seen"] = [[item.node, item.kind, item.uuid, item.label, item.volume_bytes] for item in watch.look()]
    for _ in range(30):  # while the loop does not run; the socket holds fewer than ten
        event.write_text("change")
    subprocess.run(["udevadm", "settle", "--timeout=200"], check=True)
    await until(lambda: watch.overruns)
    await asyncio.sleep(1)
    found["overruns"], found["after"] = watch.overruns, len(watch.look())
    before = len(heard)
    event.write_text("change")
    await until(lambda: len(heard) > before)
    found["heard again"] = True
    watch.stop()

asyncio.run(scene())
print(json.dumps(found))
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root for namespaces and loop devices")
@pytest.mark.skipif(not UDEVD.exists(), reason="systemd-udevd is not installed; run scripts/setup")
def test_lost_events_lead_to_another_look(tmp_path):
    """A socket whose events the kernel dropped is replaced, and everything looked at again."""
    file = devicevolumes.make_jindisk2(tmp_path / "disk", 16 << 20)
    done = subprocess.run(["losetup", "-f", "--show", file], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no loop device: {done.stderr.strip()}")
    node = done.stdout.strip()
    script = tmp_path / "start"
    values = {"bin": ROOT / ".venv/bin", "python": sys.executable, "udevd": UDEVD, "root": ROOT, "scene": SCENE}
    script.write_text(START.format(node=node, **values))
    words = ["unshare", "--mount", "--propagation", "private", "--net", "--pid", "--fork", "--kill-child",
             "--mount-proc", "sh", script]  # fmt: skip
    try:
        out = subprocess.run(words, capture_output=True, text=True, timeout=500, check=False)
    finally:
        subprocess.run(["losetup", "-d", node], check=True)
    assert out.returncode == 0, out.stderr
    found = json.loads(out.stdout.splitlines()[-1])
    assert found["before any event"] == 0
    assert found["seen"] == [[node, probe.JINDISK2, devicevolumes.UUID, devicevolumes.LABEL, 16 << 20]]
    assert found["overruns"] >= 1
    assert found["after"] == 1
    assert found["heard again"]
