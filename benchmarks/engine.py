"""Client updates per second: the simulator's trainers against a plain PyTorch loop, interleaved in one run.

The job is FedAvg as everybody runs it: 1,000 clients of 60 examples of 28x28 each, a cohort of 100 a round,
one local epoch of mini-batch SGD (batch 20, step size 0.1), no evaluation; then the same with clients of
unlike size (log-normal, 60 on average) and with tiny ones (20 examples, batch 10). The loop loads the
global weights into one ``nn.Module``, steps ``torch.optim.SGD`` and adds up the results: what most
researchers write. All sides draw the same mini-batches, and the script fails unless a round gives the same
model. The share of the peak is that of a 2048 x 2048 matrix product, timed in the same run; operations are
counted, not estimated.

    python benchmarks/engine.py                      # table on standard output
    python benchmarks/engine.py --write README.md    # and between the markers of a file
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import published
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from hansa.core.algorithm import Job
from hansa.core.data import Examples, FederatedData, Shards
from hansa.core.models import LeafCNNConfig, LogisticConfig, MLPConfig, build
from hansa.core.recipe import EngineConfig, Recipe
from hansa.core.sums import Sums
from hansa.core.task import LocalSGD, LocalWork, Task
from hansa.core.trees import Tree
from hansa.simulation.cohort import Stacked, Trainer, Work
from hansa.simulation.fused import FusedTrainer
from hansa.simulation.tiers import keep_pages, trainer, uncollected
from hansa.strategies.catalog import Federation
from hansa.strategies.fedavg import FedAvg
from hansa.strategies.rounds import Rounds

CLIENTS, COHORT, LR = 1_000, 100, 0.1
MODELS = {
    "logistic regression 784-10": LogisticConfig(),
    "MLP 784-200-200-10": MLPConfig(hidden=(200, 200)),
    "LEAF CNN 5x5 32/64, fc 512": LeafCNNConfig(hidden=512),
}
TIERS: dict[str, EngineConfig] = {
    "sequential": EngineConfig(mode="sequential"),
    "batched": EngineConfig(mode="batched"),
    "fused": EngineConfig(mode="fused"),
    "fused, winograd": EngineConfig(mode="fused", convolutions="winograd"),
}
Round = Callable[[int, Tree], Tree]


@dataclass(frozen=True)
class Case:
    """Who holds how much: ``sizes`` draws the examples of every client."""

    name: str
    batch: int
    sizes: Callable[[np.random.Generator], np.ndarray]


UNIFORM = Case("60 examples", 20, lambda rng: np.full(CLIENTS, 60))
RAGGED = Case(
    "log-normal", 20, lambda rng: np.maximum(rng.lognormal(np.log(49), 0.64, CLIENTS), 4).astype(int)
)
TINY = Case("20 examples, batch 10", 10, lambda rng: np.full(CLIENTS, 20))


def federation(model: torch.nn.Module, case: Case = UNIFORM) -> Federation:
    sizes = torch.from_numpy(case.sizes(np.random.default_rng(0)))
    total = int(sizes.sum())
    x = torch.rand(total, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    y = torch.randint(10, (total,), generator=torch.Generator().manual_seed(1))
    examples = Examples(x=x, y=y, classes=tuple("0123456789"))
    shards = Shards(torch.arange(total), torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)]))
    return Federation(
        recipe=Recipe(),
        task=Task(model, local=LocalSGD(lr=LR), classes=10),
        algorithm=FedAvg(),
        schedule=Rounds(cohort=COHORT),
        topology=None,
        data=FederatedData(train=examples, test=examples, train_shards=shards, test_shards=shards),
        work=LocalWork(epochs=1, batch_size=case.batch),
    )


def cohort(round_number: int) -> list[int]:
    return [(round_number * COHORT + i) % CLIENTS for i in range(COHORT)]


def hansa_round(f: Federation, train: Trainer) -> Round:
    sizes = f.data.train_shards.sizes.double()

    def run(number: int, params: Tree) -> Tree:
        acc, clients = Sums(), sorted(cohort(number), key=lambda client: -sizes[client])
        works = [Work(client, Job(number, "train", params), {}) for client in clients]
        for results in train.train(works):
            weights = sizes[[work.client for work in results.works]]
            if isinstance(results.change, Stacked):
                acc = acc.add(results.updates, weights, {})
            else:
                acc = acc.add_blocks(results.change.sums(weights), weights)
        change = acc.total()
        return {name: each + change.sums[name] / change.masses[name] for name, each in params.items()}

    return run


def plain_round(f: Federation, module: torch.nn.Module) -> Round:
    shards = f.data.train_shards

    def run(number: int, params: Tree) -> Tree:
        module.train()
        total = {name: torch.zeros_like(tensor) for name, tensor in params.items()}
        clients = np.array(cohort(number))
        sizes, numbers = shards.sizes.numpy()[clients], np.full(len(clients), number)
        orders = f.work.plan(sizes, seed=f.recipe.seed, clients=clients, numbers=numbers).positions
        for client, size, order in zip(
            clients.tolist(), sizes.tolist(), torch.from_numpy(orders), strict=True
        ):
            module.load_state_dict(params)
            optimiser = torch.optim.SGD(module.parameters(), lr=LR)
            owned = shards.of(client)
            x, y = f.data.train.x[owned], f.data.train.y[owned]
            for batch in order[:size].split(f.work.batch_size):
                optimiser.zero_grad()
                F.cross_entropy(module(x[batch]), y[batch]).backward()
                optimiser.step()
            for name, tensor in module.state_dict().items():
                total[name] += tensor * (size / sizes.sum())
        return total

    return run


def compare(name: str, case: Case, tiers: Sequence[str], rounds: int, peak: float) -> dict[str, str]:
    """Cells of a table: client updates per second of each side."""
    module = build(MODELS[name], sample=torch.zeros(1, 28, 28), outputs=10, seed=0)
    f = federation(module, case)
    sides: dict[str, Round] = {"plain": plain_round(f, module)}
    trainers: dict[str, Trainer] = {}
    for tier in tiers:
        its = replace(f, recipe=f.recipe.model_copy(update={"engine": TIERS[tier]}))
        trainers[tier] = trainer(its, seed=0, mode=TIERS[tier].mode, chunk=None)[0]
        sides[tier] = hansa_round(its, trainers[tier])
    params = {side: dict(f.task.initial) for side in sides}
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    with FlopCounterMode(display=False) as counter:
        plain_round(f, module)(0, params["plain"])
    with uncollected():
        for number in range(rounds + 1):
            for side, run in sides.items():
                began = time.perf_counter()
                params[side] = run(number, params[side])
                if number:  # the first round warms up, and must give the same model
                    seconds[side].append(time.perf_counter() - began)
            if not number:
                _agree(name, trainers, params, f.task.initial)
    cells = {}
    for side, each in seconds.items():
        median = statistics.median(each)
        ratio = statistics.median(p / own for p, own in zip(seconds["plain"], each, strict=True))
        share = counter.get_total_flops() / median / peak
        cells[side] = f"{COHORT / median:,.0f} ({ratio:.2f}x, {share:.0%})"
    return cells


def _agree(name: str, trainers: dict[str, Trainer], params: dict[str, Tree], start: Tree) -> None:
    """Fail where a side's model is off by a hundredth of the way; a ReLU at zero may flip in float32."""

    def apart(a: Tree, b: Tree) -> float:
        return sum(float((a[n] - t).square().sum()) for n, t in b.items()) ** 0.5

    for side, each in trainers.items():
        if isinstance(each, FusedTrainer) and not each.sound:
            raise SystemExit(f"{name}: {each.label}")
        share = apart(params[side], params["plain"]) / apart(params["plain"], start)
        if share > 1e-2:
            raise SystemExit(f"{name}: {side} ended {share:.1e} of the way from the plain loop's model")


