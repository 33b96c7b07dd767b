"""The pages Runs, Run and Compare: empty, small, large, live, failing."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from streamlit.testing.v1 import AppTest

from hansa.core.errors import InputError, RunError
from hansa.core.recipe import parse
from hansa.core.store import ClientScores, Participation, Round, RunStore, runs
from hansa.ui.launch import Launcher
from hansa.ui.site import Site, configure
from hansa.ui.source import Folder, Run

MARKUP = "<script>alert(1)</script> **bold** :red[x]"


def write(
    directory: Path,
    *,
    name: str = "study",
    seed: int = 0,
    rounds: int = 3,
    clients: int = 4,
    accuracy: float = 0.2,
) -> RunStore:
    """A run whose accuracy rises by ``accuracy`` a round, and which is not told to have ended."""
    recipe = (
        f'name = "{name}"\nseed = {seed}\n[algorithm]\nname = "fedavg"\n[stop]\nrounds = {2 * rounds or 1}\n'
    )
    facts = {"algorithm": "fedavg", "schedule": "rounds", "clients": str(clients)}
    store = RunStore.create(directory, name=name, seed=seed, recipe=recipe, facts=facts)
    for index in range(1, rounds + 1):
        store.append(
            Round(
                index=index,
                time=5.0 * index,
                wall=1.0 * index,
                bytes_up=1000,
                bytes_down=1000,
                metrics={
                    "accuracy": min(1.0, accuracy * index),
                    "loss": 1.0 / index,
                    "gossip/consensus": 2.0,
                },
                participants=[
                    Participation(
                        client=client,
                        phase="train",
                        examples=5,
                        steps=1,
                        staleness=client % 2,
                        weight=1.0,
                        dispatched=5.0 * index - 5,
                        returned=5.0 * index - 1,
                        loss=0.1,
                        outcome="folded",
                    )
                    for client in range(min(clients, 5))
                ],
                clients=ClientScores(
                    client=np.arange(clients),
                    examples=np.ones(clients, np.int64),
                    accuracy=np.linspace(0, 1, clients),
                    loss=np.zeros(clients),
                ),
                movement={"head.weight": (0.1, 1.0), "head.bias": (0.2, 1.0)},
            )
        )
    store.event(1.0, "joined", MARKUP, client=1)
    return store


def runs_page() -> None:
    from hansa.ui.pages import runs

    runs.page()


def run_page() -> None:
    from hansa.ui.pages import run

    run.page()


def compare_page() -> None:
    from hansa.ui.pages import compare

    compare.page()


def clients_page() -> None:
    from hansa.ui.pages import clients

    clients.page()


def opened(script: Any, source: Folder, **query: str | list[str]) -> AppTest:
    configure(Site(source=source))
    app = AppTest.from_function(script, default_timeout=120)
    for name, value in query.items():
        app.query_params[name] = value
    app.run()
    assert not app.exception
    return app


def texts(app: AppTest) -> str:
    shown = [*app.markdown, *app.caption, *app.error, *app.warning, *app.info]
    return "\n".join(str(each.value) for each in shown)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two seeds of one recipe, another recipe, a live run, and a directory that is none."""
    for name, seed in (("a0", 0), ("a1", 1)):
        with write(tmp_path / name, seed=seed, accuracy=0.2 + 0.1 * seed) as store:
            store.finish("finished")
    with write(tmp_path / "b0", name="other", rounds=2, accuracy=0.1) as store:
        store.finish("failed", "client 3: its loss is not finite")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "recipe.toml").write_text("x = 1")
    return tmp_path


@pytest.fixture
def live(folder: Path) -> Iterator[RunStore]:
    with write(folder / "live", name="live") as store:
        yield store


@pytest.mark.parametrize("script", [runs_page, run_page, compare_page])
@pytest.mark.parametrize("there", [True, False])
def test_an_empty_folder_says_what_to_do_next(script: Any, there: bool, tmp_path: Path) -> None:
    app = opened(script, Folder(tmp_path if there else tmp_path / "absent"))
    assert "`hansa run`" in texts(app)


