"""Keys: drawing, sealing and opening (format document, section 6).

The rule K1 is carried by types. An `OpeningKey` is made of bytes from anywhere and can only open. A `SealingKey` is
made by a `Generator`, which draws it, and nowhere else; the one exception is a worker process of a bulk load, to which
the drawing process hands a key over and by that loses it. After a fork the child's generators and sealing keys are
dead.
"""

from __future__ import annotations

import hmac
import os
import struct
from collections.abc import Callable, Iterable
from typing import ClassVar
from uuid import UUID

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from jindiskd.base.secret import Secret
from jindiskd.errors import InvalidArgument
from jindiskd.jindisk.errors import VolumeFenced, VolumeUnauthentic

KEY_BYTES = 32
TAG_BYTES = 16
SESSION_BYTES = 32
ENTROPY_BYTES = 64
ZERO_NONCE = bytes(12)
LABEL_SUPERBLOCK = b"jindisk2/1 superblock"
LABEL_GENERATOR = b"jindisk2/1 generator"
_BLOCK_NONCE = struct.Struct("<QI")
_COUNTER = struct.Struct("<Q")


class _Lineage:
    """Which process we are: 0, and one more in each forked child."""

    forks: ClassVar[int] = 0

    @classmethod
    def forked(cls) -> None:
        """Called in the child."""
        cls.forks += 1


os.register_at_fork(after_in_child=_Lineage.forked)


def block_nonce(number: int) -> bytes:
    """12 bytes: a raw block number or journal index, u64, then u32 zero."""
    return _BLOCK_NONCE.pack(number, 0)


def hkdf(*, ikm: bytes | bytearray, salt: bytes, info: bytes) -> bytes:
    """32 bytes by HKDF with SHA-256 (RFC 5869; one block of output, so expansion is one call)."""
    extracted = hmac.digest(salt, ikm, "sha256")
    return hmac.digest(extracted, info + b"\x01", "sha256")


def check_key(key: Secret) -> Secret:
    """The volume key itself.

    Raises:
        InvalidArgument: it has not 32 bytes.
    """
    if len(key) != KEY_BYTES:
        raise InvalidArgument("a volume key of", f"{len(key)} bytes", f"a JinDisk 2 key has {KEY_BYTES}")
    return key


class OpeningKey:
    """A key that opens, and cannot seal."""

    __slots__ = ("_aead", "_into")

    def __init__(self, material: bytes) -> None:
        """`material`: 32 bytes, from the disk or from memory."""
        self._aead = AESGCM(material)
        self._into = getattr(self._aead, "decrypt_into", None)  # since cryptography 47

    def open(self, nonce: bytes, sealed: bytes, aad: bytes, what: str = "a block") -> bytes:
        """The plaintext of ciphertext and tag.

        Raises:
            VolumeUnauthentic: the tag does not verify; names `what`.
        """
        try:
            return self._aead.decrypt(nonce, sealed, aad)
        except InvalidTag as exc:
            raise VolumeUnauthentic(what) from exc

    def opens(self, nonce: bytes, sealed: bytes, aad: bytes) -> bytes | None:
        """As `open`; None if the tag does not verify. For journals, whose end is found so."""
        try:
            return self._aead.decrypt(nonce, sealed, aad)
        except InvalidTag:
            return None


    def opens_into(self, nonce: bytes, sealed: memoryview, aad: bytes, plain: memoryview) -> bool:
        """As `opens`, into a buffer of just the plaintext's length; whether the tag verifies."""
        try:
            if self._into is not None:
                self._into(nonce, sealed, aad, plain)
            else:
                plain[:] = self._aead.decrypt(nonce, sealed, aad)
        except InvalidTag:
            return False
        return True


