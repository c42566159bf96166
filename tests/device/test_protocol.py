"""What the helper takes for a request, and the marks by which it knows its own: strict, whatever comes."""

from __future__ import annotations

import json
from dataclasses import replace
from uuid import uuid4

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jindiskd.base import document
from jindiskd.helper import mapped, protocol
from jindiskd.helper.mapped import Mapped
from jindiskd.helper.protocol import Below, Close, Kind, List, MalformedRequest, Open

UUID = str(uuid4())
BELOW = Below(major=8, minor=2, sequence=17)
JD2 = Open(
    kind=Kind.JINDISK2, below=BELOW, owner=1000, read_only=False, uuid=UUID, anchor=b"\1" + bytes(72),
    session=bytes(32), lease_s=60,
)  # fmt: skip
LUKS = Open(kind=Kind.LUKS2, below=BELOW, owner=0, read_only=True, uuid=UUID, header_sha256=bytes(32))
JD1 = Open(kind=Kind.JINDISK1, below=BELOW, owner=0, read_only=False)
GOOD = [JD2, LUKS, JD1, Close(node="nbd0", mark="jindisk:x"), Close(node="dm-12", mark="CRYPT"), List()]


@pytest.mark.parametrize("request_", GOOD, ids=lambda r: type(r).__name__)
def test_requests_survive_their_way(request_):
    assert protocol.parse(protocol.dump(request_)) == request_
    assert len(protocol.dump(request_)) < protocol.MESSAGE_BYTES


BAD = [
    replace(JD2, uuid=""),
    replace(JD2, uuid=UUID.upper()),
    replace(JD2, uuid="../../dev/sda"),
    replace(JD2, anchor=bytes(72)),
    replace(JD2, anchor=b"\2" + bytes(72)),
    replace(JD2, session=bytes(31)),
    replace(JD2, lease_s=-1),
    replace(JD2, owner=1 << 32),
    replace(JD2, owner=-1),
    replace(JD2, header_sha256=bytes(32)),
    replace(JD2, below=replace(BELOW, major=0)),
    replace(JD2, below=replace(BELOW, minor=-1)),
    replace(JD2, below=replace(BELOW, sequence=1 << 64)),
    replace(LUKS, session=bytes(32)),
    replace(LUKS, header_sha256=bytes(20)),
    replace(JD1, uuid=UUID),
    Close(node="sda", mark="x"),
    Close(node="nbd0/../sda", mark="x"),
    Close(node="nbd00", mark="x"),
    Close(node="nbd0", mark=""),
    Close(node="nbd0", mark="x" * 200),
    Close(node="nbd0", mark="a\nb"),
    Close(node="nbd0", mark="é"),
]


@pytest.mark.parametrize("request_", BAD, ids=str)
def test_what_does_not_go_together_is_no_request(request_):
    with pytest.raises(MalformedRequest):
        protocol.parse(protocol.dump(request_))


@pytest.mark.parametrize(
    "packet",
    [
        b"", b" ", b"open", b"open ", b"open {}", b"OPEN " + protocol.dump(JD2)[5:], b"run {}", b"list []",
        b"list {\"a\":1}",
        b"close {\"node\":\"nbd0\"}", b"open " + b"[" * 4000, b"list " + b" " * 9000 + b"{}", b"list {}\xff",
        protocol.dump(JD2).replace(b"\"minor\": 2", b"\"minor\": 2.0"),
        protocol.dump(JD2).replace(b"\"minor\": 2", b"\"minor\": true"),
        protocol.dump(JD2).replace(b"\"minor\": 2", b"\"minor\": 2, \"minor\": 3"),
        protocol.dump(JD2)[:-2] + b",\"path\":\"/dev/sda\"}",
    ],
    ids=range(17),
)  # fmt: skip
def test_other_packets_are_none(packet):
    with pytest.raises(MalformedRequest):
        protocol.parse(packet)


@settings(max_examples=400, deadline=None)
@given(
    data=st.binary(max_size=300)
    | st.builds(lambda v, d: v + b" " + d, st.sampled_from(list(protocol.VERBS)), st.binary(max_size=300))
)
def test_any_bytes_are_a_request_or_refused(data):
    try:
        protocol.parse(data).check()
    except MalformedRequest:
        return


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_a_changed_request_is_refused_or_stays_within_its_bounds(data):
    values = json.loads(protocol.dump(JD2).partition(b" ")[2])
    name = data.draw(st.sampled_from(sorted(values)))
    values[name] = data.draw(st.none() | st.integers() | st.text(max_size=80) | st.lists(st.integers(), max_size=3))
    try:
        request = protocol.parse(b"open " + json.dumps(values).encode())
    except MalformedRequest:
        return
    assert isinstance(request, Open)
    request.check()
    assert mapped.read_mark("nbd0", mapped.nbd_mark(request)) is not None or request.kind is Kind.LUKS2


@pytest.mark.parametrize("request_", [JD2, LUKS, JD1, replace(JD2, read_only=True)])
def test_marks_tell_again_what_was_opened(request_):
    """They are all that a restarted service has."""
    uses_nbd = request_.kind is not Kind.LUKS2
    node, mark = ("nbd3", mapped.nbd_mark(request_)) if uses_nbd else ("dm-3", mapped.dm_mark(request_))
    found = mapped.read_mark(node, mark, read_only=request_.read_only)
    assert found == Mapped(
        node=node, mark=mark, kind=request_.kind, uuid=request_.uuid, below=BELOW, read_only=request_.read_only,
        owner=request_.owner,
    )  # fmt: skip
    assert len(mark) <= protocol.MARK_CHARACTERS
    Close(node=node, mark=mark).check()


def test_marks_of_others_are_not_ours():
    for node, mark in (
        ("nbd0", "qemu"), ("nbd0", ""), ("dm-0", f"CRYPT-LUKS2-{UUID.replace('-', '')}-root"), ("dm-0", "LVM-abc"),
        ("nbd0", f"jindisk:luks2:{UUID}:8:2:1:rw:0"), ("nbd0", f"jindisk:jindisk2:{UUID}:0:2:1:rw:0"),
        ("nbd0", f"jindisk:jindisk2:{UUID}:8:2:99999999999999999999:rw:0"),
        ("dm-0", f"CRYPT-LUKS2-{UUID.replace('-', '')}-jindisk.8.2.1"),
    ):  # fmt: skip
        assert mapped.read_mark(node, mark) is None, mark


def test_what_is_mapped_is_read_from_the_kernel(tmp_path):
    """A device with no server attached, one of another program, and one that goes while we look, are left out."""
    block = tmp_path / "block"
    for name, files in {
        "nbd0": {"pid": "77\n", "backend": mapped.nbd_mark(JD2) + "\n"},
        "nbd1": {"backend": mapped.nbd_mark(JD2)},
        "nbd2": {"pid": "5", "backend": "other"},
        "dm-0": {"dm/uuid": mapped.dm_mark(LUKS) + "\n", "ro": "1\n"},
        "dm-1": {"dm/uuid": "LVM-x"},
        "sda": {"pid": "1"},
    }.items():
        for file, text in files.items():
            (block / name / file).parent.mkdir(parents=True, exist_ok=True)
            (block / name / file).write_text(text)
    found = mapped.mapped(tmp_path)
    assert [(item.node, item.process, item.read_only) for item in found] == [("dm-0", 0, True), ("nbd0", 77, False)]


def test_answers_are_documents():
    answer = protocol.failed(MalformedRequest("x"))
    assert document.load(protocol.Answer, document.dump(answer), document="answer") == answer
    assert protocol.HelperFailed(answer).code == "MalformedRequest"
