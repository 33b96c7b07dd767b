"""Who takes part: the agents of a coordinator, and the clients of a run."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt
import pandas as pd
import streamlit as st

from hansa.core import questions
from hansa.core.control import Coordinator
from hansa.core.wire.federation_pb2 import AgentStatus
from hansa.ui import duration, parts, size
from hansa.ui.access import coordinator_of
from hansa.ui.site import site
from hansa.ui.source import Run
from hansa.ui.theme import CATEGORIES

_ORDERS = {"most": "gave most", "least": "gave least", "slowest": "slowest"}
_SHUT_OUT = 5  # updates in a row without weight
_FAR = 2.0  # times the usual distance
_SLOW = 5.0  # seconds between two looks at what costs a pass over all jobs


def page() -> None:
    """Draw the page."""
    st.title("Clients")
    coordinator = coordinator_of(site().source)
    if coordinator is not None:
        st.subheader("Agents")
        st.text_input(
            "Search",
            key="agents",
            placeholder="Search name, device, run",
            icon=":material/search:",
            label_visibility="collapsed",
            width=320,
        )
        st.fragment(lambda: _agents(coordinator), run_every=parts.REFRESH)()
        st.subheader("Clients of a run")
    runs = [run for run in parts.run_list() if run.id and run.status != "unreadable"]
    run = parts.choose_run(runs)
    if run is None:
        parts.empty(
            "No run yet", "Clients are listed once a run has asked them. Start one on the page **Runs**."
        )
        return
    given, quality, held = st.tabs(
        [
            ":material/handshake: Contributions",
            ":material/verified_user: Quality",
            ":material/donut_small: Data",
        ]
    )
    every = _SLOW if run.active else None
    with given:
        st.selectbox(
            "Order",
            list(_ORDERS),
            format_func=_ORDERS.__getitem__,
            key="order",
            width=200,
            label_visibility="collapsed",
        )
        st.fragment(lambda: _contributions(run), run_every=every)()
    with quality:
        st.fragment(lambda: _quality(run), run_every=every)()
    with held, parts.guarded():
        _partition(run)


# Agents of a coordinator.


def _agents(coordinator: Coordinator) -> None:
    with parts.guarded("The agents cannot be listed"):
        agents = coordinator.roster()
        if not agents:
            parts.empty(
                "No agent has come yet",
                "On a machine of a site: `hansa agent start --config agent.toml`; to try it out here: "
                "`hansa local up`.",
                ":material/devices:",
            )
            return
        _headline(agents)
        words = str(st.session_state.get("agents", "")).lower().split()
        shown = [each for each in agents if all(word in _words(each) for word in words)]
        if not shown:
            st.info("No agent fits the search.", icon=":material/filter_alt:")
            return
        total = sum(each.counted for each in agents)
        table = pd.DataFrame([agent_row(each, time.time(), total) for each in shown])
        for optional in ("battery", "note"):
            if not table[optional].astype(bool).any():
                del table[optional]
        column = st.column_config
        st.dataframe(
            table,
            hide_index=True,
            height=min(36 * len(shown) + 38, 520),
            column_config={
                "name": column.TextColumn("Agent", pinned=True),
                "status": column.TextColumn("Status"),
                "job": column.TextColumn("Current job", width="medium"),
                "share": column.ProgressColumn(
                    "Share of updates", format="percent", min_value=0, max_value=1
                ),
                "speed": column.NumberColumn(
                    "Steps/s", format="%.1f", help="Local steps per second of training"
                ),
                "availability": column.ProgressColumn(
                    "Available",
                    format="percent",
                    min_value=0,
                    max_value=1,
                    help="Share of the time since it first came that it was connected",
                ),
                "seen": column.TextColumn("Last seen"),
                "battery": column.TextColumn("Battery"),
                "device": column.TextColumn("Device"),
                "clients": column.TextColumn("Speaks for"),
                "updates": column.NumberColumn("Updates", format="localized"),
                "late": column.NumberColumn("Late", format="localized"),
                "failed": column.NumberColumn("Failed", format="localized"),
                "refused": column.NumberColumn("Refused", format="localized", help="Calls that were refused"),
                "sent": column.TextColumn("Sent"),
                "hansa": column.TextColumn("Hansa"),
                "note": column.TextColumn("Note", width="medium"),
            },
        )


def _headline(agents: Sequence[AgentStatus]) -> None:
    here = [each for each in agents if each.connected]
    speed = sum(each.steps / each.seconds for each in here if each.seconds)
    with st.container(horizontal=True):
        st.metric("Connected", f"{len(here):,} of {len(agents):,}", border=True)
        st.metric("At work", f"{sum(bool(each.jobs) for each in here):,}", border=True)
        st.metric("Updates", f"{sum(each.counted for each in agents):,}", border=True)
        st.metric("Together", f"{speed:,.0f} steps/s" if speed else "–", border=True)


def _words(agent: AgentStatus) -> str:
    return " ".join([agent.name, agent.device, *(job.run for job in agent.jobs)]).lower()


def agent_row(agent: AgentStatus, now: float, total: int) -> Mapping[str, Any]:
    """An agent in a table; ``total`` counts the updates of all."""
    known = max(now - agent.first, 1e-9)
    battery = ""
    if agent.HasField("battery"):
        battery = f"{agent.battery:.0%}{' ⚡' if agent.mains else ''}"
    seats = agent.seats
    speaks_for = f"{seats.share + 1} of {seats.of} shares" if seats.of else f"{len(seats.clients)} clients"
    return {
        "name": agent.name,
        "status": "revoked" if agent.revoked else "connected" if agent.connected else "away",
        "job": _job(agent, now),
        "share": agent.counted / total if total else 0.0,
        "speed": agent.steps / agent.seconds if agent.seconds else None,
        "availability": min(agent.attended / known, 1.0),
        "seen": f"{duration(max(now - agent.seen, 0.0))} ago",
        "battery": battery,
        "device": agent.device,
        "clients": speaks_for,
        "updates": agent.counted,
        "late": agent.late,
        "failed": agent.failed,
        "refused": agent.refused,
        "sent": size(agent.bytes),
        "hansa": agent.hansa,
        "note": f"revoked: {agent.revoked}" if agent.revoked else "",
    }


def _job(agent: AgentStatus, now: float) -> str:
    if not agent.jobs:
        return ""
    first = min(agent.jobs, key=lambda job: job.since)
    more = f" and {len(agent.jobs) - 1} more" if len(agent.jobs) > 1 else ""
    what = "" if first.phase == "train" else f", {first.phase}"
    return f"client {first.client}{what}, {duration(max(now - first.since, 0.0))}{more}"


# Clients of a run.


def _contributions(run: Run) -> None:
    with parts.guarded():
        even = site().source.ask(questions.taking_part, run.id)
        if not even["asked"]:
            if run.active:
                parts.empty(
                    "Nobody was asked yet",
                    "The first clients appear with the first round.",
                    ":material/hourglass:",
                )
            else:
                parts.empty("Nobody took part", "The run ended before its first round.")
            return
        order = st.session_state.get("order", "most")
        told = site().source.ask(questions.contributors, run.id, order=order)
        population = run.clients or even["asked"]
        with st.container(horizontal=True):
            st.metric("Population", f"{population:,}", border=True)
            st.metric("Asked", f"{even['asked']:,}", border=True)
            st.metric("Gave updates", f"{even['gave']:,}", border=True)
            st.metric("Updates", f"{even['folded']:,}", border=True)
            st.metric(
                "Gini index",
                f"{gini(even['shares']):.2f}" if even["folded"] else "–",
                border=True,
                help="0: all gave alike; 1: one alone",
            )
        table, curve = st.columns([3, 2], gap="medium")
        with table:
            _contributors(told)
        with curve:
            _lorenz(even["shares"])


def gini(shares: Sequence[float]) -> float:
    """Gini's index of a Lorenz curve at equal steps, by the trapezoidal rule."""
    inner = sum(shares[1:-1]) + (shares[0] + shares[-1]) / 2
    return max(1 - 2 * inner / (len(shares) - 1), 0.0)


