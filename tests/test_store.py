from __future__ import annotations

import csv
import dataclasses
import json
import os
import re
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from math import inf, isnan, nan
from pathlib import Path

import numpy as np
import pytest
import torch
from sqlalchemy.dialects import postgresql
from sqlalchemy.schema import CreateTable

from hansa.core.algorithm import Report
from hansa.core.errors import InputError, RunError
from hansa.core.reducer import Judgement
from hansa.core.store import (
    ClientScores,
    Event,
    Outcome,
    Participation,
    Round,
    RoundRow,
    RunStore,
    Verdicts,
    export,
    new_run_directory,
    runs,
    schema,
)

RECIPE = '[algorithm]\nname = "fedavg"\n'


def create(directory: Path, *, name: str = "first", seed: int = 7) -> RunStore:
    return RunStore.create(directory, name=name, seed=seed, recipe=RECIPE, facts={"torch": "2.13.0"})


def job(
    client: int, *, staleness: int = 0, outcome: Outcome = "folded", loss: float | None = 0.5
) -> Participation:
    return Participation(
        client=client,
        phase="train",
        examples=20,
        steps=5,
        staleness=staleness,
        weight=1.5,
        dispatched=0.25,
        returned=2.5,
        loss=loss,
        outcome=outcome,
    )


def scores(accuracy: list[float]) -> ClientScores:
    n = len(accuracy)
    return ClientScores(
        client=np.arange(n), examples=np.full(n, 10), accuracy=np.array(accuracy), loss=np.full(n, nan)
    )


def round_(index: int, *jobs: Participation, clients: ClientScores | None = None, **metrics: float) -> Round:
    return Round(
        index=index,
        time=10.0 * index,
        wall=0.5 * index,
        bytes_up=100,
        bytes_down=200,
        metrics=metrics,
        participants=jobs,
        clients=clients,
    )


def test_what_is_appended_is_read_back(tmp_path: Path) -> None:
    first = round_(1, job(3), job(9, staleness=2, outcome="lost", loss=None), job(3), accuracy=0.25, loss=nan)
    second = round_(2, accuracy=0.5, clients=scores([0.1, nan, 0.9]))
    with create(tmp_path, seed=2**80) as store:
        store.append(first)
        store.append(second)
        store.event(12.0, "lost", "client went away", client=9)
        store.event(20.0, "checkpoint", "round 2")
        store.finish("finished")

    with RunStore.open(tmp_path) as store:
        assert store.recipe == RECIPE == (tmp_path / "recipe.toml").read_text()
        assert store.facts == {"torch": "2.13.0"}
        assert store.metrics() == ["accuracy", "loss"]
        one, two = store.rounds()
        assert isnan(one.metrics["loss"])
        assert one.metrics["accuracy"] == 0.25
        assert two == RoundRow(
            index=2, time=20.0, wall=1.0, bytes_up=100, bytes_down=200, metrics={"accuracy": 0.5}
        )
        indices, values = store.series("accuracy")
        assert indices.tolist() == [1, 2]
        assert values.tolist() == [0.25, 0.5]
        assert store.events() == [
            Event(time=12.0, kind="lost", text="client went away", client=9),
            Event(time=20.0, kind="checkpoint", text="round 2"),
        ]

        jobs = store.participation()
        # A client that returns twice in a round has two rows, and the order is kept.
        assert jobs["client"].tolist() == [3, 9, 3]
        assert jobs["round"].tolist() == [1, 1, 1]
        assert jobs["outcome"].tolist() == ["folded", "lost", "folded"]
        assert jobs["staleness"].tolist() == [0, 2, 0]
        assert np.array_equal(jobs["loss"], [0.5, nan, 0.5], equal_nan=True)
        assert {
            name: jobs[name][0] for name in ("phase", "examples", "steps", "weight", "dispatched", "returned")
        } == {
            "phase": "train",
            "examples": 20,
            "steps": 5,
            "weight": 1.5,
            "dispatched": 0.25,
            "returned": 2.5,
        }
        assert store.participation(2)["client"].tolist() == []

        assert store.client_scores(1) is None
        last = store.client_scores()
        assert last is not None
        assert last.client.tolist() == [0, 1, 2]
        assert last.examples.tolist() == [10, 10, 10]
        assert np.array_equal(last.accuracy, [0.1, nan, 0.9], equal_nan=True)
        assert np.isnan(last.loss).all()

        summary = store.summary()
        assert (summary.name, summary.algorithm, summary.seed) == ("first", "fedavg", 2**80)
        assert (summary.status, summary.rounds, summary.time, summary.wall) == ("finished", 2, 20.0, 1.0)
        assert (summary.bytes_up, summary.bytes_down) == (200, 400)


