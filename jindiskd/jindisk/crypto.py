"""Keys: drawing, sealing and opening (format document, section 6).

The rule K1 is carried by types. An `OpeningKey` is made of bytes from anywhere and can only open. A `SealingKey` is
made by a `Generator`, which draws it, and nowhere else; the one exception are the worker processes of a bulk load, to
which the drawing process hands a key over and by that loses it, each raw block to one of them. After a fork the child's
generators and sealing keys are dead.
"""

from __future__ import annotations

import functools
import hmac
import os
import struct
from collections import deque
from collections.abc import Callable, Sequence
from typing import ClassVar
from uuid import UUID

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from jindiskd.base.secret import Secret
from jindiskd.errors import InvalidArgument
from jindiskd.jindisk.errors import VolumeFenced, VolumeUnauthentic
from jindiskd.jindisk.geometry import ENTRY_BYTES, TAG_BYTES, Kind
from jindiskd.jindisk.native import RUN, Blocks, Native
from jindiskd.jindisk.runs import OpeningRun, SealingRun

KEY_BYTES = 32
SESSION_BYTES = 32
ENTROPY_BYTES = 64
MOST_AHEAD = 64
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

    __slots__ = ("_cipher", "_material")

    def __init__(self, material: bytes) -> None:
        """`material`: 32 bytes, from the disk or from memory."""
        self._material = material
        self._cipher: AESGCM | None = None

    @property
    def _aead(self) -> AESGCM:
        if self._cipher is None:  # made when it is needed: that costs more than to open a block
            self._cipher = AESGCM(self._material)
        return self._cipher

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

    def open_run(self, run: OpeningRun, plains: Sequence[memoryview]) -> bool:
        """Open the first blocks of a numbered run, one into each of `plains`; whether all tags verify.

        Where one does not, nothing is said of the others, and what `plains` hold is worth nothing.
        """
        into = getattr(self._aead, "decrypt_into", None)  # since cryptography 47
        try:
            if into is not None:
                deque(map(into, run.nonces, run.places, run.aads, plains), maxlen=0)
            else:
                for nonce, sealed, aad, plain in zip(run.nonces, run.places, run.aads, plains, strict=False):
                    plain[:] = self._aead.decrypt(nonce, sealed, aad)
        except InvalidTag:
            return False
        return True

    def open_run_at(self, run: OpeningRun, number: int, plain: memoryview) -> bool:
        """Open one block of a numbered run; whether its tag verifies."""
        found = self.opens(bytes(run.nonces[number]), bytes(run.places[number]), bytes(run.aads[number]))
        if found is None:
            return False
        plain[:] = found
        return True

    def open_blocks(
        self, native: Native, lba: int, raw: int, *, sealed: memoryview, entries: memoryview, plain: memoryview
    ) -> bool:
        """Open blocks that lie one behind the other in the image and in one segment; whether all tags verify.

        Args:
            native: the compiled loop.
            lba: the first block's.
            raw: the first block's.
            sealed: their ciphertexts, one behind the other.
            entries: their entries of tree F, 24 bytes each; as many as there are blocks.
            plain: takes the plaintexts; worth nothing where a tag does not verify.
        """
        step = ENTRY_BYTES[Kind.F]
        count = len(entries) // step
        blocks = Blocks(self._material, KEY_BYTES, raw, RUN.pack(lba, count), lba)
        return native.unseal(blocks, sealed, entries[step - TAG_BYTES :], plain, tag_step=step) == count


def _encrypt_into(
    aead: AESGCM, nonce: memoryview, plain: bytes | memoryview, aad: memoryview, sealed: memoryview
) -> int:
    """What `AESGCM.encrypt_into` does."""
    sealed[:] = aead.encrypt(nonce, plain, aad)
    return len(sealed)


class SealingKey:
    """A key that this process drew. Made by `Generator` or `take_over`, nowhere else."""

    __slots__ = ("_cipher", "_given", "_lineage", "_material")

    def __init__(self, material: bytes) -> None:
        """Only for this module: `material` was drawn just now."""
        self._material, self._given = material, False
        self._cipher: AESGCM | None = None
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
        return self._aead.encrypt(nonce, plain, aad)

    def seal_run(self, first: int, lbas: Sequence[int], plains: Sequence[bytes | memoryview], run: SealingRun) -> None:
        """Seal blocks of 4096 bytes under consecutive numbers from `first` on, into the first places of a run.

        Args:
            first: number of the first block's nonce, see `block_nonce`. The caller sees to it that none comes twice.
            lbas: each block's associated data, as an unsigned 64-bit number.
            plains: their plaintexts.
            run: takes ciphertexts and tags.

        Raises:
            VolumeFenced: as `seal`.
        """
        aead = self._aead
        if len(lbas) != len(plains):
            raise ValueError("each block has one number")
        run.number(first, lbas)
        into = getattr(aead, "encrypt_into", None)  # since cryptography 47
        if into is None:
            into = functools.partial(_encrypt_into, aead)
        run.take(map(into, run.nonces, plains, run.aads, run.places))

    def seal_blocks(
        self, native: Native, first: int, runs: memoryview, *, base: int, plain: memoryview, room: SealingRun
    ) -> int:
        """As `seal_run`, by the compiled loop; returns how many blocks.

        Args:
            native: the compiled loop.
            first: number of the first block's nonce.
            runs: the blocks, as `RUN`, one run behind the other.
            base: the block that begins `plain`.
            plain: the plaintexts.
            room: takes ciphertexts and tags.

        Raises:
            VolumeFenced: as `seal`.
        """
        self._check()
        return room.seal(native, Blocks(self._material, KEY_BYTES, first, runs, base), plain)

    def hand_over(self) -> bytes:
        """Give the key up for a worker process; it seals no more here."""
        self._given = True
        return self._material

    def _check(self) -> None:
        if self._given or self._lineage != _Lineage.forks:
            raise VolumeFenced("a sealing key was used in another process than its own")

    @property
    def _aead(self) -> AESGCM:
        self._check()
        if self._cipher is None:
            self._cipher = AESGCM(self._material)
        return self._cipher


class Generator:
    """Draws all keys, salts and identifiers of one process (section 6.3)."""

    __slots__ = ("_ahead", "_count", "_lineage", "_seed")

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
        self._ahead: list[bytes] = []
        self._lineage = _Lineage.forks

    def draw(self) -> bytes:
        """The next 32 bytes.

        Raises:
            VolumeFenced: this process was forked from the generator's.
        """
        if self._lineage != _Lineage.forks:
            raise VolumeFenced("the key generator was used in a forked process")
        if not self._ahead:
            # Many at once: alone, each would find the hash out of the processor's cache, and take six times as long.
            end = self._count + min(self._count + 1, MOST_AHEAD)
            numbers = range(end - 1, self._count - 1, -1)
            self._ahead = [hmac.digest(self._seed, _COUNTER.pack(number), "sha256") for number in numbers]
        self._count += 1
        return self._ahead.pop()

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
        other._count, other._ahead, other._lineage = 0, [], self._lineage
        return other

    def placement_seed(self) -> bytes:
        """Seed for choosing segments at random; independent of all keys."""
        return hmac.digest(self._seed, b"placement", "sha256")


def superblock_opening_key(key: Secret, uuid: UUID, salt: bytes) -> OpeningKey:
    """The key that opens the superblock with this salt."""
    return OpeningKey(hkdf(ikm=check_key(key).reveal(), salt=uuid.bytes + salt, info=LABEL_SUPERBLOCK))
