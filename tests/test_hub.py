from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hansa.core.algorithm import Report
from hansa.core.hub import Fold, Hub, Order, PeerHub, Send
from hansa.core.reducer import Collect
from hansa.core.schedule import Aggregated, Joined, Recall, Schedule, Stop, Stopping, Tick
from hansa.core.task import LocalSGD, Task, regression
from hansa.core.trees import Tree
from hansa.strategies.backup import Backup
from hansa.strategies.buffered import Buffered
from hansa.strategies.catalog import Federation
from hansa.strategies.fedasync import FedAsync
from hansa.strategies.fedavg import FedAvg
from hansa.strategies.fedbuff import FedBuff
from hansa.strategies.fednova import NORM, FedNova
from hansa.strategies.fedopt import FedAdam
from hansa.strategies.robust import Median
from hansa.strategies.rounds import Rounds
from hansa.strategies.selective import NORMS, SelectiveLayers

Build = Callable[..., Federation]


def hub_of(f: Federation) -> Hub:
    return Hub(f.task, f.algorithm, f.schedule, clients=f.clients, seed=0)


def made(quadratic: Build, algorithm: Any, schedule: Schedule, clients: int = 3) -> Hub:
    """A hub of clients whose models are two numbers, starting at zero."""
    return hub_of(quadratic(algorithm, [1] * clients, [[0, 0]] * clients, schedule=schedule))


def sends(orders: Sequence[Order]) -> list[Send]:
    return [each for each in orders if isinstance(each, Send)]


def last_fold(orders: Sequence[Order]) -> Fold:
    assert isinstance(orders[-1], Fold)
    return orders[-1]


def round_of(hub: Hub, clients: int, examples: Sequence[int] | None = None) -> Fold:
    """All return; the order to fold."""
    orders: list[Order] = []
    for client in range(clients):
        orders = hub.receive(client, examples=examples[client] if examples else 1, steps=1, now=1.0)
    return last_fold(orders)


def w(*rows: Sequence[float]) -> Tree:
    return {"w": torch.tensor(rows, dtype=torch.float64)}


def values(hub: Hub) -> list[float]:
    return [float(each) for each in hub.state.params["w"]]


def test_a_round_from_the_first_job_to_the_next(quadratic: Build) -> None:
    hub = made(quadratic, FedAvg(), Rounds(cohort=2, stop=Stopping(rounds=2)), clients=2)
    orders = hub.on(Joined(range(2)), 10.0)
    assert sorted((each.client, each.job.number, each.job.phase) for each in sends(orders)) == [
        (0, 0, "train"),
        (1, 0, "train"),
    ]
    assert all(each.job.payload["w"].tolist() == [0, 0] for each in sends(orders))
    assert hub.receive(1, examples=30, steps=3, now=11.0) == []
    fold = last_fold(hub.receive(0, examples=10, steps=1, now=12.5))
    common: dict[str, Any] = {"number": 0, "phase": "train", "staleness": 0, "dispatched": 10.0}
    assert fold == Fold(
        (
            Report(client=0, examples=10, steps=1, returned=12.5, **common),
            Report(client=1, examples=30, steps=3, returned=11.0, **common),
        ),
        "train",
    )
    hub.fold(fold.reports, w([4, 0], [0, 4]), {})
    hub.close()
    assert values(hub) == [1.0, 3.0]  # weighed by 10 and 30 examples
    assert hub.state.version == 1
    following = sends(hub.on(Aggregated(), 12.5))
    assert {each.job.number for each in following} == {1}
    assert following[0].job.payload["w"].tolist() == [1, 3]
    fold = round_of(hub, 2)
    hub.fold(fold.reports, w([0, 0], [0, 0]), {})
    hub.close()
    assert hub.on(Aggregated(), 13.0) == [Stop("made 2 rounds")]


