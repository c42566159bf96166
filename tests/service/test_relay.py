"""jindiskd as a relay, and jindisk-broker at the owner's, as real processes: keys are handed over and not kept."""

import asyncio
import json
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "broker"))
from brokerprocess import BrokerProcess, evidence, fetched

from jindiskd.base.endpoint import Endpoint
from jindiskd.broker.relay import Relay
from jindiskd.kbs.client import BrokerNotTrusted, BrokerRefused, KbsClient
from jindiskd.sim.firmware import SimulatedSnpFirmware
from jindiskd.sim.pki import SimulatedRoot


@pytest.fixture
def owner(unstarted: Any, tmp_path: Path) -> Iterator[BrokerProcess]:
    """The owner's broker, and the service configured as a relay to it."""
    root = SimulatedRoot.load_or_create(unstarted.state / "simulated-root")
    made = BrokerProcess(tmp_path / "owner", root)
    try:
        made.start()
        made.ctl("card", "--output", str(unstarted.folder / "card.json"))
        configuration = unstarted.configuration.read_text().replace("[broker]", '[broker]\ndeployment = "relay"')
        relay = f'[relay]\nbroker = "127.0.0.1:{made.ports["guests"]}"\ncard = "{unstarted.folder}/card.json"\n'
        unstarted.configuration.write_text(configuration + relay)
        yield made
    finally:
        made.close()


def build(daemon: Any, rootfs: Path, name: str, format_: str) -> dict[str, Any]:
    daemon.ctl("image", "build", name, "--rootfs", str(rootfs), "--format", format_)
    found: dict[str, Any] = daemon.json("image", "show", name)["image"]
    return found


async def through_relay(owner: BrokerProcess, folder: Path, ask: Any) -> Any:
    """What `ask(client)` returns for a guest that reaches the owner's broker through our relay."""
    relay = Relay(Endpoint(host="127.0.0.1", port=owner.ports["guests"]))
    listener = await relay.open(folder / "guest", "aaaaaaaa-aaaa-4aaa-8aaa-aaaaaaaaaaaa")

    def connect() -> socket.socket:
        stream = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        stream.settimeout(10)
        stream.connect(str(folder / "guest"))
        return stream

    client = KbsClient(connect, spki_sha256=owner.card.spki_sha256, deadline=time.monotonic() + 60)
    try:
        return await asyncio.to_thread(ask, client)
    finally:
        await listener.close()


def test_an_image_built_by_the_relay_is_released_by_the_owner_alone(
    unstarted: Any, owner: BrokerProcess, rootfs: Path, tmp_path: Path
) -> None:
    """Built, handed over, taken over, fetched through the relay; the host keeps neither key nor broker."""
    daemon = unstarted
    daemon.start()
    image = build(daemon, rootfs, "web", "luks2")
    assert image["State"] == "sealed"
    assert owner.card.spki_sha256.hex() in (daemon.state / "images/web/manifest.json").read_text()
    daemon.ctl("key", "export", "web", "--output", str(tmp_path / "web.json"))
    assert (tmp_path / "web.json").stat().st_mode & 0o777 == 0o600
    shown = owner.ctl("image", "import", str(tmp_path / "web.json"))
    assert image["LaunchDigest"] in shown
    root = SimulatedRoot.load_or_create(daemon.state / "simulated-root")
    firmware = SimulatedSnpFirmware(root, bytes.fromhex(image["LaunchDigest"]))
    resource = f"default/{image['ImageId']}/root"
    key = asyncio.run(through_relay(owner, tmp_path, lambda client: fetched(client, firmware, resource)))
    assert len(key) == 32
    for path in [*daemon.state.rglob("*"), daemon.log, tmp_path / "web.json"]:
        if path.is_file() and path.name != "disk.img":
            data = path.read_bytes()
            assert key not in data, path
            assert key.hex().encode() not in data, path
    assert {path.name for path in daemon.state.iterdir()} & {"kek", "keys.db", "broker.pem"} == set()
    status = daemon.ctl("status")
    assert f"127.0.0.1:{owner.ports['guests']}" in status
    assert "in this host's memory" in status
    assert daemon.json("key", "list")["keys"][0]["state"] == "sealed"
    for words in (
        ("key", "revoke", "web"),
        ("audit", "list"),
        ("audit", "verify"),
        ("policy", "show", "web"),
        ("key", "export", "web", "--output", "-", "--to", str(daemon.folder / "card.json")),
    ):
        said = daemon.ctl(*words, status=2 if "--to" in words else 1)
        assert "broker" in said, words
    daemon.ctl("image", "remove", "web", "--yes")
    assert list((daemon.state / "handover").iterdir()) == []


