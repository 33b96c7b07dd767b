"""Where updates are: in memory, in files, interrupted, the same twice, on disks that fail."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from hansa.core.errors import RunError
from hansa.core.trees import Tree
from hansa.core.wire.tensors import Packed, pack
from hansa.server import artefacts, pages
from hansa.server.artefacts import Artefacts
from hansa.server.pages import Pages
from hansa.server.reception import Reception


def update(seed: int = 0, size: int = 5000) -> tuple[Tree, Packed]:
    generator = torch.Generator().manual_seed(seed)
    tree = {"weight": torch.randn(size, generator=generator), "steps": torch.tensor(seed)}
    return tree, pack(tree)


def received(store: Artefacts, packed: Packed, job: str = "0-0", *, until: int | None = None) -> Reception:
    """An upload in pieces of 3,000 bytes, up to ``until``, that goes on with what an earlier one left."""
    reception = store.receive("run", job, packed.digest, len(packed.data))
    if reception.away:
        reception.open()
    end = len(packed.data) if until is None else until
    while reception.offset < end:
        if reception.take(packed.data[reception.offset : min(reception.offset + 3000, end)]):
            reception.write()
    return reception


def kept(store: Artefacts, packed: Packed, job: str = "0-0") -> None:
    reception = received(store, packed, job)
    assert reception.whole()
    reception.check(packed.tensors)
    reception.keep()
    store.settle()


def found(store: Artefacts, packed: Packed) -> Tree:
    tree = store.tree(packed.digest, packed.tensors)
    assert tree is not None
    return tree


def same(one: Tree, other: Tree) -> bool:
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(params=["in memory, past the page cache", "in memory", "in a file"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Artefacts:
    """Of each kind of reception."""
    if request.param == "in memory":
        monkeypatch.setattr(pages, "_DIRECT", 0)
    if request.param == "in a file":
        monkeypatch.setattr(artefacts, "_SMALL", 0)
    return Artefacts(tmp_path)


def test_an_update_comes_back_from_disk(store: Artefacts) -> None:
    tree, packed = update()
    kept(store, packed)
    assert same(found(store, packed), tree)
    assert same(found(store, packed), tree)
    assert store.get(packed.digest) == packed.data
    assert same(found(Artefacts(store.folder), packed), tree)


def test_an_interrupted_upload_goes_on_where_it_was_even_after_a_restart(store: Artefacts) -> None:
    tree, packed = update()
    for until in (1, 7001, 9000):
        reception = received(store, packed, until=until)
        assert reception.offset == until
        reception.pause()
        store = Artefacts(store.folder)
    reception = store.receive("run", "0-0", packed.digest, len(packed.data))
    assert reception.away
    reception.open()
    assert reception.offset == 9000
    reception.pause()
    kept(store, packed)
    assert same(found(store, packed), tree)
    assert not [path for path in (store.folder / "spool").rglob("*") if path.is_file()]


def test_another_update_of_a_job_takes_the_place_of_what_had_come(store: Artefacts) -> None:
    received(store, update(0)[1], until=6000).pause()
    tree, packed = update(1)
    fresh = received(store, packed, until=0)
    assert fresh.offset == 0
    fresh.pause()
    kept(store, packed)
    assert same(found(store, packed), tree)
    assert not [path for path in (store.folder / "spool").rglob("*") if path.is_file()]


def test_what_is_wrong_is_not_left_for_another_try(store: Artefacts) -> None:
    _, packed = update()
    reception = store.receive("run", "0-0", packed.digest, len(packed.data))
    if reception.away:
        reception.open()
    reception.take(b"x" * len(packed.data))
    assert not reception.whole()
    reception.discard()
    reception.pause()
    assert not [path for path in (store.folder / "spool").rglob("*") if path.is_file()]
    kept(store, packed)


def test_what_had_come_is_forgotten_if_it_is_longer_than_the_update(store: Artefacts) -> None:
    _, packed = update()
    received(store, packed, until=len(packed.data)).pause()
    (left,) = [path for path in (store.folder / "spool").rglob("*") if path.is_file()]
    left.write_bytes(b"x" * (len(packed.data) + 1))
    kept(store, packed)
    assert store.get(packed.digest) == packed.data


def test_two_updates_of_the_same_bytes_are_each_folded(store: Artefacts) -> None:
    tree, packed = update()
    kept(store, packed, "0-0")
    kept(store, packed, "1-0")
    assert same(found(store, packed), tree)
    assert same(found(store, packed), tree)


def test_bytes_that_may_be_lost_never_take_the_place_of_those_of_before(
    store: Artefacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The update of another client may have the same bytes, and is in the log."""

    def broken(descriptor: int) -> None:
        raise OSError(5, os.strerror(5))

    _, packed = update()
    kept(store, packed, "0-0")
    before = store.path(packed.digest).stat().st_ino
    again = received(store, packed, "1-0")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", broken)
        with pytest.raises(OSError, match="Input/output"):
            again.keep()
    again.pause()
    assert store.path(packed.digest).stat().st_ino == before
    assert store.get(packed.digest) == packed.data


