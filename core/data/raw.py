"""What the readers of every format share: paths, raw columns, and names turned into numbers."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hansa.core.data.examples import Examples
from hansa.core.errors import DataError

Array = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class Raw:
    """Columns as read: y and group still hold names or numbers of any kind."""

    x: Array  # [N, ...]
    y: Array  # [N], or [N, k] targets
    group: Array | None = None  # [N]


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """What a reader hands over."""

    train: Examples
    test: Examples | None = None  # None where the source has no test set of its own
    # [d] bool: the features to be standardised; x may then hold NaN for missing values
    numeric: Tensor | None = None


def resolve(path: str, field: str, *, folder: bool = False) -> Path:
    """The existing file (or folder) at ``path``, with ``~`` and ``$VAR`` expanded.

    Raises
    ------
    DataError
        If there is none.
    """
    found = Path(os.path.expandvars(path)).expanduser()
    if not (found.is_dir() if folder else found.is_file()):
        raise DataError(
            field,
            str(found),
            f"there is no such {'folder' if folder else 'file'}",
            f"correct the path (it is taken relative to {Path.cwd()})",
        )
    return found


def coded(parts: Sequence[Array]) -> tuple[list[npt.NDArray[np.int64]], tuple[str, ...]]:
    """Codes 0, 1, … of the values that occur in any of the parts, and the values' names.

    Text that is all numbers is ordered by number, and different spellings of a number ("1", "1.0") are one
    value. Numbers are exact, for ids are longer than floats, and have no underscores: "3_12" is no 312.
    """
    distinct, codes = np.unique(
        np.concatenate([np.asarray(part, _plain(part)) for part in parts]), return_inverse=True
    )
    names = [str(int(value)) if _whole(value) else str(value) for value in distinct]
    if distinct.dtype.kind == "U" and not any("_" in name for name in names):
        try:
            numbers = np.array([Decimal(name) for name in names], object)
            _, first, merged = np.unique(numbers, return_index=True, return_inverse=True)
        except ArithmeticError:  # not numbers, or NaN, which has no place in their order
            pass
        else:
            names, codes = [names[at] for at in first], merged[codes]
    ends = np.cumsum([len(part) for part in parts])
    return np.split(codes.astype(np.int64), ends[:-1]), tuple(names)


def places(values: Array, names: Sequence[str]) -> npt.NDArray[np.int64]:
    """Where each value stands among ``names``, as :func:`coded` tells them apart; -1 where it does not."""
    (known, found), _ = coded([np.array(names), values])
    at = np.full(max(known.max(), found.max(initial=-1)) + 1, -1)
    at[known] = np.arange(len(names))
    made: npt.NDArray[np.int64] = at[found]
    return made


def numbered(examples: Examples, names: Sequence[str]) -> Examples:
    """The examples with their classes numbered as ``names`` has them.

    Raises
    ------
    DataError
        If there are no classes, or one that has no name there.
    """
    if examples.classes is None:
        raise DataError("data.class_names", list(names), "the targets are numbers", "leave it out")
    numbers = places(np.array(examples.classes), names)
    if (numbers < 0).any():
        raise DataError(
            "data.class_names",
            list(names),
            f"the data has a class {examples.classes[int(numbers.argmin())]!r}, which is not among them",
            "add it, or correct the data",
        )
    as_named = torch.from_numpy(numbers)
    x = as_named[examples.x] if examples.task == "text" else examples.x
    return replace(examples, x=x, y=as_named[examples.y], classes=tuple(names))


def _plain(values: Array) -> npt.DTypeLike:
    return str if values.dtype.kind == "O" else values.dtype


def _whole(value: Any) -> bool:
    return isinstance(value, np.floating) and value.is_integer()


def encode(train: Raw, test: Raw | None, *, regression: bool, dtype: npt.DTypeLike = np.float32) -> Loaded:
    """Examples with numbered classes and groups; train and test share the numbering."""
    raws = [train] if test is None else [train, test]
    classes: tuple[str, ...] | None = None
    groups: tuple[str, ...] = ()
    group_codes: Sequence[Array | None] = [None] * len(raws)
    # What is too large for the type becomes infinite, and is refused as such.
    with np.errstate(over="ignore"):
        xs = [np.ascontiguousarray(raw.x, dtype) for raw in raws]
        ys: Sequence[Array] = [raw.y.astype(np.float32) for raw in raws] if regression else []
    if not regression:
        ys, classes = coded([raw.y for raw in raws])
    if grouped := [raw.group for raw in raws if raw.group is not None]:
        group_codes, groups = coded(grouped)
    made = [
        Examples(
            x=torch.from_numpy(x),
            y=torch.from_numpy(y),
            group=None if group is None else torch.from_numpy(group),
            classes=classes,
            groups=groups,
        )
        for x, y, group in zip(xs, ys, group_codes, strict=True)
    ]
    return Loaded(train=made[0], test=None if test is None else made[1])