def _contributors(told: questions.Columns) -> None:
    table = parts.frame(told)
    wasted = table.pop("discarded") + table.pop("lost")
    table.insert(3, "wasted", wasted)
    table["last"] = [duration(each) for each in told["last"]]
    highest = max([*told["share"], 1e-9])
    column = st.column_config
    st.dataframe(
        table[["client", "folded", "share", "wasted", "speed", "staleness", "examples", "last"]],
        hide_index=True,
        height=min(36 * len(table) + 38, 420),
        column_config={
            "client": column.NumberColumn("Client", format="%d", pinned=True),
            "folded": column.NumberColumn("Updates", format="localized"),
            "share": column.ProgressColumn("Share", format="percent", min_value=0, max_value=highest),
            "wasted": column.NumberColumn("Lost or late", format="localized"),
            "speed": column.NumberColumn(
                "Steps/s", format="%.3g", help="On the run's clock, travel included"
            ),
            "staleness": column.NumberColumn("Staleness", format="%.1f", help="Mean, in steps of the hub"),
            "examples": column.NumberColumn("Examples", format="localized"),
            "last": column.TextColumn("Last job ended", help="On the run's clock"),
        },
    )


def _lorenz(shares: Sequence[float]) -> None:
    data = pd.DataFrame({"clients": [i / 100 for i in range(101)], "updates": list(shares)})
    equal = alt.Chart(pd.DataFrame({"clients": [0.0, 1.0], "updates": [0.0, 1.0]}))
    x = alt.X("clients:Q", title="clients, least active first", axis=parts.ticks("share"))
    y = alt.Y("updates:Q", title="share of updates", axis=parts.ticks("share"))
    drawn = equal.mark_line(strokeDash=[4, 4], color=CATEGORIES[3]).encode(x=x, y=y) + alt.Chart(
        data
    ).mark_area(opacity=0.35, line={"color": CATEGORIES[0]}, color=CATEGORIES[0]).encode(
        x=x,
        y=y,
        tooltip=[alt.Tooltip("clients:Q", format=".0%"), alt.Tooltip("updates:Q", format=".1%")],
    )
    parts.chart(drawn, alt_text="Lorenz curve: share of updates by share of clients", height=300)


