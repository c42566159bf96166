"""`jindisksetup` on files: what it makes is read by the engine and by other people's tools, and it loses nothing."""

import json
import os
import signal
import subprocess

import click
import pytest
from jd import KEY, UUID1
from jd_setup import PROGRAM, SIZE, contents

from jindiskd.jindisk import anchor_file
from jindiskd.jindisk.geometry import BLOCK, default_geometry, required_bytes
from jindiskd.jindisksetup.main import cli, main

# Making


def test_format_a_new_file(setup, key, tmp_path) -> None:
    """As large as asked for, empty, closed; the anchor file accepts it."""
    made = setup(
        "format", tmp_path / "v", "--size", "32M", "--key-file", key, "--label", "disk", "--uuid", UUID1,
        "--anchor", tmp_path / "anchor",
    )["volume"]  # fmt: skip
    assert (made["uuid"], made["label"], made["size_bytes"], made["closed"]) == (str(UUID1), "disk", 32 << 20, True)
    assert made["device_bytes"] == (tmp_path / "v").stat().st_size == required_bytes(32 << 20)
    assert (tmp_path / "v").stat().st_mode & 0o777 == 0o600
    assert contents(tmp_path / "v") == bytes(32 << 20)
    known = anchor_file.read(tmp_path / "anchor")
    assert (tmp_path / "anchor").stat().st_size == 120
    assert (known.uuid, known.anchor.pack().hex()) == (UUID1, made["anchor"])
    shown = setup("dump", tmp_path / "v", "--key-file", key, "--anchor", tmp_path / "anchor")["volume"]
    assert (shown["root"], shown["sequence"], shown["anchored"]) == (made["root"], made["sequence"], True)
    assert setup("dump", tmp_path / "v", "--header-only")["volume"]["authentic"] is False


def test_format_an_existing_file_as_large_as_it_permits(setup, key, tmp_path) -> None:
    """Behind an offset too."""
    with (tmp_path / "v").open("wb") as file:
        file.truncate(64 << 20)
    made = setup("format", tmp_path / "v", "--key-file", key, "--offset", "1M")["volume"]
    assert made["device_bytes"] <= 63 << 20
    assert required_bytes(made["size_bytes"] + BLOCK) > 63 << 20
    assert (tmp_path / "v").stat().st_size == 64 << 20
    setup("check", tmp_path / "v", "--key-file", key, "--offset", "1M", "--unanchored")


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (["--size", "8M"], 2),
        (["--size", "33000000"], 2),
        ([], 2),
        (["--size", "32M", "--label", "x" * 65], 2),
        (["--size", "32M", "--uuid", "x"], 2),
        (["--size", "32M", "--offset", "1000"], 2),
        (["--size", "32M", "--reserve", "300"], 2),
        (["--size", "32M", "--format-version", "3"], 2),
    ],
)
def test_what_cannot_be_made_leaves_nothing(setup, key, tmp_path, words, status) -> None:
    """No file, no key, no anchor."""
    given = ["--generate-key", tmp_path / "new", "--anchor", tmp_path / "anchor"]
    setup("format", tmp_path / "v", *words, *given, status=status)
    assert [path.name for path in tmp_path.iterdir()] == ["key"]


def test_a_generated_key(setup, tmp_path) -> None:
    """Is private, opens the volume, and is never overwritten."""
    setup("format", tmp_path / "v", "--size", "16M", "--generate-key", tmp_path / "k")
    assert (tmp_path / "k").stat().st_mode & 0o777 == 0o600
    first = (tmp_path / "k").read_bytes()
    assert len(first) == 32
    setup("check", tmp_path / "v", "--key-file", tmp_path / "k", "--unanchored")
    setup("format", tmp_path / "w", "--size", "16M", "--generate-key", tmp_path / "k", status=6)
    assert (tmp_path / "k").read_bytes() == first
    assert not (tmp_path / "w").exists()


