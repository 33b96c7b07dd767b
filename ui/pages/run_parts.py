"""The parts of the page of one run; each is drawn again by itself as long as the run moves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import altair as alt
import pandas as pd
import streamlit as st

from hansa.core import questions
from hansa.ui import duration, is_share, parts
from hansa.ui.comparison import AXES, Over
from hansa.ui.parts import colour_of, frame, ticks
from hansa.ui.site import site
from hansa.ui.source import Run

_FIELD: dict[Over, tuple[str, str]] = {  # column, and how its axis is labelled
    "rounds": ("round", "round"),
    "time": ("time", "seconds"),
    "wall": ("wall", "seconds"),
    "bytes": ("sent", "bytes"),
}
_WAIT = ("Nothing yet", "The first round is under way; its figures appear here by themselves.")


def progress(run: Run) -> None:
    """Metrics over rounds, virtual and wall-clock time, bytes."""
    source = site().source
    names = source.ask(questions.metric_names, run.id)
    if not names:
        parts.empty(*_WAIT) if run.active else parts.empty(
            "No metrics", "The run ended before its first round."
        )
        return
    over: Over = (
        st.segmented_control(
            "Over", list(AXES), default="rounds", format_func=AXES.__getitem__, key="over", required=True
        )
        or "rounds"
    )
    usual = {"accuracy": ("accuracy", "clients/worst"), "loss": ("loss", "train/loss")}
    named = {title: [name for name in group if name in names] for title, group in usual.items()}
    rest = [name for name in names if not any(name in group for group in named.values())]
    charts = [(title, group) for title, group in named.items() if group]
    for place, (title, group) in zip(st.columns(max(len(charts), 1)), charts, strict=False):
        with place:
            _curves(run, title, group, over)
    if rest:
        further = st.multiselect(
            "Further metrics", rest, key="further", placeholder="Choose some", max_selections=12
        )
        for row in range(0, len(further), 2):
            for place, name in zip(st.columns(2), further[row : row + 2], strict=False):
                with place:
                    _curves(run, name, [name], over)


def _curves(run: Run, title: str, names: Sequence[str], over: Over) -> None:
    data = frame(site().source.ask(questions.curve, run.id, metrics=list(names), bins=300))
    st.markdown(f"**{parts.plain(title)}**")
    if data.empty:
        st.caption("has no value yet")
        return
    x, kind = _FIELD[over]
    share = is_share(names[0])
    where = alt.X(f"{x}:Q", title=AXES[over], axis=ticks(kind), scale=alt.Scale(nice=False))
    what = alt.Y(
        "value:Q", title=None, axis=ticks("share" if share else "number"), scale=alt.Scale(zero=False)
    )
    colour = alt.Color("metric:N", title=None, scale=colour_of(names), legend=_legend(names))
    tip = [
        alt.Tooltip("metric:N", title="metric"),
        alt.Tooltip("round:Q", title="round", format=",d"),
        alt.Tooltip("value:Q", title="value", format=".2%" if share else ".4g"),
    ]
    base = alt.Chart(data).encode(x=where, color=colour)
    line = base.mark_line(strokeWidth=2, point=len(data) < 3).encode(y=what, tooltip=tip)
    layers: list[Any] = [line]
    if (data["high"] > data["low"]).any():  # several rounds in one bin
        layers.insert(0, base.mark_area(opacity=0.15).encode(y=alt.Y("low:Q", title=None), y2="high:Q"))
    layers.append(_touch(base, x, what, tip))
    parts.chart(alt.layer(*layers), alt_text=f"{title} over {AXES[over]}")


def _touch(base: alt.Chart, x: str, what: alt.Y, tip: list[alt.Tooltip]) -> Any:
    """Points that show themselves, and what they stand for, where one points at the line."""
    near = alt.selection_point(nearest=True, on="pointerover", fields=[x], empty=False)
    return (
        base.mark_point(size=50, filled=True)
        .encode(y=what, tooltip=tip, opacity=alt.when(near).then(alt.value(1)).otherwise(alt.value(0)))
        .add_params(near)
    )


def _legend(names: Sequence[str]) -> alt.Legend | None:
    return alt.Legend(orient="top", labelLimit=260, symbolOpacity=1) if len(names) > 1 else None


def clients(run: Run) -> None:
    """How the model does for its clients."""
    data = frame(site().source.ask(questions.spread, run.id, bins=300))
    if data.empty:
        parts.empty(
            "No client was evaluated yet",
            "Accuracies on the clients' own data appear with the first evaluation "
            "(`evaluation.every`, `evaluation.clients`).",
        )
        return
    blue = parts.CATEGORIES[0]
    where = alt.X("round:Q", axis=ticks("round"), scale=alt.Scale(nice=False), title="round")
    base = alt.Chart(data).encode(x=where)
    tip = [
        alt.Tooltip("round:Q", format=",d"),
        *(alt.Tooltip(f"{n}:Q", format=".2%") for n in ("best", "q3", "median", "q1", "worst")),
    ]
    y = alt.Y("worst:Q", axis=ticks("share"), title=None, scale=alt.Scale(zero=False))
    left, right = st.columns([2, 1])
    with left:
        st.markdown("**Accuracy on the clients' own data**")
        parts.chart(
            alt.layer(
                base.mark_area(color=blue, opacity=0.15).encode(y=y, y2="best:Q"),
                base.mark_area(color=blue, opacity=0.3).encode(y=alt.Y("q1:Q"), y2="q3:Q"),
                base.mark_line(color=blue, strokeWidth=2, point=len(data) < 3).encode(
                    y=alt.Y("median:Q", title=None), tooltip=tip
                ),
                base.mark_line(color=parts.CATEGORIES[2], strokeWidth=1.5).encode(
                    y=alt.Y("worst:Q"), tooltip=tip
                ),
            ),
            alt_text="Worst, quartiles, median and best of the clients' accuracies over the rounds",
        )
        st.caption("line: median · dark: the middle half · light: worst to best · red: the worst client")
    with right:
        st.markdown("**Fairness**")
        fair = alt.Y("jain:Q", title=None, axis=ticks("number"), scale=alt.Scale(zero=False))
        parts.chart(
            base.mark_line(color=parts.CATEGORIES[4], strokeWidth=2, point=len(data) < 3).encode(
                y=fair,
                tooltip=[alt.Tooltip("round:Q", format=",d"), alt.Tooltip("jain:Q", format=".4f")],
            ),
            alt_text="Jain's fairness index over the rounds",
        )
        st.caption("Jain's index of the accuracies: 1 where all clients fare alike")


def participation(run: Run) -> None:
    """Who took part and when; how long updates took, waited, and how stale they were."""
    source = site().source
    told = source.ask(questions.grid, run.id, clients=80, rounds=120)
    if not told["jobs"]:
        parts.empty(*_WAIT) if run.active else parts.empty("Nobody took part", "No job ended in this run.")
        return
    data = frame({name: told[name] for name in ("client", "round", "jobs", "wasted")})
    tall, wide = told["clients"], told["rounds"]
    data["client_end"], data["round_end"] = data["client"] + tall, data["round"] + wide
    data["clients"] = _spans(data["client"], tall)
    data["rounds"] = _spans(data["round"], wide)
    st.markdown("**Who took part, and when**")
    colour = alt.Color(
        "jobs:Q",
        title="jobs",
        scale=parts.quantities(domainMin=0),
        legend=alt.Legend(orient="right", gradientLength=160, tickMinStep=1)
        if data["jobs"].max() > 1
        else None,
    )
    parts.chart(
        alt.Chart(data)
        .mark_rect()
        .encode(
            x=alt.X("round:Q", title="round", axis=ticks("round"), scale=alt.Scale(nice=False)),
            x2="round_end:Q",
            y=alt.Y(
                "client:Q",
                title="client",
                axis=ticks("round"),
                scale=alt.Scale(nice=False, reverse=True, domain=[0, told["population"]]),
            ),
            y2="client_end:Q",
            color=colour,
            tooltip=[
                alt.Tooltip("clients:N", title="client"),
                alt.Tooltip("rounds:N", title="round"),
                alt.Tooltip("jobs:Q", format=",d"),
                alt.Tooltip("wasted:Q", title="discarded or lost", format=",d"),
            ],
        ),
        alt_text="Jobs by client and round",
        height=340,
    )
    wasted = int(data["wasted"].sum())
    sampled = f", counted in one of {told['every']} rounds" if told["every"] > 1 else ""
    st.caption(f"{int(data['jobs'].sum()):,} jobs{sampled}, of which {wasted:,} were discarded or lost")
    ages = frame(source.ask(questions.ages, run.id))
    waits = frame(source.ask(questions.waits, run.id, bins=40))
    charts = []
    if not ages.empty and ages["staleness"].max() > 0:
        charts.append(("Staleness of folded updates", _ages(ages)))
    for kind, title in (("away", "From dispatch to return"), ("waiting", "Waiting to be folded")):
        here = waits[waits["kind"] == kind] if not waits.empty else waits
        if not here.empty:
            charts.append((title, _histogram(here)))
    if charts:
        for place, (title, made) in zip(st.columns(len(charts)), charts, strict=True):
            with place:
                st.markdown(f"**{title}**")
                parts.chart(made, alt_text=title, height=220)


def _spans(starts: pd.Series[int], width: int) -> pd.Series[str]:
    text = starts.astype(str)
    return text if width == 1 else text + "–" + (starts + width - 1).astype(str)


def _ages(data: pd.DataFrame) -> Any:
    return (
        alt.Chart(data)
        .mark_bar(color=parts.CATEGORIES[0])
        .encode(
            x=alt.X("staleness:O", title="server steps", axis=alt.Axis(labelAngle=0, labelOverlap=True)),
            y=alt.Y("jobs:Q", title="updates", axis=ticks("round")),
            tooltip=[alt.Tooltip("staleness:O"), alt.Tooltip("jobs:Q", title="updates", format=",d")],
        )
    )


def _histogram(data: pd.DataFrame) -> Any:
    spans = [f"{duration(a)} – {duration(b)}" for a, b in zip(data["low"], data["high"], strict=True)]
    return (
        alt.Chart(data.assign(span=spans))
        .mark_bar(color=parts.CATEGORIES[0])
        .encode(
            x=alt.X("low:Q", bin="binned", title="time on the run's clock", axis=ticks("seconds")),
            x2="high:Q",
            y=alt.Y("jobs:Q", title="updates", axis=ticks("round")),
            tooltip=[
                alt.Tooltip("span:N", title="time"),
                alt.Tooltip("jobs:Q", title="updates", format=",d"),
            ],
        )
    )


def layers(run: Run) -> None:
    """Which layers moved and by how much, and which client tuned which."""
    source = site().source
    told = source.ask(questions.layers, run.id, bins=60)
    if not told["round"]:
        if run.rounds:
            parts.empty("Not recorded", "This run was made by a Hansa that did not keep how the layers move.")
        elif run.active:
            parts.empty(*_WAIT)
        else:
            parts.empty("No layer moved", "The run ended before its first round.")
        return
    rows = [
        (name, index, moved, share)
        for name, all_moved, all_shares in zip(told["names"], told["moved"], told["share"], strict=True)
        for index, moved, share in zip(told["round"], all_moved, all_shares, strict=True)
        if share is not None and share > 0
    ]
    data = pd.DataFrame(rows, columns=["layer", "round", "moved", "share"])
    height = max(160, 22 * len(told["names"]) + 60)
    st.markdown("**How far each tensor moves in a step, by its own size**")
    parts.chart(
        alt.Chart(data)
        .mark_rect()
        .encode(
            x=alt.X("round:O", axis=alt.Axis(labelAngle=0, labelOverlap=True, title="round")),
            y=alt.Y("layer:N", sort=told["names"], title=None, axis=alt.Axis(labelLimit=220)),
            color=alt.Color(
                "share:Q",
                title="‖Δw‖ / ‖w‖",
                scale=parts.quantities(type="log"),
                legend=alt.Legend(orient="right", gradientLength=140, format=".0e"),
            ),
            tooltip=[
                alt.Tooltip("layer:N"),
                alt.Tooltip("round:O"),
                alt.Tooltip("share:Q", title="‖Δw‖ / ‖w‖", format=".3g"),
                alt.Tooltip("moved:Q", title="‖Δw‖", format=".3g"),
            ],
        ),
        alt_text="Relative movement of every layer over the rounds",
        height=height,
    )
    tuned = source.ask(questions.tuned, run.id, clients=100)
    if not tuned["jobs"]:
        st.caption("Every client of this run trains every layer.")
        return
    chosen = frame({name: tuned[name] for name in ("client", "layer", "jobs")})
    chosen["clients"] = _spans(chosen["client"], tuned["clients"])
    st.markdown("**Which client tuned which tensor**")
    parts.chart(
        alt.Chart(chosen)
        .mark_rect()
        .encode(
            x=alt.X("client:O", axis=alt.Axis(labelAngle=0, labelOverlap=True), title="client"),
            y=alt.Y("layer:N", sort=told["names"], title=None, axis=alt.Axis(labelLimit=220)),
            color=alt.Color("jobs:Q", scale=parts.quantities(domainMin=0), legend=alt.Legend(orient="right")),
            tooltip=[
                alt.Tooltip("clients:N", title="client"),
                alt.Tooltip("layer:N"),
                alt.Tooltip("jobs:Q", format=",d"),
            ],
        ),
        alt_text="How often each client tuned each layer",
        height=height,
    )


def log(run: Run) -> None:
    """What happened."""
    search = st.text_input(
        "Search",
        key="log search",
        placeholder="Search the log",
        icon=":material/search:",
        label_visibility="collapsed",
    )
    told = site().source.ask(questions.events, run.id, search=search, limit=500)
    if not told["id"]:
        parts.empty(
            "No events", "Nothing fits." if search else "Checkpoints, resumes and the end are told here."
        )
        return
    column = st.column_config
    st.dataframe(
        pd.DataFrame(
            {
                "when": [duration(each) for each in told["time"]],
                "kind": told["kind"],
                "client": ["" if each is None else str(each) for each in told["client"]],
                "what": told["text"],
            }
        ),
        hide_index=True,
        column_config={
            "when": column.TextColumn("Run's clock", width="small"),
            "kind": column.TextColumn("Kind", width="small"),
            "client": column.TextColumn("Client", width="small"),
            "what": column.TextColumn("What happened", width="large"),
        },
    )


def recipe(run: Run) -> None:
    """What the run was made with, and where that differs from the defaults."""
    text = site().source.ask(questions.recipe, run.id)
    left, right = st.columns([3, 2])
    with left:
        recipes = site().recipes
        if recipes is not None:
            st.markdown("**What differs from the defaults**")
            with parts.guarded():
                found = recipes().differences(text)
                table = pd.DataFrame(found, columns=["key", "value", "default"])
                if table.empty:
                    st.caption("nothing")
                else:
                    st.dataframe(table, hide_index=True, height="content")
        st.markdown("**The recipe, every default written out**")
        st.code(text, language="toml")
    with right:
        st.markdown("**What made it**")
        made = pd.DataFrame(sorted(run.made.items()), columns=["fact", "value"])
        st.dataframe(made, hide_index=True, height="content")
