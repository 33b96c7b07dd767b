"""What the dashboard looks at: a folder of run directories, or a coordinator. The pages know no other way.

Both answer the questions of :mod:`hansa.core.questions`, and keep what they answered until the run has moved
on. Nothing here knows Streamlit.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, Literal, ParamSpec, Protocol, TypeVar, cast

from hansa.core import questions
from hansa.core.errors import HansaError, RunError
from hansa.core.questions import Record
from hansa.core.store import locked, writer
from hansa.ui.launch import Launcher

if TYPE_CHECKING:
    from hansa.core.control import Coordinator

__all__ = ["Asked", "Folder", "Question", "Run", "Server", "Source", "Status"]

P = ParamSpec("P")
T = TypeVar("T")
Question = Callable[Concatenate[Record, P], T]
Status = Literal["queued", "running", "finished", "interrupted", "failed", "unreadable"]

_KEPT = 1024  # answers that are remembered


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run in one line, as :func:`hansa.core.questions.facts` has it; ``id`` names it at its source.

    ``present`` counts the clients that are there, where a coordinator knows.
    """

    id: str
    status: Status
    error: str | None = None
    name: str = ""
    seed: int | None = None
    algorithm: str = ""
    schedule: str = ""
    topology: str = "star"
    clients: int | None = None
    present: int | None = None
    started: float | None = None
    rounds: int = 0
    total: int | None = None
    limit: float | None = None
    target: float | None = None
    time: float = 0.0
    wall: float = 0.0
    bytes_up: int = 0
    bytes_down: int = 0
    headline: str = "accuracy"
    last: float | None = None
    best: float | None = None
    made: dict[str, str] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """What a table or a picture calls it."""
        return f"{self.name} · {self.algorithm}" if self.name != self.algorithm else self.name

    @property
    def active(self) -> bool:
        """Whether it may still move."""
        return self.status in ("queued", "running")

    @property
    def resumable(self) -> bool:
        """Whether it ended before its end, and can go on."""
        return self.status in ("interrupted", "failed")

    @property
    def fraction(self) -> float:
        """Which share of it is behind us; a target may end it sooner."""
        if self.status == "finished":
            return 1.0
        done = max(
            self.rounds / self.total if self.total else 0.0, self.time / self.limit if self.limit else 0.0
        )
        return min(done, 1.0)

    @property
    def remaining(self) -> float | None:
        """Wall seconds that it will take yet, at the pace so far; None where nobody can tell."""
        if self.status != "running" or not self.fraction or not self.wall:
            return None
        return self.wall * (1 - self.fraction) / self.fraction


class Asked(Protocol):
    """What answers questions about runs."""

    def ask(self, question: Question[P, T], run: str, /, *arguments: P.args, **named: P.kwargs) -> T:
        """Put a question of :mod:`hansa.core.questions` to a run. What it returns is not to be changed."""
        ...


class Source(Asked, Protocol):
    """What is looked at.

    Every method raises :class:`~hansa.core.errors.HansaError` where it cannot be reached or read.
    """

    @property
    def label(self) -> str:
        """What people call it."""
        ...

    def runs(self) -> list[Run]:
        """All runs, the newest first; one that cannot be read says so in its ``error``."""
        ...

    def run(self, id: str) -> Run:
        """One run."""
        ...

    def model(self, run: str) -> bytes:
        """The final model as safetensors, or the newest there is."""
        ...

    def report(self, run: str) -> bytes:
        """The report that was written when the run ended, an HTML page."""
        ...

    def has_report(self, run: str) -> bool:
        """Whether there is one."""
        ...

    def stop(self, run: str) -> None:
        """Interrupt a run."""
        ...

    def resume(self, run: str) -> None:
        """Go on with a run that was interrupted or failed."""
        ...

    def start(self, recipe: str) -> str:
        """Start a run of a recipe (TOML); returns what to call it until it has an id, or its id."""
        ...


class _Kept:
    """The newest answers, each with a mark of what it was made from; shared by all threads."""

    def __init__(self) -> None:
        self._answers: OrderedDict[Any, tuple[Any, Any]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Any, mark: Any, make: Callable[[], T]) -> T:
        with self._lock:
            if key in self._answers and self._answers[key][0] == mark:
                self._answers.move_to_end(key)
                return cast(T, self._answers[key][1])
        made = make()
        with self._lock:
            self._answers[key] = mark, made
            self._answers.move_to_end(key)
            while len(self._answers) > _KEPT:
                self._answers.popitem(last=False)
        return made


