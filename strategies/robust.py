"""Aggregation rules that stand a number of Byzantine updates.

Shapes: n updates of d numbers, f of them declared faulty. A rule works in one of two ways:

* From the Gram matrix of the updates (:class:`GramRule`) it makes n weights; the verdict is a weighted sum.
* Column by column (:class:`ColumnRule`) it makes one number of n.

Either way all works on blocks of columns, so that the memory beside the updates is small, and either may see
mixtures of neighbours (``nnm``) in place of the updates. Mixtures are never stored: their Gram matrix is
``M G Mᵀ``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hansa.core.errors import InputError
from hansa.core.reducer import Judgement
from hansa.strategies.columns import Block, by_column, namespace, over_columns, sorted_columns
from hansa.strategies.gram import Gram, combine, gram, mix, nearest_neighbours

_LEAST = {"f": 0, "nnm": 0, "iterations": 1, "selected": 1, "neighbours": 1}
_POSITIVE = ("smoothing", "tau")


@dataclass(frozen=True, kw_only=True)
class _Rule(ABC):
    """What all rules share.

    Attributes
    ----------
    nnm: nearest-neighbour mixing (Allouah et al., arXiv 2302.01772) against so many Byzantine updates: every
        update becomes the mean of the n − nnm nearest to it before the rule sees it.
    """

    nnm: int | None = None

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            value = getattr(self, name, None)
            if value is not None and value < least:
                raise InputError(f"aggregation.{name}", value, f"it is below {least}", f"use {least} or more")
        for name in _POSITIVE:
            if not 0 < getattr(self, name, 1.0) < torch.inf:
                raise InputError(
                    f"aggregation.{name}",
                    getattr(self, name),
                    "it must be finite and above zero",
                    "use a positive number",
                )

    @property
    def minimum(self) -> int:
        """Fewest updates for which the rule, and the mixing before it, are defined."""
        return max(self._minimum, 2 * (self.nnm or 0) + 1)

    @property
    def _minimum(self) -> int:
        return 1

    @abstractmethod
    def __call__(self, updates: Tensor) -> Tensor:
        """[n, d] -> [d]."""

    @abstractmethod
    def judge(self, updates: Tensor) -> tuple[Tensor, Judgement]:
        """The verdict, [n, d] -> [d], and what it makes of each update, unmixed."""


class GramRule(_Rule):
    """A rule whose verdict is a weighted sum, with weights that hang on distances only."""

    @abstractmethod
    def weights(self, gram: Gram) -> Tensor:
        """The weight of every update, [n]; zero for those that are not finite."""

    def __call__(self, updates: Tensor) -> Tensor:
        """[n, d] -> [d]."""
        return self.judge(updates)[0]

    def judge(self, updates: Tensor) -> tuple[Tensor, Judgement]:
        """The verdict, [n, d] -> [d], and what it makes of each update; the Gram matrix has it already."""
        found = gram(updates)
        if self.nnm is None:
            weights = self.weights(found)
        else:
            mixing = nearest_neighbours(found, self.nnm)
            weights = self.weights(found.mixed(mixing)) @ mixing
        point = torch.cat([weights, 1 - weights.sum(0, keepdim=True)])  # the rest is the origin's
        return combine(weights, updates), Judgement(found.distances_from(point).sqrt(), weights)


class ColumnRule(_Rule):
    """A rule that decides every coordinate for itself. NaN counts as a largest value."""

    @abstractmethod
    def columns(self, block: Block) -> Block:
        """[n, c] -> [c]."""

    def __call__(self, updates: Tensor) -> Tensor:
        """[n, d] -> [d]."""
        seen = self._seen(updates)
        return by_column(lambda block: self.columns(seen(block)), updates)

    def judge(self, updates: Tensor) -> tuple[Tensor, Judgement]:
        """The verdict, [n, d] -> [d], and how far each update is from it."""
        seen = self._seen(updates)

        def decide(block: Block) -> tuple[Block, Block]:
            verdict = self.columns(seen(block))
            return verdict, ((block - verdict) ** 2).sum(1)

        squares = torch.zeros(len(updates), dtype=torch.float64)
        verdicts = []
        for verdict, part in over_columns(decide, updates):
            verdicts.append(torch.as_tensor(verdict, device=updates.device))
            squares += torch.as_tensor(part, device="cpu")
        distances = squares.sqrt().nan_to_num(nan=torch.inf, posinf=torch.inf)
        return torch.cat(verdicts), Judgement(distances, None)

    def _seen(self, updates: Tensor) -> Callable[[Block], Block]:
        """What the rule sees of a block [n, c]."""
        if self.nnm is None:
            return lambda block: block
        found = gram(updates)
        return mix(nearest_neighbours(found, self.nnm), found.finite, updates)


@dataclass(frozen=True, kw_only=True)
class MultiKrum(GramRule):
    """Mean of the ``selected`` updates with the smallest Krum scores; ``selected = 1`` is Krum.

    A score is the sum of the squared distances to the nearest other updates.

    Attributes
    ----------
    f: Byzantine updates to stand; defined for n ≥ 2f + 3.
    selected: m; by default, and at most, n − f.
    neighbours: others that a score looks at; by default the paper's n − f − 2, at most n − f − 1: no honest
        update has more honest neighbours for sure.
    """

    f: int
    selected: int | None = None
    neighbours: int | None = None

    source: ClassVar[str] = "Blanchard et al., arXiv 1703.02757"

    @property
    def _minimum(self) -> int:
        return 2 * self.f + 3

    def scores(self, gram: Gram) -> Tensor:
        """Krum scores [n]; an update that is not finite scores infinity."""
        distances = gram.distances.fill_diagonal_(torch.inf)
        n = len(distances)
        neighbours = min(self.neighbours or n - self.f - 2, n - self.f - 1)
        return distances.sort(1).values[:, :neighbours].sum(1)

    def weights(self, gram: Gram) -> Tensor:
        """Equal for the selected."""
        scores = self.scores(gram)
        selected = min(self.selected or len(scores), len(scores) - self.f)
        return torch.zeros_like(scores).index_fill_(0, scores.argsort(stable=True)[:selected], 1 / selected)


@dataclass(frozen=True, kw_only=True)
class Krum(MultiKrum):
    """The one update with the smallest score."""

    selected: int | None = 1


@dataclass(frozen=True, kw_only=True)
class GeometricMedian(GramRule):
    """The point with the smallest sum of distances to the updates, by the smoothed Weiszfeld algorithm (RFA).

    From v = 0, no change of the model, it iterates v ← Σ β_i x_i / Σ β_i with β_i = 1 / max(ν, ‖v − x_i‖).

    Attributes
    ----------
    smoothing: ν, a distance; must be small beside those between updates.
    iterations: of the algorithm; on n coefficients, so that they cost little.
    """

    smoothing: float = 1e-6
    iterations: int = 100

    source: ClassVar[str] = "Pillutla et al., arXiv 1912.13445"

    def weights(self, gram: Gram) -> Tensor:
        """β_i / Σ β_i of the last iteration."""
        point = gram.origin
        for _ in range(self.iterations):
            beta = 1 / gram.distances_from(point).sqrt().clamp_min(self.smoothing)
            point[:-1] = beta / beta.sum()
            point[-1] = 0
        return point[:-1]


@dataclass(frozen=True, kw_only=True)
class CentredClipping(GramRule):
    """The mean of the updates, each clipped to a ball around the last estimate.

    From v = 0, no change of the model, it iterates v ← v + 1/n Σ (x_i − v) min(1, τ / ‖x_i − v‖). Every
    iteration lets f updates move the estimate by at most τ f / n. An update that is not finite moves nothing.
    The paper starts from the last step's verdict; this rule keeps nothing from one step to the next.

    Attributes
    ----------
    tau: τ, the radius of the ball; near the distance of an honest update from the honest mean.
    iterations: of the clipping; on n coefficients, so that they cost little.
    """

    tau: float
    iterations: int = 3

    source: ClassVar[str] = "Karimireddy et al., arXiv 2012.10333"

    def weights(self, gram: Gram) -> Tensor:
        """Of the updates; the rest, to one, is the origin's."""
        point = gram.origin
        for _ in range(self.iterations):
            share = (self.tau / gram.distances_from(point).sqrt()).clamp_max(1) / len(gram.finite)
            point *= 1 - share.sum()
            point[:-1] += share
        return point[:-1]


