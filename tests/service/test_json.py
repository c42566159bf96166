"""What commands print with --json is what their schemas say, none forgotten."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonout
import jsonschema
import pytest

from jindiskd.cli import manpages, schemas
from jindiskd.cli.main import cli, main


def test_every_command_has_a_schema() -> None:
    """But those that print something else, and say so."""
    for words, _ in manpages.leaves(cli, ()):
        name = " ".join(words)
        known = name in schemas.SHAPES or name in schemas.NO_OBJECT or words[0] in schemas.NO_OBJECT
        assert known, f"{name} has no schema"
    leaves = {" ".join(words) for words, _ in manpages.leaves(cli, ())}
    assert set(schemas.SHAPES) <= leaves, "a schema of no command"
    for name in schemas.SHAPES:
        jsonschema.Draft202012Validator.check_schema(schemas.schema(name))
        assert f"\n## {name}" in schemas.document()


@pytest.mark.parametrize("bad", [{}, {"images": [{}]}, {"images": [], "more": 1}, {"images": {"Name": "x"}}])
def test_a_schema_refuses_what_is_otherwise(bad: Any) -> None:
    """Missing, additional and mistyped things are found."""
    with pytest.raises(jsonschema.ValidationError):
        jsonout.check(["image", "list"], bad)


def test_real_output_fits(daemon: Any, rootfs: Path, tmp_path: Path) -> None:
    """Of every command that can be run here, by the real command line on the real service; others have to be elsewhere.

    A command that nobody runs with --json in any test is a fault of whoever added it.
    """
    daemon.environment["EDITOR"] = "true"  # changes nothing
    (tmp_path / "policy.toml").write_text("[release]\nreleases_per_hour = 78\n")
    card = tmp_path / "card.json"
    card.write_text(daemon.ctl("key", "card"))
    folder = tmp_path / "collateral"
    folder.mkdir()
    commands = [
        ["status"], ["doctor", "--platform", "simulated-snp"], ["daemon", "config"],
        ["image", "build", "printed", "--rootfs", str(rootfs)], ["image", "list"], ["image", "show", "printed"],
        ["image", "measure", "printed"], ["image", "export", "printed", str(tmp_path / "stream")],
        ["image", "volume", "add", "printed", "more:16M"], ["image", "volume", "list", "printed"],
        ["image", "volume", "remove", "printed", "more", "--yes"],
        ["image", "clone", "printed", "again"], ["image", "remove", "again", "--yes"], ["domain", "list"],
        ["domain", "xml", "--image", "printed"], ["approval", "list"],
        ["device", "list"], ["job", "list"], ["job", "show", "1"], ["job", "cancel", "1"],
        ["key", "list"], ["key", "show", "printed"], ["key", "card"], ["key", "revoke", "printed"],
        ["key", "reinstate", "printed"], ["key", "accept-rollback", "printed", "--yes"],
        ["key", "export", "printed", "--to", str(card), "--output", str(tmp_path / "handover")],
        ["key", "rotate", "printed", str(tmp_path / "handover"), "--yes"],
        ["audit", "list", "--limit", "20"], ["audit", "verify"],
        ["policy", "show", "printed"], ["policy", "check", str(tmp_path / "policy.toml")],
        ["policy", "set", "printed", str(tmp_path / "policy.toml")], ["policy", "edit", "printed"],
        ["collateral", "status", "--dir", str(folder)],
        ["collateral", "export", "--dir", str(folder), str(tmp_path / "bundle")],
        ["collateral", "import", "--dir", str(folder), str(tmp_path / "bundle")],
        ["system-files", "install", "--root", str(tmp_path / "root")],
        ["system-files", "remove", "--root", str(tmp_path / "root")],
        ["broker", "make-card", "--certificate", str(daemon.state / "broker.pem"), "--transfer-key",
         str(_recovery_key(tmp_path))],
        ["image", "remove", "printed", "--yes"], ["image", "import", str(tmp_path / "stream")],
        ["key", "recovery", "set-key", str(_recovery_key(tmp_path))],
        ["key", "recovery", "copy", "--output", str(tmp_path / "copy")],
    ]  # fmt: skip
    seen = set()
    for words in commands:
        if words[:2] in (["job", "show"], ["job", "cancel"]):
            daemon.ctl("audit", "verify")  # whose job is listed for a minute
            words = [*words[:2], str(daemon.json("job", "list")["jobs"][-1]["Id"])]
        seen.add(jsonout.command_of(words))
        with daemon.spawn("--json", *words) as process:
            out, err = process.communicate(timeout=300)
        assert out, (words, err)
        jsonout.check(words, json.loads(out))
    elsewhere = jsonout.called_with_json(Path(__file__).resolve().parent.parent)
    assert set(schemas.SHAPES) - seen <= elsewhere, "commands that no test runs with --json"


def test_a_verdict_on_recorded_evidence_fits(vectors: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It needs no service."""
    case = vectors / "attestation/snp/milan-v3-vcek"
    main(["--json", "attest", "verify", str(case / "report.bin"), "--certificates", str(case / "vek.der"),
          str(vectors / "attestation/amd-roots/milan"), "--at", "2026-07-15T00:00:00Z"])  # fmt: skip
    jsonout.check(["attest", "verify"], json.loads(capsys.readouterr().out))


def _recovery_key(folder: Path) -> Path:
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    path = folder / "recovery.pem"
    public = ec.generate_private_key(ec.SECP256R1()).public_key()
    path.write_bytes(public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return path


def test_a_job_that_is_left_to_itself_fits(stock: Any, rootfs: Path) -> None:
    """--no-wait prints the job instead of what will come of it."""
    left = stock.json("image", "build", "left", "--rootfs", str(rootfs), "--no-wait")["job"]
    stock.ctl("job", "show", str(left["Id"]), "--wait")
    stock.ctl("image", "remove", "left", "--yes")


def test_the_monitor_prints_lines_that_fit(stock: Any) -> None:
    """Each is an object of its own."""
    with stock.spawn("--json", "monitor") as process:
        try:
            stock.ctl("key", "reinstate", "stock")
            for _ in range(2):
                jsonout.check(["monitor"], json.loads(process.stdout.readline()))
        finally:
            process.kill()


def test_a_wrong_command_line_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """Errors are no objects on standard output."""
    assert main(["--json", "image", "show"]) == 2
    assert capsys.readouterr().out == ""
