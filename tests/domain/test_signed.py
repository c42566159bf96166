"""Guest policies and ID blocks in definitions: written, accepted by libvirt's schemas, adopted, and looked for."""

from __future__ import annotations

import base64
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from lxml import etree

from jindiskd.attest.id_block import IdBlock, sign
from jindiskd.base.platform import Platform
from jindiskd.domain import adoption, check, xml
from jindiskd.domain.security import Sev, Snp, Stated
from jindiskd.domain.spec import DomainSpec, from_manifest
from jindiskd.errors import InvalidArgument, NotSupported
from jindiskd.image.manifest import Manifest
from jindiskd.image.signing import problem, signed

from .conftest import make_manifest
from .test_xml import NEWEST_SCHEMA

UUID = "11111111-2222-4333-8444-555555555555"
POLICY = 0x120137


def made(directory: Path, platform: Platform, policy: int | None, *, author: bool = True) -> Manifest:
    """An image with a policy, signed where it can be."""
    for file in ("disk.img", "vmlinuz", "initrd", "cmdline"):
        (directory / file).write_text(file)
    found = make_manifest(directory, platform=platform)
    found = replace(found, shape=replace(found.shape, guest_policy=policy), launch_digest=bytes(range(48)))
    if platform.measured_before:
        return found
    keys = [ec.generate_private_key(ec.SECP384R1()) for _ in range(2)]
    block = IdBlock(launch_digest=found.launch_digest, policy=policy or 0x30000)
    done = sign(block, keys[0], keys[1] if author else None)
    return signed(found, done.block, done.auth)


def spec_of(manifest: Manifest, directory: Path) -> DomainSpec:
    return from_manifest(
        manifest, directory, name="web", uuid=UUID, memory_mib=256, console_log=Path("/c.log"), vsock=Path("/v.sock")
    )


@pytest.mark.parametrize("author", [True, False])
def test_a_signed_image_is_launched_with_its_block(tmp_path: Path, author: bool) -> None:
    """And policy; libvirt's schema and our own check find nothing in the definition."""
    manifest = made(tmp_path, Platform.SNP, POLICY, author=author)
    spec = spec_of(manifest, tmp_path)
    assert isinstance(spec.security, Snp)
    assert (spec.security.policy, spec.security.author_key) == (POLICY, author)
    text = xml.write(spec)
    root = xml.parse(text)
    assert list(check.faults(root)) == []
    assert xml.stated(root) == Stated(policy=POLICY, id_block=manifest.id_block, id_auth=manifest.id_auth)
    assert root.find("launchSecurity").get("authorKey") == ("yes" if author else "no")
    etree.RelaxNG(etree.parse(NEWEST_SCHEMA)).assertValid(etree.fromstring(text))


def test_a_simulated_platform_is_told_by_our_metadata(tmp_path: Path) -> None:
    """libvirt knows nothing of it; the simulated firmware gets what the live definition says."""
    manifest = made(tmp_path, Platform.SIMULATED_SNP, POLICY)
    spec = spec_of(manifest, tmp_path)
    root = xml.parse(xml.write(spec))
    assert root.find("launchSecurity") is None
    assert xml.boot_inputs(root) == spec.boot
    assert spec.boot.simulated == Stated.of_image(manifest)
    plain = replace(manifest, shape=replace(manifest.shape, guest_policy=None), id_block=b"", id_auth=b"")
    assert "launchSecurity" not in xml.write(spec_of(plain, tmp_path))


@pytest.mark.parametrize(("platform", "policy"), [(Platform.SEV, 0x1B), (Platform.SEV_ES, 0x3301000F)])
def test_sev_has_the_images_policy(tmp_path: Path, platform: Platform, policy: int) -> None:
    """Or its default."""
    spec = spec_of(made(tmp_path, platform, policy), tmp_path)
    assert spec.security == Sev(policy=policy)
    assert xml.stated(xml.parse(xml.write(spec))).policy == policy
    assert spec_of(made(tmp_path, platform, None), tmp_path).security == Sev(policy=policy & 0xF)


def test_what_the_image_has_rules_in_an_adopted_domain(tmp_path: Path) -> None:
    """Its owner's policy and block go; host data stays; what was edited since is named."""
    manifest = made(tmp_path, Platform.SNP, POLICY)
    spec = spec_of(manifest, tmp_path)
    root = xml.parse(xml.write(spec))
    kept = root.find("launchSecurity")
    kept.find("policy").text = "0xb0000"
    kept.find("idBlock").text = base64.b64encode(bytes(96)).decode()
    ET.SubElement(kept, "hostData").text = base64.b64encode(bytes(32)).decode()
    adopted = xml.parse(adoption.adopt(ET.tostring(root, encoding="unicode"), spec))
    assert xml.stated(adopted) == Stated.of_image(manifest)
    assert adopted.find("launchSecurity/hostData") is not None
    wanted = Stated.of_image(manifest)
    assert xml.stated(adopted).differs(wanted) == ""
    adopted.find("launchSecurity/policy").text = "0x30000"
    assert xml.stated(adopted).differs(wanted) == "its guest policy, 0x30000,"
    adopted.find("launchSecurity/policy").text = str(POLICY)
    adopted.find("launchSecurity/idAuth").text = ""
    assert xml.stated(adopted).differs(wanted) == "its ID block"
    adopted.find("launchSecurity/idAuth").text = "?"
    with pytest.raises(xml.MalformedDomain):
        xml.stated(adopted)


def test_only_a_block_of_this_image_is_taken(tmp_path: Path) -> None:
    """Another digest, another policy, another platform, a signature that does not hold."""
    manifest = made(tmp_path, Platform.SNP, POLICY)
    block, auth = manifest.id_block, manifest.id_auth
    for changed, says in (
        (replace(manifest, launch_digest=bytes(48)), "launch digest"),
        (replace(manifest, shape=replace(manifest.shape, guest_policy=None)), "guest policy"),
    ):
        assert says in problem(changed)
        with pytest.raises(InvalidArgument, match=says):
            signed(changed, block, auth)
    for bad in ((block, auth[:-1]), (block[:-1] + b"\1", auth), (block, bytes(4096)), (b"", auth), (block, b"")):
        with pytest.raises(InvalidArgument):
            signed(manifest, *bad)
    with pytest.raises(NotSupported):
        signed(replace(manifest, platform=Platform.SEV), block, auth)
    assert signed(manifest, b"", b"").id_block == b""
