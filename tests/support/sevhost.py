"""What makes a host without SEV look like one to libvirt: the emulator that stands in, and the processor behind it.

For tests of the path through libvirt: paused start, measurement, injection, resumption. Nothing here is encrypted.

The processor listens on a unix socket: one line of JSON a request, one a reply, one connection a launch. Requests, by
`do`: `capabilities`, `start`, `query`, `measure`, `inject`; see `_Connection`. Errors are `{"error": text}`.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jindiskd.attest.firmware import inspect_firmware
from jindiskd.attest.measure import LaunchInputs, kernel_hashes_table, sev_launch_digest
from jindiskd.attest.sev import SevPolicy
from jindiskd.errors import JindiskError
from jindiskd.sim.sev_firmware import SevLaunch
from jindiskd.sim.sev_platform import API, BUILD, CPU_ID, SevPlatformKeys

LINE_BYTES = 1 << 20


def install(path: Path, *, qemu: Path, processor: Path, kvm: bool = False) -> None:
    """Write the stand-in emulator, executable for everybody.

    Args:
        path: where.
        qemu: the real one.
        processor: the secure processor's socket.
        kvm: whether it claims KVM too.
    """
    text = Path(__file__).with_name("sev_emulator.py").read_text()
    for mark, value in (("@QEMU@", os.fspath(qemu)), ("@PROCESSOR@", os.fspath(processor)), ("@KVM@", "yes" * kvm)):
        text = text.replace(mark, value)
    path.write_text(text)
    path.chmod(0o755)


class SevHost:
    """The secure processor as a service."""

    def __init__(self, keys: SevPlatformKeys, socket: Path) -> None:
        """Listen nowhere yet."""
        self._keys, self._socket = keys, socket
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        """Listen; everybody may connect, as everybody may start a machine."""
        self._server = await asyncio.start_unix_server(self._accept, self._socket, limit=LINE_BYTES)
        self._socket.chmod(0o666)

    async def stop(self) -> None:
        """Stop listening."""
        if self._server is not None:
            self._server.close()
            self._socket.unlink(missing_ok=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        launch = _Connection(self._keys)
        try:
            while line := await reader.readline():
                try:
                    reply = await asyncio.to_thread(launch.answer, json.loads(line))
                except JindiskError as exc:
                    reply = {"error": str(exc)}
                writer.write(json.dumps(reply).encode() + b"\n")
                await writer.drain()
        except (ValueError, LookupError, TypeError, ConnectionError):
            pass  # whoever asks in another form is not answered
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()


class _Connection:
    """One launch."""

    def __init__(self, keys: SevPlatformKeys) -> None:
        self._keys = keys
        self._launch: SevLaunch | None = None
        self._digest = b""

    def answer(self, request: Mapping[str, Any]) -> Mapping[str, Any]:
        do = request["do"]
        if do == "capabilities":
            return {
                "pdh": _text(self._keys.pdh),
                "cert-chain": _text(self._keys.chain),
                "cpu0-id": _text(CPU_ID),
                "cbitpos": 51,
                "reduced-phys-bits": 1,
            }
        if do == "start":
            return self._start(request)
        assert self._launch is not None, "nothing was started"
        if do == "query":
            numbers = {"api-major": API[0], "api-minor": API[1], "build-id": BUILD, "policy": self._launch.policy}
            return {"enabled": True, "sev-type": "sev", **numbers, "state": "launch-secret", "handle": 1}
        if do == "measure":
            return {"data": _text(self._launch.measurement or self._launch.measure(self._digest))}
        table = self._launch.open_secret(base64.b64decode(request["header"]), base64.b64decode(request["secret"]))
        return {"table": _text(table)}

    def _start(self, request: Mapping[str, Any]) -> Mapping[str, Any]:
        policy = int(request["policy"])
        self._launch = SevLaunch(
            self._keys,
            policy=policy,
            dh_certificate=base64.b64decode(request["dh_cert"]),
            session=base64.b64decode(request["session"]),
        )
        inputs = LaunchInputs(
            firmware=Path(request["firmware"]),
            kernel=Path(request["kernel"]),
            initrd=Path(request["initrd"]),
            cmdline=request["cmdline"],
            vcpus=int(request["vcpus"]),
            cpu_model=request["cpu_model"],
        )
        self._digest = sev_launch_digest(inputs, encrypted_state=bool(policy & SevPolicy.ES))
        areas = inspect_firmware(inputs.firmware)
        table = b""
        if request["kernel_hashes"]:
            with tempfile.NamedTemporaryFile() as seen:
                seen.write(as_loaded(inputs.kernel.read_bytes(), inputs.initrd.stat().st_size, request["memory"]))
                seen.flush()
                table = kernel_hashes_table(Path(seen.name), inputs.initrd, inputs.cmdline)
        return {
            "hashes": _text(table),
            "hashes_address": areas.hash_table_address or 0,
            "secret_address": areas.secret_address or 0,
        }


def as_loaded(kernel: bytes, initrd_bytes: int, memory: str) -> bytes:
    """The kernel as the machine's firmware gets it: QEMU fills in the boot protocol's fields, but for real SEV guests.

    The firmware compares with this; the measurement is over the file, as on real hardware. Source: QEMU 7.2
    hw/i386/x86.c, x86_load_linux; Linux Documentation/arch/x86/boot.rst.
    """
    head = bytearray(kernel)
    protocol = int.from_bytes(head[0x206:0x208], "little")
    if head[0x202:0x206] != b"HdrS" or protocol < 0x203:
        return kernel
    memory_bytes = int(memory.removeprefix("size=").removesuffix("k")) << (10 if "size=" in memory else 20)
    above = protocol >= 0x20C and int.from_bytes(head[0x236:0x238], "little") & 2
    highest = 0xFFFFFFFF if above else int.from_bytes(head[0x22C:0x230], "little")
    highest = min(highest, memory_bytes - 0x28000 - 1)  # the room of ACPI tables
    head[0x210] = 0xB0
    head[0x211] |= 0x80
    head[0x224:0x226] = (0x20000 - 0x10000 - 0x200).to_bytes(2, "little")
    head[0x228:0x22C] = (0x20000).to_bytes(4, "little")
    head[0x218:0x21C] = ((highest - initrd_bytes) & ~4095).to_bytes(4, "little")
    head[0x21C:0x220] = initrd_bytes.to_bytes(4, "little")
    return bytes(head)


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()
