"""Checkpoints: tensors as safetensors, the rest as JSON, made visible in one rename."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from hansa.core.errors import RunError
from hansa.core.trees import Tree

_KEPT = 2
_BANK = "bank"


def save(
    folder: Path,
    version: int,
    tensors: Mapping[str, Any],
    facts: Mapping[str, Any],
    bank: IO[bytes] | None = None,
) -> Path:
    """Write ``folder/<version>``, with a copy of the bank's file; a crash leaves older checkpoints whole."""
    folder.mkdir(parents=True, exist_ok=True)
    final, draft = folder / f"{version:08d}", folder / f".{version:08d}.{os.getpid()}"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    save_file(
        {name: each.detach().cpu().contiguous() for name, each in tensors.items()},
        draft / "state.safetensors",
    )
    (draft / "state.json").write_text(json.dumps(facts))
    if bank is not None:
        bank.seek(0)
        with (draft / _BANK).open("wb") as file:
            shutil.copyfileobj(bank, file, 2**22)
    for path in draft.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    shutil.rmtree(final, ignore_errors=True)
    draft.rename(final)
    for old in _all(folder)[:-_KEPT]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def load(folder: Path) -> tuple[Tree, dict[str, Any], Path | None] | None:
    """Tensors, facts and the bank's file of the newest checkpoint that can be read; ``None`` without any.

    Raises
    ------
    RunError
        When there are checkpoints and none can be read.
    """
    found = _all(folder)
    reason = ""
    for path in reversed(found):
        try:
            facts = json.loads((path / "state.json").read_text())
            bank = path / _BANK
            # In memory of their own: products of numbers that lie askew, as in the file, may round otherwise.
            tensors = {name: each.clone() for name, each in load_file(path / "state.safetensors").items()}
            return tensors, facts, bank if bank.exists() else None
        except (OSError, ValueError, SafetensorError) as error:
            reason = f"{path.name}: {error}"
    if found:
        raise RunError(
            f"{folder}: no checkpoint can be read ({reason}); start the run again from its recipe.toml"
        )
    return None


def _all(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("[0-9]*") if path.is_dir())
