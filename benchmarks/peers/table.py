"""From raw results to medians, ratios, verdicts, tables and a picture. Pure but for the picture's file.

A result is plain data, as it stands in the JSON file::

    {"machine": {...}, "threads": 1, "cases": [{"model", "clients", "cohort", "sides": {"plain": side, ...}}]}
    side = {"failed": None or why, "facts": {...}, "repetitions": [[round, round, ...], ...]}
    round = {"seconds", "cpu", "loss", "peak_mb", "threads", "processes", "since_start"}

The first round of a repetition warms up and is not timed. Ratios are medians of the ratios within one
rotation: what two sides took for the same round, one right after the other.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Side = Mapping[str, Any]
Case = Mapping[str, Any]
TOLERANCE = 0.02
TITLES = {
    "hansa": "Hansa",
    "plain": "plain loop",
    "fedjax": "FedJAX",
    "pfl": "pfl",
    "fedlab": "FedLab",
    "fedml": "FedML",
    "flwr": "Flower (Ray)",
}
MODELS = {
    "logistic": "logistic regression 784-10",
    "mlp": "MLP 784-200-200-10",
    "leaf_cnn": "LEAF CNN 5x5 32/64, fc 512",
    "resnet18": "ResNet-18-GN on 3x32x32",
}


def timed(side: Side) -> dict[tuple[int, int], Mapping[str, float]]:
    """The rounds that count, by (repetition, round)."""
    return {
        (i, j): each for i, rounds in enumerate(side["repetitions"]) for j, each in enumerate(rounds) if j > 0
    }


def median(side: Side, what: str) -> float:
    """Median over the timed rounds."""
    return statistics.median(each[what] for each in timed(side).values())


def ratio(side: Side, base: Side) -> float:
    """How many times as long as ``base`` a side takes."""
    ours, theirs = timed(base), timed(side)
    return statistics.median(
        theirs[key]["seconds"] / ours[key]["seconds"] for key in ours.keys() & theirs.keys()
    )


def reference(case: Case) -> str | None:
    """The side whose loss the others must match: the plain loop, else the first that has one."""
    able = [name for name, side in case["sides"].items() if not side["failed"]]
    return "plain" if "plain" in able else next(iter(able), None)


def gap(losses: Sequence[float], expected: Sequence[float]) -> float:
    """Largest relative difference of two loss curves over the rounds that both have; infinite for NaN."""
    gaps = [abs(a - b) / abs(b) for a, b in zip(losses, expected, strict=False)]
    return max((each if each == each else float("inf") for each in gaps), default=float("inf"))


def gaps(case: Case) -> dict[str, float]:
    """Per side that ran: the largest difference of its loss from the reference's, over all repetitions."""
    base = reference(case)
    if base is None:
        return {}
    expected = case["sides"][base]["repetitions"]
    return {
        name: max(
            gap([each["loss"] for each in mine], [each["loss"] for each in theirs])
            for mine, theirs in zip(side["repetitions"], expected, strict=True)
        )
        for name, side in case["sides"].items()
        if not side["failed"]
    }


def problems(results: Mapping[str, Any]) -> list[str]:
    """Whatever keeps a figure from being one: sides that failed, and sides that did another job."""
    found = []
    for case in results["cases"]:
        where = f"{case['model']}, {case['clients']:,} clients"
        found += [f"{where}: {n} failed: {s['failed']}" for n, s in case["sides"].items() if s["failed"]]
        found += [
            f"{where}: {name}'s loss is {each:.1%} off the {reference(case)} side's"
            for name, each in gaps(case).items()
            if each > TOLERANCE
        ]
    return found


def overview(results: Mapping[str, Any]) -> str:
    """Seconds per round: a row for each case, a column for each side, in brackets how many times Hansa's."""
    names = [name for name in TITLES if any(name in case["sides"] for case in results["cases"])]
    rows = [
        f"| model | clients | cohort | {' | '.join(TITLES[name] for name in names)} |",
        f"|---|---|---|{'---|' * len(names)}",
    ]
    for case in results["cases"]:
        off = gaps(case)
        cells = [_cell(case, name, off.get(name, 0.0)) for name in names]
        rows.append(
            f"| {MODELS[case['model']]} | {case['clients']:,} | {case['cohort']} | {' | '.join(cells)} |"
        )
    worst = max((each for case in results["cases"] for each in gaps(case).values()), default=0.0)
    told = [
        "",
        "Seconds per round (median), in brackets how many times Hansa's (median of the ratios within each",
        f"rotation). {_machine(results)} Global losses differ by {worst:.2%} at most.",
        "`python benchmarks/peers/run.py` makes this table.",
    ]
    if found := problems(results):
        told += ["", "What is not as it should be:", "", *(f"* {each}" for each in found)]
    return "\n".join([*rows, *told])


