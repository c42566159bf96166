"""Completion in the shells themselves: nouns, verbs, options, and names that only the running service knows."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

PROGRAM = Path(sys.executable).with_name("jindiskctl")
DEADLINE_S = 240
CASES = (
    ("image show st", "stock"),
    ("key revoke st", "stock"),
    ("policy show st", "stock"),
    ("launch st", "stock"),
    ("audit list --image st", "stock"),
    ("audit list --verdict rel", "released"),
    ("moni", "monitor"),
)


@pytest.fixture
def shell(stock: Any, tmp_path: Path) -> Any:
    """Environment and completion script of a shell: what a user has after `jindiskctl completion SHELL`."""
    environment = {
        **stock.environment, "PATH": f"{PROGRAM.parent}:{os.environ['PATH']}", "HOME": str(tmp_path), "TERM": "dumb",
    }  # fmt: skip

    def script(name: str) -> tuple[Path, dict[str, str]]:
        path = tmp_path / f"completion.{name}"
        path.write_text(stock.ctl("completion", name))
        return path, environment

    return script


def run(environment: dict[str, str], *words: str) -> str:
    out = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    assert out.returncode == 0, out.stderr
    assert out.stderr == ""
    return out.stdout


def test_bash_completes_names(shell: Any) -> None:
    """By the function that its own completion calls."""
    script, environment = shell("bash")
    for line, expected in CASES:
        words = ["jindiskctl", *line.split()]
        code = f"""source {script}
        COMP_WORDS=({" ".join(words)}); COMP_CWORD={len(words) - 1}
        _jindiskctl_completion jindiskctl
        printf '%s\\n' "${{COMPREPLY[@]}}" """
        assert run(environment, "bash", "--norc", "-c", code).split() == [expected], line


def test_fish_completes_names(shell: Any) -> None:
    """By `complete -C`, which is what the tab key does."""
    script, environment = shell("fish")
    for line, expected in CASES:
        said = run(environment, "fish", "--no-config", "-c", f"source {script}; complete -C 'jindiskctl {line}'")
        assert [item.split("\t")[0] for item in said.splitlines()] == [expected], line


def test_zsh_completes_names(shell: Any) -> None:
    """By the tab key, on a terminal: the line is completed as it stands there."""
    script, environment = shell("zsh")
    master, slave = pty.openpty()
    seen = b""

    def until(pattern: bytes) -> None:
        nonlocal seen
        end = time.monotonic() + DEADLINE_S
        while not re.search(pattern, seen):
            assert time.monotonic() < end, (pattern, seen)
            if select.select([master], [], [], 1)[0]:
                seen += os.read(master, 65536)

    with subprocess.Popen(
        ["zsh", "-f", "-i"], env=environment, stdin=slave, stdout=slave, stderr=slave, start_new_session=True
    ) as process:
        os.close(slave)
        try:
            begin = f"PS1='> '; autoload -Uz compinit; compinit -u -D; source {script}; echo rea''dy\n"
            os.write(master, begin.encode())
            until(rb"ready\r?\n")
            for line, expected in CASES:
                seen = b""
                os.write(master, b"\x15jindiskctl " + line.encode() + b"\t")
                until(re.escape(line.rsplit(" ", 1)[-1].encode()) + rb".*" + expected[len(line.split()[-1]) :].encode())
                plain = re.sub(rb"\x1b\[[0-9;?]*[A-Za-z]|[^ -~]", b"", seen).decode()
                assert expected in plain or expected[len(line.split()[-1]) :] in plain, (line, plain)
        finally:
            process.kill()
    os.close(master)
