"""Tables in text files, and their train statistics."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hansa.core.data.config import Column, CsvData
from hansa.core.data.examples import Examples
from hansa.core.data.raw import Array, Loaded, Raw, coded, encode, places, resolve
from hansa.core.errors import DataError

_MISSING = ("", "?", "nan")
Text = npt.NDArray[np.object_]
Numbers = npt.NDArray[np.float64]


@dataclass(frozen=True)
class _Table:
    names: tuple[str, ...]  # [columns]
    cells: Text  # [rows, columns]
    places: tuple[tuple[str, int], ...]  # [rows] name of the file, line


def _read_files(paths: str | tuple[str, ...], field: str, config: CsvData) -> list[_Table]:
    files = [resolve(path, field) for path in ((paths,) if isinstance(paths, str) else paths)]
    stems = [file.stem for file in files]
    names = stems if len(set(stems)) == len(stems) else list(map(str, files))
    return [_read_file(file, name, field, config) for file, name in zip(files, names, strict=True)]


def _read_file(file: Path, name: str, field: str, config: CsvData) -> _Table:
    rows: list[list[str]] = []
    lines: list[int] = []
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.reader(
                stream, delimiter=config.delimiter, strict=True, skipinitialspace=config.delimiter != " "
            )
            for row in reader:
                if not row:
                    continue
                if rows and len(row) != len(rows[0]):
                    raise DataError(
                        field,
                        str(file),
                        f"line {reader.line_num} has {len(row)} fields, line {lines[0]} {len(rows[0])}",
                        "mend the line, or set data.delimiter",
                    )
                rows.append([cell.strip() for cell in row])
                lines.append(reader.line_num)
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(
            field,
            str(file),
            f"after line {lines[-1] if lines else 0}: {error}",
            "save it as UTF-8 text, quotes closed",
        ) from error
    if len(rows) <= config.has_header:
        raise DataError(field, str(file), "there are no rows", "choose a file that has some")
    names = tuple(rows[0]) if config.has_header else tuple(map(str, range(len(rows[0]))))
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(
            field,
            str(file),
            f"two columns are named {twice!r}",
            "rename one, or set data.has_header = false if the first line is a row",
        )
    body = slice(1 if config.has_header else 0, None)
    return _Table(names, np.array(rows[body], dtype=object), tuple((name, line) for line in lines[body]))


def _joined(tables: Sequence[_Table]) -> _Table:
    first = tables[0]
    for table in tables[1:]:
        if table.names != first.names:
            raise DataError(
                "data.path",
                table.places[0][0],
                f"its columns differ from those of {first.places[0][0]!r}",
                "give every file the same columns in the same order",
            )
    return _Table(
        first.names,
        np.concatenate([table.cells for table in tables]),
        tuple(place for table in tables for place in table.places),
    )


def _position(table: _Table, column: Column, field: str) -> int:
    if isinstance(column, int) and -len(table.names) <= column < len(table.names):
        return column % len(table.names)
    if isinstance(column, str) and column in table.names:
        return table.names.index(column)
    raise DataError(
        field,
        column,
        f"there is no such column among {', '.join(table.names)}",
        "name one of these, or set data.delimiter or data.has_header",
    )


def _where(table: _Table, row: int, column: int) -> str:
    file, line = table.places[row]
    return f"{file!r} line {line}, column {table.names[column]!r}"


def _absent(cells: Text) -> npt.NDArray[np.bool_]:
    return np.isin(np.strings.lower(cells.astype(str)), _MISSING)


def _numbers(table: _Table, column: int, field: str, remedy: str) -> Numbers:
    """``[rows]``: the column as numbers, NaN where one is missing."""
    cells = table.cells[:, column]
    absent = _absent(cells)
    try:
        numbers = np.where(absent, "nan", cells).astype(np.float64)
    except ValueError:
        row = next(row for row, cell in enumerate(cells) if not (absent[row] or _is_number(cell)))
        raise DataError(field, cells[row], f"{_where(table, row, column)} is not a number", remedy) from None
    if len(bad := np.flatnonzero(np.isinf(numbers))):
        raise DataError(
            field,
            cells[bad[0]],
            f"{len(bad)} values are not finite, the first in {_where(table, int(bad[0]), column)}",
            "remove or replace them",
        )
    return numbers


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _one_hot(table: _Table, column: int, features: Sequence[str] | None) -> tuple[Numbers, list[str]]:
    """``[rows, values]``: 1 in the column of the row's value, NaN all along where it is missing; their names.

    The values are those that ``features`` names, or those that occur.
    """
    cells, prefix = table.cells[:, column], f"{table.names[column]}="
    given = np.flatnonzero(~_absent(cells))
    values: Sequence[str] = [
        each.removeprefix(prefix) for each in features or () if each.startswith(prefix)
    ] or coded([cells[given]])[1]
    made = np.full((len(cells), len(values)), np.nan)
    if len(given):
        codes = places(cells[given], values)
        if len(unknown := given[codes < 0]):
            raise DataError(
                "data.feature_names",
                cells[unknown[0]],
                f"{_where(table, int(unknown[0]), column)} is none of {', '.join(values)}",
                "correct the value, or name it there too",
            )
        made[given] = np.eye(len(values))[codes]
    return made, [prefix + value for value in values]


def _order(features: Sequence[str], wanted: Sequence[str]) -> list[int]:
    """Where each wanted feature stands."""
    for name in sorted(set(wanted).symmetric_difference(features)):
        problem, remedy = (
            ("this data has no such feature", "name the columns as there, header and data.categorical alike")
            if name in wanted
            else ("this feature is not among them", "name its column in data.ignore")
        )
        raise DataError("data.feature_names", name, problem, remedy)
    at = {name: place for place, name in enumerate(features)}
    return [at[name] for name in wanted]


def _known(table: _Table, column: int, field: str) -> Text:
    cells = table.cells[:, column]
    if len(absent := np.flatnonzero(_absent(cells))):
        raise DataError(
            field,
            cells[absent[0]],
            f"missing values: {len(absent)}, the first in {_where(table, int(absent[0]), column)}",
            "remove those rows",
        )
    return cells


def read(config: CsvData) -> Loaded:
    """The table's rows as examples, numbers first, then the one-hot features of categorical columns.

    Raises
    ------
    DataError
        If a file is missing or ragged, a column is absent or not numeric, or values are missing.
    """
    tables = _read_files(config.path, "data.path", config)
    end = sum(len(table.places) for table in tables)
    table = _joined(tables + _read_files(config.test_path or (), "data.test_path", config))

    target = _position(table, config.target, "data.target")
    group = None if config.group is None else _position(table, config.group, "data.group")
    ignored = {_position(table, column, "data.ignore") for column in config.ignore}
    categorical = [_position(table, column, "data.categorical") for column in config.categorical]
    if target in categorical:
        raise DataError(
            "data.categorical",
            config.target,
            "it is the target: the examples would tell what is to be learnt",
            "leave it out here; a class may be text as it is",
        )
    numeric = [
        column for column in range(len(table.names)) if column not in {target, group, *ignored, *categorical}
    ]
    remedy = "name the column in data.categorical or data.ignore"
    blocks = [_numbers(table, column, "data.path", remedy)[:, None] for column in numeric]
    features = [table.names[column] for column in numeric]
    for column in categorical:
        block, names = _one_hot(table, column, config.feature_names)
        blocks.append(block)
        features += names
    if not blocks:
        raise DataError("data.path", config.path, "no column is left to learn from", "ignore fewer columns")
    x = np.concatenate(blocks, axis=1)
    order = list(range(len(features)))
    if config.feature_names is not None:
        order = _order(features, config.feature_names)
        x = x[:, order]
    if config.missing == "error" and np.isnan(x).any():
        raise _missing_error(table, [*numeric, *categorical], config)

    y: Array = _known(table, target, "data.target")
    if config.task == "regression":
        y = _numbers(table, target, "data.target", "choose a numeric column, or data.task = 'classification'")
    origin: Array | None = None
    if group is not None:
        origin = _known(table, group, "data.group")
    elif isinstance(config.path, tuple):
        origin = np.array([file for file, _ in table.places])
    train, held_out = (
        Raw(x=x[rows], y=y[rows], group=None if origin is None else origin[rows])
        for rows in (slice(end), slice(end, None))
    )
    test_rows = held_out if len(held_out.x) else None
    # Double precision until the features are standardised: a date in seconds would not survive single.
    loaded = encode(train, test_rows, regression=config.task == "regression", dtype=np.float64)
    named = tuple(features[at] for at in order)
    return Loaded(
        train=replace(loaded.train, features=named),
        test=None if loaded.test is None else replace(loaded.test, features=named),
        numeric=torch.tensor(order) < len(numeric),
    )


def _missing_error(table: _Table, columns: list[int], config: CsvData) -> DataError:
    absent = np.stack([_absent(table.cells[:, column]) for column in columns], axis=1)
    row, first = np.argwhere(absent)[0]
    return DataError(
        "data.missing",
        config.missing,
        f"missing values: {absent.sum()}, columns with any: {absent.any(axis=0).sum()}; "
        f"the first in {_where(table, int(row), columns[first])}",
        "set it to 'mean' to put the train mean in their place, or remove those rows or columns",
    )


def standardise(train: Examples, test: Examples, numeric: Tensor) -> tuple[Examples, Examples]:
    """Fill gaps with the train mean, then bring the numeric features to train mean 0 and variance 1.

    The deviation of a constant feature is 0 but for the rounding of its mean, which may be off by n ε |mean|
    (Higham, "Accuracy and Stability of Numerical Algorithms", section 4.2).

    Parameters
    ----------
    train, test:
        x ``[N, d]`` float64, NaN where a value is missing; float32 and no NaN in what is returned.
    numeric:
        ``[d]`` bool: which features to standardise; a constant one is only centred.

    Raises
    ------
    DataError
        If a feature has no value at all among the train examples.
    """
    mean = train.x.nanmean(dim=0)
    if mean.isnan().any():
        raise DataError(
            "data.ignore",
            int(mean.isnan().nonzero()[0]),
            "this feature (from 0) has no value in any train example",
            "name its column here",
        )
    spread = torch.where(train.x.isnan(), mean, train.x).std(dim=0, correction=0)
    rounding = len(train) * torch.finfo(mean.dtype).eps * mean.abs()
    shift = torch.where(numeric, mean, 0.0)
    scale = torch.where(numeric & (spread > rounding), spread, 1.0)
    made = [
        replace(part, x=((torch.where(part.x.isnan(), mean, part.x) - shift) / scale).float())
        for part in (train, test)
    ]
    return made[0], made[1]
