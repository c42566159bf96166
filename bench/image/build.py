"""How fast an image is built, beside `cp --sparse=always` of the same base.

    .venv/bin/python bench/image/build.py [BASE] [--format luks2] [--firmware FILE] [--runs 3] [--scratch DIR]

Without BASE it takes the Debian image that scripts/make-base-image makes. Prints one JSON object for each format:
megabytes (10^6) of the base's data a second for each, with the parts of the build, and how many copies a build takes.
Each run starts with the base in the page cache and an empty directory, and counts until the data is on the disk.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import structlog

from jindiskd.base.platform import Platform
from jindiskd.base.secret import Secret
from jindiskd.image.builder import build
from jindiskd.image.request import BaseKind, BuildRequest, BuildTask, Progress, VolumeFormat

BUILD = Path(__file__).resolve().parents[2] / "build"
FORMATS = (VolumeFormat.JINDISK, VolumeFormat.LUKS2)


def copy_seconds(base: Path, scratch: Path) -> float:
    """A sparse copy, synced."""
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        start = time.monotonic()
        target = Path(folder) / "copy"
        subprocess.run(["cp", "--sparse=always", base, target], check=True)
        with target.open("rb") as stream:
            os.fsync(stream.fileno())
        return time.monotonic() - start


def build_seconds(base: Path, scratch: Path, volume: VolumeFormat, firmware: str, workers: int) -> dict[str, float]:
    """A whole build, and how long each stage took."""
    stages: dict[str, float] = {}
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        request = BuildRequest(
            name="bench", platform=Platform.SIMULATED_SNP, format=volume, base_kind=BaseKind.DISK, firmware=firmware,
            vcpus=1, cpu_model="EPYC-v4",
        )  # fmt: skip
        task = BuildTask(
            request=request, image_id="00000000-0000-4000-8000-000000000000", created="", staging=folder,
            broker_spki_sha256=bytes(32), workers=workers,
        )  # fmt: skip
        start = last = time.monotonic()
        stage = "read"

        def report(progress: Progress) -> None:
            nonlocal last, stage
            now = time.monotonic()
            stages[stage] = stages.get(stage, 0.0) + now - last
            last, stage = now, progress.stage

        fd = os.open(base, os.O_RDONLY)
        try:
            build(task, fd, Secret(bytes(32)), report)
        finally:
            os.close(fd)
        stages[stage] = stages.get(stage, 0.0) + time.monotonic() - last
        stages["whole"] = time.monotonic() - start
    return stages


def compare(arguments: argparse.Namespace, volume: VolumeFormat) -> None:
    """Copies and builds in turns, and what they took."""
    data = arguments.base.stat().st_blocks * 512
    copies, builds = [], []
    for _ in range(arguments.runs):
        copies.append(copy_seconds(arguments.base, arguments.scratch))
        builds.append(
            build_seconds(arguments.base, arguments.scratch, volume, arguments.firmware, arguments.workers)
        )
    whole = statistics.median(run["whole"] for run in builds)
    copy = statistics.median(copies)
    print(
        json.dumps(
            {
                "base_bytes": arguments.base.stat().st_size,
                "data_bytes": data,
                "format": volume,
                "workers": arguments.workers,
                "runs": arguments.runs,
                "cp_s": round(copy, 2),
                "cp_mb_per_s": round(data / copy / 1e6, 1),
                "build_s": round(whole, 2),
                "build_mb_per_s": round(data / whole / 1e6, 1),
                "copies_each": round(whole / copy, 2),
                "stages_s": {name: round(statistics.median(run[name] for run in builds), 2) for name in builds[0]},
            },
            indent=2,
        )
    )


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("base", type=Path, nargs="?", default=BUILD / "base/debian.img")
    parser.add_argument("--format", type=VolumeFormat, choices=list(FORMATS), action="append")
    parser.add_argument("--firmware", default=os.fspath(BUILD / "tools/usr/share/ovmf/OVMF.fd"))
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--scratch", type=Path, default=Path("/var/tmp"))
    arguments = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    with arguments.base.open("rb") as stream:
        while stream.read(1 << 22):
            pass
    for volume in arguments.format or FORMATS:
        compare(arguments, volume)
    return 0


if __name__ == "__main__":
    sys.exit(main())
