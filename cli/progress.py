"""How a run gets on: a live table on a terminal, one line a round elsewhere."""

from __future__ import annotations

import os
import time
from collections import deque
from types import TracebackType
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from hansa.core.store import HEADLINE, Round, RunStore
from hansa.simulation.runs import Run
from hansa.ui import duration, number, score, size

_ROWS = 12
_WIDE, _LESS = 104, ("best", "elapsed")  # what a narrower screen does without
_STDERR = 2


class Progress:
    """Told of every round of a run; tells people.

    Parameters
    ----------
    console: where to; ``None`` tells nobody.
    """

    def __init__(self, run: Run, console: Console | None) -> None:
        recipe, federation = run.federation.recipe, run.federation
        self._console = console
        self._headline = HEADLINE if federation.task.classes else "loss"
        self._phases = federation.algorithm.phases
        self._synchronous = federation.schedule.synchronous
        self._rounds, self._time = recipe.stop.rounds, recipe.stop.time
        self._title = f"{recipe.algorithm['name'].rpartition(':')[2]} on {federation.clients} clients"
        self._begun, self._first = time.monotonic(), run.begins_after
        self._fraction = self._first_fraction = 0.0
        self._best: float | None = None
        self._sent = 0
        self._rows: deque[dict[str, str]] = deque(maxlen=_ROWS)
        self._stopping = False
        self._live: Live | None = None
        if run.begins_after:
            self._recall(run)

    def _recall(self, run: Run) -> None:
        """What was best, and how much was sent, before the run was interrupted."""
        with RunStore.open(run.directory) as store:
            _, values = store.series(self._headline)
            summary = store.summary()
        for value in values.tolist():
            self._remember(value)
        self._sent = summary.bytes_up + summary.bytes_down
        self._fraction = self._first_fraction = self._done(run.begins_after, summary.time)

    def __enter__(self) -> Self:
        if self._console is not None and self._console.is_terminal:
            self._live = Live(get_renderable=self._table, console=self._console, refresh_per_second=4)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def stopping(self) -> None:
        """A stop was asked for. Called from a signal handler, which may have cut in anywhere."""
        self._stopping = True
        if self._live is None and self._console is not None:
            os.write(_STDERR, f"{_STOPPING}\n".encode())

    def __call__(self, done: Round) -> None:
        """Tell of a round."""
        value = done.metrics.get(self._headline)
        if value is not None:
            self._remember(value)
        self._sent += done.bytes_up + done.bytes_down
        self._fraction = self._done(done.index, done.time)
        cells = self._cells(done, value)
        self._rows.append(cells)
        if self._console is not None and self._live is None:
            line = "  ".join(f"{name} {text}" for name, text in cells.items())
            self._console.print(line, soft_wrap=True, markup=False)

    def _cells(self, done: Round, value: float | None) -> dict[str, str]:
        asked = sum(job.phase == self._phases[0] for job in done.participants)
        folded = [job for job in done.participants if job.outcome == "folded"]
        folded = [job for job in folded if job.phase == self._phases[-1]]
        cells = {
            "round": f"{done.index}/{self._rounds}",
            self._headline: score(value, self._headline),
            "best": score(self._best, self._headline),
            "train loss": number(done.metrics.get("train/loss")),
            "clients": f"{len(folded)}/{asked}",
        }
        if not self._synchronous:
            mean = sum(job.staleness for job in folded) / len(folded) if folded else None
            cells["staleness"] = number(mean)
        return {
            **cells,
            "sent": size(self._sent),
            "virtual time": duration(done.time),
            "elapsed": duration(done.wall),
        }

    def _remember(self, value: float) -> None:
        better = max if self._headline == HEADLINE else min
        if value == value:
            self._best = value if self._best is None else better(self._best, value)

    def _done(self, rounds: int, seconds: float) -> float:
        """Which share of the run is behind us; a target may end it sooner."""
        return min(max(rounds / self._rounds, seconds / self._time if self._time else 0.0), 1.0)

    def _table(self) -> RenderableType:
        width, height = self._console.size if self._console is not None else (0, 0)
        table = Table(box=None, header_style="dim", pad_edge=False)
        shown = list(self._rows)[-max(1, min(_ROWS, height - 5)) :]
        headers = [name for name in shown[-1] if width >= _WIDE or name not in _LESS] if shown else []
        for name in headers:
            table.add_column(name, justify="right", no_wrap=True)
        for cells in shown:
            table.add_row(*(cells[name] for name in headers))
        foot = Table.grid(padding=(0, 2))
        bar = ProgressBar(total=1.0, completed=self._fraction, width=30)
        foot.add_row(Text(self._title, style="bold"), bar, Text(self._outlook()))
        return Group(table, foot)

    def _outlook(self) -> str:
        if self._stopping:
            return _STOPPING
        elapsed = time.monotonic() - self._begun
        made = self._fraction - self._first_fraction
        if made <= 0:
            return f"{duration(elapsed)} elapsed"
        return f"{duration(elapsed)} elapsed, {duration(elapsed * (1 - self._fraction) / made)} to go"


_STOPPING = "stopping after this step; Ctrl-C again ends at once"
