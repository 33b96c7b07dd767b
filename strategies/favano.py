"""FAVANO (FAVAS).

Source: Leconte et al., "FAVANO: Federated AVeraging with Asynchronous NOdes", ICASSP 2024, arXiv 2305.16099.
Clients train all the time, at most K steps after each contact. At every tick the server contacts s of them at
random, finished or not, and mixes ``x ← (x + Σ_S ŵ_i)/(s + 1)``, where ``ŵ_i = w_i⁰ + (w_i − w_i⁰)/α_i``: the
client's progress from its own start, reweighted so that every contact is worth one gradient whatever the
client's speed. With E the steps since the last contact: α_i = E[E ∧ K] (deterministic), or
α_i = P(E > 0) (E ∧ K) (stochastic). Both moments are counted by the client itself, over its contacts so far.

FAVANO[QNN] trains quantised networks: weights and gradients in b bits by logarithmic unbiased quantisation
(``hansa.strategies.luq``); activations stay as they are.

The timing is the periodic schedule's with ``recall``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field

from hansa.core.algorithm import Carry, Report, State
from hansa.core.errors import InputError
from hansa.core.ranges import Positive, Share
from hansa.core.schedule import Schedule
from hansa.core.task import Batch, Metrics, Task
from hansa.core.trees import Tree, add, pick, put_under, take_under
from hansa.core.weights import Weights
from hansa.strategies.fedavg import FedAvg
from hansa.strategies.luq import quantise
from hansa.strategies.periodic import Periodic

PAST = "favano"  # a client's contacts, those that found work done, and the steps in all


@dataclass(frozen=True, kw_only=True)
class FAVANO(FedAvg):
    """Averaging with asynchronous nodes: unfinished clients contribute what they have.

    Attributes
    ----------
    server_lr: factor on the server's mixing s/(s + 1); 1 in the paper.
    reweighting: α_i: ``stochastic``, ``deterministic``, or ``none`` for 1.
    floor: least α_i, for clients that have hardly ever progressed; it biases against them.
    bits: of quantised weights and gradients in local training; without, no quantisation.
    """

    server_lr: Share = 1.0
    reweighting: Literal["stochastic", "deterministic", "none"] = "stochastic"
    floor: Positive = 0.1
    bits: Annotated[int, Field(ge=2, le=8)] | None = None
    weights: Weights = field(default_factory=lambda: Weights(target="uniform"))

    source: ClassVar[str] = "Leconte et al., arXiv 2305.16099"
    family: ClassVar[str] = "asynchronous"
    peers: ClassVar[bool] = False

    def check(self, task: Task, schedule: Schedule) -> None:
        """Clients are contacted at random, whatever they have done."""
        super().check(task, schedule)
        if not (isinstance(schedule, Periodic) and schedule.recalls):
            raise InputError(
                "schedule.recall",
                None,
                "FAVANO contacts clients at random and takes what they have",
                'use schedule.name = "periodic" with schedule.recall',
            )

    def weigh(self, report: Report) -> float:
        """Uniform: α_i does the rest."""
        return 1.0

    def origin(self, task: Task, state: State) -> Tree:
        """Clients send models."""
        return state.params

    def apply(self, task: Task, state: State, reduced: Tree, reports: Sequence[Report], phase: str) -> State:
        """``x ← (x + Σ ŵ_i)/(s + 1)``; running statistics take the plain mean."""
        models, values = self.split(task, reduced)
        part = self.server_lr * len(reports) / (len(reports) + 1)
        mixed = {n: state.params[n] + part * (model - state.params[n]) for n, model in models.items()}
        return dataclasses.replace(state, params={**state.params, **mixed, **values})

    # The client.

    def private(self, task: Task) -> Tree:
        """No contact yet."""
        counts = {
            name: torch.zeros((), dtype=task.dtype, device=task.device)
            for name in ("contacts", "worked", "steps")
        }
        return {**super().private(task), **put_under(PAST, counts)}

    def noise(self, task: Task, phase: str, examples: int) -> Mapping[str, tuple[int, ...]]:
        """What stochastic rounding needs."""
        if self.bits is None:
            return {}
        shapes = {name: tuple(task.initial[name].shape) for name in task.trainable}
        return {f"{kind}/{name}": shape for kind in ("weight", "gradient") for name, shape in shapes.items()}

    def begin(self, task: Task, payload: Tree, private: Tree, phase: str) -> Carry:
        """Adds what the client counted."""
        return {**super().begin(task, payload, private, phase), PAST: take_under(PAST, private)}

    def direction(self, task: Task, carry: Carry, batch: Batch) -> tuple[Tree, Metrics, Tree]:
        """The gradient; of a quantised network quantised, at quantised weights."""
        if self.bits is None:
            return super().direction(task, carry, batch)
        bits, params = self.bits, carry["params"]
        coarse = {n: quantise(params[n], batch[f"weight/{n}"], bits) for n in task.trainable}
        at = {**carry, "params": {**params, **coarse}}
        grads, metrics, buffers = super().direction(task, at, {"x": batch["x"], "y": batch["y"]})
        return {n: quantise(g, batch[f"gradient/{n}"], bits) for n, g in grads.items()}, metrics, buffers

    def finish(self, task: Task, carry: Carry, phase: str) -> tuple[Tree, Tree]:
        """Send ŵ_i, keep the counts."""
        change, private = super().finish(task, carry, phase)
        steps = carry["work"]["steps"]
        news = {"contacts": torch.ones_like(steps), "worked": (steps > 0).to(steps), "steps": steps}
        past = add(carry[PAST], news)
        match self.reweighting:
            case "deterministic":
                alpha = past["steps"] / past["contacts"]
            case "stochastic":
                alpha = past["worked"] / past["contacts"] * steps
            case "none":
                alpha = torch.ones_like(steps)
        alpha = alpha.clamp_min(self.floor)
        start = carry["start"]
        models = {n: u if n in task.buffers else start[n] + u / alpha for n, u in change.items()}
        return models, {**pick(private, task.local_names), **put_under(PAST, past)}
