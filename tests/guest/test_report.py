"""Ways of asking for a report: hostile firmware answers, the ioctl's retries, configfs races."""

import ctypes
import errno
import os
import socket
import struct
import threading
from pathlib import Path

import pytest

from jindiskd.base.platform import Platform
from jindiskd.base.secret import Secret
from jindiskd.guest import report
from jindiskd.guest.broker import GuestBroker
from jindiskd.guest.codes import Code, GuestFailure
from jindiskd.guest.config import BrokerPin
from jindiskd.guest.report import NoReport, SevGuest, SimulatedFirmware, TsmReports

DATA = bytes(range(64))


def firmware(answer: bytes) -> tuple[SimulatedFirmware, list[bytes]]:
    """A source whose other end sends `answer` and closes."""
    seen: list[bytes] = []

    def connect() -> socket.socket:
        ours, theirs = socket.socketpair()
        ours.settimeout(60)

        def serve() -> None:
            with theirs:
                seen.append(theirs.recv(200))
                theirs.sendall(answer)

        threading.Thread(target=serve, daemon=True).start()
        return ours

    return SimulatedFirmware(connect), seen


def blob(data: bytes) -> bytes:
    return struct.pack("<I", len(data)) + data


def test_simulated_firmware() -> None:
    """Request and answer are as documented."""
    source, seen = firmware(bytes(4) + blob(b"report") + blob(b"table"))
    found = source.get(DATA)
    assert (found.report, found.table) == (b"report", b"table")
    assert seen == [b"JSIM" + b"\1\0\0\0" + DATA]


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"\1\0\0\0",
        bytes(3),
        bytes(4) + b"\xff\xff\xff\xff",
        bytes(4) + struct.pack("<I", 4001) + bytes(4001),
        bytes(4) + blob(b"report")[:-1],
        bytes(4) + blob(b"report"),
        bytes(4) + blob(b"report") + struct.pack("<I", (1 << 16) + 1),
    ],
)
def test_simulated_firmware_misbehaves(answer) -> None:
    """Any other answer is `NoReport`, without reading more than the limits allow."""
    with pytest.raises(NoReport):
        firmware(answer)[0].get(DATA)


def test_platform_decides(monkeypatch, tmp_path) -> None:
    """A simulated source is never used for a real platform, whatever devices there are."""
    assert isinstance(report.source_for(Platform.SIMULATED_SNP), SimulatedFirmware)
    monkeypatch.setattr(TsmReports, "ROOT", tmp_path / "absent")
    assert isinstance(report.source_for(Platform.SNP), SevGuest)
    assert isinstance(report.source_for(Platform.TDX), TsmReports)
    monkeypatch.setattr(TsmReports, "ROOT", tmp_path)
    assert isinstance(report.source_for(Platform.SNP), TsmReports)
    for platform in (Platform.SEV, Platform.SEV_ES):
        with pytest.raises(NoReport):
            report.source_for(platform)


class SevKernel:
    """The SEV driver's side of the ioctl; the hardware for it is rare."""

    def __init__(self, table: bytes, *, busy: int = 0, status: int = 0, size: int = 1184, lie: int | None = None):
        self.table, self.busy, self.status, self.size, self.lie = table, busy, status, size, lie
        self.calls = 0

    def __call__(self, _descriptor: int, request: int, buffer: bytearray) -> int:
        assert request == 0xC0205302
        assert len(buffer) == 32
        self.calls += 1
        version, asked, answer, _ = struct.unpack("<B7xQQQ", buffer)
        assert version == 1
        data, vmpl, address, length = struct.unpack("<64sI28xQI4x", ctypes.string_at(asked, 112))
        assert (data, vmpl) == (DATA, 0)
        if self.busy:
            self.busy -= 1
            struct.pack_into("<Q", buffer, 24, 2 << 32)
            raise OSError(errno.EIO, "busy")
        needed = self.lie if self.lie is not None else len(self.table)
        if length < needed or self.lie is not None:
            ctypes.memmove(asked + 96 + 8, struct.pack("<I", needed), 4)
            struct.pack_into("<Q", buffer, 24, 1 << 32)
            raise OSError(errno.EIO, "length")
        if self.table:
            ctypes.memmove(address, self.table, len(self.table))
        ctypes.memmove(answer, struct.pack("<II24x", self.status, self.size) + b"R" * 1184, 32 + 1184)
        return 0


@pytest.fixture
def device(tmp_path) -> Path:
    path = tmp_path / "sev-guest"
    path.touch()
    return path


@pytest.mark.parametrize(("table", "calls"), [(b"", 1), (b"C" * 8192, 2)])
def test_sev_guest(device, table, calls) -> None:
    """The certificate table's length is learnt from the first answer."""
    kernel = SevKernel(table)
    found = SevGuest(device, kernel).get(DATA)
    assert (found.report, found.table, kernel.calls) == (b"R" * 1184, table, calls)


def test_sev_guest_busy(device) -> None:
    """A busy host is asked again, but not for ever."""
    assert SevGuest(device, SevKernel(b"", busy=2)).get(DATA).report
    with pytest.raises(NoReport, match="busy"):
        SevGuest(device, SevKernel(b"", busy=99)).get(DATA)


@pytest.mark.parametrize(
    "kernel",
    [SevKernel(b"", status=0x16), SevKernel(b"", size=0), SevKernel(b"", size=3969)]
    + [SevKernel(b"", lie=lie) for lie in (1, 4095, 1 << 20, 0xFFFFF000)],
)
def test_sev_guest_misbehaves(device, kernel) -> None:
    """Bad status, impossible sizes and lengths from the host are refused before anything is allocated for them."""
    with pytest.raises(NoReport):
        SevGuest(device, kernel).get(DATA)


