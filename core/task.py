"""The learning problem that a federation shares: a model, its loss, and how a client takes a step.

Any unmodified ``nn.Module`` will do; it is called through ``torch.func.functional_call`` with its
parameters and buffers as a :data:`~hansa.core.trees.Tree`, so nothing about one client hides in it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad
from torch.nn.parameter import is_lazy
from torch.nn.utils.stateless import _reparametrize_module

from hansa.core import batches
from hansa.core.batches import Ints, Plan
from hansa.core.errors import InputError
from hansa.core.folding import Gradient
from hansa.core.partition import Partition, Role
from hansa.core.randomness import ALONE
from hansa.core.trees import Tree, doubled, pick, squared_norm, zeros_like

Batch = dict[str, Tensor]  # "x" [B, ...], "y" [B, ...], and the noise an algorithm asked for
Metrics = dict[str, Tensor]  # scalars of one step, means over the batch
Objective = Callable[
    [Tensor, Tensor], dict[str, Tensor]
]  # (outputs, targets) -> per-example values, with "loss"


def classification(outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Cross-entropy and accuracy per example.

    ``outputs`` [B, C] with ``targets`` [B], or [B, T, C] with [B, T] (next tokens: means over T).
    """
    loss = F.cross_entropy(outputs.flatten(0, -2), targets.flatten(), reduction="none").view(targets.shape)
    hits = (outputs.argmax(-1) == targets).to(outputs.dtype)
    return (
        {"loss": loss.flatten(1).mean(1), "accuracy": hits.flatten(1).mean(1)}
        if targets.dim() > 1
        else {
            "loss": loss,
            "accuracy": hits,
        }
    )


