from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import kstest, spearmanr

from hansa.core.data import FederatedData, load, partition
from hansa.core.errors import InputError
from hansa.core.recipe import parse
from hansa.simulation.population import Population

MANY = 2_000  # four standard errors of a share p: 4 √(p (1 − p) / 2000) < 0.045


def speeds(population: Population, seed: int = 0) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.array([population.slowness(seed, client) for client in range(MANY)])


def test_equal_devices() -> None:
    assert set(speeds(Population(spread=9.0))) == {1.0}


def test_uniform_slowness() -> None:
    drawn = speeds(Population(speeds="uniform", spread=5.0))
    assert kstest(drawn, "uniform", (1.0, 4.0)).pvalue > 0.01


def test_lognormal_slowness_holds_95_percent_between_the_roots_of_the_spread() -> None:
    logs = np.log(speeds(Population(speeds="lognormal", spread=16.0)))
    assert kstest(logs, "norm", (0.0, math.log(4.0) / 1.96)).pvalue > 0.01
    assert float(np.mean(np.abs(logs) < math.log(4.0))) == pytest.approx(0.95, abs=0.02)


def test_a_share_is_slow() -> None:
    drawn = speeds(Population(speeds="slow_share", spread=10.0, slow_share=0.3))
    assert set(drawn) == {1.0, 10.0}
    assert float(np.mean(drawn == 10.0)) == pytest.approx(0.3, abs=0.045)


def test_a_device_is_the_same_for_all_its_jobs_and_jitter_belongs_to_the_job() -> None:
    still = Population(step_time=0.2, speeds="uniform", spread=5.0)
    assert still.step_seconds(3, 7, 0) == still.step_seconds(3, 7, 1) == 0.2 * still.slowness(3, 7)
    assert still.slowness(3, 7) != still.slowness(4, 7)
    shaky = Population(jitter=0.5)
    logs = np.log([shaky.step_seconds(0, 5, number) for number in range(MANY)])
    assert kstest(logs, "norm", (0.0, 0.5)).pvalue > 0.01
    assert shaky.step_seconds(0, 5, 9) == math.exp(logs[9])


def test_a_trip_takes_latency_and_bandwidth() -> None:
    assert Population(latency=0.5, bandwidth=100.0).trip(250) == 3.0
    assert Population(latency=0.5).trip(250) == 0.5


def test_dropouts_come_with_their_probability_at_any_moment() -> None:
    population = Population(dropout=0.3)
    drops = [population.drops_at(0, client, 1) for client in range(MANY)]
    moments = [each for each in drops if each is not None]
    assert len(moments) / MANY == pytest.approx(0.3, abs=0.045)
    assert kstest(moments, "uniform").pvalue > 0.01
    assert population.drops_at(0, 4, 1) == population.drops_at(0, 4, 1)
    assert [population.drops_at(0, c, 2) for c in range(40)] != drops[:40]
    assert Population().drops_at(0, 4, 1) is None


def test_availability_is_one_stretch_of_each_period() -> None:
    population = Population(availability=0.25, period=8.0)
    at_start = []
    for client in range(400):
        changes = list(itertools.islice(population.changes(0, client), 6))
        moments, states = [m for m, _ in changes], [s for _, s in changes]
        assert moments[0] == 0.0
        assert states == [states[0] ^ bool(i % 2) for i in range(6)]
        ups = [b - a for (a, there), (b, _) in itertools.pairwise(changes[1:]) if there]
        downs = [b - a for (a, there), (b, _) in itertools.pairwise(changes[1:]) if not there]
        assert ups == pytest.approx([2.0] * 2)
        assert downs == pytest.approx([6.0] * 2)
        assert 0 < moments[1] <= (2.0 if states[0] else 6.0) + 1e-9
        at_start.append(states[0])
    assert np.mean(at_start) == pytest.approx(0.25, abs=0.1)  # phases are spread over the period


def test_a_client_that_is_always_there_never_changes() -> None:
    assert list(Population().changes(0, 3)) == [(0.0, True)]


