"""The documents by which keys go from whoever built an image to the broker of its owner, and from broker to broker.

A `BrokerCard` says which broker it is: the digest that guests pin, and the key that image keys are encrypted to. A
`Handover` describes an image in clear, for people, and has its keys sealed to one recipient: a broker's card, or the
owner's recovery key. What is sealed repeats the digest of what is in clear, so that the keys of one image cannot be
passed off as those of another by somebody who does not have them.

A handover with an `Amendment` is of an image that its owner's broker has: a data volume came or went on a host that has
none of its keys, so that it measures otherwise; the new volume's key alone is sealed in it.

Who can make a handover can name any launch digest in it: importing one is a decision of the owner.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_der_private_key,
    load_pem_private_key,
    load_pem_public_key,
)

from jindiskd.base import document
from jindiskd.base.anchor import Anchor
from jindiskd.base.platform import Platform, Tee
from jindiskd.base.secret import Secret
from jindiskd.errors import EXIT_INTEGRITY, EXIT_UNCHANGED, InvalidArgument, JindiskError
from jindiskd.kbs import jwe, jwk
from jindiskd.kbs.freshness import check_volume
from jindiskd.kbs.messages import MalformedMessage, check_resource

SCHEMA = 1
CARD, WHAT, SEALED = "the broker's card", "the handover", "the sealed part of the handover"
LIMIT_BYTES = 1 << 20
MOST_KEYS = 64
KEY_BYTES = (1, 4096)
DIGEST_BYTES = (32, 48)
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
IDENTITY = re.compile(r"[0-9A-Za-z-]{1,64}")


class HandoverUnusable(JindiskError, code="HandoverUnusable", exit_code=EXIT_INTEGRITY):
    """A handover is not for us, or is not what it was made as."""

    def __init__(self, problem: str, remedy: str) -> None:
        """`problem` completes "the handover ..."."""
        super().__init__(f"the handover {problem}: {remedy}")


class AlreadyTakenOver(JindiskError, code="AlreadyTakenOver", exit_code=EXIT_UNCHANGED):
    """A change of an image was taken over before; there is nothing to do."""

    def __init__(self, image: str) -> None:
        super().__init__(f"this change of image {image!r} was taken over before: there is nothing to do")


@dataclass(frozen=True, slots=True, kw_only=True)
class BrokerCard:
    """Which broker. Nothing in it is secret, but whoever takes it must know that it is the owner's."""

    schema: int = SCHEMA
    spki_sha256: bytes
    """SHA-256 of the DER SubjectPublicKeyInfo of the broker's TLS key: what guests pin."""
    transfer_key: dict[str, str]
    """A JSON web key, as the protocol's TEE keys are: image keys are encrypted to it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HandedVolume:
    """A JinDisk volume that a key of the image opens."""

    volume: str
    resource: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Amendment:
    """What changed of an image whose other keys are at its owner's broker; one of the two resources is empty."""

    before: tuple[bytes, ...]
    """The launch digests of the image as it was: its keys are not released to these any more."""
    added: str = ""
    """Resource of the key that comes."""
    removed: str = ""
    """Resource of the key that goes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Handover:
    """An image and its keys, sealed."""

    schema: int = SCHEMA
    image_id: str
    name: str
    platform: Platform
    resource: str
    """Of the key of the image's root."""
    launch_digests: tuple[bytes, ...]
    created: str
    volumes: tuple[HandedVolume, ...] = ()
    rules: str = ""
    """The rules of release, as the key store keeps them; empty for the strict defaults."""
    sealed: str = ""
    """A flattened JWE of a `Contents` document."""
    amends: Amendment | None = None
    """None for a whole image."""

    @property
    def digest(self) -> bytes:
        """SHA-256 of what is in clear. Of a whole image no amendment is in it: so handovers of before there were any
        keep theirs."""
        plain = document.to_plain(replace(self, sealed=""))
        if self.amends is None:
            del plain["amends"]
        return hashlib.sha256(document.dump(plain)).digest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """What is sealed. Keys are hexadecimal in it while it is read or written, for a moment, in memory alone."""

    digest: bytes
    """Of the handover around it."""
    keys: dict[str, bytes]
    """By resource."""
    anchors: dict[str, bytes] = field(default_factory=dict)
    """By volume: the anchor, 73 bytes (format document, section 13.1)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """A handover with its keys."""

    handover: Handover
    keys: Mapping[str, Secret]
    anchors: Mapping[str, Anchor]

    def close(self) -> None:
        """Wipe the keys."""
        for key in self.keys.values():
            key.close()


def draw_transfer_key() -> bytes:
    """A new P-256 key, PKCS #8 in DER."""
    return ec.generate_private_key(ec.SECP256R1()).private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())


