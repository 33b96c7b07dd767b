"""Convolutions by few multiplications give what the direct ones give, to the rounding that is promised."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hansa.simulation.winograd import Winograd, cook_toom, winograd

SIZES = [  # of images, of the padding, points of both axes
    ((14, 14), (2, 2), (8, 9)),
    ((13, 17), (2, 2), (8, 8)),
    ((9, 6), (0, 1), (9, 8)),
    ((5, 11), (4, 0), (8, 9)),
]
ROUNDING = 1e-5  # root mean square, relative


def drawn(size: tuple[int, int], padding: tuple[int, int]) -> tuple[Tensor, ...]:
    """Images, filters, bias and a gradient of what comes out, in float64."""
    draw = torch.Generator().manual_seed(0)
    height, width = (each + 2 * pad - 4 for each, pad in zip(size, padding, strict=True))
    shapes = ((6, 32, *size), (48, 32, 5, 5), (48,), (6, 48, height, width))
    return tuple(torch.randn(shape, generator=draw, dtype=torch.float64) for shape in shapes)


def direct(x: Tensor, w: Tensor, b: Tensor, g: Tensor, padding: tuple[int, int]) -> list[Tensor]:
    leaves = images, filters, bias = [each.clone().requires_grad_() for each in (x, w, b)]
    y = F.conv2d(images, filters, bias, padding=padding)
    return [y.detach(), *torch.autograd.grad(y, leaves, g)]


def transformed(way: Winograd, x: Tensor, w: Tensor, b: Tensor, g: Tensor) -> list[Tensor]:
    y, back, gw, gb = (torch.empty_like(each) for each in (g, x, w, b))
    way.forward(x, way.kernels(w), b, y)
    way.backward(g, x, way.kernels(w), back, gw, gb)
    return [y, back, gw, gb]


def apart(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize(("outputs", "taps"), [(4, 5), (5, 5), (6, 3), (2, 7), (7, 3)])
def test_few_multiplications_are_a_correlation(outputs: int, taps: int) -> None:
    A, G, B = cook_toom(outputs, taps)
    x = torch.arange(outputs + taps - 1, dtype=torch.float64).cos()
    w = torch.arange(taps, dtype=torch.float64).exp()
    torch.testing.assert_close(A.T @ ((G @ w) * (B.T @ x)), x.unfold(0, taps, 1) @ w)


@pytest.mark.parametrize(("size", "padding", "points"), SIZES)
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_all_three_passes_are_those_of_the_direct_convolution(
    size: tuple[int, int],
    padding: tuple[int, int],
    points: tuple[int, int],
    layout: torch.memory_format,
) -> None:
    x, w, b, g = drawn(size, padding)
    exact = direct(x, w, b, g, padding)
    for dtype, most in ((torch.float64, 1e-13), (torch.float32, ROUNDING)):
        way = Winograd(size, (5, 5), padding, points, dtype)
        given = [each.to(dtype) for each in (x, w, b, g)]
        given[0], given[3] = (each.to(memory_format=layout) for each in (given[0], given[3]))
        for found, each in zip(transformed(way, *given), exact, strict=True):
            assert apart(found, each) < most


def test_images_that_need_no_gradient_get_none_and_filters_the_same() -> None:
    x, w, b, g = drawn((14, 14), (2, 2))
    way = Winograd((14, 14), (5, 5), (2, 2), (8, 8), torch.float64)
    gw = torch.empty_like(w)
    way.backward(g, x, way.kernels(w), None, gw, None)
    assert torch.equal(gw, transformed(way, x, w, b, g)[2])


def test_it_is_chosen_where_it_is_exact_and_saves_most() -> None:
    x, w = torch.zeros(1, 32, 14, 14), torch.zeros(64, 32, 5, 5)
    same = ([1, 1], [2, 2], [1, 1], 1)
    assert winograd(x, w, *same) is not None
    assert winograd(x[..., :4, :4], w, *same) is not None  # as in the tests of chunks and threads
    for other in (([2, 2], *same[1:]), (*same[:2], [2, 2], 1), (*same[:3], 2), ([1, 1], [5, 5], [1, 1], 1)):
        assert winograd(x, w, *other) is None
    assert winograd(x, w[..., :3, :3], [1, 1], [1, 1], [1, 1], 1) is None
    assert winograd(x[:, :1], w[:, :1], *same) is None
    assert winograd(x[..., :2, :2], w, *same) is None
