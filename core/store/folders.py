"""Run directories: made, listed, exported."""

from __future__ import annotations

import csv
import io
import json
import re
import secrets
from collections.abc import Iterator
from datetime import UTC, datetime
from math import isfinite
from pathlib import Path

from hansa.core.errors import InputError, RunError
from hansa.core.store.faults import unwritable
from hansa.core.store.reading import Reading
from hansa.core.store.records import RunSummary, nullable
from hansa.core.store.writing import RunStore


def new_run_directory(runs: Path, name: str) -> Path:
    """Make a new directory in ``runs`` (itself made if absent) and return it.

    Its name, the run's id, sorts by time: UTC date and time, ``name`` in lower-case letters, digits
    and hyphens, and a random suffix, as in ``20261121-093000-fedavg-k3f``. No two calls return the
    same, on however many processes.

    Raises
    ------
    RunError
        If ``runs`` cannot be written.
    """
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower())[:40].strip("-") or "run"
    while True:
        suffix = "".join(secrets.choice("abcdefghijkmnpqrstuvwxyz23456789") for _ in range(3))
        directory = runs / f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{slug}-{suffix}"
        try:
            runs.mkdir(parents=True, exist_ok=True)
            directory.mkdir()
        except FileExistsError as error:
            if not runs.is_dir():
                raise unwritable(runs, error) from error
        except OSError as error:
            raise unwritable(runs, error) from error
        else:
            return directory


def runs(folder: Path) -> Iterator[RunSummary]:
    """Every run in ``folder``, the newest first; those that cannot be read last, with the reason."""
    found = []
    for directory in sorted(folder.iterdir(), reverse=True) if folder.is_dir() else ():
        try:
            if not ((directory / "run.db").exists() or (directory / "recipe.toml").exists()):
                continue
            with RunStore.open(directory) as store:
                found.append(store.summary())
        except (RunError, OSError) as error:
            found.append(
                RunSummary(id=directory.name, directory=directory, status="unreadable", error=str(error))
            )
    found.sort(key=lambda run: run.started.timestamp() if run.started else 0.0, reverse=True)
    yield from found


def export(store: Reading, path: Path) -> None:
    """Write the rounds to ``path``, one row each, with every metric as a column.

    The suffix says how: ``.csv``, where a missing value is an empty cell, or ``.json``, a list of
    objects, where it is null (and so is an infinite one, for which JSON has no number).

    Raises
    ------
    InputError
        If the suffix is another, or ``path`` cannot be written.
    """
    suffix = path.suffix.lower()
    if suffix not in (".csv", ".json"):
        raise InputError("export", str(path), "the format is not known", "end the name in .csv or .json")
    names = store.metrics()
    rows: list[dict[str, int | float | None]] = [
        {
            "round": row.index,
            "time": row.time,
            "wall": row.wall,
            "bytes_up": row.bytes_up,
            "bytes_down": row.bytes_down,
            **{name: nullable(row.metrics.get(name)) for name in names},
        }
        for row in store.rounds()
    ]
    text = io.StringIO()
    if suffix == ".csv":
        header = ["round", "time", "wall", "bytes_up", "bytes_down", *names]
        writer = csv.DictWriter(text, header, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    else:
        finite = [
            {name: value if value is None or isfinite(value) else None for name, value in row.items()}
            for row in rows
        ]
        json.dump(finite, text, indent=1, allow_nan=False)
        text.write("\n")
    try:
        path.write_text(text.getvalue(), encoding="utf-8")
    except OSError as error:
        raise InputError(
            "export", str(path), f"the file cannot be written ({error.strerror})", "choose a writable folder"
        ) from error