@pytest.mark.parametrize(
    "algorithm", [FedAvg(), FedAdam(), FedBuff(), FedAvg(reducer=Collect(rule=Median()))]
)
@pytest.mark.parametrize("cuts", [(1, 2, 3, 4), (2,), (4,)])
def test_chunked_folds_equal_one_fold(algorithm: Any, cuts: tuple[int, ...], quadratic: Build) -> None:
    updates = w([1, 2], [-3, 0.1], [0.7, 5], [11, -2], [0.3, 0.3])
    results = []
    for bounds in ((0, 5), (0, *cuts, 5)):
        hub = made(quadratic, algorithm, Rounds(cohort=5), clients=5)
        hub.on(Joined(range(5)), 0.0)
        fold = round_of(hub, 5, examples=[3, 1, 4, 1, 5])
        for a, b in itertools.pairwise(bounds):
            hub.fold(fold.reports[a:b], {"w": updates["w"][a:b]}, {})
        hub.close()
        results.append(values(hub))
    assert results[1] == pytest.approx(results[0], rel=1e-14)  # five terms in another order


@pytest.mark.parametrize(
    ("algorithm", "updates"),
    [
        (FedNova(), {**w([1, 0], [3, 2]), NORM: torch.tensor([7.0, 9.0], dtype=torch.float64)}),
        (FedAsync(), w([6, 5], [8, 7])),  # models; the hub's is (5, 5)
    ],
    ids=["FedNova", "FedAsync"],
)
def test_what_is_measured_of_updates_is_what_they_change(
    algorithm: FedAvg, updates: Tree, quadratic: Build
) -> None:
    hub = made(quadratic, algorithm, Backup(cohort=2), clients=2)
    hub.state = dataclasses.replace(hub.state, params={"w": torch.full((2,), 5.0, dtype=torch.float64)})
    hub.on(Joined(range(2)), 0.0)
    hub.fold(round_of(hub, 2).reports, updates, {})
    # Changes (1, 0) and (3, 2): their mean is (2, 1), from which each is (1, 1) away.
    assert hub.close() == pytest.approx({"update/mean": 5.0, "update/variance": 4.0})


def test_a_tensor_is_averaged_over_those_who_sent_it_and_stays_where_nobody_did() -> None:
    task = Task(nn.Linear(1, 1), regression, dtype=torch.float64)
    hub = Hub(task, FedAvg(), Rounds(cohort=2), clients=2, seed=0)
    hub.on(Joined(range(2)), 0.0)
    before = dict(hub.state.params)
    fold = round_of(hub, 2)
    updates = {
        "weight": torch.ones(2, 1, 1, dtype=torch.float64),
        "bias": torch.ones(2, 1, dtype=torch.float64),
    }
    hub.fold(fold.reports, updates, {"weight": torch.tensor([0.0, 1.0]), "bias": torch.zeros(2)})
    hub.close()
    assert torch.equal(hub.state.params["weight"], before["weight"] + 1)
    assert torch.equal(hub.state.params["bias"], before["bias"])


def test_an_abandoned_round_only_counts(quadratic: Build) -> None:
    hub = made(quadratic, FedAdam(), Rounds(cohort=3, minimum=2, deadline=5.0))
    hub.on(Joined(range(3)), 0.0)
    hub.receive(1, examples=1, steps=1, now=1.0)
    before = hub.state
    orders = hub.on(Tick(0), 5.0)
    assert set(orders[:-1]) == {Recall(0), Recall(1), Recall(2)}
    assert last_fold(orders) == Fold((), "train")
    assert hub.close() == {}
    assert hub.state.version == 1
    assert hub.state.params is before.params
    assert hub.state.slots is before.slots
    # The update that was thrown away is not taken for one of the next round.
    assert len(sends(hub.on(Aggregated(), 5.0))) == 3
    fold = round_of(hub, 3)
    assert {each.number for each in fold.reports} == {1}
    assert {each.dispatched for each in fold.reports} == {5.0}


