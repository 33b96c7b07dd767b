"""Asynchronous schemes on real data: time to a target, biased arrivals, few fast clients, backup workers.

    python benchmarks/asynchronous.py                          # all tables on standard output
    python benchmarks/asynchronous.py time --write docs/claims.md --picture docs/asynchronous.svg

``HANSA_DATA`` in the environment names a folder with ``mnist`` and ``fashion_mnist``, each with the four
idx files (``-ubyte.gz``). Every trial is written to ``--results`` as it ends; the same command goes on from
there. Where step sizes are tuned, all schemes of a table try four on seed 0, a factor of two apart, and up to
two more beyond a border at which the best lies; the table tells seeds 1 to 3, and whether the best still lies
at the border. Where a whole job counts as one gradient (FAVANO) the grid is eight times as high.
Nothing is tuned for arrivals, which tells seeds 1 to 5.

time      seconds to 72 % on Fashion-MNIST: 100 clients, Dirichlet(0.3), tenfold spread of speeds
arrivals  AFA-CD and AFA-CS, one class a client, uniform and biased arrivals
speedup   steps of AFA-CD to a target as more clients make one
few-fast  FAVANO, FedBuff and others where a ninth of the clients is eight times as fast
few-fast-network  FAVANO and FedBuff there with a network and 600 images a client
backup    dynamic backup workers against every fixed number of them
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import published
import torch
from trials import Table, Trials, fastest, merged, most_accurate, spread, table, to_target

from hansa.ui.plots import compare

SEEDS = (0, 1, 2, 3)  # the first is for tuning
RATES = (0.1, 0.2, 0.4, 0.8)
PER_JOB = tuple(8 * rate for rate in RATES)  # where a job counts as one gradient
SILENT: Table = {"clients": 0}  # no evaluation on clients' own data


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """A row of a table: what is laid over the experiment's recipe."""

    name: str
    algorithm: Mapping[str, Any]
    schedule: Mapping[str, Any]
    weights: Mapping[str, Any] | None = None
    rates: tuple[float, ...] = RATES
    every: int = 1  # steps between two evaluations

    def over(self, base: Table) -> Table:
        """The recipe."""
        told = {"algorithm": self.algorithm, "schedule": self.schedule, "weights": self.weights or {}}
        return merged(base, told, {"evaluation": {"every": self.every, **SILENT}})


# Time to a target.

ROUNDS = {"name": "rounds", "cohort": 20}
BUFFER = {"name": "buffered", "k": 10, "concurrency": 20}
ARRIVALS = {"name": "buffered", "k": 1, "concurrency": 20}
CLOCK = {"name": "periodic", "interval": 15.0}
CONTACTS = {"name": "periodic", "interval": 7.0, "recall": 20}
ESTIMATED = {"frequency": "estimated"}
TARGET = 0.72

