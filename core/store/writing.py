"""A run's database, which one process writes and any number read."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import nan
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Connection, Engine, delete, func, insert, inspect, select, update
from sqlalchemy.exc import IntegrityError, SQLAlchemyError

from hansa.core.errors import RunError
from hansa.core.store import schema as t
from hansa.core.store.faults import damaged, unwritable
from hansa.core.store.locks import acquire, release
from hansa.core.store.reading import Reading
from hansa.core.store.records import Participation, Round, nullable
from hansa.core.store.schema import SCHEMA_VERSION


class RunStore(Reading):
    """The database of one run, to write and to read.

    The first call that writes takes the run's lock, which :meth:`close` or the end of the process
    gives back; reading takes none. Use it as a context manager.

    Every method raises :class:`~hansa.core.errors.RunError` where the database cannot be read or
    written, and the writing ones where another process writes the run.
    """

    def __init__(self, directory: Path, engine: Engine) -> None:
        super().__init__(directory, engine)
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
            raise unwritable(directory, error) from error
        store = cls(directory, t.engine(directory, url))
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
                t.metadata.create_all(connection)
                connection.execute(insert(t.schema), {"version": SCHEMA_VERSION})
                connection.execute(
                    insert(t.run),
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
                        insert(t.facts), [{"name": fact, "value": value} for fact, value in facts.items()]
                    )
        except (SQLAlchemyError, OSError) as error:
            store.close()
            raise unwritable(directory, error) from error
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
        store = cls(directory, t.engine(directory, url))
        try:
            with store._reading() as connection:
                present = set(inspect(connection).get_table_names())
                version = connection.scalar(select(t.schema.c.version)) if t.schema.name in present else None
                if version is not None and version > SCHEMA_VERSION:
                    raise RunError(
                        f"{directory}: was written by a newer Hansa (schema {version}, this one reads up to "
                        f"{SCHEMA_VERSION}); update hansa to read it"
                    )
                store._version = version or SCHEMA_VERSION
                expected = {name for name in t.metadata.tables if t.ADDED.get(name, 1) <= store._version}
                missing = sorted(expected - present)
                if missing:
                    raise damaged(directory, f"no table {', '.join(missing)}")
                if version is None or connection.execute(select(t.run.c.seed)).first() is None:
                    raise damaged(directory, "the run's own row is missing")
        except BaseException:
            store.close()
            raise
        return store

    def close(self) -> None:
        """Give back the lock and the database's connections."""
        super().close()
        if self._lock is not None:
            release(self._lock)
            self._lock = None

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
                    insert(t.rounds),
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
                    insert(t.metrics),
                    [
                        {"name": name, "round": index, "value": nullable(value)}
                        for name, value in round.metrics.items()
                    ],
                )
            if round.participants:
                connection.execute(
                    insert(t.participations),
                    [
                        {
                            "round": index,
                            "position": position,
                            "client": int(job.client),
                            "phase": job.phase,
                            "examples": int(job.examples),
                            "steps": int(job.steps),
                            "staleness": int(job.staleness),
                            "weight": nullable(job.weight),
                            "dispatched": float(job.dispatched),
                            "returned": float(job.returned),
                            "loss": nullable(job.loss),
                            "outcome": job.outcome,
                        }
                        for position, job in enumerate(round.participants)
                    ],
                )
            if round.clients is not None:
                connection.execute(
                    insert(t.client_scores),
                    {
                        "round": index,
                        "client": np.asarray(round.clients.client, np.int64),
                        "examples": np.asarray(round.clients.examples, np.int64),
                        "accuracy": np.asarray(round.clients.accuracy, np.float64),
                        "loss": np.asarray(round.clients.loss, np.float64),
                    },
                )
                t.keep_spread(connection, index, round.clients.accuracy)
            if round.movement:
                self._keep_movement(connection, index, round.movement)
            self._keep_tuned(connection, index, round.participants)
            if round.verdicts is not None and len(round.verdicts.client):
                each = round.verdicts
                rows = zip(each.client, each.distance, each.relative, each.weight, strict=True)
                connection.execute(
                    insert(t.verdicts),
                    [
                        {
                            "round": index,
                            "position": position,
                            "client": int(client),
                            "distance": nullable(distance),
                            "relative": nullable(relative),
                            "weight": nullable(weight),
                        }
                        for position, (client, distance, relative, weight) in enumerate(rows)
                    ],
                )

    def _layer_numbers(self, connection: Connection, names: Iterable[str]) -> dict[str, int]:
        """Numbers of the model's tensors; new ones are entered in their order."""
        new = [name for name in dict.fromkeys(names) if name not in self._layers]
        if new:
            rows = connection.execute(select(t.layer_names.c.name, t.layer_names.c.layer))
            self._layers = dict(rows.all())
            new = [name for name in new if name not in self._layers]
        if new:
            added = {name: len(self._layers) + i for i, name in enumerate(new)}
            connection.execute(
                insert(t.layer_names), [{"layer": i, "name": name} for name, i in added.items()]
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
            insert(t.movements), {"round": index, "moved": values[0].tobytes(), "size": values[1].tobytes()}
        )

    def _keep_tuned(self, connection: Connection, index: int, jobs: Sequence[Participation]) -> None:
        chosen = [(i, job, job.layers) for i, job in enumerate(jobs) if job.layers]
        if not chosen:
            return
        numbers = self._layer_numbers(connection, (name for *_, layers in chosen for name in layers))
        connection.execute(
            insert(t.tuned),
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
                insert(t.events), {"time": float(time), "kind": kind, "text": text, "client": client}
            )

    def fact(self, name: str, value: str) -> None:
        """Put another value in the place of a fact."""
        with self._writing() as connection:
            connection.execute(update(t.facts).where(t.facts.c.name == name).values(value=value))

    def partition(self, counts: NDArray[np.integer[Any]], classes: Sequence[str] = ()) -> None:
        """Record who holds how many examples; what was recorded before is replaced.

        ``counts`` is [clients, classes] with the names of the classes, or [clients] without any.
        """
        with self._writing() as connection:
            connection.execute(delete(t.distribution))
            connection.execute(
                insert(t.distribution),
                {"counts": np.asarray(counts, np.int64), "classes": json.dumps(list(classes))},
            )

    def topology(self, mixing: NDArray[np.float64]) -> None:
        """Record who talks to whom, by a symmetric mixing matrix [n, n]; replaces what was recorded."""
        a, b = np.nonzero(np.triu(mixing, 1))
        with self._writing() as connection:
            connection.execute(delete(t.links))
            if len(a):
                rows = zip(a.tolist(), b.tolist(), mixing[a, b].tolist(), strict=True)
                connection.execute(insert(t.links), [{"a": i, "b": j, "weight": w} for i, j, w in rows])

    def truncate(self, index: int) -> None:
        """Forget the rounds after ``index`` and the events after its time; the run counts as running.

        What a resume from the checkpoint of round ``index`` begins with: all that is forgotten will
        happen again. Before the first round, everything is forgotten but the partition.
        """
        with self._writing() as connection:
            # A write goes first: it takes the database's write lock before anything is read.
            connection.execute(update(t.run).values(status="running", error=None))
            kept = connection.scalar(select(func.max(t.rounds.c.time)).where(t.rounds.c.round <= index))
            forgotten = delete(t.events)
            connection.execute(forgotten if kept is None else forgotten.where(t.events.c.time > kept))
            for table in (
                t.rounds,
                t.metrics,
                t.participations,
                t.client_scores,
                t.verdicts,
                t.spreads,
                t.movements,
                t.tuned,
            ):
                connection.execute(delete(table).where(table.c.round > index))

    def finish(self, status: Literal["finished", "interrupted", "failed"], error: str | None = None) -> None:
        """Record how the run ended, and the ``error`` that ended it if one did."""
        with self._writing() as connection:
            connection.execute(update(t.run).values(status=status, error=error))

    @contextmanager
    def _writing(self) -> Iterator[Connection]:
        self._acquire()
        try:
            with self._engine.begin() as connection:
                if self._version < SCHEMA_VERSION:
                    t.upgrade(connection, self._version)
                yield connection
            self._version = SCHEMA_VERSION
        except SQLAlchemyError as error:
            raise unwritable(self.directory, error) from error

    def _acquire(self) -> None:
        if self._lock is None:
            self._lock = acquire(self.directory)
