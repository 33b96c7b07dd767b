"""The event log: what a coordinator accepted, in order. Everything else is a fold over it.

One table of runs, one of events, one row of leadership. Events of many runs are committed together (group
commit): whoever appends waits until its own rows are durable. A coordinator takes a new epoch when it starts
and writes only while that is the newest: whatever happens to locks, two never mix. Databases and schemas:
:mod:`hansa.server.database`.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

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
    insert,
    select,
    update,
)
from sqlalchemy.exc import IntegrityError, SQLAlchemyError

from hansa.core.errors import RunError
from hansa.core.trees import Tree
from hansa.server import database
from hansa.server.patience import Over, insist, reason

T = TypeVar("T")
metadata = MetaData()
"""The newest schema; :mod:`hansa.server.migrations` leads to it."""

_leadership = Table("leadership", metadata, Column("epoch", Integer, nullable=False))

_runs = Table(
    "runs",
    metadata,
    Column("id", Text, primary_key=True),
    Column("key", Text, unique=True),  # of the submission
    Column("owner", Text, nullable=False),
    Column("recipe", Text, nullable=False),
    Column("secret", LargeBinary, nullable=False),  # of the run's leases
    Column("wait_for", Integer, nullable=False),
    Column("status", Text, nullable=False),
    Column("reason", Text, nullable=False),
    Column("rounds", Integer, nullable=False, server_default="0"),  # made, as last marked
    Column("clients", Integer, nullable=False, server_default="0"),
)

_events = Table(
    "events",
    metadata,
    Column("run", Text, primary_key=True),
    Column("seq", Integer, primary_key=True, autoincrement=False),
    Column("at", Double, nullable=False),  # seconds on the run's clock
    Column("kind", Text, nullable=False),
    Column("client", Integer),
    Column("number", Integer),  # of the client's job; only updates have one
    Column("body", Text, nullable=False),  # JSON
    UniqueConstraint("run", "client", "number"),  # a job's update is accepted once
)

_blobs = Table(
    "blobs",
    metadata,
    Column("digest", Text, primary_key=True),  # SHA-256
    Column("data", LargeBinary, nullable=False),
)

_snapshots = Table(
    "snapshots",
    metadata,
    Column("run", Text, primary_key=True),
    Column("seq", Integer, primary_key=True, autoincrement=False),  # of the last event in it
    Column("digest", Text, nullable=False),
    Column("facts", Text, nullable=False),  # JSON
)


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happened to a run, at ``at`` seconds on its clock.

    ``data`` are an update's bytes where they are few: kept beside the event (:meth:`EventLog.blob`), and not
    read with it. ``tree`` are its tensors, while they are still in memory.
    """

    seq: int
    at: float
    kind: str
    client: int | None = None
    number: int | None = None
    body: Mapping[str, Any] = field(default_factory=dict)
    data: bytes | None = None
    tree: Tree | None = field(default=None, repr=False, compare=False)


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
    rounds: int = 0
    clients: int = 0


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """What a run was after event ``seq``: tensors in the artefact ``digest``, the rest as plain facts."""

    seq: int
    digest: str
    facts: Mapping[str, Any]


_Waiting = tuple[str, Sequence[Event], "asyncio.Future[None]"]  # a run, what it has said, when it is durable


class Fenced(Over):
    """Another coordinator has taken over this event log."""


