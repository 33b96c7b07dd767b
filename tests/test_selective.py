"""Selective layers: problem (P1) against brute force, and a round against one written with torch.optim."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from hansa.core.algorithm import Report
from hansa.core.errors import InputError
from hansa.core.hub import Hub, Order, Send
from hansa.core.trees import Tree, pick
from hansa.simulation.simulator import Simulator
from hansa.strategies.catalog import Federation
from hansa.strategies.selective import (
    MASK,
    NORMS,
    SelectiveLayers,
    common_layers,
    objective,
    own_top_layers,
    select_layers,
)

Build = Callable[..., Federation]
Matrix = NDArray[np.float64]
Mask = NDArray[np.bool_]

# The masks.


def p1(m: Mask, g: Matrix, weight: float) -> float:
    """(P1) as the paper writes it, a sum over pairs of clients."""
    pairs = itertools.combinations(range(len(m)), 2)
    disagreement = sum(int((m[i] != m[j]).sum()) for i, j in pairs)
    return float((m * g).sum()) - weight * disagreement


def best_by_brute_force(g: Matrix, budgets: Sequence[int], weight: float) -> float:
    """The optimum over all masks of three clients."""
    subsets = np.array(list(itertools.product([False, True], repeat=g.shape[1])))
    a, b, c = (subsets[subsets.sum(1) <= budget] for budget in budgets)
    value = (a @ g[0])[:, None, None] + (b @ g[1])[None, :, None] + (c @ g[2])[None, None, :]

    def apart(one: Mask, other: Mask) -> NDArray[np.int_]:
        counted: NDArray[np.int_] = (one[:, None] != other[None]).sum(-1)
        return counted

    disagreement = apart(a, b)[:, :, None] + apart(a, c)[:, None, :] + apart(b, c)[None, :, :]
    return float((value - weight * disagreement).max())


instances = settings(derandomize=True, deadline=None, database=None, max_examples=150)
gains = st.lists(st.lists(st.floats(0, 10), min_size=5, max_size=5), min_size=3, max_size=3).map(np.array)
budgets_of_three = st.lists(st.integers(1, 5), min_size=3, max_size=3)
weights = st.one_of(st.just(0.0), st.floats(0.001, 20.0))


@given(seed=st.integers(0, 999), weight=weights)
@instances
def test_the_objective_is_the_papers(seed: int, weight: float) -> None:
    rng = np.random.default_rng(seed)
    m, g = rng.random((4, 6)) < 0.5, rng.exponential(size=(4, 6))
    assert objective(m, g, weight) == pytest.approx(p1(m, g, weight), rel=1e-12, abs=1e-12)


@given(g=gains, budgets=budgets_of_three, weight=weights)
@instances
def test_masks_keep_budgets_and_beat_both_extremes(g: Matrix, budgets: list[int], weight: float) -> None:
    limits = np.array(budgets)
    m = select_layers(g, limits, weight)
    assert (m.sum(1) <= limits).all()
    reached, optimum = p1(m, g, weight), best_by_brute_force(g, budgets, weight)
    slack = 1e-9 * (1 + abs(optimum))
    assert reached <= optimum + slack
    assert reached >= p1(own_top_layers(g, limits), g, weight) - slack
    assert reached >= p1(common_layers(g, limits), g, weight) - slack


def test_masks_are_optimal_nearly_always() -> None:
    """Best responses with joint moves are a heuristic; on small instances it hardly ever misses."""
    rng, missed = np.random.default_rng(0), []
    for _ in range(250):
        g = rng.exponential(size=(3, 5))
        budgets = rng.integers(1, 6, size=3)
        weight = g.mean() * rng.choice([0.0, 0.01, 0.1, 0.3, 1.0, 10.0])
        optimum = best_by_brute_force(g, budgets.tolist(), weight)
        missed.append(1 - p1(select_layers(g, budgets, weight), g, weight) / optimum)
    assert np.mean(np.array(missed) > 1e-9) <= 0.02
    assert max(missed) < 0.1


@given(g=gains, budgets=budgets_of_three)
@instances
def test_without_agreement_every_client_takes_its_own_best(g: Matrix, budgets: list[int]) -> None:
    m = select_layers(g, np.array(budgets), 0.0)
    for row, gain, budget in zip(m, g, budgets, strict=True):
        assert (gain * row).sum() == pytest.approx(np.sort(gain)[-budget:].sum())


@given(seed=st.integers(0, 999), budget=st.integers(1, 5))
@instances
def test_much_agreement_gives_one_common_set(seed: int, budget: int) -> None:
    g = np.random.default_rng(seed).exponential(size=(3, 5)) + 0.01
    m = select_layers(g, np.full(3, budget), 1e6)
    assert (m == m[0]).all()
    assert set(np.flatnonzero(m[0])) == set(np.argsort(g.sum(0))[-budget:])


def test_agreement_trades_gain_for_overlap_by_hand() -> None:
    # Each prefers its own layer by 1; apart they differ in two layers, which costs 2 λ.
    g = np.array([[3.0, 2.0], [2.0, 3.0]])
    one = np.array([1, 1])
    assert select_layers(g, one, 0.4).tolist() == [[True, False], [False, True]]  # 6 − 0.8 > 5
    together = select_layers(g, one, 0.6)  # 6 − 1.2 < 5
    assert together[0].tolist() == together[1].tolist()


def test_a_cohort_of_one_needs_no_agreement() -> None:
    assert select_layers(np.array([[1.0, 5.0, 3.0]]), np.array([2]), 100.0).tolist() == [[False, True, True]]


def test_many_clients_keep_their_budgets() -> None:
    g = np.random.default_rng(0).exponential(size=(20, 12))
    m = select_layers(g, np.full(20, 3), 0.02)
    assert (m.sum(1) <= 3).all()


# A round.


@dataclass
class Record:
    """What passed the hub: masks and norms by client, what each sent, and the names it sent."""

    masks: dict[int, list[bool]] = field(default_factory=dict)
    norms: dict[int, Tensor] = field(default_factory=dict)
    sent: dict[int, set[str]] = field(default_factory=dict)

    def tap(self, hub: Hub, patch: pytest.MonkeyPatch) -> None:
        on, fold = hub.on, hub.fold

        def listening_on(*arguments: Any) -> list[Order]:
            orders = on(*arguments)
            for order in orders:
                if isinstance(order, Send) and order.job.phase == "train":
                    self.masks[order.client] = (order.job.payload[MASK] > 0).tolist()
            return orders

        def listening_fold(reports: Sequence[Report], updates: Tree, present: Mapping[str, Tensor]) -> None:
            for place, report in enumerate(reports):
                if report.phase == "probe":
                    self.norms[report.client] = updates[NORMS][place]
                else:
                    self.sent[report.client] = {
                        n for n in updates if n not in present or present[n][place] > 0
                    }
            fold(reports, updates, present)

        patch.setattr(hub, "on", listening_on)
        patch.setattr(hub, "fold", listening_fold)


LAYERS = ("extractor.linear1", "extractor.linear2", "head")
MODEL = {"name": "mlp", "hidden": [6, 5]}


def one_round(digits: Build, patch: pytest.MonkeyPatch, **sections: Any) -> tuple[Federation, Record, Tree]:
    federation = digits(**{"model": MODEL, "stop": {"rounds": 1}, **sections})
    simulator, record = Simulator(federation), Record()
    record.tap(simulator.hub, patch)
    return federation, record, simulator.run().params


def trained(federation: Federation, client: int, layers: Sequence[str]) -> Tree:
    """A client's model after its job, only ``layers`` trained: with torch.optim.SGD."""
    task, data = federation.task, federation.data
    model = copy.deepcopy(task.module).train()
    model.load_state_dict(task.initial)
    moving = [
        each for layer in layers for each in model.get_submodule(layer).requires_grad_(True).parameters()
    ]
    optimiser = torch.optim.SGD(
        moving, task.local.lr, task.local.momentum, weight_decay=task.local.weight_decay
    )
    mine = data.train_shards.of(client)
    # The probe was the client's job number 0.
    for positions in federation.work.batches(len(mine), seed=0, client=client, number=1):
        optimiser.zero_grad()
        loss = F.cross_entropy(model(data.train.x[mine[positions]]), data.train.y[mine[positions]])
        torch.autograd.backward(loss)
        if task.local.clip_norm is not None:
            grads = [each.grad for each in moving if each.grad is not None]
            norm = torch.stack([each.square().sum() for each in grads]).sum().sqrt()
            for each in grads:
                each *= min(1.0, task.local.clip_norm / float(norm))
        optimiser.step()
    return {name: each.detach() for name, each in model.state_dict().items()}