class SealingKey:
    """A key that this process drew. Made by `Generator` or `take_over`, nowhere else."""

    __slots__ = ("_aead", "_lineage", "_material")

    def __init__(self, material: bytes) -> None:
        """Only for this module: `material` was drawn just now."""
        self._material = material
        self._aead: AESGCM | None = AESGCM(material)
        self._lineage = _Lineage.forks

    @classmethod
    def take_over(cls, material: bytes) -> SealingKey:
        """In a worker process: the key that the drawing process gave up by `hand_over`."""
        return cls(material)

    @property
    def material(self) -> bytes:
        """The 32 bytes, to be stored in the parent structure."""
        return self._material

    def seal(self, nonce: bytes, plain: bytes, aad: bytes) -> bytes:
        """Ciphertext and tag. The caller sees to it that no nonce comes twice.

        Raises:
            VolumeFenced: this process was forked from the one that drew the key, or it was handed over.
        """
        if self._aead is None or self._lineage != _Lineage.forks:
            raise VolumeFenced("a sealing key was used in another process than its own")
        return self._aead.encrypt(nonce, plain, aad)

    def seal_run(self, first: int, blocks: Iterable[tuple[int, bytes | memoryview]], sealed: memoryview) -> list[bytes]:
        """Seal blocks of equal length under consecutive numbers from `first` on; returns their tags.

        Args:
            first: number of the first block's nonce, see `block_nonce`.
            blocks: each block's associated data, as an unsigned 64-bit number, and its plaintext.
            sealed: takes the ciphertexts one behind the other, and has room for 16 bytes more.

        Raises:
            VolumeFenced: as `seal`.
        """
        if self._aead is None or self._lineage != _Lineage.forks:
            raise VolumeFenced("a sealing key was used in another process than its own")
        into = getattr(self._aead, "encrypt_into", None)  # since cryptography 47
        nonce, number, tags, at = _BLOCK_NONCE.pack, _COUNTER.pack, [], 0
        for place, (lba, plain) in enumerate(blocks, first):
            end = at + len(plain)
            if into is not None:
                into(nonce(place, 0), plain, number(lba), sealed[at : end + TAG_BYTES])
            else:
                sealed[at : end + TAG_BYTES] = self._aead.encrypt(nonce(place, 0), plain, number(lba))
            tags.append(bytes(sealed[end : end + TAG_BYTES]))  # the next block overwrites it
            at = end
        return tags

    def hand_over(self) -> bytes:
        """Give the key up for a worker process; it seals no more here."""
        self._aead = None
        return self._material


class Generator:
    """Draws all keys, salts and identifiers of one process (section 6.3)."""

    __slots__ = ("_count", "_lineage", "_seed")

    def __init__(self, key: Secret, session_id: bytes, entropy: Callable[[int], bytes]) -> None:
        """Make the seed.

        Args:
            key: the volume key.
            session_id: 32 bytes, unique; from the broker, or drawn from the system.
            entropy: the operating system's source; asked once for 64 bytes.
        """
        if len(session_id) != SESSION_BYTES:
            raise InvalidArgument("a session id of", f"{len(session_id)} bytes", f"it has {SESSION_BYTES}")
        material = bytearray(check_key(key).reveal())
        material += entropy(ENTROPY_BYTES)
        self._seed = hkdf(ikm=material, salt=session_id, info=LABEL_GENERATOR)
        material[:] = bytes(len(material))
        self._count = 0
        self._lineage = _Lineage.forks

    def draw(self) -> bytes:
        """The next 32 bytes.

        Raises:
            VolumeFenced: this process was forked from the generator's.
        """
        if self._lineage != _Lineage.forks:
            raise VolumeFenced("the key generator was used in a forked process")
        self._count += 1
        return hmac.digest(self._seed, _COUNTER.pack(self._count - 1), "sha256")

    def sealing_key(self) -> SealingKey:
        """A fresh key."""
        return SealingKey(self.draw())

    def superblock_key(self, key: Secret, uuid: UUID) -> tuple[bytes, SealingKey]:
        """A fresh salt, and the key made of it and the volume key."""
        salt = self.draw()
        return salt, SealingKey(hkdf(ikm=check_key(key).reveal(), salt=uuid.bytes + salt, info=LABEL_SUPERBLOCK))

    def branch(self, name: str) -> Generator:
        """Another generator, fixed by this one's seed and the name: what it draws does not depend on draws here."""
        other = object.__new__(Generator)
        other._seed = hmac.digest(self._seed, b"branch " + name.encode(), "sha256")
        other._count, other._lineage = 0, self._lineage
        return other

    def placement_seed(self) -> bytes:
        """Seed for choosing segments at random; independent of all keys."""
        return hmac.digest(self._seed, b"placement", "sha256")


def superblock_opening_key(key: Secret, uuid: UUID, salt: bytes) -> OpeningKey:
    """The key that opens the superblock with this salt."""
    return OpeningKey(hkdf(ikm=check_key(key).reveal(), salt=uuid.bytes + salt, info=LABEL_SUPERBLOCK))
