"""The coordinator and the simulator are two engines of one hub: the same recipe gives the same model."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from floor import Floor, checked, end, play, small, submit

from hansa.core.recipe import Recipe, parse
from hansa.core.store import RunStore
from hansa.simulation.simulator import Simulator
from hansa.strategies.catalog import assemble

PLAIN = {"name": "mlp", "hidden": [6]}
SYNCHRONOUS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "fedavg": {"model": PLAIN},
    "dropout": {"model": {**PLAIN, "dropout": 0.3}},
    "scaffold": {"algorithm": {"name": "scaffold"}},
    "fedbn": {"algorithm": {"name": "fedbn"}},
    "selective": {"algorithm": {"name": "selective", "budget": [1, 2]}, "model": PLAIN},
    "fraug": {"algorithm": {"name": "fraug"}, "stop": {"rounds": 2}, "engine": {"mode": "sequential"}},
    "multikrum": {
        "aggregation": {"rule": "multikrum", "f": 1, "selected": 3},
        "schedule": {"cohort": 6},
        "model": PLAIN,
    },
}


def simulated(recipe: Recipe) -> Mapping[str, torch.Tensor]:
    simulator = Simulator(assemble(recipe))
    simulator.run()
    return simulator.hub.model()


@pytest.mark.parametrize("name", SYNCHRONOUS)
def test_synchronous_runs_give_the_simulators_model(floor: Floor, name: str) -> None:
    recipe = small(**SYNCHRONOUS[name])

    async def scene() -> str:
        async with floor.coordinator() as control, floor.agents(3):
            run = await submit(control, recipe)
            rounds, status = await end(control, run)
            assert status.status == "finished"
            assert [each.index for each in rounds] == list(range(1, recipe.stop.rounds + 1))
            return run

    run = play(scene())
    found, expected = floor.model(run), simulated(recipe)
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-5, atol=1e-5)
    assert checked(floor, run).updates == recipe.stop.rounds * recipe.schedule["cohort"] * (
        2 if name == "selective" else 1
    )
    with RunStore.open(floor.runs / run) as store:
        assert store.summary().status == "finished"
        assert parse(tomllib.loads(store.recipe)).train == recipe.train
