"""Who talks to whom in a gossip network, and how much."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from hansa.core.questions.record import Record, question

Limit = Annotated[int, Field(ge=1, le=5000)]

_TRAFFIC = """
    WITH gave AS (SELECT client, count(*) AS n FROM participations WHERE outcome = 'folded' GROUP BY client),
    ends AS (SELECT a AS peer FROM edges UNION ALL SELECT b FROM edges),
    degrees AS (SELECT peer, count(*) AS degree FROM ends GROUP BY peer),
    sent AS (SELECT sum(n * degree) AS messages FROM gave JOIN degrees ON peer = client)
"""


@question
def topology(record: Record, limit: Limit = 1500) -> dict[str, Any]:
    """The graph: columns ``a, b, weight, bytes`` of its edges, the busiest first, at most ``limit`` of them.

    ``edges`` and ``peers`` count them all; ``degree`` is the least and the greatest. A peer sends its model
    to all its neighbours whenever it takes part, so an edge's ``bytes``, both ways, are its ends' updates,
    each of the run's mean size. Nothing of a run with a server.
    """
    empty: dict[str, Any] = {"a": [], "b": [], "weight": [], "bytes": []}
    if not record.has("edges"):
        return {**empty, "edges": 0, "peers": 0, "degree": [0, 0]}
    edges = record.row("SELECT count(*) FROM edges")[0]
    peers, least, most = record.row(f"{_TRAFFIC} SELECT count(*), min(degree), max(degree) FROM degrees")
    found = record.columns(
        f"""
        {_TRAFFIC}
        SELECT a, b, weight,
               coalesce((coalesce(ga.n, 0) + coalesce(gb.n, 0)) * 1.0 * (SELECT sum(bytes_up) FROM rounds)
                        / (SELECT messages FROM sent), 0) AS bytes
        FROM edges LEFT JOIN gave ga ON ga.client = a LEFT JOIN gave gb ON gb.client = b
        ORDER BY bytes DESC, a, b LIMIT :limit
        """,
        limit=limit,
    )
    return {**found, "edges": edges, "peers": peers, "degree": [least or 0, most or 0]}
