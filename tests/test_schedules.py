from __future__ import annotations

import heapq
import json
import math
import tracemalloc
from collections import Counter
from collections.abc import Sequence
from dataclasses import FrozenInstanceError, dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter
from scipy.stats import chi2

from hansa.core.errors import InputError
from hansa.core.schedule import (
    Aggregate,
    Aggregated,
    Command,
    Dispatch,
    Event,
    Joined,
    Left,
    Live,
    Recall,
    Returned,
    Roster,
    Schedule,
    Stop,
    Stopping,
    Tick,
    Wake,
    live,
)
from hansa.strategies.buffered import Buffered, BufferedProgress
from hansa.strategies.periodic import Periodic, PeriodicProgress
from hansa.strategies.rounds import Rounds, RoundsProgress

repeatable = settings(derandomize=True, deadline=None, database=None, max_examples=100)


# An engine without work: it keeps the books that a schedule's promises are about.


adapters: dict[type, TypeAdapter[Any]] = {
    kind: TypeAdapter(kind) for kind in (RoundsProgress, BufferedProgress, PeriodicProgress)
}


def through_json(progress: Any) -> Any:
    adapter = adapters[type(progress)]
    return adapter.validate_python(json.loads(json.dumps(adapter.dump_python(progress, mode="json"))))


@dataclass
class Engine:
    """Feeds events to a schedule, obeys its commands, and refuses those that break a promise."""

    schedule: Schedule
    seed: int = 0
    now: float = 0.0
    population: int = 0
    away: set[int] = field(default_factory=set)
    open: dict[int, int] = field(default_factory=dict)  # client -> phase of its dispatch
    sent: dict[int, float] = field(default_factory=dict)  # client -> when
    recalled: set[int] = field(default_factory=set)  # asked for what they have
    waiting: list[int] = field(default_factory=list)  # updates that arrived and are not used
    aggregating: Aggregate | None = None
    alarms: list[tuple[float, int]] = field(default_factory=list)
    steps: int = 0
    stopped: str | None = None
    progress: Any = None
    live: Live = field(init=False)
    commands: tuple[Command, ...] = ()

    def __post_init__(self) -> None:
        self.progress = self.schedule.start(self.seed)
        self.live = live(self.schedule, self.progress)

    @property
    def phases(self) -> int:
        return self.schedule.phases if isinstance(self.schedule, Rounds) else 1

    @property
    def idle(self) -> set[int]:
        return set(range(self.population)) - self.away - set(self.open)

    def feed(self, event: Event) -> None:
        before = repr(self.progress)
        progress, commands = self.schedule.on(self.progress, event, self.now)
        again = self.schedule.on(through_json(self.progress), event, self.now)
        assert again == (progress, commands)  # the same from a copy that went to disk and back
        assert repr(self.progress) == before
        assert self.stopped is None or not commands
        assert self.live.on(event, self.now) == commands  # in place, it says the same
        assert self.live.progress() == progress
        self.progress, self.commands = progress, commands
        for command in commands:
            self.obey(command)

    def obey(self, command: Command) -> None:
        assert self.stopped is None
        match command:
            case Dispatch(client, phase):
                assert client in self.idle
                assert 0 <= phase < self.phases
                self.open[client], self.sent[client] = phase, self.now
            case Recall(client, partial=True):
                assert client in self.open
                assert client not in self.recalled
                self.recalled.add(client)
            case Recall(client):
                assert client in self.open or client in self.waiting
                self.open.pop(client, None)
                self.recalled.discard(client)
                self.waiting = [each for each in self.waiting if each != client]
            case Aggregate(clients):
                assert self.aggregating is None
                assert not Counter(clients) - Counter(self.waiting)  # arrived, and not yet used
                for client in clients:
                    self.waiting.remove(client)
                self.aggregating = command
            case Wake(at, token):
                assert at > self.now
                heapq.heappush(self.alarms, (at, token))
            case Stop(reason):
                self.stopped = reason

    def said(self) -> tuple[Command, ...]:
        """The commands that the last event was answered with."""
        return self.commands

    # Events.

    def join(self, clients: Sequence[int]) -> None:
        last = max(clients)
        self.away |= set(range(self.population, last + 1))
        self.away -= set(clients)
        self.population = max(self.population, last + 1)
        self.feed(Joined(clients))

    def leave(self, client: int) -> None:
        self.away.add(client)
        self.open.pop(client, None)
        self.recalled.discard(client)
        self.feed(Left(client))

    def give_back(self, client: int) -> None:
        del self.open[client]
        self.recalled.discard(client)
        self.waiting.append(client)
        self.feed(Returned(client))

    def ring(self) -> None:
        at, token = heapq.heappop(self.alarms)
        self.now = max(self.now, at)
        self.feed(Tick(token))

    def let_pass(self, seconds: float) -> None:
        """Time goes on, up to the next alarm."""
        self.now = min([self.now + seconds, *(at for at, _ in self.alarms[:1])])

    def finish_step(self, score: float | None = None) -> None:
        done = self.aggregating
        assert done is not None
        self.aggregating = None
        whole = not done.clients or done.phase == self.phases - 1
        self.steps += whole
        due = self.schedule.stop.reached(self.steps, self.now, score) if whole else None
        self.feed(Aggregated(score))
        assert self.stopped == due
        assert self.progress.step == self.steps


