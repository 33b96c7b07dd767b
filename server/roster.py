"""What a coordinator knows of every agent since it started: for people, and for no decision of a run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field

from hansa.core.wire import federation_pb2 as pb

_KEPT = 10_000  # names; of more, those that have been gone for longest are forgotten


@dataclass
class Known:
    """One agent; times are seconds since 1970.

    Attributes
    ----------
    first: when it came for the first time. seen: when it said something last.
    came: since when it is connected, if it is.
    attended: seconds that it was connected before.
    jobs: lease -> what was given to it and has not come back.
    counted, late: updates. failed: jobs. refused: calls.
    bytes: of its updates. steps, seconds: of its training, as it says itself.
    """

    name: str
    serial: str
    hello: pb.Hello
    first: float
    seen: float
    came: float | None = None
    attended: float = 0.0
    beat: pb.Heartbeat = field(default_factory=pb.Heartbeat)
    jobs: dict[bytes, pb.OpenJob] = field(default_factory=dict)
    counted: int = 0
    late: int = 0
    failed: int = 0
    refused: int = 0
    bytes: int = 0
    steps: int = 0
    seconds: float = 0.0

    def status(self, now: float) -> pb.AgentStatus:
        """In a message."""
        said = self.hello
        told = pb.AgentStatus(
            name=self.name,
            connected=self.came is not None,
            device=said.device[:200],
            memory=said.memory,
            hansa=said.hansa[:50],
            torch=said.torch[:50],
            protocol=f"{said.version.major}.{said.version.minor}",
            seats=pb.Seats(share=said.seats.share, of=said.seats.of, clients=said.seats.clients[:100]),
            first=self.first,
            seen=self.seen,
            attended=self.attended + (now - self.came if self.came is not None else 0.0),
            mains=self.beat.mains,
            jobs=list(self.jobs.values())[:20],
            counted=self.counted,
            late=self.late,
            failed=self.failed,
            refused=self.refused,
            bytes=self.bytes,
            steps=self.steps,
            seconds=self.seconds,
        )
        if self.beat.HasField("battery"):
            told.battery = min(max(self.beat.battery, 0.0), 1.0)
        return told


class Roster:
    """All agents by name.

    ``clock`` gives seconds since 1970, ``denied`` why the certificate of a serial number is void, if it is.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.time,
        denied: Callable[[str], str | None] = lambda serial: None,
    ) -> None:
        self._clock, self._denied = clock, denied
        self._known: dict[str, Known] = {}

    def __iter__(self) -> Iterator[pb.AgentStatus]:
        now = self._clock()
        for each in sorted(self._known.values(), key=lambda each: each.name):
            told = each.status(now)
            told.revoked = self._denied(each.serial) or ""
            yield told

    def came(self, name: str, hello: pb.Hello, serial: str = "") -> None:
        """An agent's stream is open, perhaps in the place of an older one."""
        now = self._clock()
        self.went(name)
        known = self._known.setdefault(name, Known(name, serial, hello, first=now, seen=now))
        known.serial, known.hello, known.came, known.seen = serial, hello, now, now
        holding = {bytes(lease) for lease in hello.holding}
        known.jobs = {lease: job for lease, job in known.jobs.items() if lease in holding}
        if len(self._known) > _KEPT:
            gone = [each for each in self._known.values() if each.came is None]
            with suppress(ValueError):
                del self._known[min(gone, key=lambda each: each.seen).name]

    def went(self, name: str) -> None:
        """An agent's stream ended."""
        known = self._known.get(name)
        if known is not None and known.came is not None:
            known.attended += self._clock() - known.came
            known.came = None

    def heard(self, name: str, beat: pb.Heartbeat | None = None) -> None:
        """It said something; in a heartbeat, how its battery stands."""
        known = self._known.get(name)
        if known is not None:
            known.seen = self._clock()
            known.beat = beat or known.beat

    def given(self, name: str, job: pb.Job) -> None:
        """It has a job."""
        if name in self._known:
            self._known[name].jobs[job.lease] = pb.OpenJob(
                run=job.run, client=job.client, number=job.number, phase=job.phase, since=self._clock()
            )

    def over(self, name: str, lease: bytes, *, failed: bool = False) -> None:
        """It has a job no more."""
        known = self._known.get(name)
        if known is not None:
            known.jobs.pop(lease, None)
            known.failed += failed

    def sent(self, name: str, manifest: pb.Manifest, *, counted: bool) -> None:
        """An update of it was acknowledged."""
        self.heard(name)
        self.over(name, manifest.lease)
        known = self._known.get(name)
        if known is not None:
            known.counted += counted
            known.late += not counted
            known.bytes += manifest.update.size
            if 0 < manifest.seconds < float("inf"):
                known.steps += manifest.steps
                known.seconds += manifest.seconds

    def refused(self, name: str) -> None:
        """A call of it was refused."""
        if name in self._known:
            self._known[name].refused += 1