def test_known_signatures_are_not_overwritten(setup, key, tmp_path) -> None:
    """File systems, partition tables, LUKS and JinDisk need --force; other data needs --yes; holes need neither."""
    target, pbkdf = tmp_path / "t", "--pbkdf pbkdf2 --pbkdf-force-iterations 1000"
    makers = {
        "ext4": ["mkfs.ext4", "-q", "-F", target],
        "dos": ["sh", "-c", f"echo 'label: gpt' | sfdisk -q {target}"],
        "crypto_LUKS": ["sh", "-c", f"echo pw | cryptsetup luksFormat -q {pbkdf} {target} -"],
        "swap": ["mkswap", "-q", target],
    }  # fmt: skip
    for maker in makers.values():
        with target.open("wb") as file:
            file.truncate(64 << 20)
        subprocess.run([str(word) for word in maker], check=True, capture_output=True)
        before = target.read_bytes()
        setup("format", target, "--key-file", key, "--yes", status=6)
        assert "--force" in setup.said
        assert target.read_bytes() == before
    setup("format", target, "--key-file", key, "--force")
    setup("format", target, "--key-file", key, "--yes", status=6)
    assert "JinDisk 2" in setup.said
    target.write_bytes(b"notes" * (6 << 20))
    setup("format", target, "--key-file", key, status=2)
    assert "--yes" in setup.said
    setup("format", target, "--key-file", key, "--yes")
    with (tmp_path / "holes").open("wb") as file:
        file.truncate(32 << 20)
    setup("format", tmp_path / "holes", "--key-file", key)
    setup("format", "/dev/null", "--key-file", key, "--size", "16M", status=2)


def test_load_and_export(setup, key, plain, tmp_path) -> None:
    """The bytes come back, with holes; the state that load reports is the one that is measured."""
    made = setup("load", plain, tmp_path / "v", "--key-file", key, "--anchor", tmp_path / "a")["volume"]
    assert made["size_bytes"] == SIZE
    state = setup("measure", tmp_path / "v", "--key-file", key, "--anchor", tmp_path / "a")["state"]
    assert (state["root"], state["sequence"], state["anchor"]) == (made["root"], made["sequence"], made["anchor"])
    setup("check", "--data", tmp_path / "v", "--key-file", key, "--anchor", tmp_path / "a")
    out = setup("export", tmp_path / "v", tmp_path / "back", "--key-file", key, "--anchor", tmp_path / "a")["export"]
    assert (tmp_path / "back").read_bytes() == plain.read_bytes().ljust(SIZE, b"\0")
    assert out["data_bytes"] < 2 << 20
    assert (tmp_path / "back").stat().st_blocks * 512 < 2 << 20
    # Over something that was there: where the volume has holes there are zeros now.
    (tmp_path / "old").write_bytes(b"x" * (20 << 20))
    words = ["export", tmp_path / "v", tmp_path / "old", "--key-file", key, "--unanchored"]
    setup(*words, status=2)
    setup(*words, "--yes")
    assert (tmp_path / "old").read_bytes()[:SIZE] == (tmp_path / "back").read_bytes()


def test_load_refuses_itself_and_what_does_not_fit(setup, key, plain, tmp_path) -> None:
    """And the source is as it was."""
    before = plain.read_bytes()
    setup("load", plain, plain, "--key-file", key, "--force", status=2)
    os.link(plain, tmp_path / "same")
    setup("load", plain, tmp_path / "same", "--key-file", key, "--yes", "--force", status=2)
    setup("load", plain, tmp_path / "v", "--key-file", key, "--size", "4M", status=2)
    setup("load", tmp_path / "none", tmp_path / "v", "--key-file", key, status=2)
    assert plain.read_bytes() == before
    assert not (tmp_path / "v").exists()


