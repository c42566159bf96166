"""A Debian guest boots through the relay with a key from its owner's broker, of which the host sees nothing."""

import time
from collections.abc import Iterator

import pytest

from .conftest import BASE, TOOLS, BrokerProcess, Host, needed, placed, relaying

pytestmark = [pytest.mark.guest, pytest.mark.host, pytest.mark.slow]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Host, BrokerProcess]]:
    """A host that relays, an owner's broker, and an image of the owner's, which has a data volume."""
    needed(TOOLS / "bin/vhost-device-vsock", BASE)
    made = placed("relay")
    volume = ("--volume", "data:32M:/srv/data")
    with relaying(made, tmp_path_factory.mktemp("owner"), "web", *volume) as owner:
        yield made, owner


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
    said = host.wait_console("web", "witness: done")
    assert "witness: / is" in said
    assert "witness: /srv/data is /dev/nbd1" in said
    released = [row for row in owner.json("audit", "list")["rows"] if row["kind"] == "released"]
    assert len(released) == 2, "the root's key and the volume's"
    domain = host.json("domain", "show", "web")["domain"]
    assert (domain["State"], domain["RelayReason"]) == ("running", "")
    assert domain["RelayState"] in {"idle", "open"}
    assert "127.0.0.1" in host.ctl("status").stdout
    assert {path.name for path in host.state.iterdir()} & {"kek", "keys.db", "broker.pem"} == set()


def test_what_the_owner_refuses_is_told_and_what_is_away_too(place: tuple[Host, BrokerProcess]) -> None:
    """A revoked key is a refusal, status 7; a broker that is away is none, and is named on the bus."""
    host, owner = place
    owner.ctl("key", "revoke", "web")
    began = time.monotonic()
    done = host.ctl("launch", "web", check=False)
    took_s = time.monotonic() - began
    assert done.returncode == 7, done.stderr
    assert "E33" in done.stderr
    assert host.json("domain", "show", "web")["domain"]["State"] == "refused"
    assert owner.json("audit", "list")["rows"][-1]["detail"]["findings"][0]["id"] == "key.state"
    owner.ctl("key", "reinstate", "web")
    port = owner.ports["guests"]
    owner.stop()
    log, away = host.log, "the owner's broker cannot be reached"
    before = log.read_text().count(away)
    for times in (2, 10, 50):  # a busy machine may not let the guest come so far as to ask
        done = host.ctl("launch", "web", "--timeout", str(10 + round(times * took_s)), check=False)
        assert done.returncode == 1, done.stderr
        assert host.json("domain", "show", "web")["domain"]["State"] == "failed"
        if log.read_text().count(away) > before:
            break
    (line, *_) = [line for line in log.read_text().splitlines() if away in line][before:]
    assert f"127.0.0.1:{port}" in line
