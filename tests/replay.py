"""A coordinator's machine without a network: a script says when updates arrive, after how many steps.

Scripts are written by hand, or are what a simulator recorded of a run (:func:`recorded`).
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

from hansa.core.algorithm import Job
from hansa.core.store import Round
from hansa.core.trees import Tree
from hansa.core.wire.tensors import pack, unpack
from hansa.server.events import Event
from hansa.server.jobs import Open
from hansa.server.machine import Machine
from hansa.strategies.catalog import Federation
from hansa.strategies.local import Data, Work, train


class Return(NamedTuple):
    """An update arrives ``at`` seconds; after fewer steps than were planned, because it was recalled."""

    at: float
    steps: int


Script = Mapping[int, Sequence[Return | None]]  # client -> what becomes of its jobs, one after the other


def recorded(rounds: Iterable[Round]) -> Script:
    """Who returned when, by the record of a run; thrown away jobs do not return."""
    jobs = [each for done in rounds for each in done.participants]
    script: dict[int, list[Return | None]] = {}
    for job in sorted(jobs, key=lambda each: each.dispatched):
        returned = Return(job.returned, job.steps) if job.outcome == "folded" else None
        script.setdefault(job.client, []).append(returned)
    return script


class Replay:
    """Plays a script, to the end of the run or ``until`` then.

    Attributes
    ----------
    rounds: as the machine told them. models: after each of them.
    """

    def __init__(self, federation: Federation, script: Script, until: float) -> None:
        self._f, self._script = federation, script
        self._data = Data(federation, federation.recipe.seed)
        self.machine = Machine(federation, _absent, lambda hub: ({}, None))
        self.rounds: list[Round] = []
        self.models: list[Tree] = []
        self.private: dict[int, Tree] = {}
        self._due: list[tuple[float, int, Open, int]] = []  # at, order of dispatch, job, steps
        self._order = itertools.count()
        seats = {str(client): "agent" for client in range(federation.clients)}
        self._tell(0.0, kind="joined", body={"seats": seats})
        while self.machine.ended is None and (self._due or self.machine.alarms):
            at, token = min(((at, token) for token, at in self.machine.alarms.items()), default=(math.inf, 0))
            at = round(at, 6)  # the simulator's clock counts microseconds
            if self._due and self._due[0][0] <= at:  # arrivals belong to the tick
                self._arrive(*heapq.heappop(self._due))
            elif at <= until:
                self._tell(at, kind="tick", body={"token": token})
            else:
                break

    def _tell(self, at: float, **facts: Any) -> None:
        effects = self.machine.apply(Event(seq=self.machine.seq + 1, at=at, **facts))
        self.rounds += effects.rounds
        self.models += [dict(self.machine.hub.model()) for _ in effects.rounds]
        for job in effects.jobs:
            planned = self._f.algorithm.work(self._f.work, job.phase).count(
                int(self._f.data.train_shards.sizes[job.client]),
                seed=self._f.recipe.seed,
                client=job.client,
                number=job.number,
            )
            told = self._told(job)
            if told is not None and told.steps == planned:
                heapq.heappush(self._due, (told.at, next(self._order), job, told.steps))
        for job, partial in effects.recalls:
            told = self._told(job)
            if partial and told is not None:
                assert told.at == self.machine.now
                heapq.heappush(self._due, (told.at, next(self._order), job, told.steps))

    def _told(self, job: Open) -> Return | None:
        mine = self._script.get(job.client, ())
        return mine[job.number] if job.number < len(mine) else None

    def _arrive(self, at: float, _: int, job: Open, steps: int) -> None:
        f, client = self._f, job.client
        kept = self.private.get(client, f.algorithm.private(f.task))
        sent = Job(job.number, job.phase, unpack(job.packed.data, job.packed.tensors))
        made = train(self._data, Work(client, sent, kept), halt=lambda done: done == steps)
        assert made.steps == steps
        self.private[client] = made.private
        packed = pack(made.update)
        body = {
            "digest": packed.digest,
            "examples": int(f.data.train_shards.sizes[client]),
            "steps": steps,
            "loss": made.loss if steps else None,
            "agent": "agent",
        }
        tree = unpack(packed.data, job.expected)
        self._tell(at, kind="update", client=client, number=job.number, body=body, tree=tree)


def _absent(digest: str, tensors: Sequence[Any]) -> NoReturn:
    raise AssertionError(f"update {digest} came with its event")
