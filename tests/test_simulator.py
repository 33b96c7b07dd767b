from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from hansa.core.errors import DivergedError, InputError, Interrupted, RunError
from hansa.core.recipe import parse
from hansa.core.schedule import Schedule, Stopping
from hansa.core.store import Round
from hansa.core.task import LocalSGD, LocalWork, Task
from hansa.core.trees import Tree
from hansa.simulation.attacks import SignFlip
from hansa.simulation.population import Population
from hansa.simulation.simulator import Ending, Simulator
from hansa.strategies.buffered import Buffered
from hansa.strategies.catalog import Federation
from hansa.strategies.fedavg import FedAvg, LocalOnly
from hansa.strategies.fedbuff import FedBuff
from hansa.strategies.periodic import Periodic
from hansa.strategies.rounds import Rounds
from hansa.strategies.topologies import Topology

Build = Callable[..., Federation]
HALF = LocalSGD(lr=0.5)  # on ½ (w − b)² each step halves the distance to b


@dataclass(frozen=True, kw_only=True)
class Trace(Population):
    """Devices by hand: slowness of clients, jobs that are lost and at what fraction, comings and goings."""

    factors: tuple[float, ...] = ()
    losses: Mapping[tuple[int, int], float] = field(default_factory=dict)
    visits: Mapping[int, tuple[tuple[float, bool], ...]] = field(default_factory=dict)

    def slowness(self, seed: int, client: int) -> float:
        return self.factors[client] if self.factors else 1.0

    def drops_at(self, seed: int, client: int, number: int) -> float | None:
        return self.losses.get((client, number))

    first_changes = Population._one_by_one

    def changes(self, seed: int, client: int, since: float = 0.0) -> Any:
        return iter(self.visits.get(client, ((0.0, True),)))


def play(
    federation: Federation, population: Population | None = None, **more: Any
) -> tuple[Ending, list[Round]]:
    rounds: list[Round] = []
    ending = Simulator(federation, population, on_round=rounds.append, **more).run()
    return ending, rounds


def after(steps: int, b: float = 1.0, start: float = 0.0) -> float:
    """w after some halving steps towards b."""
    return b + (start - b) * 0.5**steps


def rows(round: Round, *names: str) -> list[tuple[Any, ...]]:
    return [tuple(getattr(each, name) for name in names) for each in round.participants]


def with_recipe(federation: Federation, **sections: Mapping[str, Any]) -> Federation:
    given = federation.recipe.model_dump(include={"seed", "engine"})
    engine = {**given["engine"], **sections.pop("engine", {})}
    return dataclasses.replace(
        federation, recipe=parse({"seed": given["seed"], "engine": engine, **sections})
    )


# Virtual time of rounds. The model is one float64: 8 bytes, half a second at 16 bytes a second.

TWO = Trace(factors=(1.0, 3.0), step_time=0.5, latency=0.25, bandwidth=16.0)
# client 0: 0.75 + 4 · 0.5 + 0.75 = 3.5 s; client 1: 0.75 + 4 · 1.5 + 0.75 = 7.5 s


def two(quadratic: Build, schedule: Schedule) -> Federation:
    return quadratic(
        FedAvg(), [1, 1], [[1], [2]], local=HALF, work=LocalWork(steps=4, batch_size=1), schedule=schedule
    )


def test_a_round_lasts_as_long_as_its_slowest_client(quadratic: Build) -> None:
    ending, rounds = play(two(quadratic, Rounds(stop=Stopping(rounds=2), cohort=2)), TWO)
    assert [round.time for round in rounds] == [7.5, 15.0]
    assert rows(rounds[1], "client", "dispatched", "returned", "steps", "staleness", "outcome") == [
        (0, 7.5, 11.0, 4, 0, "folded"),
        (1, 7.5, 15.0, 4, 0, "folded"),
    ]
    assert ending.time == 15.0
    assert ending.reason == "made 2 rounds"
    first = (after(4, 1.0) + after(4, 2.0)) / 2
    second = (after(4, 1.0, first) + after(4, 2.0, first)) / 2
    assert ending.params["w"].tolist() == pytest.approx([second], rel=1e-14)


