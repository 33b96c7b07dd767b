"""The commands. What they need is imported when they run, so that ``hansa --help`` is quick."""

from __future__ import annotations

import math
import os
import shlex
import sys
import tomllib
from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import click
import typer
from click.core import ParameterSource

import hansa
from hansa.cli import federation
from hansa.cli.audit import audit
from hansa.cli.options import Json as _Json
from hansa.cli.options import epilog as _epilog
from hansa.cli.options import output as _output
from hansa.cli.pki import pki
from hansa.cli.ui import ui
from hansa.core import errors

if TYPE_CHECKING:
    from hansa.core.recipe import Recipe

_EXIT_CODES = {
    0: "done",
    errors.HansaError.exit_code: "unexpected error",
    errors.InputError.exit_code: "a recipe, an option or a combination that cannot be run",
    errors.DataError.exit_code: "data that is missing, damaged or cannot be divided",
    errors.DivergedError.exit_code: "training left the finite numbers",
    errors.RunError.exit_code: "a run directory that is absent, damaged or in use",
    errors.TrustError.exit_code: "a certificate, key, token or audit log that cannot be trusted",
    errors.Interrupted.exit_code: "stopped on request; `hansa resume` goes on",
}


app = typer.Typer(
    name="hansa",
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="\n\n".join(
        [
            _epilog(
                "First steps", "hansa run", "hansa new study --algorithm scaffold", "hansa run study.toml"
            ),
            _epilog("Exit codes", *(f"{code}: {text}" for code, text in _EXIT_CODES.items())),
        ]
    ),
)
config = typer.Typer(name="config", rich_markup_mode="rich")
for each in (config, pki, audit, federation.coordinator, federation.agent, federation.local):
    app.add_typer(each)


class _Over(StrEnum):
    rounds = "rounds"
    time = "time"
    bytes = "bytes"


# What arguments mean is told in the commands' own text: typer 0.20 loses it under click 8.5.
_Recipe = Annotated[
    str | None, typer.Argument(metavar="[RECIPE]", show_default="20 clients on scikit-learn's digits")
]
_Config = Annotated[
    list[str] | None,
    typer.Option(
        "--config",
        "-c",
        metavar="KEY=VALUE",
        help="Change a value of the recipe, as in -c train.lr=0.05; may be repeated. "
        "Nothing after the = takes the key out.",
    ),
]
_Runs = Annotated[
    Path, typer.Option("--runs", envvar="HANSA_RUNS", metavar="DIR", help="Folder of run directories.")
]
_Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="No progress: only the run directory, and errors.")
]
_NoReport = Annotated[bool, typer.Option("--no-report", help="Write no report.html at the end.")]
_Profile = Annotated[bool, typer.Option("--profile", help="Tell where the time went.")]
_On = Annotated[
    str | None,
    typer.Option(
        "--on", metavar="WHERE", help="sim, local (see `hansa local up`), or a coordinator's HOST:PORT."
    ),
]
_Run = Annotated[str, typer.Argument(metavar="RUN")]
_RUNS = Path("runs")

# Options that one of the two ways to run has not: what is so with it, and what to do.
_OF_SIMULATIONS = {
    "runs": ("the coordinator writes the run directory, where it keeps its runs", "leave it out"),
    "no_report": ("a coordinator's run has no report yet", "leave it out; `hansa report` writes one"),
    "profile": ("where the time went is told of simulations alone", "leave it out"),
}
_OF_COORDINATORS = {"wait_for": ("virtual clients are always there", "leave it out, or give --on")}


@app.callback(invoke_without_command=True)
def _hansa(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error; may stand anywhere.")
    ] = False,
) -> None:
    """Federated learning: simulate a federation on this machine, watch it, compare runs."""
    if version:
        print(f"hansa {hansa.__version__}")
    elif context.invoked_subcommand is None:
        print(context.get_help())


@config.callback(invoke_without_command=True)
def _config(context: typer.Context) -> None:
    """Look at recipes."""
    if context.invoked_subcommand is None:
        print(context.get_help())