TIMED: Table = {
    "data": {"name": "fashion_mnist", "train": 6_000, "test": 2_000},
    "partition": {"kind": "dirichlet", "clients": 100, "alpha": 0.3, "min_size": 5},
    "model": {"name": "logistic"},
    "train": {"steps": 5, "batch_size": 20},
    "population": {"speeds": "uniform", "spread": 10.0, "latency": 1.0},
    "stop": {"rounds": 100_000, "time": 1_200.0, "target": TARGET},
}
SCHEMES = (
    Scheme(name="FedAvg, rounds of 20", algorithm={"name": "fedavg"}, schedule=ROUNDS),
    Scheme(
        name="FedAvg, first 20 of 26",
        algorithm={"name": "fedavg"},
        schedule={**ROUNDS, "over_selection": 1.3},
    ),
    Scheme(
        name="FedAvg, dynamic backup workers of 20",
        algorithm={"name": "fedavg"},
        schedule={"name": "backup", "cohort": 20},
    ),
    Scheme(name="CO2, rounds of 20", algorithm={"name": "co2"}, schedule=ROUNDS),
    *(
        Scheme(
            name=f"FedAsync, {staleness}",
            algorithm={"name": "fedasync"},
            schedule=ARRIVALS,
            weights={"staleness": staleness},
            every=5,
        )
        for staleness in ("constant", "polynomial", "hinge")
    ),
    Scheme(
        name="asynchronous FedAvg, p/f estimated",
        algorithm={"name": "fedavg"},
        schedule=ARRIVALS,
        weights=ESTIMATED,
        every=5,
    ),
    Scheme(name="FedBuff, K = 10", algorithm={"name": "fedbuff"}, schedule=BUFFER),
    Scheme(
        name="FedBuff, K = 10, p/f estimated",
        algorithm={"name": "fedavg"},
        schedule=BUFFER,
        weights=ESTIMATED,
    ),
    Scheme(name="AFA-CD, m = 10", algorithm={"name": "afa_cd", "server_lr": 5.0}, schedule=BUFFER),
    Scheme(name="AFA-CS, m = 10", algorithm={"name": "afa_cs", "server_lr": 5.0}, schedule=BUFFER),
    Scheme(
        name="all at work: FedBuff, K = 10",
        algorithm={"name": "fedbuff"},
        schedule={**BUFFER, "concurrency": 100},
    ),
    Scheme(name="all at work: FedFix, Δt = 15 s, unweighted", algorithm={"name": "fedavg"}, schedule=CLOCK),
    Scheme(
        name="all at work: FedFix, Δt = 15 s, p/f estimated",
        algorithm={"name": "fedavg"},
        schedule=CLOCK,
        weights=ESTIMATED,
    ),
    *(
        Scheme(
            name=f"all at work: FAVANO, 20 every 7 s, {kind}",
            algorithm={"name": "favano", "reweighting": kind},
            schedule=CONTACTS,
            rates=PER_JOB,
        )
        for kind in ("deterministic", "stochastic")
    ),
    Scheme(
        name="all at work: FAVANO without reweighting",
        algorithm={"name": "favano", "reweighting": "none"},
        schedule=CONTACTS,
    ),
)
PICTURED = (
    "FedAvg, rounds of 20",
    "FedAvg, first 20 of 26",
    "FedAsync, polynomial",
    "FedBuff, K = 10",
    "AFA-CD, m = 10",
    "all at work: FedBuff, K = 10",
    "all at work: FedFix, Δt = 15 s, p/f estimated",
    "all at work: FAVANO, 20 every 7 s, stochastic",
)


def timed(trials: Trials, picture: Path | None) -> str:
    """Virtual seconds to the target, scheme by scheme."""
    rows, curves = [], {}
    for scheme in SCHEMES:
        found = fastest(trials, scheme.over(TIMED), scheme.rates, SEEDS)
        each = found.outcomes
        rows.append(
            [
                scheme.name,
                found.told,
                to_target(each, lambda o: o.seconds),
                to_target(each, lambda o: o.updates),
                to_target(each, lambda o: o.curve[-1][2]),
                f"{statistics.mean(o.best for o in each):.3f}",
            ]
        )
        print(" | ".join(rows[-1]), flush=True)
        curve = np.array(each[0].curve)
        if scheme.name in PICTURED:
            curves[scheme.name] = (curve[:, 0], np.maximum.accumulate(curve[:, 3]))
    if picture is not None:
        compare(curves, over="time", metric="best accuracy so far").savefig(picture, metadata={"Date": None})
    head = ["scheme", "η_l", f"virtual seconds to {TARGET:.0%}", "client updates", "MB", "best accuracy met"]
    return table(head, rows)


# Anarchic averaging.

ANARCHIC: Table = {
    "data": {"name": "mnist", "train": 2_000, "test": 2_000},
    "partition": {"kind": "classes", "clients": 10, "classes_per_client": 1},
    "model": {"name": "logistic"},
    "train": {"epochs": [1, 5], "batch_size": 400, "lr": 0.1},  # so small that no model wavers by 0.02
    "schedule": {"name": "buffered", "k": 2, "concurrency": 10},
    "stop": {"rounds": 2_000},
    "evaluation": {"every": 20, **SILENT},
}
COMING: Mapping[str, Table] = {
    "uniform": {"jitter": 0.3},
    "half of the clients twelve times rarer": {
        "jitter": 0.3,
        "speeds": "slow_share",
        "spread": 12.0,
        "follows": "label",
    },
}


