"""The platforms an image can be built for: a kind of trusted execution environment, real or simulated."""

from __future__ import annotations

import enum


class Tee(enum.StrEnum):
    """Kinds of trusted execution environment, by the names libvirt and the key-broker protocol use."""

    SNP = "snp"
    TDX = "tdx"
    SEV_ES = "sev-es"
    SEV = "sev"


class Platform(enum.StrEnum):
    """What an image is built for. A simulated platform proves nothing to anybody and always says so."""

    SNP = "snp"
    TDX = "tdx"
    SEV_ES = "sev-es"
    SEV = "sev"
    SIMULATED_SNP = "simulated-snp"
    SIMULATED_SEV_ES = "simulated-sev-es"
    SIMULATED_SEV = "simulated-sev"

    @property
    def simulated(self) -> bool:
        """True where reports come from the simulated firmware and its generated root."""
        return self.value.startswith("simulated-")

    @property
    def measured_before(self) -> bool:
        """True where the guest is measured and given its key before it runs (SEV, SEV-ES), not from inside."""
        return self.tee in {Tee.SEV, Tee.SEV_ES}

    @property
    def tee(self) -> Tee:
        """The kind of evidence that this platform produces."""
        return Tee(self.value.removeprefix("simulated-"))
