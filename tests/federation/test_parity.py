"""The coordinator and the simulator are two engines of one hub: the same recipe gives the same model."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from floor import Floor, checked, end, play, small, submit
from replay import Replay, Return, recorded

from hansa.client.workshop import Workshop
from hansa.core.algorithm import Algorithm
from hansa.core.errors import DivergedError, RunError
from hansa.core.recipe import Recipe, parse
from hansa.core.schedule import Schedule, Stopping
from hansa.core.store import Round, RunStore
from hansa.core.task import LocalSGD, LocalWork
from hansa.core.trees import Tree
from hansa.core.weights import Weights
from hansa.core.wire import federation_pb2 as pb
from hansa.server.events import Event
from hansa.server.machine import Machine
from hansa.simulation.population import Population
from hansa.simulation.simulator import Simulator
from hansa.strategies.anarchic import AFACD, AFACS
from hansa.strategies.buffered import Buffered
from hansa.strategies.catalog import Federation, assemble
from hansa.strategies.favano import FAVANO
from hansa.strategies.fedasync import FedAsync
from hansa.strategies.fedavg import FedAvg
from hansa.strategies.fedbuff import FedBuff
from hansa.strategies.periodic import Periodic

PLAIN = {"name": "mlp", "hidden": [6]}
SYNCHRONOUS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "fedavg": {"model": PLAIN},
    "dropout": {"model": {**PLAIN, "dropout": 0.3}},
    "scaffold": {"algorithm": {"name": "scaffold"}},
    "fedbn": {"algorithm": {"name": "fedbn"}},
    "selective": {"algorithm": {"name": "selective", "budget": [1, 2]}, "model": PLAIN},
    "fraug": {"algorithm": {"name": "fraug"}, "stop": {"rounds": 2}, "engine": {"mode": "sequential"}},
    "multikrum": {
        "aggregation": {"rule": "multikrum", "f": 1, "selected": 3},
        "schedule": {"cohort": 6},
        "model": PLAIN,
    },
}


def simulated(recipe: Recipe) -> Mapping[str, torch.Tensor]:
    simulator = Simulator(assemble(recipe))
    simulator.run()
    return simulator.hub.model()


@pytest.mark.parametrize("name", SYNCHRONOUS)
def test_synchronous_runs_give_the_simulators_model(floor: Floor, name: str) -> None:
    recipe = small(**SYNCHRONOUS[name])

    async def scene() -> str:
        async with floor.coordinator() as control, floor.agents(3):
            run = await submit(control, recipe)
            rounds, status = await end(control, run)
            assert status.status == "finished"
            assert [each.index for each in rounds] == list(range(1, recipe.stop.rounds + 1))
            return run

    run = play(scene())
    found, expected = floor.model(run), simulated(recipe)
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-5, atol=1e-5)
    assert checked(floor, run).updates == recipe.stop.rounds * recipe.schedule["cohort"] * (
        2 if name == "selective" else 1
    )
    with RunStore.open(floor.runs / run) as store:
        assert store.summary().status == "finished"
        assert parse(tomllib.loads(store.recipe)).train == recipe.train


BUFFER = {"name": "buffered", "k": 2, "concurrency": 4}
SECONDS = [9.0, 1.0, 2.0, 3.0, 4.0, 5.0]
ASYNCHRONOUS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "fedasync": {"algorithm": {"name": "fedasync"}, "schedule": {**BUFFER, "k": 1}},
    "fedasync, hinge": {
        "algorithm": {"name": "fedasync"},
        "weights": {"staleness": "hinge", "after": 1.0},
        "schedule": {**BUFFER, "k": 1, "concurrency": 6},
    },
    "fedbuff": {"algorithm": {"name": "fedbuff"}, "schedule": BUFFER},
    "fedbuff, bounded": {
        "algorithm": {"name": "fedbuff"},
        "weights": {"max_staleness": 1},
        "schedule": BUFFER,
    },
    "fedavg, unbiased": {
        "algorithm": {"name": "fedavg", "server_lr": 0.3},
        "weights": {"frequency": "estimated"},
        "schedule": {**BUFFER, "k": 1},
    },
    "fedfix, known": {
        "weights": {"frequency": "known", "seconds": SECONDS},
        "schedule": {"name": "periodic", "interval": 3.0},
    },
    "fedfix, estimated": {
        "weights": {"frequency": "estimated"},
        "schedule": {"name": "periodic", "interval": 3.0},
    },
    "favano, stochastic": {
        "algorithm": {"name": "favano"},
        "train": {"steps": 6, "epochs": 1, "batch_size": 4, "lr": 0.05},
        "schedule": {"name": "periodic", "interval": 4.0, "recall": 3},
    },
    "favano, deterministic, quantised": {
        "algorithm": {"name": "favano", "reweighting": "deterministic", "bits": 4},
        "train": {"steps": 6, "epochs": 1, "batch_size": 4, "lr": 0.05},
        "schedule": {"name": "periodic", "interval": 4.0, "recall": 3},
    },
    "afa_cd": {
        "algorithm": {"name": "afa_cd"},
        "train": {"epochs": [1, 3], "batch_size": 12},
        "schedule": {**BUFFER, "concurrency": 6},
    },
    "afa_cs": {
        "algorithm": {"name": "afa_cs"},
        "train": {"epochs": [1, 3], "batch_size": 12},
        "schedule": {**BUFFER, "concurrency": 6},
    },
    "backup": {"schedule": {"name": "backup", "cohort": 5, "window": 4}},
    "backup, proportional": {
        "weights": {"frequency": "always"},
        "schedule": {"name": "backup", "cohort": 5, "window": 4},
    },
}


@pytest.mark.parametrize("name", ASYNCHRONOUS)
def test_a_coordinator_makes_the_simulators_model_of_the_same_arrivals(name: str) -> None:
    recipe = small(**{"stop": {"rounds": 12}, "evaluation": {"every": 100}, **ASYNCHRONOUS[name]})
    federation = assemble(recipe)
    rounds: list[Round] = []
    models: list[Tree] = []

    def record(done: Round) -> None:
        rounds.append(done)
        models.append(dict(simulator.hub.model()))

    population = Population(speeds="uniform", spread=8.0, jitter=0.2)
    simulator = Simulator(federation, population, on_round=record)
    simulator.run()
    replay = Replay(federation, recorded(rounds), rounds[-1].time)

    assert len(replay.rounds) == 12
    for ours, theirs, model, expected in zip(replay.rounds, rounds, replay.models, models, strict=True):
        assert ours.time == theirs.time
        assert facts(ours) == facts(theirs)
        for key, tensor in expected.items():
            torch.testing.assert_close(model[key], tensor, rtol=1e-9, atol=1e-10)
    jobs = [each for done in rounds for each in done.participants]
    assert len({each.steps for each in jobs}) > 1 or len({each.staleness for each in jobs}) > 1
    if name == "fedbuff, bounded":
        assert any(each.weight == 0 for each in jobs)
    if name.startswith("backup"):
        assert len({sum(each.outcome == "folded" for each in done.participants) for done in rounds}) > 1


def facts(done: Round) -> list[tuple[Any, ...]]:
    """What a round's record says of each job that was folded, but for its loss."""
    return sorted(
        (p.client, p.outcome, p.dispatched, p.returned, p.steps, p.staleness, pytest.approx(p.weight))
        for p in done.participants
        if p.outcome == "folded"
    )


