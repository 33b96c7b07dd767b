"""The folder in which a machine or a person keeps its key and certificate.

::

    <folder>/            mode 700
      ├─ identity.pem    private key and certificate, in one file: they change together; mode 600
      ├─ authority.pem   certificate of the federation's authority
      └─ next.pem        private key whose certificate is being asked for; mode 600

A key is asked for until a certificate has come: a repeated request is for the same key, and the coordinator
answers it with the same certificate.
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from hansa.core.errors import TrustError
from hansa.core.trust import files
from hansa.core.trust.identity import Identity, check_dates, utcnow

IDENTITY, AUTHORITY, _NEXT = "identity.pem", "authority.pem", "next.pem"


@dataclass(frozen=True, kw_only=True)
class Held:
    """What such a folder holds.

    Parameters
    ----------
    identity:
        Who its owner is.
    key, certificate, authority:
        As PEM.
    """

    identity: Identity
    key: bytes = field(repr=False)
    certificate: bytes
    authority: bytes


def new_key() -> ec.EllipticCurvePrivateKey:
    """A private key on P-256."""
    return ec.generate_private_key(ec.SECP256R1())


def key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """PKCS #8, not encrypted: the file's permissions guard it."""
    return key.private_bytes(Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


def read_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """The private key in a file.

    Raises
    ------
    TrustError
        When it is absent, readable by others, or no key on P-256.
    """
    return _key_in(files.read_private(path), path)


def _key_in(pem: bytes, path: Path) -> ec.EllipticCurvePrivateKey:
    try:
        key = serialization.load_pem_private_key(pem, password=None)
    except (ValueError, TypeError):
        key = None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise TrustError(f"{path}: it holds no private key that Hansa made; restore it, or join anew")
    return key


def request(folder: Path) -> bytes:
    """Ask for a certificate: PKCS #10 in DER for the folder's next key, which is made if there is none.

    Raises
    ------
    TrustError
        When others could read or exchange what is in the folder.
    """
    files.make_folder(folder)
    path = folder / _NEXT
    if not path.exists():
        files.replace(path, key_pem(new_key()), files.PRIVATE)
    key = read_key(path)
    made = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, hashes.SHA256())
    return made.public_bytes(Encoding.DER)


def install(folder: Path, certificate: bytes, authority: x509.Certificate, now: datetime) -> Identity:
    """Take up the certificate (DER) that came for the folder's next key.

    Raises
    ------
    TrustError
        When it is for another key, of another authority, or does not hold by this machine's clock.
    """
    try:
        made = x509.load_der_x509_certificate(certificate)
        made.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        raise TrustError(
            "the certificate that came is not signed by the federation's authority; do not use this "
            "coordinator"
        ) from None
    key = read_key(folder / _NEXT)
    if made.public_key() != key.public_key():
        raise TrustError("the certificate that came is for another key; do not use this coordinator")
    identity = Identity.of(made)
    check_dates(
        identity.not_before,
        identity.not_after,
        now,
        whose="the certificate that came",
        remedy="set the clock",
    )
    files.replace(folder / AUTHORITY, authority.public_bytes(Encoding.PEM), files.PUBLIC)
    files.replace(folder / IDENTITY, key_pem(key) + made.public_bytes(Encoding.PEM), files.PRIVATE)
    (folder / _NEXT).unlink()
    return identity


def load(folder: Path, now: datetime | None = None) -> Held:
    """What a folder holds, checked.

    Parameters
    ----------
    now:
        What the clock says; this machine's by default.

    Raises
    ------
    TrustError
        When a file is absent, damaged or readable by others, or the certificate has expired.
    """
    files.check_folder(folder)
    path = folder / IDENTITY
    whole = files.read_private(path)  # once: a renewal may put another pair in its place at any moment
    key = _key_in(whole, path)
    try:
        certificate = x509.load_pem_x509_certificate(whole)
        authority = x509.load_pem_x509_certificate((folder / AUTHORITY).read_bytes())
        certificate.verify_directly_issued_by(authority)
        if certificate.public_key() != key.public_key():
            raise ValueError
    except (OSError, ValueError, TypeError, InvalidSignature):
        raise TrustError(
            f"{folder}: key, certificate and authority do not belong together; restore the folder, or "
            "join anew"
        ) from None
    identity = Identity.of(certificate)
    check_dates(
        identity.not_before,
        identity.not_after,
        now or utcnow(),
        whose=f"{path}: the certificate of {identity}",
        remedy="ask for a new join token and `hansa pki join` again",
    )
    return Held(
        identity=identity,
        key=key_pem(key),
        certificate=certificate.public_bytes(Encoding.PEM),
        authority=authority.public_bytes(Encoding.PEM),
    )


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """One process at a time asks for a certificate."""
    files.make_folder(folder)
    with (folder / ".lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield
