"""TLS for whoever listens. The coordinator's certificate is renewed while it runs, between two handshakes."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import cast

import grpc
from cryptography.hazmat.primitives.serialization import Encoding

from hansa.core.errors import HansaError
from hansa.core.trust import check_loopback
from hansa.server.trust.authority import Authority

_log = logging.getLogger("hansa.trust")


def server_credentials(authority: Authority) -> grpc.ServerCredentials:
    """For the port of everything: TLS refuses callers without a certificate of this federation.

    Raises
    ------
    TrustError
        When the coordinator's key cannot be used.
    """
    return _credentials(authority, mutual=True)


def enrolment_credentials(authority: Authority) -> grpc.ServerCredentials:
    """For the port where certificates are had: only the coordinator shows one.

    Raises
    ------
    TrustError
        When the coordinator's key cannot be used.
    """
    return _credentials(authority, mutual=False)


def insecure_port(server: grpc.aio.Server, address: str) -> int:
    """Listen without TLS, on loopback, and return the port; the log says so.

    Raises
    ------
    InputError
        For an address that other machines reach.
    """
    check_loopback("address", address)
    return server.add_insecure_port(address)


def _credentials(authority: Authority, *, mutual: bool) -> grpc.ServerCredentials:
    shown = authority.coordinator()
    roots = authority.certificate.public_bytes(Encoding.PEM) if mutual else None

    def renewed() -> grpc.ServerCertificateConfiguration | None:
        """Asked at every handshake; ``None`` keeps what there is.

        gRPC replaces what it shakes hands with for whatever else is returned, under the feet of other
        handshakes: the same certificate over and over ended the process (grpcio 1.85).
        """
        nonlocal shown
        try:
            held = authority.coordinator()
        except (HansaError, OSError) as error:
            _log.error("the coordinator goes on with the certificate it has: %s", error)
            return None
        if held == shown:
            return None
        shown = held
        return grpc.ssl_server_certificate_configuration([held], roots)

    first = grpc.ssl_server_certificate_configuration([shown], roots)
    return grpc.dynamic_ssl_server_credentials(
        first,
        cast("Callable[[], grpc.ServerCertificateConfiguration]", renewed),  # the types know no None
        require_client_authentication=mutual,
    )
