"""The short way of reading a certificate's extension says what the long way says, or nothing."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from jindiskd.attest import der
from jindiskd.attest.model import MalformedEvidence
from jindiskd.attest.snp_certs import EXTENSION_FORMS

OIDS = (b"\x55\x1d\x13", b"\x2b\x06\x01\x04\x01\x9c\x78\x01\x03\x08", b"", b"\x80\x01", b"\x55\x9d", b"\x55" * 65)
FLAGS = (b"", b"\x01\x01\xff", b"\x01\x01\x00", b"\x01\x01\x01", b"\x01\x02\xff\xff", b"\x05\x00")


def the_long_way(data: bytes, at: int) -> tuple[str, bool, bytes, int]:
    entry, end = der.read(data, at)
    if entry.tag != der.SEQUENCE:
        raise MalformedEvidence("extension", "no SEQUENCE")
    parts = der.sequence(entry, "extension", *EXTENSION_FORMS)
    return der.oid(parts[0]), len(parts) == 3 and der.boolean(parts[1]), parts[-1].content, end


@settings(max_examples=600, deadline=None)
@given(data=st.data())
def test_both_ways_agree(data: st.DataObject) -> None:
    """Whole, cut, altered and with something behind: what is read the short way is what stands there."""
    name, flag = data.draw(st.sampled_from(OIDS)), data.draw(st.sampled_from(FLAGS))
    value = data.draw(st.binary(max_size=140))
    tag = data.draw(st.sampled_from([der.OCTET_STRING, der.OCTET_STRING, der.BIT_STRING]))
    blob = bytearray(der.encode(der.SEQUENCE, der.encode(der.OID, name) + flag + der.encode(tag, value)))
    blob += data.draw(st.binary(max_size=4))
    for _ in range(data.draw(st.integers(0, 2))):
        blob[data.draw(st.integers(0, len(blob) - 1))] = data.draw(st.integers(0, 255))
    del blob[data.draw(st.integers(len(blob) // 2, len(blob))) :]
    given_bytes, at = b"\0" + bytes(blob), 1
    try:
        expected = the_long_way(given_bytes, at)
    except MalformedEvidence:
        expected = None
    try:
        found = der.short_extension(given_bytes, at)
    except MalformedEvidence:
        assert expected is None
        return
    assert found is None or found == expected


def test_the_usual_ones_are_read_the_short_way() -> None:
    """With and without the word critical."""
    for flag, critical in ((b"", False), (b"\x01\x01\xff", True)):
        blob = der.encode(
            der.SEQUENCE, der.encode(der.OID, b"\x55\x1d\x13") + flag + der.encode(der.OCTET_STRING, b"v")
        )
        assert der.short_extension(blob, 0) == ("2.5.29.19", critical, b"v", len(blob))