def test_a_jindisk_image_takes_its_first_state_along(
    unstarted: Any, owner: BrokerProcess, rootfs: Path, tmp_path: Path
) -> None:
    """The owner's broker remembers the volume as its builder closed it: another state is not adopted."""
    daemon = unstarted
    daemon.start()
    image = build(daemon, rootfs, "disk", "jindisk")
    daemon.ctl("key", "export", "disk", "--output", str(tmp_path / "disk.json"))
    owner.ctl("image", "import", str(tmp_path / "disk.json"))
    volume = owner.json("image", "show", "disk")["volumes"][0]
    assert (volume["open"], volume["accept_any"]) == (False, False)
    firmware = SimulatedSnpFirmware(
        SimulatedRoot.load_or_create(daemon.state / "simulated-root"), bytes.fromhex(image["LaunchDigest"])
    )
    resource = f"default/{image['ImageId']}/root"

    def ask(client: KbsClient) -> int:
        grant = client.release("snp", resource, volume["volume"], evidence(firmware))
        with grant.key:
            assert grant.anchor is not None
            client.adopt(volume["volume"], grant.session, grant.anchor.sequence, grant.anchor.root)
            client.close(volume["volume"], grant.session, grant.anchor.sequence + 1, bytes(32))
            return grant.anchor.sequence

    sequence = asyncio.run(through_relay(owner, tmp_path, ask))
    assert owner.json("image", "show", "disk")["volumes"][0]["sequence"] == sequence + 1


def test_a_volume_comes_and_goes_on_a_host_that_relays(
    unstarted: Any, owner: BrokerProcess, rootfs: Path, tmp_path: Path
) -> None:
    """The change waits for the owner; then the new digest alone gets all keys; no old or altered document counts."""
    daemon = unstarted
    daemon.start()
    before = build(daemon, rootfs, "web", "jindisk")
    export = ("key", "export", "web", "--output", str(tmp_path / "web.json"))
    daemon.ctl(*export)
    built = (tmp_path / "web.json").read_text()
    owner.ctl("image", "import", str(tmp_path / "web.json"))
    assert "choose the root's format" in daemon.ctl("image", "volume", "add", "web", "data:16M:luks2", status=1)
    with daemon.spawn("image", "volume", "add", "web", "data:16M:/srv/data") as process:
        _, heard = process.communicate(timeout=600)
    assert process.returncode == 0, heard
    after = daemon.json("image", "show", "web")["image"]
    assert f"and to {before['LaunchDigest']} until then" in heard
    assert "jindiskctl broker image import FILE" in heard
    daemon.ctl(*export)
    bundle = json.loads((tmp_path / "web.json").read_text())["handovers"]
    assert bundle[0] == json.loads(built)
    root = SimulatedRoot.load_or_create(daemon.state / "simulated-root")
    firmware = {
        name: SimulatedSnpFirmware(root, bytes.fromhex(one["LaunchDigest"]))
        for name, one in (("before", before), ("after", after))
    }
    resource = f"default/{before['ImageId']}/data"

    def release(which: str, wanted: str, volume: str) -> bool:
        def ask(client: KbsClient) -> bool:
            client.release("snp", wanted, volume, evidence(firmware[which])).key.close()
            return True

        return bool(asyncio.run(through_relay(owner, tmp_path, ask)))

    (new,) = (one for one in after["Volumes"] if one["name"] == "data")
    root_volume = owner.json("image", "show", "web")["volumes"][0]["volume"]
    root_key = f"default/{before['ImageId']}/root"
    with pytest.raises(BrokerRefused):
        release("after", root_key, root_volume)
    assert release("before", root_key, root_volume), "until the owner agrees all is as it was"
    file = tmp_path / "change.json"

    def refused(part: dict[str, Any], status: int, word: str, *words: str) -> None:
        file.write_text(json.dumps(part))
        assert word in owner.ctl("image", "import", str(file), *words, status=status)

    change = bundle[1]
    assert change["amends"] == {"before": [before["LaunchDigest"]], "added": resource, "removed": ""}
    refused(change, 2, "--yes")
    altered = {**change, "launch_digests": ["00" * 48]}
    refused(altered, 8, "altered after it was sealed", "--yes")
    refused({**change, "sealed": json.loads(built)["sealed"]}, 8, "altered", "--yes")
    refused({**change, "rules": "x"}, 8, "the rules are the owner's", "--yes")
    both = {**change["amends"], "removed": root_key}
    refused({**change, "amends": both}, 8, "neither adds nor removes one volume", "--yes")
    refused({**change, "image_id": "1" * 8}, 8, "altered", "--yes")
    refused(change, 2, "replaces no image", "--yes", "--replaces", "web")
    shown = json.loads(owner.ctl("image", "import", str(tmp_path / "web.json"), "--yes", "--json"))
    assert shown["launch_digests"] == [after["LaunchDigest"]]
    assert owner.json("audit", "list")["rows"][-1]["kind"] == "volumes changed"
    with pytest.raises(BrokerRefused):
        release("before", root_key, root_volume)
    with pytest.raises(BrokerRefused):
        release("before", resource, new["uuid"])
    assert release("after", root_key, root_volume)
    assert release("after", resource, new["uuid"])
    refused(change, 4, "taken over before", "--yes")
    daemon.ctl("image", "volume", "remove", "web", "data", "--yes")
    daemon.ctl(*export)
    shown = json.loads(owner.ctl("image", "import", str(tmp_path / "web.json"), "--yes", "--json"))
    last = daemon.json("image", "show", "web")["image"]
    assert shown["launch_digests"] == [last["LaunchDigest"]]
    assert [volume["volume"] for volume in shown["volumes"]] == [root_volume]
    refused(change, 4, "taken over before", "--yes")
    with pytest.raises(BrokerRefused):
        release("after", root_key, root_volume)
    daemon.ctl("image", "remove", "web", "--yes")
    assert list((daemon.state / "handover").iterdir()) == []


