"""What the claims share: a recipe run through the public path, and digits seen through four domains."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from sklearn.datasets import load_digits

from hansa.core.recipe import parse
from hansa.core.store import Round
from hansa.simulation.catalog import world
from hansa.simulation.simulator import Ending, Simulator
from hansa.strategies.catalog import assemble

Array = npt.NDArray[Any]
Table = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run at its end; ``spread`` is the standard deviation of the clients' accuracies."""

    ending: Ending
    rounds: Sequence[Round]

    @property
    def accuracy(self) -> float:
        """The headline: of the global model, or the mean of the clients' own."""
        return self.ending.metrics["accuracy"]

    @property
    def spread(self) -> float:
        return math.sqrt(self.ending.metrics["clients/variance"])


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """These models are too small for more, and sums then come in one order."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def simulate() -> Callable[..., Run]:
    """``simulate(seed=0, data={...}, ...)``: a recipe, given by its sections, run to its end."""

    def simulate(**sections: Any) -> Run:
        rounds: list[Round] = []
        recipe = parse(sections)
        made = world(recipe)
        simulator = Simulator(assemble(recipe), made.population, made.attack, on_round=rounds.append)
        return Run(ending=simulator.run(), rounds=rounds)

    return simulate


@pytest.fixture
def saved(tmp_path: Path) -> Callable[[Mapping[str, Array]], Table]:
    """``saved({"x": ..., "y": ...})``: the arrays on disk, and the ``data`` section that reads them."""

    def save(arrays: Mapping[str, Array]) -> Table:
        table: Table = {"source": "npy"}
        for name, array in arrays.items():
            table[name] = str(tmp_path / f"{name}.npy")
            np.save(table[name], array)
        return table

    return save


@pytest.fixture
def synthetic_domains(saved: Callable[[Mapping[str, Array]], Table]) -> Callable[[int], Table]:
    """``synthetic_domains(seed)``: four clients see 40 digits of scikit-learn each, and 400 for the test.

    As they are; 2.5 x + 1 with noise; 0.5 x - 0.5 with noise; and 1.5 x - 0.3 moved by a pixel, with noise.
    """

    def build(seed: int) -> Table:
        rng = np.random.default_rng(seed)
        x, y = map(np.asarray, load_digits(return_X_y=True))
        x = x.reshape(-1, 1, 8, 8) / 16

        def noisy(images: Array, deviation: float) -> Array:
            return images + rng.normal(0, deviation, images.shape)

        def moved(images: Array) -> Array:
            return np.pad(images, ((0, 0), (0, 0), (0, 0), (1, 0)))[..., :-1]

        views: tuple[Callable[[Array], Array], ...] = (
            lambda images: images,
            lambda images: noisy(2.5 * images + 1, 0.3),
            lambda images: noisy(0.5 * images - 0.5, 0.1),
            lambda images: noisy(1.5 * moved(images) - 0.3, 0.2),
        )
        order = np.split(rng.permutation(len(x))[: 4 * 440], 4)
        return saved(
            _domains([(view(x[held]), y[held]) for view, held in zip(views, order, strict=True)], 40)
        )

    return build


@pytest.fixture
def real_domains(saved: Callable[[Mapping[str, Array]], Table]) -> Callable[[int], Table]:
    """``real_domains(seed)``: MNIST, USPS, Semeion and optdigits at 16x16, 60 train and 1,000 test each."""
    root = os.environ.get("HANSA_DATA")
    if root is None:
        pytest.skip("HANSA_DATA is not set: the four real digit domains are not here")
    file = Path(root) / "digits" / "digits4_16x16.npz"
    if not file.is_file():
        pytest.skip(f"there is no {file}: the four real digit domains are not here")

    def build(seed: int) -> Table:
        rng = np.random.default_rng(seed)
        domains = []
        with np.load(file, allow_pickle=False) as arrays:
            for name in ("mnist", "usps", "semeion", "optdigits"):
                images, labels = arrays[f"{name}_x"], arrays[f"{name}_y"]
                held = rng.permutation(len(images))[:1060]
                domains.append((images[held, None], labels[held].astype(np.int64)))
        return {**saved(_domains(domains, 60)), "scale": 255.0}

    return build


def _domains(domains: Sequence[tuple[Array, Array]], train: int) -> dict[str, Array]:
    """Of each domain's images and labels the first ``train`` to learn from and the rest to test on."""
    arrays: dict[str, Array] = {}
    for prefix, part in (("", slice(train)), ("test_", slice(train, None))):
        arrays[f"{prefix}x"] = np.concatenate([x[part] for x, _ in domains])
        arrays[f"{prefix}y"] = np.concatenate([y[part] for _, y in domains])
        counts = [len(y[part]) for _, y in domains]
        arrays[f"{prefix}group"] = np.repeat(np.arange(len(domains)), counts)
    return arrays
