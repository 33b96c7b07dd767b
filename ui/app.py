"""The dashboard, as Streamlit runs it: navigation, and the page that was asked for."""

from __future__ import annotations

import streamlit as st

from hansa.ui import pages
from hansa.ui.site import site


def main() -> None:
    """Draw whatever page is asked for."""
    st.set_page_config(page_title="Hansa", page_icon=":material/hub:", layout="wide")
    page = st.navigation(pages.all_pages())
    st.sidebar.caption(site().source.label)
    page.run()


if __name__ == "__main__":
    main()