# Random histories.

moments = st.sampled_from([0.0, 0.5, 1.0, 2.5])
scores = st.sampled_from([None, 0.1, 0.6, 0.95])


def moves(engine: Engine) -> list[str]:
    possible = ["wait", "join"]
    if engine.open:
        possible += ["return"] * 4
    if engine.population > len(engine.away):
        possible.append("leave")
    if engine.away:
        possible.append("rejoin")
    if engine.alarms:
        possible.append("ring")
    if engine.aggregating is not None:
        possible += ["finish"] * 2
    return possible


def move(engine: Engine, data: st.DataObject, prompt: bool) -> None:
    match data.draw(st.sampled_from(moves(engine)), label="move"):
        case "wait":
            engine.let_pass(data.draw(moments))
        case "join":
            first = engine.population + data.draw(st.integers(0, 2))
            some = range(first, first + data.draw(st.integers(1, 4)))
            engine.join(some if data.draw(st.booleans()) else tuple(reversed(some))[::2])
        case "return":
            engine.give_back(data.draw(st.sampled_from(sorted(engine.open))))
        case "leave":
            engine.leave(data.draw(st.sampled_from(sorted(set(range(engine.population)) - engine.away))))
        case "rejoin":
            back = data.draw(st.sets(st.sampled_from(sorted(engine.away)), min_size=1))
            engine.join(tuple(sorted(back)))
        case "ring":
            engine.ring()
        case "finish":
            engine.finish_step(data.draw(scores))
    while prompt and engine.aggregating is not None:
        engine.finish_step(data.draw(scores))


def drain(engine: Engine) -> None:
    """All are there and everything is answered: the run must reach its end, and never stall."""
    engine.join(range(max(engine.population, 6)))
    for _ in range(2_000):
        if engine.stopped is not None:
            return
        if engine.aggregating is not None:
            engine.finish_step()
        elif engine.open:
            engine.let_pass(0.5)
            engine.give_back(min(engine.open))
        else:
            engine.ring()
        if isinstance(engine.schedule, Periodic) and engine.alarms[0][0] <= engine.now + 2:
            engine.ring()
    pytest.fail("the schedule stalled")


@st.composite
def stoppings(draw: st.DrawFn) -> Stopping:
    return Stopping(
        rounds=draw(st.integers(1, 8)),
        time=draw(st.none() | st.sampled_from([3.0, 20.0])),
        target=draw(st.none() | st.just(0.9)),
    )


@st.composite
def rounds(draw: st.DrawFn) -> Rounds:
    cohort = draw(st.integers(1, 5))
    return Rounds(
        stop=draw(stoppings()),
        cohort=cohort,
        over_selection=draw(st.sampled_from([1.0, 1.3, 2.0])),
        deadline=draw(st.none() | st.sampled_from([1.0, 4.0])),
        minimum=draw(st.integers(1, cohort)),
        phases=draw(st.integers(1, 2)),
    )


@st.composite
def buffered(draw: st.DrawFn) -> Buffered:
    k = draw(st.integers(1, 4))
    deadline = draw(st.none() | st.sampled_from([1.0, 4.0]))
    return Buffered(stop=draw(stoppings()), k=k, concurrency=k + draw(st.integers(0, 3)), deadline=deadline)


