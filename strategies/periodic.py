"""A step at every tick of a fixed clock, from whatever has arrived, or from clients recalled in mid-work.

Sources: FedFix, Fraboni et al., arXiv 2206.10189 (a client that returns inside a window contributes at
the window's end and restarts there); recall of a random sample in mid-work as in FAVANO,
arXiv 2305.16099.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

from hansa.core.randomness import generator
from hansa.core.schedule import (
    Aggregate,
    Aggregated,
    Command,
    Dispatch,
    Event,
    Joined,
    Left,
    Progress,
    Recall,
    Returned,
    Stop,
    Stopping,
    Tick,
    Wake,
    require,
    require_deadline,
)
from hansa.core.values import replace


@dataclass(frozen=True, kw_only=True)
class PeriodicProgress(Progress):
    """``contacted``: recalled at the moment ``at`` and awaited; ``ticking``: the first alarm is set."""

    contacted: frozenset[int] = frozenset()
    at: float = 0.0
    ticking: bool = False


@dataclass(frozen=True, kw_only=True)
class Periodic:
    """Everybody trains all the time; the hub steps every ``interval`` seconds.

    Attributes
    ----------
    stop: when the run ends.
    interval: seconds between two ticks, Δt. A tick for which nothing has arrived makes no step.
    recall: at each tick, contact this many clients drawn at random, finished or not, and take what they
        have; without it the step takes whoever has finished.
    minimum: fewest updates that make a step; where clients were lost and there are fewer, these wait.
    deadline: seconds after which, at the next tick, a contacted client that keeps silent is not waited for:
        its job is thrown away and it is given another. Without, the clock waits.
    """

    stop: Stopping = field(default_factory=Stopping)
    interval: float = 10.0
    recall: int | None = None
    minimum: int = 1
    deadline: float | None = None

    source: ClassVar[str] = "Fraboni et al., arXiv 2206.10189"

    def __post_init__(self) -> None:
        require(
            0 < self.interval < math.inf,
            "interval",
            self.interval,
            "the clock would stand still",
            "give seconds > 0",
        )
        require(
            self.recall is None or self.recall >= 1,
            "recall",
            self.recall,
            "no client would ever be contacted",
            "set it to 1 or more, or leave it out",
        )
        require(
            1 <= self.minimum <= (self.recall or self.minimum),
            "minimum",
            self.minimum,
            "it is below 1" if self.minimum < 1 else f"a step of {self.recall} can never reach it",
            f"use 1 to {self.recall}" if self.recall else "use 1 or more",
        )
        require(
            self.deadline is None or self.recall is not None,
            "deadline",
            self.deadline,
            "nobody is waited for",
            "leave it out",
        )
        require_deadline(self.deadline)

    @property
    def updates_per_step(self) -> int | None:
        """Known only with ``recall``."""
        return self.recall

    @property
    def recalls(self) -> bool:
        """With ``recall``, yes."""
        return self.recall is not None

    @property
    def synchronous(self) -> bool:
        """Never."""
        return False

    @property
    def measures(self) -> bool:
        """Never."""
        return False

    def start(self, seed: int) -> PeriodicProgress:
        """The clock stands."""
        return PeriodicProgress(seed=seed)

    def on(
        self, p: PeriodicProgress, event: Event, now: float
    ) -> tuple[PeriodicProgress, tuple[Command, ...]]:
        """Next progress and commands."""
        if p.stopped:
            return p, ()
        match event:
            case Joined(clients):
                waiting = p.roster.busy | p.contacted | set(p.returned)
                p, sent = self._dispatch(
                    replace(p, roster=p.roster.joined(event)),
                    [client for client in clients if client not in waiting],
                )
                if p.ticking:
                    return p, sent
                return replace(p, ticking=True), (*sent, Wake(now + self.interval, 1))
            case Left(client):
                p = replace(p, roster=p.roster.left(client), contacted=p.contacted - {client})
                return self._maybe_step(p)
            case Returned(client) if client in p.roster.busy:
                p = replace(p, roster=p.roster.ended(client), returned=(*p.returned, client))
                return self._maybe_step(p)
            case Tick(token):
                alarm = Wake(now + self.interval, token + 1)
                p, commands = self._tick(p, token, now)
                return p, (*commands, alarm)
            case Aggregated(score) if p.aggregating:
                return self._after_step(p, score, now)
            case _:
                return p, ()

    def _tick(
        self, p: PeriodicProgress, token: int, now: float
    ) -> tuple[PeriodicProgress, tuple[Command, ...]]:
        if p.aggregating or p.contacted:  # the last step is still under way: skip this tick
            late = self.deadline is not None and not p.aggregating and now - p.at >= self.deadline
            return self._without(p, sorted(p.contacted & p.roster.busy)) if late else (p, ())
        if self.recall is None:
            return self._step(p, p.returned)
        candidates = sorted(p.roster.busy | set(p.returned))
        order = generator(p.seed, "contact", token).permutation(len(candidates))[: self.recall]
        p = replace(p, contacted=frozenset(candidates[i] for i in order), at=now)
        recalled = tuple(Recall(client, partial=True) for client in sorted(p.contacted & p.roster.busy))
        p, commands = self._maybe_step(p)
        return p, (*recalled, *commands)

    def _without(
        self, p: PeriodicProgress, silent: list[int]
    ) -> tuple[PeriodicProgress, tuple[Command, ...]]:
        """Go on with those that have answered."""
        roster = p.roster.ended(*silent)
        p, sent = self._dispatch(replace(p, roster=roster, contacted=p.contacted - {*silent}), silent)
        p, step = self._maybe_step(p)
        return p, (*map(Recall, silent), *sent, *step)

    def _maybe_step(self, p: PeriodicProgress) -> tuple[PeriodicProgress, tuple[Command, ...]]:
        if p.aggregating or not p.contacted or p.contacted & p.roster.busy:
            return p, ()
        return self._step(p, tuple(client for client in p.returned if client in p.contacted))

    def _step(
        self, p: PeriodicProgress, clients: tuple[int, ...]
    ) -> tuple[PeriodicProgress, tuple[Command, ...]]:
        if len(clients) < self.minimum:
            return replace(p, contacted=frozenset()), ()
        rest = tuple(client for client in p.returned if client not in clients)
        p = replace(p, returned=rest, contacted=frozenset(clients), aggregating=True)
        return p, (Aggregate(tuple(sorted(clients))),)

    def _after_step(
        self, p: PeriodicProgress, score: float | None, now: float
    ) -> tuple[PeriodicProgress, tuple[Command, ...]]:
        again = sorted(p.contacted - p.roster.away)
        p = replace(p, step=p.step + 1, aggregating=False, contacted=frozenset())
        if reason := self.stop.reached(p.step, now, score):
            return replace(p, stopped=True), (Stop(reason),)
        return self._dispatch(p, again)

    def _dispatch(
        self, p: PeriodicProgress, clients: list[int]
    ) -> tuple[PeriodicProgress, tuple[Command, ...]]:
        p = replace(p, roster=p.roster.dispatched(*clients))
        return p, tuple(Dispatch(client) for client in clients)