def test_a_deadline_cuts_the_round_and_discards_the_late(quadratic: Build) -> None:
    schedule = Rounds(stop=Stopping(rounds=1), cohort=2, deadline=5.0)
    ending, (round,) = play(two(quadratic, schedule), TWO)
    assert round.time == 5.0
    # (5 − 0.75) / 1.5 = 2.83: the late one made two steps.
    assert rows(round, "client", "returned", "steps", "outcome", "loss") == [
        (1, 5.0, 2, "discarded", None),
        (0, 3.5, 4, "folded", pytest.approx(sum(0.25**s / 2 for s in range(4)) / 4)),
    ]
    assert ending.params["w"].tolist() == [after(4, 1.0)]


def test_an_arrival_at_the_deadline_is_in_time(quadratic: Build) -> None:
    schedule = Rounds(stop=Stopping(rounds=1), cohort=2, deadline=7.5)
    _, (round,) = play(two(quadratic, schedule), TWO)
    assert {each.outcome for each in round.participants} == {"folded"}


def test_over_selection_closes_with_the_first(quadratic: Build) -> None:
    schedule = Rounds(stop=Stopping(rounds=2), cohort=1, over_selection=2.0)
    ending, rounds = play(two(quadratic, schedule), TWO)
    assert [round.time for round in rounds] == [3.5, 7.0]
    assert rows(rounds[0], "client", "steps", "outcome") == [(1, 1, "discarded"), (0, 4, "folded")]
    assert ending.params["w"].tolist() == [after(8, 1.0)]


def test_the_time_limit_is_checked_when_a_step_is_made(quadratic: Build) -> None:
    schedule = Rounds(stop=Stopping(rounds=100, time=8.0), cohort=2)
    ending, rounds = play(two(quadratic, schedule), TWO)
    assert (ending.time, ending.rounds) == (15.0, 2)
    assert ending.reason == "reached the time limit of 8 s"
    assert "loss" in rounds[-1].metrics


# Asynchronous time.


def test_staleness_follows_a_trace_worked_by_hand(quadratic: Build) -> None:
    # One step of 1, 2.6 and 6.5 s; whoever returns starts again at once. k = 2:
    #   1   c0 (of v0)            2   c0 (v0)  → v1
    #   2.6 c1 (v0, τ = 1)        3   c0 (v1)  → v2
    #   4   c0 (v2)               5   c0 (v2)  → v3
    #   5.2 c1 (sent at 2.6, v1)  6   c0 (v3)  → v4
    #   6.5 c2 (v0, τ = 4)        7   c0 (v4)  → v5
    schedule = Buffered(stop=Stopping(rounds=5), k=2, concurrency=3)
    b = (1.0, -2.0, 5.0)
    federation = quadratic(FedBuff(), [1] * 3, [[x] for x in b], local=HALF, schedule=schedule)
    ending, rounds = play(federation, Trace(factors=(1.0, 2.6, 6.5)))
    assert [round.time for round in rounds] == [2.0, 3.0, 5.0, 6.0, 7.0]
    folded = [[(0, 0), (0, 0)], [(1, 1), (0, 0)], [(0, 0), (0, 0)], [(1, 2), (0, 0)], [(2, 4), (0, 0)]]
    assert [rows(round, "client", "staleness") for round in rounds] == folded
    assert [each.weight for each in rounds[4].participants] == [5**-0.5, 1.0]

    starts = [(0, 0), (0, 1), (2, 2), (1, 3), (0, 4)]  # versions that the updates of each step began from
    x = [0.0]
    for step, began in zip(folded, starts, strict=True):
        changes = [
            (b[client] - x[version]) / 2 / math.sqrt(1 + stale)
            for (client, stale), version in zip(step, began, strict=True)
        ]
        x.append(x[-1] + sum(changes) / 2)
    assert ending.params["w"].tolist() == pytest.approx(x[-1:], rel=1e-13)


def test_a_periodic_step_takes_what_arrived_in_its_window(quadratic: Build) -> None:
    # Jobs of 1, 2 and 3 s and a tick every 2 s: contributions at 1, 1 and 2 windows after the dispatch.
    schedule = Periodic(stop=Stopping(rounds=4), interval=2.0)
    federation = quadratic(FedAvg(), [1] * 3, [[1], [2], [3]], local=HALF, schedule=schedule)
    _, rounds = play(federation, Trace(factors=(1.0, 2.0, 3.0)))
    assert [round.time for round in rounds] == [2.0, 4.0, 6.0, 8.0]
    assert [[c for (c,) in rows(round, "client")] for round in rounds] == [
        [0, 1],
        [0, 1, 2],
        [0, 1],
        [0, 1, 2],
    ]
    assert rows(rounds[1], "client", "staleness") == [(0, 0), (1, 0), (2, 1)]


