"""The pictures of a run, each a function from plain arrays to a matplotlib ``Figure``.

Figures are made through matplotlib's objects alone: no ``pyplot``, no global state, so that any
thread may draw. Colours: M. A. Petroff, "Accessible Color Sequences for Data Visualization",
arXiv:2107.02270 (ten colours that stay apart under the common colour-vision deficiencies), and
ColorBrewer's sequential *Blues* for quantities, where nothing is white.
"""

from __future__ import annotations

import io
import textwrap
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter
from numpy.typing import ArrayLike, NDArray

from hansa.ui.theme import CATEGORIES

__all__ = [
    "client_spread",
    "compare",
    "contributions",
    "losses",
    "others",
    "participation",
    "partition_picture",
    "png",
    "progress",
    "staleness",
    "timeline",
]

Series: TypeAlias = tuple[ArrayLike, ArrayLike]
"""Where (rounds, seconds, bytes) and the values there, both [n]."""

_INK, _SOFT, _GRID = "#1f2328", "#59636e", "#e4e7eb"
_WIDTH = 9.6  # inches
_BARS = 60  # more clients than this are drawn as a curve or a map
_COLUMNS = 1000  # more clients than this are binned


def partition_picture(counts: NDArray[np.integer[Any]], classes: Sequence[str] = ()) -> Figure:
    """Who holds what: stacked bars up to 60 clients and ten classes, a heat map beyond.

    Parameters
    ----------
    counts:
        Examples [clients, classes], or sizes alone [clients].
    classes:
        Names of the classes, in the order of the columns.
    """
    counts = np.asarray(counts)
    if counts.ndim == 1:
        return _sizes(counts)
    names = list(classes) or [str(c) for c in range(counts.shape[1])]
    if len(counts) <= _BARS and counts.shape[1] <= len(CATEGORIES):
        return _stacked(counts, names)
    return _shares(counts, names)


def _stacked(counts: NDArray[np.integer[Any]], names: Sequence[str]) -> Figure:
    figure, (axes,) = _canvas(1, height=3.6)
    clients = np.arange(len(counts))
    below = np.zeros(len(counts))
    for column, name, colour in zip(counts.T, names, CATEGORIES, strict=False):
        axes.bar(
            clients,
            column,
            0.86,
            bottom=below,
            color=colour,
            edgecolor="white",
            linewidth=0.4,
            label=_plain(name),
        )
        below += column
    axes.set(xlabel="client", ylabel="examples", xlim=(-0.7, len(counts) - 0.3))
    axes.set_ylim(0, 1.05 * max(below.max(initial=0), 1))
    _whole(axes.xaxis, 20)
    axes.grid(visible=False, axis="x")
    _thousands(axes)
    _legend(figure, axes, title="class", reverse=True)
    return figure


