"""What a run's database says."""

from __future__ import annotations

import json
import tomllib
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from math import nan
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import ColumnElement, Connection, Engine, case, func, select
from sqlalchemy.exc import SQLAlchemyError

from hansa.core.store import schema as t
from hansa.core.store.faults import damaged, reason
from hansa.core.store.locks import locked
from hansa.core.store.records import (
    HEADLINE,
    ClientScores,
    Event,
    ParticipationGrid,
    RoundRow,
    RunSummary,
    spread,
)


class Reading:
    """The database of one run, to read; nothing here takes the run's lock.

    Every method raises :class:`~hansa.core.errors.RunError` where the database cannot be read.
    """

    def __init__(self, directory: Path, engine: Engine) -> None:
        self.directory = directory
        self._engine = engine
        self._version = t.SCHEMA_VERSION
        self._lock: int | None = None  # of the process that writes

    def close(self) -> None:
        """Give back the database's connections."""
        self._engine.dispose()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def recipe(self) -> str:
        """TOML text of the recipe that is run."""
        with self._reading() as connection:
            recipe: str = connection.scalars(select(t.run.c.recipe)).one()
        return recipe

    @property
    def facts(self) -> dict[str, str]:
        """Versions, engine, device."""
        with self._reading() as connection:
            return dict(connection.execute(select(t.facts.c.name, t.facts.c.value)).all())

    def summary(self) -> RunSummary:
        """The run in one line."""
        accuracy = select(t.metrics.c.value).where(
            t.metrics.c.name == HEADLINE, t.metrics.c.value.is_not(None)
        )
        with self._reading() as connection:
            name, seed, recipe, started, status, error = connection.execute(
                select(
                    t.run.c.name, t.run.c.seed, t.run.c.recipe, t.run.c.started, t.run.c.status, t.run.c.error
                )
            ).one()
            rounds, virtual, wall, bytes_up, bytes_down = connection.execute(
                select(
                    func.count(),
                    func.max(t.rounds.c.time),
                    func.max(t.rounds.c.wall),
                    func.sum(t.rounds.c.bytes_up),
                    func.sum(t.rounds.c.bytes_down),
                ).select_from(t.rounds)
            ).one()
            last = connection.scalar(accuracy.order_by(t.metrics.c.round.desc()).limit(1))
            best = connection.scalar(accuracy.order_by(t.metrics.c.value.desc()).limit(1))
            algorithm = connection.scalar(select(t.facts.c.value).where(t.facts.c.name == "algorithm"))
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
            return sorted(connection.scalars(select(t.metrics.c.name).distinct()))

    def series(self, metric: str) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Rounds that have ``metric``, in order, and its values, both [n]; empty if none has."""
        with self._reading() as connection:
            rows = connection.execute(
                select(t.metrics.c.round, t.metrics.c.value)
                .where(t.metrics.c.name == metric)
                .order_by(t.metrics.c.round)
            ).all()
        return np.array([index for index, _ in rows], np.int64), np.array([v for _, v in rows], np.float64)

    def rounds(self) -> list[RoundRow]:
        """Every round in figures, in order."""
        with self._reading() as connection:
            rows = connection.execute(
                select(
                    t.rounds.c.round,
                    t.rounds.c.time,
                    t.rounds.c.wall,
                    t.rounds.c.bytes_up,
                    t.rounds.c.bytes_down,
                ).order_by(t.rounds.c.round)
            ).all()
            values = connection.execute(
                select(t.metrics.c.round, t.metrics.c.name, t.metrics.c.value).order_by(t.metrics.c.name)
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
        columns: list[ColumnElement[Any]] = [t.participations.c[name] for name in t.PARTICIPATION_COLUMNS]
        wanted = select(*columns).order_by(t.participations.c.round, t.participations.c.position)
        if round is not None:
            wanted = wanted.where(t.participations.c.round == round)
        with self._reading() as connection:
            rows = connection.execute(wanted).all()
        data = zip(*rows, strict=True) if rows else ((),) * len(columns)
        return {
            name: np.array(values, dtype)
            for (name, dtype), values in zip(t.PARTICIPATION_COLUMNS.items(), data, strict=True)
        }

    def participation_grid(self, *, clients: int = 240, rounds: int = 320) -> ParticipationGrid | None:
        """Jobs by client and round in at most ``clients`` × ``rounds`` bins; None if there are none.

        Counted in the database, so that a long run of many clients costs little memory.
        """
        table = t.participations
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
        table = t.participations
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
        table = t.participations
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
        table = t.participations
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
                select(t.participations.c.staleness, func.count())
                .where(t.participations.c.outcome == "folded")
                .group_by(t.participations.c.staleness)
                .order_by(t.participations.c.staleness)
            )
            return dict(counted.all())

    def client_scores(self, round: int | None = None) -> ClientScores | None:
        """The clients' scores of one round, by default of the last that has any; None if none has."""
        table = t.client_scores
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
        table = t.client_scores
        with self._reading() as connection:
            old = self._version < t.ADDED[t.spreads.name]
            rows = select(table.c.round) if old else select(*t.spreads.c)
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
            row = connection.execute(select(t.distribution.c.counts, t.distribution.c.classes)).first()
            return None if row is None else (row[0], tuple(json.loads(row[1])))

    def events(self) -> list[Event]:
        """All events, in the order of their recording."""
        with self._reading() as connection:
            return [
                Event(time=when, kind=kind, text=text, client=client)
                for when, kind, text, client in connection.execute(
                    select(t.events.c.time, t.events.c.kind, t.events.c.text, t.events.c.client).order_by(
                        t.events.c.id
                    )
                )
            ]

    @contextmanager
    def _reading(self) -> Iterator[Connection]:
        try:
            with self._engine.connect() as connection:
                yield connection
        # zlib.error, ValueError and EOFError: an array whose bytes are not what was written.
        except (SQLAlchemyError, zlib.error, ValueError, EOFError) as error:
            raise damaged(self.directory, reason(error)) from error


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
