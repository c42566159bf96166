"""Policies and refusals by the command line: a guest is played against the service's own key store, and explained."""

import json
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ownguest import image_of, played

from jindiskd.attest.measure import snp_launch_digest
from jindiskd.bus.contract import path_label
from jindiskd.decisions import replaced
from jindiskd.image.store import ImageStore
from jindiskd.kbs.client import BrokerRefused
from jindiskd.policy import form
from jindiskd.policy.rules import ReleaseRules


def test_a_refusal_is_explained_and_mended(daemon: Any, rootfs: Path, tmp_path: Path) -> None:
    """Three processors instead of two: refused, explained, tried with another policy, allowed by it, released.

    And what else explains a digest: another image's files, nothing at all, the image's own with a key that is revoked.
    """
    daemon.ctl("image", "build", "demo", "--rootfs", str(rootfs), "--vcpus", "2", "--format", "luks2")
    manifest, inputs = image_of(daemon, "demo")
    image_id = manifest["image_id"]
    assert "refusal" in daemon.ctl("attest", "explain", status=3)
    digest = snp_launch_digest(replace(inputs, vcpus=3))
    uuid = "99999999-9999-4999-8999-999999999999"
    with pytest.raises(BrokerRefused):
        played(daemon, image_id, digest, tmp_path, description=f"domain {uuid}")
    said = daemon.ctl("attest", "explain", "demo")
    assert "3 virtual processors instead of 2 virtual processors" in said
    assert "[snp.measurement]" in said
    assert "simulated: proves nothing" in said
    found = daemon.json("attest", "explain")
    assert (found["image"], found["explanation"]["found"], found["peer"]) == ("demo", True, f"domain {uuid}")
    assert [change["what"] for change in found["explanation"]["changes"]] == ["vcpus"]
    assert found["evidence"]["measurement"] == digest.hex()
    assert all(finding["remedy"] for finding in found["findings"])
    row = found["row"]
    assert daemon.json("attest", "explain", "--row", str(row)) == found
    assert daemon.json("audit", "list")["rows"][-1]["number"] == row
    # Its own policy refuses it again; one with its digest would not, and then it is released.
    assert "1 reason" in daemon.ctl("policy", "check", "--image", "demo", status=7)
    wider = tmp_path / "wider.toml"
    wider.write_text(f'[snp]\nmeasurements = ["{digest.hex()}"]\n')
    assert daemon.ctl("policy", "check", str(wider)) == f"{wider} is a policy.\n"
    assert "would release the key" in daemon.ctl("policy", "check", str(wider), "--image", "demo", "--row", str(row))
    rows = len(daemon.json("audit", "list")["rows"])
    with pytest.raises(BrokerRefused):
        played(daemon, image_id, digest, tmp_path)
    assert "measurements: [] → " in daemon.ctl("policy", "set", "demo", str(wider))
    daemon.ctl("policy", "set", "demo", str(wider), status=4)
    assert len(played(daemon, image_id, digest, tmp_path)) == 32
    kinds = [item["kind"] for item in daemon.json("audit", "list")["rows"]][rows:]
    assert kinds == ["refused", "rules", "released"]
    assert daemon.json("audit", "verify")["rows"] == rows + 3

    daemon.ctl("image", "build", "other", "--rootfs", str(rootfs), "--vcpus", "1", "--format", "luks2")
    other, _ = image_of(daemon, "other")

    def explained(measured: bytes) -> dict[str, Any]:
        with pytest.raises(BrokerRefused):
            played(daemon, image_id, measured, tmp_path)
        found: dict[str, Any] = daemon.json("attest", "explain", "demo")
        return found

    found = explained(bytes.fromhex(other["launch_digest"]))["explanation"]
    assert found["found"]
    assert "the image 'other'" in found["text"]
    found = explained(bytes(48))["explanation"]
    assert not found["found"]
    assert found["tried"] > 100
    daemon.ctl("key", "revoke", "demo")
    found = explained(bytes.fromhex(manifest["launch_digest"]))
    assert "the image's own" in found["explanation"]["text"]
    assert found["findings"][0]["id"] == "key.state"
    assert daemon.json("policy", "show", "other")["policy"] == form.plain(ReleaseRules())


def test_policies_are_shown_set_and_refused(stock: Any, tmp_path: Path) -> None:
    """What is shown can be set; all faults are told with the file's name, by the command and by the service."""
    text = stock.ctl("policy", "show", "stock")
    assert form.read(text) == ReleaseRules()
    file = tmp_path / "p.toml"
    file.write_text(text)
    stock.ctl("policy", "set", "stock", str(file), status=4)
    assert stock.ctl("policy", "show", "stock", "--set-only") == "\n"
    file.write_text("[snp]\nvmlp = 1\nvmpl = 9\n[release]\napproval = 1\n")
    told = stock.ctl("policy", "set", "stock", str(file), status=2)
    for part in (f"{file}: [snp] vmlp", "did you mean vmpl", "vmpl = 9 cannot be: it is 0 to 3", "[release] approval"):
        assert part in told
    assert "vmlp" in stock.ctl("policy", "check", str(file), status=2)
    stock.ctl("policy", "check", status=2)
    stock.ctl("policy", "show", "nothing", status=3)
    assert "refusal" in stock.ctl("policy", "check", "--image", "stock", "--row", "77777", status=3)
    busctl = ("busctl", "--address", stock.address)
    image = next(item for item in stock.json("image", "list")["images"] if item["Name"] == "stock")
    path = f"/org/jindisk1/policy/{path_label(image['ImageId'])}"
    words = [*busctl, "call", "org.jindisk1", path, "org.jindisk1.Policy", "Set", "sa{sv}", "[snp]\nx=1\n", "0"]
    out = subprocess.run(words, capture_output=True, text=True)
    assert out.returncode != 0
    assert "the policy: [snp] x is no setting" in out.stderr


def test_a_policy_is_tried_on_evidence_in_files(stock: Any, tmp_path: Path, vectors: Path) -> None:
    """A genuine report of another machine: what the image's policy says of it."""
    case = vectors / "attestation/snp/milan-v3-vcek"
    words = ["policy", "check", "--image", "stock", "--evidence", str(case / "report.bin")]
    words += ["--at", "2026-07-15T00:00:00Z"]
    words += ["--certificates", str(case / "vek.der"), str(vectors / "attestation/amd-roots/milan")]
    told = stock.ctl(*words, status=7)
    assert "the evidence is refused" in told
    with stock.spawn("--json", *words) as process:
        out, _ = process.communicate()
    found = {finding["id"] for finding in json.loads(out)["findings"]}
    assert {"snp.measurement", "snp.crl.missing"} <= found


@pytest.mark.parametrize("what", ["kernel", "initrd", "cmdline"])
def test_a_file_that_changed_in_the_store_is_named(stock: Any, what: str) -> None:
    """By its own digest, not by guessing from the launch digest; nothing is named where nothing changed."""
    image = ImageStore(stock.state / "images").get("stock")
    assert replaced(image) == []
    path = image.path / getattr(image.manifest, what).file
    before = path.read_bytes()
    path.write_bytes(before + b" ")
    try:
        assert replaced(image) == [what]
    finally:
        path.write_bytes(before)
