"""Documents that came from elsewhere: whatever is in them, they are taken as meant, or refused by an error of ours."""

import json
from dataclasses import replace
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from hypothesis import given, settings
from hypothesis import strategies as st

from jindiskd.base import document
from jindiskd.base.anchor import Anchor
from jindiskd.base.platform import Platform
from jindiskd.base.secret import Secret
from jindiskd.errors import InvalidArgument, JindiskError
from jindiskd.kbs import jwe, jwk
from jindiskd.keys import handover
from jindiskd.keys.handover import HandedVolume, Handover, HandoverUnusable

OWNER = ec.generate_private_key(ec.SECP256R1())
PUBLIC = jwk.tee_jwk(OWNER.public_key())
VOLUME = "33333333-3333-4333-8333-333333333333"
ANCHOR = Anchor(open=False, session=bytes(32), sequence=5, root=b"r" * 32)
PLAIN = Handover(
    image_id="11111111-1111-4111-8111-111111111111",
    name="web",
    platform=Platform.SNP,
    resource="a/b/root",
    launch_digests=(bytes(48),),
    created="2026-01-01T00:00:00Z",
    volumes=(HandedVolume(volume=VOLUME, resource="a/b/data"),),
)


def sealed(recipient: dict[str, str] = PUBLIC) -> Handover:
    keys = {"a/b/root": Secret(b"k" * 32), "a/b/data": Secret(b"d" * 32)}
    return handover.seal(PLAIN, keys, {VOLUME: ANCHOR}, recipient)


def test_what_goes_in_comes_out() -> None:
    """Keys and anchors, by way of JSON; and again for another recipient."""
    other = ec.generate_private_key(ec.SECP521R1())
    again = handover.reseal(handover.read(document.dump(sealed())), OWNER, jwk.tee_jwk(other.public_key()))
    opened = handover.open_(handover.read(document.dump(again)), other)
    assert {name: bytes(key.reveal()) for name, key in opened.keys.items()} == {
        "a/b/root": b"k" * 32,
        "a/b/data": b"d" * 32,
    }
    assert opened.anchors == {VOLUME: ANCHOR}
    opened.close()
    with pytest.raises(HandoverUnusable):
        handover.open_(again, OWNER)


@pytest.mark.parametrize("member", ["image_id", "name"])
@pytest.mark.parametrize("value", ["../../x", "/etc/x", ".", "..", "a/b", "a\nb", "a\x1b[2J", "", "a" * 65, "\ud800"])
def test_names_and_identities_are_no_paths(member: str, value: str) -> None:
    """A recovery copy is a file by the identity, below a folder of the owner's; whoever builds images chooses it."""
    whole = json.loads(document.dump(sealed()))
    with pytest.raises(JindiskError):
        handover.read(json.dumps({**whole, member: value}).encode())


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.text(max_size=8) | st.floats(allow_nan=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(sorted(document.to_plain(sealed()))), VALUES)
def test_a_member_may_be_anything_and_is_then_refused(member: str, value: Any) -> None:
    """What still reads as a handover no longer opens, since all of it is bound to what is sealed."""
    good = document.to_plain(sealed())
    if value == good[member]:
        return
    try:
        handover.open_(handover.read(json.dumps({**good, member: value}).encode()), OWNER)
    except JindiskError:
        return
    raise AssertionError("it was taken")


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200) | VALUES.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_are_refused_by_an_error_of_ours(data: bytes) -> None:
    """Cards, handovers, keys in PEM."""
    readers = (handover.read, handover.read_card, handover.recipient_of_pem, handover.private_key_of_pem)
    for read in readers:
        with pytest.raises(JindiskError):
            read(data)


@pytest.mark.parametrize(
    "contents",
    [
        b"",
        b"[]",
        b'{"digest": "00", "keys": {}}',
        document.dump(handover.Contents(digest=PLAIN.digest, keys={})),
        document.dump(handover.Contents(digest=PLAIN.digest, keys={"a/b/root": b""})),
        document.dump(handover.Contents(digest=PLAIN.digest, keys={"a/b/root": bytes(5000), "a/b/data": b"d"})),
        document.dump(handover.Contents(digest=PLAIN.digest, keys={"a/b/root": b"k"})),
        document.dump(handover.Contents(digest=PLAIN.digest, keys={"a/b/root": b"k", "../x": b"k", "a/b/data": b"d"})),
        document.dump(
            handover.Contents(
                digest=PLAIN.digest, keys={"a/b/root": b"k", "a/b/data": b"d"}, anchors={VOLUME: bytes(72)}
            )
        ),
        document.dump(
            handover.Contents(
                digest=PLAIN.digest, keys={"a/b/root": b"k", "a/b/data": b"d"}, anchors={"other": ANCHOR.pack()}
            )
        ),
        document.dump(
            handover.Contents(
                digest=PLAIN.digest, keys={"a/b/root": b"k", **{f"a/b/k{n}": b"k" for n in range(70)}, "a/b/data": b"d"}
            )
        ),
    ],
)
def test_what_is_sealed_is_checked_like_what_is_not(contents: bytes) -> None:
    """Whoever has the card can seal anything."""
    made = replace(PLAIN, sealed=jwe.seal(contents, PUBLIC))
    with pytest.raises(JindiskError):
        handover.open_(made, OWNER)


def test_recipients_are_of_the_protocols_kinds() -> None:
    """Two curves and RSA from 2048 bits; nothing else, and no private key in place of a public one."""

    def pem(key: Any) -> bytes:
        return bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))

    for good in (ec.generate_private_key(ec.SECP521R1()), rsa.generate_private_key(65537, 2048)):
        recipient = handover.recipient_of_pem(pem(good))
        assert bytes(handover.open_(sealed(recipient), good).keys["a/b/root"].reveal()) == b"k" * 32
    bad = (
        ec.generate_private_key(ec.SECP384R1()),
        rsa.generate_private_key(65537, 1024),
        rsa.generate_private_key(3, 2048),
        ed25519.Ed25519PrivateKey.generate(),
    )
    for key in bad:
        with pytest.raises(InvalidArgument):
            handover.recipient_of_pem(pem(key))
    private = OWNER.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    with pytest.raises(InvalidArgument):
        handover.recipient_of_pem(private)
