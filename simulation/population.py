"""How fast virtual clients are, how far away, and how reliable. Times are virtual seconds.

A client is a device; who has which device may follow its data (:meth:`Population.dealt`), the case in which a
bias to fast clients hurts.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from hansa.core.data import FederatedData
from hansa.core.errors import InputError
from hansa.core.randomness import among, uniform, uniforms, unit
from hansa.simulation.traces import Sessions, devices, sessions

_normal = NormalDist().inv_cdf


@dataclass(frozen=True, kw_only=True)
class Population:
    """A model of devices and networks.

    Attributes
    ----------
    step_time: seconds of one local step on the fastest kind of device.
    speeds: how slowness is spread over clients: ``equal``; ``uniform`` in [1, spread]; ``lognormal`` with
        95 % of clients between 1/√spread and √spread; ``slow_share``: a share is ``spread`` times slower;
        ``exponential`` with mean ``spread``; ``shifted_exponential``: 1 and an exponential, with mean
        ``spread``; ``pareto`` from 1 on with 95 % below ``spread``; ``traces``: as ``devices`` says.
    spread: ratio of slow to fast.
    slow_share: share of slow clients under ``speeds = "slow_share"``.
    follows: what the order of speeds follows: ``nothing``; ``label``: the higher its most frequent class,
        the slower the client; ``examples``: the more data, the slower.
    devices: CSV file, a device a row: ``slowness``, and as far as known ``up`` and ``down`` in bytes per
        second and ``availability``; every client has one at random.
    jitter: how much each job's own factor varies, by its law.
    jitter_law: ``lognormal``, ``jitter`` is the logarithm's standard deviation; ``exponential``: 1 − jitter
        and an exponential with mean ``jitter``; ``pareto`` with mean 1 and shape 1/jitter.
    latency: seconds before and after each job.
    bandwidth: bytes per second each way; unlimited by default.
    dropout: probability that a job is lost, at a uniformly random moment of it.
    recovery: seconds before a client that dropped out is back; infinite if it never is.
    availability: share of the time that a client is there.
    pattern: how it comes and goes: ``window``: in one stretch of each period; ``battery``: for exponential
        times, as when a charger is plugged in and pulled out; ``traces``: as ``sessions`` says.
    period: seconds of a cycle; under ``battery`` of a mean one; after it ``sessions`` repeat.
    zones: share of the period over which the clients' windows are spread: 1 is all around the clock; with
        less their number rises and falls every day.
    sessions: CSV file, a stretch of presence a row: ``device``, ``start``, ``end`` in seconds; every client
        follows a device at random.
    """

    step_time: float = 1.0
    speeds: Literal[
        "equal",
        "uniform",
        "lognormal",
        "slow_share",
        "exponential",
        "shifted_exponential",
        "pareto",
        "traces",
    ] = "equal"
    spread: float = 1.0
    slow_share: float = 0.5
    follows: Literal["nothing", "label", "examples"] = "nothing"
    devices: str | None = None
    jitter: float = 0.0
    jitter_law: Literal["lognormal", "exponential", "pareto"] = "lognormal"
    latency: float = 0.0
    bandwidth: float | None = None
    dropout: float = 0.0
    recovery: float = 0.0
    availability: float = 1.0
    pattern: Literal["window", "battery", "traces"] = "window"
    period: float = 86_400.0
    zones: float = 1.0
    sessions: str | None = None

    def __post_init__(self) -> None:
        for name in ("step_time", "period"):
            if not 0 < getattr(self, name) < math.inf:
                _refuse(name, getattr(self, name), "it must be a number greater than 0")
        if self.bandwidth is not None and not self.bandwidth > 0:
            _refuse("bandwidth", self.bandwidth, "it must be greater than 0")
        for name in ("jitter", "latency"):
            if not 0 <= getattr(self, name) < math.inf:
                _refuse(name, getattr(self, name), "it must be a number, 0 or more")
        if not self.recovery >= 0:
            _refuse("recovery", self.recovery, "it must be 0 or more")
        if not 1 <= self.spread < math.inf:
            _refuse("spread", self.spread, "it is the ratio of slow to fast, so 1 or more")
        if not 0 <= self.dropout < 1:
            _refuse("dropout", self.dropout, "it is a probability below 1, or no job would ever return")
        for name in ("slow_share", "zones"):
            if not 0 <= getattr(self, name) <= 1:
                _refuse(name, getattr(self, name), "it is a share between 0 and 1")
        if not 0 < self.availability <= 1:
            _refuse("availability", self.availability, "it is a share above 0, or nobody would ever be there")
        if self.jitter_law != "lognormal" and self.jitter > (
            1.0 if self.jitter_law == "exponential" else 0.99
        ):
            _refuse("jitter", self.jitter, f"a factor with an {self.jitter_law} part has a mean of 1")
        for key, value, source, file in (
            ("speeds", self.speeds, "devices", self.devices),
            ("pattern", self.pattern, "sessions", self.sessions),
        ):
            if (value == "traces") != (file is not None):
                remedy = "leave it out" if file else "name a CSV file"
                raise InputError(f"population.{source}", file, f"population.{key} is {value!r}", remedy)
        if self.devices is not None:
            devices(self.devices)
        if self.sessions is not None:
            sessions(self.sessions, self.period)

    def dealt(self, data: FederatedData, seed: int) -> Population:
        """The population with devices dealt out as the data has it."""
        if self.follows == "nothing":
            return self
        clients = data.clients
        key = data.train_shards.sizes.numpy()
        if self.follows == "label":
            counts = data.counts()
            if counts is None:
                raise InputError(
                    "population.follows", "label", "the data has no classes", 'use "examples" or "nothing"'
                )
            key = np.asarray(counts).argmax(1)
        slowness = [self.slowness(seed, client) for client in range(clients)]
        order = np.empty(clients, dtype=np.int64)
        order[np.argsort(key, kind="stable")] = np.argsort(slowness, kind="stable")
        fields = {each.name: getattr(self, each.name) for each in dataclasses.fields(self)}
        return _Dealt(**fields, dealt_devices=tuple(order.tolist()))

    def device(self, client: int) -> int:
        """The number of a client's device, which names its draws."""
        return client

    def slowness(self, seed: int, client: int) -> float:
        """Factor on the time of every step of a client; 1 is the fastest kind."""
        if self.speeds == "equal":
            return 1.0
        u = unit(among(seed, "speed", self.device(client)))
        match self.speeds:
            case "uniform":
                return 1.0 + u * (self.spread - 1.0)
            case "lognormal":
                return math.exp(_normal(u) * math.log(self.spread) / 3.92)
            case "slow_share":
                return self.spread if u < self.slow_share else 1.0
            case "exponential":
                return max(-math.log(u) * self.spread, 1e-6)
            case "shifted_exponential":
                return 1.0 - math.log(u) * (self.spread - 1.0)
            case "pareto":
                return float(u ** (-math.log(self.spread) / math.log(20.0)))
            case "traces":
                return self._traced(seed, client, "slowness", 1.0)

    def _traced(self, seed: int, client: int, column: str, missing: float) -> float:
        assert self.devices is not None
        known = devices(self.devices)
        if column not in known:
            return missing
        return known[column][self._row(seed, client, len(known["slowness"]))]

    def _row(self, seed: int, client: int, rows: int) -> int:
        """The row of a file that a client follows."""
        return int(uniform(seed, "device", self.device(client)) * rows)

    def trip(self, size: int) -> float:
        """Seconds that ``size`` bytes take one way."""
        return self.latency + (size / self.bandwidth if self.bandwidth else 0.0)

    def journey(self, seed: int, client: int, down: int, up: int) -> tuple[float, float]:
        """Seconds that a job takes to a client, and its update back."""
        if self.speeds != "traces":
            return self.trip(down), self.trip(up)
        there = down / self._traced(seed, client, "down", self.bandwidth or math.inf)
        back = up / self._traced(seed, client, "up", self.bandwidth or math.inf)
        return self.latency + there, self.latency + back

    def step_seconds(self, seed: int, client: int, number: int) -> float:
        """Seconds of each local step of one job."""
        return self.step_time * self.slowness(seed, client) * self._jittered(seed, client, number)

    def _jittered(self, seed: int, client: int, number: int) -> float:
        if not self.jitter:
            return 1.0
        u = uniform(seed, "jitter", client, number)
        match self.jitter_law:
            case "lognormal":
                return math.exp(self.jitter * _normal(u))
            case "exponential":
                return max(1.0 - self.jitter - self.jitter * math.log(u), 1e-6)
            case "pareto":
                return float((1.0 - self.jitter) * u**-self.jitter)

    def drops_at(self, seed: int, client: int, number: int) -> float | None:
        """At what fraction of its duration a job is lost, if it is."""
        if not self.dropout or uniform(seed, "dropout", client, number) >= self.dropout:
            return None
        return uniform(seed, "moment", client, number)

    @property
    def always_there(self) -> bool:
        """Whether nobody ever goes away but by losing a job."""
        traced = self.speeds == "traces" and "availability" in devices(str(self.devices))
        return self.availability == 1 and self.pattern != "traces" and not traced

    def changes(self, seed: int, client: int, since: float = 0.0) -> Iterator[tuple[float, bool]]:
        """(time, there from then on) of one client for ever; at time 0, then after ``since``."""
        share = self.availability
        if self.speeds == "traces":
            share = self._traced(seed, client, "availability", share)
        if self.pattern == "traces":
            assert self.sessions is not None
            known = sessions(self.sessions, self.period)
            yield from _after(since, _repeated(known[self._row(seed, client, len(known))], self.period))
        elif share == 1:
            yield 0.0, True
        elif self.pattern == "battery":
            yield from _after(since, self._charging(seed, client, share))
        else:
            yield from self._window(seed, client, share, since)

    def first_changes(
        self, seed: int, clients: int
    ) -> tuple[NDArray[np.bool_], NDArray[np.float64], NDArray[np.bool_]]:
        """Of clients 0, 1, …: who is there at time 0, and when each comes or goes first, and which; all [n].

        What :meth:`changes` tells of one client, of many at once.
        """
        numbers, share = np.arange(clients), self.availability
        if self.speeds == "traces" or self.pattern == "traces":
            return self._one_by_one(seed, clients)
        phases = uniforms(seed, "phase", numbers)
        if self.pattern == "battery":
            there = phases < share
            means = self.period * np.where(there, share, 1 - share)
            logarithms = np.array(
                list(map(math.log, uniforms(seed, "charge", numbers, np.array([0])).tolist()))
            )
            return there, 0.0 - means * logarithms, ~there
        starts, up = phases * self.period * self.zones, share * self.period
        leaves = starts - self.period + up
        comes = (leaves <= 0) & (starts > 0)
        moments = np.where(leaves > 0, leaves, np.where(comes, starts, starts + up))
        return (0.0 - starts) % self.period < up, moments, comes

    def _one_by_one(
        self, seed: int, clients: int
    ) -> tuple[NDArray[np.bool_], NDArray[np.float64], NDArray[np.bool_]]:
        first = [list(itertools.islice(self.changes(seed, client), 2)) for client in range(clients)]
        # Who is always there has no second change.
        moments = np.array([each[1][0] if len(each) > 1 else math.inf for each in first])
        return np.array([each[0][1] for each in first]), moments, np.array([each[-1][1] for each in first])

    def _window(self, seed: int, client: int, share: float, since: float) -> Iterator[tuple[float, bool]]:
        start = uniform(seed, "phase", client) * self.period * self.zones
        up = share * self.period
        there = (0.0 - start) % self.period < up
        yield 0.0, there
        for n in itertools.count(max(-1, math.floor((since - start) / self.period) - 1)):
            cycle = start + n * self.period
            for moment, state in ((cycle, True), (cycle + up, False)):
                if moment > since:
                    yield moment, state

    def _charging(self, seed: int, client: int, share: float) -> Iterator[tuple[float, bool]]:
        now, there = 0.0, uniform(seed, "phase", client) < share
        for n in itertools.count():
            yield now, there
            mean = self.period * (share if there else 1 - share)
            now, there = now - mean * math.log(uniform(seed, "charge", client, n)), not there


@dataclass(frozen=True, kw_only=True)
class _Dealt(Population):
    """Client i has the device of number ``dealt_devices[i]``."""

    dealt_devices: tuple[int, ...] = ()

    def device(self, client: int) -> int:
        return self.dealt_devices[client]


def _after(since: float, changes: Iterator[tuple[float, bool]]) -> Iterator[tuple[float, bool]]:
    yield next(changes)
    yield from (each for each in changes if each[0] > since)


def _repeated(stretches: Sessions, period: float) -> Iterator[tuple[float, bool]]:
    yield 0.0, any(start <= 0 < end for start, end in stretches)
    cycle = 0.0
    while True:
        for start, end in stretches:
            for moment, there in ((cycle + start, True), (cycle + end, False)):
                if moment > 0:
                    yield moment, there
        cycle += period


def _refuse(name: str, value: object, problem: str) -> None:
    raise InputError(f"population.{name}", value, problem, "correct it or leave it out")
