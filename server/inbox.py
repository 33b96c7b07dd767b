"""What happens to a run: numbered, durable, answered, in one order.

While one batch of events is applied, the next becomes durable: the disk and the hub work at the same time.
An update that is sent twice is one event, of which both senders are told; other bytes for its job are late.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Literal

from hansa.server.crash import point
from hansa.server.events import Event
from hansa.server.machine import Verdict
from hansa.server.patience import Over

Answer = asyncio.Future[Verdict]


class Inbox:
    """Of one run.

    Parameters
    ----------
    append: makes events durable.
    now: seconds on the run's clock.
    known: digest of the update of a client's job, and the verdict on it, if it was applied.

    Attributes
    ----------
    seq: number of the last event, applied or not.
    """

    def __init__(
        self,
        append: Callable[[Sequence[Event]], Awaitable[None]],
        now: Callable[[], float],
        known: Callable[[int, int], tuple[str, Verdict] | None],
    ) -> None:
        self._append, self._now, self._known = append, now, known
        self.seq = 0
        self._handed = 0  # number of the last event that was handed out
        self._waiting: asyncio.Queue[tuple[dict[str, Any], Answer]] = asyncio.Queue()
        self._answers: dict[int, list[Answer]] = {}  # by the numbers of events that are not applied
        self._updates: dict[tuple[int, int], tuple[str, int]] = {}  # (client, job number) -> digest, event
        self._ahead: asyncio.Task[list[Event]] | None = None
        self._shut: Over | Literal["late"] | None = None

    def __len__(self) -> int:
        """Messages that have not been looked at."""
        return self._waiting.qsize()

    @property
    def unapplied(self) -> set[tuple[int, int]]:
        """Client and job number of updates that are events and are not applied."""
        return set(self._updates)

    async def tell(self, kind: str, **facts: Any) -> Verdict:
        """Something happened: returns when it is durable, with the verdict on an update.

        Raises
        ------
        Over
            When this process may write no more.
        """
        match self._shut:
            case None:
                return await self._put(kind, facts)
            case "late":
                return self._too_late(facts)
            case over:
                raise over

    def hear(self, kind: str, **facts: Any) -> None:
        """:meth:`tell` without waiting."""
        if self._shut is None:
            self._put(kind, facts)

    def _put(self, kind: str, facts: Mapping[str, Any]) -> Answer:
        answer: Answer = asyncio.get_running_loop().create_future()
        self._waiting.put_nowait(({"kind": kind, **facts}, answer))
        return answer

    async def next(self) -> list[Event]:
        """The next events, which are durable; those after them are on their way to the disk."""
        ahead, self._ahead = self._ahead or asyncio.create_task(self._commit()), None
        events = await self._durable(ahead)
        self._ahead = asyncio.create_task(self._commit())
        return events

    async def rest(self) -> list[Event]:
        """Look at no more messages: they wait. Returns the events on their way, once they are durable."""
        ahead, self._ahead = self._ahead, None
        if ahead is None:
            return []
        if self.seq == self._handed:
            ahead.cancel()
            await asyncio.wait([ahead])
            return []
        return await self._durable(ahead)

    async def _durable(self, ahead: asyncio.Task[list[Event]]) -> list[Event]:
        events = await ahead
        self._handed = events[-1].seq
        return events

    async def _commit(self) -> list[Event]:
        events: list[Event] = []
        while not events:
            messages = [await self._waiting.get()]
            while not self._waiting.empty():
                messages.append(self._waiting.get_nowait())
            for facts, answer in messages:
                if (event := self._numbered(facts, answer)) is not None:
                    events.append(event)
        point("before-commit")
        await self._append(events)
        point("after-commit")
        return events

    def _numbered(self, facts: dict[str, Any], answer: Answer) -> Event | None:
        """The event, unless it is one that there is already."""
        if (number := facts.get("number")) is not None:
            job, digest = (facts["client"], number), facts["body"]["digest"]
            first, at = self._updates.get(job, (None, 0))
            if first == digest:
                self._answers[at].append(answer)
                return None
            if first is not None or self._known(*job) is not None:
                _set(answer, self._too_late(facts))
                return None
            self._updates[job] = digest, self.seq + 1
        self.seq += 1
        self._answers[self.seq] = [answer]
        return Event(seq=self.seq, at=self._now(), **facts)

    def answer(self, event: Event, verdict: Verdict) -> None:
        """Tell whoever waits for an event, which is now known to be applied."""
        if event.client is not None and event.number is not None:
            del self._updates[event.client, event.number]
        for each in self._answers.pop(event.seq):
            _set(each, verdict)

    def shut(self, why: Over | Literal["late"]) -> None:
        """Nothing will be applied any more: tell all who wait, and whoever comes, why."""
        self._shut = why
        left: list[tuple[Answer, Verdict]] = [(e, "late") for each in self._answers.values() for e in each]
        while not self._waiting.empty():
            facts, answer = self._waiting.get_nowait()
            left.append((answer, self._too_late(facts)))
        for answer, verdict in left:
            if not isinstance(why, Over):
                _set(answer, verdict)
            elif not answer.done():
                answer.set_exception(why)
                answer.exception()  # most do not wait for it
        self.halt()

    def halt(self) -> None:
        """Look at no more messages, without a word to anybody: another process will."""
        if self._ahead is not None:
            self._ahead.cancel()
            if self._ahead.done() and not self._ahead.cancelled():
                self._ahead.exception()  # nobody asks for it any more

    def _too_late(self, facts: Mapping[str, Any]) -> Verdict:
        """Of an update that is sent again, what was said before."""
        number = facts.get("number")
        known = None if number is None else self._known(facts["client"], number)
        return known[1] if known is not None and known[0] == facts["body"]["digest"] else "late"


def _set(answer: Answer, verdict: Verdict) -> None:
    if not answer.done():
        answer.set_result(verdict)