def test_staleness_counts_hub_steps_and_a_client_may_stand_twice_in_a_buffer(quadratic: Build) -> None:
    hub = made(quadratic, FedBuff(), Buffered(k=2, concurrency=2), clients=2)
    hub.on(Joined(range(2)), 0.0)
    hub.receive(0, examples=1, steps=1, now=1.0)
    fold = last_fold(hub.receive(0, examples=1, steps=1, now=2.0))
    assert [(each.client, each.number, each.staleness) for each in fold.reports] == [(0, 0, 0), (0, 1, 0)]
    hub.fold(fold.reports, w([1, 0], [1, 2]), {})
    hub.close()
    assert values(hub) == [1.0, 1.0]
    hub.on(Aggregated(), 2.0)
    hub.receive(1, examples=1, steps=1, now=3.0)  # of version 0
    fold = last_fold(hub.receive(0, examples=1, steps=1, now=3.5))
    assert [(each.client, each.number, each.staleness) for each in fold.reports] == [(1, 0, 1), (0, 2, 0)]
    hub.fold(fold.reports, w([2**0.5, 0], [0, 4]), {})
    hub.close()
    assert values(hub) == pytest.approx([1.5, 3.0])  # weights 1/√2 and 1, divided by k


def test_who_goes_away_loses_the_job_and_not_the_update_that_arrived(quadratic: Build) -> None:
    hub = made(quadratic, FedAvg(), Rounds(cohort=3), clients=3)
    hub.on(Joined(range(3)), 0.0)
    hub.receive(0, examples=1, steps=1, now=1.0)
    assert hub.lost(0, 1.5) == []
    hub.receive(2, examples=1, steps=1, now=2.0)
    fold = last_fold(hub.lost(1, 2.5))
    assert [each.client for each in fold.reports] == [0, 2]
    with pytest.raises(KeyError):  # there is nothing that it could still send
        hub.receive(1, examples=1, steps=1, now=3.0)


