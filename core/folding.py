"""Gradients of many clients from one forward and one backward pass over their folded batches.

The client axis is folded into the batch: an unmodified module runs once on [K·B, ...], and only operations
that consume a parameter are intercepted, because there each client has its own. Everything else is an
ordinary batch operation, so none of vmap's batching rules (slow for convolutions on a CPU) is needed.

:class:`Gradient` is what :meth:`hansa.core.task.Task.gradient` calls. Alone it is plain autograd; under
``torch.vmap`` it receives the stacked tensors and folds. Before its first use the fold is checked against
plain autograd on two clients with different parameters; a module that fails (it mixes examples, or uses a
parameter in an operation not known here) is left to vmap, if that gives the same, and else done one by one.

Shapes: K clients, B examples each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from hansa.core.errors import InputError
from hansa.core.trees import Tree, doubled, row, stack

if TYPE_CHECKING:
    from hansa.core.task import Batch, Metrics, Task

    Way = Callable[[Task, Tree, Batch], tuple[Tree, Metrics, Tree]]


class _PerClient(TorchFunctionMode):
    """Sends operations on stacked parameters to their per-client forms."""

    def __init__(self, clients: int, stacked: Tree) -> None:
        super().__init__()
        self._clients = clients
        self._stacked = {id(tensor) for tensor in stacked.values()}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        refuse_looking(func)
        own = _OPERATIONS.get(func)
        if own is not None and any(id(each) in self._stacked for each in (*args[1:], *kwargs.values())):
            return own(self._clients, *args, **kwargs)
        return func(*args, **kwargs)


def _split(clients: int, x: Tensor) -> Tensor:
    return x.view(clients, -1, *x.shape[1:])  # [K, B, ...]


def _linear(clients: int, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    rows = _split(clients, x).flatten(1, -2)  # [K, B·, in]
    out = torch.bmm(rows, weight.mT) if bias is None else torch.baddbmm(bias[:, None], rows, weight.mT)
    return out.view(*x.shape[:-1], -1)


def _conv2d(
    clients: int, x: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, **kwargs: Any
) -> Tensor:
    biases = [None] * clients if bias is None else bias.unbind()
    each = zip(_split(clients, x).unbind(), weight.unbind(), biases, strict=True)
    return torch.cat([F.conv2d(x_k, w_k, b_k, *args, **kwargs) for x_k, w_k, b_k in each])


def _affine(clients: int, x: Tensor, weight: Tensor | None, bias: Tensor | None, axis: int) -> Tensor:
    """Per-client scale and shift [K, ...] of what stands at ``axis`` and after in x [K·B, ...]."""
    folded = _split(clients, x)

    def place(parameter: Tensor) -> Tensor:
        shape = [clients] + [1] * (folded.dim() - 1)
        for offset, size in enumerate(parameter.shape[1:]):
            shape[axis + 1 + offset] = size
        return parameter.view(shape)

    if weight is not None:
        folded = folded * place(weight)
    if bias is not None:
        folded = folded + place(bias)
    return folded.flatten(0, 1)


def _group_norm(
    clients: int,
    x: Tensor,
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    return _affine(clients, F.group_norm(x, groups, None, None, eps), weight, bias, axis=1)


def _layer_norm(
    clients: int,
    x: Tensor,
    shape: list[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    normal = F.layer_norm(x, shape, None, None, eps)
    return _affine(clients, normal, weight, bias, axis=x.dim() - len(shape))


def _batch_norm(
    clients: int,
    x: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Statistics per client: clients side by side as channels, [B, K·C, ...]."""

    def flat(each: Tensor | None) -> Tensor | None:
        return None if each is None else each.reshape(-1)

    side = _split(clients, x).transpose(0, 1)
    out = F.batch_norm(
        side.flatten(1, 2), flat(mean), flat(var), flat(weight), flat(bias), training, momentum, eps
    )
    return out.view(side.shape).transpose(0, 1).flatten(0, 1)


_LOOKS = {
    *(Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__complex__, Tensor.__index__),
    *(Tensor.__contains__, Tensor.item, Tensor.tolist, Tensor.numpy, Tensor.is_nonzero, torch.is_nonzero),
    *(Tensor.equal, torch.equal, Tensor.allclose, torch.allclose),
}


def refuse_looking(func: Callable[..., Any]) -> None:
    """What depends on a value would depend on those of other clients, seen side by side."""
    if func in _LOOKS:
        raise InputError(
            "model",
            None,
            "its forward pass asks for the value of a tensor, which here holds those of many clients",
            'use engine.mode = "sequential"',
        )


