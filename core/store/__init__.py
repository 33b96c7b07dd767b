"""The record of a run: one directory, one database.

::

    <runs>/<run id>/
      ├─ recipe.toml         the recipe as it was run
      ├─ run.db              rounds, metrics, jobs, scores, verdicts, movement, events (this package)
      ├─ run.lock            held by the one process that writes
      ├─ checkpoints/        what the run is resumed from
      ├─ model.safetensors   the model it ended with
      └─ report.html         what :mod:`hansa.ui.report` made of it

One process writes, any number read at the same time (SQLite in WAL mode, or any other database that
SQLAlchemy reaches, one run to a database). Metrics stand in long format, one row to a round and a
name, so that a new metric needs no migration; a value that is NaN is stored as NULL and read as NaN.
Arrays (who holds what, clients' scores) are stored as compressed ``.npy``.
"""

from hansa.core.store.folders import export, new_run_directory, runs
from hansa.core.store.locks import locked, writer
from hansa.core.store.records import (
    HEADLINE,
    SPREAD,
    ClientScores,
    Event,
    Outcome,
    Participation,
    ParticipationGrid,
    Round,
    RoundRow,
    RunSummary,
    Status,
    Verdicts,
    spread,
)
from hansa.core.store.schema import SCHEMA_VERSION
from hansa.core.store.writing import RunStore

__all__ = [
    "HEADLINE",
    "SCHEMA_VERSION",
    "SPREAD",
    "ClientScores",
    "Event",
    "Outcome",
    "Participation",
    "ParticipationGrid",
    "Round",
    "RoundRow",
    "RunStore",
    "RunSummary",
    "Status",
    "Verdicts",
    "export",
    "locked",
    "new_run_directory",
    "runs",
    "spread",
    "writer",
]
