"""How a run stands and how it got there: its line in a list, its curves, its log."""

from __future__ import annotations

import tomllib
from typing import Annotated, Any

from pydantic import Field

from hansa.core.questions.record import Columns, Record, question
from hansa.core.store import HEADLINE, locked

Bins = Annotated[int, Field(ge=1, le=2000)]
Names = Annotated[list[str], Field(max_length=64)]


@question
def facts(record: Record) -> dict[str, Any]:
    """How a run stands, in one line.

    ``status`` is running, finished, interrupted or failed; ``total``, ``limit`` and ``target`` are the
    recipe's ``stop.rounds``, ``stop.time`` and ``stop.target``; ``headline`` names the metric that it is
    judged by, with its ``last`` and ``best`` value; ``made`` are the facts that the run recorded of itself.
    """
    name, seed, text, started, status, error = record.row(
        "SELECT name, seed, recipe, started, status, error FROM run"
    )
    rounds, time, wall, up, down = record.row(
        "SELECT count(*), max(time), max(wall), sum(bytes_up), sum(bytes_down) FROM rounds"
    )
    if status == "running" and not locked(record.directory):
        status, error = "interrupted", "the process that ran it ended without a word"
    made = dict(record.rows("SELECT name, value FROM facts"))
    written = _table(text)
    stop = _table_in(written, "stop")
    headline = HEADLINE if _last(record, HEADLINE) is not None else "loss"
    return {
        "name": name,
        "seed": int(seed),
        "algorithm": made.get("algorithm", str(_table_in(written, "algorithm").get("name", ""))),
        "schedule": made.get("schedule", str(_table_in(written, "schedule").get("name", ""))),
        "topology": str(_table_in(written, "topology").get("kind", "star")),
        "clients": int(made["clients"]) if made.get("clients", "").isdigit() else None,
        "started": started,
        "status": status,
        "error": error,
        "rounds": rounds,
        "total": stop.get("rounds"),
        "limit": stop.get("time"),
        "target": stop.get("target"),
        "time": time or 0.0,
        "wall": wall or 0.0,
        "bytes_up": int(up or 0),
        "bytes_down": int(down or 0),
        "headline": headline,
        "last": _last(record, headline),
        "best": _best(record, headline),
        "made": made,
    }


def _last(record: Record, metric: str) -> float | None:
    found = record.rows(
        "SELECT value FROM metrics WHERE name = :name AND value IS NOT NULL ORDER BY round DESC LIMIT 1",
        name=metric,
    )
    return found[0][0] if found else None


def _best(record: Record, metric: str) -> float | None:
    best = "max" if metric == HEADLINE else "min"
    value: float | None = record.row(f"SELECT {best}(value) FROM metrics WHERE name = :name", name=metric)[0]
    return value


def _table(toml: str) -> dict[str, Any]:
    try:
        return tomllib.loads(toml)
    except tomllib.TOMLDecodeError:
        return {}


def _table_in(recipe: dict[str, Any], section: str) -> dict[str, Any]:
    found = recipe.get(section)
    return found if isinstance(found, dict) else {}


@question
def recipe(record: Record) -> str:
    """TOML text of the recipe that is run."""
    text: str = record.row("SELECT recipe FROM run")[0]
    return text


@question
def metric_names(record: Record) -> list[str]:
    """Names of the metrics that any round has, sorted; the headline first."""
    # From one name to the next in the key, rather than over every row.
    found = record.rows(
        """
        WITH RECURSIVE next(name) AS (
          SELECT min(name) FROM metrics
          UNION ALL
          SELECT (SELECT min(name) FROM metrics WHERE name > next.name) FROM next WHERE next.name IS NOT NULL
        )
        SELECT name FROM next WHERE name IS NOT NULL
        """
    )
    return sorted((name for (name,) in found), key=lambda name: (name != HEADLINE, name))


