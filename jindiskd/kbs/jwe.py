"""The encrypted answer: flattened JWE (RFC 7516) with A256GCM, to an EC or RSA key (protocol section 8)."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.keywrap import InvalidUnwrap, aes_key_unwrap, aes_key_wrap

from jindiskd.base.secret import Secret
from jindiskd.kbs import encoding, jwk
from jindiskd.kbs.messages import MalformedMessage, read_object

WHAT = "the encrypted answer"
MEMBERS = {"protected", "encrypted_key", "iv", "ciphertext", "tag"}
_OAEP = padding.OAEP(mgf=padding.MGF1(hashes.SHA256()), algorithm=hashes.SHA256(), label=None)
PrivateKey = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey


def _kek(z: bytes) -> bytes:
    """Concat KDF, SHA-256, one round, for ECDH-ES+A256KW without party information (RFC 7518 section 4.6.2)."""
    alg = jwk.EC_ALG.encode()
    digest = hashes.Hash(hashes.SHA256())
    info = len(alg).to_bytes(4, "big") + alg + bytes(4) + bytes(4) + (256).to_bytes(4, "big")
    digest.update((1).to_bytes(4, "big") + z + info)
    return digest.finalize()


def seal(plaintext: bytes | bytearray, recipient: Mapping[str, object]) -> str:
    """Encrypt to a TEE key.

    The protected header is compact JSON in the order `alg`, `enc`, `epk` (`crv`, `kty`, `x`, `y`): the reference client
    serialises it anew and uses its own text as additional data, so another order could not be opened by it.

    Raises:
        MalformedMessage: `recipient` is not a key the protocol allows.
    """
    key = jwk.public_key(recipient)
    cek = os.urandom(32)
    header: dict[str, Any]
    if isinstance(key, rsa.RSAPublicKey):
        header = {"alg": jwk.RSA_ALG, "enc": "A256GCM"}
        wrapped = key.encrypt(cek, _OAEP)
    else:
        ephemeral = ec.generate_private_key(key.curve)
        header = {"alg": jwk.EC_ALG, "enc": "A256GCM", "epk": jwk.coordinates(ephemeral.public_key())}
        wrapped = aes_key_wrap(_kek(ephemeral.exchange(ec.ECDH(), key)), cek)
    protected = encoding.encode(json.dumps(header, separators=(",", ":")).encode())
    iv = os.urandom(12)
    sealed = AESGCM(cek).encrypt(iv, bytes(plaintext), protected.encode())
    answer = {
        "protected": protected,
        "encrypted_key": encoding.encode(wrapped),
        "iv": encoding.encode(iv),
        "ciphertext": encoding.encode(sealed[:-16]),
        "tag": encoding.encode(sealed[-16:]),
    }
    return json.dumps(answer, separators=(",", ":"))


def open_(text: bytes, key: PrivateKey) -> Secret:
    """Decrypt an answer; additional data is the header's text as received.

    Raises:
        MalformedMessage: not such a JWE, another algorithm or curve, or it was not made for this key.
    """
    value = read_object(text, WHAT)
    if set(value) != MEMBERS:
        raise MalformedMessage(WHAT, "not a flattened JWE")
    header = read_object(encoding.decode(value["protected"], WHAT), WHAT)
    wrapped = encoding.decode(value["encrypted_key"], WHAT)
    try:
        cek = _unwrap(header, wrapped, key)
        sealed = encoding.decode(value["ciphertext"], WHAT) + encoding.decode(value["tag"], WHAT, 16)
        opened = AESGCM(cek).decrypt(encoding.decode(value["iv"], WHAT, 12), sealed, str(value["protected"]).encode())
    except (InvalidTag, InvalidUnwrap, ValueError) as exc:
        raise MalformedMessage(WHAT, "it does not open with this key") from exc
    return Secret(bytearray(opened))


def _unwrap(header: dict[str, Any], wrapped: bytes, key: PrivateKey) -> bytes:
    if header.get("enc") != "A256GCM":
        raise MalformedMessage(WHAT, "another content encryption than A256GCM")
    if isinstance(key, rsa.RSAPrivateKey):
        if set(header) != {"alg", "enc"} or header["alg"] != jwk.RSA_ALG:
            raise MalformedMessage(WHAT, f"another algorithm than {jwk.RSA_ALG}")
        cek = key.decrypt(wrapped, _OAEP)
    else:
        if set(header) != {"alg", "enc", "epk"} or header["alg"] != jwk.EC_ALG or not isinstance(header["epk"], dict):
            raise MalformedMessage(WHAT, f"another algorithm than {jwk.EC_ALG}")
        epk = jwk.ec_public_key(header["epk"], {})
        if epk.curve.name != key.curve.name:
            raise MalformedMessage(WHAT, "the ephemeral key lies on another curve")
        cek = aes_key_unwrap(_kek(key.exchange(ec.ECDH(), epk)), wrapped)
    if len(cek) != 32:
        raise MalformedMessage(WHAT, "the content key has another length than 32 bytes")
    return cek
