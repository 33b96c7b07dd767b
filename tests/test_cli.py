"""The command line as people and scripts meet it: what it prints where, what it leaves, how it fails."""

from __future__ import annotations

import gzip
import io
import json
import os
import signal
import struct
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import hansa
from hansa.cli import main
from hansa.cli.find import find_run
from hansa.cli.progress import Progress
from hansa.core.errors import HansaError, RunError
from hansa.core.recipe import load
from hansa.core.store import Round, RunStore, runs
from hansa.simulation.catalog import resolved
from hansa.simulation.runs import start
from hansa.strategies.catalog import ALGORITHMS, assemble

SMALL = (
    "-c",
    "data.limit=120",
    "-c",
    "partition.clients=6",
    "-c",
    "schedule.cohort=4",
    "-c",
    "stop.rounds=3",
)


def overrides(arguments: Sequence[str]) -> dict[str, str]:
    """What ``-c KEY=VALUE …`` says."""
    pairs = (each.partition("=") for each in arguments if each != "-c")
    return {key: value for key, _, value in pairs}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where runs go; recipes and data are relative to its parent."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HANSA_RUNS", "here")
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.delenv("NO_COLOR", raising=False)
    return tmp_path / "here"


class Said:
    """What a command said: its exit code, standard output and standard error."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def envelope(self) -> dict[str, Any]:
        """The one JSON object on standard output."""
        (line,) = self.out.splitlines()
        made: dict[str, Any] = json.loads(line)
        return made


Command = Callable[..., Said]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """``command("run", "--json")``."""

    def call(*arguments: str) -> Said:
        capsys.readouterr()
        code = main(arguments)
        said = capsys.readouterr()
        return Said(code, said.out, said.err)

    return call


# Errors.

TABLE = "a,b,y\n" + "".join(f"{i},{i % 7},{i % 2}\n" for i in range(60))
CSV = ("-c", "data.source=csv", "-c", "data.path=table.csv", "-c", "data.target=y")

IDX = ("-c", "data.source=idx", "-c", "data.train_labels=labels")

WRONG: dict[str, tuple[tuple[str, ...], int, str]] = {
    "no equals sign": (
        ("-c", "train.lr"),
        2,
        "--config = 'train.lr': it is no KEY=VALUE; write it as in -c train.lr=0.05",
    ),
    "unknown key": (
        ("-c", "trian.lr=1"),
        2,
        "trian = { lr = 1 }: there is no such key; did you mean 'train'?",
    ),
    "wrong type": (
        ("-c", "train.lr=fast"),
        2,
        "train.lr = 'fast': it must be a number; correct it, or leave it out for the default",
    ),
    "unknown algorithm": (
        ("-c", "algorithm.name=fedavgg"),
        2,
        "algorithm.name = 'fedavgg': there is no such thing; did you mean 'fedavg'?",
    ),
    "no such recipe": (
        ("absent.toml",),
        2,
        "recipe = 'absent.toml': there is no such file; run `hansa new NAME` to make one",
    ),
    "model without a head": (
        ("-c", "algorithm.name=fraug", "-c", "model.name=logistic"),
        2,
        "model.name = 'logistic': FRAug augments the features fed to a linear head",
    ),
    "too many Byzantine": (
        ("-c", "aggregation.rule=krum", "-c", "aggregation.f=4"),
        2,
        "aggregation.f = 4: krum then needs 11 updates in a step or more, and the schedule brings 10",
    ),
    "schedule without rounds": (
        ("-c", "algorithm.name=scaffold", "-c", "schedule.name=buffered"),
        2,
        "schedule.name = 'buffered': SCAFFOLD's control variates are defined for rounds",
    ),
    "more shards than examples": (
        ("-c", "partition.kind=shards", "-c", "partition.shards_per_client=2000"),
        3,
        "partition.shards_per_client = 2000: 20000 shards cannot be cut from 1438 examples; choose fewer",
    ),
    "missing file": (
        (*CSV, "-c", "data.path=absent.csv"),
        3,
        "data.path = 'absent.csv': there is no such file; correct the path",
    ),
    "a target in per cent": (
        ("-c", "stop.target=90"),
        2,
        "stop.target = 90.0: accuracy is a share of 1; write 0.9 for 90 %",
    ),
    "truncated idx": (
        (*IDX, "-c", "data.train_images=images"),
        3,
        "data.train_images = 'images': it holds 116 bytes where its header asks for 176; fetch or write",
    ),
    "damaged gzip": (
        (*IDX, "-c", "data.train_images=images.gz"),
        3,
        "data.train_images = 'images.gz': the gzip stream is damaged",
    ),
    "NaN in a table": (CSV, 3, "line 4, column 'b'; set it to 'mean'"),
    "word in a table": ((*CSV, "-c", "data.path=words.csv"), 3, "line 4, column 'b' is not a number"),
    "divergence": ((*SMALL, "-c", "train.lr=1e30"), 4, "lower train.lr = 1e+30 or set train.clip_norm"),
    "cohort too large": (
        ("-c", "schedule.cohort=21"),
        2,
        "schedule.cohort = 21: there are 20 clients; use 20 or fewer",
    ),
    "gossip with a server": (
        ("-c", "topology.kind=ring", "-c", "algorithm.name=scaffold"),
        2,
        "topology.kind = 'ring': scaffold needs a server; use topology.kind",
    ),
    "BatchNorm of one": (
        ("-c", "model.norm=batch", "-c", "train.batch_size=1"),
        2,
        "train.batch_size = 1: BatchNorm cannot normalise a batch of one; use 2 or more",
    ),
    "attack by nobody": (
        ("-c", "attack.name=alie", "-c", "attack.fraction=0.01"),
        2,
        "attack.fraction = 0.01: this share of 20 clients is nobody; use 0.05 or more",
    ),
    "no such device": (
        ("-c", "engine.device=abacus"),
        2,
        "engine.device = 'abacus': this machine has no such",
    ),
    "unknown option": (("--sed", "1"), 2, "No such option"),
    "negative seed": (("--seed", "-1"), 2, "Invalid value for '--seed'"),
}


@pytest.fixture
def broken(tmp_path: Path) -> None:
    """Data of every broken kind."""
    (tmp_path / "table.csv").write_text(TABLE.replace("2,2,0", "2,nan,0"))
    (tmp_path / "words.csv").write_text(TABLE.replace("2,2,0", "2,two,0"))
    images = b"\0\0\x08\x03" + struct.pack(">III", 10, 4, 4) + bytes(100)
    (tmp_path / "images").write_bytes(images)
    (tmp_path / "images.gz").write_bytes(gzip.compress(images)[:-9])
    (tmp_path / "labels").write_bytes(b"\0\0\x08\x01" + struct.pack(">I", 10) + bytes(10))


@pytest.mark.usefixtures("broken")
@pytest.mark.parametrize("name", WRONG)
def test_an_error_is_one_sentence_and_an_exit_code(name: str, command: Command) -> None:
    arguments, code, words = WRONG[name]
    said = command("run", "--quiet", *arguments)
    assert said.code == code
    assert said.out == ""
    sentence, *rest = said.err.splitlines()
    assert sentence.startswith("hansa: ")
    assert words in sentence
    # A run that began and failed tells where it is; nothing else is said.
    assert [line.split()[0] for line in rest] == (["run"] if code == 4 else [])
    assert "Traceback" not in said.err


@pytest.mark.usefixtures("broken")
@pytest.mark.parametrize("name", WRONG)
def test_an_error_is_one_envelope_for_machines(name: str, command: Command) -> None:
    arguments, code, _ = WRONG[name]
    said = command("run", "--json", *arguments)
    assert said.envelope["ok"] is False
    assert said.envelope["exit_code"] == said.code == code
    error = said.envelope["error"]
    assert error.keys() == {"kind", "message", "field", "value", "problem", "remedy"}
    assert f"hansa: {error['message']}" in said.err
    if error["field"] is not None:
        assert error["message"].startswith(error["field"])
        assert error["message"].endswith(f": {error['problem']}; {error['remedy']}")


def test_the_envelope_of_a_failed_run_tells_of_the_run(command: Command, folder: Path) -> None:
    envelope = command("run", "--json", *SMALL, "-c", "train.lr=1e30").envelope
    assert envelope["error"]["kind"] == "DivergedError"
    assert envelope["run"]["status"] == "failed"
    assert Path(envelope["run"]["directory"]).resolve().parent == folder


ALGORITHM = """
import signal
from dataclasses import dataclass
from hansa.strategies.fedavg import FedAvg

