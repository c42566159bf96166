"""The service killed, libvirtd restarted, and secrets looked for, in every state of a launch; the guest is played."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Self

import jsonout
import libvirtd
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from jindiskd.attest.snp_report import parse_report
from jindiskd.base.secret import Secret
from jindiskd.kbs import jwe
from jindiskd.kbs.evidence import snp_from_json
from jindiskd.keys.store import Store

from .conftest import ROOT, Host, virsh

pytestmark = [pytest.mark.host, pytest.mark.slow]
STATES = ("started", "attested", "released", "unlocked", "running")


class Walk:
    """A launch that is led through its states one by one."""

    def __init__(self, host: Host, name: str = "one", *words: str) -> None:
        """`words` are the command that begins it; a launch of the image if there are none."""
        self.host, self.name = host, name
        self.launch = host.spawn(*(words or ("launch", name)))
        self.guest = host.play(name, self.launch)
        self.private = ec.generate_private_key(ec.SECP256R1())
        self.key = b""
        self._cookie = ""

    def to(self, state: str) -> None:
        """Lead it as far as this."""
        for step in STATES[: STATES.index(state) + 1]:
            getattr(self, f"_{step}")()
        self.host.until(lambda: self.host.domain(self.name)["State"] == state, f"state {state}")

    def _started(self) -> None:
        """It is."""

    def _attested(self) -> None:
        self._cookie, nonce = self.guest.session()
        status, answer = self.guest.attest(self.guest.attestation(nonce, self.private), self._cookie)
        assert status == 200, answer

    def _released(self) -> None:
        where = f"/kbs/v0/resource/{self.host.resource(self.name)}"
        status, _, answer = self.guest.ask("GET", where, cookie=self._cookie)
        assert status == 200, answer
        with jwe.open_(answer, self.private) as key:
            self.key = bytes(key.reveal())

    def _unlocked(self) -> None:
        self.guest.say("unlocked")

    def _running(self) -> None:
        self.guest.say("running")
        assert self.launch.wait(120) == 0

    def close(self) -> None:
        self.guest.close()
        if self.launch.poll() is None:
            self.launch.terminate()
        self.launch.communicate(timeout=120)


@pytest.fixture
def walk(bare: Host) -> Iterator[Callable[..., Walk]]:
    """Begins launches; afterwards nothing is left of them."""
    made: list[Walk] = []

    def begin(name: str = "one", *words: str) -> Walk:
        made.append(Walk(bare, name, *words))
        return made[-1]

    yield begin
    for item in made:
        item.close()
    bare.clear()
    bare.until(lambda: not bare.strays(), "the end of all machines")
    assert virsh("list", "--all", "--name").split() == []
    assert list(Path("/run/jindiskd/vsock").iterdir()) == []
    bare.ctl("audit", "verify")


def some(*ordinary: str) -> list[object]:
    """All states; those that are like another are for long runs."""
    return [state if state in ordinary else pytest.param(state, marks=pytest.mark.long) for state in STATES]


@pytest.mark.parametrize("state", some("released", "running"))
def test_the_service_is_killed(bare: Host, walk: Callable[..., Walk], state: str) -> None:
    """A guest that ran runs on and is served; any other is ended and can be launched again; no row, no key is lost."""
    first = walk()
    first.to(state)
    rows = bare.rows()
    bare.kill()
    first.launch.wait(120)
    bare.start()
    bare.until(lambda: bare.json("status")["service"]["LibvirtConnected"], "libvirt")
    bare.until(lambda: bare.domain("one")["State"], "the domain")
    assert bare.rows()[: len(rows)] == rows
    released = [row for row in rows if row["kind"] == "released"]
    assert bool(first.key) == (state in STATES[2:])
    if first.key:
        assert released  # the row of a key that left was there before it
    if state == "running":
        assert bare.domain("one")["State"] == "running"
        # The guest asks again, as one does that was reset: broker and firmware are there for it.
        assert first.guest.fetch(bare.resource("one")) == first.key
        return
    assert bare.domain("one")["State"] == "failed"
    assert "launch it again" in bare.domain("one")["Reason"]
    bare.until(lambda: not bare.strays(), "the end of the machine")
    again = walk()
    again.to("running")
    assert len(again.key) == 32
    if first.key:
        assert again.key == first.key


@pytest.mark.parametrize("state", some("started"))
def test_libvirtd_is_restarted(bare: Host, walk: Callable[..., Walk], state: str) -> None:
    """The launch goes on where it was; afterwards everything can be done as before."""
    launched = walk()
    launched.to(state)
    libvirtd.stop()
    bare.until(lambda: not bare.json("status")["service"]["LibvirtConnected"], "the loss of libvirt")
    refused = bare.ctl("domain", "stop", "one", "--force", "--yes", check=False)
    assert refused.returncode == 69
    assert "libvirtd" in refused.stderr
    libvirtd.start()
    bare.until(lambda: bare.json("status")["service"]["LibvirtConnected"], "libvirt")
    for step in STATES[STATES.index(state) + 1 :]:
        getattr(launched, f"_{step}")()
    bare.until(lambda: bare.domain("one")["State"] == "running", "the running guest")
    bare.ctl("domain", "stop", "one", "--force", "--yes")
    assert bare.domain("one")["State"] == "stopped"


def test_two_launches_of_one_image_at_once(bare: Host, walk: Callable[..., Walk]) -> None:
    """Both are asked for in the same moment: one goes on, the other is busy and disturbs nothing."""
    first = walk()
    other = bare.ctl("launch", "one", "--name", "other", check=False)
    same = bare.ctl("launch", "one", check=False)
    assert (other.returncode, same.returncode) == (6, 6)
    first.to("running")
    assert virsh("list", "--name").split() == ["one"]


def test_an_image_is_not_taken_without_what_a_snapshot_has(
    bare: Host, walk: Callable[..., Walk], tmp_path: Path
) -> None:
    """Neither exported nor cloned nor removed while its guest's disk goes on elsewhere; shown, with the remedy."""
    walk().to("running")
    layer = bare.image("one") / "disk.layer"
    try:
        virsh("snapshot-create-as", "one", "s", "--disk-only", "--diskspec", f"vda,file={layer},snapshot=external")
        bare.ctl("domain", "stop", "one", "--force", "--yes")
        bare.until(lambda: str(layer) in bare.domain("one")["Reason"], "the snapshot")
        for words in (f"export one {tmp_path}/stream", "clone one copy", "remove one --yes"):
            done = bare.ctl("image", *words.split(), check=False)
            assert (done.returncode, "virsh blockcommit one vda" in done.stderr) == (6, True), done.stderr
        assert not (tmp_path / "stream").exists()
    finally:
        virsh("undefine", "one", "--snapshots-metadata")
        layer.unlink(missing_ok=True)
    bare.ctl("image", "export", "one", str(tmp_path / "stream"))