B = (1.0, -1.0, 4.0)
ARRIVALS = {0: [Return(1.0, 1), Return(2.0, 1)], 1: [Return(1.5, 1)], 2: [Return(2.5, 1)]}


@pytest.mark.parametrize(
    ("algorithm", "schedule", "expected"),
    [
        # α is ½, ¼, ¼, ⅛: staleness is 0, 1, 1, 3. The clients' models are ½, −½, (1 + x₁)/2 and 2.
        (
            FedAsync(
                server_lr=0.5,
                mu=0.0,
                weights=Weights(target="uniform", staleness="polynomial", exponent=1.0),
            ),
            Buffered(stop=Stopping(rounds=4), k=1, concurrency=3),
            [1 / 4, 1 / 16, 13 / 64, 219 / 512],
        ),
        # ½ (½ − ½); then ½ (½ + 2), both from version 0 and with s = ½.
        (
            FedBuff(weights=Weights(target="uniform", staleness="polynomial", exponent=1.0)),
            Buffered(stop=Stopping(rounds=2), k=2, concurrency=3),
            [0, 5 / 8],
        ),
        # Δt = 1.25, p = ⅓: 0 alone, which restarts there from ⅙; then 0, 1 and, at the tick itself, 2.
        (
            FedAvg(weights=Weights(target="uniform", frequency="always")),
            Periodic(stop=Stopping(rounds=2), interval=1.25),
            [1 / 6, 1 / 6 + 5 / 36 - 1 / 6 + 2 / 3],
        ),
        # Changes a step: ½, −½, (1 − ½)/2, 2, as they come.
        (AFACD(), Buffered(stop=Stopping(rounds=4), k=1, concurrency=3), [1 / 2, 0, 1 / 4, 9 / 4]),
        # A third of the sum of the latest: ½; −½; 5/12 for ½; 2.
        (
            AFACS(),
            Buffered(stop=Stopping(rounds=4), k=1, concurrency=3),
            [1 / 6, 1 / 6, 1 / 6 - 1 / 36, 5 / 36 + 23 / 36],
        ),
    ],
)
def test_arrivals_written_by_hand(
    quadratic: Callable[..., Federation], algorithm: Algorithm, schedule: Schedule, expected: list[float]
) -> None:
    """``½ (w − b_i)²``, halving steps: 0 at 1 s, 1 at 1.5 s, 0 at 2 s, 2 at 2.5 s."""
    federation = quadratic(algorithm, (1.0,) * 3, [[b] for b in B], local=LocalSGD(lr=0.5), schedule=schedule)
    replay = Replay(federation, ARRIVALS, until=2.5)
    assert [float(each["w"]) for each in replay.models] == pytest.approx(expected, rel=1e-12, abs=1e-15)


