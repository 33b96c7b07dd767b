"""*When*: events in, commands out. A schedule sees names, counts and time as a number, nothing else.

A schedule is a pure state machine: ``on(progress, event, now)`` returns the next progress and the
commands, reads no clock and keeps nothing in ``self``. The same events give the same commands, in the
simulator as on a coordinator. It promises its engine that no client is dispatched while a dispatch of
it is open, and relies on the engine to end each dispatch in one :class:`Returned`, one :class:`Left`,
or one :class:`Recall` that discards.
"""

from __future__ import annotations

import itertools
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from hansa.core.errors import InputError
from hansa.core.randomness import generator, hashed
from hansa.core.values import made, replace


# Events: what an engine tells a schedule.
@dataclass(frozen=True)
class Joined:
    """Clients are there (again) and idle. A ``range`` says so of a million at the price of one."""

    clients: Sequence[int]


@dataclass(frozen=True)
class Left:
    """A client went away; what it was doing is lost."""

    client: int


@dataclass(frozen=True)
class Returned:
    """A client's update has arrived."""

    client: int


@dataclass(frozen=True)
class Tick:
    """The alarm set by :class:`Wake` with this token rang."""

    token: int


@dataclass(frozen=True)
class Aggregated:
    """The hub finished the last :class:`Aggregate`.

    ``score`` is the headline metric, if measured, and ``measured`` what else the step told: to a schedule
    that :attr:`~Schedule.measures`, ``train/loss`` before the step, ``update/mean`` and ``update/variance``.
    """

    score: float | None = None
    measured: Mapping[str, float] = field(default_factory=dict)


Event = Joined | Left | Returned | Tick | Aggregated


# Commands: what a schedule asks of its engine, to be obeyed in order.
@dataclass(frozen=True)
class Dispatch:
    """Send ``client`` a job of the algorithm's phase number ``phase``."""

    client: int
    phase: int = 0


@dataclass(frozen=True)
class Recall:
    """End a client's job now.

    ``partial`` asks for what the client has (a :class:`Returned` follows); otherwise the job, and any
    update of that client which waits, is thrown away.
    """

    client: int
    partial: bool = False


@dataclass(frozen=True)
class Aggregate:
    """Make one step of the hub from the updates of ``clients``, in this order.

    A client may stand there twice. Without clients the step is empty: an abandoned round.
    """

    clients: tuple[int, ...]
    phase: int = 0


@dataclass(frozen=True)
class Wake:
    """Send :class:`Tick` with this token at time ``at``."""

    at: float
    token: int


@dataclass(frozen=True)
class Stop:
    """The run is over."""

    reason: str


Command = Dispatch | Recall | Aggregate | Wake | Stop


@dataclass(frozen=True, kw_only=True)
class Stopping:
    """When a run ends: whichever comes first.

    Attributes
    ----------
    rounds: hub steps.
    time: virtual (or wall) seconds; checked when a step is made.
    target: value of the headline metric at which to stop.
    """

    rounds: int = 10
    time: float | None = None
    target: float | None = None

    def reached(self, rounds: int, now: float, score: float | None) -> str | None:
        """Why to stop now, or ``None``."""
        if self.target is not None and score is not None and score >= self.target:
            return f"reached the target {self.target:g}"
        if rounds >= self.rounds:
            return f"made {rounds} rounds"
        if self.time is not None and now >= self.time:
            return f"reached the time limit of {self.time:g} s"
        return None


