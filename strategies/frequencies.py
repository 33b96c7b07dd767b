"""How often a client contributes under a schedule, when it is known how long its jobs take.

f_i is in updates per step of the hub, so that weights p_i/f_i make a mean step Σ p_i Δ_i (Fraboni et al.,
arXiv 2206.10189; ``hansa.core.weights``). τ_i is the time of a job, N the number of clients.

=============================  ====================================================================
rounds of a random cohort S    S/N, where everybody is waited for
periodic, Δt                   1/⌈τ_i/Δt⌉: who returns inside a window restarts at its end (FedFix)
periodic with recall of s      s/N: contacts are random, whatever was done
buffered, K, all in flight     K τ_i⁻¹/Σ τ_j⁻¹: everybody restarts at once (FedBuff; K = 1: async FedAvg)
buffered, K, M_c in flight     K r_i/Σ r_j with r_i = 1/(τ_i + ι): free slots take random idle clients, so all
                               are idle equally long on average, ι, and Σ τ_i/(τ_i + ι) = M_c at work
=============================  ====================================================================
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from hansa.core.errors import InputError
from hansa.core.schedule import Schedule
from hansa.strategies.buffered import Buffered
from hansa.strategies.periodic import Periodic
from hansa.strategies.rounds import Rounds


def frequencies(schedule: Schedule, seconds: Sequence[float]) -> tuple[float, ...]:
    """f_i of clients whose jobs take ``seconds`` [N].

    Raises
    ------
    InputError
        For a schedule under which they cannot be told beforehand.
    """
    times = np.asarray(seconds, float)
    match schedule:
        case Buffered(deadline=None):
            rates = 1.0 / (times + _idle(times, schedule.concurrency))
            found = schedule.k * rates / rates.sum()
        case Periodic(recall=None):
            # A quotient a hair above a whole number is that number.
            found = 1.0 / np.maximum(np.ceil(times / schedule.interval * (1 - 1e-12)), 1.0)
        case Periodic(recall=int(recall), deadline=None):
            found = np.full(len(times), min(recall / len(times), 1.0))
        case Rounds() if type(schedule) is Rounds and not schedule.recalls:
            found = np.full(len(times), min(schedule.cohort / len(times), 1.0))
        case _:
            raise InputError(
                "weights.frequency",
                "known",
                "who is late, and how often, cannot be told from mean times",
                'use weights.frequency = "estimated"',
            )
    return tuple(map(float, found))


def _idle(times: NDArray[np.float64], concurrency: int) -> float:
    """ι for which ``Σ τ_i/(τ_i + ι)`` clients are at work, by bisection."""
    if concurrency >= len(times):
        return 0.0
    low, high = 0.0, float(times.max()) * len(times) / concurrency
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        if float((times / (times + middle)).sum()) > concurrency:
            low = middle
        else:
            high = middle
        if math.nextafter(low, high) >= high:
            break
    return high