def test_a_recall_written_by_hand(quadratic: Callable[..., Federation]) -> None:
    """FAVANO, K = 4, all contacted at 2 s: 2, 1 and 0 steps are done; each client is worth one gradient."""
    federation = quadratic(
        FAVANO(),
        (1.0,) * 3,
        [[b] for b in B],
        local=LocalSGD(lr=0.5),
        work=LocalWork(steps=4, batch_size=1),
        schedule=Periodic(stop=Stopping(rounds=1), interval=2.0, recall=3),
    )
    replay = Replay(federation, {0: [Return(2.0, 2)], 1: [Return(2.0, 1)], 2: [Return(2.0, 0)]}, until=2.0)
    assert [float(each["w"]) for each in replay.models] == pytest.approx([(3 / 8 - 1 / 2 + 0) / 4])
    assert [each.steps for each in replay.rounds[0].participants] == [2, 1, 0]


def test_a_model_that_is_not_finite_ends_a_run_as_in_the_simulator(
    quadratic: Callable[..., Federation],
) -> None:
    federation = quadratic(FedAvg(server_lr=1e300), [1], [[1e10]], local=LocalSGD(lr=0.5))
    with pytest.raises(DivergedError, match=r"round 1: the model is not finite.* w .*server_lr"):
        Replay(federation, {0: [Return(1.0, 1)]}, until=1.0)
    finite = quadratic(FedAvg(server_lr=1e290), [1], [[1e10]], local=LocalSGD(lr=0.5))  # its square is not
    assert len(Replay(finite, {0: [Return(1.0, 1)]}, until=1.0).rounds) == 1


def test_a_snapshot_knows_whose_last_update_was_thrown_away() -> None:
    recipe = small(
        algorithm={"name": "scaffold"},
        partition={"kind": "quantity", "clients": 3, "min_size": 5},
        schedule={"cohort": 3, "minimum": 3},
    )

    def machine() -> Machine:
        return Machine(assemble(recipe), lambda *_: {}, lambda _: ({}, None))

    def tell(made: Machine, kind: str, client: int | None = None, **facts: Any) -> None:
        made.apply(Event(seq=made.seq + 1, at=made.seq + 1.0, kind=kind, client=client, **facts))

    def update(made: Machine, client: int, number: int) -> None:
        job = made.job(client, number)
        assert job is not None
        tree = {each.name: torch.zeros(*each.shape, dtype=torch.float64) for each in job.expected}
        body = {"digest": "d", "examples": 9, "steps": 1, "loss": 1.0, "agent": "a"}
        tell(made, "update", client, number=number, body=body, tree=tree)

    first = machine()
    tell(first, "joined", body={"seats": dict.fromkeys("012", "a")})
    update(first, 1, 0)
    update(first, 0, 0)
    tell(first, "left", 2)
    assert first.undone == {0: 0, 1: 0}
    kept: dict[str, bytes] = {}
    tensors, facts = first.snapshot(lambda packed: kept.update({packed.digest: packed.data}))
    again = machine()
    again.restore(first.seq, tensors, json.loads(json.dumps(facts)), kept.__getitem__)
    assert again.undone == {0: 0, 1: 0}
    tell(again, "joined", body={"seats": {"2": "a"}})
    update(again, 0, 1)
    assert again.undone == {1: 0}


class Mishap(Population):
    """Client 2 loses its first job."""

    def drops_at(self, seed: int, client: int, number: int) -> float | None:
        return 0.5 if (client, number) == (2, 0) else None


@pytest.mark.parametrize(
    "changes",
    [
        {"algorithm": {"name": "scaffold"}},
        {"algorithm": {"name": "fedbn"}, "aggregation": {"rule": "krum", "f": 0}},
        {"algorithm": {"name": "afa_cs"}},
    ],
    ids=["scaffold", "fedbn, krum", "afa_cs"],
)
def test_an_abandoned_round_leaves_no_trace_with_clients(
    floor: Floor, monkeypatch: pytest.MonkeyPatch, changes: Mapping[str, Any]
) -> None:
    """Two of three updates came and were thrown away: what their clients keep must not have moved on."""
    recipe = small(
        partition={"kind": "quantity", "clients": 3, "min_size": 5},
        schedule={"cohort": 3, "minimum": 3},
        **changes,
    )
    do = Workshop.do

    def fails_once(self: Workshop, job: pb.Job, *rest: Any) -> Any:
        if (job.client, job.number) == (2, 0):
            raise RunError("as it happens")
        return do(self, job, *rest)

    monkeypatch.setattr(Workshop, "do", fails_once)

    async def scene() -> str:
        async with floor.coordinator() as control, floor.agents(3):
            run = await submit(control, recipe)
            rounds, _ = await end(control, run)
            assert [each.folded for each in rounds] == [0, 3, 3]
            return run

    found = floor.model(play(scene()))
    simulator = Simulator(assemble(recipe), Mishap())
    simulator.run()
    for key, tensor in simulator.hub.model().items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-5, atol=1e-5)