@pytest.mark.parametrize(
    ("duration", "interval"), [(1.0, 0.5), (1.0, 0.4), (0.3, 0.1), (0.7, 0.1), (2.5, 2.5), (1e-3, 2.5)]
)
def test_the_window_is_the_duration_over_the_interval_rounded_up(
    duration: float, interval: float, quadratic: Build
) -> None:
    schedule = Periodic(stop=Stopping(rounds=2), interval=interval)
    federation = quadratic(FedAvg(), [1], [[1]], local=HALF, schedule=schedule)
    _, rounds = play(federation, Population(step_time=duration))
    windows = math.ceil(duration / interval - 1e-9)
    assert [round.time for round in rounds] == pytest.approx([windows * interval, 2 * windows * interval])


@pytest.mark.parametrize(
    ("latency", "done"),
    [(0.25, (2, 1)), (0.5, (2, 1)), (0.51, (1, 0)), (3.0, (0, 0))],  # (2.5 − latency) / (1, 2) s
)
def test_a_recall_takes_the_steps_that_fitted(
    latency: float, done: tuple[int, int], quadratic: Build
) -> None:
    schedule = Periodic(stop=Stopping(rounds=1), interval=2.5, recall=2)
    federation = quadratic(
        FedAvg(), [1, 1], [[1], [3]], local=HALF, work=LocalWork(steps=4, batch_size=1), schedule=schedule
    )
    ending, (round,) = play(federation, Trace(factors=(1.0, 2.0), latency=latency))
    assert round.time == 2.5
    assert tuple(each.steps for each in round.participants) == done
    assert all((each.loss is None) == (each.steps == 0) for each in round.participants)
    assert ending.params["w"].tolist() == [(after(done[0], 1.0) + after(done[1], 3.0)) / 2]


def test_steps_of_a_tenth_of_a_second_are_counted_without_rounding_errors(quadratic: Build) -> None:
    schedule = Periodic(stop=Stopping(rounds=12), interval=0.3, recall=1)
    federation = quadratic(
        FedAvg(), [1], [[1]], local=HALF, work=LocalWork(steps=100, batch_size=1), schedule=schedule
    )
    _, rounds = play(federation, Population(step_time=0.1))
    assert [each.steps for round in rounds for each in round.participants] == [3] * 12


def test_a_clock_faster_than_a_microsecond_does_not_stand_still(quadratic: Build) -> None:
    schedule = Periodic(stop=Stopping(rounds=1), interval=1e-8)
    _, (round,) = play(
        quadratic(FedAvg(), [1], [[1]], local=HALF, schedule=schedule), Population(step_time=1e-5)
    )
    assert round.time == 1e-5


# Dropouts and availability.


@pytest.mark.parametrize(("recovery", "third"), [(2.0, [0, 1]), (5.0, [1])])
def test_a_dropped_job_is_lost_and_its_client_comes_back(
    recovery: float, third: list[int], quadratic: Build
) -> None:
    # Client 0 is lost at a quarter of its four seconds; a round lasts four seconds.
    population = Trace(losses={(0, 0): 0.25}, recovery=recovery)
    schedule = Rounds(stop=Stopping(rounds=2), cohort=2)
    federation = quadratic(
        FedAvg(), [1, 1], [[1], [3]], local=HALF, work=LocalWork(steps=4, batch_size=1), schedule=schedule
    )
    _, rounds = play(federation, population)
    assert [round.time for round in rounds] == [4.0, 8.0]
    assert rows(rounds[0], "client", "returned", "steps", "loss", "outcome") == [
        (0, 1.0, 0, None, "lost"),
        (1, 4.0, 4, pytest.approx(9 / 2 * sum(0.25**s for s in range(4)) / 4), "folded"),
    ]
    assert [c for (c,) in rows(rounds[1], "client")] == third


