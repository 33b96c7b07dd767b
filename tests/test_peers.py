"""The peers' benchmark: what it makes of figures, and that its own two sides do one job."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from hansa.core.models import build

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
HOMES = (str(BENCHMARKS / "peers"), str(BENCHMARKS))


@pytest.fixture(scope="module")
def peers() -> Iterator[Any]:
    """``peers(name)``: a module of the benchmark, whose scripts find each other by plain names."""
    before = set(sys.modules)
    sys.path[:0] = HOMES
    yield importlib.import_module
    for home in HOMES:
        sys.path.remove(home)
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(HOMES[1]):
            del sys.modules[name]


def _side(*repetitions: list[float], losses: tuple[float, ...] = (2.0, 1.5, 1.0), failed: str = "") -> Any:
    """A side with these seconds, the warm-up first."""
    rest = {"cpu": 0.5, "peak_mb": 100.0, "threads": 1, "processes": 1, "since_start": 3.0}
    return {
        "failed": failed or None,
        "facts": {"versions": {"torch": "2.13.0"}},
        "repetitions": [
            [{"seconds": s, "loss": loss, **rest} for s, loss in zip(seconds, losses, strict=True)]
            for seconds in repetitions
        ],
    }


def _results(**sides: Any) -> Any:
    case = {"model": "mlp", "clients": 1000, "cohort": 100, "sides": sides}
    machine = {"cpu": "a processor", "cores": 2, "device": "cpu"}
    return {"machine": machine, "threads": 1, "cases": [case]}


def test_a_ratio_is_the_median_of_ratios_within_a_rotation(peers: Any) -> None:
    table = peers("table")
    fast, slow = _side([9.0, 1.0, 2.0], [9.0, 4.0, 1.0]), _side([1.0, 3.0, 8.0], [1.0, 8.0, 10.0])
    assert table.ratio(slow, fast) == 3.5  # of 3, 4, 2 and 10: without the warm-up, where slow is faster
    assert table.median(fast, "seconds") == 1.5
    assert "| 1.50 | 8.00 (3.5x) |" in table.overview(_results(hansa=fast, plain=slow))


def test_a_side_that_failed_is_told_with_its_reason(peers: Any) -> None:
    table = peers("table")
    broken = _side(failed="exit status 1: ImportError: no | such thing")
    results = _results(hansa=_side([1.0, 1.0, 1.0]), plain=_side([1.0, 2.0, 2.0]), fedml=broken)
    assert "| 1.00 | 2.00 (2.0x) | failed |" in table.overview(results)
    assert table.problems(results) == [f"mlp, 1,000 clients: fedml failed: {broken['failed']}"]
    assert "no / such thing" in table.details(results)  # a bar would break the row


@pytest.mark.parametrize(("last", "same"), [(1.019, True), (1.021, False), (float("nan"), False)])
def test_a_loss_two_percent_off_is_another_job(peers: Any, last: float, same: bool) -> None:
    table = peers("table")
    other = _side([1.0, 1.0, 1.0], losses=(2.0, 1.5, last))
    results = _results(hansa=_side([1.0, 1.0, 1.0]), plain=_side([1.0, 1.0, 1.0]), pfl=other)
    assert (table.problems(results) == []) is same
    assert ("1.00, another job" in table.overview(results)) is not same


def test_tables_go_between_their_markers_and_nowhere_else(peers: Any) -> None:
    text = "a\n<!-- other -->\nx\n<!-- end -->\n<!-- mine -->\nold\n<!-- end -->\nb\n"
    assert peers("published").replace(text, "mine", "new\n\nlines") == text.replace("old", "new\n\nlines")
    assert peers("published").replace(text, "absent", "new") == text


def test_the_picture_shows_every_side_that_ran(peers: Any, tmp_path: Path) -> None:
    results = _results(
        hansa=_side([1.0, 1.0, 1.0]), plain=_side([1.0, 2.5, 2.5]), fedml=_side(failed="broken")
    )
    peers("table").picture(results, tmp_path / "peers.svg")
    drawn = (tmp_path / "peers.svg").read_text()
    assert "<!-- plain loop -->" in drawn
    assert "<!-- 2.50 -->" in drawn
    assert "<!-- FedML -->" not in drawn


@pytest.mark.parametrize("name", ["logistic", "mlp", "leaf_cnn", "resnet18"])
def test_the_peers_models_are_those_of_hansa(peers: Any, name: str) -> None:
    x = torch.rand(2, 3, 32, 32) if name == "resnet18" else torch.rand(2, 1, 28, 28)
    ours = build(peers("hansa_side").MODELS[name], sample=x[0], outputs=10, seed=0)
    theirs = peers("models").layout(name)
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(theirs(x), ours(x), rtol=0, atol=0)


def test_plain_and_hansa_do_one_job_and_a_missing_peer_is_told(peers: Any, tmp_path: Path) -> None:
    run, table = peers("run"), peers("table")
    job = peers("preparing").prepare(
        tmp_path, model="mlp", clients=6, cohort=3, examples=20, rounds=3, pool=80
    )
    case = run.measure(job, ["hansa", "pfl", "plain"], run.PLANS["mlp"], 1, tmp_path, 100.0)
    assert "No such file" in case["sides"]["pfl"]["failed"]  # there is no environment of it
    losses = {name: [each["loss"] for each in case["sides"][name]["repetitions"][0]] for name in run.OURS}
    assert len(losses["hansa"]) == 3
    assert losses["plain"][0] > losses["plain"][1] > losses["plain"][2]
    assert table.gaps(case)["hansa"] < table.TOLERANCE
    for side in run.OURS:
        last = case["sides"][side]["repetitions"][0][-1]
        assert last["cpu"] > 0
        assert last["peak_mb"] > 50  # Python and torch
        assert last["processes"] == 1
