"""The bias to fast clients on quadratics ½ (w − b_i)² with known optimum, and what remedies leave of it.

Ten clients, speeds 1 to 5, whose minima are opposed to their speed, under asynchronous FedAvg, FedFix and
FedBuff; and thirty, a third of them eight times as fast, under FAVANO. A cell is the distance of the mean
iterate of a run's second half to the mean of the b_i.

    python benchmarks/bias.py --write docs/claims.md
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import published
import torch
from trials import table

from hansa.core.algorithm import Algorithm
from hansa.core.data import Examples, FederatedData, Shards
from hansa.core.recipe import parse
from hansa.core.schedule import Schedule, Stopping
from hansa.core.task import LocalSGD, LocalWork, Task, regression
from hansa.core.weights import Weights
from hansa.simulation.population import Population
from hansa.simulation.simulator import Simulator
from hansa.strategies.buffered import Buffered
from hansa.strategies.catalog import Federation
from hansa.strategies.favano import FAVANO
from hansa.strategies.fedavg import FedAvg
from hansa.strategies.frequencies import frequencies
from hansa.strategies.periodic import Periodic

SECONDS, MINIMA = np.linspace(1.0, 0.2, 10).tolist(), np.linspace(-2.5, 2.5, 10).tolist()
SCHEMES: Sequence[tuple[str, Schedule, float]] = (
    (
        "asynchronous FedAvg, 800 steps",
        Buffered(stop=Stopping(rounds=800), k=1, concurrency=10),
        0.04,
    ),
    ("FedFix, Δt = 0.5, 200 steps", Periodic(stop=Stopping(rounds=200), interval=0.5), 0.5),
    ("FedBuff, K = 5, 400 steps", Buffered(stop=Stopping(rounds=400), k=5, concurrency=10), 0.15),
)


@dataclass(frozen=True, kw_only=True)
class Paced(Population):
    """Devices whose local steps take so many seconds."""

    seconds: tuple[float, ...]

    def slowness(self, seed: int, client: int) -> float:
        """Seconds of a step, where the fastest kind takes one."""
        return self.seconds[client]


def bias(
    algorithm: Algorithm,
    schedule: Schedule,
    seconds: Sequence[float],
    minima: Sequence[float],
    *,
    lr: float,
    steps: int = 1,
    start: float = 0.0,
    mode: str = "fused",
) -> float:
    """Distance of the mean iterate to the optimum, the mean of ``minima``."""
    n, half = len(minima), math.sqrt(0.5)
    examples = Examples(
        x=torch.full((n, 1), half, dtype=torch.float64),
        y=half * torch.tensor(minima, dtype=torch.float64)[:, None],
        classes=None,
    )
    shards = Shards(torch.arange(n), torch.arange(n + 1))
    module = torch.nn.Linear(1, 1, bias=False, dtype=torch.float64)
    torch.nn.init.constant_(module.weight, start)
    federation = Federation(
        recipe=parse(
            {
                "engine": {"mode": mode, "dtype": "float64"},
                "evaluation": {"every": 10**6, "clients": 0},
            }
        ),
        task=Task(module, regression, local=LocalSGD(lr=lr), dtype=torch.float64),
        algorithm=algorithm,
        schedule=schedule,
        topology=None,
        data=FederatedData(train=examples, test=examples, train_shards=shards, test_shards=shards),
        work=LocalWork(steps=steps, batch_size=1),
    )
    found: list[float] = []
    simulator = Simulator(
        federation,
        Paced(seconds=tuple(seconds)),
        on_round=lambda _: found.append(float(simulator.hub.model()["weight"])),
    )
    simulator.run()
    return abs(float(np.mean(found[len(found) // 2 :])) - float(np.mean(minima)))


def weighted() -> str:
    """Weights p/f, known and estimated."""
    rows = []
    for name, schedule, server_lr in SCHEMES:

        def left(frequency: Any, schedule: Schedule = schedule, server_lr: float = server_lr) -> str:
            known = frequencies(schedule, SECONDS) if frequency == "known" else ()
            weights = Weights(target="uniform", frequency=frequency, frequencies=known)
            algorithm = FedAvg(server_lr=server_lr, weights=weights)
            return f"{bias(algorithm, schedule, SECONDS, MINIMA, lr=0.2):.4f}"

        always = left("always") if isinstance(schedule, Periodic) else "–"
        rows.append([name, left("equal"), always, left("known"), left("estimated")])
    return table(["quadratics", "unweighted", "d_i = p_i", "p/f known", "p/f estimated"], rows)


def reweighted() -> str:
    """FAVANO at small steps, from the optimum."""
    seconds, minima = [2.0] * 10 + [16.0] * 20, [1.0] * 10 + [-1.0] * 20
    schedule, start = Periodic(stop=Stopping(rounds=200), interval=7.0, recall=6), float(np.mean(minima))
    kinds = ("none", "deterministic", "stochastic")
    left = [
        bias(
            FAVANO(reweighting=kind),
            schedule,
            seconds,
            minima,
            lr=0.02,
            steps=20,
            start=start,
            mode="batched",
        )
        for kind in kinds
    ]
    row = ["FAVANO, 200 ticks", *(f"{each:.4f}" for each in left)]
    return table(["quadratics", "without reweighting", *kinds[1:]], [row])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", type=Path, help="file whose tables to replace")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name, text in (("bias weights table", weighted()), ("bias favano table", reweighted())):
        print(f"{text}\n", flush=True)
        if arguments.write:
            published.write(arguments.write, name, text)


if __name__ == "__main__":
    main()
