"""The protocol between a coordinator, its agents and its users: messages, versions, limits.

``federation.proto`` is the contract; the ``_pb2`` modules are generated from it (its head says how). Tensors
travel as safetensors, in pieces, under the SHA-256 of the whole (:mod:`hansa.core.wire.tensors`).
"""

from __future__ import annotations

from typing import Any

from hansa.core.wire.federation_pb2 import Version

MAJOR, MINOR = 1, 3
PIECE = 1 << 20
"""Bytes of a piece. Fewer cost more calls; from here on Python joins what comes with its lock given away."""
INLINE = 32 << 10
"""Bytes up to which a blob travels in the message that names it."""
MESSAGE_LIMIT = 4 << 20
"""Bytes of a message, on both sides."""

NAME = "hansa-name"
"""Metadata key under which an agent names itself on an insecure loopback."""

OPTIONS: tuple[tuple[str, Any], ...] = (
    ("grpc.max_receive_message_length", MESSAGE_LIMIT),
    ("grpc.http2.max_frame_size", 1 << 20),
    ("grpc.max_send_message_length", MESSAGE_LIMIT),
    ("grpc.max_metadata_size", 16 << 10),
    ("grpc.compression_enabled_algorithms_bitset", 1),  # none: nothing inflates
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
)
"""gRPC options of both sides: limits, and pings that notice a connection that is half open."""


def version() -> Version:
    """What this Hansa speaks."""
    return Version(major=MAJOR, minor=MINOR)


def stranger(other: Version) -> str | None:
    """Why the two sides cannot talk; ``None`` where they can. Minor versions do not matter."""
    if other.major == MAJOR:
        return None
    older, newer = sorted((f"{other.major}.{other.minor}", f"{MAJOR}.{MINOR}"), key=lambda v: float(v))
    return (
        f"the two sides speak versions {other.major}.{other.minor} and {MAJOR}.{MINOR} of the protocol, "
        f"which do not understand each other; update the side of {older} to a Hansa that speaks {newer}"
    )
