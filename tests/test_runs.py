"""The life of a run: what it leaves on disk, and that stopping and resuming changes nothing."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import tomllib
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from hansa.core.errors import DataError, DivergedError, InputError, Interrupted, RunError
from hansa.core.recipe import Recipe, parse
from hansa.core.store import Round, RunStore, runs
from hansa.simulation.catalog import resolved, world
from hansa.simulation.population import Population
from hansa.simulation.runs import Run, resume, start
from hansa.simulation.simulator import Simulator
from hansa.strategies.catalog import assemble

ROUNDS = 7


def recipe(**sections: Any) -> Recipe:
    """Six clients with 90 digits among them; a section is merged into these unless it names another kind."""
    raw: dict[str, Any] = {
        "name": "small",
        "data": {"limit": 90},
        "partition": {"kind": "quantity", "clients": 6, "min_size": 4},
        "model": {"name": "mlp", "hidden": [6], "norm": "batch"},
        "train": {"batch_size": 8, "lr": 0.05, "epochs": 2},
        "schedule": {"cohort": 4},
        "stop": {"rounds": ROUNDS},
        "engine": {"checkpoint_every": 3},
    }
    for name, section in sections.items():
        whole = not isinstance(section, Mapping) or "name" in section or "kind" in section
        raw[name] = section if whole else {**raw.get(name, {}), **section}
    return parse(raw)


def until(round: int, act: Callable[[], object]) -> Callable[[Round], None]:
    """Told of rounds, acts after one of them."""

    def tell(done: Round) -> None:
        if done.index == round:
            act()

    return tell


def interrupted(made: Recipe, folder: Path, after: int) -> Run:
    run = start(made, folder)
    with pytest.raises(Interrupted):
        run.go(until(after, run.stop))
    return run


def record(directory: Path) -> dict[str, Any]:
    """All that a run left that must not depend on where it was interrupted."""
    with RunStore.open(directory) as store:
        rows = store.rounds()
        jobs = store.participation()
        return {
            "status": store.summary().status,
            "rounds": [row.index for row in rows],
            "times": [row.time for row in rows],
            "bytes": [(row.bytes_up, row.bytes_down) for row in rows],
            "metrics": [dict(row.metrics) for row in rows],
            "jobs": {name: column.tolist() for name, column in jobs.items()},
            "model": load_file(directory / "model.safetensors"),
        }


def assert_same(one: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    for name in one.keys() - {"model", "jobs", "metrics"}:
        assert one[name] == other[name], name
    for mine, theirs in zip(one["metrics"], other["metrics"], strict=True):
        assert mine == pytest.approx(theirs, rel=0, abs=0, nan_ok=True)
    for column, values in one["jobs"].items():
        np.testing.assert_array_equal(values, other["jobs"][column], err_msg=column)
    assert one["model"].keys() == other["model"].keys()
    for name, tensor in one["model"].items():
        assert torch.equal(tensor, other["model"][name]), name


SLOW = {"speeds": "lognormal", "spread": 20.0, "jitter": 0.3, "dropout": 0.2, "recovery": 15.0}
BUFFERED = {"name": "buffered", "k": 3, "concurrency": 5}
CASES: dict[str, dict[str, Any]] = {
    "fedavg with a deadline": {
        "schedule": {"deadline": 8.0, "over_selection": 1.4},
        "population": {**SLOW, "availability": 0.7, "period": 60.0},
    },
    "scaffold": {"algorithm": {"name": "scaffold"}},
    "fedbn": {"algorithm": {"name": "fedbn"}},
    "fedadam": {"algorithm": {"name": "fedadam"}},
    "fraug": {"algorithm": {"name": "fraug"}, "train": {"epochs": 1}},
    "dfedsam": {"algorithm": {"name": "dfedsam"}, "topology": {"kind": "ring"}},
    "selective": {"algorithm": {"name": "selective"}, "population": {"dropout": 0.2}},
    "krum under attack": {
        "aggregation": {"rule": "krum", "f": 0},
        "attack": {"name": "alie", "fraction": 0.3},
    },
    "local steps by dropout": {"model": {"dropout": 0.3}, "train": {"steps": 3, "momentum": 0.9}},
    "fedbuff": {"algorithm": {"name": "fedbuff"}, "schedule": BUFFERED, "population": SLOW},
    "fedbn, buffered": {"algorithm": {"name": "fedbn"}, "schedule": BUFFERED, "population": SLOW},
    "periodic": {"schedule": {"name": "periodic", "interval": 9.0}, "population": SLOW},
    "periodic with recall": {
        "algorithm": {"name": "fedbn"},
        "schedule": {"name": "periodic", "interval": 5.0, "recall": 3},
        "population": SLOW,
    },
}


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_is_the_run_that_was_never_stopped(case: str, tmp_path: Path) -> None:
    made = recipe(**CASES[case])
    whole = start(made, tmp_path / "whole")
    whole.go()
    once = interrupted(made, tmp_path / "parts", after=2)
    with RunStore.open(once.directory) as store:
        assert store.summary().status == "interrupted"
        assert store.summary().rounds == 2
    again = resume(once.directory)
    assert again.begins_after == 2
    with pytest.raises(Interrupted):
        again.go(until(5, again.stop))
    assert resume(once.directory).go().rounds == ROUNDS
    assert_same(record(once.directory), record(whole.directory))
    assert record(whole.directory)["rounds"] == list(range(1, ROUNDS + 1))


SCRIPT = """
import json, os, signal, sys
from pathlib import Path
from hansa.core.recipe import parse
from hansa.simulation.runs import start

