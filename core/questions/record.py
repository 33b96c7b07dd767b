"""A run's database, open to read: nothing is written, not even the files that SQLite keeps beside it."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, Self, TypeVar
from urllib.parse import quote

from pydantic import ConfigDict, ValidationError, validate_call

from hansa.core.errors import InputError, RunError
from hansa.core.store import SCHEMA_VERSION

P = ParamSpec("P")
T = TypeVar("T")
Columns = dict[str, list[Any]]
"""A table: values by name of their column, all of one length."""

_PATIENCE = 5.0  # seconds to wait for a writer


class Record:
    """The database of one run, in one consistent view as of the first query. A context manager.

    Attributes
    ----------
    directory: of the run.
    version: of the schema; tables of later ones are missing.

    Raises
    ------
    RunError
        If ``directory`` is no run directory, its database is damaged or was written by a newer Hansa; so
        does every query that fails.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        path = directory / "run.db"
        if not path.is_file():
            raise RunError(
                f"{directory}: is not a run directory (no run.db in it); give the directory of a run, "
                "see `hansa ls`"
            )
        # Without a writer there is no write-ahead log, and SQLite would make one even to read.
        live = path.with_name("run.db-wal").exists()
        name = f"file:{quote(str(path.absolute()))}?mode=ro{'' if live else '&immutable=1'}"
        with self._explained():
            self._connection = sqlite3.connect(name, uri=True, timeout=_PATIENCE, isolation_level=None)
        try:
            with self._explained():
                self._connection.execute("BEGIN")
                self._tables = {
                    table for (table,) in self._connection.execute("SELECT name FROM sqlite_master")
                }
            self.version = self._version()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the connection back."""
        self._connection.close()

    def has(self, table: str) -> bool:
        """Whether the schema that the run was written with has such a table."""
        return table in self._tables

    def rows(self, sql: str, **values: Any) -> list[tuple[Any, ...]]:
        """The rows of a query; ``:name`` in it stands for ``values["name"]``."""
        with self._explained():
            return self._connection.execute(sql, values).fetchall()

    def row(self, sql: str, **values: Any) -> tuple[Any, ...]:
        """The first row of a query that has one."""
        with self._explained():
            found: tuple[Any, ...] | None = self._connection.execute(sql, values).fetchone()
        if found is None:
            raise self._damaged("a row is missing")
        return found

    def columns(self, sql: str, **values: Any) -> Columns:
        """The rows of a query as columns, named as the query names them."""
        with self._explained():
            cursor = self._connection.execute(sql, values)
            rows = cursor.fetchall()
        names = [each[0] for each in cursor.description]
        return {name: [row[i] for row in rows] for i, name in enumerate(names)}

    def _version(self) -> int:
        if not self.has("schema_version") or not self.has("run"):
            raise self._damaged("it has no run in it")
        version: int = self.row("SELECT version FROM schema_version")[0]
        if version > SCHEMA_VERSION:
            raise RunError(
                f"{self.directory}: was written by a newer Hansa (schema {version}, this one reads up to "
                f"{SCHEMA_VERSION}); update hansa to read it"
            )
        return version

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise self._damaged(str(error)) from error

    def _damaged(self, reason: str) -> RunError:
        return RunError(
            f"{self.directory}: the run's database cannot be read ({reason}); restore run.db from a copy or "
            "delete the directory and run the recipe again"
        )


_QUESTIONS: dict[str, Callable[..., Any]] = {}


def question(asked: Callable[Concatenate[Record, P], T]) -> Callable[Concatenate[Record, P], T]:
    """Make a function a question: arguments are checked against its annotations, for some come by wire."""
    checked = validate_call(config=ConfigDict(arbitrary_types_allowed=True))(asked)
    _QUESTIONS[asked.__name__] = checked
    return checked


def asked(name: str) -> Callable[..., Any]:
    """The question of that name.

    Raises
    ------
    InputError
        When there is none.
    """
    if name not in _QUESTIONS:
        from hansa.core.recipe import did_you_mean  # and with it torch, which nobody needs to look

        raise InputError("question", name, "there is no such thing", did_you_mean(name, _QUESTIONS))
    return _QUESTIONS[name]


def answer(directory: Path, name: str, arguments: str | Mapping[str, Any]) -> Any:
    """What the run in ``directory`` answers; ``arguments`` are a JSON object, or its text.

    Raises
    ------
    InputError
        For an unknown question, or arguments that are none of its.
    RunError
        When the run cannot be read.
    """
    put = asked(name)
    try:
        given = json.loads(arguments) if isinstance(arguments, str) else dict(arguments)
        with Record(directory) as record:
            return put(record, **given)
    except (ValidationError, TypeError, ValueError) as error:
        raise InputError(
            "arguments", name, f"{error}".splitlines()[0], "give those of the question"
        ) from error
