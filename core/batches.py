"""Which examples make which mini-batch of a job, for many jobs at once.

A job's order of examples is the order of 64-bit keys (:func:`hansa.core.randomness.hashes`), one for each
(seed, client, job number, pass, position): no generator has a state, so jobs can be planned together, alone,
in any order and by any process.

Shapes: k jobs of up to T mini-batches and S examples.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from hansa.core.randomness import hashes

Ints = NDArray[np.int64]

_LAST = np.uint64(2**64 - 1)


@dataclass(frozen=True)
class Plan:
    """Mini-batches of k jobs.

    Attributes
    ----------
    positions: of the local examples, in the order of use [k, S]; padded with zeros.
    sizes: examples of each mini-batch [k, T], zero behind the last.
    """

    positions: Ints
    sizes: Ints

    @cached_property
    def starts(self) -> Ints:
        """Examples used before each mini-batch [k, T]."""
        before: Ints = np.cumsum(self.sizes, axis=1) - self.sizes
        return before

    def cut(self, steps: Ints) -> Plan:
        """The first ``steps[i]`` mini-batches of job i."""
        sizes = np.where(np.arange(self.sizes.shape[1]) < steps[:, None], self.sizes, 0)
        return Plan(self.positions, sizes[:, : np.count_nonzero(sizes, axis=1).max(initial=0)])

    def at(self, step: int, rows: Ints, width: int | None = None) -> Ints:
        """Positions [r, B] of the examples of jobs ``rows`` in a step; short batches repeat their first."""
        sizes = self.sizes[rows, step]
        lane = np.arange(sizes.max() if width is None else width)
        lane = self.starts[rows, step, None] + np.where(lane < sizes[:, None], lane, 0)
        found: Ints = self.positions[rows[:, None], lane]
        return found


def draw(low: int, high: int, *, seed: int, clients: Ints, numbers: Ints) -> Ints:
    """A number of passes between ``low`` and ``high``, both included, for each job [k]."""
    keys = hashes(seed, "passes", clients, numbers)
    return (low + (keys % np.uint64(high - low + 1)).astype(np.int64)).astype(np.int64)


def batches(examples: Ints, batch_size: int, whole: int) -> Ints:
    """Mini-batches of a pass [k]: a last one of fewer than ``whole`` examples is joined to the one before."""
    full, rest = np.divmod(examples, batch_size)
    made: Ints = np.maximum(full + (rest >= whole), np.minimum(examples, 1))
    return made


def plan(
    examples: Ints, totals: Ints, *, batch_size: int, whole: int, seed: int, clients: Ints, numbers: Ints
) -> Plan:
    """The first ``totals[i]`` mini-batches of job i over ``examples[i]`` examples, pass after pass."""
    per = np.maximum(batches(examples, batch_size, whole), 1)
    totals = np.where(examples > 0, totals, 0)
    step = np.arange(totals.max(initial=0))
    within = step % per[:, None]  # number of the batch in its pass
    last = examples - (per - 1) * batch_size
    sizes = np.where(within < per[:, None] - 1, batch_size, last[:, None])
    sizes = np.where(step < totals[:, None], sizes, 0)

    passes = int((-(-totals // per)).max(initial=0))
    orders = _orders(examples, passes, seed=seed, clients=clients, numbers=numbers)  # [k, passes, n]
    if passes <= 1:
        return Plan(orders.reshape(len(examples), -1), sizes)
    place = np.arange(sizes.sum(1).max(initial=0))
    held = np.maximum(examples, 1)[:, None]
    row = np.arange(len(examples))[:, None]
    return Plan(orders[row, np.minimum(place // held, passes - 1), place % held], sizes)


def _orders(examples: Ints, passes: int, *, seed: int, clients: Ints, numbers: Ints) -> Ints:
    most = int(examples.max(initial=0))
    jobs = clients[:, None, None], numbers[:, None, None]
    keys = hashes(seed, "batches", *jobs, np.arange(passes)[:, None], np.arange(most))  # [k, passes, most]
    keys[np.broadcast_to(np.arange(most) >= examples[:, None, None], keys.shape)] = _LAST
    return np.argsort(keys, axis=-1, kind="stable")