def test_numbers_of_numpy_are_numbers_in_the_database(tmp_path: Path) -> None:
    """SQLite would keep a NumPy integer as a blob."""
    with create(tmp_path) as store:
        row = Round(
            index=int(np.int64(1)),
            time=np.float32(0.5),  # type: ignore[arg-type]
            wall=np.float64(1.0),
            bytes_up=np.int64(2**40),  # type: ignore[arg-type]
            bytes_down=np.int32(7),  # type: ignore[arg-type]
            metrics={"accuracy": np.float32(0.25)},  # type: ignore[dict-item]
            participants=[job(np.int64(4))],  # type: ignore[arg-type]
        )
        store.append(row)
        assert store.rounds() == [
            RoundRow(index=1, time=0.5, wall=1.0, bytes_up=2**40, bytes_down=7, metrics={"accuracy": 0.25})
        ]
        assert store.participation()["client"].tolist() == [4]


def test_summary_tells_last_and_best_accuracy_and_overlooks_nan(tmp_path: Path) -> None:
    with create(tmp_path) as store:
        assert store.summary().accuracy is None
        for index, accuracy in enumerate((0.25, 0.75, 0.5, nan), start=1):
            store.append(round_(index, accuracy=accuracy))
        summary = store.summary()
    assert (summary.accuracy, summary.best_accuracy) == (0.5, 0.75)


def test_an_algorithm_among_the_facts_goes_before_the_recipe(tmp_path: Path) -> None:
    with RunStore.create(
        tmp_path, name="x", seed=1, recipe="no TOML [", facts={"algorithm": "krum"}
    ) as store:
        assert store.summary().algorithm == "krum"


def test_a_round_is_recorded_once_and_whole(tmp_path: Path) -> None:
    with create(tmp_path) as store:
        store.append(round_(1, job(1), accuracy=0.1))
        with pytest.raises(RunError, match="round 1 is recorded already"):
            store.append(round_(1, job(2), accuracy=0.9))
        with pytest.raises(TypeError):
            store.append(round_(2, job(None), accuracy=0.9))  # type: ignore[arg-type]
        assert [row.index for row in store.rounds()] == [1]
        assert store.series("accuracy")[1].tolist() == [0.1]
        assert store.participation()["client"].tolist() == [1]


def test_truncate_forgets_what_a_resumed_run_will_do_again(tmp_path: Path) -> None:
    with create(tmp_path) as store:
        store.partition(np.array([3, 4]))
        for index in (1, 2, 3):
            store.append(round_(index, job(index), accuracy=index / 10, clients=scores([index / 10])))
            store.event(10.0 * index, "checkpoint", f"round {index}")
        store.finish("failed", "out of memory")
    with RunStore.open(tmp_path) as store:
        store.truncate(2)
        assert [row.index for row in store.rounds()] == [1, 2]
        assert store.series("accuracy")[0].tolist() == [1, 2]
        assert store.participation()["client"].tolist() == [1, 2]
        last = store.client_scores()
        assert last is not None
        assert last.accuracy.tolist() == [0.2]
        assert [event.text for event in store.events()] == ["round 1", "round 2"]
        summary = store.summary()
        assert (summary.status, summary.error) == ("running", None)
        store.append(round_(3, accuracy=0.4))
        assert store.series("accuracy")[1].tolist() == [0.1, 0.2, 0.4]

        store.truncate(0)
        assert store.rounds() == []
        assert store.events() == []
        assert store.distribution() is not None


def test_partition_with_and_without_classes(tmp_path: Path) -> None:
    with create(tmp_path) as store:
        assert store.distribution() is None
        store.partition(np.array([[1, 0], [5, 2]]), ["cat", "dog"])
        held = store.distribution()
        assert held is not None
        assert held[0].tolist() == [[1, 0], [5, 2]]
        assert held[1] == ("cat", "dog")
        store.partition(np.array([4, 6]))
        held = store.distribution()
        assert held is not None
        assert held[0].tolist() == [4, 6]
        assert held[1] == ()


