"""jindisk-broker as a process: administered by its socket and by token, serving real guests over TCP."""

import asyncio
import grp
import json
import os
import socket
import ssl
import subprocess
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from brokerprocess import DIGEST, IMAGE, KEY, RESOURCE, SCRIPTS, BrokerProcess, evidence, fetched, handed
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from jindiskd.base import document
from jindiskd.broker.listener import listen_local
from jindiskd.broker.metrics import Metrics
from jindiskd.broker.metrics_page import MetricsPage
from jindiskd.brokerd import local_users
from jindiskd.kbs.client import BrokerRefused
from jindiskd.keys import handover
from jindiskd.sim.firmware import SimulatedSnpFirmware
from jindiskd.sim.pki import SimulatedRoot

VOLUME = "33333333-3333-4333-8333-333333333333"


@pytest.fixture
def alone(root: SimulatedRoot, tmp_path: Path) -> Iterator[BrokerProcess]:
    """A broker for one test."""
    made = BrokerProcess(tmp_path / "b", root)
    try:
        yield made.start()
    finally:
        made.close()


@pytest.fixture(scope="module")
def running(root: SimulatedRoot, tmp_path_factory: pytest.TempPathFactory) -> Iterator[BrokerProcess]:
    """A broker that tests share, one after the other."""
    made = BrokerProcess(tmp_path_factory.mktemp("broker") / "b", root)
    try:
        yield made.start()
    finally:
        made.close()


@pytest.fixture
def broker(running: BrokerProcess) -> Iterator[BrokerProcess]:
    """The shared broker; what the test registered is removed after it."""
    yield running
    for image in running.json("image", "list")["images"]:
        running.ctl("image", "remove", image["image_id"], "--yes")


@pytest.fixture
def firmware(root: SimulatedRoot) -> SimulatedSnpFirmware:
    return SimulatedSnpFirmware(root, DIGEST)


def test_an_image_is_taken_over_released_revoked_and_reinstated(
    alone: BrokerProcess, firmware: SimulatedSnpFirmware
) -> None:
    """From an empty broker to a guest with its key; revocation counts at once; the log has all of it with names."""
    assert alone.json("status")["images"] == 0
    with pytest.raises(BrokerRefused):
        fetched(alone.client(within_s=10), firmware)
    path = alone.hand_over()
    assert KEY.hex() not in path.read_text()
    shown = alone.ctl("image", "import", str(path))
    assert "simulated" in shown
    assert DIGEST.hex() in shown
    assert fetched(alone.client(), firmware) == KEY
    alone.ctl("key", "revoke", "web")
    with pytest.raises(BrokerRefused) as refused:
        fetched(alone.client(), firmware)
    assert refused.value.kind == "PolicyDeny"
    alone.ctl("key", "reinstate", IMAGE)
    assert fetched(alone.client(), firmware) == KEY
    rows = alone.json("audit", "list")["rows"]
    kinds = [row["kind"] for row in rows]
    assert kinds == ["refused", "registered", "released", "revoked", "refused", "reinstated", "released"]
    assert all(row["peer"].startswith("user root (0)") for row in rows if row["kind"] in {"registered", "revoked"})
    assert all(row["peer"] == "tcp 127.0.0.1" and row["simulated"] for row in rows if row["kind"] == "released")
    assert alone.json("audit", "verify")["rows"] == 7
    assert "jindisk_broker_releases_total" in alone.json("metrics")["metrics"]
    assert "already" in alone.ctl("image", "import", str(path), status=6)
    alone.ctl("image", "remove", "web", "--yes")
    assert alone.json("image", "list")["images"] == []


def test_it_survives_a_restart_and_leaves_no_secret_about(
    alone: BrokerProcess, firmware: SimulatedSnpFirmware
) -> None:
    """State, identity and keys are those of before; key and key-encryption key are in clear nowhere else."""
    card = alone.card
    alone.ctl("image", "import", str(alone.hand_over()))
    assert alone.stop() == 0
    assert not (alone.folder / "run/admin.sock").exists()
    alone.start()
    assert alone.card == card
    assert fetched(alone.client(), firmware) == KEY
    kek = (alone.folder / "state/kek").read_bytes()
    for path in alone.folder.rglob("*"):
        if path.is_file() and path.name != "kek":
            data = path.read_bytes()
            assert KEY not in data, path
            assert KEY.hex().encode() not in data, path
            assert kek not in data, path
        if path.is_file() and path.parent.name == "state":
            assert path.stat().st_mode & 0o077 == 0, path


