"""The dashboard, as Streamlit runs it: navigation, and the page that was asked for."""

from __future__ import annotations

from pathlib import Path

import streamlit as st

from hansa.ui import pages
from hansa.ui.access import who
from hansa.ui.site import site

ICON = str(Path(__file__).parents[1] / "icon.svg")


def main() -> None:
    """Draw whatever page is asked for."""
    st.set_page_config(page_title="Hansa", page_icon=ICON, layout="wide")
    # What says that a script is running, for live parts run all the time.
    st.html("<style>[data-testid=stStatusWidget] { display: none; }</style>")
    page = st.navigation(pages.all_pages())
    user = who(site().gate)
    if user is None:
        st.warning("You are not signed in any more. [Sign in](/login)", icon=":material/lock:")
        return
    st.sidebar.caption(site().source.label)
    if site().gate is not None:
        st.sidebar.caption(f"{user.name}, {user.role} · [sign out](/logout)")
    page.run()


if __name__ == "__main__":
    main()
