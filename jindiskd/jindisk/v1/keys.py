"""Keys of JinDisk 1, and the one way in which it seals (`docs/formats/jindisk1.md`, sections 3 and 4).

The root key protects the superblock alone, whose content follows from the size; all other keys are stored on the disk
in clear. A password adds nothing but the reference tools' fixed salts.
"""

from __future__ import annotations

import enum
import functools
import struct
from collections.abc import Sequence

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.pbkdf2 import PBKDF2HMAC

from jindiskd.base.secret import Secret
from jindiskd.errors import InvalidArgument
from jindiskd.jindisk.errors import VolumeUnauthentic
from jindiskd.jindisk.native import RUN, Blocks
from jindiskd.jindisk.runs import OpeningRun, SealingRun

ROOT_BYTES = 28
"""A root key as this package takes it: 16 bytes of AES key, then 12 of IV."""
KEY_BYTES = 16
IV_BYTES = 12
TAG_BYTES = 16
ITERATIONS = 131_072
DERIVED_BYTES = 64
ZERO_NONCE = bytes(12)
_SEQUENCE = struct.Struct("<Q12s")


class Kdf(enum.StrEnum):
    """Which of the reference's command-line tools made the root key from a password. The disk does not say."""

    C = "c"
    RUST = "rust"


SALTS = {Kdf.C: b"salt", Kdf.RUST: bytes(64)}


def derive(password: Secret, kdf: Kdf) -> Secret:
    """The root key, 28 bytes, that a reference tool makes of a password: PBKDF2 with HMAC-SHA-512.

    Salt and iterations are fixed, so equal passwords give equal keys everywhere. Prefer `Secret.random(28)`.
    """
    function = PBKDF2HMAC(algorithm=hashes.SHA512(), length=DERIVED_BYTES, salt=SALTS[kdf], iterations=ITERATIONS)
    derived = bytearray(function.derive(bytes(password.reveal())))
    root = Secret(memoryview(derived)[:ROOT_BYTES])
    derived[:] = bytes(len(derived))
    return root


def check_root(key: Secret) -> Secret:
    """The root key itself.

    Raises:
        InvalidArgument: it has not 28 bytes.
    """
    if len(key) != ROOT_BYTES:
        wanted = f"a JinDisk 1 key has {ROOT_BYTES}: {KEY_BYTES} of root key and {IV_BYTES} of root IV"
        raise InvalidArgument("a root key of", f"{len(key)} bytes", wanted)
    return key


def data_aad(number: int, nonce: bytes = ZERO_NONCE) -> bytes:
    """The 20 bytes that are authenticated with everything: a number, u64, and the nonce once more."""
    return _SEQUENCE.pack(number, nonce)


NODE_AAD = data_aad(0)


def seal(key: bytes, plain: bytes | memoryview, aad: bytes = NODE_AAD) -> bytes:
    """Ciphertext and tag under the zero nonce. A key of data seals one block; a file's key seals all its nodes."""
    return AESGCM(key).encrypt(ZERO_NONCE, plain, aad)


def unseal(key: bytes, sealed: bytes | memoryview, aad: bytes = NODE_AAD) -> bytes | None:
    """The plaintext; None if the tag does not verify."""
    try:
        return AESGCM(key).decrypt(ZERO_NONCE, sealed, aad)
    except InvalidTag:
        return None


@functools.cache
def _aads(count: int) -> tuple[struct.Struct, struct.Struct]:
    return struct.Struct("<" + "Q12x" * count), struct.Struct("20s" * count)


def _seal_into(key: bytes, plain: memoryview, aad: bytes, sealed: memoryview) -> int:
    aead = AESGCM(key)
    into = getattr(aead, "encrypt_into", None)  # since cryptography 47
    if into is not None:
        into(ZERO_NONCE, plain, aad, sealed)
    else:
        sealed[:] = aead.encrypt(ZERO_NONCE, plain, aad)
    return len(sealed)


def blocks_of(keys: Sequence[bytes], first: int) -> Blocks:
    """Blocks of consecutive numbers from `first` on, each under its own key, for the compiled loop."""
    runs = RUN.pack(first, len(keys))
    return Blocks(b"".join(keys), KEY_BYTES, None, runs, first, aad_bytes=_SEQUENCE.size)


def seal_run(keys: Sequence[bytes], first: int, plains: Sequence[memoryview], run: SealingRun) -> None:
    """Seal blocks of consecutive numbers from `first` on, each under its own key, into the first places of a run."""
    pack, unpack = _aads(len(keys))
    aads = unpack.unpack(pack.pack(*range(first, first + len(keys))))
    run.take(map(_seal_into, keys, plains, aads, run.places))


def open_run(keys: Sequence[bytes], first: int, run: OpeningRun, plains: Sequence[memoryview]) -> int | None:
    """Open what `seal_run` sealed; the place of the first that does not open, or None."""
    pack, unpack = _aads(len(keys))
    aads = unpack.unpack(pack.pack(*range(first, first + len(keys))))
    for at, (key, sealed, aad, plain) in enumerate(zip(keys, run.places, aads, plains, strict=False)):
        aead = AESGCM(key)
        into = getattr(aead, "decrypt_into", None)  # since cryptography 47
        try:
            if into is not None:
                into(ZERO_NONCE, sealed, aad, plain)
            else:
                plain[:] = aead.decrypt(ZERO_NONCE, sealed, aad)
        except InvalidTag:
            return at
    return None


def seal_superblock(root: Secret, plain: bytes) -> bytes:
    """Ciphertext and tag of the superblock's 132 bytes."""
    material = bytes(check_root(root).reveal())
    nonce = material[KEY_BYTES:]
    return AESGCM(material[:KEY_BYTES]).encrypt(nonce, plain, data_aad(0, nonce))


def open_superblock(root: Secret, sealed: bytes) -> bytes:
    """The superblock's 132 bytes.

    Raises:
        VolumeUnauthentic: the tag does not verify.
    """
    material = bytes(check_root(root).reveal())
    nonce = material[KEY_BYTES:]
    try:
        return AESGCM(material[:KEY_BYTES]).decrypt(nonce, sealed, data_aad(0, nonce))
    except InvalidTag as exc:
        raise VolumeUnauthentic("the JinDisk 1 superblock (raw block 0)") from exc
