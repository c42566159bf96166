"""Images by the command line, the bus, and the processes behind them."""

import base64
import contextlib
import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from smallroot import RELEASE

from jindiskd.base.platform import Platform
from jindiskd.image.cpio import Archive
from jindiskd.image.initramfs_files import UNLOCK
from jindiskd.image.request import BaseKind, BuildRequest, VolumeFormat


def left_behind(daemon) -> list[str]:
    """What is in the store besides its lock."""
    return sorted(path.name for path in (daemon.state / "images").iterdir() if path.name != ".lock")


def test_an_image_from_build_to_removal(daemon, rootfs):
    """Built, listed, shown, measured, revoked, reinstated, removed; each verb says what it did."""
    out = daemon.ctl("image", "build", "demo", "--rootfs", str(rootfs), "--vcpus", "2")
    assert out == "Built simulated image demo (jindisk, {}) for simulated-snp.\n".format(
        out.split("(jindisk, ")[1].split(")")[0]
    )
    listed = daemon.ctl("image", "list").splitlines()
    assert listed[0].split() == ["NAME", "PLATFORM", "FORMAT", "SIZE", "VOLUMES", "KEY", "DIGEST", "CREATED"]
    assert listed[1].split()[:3] == ["demo", "simulated-snp", "jindisk"]
    assert daemon.ctl("image", "list", "--no-legend").count("\n") == 1
    image = daemon.json("image", "show", "demo")["image"]
    assert image["Simulated"] is True
    assert image["State"] == "active"
    assert image["Distribution"] == "Test Linux 1"
    assert image["Vcpus"] == 2
    measured = daemon.json("image", "measure", "demo")
    assert measured["launch_digest"] == measured["measurements"]["snp"]["digest"] == image["LaunchDigest"]
    assert measured["inputs"]["vcpus"] == 2
    assert image["LaunchDigest"] in daemon.ctl("image", "measure", "demo")
    assert "proves nothing" in daemon.ctl("image", "show", "demo")
    assert daemon.json("key", "list")["keys"][0]["launch-digests"] == [image["LaunchDigest"]]
    key = daemon.json("key", "show", "demo")["key"]
    assert (key["name"], key["volumes"][0]["state"], key["volumes"][0]["sequence"]) == ("demo", "closed", 1)
    assert len(key["volumes"][0]["root"]) == 64
    assert "takes state 1 alone" in daemon.ctl("key", "show", image["ImageId"])
    assert "1, closed" in daemon.ctl("key", "list")
    assert "--yes" in daemon.ctl("key", "accept-rollback", "demo", status=2)
    assert "one line" in daemon.ctl("key", "accept-rollback", "demo", "--reason", "a\nb", "--yes", status=2)
    daemon.ctl("key", "accept-rollback", "nothing", "--yes", status=3)
    daemon.ctl("key", "show", "nothing", status=3)
    daemon.ctl("key", "accept-rollback", "demo", "--reason", "a backup", "--yes")
    assert daemon.json("key", "show", "demo")["key"]["volumes"][0]["rollback-accepted"] is True
    assert "any, once" in daemon.ctl("key", "list")
    daemon.ctl("key", "revoke", "demo")
    assert daemon.json("image", "list")["images"][0]["State"] == "revoked"
    daemon.ctl("key", "reinstate", image["ImageId"])
    assert daemon.json("image", "list")["images"][0]["State"] == "active"
    assert "--yes" in daemon.ctl("image", "remove", "demo", status=2)
    daemon.ctl("image", "remove", "demo", "--yes")
    assert daemon.json("image", "list")["images"] == []
    assert daemon.json("key", "list")["keys"] == []
    assert left_behind(daemon) == []
    kinds = [row["kind"] for row in daemon.json("audit", "list")["rows"]]
    assert kinds == ["activated", "volume added", "rollback accepted", "revoked", "reinstated", "forgotten"]
    assert daemon.json("audit", "verify")["rows"] == len(kinds)
    assert daemon.ctl("status").count("0 images") == 1


def test_a_directory_becomes_an_archive(daemon, rootfs, tmp_path):
    """--rootfs takes a directory as well, and keeps who owns what is in it."""
    tree = tmp_path / "tree"
    tree.mkdir()
    subprocess.run(["tar", "-xf", rootfs, "-C", tree], check=True)
    daemon.ctl("image", "build", "demo", "--rootfs", str(tree))
    assert daemon.json("image", "list")["images"][0]["Name"] == "demo"


