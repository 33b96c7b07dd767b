"""FedAvg, and training without a federation.

Source: McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data",
AISTATS 2017, arXiv 1602.05629, Algorithm 1. The server adds the mean change instead of replacing the
model by the mean model: the same for a step size of 1, and what every algorithm below builds on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from hansa.core.algorithm import Algorithm, Carry, Report, State
from hansa.core.partition import Partition, Rule
from hansa.core.ranges import Positive
from hansa.core.task import Batch, Metrics, Task
from hansa.core.trees import Tree, add, pick


@dataclass(frozen=True, kw_only=True)
class FedAvg(Algorithm):
    """Local SGD from the received model; ``x ← x + η_g Σ n_i Δ_i / Σ n_i``.

    Attributes
    ----------
    server_lr: η_g; running statistics take the plain mean of the clients'.
    """

    server_lr: Positive = 1.0

    source: ClassVar[str] = "McMahan et al., arXiv 1602.05629"
    peers: ClassVar[bool] = True

    def apply(self, task: Task, state: State, reduced: Tree, reports: Sequence[Report], phase: str) -> State:
        """Add the mean change."""
        changes, values = self.split(task, reduced)
        return dataclasses.replace(state, params={**add(state.params, changes, self.server_lr), **values})

    def split(self, task: Task, update: Tree) -> tuple[Tree, Tree]:
        """(changes to add, running statistics to set)."""
        settled = self.values(task).intersection(update)
        return pick(update, (name for name in update if name not in settled)), pick(update, settled)

    def begin(self, task: Task, payload: Tree, private: Tree, phase: str) -> Carry:
        """The received model with the client's own local tensors in place."""
        params = {**pick(payload, task.shared), **pick(private, task.local_names)}
        return {
            "start": pick(payload, task.shared),
            "params": params,
            "velocity": task.local.start(pick(params, task.trainable)),
            "work": {"steps": torch.zeros((), dtype=task.dtype, device=task.device)},
        }

    def direction(self, task: Task, carry: Carry, batch: Batch) -> tuple[Tree, Metrics, Tree]:
        """(gradient, metrics, buffers): what the local optimiser descends along."""
        return task.gradient(carry["params"], batch)

    def step(self, task: Task, carry: Carry, batch: Batch, phase: str) -> tuple[Carry, Metrics]:
        """One SGD step."""
        grads, metrics, buffers = self.direction(task, carry, batch)
        params = carry["params"]
        moved, velocity = task.local.step(pick(params, task.trainable), grads, carry["velocity"])
        return {
            **carry,
            "params": {**params, **moved, **buffers},
            "velocity": velocity,
            "work": {"steps": carry["work"]["steps"] + 1},
        }, metrics

    def change(self, task: Task, carry: Carry) -> Tree:
        """Δ of the shared tensors: after minus before. Of running statistics, the value after."""
        after = carry["params"]
        return {n: after[n] if n in task.buffers else after[n] - old for n, old in carry["start"].items()}

    def finish(self, task: Task, carry: Carry, phase: str) -> tuple[Tree, Tree]:
        """Send the change, keep the local tensors."""
        return self.change(task, carry), pick(carry["params"], task.local_names)


@dataclass(frozen=True, kw_only=True)
class LocalOnly(FedAvg):
    """No federation: every client trains its own copy. The baseline that a federation must beat."""

    source: ClassVar[str] = "baseline"
    partition: ClassVar[Partition] = Partition((Rule("*", "local"),))
    peers: ClassVar[bool] = False
