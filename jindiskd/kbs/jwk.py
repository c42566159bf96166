"""The key of a trusted execution environment as a JSON web key (protocol section 7)."""

from __future__ import annotations

from collections.abc import Mapping

from cryptography.hazmat.primitives.asymmetric import ec, rsa

from jindiskd.kbs import encoding
from jindiskd.kbs.messages import MalformedMessage

WHAT = "the TEE public key"
CURVES: dict[str, tuple[type[ec.EllipticCurve], int]] = {"P-256": (ec.SECP256R1, 32), "P-521": (ec.SECP521R1, 66)}
EC_ALG = "ECDH-ES+A256KW"
RSA_ALG = "RSA-OAEP-256"
RSA_BITS = (2048, 8192)

PublicKey = ec.EllipticCurvePublicKey | rsa.RSAPublicKey


def public_key(jwk: Mapping[str, object]) -> PublicKey:
    """The key itself; exactly the members of section 7, since any other would change what is hashed.

    Raises:
        MalformedMessage: another kind, algorithm, member, width, a point off the curve, or an RSA size out of range.
    """
    if jwk.get("kty") == "EC":
        return ec_public_key(jwk, {"alg": EC_ALG})
    if jwk.get("kty") == "RSA" and jwk.get("alg") == RSA_ALG and set(jwk) == {"kty", "alg", "n", "e"}:
        n = int.from_bytes(encoding.decode(jwk["n"], WHAT), "big")
        e = int.from_bytes(encoding.decode(jwk["e"], WHAT), "big")
        if not RSA_BITS[0] <= n.bit_length() <= RSA_BITS[1] or e != 65537:
            raise MalformedMessage(WHAT, f"an RSA key has {RSA_BITS[0]} to {RSA_BITS[1]} bits and exponent 65537")
        try:
            return rsa.RSAPublicNumbers(e, n).public_key()
        except ValueError as exc:
            raise MalformedMessage(WHAT, "not an RSA key") from exc
    raise MalformedMessage(WHAT, f"neither EC with {EC_ALG} nor RSA with {RSA_ALG}")


def ec_public_key(jwk: Mapping[str, object], more: Mapping[str, str]) -> ec.EllipticCurvePublicKey:
    """An EC key whose members are `kty`, `crv`, `x`, `y` and exactly those of `more`."""
    curve = CURVES.get(str(jwk.get("crv")))
    if curve is None or set(jwk) != {"kty", "crv", "x", "y", *more} or any(jwk[m] != v for m, v in more.items()):
        raise MalformedMessage(WHAT, "not an EC key on P-256 or P-521 with the members of the protocol")
    kind, width = curve
    x = int.from_bytes(encoding.decode(jwk["x"], WHAT, width), "big")
    y = int.from_bytes(encoding.decode(jwk["y"], WHAT, width), "big")
    try:
        return ec.EllipticCurvePublicNumbers(x, y, kind()).public_key()
    except ValueError as exc:
        raise MalformedMessage(WHAT, "the point is not on the curve") from exc


def coordinates(key: ec.EllipticCurvePublicKey) -> dict[str, str]:
    """`crv`, `kty`, `x`, `y` of a key, in the order that the reference client writes them."""
    name = {"secp256r1": "P-256", "secp521r1": "P-521"}[key.curve.name]
    width, numbers = CURVES[name][1], key.public_numbers()
    return {
        "crv": name,
        "kty": "EC",
        "x": encoding.encode(numbers.x.to_bytes(width, "big")),
        "y": encoding.encode(numbers.y.to_bytes(width, "big")),
    }


def tee_jwk(key: ec.EllipticCurvePublicKey) -> dict[str, str]:
    """What a guest sends for its key."""
    return {**coordinates(key), "alg": EC_ALG}
