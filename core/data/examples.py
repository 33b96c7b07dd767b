"""Examples, who holds which of them, and the two together."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hansa.core.errors import DataError

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Examples:
    """A set of N labelled examples.

    Attributes
    ----------
    x:
        ``[N, ...]`` float32 features (images are ``[N, C, H, W]``), or ``[N, T]`` int64 tokens.
    y:
        ``[N]`` int64 labels, ``[N, T]`` int64 next tokens, or ``[N]`` / ``[N, k]`` float32 targets.
    group:
        ``[N]`` int64: the natural column (domain, speaker, hospital …), if the data has one.
    classes:
        Names of the class values; for text the vocabulary; None for regression.
    groups:
        Names of the group values.
    features:
        Names of the features x ``[N, d]``, where the source has some.

    Raises
    ------
    DataError
        If x, y and group differ in length.
    """

    x: Tensor
    y: Tensor
    group: Tensor | None = None
    classes: tuple[str, ...] | None
    groups: tuple[str, ...] = ()
    features: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if len(self.x) != len(self.y):
            raise DataError(
                "data",
                f"{len(self.x)} x, {len(self.y)} y",
                "x and y differ in length",
                "give one y for every x",
            )
        if self.group is not None and len(self.group) != len(self.x):
            raise DataError(
                "data",
                f"{len(self.x)} x, {len(self.group)} groups",
                "x and group differ in length",
                "give one group for every x",
            )

    def __len__(self) -> int:
        return len(self.x)

    @property
    def task(self) -> Literal["classification", "regression", "text"]:
        """What is to be learnt: one class, one or more numbers, or the next token at every position."""
        if self.classes is None:
            return "regression"
        return "classification" if self.y.ndim == 1 else "text"

    def take(self, indices: Tensor) -> Examples:
        """The examples at ``indices`` (``[n]`` int64), in that order."""
        group = None if self.group is None else self.group[indices]
        return replace(self, x=self.x[indices], y=self.y[indices], group=group)


@dataclass(frozen=True, eq=False)
class Shards:
    """Who has what, in compressed rows: no object per client, a million clients are two arrays.

    Attributes
    ----------
    indices:
        ``[total]`` int64 positions in an :class:`Examples`, client after client.
    offsets:
        ``[clients + 1]`` int64: client c holds ``indices[offsets[c]:offsets[c + 1]]``.
    """

    indices: Tensor
    offsets: Tensor

    @classmethod
    def by_owner(cls, owner: Ints, clients: int) -> Shards:
        """Shards of ``clients`` clients, where ``owner[i]`` holds example i."""
        offsets = np.zeros(clients + 1, np.int64)
        np.cumsum(np.bincount(owner, minlength=clients), out=offsets[1:])
        return cls(torch.from_numpy(np.argsort(owner, kind="stable")), torch.from_numpy(offsets))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def of(self, client: int) -> Tensor:
        """Positions of one client's examples (a view, ascending)."""
        if not 0 <= client < len(self):
            raise IndexError(f"client {client} of {len(self)}")
        return self.indices[int(self.offsets[client]) : int(self.offsets[client + 1])]

    @property
    def sizes(self) -> Tensor:
        """``[clients]`` int64: how many examples each client holds."""
        return self.offsets.diff()


@dataclass(frozen=True, kw_only=True, eq=False)
class FederatedData:
    """Train and held-out examples, both divided among the same clients."""

    train: Examples
    test: Examples
    train_shards: Shards
    test_shards: Shards

    @property
    def clients(self) -> int:
        """How many clients there are."""
        return len(self.train_shards)

    def digest(self) -> str:
        """Names all examples and who holds which: another for other data, or a division of their own."""
        seen = hashlib.blake2b(digest_size=16)
        shards = [each for s in (self.train_shards, self.test_shards) for each in (s.indices, s.offsets)]
        for tensor in (self.train.x, self.train.y, self.test.x, self.test.y, *shards):
            seen.update(f"{tensor.dtype} {list(tensor.shape)}".encode())
            seen.update(tensor.cpu().contiguous().numpy().data)
        return seen.hexdigest()

    def counts(self) -> Ints | None:
        """Train examples by client and class, ``[clients, classes]``; None unless it is classification."""
        if self.train.task != "classification" or self.train.classes is None:
            return None
        shape = (self.clients, len(self.train.classes))
        owner = np.repeat(np.arange(self.clients), self.train_shards.sizes.numpy())
        label = self.train.y[self.train_shards.indices].cpu().numpy()
        return np.bincount(owner * shape[1] + label, minlength=shape[0] * shape[1]).reshape(shape)


def require_finite(examples: Examples, field: str) -> None:
    """Refuse NaN and infinity in x or y.

    Raises
    ------
    DataError
        Telling how many there are, and where the first is.
    """
    for name, values in (("x", examples.x), ("y", examples.y)):
        # A sum is finite only if every term is, and needs no mask as large as the data.
        if values.is_floating_point() and not values.sum().isfinite():
            bad = values.isfinite().logical_not_().nonzero()
            if len(bad):
                example, *place = bad[0].tolist()
                where = f"example {example}" + (f" at {tuple(place)}" if place else "")
                raise DataError(
                    field,
                    float(values[tuple(bad[0])]),
                    f"{len(bad)} values of {name} are not finite, the first in {where} (from 0)",
                    "remove or replace them",
                )


def require_learnable(examples: Examples, field: str, *, alone: bool) -> None:
    """Refuse a set from which nothing can be learnt; ``alone``: nobody else has other classes.

    Raises
    ------
    DataError
        If it is empty, or, alone, a classification of fewer than two classes.
    """
    if len(examples) == 0:
        raise DataError(field, 0, "there are no examples", "choose data that has some")
    if alone and examples.task == "classification" and int(examples.y.min()) == int(examples.y.max()):
        assert examples.classes is not None
        raise DataError(
            field,
            examples.classes[int(examples.y[0])],
            "all examples are of this one class",
            "choose data of at least two classes",
        )
