"""The pages of the dashboard, one file a page, each with one function that draws it."""

from __future__ import annotations

import streamlit as st
from streamlit.navigation.page import Page

from hansa.ui.pages import clients, compare, run, runs, system, topology

__all__ = ["all_pages"]


def all_pages() -> list[Page]:
    """The pages in the order of their navigation; the first is where one arrives."""
    return [
        st.Page(runs.page, title="Runs", icon=":material/list:", url_path="runs", default=True),
        st.Page(run.page, title="Run", icon=":material/show_chart:", url_path="run"),
        st.Page(clients.page, title="Clients", icon=":material/devices:", url_path="clients"),
        st.Page(compare.page, title="Compare", icon=":material/stacked_line_chart:", url_path="compare"),
        st.Page(topology.page, title="Topology", icon=":material/hub:", url_path="topology"),
        st.Page(system.page, title="System", icon=":material/monitoring:", url_path="system"),
    ]