@app.command(
    epilog=_epilog(
        "Examples",
        "hansa run",
        "hansa run study.toml -c partition.alpha=0.1 -c stop.rounds=50 --seed 1",
        "hansa run study.toml --json | jq .run.accuracy",
        "hansa run examples/fedexp.py -c algorithm.epsilon=0.01",
    )
)
def run(
    recipe: _Recipe = None,
    config: _Config = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Seed of every random draw, instead of the recipe's.")
    ] = None,
    runs: _Runs = _RUNS,
    on: _On = None,
    wait_for: Annotated[
        int, typer.Option(min=0, help="Clients to wait for before the first round; 0 is all.")
    ] = 0,
    json: _Json = False,
    quiet: _Quiet = False,
    no_report: _NoReport = False,
    profile: _Profile = False,
) -> None:
    """Run a recipe: on virtual clients on this machine, or, with --on, on real agents.

    On several processes or machines: torchrun --nproc-per-node 2 -m hansa run RECIPE.

    RECIPE is a TOML file, or file.py:function that returns a recipe.

    The first Ctrl-C stops after the step under way, and the run can be resumed; the second stops at once.
    """
    if on not in (None, "sim"):
        _refuse(_OF_SIMULATIONS)
        made_on = federation.run_on(
            _loaded(recipe, config, seed), on, _output(json), wait_for=wait_for, quiet=quiet
        )
        raise typer.Exit(made_on)
    _refuse(_OF_COORDINATORS)
    from hansa.cli.execute import Options, execute
    from hansa.simulation.runs import start

    made = start(_loaded(recipe, config, seed), runs)
    options = Options(quiet=quiet, report=not no_report, profile=profile, debug=_debug())
    raise typer.Exit(execute(made, _output(json), options))


@app.command(epilog=_epilog("Examples", "hansa resume last", "hansa resume last -c engine.chunk=8"))
def resume(
    run: _Run,
    config: _Config = None,
    runs: _Runs = _RUNS,
    on: _On = None,
    json: _Json = False,
    quiet: _Quiet = False,
    no_report: _NoReport = False,
    profile: _Profile = False,
) -> None:
    """Go on with a run that was interrupted, or that failed, from its last checkpoint.

    RUN is an id, the beginning of one, a path, or last; with --on, an id. What -c may change is how it is
    computed: engine.*.
    """
    if on not in (None, "sim"):
        if config:
            raise errors.InputError(
                "--config", config[0], "a coordinator's run goes on as it began", "leave it out"
            )
        _refuse(_OF_SIMULATIONS)
        raise typer.Exit(federation.resume_on(run, on, _output(json), quiet=quiet))
    from hansa.cli.execute import Options, execute
    from hansa.simulation.runs import resume

    made = resume(_found(run, runs), _overrides(config))
    options = Options(quiet=quiet, report=not no_report, profile=profile, debug=_debug())
    raise typer.Exit(execute(made, _output(json), options))


@app.command(epilog=_epilog("Examples", "hansa stop 20261121-093000-study-k3f --on local"))
def stop(
    run: _Run,
    on: Annotated[str, typer.Option("--on", metavar="WHERE", help="local or HOST:PORT.")],
    json: _Json = False,
) -> None:
    """Interrupt a run of a coordinator; what agents are doing for it is thrown away.

    RUN is an id.
    """
    federation.stop_on(run, on, _output(json))


@app.command(epilog=_epilog("Examples", "hansa verify last --data coordinator"))
def verify(
    run: _Run,
    data: Annotated[Path, typer.Option(metavar="DIR", help="The coordinator's folder.")] = Path(
        "coordinator"
    ),
    database: Annotated[
        str | None, typer.Option(metavar="URL", help="The event log, if it is in another database.")
    ] = None,
    runs: _Runs = _RUNS,
    json: _Json = False,
) -> None:
    """Make the model of a coordinator's finished run again from the accepted updates, and compare.

    RUN is an id, the beginning of one, a path, or last.
    """
    federation.verified(run, data, runs, database, _output(json))


