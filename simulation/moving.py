"""The weights of many clients while plain SGD moves them.

A chunk of clients starts from one model W_0. Where a client's own weights must exist they are moved in place;
where they need not, they never come to be: the change of a linear layer under plain SGD is
``−η Σ_s g_sᵀ x_s`` over its steps s, and (x_s, g_s) are kept instead. Sums over clients, all that a mean
asks for, are then one product over the samples of a block of clients: the same number of operations as the
gradient itself would have taken, and no matrix for each client.

Clients stand sorted by their number of steps, longest first, so that those still at work are the first rows;
what leaves this module stands in the order of the works again.

Shapes: K clients of which A are active, B examples a client and step, g blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from hansa.core.batches import Ints
from hansa.core.sums import BLOCK
from hansa.core.task import Task
from hansa.core.trees import Tree, stack
from hansa.simulation.cohort import Work
from hansa.simulation.lanes import one_thread

_WORTH_FACTORS = 1.5  # a layer's smaller side, over the samples of a job, from which factors are cheaper


@dataclass(frozen=True)
class Usual:
    """What clients do in a job: of the whole federation, so that nothing hangs on who is computed with whom.

    Attributes
    ----------
    samples: that a client uses, on average.
    batch_size: B.
    uniform: whether all use equally many.
    """

    samples: float
    batch_size: int
    uniform: bool

    def as_factors(self, shape: Sequence[int]) -> bool:
        """Whether the change of a linear layer of that shape is kept as its factors."""
        return len(shape) == 2 and self.samples * _WORTH_FACTORS < min(shape)


@dataclass
class Factors:
    """What a linear layer's change is made of, step by step: x [A, B, in] and g [A, B, out]."""

    x: list[Tensor] = field(default_factory=list)
    g: list[Tensor] = field(default_factory=list)

    def dense(self, clients: int, scale: float) -> Tensor:
        """``scale · Σ_s g_sᵀ x_s`` of every client [K, out, in]."""
        total = self.x[0].new_zeros(clients, self.g[0].shape[2], self.x[0].shape[2])
        for x, g in zip(self.x, self.g, strict=True):
            total[: len(x)].baddbmm_(g.mT, x, alpha=scale)
        return total