def test_runs_are_listed_with_what_is_the_matter(folder: Path, live: RunStore) -> None:
    app = opened(runs_page, Folder(folder))
    table = app.dataframe[0].value.set_index("id")
    assert table["status"].to_dict() == {
        "a0": "finished", "a1": "finished", "b0": "failed", "live": "running", "odd": "unreadable",
    }  # fmt: skip
    assert table["score"]["a1"] == "90.00 %"
    assert table["progress"]["live"] == 50
    assert "not finite" in table["note"]["b0"]
    assert "is not a run directory" in table["note"]["odd"]
    app.text_input(key="search").set_value("OTHER").run()
    assert list(app.dataframe[0].value["id"]) == ["b0"]


def test_a_live_run_moves_without_a_reload(folder: Path, live: RunStore) -> None:
    app = opened(run_page, Folder(folder), run="live")
    assert "#### 3" in texts(app)
    live.truncate(2)
    app.run()
    assert "#### 2" in texts(app)
    live.finish("interrupted", "stopped on request")
    live.close()
    app.run()
    assert "stopped on request" in texts(app)


@pytest.mark.parametrize("part", ["Progress", "Clients", "Participation", "Layers", "Log", "Recipe"])
def test_every_part_of_a_run_is_drawn(part: str, folder: Path) -> None:
    app = opened(run_page, Folder(folder), run="a1")
    app.session_state["part"] = part
    app.run()
    assert not app.exception
    assert not app.error
    drawn = len(app.get("vega_lite_chart")) + len(app.get("arrow_vega_lite_chart")) + len(app.dataframe)
    assert drawn


def test_markup_of_others_is_text(folder: Path) -> None:
    app = opened(run_page, Folder(folder), run="a0")
    app.session_state["part"] = "Log"
    app.run()
    assert MARKUP in list(app.dataframe[0].value["what"])  # a table takes no markup
    assert MARKUP not in texts(app)
    app = opened(run_page, Folder(folder), run=MARKUP)
    assert "\\<script\\>" in texts(app)


def test_a_run_without_metrics_says_so(tmp_path: Path) -> None:
    with write(tmp_path / "new", rounds=0):
        for part in ("Progress", "Clients", "Participation", "Layers"):
            app = opened(run_page, Folder(tmp_path), run="new")
            app.session_state["part"] = part
            app.run()
            assert not app.exception
            assert not app.get("vega_lite_chart")
        assert "Nothing yet" in texts(app)


def test_a_run_that_ended_before_its_first_round_is_not_under_way(tmp_path: Path) -> None:
    with write(tmp_path / "ended", rounds=0) as store:
        store.finish("failed", "the loss is not finite")
    for script, part in ((run_page, "Progress"), (run_page, "Layers"), (clients_page, "")):
        app = opened(script, Folder(tmp_path), run="ended")
        app.session_state["part"] = part or "Progress"
        app.run()
        assert not app.exception
        assert "ended before its first round" in texts(app)
        assert "appear" not in texts(app).replace("The model and", "")


def test_the_numbers_beside_the_statuses_move_with_the_runs(folder: Path, live: RunStore) -> None:
    app = opened(runs_page, Folder(folder))
    assert counted(app) == {"running": 1, "finished": 2, "failed": 1, "unreadable": 1}
    app.button_group(key="statuses").set_value(["running"]).run()
    live.finish("finished")
    live.close()
    app.run()
    assert counted(app) == {"running": 0, "finished": 3, "failed": 1, "unreadable": 1}
    assert "No run fits" in texts(app)


def counted(app: AppTest) -> dict[str, int]:
    """What the page says: how many runs stand how."""
    told = [each.content.split(" ") for each in app.button_group(key="statuses").proto.options]
    return {status: int(count) for status, count in told}


