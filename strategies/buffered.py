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
    Stop,
    Stopping,
    require,
)
from hansa.core.values import replace


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
                return self._go_on(replace(p, roster=p.roster.joined(event)))
            case Left(client):
                return self._go_on(replace(p, roster=p.roster.left(client)))
            case Returned(client) if client in p.roster.busy:
                p = replace(p, roster=p.roster.ended(client), returned=(*p.returned, client))
                return self._go_on(p)
            case Aggregated(score) if p.aggregating:
                p = replace(p, step=p.step + 1, aggregating=False)
                if reason := self.stop.reached(p.step, now, score):
                    return replace(p, stopped=True), (Stop(reason),)
                return self._go_on(p)
            case _:
                return p, ()

    def _go_on(self, p: BufferedProgress) -> tuple[BufferedProgress, tuple[Command, ...]]:
        if p.aggregating:  # slots are refilled with the newer model, right after the step
            return p, ()
        if len(p.returned) >= self.k:
            due, rest = p.returned[: self.k], p.returned[self.k :]
            return replace(p, returned=rest, aggregating=True), (Aggregate(due),)
        chosen = p.roster.draw(self.concurrency - len(p.roster.busy), p.seed, "slot", p.sent)
        p = replace(p, roster=p.roster.dispatched(*chosen), sent=p.sent + len(chosen))
        return p, tuple(Dispatch(client) for client in chosen)
