"""Private state is the same wherever it lies."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from hansa.core.errors import Interrupted, StorageError
from hansa.core.trees import Tree, nbytes
from hansa.simulation.bank import PAGE, Bank
from hansa.simulation.simulator import Simulator
from hansa.strategies.catalog import Federation

Build = Callable[..., Federation]


def first() -> Tree:
    """Tensors of unlike types, one of which holds nothing."""
    return {
        "w": torch.arange(6, dtype=torch.float32).view(2, 3),
        "steps": torch.tensor(3, dtype=torch.int64),
        "c": torch.full((5,), 0.5, dtype=torch.float64),
        "none": torch.zeros(0, 4),
    }


def of(client: int) -> Tree:
    return {name: each + client for name, each in first().items()}


def same(one: Tree, other: Tree) -> bool:
    return one.keys() == other.keys() and all(
        each.dtype == other[name].dtype and torch.equal(each, other[name]) for name, each in one.items()
    )


PAGES = (0, 1, 2, 100)  # that the budget allows


@pytest.mark.parametrize("pages", PAGES)
def test_what_was_put_comes_back(pages: int, tmp_path: Path) -> None:
    bank = Bank(first(), memory=pages * PAGE * nbytes(first()), folder=tmp_path)
    clients = [7 * i % 1000 for i in range(3 * PAGE + 5)]
    for client in clients:
        bank.put(client, of(client))
    bank.put(clients[3], of(-1))
    bank.put(clients[-1], of(-2))
    assert len(bank) == len(clients)
    assert same(bank[999_999], first())  # never put
    assert same(bank[clients[3]], of(-1))
    assert same(bank[clients[-1]], of(-2))
    assert all(same(bank[client], of(client)) for client in clients[4:-1])
    assert list(tmp_path.iterdir()) == []  # the file has no name, and nobody has to clean up


@pytest.mark.parametrize("before", PAGES)
@pytest.mark.parametrize("after", PAGES)
def test_a_snapshot_is_restored_under_any_budget(before: int, after: int, tmp_path: Path) -> None:
    page = PAGE * nbytes(first())
    bank, clients = Bank(first(), memory=before * page), [3 * i for i in range(2 * PAGE + 9)]
    for client in clients:
        bank.put(client, of(client))
    tensors, order, file = bank.snapshot()
    path = None
    if file is not None:
        file.seek(0)
        path = tmp_path / "bank"
        path.write_bytes(file.read())
    twin = Bank(first(), memory=after * page)
    twin.restore({name: each.clone() for name, each in tensors.items()}, order, path)
    twin.put(1, of(1))  # goes on where the other ended
    assert all(same(twin[client], of(client)) for client in (*clients, 1))
    assert len(twin) == len(clients) + 1


def test_without_private_state_there_is_nothing_to_keep() -> None:
    bank = Bank({}, memory=0)
    bank.put(4, {})
    twin = Bank({}, memory=0)
    tensors, clients, file = bank.snapshot()
    twin.restore(tensors, clients, None)
    assert (twin[4], tensors, file) == ({}, {}, None)


@pytest.mark.parametrize("memory", [0.0, 4.0])
def test_a_run_does_not_depend_on_where_private_state_lies(
    memory: float, digits: Build, tmp_path: Path
) -> None:
    def build(memory: float) -> Federation:
        sections: Mapping[str, Any] = {"algorithm": {"name": "scaffold"}, "stop": {"rounds": 4}}
        return digits(**sections, engine={"bank_memory": memory})

    whole = Simulator(build(4.0))
    expected = whole.run().params
    begun = Simulator(build(memory), checkpoints=tmp_path, on_round=lambda done: begun.stop())
    with pytest.raises(Interrupted):
        begun.run()
    second = Simulator(build(memory), checkpoints=tmp_path)
    assert second.resume() == 1
    assert same(second.run().params, expected)
    assert all(same(second.private(client), whole.private(client)) for client in range(6))


def test_a_full_disk_is_told_when_a_page_is_made_and_not_by_a_bus_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    with pytest.raises(StorageError, match=r"No space left on device.*raise engine"):
        Bank(first(), memory=0, folder=tmp_path).put(0, of(0))
