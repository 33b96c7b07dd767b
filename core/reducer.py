"""How many updates become one.

A reducer folds updates as they come (:class:`Mean`) unless its rule must see all of them at once
(:class:`Collect`). ``linear`` is a capability: secure aggregation, hierarchical sums and gossip
mixing need it.

Shapes: k updates in one call, n in all, d numbers in one update.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from hansa.core.sums import Sums
from hansa.core.trees import Tree, concatenate, flatten, unflatten


class Reducer(Protocol):
    """Fold of stacked updates into one tree."""

    @property
    def linear(self) -> bool:
        """Whether the result is a weighted sum with weights that do not depend on the updates."""
        ...

    @property
    def minimum(self) -> int:
        """Fewest updates for which the rule is defined."""
        ...

    def init(self) -> Any:
        """An empty accumulator."""
        ...

    def add(self, acc: Any, updates: Tree, weights: Tensor, present: Mapping[str, Tensor]) -> Any:
        """Fold k updates.

        Parameters
        ----------
        updates: stacked [k, ...].
        weights: [k].
        present: for names that not all of the k carry, 1.0 where they do, else 0.0: [k].
        """
        ...

    def result(self, acc: Any) -> Tree:
        """The reduced update; names that nobody carried are absent."""
        ...


@dataclass(frozen=True)
class Mean:
    """Weighted mean, folded in a stream (FedAvg, arXiv 1602.05629, Algorithm 1).

    Each name is averaged over those who carry it. The result does not depend on the chunks, to the last bit.
    """

    linear: bool = True
    minimum: int = 1

    def init(self) -> Sums:
        """Nothing folded yet."""
        return Sums()

    def add(self, acc: Sums, updates: Tree, weights: Tensor, present: Mapping[str, Tensor]) -> Sums:
        """Add ``Σ w_i u_i`` and its divisor, name by name."""
        return acc.add(updates, weights, present)

    def result(self, acc: Sums) -> Tree:
        """Sums over divisors."""
        whole = acc.total()
        return {
            name: total / whole.masses[name] for name, total in whole.sums.items() if whole.masses[name] > 0
        }


@dataclass(frozen=True)
class Keep:
    """No reduction: the updates stacked [n, ...], in the order of the reports."""

    linear: bool = False
    minimum: int = 1

    def init(self) -> tuple[Tree, ...]:
        """Nothing kept yet."""
        return ()

    def add(
        self, acc: tuple[Tree, ...], updates: Tree, weights: Tensor, present: Mapping[str, Tensor]
    ) -> tuple[Tree, ...]:
        """Keep the k updates."""
        return (*acc, updates)

    def result(self, acc: tuple[Tree, ...]) -> Tree:
        """All of them."""
        return concatenate(acc)


class RobustRule(Protocol):
    """An aggregation rule over all updates at once, one vote each."""

    @property
    def minimum(self) -> int:
        """Fewest updates for which the rule is defined."""
        ...

    def __call__(self, updates: Tensor) -> Tensor:
        """[n, d] -> [d]."""
        ...


@dataclass(frozen=True, eq=False)
class Judgement:
    """What a robust rule made of every update that it saw, in their order.

    Parameters
    ----------
    distances: [n], Euclidean, from each update to the verdict; infinite for those that are not finite.
    shares: [n], weight of each update in the verdict; None where the rule decides every number by itself.
    """

    distances: Tensor
    shares: Tensor | None


@runtime_checkable
class Judge(Protocol):
    """A rule that tells what it thinks of the updates."""

    def judge(self, updates: Tensor) -> tuple[Tensor, Judgement]:
        """The verdict, [n, d] -> [d], and what it makes of each update."""
        ...


@dataclass(frozen=True)
class Collect(Keep):
    """Hand a robust rule all updates as one matrix [n, d]. Weights are set aside: one client, one vote.

    A rule is shown changes: who sends values is compared with an ``origin``, the value where nothing changed.
    """

    rule: RobustRule = field(kw_only=True)
    minimum: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "minimum", self.rule.minimum)

    def result(self, acc: tuple[Tree, ...]) -> Tree:
        """The rule's verdict."""
        return self.judged(acc)[0]

    def judged(self, acc: tuple[Tree, ...], origin: Tree | None = None) -> tuple[Tree, Judgement | None]:
        """The rule's verdict, and what it makes of the updates if it tells.

        ``origin`` is zero for names that it lacks.
        """
        updates, still = flatten(*acc), None
        if origin:
            rest = {name: origin.get(name, torch.zeros_like(each[0])) for name, each in acc[0].items()}
            still = flatten({name: each[None] for name, each in rest.items()})[0]
            updates -= still
        if isinstance(self.rule, Judge):
            verdict, judgement = self.rule.judge(updates)
        else:
            verdict, judgement = self.rule(updates), None
        if still is not None:
            verdict = verdict + still
        return unflatten(verdict, {name: each[0] for name, each in acc[0].items()}), judgement
