"""The record of a run: one directory, one database.

::

    <runs>/<run id>/
      ├─ recipe.toml         the recipe as it was run
      ├─ run.db              rounds, metrics, jobs, scores, verdicts, movement, events (this module)
      ├─ run.lock            held by the one process that writes
      ├─ checkpoints/        what the run is resumed from
      ├─ model.safetensors   the model it ended with
      └─ report.html         what :mod:`hansa.ui.report` made of it

One process writes, any number read at the same time (SQLite in WAL mode, or any other database that
SQLAlchemy reaches, one run to a database). Metrics stand in long format, one row to a round and a
name, so that a new metric needs no migration; a value that is NaN is stored as NULL and read as NaN.
Arrays (who holds what, clients' scores) are stored as compressed ``.npy``.
"""

from __future__ import annotations

import csv
import fcntl
import io
import json
import os
import platform
import re
import secrets
import time
import tomllib
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from math import isfinite, isnan, nan
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import (
    URL,
    BigInteger,
    Column,
    ColumnElement,
    Connection,
    Dialect,
    Double,
    Engine,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
    TypeDecorator,
    case,
    create_engine,
    delete,
    event,
    func,
    insert,
    inspect,
    make_url,
    select,
    update,
)
from sqlalchemy.exc import IntegrityError, SQLAlchemyError

from hansa.core.errors import InputError, RunError, StorageError

if TYPE_CHECKING:  # torch is not needed to read
    from hansa.core.algorithm import Report
    from hansa.core.reducer import Judgement

__all__ = [
    "HEADLINE",
    "SPREAD",
    "ClientScores",
    "Event",
    "Outcome",
    "Participation",
    "ParticipationGrid",
    "Round",
    "RoundRow",
    "RunStore",
    "RunSummary",
    "Status",
    "Verdicts",
    "export",
    "locked",
    "new_run_directory",
    "runs",
    "spread",
    "writer",
]

SCHEMA_VERSION = 3
_ADDED = {  # tables that the first schema had not
    "verdicts": 2,
    "edges": 2,
    "spreads": 3,
    "layer_names": 3,
    "movements": 3,
    "tuned": 3,
}
HEADLINE = "accuracy"
"""Name of the metric that a run is judged by, a share between 0 and 1."""

SPREAD = ("worst", "q1", "median", "q3", "best", "deviation", "jain")
"""How clients' accuracies lie in a round: least, quartiles, greatest, standard deviation, Jain's index."""

Outcome = Literal["folded", "discarded", "lost"]
Status = Literal["running", "finished", "interrupted", "failed", "unreadable"]


@dataclass(frozen=True, kw_only=True)
class Participation:
    """One job that came back, or did not.

    Parameters
    ----------
    client, phase:
        Who was asked for what (``"train"``, ``"probe"``, …).
    examples, steps:
        Examples that the client holds for this task, local steps that it made.
    staleness:
        Server steps between the dispatch and the return.
    weight:
        Weight of the update in the aggregate, before normalisation.
    dispatched, returned:
        Seconds on the run's clock (virtual or wall). Between the return and the time of its round, an update
        waited for the others.
    loss:
        The client's mean training loss, where it told one.
    outcome:
        Whether the update was folded into the model, discarded (too late, refused), or lost on the way.
    layers:
        Names of the tensors that the client was asked to change, where it was not all of them.
    """

    client: int
    phase: str
    examples: int
    steps: int
    staleness: int
    weight: float
    dispatched: float
    returned: float
    loss: float | None
    outcome: Outcome
    layers: tuple[str, ...] | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class ClientScores:
    """The model of one round, evaluated on clients' own data; all arrays have shape [n].

    Parameters
    ----------
    client:
        Client numbers.
    examples:
        Examples that each was evaluated on.
    accuracy, loss:
        Share of them that was right, and mean loss; NaN where unknown.
    """

    client: NDArray[np.int64]
    examples: NDArray[np.int64]
    accuracy: NDArray[np.float64]
    loss: NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Verdicts:
    """What a robust rule made of the updates of one round, in their order; all arrays have shape [n].

    Attributes
    ----------
    client:
        Whose update it was.
    distance:
        From the update to what the rule made of all; NaN for one that is not finite.
    relative:
        The same in units of the round's median: 1 is as far as usual.
    weight:
        In the result, in units of a plain mean's: 0 is left out, 1 is a vote like any; NaN where the rule
        decides every number by itself.
    """

    client: NDArray[np.int64]
    distance: NDArray[np.float64]
    relative: NDArray[np.float64]
    weight: NDArray[np.float64]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Verdicts) and all(
            np.array_equal(each, getattr(other, name), equal_nan=True) for name, each in vars(self).items()
        )

    __hash__ = None  # type: ignore[assignment]

    @classmethod
    def of(cls, judged: tuple[Sequence[Report], Judgement] | None) -> Verdicts | None:
        """From what a hub says of its last step."""
        if judged is None:
            return None
        reports, judgement = judged
        distance = judgement.distances.cpu().double().numpy()
        distance = np.where(np.isfinite(distance), distance, nan)
        usual = np.nanmedian(distance) if np.isfinite(distance).any() else nan
        relative = distance / usual if usual > 0 else np.where(np.isnan(distance), nan, 1.0)
        weight = np.full(len(reports), nan)
        if judgement.shares is not None:
            weight = judgement.shares.cpu().double().numpy() * len(reports)
        client = np.array([report.client for report in reports], np.int64)
        return cls(client=client, distance=distance, relative=relative, weight=weight)