def test_tokens_reach_as_far_as_their_role(broker: BrokerProcess) -> None:
    """Over TLS with the pinned key; another key is told nothing; a token that was removed counts no more."""
    broker.ctl("image", "import", str(broker.hand_over()))
    there = ["--server", f"127.0.0.1:{broker.ports['admin']}", "--pin", broker.card.spki_sha256.hex()]
    for role in ("read", "approve", "manage"):
        broker.ctl("token", "add", role, "--role", role, "--output", str(broker.folder / role))
    assert (broker.folder / "read").stat().st_mode & 0o777 == 0o600
    reads = [*there, "--token-file", str(broker.folder / "read")]
    manages = [*there, "--token-file", str(broker.folder / "manage")]
    assert json.loads(broker.ctl("image", "list", "--json", *reads, server=False))["images"][0]["name"] == "web"
    assert "role" in broker.ctl("key", "revoke", "web", *reads, server=False, status=5)
    approves = [*there, "--token-file", str(broker.folder / "approve")]
    broker.ctl("key", "revoke", "web", *approves, server=False, status=5)
    broker.ctl("approval", "grant", "77", *approves, server=False, status=3)
    broker.ctl("key", "revoke", "web", *manages, server=False)
    assert broker.json("audit", "list")["rows"][-1]["peer"] == "token manage, tcp 127.0.0.1"
    for local in (["token", "add", "more", "--output", "-"], ["recovery", "set-key", "-"]):
        assert "socket" in broker.ctl(*local, *manages, server=False, status=5)
    wrong = ["--server", there[1], "--pin", "00" * 32, "--token-file", str(broker.folder / "manage")]
    assert "nothing was sent" in broker.ctl("image", "list", *wrong, server=False, status=7)
    broker.ctl("token", "remove", "manage")
    broker.ctl("image", "list", *manages, server=False, status=5)
    tokens = broker.ctl("token", "list", "--json")
    assert (broker.folder / "read").read_text().strip() not in tokens
    assert "jdt_" not in broker.log.read_text()


def test_a_refusal_is_explained_and_another_policy_tried(
    broker: BrokerProcess, root: SimulatedRoot, tmp_path: Path
) -> None:
    """The owner sees every reason, gets the report itself, and learns what a policy would have said of it."""
    broker.ctl("image", "import", str(broker.hand_over()))
    broker.ctl("image", "limits", "web", "--per-hour", "5")
    with pytest.raises(BrokerRefused):
        fetched(broker.client(), SimulatedSnpFirmware(root, bytes(48)))
    said = broker.ctl("audit", "explain", "--image", "web", "--evidence", str(tmp_path / "report"))
    assert "[snp.measurement]" in said
    assert "0" * 96 in said
    assert len((tmp_path / "report").read_bytes()) == 1184
    row = broker.json("audit", "explain")["row"]
    still = broker.json("image", "policy", "web", "--row", str(row), status=None)
    assert [finding["id"] for finding in still["findings"]] == ["snp.measurement"]
    policy = broker.ctl("image", "policy", "web")
    text = policy.replace("# minimum_guest_svn = 0", "minimum_guest_svn = 7").encode()
    worse = json.loads(broker.ctl("image", "policy", "web", "--try", "-", "--json", stdin=text, status=None))
    assert {"snp.measurement"} < {finding["id"] for finding in worse["findings"]}
    assert broker.ctl("image", "policy", "web") == policy
    broker.ctl("audit", "explain", "--row", "999999", status=3)