@question
def curve(record: Record, metrics: Names, bins: Bins = 400) -> Columns:
    """Metrics over the run: ``metric, round, time, wall, sent, value, low, high``.

    Rounds that have a value stand in at most ``bins`` equally wide bins: ``value`` is the mean, ``low`` and
    ``high`` the extremes of a bin, and the other columns those of its last round; ``sent`` counts all bytes
    up to it.
    """
    low, high = record.row("SELECT min(round), max(round) FROM rounds")
    width = 1 if low is None else -(-(high - low + 1) // bins)
    wanted = ", ".join(f":m{i}" for i in range(len(metrics)))
    return record.columns(
        f"""
        WITH path AS (
          SELECT round, time, wall, sum(bytes_up + bytes_down) OVER (ORDER BY round) AS sent FROM rounds
        ),
        binned AS (
          SELECT name, max(round) AS round, avg(value) AS value, min(value) AS low, max(value) AS high
          FROM metrics WHERE name IN ({wanted}) AND value IS NOT NULL
          GROUP BY name, (round - :low) / :width
        )
        SELECT name AS metric, round, time, wall, sent, value, low, high
        FROM binned JOIN path USING (round) ORDER BY name, round
        """,
        low=low or 0,
        width=width,
        **{f"m{i}": name for i, name in enumerate(metrics)},
    )


@question
def series(
    record: Record, metric: str, after: int = -1, limit: Annotated[int, Field(ge=1, le=20_000)] = 20_000
) -> Columns:
    """Every value of a metric, in order: ``round, value``; of rounds beyond ``after``, at most ``limit``."""
    return record.columns(
        "SELECT round, value FROM metrics WHERE name = :name AND round > :after ORDER BY round LIMIT :limit",
        name=metric,
        after=after,
        limit=limit,
    )


@question
def rounds(
    record: Record, after: int = -1, limit: Annotated[int, Field(ge=1, le=20_000)] = 20_000
) -> Columns:
    """Rounds beyond ``after``, at most ``limit``: ``round, time, wall, bytes_up, bytes_down``."""
    return record.columns(
        "SELECT round, time, wall, bytes_up, bytes_down FROM rounds WHERE round > :after "
        "ORDER BY round LIMIT :limit",
        after=after,
        limit=limit,
    )


@question
def outcome(
    record: Record, metric: str, falling: bool = False, target: float | None = None
) -> dict[str, float | None]:
    """What a metric came to: ``last`` and ``best``, and what it took to come to ``target``.

    ``rounds``, ``time``, ``wall`` and ``bytes`` are those of the first round at or beyond the target, below
    it where the metric is ``falling``; null where none is.
    """
    beyond, better = ("<=", "min") if falling else (">=", "max")
    there = record.row(
        f"SELECT min(round) FROM metrics WHERE name = :name AND value {beyond} :target",
        name=metric,
        target=target,
    )[0]
    cost: tuple[float | None, ...] = (None, None, None)
    if there is not None:
        cost = record.row(
            "SELECT max(time), max(wall), sum(bytes_up + bytes_down) FROM rounds WHERE round <= :there",
            there=there,
        )
    best = record.row(f"SELECT {better}(value) FROM metrics WHERE name = :name", name=metric)[0]
    names = ("last", "best", "rounds", "time", "wall", "bytes")
    return dict(zip(names, (_last(record, metric), best, there, *cost), strict=True))


@question
def events(
    record: Record,
    search: Annotated[str, Field(max_length=200)] = "",
    before: int | None = None,
    limit: Annotated[int, Field(ge=1, le=1000)] = 200,
) -> Columns:
    """The newest events, the last first: ``id, time, kind, client, text``.

    Only those whose kind or text contains ``search``, and of numbers below ``before``.
    """
    return record.columns(
        """
        SELECT id, time, kind, client, text FROM events
        WHERE (:search = '' OR instr(lower(kind || ' ' || text), lower(:search)))
          AND (:before IS NULL OR id < :before)
        ORDER BY id DESC LIMIT :limit
        """,
        search=search,
        before=before,
        limit=limit,
    )