class EventLog:
    """The log, open for writing.

    Parameters
    ----------
    url: SQLAlchemy URL of SQLite or PostgreSQL.
    before: called in the writing thread before each commit (to make artefacts durable first).
    lead: take a new epoch, to write; otherwise only read.
    over: called when this process may write no more, with the reason.

    Attributes
    ----------
    epoch: of this coordinator.

    Raises
    ------
    InputError
        When the URL is no database that Hansa knows.
    RunError
        When the database cannot be opened, is of a newer Hansa, or another coordinator leads.
    """

    def __init__(
        self,
        url: str,
        before: Callable[[], None] = lambda: None,
        *,
        lead: bool = True,
        over: Callable[[Over], None] = lambda _: None,
    ) -> None:
        self._engine = database.connect(url)
        self._before, self._over = before, over
        self._waiting: list[_Waiting] = []
        self._wanted = asyncio.Event()
        self._writer: asyncio.Task[None] | None = None
        self._claim: database.Claim | None = None
        try:
            if lead:
                self._claim = database.Claim(self._engine)
                database.upgrade(self._engine)
            else:
                database.require_current(self._engine)
            with self._engine.begin() as connection:
                if lead:
                    raised = connection.execute(update(_leadership).values(epoch=_leadership.c.epoch + 1))
                    if not raised.rowcount:
                        connection.execute(insert(_leadership), {"epoch": 1})
                self.epoch: int = connection.scalars(select(_leadership.c.epoch)).one()
        except SQLAlchemyError as error:
            self._disconnect()
            where = database.shown(self._engine.url)
            raise RunError(f"{where}: the event log cannot be opened ({reason(error)})") from error
        except BaseException:
            self._disconnect()
            raise

    @property
    def waiting(self) -> int:
        """Events that wait to become durable."""
        return sum(len(events) for _, events, _ in self._waiting)

    async def append(self, run: str, events: Sequence[Event]) -> None:
        """Add events to a run's; returns when they are durable. Waits as long as the database is away.

        Raises
        ------
        Over
            When this process may write no more: another coordinator has taken over, say.
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
            await self._write_waiting()

    async def _write_waiting(self) -> None:
        batch, self._waiting = self._waiting, []
        groups = [batch]
        while groups:
            group = groups.pop(0)
            error: Exception | None = None
            try:
                await self.insist(partial(self._insert, group), "writing to the event log")
            except Exception as raised:
                error = raised
            if len(group) > 1 and error is not None and not isinstance(error, Over):
                groups = [
                    [each] for each in group
                ]  # what one run says, and no database takes, fails it alone
                continue
            for _, _, done in group:
                if done.done():
                    continue
                if error is None:
                    done.set_result(None)
                else:
                    done.set_exception(error)

    async def insist(self, act: Callable[[], T], what: str, *, seconds: float = math.inf) -> T:
        """:func:`hansa.server.patience.insist`, for what ends this process when it may not be done at all."""

        def once() -> T:
            try:
                if self._claim is not None and self._claim.doubted and not self._claim.renew():
                    raise Fenced("another coordinator leads this event log now; this one ends")
                return act()
            except SQLAlchemyError:
                if self._claim is not None:
                    self._claim.doubted = True
                raise

        try:
            return await insist(once, what, seconds=seconds)
        except Over as error:
            self._over(error)
            raise

    def _insert(self, batch: Sequence[_Waiting]) -> None:
        rows = [_row(run, each) for run, events, _ in batch for each in events]
        blobs = {
            str(each.body["digest"]): each.data
            for _, events, _ in batch
            for each in events
            if each.data is not None
        }
        self._before()
        try:
            with self._leading() as connection:
                if blobs:
                    known = select(_blobs.c.digest).where(_blobs.c.digest.in_(blobs))
                    fresh = blobs.keys() - set(connection.scalars(known))
                    if fresh:
                        connection.execute(insert(_blobs), [{"digest": d, "data": blobs[d]} for d in fresh])
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

    async def stop(self) -> None:
        """End writing; what is on its way is not left in the middle."""
        if self._writer is not None:
            self._writer.cancel()
            await asyncio.wait([self._writer])

    def close(self) -> None:
        """End writing, and the database's connections."""
        if self._writer is not None:
            self._writer.cancel()
        self._disconnect()

    def _disconnect(self) -> None:
        if self._claim is not None:
            self._claim.release()
        self._engine.dispose()

    # Runs.

    def submit(self, row: RunRow) -> RunRow:
        """Add a run; returns the one of before when there is one of that key, or of that name."""
        try:
            with self._leading() as connection:
                connection.execute(insert(_runs), vars(row))
        except IntegrityError:
            # It was added, and the word of it was lost with the connection.
            return next(each for each in self.runs() if row.id == each.id or row.key == each.key)
        return row

    def mark(
        self, run: str, status: str, reason: str, rounds: int, last: Mapping[str, Any] | None = None
    ) -> None:
        """Record how a run stands; ``last`` are facts that take the snapshot's place where it has ended."""
        facts = {"status": status, "reason": reason, "rounds": rounds}
        with self._leading() as connection:
            connection.execute(update(_runs).where(_runs.c.id == run).values(facts))
            if last is not None:
                _replace(connection, run, Snapshot(seq=0, digest="", facts=last))

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

    def update_of(self, run: str, client: int, number: int) -> str | None:
        """Digest of the update of a job; ``None`` if none was accepted."""
        job = (_events.c.run == run, _events.c.client == client, _events.c.number == number)
        with self._engine.connect() as connection:
            body = connection.scalar(select(_events.c.body).where(*job))
        return None if body is None else str(json.loads(body)["digest"])

    def blob(self, digest: str) -> bytes | None:
        """An update that was kept beside its event."""
        with self._engine.connect() as connection:
            return connection.scalar(select(_blobs.c.data).where(_blobs.c.digest == digest))

    def save(self, run: str, snapshot: Snapshot) -> None:
        """Keep a snapshot in place of older ones."""
        with self._leading() as connection:
            _replace(connection, run, snapshot)

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


def _replace(connection: Connection, run: str, snapshot: Snapshot) -> None:
    connection.execute(_snapshots.delete().where(_snapshots.c.run == run))
    row = {**vars(snapshot), "run": run, "facts": json.dumps(snapshot.facts)}
    connection.execute(insert(_snapshots), row)


def _row(run: str, each: Event) -> dict[str, Any]:
    facts = {key: value for key, value in vars(each).items() if key not in ("data", "tree")}
    return {**facts, "run": run, "body": json.dumps(each.body, sort_keys=True)}
