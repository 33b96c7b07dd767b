"""The dashboard's process: Streamlit behind one address, with nothing of it told to anybody else."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import streamlit as st
from starlette.middleware import Middleware
from starlette.responses import RedirectResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocketDisconnected

from hansa.ui import pages  # noqa: F401 - imported now, and not while the first visitor waits
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
    home = Route(
        "/runs", lambda request: RedirectResponse("/")
    )  # Streamlit knows its first page by "/" alone
    app = st.App(SCRIPT, routes=[home], middleware=[Middleware(Farewell), *guard])
    app.run(config=options(address, port, certificate))


class Farewell:
    """A browser may leave in the middle of an answer, which is no fault: Streamlit would log it as one."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve."""
        with suppress(WebSocketDisconnected):
            await self._app(scope, receive, send)


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
