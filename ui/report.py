"""The report of a run: one HTML page with everything in it, to read offline and to send to others."""

from __future__ import annotations

import base64
import os
from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure
from numpy.typing import NDArray

from hansa.core.errors import RunError
from hansa.core.store import HEADLINE, ClientScores, RoundRow, RunStore, RunSummary
from hansa.ui import duration, plots, size

__all__ = ["write_report"]

_SHOWN_ROUNDS = 20
_SHOWN_EVENTS = 500


@dataclass(frozen=True, kw_only=True)
class _Picture:
    title: str
    caption: str
    data: str  # base64 of a PNG


@dataclass(frozen=True, kw_only=True)
class _Headline:
    label: str
    value: str
    note: str = ""


def write_report(directory: Path) -> Path:
    """Write ``report.html`` into the run directory from what its store holds so far; return its path.

    The page needs no other file and no network. A run of any status has one, also while it runs.

    Raises
    ------
    RunError
        If ``directory`` is not a run directory, is damaged or cannot be written.
    """
    with RunStore.open(directory) as store:
        page = _render(store)
    path = directory / "report.html"
    part = directory / "report.html.part"
    try:
        part.write_text(page, encoding="utf-8")
        os.replace(part, path)  # a browser never meets half a page
    except OSError as error:
        raise RunError(
            f"{path}: the report cannot be written ({error.strerror}); see that the directory is writable "
            "and the disk has room"
        ) from error
    return path


def _render(store: RunStore) -> str:
    summary, rounds, scores, events = store.summary(), store.rounds(), store.client_scores(), store.events()
    names = sorted(
        {name for row in rounds for name in row.metrics}, key=lambda name: (name != HEADLINE, name)
    )
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    header = ["round", "virtual time", "wall time", "up", "down", *names]
    table = [
        [
            str(row.index),
            duration(row.time),
            duration(row.wall),
            size(row.bytes_up),
            size(row.bytes_down),
            *(_number(row.metrics.get(name)) for name in names),
        ]
        for row in rounds
    ]
    return environment.get_template("report.html").render(
        run=summary,
        headlines=_headlines(summary, rounds, scores),
        pictures=_pictures(store, rounds, scores, names),
        header=header,
        rows=table,
        last=table[-_SHOWN_ROUNDS:],
        recipe=store.recipe,
        facts=store.facts,
        events=[(duration(e.time), e.kind, e.client, e.text) for e in events[-_SHOWN_EVENTS:]],
        events_total=len(events),
    )


def _headlines(run: RunSummary, rounds: Sequence[RoundRow], scores: ClientScores | None) -> list[_Headline]:
    found = []
    if run.accuracy is not None and run.best_accuracy is not None:
        best = f"best {_percent(run.best_accuracy)}"
        found.append(_Headline(label="accuracy", value=_percent(run.accuracy), note=best))
    worst = _worst(rounds, scores)
    if worst is not None:
        found.append(worst)
    traffic = f"{size(run.bytes_up)} up, {size(run.bytes_down)} down"
    return [
        *found,
        _Headline(label="rounds", value=str(run.rounds)),
        _Headline(label="virtual time", value=duration(run.time)),
        _Headline(label="wall time", value=duration(run.wall)),
        _Headline(label="sent", value=size(run.bytes_up + run.bytes_down), note=traffic),
    ]


def _worst(rounds: Sequence[RoundRow], scores: ClientScores | None) -> _Headline | None:
    if scores is not None and np.isfinite(scores.accuracy).any():
        place = int(np.nanargmin(scores.accuracy))
        who = f"client {scores.client[place]}, {scores.examples[place]} examples"
        return _Headline(label="worst client", value=_percent(float(scores.accuracy[place])), note=who)
    told = [
        row.metrics["clients/worst"] for row in rounds if isfinite(row.metrics.get("clients/worst", np.nan))
    ]
    return _Headline(label="worst client", value=_percent(told[-1])) if told else None