def _shares(counts: NDArray[np.integer[Any]], names: Sequence[str]) -> Figure:
    totals = counts.sum(axis=1)
    share = counts / np.maximum(totals, 1)[:, None]  # [clients, classes]
    # Clients of a like kind stand together: by their most frequent class, and by how frequent it is.
    order = np.lexsort((-share.max(axis=1), share.argmax(axis=1)))
    # Of many classes none has a large share; the few clients that stand out share the darkest colour.
    top = float(np.quantile(share.max(axis=1), 0.98)) or 1.0
    share, totals = _binned(share[order], _COLUMNS), _binned(totals[order].astype(float), _COLUMNS)

    height = 1.6 + min(4.2, max(1.8, 0.24 * len(names)))
    figure, (size, axes) = _canvas(2, height=height, stacked=True, ratios=(1, height - 1.6), sharex=True)
    extent = (-0.5, len(counts) - 0.5)
    edges = np.linspace(*extent, len(totals) + 1)
    size.stairs(totals, edges, fill=True, color=CATEGORIES[8])
    size.set(ylabel="examples", ylim=(0, None))
    size.grid(visible=False, axis="x")
    size.yaxis.set_major_locator(MaxNLocator(nbins=3, integer=True))
    _thousands(size)
    picture = axes.imshow(
        share.T,
        aspect="auto",
        interpolation="nearest",
        cmap="Blues",
        vmin=0,
        vmax=top,
        extent=(*extent, len(names) - 0.5, -0.5),
    )
    axes.set(xlabel="clients, those with the same most frequent class together", ylabel="class", xlim=extent)
    shown = range(0, len(names), -(-len(names) // 26))
    axes.set_yticks(list(shown), [_plain(names[c]) for c in shown])
    axes.grid(visible=False)
    _whole(axes.xaxis)
    bar = _colour_bar(figure, picture, axes, "share of the client's examples")
    bar.ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    return figure


def _sizes(counts: NDArray[np.integer[Any]]) -> Figure:
    figure, (axes,) = _canvas(1, height=2.8)
    if len(counts) <= _BARS:
        axes.bar(np.arange(len(counts)), counts, 0.86, color=CATEGORIES[0])
        axes.set(xlabel="client", xlim=(-0.7, len(counts) - 0.3))
    else:
        axes.stairs(
            _binned(np.sort(counts)[::-1].astype(float), _COLUMNS),
            np.linspace(0, len(counts), min(len(counts), _COLUMNS) + 1),
            fill=True,
            color=CATEGORIES[0],
        )
        axes.set(xlabel="clients, the largest first", xlim=(0, len(counts)))
    axes.set(ylabel="examples", ylim=(0, None))
    _whole(axes.xaxis, 20 if len(counts) <= _BARS else 10)
    axes.grid(visible=False, axis="x")
    _thousands(axes)
    return figure


def progress(
    rounds: ArrayLike,
    accuracy: ArrayLike,
    *,
    seconds: ArrayLike,
    transferred: ArrayLike,
    updates: ArrayLike | None = None,
) -> Figure:
    """Headline accuracy over rounds, virtual time [s] and bytes sent both ways so far, all [n].

    With ``updates``, the client updates folded so far, over these instead of rounds.
    """
    figure, panels = _canvas(3, height=3.0, sharey=True)
    values = np.asarray(accuracy, float)
    scale, unit = _time_unit(seconds)
    factor, size = _byte_unit(transferred)
    where = (
        (np.asarray(rounds, float), "round")
        if updates is None
        else (np.asarray(updates, float), "client updates"),
        (np.asarray(seconds, float) / scale, f"virtual time ({unit})"),
        (np.asarray(transferred, float) / factor, f"sent up and down ({size})"),
    )
    for axes, (x, label) in zip(panels, where, strict=True):
        _line(axes, x, values, CATEGORIES[0])
        axes.set(xlabel=label, xlim=(0, None) if x.size and x.min() >= 0 else None)
    _whole(panels[0].xaxis, 6)
    panels[0].set(ylabel="accuracy")
    _percent(panels[0], values)
    return figure


def losses(series: Mapping[str, Series]) -> Figure:
    """Losses by name over rounds, on a logarithmic scale where they fall by more than a hundredfold."""
    figure, (axes,) = _canvas(1, height=3.0)
    for (name, (x, y)), colour in zip(series.items(), _repeat(CATEGORIES), strict=False):
        _line(axes, x, y, colour, label=_plain(name))
    values = np.concatenate([np.asarray(y, float) for _, y in series.values()] or [np.empty(0)])
    values = values[np.isfinite(values)]
    if values.size and values.min() > 0 and values.max() > 100 * values.min():
        axes.set_yscale("log")
    axes.set(xlabel="round", ylabel="loss")
    _whole(axes.xaxis)
    _legend(figure, axes)
    return figure


def client_spread(accuracy: ArrayLike, rounds: ArrayLike = (), quantiles: ArrayLike = ()) -> Figure:
    """Accuracy of every client at the end, and its worst, quartiles and best over rounds.

    Parameters
    ----------
    accuracy:
        Each client's accuracy in the last evaluation [clients]; NaN is left out.
    rounds, quantiles:
        Rounds [n] and the accuracies [n, 5]: worst, lower quartile, median, upper quartile, best.
        The second panel appears from two rounds on.
    """
    final = np.asarray(accuracy, float)
    final = np.sort(final[np.isfinite(final)])
    x, bands = np.asarray(rounds, float), np.asarray(quantiles, float).reshape(-1, 5)
    figure, panels = _canvas(2 if len(x) > 1 else 1, height=3.0, sharey=True)
    last = panels[0]
    if len(final) <= _BARS:
        last.bar(np.arange(1, len(final) + 1), final, 0.8, color=CATEGORIES[0])
    else:
        last.stairs(
            _binned(final, _COLUMNS),
            np.linspace(0.5, len(final) + 0.5, min(len(final), _COLUMNS) + 1),
            fill=True,
            color=CATEGORIES[0],
        )
    if len(final):
        mean = final.mean()
        last.axhline(mean, color=_INK, linewidth=1, linestyle=(0, (4, 3)))
        last.annotate(
            f"mean {mean:.1%}",
            (0.02, mean),
            xycoords=last.get_yaxis_transform(),
            xytext=(0, 3),
            textcoords="offset points",
            color=_INK,
            fontsize=9,
        )
    last.set(
        xlabel="clients, the worst first",
        ylabel="accuracy",
        ylim=(0, 1),
        xlim=(0.3, max(len(final), 1) + 0.7),
    )
    _whole(last.xaxis)
    last.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    last.grid(visible=False, axis="x")
    if len(x) > 1:
        worst, lower, median, upper, best = bands.T
        over = panels[1]
        over.fill_between(x, worst, best, color=CATEGORIES[0], alpha=0.18, linewidth=0, label="worst to best")
        over.fill_between(x, lower, upper, color=CATEGORIES[0], alpha=0.45, linewidth=0, label="middle half")
        over.plot(x, median, color=_INK, linewidth=1.6, label="median")
        over.plot(x, worst, color=CATEGORIES[2], linewidth=1.2, label="worst client")
        over.set(xlabel="round", xlim=(x[0], x[-1]))
        _whole(over.xaxis, 7)
        _legend(figure, over)
    return figure


def staleness(counts: Mapping[int, int]) -> Figure:
    """How many folded updates (values) were how many server steps old (keys)."""
    figure, (axes,) = _canvas(1, height=2.6)
    ages = np.array(list(counts), float)
    jobs = np.array(list(counts.values()), float)
    width = max(1, int(np.ceil((ages.max(initial=0) + 1) / _BARS)))
    bars = np.bincount((ages // width).astype(int), weights=jobs)
    axes.bar(
        np.arange(len(bars)) * width + (width - 1) / 2,
        bars / max(jobs.sum(), 1),
        0.86 * width,
        color=CATEGORIES[0],
    )
    mean = float(ages @ jobs / max(jobs.sum(), 1))
    axes.axvline(mean, color=_INK, linewidth=1, linestyle=(0, (4, 3)))
    axes.annotate(
        f"mean {mean:.1f}",
        (mean, 0.98),
        xycoords=axes.get_xaxis_transform(),
        xytext=(5, 0),
        textcoords="offset points",
        va="top",
        color=_INK,
        fontsize=9,
    )
    axes.set_ylim(0, 1.18 * bars.max(initial=1) / max(jobs.sum(), 1))  # room for the line's label
    axes.set(xlabel="staleness (server steps between dispatch and return)", ylabel="share of updates")
    _whole(axes.xaxis)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.grid(visible=False, axis="x")
    return figure


def contributions(updates: ArrayLike, examples: ArrayLike) -> Figure:
    """Who contributed how often against p_i: shares of the folded updates over shares of the examples.

    On the diagonal a client has the say that its data give it; on the dashed line, as much as any other.

    Parameters
    ----------
    updates, examples:
        Of every client [n].
    """
    figure, (axes,) = _canvas(1, height=3.4)
    often, share = np.asarray(updates, float), np.asarray(examples, float)
    often, share = often / max(often.sum(), 1), share / max(share.sum(), 1)
    top = float(max(often.max(initial=0), share.max(initial=0))) or 1.0
    axes.plot([0, 1.05 * top], [0, 1.05 * top], color=_INK, linewidth=1, label="as often as $p_i$ says")
    level = 1 / max(len(often), 1)
    axes.axhline(level, color=_INK, linewidth=1, linestyle=(0, (4, 3)), label="all equally often")
    axes.scatter(share, often, s=22, color=CATEGORIES[0], alpha=0.7, linewidth=0, label="a client")
    axes.set(
        xlabel="share of the examples, $p_i$",
        ylabel="share of the updates",
        xlim=(0, 1.05 * max(float(share.max(initial=0)), level)),
        ylim=(0, 1.08 * max(float(often.max(initial=0)), level)),
    )
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1, decimals=1 if top < 0.06 else 0))
    _legend(figure, axes)
    return figure


def timeline(
    clients: NDArray[np.integer[Any]],
    dispatched: NDArray[np.floating[Any]],
    returned: NDArray[np.floating[Any]],
    outcomes: NDArray[np.str_],
    *,
    steps: ArrayLike = (),
) -> Figure:
    """Who was at work when: a bar a job, a row a client, the busiest sixty of them.

    Parameters
    ----------
    clients, dispatched, returned, outcomes:
        Of every job [n]: whose, from and to [s], and ``folded``, ``discarded`` or ``lost``.
    steps:
        When the hub made a step [s]: a line each, if there are at most sixty in the window.
    """
    who, jobs = np.unique(clients, return_counts=True)
    shown = np.sort(who[np.argsort(-jobs, kind="stable")[:_BARS]])
    scale, unit = _time_unit(returned)
    height = float(np.clip(0.13 * len(shown) + 1.0, 2.0, 6.0))
    figure, (axes,) = _canvas(1, height=height)
    colours = {"folded": CATEGORIES[0], "discarded": CATEGORIES[3], "lost": CATEGORIES[2]}
    for outcome, colour in colours.items():
        here = (outcomes == outcome) & np.isin(clients, shown)
        if here.any():
            axes.barh(
                np.searchsorted(shown, clients[here]),
                (returned - dispatched)[here] / scale,
                0.8,
                left=dispatched[here] / scale,
                color=colour,
                edgecolor="white",
                linewidth=0.6,
                label=outcome,
            )
    began, ended = float(dispatched.min(initial=0)), float(returned.max(initial=0))
    began = float(dispatched.min()) if len(dispatched) else began
    made = np.asarray(steps, float)
    made = made[(made >= began) & (made <= ended)]
    if len(made) <= _BARS:
        for at in made:
            axes.axvline(at / scale, color=_INK, linewidth=0.5, alpha=0.5, zorder=0)
    axes.set(xlabel=f"virtual time ({unit})", ylabel="client", ylim=(len(shown) - 0.4, -0.6))
    ticks = range(0, len(shown), -(-max(len(shown), 1) // 20))
    axes.set_yticks(list(ticks), [str(shown[i]) for i in ticks])
    axes.grid(visible=False, axis="y")
    _legend(figure, axes)
    return figure


def participation(
    counts: NDArray[np.integer[Any]],
    wasted: NDArray[np.integer[Any]],
    *,
    clients: NDArray[np.integer[Any]],
    rounds: NDArray[np.integer[Any]],
) -> Figure:
    """Who took part when: jobs by client and round, and above it the share that was wasted, if any.

    Parameters
    ----------
    counts, wasted:
        Jobs, and those of them that were discarded or lost [client bins, round bins].
    clients, rounds:
        Edges of the bins [bins + 1].
    """
    extent = (rounds[0] - 0.5, rounds[-1] - 0.5, clients[-1] - 0.5, clients[0] - 0.5)
    height = float(np.clip(0.14 * len(counts) + 1.2, 2.2, 4.2))
    if wasted.any():
        figure, (above, axes) = _canvas(
            2, height=height + 1.1, stacked=True, ratios=(1, height - 0.6), sharex=True
        )
        above.stairs(
            wasted.sum(axis=0) / np.maximum(counts.sum(axis=0), 1),
            rounds - 0.5,
            fill=True,
            color=CATEGORIES[2],
        )
        above.set(ylabel="lost or\ndiscarded", ylim=(0, None))
        above.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        above.yaxis.set_major_locator(MaxNLocator(nbins=3))
        above.grid(visible=False, axis="x")
    else:
        figure, (axes,) = _canvas(1, height=height)
    top = max(int(counts.max(initial=1)), 1)
    # Few different numbers get as many colours, so that one job can be told from two.
    few = top < 6
    steps = ListedColormap(colormaps["Blues"](np.linspace(0, 0.6 if top == 1 else 1, top + 1)))
    picture = axes.imshow(
        counts,
        aspect="auto",
        interpolation="nearest",
        cmap=steps if few else "Blues",
        vmin=-0.5 if few else 0,
        vmax=top + 0.5 if few else top,
        extent=extent,
    )
    axes.set(xlabel="round", ylabel="client")
    axes.grid(visible=False)
    _whole(axes.xaxis)
    _whole(axes.yaxis)
    if top > 1:
        cell = (int(clients[1] - clients[0]), int(rounds[1] - rounds[0]))
        size = "" if cell == (1, 1) else f" per {cell[0]} clients × {cell[1]} rounds"
        bar = _colour_bar(figure, picture, axes, f"jobs{size}")
        bar.locator = MaxNLocator(6, integer=True)
    return figure


def compare(
    series: Mapping[str, Series],
    *,
    over: Literal["rounds", "time", "wall", "bytes"] = "rounds",
    metric: str = "accuracy",
    deviations: Mapping[str, ArrayLike] | None = None,
) -> Figure:
    """One metric of several runs (by name) over rounds, virtual or wall time [s] or bytes so far.

    ``deviations`` are drawn as bands of that width on both sides.
    """
    figure, (axes,) = _canvas(1, height=3.8)
    everywhere = [x for x, _ in series.values()]
    scale, label = 1.0, "round"
    if over in ("time", "wall"):
        scale, unit = _time_unit(*everywhere)
        label = f"{'virtual' if over == 'time' else 'wall-clock'} time ({unit})"
    elif over == "bytes":
        scale, unit = _byte_unit(*everywhere)
        label = f"sent up and down ({unit})"
    dashes = [style for style in ("-", (0, (5, 2)), (0, (1.5, 1.5))) for _ in CATEGORIES]
    for (name, (x, y)), colour, dash in zip(
        series.items(), _repeat(CATEGORIES), _repeat(dashes), strict=False
    ):
        _line(axes, np.asarray(x, float) / scale, y, colour, label=_plain(name, lines=2), linestyle=dash)
        width = np.asarray((deviations or {}).get(name, 0.0), float)
        if width.any():
            low, high = np.asarray(y, float) - width, np.asarray(y, float) + width
            axes.fill_between(np.asarray(x, float) / scale, low, high, color=colour, alpha=0.18, linewidth=0)
    axes.set(xlabel=label, ylabel=_plain(metric))
    if over == "rounds":
        _whole(axes.xaxis)
    if "accuracy" in metric:
        _percent(axes, np.concatenate([np.asarray(y, float) for _, y in series.values()] or [np.empty(0)]))
    _legend(figure, axes)
    return figure


def others(series: Mapping[str, Series]) -> Figure:
    """Any further metrics over rounds, a small panel each (three to a row)."""
    rows = -(-len(series) // 3)
    figure = Figure(figsize=(_WIDTH, 2.2 * rows), layout="constrained", facecolor="white")
    grid = figure.add_gridspec(rows, 3)
    for place, (name, (x, y)) in enumerate(series.items()):
        axes = figure.add_subplot(grid[place // 3, place % 3])
        _dress(axes)
        _line(axes, x, y, CATEGORIES[0])
        axes.set_title(_plain(name), fontsize=10, loc="left", color=_INK)
        _whole(axes.xaxis, 5)
        axes.yaxis.set_major_locator(MaxNLocator(nbins=4))
        if place >= len(series) - 3:
            axes.set(xlabel="round")
    return figure


def png(figure: Figure) -> bytes:
    """A figure as the bytes of a picture."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # A name in a script that the font lacks is drawn as boxes; that is no reason to complain.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(buffer, format="png", dpi=160)
    return buffer.getvalue()


def _canvas(
    panels: int,
    *,
    height: float,
    stacked: bool = False,
    ratios: tuple[float, ...] | None = None,
    sharex: bool = False,
    sharey: bool = False,
) -> tuple[Figure, list[Axes]]:
    layout = ConstrainedLayoutEngine(wspace=0.02 if stacked else 0.05)
    figure = Figure(figsize=(_WIDTH, height), layout=layout, facecolor="white")
    shape = (panels, 1) if stacked else (1, panels)
    axes = figure.subplots(
        *shape,
        sharex=sharex,
        sharey=sharey,
        squeeze=False,
        gridspec_kw={"height_ratios": ratios} if ratios else None,
    )
    flat: list[Axes] = list(axes.flat)
    for one in flat:
        _dress(one)
    return figure, flat


def _dress(axes: Axes) -> None:
    axes.set_facecolor("white")
    axes.grid(visible=True, color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#b6bcc4")
    axes.tick_params(which="both", colors=_SOFT, labelsize=9, length=3, color="#b6bcc4")
    for axis in (axes.xaxis, axes.yaxis):
        axis.label.set(color=_SOFT, fontsize=10)


def _line(axes: Axes, x: ArrayLike, y: ArrayLike, colour: str, **style: Any) -> None:
    """A line through the finite values; few points are marked, or a lone one would not be seen."""
    where, values = np.asarray(x, float), np.asarray(y, float)
    shown = np.isfinite(values)
    few = np.count_nonzero(shown) <= 25
    axes.plot(
        where[shown],
        values[shown],
        color=colour,
        linewidth=1.8,
        marker="o" if few else "",
        markersize=4,
        **style,
    )


def _legend(figure: Figure, axes: Axes, *, title: str | None = None, reverse: bool = False) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if not handles:
        return
    legend = axes.legend(
        handles,
        labels,
        title=title,
        reverse=reverse,
        loc="center left",
        bbox_to_anchor=(1.0, 0.5),
        frameon=False,
        fontsize=9,
        labelcolor=_INK,
        title_fontsize=9,
    )
    legend.get_title().set_color(_SOFT)


def _colour_bar(figure: Figure, picture: Any, axes: Axes, label: str) -> Any:
    bar = figure.colorbar(picture, ax=axes, pad=0.015, fraction=0.04, aspect=24)
    bar.outline.set_visible(False)
    bar.ax.tick_params(colors=_SOFT, labelsize=9, length=0)
    bar.set_label(label, color=_SOFT, fontsize=9)
    return bar


def _percent(axes: Axes, values: NDArray[np.float64]) -> None:
    """Percentages; the scale is cut to the values, and never leaves 0 to 100 % by more than a hair."""
    finite = values[np.isfinite(values)]
    low, high = (finite.min(), finite.max()) if finite.size else (0.0, 1.0)
    margin = max(0.06 * (high - low), 0.01)
    low, high = max(low - margin, -0.01), min(high + margin, 1.01)
    axes.set_ylim(low, high)
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0 if high - low >= 0.06 else 1))


def _whole(axis: Axis, ticks: int = 10) -> None:
    axis.set_major_locator(MaxNLocator(ticks, steps=[1, 2, 5, 10], integer=True))


def _thousands(axes: Axes) -> None:
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}".replace(",", "\u202f")))


def _binned(values: NDArray[np.float64], limit: int) -> NDArray[np.float64]:
    """Means of at most ``limit`` runs of neighbours, along the first axis."""
    if len(values) <= limit:
        return values
    starts = np.linspace(0, len(values), limit + 1).astype(int)[:-1]
    sizes = np.diff(np.append(starts, len(values)))
    sums: NDArray[np.float64] = np.add.reduceat(values, starts, axis=0)
    return sums / sizes.reshape(-1, *[1] * (values.ndim - 1))


def _time_unit(*seconds: ArrayLike) -> tuple[float, str]:
    longest = _largest(seconds)
    for limit, scale, unit in ((180.0, 1.0, "s"), (10_800.0, 60.0, "min"), (259_200.0, 3_600.0, "h")):
        if longest < limit:
            return scale, unit
    return 86_400.0, "days"


def _byte_unit(*sizes: ArrayLike) -> tuple[float, str]:
    largest = _largest(sizes)
    for power, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if largest >= power:
            return power, unit
    return 1.0, "B"


def _largest(arrays: Iterable[ArrayLike]) -> float:
    return max((float(np.max(array, initial=0)) for array in arrays), default=0.0)


def _plain(text: str, lines: int = 1) -> str:
    """``text`` as it stands: no formula between dollar signs, no hiding behind an underscore."""
    room = 40 * lines
    text = text if len(text) <= room else text[: room - 1] + "…"
    text = textwrap.fill(text, 40) if lines > 1 else text
    return ("\u200a" if text.startswith("_") else "") + text.replace("$", r"\$")


def _repeat(items: Sequence[Any]) -> Iterable[Any]:
    while True:
        yield from items
