"""Questions to a run's record, against numbers worked by hand."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from hansa.core import questions
from hansa.core.errors import InputError, RunError
from hansa.core.questions import Record
from hansa.core.store import ClientScores, Outcome, Participation, Round, RunStore

RECIPE = '[algorithm]\nname = "fedavg"\n\n[stop]\nrounds = 8\ntarget = 0.9\n'


def job(
    client: int,
    *,
    away: float,
    returned: float,
    staleness: int = 0,
    outcome: Outcome = "folded",
    layers: tuple[str, ...] | None = None,
) -> Participation:
    return Participation(
        client=client,
        phase="train",
        examples=10,
        steps=2,
        staleness=staleness,
        weight=1.0,
        dispatched=returned - away,
        returned=returned,
        loss=0.5,
        outcome=outcome,
        layers=layers,
    )


def scores(*accuracy: float) -> ClientScores:
    n = len(accuracy)
    return ClientScores(
        client=np.arange(n), examples=np.full(n, 5), accuracy=np.array(accuracy), loss=np.zeros(n)
    )


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Four rounds of ten seconds; the run is not told to have ended."""
    jobs = {
        1: [
            job(0, away=4.0, returned=8.0, layers=("a",)),
            job(3, away=8.0, returned=10.0, layers=("a", "b")),
        ],
        2: [
            job(0, away=2.0, returned=20.0, staleness=1, layers=("b",)),
            job(1, away=1.0, returned=20.0, outcome="lost"),
        ],
        3: [job(3, away=2.0, returned=26.0, staleness=1, layers=("b",))],
        4: [],
    }
    path = tmp_path / "run"
    with RunStore.create(path, name="r", seed=3, recipe=RECIPE, facts={"clients": "4"}) as store:
        for index, accuracy in enumerate((0.2, 0.4, 0.9, 0.8), start=1):
            store.append(
                Round(
                    index=index,
                    time=10.0 * index,
                    wall=1.0 * index,
                    bytes_up=1,
                    bytes_down=2,
                    metrics={"accuracy": accuracy, "loss": 1 - accuracy, "z/other": 1.0},
                    participants=jobs[index],
                    clients=scores(0.0, 0.25, 0.5, 0.75, 1.0) if index == 2 else None,
                    movement={"a": (0.1 * index, 2.0), "b": (0.0, 0.0)},
                )
            )
        store.event(5.0, "checkpoint", "after round 1")
        store.event(25.0, "joined", "<b>client</b>", client=3)
    return path


@pytest.fixture
def record(directory: Path) -> Iterator[Record]:
    with Record(directory) as record:
        yield record


def test_facts(record: Record) -> None:
    facts = questions.facts(record)
    expected = {
        "status": "interrupted",  # nobody holds the lock
        "rounds": 4, "total": 8, "target": 0.9, "time": 40.0, "wall": 4.0, "bytes_up": 4, "bytes_down": 8,
        "headline": "accuracy", "last": 0.8, "best": 0.9, "clients": 4, "seed": 3, "algorithm": "fedavg",
    }  # fmt: skip
    assert {name: facts[name] for name in expected} == expected


def test_the_headline_comes_first_among_the_metrics(record: Record) -> None:
    assert questions.metric_names(record) == ["accuracy", "loss", "z/other"]


def test_what_it_took_to_come_to_a_target(record: Record) -> None:
    assert questions.outcome(record, "accuracy", target=0.4) == {
        "last": 0.8, "best": 0.9, "rounds": 2, "time": 20.0, "wall": 2.0, "bytes": 6,
    }  # fmt: skip
    falling = questions.outcome(record, "loss", falling=True, target=0.15)
    assert falling["best"] == pytest.approx(0.1)
    assert falling["rounds"] == 3
    assert questions.outcome(record, "accuracy", target=0.95)["rounds"] is None


def test_series_and_rounds_come_in_pages(record: Record) -> None:
    assert questions.series(record, "accuracy", after=1, limit=2) == {"round": [2, 3], "value": [0.4, 0.9]}
    assert questions.rounds(record, after=3)["round"] == [4]


def test_events_newest_first_and_searched(record: Record) -> None:
    assert questions.events(record)["kind"] == ["joined", "checkpoint"]
    assert questions.events(record, search="CLIENT")["text"] == ["<b>client</b>"]
    assert questions.events(record, before=2)["id"] == [1]


def test_staleness_counts_what_was_folded(record: Record) -> None:
    assert questions.ages(record) == {"staleness": [0, 1], "jobs": [2, 2]}


def test_how_long_updates_were_away_and_waited(record: Record) -> None:
    """Away 4, 8, 2, 2 in bins of 4: [0, 4) has two, [4, 8] two; waiting 2, 0, 0, 4 in bins of 2."""
    assert questions.waits(record, bins=2) == {
        "kind": ["away", "away", "waiting", "waiting"],
        "low": [0.0, 4.0, 0.0, 2.0],
        "high": [4.0, 8.0, 2.0, 4.0],
        "jobs": [2, 2, 2, 2],
    }


