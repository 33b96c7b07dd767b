"""Operations on the weights of many clients, each with the SGD update in its backward pass.

An unmodified module runs once on the folded batch [A·B, ...] under :class:`Fused`, which sends every
operation that consumes a parameter to its form here. Forward uses each client's own weights; backward moves
them as soon as it has what it needs, so that no gradient is ever stored.

* While clients still agree, products use the one shared matrix: ``x W_0ᵀ``, of all clients at once.
* Where a linear layer's change is kept as factors, ``x W_tᵀ = x W_0ᵀ − η Σ_s (x x_sᵀ) g_s``: large products
  stay shared, and memory is that of the activations.
* Convolutions run client by client, in the memory layout in which the library is fastest; or by few
  multiplications (:mod:`hansa.simulation.winograd`) where that is faster, if the recipe allows its rounding.

Shapes: A active clients, B examples each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from hansa.core.folding import refuse_looking, refuse_options
from hansa.simulation.lanes import deal
from hansa.simulation.moving import Moving
from hansa.simulation.winograd import winograd

_NARROW = (
    16  # outputs; with fewer, and fewer than examples, ``W xᵀ`` takes two thirds of the time of ``x Wᵀ``
)
_FEW_CHANNELS = 8  # below, a convolution of channels-last images is the faster one


class Fused(TorchFunctionMode):
    """Sends operations on the run's parameters to their fused forms; entered once for each forward pass."""

    def __init__(self, run: Moving) -> None:
        super().__init__()
        self._run = run
        self._used: set[int] = set()
        self._anchor = torch.zeros((), dtype=run.task.dtype, device=run.task.device, requires_grad=True)

    def __enter__(self) -> Self:
        self._used.clear()
        return super().__enter__()  # type: ignore[no-any-return, no-untyped-call]

    def decay_unused(self) -> None:
        """After the backward pass: weights that the model did not use have no gradient, and decay still."""
        if self._run.keep != 1.0:
            for token, name in self._run.names.items():
                if token not in self._used:
                    self._run.moved(name).mul_(self._run.keep)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        fused = _OPERATIONS.get(func)
        if fused is None:
            refuse_looking(func)
            return func(*args, **kwargs)
        own = self._run.names.keys() & map(id, (*args[1:], *kwargs.values()))
        if not own:
            return func(*args, **kwargs)
        if own & self._used:
            raise NotImplementedError("a layer used twice: its first use would see weights already moved")
        self._used |= own
        return fused(self._run, self._anchor, *args, **kwargs)


def _name(run: Moving, token: Tensor | None) -> str | None:
    if token is None:
        return None
    name = run.names.get(id(token))
    if name is None:
        raise NotImplementedError("a layer of which only a part is trained")
    return name


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, x: Tensor, run: Moving, weight: str, bias: str | None) -> Tensor:
        rows = x.detach().reshape(run.active, -1, x.shape[-1])  # [A, B, in]
        ctx.run, ctx.rows, ctx.weight, ctx.bias = run, rows, weight, bias
        W = run.values(weight)
        if W.shape[-2] < min(_NARROW, rows.shape[1]):
            each = W.expand(run.active, *W.shape[-2:])
            out = torch.bmm(each, rows.mT).mT.contiguous()
        elif run.agreed(weight):
            out = F.linear(rows.flatten(0, 1), W).view(*rows.shape[:2], -1)
        else:
            out = torch.bmm(rows, W.mT)
        if run.agreed(weight):
            for x_s, g_s in run.history(weight):
                out.baddbmm_(torch.bmm(rows, x_s.mT), g_s, alpha=-run.lr)
        if bias is not None:
            b = run.values(bias)
            out += b if run.agreed(bias) else b[:, None]
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        grad: Tensor = grads[0]
        run, rows, weight, bias = ctx.run, ctx.rows, ctx.weight, ctx.bias
        ctx.rows = None
        g = grad.reshape(*rows.shape[:2], -1)  # [A, B, out]
        W = run.values(weight)
        back = None
        if ctx.needs_input_grad[1]:
            if run.agreed(weight):
                back = (g.flatten(0, 1) @ W).view(rows.shape)
                for x_s, g_s in run.history(weight):
                    back.baddbmm_(torch.bmm(g, g_s.mT), x_s, alpha=-run.lr)
            else:
                back = torch.bmm(g, W)
            back = back.view(*grad.shape[:-1], -1)
        if bias is not None:
            run.descend(bias, g.sum(1))
        run.descend_linear(weight, rows, g)
        return None, back, None, None, None


