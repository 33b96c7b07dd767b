"""The tables of a run's database, and how an older database becomes one of today."""

from __future__ import annotations

import io
import os
import zlib
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import (
    URL,
    BigInteger,
    Column,
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
    create_engine,
    event,
    insert,
    make_url,
    select,
    update,
)

from hansa.core.store.records import SPREAD, spread

SCHEMA_VERSION = 3
ADDED = {  # tables that the first schema had not
    "verdicts": 2,
    "edges": 2,
    "spreads": 3,
    "layer_names": 3,
    "movements": 3,
    "tuned": 3,
}


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


metadata = MetaData()

schema = Table("schema_version", metadata, Column("version", Integer, nullable=False))

run = Table(
    "run",
    metadata,
    Column("name", Text, nullable=False),
    Column("seed", Text, nullable=False),  # text, for a seed may be wider than 64 bits
    Column("recipe", Text, nullable=False),
    Column("started", Double, nullable=False),  # seconds since 1970, UTC
    Column("status", Text, nullable=False),
    Column("error", Text),
)

facts = Table(
    "facts",
    metadata,
    Column("name", Text, primary_key=True),
    Column("value", Text, nullable=False),
)

distribution = Table(
    "distribution",
    metadata,
    Column("counts", _Array, nullable=False),
    Column("classes", Text, nullable=False),  # JSON list of names
)

rounds = Table(
    "rounds",
    metadata,
    Column("round", Integer, primary_key=True, autoincrement=False),
    Column("time", Double, nullable=False),
    Column("wall", Double, nullable=False),
    Column("bytes_up", BigInteger, nullable=False),
    Column("bytes_down", BigInteger, nullable=False),
)

metrics = Table(
    "metrics",
    metadata,
    Column("name", Text, primary_key=True),
    Column("round", Integer, primary_key=True, autoincrement=False),
    Column("value", Double),
    sqlite_with_rowid=False,
)

participations = Table(
    "participations",
    metadata,
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

client_scores = Table(
    "client_scores",
    metadata,
    Column("round", Integer, primary_key=True, autoincrement=False),
    Column("client", _Array, nullable=False),
    Column("examples", _Array, nullable=False),
    Column("accuracy", _Array, nullable=False),
    Column("loss", _Array, nullable=False),
)

verdicts = Table(
    "verdicts",
    metadata,
    Column("round", Integer, primary_key=True, autoincrement=False),
    Column("position", Integer, primary_key=True, autoincrement=False),
    Column("client", BigInteger, nullable=False),
    Column("distance", Double),
    Column("relative", Double),
    Column("weight", Double),
    sqlite_with_rowid=False,
)

links = Table(
    "edges",
    metadata,
    Column("a", Integer, primary_key=True, autoincrement=False),  # the smaller of the two
    Column("b", Integer, primary_key=True, autoincrement=False),
    Column("weight", Double, nullable=False),
    sqlite_with_rowid=False,
)

spreads = Table(
    "spreads",
    metadata,
    Column("round", Integer, primary_key=True, autoincrement=False),
    *(Column(name, Double) for name in SPREAD),
)

layer_names = Table(
    "layer_names",
    metadata,
    Column("layer", Integer, primary_key=True, autoincrement=False),  # in the model's order
    Column("name", Text, nullable=False, unique=True),
)

movements = Table(
    "movements",
    metadata,
    Column("round", Integer, primary_key=True, autoincrement=False),
    Column("moved", LargeBinary, nullable=False),  # float32, little-endian, by layer
    Column("size", LargeBinary, nullable=False),
)

tuned = Table(
    "tuned",
    metadata,
    Column("round", Integer, primary_key=True, autoincrement=False),
    Column("position", Integer, primary_key=True, autoincrement=False),  # as in participations
    Column("layer", Integer, primary_key=True, autoincrement=False),
    Column("client", BigInteger, nullable=False),
    sqlite_with_rowid=False,
)
events = Table(
    "events",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("time", Double, nullable=False),
    Column("kind", Text, nullable=False),
    Column("text", Text, nullable=False),
    Column("client", BigInteger),
)

PARTICIPATION_COLUMNS = {
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


def upgrade(connection: Connection, version: int) -> None:
    """Bring a database, which is read as it is, to what is written now."""
    connection.execute(update(schema).values(version=SCHEMA_VERSION))
    metadata.create_all(connection)
    if version < ADDED[spreads.name]:
        for index in connection.scalars(select(client_scores.c.round)).all():
            scores = connection.scalar(select(client_scores.c.accuracy).where(client_scores.c.round == index))
            if scores is not None:
                keep_spread(connection, index, scores)


def keep_spread(connection: Connection, index: int, accuracy: NDArray[np.float64]) -> None:
    """Record :func:`~hansa.core.store.records.spread` of a round."""
    found = spread(accuracy)
    if found is not None:
        values = map(float, found)
        connection.execute(insert(spreads), {"round": index, **dict(zip(SPREAD, values, strict=True))})


def engine(directory: Path, url: str | None) -> Engine:
    """Of the database at ``url``, by default the one in a run's directory."""
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