def test_the_map_of_participation_is_binned(record: Record) -> None:
    told = questions.grid(record, clients=2, rounds=2)
    assert (told["clients"], told["rounds"], told["population"]) == (2, 2, 4)
    cells = dict(zip(zip(told["client"], told["round"], strict=True), told["jobs"], strict=True))
    # Rounds 1 and 2: clients 0, 0, 1 below, 3 above; round 3: client 3.
    assert cells == {(0, 1): 3, (2, 1): 1, (2, 3): 1}
    assert sum(told["wasted"]) == 1


def test_the_spread_of_the_clients(record: Record) -> None:
    """Jain's index of 0, ¼, ½, ¾, 1 is 2.5² / (5 · 1.875) = 2/3; the variance is 1/8."""
    told = questions.spread(record)
    assert told["round"] == [2]
    quartiles = [told[name][0] for name in ("worst", "q1", "median", "q3", "best")]
    assert quartiles == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert told["jain"][0] == pytest.approx(2 / 3)
    assert told["deviation"][0] == pytest.approx(0.125**0.5)


def test_how_far_layers_move(record: Record) -> None:
    """‖Δa‖ = 0.1, 0.2, 0.3, 0.4 of ‖a‖ = 2; b is zero, so its share is unknown."""
    told = questions.layers(record, bins=2)
    assert (told["names"], told["round"]) == (["a", "b"], [2, 4])
    assert told["moved"][0] == pytest.approx([0.15, 0.35])
    assert told["share"][0] == pytest.approx([0.075, 0.175])
    assert told["share"][1] == [None, None]


def test_which_client_tuned_which_layer(record: Record) -> None:
    told = questions.tuned(record)
    found = list(zip(told["client"], told["layer"], told["jobs"], strict=True))
    assert found == [(0, "a", 1), (3, "a", 1), (0, "b", 1), (3, "b", 2)]


def test_nothing_is_written_by_looking(directory: Path) -> None:
    before = {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}
    with Record(directory) as record:
        questions.facts(record)
        with pytest.raises(RunError, match="readonly"):
            record.rows("DELETE FROM rounds")
    assert {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()} == before


def test_a_run_is_read_while_it_is_written(directory: Path) -> None:
    with RunStore.open(directory) as store, Record(directory) as before:
        store.truncate(2)
        assert questions.facts(before)["rounds"] == 4  # one view as long as it is open
        with Record(directory) as after:
            facts = questions.facts(after)
            assert (facts["rounds"], facts["status"]) == (2, "running")


def test_of_a_long_run_every_so_many_rounds_are_mapped_and_the_newest_counted(tmp_path: Path) -> None:
    """200 rounds of 400 jobs are 80,000: every second round is mapped, the newest 100 are counted."""
    jobs = [job(client, away=1.0, returned=1.0) for client in range(400)]
    with RunStore.create(tmp_path / "r", name="r", seed=0, recipe=RECIPE, facts={}) as store:
        for index in range(1, 201):
            store.append(
                Round(
                    index=index, time=2.0, wall=1.0, bytes_up=0, bytes_down=0, metrics={}, participants=jobs
                )
            )
    with Record(tmp_path / "r") as record:
        told = questions.grid(record, clients=1, rounds=20)
        assert (told["every"], sum(told["jobs"])) == (2, 40_000)
        assert questions.ages(record)["jobs"] == [40_000]
        assert sum(questions.waits(record)["jobs"]) == 2 * 40_000


@pytest.mark.parametrize(
    ("statement", "problem"),
    [
        ("UPDATE schema_version SET version = 99", "newer Hansa"),
        ("DROP TABLE run", "no run in it"),
    ],
)
def test_a_database_that_is_none_says_what_is_the_matter(
    directory: Path, statement: str, problem: str
) -> None:
    with closing(sqlite3.connect(directory / "run.db")) as connection:
        connection.execute(statement)
        connection.commit()
    with pytest.raises(RunError, match=problem):
        Record(directory)


def test_a_run_of_the_first_schema_is_read(directory: Path) -> None:
    with closing(sqlite3.connect(directory / "run.db")) as connection:
        for table in ("spreads", "movements", "layer_names", "tuned", "verdicts", "edges"):
            connection.execute(f"DROP TABLE {table}")
        connection.execute("UPDATE schema_version SET version = 1")
        connection.commit()
    with Record(directory) as record:
        assert questions.spread(record)["jain"][0] == pytest.approx(2 / 3)
        assert questions.layers(record)["names"] == []
        assert questions.tuned(record)["jobs"] == []
    with RunStore.open(directory) as store:
        store.truncate(4)  # whoever goes on with it brings it up to date
    with Record(directory) as record:
        assert record.version > 1
        assert questions.spread(record)["median"] == [0.5]


def test_what_came_by_wire_is_checked(directory: Path) -> None:
    assert questions.answer(directory, "ages", "{}") == {"staleness": [0, 1], "jobs": [2, 2]}
    for name, arguments in (
        ("ages", '{"x": 1}'),
        ("grid", '{"clients": 100000}'),
        ("ages", "["),
        ("drop", "{}"),
    ):
        with pytest.raises(InputError):
            questions.answer(directory, name, arguments)


def test_answers_are_json(directory: Path) -> None:
    for name in (
        "facts",
        "metric_names",
        "ages",
        "waits",
        "grid",
        "tuned",
        "spread",
        "layers",
        "events",
        "rounds",
    ):
        assert json.loads(json.dumps(questions.answer(directory, name, {})))