@st.composite
def periodic(draw: st.DrawFn) -> Periodic:
    recall = draw(st.none() | st.integers(1, 4))
    deadline = draw(st.none() | st.sampled_from([1.0, 4.0])) if recall else None
    return Periodic(stop=draw(stoppings()), interval=2.0, recall=recall, deadline=deadline)


def histories(engine: Engine, data: st.DataObject) -> Any:
    """Play a random history; yields after every event."""
    prompt = data.draw(st.booleans(), label="steps are answered at once")
    engine.join(range(data.draw(st.integers(1, 8))))
    yield
    for _ in range(data.draw(st.integers(0, 40))):
        move(engine, data, prompt)
        yield
    drain(engine)


@repeatable
@given(rounds(), st.data())
def test_rounds_keep_their_promises(schedule: Rounds, data: st.DataObject) -> None:
    engine = Engine(schedule, seed=data.draw(st.integers(0, 3)))
    for _ in histories(engine, data):
        if engine.stopped is not None:
            continue
        if engine.aggregating is not None:  # late ones were recalled, and too few were thrown away
            assert not engine.open
            assert not engine.waiting
            size = len(engine.aggregating.clients)
            assert size == 0 or schedule.minimum <= size <= schedule.cohort
        elif not engine.open:
            assert len(engine.idle) < schedule.minimum
        assert len(set(engine.open.values())) <= 1


@repeatable
@given(buffered(), st.data())
def test_buffered_keeps_its_promises(schedule: Buffered, data: st.DataObject) -> None:
    engine = Engine(schedule, seed=data.draw(st.integers(0, 3)))
    for _ in histories(engine, data):
        if engine.stopped is not None:
            continue
        assert len(engine.open) <= schedule.concurrency
        if engine.aggregating is not None:
            assert len(engine.aggregating.clients) == schedule.k
        else:
            assert len(engine.waiting) < schedule.k
            assert len(engine.open) == schedule.concurrency or not engine.idle
            for client in engine.open.keys() - set(engine.waiting):
                assert engine.now <= engine.sent[client] + (schedule.deadline or math.inf)
        assert len(engine.alarms) <= (schedule.deadline is not None)


@repeatable
@given(periodic(), st.data())
def test_periodic_keeps_its_promises(schedule: Periodic, data: st.DataObject) -> None:
    engine = Engine(schedule, seed=data.draw(st.integers(0, 3)))
    for _ in histories(engine, data):
        if engine.stopped is not None:
            continue
        assert len(engine.alarms) == 1  # the clock goes on, whatever happens
        assert engine.alarms[0][0] % schedule.interval == 0
        assert len(set(engine.waiting)) == len(engine.waiting)  # once per contact
        folding = engine.aggregating.clients if engine.aggregating is not None else ()
        assert len(set(folding)) == len(folding) <= (schedule.recall or math.inf)
        # Everybody who is there is at work, or has an update that waits or is being folded.
        assert engine.idle <= set(engine.waiting) | set(folding)


@repeatable
@given(st.one_of(rounds(), buffered(), periodic()), st.data())
def test_abandoned_steps_and_the_clock_stop_a_run_too(schedule: Schedule, data: st.DataObject) -> None:
    engine = Engine(schedule)
    for _ in histories(engine, data):
        pass
    assert engine.stopped is not None
    assert engine.steps <= schedule.stop.rounds
    for event in (Joined(range(40)), Left(0), Returned(1), Tick(1), Aggregated(1.0)):
        assert schedule.on(engine.progress, event, engine.now)[1] == ()


@pytest.mark.parametrize("schedule", [Rounds(), Buffered(), Periodic()])
def test_schedules_and_progress_are_values(schedule: Schedule) -> None:
    progress, _ = schedule.on(schedule.start(0), Joined(range(30)), 0.0)
    for value in (schedule, progress, progress.roster):
        with pytest.raises(FrozenInstanceError):
            value.stop = None  # type: ignore[misc]
    hash(progress)  # all the way down


# Rounds, by hand.


def dispatched(commands: Sequence[Command]) -> list[int]:
    return [each.client for each in commands if isinstance(each, Dispatch)]