# What a robust rule thinks.


def _quality(run: Run) -> None:
    with parts.guarded():
        told = site().source.ask(questions.quality, run.id)
        if not told["client"]:
            parts.empty(
                "This run judges nobody",
                "Its updates are averaged as they come. Under a robust rule, as in "
                "`-c aggregation.rule=multikrum -c aggregation.f=2`, every update is scored here.",
                ":material/verified_user:",
            )
            return
        over_time = parts.frame(site().source.ask(questions.judged, run.id))
        weighs = over_time["left_out"].notna().any()
        verdicts = [verdict(told, i) for i in range(len(told["client"]))]
        with st.container(horizontal=True):
            st.metric("Judged", f"{len(verdicts):,}", border=True)
            st.metric(
                "Shut out",
                f"{verdicts.count('shut out'):,}",
                border=True,
                help=f"No weight in the last {_SHUT_OUT} updates or more",
            )
            st.metric("Suspicious", f"{verdicts.count('suspicious'):,}", border=True)
            if weighs:
                st.metric(
                    "Updates left out",
                    f"{int(over_time['left_out'].sum()):,} of {int(over_time['judged'].sum()):,}",
                    border=True,
                )
        left, right = st.columns([3, 2], gap="medium")
        with left:
            _judgements(told, verdicts, weighs=bool(weighs))
        with right:
            _distances(over_time, weighs=bool(weighs))


def verdict(told: questions.Columns, i: int) -> str:
    """What one reads of a client's row of :func:`hansa.core.questions.quality`."""
    out, relative = told["out"][i], told["relative"][i]
    if out is not None and out >= _SHUT_OUT:
        return "shut out"
    if told["broken"][i] or (relative is not None and relative > _FAR) or (out or 0) >= 2:
        return "suspicious"
    return "in line"


