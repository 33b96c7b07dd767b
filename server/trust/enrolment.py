"""Certificates over the wire: for a join token once, then for a certificate that still holds.

A private key never travels: what comes in is a public key, signed with its private one (PKCS #10).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any, NoReturn

import grpc
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from hansa.core.errors import HansaError, InputError
from hansa.core.wire.enrolment_pb2 import Certificate, EnrolRequest, RenewRequest
from hansa.core.wire.enrolment_pb2_grpc import (
    EnrolmentServicer,
    RenewalServicer,
    add_EnrolmentServicer_to_server,
)
from hansa.server.trust.authority import Authority
from hansa.server.trust.guard import Refused, caller
from hansa.server.trust.ports import enrolment_credentials

_log = logging.getLogger("hansa.trust")
_OPTIONS = (
    ("grpc.max_receive_message_length", 16 << 10),
    ("grpc.max_metadata_size", 8 << 10),
    ("grpc.compression_enabled_algorithms_bitset", 1),
    ("grpc.max_connection_age_ms", 60_000),
    ("grpc.max_connection_age_grace_ms", 10_000),  # without it, a call that says nothing holds its place
)
_CALLS = 16


class Enrolment(EnrolmentServicer):
    """A token and a request against a certificate.

    Parameters
    ----------
    authority:
        Who signs.
    """

    def __init__(self, authority: Authority) -> None:
        self._authority = authority

    async def Enrol(self, request: EnrolRequest, context: Any) -> Certificate:  # noqa: N802
        """See ``enrolment.proto``. UNAUTHENTICATED for a bad token, INVALID_ARGUMENT for a bad request."""
        try:
            return await _answer(self._authority, self._authority.redeem, request.secret, request.request)
        except Refused as refused:
            _log.warning("refused enrolment peer=%s reason=%r", context.peer(), refused.reason)
            await _abort(context, refused)


class Renewal(RenewalServicer):
    """A fresh certificate for whoever holds one; behind a guard.

    Parameters
    ----------
    authority:
        Who signs.
    """

    def __init__(self, authority: Authority) -> None:
        self._authority = authority

    async def Renew(self, request: RenewRequest, context: Any) -> Certificate:  # noqa: N802
        """See ``enrolment.proto``."""
        return await _answer(self._authority, self._authority.renew, caller().identity, request.request)


def enrolment_server(authority: Authority, address: str) -> tuple[grpc.aio.Server, int]:
    """The server of the enrolment port, not yet started, and the port. Small messages, few at a time.

    Parameters
    ----------
    address:
        ``host:port``; port 0 takes a free one.

    Raises
    ------
    InputError
        When the address cannot be had.
    """
    server = grpc.aio.server(options=_OPTIONS, maximum_concurrent_rpcs=_CALLS)
    add_EnrolmentServicer_to_server(Enrolment(authority), server)
    try:
        return server, server.add_secure_port(address, enrolment_credentials(authority))
    except RuntimeError:
        raise InputError(
            "enrolment address", address, "nothing can listen there", "choose a free port of this machine"
        ) from None


async def _answer(authority: Authority, sign: Callable[..., x509.Certificate], *given: Any) -> Certificate:
    """What the authority signs, off the event loop: it waits for the disk."""
    try:
        made = await asyncio.to_thread(sign, *given)
    except InputError as error:
        raise Refused(grpc.StatusCode.INVALID_ARGUMENT, str(error)) from None
    except HansaError as error:
        raise Refused(grpc.StatusCode.UNAUTHENTICATED, str(error)) from None
    except OSError as error:
        _log.error("enrolment: %s", error)
        raise Refused(grpc.StatusCode.UNAVAILABLE, "the coordinator's disk fails; try again later") from None
    return Certificate(
        certificate=made.public_bytes(Encoding.DER),
        authority=authority.certificate.public_bytes(Encoding.DER),
        now=int(authority.now().timestamp()),
    )


async def _abort(context: Any, refused: Refused) -> NoReturn:
    await context.abort(refused.code, refused.reason)
    raise AssertionError("abort returned")
