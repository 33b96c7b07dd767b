"""Real federations: the commands that start a coordinator, agents, or both, and the run that uses them."""

from __future__ import annotations

import logging
import os
import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hansa.cli.output import Output
from hansa.core.errors import HansaError, Interrupted, RunError
from hansa.ui import number, score

if TYPE_CHECKING:
    from hansa.core.control import Coordinator
    from hansa.core.recipe import Recipe
    from hansa.core.wire import federation_pb2 as pb

coordinator = typer.Typer(name="coordinator", no_args_is_help=True, help="Serve real federations.")
agent = typer.Typer(name="agent", no_args_is_help=True, help="Train where the data is.")
local = typer.Typer(name="local", no_args_is_help=True, help="A coordinator and agents on this machine.")

_ConfigFile = Annotated[
    Path, typer.Option("--config", metavar="FILE", help="The agent's configuration.", show_default=True)
]
_Json = Annotated[
    bool, typer.Option("--json", help="One JSON object on standard output; text for people on error.")
]
_Folder = Annotated[
    Path, typer.Option("--folder", metavar="DIR", help="Where the processes keep what is theirs.")
]
_RunsOption = Annotated[
    Path, typer.Option("--runs", envvar="HANSA_RUNS", metavar="DIR", help="Folder of run directories.")
]


@coordinator.command("start")
def coordinator_start(
    config: Annotated[
        Path | None, typer.Option("--config", metavar="FILE", help="The coordinator's configuration.")
    ] = None,
    listen: Annotated[str | None, typer.Option(metavar="HOST:PORT", help="Where agents come to.")] = None,
    data: Annotated[Path | None, typer.Option(metavar="DIR", help="Event log and artefacts.")] = None,
    runs: Annotated[
        Path | None, typer.Option("--runs", envvar="HANSA_RUNS", metavar="DIR", help="Run directories.")
    ] = None,
    pki: Annotated[
        Path | None,
        typer.Option(
            "--pki",
            envvar="HANSA_PKI",
            metavar="DIR",
            show_default="pki, if it is there",
            help="The authority's folder; without one, insecure and on loopback only.",
        ),
    ] = None,
    enrolment: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="Where join tokens are taken; nowhere if empty."),
    ] = None,
    metrics: Annotated[str | None, typer.Option(metavar="HOST:PORT", help="For Prometheus.")] = None,
    database: Annotated[
        str | None,
        typer.Option(
            envvar="HANSA_DATABASE",
            metavar="URL",
            show_default="SQLite in the data folder",
            help="The event log's database: postgresql://USER@HOST/NAME.",
        ),
    ] = None,
) -> None:
    """Serve until SIGTERM or Ctrl-C. What was acknowledged survives any end.

    With certificates it listens on 0.0.0.0:8443, and for join tokens on 0.0.0.0:8444, unless told otherwise;
    without them on 127.0.0.1:8443.
    """
    import asyncio

    from hansa.server.app import read_config, serve

    _log_lines()
    overrides = {"listen": listen, "data": data, "runs": runs, "metrics": metrics, "enrolment": enrolment}
    overrides["database"] = database
    asyncio.run(serve(read_config(config, {**overrides, "pki": pki})))


@agent.command("start")
def agent_start(config: _ConfigFile = Path("agent.toml")) -> None:
    """Be there for a coordinator until SIGTERM or Ctrl-C."""
    import asyncio

    from hansa.client.agent import attend, read_config

    _log_lines()
    asyncio.run(attend(read_config(config)))


@agent.command("check")
def agent_check(config: _ConfigFile = Path("agent.toml"), json: _Json = False) -> None:
    """Look for whatever could keep an agent from its work; each problem comes with its remedy."""
    from hansa.client.agent import read_config
    from hansa.client.check import check

    out = Output(json=json)
    found: dict[str, str | None] = {}
    for what, problem in check(read_config(config)):
        found[what] = problem
        out.say(f"{'ok' if problem is None else 'PROBLEM':<8} {what}{f': {problem}' if problem else ''}")
    problems = sum(each is not None for each in found.values())
    out.envelope(checks=found, problems=problems)
    if problems:
        raise typer.Exit(RunError.exit_code)


@local.command("up")
def local_up(
    agents: Annotated[int, typer.Option(min=1, help="How many; they share the clients of every run.")] = 4,
    folder: _Folder = Path(".hansa-local"),
    runs: _RunsOption = Path("runs"),
    json: _Json = False,
) -> None:
    """Start a coordinator and agents as processes of this machine."""
    from hansa.cli.local import FOLDER, up

    out = Output(json=json)
    address = up(folder, agents, runs)
    use = "hansa run RECIPE --on local"
    if folder != FOLDER:
        use = f"HANSA_IDENTITY={shlex.quote(str(folder / 'user'))} hansa run RECIPE --on {address}"
    out.say(f"a coordinator at {address} and {agents} agents; `{use}`")
    out.envelope(address=address, agents=agents)


