"""A client's job, step by step: the loop that an engine runs where the data is.

The simulator's sequential tier and the agents of a real federation run this same loop, on the same
mini-batches and noise, which are drawn from (seed, client, job number) wherever it runs.

Shapes: k works, T steps, B examples in a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hansa.core.algorithm import Job
from hansa.core.batches import Ints, Plan
from hansa.core.randomness import ALONE, torch_generator, word
from hansa.core.task import Batch
from hansa.core.trees import Tree
from hansa.core.values import value
from hansa.strategies.catalog import Federation


@value()
class Work:
    """One job to compute: ``steps`` cuts it short."""

    client: int
    job: Job
    private: Tree
    steps: int | None = None


@dataclass(frozen=True)
class Trained:
    """What one job gave; ``loss`` is the mean training loss over its ``steps``."""

    update: Tree
    private: Tree
    loss: float
    steps: int


@dataclass(frozen=True)
class Planned:
    """The mini-batches of k works, as indices into the training examples.

    Attributes
    ----------
    plan: in positions of each client's own examples.
    indices: all clients' examples.
    starts: where those of each work begin [k].
    """

    plan: Plan
    indices: Ints
    starts: Ints

    @property
    def sizes(self) -> Ints:
        """Examples of each mini-batch [k, T], zero behind the last."""
        return self.plan.sizes

    def of(self, row: int) -> Iterator[Tensor]:
        """Indices [b] of one work, batch by batch."""
        for step in range(np.count_nonzero(self.sizes[row])):
            yield self.at(step, np.array([row]))[0]

    def at(self, step: int, rows: Ints, width: int | None = None) -> Tensor:
        """Indices [r, B] of works ``rows`` at a step; batches shorter than the longest repeat their first."""
        places = self.starts[rows, None] + self.plan.at(step, rows, width)
        return torch.from_numpy(self.indices[places])


class Data:
    """The mini-batches of works."""

    def __init__(self, federation: Federation, seed: int) -> None:
        self.federation, self.seed = federation, seed
        self.whole = 2 if federation.task.mixes_examples() else 1

    def plan(self, works: Sequence[Work]) -> Planned:
        """All mini-batches of works of one phase."""
        f = self.federation
        shards = f.data.train_shards
        clients = np.array([work.client for work in works])
        offsets = shards.offsets.numpy()
        plan = f.algorithm.work(f.work, works[0].job.phase).plan(
            offsets[clients + 1] - offsets[clients],
            seed=self.seed,
            clients=clients,
            numbers=np.array([work.job.number for work in works]),
            whole=self.whole,
        )
        if any(work.steps is not None for work in works):
            most = plan.sizes.shape[1]
            plan = plan.cut(np.array([most if work.steps is None else work.steps for work in works]))
        return Planned(plan, shards.indices.numpy(), offsets[clients])

    def batch(self, indices: Tensor) -> Batch:
        """Examples under ``indices`` of any shape."""
        train, flat = self.federation.data.train, indices.flatten()
        x, y = (each.index_select(0, flat.to(each.device)) for each in (train.x, train.y))
        return {"x": x.view(*indices.shape, *x.shape[1:]), "y": y.view(*indices.shape, *y.shape[1:])}

    def noise(self, work: Work, step: int, examples: int) -> Batch:
        """The normal draws that the algorithm asked for."""
        f = self.federation
        shapes = f.algorithm.noise(f.task, work.job.phase, examples)
        if not shapes:
            return {}
        rng = torch_generator(self.seed, "noise", work.client, work.job.number, step)
        draws = {n: torch.randn(shape, generator=rng, dtype=torch.float64) for n, shape in shapes.items()}
        return {name: each.to(f.task.dtype).to(f.task.device) for name, each in draws.items()}

    @cached_property
    def _random(self) -> bool:
        some = torch.arange(min(2, len(self.federation.data.train.x)))
        return self.federation.task.stochastic(self.batch(some)["x"])

    @contextmanager
    def own_numbers(self, work: Work, step: int) -> Iterator[None]:
        """A forward pass may draw numbers: they belong to the job."""
        if not self._random:
            yield
            return
        with ALONE, torch.random.fork_rng(devices=[]):
            torch.manual_seed(word(self.seed, "dropout", work.client, work.job.number, step) >> 1)
            yield


def train(
    data: Data,
    work: Work,
    batches: Iterable[Tensor] | None = None,
    *,
    halt: Callable[[int], bool] = lambda steps: False,
    clock: Callable[[str], AbstractContextManager[Any]] = lambda kind: nullcontext(),
) -> Trained:
    """Compute one job.

    Parameters
    ----------
    batches: indices [b] of its mini-batches, where they are planned already.
    halt: asked before each step, with the steps done, whether to end here.
    clock: counts what is done, ``data`` and ``step``.
    """
    f, phase = data.federation, work.job.phase
    carry = f.algorithm.begin(f.task, work.job.payload, work.private, phase)
    total, seen, steps = torch.zeros((), dtype=torch.float64, device=f.task.device), 0, 0
    for indices in data.plan([work]).of(0) if batches is None else batches:
        if halt(steps):
            break
        with clock("data"):
            batch = {**data.batch(indices), **data.noise(work, steps, len(indices))}
        with clock("step"), data.own_numbers(work, steps):
            carry, metrics = f.algorithm.step(f.task, carry, batch, phase)
        total += metrics["loss"] * len(indices)
        seen, steps = seen + len(indices), steps + 1
    update, private = f.algorithm.finish(f.task, carry, phase)
    return Trained(update, private, float(total) / seen if seen else 0.0, steps)
