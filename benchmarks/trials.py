"""Trials: recipes that are run once, remembered in a file, and tuned at equal budgets.

A file of trials holds a JSON object a line: what was run, and what came of it. Whoever asks again is answered
from the file, so that an interrupted benchmark goes on where it was.
"""

from __future__ import annotations

import gzip
import json
import math
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from hansa.core.recipe import parse
from hansa.core.store import Round
from hansa.simulation.catalog import world
from hansa.simulation.simulator import Simulator
from hansa.strategies.catalog import assemble

Table = Mapping[str, Any]
MORE = 2  # rates that may be tried beyond the border of the grid
TAIL = 0.1  # of a run's time: the mean accuracy of it is the accuracy at the end


@dataclass(frozen=True)
class Outcome:
    """What came of a trial.

    Attributes
    ----------
    seconds: virtual time at the end.
    reached: whether the target stopped it.
    rounds, updates: hub steps, and client updates folded.
    best: the highest accuracy met.
    curve: virtual seconds, updates, megabytes and accuracy at every evaluation.
    """

    seconds: float
    reached: bool
    rounds: int
    updates: int
    best: float
    curve: Sequence[Sequence[float]] = field(repr=False)

    @property
    def final(self) -> float:
        """The mean accuracy of the last ``TAIL`` of the time, however often a scheme is evaluated."""
        since = (1 - TAIL) * self.seconds
        return statistics.mean(accuracy for at, *_, accuracy in self.curve if at >= since)


def images(folder: Path, name: str, train: int, test: int) -> Table:
    """The ``data`` section of the first images of a set in ``HANSA_DATA``; ``folder`` has a copy."""
    source, section = Path(os.environ["HANSA_DATA"]) / name, {"source": "npy", "scale": 255.0}
    for part, count, prefix in (("", train, "train"), ("test_", test, "t10k")):
        for what, kind, head in (("x", "images-idx3", 16), ("y", "labels-idx1", 8)):
            copy = folder / f"{name}-{prefix}-{count}-{what}.npy"
            section[part + what] = str(copy)
            if copy.exists():
                continue
            with gzip.open(source / f"{prefix}-{kind}-ubyte.gz") as file:
                file.read(head)
                size = 28 * 28 if what == "x" else 1
                values = np.frombuffer(file.read(count * size), np.uint8)
            np.save(
                copy,
                values.reshape(-1, 1, 28, 28) if what == "x" else values.astype(np.int64),
                allow_pickle=False,
            )
    return section


class Trials:
    """What was run, by what was asked."""

    def __init__(self, path: Path) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text().splitlines() if path.exists() else ()
        names = {each.name for each in fields(Outcome)}  # a file of before may tell more
        self._known = {
            key: Outcome(**{name: told[name] for name in names}) for key, told in map(json.loads, lines)
        }

    def run(self, sections: Table) -> Outcome:
        """The outcome of a recipe, remembered or new. ``data`` with a name is what :func:`images` is told."""
        key = json.dumps(sections, sort_keys=True)
        if key not in self._known:
            data = sections["data"]
            if "name" in data:
                data = images(self._path.parent, **data)
            self._known[key] = found = _run({**sections, "data": data})
            with self._path.open("a") as file:
                file.write(json.dumps([key, asdict(found)]) + "\n")
        return self._known[key]


def _run(sections: Table) -> Outcome:
    recipe = parse(dict(sections))
    curve: list[tuple[float, float, float, float]] = []
    updates = sent = 0

    def watch(done: Round) -> None:
        nonlocal updates, sent
        updates += sum(each.outcome == "folded" for each in done.participants)
        sent += done.bytes_up + done.bytes_down
        if "accuracy" in done.metrics:
            curve.append((done.time, updates, sent / 1e6, done.metrics["accuracy"]))

    ending = Simulator(assemble(recipe), world(recipe).population, on_round=watch).run()
    met = [accuracy for *_, accuracy in curve]
    target = recipe.stop.target
    return Outcome(
        seconds=ending.time,
        reached=target is not None and max(met) >= target,
        rounds=ending.rounds,
        updates=updates,
        best=max(met),
        curve=curve,
    )


@dataclass(frozen=True)
class Tuned:
    """The best rate of those tried, and the outcomes with it on fresh seeds."""

    rate: float
    tried: Sequence[float]
    outcomes: Sequence[Outcome]

    @property
    def told(self) -> str:
        """The rate, and whether it lies at the border of what was tried."""
        borders = {min(self.tried): " (least tried)", max(self.tried): " (largest tried)"}
        return f"{self.rate:g}{borders.get(self.rate, '')}"


def merged(*tables: Table) -> dict[str, Any]:
    """Recipes laid over one another, section by section."""
    whole: dict[str, Any] = {}
    for table in tables:
        for key, value in table.items():
            whole[key] = {**whole.get(key, {}), **value} if isinstance(value, Mapping) else value
    return whole


def fastest(trials: Trials, sections: Table, rates: Sequence[float], seeds: Sequence[int]) -> Tuned:
    """Tune ``train.lr`` on the first seed by the time to the target, then by accuracy; run the others.

    A rate that has not reached the target in the time of one that did is not followed further.
    """
    limit = sections["stop"]["time"]

    def tried(rate: float, before: Mapping[float, Outcome]) -> Outcome:
        best = min((each.seconds for each in before.values() if each.reached), default=limit)
        return trials.run(merged(sections, {"seed": seeds[0], "train": {"lr": rate}, "stop": {"time": best}}))

    return _tuned(trials, sections, rates, seeds, tried, lambda o: (o.reached, -o.seconds, o.best))


def most_accurate(trials: Trials, sections: Table, rates: Sequence[float], seeds: Sequence[int]) -> Tuned:
    """Tune ``train.lr`` on the first seed by the accuracy at the end; run the others."""

    def tried(rate: float, _: Mapping[float, Outcome]) -> Outcome:
        return trials.run(merged(sections, {"seed": seeds[0], "train": {"lr": rate}}))

    return _tuned(trials, sections, rates, seeds, tried, lambda o: o.final)


def _tuned(
    trials: Trials,
    sections: Table,
    rates: Sequence[float],
    seeds: Sequence[int],
    tried: Callable[[float, Mapping[float, Outcome]], Outcome],
    merit: Callable[[Outcome], Any],
) -> Tuned:
    """Try all rates, and up to ``MORE`` beyond a border at which the best lies; run it on fresh seeds."""
    found: dict[float, Outcome] = {}
    ahead, best = list(rates), rates[0]
    while ahead:
        rate = ahead.pop(0)
        found[rate] = tried(rate, found)
        best = max(found, key=lambda rate: merit(found[rate]))
        if not ahead and len(found) < len(rates) + MORE:
            ahead = [best * step for step, end in ((2, max), (0.5, min)) if best == end(found)]
    outcomes = [trials.run(merged(sections, {"seed": seed, "train": {"lr": best}})) for seed in seeds[1:]]
    return Tuned(best, list(found), outcomes)


def spread(values: Sequence[float], digits: int = 0) -> str:
    """Mean ± standard deviation; how many are not finite, if any."""
    told = [each for each in values if math.isfinite(each)]
    if len(told) < len(values):
        return f"{len(values) - len(told)} of {len(values)} never"
    return f"{statistics.mean(told):,.{digits}f} ± {statistics.stdev(told):,.{digits}f}"


def to_target(outcomes: Sequence[Outcome], what: Callable[[Outcome], float]) -> str:
    """:func:`spread` of those that reached their target."""
    return spread([what(each) if each.reached else math.inf for each in outcomes])


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """In Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
