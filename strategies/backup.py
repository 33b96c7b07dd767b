"""Dynamic backup workers: of n at work, wait for the fastest k = n − b, and choose b anew in every round.

Source: Xu, Neglia, Sebastianelli, "Dynamic backup workers for parallel machine learning", arXiv 2004.14696.
The late are interrupted and restart from the new model. k is chosen for the largest gain per second,
``gain(k)/T(k)``:

* T(k), the time to the k-th update, is the mean of the last D times that it was seen;
* from k updates with mean ū and variance V: the squared norm of their expectation is ``N = ‖ū‖² − V/k``;
* a step ``c ū`` lowers the loss by ``c N/h − (L/2) c² (N + V/k)``: h is what local work multiplies a gradient
  by (step size times steps); c is 1, or k/n where absent clients count as zero (weights of frequency
  ``always``); the smoothness L is read off the decrease that the steps before have made, each
  counting as its length squared.

The estimators follow the paper's idea; its guards are not reproduced but for one: where no k promises a gain,
all are waited for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from hansa.core.schedule import Aggregated, Command, Event, Returned, require
from hansa.core.values import replace
from hansa.strategies.rounds import LiveRounds, Rounds, RoundsProgress


@dataclass(frozen=True, kw_only=True)
class BackupProgress(RoundsProgress):
    """What has been learnt of times and of updates.

    Attributes
    ----------
    began: when the round began.
    times: of each number of updates 1 … n, the last seconds that it took to have so many.
    powers, variances: the last estimates of N and V.
    bends: of the last steps, what they fell short of a plane, and what an L of one would have cost them.
    loss, last: the training loss before the last step, and of how many updates that was made.
    """

    began: float = 0.0
    times: tuple[tuple[float, ...], ...] = ()
    powers: tuple[float, ...] = ()
    variances: tuple[float, ...] = ()
    bends: tuple[tuple[float, float], ...] = ()
    loss: float | None = None
    last: int = 0


@dataclass(frozen=True, kw_only=True)
class Backup(Rounds):
    """Rounds that close with the fastest k of the cohort; k is chosen online.

    Attributes
    ----------
    cohort: clients at work, n.
    window: rounds D over which estimates are averaged.
    step_size: h (set from the clients' work).
    proportional: whether a step of k updates is k/n as long (set from the weights).
    """

    window: int = 20
    step_size: float = 1.0
    proportional: bool = False

    source: ClassVar[str] = "Xu et al., arXiv 2004.14696"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.window >= 1, "window", self.window, "it holds no estimate", "use 1 or more")
        require(
            self.over_selection == 1,
            "over_selection",
            self.over_selection,
            "how many are not waited for is what this schedule chooses",
            'leave it out, or use schedule.name = "rounds"',
        )
        require(
            self.phases == 1,
            "name",
            "backup",
            "the algorithm's rounds have several phases, which must meet the same clients",
            'use schedule.name = "rounds"',
        )

    @property
    def recalls(self) -> bool:
        """Those whom the round does not wait for."""
        return True

    @property
    def measures(self) -> bool:
        """The choice weighs the updates' variance against their mean."""
        return True

    def start(self, seed: int) -> BackupProgress:
        """Nothing is known."""
        return BackupProgress(seed=seed)

    def live(self, p: RoundsProgress) -> LiveRounds:
        """The schedule from here on."""
        assert isinstance(p, BackupProgress)
        return _Live(self, p)

    def timed(self, p: BackupProgress, before: int, seconds: float) -> BackupProgress:
        """After one more update than ``before`` was there within so many seconds."""
        times = [*p.times, *((),) * (before + 1 - len(p.times))]
        times[before] = (*times[before], seconds)[-self.window :]
        return replace(p, times=tuple(times))

    def learnt(self, p: BackupProgress, k: int, measured: Mapping[str, float]) -> BackupProgress:
        """After a step of k updates."""
        loss = measured.get("train/loss")
        if loss is None or "update/mean" not in measured:
            return p
        bends = p.bends
        if p.loss is not None and p.powers:  # the step before made this loss of that one
            power, variance, c = p.powers[-1], p.variances[-1], self._reach(p.last)
            short = c * power / self.step_size - (p.loss - loss)
            cost = c * c * (power + variance / p.last) / 2
            if cost > 0:
                bends = (*bends, (short, cost))[-self.window :]
        # One update tells nothing of a variance; to take it for zero would keep k at 1 for good.
        variance = measured["update/variance"] if k > 1 or not p.variances else _mean(p.variances)
        power = measured["update/mean"] - variance / k
        return replace(
            p,
            powers=(*p.powers, power)[-self.window :],
            variances=(*p.variances, variance)[-self.window :],
            bends=bends,
            loss=loss,
            last=k,
        )

    def _reach(self, k: int) -> float:
        return k / self.cohort if self.proportional else 1.0

    def choice(self, p: BackupProgress) -> int:
        """k of the next round: everybody while too little is known."""
        if not p.bends:
            return self.cohort
        # Single estimates below zero count as they are: were they cut off, the mean would be too large.
        power, variance = max(_mean(p.powers), 0.0), _mean(p.variances)
        bend = max(sum(short for short, _ in p.bends) / sum(cost for _, cost in p.bends), 0.0)
        best, rate, seconds = self.cohort, 0.0, 0.0
        for k, seen in enumerate(p.times[: self.cohort], start=1):
            seconds = max(seconds, _mean(seen))  # means over unlike rounds need not rise with k
            if k < self.minimum:
                continue
            c = self._reach(k)
            gain = c * power / self.step_size - bend / 2 * c * c * (power + variance / k)
            if gain > rate * seconds:
                best, rate = k, gain / seconds if seconds > 0 else gain
        return best


class _Live(LiveRounds):
    """What is learnt stands in the progress that the round began with."""

    def __init__(self, schedule: Backup, p: BackupProgress) -> None:
        super().__init__(schedule, p)
        self._backup, self._known = schedule, p

    def on(self, event: Event, now: float) -> tuple[Command, ...]:
        count = len(self._returned)
        match event:
            case Returned() if event.client in self._slots.busy and not self._stopped:
                self._know(self._backup.timed(self._known, count, now - self._known.began))
            case Aggregated() if self._aggregating and count:
                self._know(self._backup.learnt(self._known, count, event.measured))
        return super().on(event, now)

    def _begin(self, now: float) -> tuple[Command, ...]:
        before = self._running
        commands = super()._begin(now)
        if self._running and not before:
            self._know(replace(self._known, began=now))
            self._wanted = min(self._backup.choice(self._known), self._wanted)
        return commands

    def _know(self, known: BackupProgress) -> None:
        self._before = self._known = known


def _mean(values: tuple[float, ...]) -> float:
    return sum(values) / len(values)
