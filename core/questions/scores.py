"""How the model does for its clients, and how it moves: spreads and layers over the rounds."""

from __future__ import annotations

import io
import zlib
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from hansa.core.questions.record import Columns, Record, question
from hansa.core.store import SPREAD
from hansa.core.store import spread as spread_of

Bins = Annotated[int, Field(ge=1, le=1000)]


@question
def spread(record: Record, bins: Bins = 300) -> Columns:
    """How the clients' accuracies lie over the rounds: ``round`` and :data:`~hansa.core.store.SPREAD`.

    Rounds that were evaluated stand in at most ``bins`` bins, of which the last one is told. Every client
    counts the same.
    """
    if not record.has("spreads"):
        return _spread_of_old(record, bins)
    low, high = record.row("SELECT min(round), max(round) FROM spreads")
    return record.columns(
        f"SELECT max(round) AS round, {', '.join(SPREAD)} FROM spreads GROUP BY (round - :low) / :width "
        "ORDER BY round",
        low=low or 0,
        width=1 if low is None else -(-(high - low + 1) // bins),
    )


def _spread_of_old(record: Record, bins: int) -> Columns:
    """Of a run of version 1, from the scores of some rounds."""
    rounds = [each for (each,) in record.rows("SELECT round FROM client_scores ORDER BY round")]
    few = min(bins, 100)
    if len(rounds) > few:
        rounds = [rounds[i] for i in np.linspace(0, len(rounds) - 1, few).round().astype(int)]
    found: Columns = {name: [] for name in ("round", *SPREAD)}
    for index in rounds:
        blob = record.row("SELECT accuracy FROM client_scores WHERE round = :round", round=index)[0]
        values = spread_of(np.load(io.BytesIO(zlib.decompress(blob)), allow_pickle=False))
        if values is not None:
            for name, value in zip(found, (index, *values.tolist()), strict=True):
                found[name].append(value)
    return found


@question
def layers(record: Record, bins: Bins = 120) -> dict[str, Any]:
    """How far each tensor of the model moved: ``names`` [L], ``round`` [R], ``moved`` and ``share`` [L, R].

    Rounds stand in at most ``bins`` bins, named by their last one: ``moved`` is the mean L2 norm of a step's
    change, ``share`` the mean of that norm by the tensor's own. Null where nothing is known.
    """
    if not record.has("movements"):
        return {"names": [], "round": [], "moved": [], "share": []}
    names = [name for (name,) in record.rows("SELECT name FROM layer_names ORDER BY layer")]
    rows = record.rows("SELECT round, moved, size FROM movements ORDER BY round")
    if not rows:
        return {"names": [], "round": [], "moved": [], "share": []}
    rounds = np.array([row[0] for row in rows])
    moved, size = (_stacked([row[i] for row in rows], len(names)) for i in (1, 2))
    with np.errstate(invalid="ignore", divide="ignore"):
        share = np.where(size > 0, moved / size, np.nan)
    width = -(-(int(rounds[-1]) - int(rounds[0]) + 1) // bins)
    _, starts = np.unique((rounds - rounds[0]) // width, return_index=True)
    ends = np.append(starts[1:], len(rounds))
    kept = np.atleast_1d(~np.isnan(moved).all(axis=0))  # names that are only ever tuned have no movement
    return {
        "names": [name for name, known in zip(names, kept, strict=True) if known],
        "round": rounds[ends - 1].tolist(),
        "moved": _means(moved[:, kept], starts),
        "share": _means(share[:, kept], starts),
    }


def _stacked(blobs: list[bytes], layers: int) -> np.ndarray[Any, Any]:
    """[rounds, layers], NaN where a round knew fewer."""
    found = np.full((len(blobs), layers), np.nan)
    for row, blob in zip(found, blobs, strict=True):
        values = np.frombuffer(blob, "<f4")[:layers]
        row[: len(values)] = values
    return found


def _means(values: np.ndarray[Any, Any], starts: np.ndarray[Any, Any]) -> list[list[float | None]]:
    """Means over bins of rounds [layers][bins] of what is known."""
    known = ~np.isnan(values)
    counts = np.add.reduceat(known, starts, axis=0, dtype=np.int64)
    sums = np.add.reduceat(np.where(known, values, 0.0), starts, axis=0)
    means = np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)
    return [[None if np.isnan(each) else float(each) for each in row] for row in means.T]
