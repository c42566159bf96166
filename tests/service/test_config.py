"""Settings: every fault at once, with the place and the nearest right name; every value with its origin."""

import json
from pathlib import Path

import pytest

from jindiskd.base.platform import Platform
from jindiskd.config import BadConfiguration, Config, load


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_without_a_file_there_are_defaults(tmp_path):
    """And each says that it is one."""
    loaded = load(tmp_path / "none.toml")
    assert loaded.config == Config()
    assert {item.origin for item in loaded.settings} == {"default"}
    assert loaded.config.database_url == "sqlite:////var/lib/jindiskd/keys.db"


def test_drop_ins_override_in_the_order_of_their_names(tmp_path):
    """Single settings, not whole sections."""
    main = write(
        tmp_path / "j.toml",
        '[broker]\nmax_sessions = 5\nsession_lifetime_s = 7\n[images]\nplatform = "simulated-snp"\n',
    )
    later = write(tmp_path / "j.toml.d/20.toml", "[broker]\nmax_sessions = 9\n")
    write(tmp_path / "j.toml.d/10.toml", "[broker]\nmax_sessions = 8\n")
    write(tmp_path / "j.toml.d/ignored.txt", "nonsense")
    loaded = load(main)
    assert (loaded.config.broker.max_sessions, loaded.config.broker.session_lifetime_s) == (9, 7)
    assert loaded.config.images.platform is Platform.SIMULATED_SNP
    origins = {item.name: (item.value, item.origin) for item in loaded.settings}
    assert origins["broker.max_sessions"] == ("9", str(later))
    assert origins["images.platform"] == ('"simulated-snp"', str(main))


def test_all_faults_are_shown_at_once(tmp_path):
    """File, section, value, range and the nearest known name."""
    main = write(
        tmp_path / "j.toml",
        """
[servce]
[service]
state_dir = ""
job_keep_s = 100000
log_level = "inf"
[broker]
allow_simulatd = true
allow_simulated = "yes"
max_sessions = true
[images]
firmware_dirs = ["relative"]
""",
    )
    drop = write(tmp_path / "j.toml.d/x.toml", "[images\n")
    section = write(tmp_path / "j.toml.d/y.toml", "broker = 3\n")
    with pytest.raises(BadConfiguration) as caught:
        load(main)
    faults = "\n".join(caught.value.faults)
    assert len(caught.value.faults) == 10
    for words in (
        f"{main}: [servce] is not a section: did you mean service?",
        '[service] state_dir = "" is not a path',
        "[service] job_keep_s = 100000 is outside 1 to 3600",
        '[service] log_level = "inf" is not one of debug, info, warning, error: did you mean info?',
        "[broker] allow_simulatd is not a setting: did you mean allow_simulated?",
        '[broker] allow_simulated = "yes" is not of type boolean',
        "[broker] max_sessions = true is not of type integer",
        '[images] firmware_dirs = ["relative"] is not a list of absolute paths',
        f"{drop}: not TOML",
        f"{section}: broker is a section",
    ):
        assert words in faults, words


def test_what_may_hold_a_password_is_not_shown(tmp_path):
    """A database's URL often does."""
    main = write(tmp_path / "j.toml", '[broker]\ndatabase = "postgresql://u:hunter2@h/d"\n')
    loaded = load(main)
    assert loaded.config.database_url == "postgresql://u:hunter2@h/d"
    shown = {item.name: item.value for item in loaded.settings}
    assert json.loads(shown["broker.database"]) == "(set)"


def test_unreadable_and_oversized_files_are_faults(tmp_path):
    """Not silence."""
    main = write(tmp_path / "j.toml", "")
    write(tmp_path / "j.toml.d/a.toml", "#" * (1 << 20) + "\n")
    (tmp_path / "j.toml.d/b.toml").mkdir()
    (tmp_path / "j.toml.d/c.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(BadConfiguration) as caught:
        load(main)
    assert len(caught.value.faults) == 3
