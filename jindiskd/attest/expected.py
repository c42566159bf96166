"""All that a launch will measure as, on each platform, with every input beside it: what `image measure` prints."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jindiskd.attest.firmware import FirmwareUnsuitable, inspect_firmware
from jindiskd.attest.measure import (
    LaunchInputs,
    cpu_signature,
    kernel_hashes_table,
    sev_launch_digest,
    snp_launch_digest,
)
from jindiskd.attest.tdx_measure import mr_td
from jindiskd.attest.tdx_registers import rtmr1, rtmr2
from jindiskd.errors import JindiskError
from jindiskd.kbs import initdata

UNCONFIRMED = (
    "MRTD, RTMR1 and RTMR2 follow from firmware and boot files by the documents and were not compared with a machine; "
    "RTMR0 depends on the machine's shape: take it from a guest you trust"
)
HOST_DATA_BYTES, MR_CONFIG_ID_BYTES = 32, 48


def expected(inputs: LaunchInputs) -> dict[str, Any]:
    """Measurements and inputs, ready for JSON. Reads the files: call it off the event loop.

    `measurements` has, by platform, `digest` or `problem` (why there is none), and `note` where something is to be
    known.

    Raises:
        NotFound, FirmwareUnsuitable: the firmware or a boot file cannot be read.
    """
    info = inspect_firmware(inputs.firmware)
    found: dict[str, Any] = {
        "snp": _one(lambda: snp_launch_digest(inputs)),
        "sev-es": _one(lambda: sev_launch_digest(inputs, encrypted_state=True), "for hosts with Linux 6.10 and later"),
        "sev": _one(lambda: sev_launch_digest(inputs, encrypted_state=False)),
        "tdx": _one(lambda: mr_td(inputs.firmware), UNCONFIRMED),
        "tdx rtmr1": _one(lambda: rtmr1(inputs.kernel)),
        "tdx rtmr2": _one(lambda: rtmr2(inputs.cmdline, inputs.initrd)),
    }
    if info.enforces_kernel_hashes is False:
        warning = "this firmware does not check the kernel's hash: it would boot any kernel under this digest"
        for name in ("snp", "sev-es", "sev"):
            found[name]["note"] = warning
    table = _one(lambda: kernel_hashes_table(inputs.kernel, inputs.initrd, inputs.cmdline))
    signature = _one(lambda: cpu_signature(inputs.cpu_model).to_bytes(4, "big"))
    return {
        "measurements": found,
        "inputs": {
            "firmware": str(inputs.firmware),
            "firmware_sha256": info.sha256.hex(),
            "firmware_build": info.name,
            "enforces_kernel_hashes": info.enforces_kernel_hashes,
            "kernel": str(inputs.kernel),
            "kernel_sha256": _sha256(inputs.kernel),
            "initrd": str(inputs.initrd),
            "initrd_sha256": _sha256(inputs.initrd),
            "cmdline": inputs.cmdline,
            "vcpus": inputs.vcpus,
            "cpu_model": inputs.cpu_model,
            "cpu_signature": signature.get("digest"),
            "guest_features": inputs.guest_features,
            "kernel_hashes": table.get("digest"),
        },
    }


def _one(compute: Callable[[], bytes], note: str = "") -> dict[str, Any]:
    try:
        found: dict[str, Any] = {"digest": compute().hex()}
    except FirmwareUnsuitable as exc:
        return {"problem": f"the firmware {exc.problem}"}
    except JindiskError as exc:
        return {"problem": str(exc)}
    return {**found, "note": note} if note else found


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def bound_init_data(text: str) -> dict[str, str]:
    """What a launch must be given so that evidence binds this init-data, hexadecimal.

    Raises:
        MalformedMessage: it is no init-data document.
    """
    digest, _entries = initdata.read(text)
    return {
        "digest": digest.hex(),
        "host_data": initdata.placed(digest, HOST_DATA_BYTES).hex(),
        "mr_config_id": initdata.placed(digest, MR_CONFIG_ID_BYTES).hex(),
    }