class Folder:
    """A folder of run directories on this machine, of which nothing is changed by looking.

    Runs are started, resumed and stopped as processes of their own, by :mod:`hansa.ui.launch`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._kept = _Kept()
        self._launcher = Launcher(path)

    @property
    def label(self) -> str:
        """The folder's path."""
        return str(self.path)

    def runs(self) -> list[Run]:
        """See :class:`Source`."""
        found = [
            self._line(each.name)
            for each in (self.path.iterdir() if self.path.is_dir() else ())
            if (each / "run.db").exists() or (each / "recipe.toml").exists()
        ]
        found.sort(key=lambda run: (run.started or 0.0, run.id), reverse=True)
        return [*self._launched(found), *found]

    def _launched(self, found: Sequence[Run]) -> list[Run]:
        """What was started here and has no directory: it is about to begin, is queued, or could not begin."""
        writing = {writer(self.path / run.id) for run in found if run.status == "running"}
        waiting = [
            Run(id="", name=each.name, status="queued")
            for each in self._launcher.waiting()
            if each.process not in writing
        ]
        failed = [
            Run(id="", name=each.name, status="failed", error=each.error) for each in self._launcher.failed()
        ]
        return [*waiting, *failed]

    def run(self, id: str) -> Run:
        """See :class:`Source`."""
        return Run(id=id, **self.ask(questions.facts, id))

    def _line(self, id: str) -> Run:
        try:
            return self.run(id)
        except HansaError as error:
            return Run(id=id, status="unreadable", error=str(error))

    def directory(self, run: str) -> Path:
        """Where a run is; never outside the folder, whatever its name."""
        if not run or Path(run).name != run:
            raise RunError(f"{run!r}: is no name of a run; choose one from the list")
        return self.path / run

    def ask(self, question: Question[P, T], run: str, /, *arguments: P.args, **named: P.kwargs) -> T:
        """See :class:`Source`."""
        directory = self.directory(run)

        def make() -> T:
            with Record(directory) as record:
                return question(record, *arguments, **named)

        key = (question.__name__, run, json.dumps([arguments, named], sort_keys=True))
        return self._kept.get(key, _mark(directory), make)

    def model(self, run: str) -> bytes:
        """See :class:`Source`."""
        path = self.directory(run) / "model.safetensors"
        try:
            return path.read_bytes()
        except OSError as error:
            raise RunError(f"{run}: there is no model yet; it is written when the run finishes") from error

    def report(self, run: str) -> bytes:
        """See :class:`Source`."""
        path = self.directory(run) / "report.html"
        try:
            return path.read_bytes()
        except OSError as error:
            raise RunError(f"{run}: there is no report yet; `hansa report {run}` writes one") from error

    def has_report(self, run: str) -> bool:
        """See :class:`Source`."""
        return (self.directory(run) / "report.html").exists()

    def stop(self, run: str) -> None:
        """See :class:`Source`."""
        self._launcher.stop(self.directory(run))

    def resume(self, run: str) -> None:
        """See :class:`Source`."""
        self._launcher.resume(self.directory(run))

    def start(self, recipe: str) -> str:
        """See :class:`Source`."""
        return self._launcher.start(recipe)


def _mark(directory: Path) -> tuple[Any, ...]:
    """Changes when the run's database, its log or its lock does."""
    marks: list[Any] = []
    for name in ("run.db", "run.db-wal"):
        try:
            found = os.stat(directory / name)
            marks.append((found.st_ino, found.st_mtime_ns, found.st_size))
        except OSError:
            marks.append(None)
    return (*marks, locked(directory))


class Server:
    """A coordinator, asked over its control API with the caller's own certificate."""

    def __init__(self, coordinator: Coordinator) -> None:
        self._coordinator = coordinator
        self._kept = _Kept()

    @property
    def label(self) -> str:
        """Its address."""
        return self._coordinator.address

    def runs(self) -> list[Run]:
        """See :class:`Source`."""
        return [self._line(status) for status in reversed(self._coordinator.list())]

    def run(self, id: str) -> Run:
        """See :class:`Source`."""
        for status in self._coordinator.list():
            if status.id == id:
                return self._line(status)
        raise RunError(f"{id}: the coordinator has no such run; choose one from the list")

    def _line(self, status: Any) -> Run:
        told: dict[str, Any] = {
            "status": "queued" if status.status == "waiting" else status.status,
            "error": status.reason if status.status not in ("waiting", "running", "finished") else None,
            "clients": status.clients or None,
            "present": status.present if status.clients else None,
        }
        mark = (status.status, status.rounds)
        try:
            known = self._kept.get(("", status.id), mark, lambda: self._asked(questions.facts, status.id, {}))
        except RunError as error:
            return Run(id=status.id, **{**told, "status": "unreadable", "error": str(error)})
        return Run(id=status.id, **{**known, **{name: v for name, v in told.items() if v is not None}})

    def ask(self, question: Question[P, T], run: str, /, *arguments: P.args, **named: P.kwargs) -> T:
        """See :class:`Source`."""
        if arguments:
            raise TypeError(f"{question.__name__}: arguments go by name over a wire")
        key = (question.__name__, run, json.dumps(named, sort_keys=True))
        moment = int(time.monotonic() / _FRESH)  # the coordinator says what is new; it is not asked each time
        return self._kept.get(key, moment, lambda: self._asked(question, run, named))

    def _asked(self, question: Callable[..., T], run: str, named: Any) -> T:
        return cast(T, self._coordinator.ask(question.__name__, run, **named))

    @property
    def coordinator(self) -> Coordinator:
        """Whom to ask about agents, queues and versions."""
        return self._coordinator

    def model(self, run: str) -> bytes:
        """See :class:`Source`."""
        return self._coordinator.model(run)

    def report(self, run: str) -> bytes:
        """See :class:`Source`."""
        raise RunError(f"{run}: a coordinator sends no reports; `hansa report` on its machine writes one")

    def has_report(self, run: str) -> bool:
        """See :class:`Source`."""
        return False

    def stop(self, run: str) -> None:
        """See :class:`Source`."""
        self._coordinator.stop(run)

    def resume(self, run: str) -> None:
        """See :class:`Source`."""
        self._coordinator.resume(run)

    def start(self, recipe: str) -> str:
        """See :class:`Source`."""
        return self._coordinator.submit(recipe).id


_FRESH = 1.0  # seconds that an answer over the wire stands