def started(schedule: Schedule, clients: int = 8, **more: Any) -> Engine:
    engine = Engine(schedule, **more)
    engine.join(range(clients))
    return engine


def test_a_round_closes_with_the_first_cohort_and_recalls_the_late() -> None:
    engine = started(Rounds(cohort=3, over_selection=1.6, stop=Stopping(rounds=2)))
    chosen = dispatched(engine.commands)
    assert len(chosen) == 5  # ⌈3 · 1.6⌉
    first = chosen[2:]
    for client in reversed(first):
        assert engine.aggregating is None
        engine.give_back(client)
    late = sorted(set(chosen) - set(first))
    assert engine.said() == (*map(Recall, late), Aggregate(tuple(sorted(first))))


@pytest.mark.parametrize(("cohort", "factor", "asked"), [(100, 1.1, 110), (10, 1.3, 13), (3, 1.01, 4)])
def test_over_selection_asks_for_the_next_whole_number(cohort: int, factor: float, asked: int) -> None:
    engine = started(Rounds(cohort=cohort, over_selection=factor), clients=200)
    assert len(dispatched(engine.commands)) == asked


def test_a_deadline_closes_with_whoever_returned() -> None:
    engine = started(Rounds(cohort=3, deadline=5.0, minimum=2))
    a, b, c = dispatched(engine.commands)
    engine.give_back(a)
    engine.let_pass(1.0)
    engine.give_back(b)
    engine.ring()
    assert engine.now == 5.0
    assert engine.said() == (Recall(c), Aggregate(tuple(sorted((a, b)))))


def test_a_round_below_its_minimum_is_abandoned_and_the_next_begins() -> None:
    engine = started(Rounds(cohort=3, deadline=5.0, minimum=2))
    a, b, c = dispatched(engine.commands)
    engine.give_back(a)
    engine.ring()
    assert set(engine.commands[:-1]) == {Recall(a), Recall(b), Recall(c)}
    assert engine.commands[-1] == Aggregate(())
    engine.finish_step()
    assert len(dispatched(engine.commands)) == 3
    assert Wake(10.0, 1) in engine.commands


def test_the_alarm_of_a_closed_round_does_not_end_the_next() -> None:
    engine = started(Rounds(cohort=2, deadline=5.0))
    for client in dispatched(engine.commands):
        engine.give_back(client)
    engine.finish_step()
    assert len(engine.alarms) == 2
    engine.ring()
    assert engine.said() == ()


def test_dropouts_close_a_round_when_nobody_is_left_to_wait_for() -> None:
    engine = started(Rounds(cohort=3))
    a, b, c = dispatched(engine.commands)
    engine.leave(b)
    engine.give_back(a)
    assert engine.said() == ()
    engine.leave(c)
    assert engine.said() == (Aggregate((a,)),)


def test_an_update_that_arrived_counts_even_if_its_client_left_since() -> None:
    engine = started(Rounds(cohort=2))
    a, b = dispatched(engine.commands)
    engine.give_back(a)
    engine.leave(a)
    engine.give_back(b)
    assert engine.said() == (Aggregate(tuple(sorted((a, b)))),)
    engine.finish_step()
    assert a not in dispatched(engine.commands)


def test_a_round_waits_for_its_minimum_and_takes_whom_there_is() -> None:
    engine = started(Rounds(cohort=4, minimum=3), clients=2)
    assert engine.said() == ()
    engine.join((2,))
    assert sorted(dispatched(engine.commands)) == [0, 1, 2]


def test_the_second_phase_keeps_the_clients_of_the_first() -> None:
    engine = started(Rounds(cohort=3, over_selection=1.5, phases=2, stop=Stopping(rounds=1)))
    a, b, c, *_ = dispatched(engine.commands)
    for client in (a, b, c):
        engine.give_back(client)
    assert isinstance(engine.aggregating, Aggregate)
    assert engine.aggregating.phase == 0
    engine.leave(b)
    engine.finish_step()
    assert engine.said() == tuple(Dispatch(client, 1) for client in sorted((a, c)))
    engine.give_back(c)
    engine.give_back(a)
    assert engine.said() == (Aggregate(tuple(sorted((a, c))), 1),)
    engine.finish_step()
    assert engine.stopped == "made 1 rounds"