@app.command(epilog=_epilog("Examples", "hansa new study", "hansa new fedbuff-study --algorithm fedbuff"))
def new(
    name: Annotated[str, typer.Argument(metavar="NAME")],
    algorithm: Annotated[
        str, typer.Option(metavar="ALGORITHM", help="Which one; `hansa strategies` lists them.")
    ] = "fedavg",
    json: _Json = False,
) -> None:
    """Write NAME.toml, a recipe to begin with: it runs as it is, and tells of every key."""
    from hansa.cli.new import write_new

    out = _output(json)
    path = write_new(Path(name), algorithm)
    out.say(f"{path}: edit it, then `hansa run {shlex.quote(str(path))}`")
    out.envelope(recipe=path)


@config.command(
    "show",
    epilog=_epilog("Examples", "hansa config show", "hansa config show study.toml -c algorithm.name=fedadam"),
)
def config_show(recipe: _Recipe = None, config: _Config = None, json: _Json = False) -> None:
    """Show a recipe with all defaults written out; what differs from them says so.

    RECIPE is a TOML file, or file.py:function that returns a recipe.
    """
    from hansa.cli.toml import shown
    from hansa.simulation.catalog import resolved

    out = _output(json)
    made = _loaded(recipe, config, None)
    if json:
        out.envelope(recipe=tomllib.loads(resolved(made).toml()))
    else:
        print(shown(made), end="")


@app.command(epilog=_epilog("Examples", "hansa strategies", "hansa strategies fraug"))
def strategies(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", show_default=False)] = None,
    json: _Json = False,
) -> None:
    """List all there is: algorithms, schedules, rules, topologies, attacks, data, models; or tell of NAME."""
    from hansa.cli.things import find, overview, page, things

    out = _output(json)
    if json:
        out.envelope(strategies=[each.described() for each in (find(name) if name else things())])
    elif name is None:
        out.say(overview())
    else:
        for each in find(name):
            out.say(page(each))


@app.command("ls")
def ls(runs: _Runs = _RUNS, json: _Json = False) -> None:
    """List the runs, the newest first."""
    from hansa.cli.output import run_facts
    from hansa.cli.runs import listing
    from hansa.core.store import runs as stored

    out = _output(json)
    found = list(stored(runs))
    out.envelope(runs=[run_facts(each) for each in found])
    if not json:
        out.say(listing(found, out.width) if found else f"no runs in {runs}; `hansa run` makes one")


@app.command(epilog=_epilog("Examples", "hansa show last"))
def show(run: _Run, runs: _Runs = _RUNS, json: _Json = False) -> None:
    """Show one run: how it stands, what made it, its last rounds, its files.

    RUN is an id, the beginning of one, a path, or last.
    """
    from hansa.cli.output import run_facts
    from hansa.cli.runs import page
    from hansa.core.store import RunStore

    out = _output(json)
    directory = _found(run, runs)
    if not json:
        out.say(page(directory))
        return
    with RunStore.open(directory) as store:
        out.envelope(
            run=run_facts(store.summary()),
            facts=store.facts,
            recipe=tomllib.loads(store.recipe),
            rounds=[
                {
                    "round": row.index,
                    "time": row.time,
                    "wall": row.wall,
                    "bytes_up": row.bytes_up,
                    "bytes_down": row.bytes_down,
                    "metrics": row.metrics,
                }
                for row in store.rounds()
            ],
        )


