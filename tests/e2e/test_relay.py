"""A Debian guest boots through the relay with a key from its owner's broker, of which the host sees nothing."""

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "broker"))
from brokerprocess import BrokerProcess

from jindiskd.sim.pki import SimulatedRoot

from .conftest import BASE, TOOLS, Host

pytestmark = [pytest.mark.guest, pytest.mark.host, pytest.mark.slow]
STATE = Path("/var/lib/jindiskd-e2e-relay")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Host, BrokerProcess]]:
    """A host that relays, an owner's broker, and an image of the owner's."""
    if os.environ.get("JD_TESTENV") != "1":
        pytest.skip("this needs a throw-away host: run it by scripts/testenv")
    for needed in (TOOLS / "bin/vhost-device-vsock", BASE):
        if not needed.exists():
            pytest.skip(f"{needed.name} is not there: scripts/setup and scripts/make-base-image make it")
    shutil.rmtree(STATE, ignore_errors=True)
    made = Host(STATE)
    owner = BrokerProcess(
        tmp_path_factory.mktemp("owner") / "b", SimulatedRoot.load_or_create(STATE / "simulated-root")
    )
    try:
        owner.start()
        owner.ctl("card", "--output", str(STATE / "card.json"))
        configuration = STATE / "jindiskd.toml"
        text = configuration.read_text().replace("[broker]", '[broker]\ndeployment = "relay"')
        port = owner.ports["guests"]
        configuration.write_text(f'{text}\n[relay]\nbroker = "127.0.0.1:{port}"\ncard = "{STATE}/card.json"\n')
        made.start()
        made.ctl("image", "build", "web", "--base", str(BASE))
        made.ctl("key", "export", "web", "--output", str(STATE / "web.json"))
        owner.ctl("image", "import", str(STATE / "web.json"))
        yield made, owner
    finally:
        for domain in made.json("domain", "list")["domains"]:
            made.ctl("domain", "stop", domain["Name"], "--force", "--yes", check=False)
            made.ctl("domain", "undefine", domain["Name"], "--yes", check=False)
        made.stop()
        owner.close()
        shutil.rmtree(STATE, ignore_errors=True)


@pytest.fixture(autouse=True)
def _off_afterwards(place: tuple[Host, BrokerProcess]) -> Iterator[None]:
    """Each test leaves the domain off."""
    yield
    place[0].ctl("domain", "stop", "web", "--force", "--yes", check=False)


def test_a_guest_boots_through_the_relay(place: tuple[Host, BrokerProcess]) -> None:
    """All states are gone through; the owner's log has the release; the host's files have no broker."""
    host, owner = place
    done = host.ctl("launch", "web")
    # What follows within a moment is told as one: `attested` and `released` do, since the guest says both at once.
    said = [line for line in done.stderr.split("\n") if line in {"started", "attested", "released", "running"}]
    assert said[-2:] == ["released", "running"]
    assert "witness: / is" in host.wait_console("web", "witness: done", within_s=400)
    rows = owner.json("audit", "list")["rows"]
    assert "released" in [row["kind"] for row in rows]
    domain = host.json("domain", "show", "web")["domain"]
    assert (domain["State"], domain["RelayReason"]) == ("running", "")
    assert domain["RelayState"] in {"idle", "open"}
    assert "127.0.0.1" in host.ctl("status").stdout
    assert {path.name for path in STATE.iterdir()} & {"kek", "keys.db", "broker.pem"} == set()


def test_what_the_owner_refuses_is_told_and_what_is_away_too(place: tuple[Host, BrokerProcess]) -> None:
    """A revoked key is a refusal, status 7; a broker that is away is none, and is named on the bus."""
    host, owner = place
    owner.ctl("key", "revoke", "web")
    done = host.ctl("launch", "web", check=False)
    assert done.returncode == 7, done.stderr
    assert "E33" in done.stderr
    assert host.json("domain", "show", "web")["domain"]["State"] == "refused"
    assert owner.json("audit", "list")["rows"][-1]["detail"]["findings"][0]["id"] == "key.state"
    owner.ctl("key", "reinstate", "web")
    port = owner.ports["guests"]
    owner.stop()
    done = host.ctl("launch", "web", "--timeout", "90", check=False)
    assert done.returncode == 1, done.stderr
    domain = host.json("domain", "show", "web")["domain"]
    assert domain["State"] == "failed"
    assert f"127.0.0.1:{port}" in host.log.read_text()
