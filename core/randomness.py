"""Randomness that belongs to a purpose, never to an order of calls.

A draw is named by the run's seed and a key such as ``("batches", client, job)``; it is the same
whichever engine asks for it, in whatever order, on however many processes.

Where draws are many and small (a job's luck, a slot's next client, a mini-batch) no generator is made: a draw
is a word hashed from its key, purpose by purpose and number by number, with the output function of SplitMix64
(Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014), one at a time or by
arrays.
"""

from __future__ import annotations

import functools
import hashlib
import threading
from typing import Any

import numpy as np
import torch
from numpy.random.bit_generator import ISeedSequence
from numpy.typing import NDArray

ALONE = threading.RLock()
"""Held by whoever seeds torch's global generator for a purpose while other threads may do so, too."""

_BLOCK = 256
_STEP, _FIRST, _SECOND, _LAST = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB, 2**64 - 1


def _digest(seed: int, key: tuple[int | str, ...]) -> bytes:
    return hashlib.blake2b(repr((seed, *key)).encode(), digest_size=16).digest()


def word(seed: int, *key: int | str) -> int:
    """64 bits, the draw named by ``seed`` and ``key``."""
    return int.from_bytes(_digest(seed, key)[:8], "little")


class _Key(ISeedSequence):
    """Philox's key as it is. Given as ``key=``, the same costs a read of the system's entropy besides."""

    def __init__(self, digest: bytes) -> None:
        self._digest = digest

    def generate_state(self, n_words: int, dtype: Any = np.uint32) -> Any:
        """The words of the key."""
        return np.frombuffer(self._digest, "<u8")


def generator(seed: int, *key: int | str) -> np.random.Generator:
    """NumPy generator of the draw named by ``seed`` and ``key``."""
    return np.random.Generator(np.random.Philox(_Key(_digest(seed, key))))  # type: ignore[arg-type]


def torch_generator(seed: int, *key: int | str) -> torch.Generator:
    """Torch CPU generator of the draw named by ``seed`` and ``key``."""
    made = torch.Generator()
    made.manual_seed(word(seed, *key) >> 1)
    return made


@functools.lru_cache(4096)
def _purpose(seed: int, purpose: str) -> int:
    return word(seed, purpose)


def hashed(seed: int, purpose: str, *numbers: int) -> int:
    """64 bits, the draw named by ``seed``, ``purpose`` and ``numbers`` (0 or more each)."""
    z = _purpose(seed, purpose)
    for number in numbers:
        z = (z + (number + 1) * _STEP) & _LAST
        z = ((z ^ (z >> 30)) * _FIRST) & _LAST
        z = ((z ^ (z >> 27)) * _SECOND) & _LAST
        z ^= z >> 31
    return z


def among(seed: int, purpose: str, number: int, *numbers: int) -> int:
    """:func:`hashed`, where many draws are wanted that differ in ``number``: neighbours are made at once."""
    return int(_neighbours(seed, purpose, number // _BLOCK, *numbers).item(number % _BLOCK))


@functools.lru_cache(2**13)
def _neighbours(seed: int, purpose: str, block: int, *numbers: int) -> NDArray[np.uint64]:
    first = block * _BLOCK
    return hashes(seed, purpose, np.arange(first, first + _BLOCK), *(np.array([each]) for each in numbers))


def unit(word: int) -> float:
    """A number in (0, 1), both excluded, by 52 of a word's bits."""
    return ((word >> 12) + 0.5) * 2.0**-52


def uniform(seed: int, purpose: str, *numbers: int) -> float:
    """A number uniform in (0, 1), both excluded: :func:`hashed`, as :func:`unit` makes it."""
    return unit(hashed(seed, purpose, *numbers))


def uniforms(seed: int, purpose: str, *numbers: NDArray[np.int64]) -> NDArray[np.float64]:
    """:func:`uniform` of many draws at once; the arrays of numbers are broadcast."""
    words: NDArray[np.float64] = (hashes(seed, purpose, *numbers) >> np.uint64(12)).astype(np.float64)
    return (words + 0.5) * 2.0**-52


def hashes(seed: int, purpose: str, *numbers: NDArray[np.int64]) -> NDArray[np.uint64]:
    """:func:`hashed` of many draws at once; the arrays of numbers are broadcast."""
    z = np.array(_purpose(seed, purpose), np.uint64)
    for part in numbers:
        z = z + (part.astype(np.uint64) + np.uint64(1)) * np.uint64(_STEP)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(_FIRST)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(_SECOND)
        z = z ^ (z >> np.uint64(31))
    return z
