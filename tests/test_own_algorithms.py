"""Algorithms of a user's own: what they get wrong is told before the run, by the method that errs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from hansa.core.algorithm import Carry, Report, State
from hansa.core.errors import InputError
from hansa.core.recipe import Recipe, parse
from hansa.core.task import Batch, Task
from hansa.core.trees import Tree
from hansa.simulation.simulator import Simulator
from hansa.strategies.catalog import assemble
from hansa.strategies.fedavg import FedAvg


def recipe(kind: type[FedAvg], **sections: Any) -> Recipe:
    return parse(
        {
            "data": {"limit": 100},
            "partition": {"clients": 4},
            "model": {"name": "logistic"},
            "schedule": {"cohort": 4},
            "stop": {"rounds": 2},
            "algorithm": {"name": f"{__name__}:{kind.__name__}"},
            **sections,
        }
    )


@dataclass(frozen=True, kw_only=True)
class Remembers(FedAvg):
    """A slot at the server, a count with each client, two phases."""

    phases = ("train", "again")

    def init(self, task: Task, *, clients: int, horizon: int) -> State:
        state = super().init(task, clients=clients, horizon=horizon)
        return dataclasses.replace(state, slots={"steps": {"n": torch.zeros(())}})

    def private(self, task: Task) -> Tree:
        return {"own/jobs": torch.zeros(())}

    def begin(self, task: Task, payload: Tree, private: Tree, phase: str) -> Carry:
        return {**super().begin(task, payload, private, phase), "own": dict(private)}

    def finish(self, task: Task, carry: Carry, phase: str) -> tuple[Tree, Tree]:
        return super().finish(task, carry, phase)[0], {"own/jobs": carry["own"]["own/jobs"] + 1}

    def apply(self, task: Task, state: State, reduced: Tree, reports: Sequence[Report], phase: str) -> State:
        state = super().apply(task, state, reduced, reports, phase)
        return dataclasses.replace(state, slots={"steps": {"n": state.slots["steps"]["n"] + 1}})


def test_what_is_right_is_tried_without_a_trace() -> None:
    simulator = Simulator(assemble(recipe(Remembers)))
    simulator.run()
    assert simulator.hub.state.slots["steps"]["n"] == 4
    assert simulator.private(0)["own/jobs"] == 4


def test_slots_are_refused_where_there_is_no_server() -> None:
    with pytest.raises(InputError, match=r"keeps slots at a server.* set peers = False"):
        assemble(recipe(Remembers, topology={"kind": "ring"}))


def test_phases_are_refused_where_nobody_waits_for_the_others() -> None:
    with pytest.raises(InputError, match="there is a barrier between its phases"):
        assemble(recipe(Remembers, schedule={"name": "buffered", "k": 2, "concurrency": 3}))


class NoState(FedAvg):
    def apply(self, *arguments: Any, **named: Any) -> Any:
        super().apply(*arguments, **named)


class OneRow(FedAvg):
    def apply(self, *arguments: Any, **named: Any) -> State:
        state = super().apply(*arguments, **named)
        return dataclasses.replace(state, params={n: each[:1] for n, each in state.params.items()})


class NoPrivate(FedAvg):
    def finish(self, *arguments: Any, **named: Any) -> Any:
        return super().finish(*arguments, **named)[0]


class Misspelt(FedAvg):
    def finish(self, *arguments: Any, **named: Any) -> tuple[Tree, Tree]:
        update, private = super().finish(*arguments, **named)
        return {name.upper(): each for name, each in update.items()}, private


class KeepsMore(FedAvg):
    def finish(self, *arguments: Any, **named: Any) -> tuple[Tree, Tree]:
        return super().finish(*arguments, **named)[0], {"own/jobs": torch.ones(())}


class Fails(FedAvg):
    def begin(self, *arguments: Any, **named: Any) -> Carry:
        raise KeyError("control")


class InPlace(FedAvg):
    def step(self, task: Task, carry: Carry, batch: Batch, phase: str) -> Any:
        grads, metrics, _ = self.direction(task, carry, batch)
        for name, gradient in grads.items():
            carry["params"][name] -= task.local.lr * gradient
        return carry, metrics


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (NoState, "apply returned NoneType; return the next State"),
        (OneRow, r"the model after apply has \S+ of shape \[1, 64\], not \[10, 64\]"),
        (NoPrivate, r"finish returned dict; return \(update, private\)"),
        (Misspelt, r"the update has 'LINEAR.BIAS'; use the model's names, or your own with a /"),
        (KeepsMore, r"what finish keeps has 'own/jobs'; return the names that private\(\) has"),
        (Fails, r"begin fails with KeyError: 'control'"),
        (InPlace, r"changes tensors that it was given: \S+; make new ones"),
    ],
)
def test_what_a_method_gets_wrong_is_told_before_the_run(kind: type[FedAvg], words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        assemble(recipe(kind))
    assert caught.value.field == "algorithm.name"
