"""The libvirt hook, run as libvirt runs it: script, name, operation, the domain on standard input."""

from __future__ import annotations

import json
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

HOOK = Path(__file__).resolve().parents[2] / "libvirt-hooks/qemu"
URI = "https://jindisk.org/xmlns/libvirt/domain/1"
OURS = f"""<domain type='qemu'><name>web</name><uuid>11111111-1111-4111-8111-111111111111</uuid>
<metadata><jd:domain xmlns:jd='{URI}'><jd:image name='web' id='i' platform='simulated-snp'/></jd:domain></metadata>
</domain>"""
NEVER_REFUSED = ["start", "started", "stopped", "release", "reconnect", "restore", "migrate", "attach", ""]


class Service:
    """Stands where the service listens."""

    def __init__(self, path: Path) -> None:
        self.calls: list[dict[str, str]] = []
        self.answer: bytes | Callable[[socket.socket], None] = b'{"allow": true}\n'
        self._listening = socket.socket(socket.AF_UNIX)
        self._listening.bind(str(path))
        self._listening.listen()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                stream, _ = self._listening.accept()
            except OSError:
                return
            with stream:
                line = stream.makefile("rb").readline()
                if line:
                    self.calls.append(json.loads(line))
                if callable(self.answer):
                    self.answer(stream)
                else:
                    stream.sendall(self.answer)

    def close(self) -> None:
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        self._thread.join(10)


@pytest.fixture
def hook(tmp_path: Path) -> Path:
    """The script, looking for the service in the test's directory."""
    text = HOOK.read_text()
    made = tmp_path / "qemu"
    made.write_text(text.replace("/run/jindiskd/hook.sock", str(tmp_path / "hook.sock")))
    assert made.read_text() != text
    made.chmod(0o755)
    return made


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    found = Service(tmp_path / "hook.sock")
    yield found
    found.close()


def call(hook: Path, operation: str, text: str | bytes, name: str = "web") -> subprocess.CompletedProcess[bytes]:
    data = text if isinstance(text, bytes) else text.encode()
    argv = [hook, name, operation, "begin", "-"]
    return subprocess.run(argv, input=data, capture_output=True, timeout=60, check=False, env={})


def sentence(done: subprocess.CompletedProcess[bytes]) -> str:
    """The refusal, which is one line on standard error and nothing else."""
    assert done.returncode == 1
    assert done.stdout == b""
    said = done.stderr.decode()
    assert said.endswith("\n")
    assert said.count("\n") == 1
    return said


def test_the_service_is_told_of_each_step(hook: Path, service: Service) -> None:
    """Operation, name and definition, and its consent lets the start go on."""
    for operation in ("prepare", "start", "started", "stopped", "release"):
        done = call(hook, operation, OURS)
        assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert [made["operation"] for made in service.calls] == ["prepare", "start", "started", "stopped", "release"]
    assert {(made["name"], made["xml"]) for made in service.calls} == {("web", OURS)}


def test_the_services_sentence_is_what_libvirt_shows(hook: Path, service: Service) -> None:
    """With the domain's name; however it is written, it stays one line."""
    service.answer = json.dumps({"allow": False, "reason": "the kernel\nhas changed"}).encode() + b"\n"
    assert sentence(call(hook, "prepare", OURS)) == "jindisk: domain 'web' is not started: the kernel has changed\n"


def test_without_the_service_our_domains_do_not_start(hook: Path) -> None:
    """It says which service, and how to start it."""
    assert "systemctl start jindiskd" in sentence(call(hook, "prepare", OURS))


def test_a_service_that_died_leaves_its_socket(hook: Path, tmp_path: Path) -> None:
    """The same as no service."""
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "hook.sock"))
    assert "systemctl start jindiskd" in sentence(call(hook, "prepare", OURS))


def test_a_service_that_hangs_is_not_waited_for(hook: Path, service: Service) -> None:
    """The hook has a deadline of its own, since libvirt has none."""
    release = threading.Event()
    service.answer = lambda _stream: release.wait(60) and None
    began = time.monotonic()
    said = sentence(call(hook, "prepare", OURS))
    taken_s = time.monotonic() - began
    release.set()
    assert "within 2 s" in said
    assert taken_s >= 1.5, "the service got its time"


def test_a_service_that_drips_is_not_waited_for(hook: Path, service: Service) -> None:
    """The deadline is for the whole answer, not for each part."""

    def drip(stream: socket.socket) -> None:
        for _ in range(40):
            try:
                stream.sendall(b" ")
            except OSError:
                return
            time.sleep(0.2)

    service.answer = drip
    assert "within 2 s" in sentence(call(hook, "prepare", OURS))


@pytest.mark.parametrize(
    "answer",
    [b"", b"\n", b"{}\n", b"[]\n", b'{"allow": "yes"}\n', b'{"allow": 1}\n', b"\xff\n", b"x" * (1 << 17) + b"\n"],
    ids=["nothing", "empty", "object", "list", "text", "number", "bytes", "long"],
)
def test_an_answer_that_is_none_refuses(hook: Path, service: Service, answer: bytes) -> None:
    """Nothing but a plain yes lets a domain of ours start."""
    service.answer = answer
    assert "gave no answer" in sentence(call(hook, "prepare", OURS))


@pytest.mark.parametrize("operation", NEVER_REFUSED)
def test_nothing_but_prepare_is_ever_refused(hook: Path, operation: str) -> None:
    """A failing `reconnect` would kill a running guest."""
    done = call(hook, operation, OURS)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


@pytest.mark.parametrize("operation", NEVER_REFUSED)
def test_a_refusing_service_refuses_prepare_alone(hook: Path, service: Service, operation: str) -> None:
    """The same with a service that says no to everything."""
    service.answer = b'{"allow": false, "reason": "no"}\n'
    done = call(hook, operation, OURS)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


@pytest.mark.parametrize(
    "text", [b"", b"<domain/>", b"not XML", b"<domain><name>x</name></domain>", b"\x01" * 1000, b"\xff\xfe" * 1000]
)
def test_other_domains_are_left_alone(hook: Path, text: bytes) -> None:
    """Whatever is wrong with a domain that is not ours is not our business, nor is the service's absence its."""
    assert call(hook, "prepare", text).returncode == 0


def test_a_definition_that_is_too_long_is_refused(hook: Path, service: Service) -> None:
    """With our name in it, it cannot talk its way past by its length."""
    assert "too long" in sentence(call(hook, "prepare", OURS + " " * (1 << 20)))
    assert service.calls == []


def test_recorded_calls_of_libvirt(hook: Path, service: Service, vectors: Path) -> None:
    """Every call that libvirt made in a paused start, a run, a save and restore, a refusal: understood, allowed."""
    for release in ("9.0", "12.8"):
        folder = vectors / "libvirt/hooks" / release
        for made in json.loads((folder / "calls.json").read_text()):
            if made["argv"][0].endswith("/qemu"):
                text = (folder / made["stdin"]).read_bytes() if made["stdin"] else b""
                argv = [hook, *made["argv"][1:]]
                done = subprocess.run(argv, input=text, capture_output=True, timeout=60, check=False, env={})
                assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert {made["operation"] for made in service.calls} == {"prepare", "start", "started", "stopped", "release"}
