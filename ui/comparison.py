"""Runs side by side: curves over one axis, means over seeds, what it took to come to a target."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from hansa.core import questions
from hansa.core.errors import InputError
from hansa.ui import duration, score, size
from hansa.ui.source import Asked, Run

__all__ = ["AXES", "Band", "Curve", "Group", "Over", "compare", "curve_of"]

Over = Literal["rounds", "time", "wall", "bytes"]
AXES: Mapping[Over, str] = {
    "rounds": "round",
    "time": "virtual time",
    "wall": "wall-clock time",
    "bytes": "bytes sent",
}
_COLUMNS: Mapping[Over, str] = {"rounds": "round", "time": "time", "wall": "wall", "bytes": "sent"}
_POINTS = 400


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One metric of one run: ``x`` by axis and ``values``, all [n]; seconds and bytes are cumulative.

    ``last`` and ``best`` are of all rounds, however few the points.
    """

    source: Asked
    run: Run
    metric: str
    recipe: str
    x: Mapping[Over, NDArray[np.float64]]
    values: NDArray[np.float64]
    last: float
    best: float


@dataclass(frozen=True, kw_only=True)
class Band:
    """Several curves as one: ``mean`` and the standard deviation on both sides of it, all [n].

    It reaches as far as every curve does.
    """

    x: NDArray[np.float64]
    mean: NDArray[np.float64]
    deviation: NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Group:
    """Runs whose recipes differ in nothing but seed and name: a row of the table.

    ``costs`` are what it took each run to come to the target, None where it did not.
    """

    label: str
    curves: tuple[Curve, ...]
    costs: tuple[Mapping[Over, float] | None, ...]

    @property
    def last(self) -> tuple[float, ...]:
        """What each run came to in the end."""
        return tuple(each.last for each in self.curves)

    @property
    def best(self) -> tuple[float, ...]:
        """The best that each run came to."""
        return tuple(each.best for each in self.curves)

    @property
    def seeds(self) -> str:
        """The seeds in words."""
        return ", ".join(sorted({str(each.run.seed) for each in self.curves}))

    def spread(self, values: Sequence[float]) -> str:
        """Mean ± unbiased standard deviation over the runs, in words."""
        metric = self.curves[0].metric
        mean = score(float(np.mean(values)), metric)
        return mean if len(values) == 1 else f"{mean} ± {score(float(np.std(values, ddof=1)), metric)}"

    def cost(self, over: Over) -> str:
        """What it took to come to the target, in words: the mean of those that did, and how many did."""
        there = [each[over] for each in self.costs if each is not None]
        if not there:
            return "not reached"
        mean = float(np.mean(there))
        said = (
            f"{mean:,.1f}".removesuffix(".0")
            if over == "rounds"
            else size(mean)
            if over == "bytes"
            else duration(mean)
        )
        return said if len(there) == len(self.costs) else f"{said} ({len(there)} of {len(self.costs)})"

    def band(self, over: Over) -> Band:
        """Mean and unbiased standard deviation over the seeds.

        Between two of a run's values its curve is taken as straight.
        """
        if len(self.curves) == 1:
            only = self.curves[0]
            return Band(x=only.x[over], mean=only.values, deviation=np.zeros(len(only.values)))
        low = max(each.x[over][0] for each in self.curves)
        high = min(each.x[over][-1] for each in self.curves)
        everywhere = np.unique(np.concatenate([each.x[over] for each in self.curves]))
        x = everywhere[(everywhere >= low) & (everywhere <= high)]
        if len(x) > _POINTS:
            x = x[np.linspace(0, len(x) - 1, _POINTS).round().astype(int)]
        values = np.array([np.interp(x, each.x[over], each.values) for each in self.curves])
        return Band(x=x, mean=values.mean(axis=0), deviation=values.std(axis=0, ddof=1))


def curve_of(source: Asked, run: Run, metric: str, *, points: int = _POINTS) -> Curve:
    """A run's curve, of at most so many points: each the mean over neighbouring rounds.

    Raises
    ------
    InputError
        When the run has no such metric.
    """
    told = source.ask(questions.curve, run.id, metrics=[metric], bins=points)
    if not told["round"]:
        known = source.ask(questions.metric_names, run.id)
        remedy = f"choose among {', '.join(known)}" if known else "wait for its first round"
        raise InputError("metric", metric, f"{run.id} has none of it", remedy)
    came = source.ask(questions.outcome, run.id, metric=metric, falling=_falling(metric))
    last, best = came["last"], came["best"]
    assert last is not None
    assert best is not None
    return Curve(
        source=source,
        run=run,
        metric=metric,
        recipe=source.ask(questions.recipe, run.id),
        x={over: np.array(told[column], np.float64) for over, column in _COLUMNS.items()},
        values=np.array(told["value"], np.float64),
        last=last,
        best=best,
    )


def compare(curves: Sequence[Curve], target: float | None = None) -> tuple[float, list[Group]]:
    """(target, groups): curves of one metric, those of one recipe together, each group with its own label.

    Without a target it is the best that every run came to, so that all have reached it.
    """
    if target is None:
        bests = [each.best for each in curves]
        target = max(bests) if _falling(curves[0].metric) else min(bests)
    alike: dict[str, list[Curve]] = {}
    for each in curves:
        alike.setdefault(_but_for_the_seed(each.recipe), []).append(each)
    labels = [same[0].run.label for same in alike.values()]
    groups = []
    for same, label in zip(alike.values(), labels, strict=True):
        unlike = f"{label} · {same[0].run.id[-3:]}" if labels.count(label) > 1 else label
        costs = tuple(_cost(each, target) for each in same)
        groups.append(Group(label=unlike, curves=tuple(same), costs=costs))
    return target, groups


def _cost(curve: Curve, target: float) -> Mapping[Over, float] | None:
    came = curve.source.ask(
        questions.outcome,
        curve.run.id,
        metric=curve.metric,
        falling=_falling(curve.metric),
        target=target,
    )
    cost: dict[Over, float] = {over: float(value) for over in AXES if (value := came[over]) is not None}
    return cost or None


def _falling(metric: str) -> bool:
    """Whether less of a metric is better."""
    return any(word in metric for word in ("loss", "variance", "consensus"))


def _but_for_the_seed(recipe: str) -> str:
    table = tomllib.loads(recipe)
    return repr({key: value for key, value in table.items() if key not in ("seed", "name")})