def test_a_report_that_nobody_wrote_is_not_offered(folder: Path) -> None:
    def offered() -> bool:
        app = opened(run_page, Folder(folder), run="a0")
        (button,) = (each for each in app.get("download_button") if "Report" in str(each.proto))
        return "disabled: true" not in str(button.proto)

    assert not offered()
    (folder / "a0" / "report.html").write_text("<html>")
    assert offered()


def test_a_run_that_is_gone_leaves_the_others_side_by_side(folder: Path) -> None:
    app = opened(compare_page, Folder(folder), run=["a0", "b0"])
    source = Folder(folder)
    listed = source.runs()
    shutil.rmtree(folder / "b0")
    source.runs = lambda: listed  # type: ignore[method-assign] # between two looks at the list
    app = opened(compare_page, source, run=["a0", "b0"])
    assert "is not a run directory" in texts(app).replace("\\", "")
    assert list(app.dataframe[0].value["recipe"]) == ["study · fedavg"]


@pytest.mark.parametrize(
    ("damage", "problem"),
    [("UPDATE schema_version SET version = 99", "newer Hansa"), ("DROP TABLE metrics", "no such table")],
)
def test_a_damaged_run_is_told_and_the_page_goes_on(folder: Path, damage: str, problem: str) -> None:
    with closing(sqlite3.connect(folder / "a0" / "run.db")) as connection:
        connection.execute(damage)
        connection.commit()
    app = opened(run_page, Folder(folder), run="a0")
    assert problem in texts(app).replace("\\", "")
    assert (
        opened(runs_page, Folder(folder)).dataframe[0].value.set_index("id")["status"]["a0"] == "unreadable"
    )


def test_seeds_share_a_line_and_costs_are_told(folder: Path) -> None:
    """0.2, 0.4, 0.6 and 0.3, 0.6, 0.9: last 75 % ± 21.21 %; to 50 % it takes rounds 3 and 2."""
    app = opened(compare_page, Folder(folder), run=["a0", "a1", "b0"])
    app.number_input[0].set_value(50.0).run()
    rows = app.dataframe[0].value.set_index("recipe").to_dict("index")
    same = rows["study · fedavg"]
    assert (same["runs"], same["seeds"]) == (2, "0, 1")
    assert same["last accuracy"] == "75.00 % ± 21.21 %"
    assert (same["rounds to target"], same["bytes to"]) == ("2.5", "5.00 kB")
    assert rows["other · fedavg"]["rounds to target"] == "not reached"


def test_a_large_folder_is_listed(tmp_path: Path) -> None:
    for i in range(60):
        with write(tmp_path / f"r{i:02d}", seed=i, rounds=1, clients=2) as store:
            store.finish("finished")
    app = opened(runs_page, Folder(tmp_path))
    assert len(app.dataframe[0].value) == 60


def test_a_run_is_steered_by_its_process(
    folder: Path, live: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[int, int]] = []
    monkeypatch.setattr("hansa.ui.launch.os.kill", lambda process, number: told.append((process, number)))
    app = opened(runs_page, Folder(folder))
    app.button(key="stop live").click().run()
    assert told == [(os.getpid(), signal.SIGTERM)]


def test_what_waits_begins_when_the_dashboard_is_there_again(tmp_path: Path) -> None:
    small = {
        "data": {"limit": 60},
        "partition": {"kind": "iid", "clients": 2},
        "schedule": {"cohort": 2},
        "stop": {"rounds": 1},
    }
    before = Launcher(tmp_path, parallel=0)
    for name in ("first", "second"):
        assert before.start(parse({"name": name, **small}).toml()) == name
    del before
    after = Launcher(tmp_path)
    assert [each.name for each in after.waiting()] == ["first", "second"]
    assert [each.process is None for each in after.waiting()] == [False, True]
    deadline = time.monotonic() + 300
    while after.waiting() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not after.failed()
    ended = [(run.name, run.status) for run in runs(tmp_path)]
    assert ended == [("second", "finished"), ("first", "finished")]
    assert not list((tmp_path / ".queue").iterdir())


