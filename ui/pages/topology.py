"""Gossip networks: who talks to whom and how much, and how fast they come to agree."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import altair as alt
import networkx as nx
import pandas as pd
import streamlit as st

from hansa.core import questions
from hansa.ui import number, parts, size
from hansa.ui.site import site
from hansa.ui.source import Run
from hansa.ui.theme import CATEGORIES

_DRAWN = 1500  # edges
_NAMED = 40  # peers whose numbers are written
_SPRING = 300  # peers that are laid out by their edges; more stand in a circle
_LISTED = 200  # edges in the table
_SLOW = 5.0  # seconds between two looks


def page() -> None:
    """Draw the page."""
    st.title("Topology")
    runs = [
        run for run in parts.run_list() if run.id and run.topology != "star" and run.status != "unreadable"
    ]
    run = parts.choose_run(runs)
    if run is None:
        parts.empty(
            "No gossip run yet",
            "In a gossip network clients talk to their neighbours and there is no server. Start one on "
            "the page **Runs** with a topology other than *star*, or by `hansa run -c topology.kind=ring`.",
            ":material/hub:",
        )
        return
    st.fragment(lambda: _network(run), run_every=_SLOW if run.active else None)()


def _network(run: Run) -> None:
    with parts.guarded():
        run = site().source.run(run.id)
        told = site().source.ask(questions.topology, run.id, limit=_DRAWN)
        curves = parts.frame(
            site().source.ask(questions.curve, run.id, metrics=["gossip/consensus", "gossip/gap"], bins=300)
        )
        consensus, gap = (curves[curves["metric"] == name] for name in ("gossip/consensus", "gossip/gap"))
        _headline(run, told, consensus, gap)
        if not told["a"]:
            parts.empty(
                "The graph was not recorded",
                "An older Hansa made this run. Its consensus distance is below all the same.",
                ":material/hub:",
            )
        else:
            _graph(run.topology, told)
        left, right = st.columns(2, gap="medium")
        with left:
            st.markdown("**Consensus distance**", help="Mean squared distance of the peers to their average")
            _curve(consensus, "mean squared distance", log=True)
        with right:
            st.markdown(
                "**Spectral gap**",
                help="1 − the second largest absolute eigenvalue of the mixing among those who took part: "
                "the larger, the faster they agree; 0 where the network fell apart",
            )
            _curve(gap, "1 − |λ₂|", log=False)
        if told["a"]:
            _edges(told)


def _headline(run: Run, told: Mapping[str, Any], consensus: pd.DataFrame, gap: pd.DataFrame) -> None:
    least, most = told["degree"]
    with st.container(horizontal=True):
        st.metric("Graph", run.topology, border=True)
        st.metric("Peers", f"{told['peers'] or run.clients or 0:,}", border=True)
        st.metric("Edges", f"{told['edges']:,}", border=True)
        st.metric("Neighbours", f"{least}" if least == most else f"{least} to {most}", border=True)
        st.metric("Consensus distance", number(_last(consensus)), border=True)
        st.metric("Spectral gap", number(_last(gap)), border=True)


def _last(curve: pd.DataFrame) -> float | None:
    return None if curve.empty else float(curve["value"].iloc[-1])


# The graph.


@lru_cache(maxsize=32)
def places(kind: str, edges: tuple[tuple[int, int], ...]) -> dict[int, tuple[float, float]]:
    """Where to draw the peers, within [−1, 1]²."""
    graph = nx.Graph()  # peers in their order, so that a circle is one
    graph.add_nodes_from(sorted({peer for edge in edges for peer in edge}))
    graph.add_edges_from(edges)
    if kind in ("torus", "regular") and len(graph) <= _SPRING:
        found = nx.kamada_kawai_layout(graph) if len(graph) <= 100 else nx.spring_layout(graph, seed=0)
    else:
        found = nx.circular_layout(graph)
    return {peer: (float(x), float(y)) for peer, (x, y) in found.items()}


def _graph(kind: str, told: Mapping[str, Any]) -> None:
    pairs = tuple(zip(told["a"], told["b"], strict=True))
    where = places(kind, pairs)
    edges = pd.DataFrame(
        [
            {
                "edge": f"{a} – {b}",
                "x": where[a][0],
                "y": where[a][1],
                "x2": where[b][0],
                "y2": where[b][1],
                "bytes": traffic,
                "traffic": size(traffic),
                "weight": weight,
            }
            for (a, b), traffic, weight in zip(pairs, told["bytes"], told["weight"], strict=True)
        ]
    )
    sent: dict[int, float] = dict.fromkeys(where, 0.0)
    for (a, b), traffic in zip(pairs, told["bytes"], strict=True):
        sent[a] += traffic
        sent[b] += traffic
    peers = pd.DataFrame(
        [
            {"peer": str(peer), "x": x, "y": y, "bytes": sent[peer], "traffic": size(sent[peer])}
            for peer, (x, y) in where.items()
        ]
    )
    flat = alt.Scale(domain=[-1.12, 1.12], nice=False)
    x, y = alt.X("x:Q", axis=None, scale=flat), alt.Y("y:Q", axis=None, scale=flat)
    colour = alt.Color(
        "bytes:Q",
        title="traffic",
        scale=alt.Scale(scheme="viridis", domain=[min(told["bytes"]), max(max(told["bytes"]), 1)]),
        legend=alt.Legend(format="~s", orient="right", gradientLength=160),
    )
    crowded = len(edges) > 400
    lines = (
        alt.Chart(edges)
        .mark_rule(opacity=0.45 if crowded else 0.85, strokeWidth=1 if crowded else 2)
        .encode(x=x, y=y, x2="x2:Q", y2="y2:Q", color=colour, tooltip=["edge:N", "traffic:N", "weight:Q"])
    )
    dots = (
        alt.Chart(peers)
        .mark_circle(size=max(1800 / len(peers), 30) if len(peers) > _NAMED else 320, opacity=1)
        .encode(x=x, y=y, color=alt.value(CATEGORIES[0]), tooltip=["peer:N", "traffic:N"])
    )
    drawn = lines + dots
    if len(peers) <= _NAMED:
        drawn += (
            alt.Chart(peers)
            .mark_text(fontSize=11, fontWeight=600, color="white", tooltip=None)
            .encode(x=x, y=y, text="peer:N")
        )
    with st.container(horizontal_alignment="center"):
        st.altair_chart(
            drawn.properties(width=620, height=480).configure_view(strokeWidth=0),
            width="stretch",
            alt=f"The {kind} graph of {len(peers)} peers, edges coloured by traffic",
        )
    if told["edges"] > len(edges):
        st.caption(f"The busiest {len(edges):,} of {told['edges']:,} edges.")


def _edges(told: Mapping[str, Any]) -> None:
    with st.expander(f"Edges by traffic ({told['edges']:,})", icon=":material/swap_horiz:"):
        few = slice(0, _LISTED)
        busiest = max([*told["bytes"][few], 1.0])
        column = st.column_config
        st.dataframe(
            pd.DataFrame(
                {
                    "edge": [f"{a} – {b}" for a, b in zip(told["a"][few], told["b"][few], strict=True)],
                    "load": [each / busiest for each in told["bytes"][few]],
                    "traffic": [size(each) for each in told["bytes"][few]],
                    "weight": told["weight"][few],
                }
            ),
            hide_index=True,
            height=min(36 * min(len(told["a"]), _LISTED) + 38, 360),
            column_config={
                "edge": column.TextColumn("Edge", pinned=True),
                "load": column.ProgressColumn("Of the busiest", format="percent", min_value=0, max_value=1),
                "traffic": column.TextColumn("Both ways", help="Updates of both ends, each of the mean size"),
                "weight": column.NumberColumn("Mixing weight", format="%.3f"),
            },
        )


def _curve(curve: pd.DataFrame, title: str, *, log: bool) -> None:
    if curve.empty:
        st.caption("Not measured: it is for up to 400 peers, and comes with the first round.")
        return
    known = curve[curve["value"] > 0] if log else curve
    drawn = (
        alt.Chart(known)
        .mark_line(color=CATEGORIES[0])
        .encode(
            x=alt.X("round:Q", title="round", axis=parts.ticks("round")),
            y=alt.Y(
                "value:Q",
                title=title,
                axis=parts.ticks("number"),
                scale=alt.Scale(type="log") if log else alt.Scale(zero=True),
            ),
            tooltip=["round:Q", alt.Tooltip("value:Q", format=".4g")],
        )
    )
    parts.chart(drawn, alt_text=f"{title} over the rounds", height=240)