class Moving:
    """One chunk.

    Parameters
    ----------
    works: in their own order.
    sizes: examples of each mini-batch [K, T].
    job: what a client of this federation usually does.

    Attributes
    ----------
    order: the work of each row, longest first.
    active: clients at work in the current step.
    common: W_0 where all clients start alike. own: [K, ...] where they do not, or no longer.
    dense: beside the factors, the weights of the first rows, once these have taken many steps.
    names: of what stands in for the module's tensors while it runs, by identity.
    winograd: whether convolutions may round more to be faster.
    """

    def __init__(
        self, task: Task, works: Sequence[Work], sizes: Ints, job: Usual, *, winograd: bool = False
    ) -> None:
        self.winograd = winograd
        self.task, self.clients, self.active = task, len(works), len(works)
        self.lr, self.keep = task.local.lr, 1.0 - task.local.lr * task.local.weight_decay
        self.order: Ints = np.argsort(-np.count_nonzero(sizes, axis=1), kind="stable")
        self.sizes = sizes[self.order]
        self._job = job
        self.common: Tree = {}
        self.own: Tree = {}
        self.dense: Tree = {}
        self.start: Tree = {}
        self.factors: dict[str, Factors] = {}
        sorted_works = [works[row] for row in self.order]
        payloads = [work.job.payload for work in sorted_works]
        for name in task.shared:
            first = payloads[0][name]
            if all(each[name] is first for each in payloads):
                self.common[name] = self.start[name] = first
            else:
                self.start[name] = torch.stack([each[name] for each in payloads])
                self.own[name] = self.start[name].clone()
        if task.local_names:
            self.own |= stack([work.private for work in sorted_works])
        self.tokens: Tree = {
            name: self.common[name].detach() if name in self.common else self.own[name][0]
            for name in (*task.shared, *task.local_names)
        }
        self.names = {id(token): name for name, token in self.tokens.items() if name in task.trainable}

    def width(self, step: int) -> int:
        """Examples to which batches are filled: where they differ, the same in whatever company."""
        longest = int(self.sizes[:, step].max())
        return longest if self._job.uniform else max(longest, self._job.batch_size)

    # While it runs.

    def agreed(self, name: str) -> bool:
        """Whether all clients still have the common value, but for factors."""
        return name not in self.own and name not in self.dense

    def values(self, name: str) -> Tensor:
        """Weights of the active clients [A, ...], or the common ones [...] while they agree."""
        weights = self.own.get(name, self.dense.get(name))
        return self.common[name] if weights is None else self._at_work(weights)

    def _at_work(self, rows: Tensor) -> Tensor:
        return rows if len(rows) == self.active else rows[: self.active]

    def history(self, name: str) -> list[tuple[Tensor, Tensor]]:
        """The active clients' factors of every step before: (x_s, g_s)."""
        factors = self.factors.get(name, Factors())
        return [(self._at_work(x), self._at_work(g)) for x, g in zip(factors.x, factors.g, strict=True)]

    def moved(self, name: str) -> Tensor:
        """The active clients' own weights [A, ...], to be changed in place."""
        if name not in self.own:
            common = self.common[name]
            self.own[name] = common.expand(self.clients, *common.shape).clone()
        return self._at_work(self.own[name])

    def descend(self, name: str, grad: Tensor) -> None:
        """``w ← (1 − ηλ) w − η g`` for the active clients; grad [A, ...]."""
        own = self.moved(name)
        if self.keep != 1.0:
            own *= self.keep
        own.add_(grad, alpha=-self.lr)

    def descend_linear(self, name: str, x: Tensor, g: Tensor) -> None:
        """:meth:`descend` along ``gᵀ x``: x [A, B, in], g [A, B, out]."""
        if self._as_factors(name):
            self._keep_factors(name, x, g)
        elif self.agreed(name) and self.active == self.clients:
            common = self.common[name].expand(self.clients, *self.common[name].shape)
            self.own[name] = torch.baddbmm(common, g.mT, x, beta=self.keep, alpha=-self.lr)
        else:
            self.moved(name).baddbmm_(g.mT, x, beta=self.keep, alpha=-self.lr)

    def _as_factors(self, name: str) -> bool:
        if name in self.own or self.keep != 1.0:
            return False
        return self._job.as_factors(self.common[name].shape)

    def _keep_factors(self, name: str, x: Tensor, g: Tensor) -> None:
        """Products with a long history cost more than with weights: the few with many steps get them."""
        factors = self.factors.setdefault(name, Factors())
        factors.x.append(x)
        factors.g.append(g)
        steps = len(factors.x)
        rows = x.shape[1] // self.width(steps - 1) * self._job.batch_size
        if name in self.dense:
            self.dense[name][: self.active].baddbmm_(g.mT, x, alpha=-self.lr)
        elif steps * rows * _WORTH_FACTORS > min(self.common[name].shape):
            common = self.common[name]
            self.dense[name] = common.expand(self.active, *common.shape).clone()
            for x_s, g_s in self.history(name):
                self.dense[name].baddbmm_(g_s.mT, x_s, alpha=-self.lr)

    # When it is done.

    def privates(self) -> Tree:
        """Local tensors [K, ...]."""
        return {name: self.back(self.own[name]) for name in self.task.local_names}

    def stacked(self) -> Tree:
        """Changes of the shared tensors, client by client [K, ...]."""
        made: Tree = {}
        for name in self.task.shared:
            if name in self.factors:
                made[name] = self.back(self.factors[name].dense(self.clients, -self.lr))
            elif name in self.own:
                made[name] = self.back(self.own[name] - self.start[name])
            else:
                made[name] = self._unmoved(name, self.clients)
        return made

    def _unmoved(self, name: str, rows: int) -> Tensor:
        """No change, row by row: sums are moved in place, and a checkpoint keeps each row."""
        return self.common[name].new_zeros(rows, *self.common[name].shape)

    def sums(self, weights: Tensor) -> Tree:
        """Weighted changes summed over each block of works [g, ...]; weights [K].

        A block's sum depends on its own works alone: neither other rows of the chunk nor padding nor the
        number of threads change a digit.
        """
        made: Tree = {}
        blocks = -(-self.clients // BLOCK)
        for name in self.task.shared:
            if name in self.factors:
                made[name] = self._sums_of_factors(self.factors[name], weights.to(self.task.dtype) * -self.lr)
            elif name in self.own:
                made[name] = self._sums_of_rows(self.back(self.own[name] - self.start[name]), weights)
            else:
                made[name] = self._unmoved(name, blocks)
        return made

    def _sums_of_rows(self, rows: Tensor, weights: Tensor) -> Tensor:
        flat, weights = rows.reshape(self.clients, 1, -1), weights.to(rows.dtype)
        made = flat.new_empty(-(-self.clients // BLOCK), 1, flat.shape[2])
        for blocks, part, n in _runs(np.arange(self.clients)):
            _add_products(
                made[blocks], weights[part].view(-1, 1, n), flat[part].view(-1, n, flat.shape[2]), onto=0
            )
        return made.view(-1, *rows.shape[1:])

    def _sums_of_factors(self, factors: Factors, weights: Tensor) -> Tensor:
        """What fills short batches has no gradient, and adds nothing."""
        outputs, inputs = factors.g[0].shape[2], factors.x[0].shape[2]
        made = weights.new_empty(-(-self.clients // BLOCK), outputs, inputs)
        onto = 0
        if len(factors.x[0]) < self.clients:  # some do nothing
            made, onto = made.zero_(), 1
        row_of = np.argsort(self.order)
        for x, g in zip(factors.x, factors.g, strict=True):
            works = np.sort(self.order[: len(x)])  # those at work in this step
            rows = row_of[works]
            if not np.array_equal(rows, np.arange(len(rows))):
                chosen = torch.from_numpy(rows).to(x.device)
                x, g = x.index_select(0, chosen), g.index_select(0, chosen)
            scaled = g * weights[torch.from_numpy(works).to(g.device), None, None]
            for blocks, part, n in _runs(works):
                _add_products(made[blocks], _blocks(scaled[part], n).mT, _blocks(x[part], n), onto=onto)
            onto = 1
        return made

    def back(self, rows: Tensor) -> Tensor:
        """Rows in the order of the works again."""
        if np.array_equal(self.order, np.arange(self.clients)):
            return rows
        return rows[torch.from_numpy(np.argsort(self.order)).to(rows.device)]


def _runs(works: Ints) -> Iterator[tuple[slice, slice, int]]:
    """Neighbouring blocks of which equally many works are given: (blocks, places in ``works``, how many)."""
    blocks, counts = np.unique(works // BLOCK, return_counts=True)
    ends = np.cumsum(counts)
    cuts = np.flatnonzero((np.diff(blocks) != 1) | (np.diff(counts) != 0)) + 1
    for run in np.split(np.arange(len(blocks)), cuts):
        first, last = run[0], run[-1]
        n = int(counts[first])
        yield slice(blocks[first], blocks[last] + 1), slice(ends[first] - n, ends[last]), n


def _blocks(rows: Tensor, clients: int) -> Tensor:
    """[k, B, d] -> [k / clients, clients · B, d]."""
    return rows.reshape(len(rows) // clients, -1, rows.shape[2])


def _add_products(sums: Tensor, a: Tensor, b: Tensor, *, onto: int) -> None:
    """``sums ← onto · sums + a @ b``, batched: one alone is not cut among threads."""
    with one_thread() if len(a) == 1 else nullcontext():
        sums.baddbmm_(a, b, beta=onto)
