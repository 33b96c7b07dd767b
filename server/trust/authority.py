"""The certificate authority of one federation: a folder, a key, and what it signs.

Certificates say who their holder is (:mod:`hansa.core.trust.identity`), hold for seven days, begin to hold 25
hours before they are made, and are for one side only (extended key usage): a member cannot pose as the
coordinator. What is signed is in the audit log before it is in the registry, and there before anyone is told.
"""

from __future__ import annotations

import ipaddress
import threading
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Self

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from hansa.core.errors import InputError, TrustError
from hansa.core.roles import Role
from hansa.core.trust import files
from hansa.core.trust.folder import AUTHORITY, key_pem, new_key, read_key
from hansa.core.trust.identity import (
    BACKDATE,
    LIFETIME,
    Identity,
    checked_name,
    member_uri,
    shown,
    utcnow,
)
from hansa.core.trust.tokens import JoinToken, digest
from hansa.server.trust.audit import Audit
from hansa.server.trust.denylist import DenyList
from hansa.server.trust.registry import OpenToken, Registry, key_digest

_KEY, _COORDINATOR = "authority.key", "coordinator.pem"
_OWN_LIFETIME = timedelta(days=3650)
_LONGEST_TOKEN = timedelta(days=30)
_REQUEST_BYTES = 4096
_HERE = ("localhost", "127.0.0.1", "::1")


