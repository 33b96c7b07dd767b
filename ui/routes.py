"""The way from one page to another, by its address."""

from __future__ import annotations

import streamlit as st
from streamlit.navigation.page import Page


def to(path: str) -> Page:
    """The page at an address of :func:`hansa.ui.pages.all_pages`, for a link."""
    return st.Page(_elsewhere, title=path, url_path=path)


def _elsewhere() -> None:
    """Never drawn: Streamlit knows pages by their address."""
