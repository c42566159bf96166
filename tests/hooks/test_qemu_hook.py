"""The libvirt hook, run as libvirt runs it: script, name, operation, the domain on standard input."""

import socket
import subprocess
from pathlib import Path

import pytest

from jindiskd.base.platform import Platform
from jindiskd.domain.binding import Binding
from jindiskd.domain.spec import BootInputs, DomainSpec
from jindiskd.domain.xml import write

HOOK = Path(__file__).resolve().parents[2] / "libvirt-hooks/qemu"


def ours(device: Path) -> str:
    boot = BootInputs(firmware="/f", kernel="/k", initrd="/i", cmdline="ro", vcpus=1, cpu_model="EPYC-Milan")
    return write(
        DomainSpec(
            name="web",
            uuid="11111111-1111-4111-8111-111111111111",
            binding=Binding(image="web", image_id="id", platform=Platform.SIMULATED_SNP),
            boot=boot,
            memory_mib=512,
            disk=Path("/d"),
            console_log=Path("/l"),
            vsock_socket=device,
        )
    )


def call(operation: str, text: str) -> subprocess.CompletedProcess[str]:
    argv = [HOOK, "web", operation, "begin", "-"]
    return subprocess.run(argv, input=text, capture_output=True, text=True, timeout=5, check=False, env={})


def test_a_domain_that_nobody_would_attest_is_refused_in_one_sentence(tmp_path: Path) -> None:
    """The sentence names the domain and the command."""
    done = call("prepare", ours(tmp_path / "absent"))
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "'web'" in done.stderr
    assert "jindiskctl launch" in done.stderr


def test_a_prepared_domain_may_start(tmp_path: Path) -> None:
    """The service has made the device: the launch goes on."""
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "d"))
        assert call("prepare", ours(tmp_path / "d")).returncode == 0


@pytest.mark.parametrize("operation", ["start", "started", "stopped", "release", "reconnect", "restore", "migrate"])
def test_nothing_else_is_ever_refused(tmp_path: Path, operation: str) -> None:
    """A failing `reconnect` would kill a running guest."""
    done = call(operation, ours(tmp_path / "absent"))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("text", ["", "<domain/>", "not XML", "<domain><name>x</name></domain>", "\x01" * 1000])
def test_other_domains_are_left_alone(text: str) -> None:
    """Whatever is wrong with a domain that is not ours is not our business."""
    assert call("prepare", text).returncode == 0


def test_a_hostile_definition_with_our_name_in_it_is_refused() -> None:
    """Entities and broken XML cannot talk their way past."""
    uri = "https://jindisk.org/xmlns/libvirt/domain/1"
    for text in (f"<!DOCTYPE a [<!ENTITY b 'c'>]><a xmlns='{uri}'/>", f"<domain xmlns='{uri}'"):
        assert call("prepare", text).returncode == 1