def _peak() -> float:
    """Operations per second of a large matrix product."""
    a, b = torch.randn(2, 2048, 2048)
    fastest = float("inf")
    for _ in range(9):
        began = time.perf_counter()
        a @ b
        fastest = min(fastest, time.perf_counter() - began)
    return float(2 * 2048**3 / fastest)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds per model (default %(default)s)")
    parser.add_argument("--write", type=Path, help="file whose engine table to replace")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default %(default)s)")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="(default: all)")
    parser.add_argument("--tiers", nargs="+", choices=TIERS, default=list(TIERS), help="(default: all)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    keep_pages()  # helps all sides
    peak = _peak()
    rows = []
    for name in arguments.models:
        for case in (UNIFORM,) if name.startswith("LEAF") else (UNIFORM, RAGGED, TINY):
            known = TIERS if name.startswith("LEAF") else list(TIERS)[:-1]
            tiers = [tier for tier in arguments.tiers if tier in known] if case is UNIFORM else ["fused"]
            cells = compare(name, case, tiers, arguments.rounds, peak)
            rows.append(
                f"| {name} | {case.name} | {' | '.join(cells.get(s, '') for s in ('plain', *TIERS))} |"
            )
            print(rows[-1], flush=True)
    table = "\n".join(
        [
            f"| model | clients | plain loop | {' | '.join(TIERS)} |",
            f"|---|---|---|{'---|' * len(TIERS)}",
            *rows,
            "",
            f"Client updates per second, medians of {arguments.rounds} interleaved rounds; in brackets the",
            "median ratio to the plain loop of the same round, and the share of the peak of this machine's",
            f"matrix product ({peak / 1e9:.0f} Gflop/s). {arguments.threads} thread(s),",
            f"{published.processor()}, torch {torch.__version__}, float32.",
            "`python benchmarks/engine.py` makes this table.",
        ]
    )
    print(table)
    if arguments.write:
        published.write(arguments.write, "engine table", table)


if __name__ == "__main__":
    main()