def test_participation_grid_counts_jobs_in_bins(tmp_path: Path) -> None:
    with create(tmp_path) as store:
        assert store.participation_grid() is None
        store.append(round_(1, job(0), job(4), job(4)))
        store.append(round_(2, job(1, outcome="lost"), job(0)))
        store.append(round_(3, job(3, outcome="discarded")))

        exact = store.participation_grid()
        assert exact is not None
        assert exact.clients.tolist() == [0, 1, 2, 3, 4, 5]
        assert exact.rounds.tolist() == [1, 2, 3, 4]
        assert exact.counts.tolist() == [[1, 1, 0], [0, 1, 0], [0, 0, 0], [0, 0, 1], [2, 0, 0]]
        assert exact.wasted.tolist() == [[0, 0, 0], [0, 1, 0], [0, 0, 0], [0, 0, 1], [0, 0, 0]]

        # Clients 0–1, 2–3, 4–5 and rounds 1–2, 3–4.
        coarse = store.participation_grid(clients=3, rounds=2)
        assert coarse is not None
        assert coarse.clients.tolist() == [0, 2, 4, 6]
        assert coarse.rounds.tolist() == [1, 3, 5]
        assert coarse.counts.tolist() == [[3, 0], [0, 1], [2, 0]]
        assert coarse.wasted.tolist() == [[1, 0], [0, 1], [0, 0]]


def test_staleness_counts_folded_updates(tmp_path: Path) -> None:
    with create(tmp_path) as store:
        store.append(round_(1, job(0), job(1, staleness=3), job(2, staleness=3)))
        store.append(round_(2, job(0, staleness=9, outcome="discarded"), job(1)))
        assert store.staleness() == {0: 2, 3: 2}


def test_client_spread_is_worst_quartiles_best(tmp_path: Path) -> None:
    with create(tmp_path) as store:
        store.append(round_(1, clients=scores([0.0, 0.2, 0.4, 0.6, 0.8])))
        store.append(round_(2))
        store.append(round_(3, clients=scores([nan, nan])))
        store.append(round_(4, clients=scores([0.5, nan, 0.5])))
        indices, quantiles = store.client_spread()
        assert indices.tolist() == [1, 4]
        # Quartiles of five equally spaced values are the values; 1e-12 for the interpolation's rounding.
        assert quantiles == pytest.approx(np.array([[0, 0.2, 0.4, 0.6, 0.8], [0.5] * 5]), abs=1e-12)
        for index in range(5, 25):
            store.append(round_(index, clients=scores([0.5])))
        thinned, _ = store.client_spread(limit=4)
        assert (thinned[0], thinned[-1], len(thinned)) == (1, 24, 4)


# ---------------------------------------------------------------------- several processes

WRITER = """
import sys
from pathlib import Path
from hansa.core.store import Round, RunStore

with RunStore.create(Path(sys.argv[1]), name="w", seed=1, recipe="", facts={}) as store:
    print("ready", flush=True)
    for line in sys.stdin:
        index = int(line)
        store.append(Round(index=index, time=index, wall=0, bytes_up=0, bytes_down=0,
                           metrics={"accuracy": index / 10}))
        print("done", flush=True)
"""