def test_updates_stay_in_memory_while_there_is_some(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artefacts, "_MEMORY", 128 << 10)  # two of them
    store, stayed = Artefacts(tmp_path), []
    made = [update(seed) for seed in range(4)]
    for seed, (_, packed) in enumerate(made):
        stayed.append(received(store, packed, f"{seed}-0").check(packed.tensors))
    assert [each is not None for each in stayed] == [True, True, False, False]
    assert all(here and same(here, tree) for (tree, _), here in zip(made[:2], stayed[:2], strict=True))
    stayed.clear()
    tree, packed = made[3]
    again = received(store, packed, "4-0").check(packed.tensors)
    assert again is not None
    assert same(again, tree)


def test_what_an_earlier_process_was_writing_is_swept_away(tmp_path: Path) -> None:
    store = Artefacts(tmp_path)
    (tmp_path / "spool" / "draft").write_bytes(b"half")
    _, packed = update()
    received(store, packed, until=100).pause()
    store.sweep()
    left = [path for path in (tmp_path / "spool").rglob("*") if path.is_file()]
    assert [path.parent.name for path in left] == ["run"]
    store.clear(lambda run: run == "run")
    assert not received(store, packed, until=0).away


def test_a_damaged_artefact_is_named(tmp_path: Path) -> None:
    store = Artefacts(tmp_path)
    _, packed = update()
    kept(store, packed)
    store.path(packed.digest).write_bytes(packed.data[:-1] + b"!")
    with pytest.raises(RunError, match=f"{packed.digest}: an artefact is damaged"):
        store.get(packed.digest)


def test_memory_is_used_again_but_not_while_a_tensor_looks_at_it() -> None:
    store = Pages(1 << 20)
    memory = store.take(100)
    address = memory.ctypes.data
    assert len(memory) % pages.BLOCK == 0
    assert address % pages.BLOCK == 0
    tensor = torch.frombuffer(memory[:64], dtype=torch.float32)
    tensor.fill_(7)
    del memory
    other = store.take(100)
    assert other.ctypes.data != address
    other.fill(0)
    assert torch.equal(tensor, torch.full((16,), 7.0))
    del tensor
    again = store.take(200)
    assert again.ctypes.data == address


def test_memory_that_waits_has_an_end() -> None:
    store = Pages(most=0)
    memory = store.take(100)
    memory.fill(1)
    del memory
    assert not np.any(store.take(100))  # fresh from the system


def test_memory_of_one_size_makes_room_for_another() -> None:
    store = Pages(most=256 << 10)
    small = [store.take(64 << 10) for _ in range(4)]
    addresses = {each.ctypes.data for each in small}
    small.clear()
    large = store.take(128 << 10)
    assert not store.scarce
    left = [store.take(64 << 10) for _ in range(4)]
    assert sum(each.ctypes.data in addresses for each in left) <= 2
    assert store.scarce
    del large, left
    assert not store.scarce


def test_two_runs_keep_the_same_part_of_a_snapshot_at_the_same_time(tmp_path: Path) -> None:
    artefacts = Artefacts(tmp_path)
    parts = [bytes([i]) * 200_000 for i in range(100)]

    def put(run: str) -> list[str]:
        return [artefacts.put(run, part) for part in parts]

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(put, ("a", "b"))
    assert [artefacts.part("a", each) for each in first] == parts
    assert [artefacts.part("b", each) for each in second] == parts
