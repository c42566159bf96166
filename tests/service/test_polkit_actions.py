"""Every action of the policy file, asked of the real polkit by ordinary users: denied to those whom nobody gave it, and
allowed, alone, to whom a rule gives it.

There is a user for each action, whom the administrator allows that one. What there is to ask about is all there: an
image, its key and policy, a guest, a guest that waits for approval, a block device, a job.
"""

from __future__ import annotations

import json
import os
import pwd
import queue
import subprocess
import sys
import threading
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import rawbus
from devicehost import ROOT, UDEVD, DeviceHost, root_of
from ownguest import image_of, played
from polkitbus import NOBODY, POLICY, POLKITD, SERVICE, ctl, polkitd

pytestmark = [
    pytest.mark.skipif(
        os.environ.get("JD_TESTENV") != "1", reason="needs a libvirtd of its own; run in scripts/testenv"
    ),
    pytest.mark.skipif(not POLKITD.exists(), reason="polkitd is not installed; run scripts/setup"),
    pytest.mark.skipif(not UDEVD.exists(), reason="systemd-udevd is not installed; run scripts/setup"),
]

UUID = "77777777-7777-4777-8777-777777777777"
DEADLINE_S = 240
DENIED, EXIT_DENIED = "org.freedesktop.DBus.Error.InteractiveAuthorizationRequired", 5
ACTIONS = [action.attrib["id"] for action in ET.parse(POLICY).getroot().iter("action")]
USERS = [one for one in pwd.getpwall() if 0 < one.pw_uid < 1000 and one.pw_uid != SERVICE]
IMPLIED = {
    action.attrib["id"]: {
        implied
        for note in action.iter("annotate")
        if note.attrib["key"] == "org.freedesktop.policykit.imply"
        for implied in (note.text or "").split()
    }
    for action in ET.parse(POLICY).getroot().iter("action")
}
RULE = "var given = GIVEN; if (given[subject.user] == action.id) return polkit.Result.YES;"
DOMAIN = f"""<domain type='qemu'>
  <name>guest</name><uuid>{UUID}</uuid><memory>65536</memory><os><type arch='x86_64' machine='q35'>hvm</type></os>
</domain>
"""
# Run as somebody else: names of the errors that calls are answered with.
ASK = """
import json, sys
sys.path.insert(0, {support!r})
import rawbus
bus = rawbus.RawBus({address!r})
print(json.dumps([bus.call(*words, path=path)[0] for path, *words in json.load(sys.stdin)]))
"""
DONE, DONE_OR_OVER, UNABLE = {0}, {0, 4}, {1, 2, 3, 4, 6, 7, 69, 75}
EMPTY = {"s": "x", "a{sv}": {}, "b": 0, "u": 0, "t": 0, "as": [], "h": 0}
"""An argument of each type. The right is asked before any is looked at."""


def methods() -> Iterator[tuple[str, str, str, tuple[str, ...]]]:
    """Interface, method, action and types of the arguments, of each method that needs an action."""
    for file in sorted((ROOT / "dbus").glob("*.xml")):
        for interface in ET.parse(file).getroot().iter("interface"):
            for method in interface.iter("method"):
                notes = {note.attrib["name"]: note.attrib["value"] for note in method.iter("annotation")}
                action = notes.get("org.jindisk1.Action") or notes.get("org.jindisk1.ActionUnlessOwner")
                types = tuple(arg.attrib["type"] for arg in method.iter("arg") if arg.attrib["direction"] == "in")
                if action:
                    yield interface.attrib["name"], method.attrib["name"], action, types


@dataclass
class Everything:
    """The service with one of each."""

    daemon: Any
    node: str
    approval: int
    key: queue.SimpleQueue[bytes]
    paths: dict[str, str]
    """An object of each interface."""

    def ask(self, uid: int, without: Collection[str] = ()) -> dict[tuple[str, str], str]:
        """Call each method, by a user, but those of some actions; returns the errors' names by interface and method.

        Methods that take descriptors are not called, which a message of this kind has none of.
        """
        calls, names = [], []
        for interface, method, action, types in methods():
            if action not in without and "h" not in types:
                body = [EMPTY[kind] for kind in types]
                calls.append((self.paths[interface], interface, method, "".join(types), body))
                names.append((interface, method))
        script = ASK.format(support=str(ROOT / "tests/support"), address=self.daemon.address)
        words = ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", sys.executable, "-c", script]
        done = subprocess.run(
            words, input=json.dumps(calls), capture_output=True, text=True, timeout=DEADLINE_S, check=False
        )
        assert done.returncode == 0, done.stderr + self.daemon.log.read_text()[-3000:]
        return dict(zip(names, json.loads(done.stdout), strict=True))


def until(look: Callable[[], Any], what: str, log: Path) -> Any:
    """What `look` finds, once that is something."""
    end = time.monotonic() + DEADLINE_S
    while not (found := look()):
        assert time.monotonic() < end, f"{what} did not come:\n{log.read_text()[-3000:]}"
        time.sleep(0.1)
    return found