def test_a_name_that_somebody_else_uses(bare: Host) -> None:
    """A domain of that name which is not ours stays as it is."""
    text = "<domain type='qemu'><name>one</name><memory>1024</memory><os><type>hvm</type></os></domain>"
    path = bare.state / "foreign.xml"
    path.write_text(text)
    virsh("define", str(path))
    before = virsh("dumpxml", "one")
    try:
        done = bare.ctl("launch", "one", check=False)
        assert done.returncode == 6
        assert "one" in done.stderr
        assert virsh("dumpxml", "one") == before
    finally:
        virsh("undefine", "one")
        bare.clear()


class Watcher:
    """Sees every command line and environment of the machine while it is open."""

    def __init__(self) -> None:
        self.seen: set[bytes] = set()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._end.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._end.wait(0.01):
            for entry in Path("/proc").iterdir():
                if entry.name.isdigit():
                    for name in ("cmdline", "environ"):
                        with contextlib.suppress(OSError):
                            self.seen.add((entry / name).read_bytes())


def forms(secret: bytes) -> list[bytes]:
    """A secret as it might be written: raw, in hexadecimal, in both kinds of base64, as a list of numbers."""
    encoded = [base64.b64encode(secret), base64.urlsafe_b64encode(secret)]
    numbers = ", ".join(str(octet) for octet in secret).encode()
    # The last characters of base64 depend on what follows.
    return [secret, secret.hex().encode(), secret.hex().upper().encode(), numbers, *(item[:-4] for item in encoded)]


def clear_parts(disk: Path) -> bytes:
    """All of a disk but the data of its root partition."""
    table = subprocess.run(["sfdisk", "--dump", disk], check=True, capture_output=True, text=True).stdout
    root = next(line for line in table.splitlines() if "jindisk-rootfs" in line)
    found = re.search(r"start=\s*(\d+), size=\s*(\d+)", root)
    assert found is not None
    start, end = int(found[1]) * 512, (int(found[1]) + int(found[2])) * 512
    data = disk.read_bytes()
    return data[: start + (16 << 20)] + data[end:]


