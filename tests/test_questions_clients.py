"""Questions about clients and gossip, answered by the database: figures worked by hand."""

from __future__ import annotations

from collections.abc import Sequence
from math import nan
from pathlib import Path

import numpy as np
import pytest

from hansa.core import questions
from hansa.core.questions import Record
from hansa.core.store import Outcome, Participation, Round, RunStore, Verdicts

RECIPE = '[algorithm]\nname = "fedavg"\n'


def job(
    client: int, *, returned: float = 2.0, steps: int = 4, outcome: Outcome = "folded", staleness: int = 0
) -> Participation:
    return Participation(
        client=client,
        phase="train",
        examples=10 * (client + 1),
        steps=steps,
        staleness=staleness,
        weight=1.0,
        dispatched=0.0,
        returned=returned,
        loss=None,
        outcome=outcome,
    )


def record(
    folder: Path,
    *rounds: Sequence[Participation],
    verdicts: Sequence[Verdicts | None] = (),
    mixing: Sequence[Sequence[float]] = (),
    counts: Sequence[Sequence[int]] = (),
    bytes_up: int = 100,
) -> Record:
    with RunStore.create(folder, name="a", seed=0, recipe=RECIPE, facts={}) as store:
        for index, jobs in enumerate(rounds, start=1):
            store.append(
                Round(
                    index=index,
                    time=float(index),
                    wall=float(index),
                    bytes_up=bytes_up,
                    bytes_down=0,
                    metrics={},
                    participants=jobs,
                    verdicts=verdicts[index - 1] if verdicts else None,
                )
            )
        if mixing:
            store.topology(np.array(mixing))
        if counts:
            store.partition(np.array(counts), ["cat", "dog", "cow"])
    return Record(folder)


def test_what_clients_gave(tmp_path: Path) -> None:
    with record(
        tmp_path,
        [job(0, returned=2.0), job(1, returned=8.0)],
        [job(0, returned=4.0, steps=8, staleness=3), job(2, outcome="lost", steps=0)],
    ) as asked:
        told = questions.contributors(asked)
        assert told["client"] == [0, 1, 2]
        assert told["jobs"] == [2, 1, 1]
        assert (told["folded"], told["lost"]) == ([2, 1, 0], [0, 0, 1])
        assert told["share"] == pytest.approx([2 / 3, 1 / 3, 0])
        assert told["speed"] == [12 / 6, 4 / 8, None]
        assert told["staleness"] == [1.5, 0, None]
        assert told["examples"] == [10, 20, 30]
        assert questions.contributors(asked, order="least", limit=1)["client"] == [2]
        assert questions.contributors(asked, client=1)["share"] == pytest.approx([1 / 3])
        even = questions.taking_part(asked)
    assert (even["asked"], even["gave"], even["folded"]) == (3, 2, 3)
    assert even["shares"][0] == 0
    assert even["shares"][50] == pytest.approx((0.5 * 1) / 3)  # half of three clients: 0, and half of 1
    assert even["shares"][100] == 1


def verdict(clients: Sequence[int], relative: Sequence[float], weight: Sequence[float]) -> Verdicts:
    return Verdicts(
        client=np.array(clients),
        distance=np.array(relative),
        relative=np.array(relative),
        weight=np.array(weight),
    )


def test_what_a_rule_makes_of_clients(tmp_path: Path) -> None:
    seen = [
        verdict([0, 1, 2], [1.0, 1.0, 6.0], [1.5, 1.5, 0.0]),
        verdict([0, 1, 2], [1.0, 3.0, nan], [1.5, 0.0, 0.0]),
        verdict([0, 2], [1.0, 8.0], [1.0, 0.05]),
    ]
    with record(tmp_path, [], [], [], verdicts=seen) as asked:
        told = questions.quality(asked)
        assert told["client"] == [2, 1, 0]  # the farthest first
        assert told["judged"] == [3, 2, 3]
        assert told["kept"] == [0, 1, 3]
        assert told["relative"] == [7.0, 2.0, 1.0]
        assert told["broken"] == [1, 0, 0]
        assert told["out"] == [3, 1, 0]
        over_time = questions.judged(asked)
    assert over_time["judged"] == [3, 3, 2]
    assert over_time["left_out"] == [1, 2, 1]
    assert over_time["farthest"] == [6.0, 3.0, 8.0]


def test_a_rule_that_decides_number_by_number_leaves_nobody_out(tmp_path: Path) -> None:
    seen = [verdict([0, 1], [1.0, 2.0], [nan, nan])]
    with record(tmp_path, [], verdicts=seen) as asked:
        told = questions.quality(asked)
        assert (told["kept"], told["out"], told["weight"]) == ([None] * 2, [None] * 2, [None] * 2)
        assert questions.judged(asked)["left_out"] == [None]


def test_a_partition_in_bins(tmp_path: Path) -> None:
    held = [[4, 0, 1], [0, 2, 0], [1, 1, 1], [0, 0, 9], [5, 0, 0]]
    with record(tmp_path, counts=held) as asked:
        whole = questions.partition(asked)
        assert (whole["counts"], whole["width"], whole["classes"]) == (held, 1, ["cat", "dog", "cow"])
        assert whole["sizes"] == [2, 3, 5, 5, 9]
        binned = questions.partition(asked, clients=2, classes=2)
    assert binned["counts"] == [[5, 5], [5, 9]]
    assert (binned["width"], binned["classes"], binned["population"]) == (3, ["cat", "others"], 5)


def test_the_traffic_of_edges(tmp_path: Path) -> None:
    """0 – 1 – 2: in two rounds 0 and 1 send twice, 2 once: 2·1 + 2·2 + 1·1 = 7 messages of 200 / 7 bytes."""
    path = [[0.5, 0.5, 0.0], [0.5, 0.0, 0.5], [0.0, 0.5, 0.5]]
    with record(tmp_path, [job(0), job(1), job(2)], [job(0), job(1)], mixing=path) as asked:
        told = questions.topology(asked)
        assert (told["a"], told["b"], told["weight"]) == ([0, 1], [1, 2], [0.5, 0.5])
        assert told["bytes"] == pytest.approx([4 * 200 / 7, 3 * 200 / 7])
        assert sum(told["bytes"]) == pytest.approx(200)
        assert (told["edges"], told["peers"], told["degree"]) == (2, 3, [1, 2])
        assert questions.topology(asked, limit=1)["edges"] == 2


def test_a_run_that_has_none_of_it_says_nothing(tmp_path: Path) -> None:
    with record(tmp_path) as asked:
        assert questions.contributors(asked)["client"] == []
        assert questions.taking_part(asked)["folded"] == 0
        assert questions.quality(asked)["client"] == []
        assert questions.judged(asked)["round"] == []
        assert questions.partition(asked)["counts"] == []
        assert questions.topology(asked)["edges"] == 0


def test_the_pace_is_what_was_folded_per_second(tmp_path: Path) -> None:
    with record(
        tmp_path, [job(0), job(1)], [job(0), job(1, outcome="lost")], [], [job(0), job(1), job(2)]
    ) as asked:
        told = questions.pace(asked, bins=2)  # rounds 1 and 2, 3 and 4, of a second each
    assert told == {"wall": [2.0, 4.0], "updates": [3 / 2, 3 / 2], "sent": [100.0, 100.0]}
