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

from hansa.core.errors import RunError, StorageError
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
    """Write ``folder/<version>``, with a copy of the bank's file; a crash leaves older checkpoints whole.

    Those of later rounds, which a resumed run will make again, go.

    Raises
    ------
    StorageError
        When the disk takes nothing.
    """
    final, draft = folder / f"{version:08d}", folder / f".{version:08d}.{os.getpid()}"
    try:
        for left in folder.glob(".[0-9]*"):  # of processes that died at it
            shutil.rmtree(left, ignore_errors=True)
        draft.mkdir(parents=True)
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
    except (OSError, SafetensorError) as error:
        shutil.rmtree(draft, ignore_errors=True)
        raise StorageError(
            f"{final}: the checkpoint cannot be written ({error}); make room and resume the run"
        ) from error
    kept = [path for path in _all(folder) if path <= final][-_KEPT:]
    for old in _all(folder):
        if old not in kept:
            shutil.rmtree(old, ignore_errors=True)
    return final


def load(folder: Path, upto: int | None = None) -> tuple[Tree, dict[str, Any], Path | None] | None:
    """Tensors, facts and the bank's file of the newest checkpoint that can be read; ``None`` without any.

    Those after round ``upto`` are passed over.

    Raises
    ------
    RunError
        When there are checkpoints and none can be read.
    """
    found = [path for path in _all(folder) if upto is None or int(path.name) <= upto]
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