def test_a_name_is_taken_once(stock, rootfs):
    """The second build is refused before any work is done."""
    assert "choose another" in stock.ctl("image", "build", "stock", "--rootfs", str(rootfs), status=6)
    assert len(stock.json("image", "list")["images"]) == 1


@pytest.mark.parametrize(
    ("words", "status", "text"),
    [
        (["image", "build", "../x", "--rootfs", "{rootfs}"], 2, "image name '../x'"),
        (["image", "build", "x", "--rootfs", "{rootfs}", "--firmware", "/etc/passwd"], 2, "firmware_dirs"),
        (["image", "build", "x", "--rootfs", "{rootfs}", "--report-source", "none"], 2, "is not installed"),
        (
            ["image", "build", "x", "--rootfs", "{rootfs}", "--format", "luks2", "--key-program", "/etc/shadow"],
            2,
            "key_program_dirs",
        ),
        (["image", "build", "x", "--rootfs", "{rootfs}", "--size", "1000"], 2, "multiple of 4096"),
        (["image", "build", "x", "--rootfs", "{rootfs}", "--size", "lots"], 2, "not a size"),
        (["image", "build", "x", "--rootfs", "{rootfs}", "--platform", "tdx"], 1, "tdx_guest is not in"),
        (["image", "build", "x", "--rootfs", "{rootfs}", "--platform", "sev", "--format", "jindisk"], 1, "luks2"),
        (["image", "build", "x", "--rootfs", "{rootfs}", "--cpu-model", "i486"], 2, "i486"),
        (["image", "build", "x", "--base", "/etc/passwd"], 2, "GPT"),
        (["image", "build", "x"], 2, "either --base or --rootfs"),
        (["image", "build", "x", "--base", "/dev/null"], 2, "regular file"),
        (["image", "show", "none"], 3, "no image 'none'"),
        (["image", "remove", "none", "--yes"], 3, "no image 'none'"),
        (["launch", "none"], 3, "no image 'none'"),
        (["launch", "{stock}", "--name", "a/b"], 2, "domain name 'a/b'"),
        (["launch", "{stock}", "--memory", "1000"], 2, "whole MiB"),
        (["launch", "{stock}", "--timeout", "100000"], 2, "86400"),
        (["domain", "show", "none"], 3, "no domain 'none'"),
        (["domain", "adopt", "web", "none"], 3, "no image 'none'"),
        (["domain", "adopt", "x" * 129, "{stock}"], 2, "128 printable characters"),
        (["domain", "adopt", "", "{stock}"], 2, "name or UUID"),
        (["domain", "console", "none"], 3, "no domain 'none'"),
        (["domain", "start", "none"], 3, "no domain 'none'"),
        (["domain", "release", "none", "--yes"], 3, "no domain 'none'"),
        (["domain", "xml", "none"], 3, "no domain 'none'"),
        (["domain", "xml", "--image", "none"], 3, "no image 'none'"),
        (["domain", "xml", "a/b", "--image", "{stock}"], 2, "domain name 'a/b'"),
        (["domain", "xml"], 2, "give a domain, or --image"),
        (["launch", "{stock}", "--host-data", "zz"], 2, "host data 'zz'"),
        (["domain", "xml", "--image", "{stock}", "--host-data", "aa" * 32], 1, "SEV-SNP and TDX alone"),
        (["domain", "xml", "x", "--memory", "1G"], 2, "give --image"),
        (["job", "cancel", "999999"], 3, "no job '999999'"),
        (["image", "frobnicate"], 2, "No such command"),
    ],
)
def test_what_cannot_be_done_is_refused_with_its_status(stock, rootfs, words, status, text):
    """The statuses of the manual page, by the names of the errors on the bus; nothing is left."""
    before = left_behind(stock)
    assert text in stock.ctl(*[word.format(rootfs=rootfs, stock="stock") for word in words], status=status)
    assert left_behind(stock) == before


def test_interrupting_a_build_undoes_it(daemon, large_rootfs):
    """^C cancels the job, its end is awaited, the status is 130, and neither image nor key is left."""
    process = daemon.spawn("--log-json", "image", "build", "big", "--rootfs", str(large_rootfs))
    for line in process.stderr:
        if json.loads(line).get("stage"):
            break
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    events = [json.loads(line) for line in err.splitlines()]
    assert [event for event in events if event.get("finished")] == [events[-1]]
    assert events[-1]["id"] == "Cancelled"
    assert daemon.json("job", "list")["jobs"][-1]["State"] == "cancelled"
    assert left_behind(daemon) == []
    assert daemon.json("key", "list")["keys"] == []
    assert b"jindiskd.image.worker" not in b"".join(_command_lines(daemon))


