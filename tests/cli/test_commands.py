"""The command line as a whole: exit statuses, completion, manual pages, system files, offline judgements."""

import json
import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import click
import pytest

from jindiskd import system_files
from jindiskd.bus import contract
from jindiskd.cli import manpages
from jindiskd.cli.main import cli, main
from jindiskd.system_files import INTERFACES

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = Path(sys.executable).with_name("jindiskctl")


def every_command() -> list[tuple[tuple[str, ...], click.Command]]:
    return list(manpages.leaves(cli, ()))


def test_every_command_and_option_explains_itself():
    """No command without help, no option without help, --json and its like everywhere."""
    for words, command in every_command():
        assert command.help, words
        options = {p.name: p for p in command.params if isinstance(p, click.Option)}
        assert {"json", "log_json", "no_legend"} <= options.keys(), words
        for name, option in options.items():
            assert option.help or name == "tee", (words, name)


def test_without_a_service_the_status_says_so(private_bus):
    """69, and what to do, on standard error alone; as one JSON line with --log-json."""
    environment = {**os.environ, "DBUS_SYSTEM_BUS_ADDRESS": private_bus}
    out = subprocess.run([PROGRAM, "status"], env=environment, capture_output=True, text=True)
    assert (out.returncode, out.stdout) == (69, "")
    assert "systemctl start jindiskd" in out.stderr
    out = subprocess.run([PROGRAM, "--log-json", "image", "list"], env=environment, capture_output=True, text=True)
    event = json.loads(out.stderr)
    assert (event["type"], event["id"], event["finished"], event["exit_status"]) == (
        "error",
        "ServiceUnavailable",
        True,
        69,
    )
    environment["DBUS_SYSTEM_BUS_ADDRESS"] = "unix:path=/nowhere"
    out = subprocess.run([PROGRAM, "status"], env=environment, capture_output=True, text=True)
    assert out.returncode == 69
    assert "dbus.service" in out.stderr


def test_wrong_usage_is_status_2(capsys):
    """Like everywhere else."""
    assert main(["image", "frob"]) == 2
    assert main(["nonsense"]) == 2
    assert main(["audit", "list", "--limit", "0"]) == 2
    assert main(["image", "build", "x", "--seed"]) == 2
    capsys.readouterr()


