"""What the pages are made of: formats, badges, charts that look alike, and what to say where nothing is."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import altair as alt
import pandas as pd
import streamlit as st

from hansa.core.errors import HansaError
from hansa.ui import duration, size
from hansa.ui.site import site
from hansa.ui.source import Run
from hansa.ui.theme import CATEGORIES, STATUS

__all__ = [
    "CATEGORIES",
    "REFRESH",
    "ago",
    "badge",
    "chart",
    "choose_run",
    "colour_of",
    "empty",
    "frame",
    "guarded",
    "live",
    "plain",
    "progress_text",
    "quantities",
    "run_list",
    "ticks",
]

REFRESH = 2.0
"""Seconds between two looks at what is live."""


def plain(text: str) -> str:
    """Text as it is, in a place where Streamlit would take it for Markdown."""
    return re.sub(r"([\\`*_{}\[\]()#+\-.!|<>$:~])", r"\\\1", text)


def ago(seconds: float | None) -> str:
    """A moment, in seconds since 1970, as ``2026-11-21 09:30`` UTC."""
    return "–" if seconds is None else f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M}"


def badge(run: Run) -> None:
    """How a run stands."""
    st.badge(run.status, color=STATUS[run.status])  # type: ignore[arg-type]


def progress_text(run: Run) -> str:
    """How far a run is, and how long it will take yet."""
    total = f" of {run.total:,}" if run.total else ""
    parts = [f"round {run.rounds:,}{total}"]
    if run.remaining is not None:
        parts.append(f"about {duration(run.remaining)} left")
    return " · ".join(parts)


def empty(title: str, hint: str, icon: str = ":material/inbox:") -> None:
    """Nothing is here, and what to do about it."""
    with st.container(border=True, horizontal_alignment="center"):
        st.markdown(f"#### {icon} {title}", text_alignment="center")
        st.markdown(hint, text_alignment="center")


@contextmanager
def guarded(what: str = "") -> Iterator[None]:
    """What cannot be read or done is told, and the page goes on."""
    try:
        yield
    except HansaError as error:
        st.error(plain(f"{what}: {error}" if what else str(error)), icon=":material/error:")


def choose_run(runs: Sequence[Run]) -> Run | None:
    """The run that the address names, or another of the list; None where there is none."""
    known = {run.id: run for run in runs if run.id}
    if not known:
        return None
    asked = st.query_params.get("run")
    if asked is not None and asked not in known:
        st.warning(plain(f"{asked}: there is no such run here; this is the newest one"))
        asked = None
    ids = list(known)
    chosen = st.selectbox(
        "Run",
        ids,
        index=ids.index(asked) if asked else 0,
        format_func=lambda id: f"{id}  ({known[id].status})",
        label_visibility="collapsed",
    )
    if chosen != asked:
        st.query_params["run"] = chosen
    return known[chosen]


def run_list() -> list[Run]:
    """All runs, or none and the reason on the page."""
    with guarded():
        return site().source.runs()
    return []


def colour_of(names: Sequence[str]) -> alt.Scale:
    """The colours of categories, in the order of their names; the same in every chart."""
    return alt.Scale(domain=list(names), range=[CATEGORIES[i % len(CATEGORIES)] for i in range(len(names))])


def quantities(**options: Any) -> alt.Scale:
    """The colours of quantities: the more, the farther from the page's own colour."""
    dark = st.context.theme.type == "dark"
    return alt.Scale(range=["#12304d", "#8ecbff"] if dark else ["#dbe9f6", "#08306b"], **options)


def ticks(kind: str) -> alt.Axis:
    """An axis of counts, seconds, bytes, or shares, labelled as people write them."""
    expressions: Mapping[str, str] = {
        "round": "format(datum.value, ',~d')",
        "seconds": (
            "datum.value >= 172800 ? format(datum.value / 86400, '.3~g') + ' d' : "
            "datum.value >= 7200 ? format(datum.value / 3600, '.3~g') + ' h' : "
            "datum.value >= 120 ? format(datum.value / 60, '.3~g') + ' min' : "
            "format(datum.value, '~g') + ' s'"
        ),
        "bytes": "replace(format(datum.value, '~s'), 'k', ' k') + 'B'",
        "share": "format(100 * datum.value, '~g') + ' %'",
        "number": "format(datum.value, '~g')",
    }
    return alt.Axis(
        labelExpr=expressions[kind],
        grid=True,
        tickCount=6,
        tickMinStep=1 if kind == "round" else alt.Undefined,
        labelFlush=False,
    )


def chart(made: alt.Chart | alt.LayerChart | alt.FacetChart, *, alt_text: str, height: int = 280) -> None:
    """Draw a chart as wide as its place."""
    st.altair_chart(made.properties(height=height), width="stretch", alt=alt_text)


def frame(columns: Mapping[str, Sequence[Any]]) -> pd.DataFrame:
    """A table from columns."""
    return pd.DataFrame(dict(columns))


def live(active: bool) -> Callable[[Callable[[], None]], None]:
    """Draw a part, and again and again as long as something moves, without the rest of the page."""

    def draw(part: Callable[[], None]) -> None:
        st.fragment(part, run_every=REFRESH if active else None)()

    return draw


def written(run: Run) -> str:
    """What a run cost so far, in one line."""
    return f"{duration(run.wall)} here · {duration(run.time)} virtual · {size(run.bytes_up + run.bytes_down)}"
