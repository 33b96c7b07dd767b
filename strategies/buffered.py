"""Buffered asynchronous aggregation: a step whenever k updates have arrived.

Source: FedBuff, Nguyen et al., arXiv 2106.06639, Algorithm 1. With ``k = 1`` it steps at each arrival
(FedAsync's timing, arXiv 1903.03934).
"""

from __future__ import annotations

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
    Returned,
    Roster,
    Slots,
    Stop,
    Stopping,
    require,
)
from hansa.core.values import made, replace


@dataclass(frozen=True, kw_only=True)
class BufferedProgress(Progress):
    """``returned`` is the buffer; ``sent`` counts dispatches and names their draws."""

    sent: int = 0


@dataclass(frozen=True, kw_only=True)
class Buffered:
    """Keep a number of clients in flight; step when the buffer is full.

    Attributes
    ----------
    stop: when the run ends.
    k: buffer size K.
    concurrency: clients in flight M_c; a free slot is refilled at once with a random idle client.
    """

    stop: Stopping = field(default_factory=Stopping)
    k: int = 10
    concurrency: int = 20

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

    @property
    def updates_per_step(self) -> int:
        """The buffer's size."""
        return self.k

    @property
    def recalls(self) -> bool:
        """Never."""
        return False

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
                return self._go_on(p, p.roster.joined(event), p.returned)
            case Left(client):
                return self._go_on(p, p.roster.left(client), p.returned)
            case Returned(client) if client in p.roster.busy:
                return self._go_on(p, p.roster.ended(client), (*p.returned, client))
            case Aggregated(score) if p.aggregating:
                p = replace(p, step=p.step + 1, aggregating=False)
                if reason := self.stop.reached(p.step, now, score):
                    return replace(p, stopped=True), (Stop(reason),)
                return self._go_on(p, p.roster, p.returned)
            case _:
                return p, ()

    def arrivals(self, p: BufferedProgress) -> _Arrivals:
        """Arrivals from here on."""
        return _Arrivals(self, p)

    def _go_on(
        self, p: BufferedProgress, roster: Roster, returned: tuple[int, ...]
    ) -> tuple[BufferedProgress, tuple[Command, ...]]:
        if p.aggregating:  # slots are refilled with the newer model, right after the step
            return replace(p, roster=roster, returned=returned), ()
        if len(returned) >= self.k:
            due, rest = returned[: self.k], returned[self.k :]
            return replace(p, roster=roster, returned=rest, aggregating=True), (Aggregate(due),)
        chosen = roster.draw(self.concurrency - len(roster.busy), p.seed, "slot", p.sent)
        if chosen:
            roster = roster.dispatched(*chosen)
        p = replace(p, roster=roster, returned=returned, sent=p.sent + len(chosen))
        return p, tuple(Dispatch(client) for client in chosen)


class _Arrivals:
    """Slots that are refilled in place, as long as one is free at a time and the buffer is not full."""

    def __init__(self, schedule: Buffered, p: BufferedProgress) -> None:
        self._schedule = schedule
        self._enter(p)

    def _enter(self, p: BufferedProgress) -> None:
        self._p, self._slots, self._returned, self._sent = p, Slots(p.roster), list(p.returned), p.sent
        steady = self._slots.taken == self._schedule.concurrency and self._slots.free
        self._turns = (
            0 if p.aggregating or p.stopped or not steady else self._schedule.k - len(p.returned) - 1
        )

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