def test_a_failed_export_leaves_no_image(setup, key, plain, tmp_path) -> None:
    """A damaged block: integrity, its name in the message, and no half an image that could be taken for a whole."""
    setup("load", plain, tmp_path / "v", "--key-file", key)
    geometry = default_geometry(SIZE // BLOCK)
    with (tmp_path / "v").open("r+b") as file:
        for raw in range(geometry.data_start, geometry.end):
            file.seek(raw * BLOCK)
            if any(file.read(BLOCK)):
                file.seek(raw * BLOCK + 5)
                file.write(b"\xff\xff")
                break
    setup("export", tmp_path / "v", tmp_path / "out", "--key-file", key, "--unanchored", status=8)
    assert f"raw block {raw}" in setup.said
    assert not (tmp_path / "out").exists()
    found = setup("check", tmp_path / "v", "--key-file", key, "--unanchored")["check"]
    assert found["faults"] == [], "the quick check reads no data"
    found = setup("check", "--data", tmp_path / "v", "--key-file", key, "--unanchored", status=8)["check"]
    assert len(found["faults"]) == 1
    assert "1 fault " in setup.said


def test_through_pipes(setup, key, plain, tmp_path) -> None:
    """Export into load, under another key: the content never lies anywhere in clear."""
    setup("load", plain, tmp_path / "v", "--key-file", key)
    exporting = [PROGRAM, "export", tmp_path / "v", "-", "--key-file", key, "--unanchored"]
    words = [
        "load",
        "-",
        tmp_path / "w",
        "--size",
        "16M",
        "--generate-key",
        tmp_path / "k2",
        "--anchor",
        tmp_path / "a",
    ]
    with subprocess.Popen(exporting, stdout=subprocess.PIPE) as out:
        done = subprocess.run([PROGRAM, *words], stdin=out.stdout, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert out.wait(60) == 0
    assert contents(tmp_path / "w", (tmp_path / "k2").read_bytes()) == contents(tmp_path / "v")
    access = ["--key-file", tmp_path / "k2", "--anchor", tmp_path / "a"]
    setup("check", "--data", tmp_path / "w", *access)
    assert (tmp_path / "w").stat().st_blocks * 512 < 4 << 20, "zeros were stored"


@pytest.mark.parametrize(
    ("words", "data"),
    [(["--size", "16M"], bytes((16 << 20) + 1)), ([], b""), (["--size", "16M", "--key-file", "-"], KEY)],
)
def test_streams_that_do_not_fit(key, tmp_path, words, data) -> None:
    """Too long, of unknown length, or wanted for the key: refused, and no volume is left."""
    given = words if "--key-file" in words else [*words, "--key-file", key]
    done = subprocess.run([PROGRAM, "load", "-", tmp_path / "v", *given], input=data, capture_output=True, timeout=120)
    assert done.returncode == 2, done.stderr
    assert not (tmp_path / "v").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupted(key, tmp_path, number) -> None:
    """130, and nothing half done: no volume, no key, no anchor."""
    given = ["--size", "64M", "--generate-key", tmp_path / "k", "--anchor", tmp_path / "a"]
    process = subprocess.Popen([PROGRAM, "load", "-", tmp_path / "v", *given], stdin=subprocess.PIPE)
    assert process.stdin is not None
    process.stdin.write(os.urandom(8 << 20))
    process.stdin.flush()
    process.send_signal(number)
    assert process.wait(60) == 130
    process.stdin.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["key"]


# The command line


def test_every_command_and_option_explains_itself() -> None:
    """No command without help, no option without help, --json everywhere, no option that takes a key itself."""
    for name, command in cli.commands.items():
        assert command.help, name
        options = {p.name: p for p in command.params if isinstance(p, click.Option)}
        assert {"json", "log_json"} <= options.keys(), name
        for option in options.values():
            assert option.help, (name, option.name)
            assert option.name not in {"key", "password"}


def test_progress_and_the_end_as_json_lines(key, plain, tmp_path) -> None:
    """--log-json: progress with bytes, then one line that says that it is the last."""
    done = subprocess.run(
        [PROGRAM, "--log-json", "load", plain, tmp_path / "v", "--key-file", key], capture_output=True, text=True
    )
    events = [json.loads(line) for line in done.stderr.splitlines()]
    assert {event["type"] for event in events} >= {"progress"}
    assert [event.get("finished", False) for event in events] == [False] * (len(events) - 1) + [True]
    last = [event for event in events if event["type"] == "progress"][-1]
    assert last["bytes"] == last["total"] == SIZE


def test_people_get_sentences(key, plain, tmp_path, capsys) -> None:
    """Without --json."""
    assert main(["load", str(plain), str(tmp_path / "v"), "--key-file", str(key)]) == 0
    assert "16 MiB" in capsys.readouterr().out
    assert main(["dump", str(tmp_path / "v"), "--key-file", str(key), "--unanchored"]) == 0
    assert "closed: yes" in capsys.readouterr().out
    assert main(["check", str(tmp_path / "v"), "--key-file", str(key), "--unanchored"]) == 0
    assert "faults: none" in capsys.readouterr().out
    (tmp_path / "empty").write_bytes(bytes(1 << 20))
    assert main(["dump", str(tmp_path / "empty"), "--header-only"]) == 1
    assert "no JinDisk 2 volume" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["jindisksetup", "mea"], {"measure"}),
        (["jindisksetup", "serve", "--read"], {"--read-only", "--ready-file"}),
        (["jindisksetup", "serve", "x", "--report", "c"], {"close", "commit"}),
    ],
)
def test_bash_completes(words, expected, tmp_path, capsys) -> None:
    """The real shell with the real program."""
    assert main(["completion", "bash"]) == 0
    path = tmp_path / "script"
    path.write_text(capsys.readouterr().out)
    code = f"""source {path}
    COMP_WORDS=({" ".join(words)}); COMP_CWORD={len(words) - 1}
    _jindisksetup_completion {PROGRAM}
    printf '%s\\n' "${{COMPREPLY[@]}}" """
    out = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True)
    assert set(out.stdout.split()) == expected
