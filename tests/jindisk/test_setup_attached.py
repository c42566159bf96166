"""Records of attached volumes; the kernel's part is tried in a guest."""

import os
import signal
import subprocess
import sys

import pytest

from jindiskd.base.document import MalformedDocument
from jindiskd.errors import AlreadyExists, Busy, InvalidArgument, NotFound
from jindiskd.jindisksetup import attached
from jindiskd.jindisksetup.attached import Record, Registry


def test_names_are_taken_once(tmp_path) -> None:
    """By a process that lives; what a dead one left is taken over, and so is a number that is another's now."""
    registry = Registry(tmp_path / "run")
    registry.take("vol")
    assert (tmp_path / "run").stat().st_mode & 0o777 == 0o700
    assert registry.find("vol") == attached.own_record("vol")
    with pytest.raises(AlreadyExists):
        registry.take("vol")
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    began = attached.started(child.pid)
    assert began is not None
    registry.put(Record(name="vol", process=child.pid, started=began, index=-1, fault=""))
    with pytest.raises(AlreadyExists):
        registry.take("vol")
    registry.put(Record(name="vol", process=child.pid, started=began - 1, index=-1, fault=""))
    registry.take("vol")  # the process of that number is another
    registry.put(Record(name="vol", process=child.pid, started=began, index=-1, fault=""))
    child.send_signal(signal.SIGKILL)
    child.wait(60)
    assert attached.started(child.pid) is None
    registry.take("vol")
    assert [record.process for record in registry.all()] == [os.getpid()]
    registry.remove("vol")
    assert registry.all() == []
    with pytest.raises(NotFound):
        attached.close("vol", registry)


def test_what_is_being_opened_is_busy(tmp_path) -> None:
    """There is no device yet that could be let go of; and a record that goes meanwhile is none."""
    registry = Registry(tmp_path)
    registry.take("vol")
    with pytest.raises(Busy, match="vol"):
        attached.close("vol", registry)
    assert registry.find("vol") == attached.own_record("vol")
    (tmp_path / "gone.json").symlink_to("nothing")
    assert [record.name for record in registry.all()] == ["vol"]


def test_a_server_that_was_killed(tmp_path) -> None:
    """Closing says so once, and the name is free."""
    registry = Registry(tmp_path)
    registry.put(Record(name="vol", process=2**22 + 1, started=5, index=-1, fault=""))
    assert attached.close("vol", registry) is False
    registry.put(Record(name="vol", process=2**22 + 1, started=5, index=-1, fault="the store is full"))
    with pytest.raises(attached.VolumeNotClosed, match="the store is full"):
        attached.close("vol", registry)
    with pytest.raises(NotFound):
        registry.find("vol")


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../x", "-x", "x" * 65, "a b", "a\n", ".x"])
def test_bad_names(name, tmp_path) -> None:
    """Nothing that could be a path or an option."""
    with pytest.raises(InvalidArgument):
        Registry(tmp_path).find(name)


def test_damaged_records(tmp_path) -> None:
    """Are named, and never followed."""
    for data in (b"", b"{}", b"[]", b'{"name": "vol", "process": "1"}', b"\xff"):
        (tmp_path / "vol.json").write_bytes(data)
        with pytest.raises(MalformedDocument, match="record of vol"):
            Registry(tmp_path).find("vol")
