"""The dashboard's process: Streamlit behind one address, with nothing of it told to anybody else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import streamlit as st
from starlette.middleware import Middleware

from hansa.ui.gate import Guard
from hansa.ui.site import Site, configure
from hansa.ui.theme import THEME

__all__ = ["SCRIPT", "serve"]

# Beside a folder named pages, Streamlit would take every file in it for a page of its own.
SCRIPT = Path(__file__).parent / "pages" / "app.py"


def serve(site: Site, *, address: str, port: int, certificate: tuple[Path, Path] | None = None) -> None:
    """Serve the pages until SIGTERM or Ctrl-C, by HTTPS with a ``certificate`` and its key (PEM files)."""
    configure(site)
    guard = [] if site.gate is None else [Middleware(Guard, site.gate)]
    st.App(SCRIPT, middleware=guard).run(config=options(address, port, certificate))


def options(address: str, port: int, certificate: tuple[Path, Path] | None = None) -> dict[str, Any]:
    """Streamlit's options, those of the theme among them."""
    return {
        **(
            {"server.sslCertFile": str(certificate[0]), "server.sslKeyFile": str(certificate[1])}
            if certificate
            else {}
        ),
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
