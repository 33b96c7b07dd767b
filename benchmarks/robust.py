"""Robust aggregation rules: seconds and memory against ByzFL 0.0.11, interleaved in one run.

Both get the same n updates of d normal numbers, as torch tensors in float32, and the same threads. The script
fails unless they agree to 1e-9 in float64, which ByzFL keeps for NumPy arrays only, alone and after
nearest-neighbour mixing (NNM).

    python benchmarks/robust.py                       # table on standard output
    python benchmarks/robust.py --write README.md     # and between the markers of a file
    python benchmarks/robust.py --d 10000000 --rounds 1    # ByzFL takes some 20 GB
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import re
import statistics
import sys
import time
import types
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import published
import torch
from torch import Tensor

from hansa.strategies.robust import (
    CentredClipping,
    ColumnRule,
    GeometricMedian,
    GramRule,
    Krum,
    Meamed,
    Median,
    MultiKrum,
    TrimmedMean,
)

sys.modules["byzfl.benchmark"] = types.ModuleType("byzfl.benchmark")  # it wants torchvision and seaborn
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import byzfl

Side = Callable[[Tensor], Any]


@dataclass(frozen=True)
class Pair:
    """One rule on both sides; ``theirs`` makes a new one, for ByzFL's clipping remembers its last verdict."""

    name: str
    ours: GramRule | ColumnRule
    theirs: Callable[[], Any]


def pairs(n: int, f: int, d: int) -> list[Pair]:
    tau = float(d) ** 0.5  # the distance of an update from their mean
    others = n - f - 1  # ByzFL's Krum looks at one neighbour more than the paper's
    return [
        Pair("Krum", Krum(f=f, neighbours=others), lambda: byzfl.Krum(f)),
        Pair("Multi-Krum", MultiKrum(f=f, neighbours=others), lambda: byzfl.MultiKrum(f)),
        Pair(
            "geometric median, 3 iterations",
            GeometricMedian(smoothing=0.1, iterations=3),
            lambda: byzfl.GeometricMedian(nu=0.1, T=3),
        ),
        Pair(
            "centred clipping, 3 iterations",
            CentredClipping(tau=tau, iterations=3),
            lambda: byzfl.CenteredClipping(L=3, tau=tau),
        ),
        Pair("median", Median(), byzfl.Median),
        Pair("trimmed mean", TrimmedMean(f=f), lambda: byzfl.TrMean(f)),
        Pair("Meamed", Meamed(f=f), lambda: byzfl.Meamed(f)),
    ]


def agree(n: int, f: int) -> None:
    """Fail where a rule, alone or after mixing, is not ByzFL's to 1e-9 in float64."""
    for d, nnm in ((50_000, None), (2_000, f), (5_000, f)):  # ByzFL's mixing takes n (n − f) d numbers
        x = torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        seen = x.numpy() if nnm is None else byzfl.NNM(nnm)(x.numpy())
        for pair in pairs(n, f, d):
            ours, theirs = dataclasses.replace(pair.ours, nnm=nnm)(x).numpy(), pair.theirs()(seen)
            if not np.allclose(ours, theirs, rtol=1e-9, atol=1e-12):
                worst = np.abs(ours - theirs).max()
                raise SystemExit(f"{pair.name}, nnm = {nnm}: {worst:.1e} apart in float64")


def seconds(run: Side, updates: Tensor) -> float:
    began = time.perf_counter()
    run(updates)
    return time.perf_counter() - began


def extra_memory(run: Side, updates: Tensor) -> float:
    """Peak of the resident memory above what it was, as a share of the updates' (Linux, glibc)."""
    ctypes.CDLL(None).malloc_trim(0)  # what was freed before is not there already
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _status("VmRSS")
    run(updates)
    return (_status("VmHWM") - before) / updates.nbytes


def _status(key: str) -> int:
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def compare(pair: Pair, updates: Tensor, rounds: int, limit: float) -> str:
    sides: dict[str, Side] = {"theirs": lambda x: pair.theirs()(x), "ours": pair.ours}
    memory = {side: extra_memory(run, updates) for side, run in sides.items()}  # warms up as well
    times: dict[str, list[float]] = {side: [] for side in sides}
    while len(times["ours"]) < rounds and sum(times["theirs"]) < limit:
        for side, run in sides.items():
            times[side].append(seconds(run, updates))
    medians = {side: statistics.median(each) for side, each in times.items()}
    ratio = statistics.median(a / b for a, b in zip(times["theirs"], times["ours"], strict=True))
    cells = (
        f"{medians['theirs']:.2f}",
        f"{medians['ours']:.3f} ({ratio:.1f}x)",
        f"{memory['theirs']:.0%}",
        f"{memory['ours']:.1%}",
    )
    return f"| {pair.name} | {' | '.join(cells)} |"


def alone(name: str, rule: Side, updates: Tensor, rounds: int) -> str:
    memory = extra_memory(rule, updates)
    median = statistics.median(seconds(rule, updates) for _ in range(rounds))
    return f"| {name} | | {median:.3f} | | {memory:.1%} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--n", type=int, default=100, help="updates (default %(default)s)")
    parser.add_argument("--f", type=int, default=20, help="of them Byzantine (default %(default)s)")
    parser.add_argument("--d", type=int, default=1_000_000, help="numbers in each (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds per rule (default %(default)s)")
    parser.add_argument(
        "--limit", type=float, default=8.0, help="no new round after so many seconds of ByzFL"
    )
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default %(default)s)")
    parser.add_argument("--write", type=Path, help="file whose robust table to replace")
    arguments = parser.parse_args()
    n, f, d, rounds = arguments.n, arguments.f, arguments.d, arguments.rounds
    torch.set_num_threads(arguments.threads)
    agree(n, f)
    updates = torch.randn(n, d, generator=torch.Generator().manual_seed(0))
    table = "\n".join(
        [
            "| rule | ByzFL, s | Hansa, s | ByzFL, memory | Hansa, memory |",
            "|---|---|---|---|---|",
            *(compare(pair, updates, rounds, arguments.limit) for pair in pairs(n, f, d)),
            alone("geometric median, 100 iterations", GeometricMedian(), updates, rounds),
            alone("Krum after NNM", Krum(f=f, nnm=f), updates, rounds),
            alone("trimmed mean after NNM", TrimmedMean(f=f, nnm=f), updates, rounds),
            "",
            f"n = {n}, d = {d:,}, f = {f}, float32, {arguments.threads} thread(s). Medians of up to {rounds}",
            "interleaved rounds; in brackets the median ratio of the same round. Memory is the peak",
            "beside the updates, as a share of theirs. ByzFL was not run where its cells are empty: its NNM",
            "stores n (n − f) d numbers.",
            f"{published.processor()}, byzfl 0.0.11, torch {torch.__version__}, NumPy {np.__version__}.",
            "`python benchmarks/robust.py` makes this table.",
        ]
    )
    print(table)
    if arguments.write:
        published.write(arguments.write, "robust table", table)


if __name__ == "__main__":
    main()