def arrivals(trials: Trials, picture: Path | None) -> str:
    """Accuracy at the end."""
    rows = []
    for told, population in COMING.items():
        found = {
            name: [
                trials.run(
                    merged(ANARCHIC, {"seed": seed, "algorithm": {"name": name}, "population": population})
                )
                for seed in range(1, 6)
            ]
            for name in ("afa_cd", "afa_cs")
        }
        ends = {name: [o.final for o in each] for name, each in found.items()}
        waves = {
            name: statistics.mean(float(np.std([c[3] for c in o.curve[-30:]])) for o in each)
            for name, each in found.items()
        }
        apart = [cs - cd for cd, cs in zip(ends["afa_cd"], ends["afa_cs"], strict=True)]
        rows.append(
            [
                told,
                *(spread(ends[name], 3) for name in ends),
                ", ".join(f"{each:+.3f}" for each in apart),
                *(f"{waves[name]:.3f}" for name in waves),
            ]
        )
        print(" | ".join(rows[-1]), flush=True)
    return table(
        ["arrivals", "AFA-CD", "AFA-CS", "CS − CD, seed by seed", "CD wavers by", "CS wavers by"], rows
    )


WORKERS = (1, 2, 4, 8, 16)
SPEEDUP: Table = {
    "data": {"name": "mnist", "train": 4_000, "test": 2_000},
    "partition": {"kind": "iid", "clients": 16},
    "model": {"name": "logistic"},
    "train": {"steps": 3, "batch_size": 4, "lr": 0.05},
    "population": {"jitter": 0.5},
    "stop": {"rounds": 4_000, "target": 0.85},
    "evaluation": {"every": 2, **SILENT},
}


def speedup(trials: Trials, picture: Path | None) -> str:
    """Steps of AFA-CD to 0.85 with m of 16 clients a step and η ∝ √(mK)."""
    rows = []
    for seed in SEEDS[1:]:
        found = [
            trials.run(
                merged(
                    SPEEDUP,
                    {
                        "seed": seed,
                        "algorithm": {"name": "afa_cd", "server_lr": math.sqrt(3 * m)},
                        "schedule": {"name": "buffered", "k": m, "concurrency": 16},
                    },
                )
            )
            for m in WORKERS
        ]
        assert all(each.reached for each in found)
        steps = [each.rounds for each in found]
        slope = np.polyfit(np.log(WORKERS), np.log(steps), 1)[0]
        rows.append([f"{seed}", *map(str, steps), f"{slope:.2f}"])
        print(" | ".join(rows[-1]), flush=True)
    return table(["seed", *(f"m = {m}" for m in WORKERS), "slope"], rows)


# Few fast clients.

FEW: Table = {
    "data": {"name": "mnist", "train": 6_000, "test": 2_000},
    "partition": {"kind": "classes", "clients": 100, "classes_per_client": 2},
    "model": {"name": "logistic"},
    "train": {"steps": 20, "batch_size": 20},
    "population": {"step_time": 2.0, "speeds": "slow_share", "slow_share": 8 / 9, "spread": 8.0},
    "stop": {"rounds": 100_000, "time": 700.0},
}
SETTINGS: Mapping[str, Table] = {
    "low classes on fast devices, 700 s": {"population": {"follows": "label"}},
    "anywhere, 700 s": {},
    "low classes on fast devices, 2,100 s": {
        "population": {"follows": "label"},
        "stop": {"time": 2_100.0},
    },
}
RIVALS = (
    Scheme(
        name="FedBuff, Z = 10",
        algorithm={"name": "fedbuff"},
        schedule={**BUFFER, "concurrency": 100},
        every=2,
    ),
    Scheme(
        name="FedBuff, Z = 10, p/f estimated",
        algorithm={"name": "fedavg"},
        schedule={**BUFFER, "concurrency": 100},
        weights=ESTIMATED,
        every=2,
    ),
    Scheme(name="FedAvg, rounds of 20", algorithm={"name": "fedavg"}, schedule=ROUNDS),
    Scheme(
        name="FAVANO, stochastic",
        algorithm={"name": "favano", "reweighting": "stochastic"},
        schedule=CONTACTS,
        rates=PER_JOB,
        every=5,
    ),
    Scheme(
        name="FAVANO without reweighting",
        algorithm={"name": "favano", "reweighting": "none"},
        schedule=CONTACTS,
        every=5,
    ),
)


def few_fast(trials: Trials, picture: Path | None) -> str:
    """Accuracy at equal virtual time."""
    return _at_equal_time(trials, FEW, SETTINGS, RIVALS)


