"""Tables of runs: all of them, one, several side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import numpy as np
from rich.console import Group as Lines
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from hansa.core import questions
from hansa.core.errors import InputError
from hansa.core.questions import Record
from hansa.core.store import RunStore, RunSummary
from hansa.ui import duration, percent, score, size
from hansa.ui.comparison import Curve, Group, Over, curve_of
from hansa.ui.source import Question, Run

P = ParamSpec("P")
T = TypeVar("T")
_COLOURS = {
    "finished": "green",
    "running": "cyan",
    "interrupted": "yellow",
    "failed": "red",
    "unreadable": "red",
}


def listing(found: Sequence[RunSummary], width: int) -> RenderableType:
    """Runs, one to a line; on a narrow screen without the less telling columns."""
    columns: dict[str, Callable[[RunSummary], str]] = {
        "run": lambda run: run.id,
        "status": lambda run: run.status,
        "algorithm": lambda run: run.algorithm,
        "seed": lambda run: "" if run.seed is None else str(run.seed),
        "rounds": lambda run: str(run.rounds),
        "accuracy": lambda run: percent(run.accuracy),
        "best": lambda run: percent(run.best_accuracy),
        "virtual time": lambda run: duration(run.time),
        "here": lambda run: duration(run.wall),
        "sent": lambda run: size(run.bytes_up + run.bytes_down),
    }
    if width < _WIDE:
        for name in ("seed", "virtual time", "here", "sent"):
            del columns[name]
    table = _table(*columns)
    for run in found:
        cells = {name: Text(cell(run)) for name, cell in columns.items()}
        cells["status"].stylize(_COLOURS[run.status])
        table.add_row(*cells.values())
    return table


_WIDE = 130  # characters


def page(directory: Path) -> RenderableType:
    """One run: how it stands, what made it, its last rounds, its files."""
    with RunStore.open(directory) as store:
        run, facts, rounds, events = store.summary(), store.facts, store.rounds(), store.events()
    shown: list[RenderableType] = [
        Text.assemble((run.id, "bold"), "  ", (run.status, _COLOURS[run.status]), f"  {run.error or ''}")
    ]
    grid = Table.grid(padding=(0, 2))
    lines = {
        "accuracy": f"{percent(run.accuracy)}, best {percent(run.best_accuracy)}",
        "rounds": str(run.rounds),
        "time": f"{duration(run.wall)} here, {duration(run.time)} on the virtual clock",
        "sent": f"{size(run.bytes_up)} up, {size(run.bytes_down)} down",
        "seed": str(run.seed),
        **facts,
    }
    if run.accuracy is None:
        del lines["accuracy"]
    for name, text in lines.items():
        grid.add_row(Text(f"  {name}", style="dim"), Text(text))
    shown.append(grid)
    if rounds:
        names = [name for name in _SHOWN if any(name in row.metrics for row in rounds)]
        table = _table("round", *names, "sent", "virtual time")
        for row in rounds[-10:]:
            values = (score(row.metrics.get(name), name) for name in names)
            table.add_row(str(row.index), *values, size(row.bytes_up + row.bytes_down), duration(row.time))
        shown += ["", table]
    if events:
        shown.append("")
        shown += [
            Text(f"  {each.kind} at {duration(each.time)}: {each.text.splitlines()[-1]}")
            for each in events[-5:]
        ]
    files = [directory / name for name in ("recipe.toml", "model.safetensors", "report.html")]
    shown += ["", *(Text(f"  {path}", overflow="ignore", no_wrap=True) for path in files if path.exists())]
    return Lines(*shown)


_SHOWN = ("accuracy", "loss", "train/loss", "clients/worst", "gossip/consensus")


@dataclass(frozen=True)
class _Asked:
    """A run where it lies, alone: whoever looks at it from here starts nothing."""

    directory: Path

    def ask(self, question: Question[P, T], run: str, /, *arguments: P.args, **named: P.kwargs) -> T:
        with Record(self.directory) as record:
            return question(record, *arguments, **named)


def curve(directory: Path, metric: str) -> Curve:
    """A run's curve.

    Raises
    ------
    InputError
        When the run has no such metric.
    """
    source, name = _Asked(directory), directory.resolve().name
    try:
        return curve_of(source, Run(id=name, **source.ask(questions.facts, name)), metric, points=_POINTS)
    except InputError as error:
        raise InputError("--metric", metric, error.problem, error.remedy) from error


_POINTS = 2000  # beyond what a picture resolves


def compared(metric: str, target: float, groups: Sequence[Group]) -> RenderableType:
    """The comparison as a table; over seeds mean ± standard deviation."""
    table = _table(
        "recipe", "runs", "seeds", f"final {metric}", "best", "rounds to", "virtual time to", "bytes to"
    )
    for group in groups:
        table.add_row(
            group.label,
            str(len(group.curves)),
            group.seeds,
            group.spread(group.last),
            group.spread(group.best),
            *map(group.cost, _COSTS),
        )
    return Lines(Text(f"Target: {metric} {score(target, metric)}", style="dim"), table)


_COSTS: tuple[Over, ...] = ("rounds", "time", "bytes")


def facts(group: Group) -> dict[str, Any]:
    """A row for machines."""
    return {
        "label": group.label,
        "runs": [
            {
                "id": each.run.id,
                "seed": each.run.seed,
                "status": each.run.status,
                "final": each.last,
                "best": each.best,
                "reached": cost and {over: cost[over] for over in _COSTS},
            }
            for each, cost in zip(group.curves, group.costs, strict=True)
        ],
        "final_mean": float(np.mean(group.last)),
        "final_std": float(np.std(group.last, ddof=1)) if len(group.last) > 1 else None,
    }


def draw(path: Path, curves: Sequence[Curve], metric: str, over: Over) -> None:
    """Write the curves as a picture.

    Raises
    ------
    InputError
        When matplotlib cannot write such a file there.
    """
    from hansa.ui import plots

    names = [f"{each.run.label} · seed {each.run.seed}" for each in curves]
    series = {
        name if names.count(name) == 1 else each.run.id: (each.x[over], each.values)
        for name, each in zip(names, curves, strict=True)
    }
    figure = plots.compare(series, over=over, metric=metric)
    try:
        figure.savefig(path, dpi=160)
    except (OSError, ValueError) as error:
        why = (error.strerror if isinstance(error, OSError) else str(error)) or str(error)
        raise InputError("--output", str(path), why, "name a writable .png, .svg or .pdf file") from error


def _table(*columns: str) -> Table:
    table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0))
    for column in columns:
        left = column in ("run", "status", "algorithm", "recipe", "seeds")
        table.add_column(column, justify="left" if left else "right", no_wrap=True)
    return table


__all__ = ["compared", "curve", "draw", "facts", "listing", "page"]
