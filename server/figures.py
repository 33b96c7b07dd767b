"""What a coordinator counts: for Prometheus, and for whoever looks at it by way of the control service."""

from __future__ import annotations

import asyncio
import os
import platform
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import psutil
import torch
from prometheus_client import CollectorRegistry, Counter, ProcessCollector
from prometheus_client.core import GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

import hansa
from hansa.core.wire import federation_pb2 as pb
from hansa.core.wire import version

EVERY = 5.0
"""Seconds between two samples."""
_SAMPLES = 720  # an hour

_QUEUES = ("uploads", "messages", "events")


class Figures:
    """Counters of one coordinator process, since it started."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.jobs = Counter("hansa_jobs", "Jobs that were pushed", registry=registry)
        self.heartbeats = Counter("hansa_heartbeats", "Heartbeats", registry=registry)
        self.updates = Counter(
            "hansa_updates", "Updates that were acknowledged", ["verdict"], registry=registry
        )
        self.refused = Counter("hansa_refused", "Calls that were refused", ["status"], registry=registry)
        self.bytes_up = Counter("hansa_bytes_up", "Bytes of updates that were accepted", registry=registry)
        self.bytes_down = Counter("hansa_bytes_down", "Bytes of models that were sent", registry=registry)
        self.rounds = Counter("hansa_rounds", "Rounds that were made", registry=registry)
        for verdict in ("counted", "late"):
            self.updates.labels(verdict)  # a rate needs a zero to begin with


def _total(counter: Counter, **labels: str) -> int:
    """Over all labels but those given."""
    return round(
        sum(
            sample.value
            for family in counter.collect()
            for sample in family.samples
            if sample.name.endswith("_total") and labels.items() <= sample.labels.items()
        )
    )


FIGURES = Figures()


class Condition(Collector):
    """How one coordinator stands, now and over the last hour.

    Parameters
    ----------
    gauges: fills in what a sample cannot read off the counters and the process: agents, runs, jobs, queues.
    statuses: of all runs.
    secure: whether callers show certificates.
    """

    def __init__(
        self, gauges: Callable[[pb.Sample], None], statuses: Callable[[], Iterable[str]], *, secure: bool
    ) -> None:
        self._gauges, self._statuses, self._secure = gauges, statuses, secure
        self._process = psutil.Process()
        self._started = time.time()
        self._samples: deque[pb.Sample] = deque(maxlen=_SAMPLES)

    def sample(self) -> pb.Sample:
        """Of now."""
        spent = self._process.cpu_times()
        made = pb.Sample(
            at=time.time(),
            resident=self._process.memory_info().rss,
            processor=spent.user + spent.system,
            rounds=_total(FIGURES.rounds),
            counted=_total(FIGURES.updates, verdict="counted"),
            late=_total(FIGURES.updates, verdict="late"),
            refused=_total(FIGURES.refused),
            bytes_up=_total(FIGURES.bytes_up),
            bytes_down=_total(FIGURES.bytes_down),
        )
        self._gauges(made)
        return made

    def reply(self, after: float) -> pb.ConditionReply:
        """In a message, with the samples later than ``after``."""
        return pb.ConditionReply(
            hansa=hansa.__version__,
            python=platform.python_version(),
            torch=torch.__version__,
            platform=platform.platform(),
            protocol=version(),
            started=self._started,
            secure=self._secure,
            cores=os.cpu_count() or 1,
            memory=psutil.virtual_memory().total,
            samples=[each for each in (*self._samples, self.sample()) if each.at > after],
        )

    async def watch(self) -> None:
        """Take a sample every few seconds, until cancelled."""
        while True:
            self._samples.append(self.sample())
            await asyncio.sleep(EVERY)

    def collect(self) -> Iterator[Metric]:
        """For Prometheus."""
        now = pb.Sample()
        self._gauges(now)
        yield GaugeMetricFamily("hansa_agents", "Agents that are connected", now.agents)
        yield GaugeMetricFamily("hansa_open_jobs", "Jobs that are out", now.jobs)
        yield GaugeMetricFamily("hansa_uploads", "Uploads that are under way", now.uploads)
        runs = GaugeMetricFamily("hansa_runs", "Runs by how they stand", labels=["status"])
        statuses = list(self._statuses())
        for status in ("waiting", "running", "finished", "interrupted", "failed"):
            runs.add_metric([status], statuses.count(status))
        yield runs
        queues = GaugeMetricFamily("hansa_queue", "How long a queue is", labels=["queue"])
        for queue in _QUEUES:
            queues.add_metric([queue], getattr(now, f"{queue}_waiting"))
        yield queues
        facts = {"version": hansa.__version__, "torch": torch.__version__}
        yield InfoMetricFamily("hansa", "What serves", value=facts)
        yield GaugeMetricFamily("hansa_started_seconds", "When it started, in Unix time", self._started)

    @contextmanager
    def published(self) -> Iterator[None]:
        """Among the figures, as long as the context lasts."""
        FIGURES.registry.register(self)
        try:
            yield
        finally:
            FIGURES.registry.unregister(self)