def test_sev_guest_absent(tmp_path) -> None:
    """No device, no report."""
    with pytest.raises(NoReport, match="open"):
        SevGuest(tmp_path / "none").get(DATA)


class Configfs:
    """configfs-tsm's files appear with the directory and vanish with it; `os` functions are wrapped to do so."""

    def __init__(self, root: Path, *, steps: list[int], aux: bool = True, errors: list[int] | None = None) -> None:
        self.root, self.steps, self.aux, self.errors = root, steps, aux, errors or []
        self.made: list[str] = []
        self.mkdir, self.rmdir, self.open = Path.mkdir, Path.rmdir, os.open

    def install(self, monkeypatch) -> None:
        configfs = self

        def mkdir(path, *_args, **_kwargs) -> None:
            configfs.mkdir(path)
            configfs.made.append(path.name)
            (path / "generation").write_bytes(b"0\n")
            (path / "inblob").write_bytes(b"")
            (path / "outblob").write_bytes(b"")
            if configfs.aux:
                (path / "auxblob").write_bytes(b"table")

        def rmdir(path) -> None:
            for file in path.iterdir():
                file.unlink()
            configfs.rmdir(path)

        def opened(path, *args, **kwargs) -> int:
            if Path(path).name == "outblob":
                if configfs.errors:
                    raise OSError(configfs.errors.pop(0), "injected")
                folder = Path(path).parent
                count = int((folder / "generation").read_bytes())
                (folder / "generation").write_bytes(b"%d\n" % (count + configfs.steps.pop(0)))
                (folder / "outblob").write_bytes(b"quote for " + (folder / "inblob").read_bytes())
            return configfs.open(path, *args, **kwargs)

        monkeypatch.setattr(Path, "mkdir", mkdir)
        monkeypatch.setattr(Path, "rmdir", rmdir)
        monkeypatch.setattr(os, "open", opened)


@pytest.mark.parametrize("aux", [True, False])
def test_configfs(monkeypatch, tmp_path, aux) -> None:
    """One write, one generation, one report; nothing stays; names differ."""
    configfs = Configfs(tmp_path, steps=[1, 1], aux=aux)
    configfs.install(monkeypatch)
    for _ in range(2):
        found = TsmReports(tmp_path).get(DATA)
        assert (found.report, found.table) == (b"quote for " + DATA, b"table" if aux else b"")
    assert len(set(configfs.made)) == 2
    assert not list(tmp_path.iterdir())


def test_configfs_race(monkeypatch, tmp_path) -> None:
    """A report made while somebody else wrote is thrown away."""
    configfs = Configfs(tmp_path, steps=[2, 1])
    configfs.install(monkeypatch)
    assert TsmReports(tmp_path).get(DATA).report
    assert configfs.steps == []
    configfs.steps = [2] * 9
    with pytest.raises(NoReport, match="changing"):
        TsmReports(tmp_path).get(DATA)


@pytest.mark.parametrize(("number", "ok"), [(errno.EINTR, True), (errno.ETIMEDOUT, True), (errno.ENXIO, False)])
def test_configfs_errors(monkeypatch, tmp_path, number, ok) -> None:
    """What a host can cause in passing is tried again; what says that there is no provider is final."""
    Configfs(tmp_path, steps=[1], errors=[number]).install(monkeypatch)
    if ok:
        assert TsmReports(tmp_path).get(DATA).report
    else:
        with pytest.raises(NoReport, match=str(int(number))):
            TsmReports(tmp_path).get(DATA)


def test_configfs_absent(tmp_path) -> None:
    """No configfs, no report."""
    with pytest.raises(NoReport, match="mkdir"):
        TsmReports(tmp_path / "none").get(DATA)


def test_a_tdx_guest_says_that_it_has_its_keys(tmp_path: Path) -> None:
    """One write of 48 bytes, which extends the register; nothing on other platforms, nor where the kernel has none."""
    register = tmp_path / "rtmr3:sha384"
    report.end_attesting(Platform.TDX, register)
    assert not register.exists()
    register.touch()
    for platform in set(Platform) - {Platform.TDX}:
        report.end_attesting(platform, register)
        assert register.read_bytes() == b""
    report.end_attesting(Platform.TDX, register)
    assert register.read_bytes() == report.KEYS_GIVEN
    assert len(report.KEYS_GIVEN) == 48
    register.unlink()
    register.mkdir()
    with pytest.raises(OSError, match="directory"):
        report.end_attesting(Platform.TDX, register)


@pytest.mark.parametrize("refused", [False, True])
def test_it_says_so_once_it_has_them(monkeypatch: pytest.MonkeyPatch, refused: bool) -> None:
    """Not before: the next attempt would be refused. A guest that cannot does not start, and keeps no key."""
    told: list[str] = []
    key = Secret(b"k" * 32)

    class Client:
        def obtain(self, *_arguments: object) -> list[Secret]:
            told.append("keys")
            return [key]

    def end(_platform: Platform) -> None:
        told.append("end")
        if refused:
            raise OSError(errno.EIO, "refused")

    broker = GuestBroker(BrokerPin(spki_sha256=bytes(32)), Platform.TDX)
    monkeypatch.setattr(broker, "client", lambda _deadline_s: Client())
    monkeypatch.setattr(report, "end_attesting", end)
    if refused:
        with pytest.raises(GuestFailure) as failure:
            broker.obtain([], 0.0, lambda: None)
        assert (failure.value.code, len(key)) == (Code.REPORT, 0)
    else:
        assert broker.obtain([], 0.0, lambda: None) == [key]
    assert told == ["keys", "end"]
