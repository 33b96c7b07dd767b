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
from hansa.ui.source import Run, Source

__all__ = ["AXES", "Band", "Curve", "Group", "Over", "curve_of", "falling", "groups"]

Over = Literal["rounds", "time", "wall", "bytes"]
AXES: Mapping[Over, str] = {
    "rounds": "round",
    "time": "virtual time",
    "wall": "wall-clock time",
    "bytes": "bytes sent",
}
_COLUMNS: Mapping[Over, str] = {"rounds": "round", "time": "time", "wall": "wall", "bytes": "sent"}
_POINTS = 400


def falling(metric: str) -> bool:
    """Whether less of a metric is better."""
    return any(word in metric for word in ("loss", "variance", "consensus"))


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One metric of one run: ``x`` by axis and ``values``, all [n]; seconds and bytes are cumulative.

    ``cost`` is what it took to come to the target, None where it did not.
    """

    run: Run
    recipe: str
    x: Mapping[Over, NDArray[np.float64]]
    values: NDArray[np.float64]
    last: float
    best: float
    cost: Mapping[Over, float] | None = None


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
    """Runs whose recipes differ in nothing but seed and name."""

    label: str
    curves: tuple[Curve, ...]

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


def curve_of(source: Source, run: Run, metric: str, *, target: float | None = None) -> Curve:
    """A run's curve.

    Raises
    ------
    InputError
        When the run has no such metric.
    """
    told = source.ask(questions.curve, run.id, metrics=[metric], bins=_POINTS)
    if not told["round"]:
        known = source.ask(questions.metric_names, run.id)
        remedy = f"choose among {', '.join(known)}" if known else "wait for its first round"
        raise InputError("metric", metric, f"{run.id} has none of it", remedy)
    came = source.ask(questions.outcome, run.id, metric=metric, falling=falling(metric), target=target)
    cost: dict[Over, float] = {over: value for over in AXES if (value := came[over]) is not None}
    last, best = came["last"], came["best"]
    assert last is not None
    assert best is not None
    return Curve(
        run=run,
        recipe=source.ask(questions.recipe, run.id),
        x={over: np.array(told[column], np.float64) for over, column in _COLUMNS.items()},
        values=np.array(told["value"], np.float64),
        last=last,
        best=best,
        cost=cost or None,
    )


def groups(curves: Sequence[Curve]) -> list[Group]:
    """Runs of one recipe together, each group with a label of its own."""
    alike: dict[str, list[Curve]] = {}
    for each in curves:
        alike.setdefault(_but_for_the_seed(each.recipe), []).append(each)
    labels = [_label(same[0].run) for same in alike.values()]
    found = []
    for same, label in zip(alike.values(), labels, strict=True):
        unlike = f"{label} · {same[0].run.id[-3:]}" if labels.count(label) > 1 else label
        found.append(Group(label=unlike, curves=tuple(same)))
    return found


def _label(run: Run) -> str:
    return f"{run.name} · {run.algorithm}" if run.name != run.algorithm else run.name


def _but_for_the_seed(recipe: str) -> str:
    table = tomllib.loads(recipe)
    return repr({key: value for key, value in table.items() if key not in ("seed", "name")})