def card(spki_sha256: bytes, transfer_key: Secret) -> BrokerCard:
    """The card of a broker; `transfer_key` is PKCS #8 in DER."""
    private = load_der_private_key(bytes(transfer_key.reveal()), None)
    assert isinstance(private, ec.EllipticCurvePrivateKey)
    return BrokerCard(spki_sha256=spki_sha256, transfer_key=jwk.tee_jwk(private.public_key()))


def read_card(data: bytes) -> BrokerCard:
    """A card from its JSON.

    Raises:
        MalformedDocument, InvalidArgument: it is none.
    """
    found = document.load(BrokerCard, data, document=CARD, limit_bytes=LIMIT_BYTES)
    if found.schema != SCHEMA or len(found.spki_sha256) != 32:
        raise InvalidArgument(CARD, found.schema, "have the broker's owner make a new one")
    check_recipient(found.transfer_key)
    return found


def check_recipient(recipient: Mapping[str, str]) -> Mapping[str, str]:
    """A public key that keys can be sealed to; raises `InvalidArgument`."""
    try:
        jwk.public_key(recipient)
    except MalformedMessage as exc:
        raise InvalidArgument("the recipient's key", recipient.get("kty", ""), exc.problem) from exc
    return recipient


def recipient_of_pem(data: bytes) -> dict[str, str]:
    """A public key in PEM as a recipient: EC on P-256 or P-521, or RSA of at least 2048 bits.

    Raises:
        InvalidArgument: it is none of these.
    """
    remedy = "give the PEM of an EC public key on P-256 or P-521, or of an RSA public key of 2048 bits or more"
    try:
        key = load_pem_public_key(data)
    except ValueError as exc:
        raise InvalidArgument("the public key", "in this file", remedy) from exc
    if isinstance(key, ec.EllipticCurvePublicKey) and key.curve.name in {"secp256r1", "secp521r1"}:
        return jwk.tee_jwk(key)
    if isinstance(key, rsa.RSAPublicKey):
        numbers = key.public_numbers()
        parts = {
            name: base64.urlsafe_b64encode(value.to_bytes((value.bit_length() + 7) // 8, "big")).decode().rstrip("=")
            for name, value in (("n", numbers.n), ("e", numbers.e))
        }
        found = {"kty": "RSA", "alg": jwk.RSA_ALG, **parts}
        check_recipient(found)
        return found
    raise InvalidArgument("the public key", "in this file", remedy)


def private_key_of_pem(data: bytes) -> jwe.PrivateKey:
    """The private key that belongs to such a recipient; raises `InvalidArgument`."""
    try:
        key = load_pem_private_key(data, None)
    except (ValueError, TypeError) as exc:
        remedy = "give the PEM of an EC or RSA private key without a passphrase"
        raise InvalidArgument("the private key", "in this file", remedy) from exc
    if isinstance(key, ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey):
        return key
    raise InvalidArgument("the private key", type(key).__name__, "it is an EC or RSA key")


def seal(
    handover: Handover, keys: Mapping[str, Secret], anchors: Mapping[str, Anchor], recipient: Mapping[str, str]
) -> Handover:
    """The handover with keys and anchors sealed to a recipient."""
    contents = Contents(
        digest=handover.digest,
        keys={resource: bytes(key.reveal()) for resource, key in keys.items()},
        anchors={volume: anchor.pack() for volume, anchor in anchors.items()},
    )
    return replace(handover, sealed=jwe.seal(document.dump(contents), check_recipient(recipient)))


def read(data: bytes) -> Handover:
    """A handover from its JSON, its parts checked; what is sealed is not looked at.

    Raises:
        MalformedDocument, InvalidArgument, HandoverUnusable: it is none that can be used.
    """
    found = document.load(Handover, data, document=WHAT, limit_bytes=LIMIT_BYTES)
    if found.schema != SCHEMA:
        raise HandoverUnusable(f"has schema {found.schema}", f"this program knows {SCHEMA}")
    check_resource(found.resource)
    for volume in found.volumes:
        check_volume(volume.volume)
        check_resource(volume.resource)
    if any(len(digest) not in DIGEST_BYTES for digest in found.launch_digests):
        raise HandoverUnusable("names a launch digest of another length than 32 or 48 bytes", "export it again")
    if not found.launch_digests and found.platform.tee is not Tee.TDX:
        # What a TDX guest measures as is for the policy, by registers.
        raise HandoverUnusable("names no launch digest", "export it from an image that was measured")
    # They become parts of paths, of files that recovery copies are, and of lines that people read.
    if not NAME.fullmatch(found.name) or not IDENTITY.fullmatch(found.image_id):
        raise HandoverUnusable("has no usable name or identity", "export it again")
    if found.amends is not None:
        _check_amendment(found, found.amends)
    return found


def parts(data: bytes) -> list[Handover]:
    """The handovers in what `key export` wrote: one, or in `{"handovers": [...]}` an image's and its changes' in order.

    Raises:
        As `read`.
    """
    try:
        plain = json.loads(data[: LIMIT_BYTES + 1])
    except (ValueError, RecursionError):
        plain = None
    listed = plain.get("handovers") if isinstance(plain, dict) else None
    if not isinstance(listed, list):
        return [read(data)]
    if len(data) > LIMIT_BYTES or not listed:
        raise HandoverUnusable("holds too much, or nothing", "export it again")
    return [read(json.dumps(one).encode()) for one in listed]


def _check_amendment(told: Handover, amends: Amendment) -> None:
    remedy = "make the change again on the host"
    if bool(amends.added) == bool(amends.removed) or told.resource in {amends.added, amends.removed}:
        raise HandoverUnusable("neither adds nor removes one volume beside the root", remedy)
    check_resource(amends.added or amends.removed)
    if not amends.before or len(amends.before) > MOST_KEYS:
        raise HandoverUnusable("does not say what the image measured as", remedy)
    if any(len(digest) not in DIGEST_BYTES for digest in amends.before):
        raise HandoverUnusable("names a launch digest of another length than 32 or 48 bytes", remedy)
    if told.rules:
        raise HandoverUnusable("changes a volume and the rules of release", "the rules are the owner's: set them there")
    if {volume.resource for volume in told.volumes} - {amends.added}:
        raise HandoverUnusable("names volumes that are not new", remedy)


def open_(handover: Handover, key: jwe.PrivateKey) -> Opened:
    """Open what is sealed.

    Raises:
        HandoverUnusable: it is for another recipient, or was sealed for another image.
    """
    try:
        plain = jwe.open_(handover.sealed.encode(), key)
    except MalformedMessage as exc:
        raise HandoverUnusable("does not open with this key", "have it made for the card of this broker") from exc
    with plain:
        contents = document.load(Contents, bytes(plain.reveal()), document=SEALED, limit_bytes=LIMIT_BYTES)
    if contents.digest != handover.digest:
        raise HandoverUnusable("was altered after it was sealed", "have it made again")
    sizes = [len(value) for value in contents.keys.values()]
    if handover.amends is not None:
        if set(contents.keys) != {resource for resource in (handover.amends.added,) if resource}:
            raise HandoverUnusable("has other keys than that of the new volume", "have it made again")
    elif handover.resource not in contents.keys or not 1 <= len(sizes) <= MOST_KEYS:
        raise HandoverUnusable("has not the key of its image", "have it made again")
    if not all(KEY_BYTES[0] <= size <= KEY_BYTES[1] for size in sizes):
        raise HandoverUnusable("has a key of an unusable length", "have it made again")
    for resource in contents.keys:
        check_resource(resource)
    volumes = {volume.volume: volume.resource for volume in handover.volumes}
    if not set(contents.anchors) <= set(volumes) or not set(volumes.values()) <= set(contents.keys):
        raise HandoverUnusable("names volumes and keys that do not belong together", "have it made again")
    return Opened(
        handover=handover,
        keys={resource: Secret(value) for resource, value in contents.keys.items()},
        anchors={volume: Anchor.unpack(packed) for volume, packed in contents.anchors.items()},
    )


def reseal(handover: Handover, key: jwe.PrivateKey, recipient: Mapping[str, str]) -> Handover:
    """The same keys for another recipient; raises as `open_`."""
    opened = open_(handover, key)
    try:
        return seal(handover, opened.keys, opened.anchors, recipient)
    finally:
        opened.close()
