"""Convolutions by few multiplications (Winograd 1980; Lavin & Gray 2016, arXiv 1509.09308).

Along one axis, m outputs of a kernel of r taps need n = m + r − 1 multiplications, not m · r: both factors
are polynomials, evaluated at n points and multiplied there (Cook and Toom), ``y = Aᵀ[(G w) ⊙ (Bᵀ x)]``. Along
both axes of an image, and over its channels, the products at one point are one matrix product:

    U = G w Gᵀ,  V = Bᵀ x B,  M = U V at each point,  y = Aᵀ M A

The backward pass is the adjoint of each step and needs products of the same sizes. An axis that is cut into
tiles of m outputs has its tiles, their overlap and the padding written into the matrices.

Rounding grows with the number of points. Relative to exact arithmetic, root mean square, 32 to 64 channels:
8 and 9 points 4 to 6e-6, where the direct convolution has 3 to 7e-7; with 9 points on both axes it is 1.5e-5.

Shapes: B images [B, C, H, W] of one client, O filters [O, C, r, s]; p, q points and i, j tiles of the axes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache

import torch
from torch import Tensor

_CHANNELS = 16  # fewer, and there is little to save
_SIZE = 32  # of images: the matrices of an axis are dense
_FEWER = 4  # times fewer multiplications, or the transforms cost what these save
_FINITE = [Fraction(each) for each in ("0", "1", "-1", "1/2", "-1/2")]
_POINTS = {  # beside infinity: those of small rounding errors, found by trial
    8: [*_FINITE, Fraction(2), Fraction(-2)],
    9: [*_FINITE, Fraction(3, 2), Fraction(-3, 2), Fraction(3)],
}


def cook_toom(outputs: int, taps: int) -> tuple[Tensor, Tensor, Tensor]:
    """(A [n, m], G [n, r], B [n, n]) of ``y = Aᵀ[(G w) ⊙ (Bᵀ x)]``, m outputs of r taps, in float64."""
    n = outputs + taps - 1
    points = _POINTS[n]
    A = [[a**u for u in range(outputs)] for a in points]
    G, Bt = [], []
    for a in points:
        others = [b for b in points if b != a]
        scale = Fraction(1)
        for b in others:
            scale *= a - b
        G.append([a**k / scale for k in range(taps)])
        Bt.append([*_monic(others), Fraction(0)])
    A.append([Fraction(u == outputs - 1) for u in range(outputs)])
    G.append([Fraction(k == taps - 1) for k in range(taps)])
    Bt.append(_monic(points))
    return _matrix(A), _matrix(G), _matrix(Bt).T


def _monic(roots: Sequence[Fraction]) -> list[Fraction]:
    """Coefficients of ``Π (x − root)``, lowest first."""
    made = [Fraction(1)]
    for root in roots:
        made = [
            low - root * high for low, high in zip([Fraction(0), *made], [*made, Fraction(0)], strict=True)
        ]
    return made


def _matrix(rows: Sequence[Sequence[Fraction]]) -> Tensor:
    return torch.tensor([[float(each) for each in row] for row in rows], dtype=torch.float64)


@dataclass(frozen=True)
class _Tile:
    """What one tile reads and writes of an axis: B [n, read], A [n, written], the edges cut off."""

    reads: slice
    writes: slice
    A: Tensor
    B: Tensor


class _Axis:
    """One axis of an image, cut into t tiles of n points.

    Attributes
    ----------
    tiles: one by one.
    G: of the kernel [n, r].
    A, B: of all tiles at once, points first: [n · t, outputs] and [n · t, size].
    """

    def __init__(self, size: int, taps: int, padding: int, points: int) -> None:
        m = points - taps + 1
        self.outputs = size + 2 * padding - taps + 1
        A, self.G, B = cook_toom(m, taps)
        tiles = []
        for begin in range(0, self.outputs, m):
            first = begin - padding
            reads = slice(max(first, 0), min(first + points, size))
            writes = slice(begin, min(begin + m, self.outputs))
            cut = slice(reads.start - first, reads.stop - first)
            tiles.append(_Tile(reads, writes, A[:, : writes.stop - begin], B.T[:, cut]))
        self.tiles = tuple(tiles)
        wide_A = A.new_zeros(points, len(tiles), self.outputs)
        wide_B = A.new_zeros(points, len(tiles), size)
        for j, tile in enumerate(tiles):
            wide_A[:, j, tile.writes], wide_B[:, j, tile.reads] = tile.A, tile.B
        self.A, self.B = wide_A.flatten(0, 1), wide_B.flatten(0, 1)


class Winograd:
    """Convolutions, of stride 1, of images of one size; fastest where these are in channels-last memory.

    A row of tiles at a time, so that what is at work stays in the cache.
    """

    def __init__(
        self,
        size: Sequence[int],
        kernel: Sequence[int],
        padding: Sequence[int],
        points: Sequence[int],
        dtype: torch.dtype,
    ) -> None:
        rows, columns = (_Axis(*each) for each in zip(size, kernel, padding, points, strict=True))
        self._points = points[0] * points[1]
        self._side, self._tiles = points[0], len(columns.tiles)
        self._height, self._width, self._out = size[0], size[1], (rows.outputs, columns.outputs)
        self._rows = [
            _Tile(each.reads, each.writes, each.A.to(dtype), each.B.to(dtype)) for each in rows.tiles
        ]
        self._A, self._B = columns.A.to(dtype), columns.B.to(dtype)
        self._G = torch.kron(rows.G, columns.G).to(dtype)  # [p · q, r · s]

    def kernels(self, weight: Tensor) -> Tensor:
        """U [p · q, O, C] of filters [O, C, r, s]."""
        flat = weight.reshape(-1, self._G.shape[1])
        return (self._G @ flat.T).view(self._points, *weight.shape[:2])

    def forward(self, x: Tensor, U: Tensor, bias: Tensor | None, out: Tensor) -> None:
        """Write the convolution to ``out`` [B, O, ·, ·]."""
        images, outputs = len(x), U.shape[1]
        T = self._columns(x, self._B)
        N = T.new_empty(self._out[0], len(self._A), images * outputs)
        V, M = self._room(x, U.shape[2]), self._room(x, outputs)
        for tile in self._rows:
            torch.mm(tile.B, T[tile.reads].flatten(1), out=V.view(self._side, -1))
            torch.bmm(V, U.mT, out=M)
            torch.mm(tile.A.T, M.view(self._side, -1), out=N[tile.writes].flatten(1))
        y = self._images(N, self._A, images)
        if bias is None:
            out.copy_(y)
        else:
            torch.add(y, bias[:, None, None], out=out)

    def backward(
        self, g: Tensor, x: Tensor, U: Tensor, back: Tensor | None, gw: Tensor, gb: Tensor | None
    ) -> None:
        """Write the gradients by images, filters and bias."""
        T, N = self._columns(x, self._B), self._columns(g, self._A)
        V, M = self._room(x, U.shape[2]), self._room(x, U.shape[1])
        dU, dT = torch.zeros_like(U), torch.zeros_like(T)
        for tile in self._rows:
            torch.mm(tile.B, T[tile.reads].flatten(1), out=V.view(self._side, -1))
            torch.mm(tile.A, N[tile.writes].flatten(1), out=M.view(self._side, -1))
            dU.baddbmm_(M.mT, V)
            if back is not None:
                torch.bmm(M, U, out=V)
                dT[tile.reads].flatten(1).addmm_(tile.B.T, V.view(self._side, -1))
        torch.mm(dU.flatten(1).T, self._G, out=gw.view(-1, self._G.shape[1]))
        if back is not None:
            back.copy_(self._images(dT, self._B, len(x)))
        if gb is not None:
            torch.sum(g, (0, 2, 3), out=gb)

    def _room(self, x: Tensor, channels: int) -> Tensor:
        """For one row of tiles, point by point [p · q, j · B, channels]."""
        return x.new_empty(self._points, self._tiles * len(x), channels)

    def _columns(self, images: Tensor, spread: Tensor) -> Tensor:
        """[B, C, H, W] -> [H, q · j, B · C] by ``spread`` [q · j, W]."""
        rows = images.permute(2, 3, 0, 1).reshape(*images.shape[2:], -1)
        return torch.bmm(spread.expand(len(rows), *spread.shape), rows)

    def _images(self, rows: Tensor, spread: Tensor, images: int) -> Tensor:
        """[H, q · j, B · C] -> [B, C, H, W], the adjoint of :meth:`_columns`."""
        made = torch.bmm(spread.T.expand(len(rows), *spread.T.shape), rows)
        return made.view(len(rows), spread.shape[1], images, -1).permute(2, 3, 0, 1)


def winograd(
    x: Tensor, weight: Tensor, stride: list[int], padding: list[int], dilation: list[int], groups: int
) -> Winograd | None:
    """For images and filters like these, where it is faster than the direct convolution, else ``None``."""
    if x.device.type != "cpu" or weight.shape[2:] != (5, 5) or min(weight.shape[:2]) < _CHANNELS:
        return None
    if stride != [1, 1] or dilation != [1, 1] or groups != 1 or max(padding) > 4 or max(x.shape[2:]) > _SIZE:
        return None
    return _made(tuple(x.shape[2:]), tuple(padding), x.dtype)


@cache
def _made(size: tuple[int, int], padding: tuple[int, int], dtype: torch.dtype) -> Winograd | None:
    height, width = (each + 2 * pad - 4 for each, pad in zip(size, padding, strict=True))

    def products(points: tuple[int, int]) -> int:
        return math.prod(-(-each // (n - 4)) * n for each, n in zip((height, width), points, strict=True))

    points = min(((8, 8), (8, 9)), key=products)
    if 25 * height * width < _FEWER * products(points):
        return None
    return Winograd(size, (5, 5), padding, points, dtype)
