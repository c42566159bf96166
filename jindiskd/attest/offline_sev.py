"""Judging the launch of a SEV or SEV-ES guest from files: what libvirt said of it, and the host's certificates.

There is no evidence from inside such a guest. What is judged is the measurement of a paused launch, which only the
owner can check: it takes the integrity key (TIK) of the session that the launch was made with.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jindiskd.attest.model import EvidenceRefused, Finding, MalformedEvidence
from jindiskd.attest.sev import KEY_BYTES, LaunchReport, SevPolicy, appraise_launch, appraise_policy
from jindiskd.attest.sev_certs import (
    ARK_SHA256,
    CA_SIZES,
    CERTIFICATE_BYTES,
    CHAIN_BYTES,
    NAMES,
    USAGE_ARK,
    parse_authority,
    parse_sev_certificate,
    verify_platform,
)
from jindiskd.attest.verdict import OfflineVerdict, read_evidence_file, verdict_of
from jindiskd.errors import NotFound
from jindiskd.kbs.messages import MalformedMessage, read_object

WHAT = "SEV launch"
MEMBERS = ("sev-measurement", "sev-api-major", "sev-api-minor", "sev-build-id", "sev-policy")
NUMBER = re.compile(r"[0-9]{1,10}|(0x)[0-9a-fA-F]{1,8}")
LINE = re.compile(r"\s*(sev-[a-z-]+)\s*:\s*(\S+)\s*")


@dataclass(frozen=True, slots=True, kw_only=True)
class SevExpectations:
    """What a launch must be. Accepts nothing until a digest is named."""

    launch_digests: frozenset[bytes] = frozenset()
    """Launch digests (32 bytes) that are allowed."""
    minimum_api: tuple[int, int, int] = (0, 0, 0)
    allow_send: bool = False
    encrypted_state: bool = False
    """Whether the policy must require SEV-ES."""


def parse_launch(blob: bytes) -> LaunchReport:
    """What libvirt says of a launch: a JSON object, or the lines of `virsh domlaunchsecinfo`, with the members
    `sev-measurement` (base64 of 48 bytes), `sev-api-major`, `sev-api-minor`, `sev-build-id` and `sev-policy`.

    Raises:
        MalformedEvidence: it lacks one of them, or has another form.
    """
    values: Mapping[str, Any]
    if blob.lstrip()[:1] == b"{":
        try:
            values = read_object(blob, "the SEV launch")
        except MalformedMessage as exc:
            raise MalformedEvidence(WHAT, exc.problem) from exc
    else:
        lines = (LINE.fullmatch(line) for line in blob.decode(errors="replace").splitlines())
        values = {found[1]: found[2] for found in lines if found}
    for name in MEMBERS:
        if name not in values:
            raise MalformedEvidence(WHAT, f"{name} is missing")
    numbers = []
    for name, limit in zip(MEMBERS[1:], (255, 255, 255, (1 << 32) - 1), strict=True):
        value = values[name]
        text = str(value) if isinstance(value, int | str) and not isinstance(value, bool) else ""
        form = NUMBER.fullmatch(text)
        number = -1 if form is None else int(text, 16 if form[1] else 10)
        if not 0 <= number <= limit:
            raise MalformedEvidence(WHAT, f"{name} is not a number of 0 to {limit}")
        numbers.append(number)
    try:
        measurement = base64.b64decode(str(values["sev-measurement"]), validate=True)
    except (binascii.Error, ValueError) as exc:
        raise MalformedEvidence(WHAT, "sev-measurement is not base64") from exc
    return LaunchReport(
        measurement=measurement, api_major=numbers[0], api_minor=numbers[1], build=numbers[2], policy=numbers[3]
    )


def verify_sev_files(
    evidence: Path,
    certificates: Sequence[Path],
    session_key: Path | None,
    wanted: SevExpectations | None,
    *,
    encrypted_state: bool | None = None,
) -> OfflineVerdict:
    """Judge a launch from files.

    Args:
        evidence: what `parse_launch` reads.
        certificates: PDH, PEK, OCA, CEK, ASK and ARK, in any order, as files or in folders; the chain that a host shows
            (PEK, OCA and CEK in one file) too.
        session_key: the session's integrity key (TIK), 16 bytes.
        wanted: digests and versions to accept; without, only what the platform and the guest's policy are is judged,
            and the launch is refused as not checked.
        encrypted_state: whether the launch must be SEV-ES; None for whatever its policy says.

    Raises:
        NotFound, MalformedEvidence: a file that is not there or is something else.
    """
    report = parse_launch(read_evidence_file(evidence, "evidence"))
    flags = SevPolicy(report.policy & 0x3F)
    shown: dict[str, Any] = {
        "measurement": report.measurement[:32].hex(),
        "nonce": report.measurement[32:].hex(),
        "api": f"{report.api_major}.{report.api_minor}.{report.build}",
        "policy": f"0x{report.policy:x}",
        "policy_flags": [flag.name for flag in flags],
    }
    es = SevPolicy.ES in flags if encrypted_state is None else encrypted_state
    findings = appraise_policy(report.policy, encrypted_state=es, allow_send=wanted is not None and wanted.allow_send)
    findings += _platform(certificates, shown)
    if session_key is None:
        text = "the measurement cannot be checked without the session's integrity key: give it"
        findings.append(Finding("sev.unchecked.session", text))
    elif wanted is None or not wanted.launch_digests:
        text = "the measurement cannot be checked without a launch digest to compare with: name one"
        findings.append(Finding("sev.unchecked.measurement", text))
    else:
        key = read_evidence_file(session_key, "session key")
        if len(key) != KEY_BYTES:
            raise MalformedEvidence("session key", f"it has {len(key)} bytes instead of {KEY_BYTES}")
        digests = {digest.hex(): digest for digest in sorted(wanted.launch_digests)}
        more, matching = appraise_launch(report, key, digests, wanted.minimum_api)
        findings += more
        shown["launch_digest"] = matching.hex() if matching else None
    return verdict_of(shown, findings, simulated=False, judged=True)


def _platform(paths: Sequence[Path], shown: dict[str, Any]) -> list[Finding]:
    """Follow the host's certificates to AMD."""
    found = _sorted(paths)
    missing = [name for name in ("PDH", "PEK", "OCA", "CEK", "ASK", "ARK") if name not in found]
    if missing:
        text = f"the platform cannot be checked: the certificates {', '.join(missing)} are missing"
        return [Finding("sev.unchecked.platform", text)]
    chain = found["PEK"] + found["OCA"] + found["CEK"]
    try:
        platform = verify_platform(found["PDH"], chain, ask=found["ASK"], ark=found["ARK"], ark_sha256=ARK_SHA256)
    except EvidenceRefused as exc:
        return list(exc.findings)
    shown["generation"] = platform.generation
    return []


