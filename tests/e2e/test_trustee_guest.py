"""A Debian guest boots with a key that a Trustee broker gave it: not ours, but one that follows the same protocol.

The host relays. The owner keeps the key that handovers are sealed to, opens the one of the image by hand, and gives the
disk's key and the launch digest to his broker. The broker shares no code with us (tests/support/trustee.py).
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import trustee
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from .conftest import BASE, TOOLS, Host, needed, relay_to

pytestmark = [pytest.mark.guest, pytest.mark.host, pytest.mark.long]
STATE = Path("/var/lib/jindiskd-e2e-trustee")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Host, trustee.TrusteeBroker]]:
    """A host that relays to a Trustee broker, and an image whose key that broker has."""
    needed(TOOLS / "bin/vhost-device-vsock", BASE)
    shutil.rmtree(STATE, ignore_errors=True)
    host, folder = Host(STATE), tmp_path_factory.mktemp("owner")
    peer = trustee.TrusteeBroker(folder, roots=[], measurements=[], secrets={})
    private, public = folder / "owner.pem", folder / "owner-public.pem"
    try:
        for words in (
            ("ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", private),
            ("ec", "-in", private, "-pubout", "-out", public),
        ):
            subprocess.run(["openssl", *words], check=True, capture_output=True, timeout=60)
        made = host.ctl(
            "broker", "make-card", "--certificate", str(peer.certificate), "--transfer-key", str(public)
        )
        (STATE / "card.json").write_text(made.stdout)
        assert json.loads(made.stdout)["spki_sha256"] == hashlib.sha256(peer.spki).hexdigest()
        text = host.configuration.read_text().replace('"simulated-snp"', '"simulated-snp"\nformat = "luks2"')
        host.configuration.write_text(text)
        relay_to(host, peer.port)
        host.start()
        host.ctl("image", "build", "web", "--base", str(BASE))
        host.ctl("key", "export", "web", "--output", str(STATE / "web.json"))
        handover = json.loads((STATE / "web.json").read_text())
        host.ctl(
            "broker", "key", "extract", str(STATE / "web.json"), "--key", str(private), "--output", str(folder / "key")
        )
        # What a Trustee's owner uploads: the key as a resource, the digest as a reference value, and the root.
        ark = x509.load_pem_x509_certificate((STATE / "simulated-root/ark.pem").read_bytes())
        peer.roots.append(ark.public_bytes(Encoding.DER))
        peer.measurements.append(bytes.fromhex(handover["launch_digests"][0]))
        peer.secrets[handover["resource"]] = (folder / "key").read_bytes()
        yield host, peer
    finally:
        if host.daemon is not None:
            host.clear()
            host.stop()
        peer.close()
        shutil.rmtree(STATE, ignore_errors=True)


def test_a_guest_boots_by_a_trustees_key(place: tuple[Host, trustee.TrusteeBroker]) -> None:
    """One attestation, one resource, by protocol 0.4.0; other code judged its evidence and sealed its key."""
    host, peer = place
    done = host.ctl("launch", "web", check=False)
    assert done.returncode == 0, f"{done.stderr}\n{peer.asked}\n{host.log.read_text()[-3000:]}"
    assert "/ is /dev/mapper/root (crypt)" in host.wait_console("web", "witness: / is")
    assert peer.asked == [("auth", 200), ("attest", 200), ("resource", 200)]
    domain = host.json("domain", "show", "web")["domain"]
    assert (domain["State"], domain["RelayReason"]) == ("running", "")
    host.ctl("domain", "stop", "web", "--force", "--yes")


def test_a_digest_that_it_does_not_know_is_denied(place: tuple[Host, trustee.TrusteeBroker]) -> None:
    """The guest says so by its code, and powers off; the host has the word `refused` for it."""
    host, peer = place
    known, peer.measurements = peer.measurements, []
    try:
        done = host.ctl("launch", "web", check=False)
    finally:
        peer.measurements = known
    assert done.returncode == 7, done.stderr
    assert "E33" in done.stderr
    assert peer.asked[-1] == ("resource", 401)
    assert host.json("domain", "show", "web")["domain"]["State"] == "refused"