def refuse_options(
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> None:
    """Embedding options mean one table, not many side by side."""
    if padding_idx is not None or max_norm is not None or scale_grad_by_freq or sparse:
        raise NotImplementedError("an embedding with options")


def _embedding(clients: int, indices: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    refuse_options(*args, **kwargs)
    offsets = torch.arange(clients, device=indices.device) * weight.shape[1]
    own = _split(clients, indices) + offsets.view(-1, *[1] * indices.dim())
    return F.embedding(own.flatten(0, 1), weight.flatten(0, 1))


_OPERATIONS: dict[Callable[..., Any], Callable[..., Tensor]] = {
    F.linear: _linear,
    torch.conv2d: _conv2d,
    F.conv2d: _conv2d,
    F.group_norm: _group_norm,
    F.layer_norm: _layer_norm,
    F.batch_norm: _batch_norm,
    F.embedding: _embedding,
}


class Gradient(torch.autograd.Function):
    """(task, keys, tensors...) -> gradients of the trainable, the loss, moved buffers."""

    @staticmethod
    def forward(task: Task, names: tuple[str, ...], *tensors: Tensor) -> tuple[Tensor, ...]:
        """One client, plain autograd."""
        params, batch = _unpack(names, tensors)
        return _pack(*plain(task, params, batch))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Nothing is differentiated again."""
        ctx.mark_non_differentiable(*output)

    @staticmethod
    def vmap(
        info: Any, in_dims: Any, task: Task, names: tuple[str, ...], *tensors: Tensor
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        """K clients at once."""
        clients = info.batch_size
        stacked = [
            t.expand(clients, *t.shape) if dim is None else t.movedim(dim, 0)
            for t, dim in zip(tensors, in_dims[2:], strict=True)
        ]
        params, batch = _unpack(names, tuple(stacked))
        out = _pack(*together(task, params, batch))
        return out, (0,) * len(out)


def together(task: Task, params: Tree, batch: Batch) -> tuple[Tree, Metrics, Tree]:
    """Gradients, metrics and buffers [K, ...] of K clients: folded, else under vmap, where that is right."""
    if len(batch["x"]) > 1:
        if task.foldable is None:
            task.foldable = sound(task, lambda each: _agrees(each, folded, params, batch))
        if task.foldable:
            return folded(task, params, batch)
        if task.mappable is None:
            task.mappable = sound(task, lambda each: _agrees(each, mapped, params, batch))
        if task.mappable:
            return mapped(task, params, batch)
    each = [plain(task, row(params, k), row(batch, k)) for k in range(len(batch["x"]))]
    grads, metrics, buffers = (stack(trees) for trees in zip(*each, strict=True))
    return grads, metrics, buffers


def plain(task: Task, params: Tree, batch: Batch) -> tuple[Tree, Metrics, Tree]:
    """One client's gradient, metrics and buffers."""
    with torch.enable_grad():
        moving = {name: params[name].detach().requires_grad_() for name in task.trainable}
        loss, (metrics, buffers) = task.mean_loss({**params, **moving}, batch)
        grads = torch.autograd.grad(loss, list(moving.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(moving, grads, strict=True)), metrics, buffers


def mapped(task: Task, params: Tree, batch: Batch) -> tuple[Tree, Metrics, Tree]:
    """The same for K clients by vmap, which cannot look into every module: all tensors [K, ...]."""
    return torch.vmap(task.traced_gradient)(params, batch)


def folded(task: Task, params: Tree, batch: Batch) -> tuple[Tree, Metrics, Tree]:
    """The same for K clients: all tensors [K, ...]."""
    clients = len(batch["x"])
    buffers = {name: params[name].clone() for name in task.buffers if name in params}
    with torch.enable_grad():
        moving = {name: params[name].detach().requires_grad_() for name in task.trainable}
        stacked = {**params, **moving, **buffers}
        with _PerClient(clients, stacked), task.training_calls(stacked) as model:
            outputs = model(batch["x"].flatten(0, 1))
        losses = task.objective(outputs, batch["y"].flatten(0, 1))["loss"].view(clients, -1).mean(1)
        grads = torch.autograd.grad(
            losses.sum(), list(moving.values()), allow_unused=True, materialize_grads=True
        )
    return dict(zip(moving, grads, strict=True)), {"loss": losses.detach()}, buffers


def sound(task: Task, agrees: Callable[[Task], bool]) -> bool:
    """Whether a way to compute ``agrees`` with plain autograd.

    In single precision what is right may fail: rounding takes a number over the kink of a ReLU, or makes
    another one a pooling's largest, and the gradient jumps. So double precision is asked first; a module that
    only knows its own is asked in that.
    """
    return any(map(agrees, dict.fromkeys((task.precise(), task))))


def _agrees(task: Task, way: Way, params: Tree, batch: Batch) -> bool:
    """Whether a way gives what plain autograd gives, for two clients whose parameters differ."""
    if task.dtype == torch.float64:
        params, batch = doubled(params), doubled(batch)
    pair = {name: each[:2].clone() for name, each in params.items()}
    for name in task.trainable:
        pair[name][1] *= 1.1
    # Every example twice: of one each, there would be as many rows as clients, and what confuses the two
    # would pass.
    data = {name: torch.cat([each[:2], each[:2]], dim=1) for name, each in batch.items()}
    try:
        found = way(task, pair, data)
        both = [plain(task, row(pair, k), row(data, k)) for k in range(2)]
    except Exception:  # a user's module may fail in any way on shapes and types it does not expect
        return False
    for k, alone in enumerate(both):
        for tree, reference in zip(found, alone, strict=True):
            for name, each in reference.items():
                weighs = name in pair and pair[name].is_floating_point()
                if not close(tree[name][k], each, magnitude=float(pair[name].abs().max()) if weighs else 0.0):
                    return False
    return True


def close(found: Tensor, reference: Tensor, *, magnitude: float) -> bool:
    """Whether a check's result is the reference's but for rounding; ``magnitude`` is that of the weights."""
    if not reference.is_floating_point():
        return torch.equal(found, reference)
    tolerance = 1e-8 if reference.dtype == torch.float64 else 1e-3
    scale = float(reference.abs().max().clamp_min(1e-6))
    rounding = 8 * torch.finfo(torch.float64 if tolerance < 1e-6 else torch.float32).eps * magnitude
    return bool((found - reference).abs().max() <= tolerance * scale + rounding)


def _pack(grads: Tree, metrics: Metrics, buffers: Tree) -> tuple[Tensor, ...]:
    return (*grads.values(), *metrics.values(), *buffers.values())


def _unpack(names: tuple[str, ...], tensors: tuple[Tensor, ...]) -> tuple[Tree, Batch]:
    cut = names.index("")  # parameters, "", batch
    keys = (*names[:cut], *names[cut + 1 :])
    both = dict(zip(keys, tensors, strict=True))
    return {n: both[n] for n in names[:cut]}, {n: both[n] for n in names[cut + 1 :]}