def _command_lines(daemon) -> list[bytes]:
    """Command lines and environments of the service's children."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parent = (folder / "stat").read_text().rsplit(")", 1)[1].split()[1]
            if int(parent) == daemon.process.pid:
                found.append((folder / "cmdline").read_bytes() + (folder / "environ").read_bytes())
    return found


def test_a_job_is_watched_and_cancelled_by_another_process(daemon, large_rootfs):
    """--no-wait prints the job; job list, show and cancel work on it."""
    job = json.loads(daemon.ctl("--json", "image", "build", "big", "--rootfs", str(large_rootfs), "--no-wait"))["job"]
    assert job["Operation"] == "image-build"
    assert job["Objects"] == ["big"]
    assert job["OwnerUID"] == os.getuid()
    shown = daemon.json("job", "show", str(job["Id"]))["job"]
    assert shown["State"] == "running"
    assert "big" in daemon.ctl("job", "list")
    assert daemon.ctl("job", "cancel", str(job["Id"])) == f"Job {job['Id']} was cancelled.\n"
    assert "cancelled" in daemon.ctl("job", "show", str(job["Id"]), "--wait", status=130)
    daemon.ctl("job", "cancel", str(job["Id"]), status=4)
    assert left_behind(daemon) == []


def test_a_killed_service_leaves_nothing_half_done(unstarted, large_rootfs):
    """SIGKILL in the middle of a build: after the next start there is neither image nor key nor staging directory."""
    unstarted.start()
    process = unstarted.spawn("--log-json", "image", "build", "big", "--rootfs", str(large_rootfs))
    for line in process.stderr:
        if json.loads(line).get("stage"):
            break
    unstarted.stop(signal.SIGKILL)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 69, err
    deadline = time.monotonic() + 120
    unstarted.start()
    # The worker of the killed service ends by itself when it notices; its directory is locked until then.
    while left_behind(unstarted) and time.monotonic() < deadline:
        unstarted.stop()
        unstarted.start()
    assert left_behind(unstarted) == []
    assert unstarted.json("key", "list")["keys"] == []


def test_stopping_the_service_cancels_what_it_does(daemon, large_rootfs):
    """SIGTERM during a build: the job ends as cancelled, its client learns it, the status is 0."""
    process = daemon.spawn("--log-json", "image", "build", "big", "--rootfs", str(large_rootfs))
    for line in process.stderr:
        if json.loads(line).get("stage"):
            break
    assert daemon.stop() == 0
    _, err = process.communicate(timeout=120)
    assert process.returncode in {130, 69}, err
    assert left_behind(daemon) == []


def test_keys_are_nowhere_but_in_the_store(daemon, rootfs, firmware):
    """Neither the bus traffic nor logs, command lines, environments or files hold the key of an image."""
    with subprocess.Popen(
        ["dbus-monitor", "--pcap", "--address", daemon.address], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as monitor:
        build = daemon.spawn("image", "build", "demo", "--rootfs", str(rootfs), "--seed", "a public seed")
        lines = []
        while build.poll() is None:
            lines += _command_lines(daemon)
            time.sleep(0.01)
        assert build.returncode == 0, build.communicate()
        build.communicate()
        for words in (
            ["image", "measure", "demo"],
            ["key", "list"],
            ["audit", "list"],
            ["daemon", "config"],
            ["status"],
        ):
            daemon.ctl(*words)
        monitor.terminate()
        traffic = monitor.communicate()[0]
    assert b"BuildImage" in traffic
    assert any(b"image.worker" in line for line in lines)
    request = BuildRequest(
        name="demo", platform=Platform.SIMULATED_SNP, format=VolumeFormat.JINDISK, base_kind=BaseKind.ROOTFS,
        firmware=str(firmware), vcpus=1, cpu_model="EPYC-v4", seed=b"a public seed",
    )  # fmt: skip
    key = request.stream("root key")(32)
    kek = (daemon.state / "kek").read_bytes()
    files = [path.read_bytes() for path in daemon.state.rglob("*") if path.is_file() and path.name != "kek"]
    for secret in (key, kek):
        for form in (secret, secret.hex().encode(), secret.hex().upper().encode(), base64.b64encode(secret)[:40]):
            for place in (traffic, daemon.log.read_bytes(), *lines, *files):
                assert form not in place


def test_a_damaged_image_does_not_measure(stock):
    """A changed initrd is found, with the status for integrity."""
    initrd = stock.state / "images/stock/initrd"
    data = bytearray(initrd.read_bytes())
    data[100] ^= 1
    initrd.write_bytes(data)
    try:
        assert "initrd" in stock.ctl("image", "measure", "stock", status=8)
    finally:
        data[100] ^= 1
        initrd.write_bytes(data)


def test_the_doctor_names_what_is_wrong_with_an_image(stock):
    """A whole image has no problem of its own; a changed file, a revoked key and a simulated platform are named."""

    def checks():
        with stock.spawn("--json", "doctor", "--image", "stock") as process:
            said = json.loads(process.communicate(timeout=120)[0])
        assert said["problems"] == sum(check["verdict"] == "problem" for check in said["checks"])
        assert process.returncode == (1 if said["problems"] else 0)
        return {check["id"]: check for check in said["checks"]}

    first = checks()  # what it says of this host is for other tests
    for name in ("image.files", "image.key", "image.broker", "image.cmdline", "image.firmware"):
        assert first[name]["verdict"] in {"ok", "note"}, first[name]
    assert first["image.platform"]["verdict"] == "note"
    assert not any(name.startswith("host.tdx") for name in first)
    cmdline = stock.state / "images/stock/cmdline"
    text = cmdline.read_text()
    cmdline.write_text(text + " init=/bin/sh")
    stock.ctl("key", "revoke", "stock")
    try:
        second = checks()
        assert "init=/bin/sh" in second["image.cmdline"]["found"]
        assert second["image.files"]["verdict"] == "problem"
        assert "revoked" in second["image.key"]["found"]
        shown = stock.ctl("doctor", "--image", "stock", status=1)
        assert "PROBLEM  image.cmdline" in shown
        assert not any(line.startswith("ok") for line in shown.splitlines())
        cmdline.write_text(text.replace(" efi=noruntime", ""))
        assert "lacks 'efi=noruntime'" in checks()["image.cmdline"]["found"]
    finally:
        stock.ctl("key", "reinstate", "stock")
        cmdline.write_text(text)
    assert "no image" in stock.ctl("doctor", "--image", "none", status=3)
    assert "usage" in stock.ctl("doctor", "--platform", "none", status=2).lower()


def initramfs(*names: str) -> bytes:
    """An archive such as a distribution makes, with these files in it."""
    archive = Archive()
    for name in ("init", *names):
        archive.file(name, b"#!/bin/sh\n", 0o755)
    return archive.to_gzip()


def test_an_image_starts_by_its_own_systems_initramfs_and_gets_another(daemon, rootfs, tmp_path):
    """Built with what the base has, updated with what its system made later; refused without the agent, untouched."""
    tree = tmp_path / "tree"
    tree.mkdir()
    subprocess.run(["tar", "-xf", rootfs, "-C", tree], check=True)
    build = ("image", "build", "own", "--rootfs", str(tree), "--initrd", "system")
    assert "there is no initrd.img-" in daemon.ctl(*build, status=2)
    (tree / "boot" / f"initrd.img-{RELEASE}").write_bytes(initramfs(UNLOCK))
    (tree / "etc/jindisk").mkdir()
    daemon.ctl(*build)
    built = daemon.json("image", "show", "own")["image"]
    kernel, initrd = tmp_path / "vmlinuz", tmp_path / "initrd"
    kernel.write_bytes(b"another kernel" * 10_000)
    initrd.write_bytes(initramfs("sbin/init"))
    words = ("image", "update", "own", "--kernel", str(kernel), "--initrd", str(initrd))
    assert "does not have the agent" in daemon.ctl(*words, status=2)
    assert daemon.json("image", "show", "own")["image"] == built
    assert daemon.json("image", "measure", "own")["launch_digest"] == built["LaunchDigest"]
    initrd.write_bytes(initramfs(UNLOCK, "later"))
    after = daemon.json("image", "update", "own", *words[3:])["image"]
    assert after == daemon.json("image", "show", "own")["image"]
    assert after["LaunchDigest"] != built["LaunchDigest"]
    assert f'[snp] measurements = ["{after["LaunchDigest"]}"]' in daemon.ctl(*words)
    assert daemon.json("image", "measure", "own")["launch_digest"] == after["LaunchDigest"]
    assert daemon.json("key", "list")["keys"][0]["launch-digests"] == [built["LaunchDigest"]]
    assert left_behind(daemon) == ["own"]
    daemon.ctl("image", "update", "nothing", *words[3:], status=3)
