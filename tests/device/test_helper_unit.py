"""The helper in its units, under systemd as process 1: socket activation, sandbox, users.

systemd boots in a container over a throw-away copy of this machine's root. Real loop devices are bound into it, and
tagged by records of udev's that the test wrote. What the kernel here lacks (nbd, device mapper) is the last step, and
fails as it must.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import devicevolumes
import pytest

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
CONTAINER = """
set -e
mount -t tmpfs -o mode=755 tmpfs {top}
mkdir {top}/root {top}/up {top}/work
mount -t overlay overlay -o lowerdir=/,upperdir={top}/up,workdir={top}/work {top}/root
rm -rf {top}/root/run/* {top}/root/etc/machine-id
dbus-uuidgen >{top}/root/etc/machine-id
for unit in libvirtd.service libvirtd.socket libvirtd-ro.socket libvirtd-admin.socket virtlogd.socket; do
    ln -sf /dev/null {top}/root/etc/systemd/system/$unit
done
cp {out}/inside.service {top}/root/etc/systemd/system/
exec script -qec "systemd-nspawn -q --register=no --keep-unit -D {top}/root --private-network -M jindisk-helper-test \
    --bind={out}:/out --bind={project} {devices} -b systemd.unit=inside.service" /dev/null
"""
UNIT = """
[Unit]
Wants=dbus.socket
After=basic.target dbus.socket
SuccessAction=poweroff-force
FailureAction=poweroff-force
[Service]
Type=oneshot
TimeoutStartSec=400
ExecStart=/bin/sh -c '/bin/bash -ex /out/script >/out/log 2>&1; echo $$? >/out/rc'
"""
SCRIPT = """
{bin}/jindiskctl system-files install --prefix /usr --libexec {bin} >/dev/null
systemd-sysusers jindiskd.conf
systemctl daemon-reload
systemctl start jindisk-helper.socket
test "$(stat -c '%U %G %a' /run/jindisk-helper.socket)" = 'root jindiskd 660'
mkdir -p /run/udev/data
for device in {numbers}; do printf 'E:JINDISK_KIND=x\\nG:jindisk\\nQ:jindisk\\n' >/run/udev/data/b$device; done
for node in {nodes}; do chown root:disk $node; chmod 660 $node; done
runuser -u jindiskd -- {bin}/python -c '{ask}' '{wanted}' >/out/answers
! runuser -u nobody -- {bin}/python -c '{ask}' '{wanted}'
test -z "$(systemctl list-units --failed --plain --no-legend 'jindisk-helper*')"
systemd-analyze security --no-pager jindisk-helper@0.service | tail -n 1 >/out/exposure
"""
ASK = """
import asyncio, json, sys
from jindiskd.base.secret import Secret
from jindiskd.device.helper_client import HelperClient
from jindiskd.errors import JindiskError
from jindiskd.helper.protocol import Below, HelperFailed, Kind, Open

async def main():
    client, found = HelperClient(), []
    assert await client.serving() == ()
    for kind, major, minor, sequence, uuid, key, read_only in json.loads(sys.argv[1]):
        below = Below(major=major, minor=minor, sequence=sequence)
        request = Open(kind=Kind(kind), below=below, owner=0, read_only=read_only, uuid=uuid)
        try:
            found.append(await client.open(request, Secret(bytes.fromhex(key))))
        except HelperFailed as exc:
            found.append(exc.code)
    print(json.dumps(found))

asyncio.run(main())
"""


@pytest.fixture
def loops(tmp_path: Path) -> Iterator[list[tuple[str, int, int, int]]]:
    """A JinDisk 2 volume and a LUKS2 volume on loop devices: node, number, sequence number."""
    jindisk2 = devicevolumes.make_jindisk2(tmp_path / "jindisk2", 16 << 20)
    luks2 = tmp_path / "luks2"
    luks2.write_bytes(devicevolumes.luks2_header(8 << 20))
    os.truncate(luks2, 9 << 20)
    made: list[tuple[str, int, int, int]] = []
    for file in (jindisk2, luks2):
        done = subprocess.run(["losetup", "-f", "--show", file], capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"no loop device: {done.stderr.strip()}")
        node = Path(done.stdout.strip())
        number = node.stat().st_rdev
        sequence = int(Path(f"/sys/block/{node.name}/diskseq").read_text())
        made.append((str(node), os.major(number), os.minor(number), sequence))
    yield made
    for node, *_ in made:
        subprocess.run(["losetup", "-d", node], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root for a container")
@pytest.mark.skipif(Path("/sys/module/nbd").exists(), reason="this machine has nbd, and it is not the test's to use")
def test_the_helper_in_its_unit(loops, tmp_path):
    """Asked by the service's user: its worker reads the disks; it stops where the kernel has nothing to map with."""
    assert shutil.which("systemd-nspawn"), "systemd-container is missing: run scripts/setup"
    good, bad = devicevolumes.KEY.hex(), bytes(32).hex()
    (_, *first), (_, *second) = loops
    other = [first[0], first[1], first[2] + 1]
    uuid = devicevolumes.UUID
    cases = [
        (["jindisk2", *first, uuid, good, True], "NotSupported"),
        (["jindisk2", *first, uuid, good, False], "NotSupported"),
        (["jindisk2", *first, uuid, bad, False], "VolumeUnauthentic"),
        (["jindisk2", *other, uuid, good, False], "NotFound"),
        (["jindisk2", 1, 3, 0, uuid, good, False], "DeviceNotOurs"),
        (["luks2", *second, uuid, good, True], "NotSupported"),
        (["luks2", *second, uuid, bad, True], "WrongKey"),
        (["luks2", *first, uuid, good, True], "Luks2HeaderRefused"),
    ]
    out, top = tmp_path / "out", tmp_path / "top"
    out.mkdir()
    top.mkdir()
    wanted = json.dumps([case for case, _ in cases])
    numbers = " ".join(f"{major}:{minor}" for _, major, minor, _ in loops)
    nodes = " ".join(node for node, *_ in loops)
    (out / "script").write_text(SCRIPT.format(bin=BIN, numbers=numbers, nodes=nodes, ask=ASK, wanted=wanted))
    (out / "inside.service").write_text(UNIT)
    devices = " ".join(f"--bind={node}" for node, *_ in loops)
    (out / "container").write_text(CONTAINER.format(top=top, out=out, project=ROOT, devices=devices))
    with (out / "console").open("wb") as console:
        subprocess.run(["unshare", "--mount", "--propagation", "private", "sh", out / "container"],
                       stdin=subprocess.DEVNULL, stdout=console, stderr=console, timeout=500, check=False)  # fmt: skip
    log = out / "log"
    said = log.read_text() if log.exists() else (out / "console").read_text(errors="replace")
    assert (out / "rc").exists(), said[-3000:]
    assert (out / "rc").read_text().strip() == "0", said[-3000:]
    assert json.loads((out / "answers").read_text()) == [code for _, code in cases]
    exposure = (out / "exposure").read_text().strip()
    print(exposure)
    assert float(exposure.split(": ")[1].split()[0]) <= 2.5
