"""Several processes make the run that one would have made, to the last bit."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hansa.core.errors import DataError, DivergedError, HansaError, InputError, Interrupted
from hansa.core.recipe import Recipe, parse
from hansa.core.store import RunStore
from hansa.core.trees import Tree
from hansa.simulation.runs import resume, start
from hansa.simulation.workers import Workers, _as_error, _as_facts, shares

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]


def recipe(**sections: Any) -> Recipe:
    """Twenty clients of unlike size: eleven in a cohort are two blocks, of which one is not full."""
    raw: dict[str, Any] = {
        "data": {"limit": 200},
        "partition": {"kind": "quantity", "clients": 20, "min_size": 4},
        "model": {"name": "mlp", "hidden": [6], "norm": "batch"},
        "train": {"batch_size": 8, "lr": 0.05, "epochs": 1},
        "schedule": {"cohort": 11},
        "stop": {"rounds": 3},
        # Products may depend on how many clients are computed together; that is not tried here.
        "engine": {"mode": "sequential"},
    }
    for name, section in sections.items():
        whole = not isinstance(section, Mapping) or "name" in section or "kind" in section
        raw[name] = section if whole else {**raw.get(name, {}), **section}
    return parse({**raw, "name": sections.get("name", "run")})


SLOW = {"speeds": "lognormal", "spread": 9.0, "dropout": 0.1}
CASES: dict[str, dict[str, Any]] = {
    "fedavg": {},
    "devices": {"schedule": {"cohort": 9, "over_selection": 1.3}, "population": SLOW},
    "scaffold": {"algorithm": {"name": "scaffold"}},
    "fedbn": {"algorithm": {"name": "fedbn"}},
    "fedbuff": {
        "algorithm": {"name": "fedbuff"},
        "schedule": {"name": "buffered", "k": 5, "concurrency": 9},
        "population": SLOW,
    },
    "multikrum": {
        "aggregation": {"rule": "multikrum", "f": 2},
        "attack": {"name": "sign_flip", "fraction": 0.1},
    },
    "geometric median": {
        "aggregation": {"rule": "geometric_median"},
        "model": {"name": "mlp", "hidden": [40, 20]},
    },
    "gossip": {"algorithm": {"name": "dfedsam"}, "topology": {"kind": "ring"}},
    "selective": {"algorithm": {"name": "selective"}, "model": {"name": "mlp", "hidden": [6]}},
}


SCRIPT = """
import json, os, pathlib, sys
os.environ["XDG_CACHE_HOME"] = f"{sys.argv[2]}-{os.environ['RANK']}"  # as on machines of their own
from hansa.core.errors import HansaError
from hansa.core.recipe import parse
from hansa.simulation.runs import resume, start

cases, folder = json.loads(pathlib.Path(sys.argv[1]).read_text()), pathlib.Path(sys.argv[2])
for name, raw in cases.items():
    start(parse(raw), folder / name).go()
measured = {**cases["fedavg"], "engine": {"mode": "auto"}}
for name in ("measured", "remembered"):  # by the first worker alone
    start(parse(measured), folder / name).go()

run = start(parse(cases["scaffold"]), folder / "stopped")
outcomes = {}
try:
    run.go(lambda done: run.stop() if run.recorded and done.index == 1 else None)  # one is asked
except HansaError as error:
    outcomes["stopped"] = repr(error)
    resume(run.directory).go()
try:
    start(parse({**cases["fedavg"], "train": {"lr": 1e30}}), folder / "diverged").go()
except HansaError as error:
    outcomes["diverged"] = repr(error)
