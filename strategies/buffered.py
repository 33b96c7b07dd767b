"""Buffered asynchronous aggregation: a step whenever k updates have arrived.

Source: FedBuff, Nguyen et al., arXiv 2106.06639, Algorithm 1. With ``k = 1`` it steps at each arrival
(FedAsync's timing, arXiv 1903.03934).
"""

from __future__ import annotations

import itertools
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
class BufferedProgress(Progress):
    """``returned`` is the buffer; ``sent`` counts dispatches and names their draws.

    With a deadline ``due`` holds (moment, client) of the jobs under way, oldest first; ``alarmed``: an alarm
    is set.
    """

    sent: int = 0
    due: tuple[tuple[float, int], ...] = ()
    alarmed: bool = False


@dataclass(frozen=True, kw_only=True)
class Buffered:
    """Keep a number of clients in flight; step when the buffer is full.

    Attributes
    ----------
    stop: when the run ends.
    k: buffer size K.
    concurrency: clients in flight M_c; a free slot is refilled at once with a random idle client.
    deadline: seconds after which a job that has not returned is thrown away and its slot refilled; that of a
        client whose last update waits in the buffer after the step that takes it. Without, a slot waits.
    """

    stop: Stopping = field(default_factory=Stopping)
    k: int = 10
    concurrency: int = 20
    deadline: float | None = None

    source: ClassVar[str] = "Nguyen et al., arXiv 2106.06639"

    def __post_init__(self) -> None:
        require(self.k >= 1, "k", self.k, "the buffer holds nothing", "set it to 1 or more")
        require(
            self.concurrency >= self.k,
            "concurrency",
            self.concurrency,
            f"fewer clients in flight than the buffer of {self.k} holds, so steps wait for restarts",
            f"set it to {self.k} or more, or k to {max(self.concurrency, 1)} or less",
        )
        require_deadline(self.deadline)

    @property
    def updates_per_step(self) -> int:
        """The buffer's size."""
        return self.k

    @property
    def recalls(self) -> bool:
        """With a deadline, yes."""
        return self.deadline is not None

    @property
    def synchronous(self) -> bool:
        """Never."""
        return False

    @property
    def measures(self) -> bool:
        """Never."""
        return False

    def start(self, seed: int) -> BufferedProgress:
        """Nobody is in flight."""
        return BufferedProgress(seed=seed)

    def on(
        self, p: BufferedProgress, event: Event, now: float
    ) -> tuple[BufferedProgress, tuple[Command, ...]]:
        """Next progress and commands."""
        live = self.live(p)
        commands = live.on(event, now)
        return live.progress(), commands

    def live(self, p: BufferedProgress) -> _Live:
        """The schedule from here on."""
        return _Live(self, p)


class _Live:
    """The progress, changed in place."""

    def __init__(self, schedule: Buffered, p: BufferedProgress) -> None:
        self._schedule, self._before, self._slots = schedule, p, Slots(p.roster)
        self._step, self._sent, self._returned = p.step, p.sent, list(p.returned)
        self._aggregating, self._stopped, self._alarmed = p.aggregating, p.stopped, p.alarmed
        self._due = {client: at for at, client in p.due}  # oldest first

    def on(self, event: Event, now: float) -> tuple[Command, ...]:
        if self._stopped:
            return ()
        match event:
            case Returned() if event.client in self._slots.busy:
                self._slots.end(event.client)
                self._due.pop(event.client, None)
                self._returned.append(event.client)
            case Aggregated() if self._aggregating:
                self._step, self._aggregating = self._step + 1, False
                if reason := self._schedule.stop.reached(self._step, now, event.score):
                    self._stopped = True
                    return (Stop(reason),)
            case Joined():
                self._slots.joined(event)
            case Left():
                self._slots.left(event.client)
                self._due.pop(event.client, None)
            case Tick():
                self._alarmed = False
            case _:
                return ()
        return self._go_on(now)

    def _go_on(self, now: float) -> tuple[Command, ...]:
        if self._aggregating:  # slots are refilled with the newer model, right after the step
            return ()
        k, deadline = self._schedule.k, self._schedule.deadline
        if len(self._returned) >= k:
            due, self._returned = tuple(self._returned[:k]), self._returned[k:]
            self._aggregating = True
            return (Aggregate(due),)
        if deadline is None:
            return tuple(map(Dispatch, self._refill()))
        late = self._late(now)
        chosen = self._refill()
        self._due |= dict.fromkeys(chosen, now + deadline)
        return (*map(Recall, late), *map(Dispatch, chosen), *self._alarm(now))

    def _refill(self) -> tuple[int, ...]:
        slots = self._slots
        free = self._schedule.concurrency - len(slots.busy)
        chosen = slots.draw(free, self._before.seed, "slot", self._sent)
        slots.begin(chosen)
        self._sent += len(chosen)
        return chosen

    def _late(self, now: float) -> list[int]:
        """Whose jobs end here: past their deadline, and nothing of their client waits in the buffer."""
        past = itertools.takewhile(lambda each: each[1] <= now, self._due.items())
        late = [client for client, _ in past if client not in self._returned]
        for client in late:
            self._slots.end(client)
            del self._due[client]
        return late

    def _alarm(self, now: float) -> tuple[Wake, ...]:
        """For the next job that may be late, unless an alarm is set."""
        coming = () if self._alarmed else (Wake(at, self._sent) for at in self._due.values() if at > now)
        alarm = tuple(itertools.islice(coming, 1))
        self._alarmed |= bool(alarm)
        return alarm

    def progress(self) -> BufferedProgress:
        return replace(
            self._before,
            roster=self._slots.roster(),
            step=self._step,
            returned=tuple(self._returned),
            aggregating=self._aggregating,
            stopped=self._stopped,
            sent=self._sent,
            due=tuple((at, client) for client, at in self._due.items()),
            alarmed=self._alarmed,
        )