@dataclass(frozen=True, eq=False)
class Members(Set[int]):
    """An immutable set of clients of which the next one is made quickly: a large set, and what changed since.

    Attributes
    ----------
    base: the set as it was.
    plus, minus: who came, who went; few.
    """

    base: frozenset[int] = frozenset()
    plus: frozenset[int] = frozenset()
    minus: frozenset[int] = frozenset()

    def __contains__(self, client: object) -> bool:
        return client in self.plus or (client in self.base and client not in self.minus)

    def __iter__(self) -> Iterator[int]:
        return iter((self.base - self.minus) | self.plus)

    def __hash__(self) -> int:
        return self._hash()

    def __len__(self) -> int:
        return len(self.base) + len(self.plus) - len(self.minus)

    @classmethod
    def _from_iterable(cls, clients: Iterable[int]) -> frozenset[int]:  # type: ignore[override]
        return frozenset(clients)

    def union(self, clients: Iterable[int]) -> Members:
        """With these, too."""
        new = frozenset(clients)
        return self.changed(self.plus | (new - self.base), self.minus - new)

    def difference(self, clients: Iterable[int]) -> Members:
        """Without these."""
        gone = frozenset(clients)
        return self.changed(self.plus - gone, self.minus | (gone & self.base))

    def changed(self, plus: Set[int], minus: Set[int]) -> Members:
        """The same base with other changes; they become a base of their own when they are many."""
        plus, minus = frozenset(plus), frozenset(minus)
        if (changes := len(plus) + len(minus)) <= _CHANGES or changes**2 <= len(self.base):
            return made(Members, base=self.base, plus=plus, minus=minus)
        return Members((self.base - minus) | plus)


_CHANGES = 64


@dataclass(frozen=True)
class Roster:
    """Who is there. No one is both away and busy; no event costs more than the clients that it names."""

    population: int = 0
    away: Members = field(default_factory=Members)
    busy: Members = field(default_factory=Members)

    def joined(self, event: Joined) -> Roster:
        """The roster after clients came (back). Numbers below theirs that never came are away."""
        clients = event.clients
        if not clients:
            return self
        ends = (clients[0], clients[-1]) if isinstance(clients, range) else clients
        first, last = min(ends), max(ends)
        away = self.away
        if away or last - first >= len(clients) or first > self.population:  # otherwise nobody is missing
            away = away.union(range(self.population, last + 1)).difference(clients)
        return replace(self, population=max(self.population, last + 1), away=away)

    def left(self, client: int) -> Roster:
        """The roster after a client went away; one that never came cannot."""
        if client >= self.population:
            return self
        return replace(self, away=self.away.union((client,)), busy=self.busy.difference((client,)))

    def dispatched(self, *clients: int) -> Roster:
        """The roster after jobs were sent."""
        return replace(self, busy=self.busy.union(clients))

    def ended(self, *clients: int) -> Roster:
        """The roster after jobs came back or were recalled."""
        return replace(self, busy=self.busy.difference(clients))

    @property
    def idle(self) -> int:
        """How many clients could be given a job."""
        return self.population - len(self.away) - len(self.busy)

    def draw(self, count: int, seed: int, purpose: str, number: int) -> tuple[int, ...]:
        """``count`` idle clients (or as many as there are), uniformly without replacement."""
        idle = self.idle
        count = min(count, idle)
        if not count:
            return ()
        if count == 1 and idle * _TRIES >= self.population:
            return (_met(self.population, self.busy, self.away, seed, purpose, number),)
        rng = generator(seed, purpose, number)
        if (count + self.population - idle) * 2 >= self.population:  # few are left: list them
            free = self._free()
            return tuple(free[i] for i in rng.permutation(len(free))[:count])
        chosen: dict[int, None] = {}  # many are left: draw until enough differ, whatever the population
        while len(chosen) < count:
            for client in rng.integers(self.population, size=count - len(chosen)).tolist():
                if client not in self.away and client not in self.busy:
                    chosen[client] = None
        return tuple(chosen)

    def _free(self) -> list[int]:
        """The idle clients, in order."""
        busy = self.busy
        if not self.away and len(busy.base) + len(busy.plus) == self.population:  # as where all are at work
            return sorted(busy.minus)
        taken = frozenset(self.away) | frozenset(busy)
        return [client for client in range(self.population) if client not in taken]


_TRIES = 16  # draws of a client that it may take, on average, to meet an idle one


def _met(
    population: int, busy: Container[int], away: Container[int], seed: int, purpose: str, number: int
) -> int:
    for attempt in itertools.count():
        client = hashed(seed, purpose, number, attempt) % population
        if client not in busy and client not in away:
            return client
    raise AssertionError