@pytest.mark.parametrize("leaving", [2, 3])
def test_a_round_whose_clients_leave_between_two_phases_still_makes_its_step(leaving: int) -> None:
    # Otherwise the hub would count fewer rounds than the schedule.
    engine = started(Rounds(cohort=3, minimum=2, phases=2, stop=Stopping(rounds=1)))
    chosen = dispatched(engine.commands)
    for client in chosen:
        engine.give_back(client)
    for client in chosen[:leaving]:
        engine.leave(client)
    engine.finish_step()
    assert engine.said() == (Aggregate((), 1),)
    engine.finish_step()
    assert engine.stopped == "made 1 rounds"


def test_the_cohort_is_drawn_uniformly() -> None:
    rounds, clients, cohort = 3_000, 12, 3
    counts: Counter[int] = Counter()
    roster = Roster().joined(Joined(range(clients)))
    for step in range(rounds):
        drawn = roster.draw(cohort, 7, "cohort", step)
        assert len(set(drawn)) == cohort
        counts.update(drawn)
    expected = rounds * cohort / clients
    statistic = sum((counts[c] - expected) ** 2 / expected for c in range(clients))
    # Draws without replacement vary less: by (N − n)/(N − 1).
    assert chi2.sf(statistic * (clients - 1) / (clients - cohort), clients - 1) > 0.01
    assert roster.draw(cohort, 7, "cohort", 0) == roster.draw(cohort, 7, "cohort", 0)
    assert roster.draw(cohort, 7, "cohort", 0) != roster.draw(cohort, 8, "cohort", 0)


@pytest.mark.parametrize("away", [0, 7])
def test_both_ways_of_drawing_are_uniform(away: int) -> None:
    """Few free clients are listed, many are drawn by rejection."""
    roster = Roster().joined(Joined(range(10)))
    for client in range(away):
        roster = roster.left(client)
    counts = Counter(roster.draw(1, 3, "slot", n)[0] for n in range(2_000))
    assert set(counts) == set(range(away, 10))
    expected = 2_000 / (10 - away)
    assert chi2.sf(sum((n - expected) ** 2 / expected for n in counts.values()), 9 - away) > 0.01


def test_a_slot_goes_to_whoever_is_idle_however_clients_come_and_go() -> None:
    """The next client of a slot against a plain set of the idle, near full, in between and almost empty."""
    for concurrency in (40, 39, 20, 2):
        schedule = Buffered(k=1, concurrency=concurrency, stop=Stopping(rounds=10**6))
        progress, commands = schedule.on(schedule.start(5), Joined(range(40)), 0.0)
        busy, away = set(dispatched(commands)), set[int]()
        assert len(busy) == concurrency
        rng = np.random.default_rng(concurrency)
        for _ in range(300):
            event: Returned | Left | Joined = Returned(int(rng.choice(sorted(busy))))
            if away and rng.random() < 0.2:
                event = Joined((away.pop(),))
            elif rng.random() < 0.2:
                event = Left(int(rng.choice(sorted(set(range(40)) - away))))
                away.add(event.client)
            if not isinstance(event, Joined):
                busy.discard(event.client)
            progress, commands = schedule.on(progress, event, 0.0)
            sent = dispatched(commands)
            if any(isinstance(each, Aggregate) for each in commands):
                progress, commands = schedule.on(progress, Aggregated(), 0.0)
                sent = dispatched(commands)
            assert len(set(sent)) == len(sent)
            assert not (busy | away) & set(sent)
            busy |= set(sent)
            assert len(busy) == min(concurrency, 40 - len(away))
            assert set(progress.roster.busy) == busy
            assert set(progress.roster.away) == away


def test_a_cohort_out_of_a_million_costs_no_list_of_a_million() -> None:
    schedule = Rounds(cohort=50, over_selection=1.5, deadline=10.0)
    tracemalloc.start()
    try:
        progress, commands = schedule.on(schedule.start(0), Joined(range(1_000_000)), 0.0)
        for client in dispatched(commands):
            progress, commands = schedule.on(progress, Returned(client), 1.0)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert progress.aggregating
    assert peak < 1_000_000  # a list of the population alone would take 8 MB


