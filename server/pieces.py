"""Pieces of an upload, looked at where they lie.

The generated code copies a piece's bytes twice, with Python's lock held: from the message, and again whenever
they are asked for. An upload is nothing but pieces, so their few fields are read here (protobuf.dev,
"Encoding"), if they are as a sender writes them; all else is left to the generated code.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import grpc

from hansa.core.wire import federation_pb2 as pb

_METHOD = "/hansa.v1.Agents/Upload"
_PIECE, _OFFSET, _DATA = 0x12, 0x08, 0x12  # UploadRequest.piece, Piece.offset, Piece.data
_LONGEST = 9  # bytes of a number below 2^63


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes of an update, from ``offset`` on."""

    offset: int
    data: memoryview


class Pieces(grpc.aio.ServerInterceptor):
    """Lets the handler of uploads have :class:`Piece` for a piece."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Read the messages of uploads by :func:`read`."""
        handler = await continuation(handler_call_details)
        if handler is None or handler_call_details.method != _METHOD:
            return handler
        return grpc.stream_stream_rpc_method_handler(handler.stream_stream, read, handler.response_serializer)


def read(message: bytes) -> pb.UploadRequest | Piece:
    """A message of an upload.

    Raises
    ------
    google.protobuf.message.DecodeError
        When it is none.
    """
    piece = _piece(message)
    if piece is not None:
        return piece
    made = pb.UploadRequest.FromString(message)
    if made.WhichOneof("body") != "piece":
        return made
    return Piece(made.piece.offset, memoryview(made.piece.data))


def _piece(message: bytes) -> Piece | None:
    """The piece that a message is, if its fields are in the order in which they are written."""
    if message[:1] != bytes([_PIECE]):
        return None
    size, at = _number(message, 1)
    offset = 0
    if at + size != len(message):
        return None
    if message[at : at + 1] == bytes([_OFFSET]):
        offset, at = _number(message, at + 1)
    if message[at : at + 1] != bytes([_DATA]):
        return None
    size, at = _number(message, at + 1)
    return Piece(offset, memoryview(message)[at:]) if at + size == len(message) else None


def _number(message: bytes, at: int) -> tuple[int, int]:
    """The number that begins there, seven bits to a byte, and where it ends; one that has no end is -1."""
    value = 0
    for i, byte in enumerate(message[at : at + _LONGEST]):
        value |= (byte & 0x7F) << 7 * i
        if byte < 0x80:
            return value, at + i + 1
    return -1, len(message)
