"""Synchronous rounds, with deadline, over-selection and dropouts.

Sources: FedAvg, McMahan et al., arXiv 1602.05629, Algorithm 1; deadline, over-selection and abandoned
rounds after Bonawitz et al., "Towards Federated Learning at Scale", arXiv 1902.01046, §2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

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
class RoundsProgress(Progress):
    """Where the current round stands. The round's open dispatches are the roster's busy clients."""

    phase: int = 0
    running: bool = False
    wanted: int = 0


@dataclass(frozen=True, kw_only=True)
class Rounds:
    """Draw a cohort, wait for it, make one step.

    Attributes
    ----------
    stop: when the run ends.
    cohort: updates wanted per round.
    over_selection: dispatch this many times the cohort and close the round with the first ``cohort`` returns.
    deadline: seconds after which a phase closes with whoever has returned; the others are recalled.
    minimum: fewest updates that make a step, and fewest idle clients that begin a round; a round that
        ends with fewer is abandoned: it counts, and the model stays.
    phases: tasks per round with a barrier between two (set by the algorithm).
    """

    stop: Stopping = field(default_factory=Stopping)
    cohort: int = 10
    over_selection: float = 1.0
    deadline: float | None = None
    minimum: int = 1
    phases: int = 1

    source: ClassVar[str] = "McMahan et al., arXiv 1602.05629; Bonawitz et al., arXiv 1902.01046"

    def __post_init__(self) -> None:
        require(self.cohort >= 1, "cohort", self.cohort, "a round needs a client", "set it to 1 or more")
        require(
            1 <= self.over_selection < math.inf,
            "over_selection",
            self.over_selection,
            "it is a factor ≥ 1",
            "use 1.3, say",
        )
        require_deadline(self.deadline)
        require(
            1 <= self.minimum <= self.cohort,
            "minimum",
            self.minimum,
            f"a round of {self.cohort} can never reach it" if self.minimum > self.cohort else "it is below 1",
            f"use 1 to {self.cohort}",
        )

    @property
    def updates_per_step(self) -> int:
        """The cohort."""
        return self.cohort

    @property
    def recalls(self) -> bool:
        """With a deadline or over-selection, yes."""
        return self.deadline is not None or self.over_selection > 1

    @property
    def synchronous(self) -> bool:
        """Always."""
        return True

    @property
    def measures(self) -> bool:
        """Never."""
        return False

    def start(self, seed: int) -> RoundsProgress:
        """No round is running."""
        return RoundsProgress(seed=seed)

    def on(self, p: RoundsProgress, event: Event, now: float) -> tuple[RoundsProgress, tuple[Command, ...]]:
        """Next progress and commands."""
        if p.stopped:
            return p, ()
        match event:
            case Joined():
                return self._begin(replace(p, roster=p.roster.joined(event)), now)
            case Left(client):
                return self._maybe_close(replace(p, roster=p.roster.left(client)))
            case Returned(client) if client in p.roster.busy:
                roster = p.roster.ended(client)
                return self._maybe_close(replace(p, roster=roster, returned=(*p.returned, client)))
            case Tick(token) if p.running and not p.aggregating and token == self._token(p):
                return self._close(p)
            case Aggregated(score) if p.aggregating:
                return self._after_step(p, score, now)
            case _:
                return p, ()

    def _token(self, p: RoundsProgress) -> int:
        return p.step * self.phases + p.phase

    def _begin(self, p: RoundsProgress, now: float) -> tuple[RoundsProgress, tuple[Command, ...]]:
        if p.running or p.roster.idle < self.minimum:
            return p, ()
        # The product of 100 and 1.1 lies a little above 110, and 110 is meant.
        asked = math.ceil(self.cohort * self.over_selection * (1 - 1e-12))
        chosen = p.roster.draw(asked, p.seed, "cohort", p.step)
        p = replace(p, running=True, phase=0, wanted=min(self.cohort, len(chosen)), returned=())
        return self._dispatch(p, chosen, now)

    def _dispatch(
        self, p: RoundsProgress, clients: tuple[int, ...], now: float
    ) -> tuple[RoundsProgress, tuple[Command, ...]]:
        p = replace(p, roster=p.roster.dispatched(*clients))
        commands: tuple[Command, ...] = tuple(Dispatch(client, p.phase) for client in clients)
        if self.deadline is not None:
            commands += (Wake(now + self.deadline, self._token(p)),)
        return p, commands

    def _maybe_close(self, p: RoundsProgress) -> tuple[RoundsProgress, tuple[Command, ...]]:
        if not p.running or p.aggregating:
            return p, ()
        if len(p.returned) >= p.wanted or not p.roster.busy:
            return self._close(p)
        return p, ()

    def _close(self, p: RoundsProgress) -> tuple[RoundsProgress, tuple[Command, ...]]:
        late = tuple(sorted(p.roster.busy))
        folded = tuple(sorted(p.returned)) if len(p.returned) >= self.minimum else ()
        thrown = late if folded else (*late, *sorted(p.returned))
        p = replace(p, roster=p.roster.ended(*late), returned=folded, aggregating=True)
        return p, (*(Recall(client) for client in thrown), Aggregate(folded, p.phase))

    def _after_step(
        self, p: RoundsProgress, score: float | None, now: float
    ) -> tuple[RoundsProgress, tuple[Command, ...]]:
        p = replace(p, aggregating=False)
        if p.phase + 1 < self.phases and p.returned:
            here = tuple(client for client in p.returned if client not in p.roster.away)
            if len(here) >= self.minimum:
                p = replace(p, phase=p.phase + 1, wanted=len(here), returned=())
                return self._dispatch(p, here, now)
            # Too few are left for the next phase: abandon the round, by an empty step so that it counts.
            p = replace(p, phase=self.phases - 1, returned=(), aggregating=True)
            return p, (Aggregate((), p.phase),)
        p = replace(p, step=p.step + 1, running=False, returned=())
        if reason := self.stop.reached(p.step, now, score):
            return replace(p, stopped=True), (Stop(reason),)
        return self._begin(p, now)