class Authority:
    """Signs, remembers and revokes. Safe to use from several threads and processes.

    Parameters
    ----------
    folder:
        Made by :meth:`create`.
    now:
        The clock.
    """

    def __init__(self, folder: Path, now: Callable[[], datetime] = utcnow) -> None:
        files.check_folder(folder)
        self.folder, self.now = folder, now
        self._key = read_key(folder / _KEY)
        try:
            self.certificate = x509.load_pem_x509_certificate((folder / AUTHORITY).read_bytes())
            self.certificate.verify_directly_issued_by(self.certificate)
            if self.certificate.public_key() != self._key.public_key():
                raise ValueError
        except (OSError, ValueError, TypeError, InvalidSignature):
            raise TrustError(
                f"{folder}: {AUTHORITY} is not the certificate of {_KEY}; restore both"
            ) from None
        self.audit = Audit(folder / "audit.jsonl")
        self.denied = DenyList(folder / "revoked.jsonl")
        self.registry = Registry(folder / "registry.db")
        self._lock = threading.Lock()
        self._stolen = set[str]()  # serials of which the audit log was told; whoever has one may ask for ever

    @classmethod
    def create(
        cls, folder: Path, federation: str, hosts: Sequence[str], now: Callable[[], datetime] = utcnow
    ) -> Self:
        """Found a federation.

        Parameters
        ----------
        folder:
            Absent or empty.
        federation:
            A name for people, in the authority's certificate.
        hosts:
            Names and addresses under which the coordinator is reached, besides this machine's loopback.

        Raises
        ------
        TrustError
            When there is an authority in this folder.
        """
        checked_name(federation)
        names = _host_names(hosts)
        files.make_folder(folder)
        if any(folder.iterdir()):
            raise TrustError(
                f"{folder}: it is not empty, and nothing in it is overwritten; name another folder"
            )
        key, at = new_key(), now()
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, federation)])
        usage = _usage(sign=False, certify=True)
        made = (
            _certificate(subject, subject, key.public_key(), key.public_key(), at, _OWN_LIFETIME)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(usage, critical=True)
            .sign(key, hashes.SHA256())
        )
        files.replace(folder / AUTHORITY, made.public_bytes(Encoding.PEM), files.PUBLIC)
        files.replace(folder / "revoked.jsonl", b"", files.PRIVATE)
        Audit.create(folder / "audit.jsonl")
        registry = Registry(folder / "registry.db")
        registry.create()
        registry.close()
        files.replace(folder / _KEY, key_pem(key), files.PRIVATE)
        authority = cls(folder, now)
        authority._log(
            "administrator", "authority.create", federation, {"fingerprint": authority.fingerprint}
        )
        authority._renew_coordinator(names)
        return authority

    def close(self) -> None:
        """Let go of the files."""
        self.registry.close()

    @property
    def federation(self) -> str:
        """The federation's name."""
        return str(self.certificate.subject.rfc4514_string().removeprefix("CN="))

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the authority's certificate, hexadecimal."""
        return self.certificate.fingerprint(hashes.SHA256()).hex()

    # Members.

    def issue(self, name: str, role: Role, expires: timedelta, by: str = "administrator") -> JoinToken:
        """A token with which one key can be certified once.

        Raises
        ------
        InputError
            When the name is no name, or holds a certificate; when it would be open for too long.
        """
        checked_name(name)
        if not timedelta(0) < expires <= _LONGEST_TOKEN:
            raise InputError(
                "expires", str(expires), "a join token is open for up to 30 days", "give hours, as in 24h"
            )
        now = self.now()
        token = JoinToken.new(self.certificate)
        with self.registry.writing() as at:
            for holder in self.registry.living(at, now):
                if holder.name == name and self.denied.reason(holder.serial) is None:
                    raise InputError(
                        "name",
                        name,
                        f"it holds a certificate until {shown(holder.not_after)}",
                        f"take another name, or `hansa pki revoke {name}` first",
                    )
            self.registry.add_token(at, digest(token.secret), name, role, now + expires)
            self._log(by, "token.issue", name, {"role": role, "expires": (now + expires).isoformat()})
        return token

    def redeem(self, secret: bytes, request: bytes) -> x509.Certificate:
        """A certificate for a token and a request (PKCS #10, DER). The same key gets the same one again.

        Raises
        ------
        InputError
            When the request is none that this authority signs.
        TrustError
            When the token is unknown, expired, or was used for another key.
        """
        key = _requested_key(request)
        now, mark = self.now(), digest(secret)
        with self.registry.writing() as at:
            token = self.registry.token(at, mark)
            if token is None:
                raise TrustError("this join token is unknown or void here; ask for a new one")
            if token.used is not None:
                known = self.registry.certificate(at, token.serial)
                if known is not None and known.key == key_digest(key) and known.not_after > now:
                    return x509.load_der_x509_certificate(known.der)
                raise TrustError(
                    f"this join token was used on {shown(token.used)}, for another key; if that was not "
                    f"you, tell the administrator to `hansa pki revoke {token.name}`, and ask for a new token"
                )
            if token.expires <= now:
                raise TrustError(f"this join token expired on {shown(token.expires)}; ask for a new one")
            made = self._sign(token.name, Role(token.role), key, now)
            identity = Identity.of(made)
            self._log(token.name, "certificate.issue", identity.serial, {"role": token.role})
            self.registry.add_certificate(at, made)
            self.registry.use_token(at, mark, identity.serial, now)
        return made

    def renew(self, holder: Identity, request: bytes) -> x509.Certificate:
        """A fresh certificate of the same name and role, for another key. The same key gets the same again.

        Parameters
        ----------
        holder:
            As the caller's certificate, verified by TLS, says.

        Raises
        ------
        InputError
            When the request is none that this authority signs.
        TrustError
            When this certificate was renewed for another key: two hold it, and one of them stole it. Or when
            it was revoked after the call was let in.
        """
        key = _requested_key(request)
        now = self.now()
        with self.registry.writing() as at:
            if self.denied.reason(holder.serial) is not None:  # whoever revokes has the registry to himself
                raise TrustError(f"certificate {holder.serial} of {holder} is revoked")
            old = self.registry.certificate(at, holder.serial)
            if old is not None and old.successor is not None:
                known = self.registry.certificate(at, old.successor)
                if known is not None and known.key == key_digest(key):
                    return x509.load_der_x509_certificate(known.der)
                if holder.serial not in self._stolen:
                    successor = {"successor": old.successor}
                    self._log(holder.name, "certificate.renewed-twice", holder.serial, successor)
                    self._stolen.add(holder.serial)
                raise TrustError(
                    f"certificate {holder.serial} of {holder} was renewed already, for another key: two "
                    f"machines use it, or its key was stolen; `hansa pki revoke {holder.name}`, then join "
                    "with a new token"
                )
            made = self._sign(holder.name, holder.role, key, now)
            identity = Identity.of(made)
            self._log(holder.name, "certificate.renew", identity.serial, {"before": holder.serial})
            self.registry.add_certificate(at, made)
            self.registry.supersede(at, holder.serial, identity.serial)
        return made

    def revoke(self, target: str, reason: str, by: str = "administrator") -> list[Identity]:
        """Refuse a name's certificates, and its unused tokens, from the next call on; or one certificate.

        Parameters
        ----------
        target:
            A name, or a serial.

        Raises
        ------
        InputError
            When there is nothing to revoke.
        """
        with self.registry.writing() as at:
            found = [
                each
                for each in self.registry.living(at, self.now())
                if target in (each.name, each.serial) and self.denied.reason(each.serial) is None
            ]
            void = self.registry.void_tokens(at, target)
            if not found and not void:
                raise InputError(
                    "name", target, "nothing that holds has this name or serial", "see `hansa pki ls`"
                )
            serials = [each.serial for each in found]
            self._log(
                by, "certificate.revoke", target, {"serials": serials, "tokens": void, "reason": reason}
            )
            self.denied.add(found, reason, self.now())
        return found

    def members(self) -> list[tuple[Identity, str | None]]:
        """Certificates that have not expired, and why they are revoked where they are."""
        with self.registry.writing() as at:
            found = self.registry.living(at, self.now())
        return [(each, self.denied.reason(each.serial)) for each in found]

    def open_tokens(self) -> list[OpenToken]:
        """Join tokens that can still be used."""
        return self.registry.open_tokens(self.now())

    # The coordinator.

    def coordinator(self) -> tuple[bytes, bytes]:
        """The coordinator's private key and certificate, PEM; renewed here when half of its life is over."""
        with self._lock:
            whole = files.read_private(self.folder / _COORDINATOR)
            held = x509.load_pem_x509_certificate(whole)
            if self.now() > held.not_valid_after_utc - LIFETIME / 2:
                whole = self._renew_coordinator(self._names())
            return whole[: whole.index(b"-----BEGIN CERT")], whole[whole.index(b"-----BEGIN CERT") :]

    def renew_coordinator(self, hosts: Sequence[str]) -> None:
        """A fresh certificate for the coordinator, under these names and loopback's, or those it has."""
        with self._lock:
            self._renew_coordinator(_host_names(hosts) if hosts else self._names())

    def _names(self) -> list[x509.GeneralName]:
        """Those in the coordinator's certificate."""
        held = x509.load_pem_x509_certificate(files.read_private(self.folder / _COORDINATOR))
        return list(held.extensions.get_extension_for_class(x509.SubjectAlternativeName).value)

    def _renew_coordinator(self, names: Sequence[x509.GeneralName]) -> bytes:
        key = new_key()
        made = self._signed(
            "coordinator",
            x509.SubjectAlternativeName(names),
            ExtendedKeyUsageOID.SERVER_AUTH,
            key.public_key(),
            self.now(),
        )
        shows = [str(each.value) for each in names]
        self._log("coordinator", "coordinator.renew", f"{made.serial_number:x}", {"hosts": shows})
        whole = key_pem(key) + made.public_bytes(Encoding.PEM)
        files.replace(self.folder / _COORDINATOR, whole, files.PRIVATE)
        return whole

    # Signing.

    def _sign(self, name: str, role: Role, key: ec.EllipticCurvePublicKey, now: datetime) -> x509.Certificate:
        names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(member_uri(name, role))])
        return self._signed(name, names, ExtendedKeyUsageOID.CLIENT_AUTH, key, now)

    def _signed(
        self,
        name: str,
        names: x509.SubjectAlternativeName,
        side: x509.ObjectIdentifier,
        key: ec.EllipticCurvePublicKey,
        now: datetime,
    ) -> x509.Certificate:
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        return (
            _certificate(subject, self.certificate.subject, key, self._key.public_key(), now, LIFETIME)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(sign=True, certify=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([side]), critical=False)
            .add_extension(names, critical=False)
            .sign(self._key, hashes.SHA256())
        )

    def _log(self, actor: str, action: str, object: str, detail: dict[str, Any]) -> None:
        self.audit.append(actor, action, object, detail, self.now())


