"""The key-encryption key in a TPM: a software TPM with the real tools, and the broker's program with both."""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jindiskd.base.listening import is_listening
from jindiskd.base.secret import Secret
from jindiskd.errors import AlreadyExists, InvalidArgument
from jindiskd.keys.database import KekWrong
from jindiskd.keys.kek import KekPlace, KekSource
from jindiskd.keys.opening import open_store
from jindiskd.keys.tpm import KekNotUnsealed, Tpm
from jindiskd.keys.wrap import KekMissing, load_kek

PLACE: dict[str, Any] = {
    "source": KekSource.FILE, "tpm2_dir": Path("/nowhere"), "tpm2_tcti": "", "tpm2_pcrs": "", "credentials": None,
}  # fmt: skip


class Software:
    """A TPM in software: its state stays when it is switched off, and its registers begin anew."""

    def __init__(self, folder: Path) -> None:
        for program in ("swtpm", "tpm2_unseal"):
            if shutil.which(program) is None:
                pytest.skip(f"{program} is not installed: scripts/setup installs it")
        self.folder, self.process = folder, None  # type: Path, subprocess.Popen[bytes] | None
        self.tcti = f"swtpm:path={folder}/sock"

    def on(self) -> "Software":
        words = ["swtpm", "socket", "--tpm2", "--tpmstate", f"dir={self.folder}"]
        words += ["--flags", "not-need-init,startup-clear"]
        for option, name in (("--server", "sock"), ("--ctrl", "sock.ctrl")):
            words += [option, f"type=unixio,path={self.folder}/{name}"]
        self.process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for _ in range(3000):
            if is_listening(self.folder / "sock"):
                return self
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(0.01)
                break
        raise AssertionError("swtpm did not start")

    def off(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None
        for name in ("sock", "sock.ctrl"):
            (self.folder / name).unlink(missing_ok=True)

    def extend(self, register: int) -> None:
        words = ["tpm2_pcrextend", "-T", self.tcti, f"{register}:sha256={'11' * 32}"]
        subprocess.run(words, check=True, capture_output=True, timeout=60)


@pytest.fixture
def software() -> Iterator[Software]:
    with tempfile.TemporaryDirectory() as name:
        made = Software(Path(name))
        try:
            yield made.on()
        finally:
            made.off()


def test_it_unseals_in_the_state_it_was_sealed_in_alone(software: Software, tmp_path: Path) -> None:
    """After the machine was off too; with a changed register it does not; nothing on the disk is the key."""
    kek = Secret.random(32)
    plain = bytes(kek.reveal())
    tpm = Tpm(tmp_path / "tpm2", software.tcti, "sha256:7,8")
    with pytest.raises(KekMissing):
        tpm.unseal()
    tpm.seal(kek)
    assert tpm.unseal() == kek
    with pytest.raises(AlreadyExists):
        tpm.seal(Secret.random(32))
    for path in [*(tmp_path / "tpm2").iterdir(), *software.folder.iterdir()]:
        assert not path.is_file() or plain not in path.read_bytes()
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "tpm2").iterdir()} == {0o600}
    software.off()
    software.on()
    assert tpm.unseal() == kek
    software.extend(8)
    with pytest.raises(KekNotUnsealed, match="seal it again"):
        tpm.unseal()
    software.extend(9)
    software.off()
    software.on()
    assert tpm.unseal() == kek


def test_another_tpm_gives_nothing(software: Software, tmp_path: Path) -> None:
    """What is sealed to one is of no use to another, or when it was altered; without registers the TPM suffices."""
    kek = Secret.random(32)
    Tpm(tmp_path / "tpm2", software.tcti, "").seal(kek)
    software.extend(7)
    assert Tpm(tmp_path / "tpm2", software.tcti, "").unseal() == kek
    with tempfile.TemporaryDirectory() as name:
        other = Software(Path(name)).on()
        with pytest.raises(KekNotUnsealed):
            Tpm(tmp_path / "tpm2", other.tcti, "").unseal()
        other.off()
    private = tmp_path / "tpm2/kek.priv"
    data = bytearray(private.read_bytes())
    data[-1] ^= 1
    private.write_bytes(data)
    with pytest.raises(KekNotUnsealed):
        Tpm(tmp_path / "tpm2", software.tcti, "").unseal()


@pytest.mark.parametrize(("tcti", "pcrs"), [("device:/dev/tpmrm0", "7"), ("device:/x", "sha256:7;x"), ("--help", "")])
def test_settings_are_read_strictly(tcti: str, pcrs: str) -> None:
    """They become arguments of programs."""
    with pytest.raises(InvalidArgument):
        Tpm(Path("/nowhere"), tcti, pcrs)


@pytest.mark.parametrize("name", ["jindisk-broker", "jindiskd"])
def test_the_programs_start_from_a_sealed_key(software: Software, tmp_path: Path, name: str) -> None:
    """Sealed by the program, the file deleted, started; with the register changed it ends with 8 and says why.

    jindiskd gets a bus of its own, and no libvirt: both come after the store.
    """
    configuration, program = tmp_path / "settings.toml", Path(sys.executable).with_name(name)
    listen = '[listen]\nguests = ""\n' if name == "jindisk-broker" else f'[images]\ndir = "{tmp_path}/images"\n'
    service = f'[service]\nstate_dir = "{tmp_path}/state"\nruntime_dir = "{tmp_path}/run"\n'
    keys = f'[keys]\ntpm2_tcti = "{software.tcti}"\ntpm2_pcrs = "sha256:7"\n'
    configuration.write_text(service + listen + keys)
    words = [str(program), "--config", str(configuration)]
    done = subprocess.run([*words, "--seal-kek"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "delete that file" in done.stdout
    (tmp_path / "state/kek").unlink()
    configuration.write_text(service + listen + keys.replace("[keys]", '[keys]\nkek = "tpm2"'))
    environment = {"PATH": os.environ["PATH"]}
    with bus(tmp_path) as address:
        environment |= {"DBUS_SYSTEM_BUS_ADDRESS": address}

        def start() -> subprocess.Popen[str]:
            return subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=environment)

        with start() as process:
            assert process.stderr is not None
            said = []
            for line in process.stderr:
                said.append(line)
                if "ready" in line:
                    break
            assert process.poll() is None, said
            process.terminate()
            process.communicate(timeout=300)
            assert process.returncode == 0
        assert (tmp_path / "state/keys.db").stat().st_size > 0
        assert not (tmp_path / "state/kek").exists()
        software.extend(7)
        with start() as process:
            _, text = process.communicate(timeout=300)
            assert process.returncode == 8
            assert "does not unseal" in text


@contextlib.contextmanager
def bus(folder: Path) -> Iterator[str]:
    """A bus without rules, for programs that want one."""
    config = folder / "bus.conf"
    config.write_text(
        '<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-BUS Bus Configuration 1.0//EN"\n'
        ' "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">\n'
        f"<busconfig><type>system</type><listen>unix:path={folder}/bus</listen>"
        '<policy context="default"><allow user="*"/><allow own="*"/><allow send_destination="*" eavesdrop="true"/>'
        '<allow receive_sender="*" eavesdrop="true"/>'
        "</policy></busconfig>"
    )
    words = ["dbus-daemon", f"--config-file={config}", "--nofork", "--print-address=1"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip()
        finally:
            process.kill()


@pytest.mark.parametrize("name", ["jindisk-broker", "jindiskd"])
def test_the_programs_rotate_and_take_a_credential(tmp_path: Path, name: str) -> None:
    """From a file to the credential by `--rotate-kek`; the old key opens nothing any more, nor is any file taken."""
    configuration, program = tmp_path / "settings.toml", Path(sys.executable).with_name(name)
    service = f'[service]\nstate_dir = "{tmp_path}/state"\nruntime_dir = "{tmp_path}/run"\n'
    configuration.write_text(service)
    (tmp_path / "state").mkdir()
    old = load_kek(tmp_path / "state/kek", None)
    open_store(KekPlace(**PLACE, file=tmp_path / "state/kek"), f"sqlite:///{tmp_path}/state/keys.db", None).close()
    new = tmp_path / "new"
    new.write_bytes(os.urandom(32))
    words = [str(program), "--config", str(configuration), "--rotate-kek", str(new)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert "chmod 600" in done.stderr
    new.chmod(0o600)
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (tmp_path / "credentials").mkdir()
    new.rename(tmp_path / "credentials/jindisk.kek")
    configuration.write_text(service + '[keys]\nkek = "credential"\n')
    place = KekPlace(**{**PLACE, "source": KekSource.CREDENTIAL}, file=tmp_path / "none")
    url = f"sqlite:///{tmp_path}/state/keys.db"
    with pytest.raises(KekMissing):
        open_store(place, url, None)
    open_store(replace(place, credentials=tmp_path / "credentials"), url, None).close()
    assert bytes(old.reveal()) == (tmp_path / "state/kek").read_bytes()
    with pytest.raises(KekWrong):
        open_store(KekPlace(**PLACE, file=tmp_path / "state/kek"), url, None)