def test_exponential_and_pareto_slowness() -> None:
    drawn = speeds(Population(speeds="exponential", spread=4.0))
    assert kstest(drawn, "expon", (0.0, 4.0)).pvalue > 0.01
    shifted = speeds(Population(speeds="shifted_exponential", spread=4.0))
    assert kstest(shifted, "expon", (1.0, 3.0)).pvalue > 0.01
    heavy = speeds(Population(speeds="pareto", spread=10.0))
    shape = math.log(20) / math.log(10)
    assert kstest(heavy, "pareto", (shape,)).pvalue > 0.01
    assert float(np.mean(heavy < 10)) == pytest.approx(0.95, abs=0.02)


@pytest.mark.parametrize(
    ("law", "jitter", "reference"),
    [
        ("exponential", 1.0, ("expon", (0.0, 1.0))),
        ("exponential", 0.2, ("expon", (0.8, 0.2))),
        ("pareto", 0.25, ("pareto", (4.0, 0.0, 0.75))),
    ],
)
def test_laws_of_jitter_have_a_mean_of_one(law: Any, jitter: float, reference: Any) -> None:
    population = Population(jitter=jitter, jitter_law=law)
    drawn = [population.step_seconds(0, 5, number) for number in range(MANY)]
    assert kstest(drawn, *reference).pvalue > 0.01
    assert np.mean(drawn) == pytest.approx(1.0, abs=0.1)


def test_clients_with_more_zones_apart_come_and_go_together() -> None:
    together = Population(availability=0.5, period=24.0, zones=0.0)
    assert {next(iter(together.changes(0, client)))[1] for client in range(50)} == {True}
    changes = [next(itertools.islice(together.changes(0, client), 1, None)) for client in range(50)]
    assert changes == [(12.0, False)] * 50


def test_batteries_are_charged_for_exponential_times() -> None:
    population = Population(availability=0.25, period=8.0, pattern="battery")
    changes = list(itertools.islice(population.changes(0, 3), 4_001))
    lengths = np.diff([moment for moment, _ in changes])
    there = np.array([state for _, state in changes[:-1]])
    assert list(there) == [bool(there[0]) ^ bool(i % 2) for i in range(4_000)]
    assert kstest(lengths[there], "expon", (0.0, 2.0)).pvalue > 0.01
    assert kstest(lengths[~there], "expon", (0.0, 6.0)).pvalue > 0.01


def written(path: Path, *lines: str) -> str:
    path.write_text("\n".join(lines))
    return str(path)


@pytest.mark.parametrize(
    "fields",
    [
        {"availability": 0.5},
        {"availability": 0.3, "zones": 0.2, "period": 100.0},
        {"availability": 0.9, "zones": 0.0},
        {"availability": 0.5, "pattern": "battery"},
        {"pattern": "traces", "sessions": ["device,start,end", "a,0,4", "b,3,5", "b,8,9"], "period": 10.0},
        {"speeds": "traces", "devices": ["slowness,availability", "1,1", "2,0.25"]},
    ],
)
def test_first_changes_of_many_are_those_of_each(fields: dict[str, Any], tmp_path: Path) -> None:
    for key in ("sessions", "devices"):
        if key in fields:
            (tmp_path / key).write_text("\n".join(fields[key]))
            fields = {**fields, key: str(tmp_path / key)}
    population = Population(**fields)
    there, moments, comes = population.first_changes(3, 300)
    for client in range(300):
        each = list(itertools.islice(population.changes(3, client), 2))
        assert each[0] == (0.0, there[client])
        assert [(moments[client], comes[client])] == (each[1:] or [(math.inf, True)])


def test_devices_of_a_file(tmp_path: Path) -> None:
    file = written(tmp_path / "d.csv", "slowness,up,down,availability", "2,100,200,1", "5,10,20,0.5")
    population = Population(speeds="traces", devices=file, step_time=0.1, latency=1.0, period=10.0)
    assert not population.always_there
    seen = set()
    for client in range(30):
        slow = population.slowness(0, client)
        seen.add(slow)
        assert population.step_seconds(0, client, 4) == pytest.approx(0.1 * slow)
        expected = (2.0, 2.0) if slow == 2 else (11.0, 11.0)
        assert population.journey(0, client, 200, 100) == pytest.approx(expected)
        comings = list(itertools.islice(population.changes(0, client), 3))
        assert len(comings) == (1 if slow == 2 else 3)
    assert seen == {2.0, 5.0}
    assert Population(
        speeds="traces", devices=written(tmp_path / "e.csv", "slowness", "1"), bandwidth=10.0
    ).journey(0, 0, 5, 20) == (0.5, 2.0)


