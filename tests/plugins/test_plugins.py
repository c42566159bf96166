"""Plug-ins: the sample of the documents, installed as a package would be, and those that cannot be used."""

import shutil
import sys
import textwrap
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from jindiskd.attest.collateral import CollateralCache
from jindiskd.attest.collecting import Collector
from jindiskd.attest.plugins import plugged_in
from jindiskd.attest.verifier import Evidence, judge_any
from jindiskd.backend.images import ImagesBackend
from jindiskd.base.platform import Platform, Tee
from jindiskd.base.plugins import REPORT_SOURCES, PluginUnusable, find
from jindiskd.bus.ports import BuildOrder
from jindiskd.config import BadConfiguration, BrokerConfig, Config, ImagesConfig, load
from jindiskd.errors import InvalidArgument
from jindiskd.guest import report
from jindiskd.image.request import BaseKind, BuildRequest, VolumeFormat
from jindiskd.sim.firmware import SimulatedSnpFirmware
from jindiskd.sim.pki import SimulatedRoot

EXAMPLES = Path(__file__).resolve().parents[2] / "docs/examples"
ENTRY_POINTS = """
[jindiskd.verifiers]
sample = sample_plugin:make_verifier
broken = sample_plugin:nothing
missing = no_such_module_at_all:x
text = sample_plugin:TEXT
fails = sample_plugin:fails
other = sample_plugin:other
[jindiskd.report_sources]
sample = sample_plugin:Reports
"""
MORE = """
TEXT = "no function"
def fails(collector):
    raise RuntimeError("no")
def other(collector):
    return object()
"""


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The sample, as pip would leave it."""
    folder = tmp_path / "site"
    info = folder / "sample_plugin-1.0.dist-info"
    info.mkdir(parents=True)
    text = (EXAMPLES / "sample_plugin.py").read_text()
    (folder / "sample_plugin.py").write_text(text + textwrap.dedent(MORE))
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: sample-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(ENTRY_POINTS)
    monkeypatch.syspath_prepend(str(folder))
    yield folder
    sys.modules.pop("sample_plugin", None)


def test_a_verifier(installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sample judges reports under its own root, behind ours and by the same interface."""
    now = datetime.now(UTC)
    root = SimulatedRoot.generate(now=now)
    (tmp_path / "ark.der").write_bytes(root.ark)
    monkeypatch.setenv("SAMPLE_ROOT", str(tmp_path / "ark.der"))
    collector = Collector(CollateralCache(tmp_path / "cache"))
    verifiers = plugged_in(["sample"], collector)
    firmware = SimulatedSnpFirmware(root, bytes(48))
    vcek = root.chip_certificate(root.chip_id("default"), firmware.template.reported_tcb)
    certificates = (vcek, root.ask, root.ark)
    evidence = Evidence(tee=Tee.SNP, blob=firmware.report(bytes(64)), certificates=certificates)
    found = judge_any(verifiers, evidence, report_data=bytes(64), now=now)
    assert found.simulated
    assert found.measurement == bytes(48)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("absent", "is not installed (installed: broken, fails, missing, other, sample, text)"),
        ("broken", "cannot be loaded: AttributeError"),
        ("missing", "cannot be loaded: ModuleNotFoundError"),
        ("text", "is not a function"),
        ("fails", "fails: RuntimeError: no"),
        ("other", "makes something that is no verifier"),
    ],
)
def test_those_that_cannot_be_used(installed: Path, tmp_path: Path, name: str, problem: str) -> None:
    """Named, with the reason; the service does not start with them."""
    with pytest.raises(PluginUnusable) as found:
        plugged_in([name], Collector(CollateralCache(tmp_path)))
    assert problem in str(found.value)


def test_a_report_source(installed: Path, tmp_path: Path) -> None:
    """Found by its name when an image is built, and imported by module and attribute in the guest."""
    place = find(REPORT_SOURCES, "sample").value
    source = report.source_for(Platform.SNP, place)
    assert type(source).__name__ == "Reports"
    for bad in ("sample_plugin:absent", "absent:x", "sample_plugin:", ":"):
        with pytest.raises(report.NoReport, match="cannot be used"):
            report.source_for(Platform.SNP, bad)


