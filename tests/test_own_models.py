"""Models of a user's own: the same in every tier, or refused in words that tell what to mend."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hansa.core.errors import InputError
from hansa.core.recipe import Recipe, parse
from hansa.simulation.simulator import Simulator
from hansa.strategies.catalog import assemble


def recipe(factory: str, mode: str = "sequential", **sections: Any) -> Recipe:
    return parse(
        {
            "data": {"limit": 200},
            "partition": {"kind": "quantity", "clients": 5, "min_size": 4},
            "model": {"name": "custom", "factory": f"{__name__}:{factory}"},
            "train": {"batch_size": 8, "epochs": 2},
            "schedule": {"cohort": 4},
            "stop": {"rounds": 3},
            "engine": {"mode": mode, "dtype": "float64"},
            **sections,
        }
    )


class Net(nn.Module):
    """Two layers; ``shape`` is what a subclass does to the features between them."""

    def __init__(self, sample: Tensor, outputs: int) -> None:
        super().__init__()
        self.body = nn.Linear(sample.numel(), 16)
        self.head = nn.Linear(16, outputs)

    def shape(self, features: Tensor) -> Tensor:
        return features

    def forward(self, x: Tensor) -> Any:
        return self.head(self.shape(F.relu(self.body(x.flatten(1)))))


class Branches(Net):
    """Looks at its own activations: whether a client's are large depends on its weights."""

    def shape(self, features: Tensor) -> Tensor:
        return features * 0.5 if features.abs().max() > 1.2 else features


class Rounds(Net):
    """A scale that is read as a number of Python."""

    def shape(self, features: Tensor) -> Tensor:
        return features * (1 + round(features.mean().item(), 1))


class Masked(Net):
    """A buffer of booleans, which has no absolute value."""

    mask: Tensor

    def __init__(self, sample: Tensor, outputs: int) -> None:
        super().__init__(sample, outputs)
        self.register_buffer("mask", torch.arange(16) % 3 > 0)

    def shape(self, features: Tensor) -> Tensor:
        return features * self.mask


@pytest.mark.parametrize("kind", [Branches, Rounds, Masked])
def test_clients_computed_together_come_to_what_each_comes_to_alone(kind: type[Net]) -> None:
    alone = Simulator(assemble(recipe(kind.__name__))).run().params
    for mode in ("batched", "fused") if kind is not Masked else ("batched",):
        for name, each in Simulator(assemble(recipe(kind.__name__, mode))).run().params.items():
            torch.testing.assert_close(each, alone[name], rtol=0, atol=1e-12)


class Shifts(Net):
    """Changes its input where it stands."""

    def forward(self, x: Tensor) -> Any:
        return super().forward(x.sub_(0.5))


def test_a_model_that_changes_its_input_leaves_the_data_as_they_are() -> None:
    simulator = Simulator(assemble(made := recipe("Shifts", "auto")))
    simulator.run()
    untouched = assemble(made.model_copy(update={"model": parse({}).model})).data
    torch.testing.assert_close(simulator._f.data.train.x, untouched.train.x, rtol=0, atol=0)
    torch.testing.assert_close(simulator._f.data.test.x, untouched.test.x, rtol=0, atol=0)


class Complex(Net):
    def __init__(self, sample: Tensor, outputs: int) -> None:
        super().__init__(sample, outputs)
        self.register_buffer("phase", torch.polar(torch.ones(16), torch.arange(16.0)))


class Lazy(Net):
    def __init__(self, sample: Tensor, outputs: int) -> None:
        super().__init__(sample, outputs)
        self.body = nn.LazyLinear(16)


class Pair(Net):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x), x


class PairInTraining(Net):
    def forward(self, x: Tensor) -> Any:
        return (super().forward(x), x) if self.training else super().forward(x)


class Detached(Net):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x).detach()


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (Complex, r"'phase': complex numbers .* keep both parts as real tensors"),
        (Lazy, r"'body\.weight': a lazy layer has no tensors yet; call the model once"),
        (Pair, r"turns two examples into tuple; make it a tensor of shape \(2, 10\)"),
        (PairInTraining, r"fails on two examples in training with AttributeError"),
        (Detached, r"fails on two examples in training with RuntimeError"),
    ],
)
def test_a_model_that_cannot_be_trained_is_refused_before_the_run(
    kind: Callable[..., Net], words: str
) -> None:
    with pytest.raises(InputError, match=words):
        assemble(recipe(kind.__name__))


def test_a_regression_that_gives_another_number_of_outputs_is_refused(tmp_path: Path) -> None:
    """Three outputs for one target would be taken for three guesses at it."""
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(40, 3)))
    np.save(tmp_path / "y.npy", np.arange(40) / 10)
    data = {"source": "npy", "x": str(tmp_path / "x.npy"), "y": str(tmp_path / "y.npy")}
    partition = {"kind": "iid", "clients": 4}
    assert assemble(recipe("Net", data=data, partition=partition)).task.classes == 0
    with pytest.raises(InputError, match=r"outputs of shape \(2, 3\); make it a tensor of shape \(2,"):
        assemble(recipe("triple", data=data, partition=partition))


def triple(sample: Tensor, outputs: int) -> Net:
    return Net(sample, 3 * outputs)
