"""Running in the foreground: signals, progress, the summary and the report."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from hansa.cli.output import Output, run_facts
from hansa.cli.progress import Progress
from hansa.core.errors import HansaError, Interrupted
from hansa.core.store import RunStore, RunSummary
from hansa.simulation.runs import Run
from hansa.simulation.simulator import Ending
from hansa.ui import duration, percent, size
from hansa.ui.report import write_report


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to tell of a run: nothing but its directory, its report, where its time went, tracebacks."""

    quiet: bool
    report: bool
    profile: bool
    debug: bool


def execute(run: Run, out: Output, options: Options) -> int:
    """Run to the end and tell how it went; returns the exit code."""
    quiet, debug = options.quiet, options.debug
    if not run.recorded:
        with _signals(run, lambda: None):
            run.go()
        return 0
    if not quiet:
        out.error.print(_opening(run), soft_wrap=True, markup=False)
    ending: Ending | None = None
    error: BaseException | None = None
    try:
        with Progress(run, None if quiet else out.error) as progress, _signals(run, progress.stopping):
            ending = run.go(progress)
    except (KeyboardInterrupt, Exception) as caught:
        error = caught
    stopped = isinstance(error, Interrupted | KeyboardInterrupt)
    try:
        with RunStore.open(run.directory) as store:
            summary = store.summary()
    except HansaError as unreadable:
        return out.failed(error or unreadable, debug=debug)
    page = _reported(run.directory, out) if options.report and summary.rounds and not stopped else None
    if ending is not None:
        out.envelope(
            run=run_facts(summary),
            reason=ending.reason,
            metrics=ending.metrics,
            model=run.model,
            report=page,
            seconds=run.simulator.seconds,
            **({"profile": run.profile} if options.profile else {}),
        )
        if quiet and not out.json:
            out.say(str(run.directory))
        elif not quiet:
            _summarise(run, ending.reason, summary, page, out)
        if options.profile and not out.json:
            out.say(_profiled(run.profile))
        return 0
    assert error is not None
    if stopped:
        after = (
            f"stopped after round {summary.rounds}" if summary.rounds else "stopped before the first round"
        )
        error = Interrupted(f"{after}; `hansa resume {run.directory}` goes on")
    code = out.failed(error, debug=debug, run=run_facts(summary), report=page)
    if not stopped:
        out.error.print(f"  run       {run.directory}", soft_wrap=True, markup=False)
    return code


def _opening(run: Run) -> str:
    recipe, federation = run.federation.recipe, run.federation
    after = f", after round {run.begins_after}" if run.begins_after else ""
    return (
        f"{run.directory.name}: {recipe.algorithm['name']} on {federation.clients} clients, "
        f"{len(federation.data.train)} examples, {run.simulator.engine.partition(':')[0]}{after}"
    )


def _summarise(run: Run, reason: str, summary: RunSummary, page: Path | None, out: Output) -> None:
    lines = {}
    if summary.accuracy is not None:
        lines["accuracy"] = f"{percent(summary.accuracy)}, best {percent(summary.best_accuracy)}"
    lines["time"] = f"{duration(summary.wall)} here, {duration(summary.time)} on the virtual clock"
    lines["sent"] = f"{size(summary.bytes_up)} up, {size(summary.bytes_down)} down"
    lines["run"] = str(run.directory)
    lines["model"] = str(run.model)
    if page is not None:
        lines["report"] = str(page)
    out.say(Text.assemble(("finished", "bold green"), f": {reason}"))
    for name, text in lines.items():
        out.say(f"  {name:<9} {text}")


def _profiled(profile: Mapping[str, float]) -> Table:
    """Where the time went, the largest share first."""
    table = Table(box=None, header_style="dim", pad_edge=False)
    for name in ("where the time went", "seconds", "share"):
        table.add_column(name, justify="left" if name.startswith("where") else "right")
    whole = sum(profile.values())
    for name, seconds in sorted(profile.items(), key=lambda each: -each[1]):
        table.add_row(name, f"{seconds:.2f}", percent(seconds / whole if whole else None))
    return table


def _reported(directory: Path, out: Output) -> Path | None:
    try:
        return write_report(directory)
    except HansaError as error:
        out.error.print(f"no report was written: {error}", soft_wrap=True, markup=False)
        return None


@contextmanager
def _signals(run: Run, tell: Callable[[], None]) -> Iterator[None]:
    """The first Ctrl-C or SIGTERM asks the run to stop at the next step, the second ends it at once."""
    asked = False

    def handle(number: int, frame: Any) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        run.stop()
        tell()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
