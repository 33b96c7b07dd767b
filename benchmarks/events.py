"""Events per second of the virtual clock and the schedule, without learning: 1,000 clients at work.

A one-number model; a client's step is left out, so that what is timed is the heap, the schedule, the hub's
books and the record. An event is an arrival, with the dispatch that follows it: FedBuff makes a step of the
hub of ``--k`` of them, FedAsync one of each.

    python benchmarks/events.py
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Iterator, Sequence
from typing import ClassVar
from unittest import mock

import torch

from hansa.core.algorithm import Algorithm
from hansa.core.data import Examples, FederatedData, Shards
from hansa.core.recipe import parse
from hansa.core.schedule import Stopping
from hansa.core.task import LocalWork, Task, regression
from hansa.simulation import simulator as engine
from hansa.simulation.cohort import Results, Stacked, Work
from hansa.simulation.population import Population
from hansa.strategies.buffered import Buffered
from hansa.strategies.catalog import Federation
from hansa.strategies.fedasync import FedAsync
from hansa.strategies.fedbuff import FedBuff


class Idle:
    """A trainer that hands every model back as it came."""

    chunk = 1_000
    label = "idle"
    seconds: ClassVar[dict[str, float]] = {}

    def train(self, works: Sequence[Work]) -> Iterator[Results]:
        """No change, no loss."""
        for start in range(0, len(works), self.chunk):
            part = tuple(works[start : start + self.chunk])
            zeros = {name: torch.zeros(len(part), *t.shape) for name, t in part[0].job.payload.items()}
            yield Results(part, Stacked(zeros), {}, (0.0,) * len(part))


def federation(algorithm: Algorithm, clients: int, working: int, k: int, steps: int) -> Federation:
    """One example a client, and a model of one number."""
    examples = Examples(x=torch.zeros(clients, 1), y=torch.zeros(clients, 1), classes=None)
    shards = Shards(torch.arange(clients), torch.arange(clients + 1))
    return Federation(
        recipe=parse({"evaluation": {"every": 10**9, "clients": 0}, "engine": {"mode": "fused"}}),
        task=Task(torch.nn.Linear(1, 1, bias=False), regression),
        algorithm=algorithm,
        schedule=Buffered(stop=Stopping(rounds=steps), k=k, concurrency=working),
        topology=None,
        data=FederatedData(train=examples, test=examples, train_shards=shards, test_shards=shards),
        work=LocalWork(steps=1, batch_size=1),
    )


def run(algorithm: Algorithm, clients: int, working: int, k: int, events: int) -> float:
    """Seconds that so many events take."""
    made = federation(algorithm, clients, working, k, events // k)
    with mock.patch.object(engine, "trainer", return_value=(Idle(), "nothing is to be learnt")):
        simulator = engine.Simulator(made, Population(speeds="lognormal", spread=10.0))
    began = time.perf_counter()
    simulator.run()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clients", type=int, nargs="+", default=[1_000, 10_000, 100_000, 1_000_000])
    parser.add_argument("--working", type=int, default=1_000)
    parser.add_argument("--k", type=int, default=100)
    parser.add_argument("--events", type=int, default=20_000)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    run(FedBuff(), 1_000, min(arguments.working, 1_000), arguments.k, 10 * arguments.k)  # loads what is used
    for algorithm, k in ((FedBuff(), arguments.k), (FedAsync(), 1)):
        for clients in sorted(arguments.clients):
            seconds = run(algorithm, clients, arguments.working, k, arguments.events)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
            told = f"{arguments.events / seconds:,.0f} events/s, {peak:.2f} GB at most"
            print(f"{type(algorithm).__name__}, k = {k}, {clients:,} clients: {told}", flush=True)


if __name__ == "__main__":
    main()