def _judgements(told: questions.Columns, verdicts: Sequence[str], *, weighs: bool) -> None:
    table = parts.frame({**told, "verdict": verdicts})
    farthest = max([each for each in told["relative"] if each is not None] or [1.0])
    shown = ["client", "verdict", "relative", "judged", "broken"]
    if weighs:
        shown[3:3] = ["weight", "kept", "out"]
    column = st.column_config
    st.dataframe(
        table[shown],
        hide_index=True,
        height=min(36 * len(table) + 38, 420),
        column_config={
            "client": column.NumberColumn("Client", format="%d", pinned=True),
            "verdict": column.TextColumn("Verdict"),
            "relative": column.ProgressColumn(
                "Distance",
                format="%.2f",
                min_value=0,
                max_value=farthest,
                help="Mean distance of its updates from what the rule made of all; 1 is the round's median",
            ),
            "weight": column.NumberColumn("Weight", format="%.2f", help="Mean; 1 is a vote in a plain mean"),
            "kept": column.NumberColumn("Kept", format="localized"),
            "out": column.NumberColumn("Out in a row", format="localized"),
            "judged": column.NumberColumn("Judged", format="localized"),
            "broken": column.NumberColumn("Not finite", format="localized"),
        },
    )


def _distances(over_time: pd.DataFrame, *, weighs: bool) -> None:
    x = alt.X("round:Q", title="round", axis=parts.ticks("round"))
    far = (
        alt.Chart(over_time)
        .mark_line(color=CATEGORIES[2])
        .encode(
            x=x,
            y=alt.Y("farthest:Q", title="times the median", scale=alt.Scale(zero=True)),
            tooltip=["round:Q", alt.Tooltip("farthest:Q", format=".2f")],
        )
    )
    st.markdown("**Farthest update**", help="Its distance from what the rule made of all")
    parts.chart(far, alt_text="Distance of the farthest update over the rounds", height=200)
    if weighs:
        data = over_time.assign(share=over_time["left_out"] / over_time["judged"])
        out = (
            alt.Chart(data)
            .mark_area(color=CATEGORIES[0], opacity=0.35, line={"color": CATEGORIES[0]})
            .encode(
                x=x,
                y=alt.Y(
                    "share:Q",
                    title="share",
                    axis=parts.ticks("share"),
                    scale=alt.Scale(domain=[0, 1]),
                ),
                tooltip=["round:Q", "left_out:Q", "judged:Q"],
            )
        )
        st.markdown("**Updates left out**")
        parts.chart(out, alt_text="Share of updates that were left out, over the rounds", height=200)


# Who holds what.


def _partition(run: Run) -> None:
    told = site().source.ask(questions.partition, run.id)
    counts, classes, width = told["counts"], told["classes"], told["width"]
    if not counts:
        parts.empty(
            "Nothing is known of the data", "The run recorded no partition.", ":material/donut_small:"
        )
        return
    least, _, median, _, most = told["sizes"]
    with st.container(horizontal=True):
        st.metric("Clients", f"{told['population']:,}", border=True)
        st.metric("Examples", f"{sum(map(sum, counts)):,}", border=True)
        st.metric("Median client", f"{median:,.0f}", border=True)
        st.metric("Smallest, largest", f"{least:,.0f}, {most:,.0f}", border=True)
    population = told["population"]
    rows = [
        {
            "client": str(i) if width == 1 else f"{i * width}–{min((i + 1) * width, population) - 1}",
            "place": i,
            "class": name,
            "order": j,
            "examples": n,
        }
        for i, row in enumerate(counts)
        for j, (name, n) in enumerate(zip(classes, row, strict=True))
        if n
    ]
    one = len(classes) == 1
    colour = (
        alt.value(CATEGORIES[0])
        if one
        else alt.Color(
            "class:N",
            scale=parts.colour_of(classes),
            sort=list(classes),
            title="class",
            legend=alt.Legend(orient="bottom", columns=10),
        )
    )
    drawn = (
        alt.Chart(pd.DataFrame(rows))
        .mark_bar()
        .encode(
            x=alt.X(
                "client:N",
                sort=alt.EncodingSortField("place"),
                title="client" if width == 1 else f"clients, {width:,} a bar",
                axis=alt.Axis(labelAngle=0, labelOverlap=True),
            ),
            y=alt.Y("examples:Q", title="examples"),
            color=colour,
            order=alt.Order("order:Q"),
            tooltip=["client:N", *([] if one else ["class:N"]), alt.Tooltip("examples:Q", format=",")],
        )
    )
    parts.chart(drawn, alt_text="Examples of every class by client", height=360)