def _sorted(paths: Sequence[Path]) -> dict[str, bytes]:
    """Certificates by what they are for. Of two for the same, one that is signed counts: hosts show an unsigned CEK."""
    found: dict[str, bytes] = {}
    for path in paths:
        if not path.exists():
            raise NotFound("certificate file", str(path))
        for file in sorted(path.iterdir()) if path.is_dir() else [path]:
            blob = read_evidence_file(file, "certificate")
            for part in _split(blob):
                name = _name(part)
                if name not in found or any(part[-1040:-520].strip(b"\0")):
                    found[name] = part
    return found


def _split(blob: bytes) -> list[bytes]:
    """The certificates of a file: one, the host's chain, or ASK and ARK as AMD's server gives them."""
    if len(blob) == CHAIN_BYTES:
        return [blob[at : at + CERTIFICATE_BYTES] for at in range(0, CHAIN_BYTES, CERTIFICATE_BYTES)]
    for size in CA_SIZES.values():
        if len(blob) == 2 * size:
            return [blob[:size], blob[size:]]
    return [blob]


def _name(blob: bytes) -> str:
    if len(blob) in CA_SIZES.values():
        return "ARK" if parse_authority(blob).usage == USAGE_ARK else "ASK"
    return NAMES[parse_sev_certificate(blob).usage]