async def test_other_users_of_the_machine_are_strangers() -> None:
    """Even where the socket's mode lets them in: the kernel tells who they are, and their connection is closed."""

    async def healthy() -> bool:
        return True

    code = """import socket, sys; s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); print("in")
try: s.sendall(b"GET /healthz HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n"); print(s.recv(100))
except OSError: pass"""

    async def as_user(uid: int) -> str:
        words = ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", "/usr/bin/python3", "-c", code, path]
        process = await asyncio.create_subprocess_exec(*words, stdout=subprocess.PIPE)
        return (await process.communicate())[0].decode()

    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        path = f"{folder}/admin.sock"
        page = MetricsPage(Metrics(), healthy)
        listener = await listen_local(page, Path(path), local_users(None), 0o666)
        assert "200 OK" in await as_user(0)
        said = await as_user(65534)
        assert "in" in said
        assert "200" not in said
        await listener.close()
        listener = await listen_local(page, Path(path), local_users(grp.getgrnam("nogroup").gr_gid), 0o666)
        assert "200 OK" in await as_user(65534)
        await listener.close()


def test_limits_policy_and_approval(broker: BrokerProcess, firmware: SimulatedSnpFirmware) -> None:
    """A guest waits until somebody approves it, gets its key as often as allowed, and then no more."""
    broker.ctl("image", "import", str(broker.hand_over()))
    broker.ctl("image", "limits", "web", "--approval", "--per-guest", "1")
    assert "approval = true" in broker.ctl("image", "policy", "web")
    with pytest.raises(BrokerRefused) as waits:
        fetched(broker.client(within_s=3), firmware)
    assert waits.value.kind == "PluginInternalError"
    waiting = broker.json("approval", "list")["approvals"]
    assert [item["granted"] for item in waiting] == [False]
    broker.ctl("approval", "grant", str(waiting[0]["number"]))
    assert fetched(broker.client(), firmware) == KEY
    with pytest.raises(BrokerRefused) as over:
        fetched(broker.client(), firmware)
    assert over.value.kind == "PolicyDeny"
    policy = broker.ctl("image", "policy", "web").replace("approval = true", "approval = false")
    broker.ctl("image", "policy", "web", "--set", "-", stdin=policy.encode())
    broker.ctl("image", "limits", "web", "--per-guest", "0")
    assert fetched(broker.client(), firmware) == KEY
    broker.ctl("image", "policy", "web", "--set", "-", stdin=b"[release]\nnonsense = 1\n", status=2)


def test_several_keys_and_volumes_of_one_image(broker: BrokerProcess, firmware: SimulatedSnpFirmware) -> None:
    """Each key at its resource, each volume with its key; what belongs to another does not go together."""
    data = f"default/{IMAGE}/data"
    both = {RESOURCE: KEY, data: b"d" * 32}
    broker.ctl("image", "import", str(broker.hand_over(keys=both, volumes={VOLUME: data})))
    assert fetched(broker.client(), firmware, data) == b"d" * 32
    broker.ctl("key", "add", "web", "scratch", "--file", "-", stdin=b"s" * 16)
    assert fetched(broker.client(), firmware, f"default/{IMAGE}/scratch") == b"s" * 16
    broker.ctl("volume", "accept-rollback", VOLUME, "--reason", "new", "--yes")
    with broker.client().release("snp", data, VOLUME, evidence(firmware)).key as key:
        assert bytes(key.reveal()) == b"d" * 32
    with pytest.raises(BrokerRefused):
        broker.client().release("snp", RESOURCE, VOLUME, evidence(firmware))
    assert broker.json("audit", "list")["rows"][-1]["detail"]["findings"][0]["id"] == "volume.image"
    broker.ctl("key", "add", "web", "scratch", "--file", "-", stdin=b"x", status=6)
    broker.ctl("key", "add", "web", RESOURCE, "--file", "-", stdin=b"x", status=6)
    broker.ctl("key", "add", "web", "long", "--file", "-", stdin=bytes(4097), status=2)
    broker.ctl("key", "remove", "web", "scratch", "--yes")
    with pytest.raises(BrokerRefused):
        fetched(broker.client(), firmware, f"default/{IMAGE}/scratch")


def test_rotation_replaces_key_and_digest(broker: BrokerProcess, root: SimulatedRoot) -> None:
    """The old measurement gets nothing, the new one the new key; of another image nothing is taken."""
    broker.ctl("image", "import", str(broker.hand_over()))
    other = bytes(48)
    path = broker.hand_over(keys={RESOURCE: b"n" * 32}, launch_digests=(other,))
    broker.ctl("key", "rotate", "web", str(path), "--yes")
    assert fetched(broker.client(), SimulatedSnpFirmware(root, other)) == b"n" * 32
    with pytest.raises(BrokerRefused):
        fetched(broker.client(), SimulatedSnpFirmware(root, DIGEST))
    foreign = broker.hand_over(image_id="22222222-2222-4222-8222-222222222222")
    broker.ctl("key", "rotate", "web", str(foreign), "--yes", status=2)


