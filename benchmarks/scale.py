"""What a round costs as populations, cohorts and networks grow: seconds and memory of the whole simulator.

FedAvg on an MLP 784-200-200-10, one local epoch of mini-batch SGD (batch 20, step size 0.1). Clients are
virtual: each is an index, 60 of 60,000 examples of 28x28, drawn at random. Every line of the table is a
process of its own, whose peak memory is that of the system's accounts.

    python benchmarks/scale.py                      # table on standard output
    python benchmarks/scale.py --write README.md    # and between the markers of a file
    python benchmarks/scale.py --only population    # one of population, cohort, asynchronous, gossip
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import published
import torch

from hansa.core.data import Examples, FederatedData, Shards
from hansa.core.models import LogisticConfig, MLPConfig, build
from hansa.core.recipe import parse
from hansa.core.schedule import Schedule, Stopping
from hansa.core.store import Round
from hansa.core.task import LocalSGD, LocalWork, Task
from hansa.simulation.population import Population
from hansa.simulation.simulator import Simulator
from hansa.strategies.buffered import Buffered
from hansa.strategies.catalog import Federation
from hansa.strategies.fedavg import FedAvg
from hansa.strategies.fedbuff import FedBuff
from hansa.strategies.rounds import Rounds
from hansa.strategies.topologies import Kind, Topology

EXAMPLES, EACH = 60_000, 60
MODELS = {"mlp": MLPConfig(hidden=(200, 200)), "logistic": LogisticConfig()}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One line of the table."""

    part: str
    clients: int
    cohort: int
    rounds: int
    model: str = "mlp"
    in_flight: int = 0
    topology: Kind | None = None

    @property
    def name(self) -> str:
        match self.part:
            case "asynchronous":
                return f"FedBuff, {self.in_flight:,} in flight of {self.clients:,}, buffer {self.cohort:,}"
            case "gossip":
                return f"gossip, {self.clients:,} peers, {self.topology}"
        return f"{self.clients:,} clients, cohort {self.cohort:,}"


CASES = (
    *(
        Case(part="population", clients=n, cohort=1_000, rounds=5)
        for n in (1_000, 10_000, 100_000, 1_000_000)
    ),
    *(
        Case(part="cohort", clients=100_000, cohort=c, rounds=r)
        for c, r in ((100, 20), (1_000, 5), (10_000, 2))
    ),
    Case(part="asynchronous", clients=100_000, cohort=100, in_flight=1_000, rounds=40),
    Case(part="gossip", clients=1_000, cohort=1_000, rounds=2, topology="exponential"),
)


def federation(case: Case) -> Federation:
    """A federation of virtual clients."""
    rng = torch.Generator().manual_seed(0)
    x, y = torch.rand(EXAMPLES, 1, 28, 28, generator=rng), torch.randint(10, (EXAMPLES,), generator=rng)
    train = Examples(x=x, y=y, classes=tuple("0123456789"))
    test = Examples(x=x[:100], y=y[:100], classes=train.classes)
    held = Shards(
        torch.randint(EXAMPLES, (case.clients * EACH,), generator=rng), torch.arange(case.clients + 1) * EACH
    )
    nobody = Shards(torch.zeros(0, dtype=torch.int64), torch.zeros(case.clients + 1, dtype=torch.int64))
    stop = Stopping(rounds=case.rounds + 1)
    schedule: Schedule = Rounds(stop=stop, cohort=case.cohort)
    if case.in_flight:
        schedule = Buffered(stop=stop, k=case.cohort, concurrency=case.in_flight)
    model = build(MODELS[case.model], sample=x[0], outputs=10, seed=0)
    return Federation(
        recipe=parse({"evaluation": {"every": 1_000_000, "clients": 0}}),
        task=Task(model, local=LocalSGD(lr=0.1), classes=10),
        algorithm=FedBuff() if case.in_flight else FedAvg(),
        schedule=schedule,
        topology=None if case.topology is None else Topology(kind=case.topology),
        data=FederatedData(train=train, test=test, train_shards=held, test_shards=nobody),
        work=LocalWork(epochs=1, batch_size=20),
    )


def measure(case: Case, threads: int) -> dict[str, float]:
    """Median seconds of a round after the first, updates folded per second, and peak memory in gigabytes."""
    torch.set_num_threads(threads)
    moments: list[float] = []

    def tell(done: Round) -> None:
        moments.append(time.perf_counter())

    population = Population(speeds="lognormal", spread=10.0)
    began = time.perf_counter()
    made = federation(case)
    ready = time.perf_counter()
    simulator = Simulator(made, population, on_round=tell)
    simulator.run()
    rounds = [after - before for before, after in itertools.pairwise(moments)]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    return {
        "seconds": statistics.median(rounds),
        "rate": case.cohort / statistics.mean(rounds)
        if case.in_flight
        else case.cohort / statistics.median(rounds),
        "gigabytes": peak,
        "start": moments[0] - ready,
        "data": ready - began,
        **{f"share {kind}": each / sum(rounds) for kind, each in simulator.seconds.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=sorted({case.part for case in CASES}), help="a part of the table")
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default %(default)s)")
    parser.add_argument("--write", type=Path, help="file whose scale table to replace")
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(measure(Case(**arguments.case), arguments.threads)))
        return
    table = made_table([case for case in CASES if arguments.only in (None, case.part)], arguments.threads)
    print(table)
    if arguments.write:
        published.write(arguments.write, "scale table", table)


def made_table(cases: list[Case], threads: int) -> str:
    """One process after the other."""
    rows = []
    for case in cases:
        command = [sys.executable, __file__, "--threads", str(threads), "--case", json.dumps(vars(case))]
        told = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        rows.append(
            f"| {case.name} | {told['seconds']:.2f} | {told['rate']:,.0f} | {told['gigabytes']:.1f} |"
        )
    return "\n".join(
        [
            "| | seconds a round | client updates a second | peak memory, GB |",
            "|---|---|---|---|",
            *rows,
            "",
            "Medians of the rounds after the first (FedBuff: the mean rate), MLP 784-200-200-10,",
            f"{threads} thread(s), torch {torch.__version__}, float32.",
            "`python benchmarks/scale.py` makes this table.",
        ]
    )


if __name__ == "__main__":
    main()
