"""A piece is what the generated code says it is, whatever the bytes."""

from __future__ import annotations

from google.protobuf.message import DecodeError
from hypothesis import example, given
from hypothesis import strategies as st

from hansa.core.wire import federation_pb2 as pb
from hansa.server.pieces import Piece, read


def generated(message: bytes) -> pb.UploadRequest | None:
    try:
        return pb.UploadRequest.FromString(message)
    except DecodeError:
        return None


def ours(message: bytes) -> pb.UploadRequest | None:
    """What was read, as the generated code has it."""
    try:
        found = read(message)
    except DecodeError:
        return None
    if isinstance(found, Piece):
        return pb.UploadRequest(piece=pb.Piece(offset=found.offset, data=bytes(found.data)))
    return found


@given(st.integers(0, 2**63 - 1), st.binary(min_size=1, max_size=400))
@example(0, b"x")
@example(2**62, b"\x12" * 300)
def test_a_piece_is_read_where_it_lies(offset: int, data: bytes) -> None:
    found = read(pb.UploadRequest(piece=pb.Piece(offset=offset, data=data)).SerializeToString())
    assert isinstance(found, Piece)
    assert (found.offset, bytes(found.data)) == (offset, data)


messages = st.one_of(
    st.binary(max_size=40),
    st.lists(st.sampled_from([0x12, 0x08, 0x0A, 0x80, 0xFF, 0, 1, 2, 3, 4, 5, 6]), max_size=14).map(bytes),
    st.builds(
        lambda offset, data: pb.UploadRequest(piece=pb.Piece(offset=offset, data=data)).SerializeToString(),
        st.integers(0, 2**64 - 1),
        st.binary(max_size=200),
    ),
    st.builds(
        lambda lease, size: pb.UploadRequest(
            manifest=pb.Manifest(lease=lease, update=pb.Blob(size=size))
        ).SerializeToString(),
        st.binary(max_size=20),
        st.integers(0, 2**63),
    ),
)


@given(messages, st.integers(0, 255), st.integers(0, 255), st.booleans())
@example(b"\x12\x00", 0, 0x12, False)
@example(b"\x12\x02\x08\x01", 0, 0x12, False)
@example(b"\x12\x04\x08\x01\x12\x00\x00", 0, 0x12, False)
@example(b"\x12\x80", 0, 0x12, False)
def test_any_bytes_are_read_as_the_generated_code_reads_them(
    message: bytes, at: int, byte: int, cut: bool
) -> None:
    """Whole, cut, or with a byte changed."""
    for each in (message, message[:at] if cut else message[:at] + bytes([byte]) + message[at + 1 :]):
        assert ours(each) == generated(each)