def test_an_image_that_was_built_again_takes_the_place_of_the_old(
    broker: BrokerProcess, root: SimulatedRoot, firmware: SimulatedSnpFirmware
) -> None:
    """Under its name and policy; the old key is released no more, and is still there."""
    broker.ctl("image", "import", str(broker.hand_over()))
    broker.ctl("image", "limits", "web", "--per-hour", "9")
    new = "22222222-2222-4222-8222-222222222222"
    resource = f"default/{new}/root"
    changes = {"image_id": new, "resource": resource, "keys": {resource: b"n" * 32}, "launch_digests": (bytes(48),)}
    path = str(broker.hand_over(**changes))
    broker.ctl("image", "import", path, status=6)
    broker.ctl("image", "import", path, "--replaces", "none", status=3)
    broker.ctl("image", "import", path, "--replaces", "web")
    assert broker.json("image", "show", "web")["rules"]["releases_per_hour"] == 9
    assert fetched(broker.client(), SimulatedSnpFirmware(root, bytes(48)), resource) == b"n" * 32
    with pytest.raises(BrokerRefused):
        fetched(broker.client(), firmware)
    assert broker.json("image", "show", "web.11111111")["state"] == "revoked"


def test_a_recovery_copy_brings_the_keys_to_a_new_broker(
    broker: BrokerProcess, root: SimulatedRoot, tmp_path: Path, firmware: SimulatedSnpFirmware
) -> None:
    """With the offline key alone, everything of a broker that is lost is there again."""
    broker.ctl("image", "import", str(broker.hand_over()))
    broker.ctl("image", "limits", "web", "--per-hour", "9")
    private = ec.generate_private_key(ec.SECP521R1())
    pem = private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    broker.ctl("recovery", "copy", "--directory", str(tmp_path / "copy"), status=1)
    broker.ctl("recovery", "set-key", "-", stdin=b"nonsense", status=2)
    broker.ctl("recovery", "set-key", "-", stdin=pem)
    broker.ctl("recovery", "copy", "--directory", str(tmp_path / "copy"))
    copy = tmp_path / f"copy/{IMAGE}.json"
    key_file, card_file = tmp_path / "private.pem", tmp_path / "card.json"
    key_file.write_bytes(private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    broker.ctl("key", "extract", str(copy), "--key", str(key_file), "--output", str(tmp_path / "key"), server=False)
    assert (tmp_path / "key").read_bytes() == KEY
    new = BrokerProcess(tmp_path / "new", root).start()
    try:
        new.ctl("card", "--output", str(card_file))
        words = ["key", "reseal", str(copy), "--key", str(key_file), "--to", str(card_file)]
        new.ctl(*words, "--output", str(tmp_path / "again.json"), server=False)
        new.ctl("image", "import", str(copy), status=8)
        new.ctl("image", "import", str(tmp_path / "again.json"))
        assert new.json("image", "show", "web")["rules"]["releases_per_hour"] == 9
        assert fetched(new.client(), firmware) == KEY
        new.ctl("card", "--output", str(card_file))
        new.ctl("key", "export", "web", "--to", str(card_file), "--output", str(tmp_path / "export.json"))
    finally:
        new.close()


def test_a_handover_that_was_altered_is_refused(broker: BrokerProcess) -> None:
    """Another digest, name or platform than was sealed; another recipient; members that do not belong."""
    path = broker.hand_over()
    good = json.loads(path.read_text())
    for member, value in (
        ("launch_digests", ["00" * 48]),
        ("name", "other"),
        ("platform", "snp"),
        ("resource", "a/b/c"),
        ("sealed", good["sealed"].replace("A", "B", 1)),
        ("schema", 2),
        ("surplus", 1),
        ("launch_digests", []),
    ):
        path.write_text(json.dumps({**good, member: value}))
        broker.ctl("image", "import", str(path), status=8)
    stranger = ec.generate_private_key(ec.SECP256R1()).public_key().public_bytes(
        Encoding.PEM, PublicFormat.SubjectPublicKeyInfo
    )
    path.write_bytes(document.dump(handed(handover.recipient_of_pem(stranger))))
    broker.ctl("image", "import", str(path), status=8)
    assert broker.json("image", "list")["images"] == []


def test_the_key_encryption_key_is_rotated(alone: BrokerProcess, firmware: SimulatedSnpFirmware) -> None:
    """All opens with the new one alone, further keys and the broker's own included; the old one is refused."""
    alone.ctl("image", "import", str(alone.hand_over(keys={RESOURCE: KEY, f"default/{IMAGE}/data": b"d"})))
    card = alone.card
    alone.stop()
    new = alone.folder / "new"
    new.write_bytes(os.urandom(32))
    program = [SCRIPTS / "jindisk-broker", "--config", alone.configuration, "--rotate-kek", new]
    new.chmod(0o644)
    assert subprocess.run(program, capture_output=True).returncode == 2
    new.chmod(0o600)
    done = subprocess.run(program, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    alone.begin()
    assert alone.process is not None
    assert alone.process.wait(60) == 8
    assert "restore" in alone.log.read_text()
    new.replace(alone.folder / "state/kek")
    alone.start()
    assert alone.card == card
    assert fetched(alone.client(), firmware) == KEY
    assert fetched(alone.client(), firmware, f"default/{IMAGE}/data") == b"d"


def test_metrics_and_health_by_plain_http(broker: BrokerProcess) -> None:
    """For Prometheus and a load balancer: nothing else is there."""
    base = f"http://127.0.0.1:{broker.ports['metrics']}"
    with urllib.request.urlopen(f"{base}/metrics") as answer:
        text = answer.read().decode()
        assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
    assert "# TYPE jindisk_broker_requests_total counter" in text
    with urllib.request.urlopen(f"{base}/healthz") as answer:
        assert answer.read() == b"ok\n"
    with pytest.raises(urllib.error.HTTPError):
        urllib.request.urlopen(f"{base}/v1/images")


@pytest.mark.parametrize(
    "request_",
    [
        b"GET /v1/images HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer jdt_no\r\nConnection: close\r\n\r\n",
        b"GET /v1/images HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
        b"POST /v1/images HTTP/1.1\r\nHost: x\r\nContent-Length: 999999999\r\n\r\n",
        b"\x16\x03\x01\xff\xff garbage",
        b"GET /kbs/v0/auth HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
    ],
)
def test_strangers_at_the_administrators_port_get_nothing(broker: BrokerProcess, request_: bytes) -> None:
    """With and without TLS; and the broker goes on."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    for wrapped in (True, False):
        stream = socket.create_connection(("127.0.0.1", broker.ports["admin"]), timeout=30)
        with context.wrap_socket(stream) if wrapped else stream as channel:
            channel.sendall(request_)
            answer = channel.recv(4096)
        assert b"200" not in answer.split(b"\r\n")[0]
    assert broker.json("status")["images"] == 0


def test_wrong_settings_are_told_at_once(root: SimulatedRoot, tmp_path: Path) -> None:
    """Status 2, all of them, with the nearest right name."""
    made = BrokerProcess(tmp_path / "b", root, listen={"gests": "x"}, broker={"max_sessions": 0})
    program = [SCRIPTS / "jindisk-broker", "--config", made.configuration, "--check-config"]
    done = subprocess.run(program, capture_output=True, text=True)
    assert done.returncode == 2
    assert "did you mean guests?" in done.stderr
    assert "max_sessions" in done.stderr
    made.close()
    made = BrokerProcess(tmp_path / "c", root, listen={"guests": "no port"})
    program[2] = made.configuration
    done = subprocess.run(program, capture_output=True, text=True)
    assert (done.returncode, "host:port" in done.stderr) == (2, True)
    made.close()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        where = f"127.0.0.1:{taken.getsockname()[1]}"
        for number, (section, settings, word) in enumerate(
            (("listen", {"admin": where}, "listen.admin"), ("admin", {"group": "nobodys-group"}, "no such group"))
        ):
            made = BrokerProcess(tmp_path / f"d{number}", root, **{section: settings})
            made.begin()
            assert made.process is not None
            assert made.process.wait(60) == 2
            assert word in made.log.read_text()
            made.close()
