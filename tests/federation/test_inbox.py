"""A run's inbox: order, durability first, one event for an update however often it is sent."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from hansa.server.events import Event
from hansa.server.inbox import Inbox
from hansa.server.machine import Verdict
from hansa.server.patience import Over


class Disk:
    """Makes events durable when it is told to."""

    def __init__(self, *, ready: bool = True) -> None:
        self.begun: list[int] = []
        self.known: dict[tuple[int, int], tuple[str, Verdict]] = {}
        self.fails: Exception | None = None
        self._ready = asyncio.Event()
        if ready:
            self._ready.set()
        self.inbox = Inbox(self._append, lambda: 1.5, lambda client, number: self.known.get((client, number)))

    async def _append(self, events: Sequence[Event]) -> None:
        self.begun += [each.seq for each in events]
        await self._ready.wait()
        if self.fails is not None:
            raise self.fails

    def work(self, on: bool) -> None:
        (self._ready.set if on else self._ready.clear)()

    def update(self, client: int, number: int, digest: str = "d") -> asyncio.Task[Verdict]:
        told = self.inbox.tell("update", client=client, number=number, body={"digest": digest})
        return asyncio.create_task(told)


def play(scene: Any) -> None:
    asyncio.run(asyncio.wait_for(scene(), 10))


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def test_events_are_numbered_in_order_and_handed_out_when_they_are_durable() -> None:
    async def scene() -> None:
        disk = Disk(ready=False)
        disk.inbox.seq = 7
        disk.inbox.hear("joined", body={"seats": {}})
        answer = disk.update(3, 0)
        await settle()
        coming = asyncio.create_task(disk.inbox.next())
        await settle()
        assert disk.begun == [8, 9]
        assert not coming.done()
        disk.work(True)
        events = await coming
        assert [(each.seq, each.kind, each.at) for each in events] == [(8, "joined", 1.5), (9, "update", 1.5)]
        assert not answer.done()
        for each in events:
            disk.inbox.answer(each, "counted")
        assert await answer == "counted"
        disk.inbox.halt()

    play(scene)


def test_the_next_batch_becomes_durable_before_the_first_is_applied() -> None:
    async def scene() -> None:
        disk = Disk()
        disk.update(0, 0)
        await settle()
        first = await disk.inbox.next()
        second = disk.update(1, 0)
        await settle()
        assert disk.begun == [1, 2]
        disk.inbox.answer(first[0], "counted")
        assert disk.inbox.unapplied == {(1, 0)}
        assert not second.done()
        (event,) = await disk.inbox.next()
        assert (event.seq, event.client) == (2, 1)
        disk.inbox.answer(event, "late")
        assert await second == "late"
        assert not disk.inbox.unapplied
        disk.inbox.halt()

    play(scene)


@pytest.mark.parametrize("when", ["with it", "on its way", "not applied"])
def test_an_update_that_is_sent_twice_is_one_event(when: str) -> None:
    async def scene() -> None:
        disk = Disk(ready=False)
        answers = [disk.update(4, 2)]
        if when == "with it":
            answers.append(disk.update(4, 2))
        await settle()
        coming = asyncio.create_task(disk.inbox.next())
        await settle()
        if when == "on its way":
            answers.append(disk.update(4, 2))
        disk.work(True)
        (event,) = await coming
        if when == "not applied":
            answers.append(disk.update(4, 2))
        await settle()
        while when == "on its way" and len(disk.inbox):
            await asyncio.sleep(0)
        disk.known[4, 2] = "d", "counted"
        disk.inbox.answer(event, "counted")
        assert await asyncio.gather(*answers) == ["counted", "counted"]
        assert await disk.update(4, 2) == "counted"
        assert disk.begun == [1]
        disk.inbox.halt()

    play(scene)


def test_other_bytes_for_a_job_are_late_whatever_becomes_of_the_first() -> None:
    async def scene() -> None:
        disk = Disk(ready=False)
        first, other = disk.update(4, 2), disk.update(4, 2, "e")
        coming = asyncio.create_task(disk.inbox.next())
        assert await other == "late"
        disk.work(True)
        (event,) = await coming
        other = disk.update(4, 2, "e")
        assert await other == "late"
        disk.known[4, 2] = "d", "counted"
        disk.inbox.answer(event, "counted")
        assert await first == "counted"
        assert await disk.update(4, 2, "e") == "late"
        disk.inbox.shut("late")
        assert (await disk.update(4, 2, "e"), await disk.update(4, 2)) == ("late", "counted")
        assert disk.begun == [1]

    play(scene)


def test_whoever_waits_and_whoever_comes_when_it_is_shut_is_late() -> None:
    async def scene() -> None:
        disk = Disk()
        applied = disk.update(0, 0)
        await settle()
        (event,) = await disk.inbox.next()
        disk.inbox.answer(event, "counted")
        await settle()
        assert await disk.inbox.rest() == []
        waiting = disk.update(1, 0)
        await settle()
        assert disk.begun == [1]  # nobody looks at it any more
        disk.inbox.shut("late")
        assert await applied == "counted"
        assert await waiting == "late"
        assert await disk.update(2, 0) == "late"
        disk.inbox.hear("left", client=0)
        assert len(disk.inbox) == 0

    play(scene)


def test_who_rests_takes_what_has_a_number_and_no_more_however_much_comes() -> None:
    async def scene() -> None:
        disk = Disk()
        disk.update(0, 0)
        await settle()
        (first,) = await disk.inbox.next()
        disk.work(False)
        on_its_way = disk.update(1, 0)
        await settle()
        disk.inbox.answer(first, "counted")
        resting = asyncio.create_task(disk.inbox.rest())
        waiting = [disk.update(client, 0) for client in range(2, 9)]
        await settle()
        disk.work(True)
        (event,) = await resting
        assert event.client == 1
        disk.inbox.answer(event, "late")
        assert await on_its_way == "late"
        await settle()
        assert disk.begun == [1, 2]
        disk.inbox.shut("late")
        assert await asyncio.gather(*waiting) == ["late"] * 7

    play(scene)


def test_an_update_that_counted_and_is_sent_again_when_it_is_shut_has_counted() -> None:
    async def scene() -> None:
        disk = Disk()
        disk.known[3, 1] = "d", "counted"
        waiting = disk.update(3, 1)
        disk.inbox.shut("late")
        assert await waiting == "counted"
        assert await disk.update(3, 1) == "counted"
        assert await disk.update(3, 2) == "late"

    play(scene)


def test_a_log_that_is_lost_ends_it_for_all() -> None:
    async def scene() -> None:
        disk = Disk()
        answers = [disk.update(0, 0)]
        await settle()
        await disk.inbox.next()  # not applied when the next one fails
        disk.fails = Over("another coordinator leads")
        answers.append(disk.update(1, 0))
        await settle()
        with pytest.raises(Over) as caught:
            await disk.inbox.next()
        answers.append(disk.update(2, 0))
        await settle()
        disk.inbox.shut(caught.value)
        for each in answers:
            with pytest.raises(Over):
                await each
        with pytest.raises(Over):
            await disk.update(3, 0)

    play(scene)