NETWORK = merged(
    FEW,
    {
        "data": {"train": 60_000},
        "model": {"name": "mlp", "hidden": [32]},
        "train": {"batch_size": 64},
        "population": {"jitter": 0.2},  # as 20 steps of geometrically distributed time vary
        "engine": {"mode": "sequential"},  # the quickest with few steps of few clients
    },
)
NETWORK_RIVALS = tuple(  # the same step sizes for all of them
    replace(each, rates=RATES)
    for each in RIVALS
    if each.name in ("FedBuff, Z = 10", "FAVANO, stochastic", "FAVANO without reweighting")
)


def few_fast_network(trials: Trials, picture: Path | None) -> str:
    """Accuracy at equal virtual time."""
    return _at_equal_time(trials, NETWORK, {"anywhere, 700 s": {}}, NETWORK_RIVALS)


def _at_equal_time(
    trials: Trials, base: Table, settings: Mapping[str, Table], schemes: Sequence[Scheme]
) -> str:
    cells = {scheme.name: [scheme.name] for scheme in schemes}
    for told, setting in settings.items():
        for scheme in schemes:
            found = most_accurate(trials, scheme.over(merged(base, setting)), scheme.rates, SEEDS)
            cells[scheme.name] += [found.told, spread([o.final for o in found.outcomes], 3)]
            print(told, scheme.name, *cells[scheme.name][-2:], sep=" | ", flush=True)
    return table(["scheme", *(cell for told in settings for cell in ("η_l", told))], list(cells.values()))


# Dynamic backup workers.

PROPORTIONAL = {"target": "uniform", "frequency": "always"}  # k of n make a step of k/n
BACKUP: Table = {
    "data": {"name": "mnist", "train": 6_000, "test": 2_000},
    "partition": {"kind": "iid", "clients": 16},
    "model": {"name": "mlp", "hidden": [64]},
    "train": {"steps": 1, "batch_size": 32, "lr": 0.8},
    "algorithm": {"name": "fedavg"},
    "weights": PROPORTIONAL,
    "stop": {"rounds": 5_000, "target": 0.85},
    "evaluation": {"every": 5, **SILENT},
}
FIXED = (2, 4, 8, 12, 16)


def backup(trials: Trials, picture: Path | None) -> str:
    """Seconds to 0.85, where a worker's round trip takes 1 − a + a Exp(1)."""
    plans: dict[str, Table] = {
        "all 16" if k == 16 else f"fastest {k}": {"name": "rounds", "cohort": k, "over_selection": 16 / k}
        for k in FIXED
    }
    plans |= {f"dynamic, window {d}": {"name": "backup", "cohort": 16, "window": d} for d in (5, 20)}
    rows = []
    for name, schedule in plans.items():
        cells = [name]
        for share in (0.2, 1.0):
            population = {"jitter": share, "jitter_law": "exponential"}
            over = {"schedule": schedule, "population": population}
            found = [trials.run(merged(BACKUP, over, {"seed": seed})) for seed in SEEDS[1:]]
            waited = statistics.mean(o.updates / o.rounds for o in found)
            cells += [to_target(found, lambda o: o.seconds), f"{waited:.1f}"]
        rows.append(cells)
        print(" | ".join(cells), flush=True)
    return table(["waits for", "a = 0.2", "mean k", "a = 1", "mean k"], rows)


EXPERIMENTS: Mapping[str, Callable[[Trials, Path | None], str]] = {
    "time": timed,
    "arrivals": arrivals,
    "speedup": speedup,
    "few-fast": few_fast,
    "few-fast-network": few_fast_network,
    "backup": backup,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("experiments", nargs="*", choices=[[], *EXPERIMENTS], help="all, if none is named")
    parser.add_argument(
        "--results",
        type=Path,
        default=Path("runs/asynchronous.jsonl"),
        help="file of trials (default %(default)s)",
    )
    parser.add_argument("--write", type=Path, help="file whose tables to replace")
    parser.add_argument("--picture", type=Path, help="where to draw accuracy over virtual time")
    arguments = parser.parse_args()
    if arguments.results.is_dir():
        parser.error(f"--results: {arguments.results} is a folder; name a file, in it say trials.jsonl")
    torch.set_num_threads(1)
    trials = Trials(arguments.results)
    for name in arguments.experiments or EXPERIMENTS:
        text = EXPERIMENTS[name](trials, arguments.picture)
        print(f"\n{text}\n", flush=True)
        if arguments.write:
            published.write(arguments.write, f"asynchronous {name} table", text)


if __name__ == "__main__":
    main()
