"""*When*: events in, commands out. A schedule sees names, counts and time as a number, nothing else.

A schedule is a pure state machine: ``on(progress, event, now)`` returns the next progress and the
commands, reads no clock and keeps nothing in ``self``. The same events give the same commands, in the
simulator as on a coordinator. It promises its engine that no client is dispatched while a dispatch of
it is open, and relies on the engine to end each dispatch in one :class:`Returned`, one :class:`Left`,
or one :class:`Recall` that discards.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from hansa.core.errors import InputError
from hansa.core.randomness import among, generator
from hansa.core.values import replace, value


# Events: what an engine tells a schedule.
@value()
class Joined:
    """Clients are there (again) and idle. A ``range`` says so of a million at the price of one."""

    clients: Sequence[int]


@value()
class Left:
    """A client went away; what it was doing is lost."""

    client: int


@value()
class Returned:
    """A client's update has arrived."""

    client: int


@value()
class Tick:
    """The alarm set by :class:`Wake` with this token rang."""

    token: int


@value()
class Aggregated:
    """The hub finished the last :class:`Aggregate`.

    ``score`` is the headline metric, if measured, and ``measured`` what else the step told: to a schedule
    that :attr:`~Schedule.measures`, ``train/loss`` before the step, ``update/mean`` and ``update/variance``.
    """

    score: float | None = None
    measured: Mapping[str, float] = field(default_factory=dict)


Event = Joined | Left | Returned | Tick | Aggregated


# Commands: what a schedule asks of its engine, to be obeyed in order.
@value()
class Dispatch:
    """Send ``client`` a job of the algorithm's phase number ``phase``."""

    client: int
    phase: int = 0


@value()
class Recall:
    """End a client's job now.

    ``partial`` asks for what the client has (a :class:`Returned` follows); otherwise the job, and any
    update of that client which waits, is thrown away.
    """

    client: int
    partial: bool = False


@value()
class Aggregate:
    """Make one step of the hub from the updates of ``clients``, in this order.

    A client may stand there twice. Without clients the step is empty: an abandoned round.
    """

    clients: tuple[int, ...]
    phase: int = 0


@value()
class Wake:
    """Send :class:`Tick` with this token at time ``at``."""

    at: float
    token: int


@value()
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
            return Members(self.base, plus, minus)
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
        return _drawn(self, self.busy, self._free, count, seed, purpose, number)

    def _free(self) -> list[int]:
        """The idle clients, in order."""
        busy = self.busy
        if not self.away and len(busy.base) + len(busy.plus) == self.population:  # as where all are at work
            return sorted(busy.minus)
        taken = frozenset(self.away) | frozenset(busy)
        return [client for client in range(self.population) if client not in taken]


_TRIES = 16  # draws of a client that it may take, on average, to meet an idle one


def _drawn(
    roster: Roster,
    busy: Set[int],
    free: Callable[[], list[int]],
    count: int,
    seed: int,
    purpose: str,
    number: int,
) -> tuple[int, ...]:
    """:meth:`Roster.draw`; ``busy`` stands for the roster's, and ``free`` lists the idle in order."""
    population, away = roster.population, roster.away
    idle = population - len(away) - len(busy)
    count = min(count, idle)
    if not count:
        return ()
    if count == 1 and idle * _TRIES >= population:
        return (_met(population, busy, away, seed, purpose, number),)
    if idle == 1:
        return tuple(free())
    rng = generator(seed, purpose, number)
    if (count + population - idle) * 2 >= population:  # few are left: list them
        listed = free()
        return tuple(listed[i] for i in rng.permutation(len(listed))[:count])
    chosen: dict[int, None] = {}  # many are left: draw until enough differ, whatever the population
    while len(chosen) < count:
        for client in rng.integers(population, size=count - len(chosen)).tolist():
            if client not in away and client not in busy:
                chosen[client] = None
    return tuple(chosen)


def _met(
    population: int, busy: Container[int], away: Container[int], seed: int, purpose: str, number: int
) -> int:
    for attempt in itertools.count():
        client = among(seed, purpose, number, attempt) % population
        if client not in busy and client not in away:
            return client
    raise AssertionError


class Slots:
    """A roster that is changed in place, for schedules in which few clients begin or end at a time.

    Attributes
    ----------
    busy: who is at work.
    """

    def __init__(self, roster: Roster) -> None:
        self._there, self.busy = replace(roster, busy=Members()), set(roster.busy)
        self._idle: set[int] | None = None  # known once it was asked for

    def joined(self, event: Joined) -> None:
        """Clients came (back)."""
        self._there, self._idle = self._there.joined(event), None

    def left(self, client: int) -> None:
        """A client went away."""
        self._there, self._idle = self._there.left(client), None
        self.busy.discard(client)

    def begin(self, clients: Iterable[int]) -> None:
        """Jobs were sent."""
        self.busy.update(clients)
        if self._idle is not None:
            self._idle.difference_update(clients)

    def end(self, client: int) -> None:
        """A job came back."""
        self.busy.remove(client)
        if self._idle is not None:
            self._idle.add(client)

    @property
    def idle(self) -> int:
        """How many clients could be given a job."""
        return self._there.idle - len(self.busy)

    def there(self, clients: Iterable[int]) -> tuple[int, ...]:
        """Those of some clients who are not away."""
        return tuple(client for client in clients if client not in self._there.away)

    def draw(self, count: int, seed: int, purpose: str, number: int) -> tuple[int, ...]:
        """As :meth:`Roster.draw`."""
        return _drawn(self._there, self.busy, self._free, count, seed, purpose, number)

    def _free(self) -> list[int]:
        if self._idle is None:
            self._idle = set(self.roster()._free())
        return sorted(self._idle)

    def roster(self) -> Roster:
        """The roster as it is now."""
        return replace(self._there, busy=Members(frozenset(self.busy)))


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


class Live(Protocol):
    """A schedule under way: its progress is its own, and may be changed in place."""

    def on(self, event: Event, now: float, /) -> Sequence[Command]:
        """Commands."""
        ...

    def progress(self) -> Any:
        """The progress, as :meth:`Schedule.on` gives it after the same events."""
        ...


@runtime_checkable
class Swift(Protocol):
    """A schedule that needs no new progress for every event. Its ``on`` is one event of what is live."""

    def live(self, progress: Any, /) -> Live:
        """The schedule from here on."""
        ...


class _Stepwise:
    """Any schedule, live."""

    def __init__(self, schedule: Schedule, progress: Any) -> None:
        self._schedule, self._progress = schedule, progress

    def on(self, event: Event, now: float) -> Sequence[Command]:
        self._progress, commands = self._schedule.on(self._progress, event, now)
        return commands

    def progress(self) -> Any:
        return self._progress


def live(schedule: Schedule, progress: Any) -> Live:
    """The schedule from here on."""
    return schedule.live(progress) if isinstance(schedule, Swift) else _Stepwise(schedule, progress)


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


def require_deadline(seconds: float | None) -> None:
    """:func:`require` that a deadline, where there is one, leaves time."""
    require(
        seconds is None or 0 < seconds < math.inf,
        "deadline",
        seconds,
        "it is not a number of seconds in which somebody could return",
        "give positive seconds, or leave it out",
    )


__all__ = [
    "Aggregate",
    "Aggregated",
    "Command",
    "Dispatch",
    "Event",
    "Joined",
    "Left",
    "Live",
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
    "live",
    "require",
    "require_deadline",
]