def test_a_run_that_fails_after_its_begin_is_told_of_once(tmp_path: Path) -> None:
    """Its record tells; whoever could not begin has none."""
    small = {"data": {"limit": 60}, "partition": {"kind": "iid", "clients": 2}}
    source = Folder(tmp_path)
    source.start(parse({"name": "early", **small, "schedule": {"cohort": 3}}).toml())
    source.start(parse({"name": "late", **small, "schedule": {"cohort": 2}, "train": {"lr": 1e30}}).toml())
    end = time.monotonic() + 180
    while any(run.active for run in source.runs()):
        assert time.monotonic() < end
        time.sleep(0.1)
    early, late = source.runs()
    assert (early.name, early.id, early.status) == ("early", "", "failed")
    assert early.error == "schedule.cohort = 3: there are 2 clients; use 2 or fewer"
    assert (late.name, late.status) == ("late", "failed")
    assert "train.lr = 1e+30" in (late.error or "")


def test_a_run_is_asked_to_go_on_once(folder: Path) -> None:
    launcher = Launcher(folder, parallel=0)
    launcher.resume(folder / "b0")
    with pytest.raises(RunError, match="waits for its turn already"):
        launcher.resume(folder / "b0")


def test_what_waits_lets_a_run_end_that_goes_on_from_before(tmp_path: Path) -> None:
    small = {"data": {"limit": 60}, "partition": {"kind": "iid", "clients": 2}, "schedule": {"cohort": 2}}
    long = parse({"name": "long", **small, "stop": {"rounds": 1_000_000}}).toml()
    short = parse({"name": "short", **small, "stop": {"rounds": 1}}).toml()
    dashboard = (
        "import os, sys; from pathlib import Path; from hansa.ui.launch import Launcher\n"
        "launcher = Launcher(Path(sys.argv[1]))\n"
        "launcher.start(sys.argv[2]), launcher.start(sys.argv[3])\n"
        "print(launcher.waiting()[0].process, flush=True); os._exit(0)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", dashboard, str(tmp_path), long, short], stdout=subprocess.PIPE, check=True
    )
    process = int(ended.stdout)
    try:
        again = Launcher(tmp_path)
        assert [(it.name, it.process) for it in again.waiting()] == [("long", process), ("short", None)]
        deadline = time.monotonic() + 300
        while not any(run.rounds for run in runs(tmp_path)) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert [(run.name, run.status) for run in runs(tmp_path)] == [("long", "running")]
        assert [each.process for each in again.waiting()] == [process, None]
    finally:
        os.kill(process, signal.SIGTERM)
    while again.waiting() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not again.failed()
    assert [(run.name, run.status) for run in runs(tmp_path)] == [
        ("short", "finished"),
        ("long", "interrupted"),
    ]
    assert not list((tmp_path / ".queue").iterdir())


def test_how_long_a_run_takes_yet() -> None:
    run = Run(id="x", status="running", rounds=25, total=100, wall=10.0, limit=100.0, time=50.0)
    assert (run.fraction, run.remaining) == (0.5, 10.0)  # the clock runs out first
    assert Run(id="x", status="finished", rounds=1, total=9).fraction == 1.0


def test_the_form_checks_as_the_command_line_does() -> None:
    from hansa.cli.recipes import Recipes

    recipes = Recipes()
    made = recipes.made("", {"algorithm.name": "scaffold", "stop.rounds": "7"})
    assert {("algorithm.name", '"scaffold"', '"fedavg"'), ("stop.rounds", "7", "40")} <= set(
        recipes.differences(made)
    )
    other = recipes.made(made, {"algorithm.name": "fedprox"})  # what only scaffold has is left out
    assert {each.name for each in recipes.sections(other)} >= {"algorithm", "train", "schedule"}
    with pytest.raises(InputError, match="did you mean"):
        recipes.made("", {"train.batch_sise": "1"})
