"""The event log: what a coordinator accepted, in order. Everything else is a fold over it.

One table of runs, one of events, one row of leadership. Events of many runs are committed together (group
commit): whoever appends waits until its own rows are durable. A coordinator takes a new epoch when it starts
and writes only while that is the newest, so a second one, started by mistake, fences off the first, never
mixes with it. SQLite in WAL mode, or any database that SQLAlchemy reaches.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import structlog
from sqlalchemy import (
    Column,
    Connection,
    Double,
    Engine,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
    UniqueConstraint,
    create_engine,
    event,
    insert,
    select,
    update,
)
from sqlalchemy.exc import IntegrityError, SQLAlchemyError

from hansa.core.errors import RunError

SCHEMA_VERSION = 1
_PATIENCE = 0.2  # seconds before a commit that failed is tried again, doubled up to …
_LONGEST = 5.0

_log = structlog.get_logger(__name__)
_metadata = MetaData()

_leadership = Table(
    "leadership",
    _metadata,
    Column("schema_version", Integer, nullable=False),
    Column("epoch", Integer, nullable=False),
)

_runs = Table(
    "runs",
    _metadata,
    Column("id", Text, primary_key=True),
    Column("key", Text, unique=True),  # of the submission
    Column("owner", Text, nullable=False),
    Column("recipe", Text, nullable=False),
    Column("secret", LargeBinary, nullable=False),  # of the run's leases
    Column("wait_for", Integer, nullable=False),
    Column("status", Text, nullable=False),
    Column("reason", Text, nullable=False),
)

_events = Table(
    "events",
    _metadata,
    Column("run", Text, primary_key=True),
    Column("seq", Integer, primary_key=True, autoincrement=False),
    Column("at", Double, nullable=False),  # seconds on the run's clock
    Column("kind", Text, nullable=False),
    Column("client", Integer),
    Column("number", Integer),  # of the client's job; only updates have one
    Column("body", Text, nullable=False),  # JSON
    UniqueConstraint("run", "client", "number"),  # a job's update is accepted once
)

_snapshots = Table(
    "snapshots",
    _metadata,
    Column("run", Text, primary_key=True),
    Column("seq", Integer, primary_key=True, autoincrement=False),  # of the last event in it
    Column("digest", Text, nullable=False),
    Column("facts", Text, nullable=False),  # JSON
)


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happened to a run, at ``at`` seconds on its clock."""

    seq: int
    at: float
    kind: str
    client: int | None = None
    number: int | None = None
    body: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class RunRow:
    """A run as it was submitted, and how it stands."""

    id: str
    key: str | None
    owner: str
    recipe: str
    secret: bytes
    wait_for: int
    status: str
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """What a run was after event ``seq``: tensors in the artefact ``digest``, the rest as plain facts."""

    seq: int
    digest: str
    facts: Mapping[str, Any]


class Fenced(RunError):
    """Another coordinator has taken over this event log."""


