"""A guest of SEV boots by a secret that its owner's broker sealed, through a host that relays and learns nothing of it.

As test_sev: the emulator stands in for one with SEV, and all else is the real thing, the owner's broker too.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import sevmounts

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "broker"))
from brokerprocess import BrokerProcess

from jindiskd.base import document
from jindiskd.sim.pki import SimulatedRoot
from jindiskd.sim.sev_platform import SevPlatformKeys

from .conftest import BASE, TOOLS, Host

pytestmark = [pytest.mark.guest, pytest.mark.host, pytest.mark.long]
STATE = Path("/var/lib/jindiskd-sev-relay")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Host, BrokerProcess]]:
    """A host with SEV that relays, an owner's broker, and an image of the owner's."""
    if os.environ.get("JD_TESTENV") != "1":
        pytest.skip("this needs a throw-away host: run it by scripts/testenv")
    for needed in (TOOLS / "share/ovmf/OVMF.amdsev.fd", BASE):
        if not needed.exists():
            pytest.skip(f"{needed.name} is not there: scripts/setup and scripts/make-base-image make it")
    shutil.rmtree(STATE, ignore_errors=True)
    made = Host(STATE)
    shutil.copy(TOOLS / "share/ovmf/OVMF.amdsev.fd", STATE / "tools/OVMF.amdsev.fd")
    keys = SevPlatformKeys.generate()
    folder = tmp_path_factory.mktemp("owner")
    (folder / "sev.json").write_bytes(document.dump(keys.root))
    owner = BrokerProcess(
        folder / "b",
        SimulatedRoot.load_or_create(STATE / "simulated-root"),
        broker={"allow_simulated": True, "simulated_sev": str(folder / "sev.json")},
    )
    try:
        owner.start()
        owner.ctl("card", "--output", str(STATE / "card.json"))
        file = STATE / "jindiskd.toml"
        text = file.read_text().replace('"simulated-snp"', '"simulated-sev"\nformat = "luks2"')
        text = text.replace("tools/OVMF.fd", "tools/OVMF.amdsev.fd")
        text = text.replace("[broker]", '[broker]\ndeployment = "relay"')
        relay = f'[relay]\nbroker = "127.0.0.1:{owner.ports["guests"]}"\ncard = "{STATE}/card.json"'
        file.write_text(f"{text}\n{relay}\n")
        with sevmounts.sev_machine("e2e-relay", keys):
            made.start()
            try:
                made.ctl("image", "build", "sev", "--base", str(BASE), "--volume", "data:32M:luks2:/srv/data")
                made.ctl("key", "export", "sev", "--output", str(STATE / "sev.json"))
                owner.ctl("image", "import", str(STATE / "sev.json"))
                yield made, owner
            finally:
                made.clear()
                made.stop()
    finally:
        owner.close()
        shutil.rmtree(STATE, ignore_errors=True)


def test_what_measures_otherwise_gets_no_secret(place: tuple[Host, BrokerProcess]) -> None:
    """Its owner's log has the reason; the host is told that there is one."""
    host, owner = place
    path = host.image("sev") / "cmdline"
    original = path.read_bytes()
    path.write_bytes(original + b" single")
    try:
        done = host.ctl("launch", "sev", check=False)
    finally:
        path.write_bytes(original)
    assert done.returncode == 7, done.stderr
    assert "its audit log has the reasons" in done.stderr
    assert host.domain("sev")["State"] == "refused"
    assert owner.json("audit", "list")["rows"][-1]["detail"]["findings"][0]["id"] == "sev.measurement"


def test_the_guest_boots_by_the_owners_secret(place: tuple[Host, BrokerProcess]) -> None:
    """From its encrypted root. The release is in the owner's log, and nothing with the key on the host."""
    host, owner = place
    done = host.ctl("launch", "sev", check=False)
    assert done.returncode == 0, f"{done.stderr}\n{host.log.read_text()[-3000:]}"
    assert "simulated" in done.stdout
    said = host.wait_console("sev", "witness: done")
    assert "/ is /dev/mapper/root (crypt)" in said
    assert "witness: /srv/data is /dev/mapper/jindisk-data" in said
    assert [row["simulated"] for row in owner.json("audit", "list")["rows"] if row["kind"] == "released"] == [True] * 2
    assert {path.name for path in STATE.iterdir()} & {"kek", "keys.db", "broker.pem", "simulated-sev.json"} == set()
    owner.ctl("key", "revoke", "sev")
    host.ctl("domain", "stop", "sev", "--force", "--yes")
    done = host.ctl("launch", "sev", check=False)
    assert done.returncode == 7, done.stderr
    assert owner.json("audit", "list")["rows"][-1]["detail"]["findings"][0]["id"] == "key.state"
