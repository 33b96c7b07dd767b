"""Buffered asynchronous aggregation: a step whenever k updates have arrived.

Source: FedBuff, Nguyen et al., arXiv 2106.06639, Algorithm 1. With ``k = 1`` it steps at each arrival
(FedAsync's timing, arXiv 1903.03934).
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
    Roster,
    Slots,
    Stop,
    Stopping,
    Tick,
    Wake,
    require,
)
from hansa.core.values import made, replace


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
        require(
            self.deadline is None or 0 < self.deadline < math.inf,
            "deadline",
            self.deadline,
            "it is not a number of seconds in which somebody could return",
            "give positive seconds, or leave it out",
        )

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
        if p.stopped:
            return p, ()
        match event:
            case Joined():
                return self._go_on(p, p.roster.joined(event), p.returned, now)
            case Left(client):
                return self._go_on(p, p.roster.left(client), p.returned, now)
            case Returned(client) if client in p.roster.busy:
                return self._go_on(p, p.roster.ended(client), (*p.returned, client), now)
            case Tick():
                return self._go_on(replace(p, alarmed=False), p.roster, p.returned, now)
            case Aggregated(score) if p.aggregating:
                p = replace(p, step=p.step + 1, aggregating=False)
                if reason := self.stop.reached(p.step, now, score):
                    return replace(p, stopped=True), (Stop(reason),)
                return self._go_on(p, p.roster, p.returned, now)
            case _:
                return p, ()

    def arrivals(self, p: BufferedProgress) -> _Arrivals:
        """Arrivals from here on."""
        return _Arrivals(self, p)

    def _go_on(
        self, p: BufferedProgress, roster: Roster, returned: tuple[int, ...], now: float
    ) -> tuple[BufferedProgress, tuple[Command, ...]]:
        if p.aggregating:  # slots are refilled with the newer model, right after the step
            return replace(p, roster=roster, returned=returned), ()
        if len(returned) >= self.k:
            due, rest = returned[: self.k], returned[self.k :]
            return replace(p, roster=roster, returned=rest, aggregating=True), (Aggregate(due),)
        if self.deadline is not None:
            return self._in_time(p, roster, returned, now, self.deadline)
        p, sent = self._refill(p, roster, returned)
        return p, tuple(Dispatch(client) for client in sent)

    def _refill(
        self, p: BufferedProgress, roster: Roster, returned: tuple[int, ...]
    ) -> tuple[BufferedProgress, tuple[int, ...]]:
        chosen = roster.draw(self.concurrency - len(roster.busy), p.seed, "slot", p.sent)
        if chosen:
            roster = roster.dispatched(*chosen)
        return replace(p, roster=roster, returned=returned, sent=p.sent + len(chosen)), chosen

    def _in_time(
        self, p: BufferedProgress, roster: Roster, returned: tuple[int, ...], now: float, deadline: float
    ) -> tuple[BufferedProgress, tuple[Command, ...]]:
        open_ = [(at, client) for at, client in p.due if client in roster.busy]
        late = tuple(client for at, client in open_ if at <= now and client not in returned)
        p, chosen = self._refill(p, roster.ended(*late), returned)
        due = (
            *((at, client) for at, client in open_ if client not in late),
            *((now + deadline, client) for client in chosen),
        )
        alarm = () if p.alarmed else tuple(Wake(at, p.sent) for at, _ in due if at > now)[:1]
        p = replace(p, due=due, alarmed=p.alarmed or bool(alarm))
        return p, (*map(Recall, late), *map(Dispatch, chosen), *alarm)


class _Arrivals:
    """Slots that are refilled in place, as long as one is free at a time and the buffer is not full.

    Where there is a deadline, every arrival goes through the schedule.
    """

    def __init__(self, schedule: Buffered, p: BufferedProgress) -> None:
        self._schedule = schedule
        self._enter(p)

    def _enter(self, p: BufferedProgress) -> None:
        self._p, self._slots, self._returned, self._sent = p, Slots(p.roster), list(p.returned), p.sent
        steady = self._slots.taken == self._schedule.concurrency and self._slots.free
        swift = steady and not (p.aggregating or p.stopped or self._schedule.recalls)
        self._turns = self._schedule.k - len(p.returned) - 1 if swift else 0

    def returned(self, client: int, now: float) -> tuple[Command, ...]:
        if self._turns <= 0 or client not in self._slots:
            p, commands = self._schedule.on(self.progress(), Returned(client), now)
            self._enter(p)
            return commands
        self._turns -= 1
        chosen = self._slots.turn(client, self._p.seed, "slot", self._sent)
        self._returned.append(client)
        self._sent += 1
        return (made(Dispatch, client=chosen, phase=0),)

    def progress(self) -> BufferedProgress:
        return replace(self._p, roster=self._slots.roster(), returned=tuple(self._returned), sent=self._sent)
