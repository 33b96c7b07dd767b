"""Hostile messages from a member of a federation, a great many of them: what becomes of each, and of memory.

    python benchmarks/fuzz.py --count 20000

Mallory has a seat in a run and jobs of her own; two honest agents work beside her. Her messages are valid
ones of every method, scrambled or with one field twisted, manifests that lie, files that lie, pieces out of
order. Every call must end with a precise status, the coordinator must log no error, whatever of hers was
accepted is checked once more by other means, and the honest agents' run must go on.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import structlog

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from floor import Floor
from storm import Storm, honest, memory

from hansa.core.wire import federation_pb2 as pb


async def scene(floor: Floor, storm: Storm, count: int) -> None:
    began = time.perf_counter()

    def told() -> None:
        wrong = [
            each
            for each in said
            if (each["log_level"] == "error" and each.get("run", storm.run) == storm.run)
            or "exc_info" in each
        ]  # a scrambled recipe may be right, and its run fail for want of clients
        if wrong:
            raise SystemExit(f"the coordinator logged an error: {wrong[0]}")
        said.clear()
        print(
            f"{storm.sent} messages, {time.perf_counter() - began:.0f} s, at most {memory():.0f} MB",
            flush=True,
        )

    async with floor.coordinator() as control:
        with structlog.testing.capture_logs() as said:
            async with honest(floor):
                blowing = asyncio.create_task(storm.blow(count))
                while not blowing.done():
                    await asyncio.wait([blowing], timeout=20)
                    told()
                blowing.result()
            status = await control.Stop(pb.RunName(id=storm.run))
    if not status.rounds:
        raise SystemExit("the honest agents' run made no round")
    print(f"rounds of the honest agents meanwhile: {status.rounds}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=20_000, help="messages")
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    logging.basicConfig(level=logging.ERROR)  # a refusal is a warning
    with tempfile.TemporaryDirectory() as name:
        floor = Floor(Path(name))
        storm = Storm(floor, random.Random(given.seed))
        asyncio.run(scene(floor, storm, given.count))
        print(f"updates of hers that were right and counted: {storm.accepted()}")
    ends: Counter[str] = Counter()
    for (_, status), times in storm.ends.items():
        ends[status] += times
    for status, times in ends.most_common():
        print(f"{times:7d}  {status}")


if __name__ == "__main__":
    main()