@pytest.fixture
def everything(unstarted: Any, private_bus: str, rootfs: Path, tmp_path: Path) -> Iterator[Everything]:
    """The service, and one of each that its actions are about."""
    daemon = unstarted
    daemon.configuration.write_text(daemon.configuration.read_text().replace("test:///none", "qemu:///system"))
    subprocess.run(["virsh", "-c", "qemu:///system", "define", "/dev/stdin"], input=DOMAIN, text=True, check=True)
    bindings = daemon.state / "domains"
    bindings.mkdir()
    binding = {"image": "stock", "image_id": UUID, "platform": "simulated-snp"}
    (bindings / f"{UUID}.json").write_text(json.dumps(binding))
    rules = {user.pw_name: action for user, action in zip(USERS, ACTIONS, strict=False)}
    assert len(rules) == len(ACTIONS), "there are more actions than users"
    with polkitd(daemon, private_bus, RULE.replace("GIVEN", json.dumps(rules))):
        host = DeviceHost(daemon)
        try:
            host.start()
            daemon.ctl("image", "build", "stock", "--rootfs", str(rootfs), "--vcpus", "1", "--format", "luks2")
            (tmp_path / "policy").write_text("[release]\napproval = true\n")
            daemon.ctl("policy", "set", "stock", str(tmp_path / "policy"))
            disk = daemon.state / "images/stock/disk.img"
            offset, size = root_of(disk)
            node = host.plug(disk, offset=offset, size=size)
            manifest, _ = image_of(daemon, "stock")
            digest = bytes.fromhex(manifest["launch_digest"])
            key: queue.SimpleQueue[bytes] = queue.SimpleQueue()

            def ask() -> None:
                key.put(played(daemon, manifest["image_id"], digest, tmp_path, description="a guest"))

            threading.Thread(target=ask, daemon=True).start()

            def objects() -> dict[str, str]:
                daemon.ctl("key", "reinstate", "stock")  # it looks again
                raw = rawbus.RawBus(daemon.address)
                _, (there,) = raw.call("org.freedesktop.DBus.ObjectManager", "GetManagedObjects")
                raw.close()
                found = {name: path for path, interfaces in there.items() for name in interfaces}
                found["org.jindisk1.Manager"] = "/org/jindisk1"
                return found if {name for name, *_ in methods()} <= set(found) else {}

            paths = until(objects, "an object of each kind", daemon.log)
            number = daemon.json("approval", "list")["approvals"][0]["Number"]
            yield Everything(daemon, node, number, key, paths)
        finally:
            ctl(daemon, "key", "revoke", "stock", uid=0)  # so that the guest does not go on asking
            host.close()
            daemon.close()
            subprocess.run(["virsh", "-c", "qemu:///system", "undefine", "guest"], capture_output=True, check=False)


def commands(there: Everything, scratch: Path, archive: Path) -> Mapping[str, tuple[set[int], tuple[str, ...]]]:
    """For each action, in the order in which they are tried, a command that needs it and no other, and what its status
    may be where a rule allows it: not every host can do all of them, and says so after the right was asked."""
    policy = scratch / "policy.toml"
    policy.write_text("")
    for path in (scratch, policy, archive):
        path.chmod(0o755)
    return {
        "org.jindisk1.inspect": (DONE, ("audit", "list")),
        "org.jindisk1.approve-release": (DONE, ("approval", "approve", str(there.approval))),
        "org.jindisk1.manage-policy": (DONE, ("policy", "set", "stock", str(policy))),
        "org.jindisk1.attach-console": (UNABLE, ("domain", "console", "guest", "--attach")),
        "org.jindisk1.adopt-domain": (UNABLE, ("domain", "adopt", "nothing", "stock")),
        "org.jindisk1.launch-domain": (DONE, ("domain", "undefine", "guest", "--yes")),
        "org.jindisk1.open-device": (DONE | UNABLE, ("device", "open", there.node)),
        "org.jindisk1.close-device": (DONE | UNABLE, ("device", "close", there.node)),
        "org.jindisk1.manage-keys": (DONE, ("key", "reinstate", "stock")),
        "org.jindisk1.build-image": (DONE, ("image", "build", "another", "--rootfs", str(archive), "--no-wait")),
        "org.jindisk1.cancel-others-jobs": (DONE_OR_OVER, ("job", "cancel", "{job}")),
        "org.jindisk1.manage-images": (DONE, ("image", "remove", "stock", "--yes")),
    }


def test_every_action(everything: Everything, rootfs: Path) -> None:
    """Asked for what it is about, and for nothing else."""
    daemon = everything.daemon
    assert {action for _, _, action, _ in methods()} == set(ACTIONS)
    archive = daemon.folder / "root.tar"
    archive.write_bytes(rootfs.read_bytes())
    scratch = daemon.folder / "scratch"
    scratch.mkdir()
    cases = commands(everything, scratch, archive)
    assert set(cases) == set(ACTIONS), "each action has a command here"

    assert set(everything.ask(NOBODY).values()) == {DENIED}
    for user, action in zip(USERS, ACTIONS, strict=False):
        others = everything.ask(user.pw_uid, {action} | IMPLIED[action])
        assert set(others.values()) == {DENIED}, (action, others)

    answered = {action for _, _, action, types in methods() if "h" not in types}
    for action, (fits, words) in cases.items():
        if words[:2] == ("image", "remove"):  # which the guest would be refused for, if it came to ask after that
            assert len(everything.key.get(timeout=DEADLINE_S)) == 32
        job = max(item["Id"] for item in daemon.json("job", "list")["jobs"]) if "{job}" in words else 0
        words = tuple(word.format(job=job) for word in words)
        if action not in answered:
            code, text = ctl(daemon, *words)
            assert (code, f"{action} needs authentication" in text) == (EXIT_DENIED, True), (words, code, text)
        code, text = ctl(daemon, *words, uid=USERS[ACTIONS.index(action)].pw_uid)
        assert code in fits, (words, code, text)
        if job:  # which is that user's who built an image: one's own needs no right
            code, text = ctl(daemon, *words, uid=USERS[ACTIONS.index("org.jindisk1.build-image")].pw_uid)
            assert code in fits, (words, code, text)