@dataclass(frozen=True, kw_only=True)
class Bad(FedAvg):
    'Does something odd after the second round.'
    signals: int = 0

    def apply(self, task, state, reduced, reports, phase):
        if state.version == 1:
            for _ in range(self.signals):
                signal.raise_signal(signal.SIGINT)
            if not self.signals:
                raise ZeroDivisionError("no luck")
        return super().apply(task, state, reduced, reports, phase)
"""


@pytest.fixture
def bad(tmp_path: Path) -> tuple[str, ...]:
    """Arguments of a run whose algorithm misbehaves."""
    (tmp_path / "bad.py").write_text(ALGORITHM)
    return ("run", *SMALL, "-c", "algorithm.name=bad.py:Bad", "--no-report")


def test_an_unexpected_error_is_a_sentence_unless_the_traceback_is_asked_for(
    bad: Sequence[str], command: Command
) -> None:
    said = command(*bad, "--quiet")
    assert said.code == 1
    sentence = "hansa: unexpected error (ZeroDivisionError: no luck); give the same command with --debug"
    assert said.err.startswith(sentence)
    assert "Traceback" not in said.err
    for debug in (command("--debug", *bad), command(*bad, "--debug")):
        assert debug.code == 1
        assert "Traceback" in debug.err
        assert "in apply" in debug.err
    assert command(*bad, "--json").envelope["error"]["kind"] == "ZeroDivisionError"


def test_control_c_stops_after_the_step_and_the_run_goes_on(
    bad: Sequence[str], command: Command, folder: Path
) -> None:
    said = command(*bad, "-c", "algorithm.signals=1")
    (summary,) = runs(folder)
    assert said.code == 130
    assert f"stopped after round 2; `hansa resume here/{summary.id}` goes on" in said.err
    assert "Traceback" not in said.err
    assert (summary.status, summary.rounds) == ("interrupted", 2)
    assert command("resume", "last", "--quiet", "--no-report").code == 0
    (summary,) = runs(folder)
    assert (summary.status, summary.rounds) == ("finished", 3)


def test_a_second_control_c_ends_at_once(bad: Sequence[str], command: Command, folder: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    said = command(*bad, "--json", "-c", "algorithm.signals=2", "-c", "engine.checkpoint_every=1")
    (summary,) = runs(folder)
    assert said.code == said.envelope["exit_code"] == 130
    assert said.envelope["run"]["status"] == "interrupted"
    assert (summary.status, summary.rounds) == ("interrupted", 1)
    # Signals are back where they were.
    assert signal.getsignal(signal.SIGINT) is before


def test_signals_from_outside_stop_a_process(folder: Path) -> None:
    arguments = [sys.executable, "-m", "hansa", "run", *SMALL, "-c", "stop.rounds=1000000", "--no-report"]
    with subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("round 3/"):
                break
        process.send_signal(signal.SIGTERM)
        rest = process.stderr.read()
    assert process.returncode == 130
    assert "`hansa resume here/" in rest
    (summary,) = runs(folder)
    assert summary.status == "interrupted"
    assert summary.rounds >= 3
    assert find_run("last", folder) == folder / summary.id


# Running.


def test_a_run_for_people(command: Command, folder: Path) -> None:
    said = command("run", *SMALL, "--seed", "4")
    (summary,) = runs(folder)
    assert said.code == 0
    opening, *lines = said.err.splitlines()
    assert opening.startswith(f"{summary.id}: fedavg on 6 clients, 120 examples, ")
    assert [line.split("  ")[0] for line in lines] == ["round 1/3", "round 2/3", "round 3/3"]
    assert all(f"clients {n}/4" in line for line in lines for n in [4])
    assert "accuracy" in lines[-1]
    assert "\x1b" not in said.err + said.out  # no colours where there is no terminal
    assert said.out.startswith("finished: made 3 rounds\n")
    told = dict(line.split(maxsplit=1) for line in said.out.splitlines()[1:])
    assert told["run"] == f"here/{summary.id}"
    assert Path(told["model"]).is_file()
    assert Path(told["report"]).is_file()
    assert (summary.seed, summary.status) == (4, "finished")


def test_a_run_for_machines(command: Command, folder: Path) -> None:
    said = command("run", "--json", *SMALL, "--no-report")
    envelope = said.envelope
    (summary,) = runs(folder)
    assert said.code == 0
    assert envelope["ok"] is True
    assert envelope["reason"] == "made 3 rounds"
    assert envelope["run"]["id"] == summary.id
    assert envelope["run"]["accuracy"] == envelope["metrics"]["accuracy"] == summary.accuracy
    assert Path(envelope["model"]).is_file()
    assert envelope["report"] is None
    assert not (folder / summary.id / "report.html").exists()
    assert "round 3/3" in said.err


def test_a_quiet_run_says_where_it_is(command: Command, folder: Path) -> None:
    said = command("run", *SMALL, "--quiet", "--no-report", "--runs", "elsewhere")
    (summary,) = runs(Path("elsewhere"))
    assert (said.out, said.err) == (f"elsewhere/{summary.id}\n", "")
    assert not folder.exists()


def test_a_report_that_cannot_be_written_does_not_fail_the_run(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(directory: Path) -> Path:
        raise RunError("the disk is full")

    monkeypatch.setattr("hansa.cli.execute.write_report", refuse)
    said = command("run", *SMALL, "--json")
    assert said.code == 0
    assert said.envelope["report"] is None
    assert "no report was written: the disk is full" in said.err


def test_resuming_what_has_finished_is_refused(command: Command, folder: Path) -> None:
    command("run", *SMALL, "--quiet", "--no-report")
    said = command("resume", "last")
    assert said.code == 5
    assert "has finished" in said.err
    assert command("resume", "last", "--json").envelope["error"]["kind"] == "RunError"


def test_asynchronous_runs_tell_of_staleness(command: Command) -> None:
    buffered = ("-c", "schedule.cohort=", "-c", "schedule.name=buffered", "-c", "schedule.k=2")
    said = command("run", *SMALL, *buffered, "--no-report")
    assert said.code == 0
    assert all("staleness" in line for line in said.err.splitlines()[1:])


def test_the_live_table_shows_the_last_rounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = start(load(None, overrides(SMALL)), tmp_path)
    shown = io.StringIO()
    monkeypatch.setenv("NO_COLOR", "1")
    console = Console(file=shown, force_terminal=True, width=120, height=40)
    with Progress(run, console) as progress:
        run.go(progress)
    last = shown.getvalue().rpartition("train loss")[2]
    for words in ("1/3", "2/3", "3/3", "4/4", "fedavg on 6 clients", "elapsed"):
        assert words in last
    assert "\x1b[3" not in shown.getvalue()  # NO_COLOR: neither foreground colours …
    assert "\x1b[9" not in shown.getvalue()  # … nor bright ones


# Recipes.


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_a_new_recipe_runs_as_it_is(name: str, command: Command, tmp_path: Path) -> None:
    said = command("new", f"my-{name}", "--algorithm", name)
    assert (said.code, said.out) == (0, f"my-{name}.toml: edit it, then `hansa run my-{name}.toml`\n")
    recipe = load(tmp_path / f"my-{name}.toml")
    assert recipe.name == f"my-{name}"
    assert recipe.algorithm["name"] == name
    assemble(recipe)
    short = ("-c", "stop.rounds=1", "-c", "train.epochs=", "-c", "train.steps=1", "-c", "data.limit=400")
    assert command("run", f"my-{name}.toml", *short, "--quiet", "--no-report").code == 0


def test_a_new_recipe_is_the_default_one_and_tells_of_every_key(command: Command, tmp_path: Path) -> None:
    command("new", "study")
    text = (tmp_path / "study.toml").read_text()
    assert resolved(load("study.toml")) == resolved(load(None, {"name": "study"}))
    for line in (
        "# server_lr = 1.0",
        "lr = 0.1",
        "cohort = ",
        "# test_fraction = 0.2",
        "# [attack]",
        "[population]",
    ):
        assert line in text
    lines = text.partition("# [attack]")[0].splitlines()
    assert all("  # " in line for line in lines if " = " in line)  # every key tells what it means
    # What is commented out are the defaults: taking the marks away changes nothing.
    opened = [line.removeprefix("# ") if " = " in line and "(unset)" not in line else line for line in lines]
    (tmp_path / "opened.toml").write_text("\n".join(opened))
    assert resolved(load("opened.toml")) == resolved(load("study.toml"))


def test_new_never_overwrites(command: Command, tmp_path: Path) -> None:
    (tmp_path / "study.toml").write_text("seed = 7\n")
    said = command("new", "study")
    assert said.code == 2
    assert "NAME = 'study.toml': there is such a file already; choose another name" in said.err
    assert (tmp_path / "study.toml").read_text() == "seed = 7\n"
    assert command("new", "absent/study").code == 2
    assert command("new", "other", "--algorithm", "fedavgg").code == 2
    assert not (tmp_path / "other.toml").exists()


def test_config_show_is_a_recipe_that_marks_what_is_not_the_default(command: Command, tmp_path: Path) -> None:
    changes = (
        "-c",
        "train.lr=0.3",
        "-c",
        "stop.time=50",
        "-c",
        "algorithm.name=fedprox",
        "-c",
        "model.hidden=[8]",
    )
    said = command("config", "show", *changes)
    (tmp_path / "shown.toml").write_text(said.out)
    assert resolved(load("shown.toml")) == resolved(load(None, overrides(changes)))
    marked = {line.split()[0]: line.rpartition("# ")[2] for line in said.out.splitlines() if "  # " in line}
    assert marked == {
        "lr": "default 0.1",
        "time": "default unset",
        "name": 'default "fedavg"',
        "hidden": "default [64]",
    }
    assert "#" not in command("config", "show").out
    machine = command("config", "show", "--json", *changes).envelope["recipe"]
    assert machine == tomllib.loads(said.out)


def test_strategies_lists_everything_with_what_it_combines_with(command: Command) -> None:
    listed = command("strategies").out
    found = command("strategies", "--json").envelope["strategies"]
    assert {each["name"] for each in found if each["section"] == "algorithm"} == set(ALGORITHMS)
    assert {each["section"] for each in found} == {
        "algorithm", "schedule", "aggregation", "topology", "attack", "partition", "data", "model"
    }  # fmt: skip
    assert all(each["name"] in listed and each["meaning"] for each in found)
    combined = {each["name"]: each["combines_with"] for each in found if each["section"] == "algorithm"}
    assert combined["fedavg"]["topology"] == {"star": "", "gossip": ""}
    assert "rounds in which all start" in combined["scaffold"]["schedule"]["buffered"]
    assert combined["scaffold"]["schedule"]["rounds"] == ""
    assert combined["scaffold"]["topology"]["gossip"] == "scaffold needs a server"
    assert combined["dfedsam"]["topology"]["star"] == "DFedSAM has no server"
    assert combined["fednova"]["aggregation"]["robust"] != ""
    assert all(each["source"] for each in found if each["section"] == "algorithm")


def test_strategies_tells_of_one(command: Command) -> None:
    assert command("strategies", "ring").out.startswith("ring  topology\n")
    said = command("strategies", "fedadam").out
    assert "arXiv 2003.00295" in said
    for key in ("server_lr", "beta1", "beta2", "tau"):
        assert key in said
    (found,) = command("strategies", "fedprox", "--json").envelope["strategies"]
    (mu,) = [key for key in found["keys"] if key["key"] == "mu"]
    assert (mu["default"], mu["required"]) == (0.01, False)
    assert mu["meaning"].startswith("μ")
    (krum,) = command("strategies", "krum", "--json").envelope["strategies"]
    assert [key["key"] for key in krum["keys"] if key["required"]] == ["f"]
    assert "did you mean 'fedavg'?" in command("strategies", "fedvg").err


# Runs.


def stored(
    folder: Path,
    name: str,
    seed: int,
    accuracies: Sequence[float],
    recipe: str = "",
    status: str = "finished",
) -> Path:
    """A run made up: round i took 10 virtual seconds and 100 bytes each way."""
    directory = folder / f"20261121-0930{seed:02d}-{name}-abc"
    text = f"seed = {seed}\n{recipe}"
    with RunStore.create(
        directory, name=name, seed=seed, recipe=text, facts={"algorithm": "fedavg"}
    ) as store:
        for index, accuracy in enumerate(accuracies, start=1):
            store.append(
                Round(
                    index=index,
                    time=10.0 * index,
                    wall=0.5 * index,
                    bytes_up=100,
                    bytes_down=100,
                    metrics={"accuracy": accuracy, "train/loss": 1 - accuracy},
                )
            )
        if status == "finished":
            store.finish("finished")
    return directory


def test_compare_puts_seeds_together_and_finds_the_target(command: Command, folder: Path) -> None:
    stored(folder, "one", 1, [0.2, 0.6, 0.8])
    stored(folder, "one", 2, [0.4, 0.5, 0.6])
    stored(folder, "two", 3, [0.1, 0.2, 0.9], recipe="[train]\nlr = 1.0\n")
    envelope = command("compare", "--json", "20261121-093001", "20261121-093002", "20261121-093003").envelope
    # The poorest best is 0.6, which all reached.
    assert envelope["target"] == 0.6
    one, two = envelope["comparison"]
    assert [run["seed"] for run in one["runs"]] == [1, 2]
    assert one["final_mean"] == pytest.approx(0.7)
    assert one["final_std"] == pytest.approx(0.1 * 2**0.5)  # unbiased, of 0.8 and 0.6
    assert [run["reached"] for run in one["runs"]] == [
        {"rounds": 2.0, "time": 20.0, "bytes": 400.0},
        {"rounds": 3.0, "time": 30.0, "bytes": 600.0},
    ]
    assert (two["final_mean"], two["final_std"]) == (0.9, None)
    said = command("compare", "20261121-093001", "20261121-093002", "20261121-093003", "--target", "0.8")
    line_one, line_two = said.out.splitlines()[-2:]
    assert "70.00 % ± 14.14 %" in line_one
    assert "3 (1 of 2)" in line_one
    assert "90.00 %" in line_two
    assert "not reached" in command("compare", "last", "20261121-093001", "--target", "0.99").out
    (twice,) = command("compare", "--json", "last", "20261121-093003").envelope["comparison"]
    assert len(twice["runs"]) == 1  # a run is no seed more for being named again


def test_compare_tells_recipes_of_one_name_apart(command: Command, folder: Path) -> None:
    runs = [stored(folder, "one", 1, [0.2]), stored(folder, "one", 2, [0.4], recipe="[train]\nlr = 1.0\n")]
    runs[1] = runs[1].rename(runs[1].with_name(runs[1].name[:-3] + "xyz"))
    rows = command("compare", "--json", *map(str, runs)).envelope["comparison"]
    assert [row["label"] for row in rows] == ["one · fedavg · abc", "one · fedavg · xyz"]


def test_a_falling_metric_is_best_where_it_is_least(command: Command, folder: Path) -> None:
    stored(folder, "one", 1, [0.2, 0.8, 0.7])
    (row,) = command("compare", "--json", "last", "--metric", "train/loss").envelope["comparison"]
    assert row["runs"][0]["best"] == pytest.approx(0.2)
    assert row["runs"][0]["reached"]["rounds"] == 2
    said = command("compare", "last", "--metric", "nope")
    assert said.code == 2
    assert "choose among accuracy, train/loss" in said.err


def test_compare_draws_a_picture(command: Command, folder: Path, tmp_path: Path) -> None:
    for seed in (1, 2):
        stored(folder, "one", seed, [0.2, 0.8])
    for over in ("rounds", "time", "bytes"):
        picture = tmp_path / f"{over}.png"
        said = command("compare", "20261121-093001", "20261121-093002", "--over", over, "-o", str(picture))
        assert said.code == 0
        assert picture.read_bytes().startswith(b"\x89PNG")
    said = command("compare", "last", "-o", "picture.xyz")
    assert said.code == 2
    assert "--output = 'picture.xyz'" in said.err


def test_ls_and_show_and_export_and_report(command: Command, folder: Path, tmp_path: Path) -> None:
    assert command("ls").out == "no runs in here; `hansa run` makes one\n"
    assert command("ls", "--json").envelope["runs"] == []
    stored(folder, "one", 1, [0.2, 0.6])
    directory = stored(folder, "two", 2, [0.5], status="gone")
    (folder / "not-a-run").mkdir()
    _, first, second = command("ls").out.splitlines()
    assert first.split()[:2] == [directory.name, "interrupted"]  # the newest first
    assert "60.00 %" in second
    assert [run["status"] for run in command("ls", "--json").envelope["runs"]] == ["interrupted", "finished"]
    shown = command("show", "20261121-093001")
    for words in ("finished", "60.00 %", "best 60.00 %", "recipe.toml"):
        assert words in shown.out
    envelope = command("show", "20261121-093001", "--json").envelope
    assert [row["metrics"]["accuracy"] for row in envelope["rounds"]] == [0.2, 0.6]
    assert envelope["recipe"] == {"seed": 1}
    assert command("export", "20261121-093001", "rounds.csv").code == 0
    assert (tmp_path / "rounds.csv").read_text().startswith("round,time,wall,")
    assert command("export", "last", "rounds.xls").code == 2
    report = command("report", "last", "--json").envelope["report"]
    assert Path(report).read_text().startswith("<!doctype html>")


def test_runs_are_found_by_id_prefix_path_and_last(folder: Path, tmp_path: Path) -> None:
    one, two = stored(folder, "one", 1, []), stored(folder, "two", 2, [])
    assert find_run(one.name, folder) == one
    assert find_run("20261121-093001", folder) == one
    assert find_run("last", folder) == two
    assert find_run(str(one), tmp_path / "elsewhere") == one
    with pytest.raises(RunError, match=r"2 runs begin so \(20261121-093001-one-abc, 2026"):
        find_run("2026", folder)
    with pytest.raises(RunError, match=r"there is no such run in .*; see `hansa ls`"):
        find_run("nothing", folder)
    with pytest.raises(RunError, match="there are no runs yet"):
        find_run("last", tmp_path / "elsewhere")


def test_last_is_the_run_started_last_also_within_a_second(folder: Path) -> None:
    late, early = (folder / f"20261121-093000-{name}-abc" for name in ("a", "b"))
    for directory in (early, late):
        RunStore.create(directory, name="x", seed=0, recipe="", facts={}).close()
        time.sleep(0.02)  # so that the files' times differ
    assert find_run("last", folder) == late


# The program.


def test_help_is_quick_and_tells_exit_codes_and_examples() -> None:
    program = (
        "import sys; from hansa.cli import main\n"
        "code = main(['--help']) + main(['ls']) + main(['run', '--help'])\n"
        "assert 'torch' not in sys.modules and 'matplotlib' not in sys.modules, 'slow'\n"
        "sys.exit(code)"
    )
    made = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    for cls in _subclasses(HansaError):
        assert f"{cls.exit_code}: " in made.stdout
    assert "hansa run study.toml" in made.stdout
    assert "env var: HANSA_RUNS" in made.stdout
    assert "default: runs" in made.stdout


def _subclasses(cls: type[HansaError]) -> list[type[HansaError]]:
    return [cls, *(each for sub in cls.__subclasses__() for each in _subclasses(sub))]


@pytest.mark.parametrize(
    "name", ["run", "resume", "new", "strategies", "ls", "show", "compare", "export", "report", "config show"]
)
def test_every_command_has_help(name: str, command: Command) -> None:
    said = command(*name.split(), "--help")
    assert said.code == 0
    assert f"Usage: hansa {name}" in said.out
    assert "--json" in said.out


def test_the_program_without_arguments_and_its_version(command: Command) -> None:
    assert "Usage: hansa" in command().out
    assert "Usage: hansa config" in command("config").out
    assert command("--version").out == f"hansa {hansa.__version__}\n"
    assert command("fly").code == 2
    assert (
        command("fly", "--json").envelope["error"]["message"] == "No such command 'fly'; see `hansa --help`"
    )


def test_a_command_that_is_none_or_incomplete(command: Command) -> None:
    said = command("rnu")
    assert (said.code, said.err) == (
        2,
        "hansa: No such command 'rnu'. Did you mean 'run'? see `hansa --help`\n",
    )
    said = command("local")
    assert (said.code, said.err) == (2, "")
    assert "down" in said.out


def test_resuming_at_a_coordinator_changes_nothing(command: Command) -> None:
    said = command("resume", "some-run", "--on", "local", "-c", "engine.chunk=2")
    assert said.code == 2
    assert "--config = 'engine.chunk=2': a coordinator's run goes on as it began" in said.err


def test_a_coordinator_elsewhere_asks_for_a_certificate(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HANSA_IDENTITY", raising=False)
    said = command("run", "--on", "fl.example.org:8443")
    assert said.code == 2
    assert "name the folder of your certificate in HANSA_IDENTITY" in said.err


def test_a_reader_that_has_gone_is_no_error() -> None:
    program = f"{sys.executable} -m hansa --help | true"
    made = subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=True)
    assert made.stderr == ""


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (("run", "--on", "local", "--profile"), "--profile: where the time went is told of simulations"),
        (("run", "--on", "local", "--no-report"), "--no-report: a coordinator's run has no report"),
        (("run", "--on", "local", "--runs", "x"), "--runs = 'x': the coordinator writes the run directory"),
        (("resume", "r", "--on", "local", "--profile"), "--profile: where the time went is told"),
        (("run", "--wait-for", "3"), "--wait-for = 3: virtual clients are always there"),
    ],
)
def test_options_that_nothing_would_heed_are_refused(
    given: tuple[str, ...], why: str, command: Command
) -> None:
    said = command(*given)
    assert said.code == 2
    assert f"hansa: {why}" in said.err


def test_the_dashboard_names_its_own_option(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HANSA_IDENTITY", raising=False)
    for where in ("local", "fl.example.org:8443"):
        said = command("ui", "--server", where)
        assert said.code == 2
        assert said.err.startswith("hansa: --server = ")


@pytest.mark.parametrize(
    ("given", "code", "why"),
    [
        (("show", "a" * 300), 5, "there is no such run"),
        (("show", ""), 5, "no name: there is no such run"),
        (("new", "."), 2, "NAME = '.': it names no file"),
        (("new", ""), 2, "it names no file"),
        (("compare", "last", "--target", "nan"), 2, "--target = nan: it must be finite"),
        (("local", "up", "--folder", "file"), 2, "--folder = 'file': it cannot be made"),
        (("local", "up", "--folder", "left"), 2, "--folder = 'left': what an earlier one left is in it"),
    ],
)
def test_names_that_name_nothing(
    given: tuple[str, ...], code: int, why: str, folder: Path, command: Command
) -> None:
    Path("file").write_text("")
    Path("left/pki").mkdir(parents=True)
    RunStore.create(folder / "alone", name="alone", seed=0, recipe="", facts={}).close()
    said = command(*given)
    assert (said.code, said.out) == (code, "")
    assert why in said.err


def test_a_new_recipe_says_how_it_is_run_whatever_its_name(command: Command) -> None:
    assert "`hansa run 'a study.toml'`" in command("new", "a study").out
    assert "hansa run 'a study.toml' -c" in Path("a study.toml").read_text()


def test_a_reader_that_has_seen_enough_of_the_help_is_no_error() -> None:
    """A pipe whose other end is closed before anything is written."""
    reader, writer = os.pipe()
    os.close(reader)
    said = subprocess.run([sys.executable, "-m", "hansa", "--help"], stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (said.returncode, said.stderr) == (0, b"")
