"""The simulated firmware of a domain: a process that measures what libvirt says it boots."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path

from jindiskd.base.process import ENVIRONMENT, terminate
from jindiskd.domain.spec import BootInputs
from jindiskd.domain.state import LaunchFailed

READY_S = 60.0


class FirmwareProcess:
    """One domain's simulated firmware, listening on a unix socket."""

    def __init__(self, process: asyncio.subprocess.Process, launch_digest: str) -> None:
        """Use `start`."""
        self._process, self.launch_digest = process, launch_digest

    @classmethod
    async def start(cls, name: str, boot: BootInputs, *, root: Path, socket: Path) -> FirmwareProcess:
        """Measure and listen.

        Raises:
            LaunchFailed: the inputs cannot be measured, with the reason.
        """
        request = {
            "firmware": boot.firmware,
            "kernel": boot.kernel,
            "initrd": boot.initrd,
            "cmdline": boot.cmdline,
            "vcpus": boot.vcpus,
            "cpu_model": boot.cpu_model,
            "id_block": boot.simulated.id_block.hex(),
            "id_auth": boot.simulated.id_auth.hex(),
            "root": str(root),
            "socket": str(socket),
        }
        if boot.simulated.policy is not None:
            request["policy"] = boot.simulated.policy
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-I",
            "-m",
            "jindiskd.sim.process",
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=ENVIRONMENT,
            start_new_session=True,
        )
        try:
            async with asyncio.timeout(READY_S):
                assert process.stdin is not None
                assert process.stdout is not None
                process.stdin.write(json.dumps(request).encode() + b"\n")
                answer = json.loads(await process.stdout.readline() or b"{}")
        except asyncio.CancelledError:
            await asyncio.shield(terminate(process))
            raise
        except (TimeoutError, ValueError, ConnectionError) as exc:
            await terminate(process)
            raise LaunchFailed(name, "the simulated firmware did not start") from exc
        if not answer.get("ready"):
            await terminate(process)
            raise LaunchFailed(name, str(answer.get("message", "the simulated firmware did not start")))
        return cls(process, str(answer["launch_digest"]))

    async def stop(self) -> None:
        """End it."""
        if self._process.returncode is None:
            await terminate(self._process)
