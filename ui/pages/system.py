"""How the machinery does: throughput, queues, memory, versions."""

from __future__ import annotations

import os
import platform
import shutil
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import altair as alt
import pandas as pd
import psutil
import streamlit as st

from hansa.core import questions
from hansa.core.control import Coordinator
from hansa.core.wire.federation_pb2 import ConditionReply
from hansa.ui import duration, parts, size
from hansa.ui.access import coordinator_of
from hansa.ui.site import site
from hansa.ui.source import Run

_PACKAGES = ("hansa", "torch", "numpy", "streamlit", "grpcio", "sqlalchemy")
_RUNS = 6  # newest ones whose pace is drawn
_EVERY = 5.0  # seconds between two looks, as often as a coordinator takes a sample


def page() -> None:
    """Draw the page."""
    st.title("System")
    coordinator = coordinator_of(site().source)
    if coordinator is not None:
        st.fragment(lambda: _coordinator(coordinator), run_every=_EVERY)()
    else:
        st.fragment(_machine, run_every=_EVERY)()
    st.subheader("Throughput of runs")
    st.fragment(_pace, run_every=_EVERY)()
    st.subheader("This dashboard")
    _dashboard()


# The coordinator.


def _coordinator(coordinator: Coordinator) -> None:
    with parts.guarded("The coordinator cannot be asked"):
        told = coordinator.condition()
        samples = rates(told)
        now = told.samples[-1]
        with st.container(horizontal=True):
            st.metric("Up", duration(max(time.time() - told.started, 0.0)), border=True)
            st.metric("Agents", f"{now.agents:,}", border=True)
            st.metric("Runs", f"{now.runs:,}", border=True)
            st.metric("Jobs out", f"{now.jobs:,}", border=True)
            st.metric("Updates", f"{now.counted:,}", border=True, help="Accepted since it started")
            st.metric("Refused", f"{now.refused:,}", border=True, help="Calls that were refused")
            st.metric("Memory", size(now.resident), border=True)
        if len(samples) < 2:
            st.caption("Curves appear after a few seconds.")
        else:
            left, right = st.columns(2, gap="medium")
            with left:
                st.markdown("**Updates per second**")
                _lines(samples, {"updates": "updates"}, "number")
                st.markdown(
                    "**Queues**",
                    help="What waits: uploads for a permit, messages to be looked at, events for the disk",
                )
                _lines(samples, {"uploads": "uploads", "messages": "messages", "events": "events"}, "number")
            with right:
                st.markdown("**Bytes per second**")
                _lines(samples, {"up": "from agents", "down": "to agents"}, "bytes")
                st.markdown("**Memory and processor**")
                memory, processor = st.tabs(["Memory", "Processor"])
                with memory:
                    _lines(samples, {"resident": "resident"}, "bytes", height=180)
                with processor:
                    _lines(samples, {"processor": "cores"}, "number", height=180)
        st.caption(
            " · ".join(
                [
                    f"Hansa {told.hansa}",
                    f"protocol {told.protocol.major}.{told.protocol.minor}",
                    f"torch {told.torch}",
                    f"Python {told.python}",
                    parts.plain(told.platform),
                    f"{told.cores} cores, {size(told.memory)}",
                    "mutual TLS" if told.secure else "**insecure: loopback only**",
                ]
            )
        )


def rates(told: ConditionReply) -> pd.DataFrame:
    """The samples of a coordinator with what was counted between two of them as rates, per second."""
    rows: list[Mapping[str, Any]] = []
    for before, after in zip(told.samples, told.samples[1:], strict=False):
        seconds = after.at - before.at
        if seconds < 0.5:  # the sample of now, right after the last one
            continue
        rows.append(
            {
                "at": pd.Timestamp(after.at, unit="s", tz="UTC"),
                "updates": max(after.counted + after.late - before.counted - before.late, 0) / seconds,
                "up": max(after.bytes_up - before.bytes_up, 0) / seconds,
                "down": max(after.bytes_down - before.bytes_down, 0) / seconds,
                "processor": max(after.processor - before.processor, 0.0) / seconds,
                "resident": after.resident,
                "uploads": after.uploads_waiting,
                "messages": after.messages_waiting,
                "events": after.events_waiting,
            }
        )
    return pd.DataFrame(rows)


def _lines(samples: pd.DataFrame, series: Mapping[str, str], kind: str, height: int = 220) -> None:
    data = samples[["at", *series]].rename(columns=dict(series)).melt("at", var_name="what")
    names = list(series.values())
    legend = alt.Legend(orient="top", title=None) if len(names) > 1 else None
    drawn = (
        alt.Chart(data)
        .mark_line(interpolate="monotone")
        .encode(
            x=alt.X("at:T", title=None, axis=alt.Axis(format="%H:%M:%S", tickCount=5)),
            y=alt.Y("value:Q", title=None, axis=parts.ticks(kind), scale=alt.Scale(zero=True, nice=True)),
            color=alt.Color("what:N", scale=parts.colour_of(names), legend=legend),
            tooltip=[alt.Tooltip("at:T", format="%H:%M:%S"), "what:N", alt.Tooltip("value:Q", format=".4~s")],
        )
    )
    parts.chart(drawn, alt_text=f"{', '.join(names)} over time", height=height)


