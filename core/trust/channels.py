"""TLS for whoever connects, and a plain sentence for when it fails.

gRPC reports a failed handshake as UNAVAILABLE, whatever the cause. :func:`explain` asks again with Python's
own TLS, which tells.
"""

from __future__ import annotations

import ipaddress
import logging
import socket
import ssl
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import grpc
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.serialization import Encoding

from hansa.core.errors import InputError
from hansa.core.trust.folder import IDENTITY, load
from hansa.core.trust.identity import shown, utcnow

_log = logging.getLogger("hansa.trust")
_PROBE_SECONDS = 5.0
_NOT_YET_VALID, _EXPIRED = 9, 10  # X509_V_ERR_..., openssl/x509_vfy.h
_NAME_MISMATCH = (62, 64)


def channel_credentials(folder: Path, now: datetime | None = None) -> grpc.ChannelCredentials:
    """Credentials of both sides, from the folder that ``hansa pki join`` made.

    Raises
    ------
    TrustError
        When the folder cannot be used: see :func:`~hansa.core.trust.folder.load`.
    """
    held = load(folder, now)
    return grpc.ssl_channel_credentials(held.authority, held.key, held.certificate)


def first_contact_credentials(authority: x509.Certificate) -> grpc.ChannelCredentials:
    """Credentials that authenticate the coordinator alone, by the authority that a join token names."""
    return grpc.ssl_channel_credentials(authority.public_bytes(Encoding.PEM))


def insecure_channel(address: str, options: Sequence[tuple[str, Any]] = ()) -> grpc.aio.Channel:
    """A channel without TLS, to this machine alone.

    Raises
    ------
    InputError
        For an address on another machine.
    """
    check_loopback(
        "address", address, "use 127.0.0.1:PORT, or name in `identity` the folder that `hansa pki join` makes"
    )
    return grpc.aio.insecure_channel(address, options)


def check_loopback(
    field: str, address: str, remedy: str = "use 127.0.0.1:PORT, or certificates: `hansa pki init`"
) -> None:
    """Insecure mode is for one machine: refuse any other address, and say in the log that it is on.

    Raises
    ------
    InputError
        For an address that other machines reach.
    """
    if not is_loopback(address):
        raise InputError(
            field,
            address,
            "insecure mode has no encryption and believes whatever a caller says; it is for loopback only",
            remedy,
        )
    _log.warning("INSECURE mode at %s: no encryption, no certificates, no roles", address)


def is_loopback(address: str) -> bool:
    """Whether only this machine reaches ``host:port``."""
    if address.startswith("unix:"):
        return True
    host, _ = split(address)
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def split(address: str) -> tuple[str, int]:
    """``host:port`` or ``[ipv6]:port``.

    Raises
    ------
    InputError
        For anything else.
    """
    host, _, port = address.rpartition(":")
    bare = host.removeprefix("[").removesuffix("]")
    if not bare or not port.isdigit() or int(port) > 65535 or (":" in bare) != host.startswith("["):
        raise InputError(
            "address", address, "it is no HOST:PORT", "write it as in coordinator.example.org:8443"
        )
    return bare, int(port)


def explain(
    address: str, authority: x509.Certificate, folder: Path | None = None, now: datetime | None = None
) -> str | None:
    """Why no TLS connection comes about, and what to do; ``None`` where one does. Blocks for seconds.

    Parameters
    ----------
    address:
        ``host:port``.
    authority:
        Whose certificates the coordinator should have.
    folder:
        With the caller's own certificate, where one is to be shown.
    now:
        This machine's clock.
    """
    host, port = split(address)
    context = ssl.create_default_context(cadata=authority.public_bytes(Encoding.PEM).decode())
    context.set_alpn_protocols(["h2"])
    if folder is not None:
        _show(context, folder / IDENTITY)
    try:
        with (
            socket.create_connection((host, port), timeout=_PROBE_SECONDS) as plain,
            context.wrap_socket(plain, server_hostname=host) as secured,
        ):
            if secured.recv(1):  # an HTTP/2 server speaks first, once it is content
                return None
    except ssl.SSLCertVerificationError as error:
        return _coordinator_refused(error, address, now or utcnow())
    except ssl.SSLError as error:
        reason = (error.reason or str(error)).replace("_", " ").lower()
        return f"{address}: the TLS handshake failed ({reason}); is this the coordinator's port?"
    except TimeoutError:
        return f"{address}: nothing answers within {_PROBE_SECONDS:g} s; check the address and the firewalls"
    except ConnectionResetError:
        pass  # the other way to hang up
    except OSError as error:
        return f"{address}: no connection ({error.strerror or error}); check that a coordinator runs there"
    return _caller_refused(address, authority, folder, now or utcnow())


def explain_member(address: str, folder: Path) -> str | None:
    """:func:`explain` for whoever has the certificate in ``folder``.

    Raises
    ------
    TrustError
        As :func:`~hansa.core.trust.folder.load`.
    """
    return explain(address, x509.load_pem_x509_certificate(load(folder).authority), folder)


def _show(context: ssl.SSLContext, identity: Path) -> None:
    """OpenSSL opens the file for the certificate, then for the key; a renewal may fall between the two."""
    try:
        context.load_cert_chain(identity)
    except ssl.SSLError:
        context.load_cert_chain(identity)


def _coordinator_refused(error: ssl.SSLCertVerificationError, address: str, now: datetime) -> str:
    """The caller does not accept the coordinator's certificate."""
    if error.verify_code in (_NOT_YET_VALID, _EXPIRED):
        shows = x509.load_pem_x509_certificate(ssl.get_server_certificate(split(address)).encode())
        return (
            f"{address}: the coordinator's certificate holds from {shown(shows.not_valid_before_utc)} to "
            f"{shown(shows.not_valid_after_utc)}, and the clock here says {shown(now)}; set the clock "
            "that is wrong (chronyc tracking, timedatectl status), or start the coordinator anew if it "
            "stood still"
        )
    if error.verify_code in _NAME_MISMATCH:
        return (
            f"{address}: the coordinator's certificate is for another name; use the address it was made "
            "for, or on the coordinator `hansa pki renew --host NAME`"
        )
    return (
        f"{address}: what answers there was not certified by this federation's authority "
        f"({error.verify_message}); check the address, and do not go on if it is right"
    )


def _caller_refused(address: str, authority: x509.Certificate, folder: Path | None, now: datetime) -> str:
    """The coordinator shook hands, then hung up: gRPC's way to say that it does not accept a certificate."""
    if folder is None:
        return f"{address}: the coordinator wants a certificate on this port; joining has a port of its own"
    own = x509.load_pem_x509_certificate((folder / IDENTITY).read_bytes())
    try:
        own.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        return f"{address}: the certificate in {folder} is of another federation; join this one"
    return (
        f"{address}: the coordinator does not accept the certificate in {folder}, which holds from "
        f"{shown(own.not_valid_before_utc)} to {shown(own.not_valid_after_utc)} (the clock here says "
        f"{shown(now)}): it has expired by the coordinator's clock; compare the clocks, or join with a "
        "new token"
    )