def request(**changes: object) -> BuildRequest:
    given: dict = {
        "name": "x",
        "platform": Platform.SIMULATED_SNP,
        "format": VolumeFormat.LUKS2,
        "base_kind": BaseKind.ROOTFS,
        "firmware": "/f",
        "vcpus": 1,
        "cpu_model": "EPYC-v4",
    }
    return BuildRequest(**{**given, **changes})


def test_what_a_build_takes() -> None:
    """A key program is not for JinDisk 2, whose freshness the broker keeps; a source has a form."""
    request(key_program="/x", report_source="a.b:C").check()
    with pytest.raises(InvalidArgument, match="JinDisk 2"):
        request(key_program="/x", format=VolumeFormat.JINDISK).check()
    for bad in ("x", "os.system('x'):y", "../x:y", "a:b:c"):
        with pytest.raises(InvalidArgument, match="report source"):
            request(report_source=bad).check()


def test_a_build_may_name_what_is_installed_and_nothing_else(installed: Path, tmp_path: Path) -> None:
    """Over what is configured, or back to none; a program from one of its folders alone, whatever links lead there."""
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in ("mine", "configured"):
        (programs / name).write_bytes(b"#!")
    (programs / "link").symlink_to("/etc/shadow")
    images = ImagesConfig(
        report_source="sample",
        key_program=programs / "configured",
        key_program_dirs=(programs,),
        firmware=tmp_path / "firmware",
        format=VolumeFormat.LUKS2,
        platform=Platform.SIMULATED_SNP,
        cpu_model="EPYC-v4",
    )
    backend = ImagesBackend(None, None, None, Config(images=images, broker=BrokerConfig(allow_simulated=True)))  # type: ignore[arg-type]  # only settings are asked

    def made(**changes: object) -> tuple[str, str]:
        order = backend.checked(BuildOrder(name="x", **changes))  # type: ignore[arg-type]  # fields of it
        asked = backend._request(order)
        return asked.report_source, asked.key_program

    source = find(REPORT_SOURCES, "sample").value
    assert made() == (source, str(programs / "configured"))
    assert made(report_source="", key_program="") == ("", "")
    assert made(report_source="sample", key_program=str(programs / "mine")) == (source, str(programs / "mine"))
    # A link of the caller's own may lead elsewhere by the time that the program is read.
    (tmp_path / "callers").symlink_to(programs)
    through = str(tmp_path / "callers/mine")
    assert made(report_source="sample", key_program=through) == (source, str(programs / "mine"))
    (tmp_path / "link").symlink_to(programs / "mine")
    links = (str(tmp_path / "link"), str(programs / "link"))
    for bad in (*links, str(programs / ".."), "/etc/shadow", str(programs / "../firmware"), "mine"):
        with pytest.raises(InvalidArgument, match="key_program_dirs"):
            made(key_program=bad)
    with pytest.raises(PluginUnusable, match="not installed"):
        made(report_source="none")
    with pytest.raises(InvalidArgument, match="JinDisk 2"):
        made(key_program=str(programs / "mine"), format="jindisk")


def test_settings(tmp_path: Path) -> None:
    """Names in a list; anything else is a fault that says so."""
    file = tmp_path / "jindiskd.toml"
    file.write_text('[broker]\nverifiers = ["a", "b"]\n')
    assert load(file).config.broker.verifiers == ("a", "b")
    for bad in ('"a"', "[1]", '[""]'):
        file.write_text(f"[broker]\nverifiers = {bad}\n")
        with pytest.raises(BadConfiguration, match="list of names"):
            load(file)


def test_the_examples_are_whole() -> None:
    """What the documents point to is there, and the program can be run."""
    assert (EXAMPLES / "key-program").stat().st_mode & 0o111
    assert shutil.which("python3")
