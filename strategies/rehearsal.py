"""What a user wrote, tried on two examples: its mistakes are met before the run, by the name of what errs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hansa.core.algorithm import Algorithm, Report, State
from hansa.core.data import Examples
from hansa.core.errors import InputError
from hansa.core.folding import plain
from hansa.core.randomness import ALONE
from hansa.core.task import Task
from hansa.core.trees import Tree


def model(task: Task, train: Examples, factory: str) -> None:
    """A forward pass, and a step of training.

    Raises
    ------
    InputError
        When one of them fails, or gives what no loss can take.
    """
    x, y = train.x[:2], train.y[:2]
    where = "two examples"
    try:
        outputs = task.forward(task.initial, x.clone())  # which it may change where they stand
        _require_outputs(task, outputs, y, factory)
        where += " in training"
        if len(x) == 2:
            with ALONE, torch.random.fork_rng(devices=[]):
                plain(task, task.initial, {"x": x.clone(), "y": y})
    except InputError:
        raise
    except Exception as error:  # the user's own code
        problem = f"its model fails on {where} with {type(error).__name__}: {error}"
        raise InputError("model.factory", factory, problem, "correct the model") from error


def _require_outputs(task: Task, outputs: object, y: Tensor, factory: str) -> None:
    wanted = (*y.shape, task.classes) if task.classes else tuple(y.shape)
    if not isinstance(outputs, Tensor):
        found, fits = type(outputs).__name__, False
    else:
        found = f"outputs of shape {tuple(outputs.shape)}"
        fits = outputs.shape == wanted or (not task.classes and outputs.shape == (*wanted, 1))
    if not fits:
        problem = f"its model turns two examples into {found}"
        raise InputError("model.factory", factory, problem, f"make it a tensor of shape {wanted}")


def algorithm(
    made: Algorithm, task: Task, train: Examples, name: str, *, clients: int, horizon: int, gossip: bool
) -> None:
    """One client's job of one step in every phase, and a step of the hub with its update alone.

    Raises
    ------
    InputError
        Naming the method that fails, or what it should have returned.
    """
    if len(train) < 2:
        return

    def call(method: str, *arguments: Any, **named: Any) -> Any:
        try:
            return getattr(made, method)(task, *arguments, **named)
        except InputError:
            raise
        except Exception as error:  # the user's own code
            raise wrong(
                f"{method} fails with {type(error).__name__}: {error}", f"correct {method}"
            ) from error

    def wrong(problem: str, remedy: str) -> InputError:
        return InputError("algorithm.name", name, problem, remedy)

    def pair(method: str, given: Any, what: str) -> Any:
        if not (isinstance(given, tuple) and len(given) == 2 and isinstance(given[0], Mapping)):
            raise wrong(f"{method} returned {type(given).__name__}", f"return {what}")
        return given

    before = {n: each.clone() for n, each in task.initial.items()}
    with ALONE, torch.random.fork_rng(devices=[]):
        state = call("init", clients=clients, horizon=horizon)
        if not isinstance(state, State):
            raise wrong(f"init returned {type(state).__name__}", "return a State")
        if gossip and state.slots:
            raise wrong("it keeps slots at a server, and peers have none", "set peers = False in the class")
        private = kept = call("private")
        for phase in made.phases:
            payload, _ = pair("issue", call("issue", state, 0, phase), "(payload, keys)")
            carry = call("begin", payload, kept, phase)
            noise = {n: torch.randn(shape) for n, shape in call("noise", phase, 2).items()}
            noise = {n: each.to(task.device, task.dtype) for n, each in noise.items()}
            batch = {"x": train.x[:2].clone(), "y": train.y[:2].clone(), **noise}
            carry, metrics = pair("step", call("step", carry, batch, phase), "(carry, metrics)")
            if "loss" not in metrics:
                raise wrong(f"the metrics of step are {list(metrics)}", 'put the mean "loss" among them')
            update, kept = pair("finish", call("finish", carry, phase), "(update, private)")
            _same(
                "what finish keeps", kept, private, wrong, "return the names that private() has", whole=True
            )
            plainly = {n: u for n, u in update.items() if "/" not in n}
            _same("the update", plainly, task.initial, wrong, "use the model's names, or your own with a /")
            report = Report(
                client=0,
                number=0,
                phase=phase,
                examples=2,
                steps=1,
                staleness=0,
                dispatched=0.0,
                returned=1.0,
            )
            after = call("apply", state, dict(update), [report], phase)
            if not isinstance(after, State):
                raise wrong(f"apply returned {type(after).__name__}", "return the next State")
            _same("the model after apply", after.params, state.params, wrong, "keep the names", whole=True)
            state = after
    moved = [n for n, each in task.initial.items() if not torch.equal(each, before[n])]
    if moved:
        task.initial.update(before)
        raise wrong(f"it changes tensors that it was given: {moved[0]}", "make new ones, not x.add_ or x +=")


def _same(what: str, found: Tree, wanted: Tree, wrong: Any, remedy: str, *, whole: bool = False) -> None:
    """Names that are known, or, of the ``whole``, all of them, in the shapes they have."""
    odd = sorted(found.keys() ^ wanted.keys() if whole else found.keys() - wanted.keys())
    if odd:
        raise wrong(f"{what} has {'' if odd[0] in found else 'no '}{odd[0]!r}", remedy)
    for name, each in found.items():
        if each.shape != wanted[name].shape:
            shapes = f"{list(each.shape)}, not {list(wanted[name].shape)}"
            raise wrong(f"{what} has {name} of shape {shapes}", "keep the shapes")


__all__ = ["algorithm", "model"]