# Completion


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts_are_right_for_their_shells(shell, tmp_path, capsys):
    """Each is accepted by its shell; bash completes nouns, verbs and options with it."""
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert "_JINDISKCTL_COMPLETE" in script
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    path = tmp_path / "script"
    path.write_text(script)
    subprocess.run([shell, "-n", path], check=True)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["jindiskctl", "ima"], {"image"}),
        (["jindiskctl", "key", "re"], {"recovery", "revoke", "reinstate"}),
        (["jindiskctl", "image", "build", "--vc"], {"--vcpus"}),
        (["jindiskctl", "image", "build", "x", "--platform", "simulated-sn"], {"simulated-snp"}),
        (["jindiskctl", "image", "show", "x"], set()),
    ],
)
def test_bash_completes(words, expected, tmp_path, capsys, private_bus):
    """The real shell with the real program; no service runs, and completing does not complain."""
    main(["completion", "bash"])
    path = tmp_path / "script"
    path.write_text(capsys.readouterr().out)
    code = f"""source {path}
    COMP_WORDS=({" ".join(words)}); COMP_CWORD={len(words) - 1}
    _jindiskctl_completion {PROGRAM}
    printf '%s\\n' "${{COMPREPLY[@]}}" """
    environment = {**os.environ, "DBUS_SYSTEM_BUS_ADDRESS": private_bus}
    out = subprocess.run(["bash", "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert set(out.stdout.split()) == expected
    assert out.stderr == ""


# Manual pages


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("man")
    subprocess.run([sys.executable, "-m", "jindiskd.cli.manpages", folder], check=True)
    return folder


def plain(page: Path) -> str:
    if shutil.which("groff") is None:
        pytest.skip("groff is not installed")
    words = ["groff", "-man", "-ww", "-Tutf8", "-Kutf8", "-rHY=0", "-rLL=200n", "-P-cbou", page]
    out = subprocess.run(words, capture_output=True, text=True, check=True)
    assert out.stderr == ""
    return out.stdout.replace("\u2010", "-").replace("\u2212", "-")


def test_the_pages_have_every_command_and_option(pages):
    """And groff finds nothing to complain about."""
    text = plain(pages / "jindiskctl.1")
    for words, command in every_command():
        assert re.search(rf"^\s+{re.escape(' '.join(words))}\b", text, re.MULTILINE), words
        for parameter in command.params:
            for flag in getattr(parameter, "opts", []):
                assert not flag.startswith("-") or flag in text, (words, flag)
    assert "EXIT STATUS" in text


def test_the_page_of_jindisksetup_has_every_command_and_option(pages):
    """Its own page, from its own commands."""
    text = plain(pages / "jindisksetup.8")
    for words, command in manpages.leaves(manpages.setup_cli, ()):
        assert re.search(rf"^\s+{re.escape(' '.join(words))}\b", text, re.MULTILINE), words
        for parameter in command.params:
            for flag in getattr(parameter, "opts", []):
                assert not flag.startswith("-") or flag in text, (words, flag)
    assert "nothing to guess" in text


def test_the_pages_have_every_setting(pages):
    """With its default and range."""
    text = plain(pages / "jindiskd.toml.5")
    for section, kind in manpages.config.sections().items():
        assert f"[{section.upper()}]" in text
        for name in kind.__dataclass_fields__:
            assert re.search(rf"^\s+{name}(\s|$)", text, re.MULTILINE), name
    assert "--check-config" in plain(pages / "jindiskd.8")


def test_the_pages_are_the_same_each_time(pages, tmp_path):
    """A package built twice is the same."""
    subprocess.run([sys.executable, "-m", "jindiskd.cli.manpages", tmp_path], check=True)
    for page in pages.iterdir():
        assert page.read_bytes() == (tmp_path / page.name).read_bytes()


# The contract and its companions


def members():
    for name in INTERFACES:
        from lxml import etree

        root = etree.parse(ROOT / f"dbus/org.jindisk1.{name}.xml").getroot()
        for member in root.find("interface"):
            if isinstance(member.tag, str):
                yield name, member


def test_every_member_of_the_contract_is_documented():
    """A comment stands before each, says since when, and names every argument."""
    from lxml import etree

    count = 0
    for name, member in members():
        before = member.getprevious()
        assert isinstance(before, etree._Comment), (name, member.get("name"))
        assert "@since: " in before.text, (name, member.get("name"))
        for argument in member.findall("arg"):
            assert f"@{argument.get('name')}" in before.text, (name, member.get("name"), argument.get("name"))
        for note in member.findall("annotation"):
            if note.get("name") == contract.OPTIONS:
                for option in note.get("value").split():
                    assert f"{option.split(':')[0]}:" in before.text, (name, member.get("name"), option)
        count += 1
    assert count > 50


def test_every_action_of_the_contract_is_one_of_the_policy_and_the_other_way_round():
    """A method whose action polkit does not know could be called by root alone; one too many confuses."""
    actions = {note.get("value") for _, member in members() for note in member.findall("annotation")
               if note.get("name") in {contract.ACTION, contract.ACTION_UNLESS_OWNER}}  # fmt: skip
    policy = ET.parse(ROOT / "dbus/org.jindisk1.policy").getroot()
    assert actions == {action.get("id") for action in policy.findall("action")}
    for action in policy.findall("action"):
        assert action.find("annotate[@key='org.freedesktop.policykit.owner']").text == "unix-user:jindiskd"
        assert action.find("defaults/allow_any").text == "auth_admin"
        for detail in re.findall(r"\$\((\w+)\)", action.findtext("message")):
            assert detail in {"image", "operation", "device", "guest", "domain"}


def test_the_bus_policy_lets_the_interfaces_through_and_no_others():
    """By name; and it lets nobody but the service's user and root own the name."""
    root = ET.parse(ROOT / "dbus/org.jindisk1.conf").getroot()
    allowed = {rule.get("send_interface") for rule in root.iter("allow") if rule.get("send_interface")}
    standard = {f"org.freedesktop.DBus.{name}" for name in ("Introspectable", "ObjectManager", "Peer", "Properties")}
    assert allowed == standard | {f"org.jindisk1.{name}" for name in INTERFACES}
    for rule in [*root.iter("allow"), *root.iter("deny")]:
        assert rule.get("own") or rule.get("send_destination") == "org.jindisk1"
    owners = [policy.get("user") for policy in root.findall("policy") if policy.find("allow[@own]") is not None]
    assert owners == ["jindiskd", "root"]


def test_the_bus_policy_holds_on_a_real_bus(tmp_path):
    """Another user can call, but neither own the name nor send signals to whoever has it."""
    if os.getuid() != 0 or shutil.which("dbus-daemon") is None:
        pytest.skip("needs root to become other users, and dbus-daemon")
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        shutil.copy(ROOT / "dbus/org.jindisk1.conf", folder)
        (folder / "bus.conf").write_text(f"""<busconfig><type>system</type><listen>unix:path={folder}/bus</listen>
        <auth>EXTERNAL</auth><policy context="default"><allow user="*"/><deny own="*"/><deny send_type="method_call"/>
        <allow send_type="signal"/><allow send_requested_reply="true" send_type="method_return"/>
        <allow send_requested_reply="true" send_type="error"/><allow receive_type="method_call"/>
        <allow receive_type="method_return"/><allow receive_type="error"/><allow receive_type="signal"/>
        <allow send_destination="org.freedesktop.DBus"/></policy>
        <include>{folder}/org.jindisk1.conf</include></busconfig>""")
        bus = subprocess.Popen(
            ["dbus-daemon", f"--config-file={folder}/bus.conf", "--nofork", "--nopidfile", "--print-address=1"],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            address = bus.stdout.readline().decode().strip()
            own = f"""
import asyncio, sys
from jindiskd.bus.lib import BusType, Message, NameFlag
from jindiskd.bus.transport import connect_to
async def main():
    bus = await connect_to(BusType.SYSTEM, {address!r})
    reply = await bus.call(Message(destination="org.freedesktop.DBus", path="/org/freedesktop/DBus",
        interface="org.freedesktop.DBus", member="RequestName", signature="su", body=["org.jindisk1", 4]))
    print(reply.error_name or "owned", flush=True)
    got = []
    bus.add_message_handler(lambda m: got.append(m.member) if m.member in ("Evil", "Build") else None)
    if len(sys.argv) > 1:
        await asyncio.to_thread(sys.stdin.read)
        await asyncio.sleep(0.2)
        print(got)
    await bus.aclose()
asyncio.run(main())
"""
            nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
            out = subprocess.run([*nobody, sys.executable, "-c", own], capture_output=True, text=True, cwd="/")
            assert "AccessDenied" in out.stdout, out.stderr
            owner = subprocess.Popen(
                [sys.executable, "-c", own, "stay"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            assert owner.stdout.readline() == "owned\n"
            send = [
                "dbus-send",
                f"--bus={address}",
                "--dest=org.jindisk1",
                "--type=signal",
                "/x",
                "org.jindisk1.Job.Evil",
            ]
            subprocess.run([*nobody, *send], capture_output=True, check=False)
            send = [*send[:3], "--type=method_call", "/x", "org.jindisk1.Manager.Build"]
            subprocess.run([*nobody, *send], capture_output=True, check=True)
            assert "['Build']" in owner.communicate("")[0]
        finally:
            bus.terminate()
            bus.wait()
            bus.stdout.close()


# System files


@pytest.mark.parametrize(
    ("prefix", "unit", "bus"),
    [
        ("/usr", "usr/lib/systemd/system/jindiskd.service", "usr/share/dbus-1/system.d/org.jindisk1.conf"),
        ("/usr/local", "etc/systemd/system/jindiskd.service", "etc/dbus-1/system.d/org.jindisk1.conf"),
    ],
)
def test_system_files_are_put_in_place_and_taken_away(prefix, unit, bus, tmp_path, capsys):
    """For packages below /usr, for pip where administrators' files go; a second time nothing changes (status 4)."""
    words = ["--prefix", prefix, "--root", str(tmp_path), "--libexec", "/opt/x/bin"]
    assert main(["system-files", "install", "--dry-run", *words]) == 0
    assert list(tmp_path.iterdir()) == []
    assert main(["--json", "system-files", "install", *words]) == 0
    capsys.readouterr()
    assert main(["system-files", "install", *words]) == 4
    assert "ExecStart=/opt/x/bin/jindiskd" in (tmp_path / unit).read_text()
    assert (tmp_path / bus).stat().st_mode & 0o777 == 0o644
    assert (tmp_path / "usr/share/polkit-1/actions/org.jindisk1.policy").is_file()
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == len(system_files.FILES)
    assert main(["system-files", "remove", *words]) == 0
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    assert main(["system-files", "remove", *words]) == 4
    capsys.readouterr()


@pytest.fixture
def unit(tmp_path) -> Path:
    """The unit as installed, with a program that exists."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    places = system_files.Places(prefix=Path("/usr"), libexec=Path("/bin"))
    path = tmp_path / "jindiskd.service"
    file = next(item for item in system_files.FILES if item.name == "jindiskd.service")
    path.write_bytes(system_files.content(file, places).replace(b"/bin/jindiskd", b"/bin/true"))
    return path


def test_the_unit_is_right(unit):
    """By systemd's own judgement, without a word of complaint."""
    out = subprocess.run(["systemd-analyze", "verify", "--man=no", unit], capture_output=True, text=True)
    complaints = [line for line in out.stderr.splitlines() if "jindiskd.service" in line]
    assert (out.returncode, complaints) == (0, []), out.stderr


def test_the_unit_exposes_little(unit):
    """2.0 of 10 on systemd's scale at most; udisks2 and libvirtd have 9.6."""
    out = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--threshold=20", "--no-pager", unit],
        capture_output=True,
        text=True,
    )
    assert out.returncode == 0, out.stdout


# Offline judgement of evidence


def test_evidence_is_judged_without_a_service(vectors, capsys):
    """A genuine report of a real machine is genuine; with its own measurement accepted, with another refused (7)."""
    case = vectors / "attestation/snp/milan-v3-vcek"
    report = case / "report.bin"
    words = ["attest", "verify", str(report), "--certificates", str(case / "vek.der"), "--certificates",
             str(vectors / "attestation/amd-roots/milan"), "--at", "2026-07-15"]  # fmt: skip
    assert main(["--json", *words]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["verdict"], shown["simulated"]) == ("genuine", False)
    said = shown["fields"]
    named = ["--measurement", said["measurement"], "--host-data", said["host_data"]]
    assert main([*words, *named]) == 0
    assert "verdict: accepted" in capsys.readouterr().out
    assert main(["--json", *words, "--measurement", "00" * 48]) == 7
    shown = json.loads(capsys.readouterr().out)
    assert shown["verdict"] == "refused"
    assert shown["findings"]
    assert main([*words, "--measurement", "00" * 47]) == 2
    assert main([*words, "--rtmr", "1=any"]) == 2
    capsys.readouterr()


def test_rows_about_simulated_sessions_say_so() -> None:
    """Rows of a session that was attested before have no measurement; whether it was simulated is told all the same."""
    from jindiskd.cli.audit import _evidence

    rows = [{"measurement": "", "simulated": False}, {"measurement": "", "simulated": True}]
    rows += [{"measurement": "ab", "simulated": False}, {"measurement": "ab", "simulated": True}]
    assert [_evidence(row) for row in rows] == ["-", "simulated", "hardware", "simulated"]