# Roster.


def test_clients_below_a_newcomer_that_never_came_are_away() -> None:
    roster = Roster().joined(Joined((2, 4)))
    assert (roster.population, frozenset(roster.away)) == (5, frozenset({0, 1, 3}))
    roster = roster.joined(Joined(range(2)))
    assert (roster.population, frozenset(roster.away)) == (5, frozenset({3}))
    # Old and new ones in one event.
    roster = Roster(population=10).joined(Joined((2, 3, 12)))
    assert (roster.population, frozenset(roster.away)) == (13, frozenset({10, 11}))
    roster = Roster(population=3).joined(Joined(range(5, 3, -1)))
    assert (roster.population, frozenset(roster.away)) == (6, frozenset({3}))


def test_a_client_that_never_came_cannot_leave() -> None:
    roster = Roster(population=3).left(7)
    assert roster.idle == 3
    assert roster.joined(Joined((7,))).idle == 4


# Buffered, by hand.


def test_buffered_steps_on_each_kth_arrival_and_refills_with_the_newer_model() -> None:
    engine = started(Buffered(k=2, concurrency=3, stop=Stopping(rounds=2)))
    a, b, _ = dispatched(engine.commands)
    engine.give_back(a)
    assert len(dispatched(engine.commands)) == 1
    engine.give_back(b)
    assert engine.said() == (Aggregate((a, b)),)  # nobody is sent the old model
    engine.finish_step()
    assert len(dispatched(engine.commands)) == 1
    assert len(engine.open) == 3


def test_a_fast_client_may_stand_twice_in_the_buffer() -> None:
    engine = started(Buffered(k=2, concurrency=2), clients=2)
    engine.give_back(0)
    assert dispatched(engine.commands) == [0]
    engine.give_back(0)
    assert engine.said() == (Aggregate((0, 0)),)


def test_arrivals_during_a_step_wait_for_the_next() -> None:
    engine = started(Buffered(k=2, concurrency=4), clients=4)
    for client in (3, 1, 0, 2):
        engine.give_back(client)
    assert engine.aggregating == Aggregate((3, 1))
    engine.finish_step()
    assert engine.said() == (Aggregate((0, 2)),)


def test_every_refill_is_a_new_draw() -> None:
    engine = started(Buffered(k=20, concurrency=20), clients=1_000)
    drawn = dispatched(engine.commands)
    for _ in range(10):  # always the newest: it is idle again, and would be drawn again by the same draw
        engine.give_back(drawn[-1])
        drawn += dispatched(engine.commands)
    assert len(set(drawn)) == 30


def test_a_job_past_its_deadline_is_thrown_away_and_another_takes_its_slot() -> None:
    engine = started(Buffered(k=2, concurrency=2, deadline=5.0), clients=6)
    a, b = dispatched(engine.commands)
    assert engine.said()[-1] == Wake(5.0, 2)
    engine.let_pass(1.0)
    engine.give_back(a)
    (c,) = dispatched(engine.commands)
    engine.ring()
    assert engine.now == 5.0
    (d,) = dispatched(engine.commands)
    assert engine.said() == (Recall(b), Dispatch(d), Wake(6.0, 4))  # the alarm is for c, sent at 1
    engine.give_back(c)
    assert engine.said() == (Aggregate((a, c)),)


def test_a_deadline_does_not_take_the_update_that_waits() -> None:
    engine = started(Buffered(k=2, concurrency=2, deadline=5.0), clients=2)
    engine.give_back(0)
    assert dispatched(engine.commands) == [0]
    engine.ring()  # 0 and 1 are late, but a recall would throw away what 0 sent before, too
    assert engine.said() == (Recall(1), Dispatch(1), Wake(10.0, 4))
    engine.give_back(1)
    assert engine.said() == (Aggregate((0, 1)),)
    engine.finish_step()
    assert engine.said()[0] == Recall(0)
    assert sorted(dispatched(engine.commands)) == [0, 1]


# Periodic, by hand.


