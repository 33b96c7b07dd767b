"""Leases: what lets one agent alone work on one job of one client. They are signed, so no table is kept."""

from __future__ import annotations

import hmac
from dataclasses import dataclass

_MAC = 16
_LIMIT = 256  # bytes


@dataclass(frozen=True)
class Lease:
    """What a job's lease says: whose it is."""

    run: str
    client: int
    number: int

    def signed(self, secret: bytes) -> bytes:
        """As it travels; ``secret`` is the run's."""
        claim = f"{self.run}|{self.client}|{self.number}|".encode()
        return claim + hmac.digest(secret, claim, "sha256")[:_MAC]


def read_lease(lease: bytes) -> Lease | None:
    """What a lease claims; only the run's secret tells whether it is true."""
    if len(lease) > _LIMIT:
        return None
    run, *numbers = lease[:-_MAC].decode("ascii", "replace").split("|")
    if len(numbers) != 3 or numbers.pop() or not all(each.isdecimal() and len(each) < 20 for each in numbers):
        return None
    client, number = map(int, numbers)
    return Lease(run, client, number)
