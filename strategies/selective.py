"""Selective layer fine-tuning: each client trains a few layers, chosen by the server.

Source: Sun et al., "Exploring Selective Layer Fine-Tuning in Federated Learning", arXiv 2408.15600.
A round has two phases: clients report the squared gradient norm of each layer (``probe``); the server
solves problem (P1) for the masks and clients train their selected layers (``train``). Three departures from
the released code: local steps do move the model, g_il is the squared norm of the mean gradient over the
local data (both as in the paper), and budget that (P1) leaves unused stays unused. The solver is a local
search.

Shapes: N clients of a round, L layers, g and m [N, L].
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from hansa.core.algorithm import Carry, Report, State
from hansa.core.errors import InputError
from hansa.core.ranges import Count, NonNegative
from hansa.core.reducer import Keep, Reducer
from hansa.core.schedule import Schedule
from hansa.core.task import Batch, LocalWork, Metrics, Task
from hansa.core.trees import Tree, add, pick, zeros_like
from hansa.strategies.fedavg import FedAvg

NORMS, MASK = "probe/norms", "selection/mask"
Matrix = NDArray[np.float64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class SelectiveLayers(FedAvg):
    """FedAvg in which each client trains and sends at most R_i layers; a layer is averaged over its trainers.

    Attributes
    ----------
    budget: layers per client, R_i; several values are given to clients in turn.
    agreement: weight λ of the disagreement between clients, in units of the mean of g; 0 lets every
        client take its own top layers, a large value makes all choose the same.
    common: name patterns of tensors that every client trains besides its budget.
    probe_steps: mini-batches for the probe; all local data by default.
    """

    budget: int | tuple[int, ...] = 1
    agreement: NonNegative = 0.0
    common: tuple[str, ...] = ()
    probe_steps: Count | None = None

    source: ClassVar[str] = "Sun et al., arXiv 2408.15600"
    family: ClassVar[str] = "layer-selective"
    phases: ClassVar[tuple[str, ...]] = ("probe", "train")
    peers: ClassVar[bool] = False

    needs_rounds: ClassVar[str | None] = (
        "selective layers probe all clients of a round before any of them trains"
    )
    needs_mean: ClassVar[str | None] = (
        "clients send different layers, and a robust rule must compare whole updates"
    )

    def check(self, task: Task, schedule: Schedule) -> None:
        """Budgets and names that the model can meet."""
        super().check(task, schedule)
        for pattern in self.common:
            if not fnmatch.filter(task.trainable, pattern):
                raise InputError(
                    "algorithm.common",
                    pattern,
                    "no trainable tensor has such a name",
                    "see the names in the model",
                )
        layers = self.layers(task)
        if not layers:
            raise InputError("algorithm.common", self.common, "no layer is left to choose from", "name fewer")
        for budget in self._budgets():
            if not 1 <= budget <= len(layers):
                raise InputError(
                    "algorithm.budget",
                    budget,
                    f"the model has {len(layers)} layers to choose from ({', '.join(layers)})",
                    f"use 1 to {len(layers)}",
                )

    def layers(self, task: Task) -> dict[str, tuple[str, ...]]:
        """Selectable layers in the model's order: module name -> its trainable shared tensors."""
        found: dict[str, list[str]] = {}
        for name in task.trainable:
            if name in task.shared and not self._is_common(name):
                found.setdefault(name.rpartition(".")[0], []).append(name)
        return {layer: tuple(names) for layer, names in found.items()}

    def _is_common(self, name: str) -> bool:
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in self.common)

    def _budgets(self) -> tuple[int, ...]:
        return (self.budget,) if isinstance(self.budget, int) else self.budget

    # The hub.

    def fold(self, phase: str) -> Reducer:
        """The probe's norms are kept one by one."""
        return Keep() if phase == "probe" else self.reducer

    def issue(self, task: Task, state: State, client: int, phase: str) -> tuple[Tree, frozenset[str] | None]:
        """To the train phase goes the client's mask; it sends what it trained, and buffers."""
        if phase == "probe":
            return state.params, None
        mask = state.slots["selection"][str(client)]
        layers = self.layers(task)
        off = {n for chosen, names in zip(mask, layers.values(), strict=True) if not chosen for n in names}
        return {**state.params, MASK: mask}, frozenset(name for name in task.shared if name not in off)

    def apply(self, task: Task, state: State, reduced: Tree, reports: Sequence[Report], phase: str) -> State:
        """After the probe, choose; after training, add each layer's mean change."""
        if phase == "train":
            return super().apply(task, dataclasses.replace(state, slots={}), reduced, reports, phase)
        g = reduced[NORMS].double().cpu().numpy()
        budgets = self._budgets()
        allowed = np.array([budgets[report.client % len(budgets)] for report in reports])
        chosen = torch.from_numpy(select_layers(g, allowed, self.agreement * float(g.mean())))
        masks = {
            str(r.client): m.to(task.dtype).to(task.device) for r, m in zip(reports, chosen, strict=True)
        }
        return dataclasses.replace(state, slots={"selection": masks})

    # The client.

    def work(self, work: LocalWork, phase: str) -> LocalWork:
        """The probe sees all local data once, or ``probe_steps`` batches."""
        if phase == "train":
            return work
        return LocalWork(epochs=1, steps=self.probe_steps, batch_size=work.batch_size)

    def begin(self, task: Task, payload: Tree, private: Tree, phase: str) -> Carry:
        """The probe gathers a gradient; training keeps its mask."""
        carry = super().begin(task, payload, private, phase)
        if phase == "probe":
            total = zeros_like(pick(carry["params"], task.trainable))
            return {
                **carry,
                "total": total,
                "work": {"examples": torch.zeros((), dtype=task.dtype, device=task.device)},
            }
        return {**carry, "mask": {MASK: payload[MASK]}}

    def direction(self, task: Task, carry: Carry, batch: Batch) -> tuple[Tree, Metrics, Tree]:
        """The gradient by the selected layers alone, for it may be clipped."""
        grads, metrics, buffers = super().direction(task, carry, batch)
        return self._chosen(task, carry, grads, zeros_like(grads)), metrics, buffers

    def _chosen(self, task: Task, carry: Carry, tree: Tree, otherwise: Tree) -> Tree:
        """``tree``, with what belongs to layers that are not selected from ``otherwise``."""
        made = dict(tree)
        for position, names in enumerate(self.layers(task).values()):
            chosen = carry["mask"][MASK][position] > 0
            made |= {name: torch.where(chosen, tree[name], otherwise[name]) for name in names}
        return made

    def step(self, task: Task, carry: Carry, batch: Batch, phase: str) -> tuple[Carry, Metrics]:
        """Gather the gradient, or train the selected layers."""
        if phase == "probe":
            grads, metrics, _ = task.gradient(carry["params"], batch)
            size = len(batch["x"])
            examples = {"examples": carry["work"]["examples"] + size}
            return {**carry, "total": add(carry["total"], grads, size), "work": examples}, metrics
        after, metrics = super().step(task, carry, batch, phase)
        # Not only the gradient: weight decay must not move the others either.
        return {**after, "params": self._chosen(task, carry, after["params"], carry["params"])}, metrics

    def finish(self, task: Task, carry: Carry, phase: str) -> tuple[Tree, Tree]:
        """L numbers after the probe; the change after training."""
        update, private = super().finish(task, carry, phase)
        if phase == "train":
            return update, private
        examples = carry["work"]["examples"].clamp_min(1.0)
        norms = [
            torch.stack([(carry["total"][n] / examples).square().sum() for n in names]).sum()
            for names in self.layers(task).values()
        ]
        return {NORMS: torch.stack(norms)}, private


