"""Several runs over one axis: mean and band over seeds, what they came to, and what it took."""

from __future__ import annotations

from collections.abc import Sequence

import altair as alt
import pandas as pd
import streamlit as st

from hansa.core import questions
from hansa.core.errors import HansaError
from hansa.ui import is_share, parts, score
from hansa.ui.comparison import AXES, Group, Over, compare, curve_of
from hansa.ui.parts import colour_of, ticks
from hansa.ui.site import site
from hansa.ui.source import Run

_KIND: dict[Over, str] = {"rounds": "round", "time": "seconds", "wall": "seconds", "bytes": "bytes"}
_MOST = 40  # runs in one picture


def page() -> None:
    """Draw the page."""
    st.title("Compare")
    runs = {run.id: run for run in parts.run_list() if run.id and run.status != "unreadable"}
    if not runs:
        parts.empty("No runs to compare", "Start two on the page **Runs**, or with `hansa run`.")
        return
    chosen = _chosen(runs)
    if not chosen:
        parts.empty(
            "No runs chosen", "Choose some above. Runs that differ in nothing but the seed share a line."
        )
        return
    metric, over, target = _controls(chosen)
    if metric is None:
        parts.empty("No metrics yet", "None of these runs has finished a round; come back in a moment.")
        return

    def body() -> None:
        with parts.guarded():
            _compare([run.id for run in chosen], metric, over, target)

    parts.live(any(run.active for run in chosen))(body)


def _chosen(runs: dict[str, Run]) -> list[Run]:
    asked = [id for id in st.query_params.get_all("run") if id in runs]
    if "compared" not in st.session_state:
        st.session_state["compared"] = asked
    elif asked and asked != st.session_state.get("asked"):
        st.session_state["compared"] = asked  # by a link from another page
    st.session_state["asked"] = asked
    st.session_state["compared"] = [id for id in st.session_state["compared"] if id in runs]
    ids = st.multiselect(
        "Runs",
        list(runs),
        key="compared",
        max_selections=_MOST,
        placeholder="Choose runs",
        label_visibility="collapsed",
    )
    if ids != asked:
        st.query_params["run"] = ids
        st.session_state["asked"] = ids
    return [runs[id] for id in ids]


def _controls(runs: Sequence[Run]) -> tuple[str | None, Over, float | None]:
    known: list[str] = []
    for run in runs:
        with parts.guarded():
            known += site().source.ask(questions.metric_names, run.id)
    names = list(dict.fromkeys(known))
    if not names:
        return None, "rounds", None
    with st.container(horizontal=True, vertical_alignment="bottom"):
        metric = st.selectbox("Metric", names, key="compared metric", width=220)
        over: Over = (
            st.segmented_control(
                "Over", list(AXES), default="rounds", format_func=AXES.__getitem__, key="over", required=True
            )
            or "rounds"
        )
        share = is_share(metric)
        target = st.number_input(
            "Target, %" if share else "Target",
            value=None,
            placeholder="automatic",
            width=180,
            help="The table tells what it took to come to it; by default what every run came to.",
        )
    return metric, over, target / 100 if share and target is not None else target


def _compare(runs: Sequence[str], metric: str, over: Over, target: float | None) -> None:
    source = site().source
    curves = []
    for id in runs:
        try:
            curves.append(curve_of(source, source.run(id), metric))
        except HansaError as error:
            st.warning(parts.plain(str(error)))
    if not curves:
        return
    target, found = compare(curves, target)
    _picture(found, metric, over)
    table = _table(found, metric)
    st.caption(f"Target: {metric} {score(target, metric)}".replace("$", r"\$"))
    st.dataframe(table, hide_index=True, height="content")
    with st.container(horizontal=True):
        st.download_button(
            "Picture (PNG)",
            lambda: _png(found, metric, over),
            "comparison.png",
            "image/png",
            icon=":material/image:",
            on_click="ignore",
        )
        st.download_button(
            "Table (CSV)",
            lambda: _csv(found, metric),
            "comparison.csv",
            "text/csv",
            icon=":material/table:",
            on_click="ignore",
        )


def _picture(found: Sequence[Group], metric: str, over: Over) -> None:
    rows = []
    for group in found:
        band = group.band(over)
        rows.append(
            pd.DataFrame(
                {
                    "recipe": group.label,
                    "x": band.x,
                    "mean": band.mean,
                    "low": band.mean - band.deviation,
                    "high": band.mean + band.deviation,
                }
            )
        )
    data = pd.concat(rows)
    share, labels = is_share(metric), [group.label for group in found]
    tip = [
        alt.Tooltip("recipe:N"),
        alt.Tooltip("x:Q", title=AXES[over], format=",.4~g"),
        alt.Tooltip("mean:Q", title=metric, format=".2%" if share else ".4g"),
    ]
    legend = alt.Legend(orient="top", labelLimit=300, columns=3, symbolOpacity=1) if len(labels) > 1 else None
    base = alt.Chart(data).encode(
        x=alt.X("x:Q", title=AXES[over], axis=ticks(_KIND[over]), scale=alt.Scale(nice=False)),
        color=alt.Color("recipe:N", title=None, scale=colour_of(labels), legend=legend),
    )
    y = alt.Y("mean:Q", title=metric, axis=ticks("share" if share else "number"), scale=alt.Scale(zero=False))
    parts.chart(
        alt.layer(
            base.mark_area(opacity=0.18).encode(y=alt.Y("low:Q"), y2="high:Q"),
            base.mark_line(strokeWidth=2).encode(y=y, tooltip=tip),
        ),
        alt_text=f"{metric} of {len(labels)} recipes over {AXES[over]}",
        height=380,
    )
    if any(len(group.curves) > 1 for group in found):
        st.caption("line: mean over seeds · band: one standard deviation to both sides")


def _table(found: Sequence[Group], metric: str) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {
                "recipe": group.label,
                "runs": len(group.curves),
                "seeds": group.seeds,
                f"last {metric}": group.spread(group.last),
                "best": group.spread(group.best),
                "rounds to target": group.cost("rounds"),
                "virtual time to": group.cost("time"),
                "wall time to": group.cost("wall"),
                "bytes to": group.cost("bytes"),
            }
            for group in found
        ]
    )


def _csv(found: Sequence[Group], metric: str) -> bytes:
    """A row a run, in numbers."""
    rows = [
        {
            "recipe": group.label,
            "run": each.run.id,
            "seed": each.run.seed,
            "status": each.run.status,
            f"last {metric}": each.last,
            f"best {metric}": each.best,
            **{f"{over} to target": None if cost is None else cost[over] for over in AXES},
        }
        for group in found
        for each, cost in zip(group.curves, group.costs, strict=True)
    ]
    return pd.DataFrame(rows).to_csv(index=False, lineterminator="\n").encode()


def _png(found: Sequence[Group], metric: str, over: Over) -> bytes:
    from hansa.ui import plots  # and with it matplotlib

    bands = {group.label: group.band(over) for group in found}
    return plots.png(
        plots.compare(
            {label: (band.x, band.mean) for label, band in bands.items()},
            over=over,
            metric=metric,
            deviations={label: band.deviation for label, band in bands.items()},
        )
    )