class _Direct:
    """The library's convolution of one client, in the memory layout in which it is fastest."""

    def __init__(self, channels: int, geometry: tuple[Any, ...]) -> None:
        self._layout = torch.channels_last if channels < _FEW_CHANNELS else torch.contiguous_format
        self._geometry = geometry

    def kernels(self, weight: Tensor) -> Tensor:
        """The filters as :meth:`forward` and :meth:`backward` take them."""
        return _laid(weight, self._layout)

    def forward(self, x: Tensor, kernels: Tensor, bias: Tensor | None, out: Tensor) -> None:
        """Write the convolution to ``out``."""
        out.copy_(F.conv2d(_laid(x, self._layout), kernels, bias, *self._geometry))

    def backward(
        self, g: Tensor, x: Tensor, kernels: Tensor, back: Tensor | None, gw: Tensor, gb: Tensor | None
    ) -> None:
        """Write the gradients by images, filters and bias."""
        stride, padding, dilation, groups = self._geometry
        g, x = _laid(g, self._layout), _laid(x, self._layout)
        sizes, wants = None if gb is None else [g.shape[1]], [back is not None, True, gb is not None]
        found = torch.ops.aten.convolution_backward(
            g, x, kernels, sizes, stride, padding, dilation, False, [0, 0], groups, wants
        )
        for place, each in zip((back, gw, gb), found, strict=True):
            if place is not None:
                place.copy_(each)


class _Conv2d(torch.autograd.Function):
    """Client by client; images stay in the memory layout in which they come, or that the first one makes."""

    @staticmethod
    def forward(
        ctx: Any,
        anchor: Tensor,
        x: Tensor,
        run: Moving,
        weight: str,
        bias: str | None,
        geometry: tuple[Any, ...],
    ) -> Tensor:
        x = x.detach()
        W, b = run.values(weight), None if bias is None else run.values(bias)
        alike, images = run.agreed(weight), len(x) // run.active
        w = W if alike else W[0]
        fast = winograd(x, w, *geometry) if run.winograd else None
        way = fast or _Direct(x.shape[1], geometry)
        ctx.run, ctx.x, ctx.weight, ctx.bias, ctx.way = run, x, weight, bias, way
        shape = F.conv2d(x[:1].to("meta"), w.to("meta"), None, *geometry).shape
        last = x.shape[1] < _FEW_CHANNELS or x.is_contiguous(memory_format=torch.channels_last)
        layout = torch.channels_last if last else torch.contiguous_format
        out = torch.empty((len(x), *shape[1:]), dtype=x.dtype, device=x.device, memory_format=layout)
        common = way.kernels(W) if alike else None

        def one(k: int) -> None:
            mine = slice(k * images, (k + 1) * images)
            kernels = way.kernels(W[k]) if common is None else common
            b_k = None if b is None or bias is None else b if run.agreed(bias) else b[k]
            way.forward(x[mine], kernels, b_k, out[mine])

        deal(one, range(run.active))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        grad: Tensor = grads[0]
        run, x, weight, bias, way = ctx.run, ctx.x, ctx.weight, ctx.bias, ctx.way
        ctx.x = None
        images = len(x) // run.active
        back = torch.empty_like(x) if ctx.needs_input_grad[1] else None
        W = run.values(weight)
        common = way.kernels(W) if run.agreed(weight) else None
        gw = grad.new_empty(run.active, *W.shape[-4:])
        gb = None if bias is None else grad.new_empty(run.active, grad.shape[1])

        def one(k: int) -> None:
            mine = slice(k * images, (k + 1) * images)
            kernels = way.kernels(W[k]) if common is None else common
            back_k, gb_k = (None if each is None else each[at] for each, at in ((back, mine), (gb, k)))
            way.backward(grad[mine], x[mine], kernels, back_k, gw[k], gb_k)

        deal(one, range(run.active))
        run.descend(weight, gw)
        if bias is not None:
            run.descend(bias, gb)
        return None, back, None, None, None, None


def _laid(images: Tensor, layout: torch.memory_format) -> Tensor:
    """Unlike ``contiguous``, this gives images of one channel the strides by which the library knows them."""
    return images.to(memory_format=layout)