def objective(m: Mask, g: Matrix, weight: float) -> float:
    """(P1): ``Σ_il m_il g_il − λ Σ_{i<j} ‖m_i − m_j‖²``; the second sum is ``Σ_l n_l (N − n_l)``."""
    holders = m.sum(0)
    return float((m * g).sum() - weight * (holders * (len(m) - holders)).sum())


def own_top_layers(g: Matrix, budgets: NDArray[np.int_]) -> Mask:
    """Each client's R_i layers of largest g: the solution for λ = 0."""
    rank = (-g).argsort(1, kind="stable").argsort(1)
    mask: Mask = rank < budgets[:, None]
    return mask


def common_layers(g: Matrix, budgets: NDArray[np.int_]) -> Mask:
    """The same ranking, by Σ_i g_il, for all: the solution for λ → ∞ and equal budgets."""
    return own_top_layers(np.broadcast_to(g.sum(0), g.shape), budgets)


def select_layers(g: Matrix, budgets: NDArray[np.int_], weight: float) -> Mask:
    """Masks m [N, L] for (P1) under ``Σ_l m_il ≤ R_i``.

    A client's marginal value of layer l, given the others, is ``g_il − λ (N − 1 − 2 n_l,−i)``, so best
    responses climb the objective; joint moves of all holders of a layer leave the ridges on which no
    single client can improve. Never below :func:`own_top_layers` or :func:`common_layers`.
    """
    starts = (own_top_layers(g, budgets), common_layers(g, budgets), np.zeros(g.shape, dtype=bool))
    climbed = [_climb(start, g, budgets, weight) for start in starts]
    return max(climbed, key=lambda m: objective(m, g, weight))


def _climb(m: Mask, g: Matrix, budgets: NDArray[np.int_], weight: float) -> Mask:
    best = objective(m, g, weight)
    while True:
        m = _best_responses(m, g, budgets, weight)
        moved = max(_joint_moves(m, g, budgets), key=lambda each: objective(each, g, weight), default=m)
        reached = objective(moved, g, weight)
        if reached <= best + 1e-12 * abs(best):
            return moved
        m, best = moved, reached


def _best_responses(m: Mask, g: Matrix, budgets: NDArray[np.int_], weight: float) -> Mask:
    m = m.copy()
    for _ in range(100):  # each sweep climbs; far fewer are ever needed
        before = m.copy()
        for i in range(len(m)):
            others = m.sum(0) - m[i]
            value = g[i] - weight * (len(m) - 1 - 2 * others)
            best = (-value).argsort(kind="stable")[: budgets[i]]
            m[i] = False
            m[i, best[value[best] > 0]] = True
        if (m == before).all():
            break
    return m


def _joint_moves(m: Mask, g: Matrix, budgets: NDArray[np.int_]) -> list[Mask]:
    """All holders of a layer swap it for another; all drop it; all take it, giving up their least if full."""
    layers = m.shape[1]
    moves: list[Mask] = [m]
    for a in range(layers):
        dropped = m.copy()
        dropped[:, a] = False
        taken = m.copy()
        for i in np.flatnonzero(~m[:, a]):
            if taken[i].sum() >= budgets[i]:
                held = np.flatnonzero(taken[i])
                taken[i, held[g[i, held].argmin()]] = False
            taken[i, a] = True
        moves += [dropped, taken]
        for b in range(layers):
            if a != b:
                swapped = m.copy()
                movers = m[:, a] & ~m[:, b]
                swapped[movers, a], swapped[movers, b] = False, True
                moves.append(swapped)
    return moves