def _cell(case: Case, name: str, off: float) -> str:
    side = case["sides"].get(name)
    if side is None:
        return ""
    if side["failed"]:
        return "failed"
    text = _seconds(median(side, "seconds"))
    base = case["sides"].get("hansa")
    if off > TOLERANCE:
        return f"{text}, another job"
    if name == "hansa" or base is None or base["failed"]:
        return text
    return f"{text} ({_times(ratio(side, base))})"


def details(results: Mapping[str, Any]) -> str:
    """All that was measured, a row for each case and side, and the versions."""
    rows = [
        "| model | clients | side | seconds: median (least to most) | CPU seconds | peak MB "
        "| processes, threads | start to end of round 1, s | largest loss difference |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for case in results["cases"]:
        off = gaps(case)
        for name in (name for name in TITLES if name in case["sides"]):
            side = case["sides"][name]
            start = f"| {case['model']} | {case['clients']:,} | {TITLES[name]} "
            if side["failed"]:
                rows.append(f"{start}| failed: {_plain(side['failed'])} | | | | | |")
                continue
            seconds = sorted(each["seconds"] for each in timed(side).values())
            last = [rounds[-1] for rounds in side["repetitions"]]
            cells = [
                f"{_seconds(median(side, 'seconds'))} ({_seconds(seconds[0])} to {_seconds(seconds[-1])})",
                _seconds(median(side, "cpu")),
                f"{max(each['peak_mb'] for each in last):,.0f}",
                f"{last[0]['processes']}, {last[0]['threads']}",
                f"{statistics.median(rounds[0]['since_start'] for rounds in side['repetitions']):.1f}",
                f"{off[name]:.2%}",
            ]
            rows.append(f"{start}| {' | '.join(cells)} |")
    versions: dict[str, str] = {}
    engines = []
    for case in results["cases"]:
        for side in case["sides"].values():
            versions |= side["facts"].get("versions", {})
            if engine := side["facts"].get("engine"):
                engines.append(f"{case['model']} {case['clients']:,}: {_plain(engine)}")
    told = [
        "",
        f"{_machine(results)} Versions: {', '.join(f'{n} {v}' for n, v in sorted(versions.items()))}.",
    ]
    if engines:
        told += ["", "Hansa's engine chose:", "", *(f"* {each}" for each in engines)]
    return "\n".join([*rows, *told])


def picture(results: Mapping[str, Any], path: Path) -> None:
    """Bars of seconds per round on a logarithmic axis, a panel for each case."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "hansa"
    from matplotlib import pyplot, ticker

    cases = results["cases"]
    columns = min(3, len(cases))
    height = -(-len(cases) // columns)
    figure, axes = pyplot.subplots(
        height, columns, figsize=(4 * columns, 2.3 * height), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(cases) :]:
        axis.set_visible(False)
    for case, axis in zip(cases, axes.flat, strict=False):
        shown = [n for n in TITLES if n in case["sides"] and not case["sides"][n]["failed"]]
        values = [median(case["sides"][name], "seconds") for name in shown]
        colours = ["#b5482a" if name == "hansa" else "#8a94a0" for name in shown]
        bars = axis.barh([TITLES[name] for name in shown], values, color=colours)
        axis.bar_label(bars, [_seconds(each) for each in values], padding=3, fontsize=8)
        axis.set_xscale("log")
        axis.xaxis.set_minor_formatter(ticker.NullFormatter())
        if values:
            axis.set_xlim(min(values) / 2, max(values) * 4)
        axis.invert_yaxis()
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_title(
            f"{MODELS[case['model']]}\n{case['clients']:,} clients, cohort {case['cohort']}", fontsize=9
        )
    figure.supxlabel("seconds per round (logarithmic)", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)


def _machine(results: Mapping[str, Any]) -> str:
    machine = results["machine"]
    where = f"{machine['device']}, " if machine["device"] != "cpu" else ""
    flower = (
        "; Flower two processes of one" if any("flwr" in case["sides"] for case in results["cases"]) else ""
    )
    return (
        f"{where}{machine['cpu']}, {machine['cores']} cores; "
        f"{results['threads']} thread{'s' if results['threads'] != 1 else ''} each{flower}."
    )


def _seconds(value: float) -> str:
    """Three digits: 0.0123, 1.23, 12.3."""
    return f"{value:#.3g}".rstrip(".")


def _times(value: float) -> str:
    return f"{value:,.0f}x" if value >= 20 else f"{value:.1f}x" if value >= 2 else f"{value:.2f}x"


def _plain(text: str) -> str:
    return " ".join(text.replace("|", "/").split())