@app.command(
    epilog=_epilog(
        "Examples",
        "hansa compare 20261121-0930 20261121-0945",
        "hansa compare runs/* --target 0.9 --over bytes -o bytes.png",
    )
)
def compare(
    run: Annotated[
        list[str],
        typer.Argument(metavar="RUN RUN..."),
    ],
    metric: Annotated[str, typer.Option(help="What to compare.")] = "accuracy",
    target: Annotated[
        float | None,
        typer.Option(show_default="what the poorest run came to", help="Value to be reached."),
    ] = None,
    over: Annotated[_Over, typer.Option(help="What the picture's axis shows.")] = _Over.rounds,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", show_default=False, help="Draw the curves: .png, .svg or .pdf."),
    ] = None,
    runs: _Runs = _RUNS,
    json: _Json = False,
) -> None:
    """Compare runs: final, best, and what it took to come to a target.

    RUN is an id, the beginning of one, a path, or last.

    Runs whose recipes differ in nothing but the seed share a line: mean ± standard deviation.
    """
    from hansa.cli import runs as tables
    from hansa.ui.comparison import compare as put_side_by_side

    if target is not None and not math.isfinite(target):
        raise errors.InputError("--target", target, "it must be finite", "give a value of the metric")
    out = _output(json)
    directories = dict.fromkeys(_found(each, runs).resolve() for each in run)  # each once
    curves = [tables.curve(each, metric) for each in directories]
    reached, rows = put_side_by_side(curves, target)
    if output is not None:
        tables.draw(output, curves, metric, over.value)
    out.envelope(
        metric=metric, target=reached, comparison=[tables.facts(row) for row in rows], picture=output
    )
    if not json:
        out.say(tables.compared(metric, reached, rows))
        if output is not None:
            out.say(f"picture: {output}")


@app.command(epilog=_epilog("Examples", "hansa export last rounds.csv"))
def export(
    run: _Run,
    path: Annotated[Path, typer.Argument(metavar="PATH")],
    runs: _Runs = _RUNS,
    json: _Json = False,
) -> None:
    """Write the rounds of a run to PATH, a .csv or .json file, with a column for every metric."""
    from hansa.core.store import RunStore
    from hansa.core.store import export as write

    out = _output(json)
    with RunStore.open(_found(run, runs)) as store:
        write(store, path)
    out.say(str(path))
    out.envelope(path=path)


@app.command(epilog=_epilog("Examples", "hansa report last"))
def report(run: _Run, runs: _Runs = _RUNS, json: _Json = False) -> None:
    """Write report.html of a run: one page, to read offline and to send to others."""
    from hansa.ui.report import write_report

    out = _output(json)
    path = write_report(_found(run, runs))
    out.say(str(path))
    out.envelope(report=path)


app.add_typer(
    ui, epilog=_epilog("Examples", "hansa ui", "hansa ui --runs results", "hansa ui --server local")
)


def _follows() -> bool:
    """Whether torchrun started this process as another than the first worker."""
    return "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("RANK", "0") != "0"


def _refuse(options: Mapping[str, tuple[str, str]]) -> None:
    """Refuse those that were given: nothing would heed them."""
    context = click.get_current_context()
    for option in context.command.params:
        name = str(option.name)
        if name in options and context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            value = context.params[name]
            raise errors.InputError(option.opts[0], None if value is True else value, *options[name])


def _debug() -> bool:
    return bool(click.get_current_context().find_root().obj)


def _found(name: str, folder: Path) -> Path:
    from hansa.cli.find import find_run

    return find_run(name, folder)


def _loaded(recipe: str | None, pairs: list[str] | None, seed: int | None) -> Recipe:
    from hansa.core.recipe import load

    overrides = _overrides(pairs)
    if seed is not None:
        overrides["seed"] = str(seed)
    return load(recipe, overrides)


def _overrides(pairs: list[str] | None) -> dict[str, str]:
    overrides = {}
    for pair in pairs or []:
        key, equals, text = pair.partition("=")
        if not equals or not key:
            raise errors.InputError("--config", pair, "it is no KEY=VALUE", "write it as in -c train.lr=0.05")
        overrides[key.strip()] = text.strip()
    return overrides


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code; the arguments are the process's by default."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    given = [each for each in given if each != "--debug"]  # it may stand anywhere
    try:
        code = app(given, prog_name="hansa", standalone_mode=False, obj=debug)
    except click.exceptions.NoArgsIsHelpError as shown:
        return shown.exit_code
    except (BrokenPipeError, SystemExit):  # the reader, head or less, has seen enough: click exits by itself
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is flushed at the end
        return 0
    except (Exception, KeyboardInterrupt) as error:
        if _follows() and isinstance(error, errors.HansaError) and not debug:
            return error.exit_code  # the first worker tells of it
        return _output("--json" in given).failed(error, debug=debug)
    return int(code or 0)
