"""What the event log promises on every database: durable, in order, once, by one coordinator; its schema."""

from __future__ import annotations

import asyncio
import itertools
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from floor import play
from sqlalchemy.exc import OperationalError

from hansa.core.errors import InputError, RunError, StorageError
from hansa.server import database as databases
from hansa.server import events as module
from hansa.server.database import REVISION, connect, upgrade
from hansa.server.events import Event, EventLog, Fenced, RunRow, Snapshot
from hansa.server.patience import Over

UPDATE = Event(seq=1, at=0.1 + 0.2, kind="update", client=3, number=7, body={"digest": "d", "loss": None})


def opened(url: str) -> closing[EventLog]:
    return closing(EventLog(url))


def row(id: str, **facts: Any) -> RunRow:
    return RunRow(
        **{
            "id": id,
            "key": None,
            "owner": "ada",
            "recipe": "é",
            "secret": b"\0\xff",
            "wait_for": 0,
            "status": "waiting",
            **facts,
        }
    )


def rival(url: str) -> EventLog:
    """A second coordinator that got past every lock."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(databases, "_TRY", sa.text("SELECT true OR :key = 0"))
        return EventLog(url)


def test_what_is_appended_is_read_back(database: str) -> None:
    later = Event(
        seq=2, at=1e9, kind="failed", client=2**31 - 1, body={"reason": 'nul \0, é, "', "again": True}
    )

    async def scene() -> None:
        log = EventLog(database)
        await asyncio.gather(
            log.append("a", [UPDATE, later]), log.append("b", [Event(seq=1, at=0.0, kind="stopped")])
        )
        log.close()

    play(scene())
    with closing(EventLog(database, lead=False)) as log:
        assert log.events("a") == [UPDATE, later]
        assert log.events("a", after=1) == [later]
        assert log.events("b") == [Event(seq=1, at=0.0, kind="stopped")]
        assert log.update_of("a", 3, 7) == "d"
        assert log.update_of("a", 3, 8) is None


def test_runs_marks_and_snapshots(database: str) -> None:
    with opened(database) as log:
        first, second = row("1", key="ada/k"), row("2", clients=6)
        assert log.submit(first) == first
        assert log.submit(second) == second
        assert log.submit(row("3", key="ada/k")) == first  # a key submits once
        log.save("2", Snapshot(seq=4, digest="x", facts={"late": [[1, 2]]}))
        log.save("2", Snapshot(seq=5, digest="y", facts={"now": 0.1}))
        assert log.snapshot("2") == Snapshot(seq=5, digest="y", facts={"now": 0.1})
        assert log.snapshot("1") is None
        log.mark("2", "failed", "no \u2028 reason", 9, {"seats": [[0, "a"]]})
        assert [each.status for each in log.runs()] == ["waiting", "failed"]
    with opened(database) as log:
        assert log.runs()[1] == row("2", clients=6, status="failed", reason="no \u2028 reason", rounds=9)
        last = log.snapshot("2")
        assert last is not None
        assert last.facts == {"seats": [[0, "a"]]}


def test_a_commit_whose_answer_was_lost_counts_once(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lost = itertools.count()
    leave = module._Leading.__exit__

    def losing(self: Any, *error: Any) -> None:
        leave(self, *error)
        if next(lost) == 0:
            raise OperationalError("COMMIT", None, ConnectionError("reset"))

    async def scene() -> None:
        log = EventLog(database)
        monkeypatch.setattr(module._Leading, "__exit__", losing)
        await log.append("r", [UPDATE])
        await log.append("r", [Event(seq=2, at=1.0, kind="stopped")])
        assert [each.seq for each in log.events("r")] == [1, 2]
        log.close()

    play(scene())


def test_a_job_counts_once_whoever_asks(database: str) -> None:
    async def scene() -> None:
        log = EventLog(database)
        await log.append("r", [UPDATE])
        twin = Event(seq=2, at=1.0, kind="update", client=3, number=7, body={"digest": "e"})
        with pytest.raises(Fenced):
            await log.append("r", [twin])
        assert log.events("r") == [UPDATE]
        log.close()

    play(scene())


def test_a_coordinator_whose_log_was_taken_over_writes_nothing_more(database: str) -> None:
    async def scene() -> None:
        taken: list[Over] = []
        old = EventLog(database, over=taken.append)
        await old.append("r", [Event(seq=1, at=0.0, kind="stopped")])
        new = rival(database)
        with pytest.raises(Fenced):
            await old.append("r", [Event(seq=2, at=1.0, kind="stopped")])
        for write in (
            lambda: old.mark("r", "failed", "", 0),
            lambda: old.submit(row("1")),
            lambda: old.save("r", Snapshot(seq=1, digest="", facts={})),
        ):
            with pytest.raises(Fenced):
                write()
        assert [type(each) for each in taken] == [Fenced]
        await new.append("r", [Event(seq=2, at=2.0, kind="resumed")])
        assert [(each.seq, each.kind) for each in new.events("r")] == [(1, "stopped"), (2, "resumed")]
        old.close()
        new.close()

    play(scene())


def test_a_log_with_a_hole_is_refused(database: str) -> None:
    async def scene() -> None:
        log = EventLog(database)
        await log.append("r", [Event(seq=each, at=0.0, kind="stopped") for each in (1, 2, 4)])
        with pytest.raises(RunError, match="event 3 is missing"):
            log.events("r")
        log.close()

    play(scene())


def test_patience_has_an_end_where_it_is_given_one(database: str) -> None:
    def full() -> None:
        raise OSError(28, "No space left on device")

    async def scene() -> None:
        log = EventLog(database)
        with pytest.raises(StorageError, match=r"writing: not now .No space left on device"):
            await log.insist(full, "writing", seconds=0.05)
        log.close()

    play(scene())


# Schema.


def test_migrations_lead_to_the_tables_of_the_code(database: str) -> None:
    engine = connect(database)
    upgrade(engine)
    with engine.connect() as connection:
        assert _differences(connection) == []
    engine.dispose()
    folder = str(Path(databases.__file__).with_name("migrations"))
    assert ScriptDirectory(folder, version_locations=[folder]).get_heads() == [REVISION]


def _differences(connection: sa.Connection) -> list[Any]:
    found = compare_metadata(MigrationContext.configure(connection), module.metadata)
    return [each for each in found if not (each[0] == "remove_table" and each[1].name == "alembic_version")]


def test_a_log_of_the_first_release_is_upgraded_with_all_it_holds(database: str) -> None:
    """It kept no revision: its tables alone tell."""
    with opened(database) as log:
        log.submit(row("1"))
        asyncio.run(_appended(log))
        epoch = log.epoch
    engine = connect(database)
    with engine.begin() as connection:
        for statement in (
            "DROP TABLE alembic_version",
            "DROP TABLE blobs",
            "ALTER TABLE leadership ADD COLUMN schema_version INTEGER NOT NULL DEFAULT 1",
            "ALTER TABLE runs DROP COLUMN rounds",
            "ALTER TABLE runs DROP COLUMN clients",
        ):
            connection.exec_driver_sql(statement)
    engine.dispose()
    with pytest.raises(RunError, match="holds no event log"):
        EventLog(database, lead=False)
    with opened(database) as log:
        assert log.epoch == epoch + 1
        assert log.runs() == [row("1")]
        assert log.events("r") == [UPDATE]
    engine = connect(database)
    with engine.connect() as connection:
        assert _differences(connection) == []
    engine.dispose()


async def _appended(log: EventLog) -> None:
    await log.append("r", [UPDATE])


def test_a_log_of_a_newer_hansa_is_left_alone(database: str) -> None:
    with opened(database) as log:
        log.submit(row("1"))
    engine = connect(database)
    with engine.begin() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '99'")
    for lead in (True, False):
        with pytest.raises(RunError, match=f"schema 99.*schema {REVISION}|schema 99, this one knows up to"):
            EventLog(database, lead=lead)
    with engine.connect() as connection:
        assert connection.scalar(sa.text("SELECT count(*) FROM runs")) == 1
    engine.dispose()


def test_an_upgrade_that_fails_half_way_changes_nothing(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Any, *arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("alembic.operations.Operations.add_column", broken)
    with pytest.raises(KeyboardInterrupt):
        EventLog(database)
    monkeypatch.undo()
    engine = connect(database)
    assert sa.inspect(engine).get_table_names() == []
    engine.dispose()
    with opened(database) as log:
        assert log.epoch == 1


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("nonsense", "no URL"),
        ("mysql://u:secret@h/x", "not known"),
        ("postgresql://u:secret@127.0.0.1:1/x", "cannot be opened"),
        ("sqlite:////nowhere/at/all.db", "cannot be opened"),
    ],
)
def test_databases_that_cannot_be_used_are_named_without_their_passwords(url: str, problem: str) -> None:
    with pytest.raises((InputError, RunError), match=problem) as caught:
        EventLog(url)
    assert "secret" not in str(caught.value)