class Slots:
    """A roster in which one client ends a job and another begins one, time and again, changed in place.

    Attributes
    ----------
    taken: how many are at work.
    free: whether enough are idle for a few hashed draws to find one, as :meth:`Roster.draw` would.
    """

    def __init__(self, roster: Roster) -> None:
        self._roster, busy = roster, roster.busy
        self._base, self._plus, self._minus = busy.base, set(busy.plus), set(busy.minus)
        self.taken = len(busy)
        self.free = (roster.idle + 1) * _TRIES >= roster.population

    def __contains__(self, client: object) -> bool:
        """Whether a client is at work."""
        return client in self._plus or (client in self._base and client not in self._minus)

    def turn(self, ended: int, seed: int, purpose: str, number: int) -> int:
        """End a client's job; who is drawn to begin one."""
        if ended in self._base:
            self._minus.add(ended)
        else:
            self._plus.discard(ended)
        client = _met(self._roster.population, self, self._roster.away, seed, purpose, number)
        if client in self._base:
            self._minus.discard(client)
        else:
            self._plus.add(client)
        return client

    def roster(self) -> Roster:
        """The roster as it is now."""
        return replace(self._roster, busy=self._roster.busy.changed(self._plus, self._minus))


class Schedule(Protocol):
    """A decision maker without tensors, sockets or clocks."""

    @property
    def stop(self) -> Stopping:
        """When the run ends."""
        ...

    @property
    def updates_per_step(self) -> int | None:
        """Updates in one full hub step, where that is known: it bounds what a robust rule can stand."""
        ...

    @property
    def recalls(self) -> bool:
        """Whether jobs may be cut short or thrown away, so that work should not be done before it is due."""
        ...

    @property
    def synchronous(self) -> bool:
        """Whether every update of a step starts from the newest model."""
        ...

    @property
    def measures(self) -> bool:
        """Whether it decides by the size and the spread of the updates, which then are measured."""
        ...

    def start(self, seed: int) -> Any:
        """Progress before the first event."""
        ...

    def on(self, progress: Any, event: Event, now: float, /) -> tuple[Any, tuple[Command, ...]]:
        """Next progress and commands."""
        ...


class Arrivals(Protocol):
    """Progress on which arrivals are entered in place, one after the other."""

    def returned(self, client: int, now: float) -> tuple[Command, ...]:
        """The commands that :meth:`Schedule.on` gives for ``Returned(client)``."""
        ...

    def progress(self) -> Any:
        """The progress that it gives."""
        ...


@runtime_checkable
class Swift(Protocol):
    """A schedule that can do without a new progress for every arrival, of which there are most."""

    def arrivals(self, progress: Any, /) -> Arrivals:
        """Arrivals from here on."""
        ...


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What every schedule remembers.

    Attributes
    ----------
    seed: names the draws of clients.
    roster: who is there.
    step: hub steps made.
    returned: clients whose update waits for the next step, in order of arrival.
    aggregating: an :class:`Aggregate` is under way.
    stopped: :class:`Stop` was sent.
    """

    seed: int
    roster: Roster = field(default_factory=Roster)
    step: int = 0
    returned: tuple[int, ...] = ()
    aggregating: bool = False
    stopped: bool = False


def require(condition: bool, name: str, value: object, problem: str, remedy: str) -> None:
    """Raise an :class:`InputError` for ``schedule.<name>`` unless ``condition`` holds."""
    if not condition:
        raise InputError(f"schedule.{name}", value, problem, remedy)


__all__ = [
    "Aggregate",
    "Aggregated",
    "Arrivals",
    "Command",
    "Dispatch",
    "Event",
    "Joined",
    "Left",
    "Members",
    "Progress",
    "Recall",
    "Returned",
    "Roster",
    "Schedule",
    "Slots",
    "Stop",
    "Stopping",
    "Swift",
    "Tick",
    "Wake",
    "require",
]
