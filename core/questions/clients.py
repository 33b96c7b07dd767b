"""Who the clients are: what they gave, what they hold, and what a robust rule thinks of them."""

from __future__ import annotations

import io
import json
import zlib
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from hansa.core.questions.record import Columns, Record, question

Bins = Annotated[int, Field(ge=1, le=400)]
Limit = Annotated[int, Field(ge=1, le=2000)]

_ORDERS = {"most": "folded DESC, client", "least": "folded, client", "slowest": "speed NULLS LAST, client"}
LEAST = 0.1
"""Weight, in units of a plain mean's, below which an update counts as left out."""


@question
def contributors(
    record: Record,
    order: Literal["most", "least", "slowest"] = "most",
    client: int | None = None,
    limit: Limit = 500,
) -> Columns:
    """Clients that were asked at all, in an ``order``, or one of them.

    ``client, jobs, folded, discarded, lost``, ``share`` of all folded updates, ``examples``, ``speed`` in
    local steps per second of the run's clock from dispatch to return, mean ``staleness``, and ``last``, when
    one of its jobs ended last.
    """
    return record.columns(
        f"""
        SELECT client, count(*) AS jobs, sum(outcome = 'folded') AS folded,
               sum(outcome = 'discarded') AS discarded, sum(outcome = 'lost') AS lost,
               1.0 * sum(outcome = 'folded') / max(1, (SELECT count(*) FROM participations
                                                       WHERE outcome = 'folded')) AS share,
               max(examples) AS examples,
               sum(CASE WHEN outcome = 'folded' THEN steps END)
                 / nullif(sum(CASE WHEN outcome = 'folded' THEN returned - dispatched END), 0) AS speed,
               avg(CASE WHEN outcome = 'folded' THEN staleness END) AS staleness,
               max(returned) AS last
        FROM participations WHERE :client IS NULL OR client = :client
        GROUP BY client ORDER BY {_ORDERS[order]} LIMIT :limit
        """,
        client=client,
        limit=limit,
    )


@question
def taking_part(record: Record) -> dict[str, Any]:
    """How evenly clients gave.

    ``asked`` and ``gave`` count clients, ``folded`` updates, and ``shares`` [101] is the share of updates of
    the 0, 1, … 100 % of asked clients who gave least (a Lorenz curve).
    """
    counts = [
        n
        for (n,) in record.rows(
            "SELECT sum(outcome = 'folded') AS n FROM participations GROUP BY client ORDER BY n"
        )
    ]
    total = np.concatenate([[0], np.cumsum(counts, dtype=np.float64)])
    shares = np.interp(np.linspace(0, len(counts), 101), np.arange(len(counts) + 1), total)
    return {
        "asked": len(counts),
        "gave": sum(n > 0 for n in counts),
        "folded": int(total[-1]),
        "shares": (shares / max(total[-1], 1)).tolist(),
    }


@question
def partition(record: Record, clients: Bins = 60, classes: Bins = 20) -> dict[str, Any]:
    """Who holds how many examples of what, in bins of clients.

    ``counts`` [bins][classes], ``classes`` their names; ``width`` clients stand in a bin, the last of many
    classes are summed as "others"; ``sizes`` tells of the clients' examples: least, quartiles, most. Nothing
    where nothing was recorded.
    """
    rows = record.rows("SELECT counts, classes FROM distribution")
    if not rows:
        return {"counts": [], "classes": [], "width": 1, "population": 0, "sizes": []}
    blob, text = rows[0]
    held = np.load(io.BytesIO(zlib.decompress(blob)), allow_pickle=False)
    names = list(json.loads(text)) or ["examples"]
    held = held.reshape(len(held), -1)
    names += [str(i) for i in range(len(names), held.shape[1])]
    sizes = held.sum(1)
    if held.shape[1] > classes:
        held = np.concatenate([held[:, : classes - 1], held[:, classes - 1 :].sum(1, keepdims=True)], axis=1)
        names = [*names[: classes - 1], "others"]
    width = -(-len(held) // clients)
    binned = np.add.reduceat(held, np.arange(0, len(held), width), axis=0)
    return {
        "counts": binned.tolist(),
        "classes": [str(name) for name in names],
        "width": width,
        "population": len(held),
        "sizes": np.quantile(sizes, (0, 0.25, 0.5, 0.75, 1)).tolist(),
    }


@question
def quality(record: Record, limit: Limit = 500) -> Columns:
    """What a robust rule makes of the clients, the farthest first; nothing of other runs.

    ``client``; ``judged`` updates, ``kept`` of them with a weight of at least :data:`LEAST` times a plain
    mean's (null where the rule decides every number by itself); mean ``weight`` in these units; mean
    ``relative`` distance to the verdict in units of the round's median; ``broken`` updates that were not
    finite; ``out``, how many of the last ones in a row were left out; ``round`` of the last.
    """
    if not record.has("verdicts"):
        return {name: [] for name in _QUALITY}
    return record.columns(
        f"""
        WITH last AS (SELECT client, max(round) AS kept FROM verdicts WHERE weight >= :least GROUP BY client)
        SELECT {", ".join(f"{value} AS {name}" for name, value in _QUALITY.items())}
        FROM verdicts v LEFT JOIN last USING (client)
        GROUP BY v.client ORDER BY relative IS NOT NULL, relative DESC, v.client LIMIT :limit
        """,
        least=LEAST,
        limit=limit,
    )


_QUALITY = {
    "client": "v.client",
    "judged": "count(*)",
    "kept": "sum(weight >= :least)",
    "weight": "avg(weight)",
    "relative": "avg(relative)",
    "broken": "sum(relative IS NULL)",
    "out": "CASE WHEN count(weight) THEN sum(round > coalesce(kept, -1)) END",
    "round": "max(round)",
}


@question
def judged(record: Record, bins: Bins = 120) -> Columns:
    """How many updates a robust rule saw and left out, and how far the farthest was, in bins of rounds.

    ``round, judged, left_out, farthest``.
    """
    if not record.has("verdicts"):
        return {"round": [], "judged": [], "left_out": [], "farthest": []}
    low, high = record.row("SELECT min(round), max(round) FROM verdicts")
    return record.columns(
        """
        SELECT max(round) AS round, count(*) AS judged, sum(weight < :least) AS left_out,
               max(relative) AS farthest
        FROM verdicts GROUP BY (round - :low) / :width ORDER BY round
        """,
        least=LEAST,
        low=low or 0,
        width=1 if low is None else -(-(high - low + 1) // bins),
    )
