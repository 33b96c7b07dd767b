"""Plain local SGD of many clients at once, the update fused into the backward pass.

FedAvg's clients, and all whose local work is the same, do nothing but ``w ← w − η ∇f(w)``. Then no gradient
need ever exist, and often no client's own weights: see :mod:`hansa.simulation.moving` for what is kept
instead and :mod:`hansa.simulation.operations` for what runs. Short batches are filled with examples of
weight zero. Models that mix examples (BatchNorm) do not come here.

The first cohort is checked: two clients, two steps, against the plain path.

Shapes: K clients in a chunk of which A are active, B examples a client and step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from hansa.core.algorithm import Algorithm
from hansa.core.batches import Ints, Plan
from hansa.core.folding import close, sound
from hansa.core.sums import BLOCK
from hansa.core.task import Batch, Task
from hansa.core.trees import Tree, doubled
from hansa.simulation.cohort import Data, Planned, Results, SequentialTrainer, Trainer, Work, pair
from hansa.simulation.lanes import one_thread
from hansa.simulation.moving import Moving, Usual
from hansa.simulation.operations import Fused
from hansa.simulation.stopwatch import Stopwatch
from hansa.strategies.catalog import Federation
from hansa.strategies.fedavg import FedAvg

Model = Callable[[Tensor], Tensor]

_CHECKED = 8  # examples of a batch are enough for a check
_CLIENT_HALF = ("begin", "direction", "step", "change", "finish")


def applies(task: Task, algorithm: Algorithm) -> bool:
    """Whether a job of this algorithm is plain SGD on a model that does not mix examples."""
    kind = type(algorithm)
    stock = isinstance(algorithm, FedAvg) and all(
        getattr(kind, name) is getattr(FedAvg, name) for name in _CLIENT_HALF
    )
    plain = not task.local.momentum and task.local.clip_norm is None
    return stock and plain and kind.noise is Algorithm.noise and not task.buffers


class _Checked(Data):
    """Every example of a batch twice, which changes no mean, and in the precision of the task.

    Of one example each, there would be as many rows as clients, and what confuses the two would pass.
    """

    def plan(self, works: Sequence[Work]) -> Planned:
        """All mini-batches of works of one phase."""
        made = super().plan(works)
        return replace(made, plan=Plan(made.plan.positions.repeat(2, axis=1), 2 * made.plan.sizes))

    def batch(self, indices: Tensor) -> Batch:
        """Examples under ``indices`` of any shape."""
        made = super().batch(indices)
        return doubled(made) if self.federation.task.dtype == torch.float64 else made


class FusedTrainer:
    """Many clients at once; ``otherwise`` takes over where the check fails."""

    def __init__(self, federation: Federation, *, seed: int, chunk: int, otherwise: Trainer) -> None:
        self._federation = federation
        self._seed = seed
        self._data = Data(federation, seed)
        self._otherwise = otherwise
        self._usual = usual(federation)
        self.sound: bool | None = None  # the verdict of the check; a checkpoint keeps it
        self.chunk = -(-chunk // BLOCK) * BLOCK
        self._clock = Stopwatch()
        self.seconds = self._clock.seconds

    @property
    def label(self) -> str:
        """What computes the cohort."""
        if self.sound is False:
            return f"{self._otherwise.label}: the fused tier failed its check"
        return f"fused, {self.chunk} clients at a time"

    def train(self, works: Sequence[Work]) -> Iterator[Results]:
        """Results, about ``chunk`` clients at a time: whole blocks, but for the last."""
        if self.sound is None:
            self.sound = self._check(works)
        if not self.sound:
            yield from self._otherwise.train(works)
            return
        blocks = -(-len(works) // BLOCK)
        parts = -(-blocks // max(self.chunk // BLOCK, 1))
        for part in range(parts):
            start, stop = (blocks * edge // parts * BLOCK for edge in (part, part + 1))
            yield self._together(tuple(works[start:stop]), self._data)

    def _check(self, works: Sequence[Work]) -> bool:
        two = pair(self._federation, works)
        return two is not None and sound(self._federation.task, lambda task: self._agrees(task, two))

    def _agrees(self, task: Task, works: Sequence[Work]) -> bool:
        tried = tuple(replace(work, steps=2) for work in works)
        if task.dtype == torch.float64:
            tried = tuple(_in_double(tried))
        f = self._federation
        few = replace(f.work, batch_size=min(f.work.batch_size, _CHECKED))
        data = _Checked(replace(f, task=task, work=few), self._seed)
        plain = SequentialTrainer(data.federation, seed=self._seed, data=data)
        try:
            reference = [result for work in tried for result in plain.train([work])]
            found = self._together(tried, data)
        except Exception:  # a user's module may fail in any way on shapes and types it does not expect
            return False
        start = {**tried[0].job.payload, **tried[0].private}
        for k, alone in enumerate(reference):
            for tree, other in ((found.updates, alone.updates), (found.privates, alone.privates)):
                for name, each in other.items():
                    if not close(tree[name][k], each[0], magnitude=float(start[name].abs().max())):
                        return False
        return True

    def _together(self, works: tuple[Work, ...], data: Data) -> Results:
        task = data.federation.task
        with self._clock("data"):
            planned = data.plan(works)
        winograd = self._federation.recipe.engine.convolutions == "winograd"
        moving = Moving(task, works, planned.sizes, self._usual, winograd=winograd)
        fused = Fused(moving)
        totals = torch.zeros(len(works), dtype=torch.float64, device=task.device)
        with task.training_calls(moving.tokens) as model:
            for step in range(moving.sizes.shape[1]):
                sizes = moving.sizes[:, step]
                active = moving.active = int(np.count_nonzero(sizes))
                with self._clock("data"):
                    batch = data.batch(planned.at(step, moving.order[:active], moving.width(step)))
                with self._clock("step"):
                    totals[:active] += self._step(model, fused, batch["x"], batch["y"], sizes[:active])
        seen = torch.from_numpy(planned.sizes.sum(1)).to(task.device)
        means = moving.back(totals) / seen.clamp_min(1)
        return Results(works, moving, moving.privates(), tuple(means.tolist()))

    def _step(self, model: Model, fused: Fused, x: Tensor, y: Tensor, sizes: Ints) -> Tensor:
        """One step of the first A clients on [A, B] examples; returns sums of their losses [A]."""
        counts = torch.from_numpy(sizes).to(x.device)[:, None]
        given = torch.arange(x.shape[1], device=x.device) < counts  # [A, B]; the others fill up
        with torch.enable_grad(), one_thread() if len(sizes) == 1 else nullcontext():
            with fused:
                outputs = model(x.flatten(0, 1))
            losses = self._federation.task.objective(outputs, y.flatten(0, 1))["loss"].view(given.shape)
            torch.sum(losses * (given.to(losses.dtype) / counts)).backward()  # type: ignore[no-untyped-call]
        fused.decay_unused()
        return torch.where(given, losses.detach(), 0.0).sum(1).double()


def _in_double(works: Sequence[Work]) -> Iterator[Work]:
    """What is one tensor for all works stays one."""
    made: dict[int, Tensor] = {}

    def lift(tree: Tree) -> Tree:
        return {name: made.setdefault(id(tree[name]), each) for name, each in doubled(tree).items()}

    for work in works:
        yield replace(work, job=replace(work.job, payload=lift(work.job.payload)), private=lift(work.private))


def usual(federation: Federation) -> Usual:
    """What the federation's clients do in a job."""
    work, sizes = federation.work, federation.data.train_shards.sizes
    if work.steps is not None:
        samples = float(work.steps * work.batch_size)
    else:
        epochs = work.epochs if isinstance(work.epochs, int) else sum(work.epochs) / 2
        samples = epochs * float(sizes.double().mean())
    alike = (
        bool((sizes == sizes[0]).all()) and isinstance(work.epochs, int) and not federation.schedule.recalls
    )
    return Usual(samples, work.batch_size, alike)
