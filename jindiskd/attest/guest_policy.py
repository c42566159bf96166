"""The guest policy of SEV, SEV-ES and SEV-SNP: what the host may not do with a guest, in words and as the number.

The firmware holds to it from the launch on, and a report or measurement shows it. Whoever builds an image says what it
demands beyond what every image demands; what would let the host into the guest is never a default.
Source: AMD 56860 section 4.3 (SEV-SNP); AMD 55766 chapter 3 (SEV, SEV-ES).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping

from jindiskd.attest.sev import SevPolicy
from jindiskd.attest.snp_report import GuestPolicy
from jindiskd.base.platform import Tee
from jindiskd.errors import InvalidArgument, NotSupported

SNP_DEFAULT = int(GuestPolicy.SMT | GuestPolicy.RESERVED_ONE)
"""Simultaneous multithreading allowed, since a host that has it on starts nothing else; no debugging, no migration."""
SEV_DEFAULT = int(SevPolicy.NODBG | SevPolicy.NOKS | SevPolicy.NOSEND)
"""No debugging, no key sharing, no sending elsewhere."""
SNP_WORDS: Mapping[str, GuestPolicy] = {
    "single-socket": GuestPolicy.SINGLE_SOCKET,
    "cxl": GuestPolicy.CXL_ALLOW,
    "aes-256-xts": GuestPolicy.MEM_AES_256_XTS,
    "rapl-off": GuestPolicy.RAPL_DIS,
    "ciphertext-hiding": GuestPolicy.CIPHERTEXT_HIDING_DRAM,
    "no-page-swap": GuestPolicy.PAGE_SWAP_DISABLE,
    "debug": GuestPolicy.DEBUG,
}
"""Words that set a bit. `cxl` and `debug` allow something, the others demand it."""
NO_SMT = "no-smt"
SEV_WORDS: Mapping[str, SevPolicy] = {"domain": SevPolicy.DOMAIN, "sev": SevPolicy.SEV}
SNP_BITS = int(GuestPolicy.SMT | GuestPolicy.RESERVED_ONE) | sum(int(bit) for bit in SNP_WORDS.values()) | 0xFFFF
SEV_BITS = SEV_DEFAULT | int(SevPolicy.ES | SevPolicy.DOMAIN | SevPolicy.SEV) | 0xFFFF << 16
_ABI = re.compile(r"abi=(\d{1,3})\.(\d{1,3})")


def default(tee: Tee) -> int:
    """The policy of an image for which nothing was said; 0 for TDX, whose attributes are libvirt's."""
    if tee is Tee.TDX:
        return 0
    if tee is Tee.SNP:
        return SNP_DEFAULT
    return SEV_DEFAULT | (int(SevPolicy.ES) if tee is Tee.SEV_ES else 0)


def read(text: str, tee: Tee, *, debug: bool = False) -> int:
    """A policy from words with commas between them, which are added to the default.

    Args:
        text: such as `no-smt,single-socket,abi=1.55`.
        tee: for which the image is built.
        debug: whether the word `debug` is permitted: the host can then read and change the guest's memory.

    Raises:
        InvalidArgument: a word is not known, stands there twice, or is not permitted.
        NotSupported: the platform has no such policy.
    """
    words = [word.strip() for word in text.split(",")] if text.strip() else []
    if tee is Tee.TDX:
        if words:
            raise NotSupported("a guest policy for TDX", "libvirt allows no choice there: leave it out")
        return 0
    policy, seen = default(tee), set()
    bits: Mapping[str, int] = SNP_WORDS if tee is Tee.SNP else SEV_WORDS
    for word in words:
        name = word.partition("=")[0]
        if name in seen:
            raise InvalidArgument("guest policy", text[:100], f"{name!r} stands there twice")
        seen.add(name)
        if version := _ABI.fullmatch(word):
            policy |= _abi(int(version[1]), int(version[2]), tee, word)
        elif word == NO_SMT and tee is Tee.SNP:
            policy &= ~int(GuestPolicy.SMT)
        elif word == "debug" and tee is not Tee.SNP:
            raise InvalidArgument("guest policy", word, "no broker gives a key to a SEV guest that the host can debug")
        elif word == "debug" and not debug:
            text = "the host can read and change the memory of such a guest: say --debug as well if that is meant"
            raise InvalidArgument("guest policy", word, text)
        elif word in bits:
            policy |= int(bits[word])
        else:
            known = (*bits, "abi=MAJOR.MINOR", *((NO_SMT,) if tee is Tee.SNP else ()))
            near = difflib.get_close_matches(word, known, n=1)
            remedy = f"did you mean {near[0]!r}?" if near else f"for {tee} there are {', '.join(known)}"
            raise InvalidArgument("guest policy", word[:40], remedy)
    return policy


def _abi(major: int, minor: int, tee: Tee, word: str) -> int:
    if max(major, minor) > 255:
        raise InvalidArgument("guest policy", word, "each part of a version is 0 to 255")
    # SNP: minor in bits 7:0, major in 15:8. SEV: major in 23:16, minor in 31:24.
    return major << 8 | minor if tee is Tee.SNP else major << 16 | minor << 24


def abi(policy: int, tee: Tee) -> tuple[int, int]:
    """The least firmware ABI (SNP) or API (SEV) version that a policy demands."""
    if tee is Tee.SNP:
        return policy >> 8 & 0xFF, policy & 0xFF
    return policy >> 16 & 0xFF, policy >> 24 & 0xFF


def written(policy: int, tee: Tee) -> str:
    """The words of a policy: what `read` makes it of; empty for the default."""
    if tee is Tee.TDX:
        return ""
    words = [NO_SMT] if tee is Tee.SNP and not policy & GuestPolicy.SMT else []
    bits: Mapping[str, int] = SNP_WORDS if tee is Tee.SNP else SEV_WORDS
    words += [word for word, bit in bits.items() if policy & int(bit)]
    least = abi(policy, tee)
    return ",".join([*words, *([f"abi={least[0]}.{least[1]}"] if any(least) else [])])


def problem(policy: int, tee: Tee) -> str:
    """What is wrong with a policy that somebody else chose; empty where nothing is."""
    if tee is Tee.TDX:
        return "TDX has none" if policy else ""
    bits, must = (SNP_BITS, int(GuestPolicy.RESERVED_ONE)) if tee is Tee.SNP else (SEV_BITS, default(tee))
    if policy < 0 or policy & ~bits:
        return f"{policy:#x} has bits that no image of ours has"
    if policy & must != must:
        return f"{policy:#x} lacks bits that every image of ours has ({must:#x})"
    return ""
