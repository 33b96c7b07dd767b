"""What can be taken home from a run: model, metrics, report, recipe. Made when it is asked for."""

from __future__ import annotations

import csv
import io

import streamlit as st

from hansa.core import questions
from hansa.ui.site import site
from hansa.ui.source import Run, Source

__all__ = ["downloads", "metrics_csv"]

_PAGE = 20_000


def downloads(run: Run) -> None:
    """Buttons, one a file."""
    source = site().source
    files = [
        ("Model", f"{run.id}.safetensors", "application/octet-stream", lambda: source.model(run.id)),
        ("Metrics", f"{run.id}.csv", "text/csv", lambda: metrics_csv(source, run.id)),
        ("Report", f"{run.id}.html", "text/html", lambda: source.report(run.id)),
        (
            "Recipe",
            f"{run.id}.toml",
            "application/toml",
            lambda: source.ask(questions.recipe, run.id).encode(),
        ),
    ]
    ended = run.status == "finished"
    there = {"Model": ended, "Metrics": run.rounds > 0, "Report": ended and source.has_report(run.id)}
    for label, name, mime, make in files:
        st.download_button(
            label,
            make,
            name,
            mime,
            key=f"download {label}",
            on_click="ignore",
            disabled=not there.get(label, True),
            width="stretch",
        )
    if not ended:
        st.caption("The model and the report are written when the run finishes.")
    elif not there["Report"]:
        st.caption(f"No report was written here; on its machine: `hansa report {run.id}`.")


def metrics_csv(source: Source, run: str) -> bytes:
    """The rounds of a run, one row each, with every metric as a column; unknown values are empty cells."""
    columns = source.ask(questions.rounds, run, after=-1, limit=_PAGE)
    while len(columns["round"]) % _PAGE == 0 and columns["round"]:
        more = source.ask(questions.rounds, run, after=columns["round"][-1], limit=_PAGE)
        if not more["round"]:
            break
        columns = {name: [*values, *more[name]] for name, values in columns.items()}
    names = source.ask(questions.metric_names, run)
    values = {name: _values(source, run, name) for name in names}
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*columns, *names])
    for i, index in enumerate(columns["round"]):
        row = [column[i] for column in columns.values()]
        writer.writerow([*row, *(values[name].get(index) for name in names)])
    return text.getvalue().encode()


def _values(source: Source, run: str, metric: str) -> dict[int, float]:
    found: dict[int, float] = {}
    after = -1
    while True:
        page = source.ask(questions.series, run, metric=metric, after=after, limit=_PAGE)
        found.update(zip(page["round"], page["value"], strict=True))
        if len(page["round"]) < _PAGE:
            return found
        after = page["round"][-1]