(folder / f"outcomes-{'first' if run.recorded else 'second'}.json").write_text(json.dumps(outcomes))
"""


def record(directory: Path) -> dict[str, Any]:
    with RunStore.open(directory) as store:
        jobs = {name: column.tolist() for name, column in store.participation().items()}
        rounds = [
            (row.index, row.time, row.bytes_up, row.bytes_down, dict(row.metrics)) for row in store.rounds()
        ]
    return {"rounds": rounds, "jobs": repr(jobs)}


def same_models(one: Tree, other: Tree) -> bool:
    return one.keys() == other.keys() and all(torch.equal(each, other[name]) for name, each in one.items())


def only(folder: Path) -> Path:
    (found,) = folder.iterdir()
    return found


@pytest.fixture(scope="module")
def of_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which two processes have made all runs."""
    folder = tmp_path_factory.mktemp("two")
    script = folder / "all.py"
    script.write_text(SCRIPT)
    cases = folder / "cases.json"
    cases.write_text(
        json.dumps({name: recipe(**case).model_dump(mode="json") for name, case in CASES.items()})
    )
    (folder / "runs").mkdir()
    done = subprocess.run(
        [*TORCHRUN, "--nproc-per-node", "2", str(script), str(cases), str(folder / "runs")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "runs"


@pytest.mark.parametrize("name", CASES)
def test_two_processes_make_the_run_of_one(name: str, of_two: Path, tmp_path: Path) -> None:
    run = start(recipe(**CASES[name]), tmp_path)
    run.go()
    twin = only(of_two / name)
    assert same_models(load_file(run.model), load_file(twin / "model.safetensors"))
    assert record(run.directory) == record(twin)


def test_all_workers_use_the_tier_that_the_first_one_knows(of_two: Path) -> None:
    measured, remembered = (only(of_two / name) for name in ("measured", "remembered"))
    assert same_models(*(load_file(each / "model.safetensors") for each in (measured, remembered)))


def test_workers_stop_together_and_go_on_together(of_two: Path) -> None:
    told = [json.loads((of_two / f"outcomes-{which}.json").read_text()) for which in ("first", "second")]
    assert [each["stopped"] for each in told] == ["Interrupted('stopped after round 2')"] * 2
    whole, resumed = only(of_two / "scaffold"), only(of_two / "stopped")
    assert record(resumed) == record(whole)
    assert same_models(*(load_file(each / "model.safetensors") for each in (resumed, whole)))


def test_what_fails_on_one_worker_fails_on_all_with_the_same_words(of_two: Path) -> None:
    told = [json.loads((of_two / f"outcomes-{which}.json").read_text()) for which in ("first", "second")]
    assert [each["diverged"].partition("(")[0] for each in told] == ["DivergedError"] * 2
    with RunStore.open(only(of_two / "diverged")) as store:
        summary = store.summary()
    assert summary.status == "failed"
    assert summary.error is not None
    assert "lower train.lr" in summary.error


def test_a_run_of_two_that_was_interrupted_is_gone_on_with_by_one(tmp_path: Path) -> None:
    made = recipe(stop={"rounds": 1000}, engine={"checkpoint_every": 1})
    path = tmp_path / "study.toml"
    path.write_text(made.toml())
    launched = subprocess.Popen(
        [
            *TORCHRUN,
            "--nproc-per-node",
            "2",
            "-m",
            "hansa",
            "run",
            str(path),
            "--runs",
            str(tmp_path / "runs"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert launched.stdout is not None
    said = []
    for line in launched.stdout:
        said.append(line)
        if line.startswith("round 3/"):
            launched.send_signal(signal.SIGINT)
            break
    said += launched.stdout.readlines()
    launched.wait()
    launched.stdout.close()
    text = "".join(said)
    assert len(re.findall("^round 1/1000", text, re.MULTILINE)) == 1  # one of them talks
    directory = only(tmp_path / "runs")
    with RunStore.open(directory) as store:
        assert store.summary().status == "interrupted"
        rounds = store.summary().rounds
    assert f"stopped after round {rounds}; `hansa resume" in text
    # One process goes on, here for two rounds more.
    run = resume(directory)
    with pytest.raises(Interrupted):
        run.go(lambda done: run.stop() if done.index == rounds + 2 else None)
    alone = start(made, tmp_path / "alone")
    with pytest.raises(Interrupted):
        alone.go(lambda done: alone.stop() if done.index == rounds + 2 else None)
    assert record(directory) == record(alone.directory)


# The parts.


def test_one_process_is_alone() -> None:
    workers = Workers()
    assert (workers.first, workers.count) == (True, 1)
    assert workers.share([1.0] * 5, 8) == slice(0, 5)
    tree = {"w": torch.ones(2)}
    assert workers.exchange(lambda: (tree, [1])) == [(tree, [1])]
    with pytest.raises(ZeroDivisionError):
        workers.together(lambda: 1 // 0)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("jobs", [1, 3, 8, 9, 40, 100])
@pytest.mark.parametrize("unit", [1, 8])
def test_shares_cover_the_jobs_in_whole_units(count: int, jobs: int, unit: int) -> None:
    costs = [1.0 + (7 * i) % 11 for i in range(jobs)]
    parts = shares(costs, count, unit)
    assert [i for part in parts for i in range(jobs)[part]] == list(range(jobs))
    assert all(part.start % unit == 0 or part.start == jobs for part in parts)
    loads = [sum(costs[part]) for part in parts]
    # A cut lies half a unit or less off its goal, and a share has two cuts.
    widest = max(sum(costs[at : at + unit]) for at in range(0, jobs, unit))
    assert max(loads) <= sum(costs) / count + widest


@pytest.mark.parametrize(
    "error",
    [
        InputError("engine.chunk", 64, "too many", "use fewer"),
        DataError("data", [1, 2], "not finite", "mend it"),
        DivergedError("round 3: infinite"),
    ],
)
def test_an_error_is_told_to_other_workers_in_its_own_words(error: HansaError) -> None:
    told = _as_error(1, json.loads(json.dumps(_as_facts(error))))
    assert type(told) is type(error)
    assert told.exit_code == error.exit_code
    assert isinstance(error, DataError) or str(told) == str(error)


def test_an_error_that_should_not_happen_names_its_worker() -> None:
    told = _as_error(3, _as_facts(KeyError("w")))
    assert str(told) == "worker 3: KeyError: 'w'"
