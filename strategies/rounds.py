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
    Slots,
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
        live = self.live(p)
        commands = live.on(event, now)
        return live.progress(), commands

    def live(self, p: RoundsProgress) -> LiveRounds:
        """The schedule from here on."""
        return LiveRounds(self, p)


class LiveRounds:
    """The progress, changed in place."""

    def __init__(self, schedule: Rounds, p: RoundsProgress) -> None:
        self._schedule, self._before, self._slots = schedule, p, Slots(p.roster)
        self._step, self._phase, self._wanted, self._returned = p.step, p.phase, p.wanted, list(p.returned)
        self._running, self._aggregating, self._stopped = p.running, p.aggregating, p.stopped

    def on(self, event: Event, now: float) -> tuple[Command, ...]:
        """Commands."""
        if self._stopped:
            return ()
        match event:
            case Returned() if event.client in self._slots.busy:
                self._slots.end(event.client)
                self._returned.append(event.client)
                return self._maybe_close()
            case Joined():
                self._slots.joined(event)
                return self._begin(now)
            case Left():
                self._slots.left(event.client)
                return self._maybe_close()
            case Tick() if self._running and not self._aggregating and event.token == self._token:
                return self._close()
            case Aggregated() if self._aggregating:
                return self._after_step(event.score, now)
            case _:
                return ()

    @property
    def _token(self) -> int:
        return self._step * self._schedule.phases + self._phase

    def _begin(self, now: float) -> tuple[Command, ...]:
        schedule = self._schedule
        if self._running or self._slots.idle < schedule.minimum:
            return ()
        # The product of 100 and 1.1 lies a little above 110, and 110 is meant.
        asked = math.ceil(schedule.cohort * schedule.over_selection * (1 - 1e-12))
        chosen = self._slots.draw(asked, self._before.seed, "cohort", self._step)
        self._running, self._phase = True, 0
        return self._dispatch(chosen, min(schedule.cohort, len(chosen)), now)

    def _dispatch(self, clients: tuple[int, ...], wanted: int, now: float) -> tuple[Command, ...]:
        self._wanted, self._returned = wanted, []
        self._slots.begin(clients)
        commands: tuple[Command, ...] = tuple(Dispatch(client, self._phase) for client in clients)
        if self._schedule.deadline is not None:
            commands += (Wake(now + self._schedule.deadline, self._token),)
        return commands

    def _maybe_close(self) -> tuple[Command, ...]:
        if not self._running or self._aggregating:
            return ()
        return self._close() if len(self._returned) >= self._wanted or not self._slots.busy else ()

    def _close(self) -> tuple[Command, ...]:
        late, returned = sorted(self._slots.busy), sorted(self._returned)
        for client in late:
            self._slots.end(client)
        if len(returned) < self._schedule.minimum:
            late, returned = late + returned, []
        self._returned, self._aggregating = returned, True
        return (*map(Recall, late), Aggregate(tuple(returned), self._phase))

    def _after_step(self, score: float | None, now: float) -> tuple[Command, ...]:
        schedule, self._aggregating = self._schedule, False
        if self._phase + 1 < schedule.phases and self._returned:
            here = self._slots.there(self._returned)
            if len(here) >= schedule.minimum:
                self._phase += 1
                return self._dispatch(here, len(here), now)
            # Too few are left for the next phase: abandon the round, by an empty step so that it counts.
            self._phase, self._returned, self._aggregating = schedule.phases - 1, [], True
            return (Aggregate((), self._phase),)
        self._step, self._running, self._returned = self._step + 1, False, []
        if reason := schedule.stop.reached(self._step, now, score):
            self._stopped = True
            return (Stop(reason),)
        return self._begin(now)

    def progress(self) -> RoundsProgress:
        """As :meth:`Rounds.on` gives it after the same events."""
        return replace(
            self._before,
            roster=self._slots.roster(),
            step=self._step,
            returned=tuple(self._returned),
            aggregating=self._aggregating,
            stopped=self._stopped,
            phase=self._phase,
            running=self._running,
            wanted=self._wanted,
        )