@dataclass(frozen=True, kw_only=True)
class RoundRow:
    """One server step (aggregate), in figures.

    Parameters
    ----------
    index:
        Number of the step.
    time, wall:
        Virtual and wall seconds since the start of the run, cumulative over resumes.
    bytes_up, bytes_down:
        Payload of this round from and to the clients.
    metrics:
        Values by name: ``"accuracy"`` (the headline), ``"train/loss"``, ``"clients/worst"``, …
    """

    index: int
    time: float
    wall: float
    bytes_up: int
    bytes_down: int
    metrics: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Round(RoundRow):
    """A :class:`RoundRow` with the jobs that made it and, where they are, clients' scores and verdicts.

    ``movement`` says of tensors of the model how far the step moved them, and how large they were before (L2
    norms).
    """

    participants: Sequence[Participation] = ()
    clients: ClientScores | None = None
    verdicts: Verdicts | None = None
    movement: Mapping[str, tuple[float, float]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something worth telling that is not a round: a client joined, a checkpoint was written."""

    time: float
    kind: str
    text: str
    client: int | None = None


@dataclass(frozen=True, kw_only=True)
class ParticipationGrid:
    """How many jobs came from whom and when, in bins small enough to draw.

    Parameters
    ----------
    counts:
        Jobs [client bins, round bins].
    wasted:
        Those of them that were discarded or lost [client bins, round bins].
    clients, rounds:
        Edges of the bins [bins + 1]: bin i holds the numbers from ``edges[i]`` to ``edges[i + 1] - 1``.
    """

    counts: NDArray[np.int64]
    wasted: NDArray[np.int64]
    clients: NDArray[np.int64]
    rounds: NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """A run in one line.

    ``rounds`` counts the recorded rounds; ``time`` and ``wall`` are seconds, ``bytes_up`` and
    ``bytes_down`` totals. A run whose process went away without a word counts as interrupted. A
    directory that cannot be read has the status ``"unreadable"`` and the reason in ``error``.
    """

    id: str
    directory: Path
    status: Status
    name: str = ""
    algorithm: str = ""
    seed: int | None = None
    started: datetime | None = None
    rounds: int = 0
    accuracy: float | None = None
    best_accuracy: float | None = None
    time: float = 0.0
    wall: float = 0.0
    bytes_up: int = 0
    bytes_down: int = 0
    error: str | None = None


class _Array(TypeDecorator[NDArray[Any]]):
    """A NumPy array as the compressed bytes of a ``.npy`` file."""

    impl = LargeBinary
    cache_ok = True

    def process_bind_param(self, value: NDArray[Any] | None, dialect: Dialect) -> bytes | None:
        if value is None:
            return None
        buffer = io.BytesIO()
        np.save(buffer, value, allow_pickle=False)
        return zlib.compress(buffer.getvalue(), level=1)

    def process_result_value(self, value: bytes | None, dialect: Dialect) -> NDArray[Any] | None:
        if value is None:
            return None
        array: NDArray[Any] = np.load(io.BytesIO(zlib.decompress(value)), allow_pickle=False)
        return array


_metadata = MetaData()

_schema = Table("schema_version", _metadata, Column("version", Integer, nullable=False))

_run = Table(
    "run",
    _metadata,
    Column("name", Text, nullable=False),
    Column("seed", Text, nullable=False),  # text, for a seed may be wider than 64 bits
    Column("recipe", Text, nullable=False),
    Column("started", Double, nullable=False),  # seconds since 1970, UTC
    Column("status", Text, nullable=False),
    Column("error", Text),
)

_facts = Table(
    "facts",
    _metadata,
    Column("name", Text, primary_key=True),
    Column("value", Text, nullable=False),
)

_distribution = Table(
    "distribution",
    _metadata,
    Column("counts", _Array, nullable=False),
    Column("classes", Text, nullable=False),  # JSON list of names
)

_rounds = Table(
    "rounds",
    _metadata,
    Column("round", Integer, primary_key=True, autoincrement=False),
    Column("time", Double, nullable=False),
    Column("wall", Double, nullable=False),
    Column("bytes_up", BigInteger, nullable=False),
    Column("bytes_down", BigInteger, nullable=False),
)

_metrics = Table(
    "metrics",
    _metadata,
    Column("name", Text, primary_key=True),
    Column("round", Integer, primary_key=True, autoincrement=False),
    Column("value", Double),
    sqlite_with_rowid=False,
)

_participations = Table(
    "participations",
    _metadata,
    Column("round", Integer, primary_key=True, autoincrement=False),
    # A client may return twice in one round, so its number is no key.
    Column("position", Integer, primary_key=True, autoincrement=False),
    Column("client", BigInteger, nullable=False),
    Column("phase", Text, nullable=False),
    Column("examples", BigInteger, nullable=False),
    Column("steps", BigInteger, nullable=False),
    Column("staleness", Integer, nullable=False),
    Column("weight", Double),
    Column("dispatched", Double, nullable=False),
    Column("returned", Double, nullable=False),
    Column("loss", Double),
    Column("outcome", Text, nullable=False),
    sqlite_with_rowid=False,
)

_client_scores = Table(
    "client_scores",
    _metadata,
    Column("round", Integer, primary_key=True, autoincrement=False),
    Column("client", _Array, nullable=False),
    Column("examples", _Array, nullable=False),
    Column("accuracy", _Array, nullable=False),
    Column("loss", _Array, nullable=False),
)

_verdicts = Table(
    "verdicts",
    _metadata,
    Column("round", Integer, primary_key=True, autoincrement=False),
    Column("position", Integer, primary_key=True, autoincrement=False),
    Column("client", BigInteger, nullable=False),
    Column("distance", Double),
    Column("relative", Double),
    Column("weight", Double),
    sqlite_with_rowid=False,
)

_links = Table(
    "edges",
    _metadata,
    Column("a", Integer, primary_key=True, autoincrement=False),  # the smaller of the two
    Column("b", Integer, primary_key=True, autoincrement=False),
    Column("weight", Double, nullable=False),
    sqlite_with_rowid=False,
)

_spreads = Table(
    "spreads",
    _metadata,
    Column("round", Integer, primary_key=True, autoincrement=False),
    *(Column(name, Double) for name in SPREAD),
)

_layer_names = Table(
    "layer_names",
    _metadata,
    Column("layer", Integer, primary_key=True, autoincrement=False),  # in the model's order
    Column("name", Text, nullable=False, unique=True),
)

_movements = Table(
    "movements",
    _metadata,
    Column("round", Integer, primary_key=True, autoincrement=False),
    Column("moved", LargeBinary, nullable=False),  # float32, little-endian, by layer
    Column("size", LargeBinary, nullable=False),
)

_tuned = Table(
    "tuned",
    _metadata,
    Column("round", Integer, primary_key=True, autoincrement=False),
    Column("position", Integer, primary_key=True, autoincrement=False),  # as in participations
    Column("layer", Integer, primary_key=True, autoincrement=False),
    Column("client", BigInteger, nullable=False),
    sqlite_with_rowid=False,
)
_events = Table(
    "events",
    _metadata,
    Column("id", Integer, primary_key=True),
    Column("time", Double, nullable=False),
    Column("kind", Text, nullable=False),
    Column("text", Text, nullable=False),
    Column("client", BigInteger),
)

_PARTICIPATION_COLUMNS = {
    "round": np.int64,
    "client": np.int64,
    "phase": np.str_,
    "examples": np.int64,
    "steps": np.int64,
    "staleness": np.int64,
    "weight": np.float64,
    "dispatched": np.float64,
    "returned": np.float64,
    "loss": np.float64,
    "outcome": np.str_,
}


class RunStore:
    """The database of one run, to write and to read.

    The first call that writes takes the run's lock, which :meth:`close` or the end of the process
    gives back; reading takes none. Use it as a context manager.

    Every method raises :class:`~hansa.core.errors.RunError` where the database cannot be read or
    written, and the writing ones where another process writes the run.
    """

    def __init__(self, directory: Path, engine: Engine) -> None:
        self.directory = directory
        self._engine = engine
        self._lock: int | None = None
        self._version = SCHEMA_VERSION
        self._layers: dict[str, int] = {}

    @classmethod
    def create(
        cls,
        directory: Path,
        *,
        name: str,
        seed: int,
        recipe: str,
        facts: Mapping[str, str],
        url: str | None = None,
    ) -> RunStore:
        """Start the record of a run, with the status ``"running"``.

        Parameters
        ----------
        directory:
            Where to; made if absent.
        name, seed:
            What people call the run, and the seed of all its draws.
        recipe:
            TOML text, also written to ``recipe.toml``.
        facts:
            What else made the result: versions, engine, device. ``"algorithm"`` shows in summaries.
        url:
            SQLAlchemy URL of an empty database, by default SQLite at ``<directory>/run.db``.

        Raises
        ------
        RunError
            If the directory holds a run already or cannot be written.
        """
        try:
            (directory / "checkpoints").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _unwritable(directory, error) from error
        store = cls(directory, _engine(directory, url))
        try:
            store._acquire()
            if inspect(store._engine).get_table_names():
                raise RunError(
                    f"{directory}: holds a run already; resume that one or choose another directory"
                )
            (directory / "recipe.toml").write_text(recipe, encoding="utf-8")
            if store._engine.dialect.name == "sqlite":
                with store._engine.connect() as connection:
                    connection.exec_driver_sql("PRAGMA journal_mode=WAL")
            with store._engine.begin() as connection:
                _metadata.create_all(connection)
                connection.execute(insert(_schema), {"version": SCHEMA_VERSION})
                connection.execute(
                    insert(_run),
                    {
                        "name": name,
                        "seed": str(seed),
                        "recipe": recipe,
                        "started": time.time(),
                        "status": "running",
                    },
                )
                if facts:
                    connection.execute(
                        insert(_facts), [{"name": fact, "value": value} for fact, value in facts.items()]
                    )
        except (SQLAlchemyError, OSError) as error:
            store.close()
            raise _unwritable(directory, error) from error
        except BaseException:
            store.close()
            raise
        return store

    @classmethod
    def open(cls, directory: Path, *, url: str | None = None) -> RunStore:
        """Open the record of a run, to read it or to go on with it.

        Raises
        ------
        RunError
            If ``directory`` is not a run directory, or its database is damaged or was written by a
            newer Hansa.
        """
        if url is None and not (directory / "run.db").is_file():
            raise RunError(
                f"{directory}: is not a run directory (no run.db in it); give the directory of a run, "
                "see `hansa ls`"
            )
        store = cls(directory, _engine(directory, url))
        try:
            with store._reading() as connection:
                present = set(inspect(connection).get_table_names())
                version = connection.scalar(select(_schema.c.version)) if _schema.name in present else None
                if version is not None and version > SCHEMA_VERSION:
                    raise RunError(
                        f"{directory}: was written by a newer Hansa (schema {version}, this one reads up to "
                        f"{SCHEMA_VERSION}); update hansa to read it"
                    )
                store._version = version or SCHEMA_VERSION
                expected = {name for name in _metadata.tables if _ADDED.get(name, 1) <= store._version}
                missing = sorted(expected - present)
                if missing:
                    raise _damaged(directory, f"no table {', '.join(missing)}")
                if version is None or connection.execute(select(_run.c.seed)).first() is None:
                    raise _damaged(directory, "the run's own row is missing")
        except BaseException:
            store.close()
            raise
        return store

    def close(self) -> None:
        """Give back the lock and the database's connections."""
        self._engine.dispose()
        if self._lock is not None:
            # Unlocking, not only closing: a forked child may still hold a copy of the descriptor.
            fcntl.flock(self._lock, fcntl.LOCK_UN)
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ------------------------------------------------------------------ writing

    def append(self, round: Round) -> None:
        """Record one round with all that belongs to it, in one transaction.

        Raises
        ------
        RunError
            If a round of that index is recorded already.
        """
        index = int(round.index)
        with self._writing() as connection:
            try:
                connection.execute(
                    insert(_rounds),
                    {
                        "round": index,
                        "time": float(round.time),
                        "wall": float(round.wall),
                        "bytes_up": int(round.bytes_up),
                        "bytes_down": int(round.bytes_down),
                    },
                )
            except IntegrityError as error:
                raise RunError(
                    f"{self.directory}: round {index} is recorded already; resume the run from a checkpoint"
                ) from error
            if round.metrics:
                connection.execute(
                    insert(_metrics),
                    [
                        {"name": name, "round": index, "value": _nullable(value)}
                        for name, value in round.metrics.items()
                    ],
                )
            if round.participants:
                connection.execute(
                    insert(_participations),
                    [
                        {
                            "round": index,
                            "position": position,
                            "client": int(job.client),
                            "phase": job.phase,
                            "examples": int(job.examples),
                            "steps": int(job.steps),
                            "staleness": int(job.staleness),
                            "weight": _nullable(job.weight),
                            "dispatched": float(job.dispatched),
                            "returned": float(job.returned),
                            "loss": _nullable(job.loss),
                            "outcome": job.outcome,
                        }
                        for position, job in enumerate(round.participants)
                    ],
                )
            if round.clients is not None:
                connection.execute(
                    insert(_client_scores),
                    {
                        "round": index,
                        "client": np.asarray(round.clients.client, np.int64),
                        "examples": np.asarray(round.clients.examples, np.int64),
                        "accuracy": np.asarray(round.clients.accuracy, np.float64),
                        "loss": np.asarray(round.clients.loss, np.float64),
                    },
                )
                _keep_spread(connection, index, round.clients.accuracy)
            if round.movement:
                self._keep_movement(connection, index, round.movement)
            self._keep_tuned(connection, index, round.participants)
            if round.verdicts is not None and len(round.verdicts.client):
                each = round.verdicts
                rows = zip(each.client, each.distance, each.relative, each.weight, strict=True)
                connection.execute(
                    insert(_verdicts),
                    [
                        {
                            "round": index,
                            "position": position,
                            "client": int(client),
                            "distance": _nullable(distance),
                            "relative": _nullable(relative),
                            "weight": _nullable(weight),
                        }
                        for position, (client, distance, relative, weight) in enumerate(rows)
                    ],
                )

    def _layer_numbers(self, connection: Connection, names: Iterable[str]) -> dict[str, int]:
        """Numbers of the model's tensors; new ones are entered in their order."""
        new = [name for name in dict.fromkeys(names) if name not in self._layers]
        if new:
            rows = connection.execute(select(_layer_names.c.name, _layer_names.c.layer))
            self._layers = dict(rows.all())
            new = [name for name in new if name not in self._layers]
        if new:
            added = {name: len(self._layers) + i for i, name in enumerate(new)}
            connection.execute(
                insert(_layer_names), [{"layer": i, "name": name} for name, i in added.items()]
            )
            self._layers |= added
        return self._layers

    def _keep_movement(
        self, connection: Connection, index: int, movement: Mapping[str, tuple[float, float]]
    ) -> None:
        numbers = self._layer_numbers(connection, movement)
        values = np.full((2, len(numbers)), nan, "<f4")
        values[:, [numbers[name] for name in movement]] = np.array(list(movement.values())).T
        connection.execute(
            insert(_movements), {"round": index, "moved": values[0].tobytes(), "size": values[1].tobytes()}
        )

    def _keep_tuned(self, connection: Connection, index: int, jobs: Sequence[Participation]) -> None:
        chosen = [(i, job, job.layers) for i, job in enumerate(jobs) if job.layers]
        if not chosen:
            return
        numbers = self._layer_numbers(connection, (name for *_, layers in chosen for name in layers))
        connection.execute(
            insert(_tuned),
            [
                {"round": index, "position": i, "layer": numbers[name], "client": int(job.client)}
                for i, job, layers in chosen
                for name in layers
            ],
        )

    def event(self, time: float, kind: str, text: str, client: int | None = None) -> None:
        """Record that something of ``kind`` happened at ``time`` seconds, to ``client`` if to one."""
        with self._writing() as connection:
            connection.execute(
                insert(_events), {"time": float(time), "kind": kind, "text": text, "client": client}
            )

    def partition(self, counts: NDArray[np.integer[Any]], classes: Sequence[str] = ()) -> None:
        """Record who holds how many examples; what was recorded before is replaced.

        ``counts`` is [clients, classes] with the names of the classes, or [clients] without any.
        """
        with self._writing() as connection:
            connection.execute(delete(_distribution))
            connection.execute(
                insert(_distribution),
                {"counts": np.asarray(counts, np.int64), "classes": json.dumps(list(classes))},
            )

    def topology(self, mixing: NDArray[np.float64]) -> None:
        """Record who talks to whom, by a symmetric mixing matrix [n, n]; replaces what was recorded."""
        a, b = np.nonzero(np.triu(mixing, 1))
        with self._writing() as connection:
            connection.execute(delete(_links))
            if len(a):
                rows = zip(a.tolist(), b.tolist(), mixing[a, b].tolist(), strict=True)
                connection.execute(insert(_links), [{"a": i, "b": j, "weight": w} for i, j, w in rows])

    def truncate(self, index: int) -> None:
        """Forget the rounds after ``index`` and the events after its time; the run counts as running.

        What a resume from the checkpoint of round ``index`` begins with: all that is forgotten will
        happen again. Before the first round, everything is forgotten but the partition.
        """
        with self._writing() as connection:
            # A write goes first: it takes the database's write lock before anything is read.
            connection.execute(update(_run).values(status="running", error=None))
            kept = connection.scalar(select(func.max(_rounds.c.time)).where(_rounds.c.round <= index))
            forgotten = delete(_events)
            connection.execute(forgotten if kept is None else forgotten.where(_events.c.time > kept))
            for table in (
                _rounds,
                _metrics,
                _participations,
                _client_scores,
                _verdicts,
                _spreads,
                _movements,
                _tuned,
            ):
                connection.execute(delete(table).where(table.c.round > index))

    def finish(self, status: Literal["finished", "interrupted", "failed"], error: str | None = None) -> None:
        """Record how the run ended, and the ``error`` that ended it if one did."""
        with self._writing() as connection:
            connection.execute(update(_run).values(status=status, error=error))

    # ------------------------------------------------------------------ reading

    @property
    def recipe(self) -> str:
        """TOML text of the recipe that is run."""
        with self._reading() as connection:
            recipe: str = connection.scalars(select(_run.c.recipe)).one()
        return recipe

    @property
    def facts(self) -> dict[str, str]:
        """Versions, engine, device."""
        with self._reading() as connection:
            return dict(connection.execute(select(_facts.c.name, _facts.c.value)).all())

    def summary(self) -> RunSummary:
        """The run in one line."""
        accuracy = select(_metrics.c.value).where(_metrics.c.name == HEADLINE, _metrics.c.value.is_not(None))
        with self._reading() as connection:
            name, seed, recipe, started, status, error = connection.execute(
                select(_run.c.name, _run.c.seed, _run.c.recipe, _run.c.started, _run.c.status, _run.c.error)
            ).one()
            rounds, virtual, wall, bytes_up, bytes_down = connection.execute(
                select(
                    func.count(),
                    func.max(_rounds.c.time),
                    func.max(_rounds.c.wall),
                    func.sum(_rounds.c.bytes_up),
                    func.sum(_rounds.c.bytes_down),
                ).select_from(_rounds)
            ).one()
            last = connection.scalar(accuracy.order_by(_metrics.c.round.desc()).limit(1))
            best = connection.scalar(accuracy.order_by(_metrics.c.value.desc()).limit(1))
            algorithm = connection.scalar(select(_facts.c.value).where(_facts.c.name == "algorithm"))
        if status == "running" and self._lock is None and not locked(self.directory):
            status, error = "interrupted", "the process that ran it ended without a word"
        return RunSummary(
            id=self.directory.resolve().name,
            directory=self.directory,
            status=status,
            name=name,
            algorithm=algorithm if algorithm is not None else _algorithm(recipe),
            seed=int(seed),
            started=datetime.fromtimestamp(started, UTC),
            rounds=rounds,
            accuracy=last,
            best_accuracy=best,
            time=virtual or 0.0,
            wall=wall or 0.0,
            bytes_up=int(bytes_up or 0),
            bytes_down=int(bytes_down or 0),
            error=error,
        )

    def metrics(self) -> list[str]:
        """Names of the metrics that any round has, sorted."""
        with self._reading() as connection:
            return sorted(connection.scalars(select(_metrics.c.name).distinct()))

    def series(self, metric: str) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Rounds that have ``metric``, in order, and its values, both [n]; empty if none has."""
        with self._reading() as connection:
            rows = connection.execute(
                select(_metrics.c.round, _metrics.c.value)
                .where(_metrics.c.name == metric)
                .order_by(_metrics.c.round)
            ).all()
        return np.array([index for index, _ in rows], np.int64), np.array([v for _, v in rows], np.float64)

    def rounds(self) -> list[RoundRow]:
        """Every round in figures, in order."""
        with self._reading() as connection:
            rows = connection.execute(
                select(
                    _rounds.c.round,
                    _rounds.c.time,
                    _rounds.c.wall,
                    _rounds.c.bytes_up,
                    _rounds.c.bytes_down,
                ).order_by(_rounds.c.round)
            ).all()
            values = connection.execute(
                select(_metrics.c.round, _metrics.c.name, _metrics.c.value).order_by(_metrics.c.name)
            ).all()
        metrics: dict[int, dict[str, float]] = {index: {} for index, *_ in rows}
        for index, name, value in values:
            if index in metrics:  # a round may have been added between the two queries
                metrics[index][name] = nan if value is None else value
        return [
            RoundRow(index=index, time=t, wall=wall, bytes_up=up, bytes_down=down, metrics=metrics[index])
            for index, t, wall, up, down in rows
        ]

    def participation(self, round: int | None = None) -> dict[str, NDArray[Any]]:
        """The jobs of one round, or of all, in order, as columns [n] named like the fields.

        ``round`` is a column too; a loss that is not known is NaN.
        """
        columns: list[ColumnElement[Any]] = [_participations.c[name] for name in _PARTICIPATION_COLUMNS]
        wanted = select(*columns).order_by(_participations.c.round, _participations.c.position)
        if round is not None:
            wanted = wanted.where(_participations.c.round == round)
        with self._reading() as connection:
            rows = connection.execute(wanted).all()
        data = zip(*rows, strict=True) if rows else ((),) * len(columns)
        return {
            name: np.array(values, dtype)
            for (name, dtype), values in zip(_PARTICIPATION_COLUMNS.items(), data, strict=True)
        }

    def participation_grid(self, *, clients: int = 240, rounds: int = 320) -> ParticipationGrid | None:
        """Jobs by client and round in at most ``clients`` × ``rounds`` bins; None if there are none.

        Counted in the database, so that a long run of many clients costs little memory.
        """
        table = _participations
        with self._reading() as connection:
            low_client, high_client, low_round, high_round = connection.execute(
                select(
                    func.min(table.c.client),
                    func.max(table.c.client),
                    func.min(table.c.round),
                    func.max(table.c.round),
                )
            ).one()
            if low_client is None:
                return None
            client_edges = _edges(low_client, high_client, clients)
            round_edges = _edges(low_round, high_round, rounds)
            row = (table.c.client - low_client) // int(client_edges[1] - client_edges[0])
            column = (table.c.round - low_round) // int(round_edges[1] - round_edges[0])
            counted = connection.execute(
                select(row, column, table.c.outcome, func.count())
                # Rounds that were added since the limits were read have no bin.
                .where(table.c.round <= high_round, table.c.client.between(low_client, high_client))
                .group_by(row, column, table.c.outcome)
            ).all()
        counts = np.zeros((len(client_edges) - 1, len(round_edges) - 1), np.int64)
        wasted = np.zeros_like(counts)
        for i, j, outcome, jobs in counted:
            counts[i, j] += jobs
            wasted[i, j] += 0 if outcome == "folded" else jobs
        return ParticipationGrid(counts=counts, wasted=wasted, clients=client_edges, rounds=round_edges)

    def contributions(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Clients [n] who were asked at all, how many of their updates were folded, and their examples."""
        table = _participations
        folded = func.sum(case((table.c.outcome == "folded", 1), else_=0))
        with self._reading() as connection:
            rows = connection.execute(
                select(table.c.client, folded, func.max(table.c.examples))
                .group_by(table.c.client)
                .order_by(table.c.client)
            ).all()
        counted = np.array([tuple(each) for each in rows], np.int64).reshape(-1, 3)
        return counted[:, 0], counted[:, 1], counted[:, 2]

    def updates(self) -> dict[int, int]:
        """How many updates were folded in each round that had any."""
        table = _participations
        with self._reading() as connection:
            counted = connection.execute(
                select(table.c.round, func.count())
                .where(table.c.outcome == "folded")
                .group_by(table.c.round)
                .order_by(table.c.round)
            )
            return dict(counted.all())

    def timeline(self, jobs: int = 240) -> dict[str, NDArray[Any]]:
        """The last ``jobs`` to end, as columns [n]: ``client``, ``dispatched``, ``returned``, ``outcome``."""
        table = _participations
        with self._reading() as connection:
            rows = connection.execute(
                select(table.c.client, table.c.dispatched, table.c.returned, table.c.outcome)
                .order_by(table.c.returned.desc(), table.c.round.desc(), table.c.position.desc())
                .limit(jobs)
            ).all()
        kinds = {"client": np.int64, "dispatched": np.float64, "returned": np.float64, "outcome": np.str_}
        data = zip(*rows, strict=True) if rows else ((),) * len(kinds)
        return {
            name: np.array(values, kind) for (name, kind), values in zip(kinds.items(), data, strict=True)
        }

    def staleness(self) -> dict[int, int]:
        """How many folded updates came back with which staleness."""
        with self._reading() as connection:
            counted = connection.execute(
                select(_participations.c.staleness, func.count())
                .where(_participations.c.outcome == "folded")
                .group_by(_participations.c.staleness)
                .order_by(_participations.c.staleness)
            )
            return dict(counted.all())

    def client_scores(self, round: int | None = None) -> ClientScores | None:
        """The clients' scores of one round, by default of the last that has any; None if none has."""
        table = _client_scores
        wanted = select(table.c.client, table.c.examples, table.c.accuracy, table.c.loss)
        wanted = wanted.order_by(table.c.round.desc()).limit(1)
        if round is not None:
            wanted = wanted.where(table.c.round == round)
        with self._reading() as connection:
            row = connection.execute(wanted).first()
        if row is None:
            return None
        client, examples, accuracy, loss = row
        return ClientScores(client=client, examples=examples, accuracy=accuracy, loss=loss)

    def client_spread(self, limit: int = 200) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Rounds [n] and the worst, quartiles and best [n, 5] of the clients' accuracies in them.

        Every client counts the same. Of more than ``limit`` rounds, that many evenly chosen ones,
        the first and the last among them.
        """
        table = _client_scores
        with self._reading() as connection:
            old = self._version < _ADDED[_spreads.name]
            rows = select(table.c.round) if old else select(*_spreads.c)
            found: list[Any] = list(connection.execute(rows.order_by(rows.selected_columns[0])).all())
            if len(found) > limit:
                found = [found[i] for i in np.linspace(0, len(found) - 1, limit).round().astype(int)]
            if old:
                blobs = (
                    (i, connection.scalar(select(table.c.accuracy).where(table.c.round == i)))
                    for (i,) in found
                )
                spreads = ((i, spread(accuracy)) for i, accuracy in blobs if accuracy is not None)
                found = [(i, *each) for i, each in spreads if each is not None]
        values = np.array([row[1:6] for row in found], np.float64).reshape(-1, 5)
        return np.array([row[0] for row in found], np.int64), values

    def distribution(self) -> tuple[NDArray[np.int64], tuple[str, ...]] | None:
        """What :meth:`partition` recorded: counts and names of the classes; None if nothing."""
        with self._reading() as connection:
            row = connection.execute(select(_distribution.c.counts, _distribution.c.classes)).first()
            return None if row is None else (row[0], tuple(json.loads(row[1])))

    def events(self) -> list[Event]:
        """All events, in the order of their recording."""
        with self._reading() as connection:
            return [
                Event(time=when, kind=kind, text=text, client=client)
                for when, kind, text, client in connection.execute(
                    select(_events.c.time, _events.c.kind, _events.c.text, _events.c.client).order_by(
                        _events.c.id
                    )
                )
            ]

    # ------------------------------------------------------------------ inside

    @contextmanager
    def _reading(self) -> Iterator[Connection]:
        try:
            with self._engine.connect() as connection:
                yield connection
        # zlib.error, ValueError and EOFError: an array whose bytes are not what was written.
        except (SQLAlchemyError, zlib.error, ValueError, EOFError) as error:
            raise _damaged(self.directory, _reason(error)) from error

    @contextmanager
    def _writing(self) -> Iterator[Connection]:
        self._acquire()
        try:
            with self._engine.begin() as connection:
                if self._version < SCHEMA_VERSION:
                    _upgrade(connection, self._version)
                yield connection
            self._version = SCHEMA_VERSION
        except SQLAlchemyError as error:
            raise _unwritable(self.directory, error) from error

    def _acquire(self) -> None:
        if self._lock is not None:
            return
        try:
            descriptor = os.open(self.directory / "run.lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise _unwritable(self.directory, error) from error
        for _ in range(5):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(0.02)  # a reader's look at the lock (see :func:`locked`) is over by then
            else:
                self._lock = descriptor
                os.ftruncate(descriptor, 0)
                os.write(descriptor, f"{os.getpid()} {platform.node()}\n".encode())
                return
        os.close(descriptor)
        raise RunError(f"{self.directory}: another process is writing this run; wait for it or stop it first")


def _upgrade(connection: Connection, version: int) -> None:
    """Bring a database, which is read as it is, to what is written now."""
    connection.execute(update(_schema).values(version=SCHEMA_VERSION))
    _metadata.create_all(connection)
    if version < _ADDED[_spreads.name]:
        for index in connection.scalars(select(_client_scores.c.round)).all():
            scores = connection.scalar(
                select(_client_scores.c.accuracy).where(_client_scores.c.round == index)
            )
            if scores is not None:
                _keep_spread(connection, index, scores)


def _keep_spread(connection: Connection, index: int, accuracy: NDArray[np.float64]) -> None:
    found = spread(accuracy)
    if found is not None:
        values = map(float, found)
        connection.execute(insert(_spreads), {"round": index, **dict(zip(SPREAD, values, strict=True))})


def spread(accuracy: NDArray[np.float64]) -> NDArray[np.float64] | None:
    """:data:`SPREAD` of clients' accuracies [n], every client counting the same; None if none is known.

    Jain's index, ``(Σ a)² / (n Σ a²)``, is 1 where all are alike and 1/n where one has everything
    (R. Jain, D. Chiu, W. Hawe, "A quantitative measure of fairness", 1984, arXiv:cs/9809099).
    """
    known = np.asarray(accuracy, np.float64)
    known = known[~np.isnan(known)]
    if not len(known):
        return None
    squares = float(np.square(known).sum())
    jain = float(known.sum()) ** 2 / (len(known) * squares) if squares else 1.0
    return np.array([*np.quantile(known, (0.0, 0.25, 0.5, 0.75, 1.0)), known.std(), jain])


def _engine(directory: Path, url: str | None) -> Engine:
    if url is not None:
        where = make_url(url)
    elif os.access(directory, os.W_OK):
        where = URL.create("sqlite", database=str(directory / "run.db"))
    else:
        # SQLite wants to write beside a database in WAL mode even to read it, unless it is told that
        # nobody writes, or the writer's files are there.
        query = {"uri": "true", "mode": "ro"}
        if not (directory / "run.db-wal").exists():
            query["immutable"] = "1"
        path = quote(str((directory / "run.db").absolute()))
        where = URL.create("sqlite", database=f"file:{path}", query=query)
    if where.get_backend_name() != "sqlite":
        return create_engine(where)
    engine = create_engine(where, connect_args={"timeout": 30})

    @event.listens_for(engine, "connect")
    def _tune(connection: Any, _: object) -> None:
        # In WAL mode a power failure then costs at most the last rounds, never the database.
        connection.execute("PRAGMA synchronous=NORMAL")

    return engine


def writer(directory: Path) -> int | None:
    """Number of the process that writes the run; None if there is none, or it is of another machine."""
    if not locked(directory):
        return None
    number, _, node = (directory / "run.lock").read_text(encoding="utf-8").strip().partition(" ")
    return int(number) if number.isdigit() and node == platform.node() else None


def locked(directory: Path) -> bool:
    """Whether some process holds the run's lock."""
    try:
        descriptor = os.open(directory / "run.lock", os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _edges(low: int, high: int, limit: int) -> NDArray[np.int64]:
    """Edges of at most ``limit`` equally wide bins over the whole numbers from ``low`` to ``high``."""
    width = -(-(high - low + 1) // limit)
    bins = -(-(high - low + 1) // width)
    return low + width * np.arange(bins + 1, dtype=np.int64)


def _algorithm(recipe: str) -> str:
    """Name of the algorithm in a recipe, as ``algorithm = "…"`` or ``[algorithm] name = "…"``."""
    try:
        named = tomllib.loads(recipe).get("algorithm", "")
    except tomllib.TOMLDecodeError:
        return ""
    return str(named.get("name", "") if isinstance(named, dict) else named)


def _nullable(value: float | None) -> float | None:
    return None if value is None or isnan(value) else float(value)


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    # The driver's words, without the statement and the address of the manual that SQLAlchemy adds.
    return str(getattr(error, "orig", None) or error).splitlines()[0]


def _damaged(directory: Path, reason: str) -> RunError:
    return RunError(
        f"{directory}: the run's database cannot be read ({reason}); restore run.db from a copy or delete "
        "the directory and run the recipe again"
    )


def _unwritable(directory: Path, error: BaseException) -> StorageError:
    return StorageError(
        f"{directory}: the run cannot be recorded ({_reason(error)}); see that the directory is writable and "
        "the disk has room"
    )


def new_run_directory(runs: Path, name: str) -> Path:
    """Make a new directory in ``runs`` (itself made if absent) and return it.

    Its name, the run's id, sorts by time: UTC date and time, ``name`` in lower-case letters, digits
    and hyphens, and a random suffix, as in ``20261121-093000-fedavg-k3f``. No two calls return the
    same, on however many processes.

    Raises
    ------
    RunError
        If ``runs`` cannot be written.
    """
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower())[:40].strip("-") or "run"
    while True:
        suffix = "".join(secrets.choice("abcdefghijkmnpqrstuvwxyz23456789") for _ in range(3))
        directory = runs / f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{slug}-{suffix}"
        try:
            runs.mkdir(parents=True, exist_ok=True)
            directory.mkdir()
        except FileExistsError as error:
            if not runs.is_dir():
                raise _unwritable(runs, error) from error
        except OSError as error:
            raise _unwritable(runs, error) from error
        else:
            return directory


def runs(folder: Path) -> Iterator[RunSummary]:
    """Every run in ``folder``, the newest first; those that cannot be read last, with the reason."""
    found = []
    for directory in sorted(folder.iterdir(), reverse=True) if folder.is_dir() else ():
        try:
            if not ((directory / "run.db").exists() or (directory / "recipe.toml").exists()):
                continue
            with RunStore.open(directory) as store:
                found.append(store.summary())
        except (RunError, OSError) as error:
            found.append(
                RunSummary(id=directory.name, directory=directory, status="unreadable", error=str(error))
            )
    found.sort(key=lambda run: run.started.timestamp() if run.started else 0.0, reverse=True)
    yield from found


def export(store: RunStore, path: Path) -> None:
    """Write the rounds to ``path``, one row each, with every metric as a column.

    The suffix says how: ``.csv``, where a missing value is an empty cell, or ``.json``, a list of
    objects, where it is null (and so is an infinite one, for which JSON has no number).

    Raises
    ------
    InputError
        If the suffix is another, or ``path`` cannot be written.
    """
    suffix = path.suffix.lower()
    if suffix not in (".csv", ".json"):
        raise InputError("export", str(path), "the format is not known", "end the name in .csv or .json")
    names = store.metrics()
    rows: list[dict[str, int | float | None]] = [
        {
            "round": row.index,
            "time": row.time,
            "wall": row.wall,
            "bytes_up": row.bytes_up,
            "bytes_down": row.bytes_down,
            **{name: _nullable(row.metrics.get(name)) for name in names},
        }
        for row in store.rounds()
    ]
    text = io.StringIO()
    if suffix == ".csv":
        header = ["round", "time", "wall", "bytes_up", "bytes_down", *names]
        writer = csv.DictWriter(text, header, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    else:
        finite = [
            {name: value if value is None or isfinite(value) else None for name, value in row.items()}
            for row in rows
        ]
        json.dump(finite, text, indent=1, allow_nan=False)
        text.write("\n")
    try:
        path.write_text(text.getvalue(), encoding="utf-8")
    except OSError as error:
        raise InputError(
            "export", str(path), f"the file cannot be written ({error.strerror})", "choose a writable folder"
        ) from error
