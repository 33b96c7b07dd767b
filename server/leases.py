"""Leases: what lets one agent alone work on one job of one client. They are signed, so no table is kept."""

from __future__ import annotations

import hmac
from dataclasses import dataclass
from typing import Literal

_MAC = 16
_LIMIT = 256  # bytes


@dataclass(frozen=True)
class Lease:
    """What a job's lease says: whose it is.

    ``number`` is that of the client's job, and where ``what`` is ``"evaluate"`` that of the model's round.
    """

    run: str
    client: int
    number: int
    what: Literal["", "evaluate"] = ""

    def signed(self, secret: bytes) -> bytes:
        """As it travels; ``secret`` is the run's."""
        claim = f"{self.run}|{self.client}|{self.number}|{self.what}".encode()
        return claim + hmac.digest(secret, claim, "sha256")[:_MAC]


def read_lease(lease: bytes) -> Lease | None:
    """What a lease claims; only the run's secret tells whether it is true."""
    if len(lease) > _LIMIT:
        return None
    run, *rest = lease[:-_MAC].decode("ascii", "replace").split("|")
    if len(rest) != 3 or not all(each.isdecimal() and len(each) < 20 for each in rest[:2]):
        return None
    client, number = map(int, rest[:2])
    match rest[2]:
        case "" | "evaluate" as what:
            return Lease(run, client, number, what)
        case _:
            return None
