"""ID block and ID authentication of a SEV-SNP launch: an owner's signed statement of what may be launched.

The firmware refuses a launch whose digest or policy differ from the block's, and reports the digests of the keys; so a
policy can name a key and a least security version instead of every digest, and old images can be ruled out.

Source: AMD 56860 section 8.18 and tables "ID Block" and "ID Authentication Information"; signatures and keys as in its
chapter "Digital signatures". Integers are little-endian, numbers of keys and signatures too.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from jindiskd.attest.guest_policy import SNP_DEFAULT
from jindiskd.attest.model import MalformedEvidence
from jindiskd.errors import InvalidArgument, NotFound

BLOCK_BYTES, AUTH_BYTES, KEY_BYTES, SIGNATURE_BYTES = 96, 4096, 0x404, 0x200
VERSION, ALGORITHM, CURVE_P384 = 1, 1, 2
BLOCK_SIGNATURE_AT, ID_KEY_AT, KEY_SIGNATURE_AT, AUTHOR_KEY_AT = 0x40, 0x240, 0x680, 0x880
MAX_PEM_BYTES = 16 << 10


@dataclass(frozen=True, slots=True, kw_only=True)
class IdBlock:
    """What is signed."""

    launch_digest: bytes
    """48 bytes."""
    family_id: bytes = bytes(16)
    image_id: bytes = bytes(16)
    guest_svn: int = 0
    """Unsigned, 32 bits; `minimum_guest_svn` of a policy is compared with it."""
    policy: int = SNP_DEFAULT
    """The guest's policy, which the launch must have exactly."""

    def encode(self) -> bytes:
        """The 96 bytes: launch digest, family id, image id, version, security version, policy.

        Raises:
            InvalidArgument: a member of another length or range.
        """
        for name, value, length in (
            ("launch digest", self.launch_digest, 48),
            ("family id", self.family_id, 16),
            ("image id", self.image_id, 16),
        ):
            if len(value) != length:
                raise InvalidArgument(name, value.hex(), f"it has {length} bytes")
        if not 0 <= self.guest_svn < 1 << 32:
            raise InvalidArgument("security version", self.guest_svn, "it is an unsigned 32-bit number")
        if not 0 <= self.policy < 1 << 64 or not self.policy & 1 << 17:
            raise InvalidArgument("guest policy", hex(self.policy), "it is a 64-bit number with bit 17 set")
        numbers = VERSION.to_bytes(4, "little") + self.guest_svn.to_bytes(4, "little")
        return self.launch_digest + self.family_id + self.image_id + numbers + self.policy.to_bytes(8, "little")


    @classmethod
    def decode(cls, blob: bytes) -> IdBlock:
        """What 96 bytes say.

        Raises:
            MalformedEvidence: another length or version.
        """
        if len(blob) != BLOCK_BYTES or int.from_bytes(blob[80:84], "little") != VERSION:
            raise MalformedEvidence("ID block", f"it is not one of version {VERSION} with {BLOCK_BYTES} bytes")
        return cls(
            launch_digest=blob[:48],
            family_id=blob[48:64],
            image_id=blob[64:80],
            guest_svn=int.from_bytes(blob[84:88], "little"),
            policy=int.from_bytes(blob[88:96], "little"),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SignedIdBlock:
    """What libvirt takes as `idBlock` and `idAuth`, and what a policy names."""

    block: bytes
    auth: bytes
    id_key_digest: bytes
    """48 bytes: `id_key_digests` of a policy."""
    author_key_digest: bytes
    """48 bytes: `author_key_digests` of a policy; zeros without an author key."""


def load_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """A P-384 private key from a PEM file without a passphrase.

    Raises:
        NotFound, InvalidArgument: no such file; it holds something else.
    """
    try:
        with path.open("rb") as stream:
            data = stream.read(MAX_PEM_BYTES + 1)
    except (FileNotFoundError, IsADirectoryError) as exc:
        raise NotFound("key file", str(path)) from exc
    try:
        key = load_pem_private_key(data, None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as exc:
        raise InvalidArgument("key file", str(path), "it holds no private key in PEM without a passphrase") from exc
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP384R1):
        raise InvalidArgument("key file", str(path), "its key is not one of curve P-384")
    return key


def encode_key(key: ec.EllipticCurvePublicKey) -> bytes:
    """The public key structure, 0x404 bytes: curve, x and y as 72 bytes each, zeros."""
    numbers = key.public_numbers()
    point = numbers.x.to_bytes(72, "little") + numbers.y.to_bytes(72, "little")
    return (CURVE_P384.to_bytes(4, "little") + point).ljust(KEY_BYTES, b"\0")


def decode_key(blob: bytes) -> ec.EllipticCurvePublicKey:
    """The key of a structure.

    Raises:
        MalformedEvidence: another length or curve, no point of it, or bytes set after it.
    """
    what = "ID key"
    if len(blob) != KEY_BYTES or int.from_bytes(blob[:4], "little") != CURVE_P384 or any(blob[0x94:]):
        raise MalformedEvidence(what, f"it is not a P-384 key of {KEY_BYTES} bytes")
    x, y = int.from_bytes(blob[4:0x4C], "little"), int.from_bytes(blob[0x4C:0x94], "little")
    try:
        return ec.EllipticCurvePublicNumbers(x, y, ec.SECP384R1()).public_key()
    except ValueError as exc:
        raise MalformedEvidence(what, "it is not a point of its curve") from exc


def _sign(key: ec.EllipticCurvePrivateKey, data: bytes) -> bytes:
    r, s = decode_dss_signature(key.sign(data, ec.ECDSA(hashes.SHA384())))
    return (r.to_bytes(72, "little") + s.to_bytes(72, "little")).ljust(SIGNATURE_BYTES, b"\0")


def _signed(key: ec.EllipticCurvePublicKey, data: bytes, signature: bytes) -> bool:
    r, s = int.from_bytes(signature[:72], "little"), int.from_bytes(signature[72:144], "little")
    if any(signature[144:]):
        return False
    try:
        key.verify(encode_dss_signature(r, s), data, ec.ECDSA(hashes.SHA384()))
    except InvalidSignature:
        return False
    return True


def sign(
    block: IdBlock, id_key: ec.EllipticCurvePrivateKey, author_key: ec.EllipticCurvePrivateKey | None = None
) -> SignedIdBlock:
    """Sign a block, and with an author key the ID key too. May be called from any thread."""
    blob, public = block.encode(), encode_key(id_key.public_key())
    auth = bytearray(AUTH_BYTES)
    auth[0:4] = ALGORITHM.to_bytes(4, "little")
    auth[BLOCK_SIGNATURE_AT : BLOCK_SIGNATURE_AT + SIGNATURE_BYTES] = _sign(id_key, blob)
    auth[ID_KEY_AT : ID_KEY_AT + KEY_BYTES] = public
    author_digest = bytes(48)
    if author_key is not None:
        author = encode_key(author_key.public_key())
        auth[4:8] = ALGORITHM.to_bytes(4, "little")
        auth[KEY_SIGNATURE_AT : KEY_SIGNATURE_AT + SIGNATURE_BYTES] = _sign(author_key, public)
        auth[AUTHOR_KEY_AT : AUTHOR_KEY_AT + KEY_BYTES] = author
        author_digest = hashlib.sha384(author).digest()
    return SignedIdBlock(
        block=blob,
        auth=bytes(auth),
        id_key_digest=hashlib.sha384(public).digest(),
        author_key_digest=author_digest,
    )


def check(block: bytes, auth: bytes) -> SignedIdBlock:
    """Read a block and its authentication as the firmware does.

    Raises:
        MalformedEvidence: not in their formats, or a signature does not hold.
    """
    what = "ID authentication"
    if len(block) != BLOCK_BYTES or len(auth) != AUTH_BYTES:
        raise MalformedEvidence(what, f"block and authentication have {BLOCK_BYTES} and {AUTH_BYTES} bytes")
    if int.from_bytes(block[80:84], "little") != VERSION:
        raise MalformedEvidence("ID block", "it is of another version than 1")
    id_algorithm, author_algorithm = (int.from_bytes(auth[at : at + 4], "little") for at in (0, 4))
    if id_algorithm != ALGORITHM or author_algorithm not in {0, ALGORITHM}:
        raise MalformedEvidence(what, "it is signed with another algorithm than ECDSA P-384 with SHA-384")
    if any(auth[8:BLOCK_SIGNATURE_AT]) or any(auth[ID_KEY_AT + KEY_BYTES : KEY_SIGNATURE_AT]):
        raise MalformedEvidence(what, "reserved bytes are set")
    public = auth[ID_KEY_AT : ID_KEY_AT + KEY_BYTES]
    if not _signed(decode_key(public), block, auth[BLOCK_SIGNATURE_AT : BLOCK_SIGNATURE_AT + SIGNATURE_BYTES]):
        raise MalformedEvidence(what, "the block was not signed by the ID key")
    author_digest = bytes(48)
    if any(auth[(AUTHOR_KEY_AT + KEY_BYTES) if author_algorithm else KEY_SIGNATURE_AT :]):
        raise MalformedEvidence(what, "bytes are set that belong to nothing")
    if author_algorithm:
        author = auth[AUTHOR_KEY_AT : AUTHOR_KEY_AT + KEY_BYTES]
        if not _signed(decode_key(author), public, auth[KEY_SIGNATURE_AT : KEY_SIGNATURE_AT + SIGNATURE_BYTES]):
            raise MalformedEvidence(what, "the ID key was not signed by the author key")
        author_digest = hashlib.sha384(author).digest()
    return SignedIdBlock(
        block=block, auth=auth, id_key_digest=hashlib.sha384(public).digest(), author_key_digest=author_digest
    )
