"""From a source to train and held-out examples."""

from __future__ import annotations

from importlib.metadata import distribution

import numpy as np
import numpy.typing as npt
import torch
from numpy.random import Generator

from hansa.core.data import arrays, huggingface, images, synthetic, tables, text
from hansa.core.data.config import (
    CsvData,
    DataConfig,
    DigitsData,
    HuggingFaceData,
    IdxData,
    ImagesData,
    NpyData,
    SyntheticFeatureShift,
    SyntheticLabelShift,
    TextData,
)
from hansa.core.data.examples import Examples, require_finite, require_learnable
from hansa.core.data.raw import Loaded, Raw, encode, numbered
from hansa.core.data.strata import by_class_and_group, sample
from hansa.core.errors import DataError
from hansa.core.randomness import generator


def load(config: DataConfig, seed: int, *, alone: bool = True) -> tuple[Examples, Examples]:
    """Train examples, and test examples that no client trains on.

    Where the source has no test set, ``test_fraction`` of the examples is held out, of each class of each
    group alike (the only example of one stays in the train set). The seed chooses them, the examples
    that ``limit`` keeps, and what synthetic sources make up. ``alone``: nobody else has other classes.

    Raises
    ------
    DataError
        If data is missing, damaged, not finite, empty, or alone and of a single class where none are named.
    InputError
        If the source needs a package that is not installed.
    """
    loaded = _read(config, seed)
    train, test = loaded.train, loaded.test
    if config.class_names is not None:
        train = numbered(train, config.class_names)
        test = None if test is None else numbered(test, config.class_names)
    if loaded.numeric is None:
        require_finite(train, "data")
    if test is None:
        train, test = _held_out(train, config.test_fraction, generator(seed, "data", "test"))
    elif loaded.numeric is None:
        require_finite(test, "data")
    if test.x.shape[1:] != train.x.shape[1:] or test.y.shape[1:] != train.y.shape[1:]:
        raise DataError(
            "data",
            list(test.x.shape[1:]),
            f"train examples are {list(train.x.shape[1:])}, tests not",
            "give both the same shape",
        )
    if config.limit is not None and config.limit < len(train):
        kept = sample(by_class_and_group(train), config.limit, generator(seed, "data", "limit"))
        train = _masked(train, kept)
    if loaded.numeric is not None:
        train, test = tables.standardise(train, test, loaded.numeric)
        require_finite(train, "data")
        require_finite(test, "data")
    require_learnable(train, "data", alone=alone and config.class_names is None)
    if len(test) == 0:
        raise DataError("data", 0, "there are no test examples", "give more examples, or another test set")
    return train, test


def _read(config: DataConfig, seed: int) -> Loaded:
    match config:
        case DigitsData():
            return encode(_digits(), None, regression=False)
        case IdxData():
            return arrays.read_idx(config)
        case CsvData():
            return tables.read(config)
        case ImagesData():
            return images.read(config)
        case NpyData():
            return arrays.read_npy(config)
        case TextData():
            return text.read(config)
        case HuggingFaceData():
            return huggingface.read(config)
        case SyntheticFeatureShift():
            return Loaded(train=synthetic.feature_shift(config, seed))
        case SyntheticLabelShift():
            return Loaded(train=synthetic.label_shift(config, seed))


def _digits() -> Raw:
    """scikit-learn's digits, from the file that comes with it.

    Importing scikit-learn takes seconds and 130 MB, for which a coordinator or an agent would wait.
    """
    path = distribution("scikit-learn").locate_file("sklearn/datasets/data/digits.csv.gz")
    table = np.loadtxt(str(path), delimiter=",")
    return Raw(x=table[:, :-1].reshape(-1, 1, 8, 8) / 16, y=table[:, -1].astype(np.int64))


def _held_out(examples: Examples, fraction: float, rng: Generator) -> tuple[Examples, Examples]:
    count = max(1, round(fraction * len(examples))) if len(examples) else 0
    test = sample(by_class_and_group(examples), count, rng, spare=1)
    if not test.any():
        # Every stratum is a single example: there is nothing to keep in proportion.
        test = sample(np.zeros(len(examples), np.int64), count, rng, spare=1)
    return _masked(examples, ~test), _masked(examples, test)


def _masked(examples: Examples, mask: npt.NDArray[np.bool_]) -> Examples:
    return examples.take(torch.from_numpy(np.flatnonzero(mask)))
