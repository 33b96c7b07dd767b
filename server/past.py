"""A run that has ended: a few numbers in memory; whatever else is asked, from the log and its directory."""

from __future__ import annotations

import hmac
import tomllib
from collections import Counter
from functools import cached_property
from pathlib import Path

from hansa.core.recipe import parse
from hansa.core.store import RunStore
from hansa.core.wire import federation_pb2 as pb
from hansa.server.events import EventLog, RunRow
from hansa.server.leases import Lease


class Past:
    """One such run. Its methods read the database: call them in a thread.

    Parameters
    ----------
    row: as the log has it.
    directory: where its record is.
    """

    def __init__(self, row: RunRow, directory: Path, log: EventLog) -> None:
        self.id, self.owner, self.status, self.reason = row.id, row.owner, row.status, row.reason
        self.rounds, self.clients, self.directory = row.rounds, row.clients, directory
        self._secret, self._recipe, self._log = row.secret, row.recipe, log

    def honours(self, lease: bytes, claim: Lease) -> bool:
        """Whether this run gave that lease."""
        return hmac.compare_digest(lease, claim.signed(self._secret))

    def holder(self, client: int) -> str | None:
        """The agent that spoke for a client."""
        return self._seats.get(client)

    def accepted(self, claim: Lease) -> tuple[str, bool] | None:
        """Digest of the update of a job, and whether it counted; ``None`` if none was accepted."""
        digest = self._log.update_of(self.id, claim.client, claim.number)
        return None if digest is None else (digest, (claim.client, claim.number) not in self._late)

    def told(self) -> list[pb.Round]:
        """Its rounds, as they are told to who watches."""
        with RunStore.open(self.directory) as store:
            return told(store)

    @cached_property
    def planned(self) -> int:
        """Rounds that it was to make."""
        return parse(tomllib.loads(self._recipe)).stop.rounds

    @cached_property
    def _facts(self) -> dict[str, list[list[int | str]]]:
        snapshot = self._log.snapshot(self.id)
        return {} if snapshot is None else dict(snapshot.facts)

    @cached_property
    def _seats(self) -> dict[int, str]:
        return {int(client): str(agent) for client, agent in self._facts.get("seats", [])}

    @cached_property
    def _late(self) -> set[tuple[int, int]]:
        return {(int(client), int(number)) for client, number in self._facts.get("late", [])}


def told(store: RunStore) -> list[pb.Round]:
    """The rounds of a record, as they are told to who watches."""
    rounds, jobs = store.rounds(), store.participation()
    asked = Counter(jobs["round"].tolist())
    folded = Counter(jobs["round"][jobs["outcome"] == "folded"].tolist())
    return [
        pb.Round(
            index=each.index,
            time=each.time,
            bytes_up=each.bytes_up,
            bytes_down=each.bytes_down,
            asked=asked[each.index],
            folded=folded[each.index],
            metrics=dict(each.metrics),
        )
        for each in rounds
    ]
