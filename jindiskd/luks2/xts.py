"""AES-XTS with the `plain64` tweak: sector after sector, the tweak the sector's number in little-endian.

Source: IEEE 1619-2007 for the mode; linux `Documentation/admin-guide/device-mapper/dm-crypt.rst` for `plain64`.
"""

from __future__ import annotations

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes


def _crypt(
    key: bytes | bytearray, data: bytes | memoryview, sector_bytes: int, first_tweak: int, step: int, encrypt: bool
) -> bytes:
    aes = algorithms.AES(bytes(key))
    parts = []
    for index, start in enumerate(range(0, len(data), sector_bytes)):
        tweak = modes.XTS((first_tweak + index * step).to_bytes(16, "little"))
        cipher = Cipher(aes, tweak)
        context = cipher.encryptor() if encrypt else cipher.decryptor()
        parts.append(context.update(data[start : start + sector_bytes]))
    return b"".join(parts)


def encrypt(
    key: bytes | bytearray, data: bytes | memoryview, *, sector_bytes: int, first_tweak: int, step: int
) -> bytes:
    """Encrypt whole sectors; the first has tweak `first_tweak`, each following one `step` more. `key` is 64 bytes."""
    return _crypt(key, data, sector_bytes, first_tweak, step, True)


def decrypt(
    key: bytes | bytearray, data: bytes | memoryview, *, sector_bytes: int, first_tweak: int, step: int
) -> bytes:
    """The reverse of `encrypt`."""
    return _crypt(key, data, sector_bytes, first_tweak, step, False)
