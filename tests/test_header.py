"""The header, held to bytes that are written out here."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distsign.wire import HEADER_BYTES, Codec, Header, PayloadError
from distsign.wire.header import FORMAT_VERSION, POISON_BYTE, POISON_FLAG

GOLDEN = [
    (Header(Codec.PLANES, 0), "01 01 00 00 00 00 00 00"),
    (Header(Codec.PLANES, 1), "01 01 00 01 00 00 00 00"),
    (Header(Codec.PLANES, 1000), "01 01 00 e8 03 00 00 00"),
    (Header(Codec.PLANES, 1000, verdict=True), "01 01 01 e8 03 00 00 00"),
    (Header(Codec.PLANES, 1000, poison=True), "01 01 02 e8 03 00 00 00"),
    (Header(Codec.PLANES, 0x0102030405, verdict=True, poison=True), "01 01 03 05 04 03 02 01"),
    (Header(Codec.PLANES, 2**40 - 1), "01 01 00 ff ff ff ff ff"),
    (Header(Codec.SPARSE, 1000, verdict=True), "01 02 01 e8 03 00 00 00"),
    (Header(Codec.SPARSE, 1000, checksum=True), "01 02 04 e8 03 00 00 00"),
]


@pytest.mark.parametrize(("header", "written"), GOLDEN)
def test_headers_have_these_bytes(header: Header, written: str) -> None:
    assert header.encode() == bytes.fromhex(written)
    assert Header.decode(bytes.fromhex(written)) == header


def test_a_header_has_at_most_eight_bytes() -> None:
    assert HEADER_BYTES == 8


@given(st.sampled_from(Codec), st.integers(0, 2**40 - 1), st.booleans(), st.booleans(), st.binary(max_size=9))
def test_what_is_written_can_be_read(codec: Codec, num_elements: int, verdict: bool, poison: bool, body: bytes) -> None:
    header = Header(codec, num_elements, verdict, poison)
    written = header.encode()
    assert len(written) == HEADER_BYTES
    assert Header.decode(written + body) == header


@given(st.binary(min_size=HEADER_BYTES, max_size=HEADER_BYTES))
def test_eight_bytes_are_either_refused_or_read_as_what_they_are(data: bytes) -> None:
    try:
        header = Header.decode(data)
    except PayloadError:
        assert data[0] != 1 or data[1] not in (1, 2) or data[2] > 3
    else:
        assert header.encode() == data


def test_poison_can_be_set_in_a_written_header() -> None:
    """The exchange does it on the device, without a host that knows."""
    for header, _ in GOLDEN:
        data = bytearray(header.encode())
        data[POISON_BYTE] |= POISON_FLAG
        assert Header.decode(bytes(data)) == replace(header, poison=True)


@pytest.mark.parametrize("num_elements", [-1, 2**40])
def test_an_impossible_size_is_our_own_fault(num_elements: int) -> None:
    with pytest.raises(AssertionError):
        Header(Codec.PLANES, num_elements).encode()


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("", "8 bytes of header, but only 0 came"),
        ("01 01 00 e8 03 00 00", "8 bytes of header, but only 7 came"),
        ("00 01 00 e8 03 00 00 00", "format version 0, this distsign reads version 1"),
        ("02 01 00 e8 03 00 00 00", "format version 2, this distsign reads version 1"),
        ("01 00 00 e8 03 00 00 00", r"codec 0 is unknown .* 1 \(planes\), 2 \(sparse\)"),
        ("01 07 00 e8 03 00 00 00", r"codec 7 is unknown .* 1 \(planes\), 2 \(sparse\)"),
        ("01 01 08 e8 03 00 00 00", "flags 0x08"),
        ("01 01 83 e8 03 00 00 00", "flags 0x83"),
    ],
)
def test_unreadable_headers_are_named(data: str, said: str) -> None:
    with pytest.raises(PayloadError, match=said):
        Header.decode(bytes.fromhex(data))
    with pytest.raises(PayloadError, match=f"^rank 3 cannot read the payload of rank 5: .*{said}"):
        Header.expect(bytes.fromhex(data), Header(Codec.PLANES, 1000), sender=5, receiver=3)


@pytest.mark.parametrize("poison", [False, True])
def test_what_is_expected_passes_with_or_without_poison(poison: bool) -> None:
    came = Header(Codec.PLANES, 1000, verdict=True, poison=poison)
    expected = Header(Codec.PLANES, 1000, verdict=True)
    assert Header.expect(came.encode(), expected, sender=1, receiver=0) == came


@pytest.mark.parametrize(
    ("came", "said"),
    [
        (Header(Codec.PLANES, 1001), "ballots on 1,001 elements as planes"),
        (Header(Codec.PLANES, 1000, verdict=True), "verdicts on 1,000 elements as planes"),
        (Header(Codec.PLANES, 0, poison=True), "ballots on 0 elements as planes"),
        (Header(Codec.SPARSE, 1000), "ballots on 1,000 elements as sparse"),
        (Header(Codec.PLANES, 1000, checksum=True), "ballots on 1,000 elements as planes with a checksum"),
    ],
)
def test_what_is_not_expected_names_both_sides(came: Header, said: str) -> None:
    with pytest.raises(PayloadError) as error:
        Header.expect(came.encode(), Header(Codec.PLANES, 1000), sender=5, receiver=3)
    assert f"rank 3 expects ballots on 1,000 elements as planes from rank 5, but {said} came" in str(error.value)


def test_the_format_is_version_one() -> None:
    """A change of the bytes above needs another version, so that two versions on two ranks say so."""
    assert FORMAT_VERSION == 1