def test_periodic_takes_whoever_has_finished_and_restarts_only_them() -> None:
    engine = started(Periodic(interval=4.0), clients=3)
    assert engine.said() == (Dispatch(0), Dispatch(1), Dispatch(2), Wake(4.0, 1))
    engine.ring()
    assert engine.said() == (Wake(8.0, 2),)  # nothing arrived: no step
    engine.give_back(2)
    engine.give_back(0)
    assert engine.said() == ()
    engine.ring()
    assert engine.said() == (Aggregate((0, 2)), Wake(12.0, 3))
    engine.finish_step()
    assert engine.said() == (Dispatch(0), Dispatch(2))


def test_periodic_recall_waits_for_all_it_contacted() -> None:
    engine = started(Periodic(interval=4.0, recall=2), clients=3)
    engine.ring()
    contacted = [each.client for each in engine.commands if isinstance(each, Recall)]
    assert len(contacted) == 2
    engine.give_back(contacted[0])
    assert engine.said() == ()
    engine.ring()  # late: this tick is skipped, the clock goes on
    assert engine.said() == (Wake(12.0, 3),)
    engine.leave(contacted[1])
    assert engine.said() == (Aggregate((contacted[0],)),)


def test_a_client_that_was_contacted_and_comes_back_anew_goes_to_work_at_once() -> None:
    engine = started(Periodic(interval=4.0, recall=2), clients=2)
    engine.ring()
    engine.leave(1)
    engine.join((1,))
    assert engine.said() == (Dispatch(1),)
    engine.give_back(0)
    assert engine.said() == (Aggregate((0,)),)


def test_a_contacted_client_that_stays_silent_is_not_waited_for_for_ever() -> None:
    engine = started(Periodic(interval=4.0, recall=2, deadline=6.0), clients=2)
    engine.ring()
    engine.give_back(1)
    engine.ring()  # 4 s after the contact
    assert engine.said() == (Wake(12.0, 3),)
    engine.ring()
    assert engine.said() == (Recall(0), Dispatch(0), Aggregate((1,)), Wake(16.0, 4))


def test_periodic_does_not_recall_those_who_have_finished() -> None:
    engine = started(Periodic(interval=4.0, recall=2), clients=2)
    engine.give_back(1)
    engine.ring()
    assert engine.said() == (Recall(0, partial=True), Wake(8.0, 2))
    engine.give_back(0)
    assert engine.said() == (Aggregate((0, 1)),)


# Configurations.


@pytest.mark.parametrize(
    ("kind", "wrong", "field"),
    [
        (Rounds, {"cohort": 0}, "schedule.cohort"),
        (Rounds, {"over_selection": 0.9}, "schedule.over_selection"),
        (Rounds, {"over_selection": math.inf}, "schedule.over_selection"),
        (Rounds, {"deadline": 0.0}, "schedule.deadline"),
        (Rounds, {"deadline": math.inf}, "schedule.deadline"),
        (Rounds, {"minimum": 0}, "schedule.minimum"),
        (Rounds, {"cohort": 2, "minimum": 3}, "schedule.minimum"),
        (Buffered, {"k": 0}, "schedule.k"),
        (Buffered, {"k": 3, "concurrency": 2}, "schedule.concurrency"),
        (Buffered, {"deadline": 0.0}, "schedule.deadline"),
        (Periodic, {"interval": 0.0}, "schedule.interval"),
        (Periodic, {"interval": math.nan}, "schedule.interval"),
        (Periodic, {"interval": math.inf}, "schedule.interval"),
        (Periodic, {"recall": 0}, "schedule.recall"),
        (Periodic, {"recall": 2, "deadline": math.inf}, "schedule.deadline"),
        (Periodic, {"deadline": 5.0}, "schedule.deadline"),
    ],
)
def test_impossible_schedules_are_refused(kind: Any, wrong: dict[str, Any], field: str) -> None:
    with pytest.raises(InputError, match=field):
        kind(**wrong)


def test_a_run_stops_for_whichever_reason_comes_first() -> None:
    stop = Stopping(rounds=5, time=60.0, target=0.9)
    assert stop.reached(4, 59.0, 0.8) is None
    assert stop.reached(4, 59.0, None) is None
    assert stop.reached(5, 59.0, 0.8) == "made 5 rounds"
    assert stop.reached(4, 60.0, 0.8) == "reached the time limit of 60 s"
    assert stop.reached(5, 60.0, 0.9) == "reached the target 0.9"