@dataclass(frozen=True, kw_only=True)
class Median(ColumnRule):
    """Coordinate-wise median; for an even n the mean of the two middle values."""

    source: ClassVar[str] = "Yin et al., arXiv 1803.01498"

    def columns(self, block: Block) -> Block:
        """[n, c] -> [c]."""
        return _middle(sorted_columns(block))


@dataclass(frozen=True, kw_only=True)
class TrimmedMean(ColumnRule):
    """Per coordinate, the mean without the f smallest and the f largest values.

    Attributes
    ----------
    f: Byzantine updates to stand; defined for n ≥ 2f + 1.
    """

    f: int

    source: ClassVar[str] = "Yin et al., arXiv 1803.01498"

    @property
    def _minimum(self) -> int:
        return 2 * self.f + 1

    def columns(self, block: Block) -> Block:
        """[n, c] -> [c]."""
        return sorted_columns(block)[:, self.f : len(block) - self.f].mean(1)


@dataclass(frozen=True, kw_only=True)
class Meamed(ColumnRule):
    """Per coordinate, the mean of the n − f values nearest to the median (mean around median).

    Attributes
    ----------
    f: Byzantine updates to stand; defined for n ≥ 2f + 1.
    """

    f: int

    source: ClassVar[str] = "Xie et al., arXiv 1802.10116"

    @property
    def _minimum(self) -> int:
        return 2 * self.f + 1

    def columns(self, block: Block) -> Block:
        """[n, c] -> [c].

        In a sorted column the nearest are n − f neighbours in a row. They hold the middle n − 2f, and of
        every pair of values that stand n − f apart the one nearer to the median, the lower of equals.
        """
        kept = len(block) - self.f
        column = sorted_columns(block)
        low, high, median = column[:, : self.f], column[:, kept:], _middle(column)[:, None]
        nearer = namespace(block).where(median - low > high - median, high, low)
        return (column[:, self.f : kept].sum(1) + nearer.sum(1)) / kept


def _middle(column: Block) -> Block:
    """The median of sorted columns [c, n]."""
    n = column.shape[1]
    return column[:, (n - 1) // 2 : n // 2 + 1].mean(1)
