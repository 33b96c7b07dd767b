"""Who someone is, and how the others can tell: names, roles, certificates, join tokens, TLS.

A private key is made where it is used and never leaves that machine. What a certificate says was written by
the federation's authority (:mod:`hansa.server.trust`), whose own certificate came with the join token.
"""

from __future__ import annotations

from hansa.core.roles import Role
from hansa.core.trust.channels import (
    channel_credentials,
    check_loopback,
    explain,
    explain_member,
    first_contact_credentials,
    insecure_channel,
    is_loopback,
)
from hansa.core.trust.folder import Held, folder_lock, install, load, request
from hansa.core.trust.identity import BACKDATE, LIFETIME, Identity, checked_name, utcnow
from hansa.core.trust.tokens import JoinToken

__all__ = [
    "BACKDATE",
    "LIFETIME",
    "Held",
    "Identity",
    "JoinToken",
    "Role",
    "channel_credentials",
    "check_loopback",
    "checked_name",
    "explain",
    "explain_member",
    "first_contact_credentials",
    "folder_lock",
    "insecure_channel",
    "install",
    "is_loopback",
    "load",
    "request",
    "utcnow",
]
