"""All runs: what is running, queued, finished, failed; start one, stop it, go on with it."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
import streamlit as st

from hansa.ui import duration, parts, score, size
from hansa.ui.access import may_operate
from hansa.ui.form import new_run
from hansa.ui.routes import to
from hansa.ui.site import site
from hansa.ui.source import Run

_STATUSES = ("running", "queued", "finished", "interrupted", "failed", "unreadable")
_CARDS = 6  # running ones that are shown at large
_ROWS = 16  # more are scrolled
_IDLE = 5.0  # seconds between two looks where nothing moves


def page() -> None:
    """Draw the page."""
    with st.container(horizontal=True, vertical_alignment="center"):
        st.title("Runs", width="stretch")
        if may_operate() and site().recipes is not None:
            st.button("New run", icon=":material/add:", type="primary", on_click=_open_form)
    if st.session_state.pop("new_run", False):
        new_run()
    moving = any(run.active for run in parts.run_list())
    st.fragment(_listing, run_every=parts.REFRESH if moving else _IDLE)()


def _open_form() -> None:
    st.session_state["new_run"] = True


def _listing() -> None:
    runs = parts.run_list()
    if not runs:
        parts.empty(
            "No runs yet",
            "Start one with **New run**, or on the command line with `hansa run`. It appears here by itself.",
        )
        return
    _filter(runs)
    shown = _filtered(runs)
    for run in [run for run in shown if run.active][:_CARDS]:
        _card(run)
    for run in shown:
        if run.error and not run.id:
            st.error(f"**{parts.plain(run.name)}** could not begin: {parts.plain(run.error)}")
    listed = [run for run in shown if run.id]
    if listed:
        _table(listed)
    elif not any(run.active for run in shown):
        st.info("No run fits the filter.", icon=":material/filter_alt:")


def _filter(runs: Sequence[Run]) -> None:
    """What to look for, and how many runs stand how."""
    counts = {status: sum(run.status == status for run in runs) for status in _STATUSES}
    chosen = st.session_state.get("statuses") or ()
    with st.container(horizontal=True, vertical_alignment="center"):
        st.text_input(
            "Search",
            key="search",
            placeholder="Search name, algorithm, id",
            icon=":material/search:",
            label_visibility="collapsed",
            width=320,
        )
        st.pills(
            "Status",
            [status for status, count in counts.items() if count or status in chosen],
            format_func=lambda status: f"{status} {counts[status]:,}",
            key="statuses",
            selection_mode="multi",
            label_visibility="collapsed",
        )


def _filtered(runs: Sequence[Run]) -> list[Run]:
    words = str(st.session_state.get("search", "")).lower().split()
    statuses = st.session_state.get("statuses") or _STATUSES
    return [
        run
        for run in runs
        if run.status in statuses
        and all(word in f"{run.id} {run.name} {run.algorithm} {run.schedule}".lower() for word in words)
    ]


def _card(run: Run) -> None:
    stop = False
    with st.container(border=True, gap="xsmall"):
        with st.container(horizontal=True, vertical_alignment="center"):
            seed = "" if run.seed is None else f" · seed {run.seed}"
            st.markdown(
                f"**{parts.plain(run.name)}** {parts.plain(f'{run.algorithm}{seed}')}", width="content"
            )
            parts.badge(run)
            st.space("stretch")
            if run.last is not None:
                name = "accuracy" if run.headline == "accuracy" else run.headline
                st.markdown(f"{name} **{score(run.last, run.headline)}**", width="content")
            if run.id:
                st.page_link(
                    to("run"), label="Open", icon=":material/open_in_full:", query_params={"run": run.id}
                )
                if may_operate():
                    stop = st.button("Stop", icon=":material/stop:", key=f"stop {run.id}")
        if run.status == "queued":
            here = f": {run.present} of {run.clients} clients are here" if run.present is not None else ""
            st.caption(f"waits for its turn{here}")
        else:
            st.progress(run.fraction, text=parts.progress_text(run))
    if stop:
        _steer("stop", [run.id])


def _table(runs: Sequence[Run]) -> None:
    place = st.container()
    table = pd.DataFrame(
        {
            "name": [run.name or run.id for run in runs],
            "status": [run.status for run in runs],
            "algorithm": [run.algorithm for run in runs],
            "seed": [None if run.seed is None else str(run.seed) for run in runs],
            "progress": [100 * run.fraction for run in runs],
            "rounds": [run.rounds for run in runs],
            "score": [score(run.last, run.headline) for run in runs],
            "best": [score(run.best, run.headline) for run in runs],
            "here": [duration(run.wall) for run in runs],
            "virtual": [duration(run.time) for run in runs],
            "sent": [size(run.bytes_up + run.bytes_down) for run in runs],
            "started": [parts.ago(run.started) for run in runs],
            "id": [run.id for run in runs],
            "note": [run.error or "" for run in runs],
        }
    )
    if not any(run.error for run in runs):
        del table["note"]
    column = st.column_config
    state = st.dataframe(
        table,
        key=f"runs {hash(tuple(run.id for run in runs))}",  # other rows, other selection
        hide_index=True,
        height="content" if len(runs) < _ROWS else 36 * _ROWS,
        on_select="rerun",
        selection_mode="multi-row",
        column_config={
            "name": column.TextColumn("Run"),
            "status": column.TextColumn("Status"),
            "algorithm": column.TextColumn("Algorithm"),
            "seed": column.TextColumn("Seed", width="small"),
            "progress": column.ProgressColumn("Progress", format="%d %%", min_value=0, max_value=100),
            "rounds": column.NumberColumn("Rounds", format="localized", width="small"),
            "score": column.TextColumn("Last", help="Accuracy, or the loss where there is no accuracy"),
            "best": column.TextColumn("Best"),
            "here": column.TextColumn("Wall time"),
            "virtual": column.TextColumn("Virtual time"),
            "sent": column.TextColumn("Sent"),
            "started": column.TextColumn("Started (UTC)"),
            "id": column.TextColumn("Directory", width="medium"),
            "note": column.TextColumn("Note", width="large"),
        },
    )
    chosen = [runs[i] for i in state["selection"]["rows"] if i < len(runs)]
    with place.container(horizontal=True, vertical_alignment="center"):
        asked = _actions(chosen)
    if asked is not None:
        _steer(*asked)


def _actions(chosen: Sequence[Run]) -> tuple[str, list[str]] | None:
    """The buttons; what to do with which runs, if one was pressed."""
    if not chosen:
        st.caption("Select runs to open, compare, stop or resume them.")
        return None
    readable = [run for run in chosen if run.status != "unreadable"]
    if len(readable) == 1:
        st.page_link(
            to("run"), label="Open", icon=":material/open_in_full:", query_params={"run": readable[0].id}
        )
    if readable:
        st.page_link(
            to("compare"),
            label="Compare",
            icon=":material/stacked_line_chart:",
            query_params={"run": [run.id for run in readable]},
        )
    if not may_operate():
        return None
    running = [run.id for run in chosen if run.active]
    ended = [run.id for run in chosen if run.resumable]
    if running and st.button("Stop", icon=":material/stop:"):
        return "stop", running
    if ended and st.button("Resume", icon=":material/play_arrow:"):
        return "resume", ended
    return None


def _steer(what: str, ids: Sequence[str]) -> None:
    """Stop or resume runs, and say how it went."""
    done = {"stop": "asked to stop after the step under way", "resume": "goes on as soon as it is its turn"}
    for id in ids:
        with parts.guarded():
            getattr(site().source, what)(id)
            st.toast(f"{parts.plain(id)}: {done[what]}")