def _pictures(
    store: RunStore, rounds: Sequence[RoundRow], scores: ClientScores | None, names: Sequence[str]
) -> list[_Picture]:
    pictures = []

    def show(title: str, caption: str, figure: Figure) -> None:
        pictures.append(_Picture(title=title, caption=caption, data=_png(figure)))

    index = np.array([row.index for row in rounds])
    sent = np.cumsum([row.bytes_up + row.bytes_down for row in rounds])
    metrics = {name: _column(rounds, name) for name in names}
    known = {name: values for name, values in metrics.items() if np.isfinite(values).any()}
    headline = known.pop(HEADLINE, None)
    ages = store.staleness()
    stale = any(ages)
    if headline is not None:
        folded = store.updates()
        updates = np.cumsum([folded.get(row.index, 0) for row in rounds]) if stale else None
        show(
            "Progress",
            f"Accuracy over {'client updates' if stale else 'rounds'}, over virtual time and over the bytes "
            "sent both ways.",
            plots.progress(
                index,
                headline,
                seconds=[row.time for row in rounds],
                transferred=sent,
                updates=updates,
            ),
        )
    losses = {name: (index, values) for name, values in known.items() if "loss" in name.rsplit("/", 1)[-1]}
    if losses:
        show("Losses", "Mean losses by round.", plots.losses(losses))
    if scores is not None and np.isfinite(scores.accuracy).any():
        spread_rounds, quantiles = store.client_spread()
        show(
            "Clients",
            "Accuracy of the model on each client's own data, in the last evaluation and over the rounds. "
            "Every client counts the same.",
            plots.client_spread(scores.accuracy, spread_rounds, quantiles),
        )
    grid = store.participation_grid()
    if grid is not None:
        show(
            "Participation",
            "Which clients' jobs made which rounds.",
            plots.participation(grid.counts, grid.wasted, clients=grid.clients, rounds=grid.rounds),
        )
    if stale:
        show("Staleness", "Age of the updates that were folded into the model.", plots.staleness(ages))
    held = store.distribution()
    clients, often, examples = store.contributions()
    if held is not None and len(held[0]) > clients.max(initial=-1):  # those of whom nothing came, too
        everyone = np.zeros(len(held[0]), np.int64)
        everyone[clients] = often
        often, examples = everyone, np.asarray(held[0]).reshape(len(held[0]), -1).sum(axis=1)
    if len(often) > 1 and often.any():
        show(
            "Contributions",
            "How often each client's updates were folded, against its share of the examples.",
            plots.contributions(often, examples),
        )
    jobs = store.timeline()
    if (jobs["returned"] > jobs["dispatched"]).any():
        show(
            "Timeline",
            f"The last {len(jobs['client'])} jobs; a line is a step of the hub.",
            plots.timeline(
                jobs["client"],
                jobs["dispatched"],
                jobs["returned"],
                jobs["outcome"],
                steps=[row.time for row in rounds],
            ),
        )
    further = {
        name: (index, values)
        for name, values in known.items()
        if name not in losses
        and np.isfinite(values).sum() > 1
        and (headline is None or not np.array_equal(values, headline, equal_nan=True))
    }
    if further:
        show("Further metrics", "All other metrics by round.", plots.others(further))
    if held is not None and held[0].size:
        show("Data", "Who holds what.", plots.partition_picture(*held))
    return pictures


def _column(rounds: Sequence[RoundRow], name: str) -> NDArray[np.float64]:
    return np.array([row.metrics.get(name, np.nan) for row in rounds], np.float64)


def _png(figure: Figure) -> str:
    return base64.b64encode(plots.png(figure)).decode("ascii")


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def _number(value: float | None) -> str:
    if value is None or value != value:
        return "–"
    return f"{value:#.4g}" if isfinite(value) else ("∞" if value > 0 else "−∞")