def chosen_layers(mask: Sequence[bool]) -> list[str]:
    return [layer for layer, on in zip(LAYERS, mask, strict=True) if on]


@pytest.mark.parametrize("mode", ["sequential", "batched"])
def test_a_round_averages_each_layer_over_those_who_train_it(
    digits: Build, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    federation, record, params = one_round(
        digits,
        monkeypatch,
        algorithm={"name": "selective", "budget": [1, 2]},
        schedule={"cohort": 6},
        # None of them may move a layer that was not chosen, nor its gradient shorten the others'.
        train={"momentum": 0.9, "weight_decay": 0.1, "clip_norm": 0.2},
        engine={"mode": mode, "chunk": 4},
    )
    start, sizes = federation.task.initial, federation.data.train_shards.sizes
    models = {
        client: trained(federation, client, chosen_layers(mask)) for client, mask in record.masks.items()
    }
    assert len(models) == 6
    for position, layer in enumerate(LAYERS):
        trainers = [client for client, mask in record.masks.items() if mask[position]]
        for name in (f"{layer}.weight", f"{layer}.bias"):
            if not trainers:
                assert torch.equal(params[name], start[name])  # bit for bit
                continue
            total = sum(float(sizes[client]) for client in trainers)
            expected = sum(
                (models[client][name] * float(sizes[client]) / total for client in trainers), Tensor([0.0])
            )
            assert torch.allclose(params[name], expected, rtol=1e-10, atol=1e-13)


def test_one_trainer_changes_its_layer_fully_and_nobody_a_layer_not_chosen(
    digits: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    federation, record, params = one_round(
        digits,
        monkeypatch,
        algorithm={"name": "selective"},
        schedule={"cohort": 1},
        train={"weight_decay": 0.1},
    )
    ((client, mask),) = record.masks.items()
    assert sum(mask) == 1
    model = trained(federation, client, chosen_layers(mask))
    for name, each in params.items():
        if name.rpartition(".")[0] in chosen_layers(mask):
            assert torch.allclose(each, model[name], rtol=1e-12, atol=1e-14)
            assert not torch.equal(each, federation.task.initial[name])
        else:
            assert torch.equal(each, federation.task.initial[name])


def test_clients_send_what_they_trained_and_running_statistics(
    digits: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    federation, record, _ = one_round(
        digits, monkeypatch, algorithm={"name": "selective", "budget": 2}, model={**MODEL, "norm": "batch"}
    )
    algorithm = federation.algorithm
    assert isinstance(algorithm, SelectiveLayers)
    layers = algorithm.layers(federation.task)
    assert list(layers) == [f"extractor.{each}" for each in ("linear1", "norm1", "linear2", "norm2")] + [
        "head"
    ]
    statistics = {f"extractor.norm{i}.running_{each}" for i in (1, 2) for each in ("mean", "var")}
    for client, mask in record.masks.items():
        names = {name for on, names in zip(mask, layers.values(), strict=True) if on for name in names}
        assert record.sent[client] == names | statistics


def test_the_probe_is_the_squared_norm_of_the_mean_gradient(
    digits: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    federation, record, _ = one_round(
        digits, monkeypatch, algorithm={"name": "selective"}, schedule={"cohort": 6}
    )
    task, train = federation.task, federation.data.train
    model = copy.deepcopy(task.module).train().requires_grad_(True)
    model.load_state_dict(task.initial)
    for client, norms in record.norms.items():
        mine = federation.data.train_shards.of(client)
        loss = F.cross_entropy(model(train.x[mine]), train.y[mine])  # all at once: batches must not matter
        grads = dict(zip(task.trainable, torch.autograd.grad(loss, list(model.parameters())), strict=True))
        for layer, found in zip(LAYERS, norms.tolist(), strict=True):
            expected = sum(float(grads[f"{layer}.{each}"].square().sum()) for each in ("weight", "bias"))
            assert found == pytest.approx(expected, rel=1e-10)


def test_a_short_probe_looks_at_few_batches(digits: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    def norms(**algorithm: Any) -> dict[int, Tensor]:
        made = one_round(
            digits, monkeypatch, algorithm={"name": "selective", **algorithm}, schedule={"cohort": 6}
        )
        return made[1].norms

    whole, short = norms(), norms(probe_steps=1)
    sizes = digits(model=MODEL).data.train_shards.sizes
    for client in range(6):
        one_batch = int(sizes[client]) <= 12
        assert torch.allclose(whole[client], short[client], rtol=1e-12) == one_batch


@pytest.mark.parametrize("mode", ["sequential", "batched"])
def test_a_full_budget_is_fedavg(digits: Build, mode: str) -> None:
    """All train all layers: FedAvg's weighted mean, on the batches of the clients' second jobs."""
    sections = {"model": MODEL, "schedule": {"cohort": 6}, "engine": {"mode": mode}}
    selective = digits(algorithm={"name": "selective", "budget": 3}, stop={"rounds": 1}, **sections)
    found = Simulator(selective).run().params
    sizes = selective.data.train_shards.sizes.double()
    models = [trained(selective, client, LAYERS) for client in range(6)]
    for name, each in found.items():
        expected = sum(
            (sizes[i] / sizes.sum() * model[name] for i, model in enumerate(models)), Tensor([0.0])
        )
        assert torch.allclose(each, expected, rtol=1e-10, atol=1e-13)


def test_budgets_are_given_in_turn_and_kept(digits: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    _, record, _ = one_round(
        digits, monkeypatch, algorithm={"name": "selective", "budget": [1, 3, 2]}, schedule={"cohort": 6}
    )
    for client, mask in record.masks.items():
        assert sum(mask) == (1, 3, 2)[client % 3]  # with λ = 0 every gradient is worth its place


def test_common_tensors_are_trained_by_all_and_cost_nothing(
    digits: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    federation, record, params = one_round(
        digits, monkeypatch, algorithm={"name": "selective", "common": ["head.*"]}, schedule={"cohort": 6}
    )
    algorithm, task = federation.algorithm, federation.task
    assert isinstance(algorithm, SelectiveLayers)
    assert list(algorithm.layers(task)) == list(LAYERS[:2])
    assert all(sum(mask) == 1 for mask in record.masks.values())
    assert all({"head.weight", "head.bias"} <= names for names in record.sent.values())
    sizes = federation.data.train_shards.sizes.double()
    expected = torch.zeros_like(task.initial["head.bias"])
    for client, mask in record.masks.items():
        layers = [*chosen_layers([*mask, True])]
        expected += sizes[client] / sizes.sum() * trained(federation, client, layers)["head.bias"]
    assert torch.allclose(params["head.bias"], expected, rtol=1e-10)


@pytest.mark.parametrize("unit", [1.0, 1e-6, 1e4])
def test_agreement_is_in_units_of_the_mean_of_g(digits: Build, unit: float) -> None:
    """Mean 5/3; two clients part while 2 λ < 1: up to an agreement of 0.3, whatever the gradients' size."""
    g = unit * torch.tensor([[3.0, 2.0, 0.0], [2.0, 3.0, 0.0]], dtype=torch.float64)
    reports = [Report(client, 0, "probe", 9, 1, 0, 0.0, 1.0) for client in (2, 5)]

    def masks(agreement: float) -> set[tuple[float, ...]]:
        federation = digits(algorithm={"name": "selective", "agreement": agreement}, model=MODEL)
        algorithm, task = federation.algorithm, federation.task
        state = algorithm.init(task, clients=6, horizon=1)
        chosen = algorithm.apply(task, state, {NORMS: g}, reports, "probe").slots["selection"]
        assert chosen.keys() == {"2", "5"}
        return {tuple(each.tolist()) for each in chosen.values()}

    assert masks(0.2) == {(1, 0, 0), (0, 1, 0)}
    assert len(masks(0.4)) == 1


def test_the_probe_changes_nothing(digits: Build) -> None:
    federation = digits(algorithm={"name": "selective"}, model={**MODEL, "norm": "batch"})
    task, algorithm = federation.task, federation.algorithm
    private = algorithm.private(task)
    state = algorithm.init(task, clients=6, horizon=1)
    carry = algorithm.begin(task, state.params, private, "probe")
    batch = {"x": federation.data.train.x[:12], "y": federation.data.train.y[:12]}
    carry, _ = algorithm.step(task, carry, batch, "probe")
    update, kept = algorithm.finish(task, carry, "probe")
    assert update.keys() == {NORMS}
    assert all(torch.equal(each, private[name]) for name, each in kept.items())
    assert all(
        torch.equal(each, state.params[name]) for name, each in pick(carry["params"], task.shared).items()
    )


# What is refused.


@pytest.mark.parametrize(
    ("sections", "field"),
    [
        ({"algorithm": {"budget": 4}}, "algorithm.budget"),
        ({"algorithm": {"budget": 0}}, "algorithm.budget"),
        ({"algorithm": {"budget": [1, 9]}}, "algorithm.budget"),
        ({"algorithm": {"common": ["nothing.*"]}}, "algorithm.common"),
        ({"algorithm": {"common": ["*"]}}, "algorithm.common"),
        ({"schedule": {"name": "buffered", "k": 2, "concurrency": 4}}, "schedule.name"),
        ({"aggregation": {"rule": "median"}}, "aggregation.rule"),
    ],
)
def test_impossible_settings_are_refused(digits: Build, sections: dict[str, Any], field: str) -> None:
    algorithm = {"name": "selective", **sections.pop("algorithm", {})}
    with pytest.raises(InputError) as caught:
        digits(algorithm=algorithm, model=MODEL, **sections)
    assert caught.value.field == field
