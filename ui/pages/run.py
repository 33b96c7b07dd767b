"""One run: how it learns, for whom, with whom, which layers move, what happened, what made it."""

from __future__ import annotations

import streamlit as st

from hansa.core import questions
from hansa.ui import duration, parts, percent, score, size
from hansa.ui.access import may_operate
from hansa.ui.downloads import downloads
from hansa.ui.pages import run_parts
from hansa.ui.site import site
from hansa.ui.source import Run

_PARTS = {
    "Progress": run_parts.progress,
    "Clients": run_parts.clients,
    "Participation": run_parts.participation,
    "Layers": run_parts.layers,
    "Log": run_parts.log,
    "Recipe": run_parts.recipe,
}
_IDLE = 5.0  # seconds between two looks at a run that somebody may go on with


def page() -> None:
    """Draw the page."""
    runs = parts.run_list()
    st.title("Run")
    run = parts.choose_run(runs)
    if run is None:
        parts.empty("No run to show", "Start one on the page **Runs**, or with `hansa run`.")
        return
    if run.status == "unreadable":
        st.error(parts.plain(run.error or ""), icon=":material/error:")
        return

    def head() -> None:
        with parts.guarded():
            now = site().source.run(run.id)
            if now.active != run.active:
                st.rerun()  # the rest of the page begins to move, or stands still
            _head(now)

    st.fragment(head, run_every=parts.REFRESH if run.active else _IDLE if run.resumable else None)()
    part = st.segmented_control(
        "Part", list(_PARTS), default="Progress", key="part", label_visibility="collapsed", required=True
    )
    draw = _PARTS[part or "Progress"]

    def body() -> None:
        with parts.guarded():
            draw(site().source.run(run.id))

    # The log has a field to write in, and the recipe does not change.
    parts.live(run.active and part not in ("Recipe",))(body)


def _head(run: Run) -> None:
    with st.container(horizontal=True, vertical_alignment="center"):
        parts.badge(run)
        facts = [run.algorithm, run.schedule if run.topology == "star" else f"{run.topology} gossip"]
        facts += [f"{run.clients:,} clients"] if run.clients else []
        facts += [f"seed {run.seed}", f"started {parts.ago(run.started)} UTC"]
        st.caption(parts.plain(" · ".join(filter(None, facts))), width="content")
        st.space("stretch")
        asked = _actions(run)
    if asked is not None:
        _steer(asked, run.id)
    if run.error:
        tell = st.error if run.status == "failed" else st.warning
        tell(parts.plain(run.error))
    if run.active:
        st.progress(run.fraction, text=parts.progress_text(run))
    _figures(run)


def _actions(run: Run) -> str | None:
    """The buttons; what to do, if one was pressed."""
    asked = None
    if may_operate():
        if run.active and st.button("Stop", icon=":material/stop:"):
            asked = "stop"
        elif run.resumable and st.button("Resume", icon=":material/play_arrow:"):
            asked = "resume"
    with st.popover("Download", icon=":material/download:"):
        downloads(run)
    return asked


def _steer(what: str, id: str) -> None:
    with parts.guarded():
        getattr(site().source, what)(id)
        st.toast(
            "It stops after the step under way."
            if what == "stop"
            else "It goes on as soon as it is its turn."
        )


def _figures(run: Run) -> None:
    spread = site().source.ask(questions.spread, run.id, bins=300)
    figures = [
        (run.headline, score(run.last, run.headline), f"best {score(run.best, run.headline)}"),
        ("rounds", f"{run.rounds:,}", f"of {run.total:,}" if run.total else ""),
        ("virtual time", duration(run.time), f"{duration(run.wall)} wall-clock"),
        (
            "sent",
            size(run.bytes_up + run.bytes_down),
            f"{size(run.bytes_up)} up",
        ),
    ]
    if spread["round"]:
        jain = spread["jain"][-1]
        figures.insert(1, ("worst client", percent(spread["worst"][-1]), f"fairness {jain:.3f}"))
    with st.container(horizontal=True):
        for label, value, note in figures:
            with st.container(border=True, gap=None, width=164):
                st.caption(label)
                st.markdown(f"#### {parts.plain(value)}")
                st.caption(parts.plain(note) or "&nbsp;")