@local.command("down")
def local_down(folder: _Folder = Path(".hansa-local"), json: _Json = False) -> None:
    """End what `hansa local up` started, and remove all but the run directories."""
    from hansa.cli.local import down

    out = Output(json=json)
    ended = down(folder)
    out.say(f"{ended} processes ended" if ended else "nothing was up")
    out.envelope(ended=ended)


def run_on(recipe: Recipe, where: str, out: Output, *, wait_for: int, quiet: bool) -> int:
    """Run a recipe on a coordinator and tell how it goes; returns the exit code."""
    import secrets

    with coordinator_at(where) as remote:
        status = remote.submit(recipe.toml(), wait_for=wait_for, key=secrets.token_hex(16))
        if not quiet:
            out.error.print(f"{status.id}: on {remote.address}", soft_wrap=True, markup=False)
        return _follow(remote, where, status.id, out, quiet=quiet)


def resume_on(run: str, where: str, out: Output, *, quiet: bool) -> int:
    """Go on with an interrupted run of a coordinator."""
    with coordinator_at(where) as remote:
        status = remote.resume(run)
        return _follow(remote, where, run, out, quiet=quiet, after=status.rounds)


def stop_on(run: str, where: str, out: Output) -> None:
    """Interrupt a run of a coordinator."""
    with coordinator_at(where) as remote:
        status = remote.stop(run)
        out.say(f"{run}: {status.status}; `hansa resume {run} --on {where}` goes on")
        out.envelope(run=_facts(status))


def coordinator_at(where: str, *, patience: float = 20.0, option: str = "--on") -> Coordinator:
    """The coordinator at HOST:PORT, or with "local" that of `hansa local up`; ``option`` named it."""
    from hansa.cli import local as processes
    from hansa.core.control import Coordinator

    if where == "local":
        address, folder = processes.where(processes.FOLDER, option), processes.FOLDER / "user"
        return Coordinator(address, folder, patience=patience, option=option)
    identity = os.environ.get("HANSA_IDENTITY")
    return Coordinator(where, Path(identity) if identity else None, patience=patience, option=option)


def _follow(remote: Coordinator, where: str, run: str, out: Output, *, quiet: bool, after: int = 0) -> int:
    end: pb.RunStatus | None = None
    metrics: dict[str, float] = {}
    with _stopping(remote, run):
        for happening in remote.watch(run, after):
            if happening.WhichOneof("body") == "end":
                end = happening.end
                break
            metrics = dict(happening.round.metrics)
            if not quiet:
                out.error.print(_line(happening.round), soft_wrap=True, markup=False)
    assert end is not None
    if end.status == "interrupted":
        raise Interrupted(f"stopped after round {end.rounds}; `hansa resume {run} --on {where}` goes on")
    if end.status != "finished":
        raise HansaError(f"{run}: {end.reason}")
    out.say(f"finished: {end.reason}\n  run       {end.directory}" if not quiet else end.directory)
    out.envelope(run=_facts(end), metrics=metrics)
    return 0


def _facts(status: pb.RunStatus) -> dict[str, Any]:
    return {field.name: getattr(status, field.name) for field in status.DESCRIPTOR.fields}


def _line(done: pb.Round) -> str:
    cells = {"round": str(done.index)}
    for name in ("accuracy", "loss", "train/loss"):
        if name in done.metrics:
            value = done.metrics[name]
            cells[name] = score(value, name) if name == "accuracy" else number(value)
    return "  ".join(
        f"{name} {text}" for name, text in {**cells, "clients": f"{done.folded}/{done.asked}"}.items()
    )


@contextmanager
def _stopping(remote: Coordinator, run: str) -> Iterator[None]:
    """The first Ctrl-C asks the coordinator to stop the run, the second ends at once."""
    asked = False

    def handle(signum: int, frame: Any) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        remote.stop(run)

    before = {each: signal.signal(each, handle) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def verified(run: str, data: Path, runs: Path, database: str | None, out: Output) -> None:
    """Recompute a run's model from what was accepted, and tell."""
    from hansa.cli.find import find_run
    from hansa.server.verify import verify

    directory = find_run(run, runs)
    url = database or f"sqlite:///{(data / 'events.db').absolute()}"
    if database is None and not (data / "events.db").is_file():
        raise RunError(f"{data}: there is no event log; give the coordinator's folder with --data")
    found = verify(
        directory.resolve().name, database=url, artefacts=data / "artefacts", runs=directory.resolve().parent
    )
    out.say(
        f"{directory}: the model is what {found.updates - found.late} accepted updates make, bit for bit "
        f"({found.rounds} rounds, {found.events} events, {found.late} late updates set aside)"
    )
    out.envelope(verified=vars(found))


def _log_lines() -> None:
    """One line an event on standard error: JSON, or for a terminal in colours."""
    import structlog

    people = sys.stderr.isatty()
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.dev.ConsoleRenderer() if people else structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
