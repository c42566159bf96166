"""The keys of a session: replaced, given to a copy, made from poor randomness, kept from a forked process."""

import multiprocessing
import os
from uuid import UUID

import pytest
from jd import KEY, UUID1, ZERO, Audit, content, world

from jindiskd.base.secret import Secret
from jindiskd.errors import InvalidArgument
from jindiskd.jindisk.errors import (
    VolumeError,
    VolumeFenced,
    VolumeUnauthentic,
)
from jindiskd.jindisk.geometry import BLOCK
from jindiskd.jindisk.session import Session
from jindiskd.jindisk.volume import open_volume

UUID2 = UUID(int=2)
KEY2 = bytes(range(100, 132))


def test_rekeying_replaces_both_superblocks(audit: Audit) -> None:
    """The old key opens nothing any more, the data stay; stopped between the two, the new key opens."""
    here = world(audit=audit)
    session = here.create()
    session.write(0, content(1))
    session.rekey(Secret(KEY2))
    session.write(BLOCK, content(2))
    session.close()
    with pytest.raises(VolumeUnauthentic, match="superblock slot"):
        here.open()
    here.key = Secret(KEY2)
    assert here.open().read(0, 2 * BLOCK) == content(1) + content(2)
    session = here.begin()
    session.volume.key = Secret(KEY)
    session.checkpoint()
    stopped = here.fork()
    assert stopped.begin().read(0, BLOCK) == content(1)  # the older superblock, under the older key
    stopped = here.fork()
    stopped.key = Secret(KEY)
    assert stopped.begin().read(0, 2 * BLOCK) == content(1) + content(2)
    with pytest.raises(InvalidArgument):
        session.rekey(Secret(b"short"))


def test_a_copy_becomes_a_volume_of_its_own(audit: Audit) -> None:
    """Its own UUID, key and label; the original is untouched, and neither opens as the other."""
    here = world(audit=audit)
    session = here.create()
    session.write(0, content(1))
    session.close()
    copied = here.fork()
    session = copied.begin()
    session.rekey(Secret(KEY2), uuid=UUID2, label="the copy")
    session.close()
    with pytest.raises(VolumeError):
        copied.open()
    copied.key, copied.uuid = Secret(KEY2), UUID2
    session = copied.begin()
    assert session.volume.identification.label == "the copy"
    session.write(BLOCK, content(2))
    session.close()
    assert copied.open().read(0, 2 * BLOCK) == content(1) + content(2)
    assert here.open().read(0, 2 * BLOCK) == content(1) + ZERO


@pytest.mark.parametrize("poor", ["the system's", "the broker's"])
def test_one_good_source_of_randomness_is_enough(poor: str, audit: Audit) -> None:
    """The host starts ten guests on one disk and replays the random source, or the session id: no key comes twice."""
    here = world()
    session = here.create()
    session.write(0, content(1))
    session.close()
    for number in range(10):
        copied = here.fork()
        anchor = copied.broker.anchor
        assert anchor is not None
        audit.new_process()
        volume = open_volume(copied.device, key=here.key, uuid=UUID1, anchor=anchor)
        again = Session(
            volume,
            session_id=bytes([number]) * 32 if poor == "the system's" else bytes(32),
            entropy=bytes if poor == "the system's" else os.urandom,
            ordered_placement=True,
        )
        again.begin()
        again.write(0, content(100 + number))
        again.flush()
        again.close()
    # `audit` has looked at every sealing; the same places and numbers were sealed in all ten.
    assert audit.count > 40


def _child_seals(session: Session, answer: "multiprocessing.Queue[str]") -> None:
    try:
        session.write(BLOCK, content(2))
        session.flush()
        answer.put("written")
    except VolumeFenced as exc:
        answer.put(str(exc))


def test_a_forked_process_has_no_sealing_keys() -> None:
    """The child of a fork can neither draw nor seal; the parent goes on."""
    here = world()
    session = here.create()
    session.write(0, content(1))
    session.flush()
    context = multiprocessing.get_context("fork")
    answer: multiprocessing.Queue[str] = context.Queue()
    child = context.Process(target=_child_seals, args=(session, answer))
    child.start()
    assert "process" in answer.get(timeout=60)
    child.join(60)
    session.write(BLOCK, content(3))
    session.close()
    assert here.open().read(0, 2 * BLOCK) == content(1) + content(3)
