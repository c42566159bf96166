"""Guest policies in words and numbers."""

from __future__ import annotations

import itertools

import pytest

from jindiskd.attest import guest_policy
from jindiskd.attest.appraise import SnpExpectations
from jindiskd.attest.guest_policy import SEV_WORDS, SNP_WORDS
from jindiskd.attest.sev import appraise_policy
from jindiskd.base.platform import Tee
from jindiskd.errors import InvalidArgument, NotSupported


@pytest.mark.parametrize(
    ("tee", "text", "policy"),
    [
        # AMD 56860 section 4.3: ABI minor in bits 7:0, major in 15:8, SMT 16, one 17, DEBUG 19, …
        (Tee.SNP, "", 0x30000),
        (Tee.SNP, "no-smt", 0x20000),
        (Tee.SNP, " abi=1.55 , single-socket", 0x130137),
        (Tee.SNP, "aes-256-xts,rapl-off,ciphertext-hiding,no-page-swap", 0x3C30000),
        (Tee.SNP, "cxl", 0x230000),
        # AMD 55766 chapter 3: NODBG 0, NOKS 1, ES 2, NOSEND 3, DOMAIN 4, SEV 5, API major 23:16, minor 31:24.
        (Tee.SEV, "", 0xB),
        (Tee.SEV_ES, "", 0xF),
        (Tee.SEV, "domain,sev", 0x3B),
        (Tee.SEV_ES, "abi=1.51", 0x3301000F),
        (Tee.TDX, "", 0),
    ],
)
def test_words_are_the_bits_of_the_specification(tee: Tee, text: str, policy: int) -> None:
    """And back."""
    assert guest_policy.read(text, tee) == policy
    assert guest_policy.problem(policy, tee) == ""
    assert guest_policy.read(guest_policy.written(policy, tee), tee) == policy


@pytest.mark.parametrize(
    ("tee", "text", "says"),
    [
        (Tee.SNP, "debug", "--debug"),
        (Tee.SNP, "no-smt,no-smt", "twice"),
        (Tee.SNP, "abi=1.55,abi=1.5", "twice"),
        (Tee.SNP, "abi=1.256", "0 to 255"),
        (Tee.SNP, "abi=1", "abi=MAJOR.MINOR"),
        (Tee.SNP, "single_socket", "did you mean 'single-socket'"),
        (Tee.SNP, "domain", "there are"),
        (Tee.SNP, ",", "there are"),
        (Tee.SEV, "debug", "no broker gives a key"),
        (Tee.SEV_ES, "no-smt", "there are"),
    ],
)
def test_what_is_no_policy_is_refused(tee: Tee, text: str, says: str) -> None:
    """With what would be one."""
    with pytest.raises(InvalidArgument) as caught:
        guest_policy.read(text, tee)
    assert says in str(caught.value)


def test_debugging_has_to_be_meant() -> None:
    """Twice: by the word and by the permission; SEV guests have none; TDX has no policy to choose."""
    assert guest_policy.read("debug", Tee.SNP, debug=True) == 0xB0000
    with pytest.raises(InvalidArgument):
        guest_policy.read("debug", Tee.SEV, debug=True)
    with pytest.raises(NotSupported):
        guest_policy.read("single-socket", Tee.TDX)


def test_every_policy_is_written_and_read_back() -> None:
    """All sets of words; each SEV policy is one that the verifier takes."""
    for tee, words in ((Tee.SNP, [*(set(SNP_WORDS) - {"debug"}), "no-smt"]), (Tee.SEV, list(SEV_WORDS))):
        for count in range(len(words) + 1):
            for some in itertools.combinations(words, count):
                policy = guest_policy.read(",".join(some), tee)
                assert set(filter(None, guest_policy.written(policy, tee).split(","))) == set(some)
                assert guest_policy.problem(policy, tee) == ""
                if tee is Tee.SEV:
                    assert appraise_policy(policy, encrypted_state=False) == []
    assert SnpExpectations().allow_debug is False


@pytest.mark.parametrize(
    ("tee", "policy"),
    [
        (Tee.SNP, 0x10000), (Tee.SNP, 0), (Tee.SNP, 0x70000), (Tee.SNP, 1 << 26 | 0x30000), (Tee.SNP, -1),
        (Tee.SEV, 0x3), (Tee.SEV, 0xA), (Tee.SEV_ES, 0xB), (Tee.SEV, 0x4B), (Tee.TDX, 1),
    ],
)  # fmt: skip
def test_a_strangers_number_is_judged(tee: Tee, policy: int) -> None:
    """Bits that must be, and bits that are none: a migration agent among them."""
    assert guest_policy.problem(policy, tee)