# A folder on this machine.


def _machine() -> None:
    runs = parts.run_list()
    folder = Path(site().source.label)
    memory = psutil.virtual_memory()
    with st.container(horizontal=True):
        st.metric("Running", f"{sum(run.status == 'running' for run in runs):,}", border=True)
        st.metric("Queued", f"{sum(run.status == 'queued' for run in runs):,}", border=True)
        st.metric("Runs", f"{len(runs):,}", border=True)
        st.metric("Load", f"{os.getloadavg()[0]:.1f} of {os.cpu_count()} cores", border=True)
        st.metric("Memory in use", f"{memory.percent:.0f} % of {size(memory.total)}", border=True)
        if folder.is_dir():
            disk = shutil.disk_usage(folder)
            st.metric("Disk left", size(disk.free), border=True, help=f"Where {folder} is")


# Runs.


def _pace() -> None:
    with parts.guarded():
        listed = [run for run in parts.run_list() if run.id and run.rounds]
        moving = [run for run in listed if run.active]
        runs = (moving or listed)[:_RUNS]
        if not runs:
            parts.empty("Nothing has run yet", "Start a run on the page **Runs**.", ":material/speed:")
            return
        told = {run.id: site().source.ask(questions.pace, run.id, bins=40) for run in runs}
        shown = [run for run in runs if told[run.id]["wall"]]
        data = pd.concat([parts.frame(told[run.id]).assign(run=run.id) for run in shown]) if shown else None
        if data is None:
            st.caption("The first rounds are not over yet.")
            return
        st.dataframe(
            pd.DataFrame([_paced(run, told[run.id]) for run in shown]),
            hide_index=True,
            column_config={
                "run": st.column_config.TextColumn("Run", pinned=True),
                "updates": st.column_config.NumberColumn("Updates/s", format="%.1f"),
                "bytes": st.column_config.TextColumn("Bytes/s"),
                "rounds": st.column_config.NumberColumn("Rounds/s", format="%.2f"),
                "engine": st.column_config.TextColumn("Engine"),
                "threads": st.column_config.TextColumn("Threads"),
                "hansa": st.column_config.TextColumn("Hansa"),
                "torch": st.column_config.TextColumn("torch"),
            },
        )
        _pace_chart(data, [run.id for run in shown])


def _paced(run: Run, pace: questions.Columns) -> Mapping[str, Any]:
    spans = [after - before for before, after in zip([0.0, *pace["wall"]], pace["wall"], strict=False)]
    total = sum(spans)
    return {
        "run": run.id,
        "updates": sum(u * s for u, s in zip(pace["updates"], spans, strict=True)) / total,
        "bytes": size(sum(b * s for b, s in zip(pace["sent"], spans, strict=True)) / total),
        "rounds": run.rounds / run.wall if run.wall else None,
        "engine": run.made.get("engine", "").partition(":")[0],
        "threads": run.made.get("threads", ""),
        "hansa": run.made.get("hansa", ""),
        "torch": run.made.get("torch", ""),
    }


def _pace_chart(data: pd.DataFrame, names: Sequence[str]) -> None:
    drawn = (
        alt.Chart(data)
        .mark_line()
        .encode(
            x=alt.X("wall:Q", title="wall time", axis=parts.ticks("seconds")),
            y=alt.Y(
                "updates:Q",
                title="client updates per second",
                axis=parts.ticks("number"),
                scale=alt.Scale(zero=True),
            ),
            color=alt.Color(
                "run:N",
                scale=parts.colour_of(names),
                legend=alt.Legend(orient="top", title=None, columns=3, labelLimit=400)
                if len(names) > 1
                else None,
            ),
            tooltip=["run:N", alt.Tooltip("updates:Q", format=".1f"), alt.Tooltip("wall:Q", format=".1f")],
        )
    )
    parts.chart(drawn, alt_text="Client updates per second over wall time", height=260)


# This process.


def _dashboard() -> None:
    process = psutil.Process()
    facts = {
        "memory": size(process.memory_info().rss),
        "up": duration(max(time.time() - process.create_time(), 0.0)),
        "Python": platform.python_version(),
        **{name: _version(name) for name in _PACKAGES},
    }
    st.caption(" · ".join(f"{name} {parts.plain(value)}" for name, value in facts.items()))


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "–"
