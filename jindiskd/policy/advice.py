"""What to do about a finding: one sentence for each kind, by its id or the longest beginning of it that is known."""

from __future__ import annotations

ADVICE = {
    "evidence.additional": "Turn off the guest component that sends evidence of devices; this broker judges none.",
    "evidence.malformed": "The guest's agent and this broker do not speak the same protocol: use the agent of this "
    "release, and look at its log.",
    "evidence.no_roots": "This broker judges no evidence of that kind: start the image on another platform.",
    "init_data.other": "Launch the guest with the init-data that it sends, or let it send what it was launched with.",
    "key.count": "Remove further keys of the image that belong to no volume (jindiskctl broker key remove).",
    "key.state": "Reinstate the key (jindiskctl key reinstate) if this guest should start.",
    "limit.guest": "Start the guest anew, or raise releases_per_guest in the image's policy.",
    "limit.image": "Wait for the hour to pass, or raise releases_per_hour in the image's policy.",
    "limit.used": "The key was for so many starts: raise releases_in_all in the image's policy.",
    "peer.image": "The guest runs another image than its domain is for: look at the domain's disk and boot files.",
    "peer.refusals": "Mend what the guest is refused for, then wait: after many refusals it is not judged for a while.",
    "platform.kind": "Build the image for the platform that it is started on.",
    "platform.simulation": "Start the image on the platform it was built for; a simulated report proves nothing.",
    "policy.too_early": "Wait, or change not_before in the image's policy.",
    "policy.too_late": "Change not_after in the image's policy if this guest should still start.",
    "resource.unknown": "The guest's configuration names a key that is not here: was the image removed, or built for "
    "another broker?",
    "session": "Start the guest anew; if it happens again, something on the host repeats old messages.",
    "snp.certificate": "Give the broker the chip's certificate: jindiskctl collateral fetch, or import it.",
    "snp.chain": "Give the broker AMD's intermediate certificates: jindiskctl collateral fetch, or import them.",
    "snp.chain.root": "The chain ends in a root that is not AMD's: the evidence is forged, or made by a simulation.",
    "snp.chip_id": "The host sent another chip's certificate: have it send its own.",
    "snp.chip_id.masked": "Have the host show its chip (MASK_CHIP_ID off), or set allow_masked_chip_id.",
    "snp.chip_id.unknown": "Add the machine to chip_ids in the policy if it is yours.",
    "snp.crl": "Get AMD's revocation lists: jindiskctl collateral fetch, or import a bundle; or set "
    "[revocation] required = false.",
    "snp.revoked": "AMD has taken this authority back: nothing it signed is to be trusted. Ask AMD.",
    "snp.debug": "Launch the guest with a policy without DEBUG.",
    "snp.firmware": "Update the host's SEV firmware, and commit it (SNP_COMMIT).",
    "snp.generation": "Start it on another machine, or add the generation to the policy.",
    "snp.guest_svn": "Sign the image with a higher security version, or start the newer image.",
    "snp.host_data": "Launch with the init-data that the policy names, or name what was launched with in host_data.",
    "snp.measurement": "Something that was measured differs: jindiskctl attest explain says what. If it is meant, add "
    "the digest to measurements in the policy, or build the image again.",
    "snp.migration_agent": "Launch the guest with a policy without MIGRATE_MA.",
    "snp.minimum_tcb": "Update the host's firmware.",
    "snp.mitigations": "Update the host's firmware and microcode.",
    "snp.platform": "Configure the host as the policy demands, or change the policy.",
    "snp.policy_abi": "Launch with a guest policy that asks for a newer firmware ABI.",
    "snp.product": "Report and certificate are of different processors: have the host send its own certificate.",
    "snp.report_data": "The report is not of this session: start the guest anew; if it happens again, the host "
    "repeats old reports.",
    "snp.reserved": "The report has bits that this release does not know: update jindiskd.",
    "snp.signature": "The report was altered, or its certificate is another chip's: have the host send its own.",
    "snp.signer": "Have the guest ask for a report signed by the chip's key (VCEK).",
    "snp.signer.vlek": "Name the provider in providers of the policy, if you trust it.",
    "snp.simulated": "Simulated firmware is allowed where broker and policy say so, and proves nothing.",
    "snp.tcb": "Update the host's firmware and microcode, then fetch the certificate for the new versions; or name the "
    "generation in minimum_tcb of the policy, if older firmware is to be accepted.",
    "snp.tcb.no_minimum": "Add the generation to minimum_tcb in the policy.",
    "snp.vmpl": "Have the guest itself ask for the report, at the level that the policy names.",
    "sev.api": "Update the host's SEV firmware.",
    "sev.chain": "Have the host show its own platform certificates, and get the CEK from AMD.",
    "sev.chain.missing": "Give the broker AMD's certificates of the host's processor: jindiskctl collateral fetch "
    "--sev-processor, or import them.",
    "sev.measurement": "Firmware, kernel, initrd or command line differ from the image's: build again, or start it as "
    "it was built.",
    "sev.policy": "Launch the guest with the policy that jindiskd sets.",
    "sev.unchecked": "Give what is missing; nothing passes because it could not be checked.",
    "tdx.advisory": "Read the advisories; update the platform, or list those that you accept.",
    "tdx.attributes": "Launch the guest with attributes that this release knows, or update jindiskd.",
    "tdx.collateral": "Give the broker Intel's collateral: jindiskctl collateral fetch, or import it.",
    "tdx.debug": "Launch the guest without debug.",
    "tdx.event_log": "The event log was altered or cut: start the guest anew.",
    "tdx.migratable": "Launch the guest as not migratable.",
    "tdx.mr_config_id": "Launch with the init-data that the policy names, or name what was launched with in "
    "mr_config_id.",
    "tdx.mr_owner_config": "Launch with the owner configuration that the policy names.",
    "tdx.mr_owner": "Launch with the owner values that the policy names.",
    "tdx.mr_seam": "Add the TDX module to mr_seam in the policy if it is a good one.",
    "tdx.mr_td": "Another firmware was started than the image's: put that back, or add it to mr_td in the policy.",
    "tdx.platform": "Configure the host as the policy demands, or change the policy.",
    "tdx.ppid": "Add the machine to ppids in the policy if it is yours.",
    "tdx.quote": "Fetch new collateral; if it stays, the quote was altered or is of another platform.",
    "tdx.report_data": "The quote is not of this session: start the guest anew.",
    "tdx.rtmr": "What this register measured differs: take its value from a guest you trust, or start the image as it "
    "was built.",
    "tdx.seam": "Have the host load Intel's production TDX module.",
    "tdx.sept_ve": "Launch the guest with SEPT_VE_DISABLE (policy 0x10000000).",
    "tdx.service_td": "Launch the guest without a service guest.",
    "tdx.simulated": "A quote of a test root proves nothing.",
    "tdx.status": "Update the platform (BIOS, microcode, TDX module), then fetch new collateral.",
    "tdx.tcb_evaluation": "Fetch newer collateral.",
}


def remedy(finding_id: str) -> str:
    """What to do about a finding; an empty text where nothing is known."""
    name = finding_id
    while name:
        if name in ADVICE:
            return ADVICE[name]
        shorter = name.rpartition(".")[0]
        # `tdx.rtmr1` has no dot before its number.
        name = name.rstrip("0123456789") if name[-1].isdigit() else shorter
    return ""
