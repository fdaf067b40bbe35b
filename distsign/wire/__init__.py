"""What travels: payload = header + body."""

from distsign.wire.header import HEADER_BYTES, Codec, Header, PayloadError

__all__ = ["HEADER_BYTES", "Codec", "Header", "PayloadError"]
