"""Trees: flat dictionaries of tensors under state-dict names.

A flat tree is a safetensors file, a wire message, a layer filter and, with a leading client axis, a
batch of models. Extra networks and control variates are more keys, under a namespace that ends in
``/`` (``generator/0.weight``, ``control/head.bias``); names of the model itself contain no ``/``.

Shapes: n clients, d numbers in one flattened tree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

Tree = dict[str, Tensor]


def tree_map(function: Callable[..., Tensor], *trees: Mapping[str, Tensor]) -> Tree:
    """Apply ``function`` to the tensors that stand under the same name in every tree of ``trees``."""
    first, *rest = trees
    return {name: function(tensor, *(tree[name] for tree in rest)) for name, tensor in first.items()}


def add(a: Mapping[str, Tensor], b: Mapping[str, Tensor], scale: float | Tensor = 1.0) -> Tree:
    """``a + scale * b`` on the names of ``a`` that ``b`` has; the others pass through."""
    return {name: tensor + scale * b[name] if name in b else tensor for name, tensor in a.items()}


def subtract(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> Tree:
    """``a - b`` on the names of ``a``."""
    return tree_map(torch.sub, a, b)


def zeros_like(tree: Mapping[str, Tensor]) -> Tree:
    """Zeros of the same names, shapes and types."""
    return tree_map(torch.zeros_like, tree)


def doubled(tree: Mapping[str, Tensor]) -> Tree:
    """The tree in double precision; integers stay what they are."""
    return {name: each.double() if each.is_floating_point() else each for name, each in tree.items()}


def pick(tree: Mapping[str, Tensor], names: Iterable[str]) -> Tree:
    """The named part of a tree."""
    return {name: tree[name] for name in names}


def put_under(namespace: str, tree: Mapping[str, Tensor]) -> Tree:
    """The tree with every name moved under ``namespace/``."""
    return {f"{namespace}/{name}": tensor for name, tensor in tree.items()}


def take_under(namespace: str, tree: Mapping[str, Tensor]) -> Tree:
    """The part of a tree that stands under ``namespace/``, its names without that prefix."""
    prefix = f"{namespace}/"
    return {name[len(prefix) :]: tensor for name, tensor in tree.items() if name.startswith(prefix)}


def stack(trees: Sequence[Mapping[str, Tensor]]) -> Tree:
    """Trees of equal names and shapes as one tree with a leading client axis ``[n, ...]``."""
    return {name: torch.stack([tree[name] for tree in trees]) for name in trees[0]}


def row(stacked: Mapping[str, Tensor], index: int) -> Tree:
    """One client's tree of a stacked one, which it keeps alive: nothing is copied."""
    return {name: tensor[index] for name, tensor in stacked.items()}


def concatenate(stacks: Sequence[Mapping[str, Tensor]]) -> Tree:
    """Stacked trees joined along the client axis."""
    if len(stacks) == 1:
        return dict(stacks[0])
    return {name: torch.cat([each[name] for each in stacks]) for name in stacks[0]}


def flatten(*stacks: Mapping[str, Tensor]) -> Tensor:
    """Stacked trees as one matrix [n, d], one below the other, names in the first tree's own order."""
    names = list(stacks[0])
    rows = [[each[name].reshape(len(each[name]), -1) for name in names] for each in stacks]
    first = rows[0][0]
    matrix = first.new_empty(sum(len(each[0]) for each in rows), sum(part.shape[1] for part in rows[0]))
    for place, parts in zip(
        torch.split_with_sizes(matrix, [len(each[0]) for each in rows]), rows, strict=True
    ):
        torch.cat(parts, dim=1, out=place)
    return matrix


def unflatten(flat: Tensor, like: Mapping[str, Tensor]) -> Tree:
    """Undo :func:`flatten`: ``flat`` is [n, d] or [d]; ``like`` gives names and one client's shapes."""
    parts = torch.split_with_sizes(flat, [tensor.numel() for tensor in like.values()], dim=-1)
    return {
        name: part.reshape((*flat.shape[:-1], *tensor.shape))
        for (name, tensor), part in zip(like.items(), parts, strict=True)
    }


def squared_norm(tree: Mapping[str, Tensor]) -> Tensor:
    """Squared L2 norm over all tensors of a tree: a scalar tensor."""
    return torch.stack([tensor.square().sum() for tensor in tree.values()]).sum()


def nbytes(tree: Mapping[str, Tensor]) -> int:
    """Bytes that the tensors of a tree take on the wire."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tree.values())


def movement(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> dict[str, tuple[float, float]]:
    """For each floating-point tensor, the L2 norms of its change and of what it was before."""
    names = [name for name, tensor in after.items() if name in before and tensor.is_floating_point()]
    if not names:
        return {}
    norm = torch.linalg.vector_norm
    moved = [norm(after[name] - before[name]) for name in names]
    was = [norm(before[name]) for name in names]
    pairs = torch.stack([*moved, *was]).view(2, -1).T.tolist()
    return {name: (change, size) for name, (change, size) in zip(names, pairs, strict=True)}
