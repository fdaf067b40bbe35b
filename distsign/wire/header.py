"""The eight bytes in front of each payload, which say what follows, and the size of the checksum that may end it.

byte 0     format version
byte 1     codec of the body
byte 2     flags: bit 0 verdicts (else ballots), bit 1 poison, bit 2 the payload ends with a checksum
bytes 3-7  number of elements, little-endian
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import IntEnum

__all__ = [
    "CHECKSUM_BYTES",
    "FORMAT_VERSION",
    "HEADER_BYTES",
    "POISON_BYTE",
    "POISON_FLAG",
    "Codec",
    "Header",
    "PayloadError",
]

FORMAT_VERSION = 1
HEADER_BYTES = 8
CHECKSUM_BYTES = 4
POISON_BYTE = 2
POISON_FLAG = 2
_VERDICT_FLAG = 1
_CHECKSUM_FLAG = 4
_MAX_ELEMENTS = 2**40 - 1


class PayloadError(RuntimeError):
    """A payload is not what its receiver expects."""


class Codec(IntEnum):
    """How a payload's body is coded."""

    PLANES = 1
    SPARSE = 2


@dataclass(frozen=True)
class Header:
    """What a payload says of itself.

    Args:
        codec: how the body is coded.
        num_elements: components that the body speaks about.
        verdict: whether these are an owner's verdicts; else they are one worker's ballots.
        poison: whether the gradient held a NaN or an infinity, so that the body means nothing.
        checksum: whether the last bytes of the payload are a checksum of all the others.

    Example:
        >>> Header(Codec.PLANES, 1000).encode().hex(" ")
        '01 01 00 e8 03 00 00 00'
    """

    codec: Codec
    num_elements: int
    verdict: bool = False
    poison: bool = False
    checksum: bool = False

    def encode(self) -> bytes:
        """Return the `HEADER_BYTES` bytes of this header."""
        assert 0 <= self.num_elements <= _MAX_ELEMENTS
        flags = _VERDICT_FLAG * self.verdict | POISON_FLAG * self.poison | _CHECKSUM_FLAG * self.checksum
        return bytes((FORMAT_VERSION, self.codec, flags)) + self.num_elements.to_bytes(5, "little")

    @classmethod
    def decode(cls, data: bytes) -> Header:
        """Read a header.

        Args:
            data: the first bytes of a payload.

        Raises:
            PayloadError: if there are fewer than `HEADER_BYTES` bytes, or the version, the codec or a flag is unknown.
        """
        if len(data) < HEADER_BYTES:
            raise PayloadError(f"a payload begins with {HEADER_BYTES} bytes of header, but only {len(data)} came")
        version, codec, flags = data[:3]
        if version != FORMAT_VERSION:
            raise PayloadError(
                f"the payload has format version {version}, this distsign reads version {FORMAT_VERSION}: run the same "
                "distsign on every rank"
            )
        if codec not in Codec.__members__.values():
            known = ", ".join(f"{c.value} ({c.name.lower()})" for c in Codec)
            raise PayloadError(f"the payload's codec {codec} is unknown to this distsign, which has {known}")
        if flags & ~(_VERDICT_FLAG | POISON_FLAG | _CHECKSUM_FLAG):
            raise PayloadError(f"the payload's flags {flags:#04x} have bits that format version {version} does not use")
        num_elements = int.from_bytes(data[3:HEADER_BYTES], "little")
        verdict, poison, checksum = (bool(flags & flag) for flag in (_VERDICT_FLAG, POISON_FLAG, _CHECKSUM_FLAG))
        return cls(Codec(codec), num_elements, verdict, poison, checksum)

    @classmethod
    def expect(cls, data: bytes, expected: Header, *, sender: int, receiver: int) -> Header:
        """Read a header and hold it against what the receiver expects; only the poison flag may differ.

        Raises:
            PayloadError: if it differs, naming both ranks and both headers.
        """
        try:
            header = cls.decode(data)
        except PayloadError as error:
            raise PayloadError(f"rank {receiver} cannot read the payload of rank {sender}: {error}") from error
        if replace(header, poison=False) != replace(expected, poison=False):
            raise PayloadError(
                f"rank {receiver} expects {expected._describe()} from rank {sender}, but {header._describe()} came: "
                "the ranks do not train the same model with the same options"
            )
        return header

    def _describe(self) -> str:
        kind = "verdicts" if self.verdict else "ballots"
        ending = " with a checksum" if self.checksum else ""
        return f"{kind} on {self.num_elements:,} elements as {self.codec.name.lower()}{ending}"
