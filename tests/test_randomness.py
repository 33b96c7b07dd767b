from __future__ import annotations

import numpy as np
from scipy.stats import kstest

from hansa.core.randomness import hashed, hashes, uniform


def test_draws_are_the_same_one_by_one_and_together() -> None:
    clients, numbers = np.arange(7)[:, None], np.array([0, 5, 10**6])
    together = hashes(3, "jitter", clients, numbers)
    assert together.tolist() == [[hashed(3, "jitter", c, int(n)) for n in numbers] for c in range(7)]


def test_draws_of_other_seeds_purposes_and_numbers_differ() -> None:
    drawn = [
        *(hashed(0, "a", *numbers) for numbers in ((), (1,), (1, 2), (2, 1))),
        *(hashed(seed, purpose, 1, 2) for seed, purpose in ((1, "a"), (0, "b"))),
    ]
    assert len(set(drawn)) == len(drawn)


def test_uniform_draws_fill_the_open_interval() -> None:
    for drawn in (
        [uniform(0, "speed", client) for client in range(4_000)],
        [uniform(0, "jitter", 3, number) for number in range(4_000)],
    ):
        assert min(drawn) > 0
        assert max(drawn) < 1
        assert kstest(drawn, "uniform").pvalue > 0.01
    neighbours = np.array([[uniform(0, "x", c, n) for n in range(60)] for c in range(60)])
    for shifted in (neighbours[1:] * neighbours[:-1], neighbours[:, 1:] * neighbours[:, :-1]):
        # E[uv] = 1/4, with standard deviation 0.22 for independent u and v: 4 standard errors.
        assert abs(shifted.mean() - 0.25) < 4 * 0.2205 / shifted.size**0.5