@contextmanager
def writer(directory: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that has the run open and appends the rounds whose numbers it is sent."""
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(directory)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()


def test_a_run_is_read_while_another_process_writes_it(tmp_path: Path) -> None:
    with writer(tmp_path) as process, RunStore.open(tmp_path) as store:
        assert process.stdin is not None
        assert process.stdout is not None
        assert store.summary().status == "running"
        for index in (1, 2, 3):
            process.stdin.write(f"{index}\n")
            process.stdin.flush()
            assert process.stdout.readline() == "done\n"
            assert [row.index for row in store.rounds()] == list(range(1, index + 1))
            with RunStore.open(tmp_path) as newcomer:
                assert newcomer.summary().accuracy == index / 10


def test_a_reader_neither_waits_for_nor_sees_an_open_transaction(tmp_path: Path) -> None:
    with create(tmp_path) as store:
        store.append(round_(1, accuracy=0.5))
        with closing(sqlite3.connect(tmp_path / "run.db", isolation_level=None)) as connection:
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("INSERT INTO rounds VALUES (2, 0, 0, 0, 0)")
            assert [row.index for row in store.rounds()] == [1]
            connection.execute("COMMIT")
        assert [row.index for row in store.rounds()] == [1, 2]


def test_only_one_process_writes_until_it_ends(tmp_path: Path) -> None:
    with writer(tmp_path) as process:
        with RunStore.open(tmp_path) as store:
            assert store.summary().status == "running"
            with pytest.raises(RunError, match=rf"{re.escape(str(tmp_path))}: another process is writing"):
                store.event(0.0, "x", "y")
        with pytest.raises(RunError, match="another process is writing"):
            create(tmp_path)
        process.kill()
        process.wait()
    with RunStore.open(tmp_path) as store:
        # A killed process says no farewell, but its lock is gone.
        summary = store.summary()
        assert summary.status == "interrupted"
        assert summary.error is not None
        store.truncate(0)
        assert store.summary().status == "running"


def test_close_gives_the_lock_and_the_files_back(tmp_path: Path) -> None:
    descriptors = Path("/proc/self/fd")
    before = set(os.listdir(descriptors)) if descriptors.exists() else set()
    with create(tmp_path) as first:
        with RunStore.open(tmp_path) as second, pytest.raises(RunError):
            second.finish("finished")
        first.append(round_(1))
    with RunStore.open(tmp_path) as second:
        second.finish("finished")
    assert not list(tmp_path.glob("run.db-*"))
    if descriptors.exists():
        assert set(os.listdir(descriptors)) == before


# ---------------------------------------------------------------------- damage


def damage(directory: Path, statement: str) -> None:
    with closing(sqlite3.connect(directory / "run.db")) as connection, connection:
        connection.execute(statement)


def test_a_directory_that_is_no_run(tmp_path: Path) -> None:
    for directory in (tmp_path, tmp_path / "absent"):
        with pytest.raises(RunError, match=r"is not a run directory .* give the directory of a run"):
            RunStore.open(directory)


def test_a_garbage_file_is_a_damaged_run(tmp_path: Path) -> None:
    (tmp_path / "run.db").write_bytes(b"not a database" * 100)
    with pytest.raises(RunError, match=r"cannot be read .*not a database.*; restore run\.db"):
        RunStore.open(tmp_path)


def test_an_empty_file_is_a_damaged_run(tmp_path: Path) -> None:
    (tmp_path / "run.db").touch()
    with pytest.raises(RunError, match=r"no table .*; restore run\.db"):
        RunStore.open(tmp_path)


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("DROP TABLE metrics", "no table metrics"),
        ("DELETE FROM run", "own row is missing"),
        ("DELETE FROM schema_version", "own row is missing"),
        ("UPDATE schema_version SET version = 99", "newer Hansa .schema 99.*; update hansa"),
    ],
)
def test_a_damaged_or_newer_database(tmp_path: Path, statement: str, message: str) -> None:
    create(tmp_path).close()
    damage(tmp_path, statement)
    with pytest.raises(RunError, match=message):
        RunStore.open(tmp_path)


def test_a_newer_database_with_other_tables_is_called_newer(tmp_path: Path) -> None:
    create(tmp_path).close()
    damage(tmp_path, f"UPDATE schema_version SET version = {schema.SCHEMA_VERSION + 1}")
    damage(tmp_path, "DROP TABLE metrics")
    with pytest.raises(RunError, match="newer Hansa"):
        RunStore.open(tmp_path)


def test_an_older_database_is_read_as_it_is_and_brought_up_to_date_when_written(tmp_path: Path) -> None:
    with create(tmp_path) as store:
        store.append(round_(1, job(0)))
    damage(tmp_path, "UPDATE schema_version SET version = 1")
    damage(tmp_path, "DROP TABLE verdicts")
    damage(tmp_path, "DROP TABLE edges")

    def version() -> int:
        with closing(sqlite3.connect(tmp_path / "run.db")) as connection:
            found: int = connection.execute("SELECT version FROM schema_version").fetchone()[0]
            return found

    with RunStore.open(tmp_path) as store:
        assert store.summary().rounds == 1
        assert version() == 1  # nothing is written by looking
        store.append(dataclasses.replace(round_(2, job(0)), verdicts=VERDICTS))
    assert version() == schema.SCHEMA_VERSION
    assert [row[:3] for row in table(tmp_path, "verdicts")] == [(2, 0, 5), (2, 1, 3), (2, 2, 8)]


VERDICTS = Verdicts(
    client=np.array([5, 3, 8]),
    distance=np.array([1.0, 3.0, nan]),
    relative=np.array([0.5, 1.5, nan]),
    weight=np.array([1.5, 1.5, 0.0]),
)


def table(directory: Path, name: str) -> list[tuple[object, ...]]:
    with closing(sqlite3.connect(directory / "run.db")) as connection:
        return connection.execute(f"SELECT * FROM {name}").fetchall()


def test_verdicts_stand_by_round_and_are_forgotten_with_it(tmp_path: Path) -> None:
    with create(tmp_path) as store:
        for index in (1, 2):
            store.append(dataclasses.replace(round_(index), verdicts=VERDICTS))
        store.truncate(1)
    assert table(tmp_path, "verdicts") == [
        (1, 0, 5, 1.0, 0.5, 1.5),
        (1, 1, 3, 3.0, 1.5, 1.5),
        (1, 2, 8, None, None, 0.0),
    ]


def test_verdicts_are_in_units_of_the_round() -> None:
    reports = [
        Report(
            client=client,
            number=0,
            phase="train",
            examples=1,
            steps=1,
            staleness=0,
            dispatched=0.0,
            returned=1.0,
        )
        for client in (7, 2, 4)
    ]
    distances = torch.tensor([2.0, 8.0, inf])
    made = Verdicts.of((reports, Judgement(distances, torch.tensor([0.5, 0.5, 0.0]))))
    assert made is not None
    assert made.client.tolist() == [7, 2, 4]
    np.testing.assert_array_equal(made.relative, [0.4, 1.6, nan])  # of the median of 2 and 8
    assert made.weight.tolist() == [1.5, 1.5, 0.0]
    column = Verdicts.of((reports, Judgement(torch.zeros(3), None)))
    assert column is not None
    assert column.relative.tolist() == [1.0, 1.0, 1.0]
    assert np.isnan(column.weight).all()
    assert Verdicts.of(None) is None


def test_a_topology_is_its_edges(tmp_path: Path) -> None:
    ring = np.array([[0.5, 0.25, 0.25], [0.25, 0.5, 0.25], [0.25, 0.25, 0.5]])
    with create(tmp_path) as store:
        store.topology(np.eye(3))
        store.topology(ring)
    assert table(tmp_path, "edges") == [(0, 1, 0.25), (0, 2, 0.25), (1, 2, 0.25)]


def test_a_truncated_file_fails_where_it_is_read(tmp_path: Path) -> None:
    with create(tmp_path) as store:
        store.append(round_(1, *(job(client) for client in range(2000))))
    content = (tmp_path / "run.db").read_bytes()
    (tmp_path / "run.db").write_bytes(content[: len(content) // 2])
    with (
        pytest.raises(RunError, match=r"cannot be read .*; restore run\.db"),
        RunStore.open(tmp_path) as store,
    ):
        store.participation()


@pytest.mark.parametrize("content", [b"", b"garbage"])
def test_a_damaged_array(tmp_path: Path, content: bytes) -> None:
    with create(tmp_path) as store:
        store.append(round_(1, clients=scores([0.5])))
        damage(tmp_path, f"UPDATE client_scores SET accuracy = x'{content.hex()}'")
        with pytest.raises(RunError, match=r"cannot be read"):
            store.client_scores()


def test_a_directory_holds_one_run(tmp_path: Path) -> None:
    with create(tmp_path) as store:
        store.append(round_(1))
    with pytest.raises(RunError, match="holds a run already"):
        RunStore.create(tmp_path, name="second", seed=1, recipe="other", facts={})
    assert (tmp_path / "recipe.toml").read_text() == RECIPE
    with RunStore.open(tmp_path) as store:
        store.event(0.0, "the lock", "is free")


def test_a_file_in_the_way_is_a_run_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="cannot be recorded"):
        create(tmp_path / "file")
    with pytest.raises(RunError, match="cannot be recorded"):
        new_run_directory(tmp_path / "file", "x")


# ---------------------------------------------------------------------- other databases


def test_any_database_url(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'elsewhere.db'}"
    with RunStore.create(tmp_path / "run", name="x", seed=1, recipe="", facts={}, url=url) as store:
        store.append(round_(1, job(1), accuracy=0.5))
    assert not (tmp_path / "run" / "run.db").exists()
    with RunStore.open(tmp_path / "run", url=url) as store:
        assert store.summary().accuracy == 0.5


def test_the_schema_is_not_sqlites_alone() -> None:
    dialect = postgresql.dialect()  # type: ignore[no-untyped-call]
    for table in schema.metadata.sorted_tables:
        assert "WITHOUT ROWID" not in str(CreateTable(table).compile(dialect=dialect))


# ---------------------------------------------------------------------- folders of runs


def test_run_ids_sort_by_time_and_never_collide(tmp_path: Path) -> None:
    made = [new_run_directory(tmp_path / "runs", "FedAvg, α = 0.1!") for _ in range(50)]
    assert len(set(made)) == 50
    assert all(directory.is_dir() for directory in made)
    assert all(re.fullmatch(r"\d{8}-\d{6}-fedavg-0-1-[a-z0-9]{3}", directory.name) for directory in made)
    assert new_run_directory(tmp_path, "///").name[16:].startswith("run-")


def test_runs_are_listed_newest_first_and_the_unreadable_last(tmp_path: Path) -> None:
    assert list(runs(tmp_path / "absent")) == []
    create(tmp_path / "b", name="older").close()
    create(tmp_path / "a", name="newer").close()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "run.db").write_bytes(b"garbage" * 100)
    (tmp_path / "lost").mkdir()
    (tmp_path / "lost" / "recipe.toml").touch()
    (tmp_path / "not a run").mkdir()
    (tmp_path / "file").touch()
    found = list(runs(tmp_path))
    assert [run.id for run in found] == ["a", "b", "lost", "broken"]
    assert [run.name for run in found] == ["newer", "older", "", ""]
    assert [run.status for run in found[2:]] == ["unreadable", "unreadable"]
    assert "no run.db" in str(found[2].error)
    assert "not a database" in str(found[3].error)


# ---------------------------------------------------------------------- export


@pytest.fixture
def exported(tmp_path: Path) -> Iterator[RunStore]:
    with create(tmp_path / "run") as store:
        store.append(round_(1, clients=None, **{"accuracy": 0.1, "train/loss": inf}))
        store.append(round_(2, clients=None, **{"accuracy": 1 / 3, "train/loss": nan, "a,b": 2.0}))
        yield store


def test_export_to_csv_is_what_was_appended(exported: RunStore, tmp_path: Path) -> None:
    export(exported, tmp_path / "out.csv")
    with (tmp_path / "out.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == [
        "round",
        "time",
        "wall",
        "bytes_up",
        "bytes_down",
        "a,b",
        "accuracy",
        "train/loss",
    ]
    assert [[float(cell) if cell else None for cell in row.values()] for row in rows] == [
        [1, 10.0, 0.5, 100, 200, None, 0.1, inf],
        [2, 20.0, 1.0, 100, 200, 2.0, 1 / 3, None],
    ]


def test_export_to_json_is_what_was_appended(exported: RunStore, tmp_path: Path) -> None:
    export(exported, tmp_path / "out.JSON")
    common = {"bytes_up": 100, "bytes_down": 200, "train/loss": None}
    assert json.loads((tmp_path / "out.JSON").read_text()) == [
        {"round": 1, "time": 10.0, "wall": 0.5, "accuracy": 0.1, "a,b": None, **common},
        {"round": 2, "time": 20.0, "wall": 1.0, "accuracy": 1 / 3, "a,b": 2.0, **common},
    ]


def test_export_elsewhere_is_refused(exported: RunStore, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"end the name in \.csv or \.json"):
        export(exported, tmp_path / "out.xlsx")
    with pytest.raises(InputError, match="cannot be written"):
        export(exported, tmp_path / "absent" / "out.csv")
