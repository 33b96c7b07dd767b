"""Weighted sums whose last digit depends on nothing but the rows and their order.

Floating-point sums depend on how they are bracketed. Here rows are added one after the other in blocks of
:data:`BLOCK`, and blocks pairwise in a binary tree whose shape is given by their number alone (pairwise
summation; Higham, "The accuracy of floating point summation", SIAM J. Sci. Comput. 14(4), 1993). However rows
are cut into chunks and blocks dealt to workers, the brackets are the same; and every element is a chain
of multiplications and additions of its own, which no number of threads can cut. A sum under way holds one
tree for each binary digit of the number of blocks, never the rows.

Shapes: k rows in one call, g blocks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hansa.core.trees import Tree, put_under, take_under

BLOCK = 8
_SMALL = (
    1024  # numbers in a row, up to which it costs more to take rows up one by one than to read them twice
)


@dataclass
class Part:
    """``Σ w_i u_i`` by name, and ``Σ w_i`` over those who carry the name. Moved in place."""

    sums: Tree
    masses: dict[str, float]

    def add(self, sums: Tree, masses: Mapping[str, float], scale: float = 1.0) -> None:
        """Add ``scale`` times other sums, and their masses."""
        if new := sums.keys() - self.sums.keys():
            self.sums |= {name: sums[name] * scale for name in sums if name in new}
        old = [name for name in sums if name not in new] if new else sums
        if old:
            torch._foreach_add_([self.sums[n] for n in old], [sums[n] for n in old], alpha=scale)
        for name, mass in masses.items():
            self.masses[name] = self.masses.get(name, 0.0) + mass


@dataclass(frozen=True)
class Node:
    """The sum of the 2^level blocks from block ``first`` on, a multiple of 2^level."""

    first: int
    level: int
    part: Part


@dataclass(frozen=True)
class Sums:
    """A sum under way. Its tensors are moved in place: go on with the latest only.

    Attributes
    ----------
    rows: rows behind it, whoever summed them.
    nodes: finished subtrees, from left to right.
    open: the block that still lacks rows.
    """

    rows: int = 0
    nodes: tuple[Node, ...] = ()
    open: Part | None = None

    def add(self, updates: Tree, weights: Tensor, present: Mapping[str, Tensor]) -> Sums:
        """Go on with the next k rows [k, ...]; ``weights`` and ``present`` as a reducer is given them."""
        rows, scales = {name: _wide(each) for name, each in updates.items()}, weights.tolist()
        if small := bool(rows) and sum(each[0].numel() for each in rows.values()) <= _SMALL:
            rows = {n: each * _aligned(weights, each) for n, each in rows.items()}
            if self.open is None and not present:
                return self.add_blocks({n: _blockwise(each) for n, each in rows.items()}, weights)
        nodes, part, count = list(self.nodes), self.open, self.rows
        names = list(rows)
        carried = {name: each.tolist() for name, each in present.items()}
        each = (
            zip(*(tensor.unbind() for tensor in rows.values()), strict=True) if rows else [()] * len(scales)
        )
        for i, (row, weight) in enumerate(zip(each, scales, strict=True)):
            here = {n: t for n, t in zip(names, row, strict=True) if n not in carried or carried[n][i]}
            part = part or Part({}, {})
            part.add(here, dict.fromkeys(here, weight), 1.0 if small else weight)
            count += 1
            if count % BLOCK == 0:
                _push(nodes, Node(count // BLOCK - 1, 0, part))
                part = None
        return Sums(count, tuple(nodes), part)

    def add_blocks(self, sums: Tree, weights: Tensor) -> Sums:
        """Go on with k rows whose weighted sums over each block [g, ...] are known; the last may lack rows.

        How a block is summed is the caller's matter; it must not depend on what else is computed.
        """
        assert self.open is None, "the block before still lacks rows"
        nodes, part, each = list(self.nodes), None, weights.tolist()
        masses = []
        for start in range(0, len(each), BLOCK):
            mass = 0.0
            for weight in each[start : start + BLOCK]:  # one after the other, as in add
                mass += weight
            masses.append(mass)
        whole = len(each) // BLOCK
        for node in _subtrees(self.rows // BLOCK, {n: t[:whole] for n, t in sums.items()}, masses[:whole]):
            _push(nodes, node)
        if whole < len(masses):
            part = Part(
                {name: tensor[whole] for name, tensor in sums.items()}, dict.fromkeys(sums, masses[-1])
            )
        return Sums(self.rows + len(each), tuple(nodes), part)

    def skip(self, rows: int) -> Sums:
        """Leave the next rows, whole blocks of them, to other workers."""
        assert self.open is None, "the block before still lacks rows"
        return Sums(self.rows + rows, self.nodes)

    def total(self) -> Part:
        """The whole sum."""
        whole = Part({}, {})
        for node in self._closed():
            whole.add(node.part.sums, node.part.masses)
        return whole

    def packed(self) -> tuple[Tree, list[Any]]:
        """What :func:`joined` needs of it: tensors, and facts that JSON can hold."""
        nodes = self._closed()
        trees = (put_under(str(i), node.part.sums) for i, node in enumerate(nodes))
        tensors = {name: each for tree in trees for name, each in tree.items()}
        return tensors, [[node.first, node.level, node.part.masses] for node in nodes]

    def _closed(self) -> list[Node]:
        """All subtrees. A block that lacks rows stands below the others, and is nobody's sibling."""
        last = [Node(self.rows // BLOCK, -1, self.open)] if self.open is not None else []
        return [*self.nodes, *last]


def joined(packed: Iterable[tuple[Tree, list[Any]]]) -> Sums:
    """The sum of what workers have packed, in the order of their rows."""
    nodes: list[Node] = []
    for tensors, facts in packed:
        for i, (first, level, masses) in enumerate(facts):
            _push(nodes, Node(first, level, Part(take_under(str(i), tensors), masses)))
    return Sums(nodes=tuple(nodes))


def _push(nodes: list[Node], node: Node) -> None:
    """Put a subtree to the right of the others; two siblings become their parent."""
    while nodes and nodes[-1].level == node.level and nodes[-1].first == node.first ^ (1 << node.level):
        left = nodes.pop()
        left.part.add(node.part.sums, node.part.masses)
        node = Node(left.first, left.level + 1, left.part)
    nodes.append(node)


def _subtrees(first: int, sums: Tree, masses: list[float]) -> list[Node]:
    """The largest subtrees over the blocks [g, ...] from ``first`` on, from left to right.

    All pairs of a level are added up at once, in place.
    """
    left, right, level = [], [], 0

    def node(at: int) -> Node:
        part = Part({name: each[at] for name, each in sums.items()}, dict.fromkeys(sums, masses[at]))
        return Node((first + at) << level, level, part)

    while masses:
        if first % 2:  # its sibling stands to the left of these
            left.append(node(0))
            sums, masses, first = {name: each[1:] for name, each in sums.items()}, masses[1:], first + 1
        if len(masses) % 2:
            right.append(node(len(masses) - 1))
            sums, masses = {name: each[:-1] for name, each in sums.items()}, masses[:-1]
        if masses:
            sums = {name: each[::2].add_(each[1::2]) for name, each in sums.items()}
            masses = [a + b for a, b in zip(masses[::2], masses[1::2], strict=True)]
        first, level = first // 2, level + 1
    return [*left, *reversed(right)]


def _aligned(weights: Tensor, rows: Tensor) -> Tensor:
    """[k] as [k, 1, ...], in the precision of the rows."""
    return weights.to(rows).reshape(-1, *(1,) * (rows.ndim - 1))


def _blockwise(rows: Tensor) -> Tensor:
    """The sums of blocks [g, ...] of rows [k, ...], each added up row after row; the last may lack rows."""
    total = rows[::BLOCK].clone()
    for i in range(1, min(BLOCK, len(rows))):
        some = rows[i::BLOCK]
        total[: len(some)] += some
    return total


def _wide(rows: Tensor) -> Tensor:
    """In at least single precision; whole numbers in double."""
    if not rows.is_floating_point():
        return rows.double()
    return rows.float() if rows.element_size() < 4 else rows


__all__ = ["BLOCK", "Node", "Part", "Sums", "joined"]
