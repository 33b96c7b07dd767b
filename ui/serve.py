"""The dashboard's process: Streamlit behind one address, with nothing of it told to anybody else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import streamlit as st

from hansa.ui.site import Site, configure
from hansa.ui.theme import THEME

__all__ = ["SCRIPT", "serve"]

SCRIPT = Path(__file__).with_name("app.py")


def serve(site: Site, *, address: str, port: int) -> None:
    """Serve the pages until SIGTERM or Ctrl-C."""
    configure(site)
    st.App(SCRIPT).run(config=options(address, port))


def options(address: str, port: int) -> dict[str, Any]:
    """Streamlit's options, those of the theme among them."""
    return {
        "server.address": address,
        "server.port": port,
        "server.headless": True,  # no browser is opened, no address asked for
        "server.fileWatcherType": "none",
        "server.enableStaticServing": False,
        "browser.gatherUsageStats": False,
        "client.toolbarMode": "viewer",
        "client.showErrorDetails": "none",
        "client.showErrorLinks": "false",
        "runner.magicEnabled": False,
        "logger.hideWelcomeMessage": True,
        **THEME,
    }
