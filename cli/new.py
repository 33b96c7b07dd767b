"""``hansa new``: a recipe to begin with."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hansa.cli.things import choices
from hansa.cli.toml import template
from hansa.core.errors import InputError
from hansa.core.recipe import parse

# What an algorithm needs beside it, to run as it is meant to.
_BATCH_NORM = {
    "model": {"name": "mlp", "norm": "batch"},
    "partition": {"kind": "dirichlet", "clients": 20, "alpha": 0.3, "min_size": 2},
}
_SLOW = {"speeds": "lognormal", "spread": 10.0}
_BUFFERED = {"schedule": {"name": "buffered", "k": 5, "concurrency": 10}, "population": _SLOW}
_COMPANIONS: Mapping[str, Mapping[str, Any]] = {
    "fedbn": _BATCH_NORM,
    "fraug": _BATCH_NORM,
    "fedbuff": _BUFFERED,
    "fedasync": {"schedule": {"name": "buffered", "k": 1, "concurrency": 10}, "population": _SLOW},
    "favano": {"schedule": {"name": "periodic", "interval": 7.0, "recall": 5}, "population": _SLOW},
    "afa_cd": _BUFFERED,
    "afa_cs": _BUFFERED,
    "dfedsam": {"topology": {"kind": "ring"}},
}


def write_new(path: Path, algorithm: str) -> Path:
    """Write a commented recipe for an algorithm to ``path`` (with ``.toml``); returns where.

    Raises
    ------
    InputError
        For an unknown algorithm, or where there is such a file already, or the folder cannot be written.
    """
    if not re.search(r"\w", path.name):
        raise InputError("NAME", str(path), "it names no file", "write it as in `hansa new study`")
    path = path if path.suffix == ".toml" else path.with_name(f"{path.name}.toml")
    name = re.sub(r"[^\w.-]+", "-", path.stem)
    text = template(
        parse({"name": name, "algorithm": {"name": algorithm}, **_COMPANIONS.get(algorithm, {})}),
        path,
        choices(),
    )
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as error:
        raise InputError("NAME", str(path), "there is such a file already", "choose another name") from error
    except OSError as error:
        raise InputError(
            "NAME", str(path), f"it cannot be written ({error.strerror})", "choose a writable folder"
        ) from error
    return path
