"""A sample of both kinds of plug-in. In its package's pyproject.toml:

    [project.entry-points."jindiskd.verifiers"]
    sample = "sample_plugin:make_verifier"

    [project.entry-points."jindiskd.report_sources"]
    sample = "sample_plugin:Reports"
"""

import os

from jindiskd.guest.report import RawReport, TsmReports


def make_verifier(collector):
    """Judges SEV-SNP reports under a root of one's own, which a file names: a laboratory's, for example."""
    # What only the broker needs is imported here: the guest imports this module too.
    from pathlib import Path

    from jindiskd.attest.snp import SnpRoots, SnpVerifier
    from jindiskd.attest.snp_certs import to_der

    root = to_der(Path(os.environ["SAMPLE_ROOT"]).read_bytes())[0]
    return SnpVerifier(roots=SnpRoots.simulated_from(root), crls=collector.cache.revocation_lists())


class Reports:
    """Asks configfs-tsm twice and takes the second report: the platform's own way, a little differently."""

    def __init__(self, platform):
        self.platform, self.source = platform, TsmReports()

    def get(self, data: bytes) -> RawReport:
        """A fresh report that binds `data`, 64 bytes."""
        self.source.get(bytes(64))
        return self.source.get(data)
