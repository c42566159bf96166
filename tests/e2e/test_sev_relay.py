"""A guest of SEV boots by a secret that its owner's broker sealed, through a host that relays and learns nothing of it.

As test_sev: the emulator stands in for one with SEV, and all else is the real thing, the owner's broker too.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest
import sevmounts

from jindiskd.base import document
from jindiskd.sim.sev_platform import SevPlatformKeys

from .conftest import BASE, TOOLS, BrokerProcess, Host, needed, placed, relaying

pytestmark = [pytest.mark.guest, pytest.mark.host, pytest.mark.long]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Host, BrokerProcess]]:
    """A host with SEV that relays, an owner's broker, and an image of the owner's, which has a data volume."""
    needed(TOOLS / "share/ovmf/OVMF.amdsev.fd", BASE)
    made = placed("sev-relay")
    shutil.copy(TOOLS / "share/ovmf/OVMF.amdsev.fd", made.state / "tools/OVMF.amdsev.fd")
    text = made.configuration.read_text().replace('"simulated-snp"', '"simulated-sev"\nformat = "luks2"')
    made.configuration.write_text(text.replace("tools/OVMF.fd", "tools/OVMF.amdsev.fd"))
    keys, folder = SevPlatformKeys.generate(), tmp_path_factory.mktemp("owner")
    (folder / "sev.json").write_bytes(document.dump(keys.root))
    volume, broker = ("--volume", "data:32M:luks2:/srv/data"), {"simulated_sev": str(folder / "sev.json")}
    machine = sevmounts.sev_machine("e2e-relay", keys)
    with relaying(made, folder, "sev", *volume, broker=broker, machine=machine) as owner:
        yield made, owner


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
    secret = {"kek", "keys.db", "broker.pem", "simulated-sev.json"}
    assert {path.name for path in host.state.iterdir()} & secret == set()
    owner.ctl("key", "revoke", "sev")
    host.ctl("domain", "stop", "sev", "--force", "--yes")
    done = host.ctl("launch", "sev", check=False)
    assert done.returncode == 7, done.stderr
    assert owner.json("audit", "list")["rows"][-1]["detail"]["findings"][0]["id"] == "key.state"
