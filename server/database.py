"""The coordinator's database: SQLite in WAL mode, or PostgreSQL; one leader; a schema that climbs by itself.

Whoever leads holds a lock for as long as it lives: on PostgreSQL an advisory lock of its session, on SQLite
that of the data folder (:mod:`hansa.server.app`). So a second one, started by mistake, is turned away.
Should a lock be lost (the database restarted, the network cut), the epoch in the log still fences one of the
two off.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event, inspect, make_url, text
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError

from hansa.core.errors import InputError, RunError

REVISION = "3"
"""The newest revision in :mod:`hansa.server.migrations`."""

_KEY = 0x48414E5341  # of the advisory lock: "HANSA"
_TRY, _ALIVE = text("SELECT pg_try_advisory_lock(:key)"), text("SELECT 1")
_HANDOVER = 5.0  # seconds that the session of a coordinator which was killed may take to end
_POSTGRESQL: dict[str, Any] = {  # a server that is gone is missed within seconds, by both sides
    "connect_timeout": 5,
    "keepalives_idle": 5,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 15_000,
}
_SESSION = (
    "SET synchronous_commit = on; SET tcp_keepalives_idle = 5; SET tcp_keepalives_interval = 5; "
    "SET tcp_keepalives_count = 3"
)


def connect(url: str) -> Engine:
    """An engine for ``sqlite:///path`` or ``postgresql://user@host/name``; nothing is opened yet.

    Raises
    ------
    InputError
        For any other URL, or where the driver is not installed.
    """
    try:
        where = make_url(url)
    except ArgumentError:  # the text is not shown: it may hold a password
        raise _unusable(None, "it is no URL", 'write "postgresql://hansa@db.example.org/hansa"') from None
    if where.get_backend_name() not in ("sqlite", "postgresql"):
        raise _unusable(where, "this kind of database is not known", "use postgresql:// or sqlite:///")
    if where.drivername == "postgresql":
        where = where.set(drivername="postgresql+psycopg")
    try:
        if where.get_backend_name() == "sqlite":
            return _sqlite(where)
        engine = create_engine(where, pool_pre_ping=True, connect_args=_POSTGRESQL)
    except (ModuleNotFoundError, NoSuchModuleError) as error:
        raise _unusable(where, f"its driver is missing ({error})", "pip install 'hansa[postgres]'") from error

    @event.listens_for(engine, "connect")
    def tune(connection: Any, _: object) -> None:
        connection.execute(_SESSION)
        connection.commit()

    return engine


def _sqlite(where: URL) -> Engine:
    engine = create_engine(where)

    @event.listens_for(engine, "connect")
    def tune(connection: Any, _: object) -> None:
        connection.isolation_level = None  # the driver begins no transactions: it would leave DDL out of them
        connection.execute("PRAGMA busy_timeout=10000")
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")  # durable when the commit returns

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN")

    return engine


def _unusable(where: URL | None, problem: str, remedy: str) -> InputError:
    return InputError("coordinator.database", where and shown(where), problem, remedy)


def shown(where: URL) -> str:
    """A URL without its password."""
    return where.render_as_string(hide_password=True)


class Claim:
    """The leader's lock on a PostgreSQL database; on SQLite nothing. Held until :meth:`release`.

    Attributes
    ----------
    doubted: something went wrong since it was taken.

    Raises
    ------
    RunError
        When another session holds it.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._session: Connection | None = None
        self._lock = threading.Lock()
        self.doubted = False
        if engine.dialect.name == "postgresql" and not self._taken(_HANDOVER):
            self.release()
            raise RunError(f"{shown(engine.url)}: another coordinator leads here; stop it first")

    def renew(self) -> bool:
        """Take it again if its session was lost; returns whether it is held.

        Raises
        ------
        SQLAlchemyError
            When the database is away.
        """
        with self._lock:
            if self._session is not None and not self._alive(self._session):
                self._session.close()
                if not self._taken(_HANDOVER):
                    return False
            self.doubted = False
            return True

    @staticmethod
    def _alive(session: Connection) -> bool:
        try:
            session.execute(_ALIVE)
        except SQLAlchemyError:
            return False
        return True

    def _taken(self, patience: float) -> bool:
        session = self._session = self._engine.connect().execution_options(isolation_level="AUTOCOMMIT")
        session.detach()  # closing it ends the session, and so gives the lock back
        until = time.monotonic() + patience
        while not session.scalar(_TRY, {"key": _KEY}):
            if time.monotonic() > until:
                return False
            time.sleep(0.05)
        return True

    def release(self) -> None:
        """Give it back."""
        if self._session is not None:
            self._session.close()


def upgrade(engine: Engine) -> None:
    """Make the schema the newest, in one transaction; an empty database gets all of it.

    Raises
    ------
    RunError
        When it is of a newer Hansa.
    """
    with engine.begin() as connection:
        found = _revision(connection)
        if found == REVISION:
            return
        # Imported here: a coordinator that restarts has nothing to climb, and is to be back soon.
        from alembic.config import Config
        from alembic.runtime.environment import EnvironmentContext
        from alembic.script import ScriptDirectory

        here = str(Path(__file__).with_name("migrations"))
        script = ScriptDirectory(here, version_locations=[here])
        if found is not None and found not in {each.revision for each in script.walk_revisions()}:
            raise RunError(
                f"{shown(engine.url)}: was written by a newer Hansa (schema {found}, this one knows up to "
                f"{REVISION}); update hansa"
            )
        with EnvironmentContext(
            Config(), script, fn=lambda revision, _: script._upgrade_revs("head", revision)
        ) as environment:
            environment.configure(connection=connection, transactional_ddl=True)
            if found is None and inspect(connection).has_table("leadership"):
                # The first release kept no revision.
                environment.get_context().stamp(script, "1")
            environment.run_migrations()


def require_current(engine: Engine) -> None:
    """Refuse a database that this Hansa cannot read as it is.

    Raises
    ------
    RunError
    """
    with engine.connect() as connection:
        found = _revision(connection)
    if found != REVISION:
        where, of = shown(engine.url), "no" if found is None else f"schema {found} of"
        raise RunError(
            f"{where}: holds {of} event log, and this Hansa reads schema {REVISION}; a coordinator that is "
            "started on it makes or upgrades it, and a newer one is read by a newer Hansa"
        )


def _revision(connection: Connection) -> str | None:
    if not inspect(connection).has_table("alembic_version"):
        return None
    found: str | None = connection.scalar(text("SELECT version_num FROM alembic_version"))
    return found
