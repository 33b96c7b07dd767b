from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hansa.core.trees import (
    Tree,
    add,
    concatenate,
    flatten,
    nbytes,
    pick,
    put_under,
    row,
    squared_norm,
    stack,
    subtract,
    take_under,
    tree_map,
    unflatten,
    zeros_like,
)


def tree(**values: object) -> Tree:
    return {name: torch.tensor(each, dtype=torch.float64) for name, each in values.items()}


def same(one: Tree, other: Tree) -> bool:
    return list(one) == list(other) and all(torch.equal(each, other[name]) for name, each in one.items())


def test_arithmetic() -> None:
    a, b = tree(w=[1.0, 2.0], v=3.0), tree(w=[10.0, 20.0], v=30.0)
    assert same(add(a, b), tree(w=[11.0, 22.0], v=33.0))
    assert same(add(a, b, 0.1), tree(w=[2.0, 4.0], v=6.0))
    assert same(subtract(b, a), tree(w=[9.0, 18.0], v=27.0))
    assert same(zeros_like(a), tree(w=[0.0, 0.0], v=0.0))
    assert same(tree_map(torch.maximum, a, tree(w=[0.0, 5.0], v=9.0)), tree(w=[1.0, 5.0], v=9.0))
    assert float(squared_norm(a)) == 1 + 4 + 9


def test_what_the_second_tree_lacks_passes_through() -> None:
    a = tree(w=[1.0, 2.0], v=3.0)
    summed = add(a, tree(v=1.0, other=7.0))
    assert same(summed, tree(w=[1.0, 2.0], v=4.0))
    assert summed["w"] is a["w"]


def test_operands_are_left_alone() -> None:
    a, b = tree(w=[1.0]), tree(w=[2.0])
    add(a, b)
    subtract(a, b)
    assert same(a, tree(w=[1.0]))
    assert same(b, tree(w=[2.0]))


def test_pick() -> None:
    a = tree(w=1.0, v=2.0, u=3.0)
    assert same(pick(a, ("u", "w")), tree(u=3.0, w=1.0))
    with pytest.raises(KeyError):
        pick(a, ("absent",))


def test_namespaces_nest_and_do_not_mix() -> None:
    model, control = tree(w=1.0), tree(w=2.0)
    both = {**model, **put_under("control", control), **put_under("control/old", control)}
    assert list(both) == ["w", "control/w", "control/old/w"]
    assert list(take_under("control", both)) == ["w", "old/w"]
    assert same(take_under("control/old", both), control)
    assert take_under("contr", both) == {}


def test_stack_row_and_concatenate() -> None:
    trees = [tree(w=[float(i), i + 0.5], v=float(-i)) for i in range(3)]
    stacked = stack(trees)
    assert stacked["w"].shape == (3, 2)
    assert stacked["v"].shape == (3,)
    assert all(same(row(stacked, i), each) for i, each in enumerate(trees))
    assert same(concatenate([stack(trees[:2]), stack(trees[2:])]), stacked)
    assert same(concatenate([stacked]), stacked)


def test_a_row_is_no_copy() -> None:
    stacked = stack([tree(w=[1.0]), tree(w=[2.0])])
    assert row(stacked, 1)["w"].data_ptr() == stacked["w"][1].data_ptr()


def test_bytes_on_the_wire() -> None:
    assert nbytes({"a": torch.zeros(3, 2), "b": torch.zeros((), dtype=torch.float64)}) == 6 * 4 + 8
    assert nbytes({"n": torch.zeros(5, dtype=torch.int64)}) == 40
    assert nbytes({}) == 0


shapes = st.dictionaries(
    st.text("abc./", min_size=1, max_size=4),
    st.lists(st.integers(0, 3), max_size=3).map(tuple),
    min_size=1,
    max_size=4,
)


@settings(derandomize=True, deadline=None, database=None, max_examples=60)
@given(shapes=shapes, clients=st.integers(1, 4))
def test_flatten_and_back(shapes: dict[str, tuple[int, ...]], clients: int) -> None:
    rng = torch.Generator().manual_seed(0)
    trees = [{n: torch.randn(shape, generator=rng) for n, shape in shapes.items()} for _ in range(clients)]
    matrix: Tensor = flatten(stack(trees))
    assert matrix.shape == (clients, sum(each.numel() for each in trees[0].values()))
    assert same(unflatten(matrix, trees[0]), stack(trees))
    assert same(unflatten(matrix[0], trees[0]), trees[0])


def test_flattening_follows_the_trees_own_order() -> None:
    stacked = stack([tree(b=[[1.0, 2.0], [3.0, 4.0]], a=5.0)])
    assert flatten(stacked).tolist() == [[1, 2, 3, 4, 5]]
    with pytest.raises(RuntimeError):
        unflatten(torch.zeros(6), row(stacked, 0))