def test_two_phases_are_one_version() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    task = Task(module, regression, dtype=torch.float64)
    algorithm = SelectiveLayers(budget=1)
    hub = Hub(task, algorithm, Rounds(cohort=2, phases=2), clients=2, seed=0)
    first = sends(hub.on(Joined(range(2)), 0.0))
    assert {each.job.phase for each in first} == {"probe"}
    fold = round_of(hub, 2)
    assert fold.phase == "probe"
    norms = torch.tensor([[3.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
    hub.fold(fold.reports, {NORMS: norms}, {})
    hub.close()
    assert hub.state.version == 0
    second = sends(hub.on(Aggregated(), 1.0))
    assert {(each.client, each.job.number, each.job.phase) for each in second} == {
        (0, 1, "train"),
        (1, 1, "train"),
    }
    keys = {each.client: each.job.keys or frozenset() for each in second}
    assert keys == {0: frozenset({"0.weight", "0.bias"}), 1: frozenset({"1.weight", "1.bias"})}
    fold = round_of(hub, 2)
    assert fold.phase == "train"
    before = dict(hub.state.params)
    updates = {name: torch.ones(2, *each.shape, dtype=torch.float64) for name, each in before.items()}
    present = {name: torch.tensor([name in keys[c] for c in (0, 1)]).double() for name in updates}
    hub.fold(fold.reports, updates, present)
    hub.close()
    assert hub.state.version == 1
    assert all(torch.equal(hub.state.params[name], each + 1) for name, each in before.items())


def through_disk(hub: Hub, fresh: Hub) -> Hub:
    tensors, facts = hub.snapshot()
    copied = {name: tensors[name].clone() for name in sorted(tensors)}
    fresh.restore(copied, json.loads(json.dumps(facts)))
    return fresh


def told(orders: Sequence[Order]) -> list[Any]:
    return [
        (each.client, each.job.number, each.job.payload["w"].tolist()) if isinstance(each, Send) else each
        for each in orders
    ]


@pytest.mark.parametrize("schedule", [Buffered(k=2, concurrency=3), Rounds(cohort=3, deadline=4.0)])
def test_a_restored_hub_goes_on_as_the_old_one(schedule: Schedule, quadratic: Build) -> None:
    federation = quadratic(FedAdam(), [1] * 4, [[0, 0]] * 4, schedule=schedule)
    hub = hub_of(federation)
    away: set[int] = set()
    out = {each.client for each in sends(hub.on(Joined(range(4)), 0.0))}
    for event in range(12):
        hub = through_disk(hub, hub_of(federation))
        twin = through_disk(hub, hub_of(federation))
        both = (hub, twin)
        now = float(event)
        if event == 5:
            client = min(out)
            orders, copies = [each.lost(client, now) for each in both]
            out.discard(client)
            away.add(client)
        elif event == 7:
            orders, copies = [each.on(Joined(tuple(away)), now) for each in both]
        else:
            client = max(out)
            orders, copies = [each.receive(client, examples=client + 1, steps=2, now=now) for each in both]
            out.discard(client)
        assert told(orders) == told(copies)
        while True:
            out |= {each.client for each in sends(orders)}
            out -= {each.client for each in orders if isinstance(each, Recall)}
            if not (orders and isinstance(orders[-1], Fold)):
                break
            fold = orders[-1]
            for each in both:
                each.fold(fold.reports, w(*([r.client, r.number] for r in fold.reports)), {})
                each.close()
            assert hub.state.version == twin.state.version
            assert values(hub) == values(twin)
            orders, copies = [each.on(Aggregated(), now) for each in both]
            assert told(orders) == told(copies)
    assert hub.state.version >= 3


# Gossip.


def peers(
    quadratic: Build,
    mixing: Sequence[Sequence[float]],
    *,
    steps: int = 1,
    server_lr: float = 1.0,
    **schedule: Any,
) -> PeerHub:
    n = len(mixing)
    f = quadratic(FedAvg(server_lr=server_lr), [1] * n, [[0, 0]] * n, schedule=Rounds(cohort=n, **schedule))
    hub = PeerHub(
        f.task,
        f.algorithm,
        f.schedule,
        clients=n,
        seed=0,
        mixing=torch.tensor(mixing, dtype=torch.float64),
        mixing_steps=steps,
    )
    hub.on(Joined(range(n)), 0.0)
    return hub


PATH = [[0.5, 0.5, 0.0], [0.5, 0.0, 0.5], [0.0, 0.5, 0.5]]  # 0 – 1 – 2


def models(hub: PeerHub) -> list[list[float]]:
    return [[float(x) for x in row] for row in hub.state.params["w"]]


def test_peers_mix_their_trained_models_with_their_neighbours(quadratic: Build) -> None:
    hub = peers(quadratic, PATH)
    fold = round_of(hub, 3)
    hub.fold(fold.reports[:2], w([4, 0], [0, 8]), {})  # in two chunks
    hub.fold(fold.reports[2:], w([0, 2]), {})
    measured = hub.close()
    mixed = [[2, 4], [2, 1], [0, 5]]
    assert models(hub) == mixed
    assert hub.state.version == 1
    assert [hub.params_for(i)["w"].tolist() for i in range(3)] == mixed
    assert hub.model()["w"].tolist() == pytest.approx([4 / 3, 10 / 3])  # mixing keeps the average
    # Mean squared distances to it: (4/9 + 4/9 + 16/9 + 4/9 + 49/9 + 25/9) / 3.
    # The matrix has the eigenvalues 1, ½ and −½.
    assert measured == {"gossip/consensus": pytest.approx(102 / 27), "gossip/gap": pytest.approx(0.5)}
    following = sends(hub.on(Aggregated(), 1.0))
    assert [
        (each.client, each.job.payload["w"].tolist()) for each in sorted(following, key=lambda s: s.client)
    ] == [(i, mixed[i]) for i in range(3)]


def test_several_exchanges_are_a_power_of_the_matrix(quadratic: Build) -> None:
    hub = peers(quadratic, PATH, steps=3)
    fold = round_of(hub, 3)
    z = w([4, 0], [0, 8], [0, 2])
    hub.fold(fold.reports, z, {})
    hub.close()
    W = torch.tensor(PATH, dtype=torch.float64)
    assert models(hub) == (W @ W @ W @ z["w"]).tolist()


def test_a_peer_that_did_not_return_keeps_its_model_and_takes_no_part(quadratic: Build) -> None:
    hub = peers(quadratic, PATH, deadline=5.0)
    fold = round_of(hub, 3)
    hub.fold(fold.reports, w([3, 0], [0, 0], [0, 9]), {})
    hub.close()
    first = models(hub)
    assert first == [[1.5, 0], [1.5, 4.5], [0, 4.5]]
    hub.on(Aggregated(), 1.0)
    hub.receive(1, examples=1, steps=1, now=2.0)
    hub.receive(0, examples=1, steps=1, now=2.0)
    fold = last_fold(hub.on(Tick(1), 6.0))
    assert [each.client for each in fold.reports] == [0, 1]
    hub.fold(fold.reports, w([1, 0], [-1, 2]), {})
    measured = hub.close()
    # The weight between 1 and 2 goes back to their diagonals: [[½, ½], [½, ½]] mixes 0 and 1.
    assert measured["gossip/gap"] == pytest.approx(1)
    assert models(hub) == [[1.5, 3.25], [1.5, 3.25], first[2]]


def test_the_server_step_size_is_that_of_every_peer(quadratic: Build) -> None:
    hub = peers(quadratic, PATH, server_lr=0.5)
    fold = round_of(hub, 3)
    hub.fold(fold.reports, w([4, 0], [0, 8], [0, 2]), {})
    hub.close()
    assert models(hub) == [[1, 2], [1, 0.5], [0, 2.5]]


def test_an_abandoned_round_of_peers_only_counts(quadratic: Build) -> None:
    hub = peers(quadratic, PATH, deadline=5.0)
    before = hub.state.params
    assert last_fold(hub.on(Tick(0), 5.0)) == Fold((), "train")
    assert hub.close() == {}
    assert hub.state.params is before
    assert hub.state.version == 1


def test_running_statistics_are_mixed_as_values() -> None:
    module = nn.Sequential(nn.BatchNorm1d(1))
    task = Task(module, regression, local=LocalSGD(lr=0.1), dtype=torch.float64)
    mixing = torch.full((2, 2), 0.5, dtype=torch.float64)
    hub = PeerHub(task, FedAvg(), Rounds(cohort=2), clients=2, seed=0, mixing=mixing, mixing_steps=1)
    hub.on(Joined(range(2)), 0.0)
    fold = round_of(hub, 2)

    def column(*each: float) -> Tensor:
        return torch.tensor(each, dtype=torch.float64)[:, None]

    updates = {
        "0.weight": column(0.5, 1.5),  # changes: 1 + ½, 1 + 3/2
        "0.bias": column(2.0, 4.0),
        "0.running_mean": column(2.0, 6.0),  # values
        "0.running_var": column(3.0, 5.0),
    }
    hub.fold(fold.reports, updates, {})
    hub.close()
    assert {name: each.flatten().tolist() for name, each in hub.state.params.items()} == {
        "0.weight": [2.0, 2.0],
        "0.bias": [3.0, 3.0],
        "0.running_mean": [4.0, 4.0],
        "0.running_var": [4.0, 4.0],
    }


def test_traffic_goes_to_each_neighbour_in_each_exchange(quadratic: Build) -> None:
    hub = peers(quadratic, PATH, steps=4)
    assert [hub.traffic(10, client) for client in range(3)] == [40, 80, 40]
    assert made(quadratic, FedAvg(), Rounds(cohort=3)).traffic(10, 0) == 10


def test_a_restored_network_has_its_peers_models(quadratic: Build) -> None:
    hub = peers(quadratic, PATH)
    fold = round_of(hub, 3)
    hub.fold(fold.reports, w([4, 0], [0, 8], [0, 2]), {})
    hub.close()
    hub.on(Aggregated(), 1.0)
    twin = peers(quadratic, PATH)
    through_disk(hub, twin)
    assert models(twin) == models(hub)
    assert told([*twin.receive(0, examples=1, steps=1, now=2.0)]) == told(
        [*hub.receive(0, examples=1, steps=1, now=2.0)]
    )
    assert round_of_rest(twin) == round_of_rest(hub)


def round_of_rest(hub: Hub) -> Fold:
    hub.receive(1, examples=1, steps=1, now=2.0)
    return last_fold(hub.receive(2, examples=1, steps=1, now=2.0))
