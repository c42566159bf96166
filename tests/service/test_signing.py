"""Guest policies and ID blocks of images: from the build to the domain that a launch would define."""

from __future__ import annotations

import base64
import json
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from jindiskd.attest.id_block import IdBlock, check, encode_key

USAGE, NOT_SUPPORTED = 2, 1
POLICY = "no-smt,single-socket,abi=1.55"
NUMBER = 0x120137


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    """An ID key and an author key."""
    found = []
    for name in ("id", "author"):
        key = ec.generate_private_key(ec.SECP384R1())
        (tmp_path / name).write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        found.append(tmp_path / name)
    return found[0], found[1]


def digest_of(path: Path) -> str:
    import hashlib

    from jindiskd.attest.id_block import load_key

    return hashlib.sha384(encode_key(load_key(path).public_key())).hexdigest()


def test_an_image_is_built_signed_and_carries_it(
    daemon: Any, rootfs: Path, tmp_path: Path, keys: tuple[Path, Path]
) -> None:
    """Into its manifest, the policy of its release, what image measure prints, the stream, a domain's definition."""
    id_key, author_key = keys
    words = ["image", "build", "web", "--rootfs", str(rootfs), "--format", "luks2"]
    assert "say --debug" in daemon.ctl(*words, "--guest-policy", "debug", status=USAGE)
    assert "did you mean 'no-smt'" in daemon.ctl(*words, "--guest-policy", "no-smtt", status=USAGE)
    assert "--no-wait" in daemon.ctl(*words, "--id-key", str(id_key), "--no-wait", status=USAGE)
    assert "no ID block" in daemon.ctl(*words, "--id-key", str(id_key), "--platform", "sev", status=USAGE)
    (tmp_path / "none").write_text("no key")
    assert "no private key" in daemon.ctl(*words, "--id-key", str(tmp_path / "none"), status=USAGE)
    assert daemon.json("image", "list")["images"] == []
    signing = ["--id-key", str(id_key), "--author-key", str(author_key), "--guest-svn", "7"]
    image = daemon.json(*words, "--guest-policy", POLICY, *signing)["image"]
    assert (image["GuestPolicy"], image["GuestSvn"]) == (NUMBER, 7)
    assert (image["IdKeyDigest"], image["AuthorKeyDigest"]) == (digest_of(id_key), digest_of(author_key))
    rules = daemon.json("policy", "show", "web")["policy"]["snp"]
    demanded = {name for name, value in rules.items() if name.startswith("require_") and value is True}
    assert demanded == {"require_smt_off", "require_single_socket", "require_no_cxl"}
    assert (rules["minimum_policy_abi"], rules["allow_debug"]) == ("1.55", False)
    measured = daemon.json("image", "measure", "web")
    assert measured["guest_policy"] == {"value": NUMBER, "words": "no-smt,single-socket,abi=1.55"}
    assert measured["signed"]["id_key_digest"] == digest_of(id_key)
    assert "0x120137" in daemon.ctl("image", "show", "web")

    root = ET.fromstring(daemon.ctl("domain", "xml", "--image", "web"))
    told = {child.tag.rpartition("}")[2]: child.text for child in root.find("metadata/*/{*}launchSecurity")}
    block, auth = (base64.b64decode(told[name]) for name in ("idBlock", "idAuth"))
    assert check(block, auth).id_key_digest.hex() == digest_of(id_key)
    said = IdBlock.decode(block)
    assert (said.launch_digest.hex(), said.policy, said.guest_svn) == (image["LaunchDigest"], NUMBER, 7)
    assert int(told["policy"], 0) == NUMBER

    # A clone measures otherwise, and the policy of its release is the source's; a moved image is the same.
    clone = daemon.json("image", "clone", "web", "copy")["image"]
    assert (clone["GuestPolicy"], clone["IdKeyDigest"]) == (NUMBER, "")
    assert daemon.json("policy", "show", "copy")["policy"]["snp"] == rules
    daemon.ctl("image", "export", "web", str(tmp_path / "stream"))
    daemon.ctl("image", "remove", "web", "--yes")
    moved = daemon.json("image", "import", str(tmp_path / "stream"))["image"]
    assert moved == {**image, "State": "unknown"}


def test_a_signature_is_put_on_and_taken_away(stock: Any, tmp_path: Path, keys: tuple[Path, Path]) -> None:
    """By keys, by what was signed elsewhere, and never for another digest or policy than the image's."""
    id_key, _ = keys
    before = stock.json("image", "show", "stock")["image"]
    assert (before["GuestPolicy"], before["IdKeyDigest"]) == (0x30000, "")
    signed = stock.json("image", "sign", "stock", "--id-key", str(id_key))["image"]
    assert signed["IdKeyDigest"] == digest_of(id_key)
    assert not any(bytes.fromhex(signed["AuthorKeyDigest"]))
    assert stock.json("image", "sign", "stock", "--remove")["image"] == before

    files = ["--id-block", str(tmp_path / "id-block"), "--id-auth", str(tmp_path / "id-auth")]
    elsewhere = ["image", "measure", "stock", "--id-key", str(id_key), "--output", str(tmp_path)]
    stock.ctl(*elsewhere)
    assert stock.json("image", "sign", "stock", *files)["image"] == signed
    stock.ctl("image", "sign", "stock", "--remove")
    stock.ctl(*elsewhere, "--guest-policy", "0x130000")
    assert "guest policy 0x130000" in stock.ctl("image", "sign", "stock", *files, status=USAGE)
    auth = bytearray((tmp_path / "id-auth").read_bytes())
    stock.ctl(*elsewhere)
    (tmp_path / "id-auth").write_bytes(auth)  # of the other block
    assert "not signed by the ID key" in stock.ctl("image", "sign", "stock", *files, status=USAGE)
    (tmp_path / "id-block").write_bytes(b"short")
    assert "96" in stock.ctl("image", "sign", "stock", *files, status=USAGE)
    for words in ([], files[:2], ["--remove", "--id-key", str(id_key)], ["--author-key", str(id_key)]):
        stock.ctl("image", "sign", "stock", *words, status=USAGE)
    assert stock.json("image", "show", "stock")["image"] == before
    manifest = json.loads((stock.state / "images/stock/manifest.json").read_text())
    assert (manifest["id_block"], manifest["id_auth"]) == ("", "")
