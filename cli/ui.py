"""``hansa ui``: the dashboard."""

from __future__ import annotations

import socket
import ssl
import sys
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hansa.core.errors import InputError
from hansa.core.trust import is_loopback

if TYPE_CHECKING:
    from hansa.cli.recipes import Recipes
    from hansa.ui.source import Source


ui = typer.Typer(
    name="ui",
    rich_markup_mode="rich",
    invoke_without_command=True,
    help="Watch and steer runs in the browser.",
)
user = typer.Typer(name="user", rich_markup_mode="rich", help="Who may use an exposed dashboard.")
ui.add_typer(user)

_File = Annotated[Path, typer.Option("--file", metavar="FILE", help="The file of users.")]
_USERS = Path("users.json")


@ui.callback()
def serve(
    context: typer.Context,
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
    auth: Annotated[
        Path | None,
        typer.Option(
            "--auth", metavar="FILE", help="Who may look and steer, by password; see `hansa ui user add`."
        ),
    ] = None,
    certificate: Annotated[
        Path | None, typer.Option(metavar="FILE", help="For HTTPS: a certificate, PEM.")
    ] = None,
    key: Annotated[Path | None, typer.Option(metavar="FILE", help="For HTTPS: its private key, PEM.")] = None,
) -> None:
    """Watch and steer runs in the browser, until SIGTERM or Ctrl-C.

    It shows a folder of runs, or with --server the runs of a coordinator. Beyond this machine it is served to
    those in the file of --auth alone.
    """
    if context.invoked_subcommand is not None:
        return
    exposed = not is_loopback(f"{address}:{port}")
    if exposed and auth is None:
        raise InputError(
            "--address",
            address,
            "others could reach it, and nobody would be asked who they are",
            "name those who may with --auth FILE (`hansa ui user add` makes it), or leave it at 127.0.0.1",
        )
    if (certificate is None) != (key is None):
        raise InputError(
            "--certificate", str(certificate or key), "a certificate and its key go together", "give both"
        )
    if certificate is not None and key is not None:
        _require_pair(certificate, key)
    from hansa.ui.access import Guarded
    from hansa.ui.gate import Gate
    from hansa.ui.serve import serve
    from hansa.ui.site import Site
    from hansa.ui.users import Users

    source, gate = _source(runs, server), None
    if auth is not None:
        users = Users(auth)
        users.all()  # a file that cannot be read is told now
        gate = Gate(users, secure=certificate is not None)
        source = Guarded(source, gate)
    if exposed and certificate is None:
        print(
            "passwords will cross the network in the clear; use --certificate and --key, or an HTTPS proxy",
            file=sys.stderr,
        )
    _require_free(address, port)
    print(f"{'https' if certificate else 'http'}://{address}:{port}", flush=True)
    pair = (certificate, key) if certificate is not None and key is not None else None
    serve(Site(source=source, gate=gate, recipes=_recipes), address=address, port=port, certificate=pair)


@user.command("add")
def user_add(
    name: Annotated[str, typer.Argument(metavar="NAME")],
    role: Annotated[
        str, typer.Option(metavar="ROLE", help="viewer, or operator: who also starts and stops.")
    ] = ("viewer"),
    file: _File = _USERS,
) -> None:
    """Add a user, or give one a new role and password, which is read from the terminal or standard input."""
    from hansa.ui.users import Users

    if sys.stdin.isatty():
        password = typer.prompt(f"Password of {name}", hide_input=True, confirmation_prompt=True)
    else:
        password = sys.stdin.readline().rstrip("\n")
    Users(file).add(name, role, password)
    print(f"{name}: {role}, in {file}")


@user.command("ls")
def user_ls(file: _File = _USERS) -> None:
    """List the users."""
    from hansa.ui.users import Users

    for each in Users(file).all():
        print(f"{each.role:<9} {each.name}")


@user.command("rm")
def user_rm(name: Annotated[str, typer.Argument(metavar="NAME")], file: _File = _USERS) -> None:
    """Take a user out, at once."""
    from hansa.ui.users import Users

    Users(file).remove(name)
    print(f"{name}: out of {file}")


def _require_pair(certificate: Path, key: Path) -> None:
    try:
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(certificate, key, password="")
    except OSError as error:
        why = f"it cannot be used with {key} ({error.strerror or error})"
        raise InputError(
            "--certificate",
            str(certificate),
            why,
            "give a certificate and its key, both PEM, without password",
        ) from error


def _require_free(address: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        socket.create_server((address, port), family=family).close()
    except OSError as error:
        why = f"nothing can listen at {address}:{port} ({error.strerror or error})"
        raise InputError("--port", port, why, "use another port") from error


def _source(runs: Path | None, server: str | None) -> Source:
    from hansa.ui.source import Folder, Server

    if server is None:
        return Folder(runs or Path("runs"))
    from hansa.cli.federation import coordinator_at

    return Server(coordinator_at(server, patience=3.0, option="--server"))


@cache
def _recipes() -> Recipes:
    from hansa.cli.recipes import Recipes  # and with it torch, once somebody asks for a form

    return Recipes()