def regression(outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Squared error per example, summed over the outputs. ``outputs`` and ``targets`` [B] or [B, k]."""
    error = (outputs.reshape(len(outputs), -1) - targets.reshape(len(targets), -1)).square().sum(1)
    return {"loss": error}


@dataclass(frozen=True, kw_only=True)
class LocalSGD:
    """The client's optimiser: mini-batch SGD as in ``torch.optim.SGD``, with an optional gradient clip.

    Attributes
    ----------
    lr: step size η_l.
    momentum: ρ of heavy-ball momentum; its buffer starts at zero in every job.
    weight_decay: coefficient added to the gradient times the parameter.
    clip_norm: bound on the gradient's L2 norm, before weight decay and momentum.
    """

    lr: float = 0.1
    momentum: float = 0.0
    weight_decay: float = 0.0
    clip_norm: float | None = None

    def start(self, params: Tree) -> Tree:
        """Momentum buffers for ``params``; empty where there is no momentum."""
        return zeros_like(params) if self.momentum else {}

    def step(self, params: Tree, grads: Tree, velocity: Tree) -> tuple[Tree, Tree]:
        """One step: (new parameters, new momentum buffers)."""
        if self.clip_norm is not None:
            shrink = (self.clip_norm / squared_norm(grads).sqrt().clamp_min(1e-12)).clamp_max(1.0)
            grads = {name: g * shrink for name, g in grads.items()}
        if self.weight_decay:
            grads = {name: g + self.weight_decay * params[name] for name, g in grads.items()}
        if self.momentum:
            velocity = grads = {name: self.momentum * velocity[name] + g for name, g in grads.items()}
        return {name: w - self.lr * grads[name] for name, w in params.items()}, velocity


@dataclass(frozen=True, kw_only=True)
class LocalWork:
    """How much a client does in one job.

    Attributes
    ----------
    epochs: passes over the local data, each in a new order; a pair (low, high) draws a number for every
        job, as devices of different strength would.
    steps: mini-batches instead of epochs, going on to a new pass where one ends.
    batch_size: B; the last batch of a pass may be smaller.
    """

    epochs: int | tuple[int, int] = 1
    steps: int | None = None
    batch_size: int = 20

    def count(self, examples: int, *, seed: int, client: int, number: int, whole: int = 1) -> int:
        """How many mini-batches :meth:`batches` would make."""
        if self.steps is not None:
            return self.steps if examples else 0
        full, rest = divmod(examples, self.batch_size)
        per = max(full + (rest >= whole), min(examples, 1))
        if isinstance(self.epochs, int):
            return self.epochs * per
        low, high = self.epochs
        return per * batches.draw(low, high, seed=seed, clients=_row(client), numbers=_row(number)).item()

    def batches(self, examples: int, *, seed: int, client: int, number: int, whole: int = 1) -> list[Tensor]:
        """Positions [b] of the local examples in each mini-batch of a job.

        Drawn from (seed, client, job number) alone. A last batch of fewer than ``whole`` examples,
        which BatchNorm cannot take, is joined to the one before it.
        """
        made = self.plan(_row(examples), seed=seed, clients=_row(client), numbers=_row(number), whole=whole)
        used = torch.from_numpy(made.positions[0][: made.sizes.sum()])
        return list(torch.split_with_sizes(used, made.sizes[0].tolist()))

    def plan(self, examples: Ints, *, seed: int, clients: Ints, numbers: Ints, whole: int = 1) -> Plan:
        """The mini-batches of k jobs: :meth:`batches` of each, at once. All arrays are [k]."""
        totals = self._totals(examples, seed, clients, numbers, whole)
        return batches.plan(
            examples,
            totals,
            batch_size=self.batch_size,
            whole=whole,
            seed=seed,
            clients=clients,
            numbers=numbers,
        )

    def _totals(self, examples: Ints, seed: int, clients: Ints, numbers: Ints, whole: int) -> Ints:
        if self.steps is not None:
            return np.where(examples > 0, self.steps, 0)
        per = batches.batches(examples, self.batch_size, whole)
        if isinstance(self.epochs, int):
            return self.epochs * per
        low, high = self.epochs
        return per * batches.draw(low, high, seed=seed, clients=clients, numbers=numbers)


def _row(value: int) -> Ints:
    return np.array([value], np.int64)


class Task:
    """A model with its loss, the role of each of its tensors, and the client's optimiser.

    Parameters
    ----------
    module:
        The model; its own parameters are the initial ones.
    objective:
        Per-example loss and scores (:func:`classification`, :func:`regression`, or your own).
    local:
        The client's optimiser.
    partition:
        What is shared, local and frozen.
    classes:
        Number of classes, 0 where there are none.

    Attributes
    ----------
    initial: the module's tensors, by name.
    shared, local_names, frozen: names by role. ``frozen`` tensors are constants of the task.
    trainable: names that gradients move. buffers: floating or counting state that a forward pass moves.
    head: name of the final linear layer that is fed features, where there is one.
    foldable, mappable: whether many clients' gradients can be folded into one pass, or else computed under
        ``torch.vmap``; ``None`` before it was tried.
    seed: names the draws of whatever else an algorithm initialises.
    autocast: type in which training passes compute what :class:`torch.autocast` lets them; an engine sets it.
        Weights, gradients, losses and statistics keep ``dtype``.
    """

    def __init__(
        self,
        module: nn.Module,
        objective: Objective = classification,
        *,
        local: LocalSGD | None = None,
        partition: Partition | None = None,
        classes: int = 0,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        for name, layer in module.named_modules():
            if getattr(layer, "max_norm", None) is not None:
                raise InputError(
                    "model",
                    name,
                    "a lookup with max_norm rewrites the weights, which clients share until they train",
                    "leave max_norm out, and bound the norm in the forward pass",
                )
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            if is_lazy(tensor):
                raise InputError(
                    "model",
                    name,
                    "a lazy layer has no tensors yet",
                    "call the model once on an example before it is returned",
                )
            if tensor.is_complex():
                raise InputError(
                    "model",
                    name,
                    "complex numbers are not known here and would lose their imaginary part",
                    "keep both parts as real tensors, see torch.view_as_real",
                )
        module = copy.deepcopy(module).to(dtype=dtype, device=device)
        self.objective = objective
        self.local = local or LocalSGD()
        self.classes = classes
        self.seed = seed
        self.dtype = dtype
        self.device = torch.device(device)
        self.roles: dict[str, Role] = (partition or Partition()).roles(module)
        self._train = module.train()
        for prefix, layer in self._train.named_modules():
            held = [f"{prefix}.{short}" for short, _ in layer.named_buffers(recurse=False)]
            if held and all(self.roles.get(name) == "frozen" for name in held):
                layer.eval()  # frozen statistics must not move
        self._eval = copy.deepcopy(module).eval()
        tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        self.initial: Tree = {name: tensors[name].detach().clone() for name in self.roles}
        parameters = {name for name, each in module.named_parameters() if each.requires_grad}
        for each in (self._train, self._eval):  # frozen tensors, used where they stand, join no graph
            each.requires_grad_(False)
        self.shared = tuple(name for name, role in self.roles.items() if role == "shared")
        self.local_names = tuple(name for name, role in self.roles.items() if role == "local")
        self.trainable = tuple(n for n, role in self.roles.items() if role != "frozen" and n in parameters)
        self.buffers = tuple(n for n in self.roles if n not in dict(module.named_parameters()))
        self.head = _head(module)
        self.foldable: bool | None = None
        self.mappable: bool | None = None
        self.autocast: torch.dtype | None = None
        self.frozen: Tree = {
            name: self.initial[name] for name, role in self.roles.items() if role == "frozen"
        }
        if not self.trainable:
            raise InputError(
                "parameters.frozen", list(self.frozen), "nothing is left to train", "freeze less"
            )

    @property
    def module(self) -> nn.Module:
        """The model in evaluation mode. Its own tensors are never used: treat it as a description."""
        return self._eval

    def precise(self) -> Task:
        """For training passes in double precision, to check others by; itself where there is none."""
        if self.dtype == torch.float64 or self.device.type == "mps":
            return self
        twin = copy.copy(self)
        twin._train = copy.deepcopy(self._train).double()
        twin.initial, twin.frozen = doubled(self.initial), doubled(self.frozen)
        twin.dtype, twin.autocast = torch.float64, None
        return twin

    def mixes_examples(self) -> bool:
        """Whether a forward pass in training mode depends on the whole batch (BatchNorm)."""
        kind = nn.modules.batchnorm._BatchNorm
        return any(isinstance(each, kind) and each.training for each in self._train.modules())

    def stochastic(self, x: Tensor) -> bool:
        """Whether a training pass over examples ``x`` draws random numbers of its own (dropout)."""
        with ALONE, torch.random.fork_rng(devices=[]), torch.no_grad():
            before = torch.get_rng_state()
            self.train_forward(self.initial, x)
            return not torch.equal(before, torch.get_rng_state())

    def forward(self, params: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """Outputs in evaluation mode."""
        out: Tensor = functional_call(self._eval, dict(params), (x,))
        return out

    def scores(self, params: Mapping[str, Tensor], x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """Per-example loss and scores in evaluation mode: each [B]."""
        return self.objective(self.forward(params, x), y)

    def gradient(self, params: Tree, batch: Batch) -> tuple[Tree, Metrics, Tree]:
        """Gradient of the mean loss over one batch, in training mode.

        Returns
        -------
        (gradient by trainable name, step metrics, the buffers after the forward pass).
        """
        wanted = {name: params[name] for name in params if name in self.roles}
        names = (*wanted, "", *batch)
        flat: tuple[Tensor, ...] = Gradient.apply(self, names, *wanted.values(), *batch.values())  # type: ignore[no-untyped-call]
        moved = [name for name in self.buffers if name in params]
        count = len(self.trainable)
        grads = dict(zip(self.trainable, flat[:count], strict=True))
        return grads, {"loss": flat[count]}, dict(zip(moved, flat[count + 1 :], strict=True))

    def traced_gradient(self, params: Tree, batch: Batch) -> tuple[Tree, Metrics, Tree]:
        """:meth:`gradient` by ``torch.func``, which vmap can look into."""
        return self.differentiate(self.mean_loss, params, batch)

    @contextmanager
    def training_calls(self, params: Tree) -> Iterator[Callable[[Tensor], Tensor]]:
        """The bare module in training mode on ``params``, for many calls.

        It moves the buffers in ``params`` where they stand. Putting tensors into a module and taking them out
        again costs more than a small layer.
        """

        def call(x: Tensor) -> Tensor:
            with self._lowered():
                out: Tensor = self._train(x)
            return out.to(self.dtype)

        with _reparametrize_module(self._train, params, tie_weights=True):
            yield call

    def differentiate(
        self,
        function: Callable[[Tree, Batch], tuple[Tensor, tuple[Metrics, Tree]]],
        params: Tree,
        batch: Batch,
    ) -> tuple[Tree, Metrics, Tree]:
        """Like :meth:`gradient` for any ``function(params, batch) -> (loss, (metrics, buffers))``."""
        still = {name: tensor for name, tensor in params.items() if name not in self.trainable}

        def objective(moving: Tree) -> tuple[Tensor, tuple[Metrics, Tree]]:
            return function({**still, **moving}, batch)

        grads, (metrics, buffers) = grad(objective, has_aux=True)(pick(params, self.trainable))
        return grads, metrics, buffers

    def mean_loss(self, params: Tree, batch: Batch) -> tuple[Tensor, tuple[Metrics, Tree]]:
        """Mean training loss of a batch, with (metrics, the buffers after the forward pass)."""
        outputs, buffers = self.train_forward(params, batch["x"])
        loss = self.objective(outputs, batch["y"])["loss"].mean()
        return loss, ({"loss": loss.detach()}, buffers)

    def train_forward(self, params: Tree, x: Tensor) -> tuple[Tensor, Tree]:
        """Outputs in training mode, and the buffers as the forward pass leaves them."""
        buffers = self._moving_buffers(params)
        with self._lowered():
            outputs: Tensor = functional_call(self._train, {**params, **buffers}, (x,))
        return outputs.to(self.dtype), self._moved(params, buffers)

    def train_forward_with_features(self, params: Tree, x: Tensor) -> tuple[Tensor, Tensor, Tree]:
        """(outputs, what the head was given [B, d], buffers), in training mode."""
        buffers = self._moving_buffers(params)
        with self._lowered():
            outputs, features = self._tapped(self._train, {**params, **buffers}, x)
        return outputs.to(self.dtype), features.to(self.dtype), self._moved(params, buffers)

    def _lowered(self) -> AbstractContextManager[Any]:
        """What a training pass computes under; its backward pass computes in the same types."""
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.autocast)

    def features(self, params: Tree, x: Tensor) -> Tensor:
        """What the head is given [B, d], in evaluation mode."""
        return self._tapped(self._eval, params, x)[1]

    def classify(self, params: Tree, features: Tensor) -> Tensor:
        """The head alone: features [B, d] -> outputs [B, C]."""
        return F.linear(features, params[f"{self.head}.weight"], params.get(f"{self.head}.bias"))

    def _moving_buffers(self, params: Tree) -> Tree:
        return {name: params.get(name, self.initial[name]).clone() for name in self.buffers}

    def _moved(self, params: Tree, buffers: Tree) -> Tree:
        return {name: buffer for name, buffer in buffers.items() if name in params}

    def _tapped(self, module: nn.Module, tensors: Tree, x: Tensor) -> tuple[Tensor, Tensor]:
        seen: list[Tensor] = []
        head = module.get_submodule(self.head or "")
        handle = head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        try:
            outputs = functional_call(module, tensors, (x,))
        finally:
            handle.remove()
        return outputs, seen[-1]


def _head(module: nn.Module) -> str | None:
    """Name of the final linear layer: ``head``, else the last one, if anything stands before it."""
    linear = [name for name, each in module.named_modules() if isinstance(each, nn.Linear)]
    name = "head" if "head" in linear else linear[-1] if linear else None
    if name is None or all(each.startswith(f"{name}.") for each, _ in module.named_parameters()):
        return None
    return name
