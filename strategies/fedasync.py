"""FedAsync.

Source: Xie et al., "Asynchronous Federated Optimization", arXiv 1903.03934, Algorithm 1: at each arrival
``x ← (1 − α_t) x + α_t x_new`` with ``α_t = α s(τ)``. What is mixed is the client's *model*, so everything
that happened since it was sent is undone by the factor α_t as well. Clients minimise
``f_i(w) + (ρ/2)‖w − x‖²``. s is the weights' (constant, polynomial, hinge); α itself is never changed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from hansa.core.algorithm import Carry, Report, State
from hansa.core.errors import InputError
from hansa.core.ranges import NonNegative, Share
from hansa.core.task import Task
from hansa.core.trees import Tree, pick
from hansa.core.weights import Weights
from hansa.strategies.fedprox import FedProx


@dataclass(frozen=True, kw_only=True)
class FedAsync(FedProx):
    """The server's model moves towards each client's as it comes, less the staler it is.

    Of several updates in one step the models' weighted mean is mixed in.

    Attributes
    ----------
    server_lr: α, at most 1.
    mu: ρ of the clients' proximal term.
    """

    server_lr: Share = 0.6
    mu: NonNegative = 0.005
    weights: Weights = field(default_factory=lambda: Weights(target="uniform", staleness="polynomial"))

    source: ClassVar[str] = "Xie et al., arXiv 1903.03934"
    family: ClassVar[str] = "asynchronous"
    peers: ClassVar[bool] = False

    def check_weights(self) -> None:
        """A convex combination of models only."""
        super().check_weights()
        if self.weights.absolute:
            raise InputError(
                "weights.frequency",
                self.weights.frequency,
                "FedAsync mixes models, and α s(τ) p_i/f_i may exceed 1",
                'use weights.frequency = "equal", or algorithm.name = "fedavg"',
            )

    def origin(self, task: Task, state: State) -> Tree:
        """Clients send models."""
        return state.params

    def apply(self, task: Task, state: State, reduced: Tree, reports: Sequence[Report], phase: str) -> State:
        """``x ← (1 − α s) x + α s x_new``; running statistics are the client's."""
        models, values = self.split(task, reduced)
        alpha = self.server_lr * self.weights.mass(reports)
        mixed = {n: state.params[n] + alpha * (model - state.params[n]) for n, model in models.items()}
        return dataclasses.replace(state, params={**state.params, **mixed, **values})

    def stretch(self, task: Task, reduced: Tree, mass: float) -> Tree:
        """Models are not changes: s enters with α."""
        return reduced

    def finish(self, task: Task, carry: Carry, phase: str) -> tuple[Tree, Tree]:
        """Send the model, keep the local tensors."""
        return pick(carry["params"], task.shared), pick(carry["params"], task.local_names)