class _Affine(torch.autograd.Function):
    """Scale and shift of normalised values; parameters stand at ``axis`` and after in [K·B, ...]."""

    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, x: Tensor, run: Moving, weight: str | None, bias: str | None, axis: int
    ) -> Tensor:
        folded = x.detach().view(run.active, -1, *x.shape[1:])  # [A, B, ...]
        ctx.run, ctx.folded, ctx.weight, ctx.bias, ctx.axis = run, folded, weight, bias, axis
        out = folded
        if weight is not None:
            out = out * _placed(run, weight, folded, axis)
        if bias is not None:
            out = out + _placed(run, bias, folded, axis)
        return out.flatten(0, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        grad: Tensor = grads[0]
        run, folded, weight, bias, axis = ctx.run, ctx.folded, ctx.weight, ctx.bias, ctx.axis
        ctx.folded = None
        g = grad.reshape(folded.shape)
        back = g if weight is None else g * _placed(run, weight, folded, axis)
        for name, product in ((weight, lambda: g * folded), (bias, lambda: g)):
            if name is not None:
                shape = run.values(name).shape if run.agreed(name) else run.values(name).shape[1:]
                span = range(axis + 1, axis + 1 + len(shape))
                away = [d for d in range(1, folded.dim()) if d not in span]
                run.descend(name, product().sum(away))
        return None, back.flatten(0, 1), None, None, None, None


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, indices: Tensor, run: Moving, weight: str) -> Tensor:
        W = run.values(weight)
        size = W.shape[-2]
        lanes = torch.arange(run.active, device=indices.device) * size
        rows = indices.reshape(run.active, -1) + lanes[:, None]  # [A, B·]
        ctx.run, ctx.rows, ctx.weight = run, rows, weight
        if run.agreed(weight):
            return F.embedding(indices, W)
        return F.embedding(rows, W.flatten(0, 1)).view(*indices.shape, -1)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        grad: Tensor = grads[0]
        run, rows, weight = ctx.run, ctx.rows, ctx.weight
        own = run.moved(weight)
        if run.keep != 1.0:
            own *= run.keep
        table = own.view(-1, own.shape[-1])
        table.index_add_(0, rows.flatten(), grad.reshape(-1, grad.shape[-1]), alpha=-run.lr)
        return None, None, None, None


def _placed(run: Moving, name: str, folded: Tensor, axis: int) -> Tensor:
    """A parameter of shape [A, ...] or [...], ready to broadcast against [A, B, ...]."""
    values = run.values(name)
    if run.agreed(name):
        values = values[None]
    shape = [len(values)] + [1] * (folded.dim() - 1)
    for offset, size in enumerate(values.shape[1:]):
        shape[axis + 1 + offset] = size
    return values.view(shape)


def _fused_linear(run: Moving, anchor: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    return _Linear.apply(anchor, x, run, _name(run, weight), _name(run, bias))  # type: ignore[no-untyped-call]


def _fused_conv2d(
    run: Moving,
    anchor: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Any:
    def pair(each: Any) -> list[int]:
        return [each, each] if isinstance(each, int) else list(each)

    stride, dilation = pair(stride), pair(dilation)
    if padding == "same":
        reach = [d * (size - 1) for d, size in zip(dilation, weight.shape[2:], strict=True)]
        if any(each % 2 for each in reach):
            raise NotImplementedError("uneven padding")
        padding = [each // 2 for each in reach]
    geometry = (stride, [0, 0] if padding == "valid" else pair(padding), dilation, groups)
    return _Conv2d.apply(anchor, x, run, _name(run, weight), _name(run, bias), geometry)  # type: ignore[no-untyped-call]


def _fused_group_norm(
    run: Moving,
    anchor: Tensor,
    x: Tensor,
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Any:
    normal = F.group_norm(x, groups, None, None, eps)
    return _Affine.apply(anchor, normal, run, _name(run, weight), _name(run, bias), 1)  # type: ignore[no-untyped-call]


def _fused_layer_norm(
    run: Moving,
    anchor: Tensor,
    x: Tensor,
    shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Any:
    normal = F.layer_norm(x, list(shape), None, None, eps)
    axis = x.dim() - len(shape)
    return _Affine.apply(anchor, normal, run, _name(run, weight), _name(run, bias), axis)  # type: ignore[no-untyped-call]


def _fused_embedding(
    run: Moving, anchor: Tensor, indices: Tensor, weight: Tensor, *args: Any, **kwargs: Any
) -> Any:
    refuse_options(*args, **kwargs)
    return _Embedding.apply(anchor, indices, run, _name(run, weight))  # type: ignore[no-untyped-call]


_OPERATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    F.linear: _fused_linear,
    torch.conv2d: _fused_conv2d,
    F.group_norm: _fused_group_norm,
    F.layer_norm: _fused_layer_norm,
    F.embedding: _fused_embedding,
}