class EventLog:
    """The log, open for writing.

    Parameters
    ----------
    url: SQLAlchemy URL.
    before: called in the writing thread before each commit (to make artefacts durable first).
    lead: take a new epoch, to write; otherwise only read.
    fenced: set when another coordinator has taken over.

    Attributes
    ----------
    epoch: of this coordinator.

    Raises
    ------
    RunError
        When the database cannot be opened or is of a newer Hansa.
    """

    def __init__(
        self,
        url: str,
        before: Callable[[], None] = lambda: None,
        *,
        lead: bool = True,
        fenced: asyncio.Event | None = None,
    ) -> None:
        self._engine = _engine(url)
        self._before = before
        self._waiting: list[tuple[str, Sequence[Event], asyncio.Future[None]]] = []
        self._wanted = asyncio.Event()
        self._writer: asyncio.Task[None] | None = None
        self._fenced = fenced or asyncio.Event()
        try:
            with self._engine.begin() as connection:
                _metadata.create_all(connection)
                row = connection.execute(select(_leadership)).first()
                if row is None:
                    connection.execute(insert(_leadership), {"schema_version": SCHEMA_VERSION, "epoch": 1})
                elif row.schema_version > SCHEMA_VERSION:
                    raise RunError(
                        f"{url}: was written by a newer Hansa (schema {row.schema_version}); update hansa"
                    )
                elif lead:
                    connection.execute(update(_leadership).values(epoch=_leadership.c.epoch + 1))
                self.epoch: int = connection.scalars(select(_leadership.c.epoch)).one()
        except SQLAlchemyError as error:
            raise RunError(f"{url}: the event log cannot be opened ({error})") from error

    @property
    def waiting(self) -> int:
        """Events that wait to become durable."""
        return sum(len(events) for _, events, _ in self._waiting)

    async def append(self, run: str, events: Sequence[Event]) -> None:
        """Add events to a run's; returns when they are durable. Waits as long as the database is away.

        Raises
        ------
        Fenced
            When another coordinator has taken over.
        """
        done = asyncio.get_running_loop().create_future()
        self._waiting.append((run, events, done))
        self._wanted.set()
        if self._writer is None:
            self._writer = asyncio.create_task(self._write())
        await done

    async def _write(self) -> None:
        while True:
            await self._wanted.wait()
            self._wanted.clear()
            batch, self._waiting = self._waiting, []
            rows = [_row(run, each) for run, events, _ in batch for each in events]
            error = await self._commit(rows)
            for _, _, done in batch:
                if done.done():
                    continue
                if error is None:
                    done.set_result(None)
                else:
                    done.set_exception(error)

    async def _commit(self, rows: list[dict[str, Any]]) -> Fenced | None:
        pause = _PATIENCE
        while True:
            try:
                await asyncio.to_thread(self._insert, rows)
            except Fenced as error:
                self._fenced.set()
                return error
            except (SQLAlchemyError, OSError) as error:
                _log.error("the event log cannot be written; trying again", error=str(error), seconds=pause)
                await asyncio.sleep(pause)
                pause = min(2 * pause, _LONGEST)
            else:
                return None

    def _insert(self, rows: list[dict[str, Any]]) -> None:
        self._before()
        try:
            with self._leading() as connection:
                connection.execute(insert(_events), rows)
        except IntegrityError as error:
            # A commit may succeed and its answer be lost with the connection; then the rows are there.
            with self._engine.connect() as connection:
                for row in rows:
                    where = (_events.c.run == row["run"], _events.c.seq == row["seq"])
                    there = connection.execute(select(_events).where(*where)).mappings().first()
                    if there is None or dict(there) != row:
                        raise Fenced("the event log has rows of another coordinator") from error

    def _leading(self) -> _Leading:
        return _Leading(self._engine, self.epoch)

    async def close(self) -> None:
        """End writing, and the database's connections."""
        if self._writer is not None:
            self._writer.cancel()
        self._engine.dispose()

    # Runs.

    def submit(self, row: RunRow) -> None:
        """Add a run."""
        with self._leading() as connection:
            connection.execute(insert(_runs), vars(row))

    def mark(self, run: str, status: str, reason: str) -> None:
        """Record how a run stands."""
        with self._leading() as connection:
            connection.execute(update(_runs).where(_runs.c.id == run).values(status=status, reason=reason))

    def runs(self) -> list[RunRow]:
        """All runs, in the order of their names, which is that of their submission."""
        with self._engine.connect() as connection:
            rows = connection.execute(select(_runs).order_by(_runs.c.id)).mappings()
            return [RunRow(**row) for row in rows]

    def events(self, run: str, after: int = 0) -> list[Event]:
        """A run's events with a number above ``after``.

        Raises
        ------
        RunError
            When one is missing.
        """
        wanted = select(_events).where(_events.c.run == run, _events.c.seq > after).order_by(_events.c.seq)
        with self._engine.connect() as connection:
            rows = connection.execute(wanted).mappings().all()
        found = [
            Event(**{**{k: v for k, v in row.items() if k != "run"}, "body": json.loads(row["body"])})
            for row in rows
        ]
        for seq, each in enumerate(found, after + 1):
            if each.seq != seq:
                raise RunError(f"{run}: event {seq} is missing from the log; restore it from a backup")
        return found

    def save(self, run: str, snapshot: Snapshot) -> None:
        """Keep a snapshot in place of older ones."""
        with self._leading() as connection:
            connection.execute(_snapshots.delete().where(_snapshots.c.run == run))
            connection.execute(
                insert(_snapshots),
                {
                    "run": run,
                    "seq": snapshot.seq,
                    "digest": snapshot.digest,
                    "facts": json.dumps(snapshot.facts),
                },
            )

    def snapshot(self, run: str) -> Snapshot | None:
        """A run's newest snapshot."""
        with self._engine.connect() as connection:
            row = connection.execute(select(_snapshots).where(_snapshots.c.run == run)).first()
        return None if row is None else Snapshot(seq=row.seq, digest=row.digest, facts=json.loads(row.facts))


class _Leading:
    """A transaction of the coordinator that leads; :class:`Fenced` for any other."""

    def __init__(self, engine: Engine, epoch: int) -> None:
        self._transaction = engine.begin()
        self._epoch = epoch

    def __enter__(self) -> Connection:
        connection = self._transaction.__enter__()
        # The update takes the row's lock, so no other coordinator can take over before the commit.
        mine = update(_leadership).where(_leadership.c.epoch == self._epoch).values(epoch=self._epoch)
        if connection.execute(mine).rowcount != 1:
            error = Fenced("another coordinator has taken over the event log; this one ends")
            self._transaction.__exit__(Fenced, error, None)
            raise error
        return connection

    def __exit__(self, *error: Any) -> None:
        self._transaction.__exit__(*error)


def _row(run: str, each: Event) -> dict[str, Any]:
    return {**vars(each), "run": run, "body": json.dumps(each.body, sort_keys=True)}


def _engine(url: str) -> Engine:
    engine = create_engine(url, pool_pre_ping=True)
    if engine.dialect.name == "sqlite":

        @event.listens_for(engine, "connect")
        def _tune(connection: Any, _: object) -> None:
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=FULL")  # durable when the commit returns
            connection.execute("PRAGMA busy_timeout=10000")

    return engine
