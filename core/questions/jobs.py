"""Who took part, and how long it took: maps and histograms of jobs, counted in the database."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from hansa.core.questions.record import Columns, Record, question

Bins = Annotated[int, Field(ge=1, le=400)]


_WINDOW = 40_000  # jobs that a histogram or a map is made of, at about a microsecond each


def _since(record: Record) -> int:
    """The round before the newest ones that have about as many jobs as a histogram is made of."""
    found = record.rows(
        "SELECT round FROM participations ORDER BY round DESC, position DESC LIMIT 1 OFFSET :jobs",
        jobs=_WINDOW,
    )
    return int(found[0][0]) if found else -1


@question
def ages(record: Record) -> Columns:
    """How many folded updates were how stale: ``staleness, jobs``; of a long run, the newest ones."""
    return record.columns(
        "SELECT staleness, count(*) AS jobs FROM participations WHERE outcome = 'folded' AND round > :since "
        "GROUP BY staleness ORDER BY staleness",
        since=_since(record),
    )


@question
def waits(record: Record, bins: Bins = 40) -> Columns:
    """How long folded updates took and waited, in seconds of the run's clock: ``kind, low, high, jobs``.

    ``kind`` is ``"away"``, from the dispatch to the return, or ``"waiting"``, from the return to the step
    that folded it; ``low`` and ``high`` bound a bin. Of a long run, the newest updates. Before version 3 of
    the schema nothing waits.
    """
    found: Columns = {"kind": [], "low": [], "high": [], "jobs": []}
    since = _since(record)
    kinds = {"away": "p.returned - p.dispatched", "waiting": "r.time - p.returned"}
    for kind, seconds in kinds.items():
        spans = (
            f"SELECT {seconds} AS s FROM rounds r CROSS JOIN participations p USING (round) "
            "WHERE r.round > :since AND outcome = 'folded'"
        )
        longest = record.row(f"SELECT max(s) FROM ({spans})", since=since)[0]
        if not longest or longest <= 0:
            continue
        width = longest / bins
        counted = record.rows(
            f"SELECT min(CAST(max(s, 0) / :width AS INTEGER), :last) AS bin, count(*) FROM ({spans}) "
            "GROUP BY bin ORDER BY bin",
            width=width,
            last=bins - 1,
            since=since,
        )
        for i, jobs in counted:
            for name, value in zip(found, (kind, i * width, (i + 1) * width, jobs), strict=True):
                found[name].append(value)
    return found


@question
def grid(record: Record, clients: Bins = 80, rounds: Bins = 120) -> dict[str, Any]:
    """Jobs by client and round in bins: ``client, round, jobs, wasted`` of the bins that have any.

    ``wasted`` counts those that were discarded or lost; ``clients`` and ``rounds`` tell how wide the bins
    are, ``first`` and ``last`` which rounds the map spans, ``population`` how many clients. Of a long run,
    only ``every`` so many rounds are counted.
    """
    first, last = record.row("SELECT min(round), max(round) FROM rounds")
    highest = record.row("SELECT max(client) FROM participations WHERE round > :since", since=_since(record))[
        0
    ]
    if first is None or highest is None:
        return {"client": [], "round": [], "jobs": [], "wasted": []}
    known = dict(record.rows("SELECT name, value FROM facts WHERE name = 'clients'")).get("clients", "")
    population = max(highest + 1, int(known) if known.isdigit() else 0)
    tall, wide = -(-population // clients), -(-(last - first + 1) // rounds)
    newest = record.row("SELECT count(*) FROM participations WHERE round > :since", since=last - 20)[0]
    jobs = newest / min(20, last - first + 1) * (last - first + 1)
    every = min(max(1, round(jobs / _WINDOW)), wide)  # at least one of each bin
    counted = record.columns(
        """
        SELECT client / :tall * :tall AS client, :first + (r.round - :first) / :wide * :wide AS round,
               count(*) AS jobs, sum(outcome != 'folded') AS wasted
        FROM rounds r CROSS JOIN participations p USING (round)
        WHERE r.round BETWEEN :first AND :last AND (r.round - :first) % :wide % :every = 0 GROUP BY 1, 2
        """,
        tall=tall,
        wide=wide,
        every=every,
        first=first,
        last=last,
    )
    return {
        **counted,
        "clients": tall,
        "rounds": wide,
        "every": every,
        "first": first,
        "last": last,
        "population": population,
    }


@question
def tuned(record: Record, clients: Bins = 100) -> dict[str, Any]:
    """How often which client was asked to change which tensor: ``client, layer, jobs``; nothing of most runs.

    ``clients`` tells how wide the bins are.
    """
    if not record.has("tuned"):
        return {"client": [], "layer": [], "jobs": []}
    highest = record.row("SELECT max(client) FROM tuned")[0] or 0
    wide = -(-(highest + 1) // clients)
    counted = record.columns(
        "SELECT client / :wide * :wide AS client, name AS layer, count(*) AS jobs FROM tuned "
        "JOIN layer_names USING (layer) GROUP BY 1, layer ORDER BY layer, 1",
        wide=wide,
    )
    return {**counted, "clients": wide}


@question
def pace(record: Record, bins: Bins = 120) -> Columns:
    """How much was done in how much time: ``wall``, folded ``updates`` and ``sent`` bytes per wall second.

    Rounds stand in at most ``bins`` bins; ``wall`` is the end of a bin, in seconds since the start.
    """
    low, high = record.row("SELECT min(round), max(round) FROM rounds")
    return record.columns(
        """
        WITH folded AS (
          SELECT round, count(*) AS jobs FROM participations WHERE outcome = 'folded' GROUP BY round
        ),
        binned AS (
          SELECT max(wall) AS wall, total(jobs) AS jobs, total(bytes_up + bytes_down) AS bytes
          FROM rounds LEFT JOIN folded USING (round) GROUP BY (round - :low) / :width
        ),
        spans AS (SELECT *, wall - lag(wall, 1, 0.0) OVER (ORDER BY wall) AS span FROM binned)
        SELECT wall, jobs / span AS updates, bytes / span AS sent FROM spans WHERE span > 0 ORDER BY wall
        """,
        low=low or 0,
        width=1 if low is None else -(-(high - low + 1) // bins),
    )