def _certificate(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    issuer_key: ec.EllipticCurvePublicKey,
    now: datetime,
    lifetime: timedelta,
) -> x509.CertificateBuilder:
    """What every certificate has."""
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - BACKDATE)
        .not_valid_after(now + lifetime)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key), critical=False)
    )


def _usage(*, sign: bool, certify: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=sign,
        key_cert_sign=certify,
        crl_sign=False,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _requested_key(request: bytes) -> ec.EllipticCurvePublicKey:
    """The public key of a request whose sender has shown to hold the private one."""
    try:
        if len(request) > _REQUEST_BYTES:
            raise ValueError
        made = x509.load_der_x509_csr(request)
        key = made.public_key()
        if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
            raise ValueError
        if not made.is_signature_valid:
            raise ValueError
    except (ValueError, TypeError, InvalidSignature):
        raise InputError(
            "request",
            None,
            "it is no PKCS #10 request, signed by its own key on P-256",
            "let `hansa pki join` make it",
        ) from None
    return key


def _host_names(hosts: Sequence[str]) -> list[x509.GeneralName]:
    """Names for a certificate, loopback's among them."""
    made: list[x509.GeneralName] = []
    for host in dict.fromkeys((*hosts, *_HERE)):
        try:
            made.append(x509.IPAddress(ipaddress.ip_address(host)))
        except ValueError:
            if not host.isascii() or not host.strip() or set(host) & set(" /:@*"):
                raise InputError(
                    "host",
                    host,
                    "it is no host name or address",
                    "write it without port, as in fl.example.org",
                ) from None
            made.append(x509.DNSName(host))
    return made