def test_nobody_works_while_away_and_who_leaves_in_mid_job_loses_it(quadratic: Build) -> None:
    population = Population(availability=0.6, period=23.0, speeds="uniform", spread=4.0)
    schedule = Buffered(stop=Stopping(rounds=25), k=2, concurrency=4)
    federation = quadratic(
        FedAvg(), [1] * 6, [[1]] * 6, work=LocalWork(steps=3, batch_size=1), schedule=schedule
    )
    _, rounds = play(federation, population)
    jobs = [each for round in rounds for each in round.participants]
    assert {each.outcome for each in jobs} == {"folded", "lost"}
    last = rounds[-1].time
    for job in jobs:
        changes = population.changes(federation.recipe.seed, job.client)
        spells: list[list[float]] = []  # [from, to] of being there
        for moment, there in changes:
            if there:
                spells.append([moment, math.inf])
            elif spells:
                spells[-1][1] = moment
            if moment > last:
                break
        # Times are rounded to a microsecond.
        spell = next(each for each in spells if each[0] - 1e-6 <= job.dispatched <= each[1] + 1e-6)
        if job.outcome == "lost":
            assert job.returned == pytest.approx(spell[1], abs=1e-6)


def test_a_client_that_comes_late_joins_the_run(quadratic: Build) -> None:
    population = Trace(
        availability=0.5, visits={0: ((0.0, False), (3.0, True)), 1: ((0.0, True), (2.5, False), (3.5, True))}
    )
    schedule = Rounds(stop=Stopping(rounds=4), cohort=2)
    _, rounds = play(quadratic(FedAvg(), [1, 1], [[1], [1]], local=HALF, schedule=schedule), population)
    assert [(round.time, rows(round, "client", "outcome")) for round in rounds] == [
        (1.0, [(1, "folded")]),
        (2.0, [(1, "folded")]),
        (2.5, [(1, "lost")]),  # it left, so the round was abandoned; then nobody was there until 3
        (4.0, [(0, "folded")]),
    ]


# Client 1 drops out at 0.5, is away from 1.2 to 3.9 and has recovered at 2.5.
UNLUCKY = Trace(
    losses={(1, 0): 0.5},
    recovery=2.0,
    availability=0.5,
    visits={1: ((0.0, True), (1.2, False), (3.9, True))},
)


def test_who_recovers_while_away_does_not_work_yet(quadratic: Build) -> None:
    schedule = Rounds(stop=Stopping(rounds=5), cohort=2)
    _, rounds = play(quadratic(FedAvg(), [1, 1], [[1], [1]], local=HALF, schedule=schedule), UNLUCKY)
    assert [[c for (c,) in rows(round, "client")] for round in rounds] == [[1, 0], [0], [0], [0], [0, 1]]


@pytest.mark.parametrize(
    "schedule",
    [
        Rounds(cohort=2, minimum=2),
        Buffered(k=2, concurrency=2),
        Periodic(interval=1.0),
        Periodic(interval=3.0, recall=1),
    ],
)
def test_a_run_whose_clients_are_gone_for_good_says_so(schedule: Schedule, quadratic: Build) -> None:
    losses = {(client, number): 0.5 for client in range(2) for number in range(3 - client, 9)}
    population = Trace(losses=losses, recovery=math.inf)
    with pytest.raises(InputError, match=r"after round \d no client is at work and none will come"):
        play(quadratic(FedAvg(), [1, 1], [[1], [1]], schedule=schedule), population)


def test_clients_that_are_gone_for_good_stay_away_from_a_run_that_is_resumed(
    quadratic: Build, tmp_path: Path
) -> None:
    population = Trace(losses={(client, 0): 0.5 for client in range(2)}, recovery=math.inf)
    federation = quadratic(FedAvg(), [1, 1], [[1], [1]], schedule=Rounds(cohort=2, minimum=2))

    class Watched(Simulator):
        def _depart(self, client: int) -> None:
            super()._depart(client)
            if not self._open:
                self.stop()

    with pytest.raises(Interrupted):
        Watched(federation, population, checkpoints=tmp_path).run()
    again = Simulator(federation, population, checkpoints=tmp_path)
    again.resume()
    with pytest.raises(InputError, match="no client is at work and none will come"):
        again.run()


def test_nobody_there_at_the_start_is_no_starvation(quadratic: Build) -> None:
    population = Trace(availability=0.5, visits={0: ((0.0, False), (7.0, True))})
    ending, _ = play(quadratic(FedAvg(), [1], [[1]]), population)
    assert ending.time == 8.0


# Bytes.


