"""``hansa ui``: the dashboard."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hansa.core.errors import InputError
from hansa.core.trust import is_loopback

if TYPE_CHECKING:
    from hansa.ui.source import Source


def ui(
    runs: Annotated[
        Path | None,
        typer.Option(
            "--runs",
            envvar="HANSA_RUNS",
            metavar="DIR",
            help="Folder of run directories.",
            show_default="runs",
        ),
    ] = None,
    server: Annotated[
        str | None,
        typer.Option(
            "--server", metavar="WHERE", help="A coordinator instead: HOST:PORT, or local (`hansa local up`)."
        ),
    ] = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Where the browser finds it.")] = 8501,
    address: Annotated[str, typer.Option(metavar="HOST", help="Which of this machine's addresses.")] = (
        "127.0.0.1"
    ),
) -> None:
    """Watch and steer runs in the browser, until SIGTERM or Ctrl-C.

    It shows a folder of runs, or with --server the runs of a coordinator.
    """
    if not is_loopback(f"{address}:{port}"):
        raise InputError(
            "--address", address, "others could reach it, and it has no login", "leave it at 127.0.0.1"
        )
    from hansa.ui.serve import serve
    from hansa.ui.site import Site

    print(f"http://{address}:{port}", flush=True)
    serve(Site(source=_source(runs, server)), address=address, port=port)


def _source(runs: Path | None, server: str | None) -> Source:
    from hansa.ui.source import Folder, Server

    if server is None:
        return Folder(runs or Path("runs"))
    from hansa.cli.federation import coordinator_at

    return Server(coordinator_at(server, patience=3.0))
