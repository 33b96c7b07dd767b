"""How much an update counts: ``x ← x + η_g Σ_i d_i Δ_i`` with ``d_i = p_i s(τ_i) / f_i``.

p_i is the client's share in the objective Σ p_i f_i(x), s(τ) discounts stale updates, and f_i is how often
the client contributes, in updates per hub step. With s = 1 the mean of a step is Σ p_i Δ_i whoever is fast
and whatever the schedule: Fraboni et al., "A General Theory for Federated Optimization with Asynchronous
and Heterogeneous Clients Updates", arXiv 2206.10189. Synchronous FedAvg (f_i = 1), asynchronous FedAvg
(f_i = τ_i⁻¹/Σ τ_j⁻¹), FedFix (f_i = 1/⌈τ_i/Δt⌉) and FedBuff are this one formula; what f_i is under a
schedule, from the clients' times, stands in ``hansa.strategies.frequencies``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from hansa.core.errors import InputError
from hansa.core.ranges import NonNegative, Positive


class Dated(Protocol):
    """What weights look at in an update's report."""

    @property
    def client(self) -> int:
        """Who sent it."""
        ...

    @property
    def examples(self) -> int:
        """n_i."""
        ...

    @property
    def staleness(self) -> int:
        """τ_i."""
        ...

    @property
    def share(self) -> float:
        """p_i."""
        ...

    @property
    def frequency(self) -> float:
        """f_i."""
        ...


@dataclass(frozen=True, kw_only=True)
class Weights:
    """How much an update counts in its step.

    Attributes
    ----------
    target: p_i: by the number of examples, or uniform.
    frequency: f_i, how often a client contributes. ``equal``: alike for all, so weights are relative and a
        step of fresh updates is a mean. ``always``: in every step, so a step with few clients is short.
        ``estimated``: as counted so far. ``known``: computed from ``seconds``.
    seconds: for ``known``: how long a job takes, client by client.
    staleness: s(τ): ``constant`` is 1; ``polynomial`` is (1 + τ)^−exponent; ``hinge`` is 1 up to ``after``,
        then 1/(1 + slope (τ − after)).
    exponent: of the polynomial; ½ gives 1/√(1 + τ).
    slope, after: of the hinge.
    max_staleness: updates that missed more steps count nothing.
    frequencies: f_i client by client, for ``known``; from ``seconds`` in a recipe.
    """

    target: Literal["examples", "uniform"] = "examples"
    frequency: Literal["equal", "always", "estimated", "known"] = "equal"
    seconds: tuple[Positive, ...] = ()
    staleness: Literal["constant", "polynomial", "hinge"] = "constant"
    exponent: NonNegative = 0.5
    slope: Positive = 10.0
    after: NonNegative = 4.0
    max_staleness: int | None = None
    frequencies: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        known = self.frequency == "known"
        if known and not (self.seconds or self.frequencies):
            raise InputError(
                "weights.seconds",
                None,
                "the frequencies shall be known, and nobody says how long the clients take",
                'give a number of seconds for every client, or use weights.frequency = "estimated"',
            )
        if self.seconds and not known:
            raise InputError(
                "weights.seconds",
                f"{len(self.seconds)} numbers",
                f"frequencies are {self.frequency} and not computed",
                'set weights.frequency = "known", or leave it out',
            )
        if self.max_staleness is not None and self.max_staleness < 0:
            raise InputError(
                "weights.max_staleness", self.max_staleness, "nothing is so new", "use 0 or more"
            )

    @property
    def absolute(self) -> bool:
        """Whether d_i is a number of its own and not relative to the other updates of the step."""
        return self.frequency != "equal"

    def discount(self, staleness: int) -> float:
        """s(τ)."""
        if self.max_staleness is not None and staleness > self.max_staleness:
            return 0.0
        match self.staleness:
            case "constant":
                return 1.0
            case "polynomial":
                return float((1 + staleness) ** -self.exponent)
            case "hinge":
                return 1.0 / (1.0 + self.slope * max(staleness - self.after, 0.0))

    def of(self, report: Dated) -> float:
        """d_i; without a frequency only in relation to others."""
        fresh = self.discount(report.staleness)
        if self.absolute:
            return report.share * fresh / report.frequency
        return fresh * (report.examples if self.target == "examples" else 1.0)

    def mass(self, reports: Sequence[Dated]) -> float:
        """Σ d_i of a step: how far it goes along the weighted mean of its updates.

        Relative weights give Σ p_i s(τ_i) / Σ p_i: FedBuff's (1/K) Σ s(τ_i) where p is uniform, 1 where all
        is fresh.
        """
        if self.absolute:
            return sum(self.of(each) for each in reports)
        if self.staleness == "constant" and self.max_staleness is None:
            return 1.0
        whole = [each.examples if self.target == "examples" else 1.0 for each in reports]
        fresh = (self.discount(each.staleness) * n for each, n in zip(reports, whole, strict=True))
        return sum(fresh) / sum(whole)


class Ledger:
    """Who contributed how often: the statistics behind p_i and f_i.

    Of clients not heard of yet the mean number of examples is assumed; f_i is counted up to and with the
    step under way, so a client's first update is not yet blown up by its rarity.
    """

    def __init__(self, weights: Weights, clients: int) -> None:
        self._weights, self._clients = weights, clients
        self._counts: dict[int, int] = {}
        self._examples: dict[int, int] = {}
        self._total = 0

    def enter(self, client: int, examples: int) -> None:
        """An update is folded."""
        self._counts[client] = self._counts.get(client, 0) + 1
        self._total += examples - self._examples.get(client, 0)
        self._examples[client] = examples

    def share(self, client: int) -> float:
        """p_i."""
        if self._weights.target == "uniform":
            return 1.0 / self._clients
        return self._examples[client] * len(self._examples) / (self._total * self._clients)

    def frequency(self, client: int, steps: int) -> float:
        """f_i after so many steps of the hub."""
        match self._weights.frequency:
            case "estimated":
                return self._counts[client] / steps
            case "known":
                return self._weights.frequencies[client]
            case _:
                return 1.0

    def snapshot(self) -> list[list[int]]:
        """[client, updates, examples] of all who contributed."""
        return [[client, count, self._examples[client]] for client, count in self._counts.items()]

    def restore(self, entries: Sequence[Sequence[int]]) -> None:
        """Undo :meth:`snapshot`."""
        self._counts = {client: count for client, count, _ in entries}
        self._examples = {client: examples for client, _, examples in entries}
        self._total = sum(self._examples.values())


def default_weights(kind: type[Any]) -> Weights:
    """The weights that an algorithm's class has without being told."""
    fields: Mapping[str, Any] = {each.name: each for each in dataclasses.fields(kind)}
    made: Weights = fields["weights"].default_factory()
    return made