class Halves(nn.Module):
    """Two vectors, of 3 and of 5 numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.zeros(3))
        self.b = nn.Parameter(torch.zeros(5))

    def forward(self, x: Tensor) -> Tensor:
        return (self.a.sum() + self.b.sum()).expand(len(x), 1)


@dataclass(frozen=True, kw_only=True)
class Selected(FedAvg):
    """Client 0 sends a, the others all."""

    source: ClassVar[str] = "none"

    def issue(self, task: Task, state: Any, client: int, phase: str) -> tuple[Tree, frozenset[str] | None]:
        return state.params, frozenset({"a"}) if client == 0 else None


def halves(quadratic: Build, schedule: Schedule) -> Federation:
    made = quadratic(Selected(), [1, 1], [[1], [1]], schedule=schedule)
    task = Task(Halves(), made.task.objective, local=LocalSGD(lr=0.1), dtype=torch.float64)
    return dataclasses.replace(made, task=task)


def test_bytes_count_what_is_sent_and_the_keys_that_are_asked_for(quadratic: Build) -> None:
    ending, rounds = play(halves(quadratic, Rounds(stop=Stopping(rounds=2), cohort=2)))
    assert [round.bytes_down for round in rounds] == [2 * 64] * 2
    assert [round.bytes_up for round in rounds] == [24 + 64] * 2
    # The gradient of ½ (Σ w − 1)² is Σ w − 1: −1, then −0.2. a is averaged over two clients, b over one.
    assert ending.params["a"].tolist() == pytest.approx([0.12] * 3)
    assert ending.params["b"].tolist() == pytest.approx([0.12] * 5)


def test_fewer_keys_travel_faster(quadratic: Build) -> None:
    federation = halves(quadratic, Buffered(stop=Stopping(rounds=2), k=1, concurrency=2))
    _, rounds = play(federation, Population(bandwidth=8.0))
    # Down 64 bytes in 8 s, one second of work, up 24 or 64 bytes.
    assert [(round.time, rows(round, "client")) for round in rounds] == [(12.0, [(0,)]), (17.0, [(1,)])]


def test_discarded_updates_cost_their_way_down_only(quadratic: Build) -> None:
    schedule = Rounds(stop=Stopping(rounds=1), cohort=1, over_selection=2.0)
    _, (round,) = play(two(quadratic, schedule), TWO)
    assert (round.bytes_down, round.bytes_up) == (16, 8)


def test_gossip_sends_to_each_neighbour_in_each_mixing_step(quadratic: Build) -> None:
    topology = Topology(kind="ring", mixing_steps=3)
    federation = quadratic(FedAvg(), [1] * 4, [[1]] * 4, topology=topology)
    _, (round,) = play(federation)
    assert (round.bytes_up, round.bytes_down) == (4 * 8 * 2 * 3, 4 * 8 * 2 * 3)


def test_a_job_past_its_deadline_is_thrown_away_and_the_rest_goes_on(quadratic: Build) -> None:
    # Client 0 takes a second, client 1 nine, with which it is begun anew every three.
    schedule = Buffered(stop=Stopping(rounds=7), k=1, concurrency=2, deadline=3.0)
    federation = quadratic(FedAvg(), [1] * 2, [[1], [2]], local=HALF, schedule=schedule)
    ending, rounds = play(federation, Trace(factors=(1.0, 9.0)))
    assert [r.time for r in rounds] == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]
    thrown = [(r.time, p.client) for r in rounds for p in r.participants if p.outcome == "discarded"]
    assert thrown == [(4.0, 1), (7.0, 1)]  # at 3 and 6 s, told of with the next step
    assert ending.params["w"].item() == after(7, 1.0)


def test_a_deadline_in_which_no_job_can_be_done_is_refused(quadratic: Build) -> None:
    schedule = Buffered(k=1, concurrency=2, deadline=0.5)
    with pytest.raises(InputError, match=r"schedule\.deadline = 0\.5: 1001 jobs were lost"):
        play(quadratic(FedAvg(), [1] * 2, [[1], [2]], local=HALF, schedule=schedule))


# Evaluation, attacks, errors.


def test_evaluation_comes_every_n_rounds_and_at_the_end(quadratic: Build) -> None:
    federation = quadratic(FedAvg(), [1], [[1]], local=HALF, rounds=5)
    ending, rounds = play(with_recipe(federation, evaluation={"every": 2}))
    assert ["loss" in round.metrics for round in rounds] == [False, True, False, True, True]
    assert [round.clients is not None for round in rounds] == [False, True, False, True, True]
    assert [round.metrics["train/loss"] for round in rounds] == [0.25**n / 2 for n in range(5)]
    assert ending.metrics == rounds[-1].metrics
    assert ending.metrics["loss"] == 0.25**5 / 2


def test_the_target_ends_a_run_where_it_is_measured(quadratic: Build) -> None:
    # Without an accuracy the score is −loss: 0.25ⁿ / 2 falls below 0.01 after three rounds.
    schedule = Rounds(stop=Stopping(rounds=50, target=-0.01), cohort=1)
    federation = quadratic(FedAvg(), [1], [[1]], local=HALF, schedule=schedule)
    assert play(federation)[0].rounds == 3
    assert play(with_recipe(federation, evaluation={"every": 2}))[0].rounds == 4


@pytest.mark.parametrize(
    "schedule",
    [Rounds(stop=Stopping(rounds=1), cohort=4), Buffered(stop=Stopping(rounds=1), k=4, concurrency=4)],
)
def test_malicious_clients_train_honestly_and_send_something_else(
    schedule: Schedule, quadratic: Build
) -> None:
    attack = SignFlip(fraction=0.25, scale=2.0)
    federation = quadratic(FedAvg(), [1] * 4, [[1]] * 4, local=HALF, schedule=schedule)
    ending, (round,) = play(federation, attack=attack)
    assert len(attack.malicious(4, 0)) == 1
    assert ending.params["w"].tolist() == [(3 * 0.5 - 2 * 0.5) / 4]
    assert [each.loss for each in round.participants] == [0.5] * 4
    assert round.metrics["train/loss"] == 0.5


def test_the_malicious_are_the_same_for_a_whole_run(quadratic: Build) -> None:
    attack = SignFlip(fraction=0.5)
    (bad,) = attack.malicious(2, 0)
    b = [[1.0], [1.0]]
    federation = quadratic(
        FedAvg(), [1, 1], b, schedule=Rounds(stop=Stopping(rounds=9), cohort=1), local=HALF
    )
    _, rounds = play(federation, attack=attack)
    w = 0.0
    for round in rounds:
        (client,) = [each.client for each in round.participants]
        w += (1 - w) / 2 * (-1 if client == bad else 1)
        assert round.metrics["loss"] == pytest.approx((1 - w) ** 2 / 2, rel=1e-12)


def test_a_model_that_is_not_finite_ends_the_run_though_every_update_was(quadratic: Build) -> None:
    federation = quadratic(FedAvg(server_lr=1e300), [1], [[1e10]], local=HALF)  # one round, and no next one
    with pytest.raises(DivergedError, match=r"round 1: the model is not finite.* w .*server_lr"):
        play(federation)


@pytest.mark.parametrize("mode", ["sequential", "batched"])
def test_divergence_names_the_round_and_the_client(mode: str, quadratic: Build) -> None:
    # Client 0 stays; client 1 jumps to 1e200 and its squared distance overflows.
    federation = quadratic(
        FedAvg(),
        [0, 1],
        [[1], [1]],
        local=LocalSGD(lr=1e200),
        work=LocalWork(steps=2, batch_size=1),
        mode=mode,
    )
    with pytest.raises(DivergedError, match=r"round 1, client 1: the training loss is inf.*train\.lr"):
        play(federation)


def test_rounds_without_updates_are_told_too(quadratic: Build) -> None:
    population = Trace(losses={(0, 0): 0.5})
    ending, rounds = play(quadratic(FedAvg(), [1], [[1]], local=HALF, rounds=2), population)
    assert rows(rounds[0], "outcome") == [("lost",)]
    assert "train/loss" not in rounds[0].metrics
    assert rounds[0].metrics["loss"] == 0.5
    assert ending.params["w"].tolist() == [0.5]


# Private state.


def private(simulator: Simulator, clients: int) -> list[float]:
    return [float(simulator.private(client)["w"]) for client in range(clients)]


@pytest.mark.parametrize("mode", ["sequential", "batched"])
def test_a_client_goes_on_from_the_private_state_of_its_last_job(mode: str, quadratic: Build) -> None:
    # Client 0 returns twice before the first step is made; client 2 is still at its first job at the end.
    schedule = Buffered(stop=Stopping(rounds=2), k=3, concurrency=3)
    federation = quadratic(LocalOnly(), [1] * 3, [[1], [2], [4]], local=HALF, schedule=schedule, mode=mode)
    rounds: list[Round] = []
    simulator = Simulator(federation, Trace(factors=(1.0, 2.5, 9.0)), on_round=rounds.append)
    simulator.run()
    assert [[c for (c,) in rows(round, "client")] for round in rounds] == [[0, 0, 1], [0, 0, 1]]
    assert private(simulator, 3) == [after(4, 1.0), after(2, 2.0), 0.0]
    assert simulator.hub.model() == {}


@pytest.mark.parametrize("mode", ["sequential", "batched"])
def test_a_lost_job_leaves_the_private_state_alone(mode: str, quadratic: Build) -> None:
    # Client 1 leaves in the middle of its second job, which may have been computed with client 0's by then.
    population = Trace(
        factors=(1.0, 2.0),
        availability=0.5,
        visits={1: ((0.0, True), (3.5, False), (3.75, True))},
    )
    schedule = Buffered(stop=Stopping(rounds=6), k=1, concurrency=2)
    federation = quadratic(LocalOnly(), [1] * 2, [[1], [2]], local=HALF, schedule=schedule, mode=mode)
    rounds: list[Round] = []
    simulator = Simulator(federation, population, on_round=rounds.append)
    simulator.run()  # client 0 at 1, 2, 3, 4, 5 s; client 1 at 2 s
    assert [(r.time, *rows(r, "client", "outcome")) for r in rounds][3:] == [
        (3.0, (0, "folded")),
        (4.0, (1, "lost"), (0, "folded")),
        (5.0, (0, "folded")),
    ]
    assert private(simulator, 2) == [after(5, 1.0), after(1, 2.0)]


@pytest.mark.parametrize("algorithm", ["fedbn", "fedbuff"])
def test_asynchronous_results_do_not_depend_on_what_is_computed_together(
    algorithm: str, digits: Build
) -> None:
    endings = []
    for engine in ({"mode": "sequential"}, {"mode": "batched", "chunk": 1}, {"mode": "batched", "chunk": 64}):
        federation = digits(
            algorithm={"name": algorithm},
            schedule={"name": "buffered", "k": 2, "concurrency": 4},
            engine=engine,
        )
        endings.append(play(federation, Population(speeds="uniform", spread=5.0, dropout=0.2)))
    reference, rounds = endings[0]
    for ending, others in endings[1:]:
        assert [round.time for round in others] == [round.time for round in rounds]
        for name, tensor in reference.params.items():
            # Sums in another order, over ten steps of float64.
            torch.testing.assert_close(ending.params[name], tensor, rtol=0, atol=1e-12)


# Stopping and resuming.

MIXED = Population(
    speeds="uniform", spread=6.0, jitter=0.3, dropout=0.2, recovery=4.0, availability=0.8, period=11.0
)
RUNS: Mapping[str, Mapping[str, Any]] = {
    "rounds": {"schedule": {"cohort": 4, "over_selection": 1.3}},
    "scaffold": {"algorithm": {"name": "scaffold"}},
    "two phases": {"algorithm": {"name": "selective"}},
    "gossip": {"topology": {"kind": "ring"}},
    "buffered": {
        "algorithm": {"name": "fedbn"},
        "schedule": {"name": "buffered", "k": 3, "concurrency": 5},
        "engine": {"mode": "batched", "chunk": 4},
    },
    "ties": {
        "schedule": {"name": "buffered", "k": 3, "concurrency": 5},
        "train": {"steps": 2},
    },
    "periodic": {"algorithm": {"name": "fedbn"}, "schedule": {"name": "periodic", "interval": 3.0}},
    "recall": {
        "algorithm": {"name": "fedbn"},
        "schedule": {"name": "periodic", "interval": 3.0, "recall": 2},
    },
}


class Stopped(Simulator):
    """Asks itself to stop after some events."""

    events = 0
    last = 0

    def _ring(self, alarm: Any) -> None:
        super()._ring(alarm)
        self.events += 1
        if self.events == self.last:
            self.stop()


def whole(federation: Federation, population: Population) -> Any:
    """Everything that a run tells, and the private states that it leaves."""
    rounds: list[Round] = []
    simulator = Simulator(federation, population, on_round=rounds.append)
    return told(simulator, simulator.run(), rounds)


def interrupted(federation: Federation, population: Population, last: int, folder: Path) -> Any:
    """The same, stopped after an event and resumed by another simulator."""
    rounds: list[Round] = []
    first = Stopped(federation, population, on_round=rounds.append, checkpoints=folder)
    first.last = last
    with pytest.raises(Interrupted, match="stopped after round"):
        first.run()
    second = Simulator(federation, population, on_round=rounds.append, checkpoints=folder)
    assert second.resume() == len(rounds)
    return told(second, second.run(), rounds)


def told(simulator: Simulator, ending: Ending, rounds: list[Round]) -> Any:
    trees = {"model": ending.params, **{str(client): simulator.private(client) for client in range(6)}}
    tensors = {(part, name): each.tolist() for part, tree in trees.items() for name, each in tree.items()}
    facts = [(r.index, r.time, r.bytes_up, r.bytes_down, r.metrics, r.participants) for r in rounds]
    return ending.reason, ending.time, ending.metrics, tensors, facts


@pytest.mark.parametrize("name", RUNS)
def test_a_resumed_run_repeats_the_uninterrupted_one_bit_for_bit(
    name: str, digits: Build, tmp_path: Path
) -> None:
    federation = digits(**{"evaluation": {"every": 2}, "stop": {"rounds": 6}, **RUNS[name]})
    population = Population() if name == "ties" else MIXED
    uninterrupted = whole(federation, population)
    for last in (2, 6, 13):
        assert interrupted(federation, population, last, tmp_path / str(last)) == uninterrupted


@pytest.mark.parametrize("last", range(1, 10))
def test_a_run_may_be_interrupted_anywhere(last: int, quadratic: Build, tmp_path: Path) -> None:
    unlucky = quadratic(
        FedAvg(), [1, 1], [[1], [2]], local=HALF, schedule=Rounds(stop=Stopping(rounds=7), cohort=2)
    )
    for federation, population in (
        (unlucky, UNLUCKY),
        (halves(quadratic, Buffered(stop=Stopping(rounds=9), k=2, concurrency=2)), Trace(factors=(1.0, 1.7))),
    ):
        folder = tmp_path / type(federation.schedule).__name__
        assert interrupted(federation, population, last, folder) == whole(federation, population)


def test_checkpoints_come_every_n_rounds_and_at_the_end(quadratic: Build, tmp_path: Path) -> None:
    federation = with_recipe(
        quadratic(FedAvg(), [1], [[1]], local=HALF, rounds=5), engine={"checkpoint_every": 2}
    )
    seen: list[list[str]] = []

    def look(_: Round) -> None:
        seen.append(sorted(path.name for path in tmp_path.iterdir()))

    Simulator(federation, on_round=look, checkpoints=tmp_path).run()
    assert seen == [[], [], ["00000002"], ["00000002"], ["00000002", "00000004"]]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000004", "00000005"]


def test_a_finished_run_can_be_resumed_and_is_finished(quadratic: Build, tmp_path: Path) -> None:
    federation = quadratic(FedAvg(), [1], [[1]], local=HALF, rounds=3)
    ending, _ = play(federation, checkpoints=tmp_path)
    rounds: list[Round] = []
    again = Simulator(federation, on_round=rounds.append, checkpoints=tmp_path)
    assert again.resume() == 3
    repeated = again.run()
    assert rounds == []
    assert (repeated.reason, repeated.rounds, repeated.time, repeated.metrics) == (
        ending.reason,
        ending.rounds,
        ending.time,
        ending.metrics,
    )
    assert torch.equal(repeated.params["w"], ending.params["w"])


def test_a_damaged_checkpoint_gives_way_to_the_one_before(quadratic: Build, tmp_path: Path) -> None:
    federation = with_recipe(
        quadratic(FedAvg(), [1], [[1]], local=HALF, rounds=6), engine={"checkpoint_every": 2}
    )
    ending, _ = play(federation, checkpoints=tmp_path)
    older, newest = sorted(tmp_path.iterdir())
    (newest / "state.safetensors").write_bytes((newest / "state.safetensors").read_bytes()[:-3])
    again = Simulator(federation, checkpoints=tmp_path)
    assert again.resume() == 4
    assert torch.equal(again.run().params["w"], ending.params["w"])
    for path in (older, newest):
        (path / "state.json").write_text("{")
    with pytest.raises(RunError, match="no checkpoint can be read"):
        Simulator(federation, checkpoints=tmp_path).resume()


def test_there_is_nothing_to_resume_at_first(quadratic: Build, tmp_path: Path) -> None:
    federation = quadratic(FedAvg(), [1], [[1]])
    assert Simulator(federation, checkpoints=tmp_path / "none").resume() == 0
    assert Simulator(federation).resume() == 0