run = start(parse(json.loads(sys.argv[1])), Path(sys.argv[2]))
run.go(lambda done: os.kill(os.getpid(), signal.SIGKILL) if done.index == 5 else None)
"""


@pytest.mark.parametrize(("every", "after"), [(2, 4), (100, 0)], ids=["checkpoint", "no checkpoint yet"])
def test_a_killed_process_leaves_a_run_that_goes_on(every: int, after: int, tmp_path: Path) -> None:
    made = recipe(algorithm={"name": "scaffold"}, engine={"checkpoint_every": every})
    arguments = [json.dumps(made.model_dump(mode="json")), str(tmp_path / "killed")]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    died = subprocess.run([sys.executable, "-c", SCRIPT, *arguments], check=False, env=environment)
    assert died.returncode == -signal.SIGKILL
    (summary,) = runs(tmp_path / "killed")
    assert (summary.status, summary.rounds) == ("interrupted", 5)
    run = resume(summary.directory)
    assert run.begins_after == after  # round 5 was told of, and made again
    run.go()
    whole = start(made, tmp_path / "whole")
    whole.go()
    assert_same(record(run.directory), record(whole.directory))


def test_what_a_finished_run_leaves(tmp_path: Path) -> None:
    made = recipe(algorithm={"name": "fedbn"}, seed=5)
    run = start(made, tmp_path)
    told: list[int] = []
    ending = run.go(lambda done: told.append(done.index))
    assert told == list(range(1, ROUNDS + 1))
    assert {path.name for path in run.directory.iterdir()} >= {
        "recipe.toml",
        "run.db",
        "checkpoints",
        "model.safetensors",
    }
    model = load_file(run.model)
    assert model.keys() == ending.params.keys()
    assert not any("norm" in name for name in model)  # FedBN's stay with the clients
    assert not list(run.directory.glob("*.part"))
    stored = parse(tomllib.loads((run.directory / "recipe.toml").read_text()))
    assert stored == resolved(made)
    assert stored.algorithm == {"name": "fedbn", "server_lr": 1.0}
    assert stored.population["step_time"] == 1.0
    with RunStore.open(run.directory) as store:
        summary, facts, held = store.summary(), store.facts, store.distribution()
        assert [(each.kind, each.text) for each in store.events()] == [("finished", f"made {ROUNDS} rounds")]
    assert (summary.status, summary.rounds, summary.seed, summary.name) == ("finished", ROUNDS, 5, "small")
    assert facts["algorithm"] == "fedbn"
    assert facts["torch"] == torch.__version__
    assert facts.keys() >= {"hansa", "python", "numpy", "platform", "engine", "device", "threads", "clients"}
    assert held is not None
    assert held[0].shape == (6, 10)
    assert held[0].sum() == 90


def test_a_regression_records_sizes_and_a_model(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 3))
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "y.npy", x @ np.array([1.0, -2.0, 0.5]))
    run = start(
        recipe(
            data={"source": "npy", "x": str(tmp_path / "x.npy"), "y": str(tmp_path / "y.npy"), "limit": 40},
            model={"name": "logistic"},
            partition={"kind": "iid", "clients": 6},
        ),
        tmp_path / "runs",
    )
    ending = run.go()
    assert ending.metrics["loss"] < 1.0  # the variance of y is 5.25
    with RunStore.open(run.directory) as store:
        held = store.distribution()
    assert held is not None
    assert held[0].sum() == 40


def test_errors_before_anything_ran_leave_no_directory(tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    for sections, kind in (
        ({"schedule": {"cohort": 7}}, InputError),
        ({"data": {"source": "csv", "path": "absent.csv", "target": 0}}, DataError),
        ({"attack": {"name": "alie", "fraction": 0.05}}, InputError),
        ({"model": {"dropout": 0.5}, "engine": {"mode": "batched"}}, InputError),
    ):
        with pytest.raises(kind):
            start(recipe(**sections), folder)
    assert not folder.exists() or not list(folder.iterdir())


def test_what_computed_the_run_is_on_record(tmp_path: Path) -> None:
    run = start(recipe(model={"name": "logistic"}, stop={"rounds": 1}, engine={"mode": "auto"}), tmp_path)
    run.go()
    with RunStore.open(run.directory) as store:
        assert store.facts["engine"] == run.simulator.engine
    assert "to be measured" not in run.simulator.engine


def test_the_model_of_the_same_run_has_the_same_bytes(tmp_path: Path) -> None:
    made = recipe(model={"name": "logistic"}, stop={"rounds": 1}, engine={"mode": "sequential"})
    first, again = (start(made, tmp_path / str(n)) for n in range(2))
    first.go()
    again.go()
    assert first.model.read_bytes() == again.model.read_bytes()


def test_divergence_is_recorded_as_failure(tmp_path: Path) -> None:
    run = start(recipe(train={"lr": 1e30}), tmp_path)
    with pytest.raises(DivergedError, match=r"lower train\.lr = 1e\+30"):
        run.go()
    with RunStore.open(run.directory) as store:
        summary = store.summary()
        (event,) = store.events()
    assert summary.status == "failed"
    assert summary.error is not None
    assert "lower train.lr" in summary.error
    assert event.kind == "failed"
    assert not run.model.exists()


def test_an_unexpected_error_is_recorded_with_its_traceback_and_can_be_resumed(tmp_path: Path) -> None:
    def fail() -> None:
        raise ZeroDivisionError("no luck")

    made = recipe()
    run = start(made, tmp_path)
    with pytest.raises(ZeroDivisionError):
        run.go(until(5, fail))
    with RunStore.open(run.directory) as store:
        summary = store.summary()
        (event,) = store.events()
    assert (summary.status, summary.error, summary.rounds) == ("failed", "ZeroDivisionError: no luck", 5)
    assert "Traceback" in event.text
    assert "in fail" in event.text
    again = resume(run.directory)
    assert again.begins_after == 3  # the last checkpoint
    again.go()
    whole = start(made, tmp_path)
    whole.go()
    assert_same(record(again.directory), record(whole.directory))


def test_a_second_request_to_stop_ends_at_once_and_is_recorded(tmp_path: Path) -> None:
    def at_once() -> None:
        raise KeyboardInterrupt

    run = start(recipe(), tmp_path)
    with pytest.raises(KeyboardInterrupt):
        run.go(until(5, at_once))
    with RunStore.open(run.directory) as store:
        assert store.summary().status == "interrupted"
        assert store.summary().error == "ended at once, on request"
    assert resume(run.directory).begins_after == 3


def test_a_run_stopped_before_its_first_round_goes_on(tmp_path: Path) -> None:
    run = start(recipe(), tmp_path)
    run.stop()
    with pytest.raises(Interrupted):
        run.go()
    again = resume(run.directory)
    assert again.begins_after == 0
    assert again.go().rounds == ROUNDS


def test_a_run_that_finished_or_still_runs_is_not_resumed(tmp_path: Path) -> None:
    run = start(recipe(stop={"rounds": 2}), tmp_path)
    with pytest.raises(RunError, match="still running; stop it first"):
        resume(run.directory)
    run.go()
    with pytest.raises(RunError, match=r"has finished; to go further, start its recipe\.toml with more"):
        resume(run.directory)
    with pytest.raises(RunError, match="is not a run directory"):
        resume(tmp_path / "absent")


def test_missing_data_leave_an_interrupted_run_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text("a,b,y\n" + "".join(f"{i},{i % 7},{i % 2}\n" for i in range(80)))
    made = recipe(data={"source": "csv", "path": str(path), "target": "y", "limit": None})
    run = interrupted(made, tmp_path / "runs", after=3)
    path.rename(tmp_path / "moved.csv")
    with pytest.raises(DataError, match=r"table\.csv'?: there is no such file"):
        resume(run.directory)
    with RunStore.open(run.directory) as store:
        assert (store.summary().status, store.summary().rounds) == ("interrupted", 3)
    (tmp_path / "moved.csv").rename(path)
    assert resume(run.directory).go().rounds == ROUNDS


def test_changed_data_are_told_before_anything_is_forgotten(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    rows = [f"{i},{i % 7},{i % 2}\n" for i in range(80)]
    path.write_text("a,b,y\n" + "".join(rows))
    made = recipe(data={"source": "csv", "path": str(path), "target": "y", "limit": None})
    run = interrupted(made, tmp_path / "runs", after=4)
    path.write_text("a,b,y\n" + "".join(rows[:-1]) + "79,3,1\n")  # one number is another
    with pytest.raises(DataError, match="no longer those the run began with; put the data back"):
        resume(run.directory)
    with RunStore.open(run.directory) as store:
        assert (store.summary().status, store.summary().rounds) == ("interrupted", 4)
    path.write_text("a,b,y\n" + "".join(rows))
    assert resume(run.directory).begins_after == 4


def test_a_changed_recipe_is_not_passed_over(tmp_path: Path) -> None:
    run = interrupted(recipe(), tmp_path, after=3)
    path = run.directory / "recipe.toml"
    path.write_text(path.read_text().replace("lr = 0.05", "lr = 0.5"))
    with pytest.raises(RunError, match=r"recipe\.toml: was changed, but a run goes on as it began"):
        resume(run.directory)
    path.unlink()
    assert resume(run.directory).begins_after == 3


@pytest.mark.parametrize("kept", [2, 4, 7])
def test_a_record_behind_the_checkpoints_is_made_whole(kept: int, tmp_path: Path) -> None:
    """As a power cut leaves it, or a copy made while the run went on."""
    made = recipe(engine={"checkpoint_every": 1})
    whole, run = start(made, tmp_path / "whole"), interrupted(made, tmp_path / "parts", after=5)
    whole.go()
    with RunStore.open(run.directory) as store:
        store.truncate(kept)
        store.finish("interrupted")
    again = resume(run.directory)
    assert again.begins_after == min(kept, 5) if kept >= 4 else again.begins_after == 0
    with pytest.raises(Interrupted):
        again.go(until(6, again.stop))
    resume(run.directory).go()
    assert_same(record(run.directory), record(whole.directory))


def test_a_checkpoint_of_another_model_or_layout_is_refused(tmp_path: Path) -> None:
    run = interrupted(recipe(), tmp_path, after=3)
    for path in (run.directory / "checkpoints").glob("*/state.json"):
        facts = json.loads(path.read_text())
        del facts["alarms"]
        path.write_text(json.dumps(facts))
    with pytest.raises(RunError, match=r"what was saved does not fit this run \(KeyError: 'alarms'\)"):
        resume(run.directory)
    with RunStore.open(run.directory) as store:
        assert (store.summary().status, store.summary().rounds) == ("interrupted", 3)


def test_a_model_that_cannot_be_written_fails_the_run_and_resuming_writes_it(tmp_path: Path) -> None:
    run = start(recipe(), tmp_path)
    run.model.mkdir()  # stands in the way
    with pytest.raises(RunError, match="the model cannot be written"):
        run.go()
    run.model.rmdir()
    assert resume(run.directory).go().rounds == ROUNDS
    assert run.model.is_file()
    assert record(run.directory)["rounds"] == list(range(1, ROUNDS + 1))


def test_the_world_is_what_the_recipe_says() -> None:
    made = world(recipe(population={"dropout": 0.25}, attack={"name": "sign_flip", "scale": 3.0}))
    assert made.population == Population(dropout=0.25)
    assert made.attack is not None
    assert made.attack.malicious(10, seed=0) == made.attack.malicious(10, seed=0)
    assert len(made.attack.malicious(10, seed=0)) == 2
    assert world(recipe()).attack is None


@pytest.mark.parametrize(
    ("sections", "field", "words"),
    [
        ({"population": {"drop": 0.1}}, "population.drop", "did you mean 'dropout'?"),
        ({"population": {"dropout": 1}}, "population.dropout", "a probability below 1"),
        ({"population": {"spread": 3}}, "population.spread", "set population.speeds"),
        ({"attack": {"name": "alei"}}, "attack.name", "did you mean 'alie'?"),
        ({"attack": {"fraction": 0.2}}, "attack.name", "choose among sign_flip, alie"),
        ({"attack": {"name": "alie", "scale": 2}}, "attack.scale", "or set attack.name = 'sign_flip'"),
        ({"attack": {"name": "alie"}, "topology": {"kind": "ring"}}, "attack.name", "updates of one model"),
        ({"attack": {"name": "alie"}, "algorithm": {"name": "selective"}}, "attack.name", "different layers"),
    ],
)
def test_a_world_that_cannot_be_is_refused(sections: dict[str, Any], field: str, words: str) -> None:
    with pytest.raises(InputError, match=words.replace("?", r"\?")) as caught:
        world(recipe(**sections))
    assert caught.value.field == field


def test_malicious_peers_of_a_gossip_network_send_the_flipped_change() -> None:
    """One round on a complete graph of three, one of them malicious: all hold the mean of what was sent."""
    common: dict[str, Any] = {
        "partition": {"kind": "iid", "clients": 3},
        "model": {"name": "logistic"},
        "schedule": {"cohort": 3},
        "stop": {"rounds": 1},
        "engine": {"dtype": "float64"},
    }
    # Each peer's own change is what it comes to on its own.
    alone = Simulator(assemble(recipe(**common, algorithm={"name": "local"})))
    alone.run()
    attack = {"name": "sign_flip", "fraction": 0.34, "scale": 2.0}
    made = recipe(**common, topology={"kind": "complete"}, attack=attack)
    around, federation = world(made), assemble(made)
    assert around.attack is not None
    (bad,) = around.attack.malicious(3, seed=0)
    initial = federation.task.initial
    attacked = Simulator(federation, around.population, around.attack)
    attacked.run()
    for name, before in initial.items():
        changes = [alone.private(client)[name] - before for client in range(3)]
        sent = [-2.0 * change if client == bad else change for client, change in enumerate(changes)]
        expected = before + torch.stack(sent).mean(0)
        for client in range(3):
            torch.testing.assert_close(attacked.hub.params_for(client)[name], expected)


def test_a_robust_run_records_whose_updates_it_left_out(tmp_path: Path) -> None:
    made = recipe(
        partition={"kind": "iid", "clients": 10},
        schedule={"name": "rounds", "cohort": 10},
        aggregation={"rule": "multikrum", "f": 3},
        attack={"name": "sign_flip", "fraction": 0.3, "scale": 10.0},
        stop={"rounds": 3},
    )
    run = start(made, tmp_path)
    run.go()
    attack = world(resolved(made)).attack
    assert attack is not None
    liars = attack.malicious(10, made.seed)
    with closing(sqlite3.connect(run.directory / "run.db")) as connection:
        seen = connection.execute("SELECT round, client, relative, weight FROM verdicts").fetchall()
    assert len(seen) == 3 * 10
    assert {client for _, client, _, weight in seen if weight == 0} == liars
    assert all(weight == pytest.approx(10 / 7) for _, client, _, weight in seen if client not in liars)
    assert min(far for _, client, far, _ in seen if client in liars) > 1


def test_a_gossip_run_records_who_talks_to_whom(tmp_path: Path) -> None:
    run = start(recipe(topology={"kind": "ring"}, stop={"rounds": 2}), tmp_path)
    run.go()
    with closing(sqlite3.connect(run.directory / "run.db")) as connection:
        edges = connection.execute("SELECT a, b, weight FROM edges").fetchall()
    assert [(a, b) for a, b, _ in edges] == [(0, 1), (0, 5), (1, 2), (2, 3), (3, 4), (4, 5)]
    assert [weight for *_, weight in edges] == pytest.approx([1 / 3] * 6)