def test_no_key_is_where_others_can_read(bare: Host, walk: Callable[..., Walk]) -> None:
    """
    The volume's key, the key-encryption key, the broker's private key and the guest's own one are looked for, in five
    notations, in all traffic of the bus, every command line and environment, logs, consoles, XML, libvirt's files, the
    clear parts of the disk, and the state directory but for the two files that hold keys.
    """
    address = "unix:path=/run/dbus/system_bus_socket"
    words = ["dbus-monitor", "--pcap", "--address", address]
    monitor = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    traffic: list[bytes] = []
    assert monitor.stdout is not None
    stream = monitor.stdout
    traffic.append(os.read(stream.fileno(), 1 << 16))  # it watches from here on
    reader = threading.Thread(target=lambda: traffic.append(stream.read()))
    reader.start()
    with Watcher() as watcher:
        bare.build_idle("sought")
        launched = walk("sought")
        launched.to("running")
        for command in (["key", "list"], ["audit", "list"], ["daemon", "config"], ["status"], ["image", "list"]):
            bare.ctl(*command, "--json")
        bare.ctl("domain", "console", "sought")
        xml = virsh("dumpxml", "sought", "--security-info").encode()
        bare.ctl("domain", "stop", "sought", "--force", "--yes")
    monitor.terminate()
    reader.join()
    stream.close()
    monitor.wait()
    bus = b"".join(traffic)
    assert b"BuildImage" in bus
    assert b"Launch" in bus
    assert any(b"jindiskd.image.worker" in line for line in watcher.seen)
    assert any(b"qemu-system" in line for line in watcher.seen)
    kek = (bare.state / "kek").read_bytes()
    broker = serialization.load_pem_private_key((bare.state / "broker.pem").read_bytes(), None)
    assert isinstance(broker, ec.EllipticCurvePrivateKey)
    store = Store.open(f"sqlite:///{bare.state}/keys.db", Secret(kek))
    record = next(item for item in store.images() if item.name == "sought")
    with store.release(record.image_id, peer="test", measurement=b"", simulated=True) as key:
        assert bytes(key.reveal()) == launched.key  # what is looked for is what the guest got
    store.close()
    numbers = [key.private_numbers().private_value for key in (broker, launched.private)]
    secrets = [launched.key, kek, *(number.to_bytes((number.bit_length() + 7) // 8, "big") for number in numbers)]
    places = {"bus": bus, "xml": xml, "disk": clear_parts(bare.image("sought") / "disk.img")}
    places |= {f"process {number}": line for number, line in enumerate(watcher.seen)}
    for directory in (bare.state, "/run/jindiskd", "/run/libvirt", "/var/log", "/var/lib/libvirt"):
        for path in Path(directory).rglob("*"):
            if path.is_file() and path.suffix not in {".img", ".fd"} and path.name not in {"kek", "broker.pem"}:
                places[str(path)] = path.read_bytes()
    assert any("libvirt/qemu" in name for name in places)
    assert any("jindiskd.log" in name for name in places)
    assert any("keys.db" in name for name in places)
    found = [(name, number) for name, data in places.items() for number, secret in enumerate(secrets)
             for form in forms(secret) if form in data]  # fmt: skip
    assert found == []
    assert any(form in (bare.state / "kek").read_bytes() for form in forms(kek))  # the search finds what is there


def test_commands_about_domains_print_what_they_say(bare: Host, walk: Callable[..., Walk], tmp_path: Path) -> None:
    """With --json, each on a real domain: what is printed is held against its schema."""
    for words in (["--json", "launch", "one"], ["--json", "domain", "start", "one"]):
        led = walk("one", *words)
        led.to("running")
        printed = json.loads(led.launch.communicate(timeout=120)[0])
        jsonout.check(words[1:], printed)
        assert printed["domain"] == bare.json("domain", "show", "one")["domain"]
        bare.json("domain", "console", "one")
        assert "<name>one</name>" in bare.json("domain", "xml", "one")["xml"]
        assert bare.json("domain", "stop", "one", "--force", "--yes") == {"stopped": "one"}
    assert bare.json("domain", "undefine", "one", "--yes") == {"undefined": "one"}
    words = [
        "virt-install", "--connect", "qemu:///system", "--name", "other", "--memory", "256", "--virt-type", "qemu",
        "--import", "--osinfo", "generic", "--machine", "q35", "--graphics", "none", "--network", "none",
        "--disk", f"path={bare.image('two') / 'disk.img'},format=raw,bus=virtio", "--print-xml", "--check", "all=off",
    ]  # fmt: skip
    done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=300)
    (tmp_path / "other.xml").write_text(done.stdout)
    virsh("define", str(tmp_path / "other.xml"))
    assert bare.json("domain", "adopt", "other", "two")["domain"]["Image"] == "two"
    assert bare.json("domain", "release", "other", "--yes") == {"released": "other"}
    virsh("undefine", "other")


def test_a_signed_images_guests_report_it(bare: Host, walk: Callable[..., Walk], tmp_path: Path) -> None:
    """Policy, security version and the key's digest, from the build through libvirt to the report that gets the key."""
    key = ec.generate_private_key(ec.SECP384R1())
    (tmp_path / "id.pem").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )  # fmt: skip
    archive = str(bare.state / "root.tar")
    words = ["image", "build", "signed", "--rootfs", archive, "--format", "luks2", "--guest-policy", "single-socket"]
    image = bare.json(*words, "--id-key", str(tmp_path / "id.pem"), "--guest-svn", "3")["image"]
    try:
        led = walk("signed")
        report = snp_from_json(led.guest.evidence(bytes(64)))[0]
        found = parse_report(report)
        assert (found.policy, found.guest_svn, found.id_key_digest.hex()) == (0x130000, 3, image["IdKeyDigest"])
        led.to("running")
        bare.ctl("domain", "stop", "signed", "--force", "--yes")
        bare.ctl("domain", "undefine", "signed", "--yes")
    finally:
        bare.clear()
        bare.ctl("image", "remove", "signed", "--yes", check=False)


def test_a_console_is_followed_to_the_end_of_its_domain(bare: Host, walk: Callable[..., Walk]) -> None:
    """Through another log under its name, as libvirt's logger begins one; ^C ends it before; keys go to the guest."""
    led = walk("one")
    led.to("running")
    log = bare.state / "console" / f"{bare.domain('one')['Uuid']}.log"
    followed, given_up = (bare.spawn("domain", "console", "one", "--follow") for _ in range(2))
    for one in (followed, given_up):
        assert one.stdout.readline()  # what the firmware wrote: it has the old log
    given_up.send_signal(signal.SIGINT)
    assert given_up.wait(120) == 130
    with log.open("ab") as old:
        log.rename(log.with_suffix(".log.0"))
        old.write(b"the old log's last line\n")
    log.write_bytes(b"the new log's first line\n")
    lines = []
    while "the new log's first line\n" not in lines:
        lines.append(followed.stdout.readline())
    assert "the old log's last line\n" in lines
    with subprocess.Popen(
        [ROOT / ".venv/bin/jindiskctl", "domain", "console", "one", "--attach"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as attached:  # fmt: skip
        os.set_blocking(attached.stdout.fileno(), False)

        def answered() -> bool:
            attached.stdin.write(b"\x1b[B")
            attached.stdin.flush()
            assert attached.poll() is None, attached.stderr.read()
            return bool(attached.stdout.read())

        bare.until(answered, "an answer of the firmware's menu", 240)
        busy = bare.ctl("domain", "console", "one", "--attach", check=False)
        assert (busy.returncode, "--force" in busy.stderr) == (6, True)
        bare.ctl("domain", "stop", "one", "--force", "--yes")
        attached.stdin.close()
        assert attached.wait(120) == 0
    assert followed.wait(120) == 0
    followed.communicate()
    given_up.communicate()
    log.with_suffix(".log.0").unlink()
    bare.ctl("domain", "undefine", "one", "--yes")


def test_a_guest_that_waits_for_a_person_says_so(bare: Host, walk: Callable[..., Walk], tmp_path: Path) -> None:
    """In the listing and to whoever launched it, with the command; approved, it goes on by itself."""
    (tmp_path / "policy.toml").write_text("[release]\napproval = true\n")
    bare.ctl("policy", "set", "one", str(tmp_path / "policy.toml"))
    try:
        led = walk("one")
        led.to("attested")
        where = f"/kbs/v0/resource/{bare.resource('one')}"
        assert led.guest.ask("GET", where, cookie=led._cookie)[0] != 200
        bare.until(lambda: bare.json("approval", "list")["approvals"], "the approval")
        (waiting,) = bare.json("approval", "list")["approvals"]
        domain = bare.domain("one")
        assert waiting["Peer"] == f"domain {domain['Uuid']}"
        command = f"jindiskctl approval approve {waiting['Number']}"
        assert (domain["State"], command in domain["Reason"]) == ("attested", True)
        assert bare.json("status")["approvals_waiting"] == 1
        bare.ctl(*command.split()[1:])
        for step in (led._released, led._unlocked, led._running):
            step()
        bare.until(lambda: bare.domain("one")["State"] == "running", "state running")
        assert bare.domain("one")["Reason"] == ""
        assert f"waiting for approval {waiting['Number']}" in led.launch.communicate(timeout=120)[1]
    finally:
        (tmp_path / "policy.toml").write_text("")
        bare.ctl("policy", "set", "one", str(tmp_path / "policy.toml"))