def test_sessions_of_a_file_repeat(tmp_path: Path) -> None:
    file = written(tmp_path / "s.csv", "device,start,end", "a,0,2", "a,5,6", "b,3,10")
    population = Population(pattern="traces", sessions=file, period=10.0)
    seen = set()
    for client in range(20):
        changes = tuple(itertools.islice(population.changes(0, client), 6))
        seen.add(changes)
    assert seen == {
        ((0.0, True), (2.0, False), (5.0, True), (6.0, False), (10.0, True), (12.0, False)),
        ((0.0, False), (3.0, True), (10.0, False), (13.0, True), (20.0, False), (23.0, True)),
    }


def test_fast_devices_may_go_to_the_low_labels_or_to_little_data() -> None:
    def federation(kind: dict[str, Any]) -> FederatedData:
        recipe = parse({"data": {"limit": 400}, "partition": kind})
        return partition(recipe.partition, *load(recipe.data, 0), 0)

    base = Population(speeds="uniform", spread=9.0)
    labels = federation({"kind": "classes", "clients": 20, "classes_per_client": 1})
    dealt = dataclasses.replace(base, follows="label").dealt(labels, 3)
    counts = labels.counts()
    assert counts is not None
    slowness = [dealt.slowness(3, client) for client in range(20)]
    assert sorted(slowness) == sorted(base.slowness(3, client) for client in range(20))
    assert spearmanr(slowness, counts.argmax(1)).statistic > 0.98  # but for clients of the same label
    sizes = federation({"kind": "quantity", "clients": 20})
    dealt = dataclasses.replace(base, follows="examples").dealt(sizes, 3)
    slowness = [dealt.slowness(3, client) for client in range(20)]
    assert spearmanr(slowness, sizes.train_shards.sizes).statistic > 0.98
    assert base.dealt(labels, 3) is base


@pytest.mark.parametrize(
    ("key", "lines", "problem"),
    [
        ("devices", ["speed", "1"], "no column 'slowness'"),
        ("devices", ["slowness"], "nobody is in it"),
        ("devices", ["slowness", "fast"], "line 2 has slowness 'fast'"),
        ("devices", ["slowness,availability", "1,0"], "line 2 has availability 0"),
        ("devices", ["slowness", "1", "inf"], "line 3 has slowness inf"),
        ("sessions", ["device,start,end", "a,5,5"], "line 2 is there from 5 to 5"),
        ("sessions", ["device,start,end", "a,5,12"], "stay within 0 to 10"),
        ("sessions", ["device,start,end", "a,5,8", "a,7,9"], "line 3 begins before"),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, key: str, lines: list[str], problem: str) -> None:
    file = written(tmp_path / "f.csv", *lines)
    table: dict[str, Any] = {"devices": {"speeds": "traces"}, "sessions": {"pattern": "traces"}}[key]
    with pytest.raises(InputError, match=problem) as caught:
        Population(**{**table, key: file, "period": 10.0})
    assert caught.value.field == f"population.{key}"


def test_files_and_words_belong_together(tmp_path: Path) -> None:
    file = written(tmp_path / "f.csv", "slowness", "1")
    tables: list[dict[str, Any]] = [
        {"speeds": "traces"},
        {"devices": file},
        {"speeds": "traces", "devices": "no.csv"},
    ]
    for fields in tables:
        with pytest.raises(InputError, match=r"population\.devices"):
            Population(**fields)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("zones", 1.5),
        ("step_time", 0.0),
        ("step_time", math.inf),
        ("period", -1.0),
        ("bandwidth", 0.0),
        ("jitter", -0.1),
        ("latency", math.nan),
        ("latency", math.inf),
        ("recovery", -1.0),
        ("spread", 0.5),
        ("dropout", 1.0),
        ("dropout", -0.1),
        ("slow_share", 1.1),
        ("availability", 0.0),
        ("availability", 1.5),
    ],
)
def test_impossible_devices_are_refused(field: str, value: float) -> None:
    with pytest.raises(InputError, match=rf"population\.{field} = "):
        Population(**{field: value})  # type: ignore[arg-type]