def test_a_broker_that_is_not_the_owners_is_not_spoken_to(
    unstarted: Any, owner: BrokerProcess, tmp_path: Path
) -> None:
    """Whatever the host's configuration passes guests on to: the pin is in the guest."""
    other = BrokerProcess(tmp_path / "other", SimulatedRoot.load_or_create(unstarted.state / "simulated-root"))
    try:
        other.start()
        client = other.client(pin=owner.card.spki_sha256)
        firmware = SimulatedSnpFirmware(SimulatedRoot.load_or_create(unstarted.state / "simulated-root"), bytes(48))
        with pytest.raises(BrokerNotTrusted):
            fetched(client, firmware)
    finally:
        other.close()


def test_keys_of_an_embedded_broker_are_handed_on(
    daemon: Any, rootfs: Path, tmp_path: Path
) -> None:
    """To the broker of a card alone, with a row in the log that says so; not to nobody."""
    root = SimulatedRoot.load_or_create(daemon.state / "simulated-root")
    owner = BrokerProcess(tmp_path / "owner", root)
    try:
        owner.start()
        owner.ctl("card", "--output", str(tmp_path / "card.json"))
        image = build(daemon, rootfs, "web", "luks2")
        assert "--to" in daemon.ctl("key", "export", "web", "--output", str(tmp_path / "web.json"), status=2)
        words = ["--to", str(tmp_path / "card.json"), "--output", str(tmp_path / "web.json")]
        daemon.ctl("key", "export", "web", *words)
        assert daemon.json("audit", "list")["rows"][-1]["kind"] == "exported"
        owner.ctl("image", "import", str(tmp_path / "web.json"))
        firmware = SimulatedSnpFirmware(root, bytes.fromhex(image["LaunchDigest"]))
        assert len(fetched(owner.client(), firmware, f"default/{image['ImageId']}/root")) == 32
    finally:
        owner.close()


@pytest.mark.parametrize(
    ("relay", "word"),
    [
        ("", "relay.broker"),
        ('[relay]\nbroker = "nowhere"\n', "host:port"),
        ('[relay]\nbroker = "h:1"\n', "relay.card"),
        ('[relay]\nbroker = "h:1"\ncard = "/nonexistent"\n', "cannot be read"),
    ],
)
def test_a_relay_without_a_broker_does_not_start(unstarted: Any, relay: str, word: str) -> None:
    """Status 2, and which setting it is."""
    text = unstarted.configuration.read_text().replace("[broker]", '[broker]\ndeployment = "relay"')
    unstarted.configuration.write_text(text + relay)
    unstarted.start(wait=False)
    assert unstarted.process.wait(60) == 2
    assert word in unstarted.log.read_text()
