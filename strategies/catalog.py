"""What there is, by name, and how a recipe becomes a federation ready to run."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from hansa.core import data as core_data
from hansa.core import models
from hansa.core.algorithm import Algorithm
from hansa.core.data import Examples, FederatedData
from hansa.core.errors import DataError, InputError
from hansa.core.partition import Partition, Rule
from hansa.core.randomness import ALONE
from hansa.core.recipe import CustomModel, Recipe, build, construct, describe, import_object
from hansa.core.reducer import Collect, Mean, RobustRule
from hansa.core.schedule import Schedule, Stopping
from hansa.core.task import LocalSGD, LocalWork, Task, classification, regression
from hansa.core.weights import Weights, default_weights
from hansa.strategies import rehearsal
from hansa.strategies.anarchic import AFACD, AFACS
from hansa.strategies.backup import Backup
from hansa.strategies.buffered import Buffered
from hansa.strategies.co2 import CO2
from hansa.strategies.dfedsam import DFedSAM
from hansa.strategies.favano import FAVANO
from hansa.strategies.fedasync import FedAsync
from hansa.strategies.fedavg import FedAvg, LocalOnly
from hansa.strategies.fedbn import FedBN
from hansa.strategies.fedbuff import FedBuff
from hansa.strategies.fednova import FedNova
from hansa.strategies.fedopt import FedAdagrad, FedAdam, FedAvgM, FedYogi
from hansa.strategies.fedprox import FedProx
from hansa.strategies.fraug import FRAug
from hansa.strategies.frequencies import frequencies
from hansa.strategies.periodic import Periodic
from hansa.strategies.robust import (
    CentredClipping,
    GeometricMedian,
    Krum,
    Meamed,
    Median,
    MultiKrum,
    TrimmedMean,
)
from hansa.strategies.rounds import Rounds
from hansa.strategies.scaffold import Scaffold
from hansa.strategies.selective import SelectiveLayers
from hansa.strategies.topologies import Topology

ALGORITHMS: Mapping[str, type[Algorithm]] = {
    "local": LocalOnly,
    "fedavg": FedAvg,
    "fedavgm": FedAvgM,
    "fedadam": FedAdam,
    "fedyogi": FedYogi,
    "fedadagrad": FedAdagrad,
    "fedprox": FedProx,
    "scaffold": Scaffold,
    "fednova": FedNova,
    "fedbn": FedBN,
    "fedbuff": FedBuff,
    "fedasync": FedAsync,
    "favano": FAVANO,
    "afa_cd": AFACD,
    "afa_cs": AFACS,
    "co2": CO2,
    "fraug": FRAug,
    "selective": SelectiveLayers,
    "dfedsam": DFedSAM,
}
SCHEDULES: Mapping[str, Any] = {
    "rounds": Rounds,
    "buffered": Buffered,
    "periodic": Periodic,
    "backup": Backup,
}
RULES: Mapping[str, Any] = {
    "krum": Krum,
    "multikrum": MultiKrum,
    "median": Median,
    "trimmed_mean": TrimmedMean,
    "meamed": Meamed,
    "geometric_median": GeometricMedian,
    "centred_clipping": CentredClipping,
}
_NOT_IN_RECIPES = ("stop", "phases", "step_size", "proportional")  # of schedules: other sections say them


@dataclass(frozen=True, kw_only=True)
class Federation:
    """Everything that an engine needs but time: a recipe with its words turned into objects.

    Attributes
    ----------
    topology: who talks to whom in a gossip network; ``None`` where there is a server.
    """

    recipe: Recipe
    task: Task
    algorithm: Algorithm
    schedule: Schedule
    topology: Topology | None
    data: FederatedData
    work: LocalWork

    @property
    def clients(self) -> int:
        """Size of the population, N."""
        return self.data.clients


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The plug-ins of a recipe, made without loading any data."""

    algorithm: Algorithm
    schedule: Schedule
    topology: Topology | None


def parts(recipe: Recipe) -> Parts:
    """Make the plug-ins and check every combination that can be judged without data.

    Raises
    ------
    InputError
        For an unknown name or key, a bad value, or an impossible combination.
    """
    algorithm = build(
        recipe.algorithm,
        ALGORITHMS,
        section="algorithm",
        tag="name",
        base=Algorithm,
        fixed={"reducer": Mean(), "weights": Weights()},
    )
    algorithm = dataclasses.replace(algorithm, weights=_weights(recipe, type(algorithm)))
    rule = recipe.aggregation.get("rule")
    if rule == "mean":
        if extra := sorted(recipe.aggregation.keys() - {"rule"}):
            raise InputError(
                f"aggregation.{extra[0]}",
                recipe.aggregation[extra[0]],
                "the mean has no such key",
                "leave it out",
            )
    else:
        made = build(recipe.aggregation, RULES, section="aggregation", tag="rule", base=object)
        algorithm = dataclasses.replace(algorithm, reducer=Collect(rule=made))
    topology = None
    if recipe.topology.get("kind") != "star":
        topology = construct(Topology, recipe.topology, section="topology")
    elif extra := sorted(recipe.topology.keys() - {"kind"}):
        raise InputError(
            f"topology.{extra[0]}",
            recipe.topology[extra[0]],
            "a star has no such key",
            "leave it out, or choose a gossip topology",
        )
    stop = Stopping(rounds=recipe.stop.rounds, time=recipe.stop.time, target=recipe.stop.target)
    fixed = {"stop": stop, "phases": len(algorithm.phases), "step_size": 1.0, "proportional": False}
    schedule: Schedule = build(
        recipe.schedule, SCHEDULES, section="schedule", tag="name", base=object, fixed=fixed
    )
    _check(recipe, algorithm, schedule, topology)
    return Parts(algorithm=algorithm, schedule=schedule, topology=topology)


def divided(recipe: Recipe) -> FederatedData:
    """Load a recipe's data, and divide it."""
    train, test = core_data.load(recipe.data, recipe.seed)
    return core_data.partition(recipe.partition, train, test, recipe.seed)


def assemble(recipe: Recipe, held: FederatedData | None = None, *, largest: int | None = None) -> Federation:
    """Load the data, divide it, make the model, and check the whole.

    ``held`` is what a site holds, instead of the recipe's data: of all clients, some have nothing there.
    ``largest`` is as for :func:`hansa.core.models.build`.

    Raises
    ------
    InputError, DataError
        With the field, the value and the remedy.
    """
    made = parts(recipe)
    device = _device(recipe.engine.device)
    dtype = getattr(torch, recipe.engine.dtype)
    data = _placed(divided(recipe) if held is None else held, dtype, device)
    rules = (
        *(Rule(select, "shared") for select in recipe.parameters.shared),
        *(Rule(select, "local") for select in recipe.parameters.local),
        *(Rule(select, "frozen") for select in recipe.parameters.frozen),
    )
    partition = made.algorithm.partition
    module = _model(recipe, data.train, largest)
    if made.algorithm.partition.rules and not _has_layers(module, partition):
        partition = Partition()
    t = recipe.train
    task = Task(
        module,
        classification if data.train.classes is not None else regression,
        local=LocalSGD(lr=t.lr, momentum=t.momentum, weight_decay=t.weight_decay, clip_norm=t.clip_norm),
        partition=Partition((*rules, *partition.rules)),
        classes=len(data.train.classes or ()),
        seed=recipe.seed,
        dtype=dtype,
        device=device,
    )
    try:
        made.algorithm.check(task, made.schedule)
    except InputError as error:
        raise _as_written(error, recipe) from error
    _check_target(recipe.stop.target, task)
    schedule = made.schedule
    if isinstance(schedule, Rounds):
        schedule = _fit_rounds(schedule, made, data.clients)
    elif isinstance(schedule, Periodic):
        schedule = _fit_periodic(schedule, made, data.clients)
    algorithm = _fit_weights(made.algorithm, schedule, data.clients)
    if isinstance(schedule, Backup):
        epochs = t.epochs if isinstance(t.epochs, int) else sum(t.epochs) / 2
        steps = t.steps or epochs * max(len(data.train) / data.clients / t.batch_size, 1.0)
        schedule = dataclasses.replace(
            schedule, step_size=t.lr * steps, proportional=algorithm.weights.frequency == "always"
        )
    if t.batch_size < 2 and task.mixes_examples():
        raise InputError(
            "train.batch_size", t.batch_size, "BatchNorm cannot normalise a batch of one", "use 2 or more"
        )
    poor = torch.nonzero(data.train_shards.sizes == 1).flatten().tolist()
    if poor and task.mixes_examples():
        raise DataError(
            "partition",
            f"client {poor[0]} with 1 example",
            "BatchNorm cannot normalise a batch of one",
            "use fewer clients or a model without BatchNorm",
        )
    if not task.shared and (made.topology is not None or recipe.attack or not made.algorithm.reducer.linear):
        raise InputError(
            "parameters.local",
            list(recipe.parameters.local) or recipe.algorithm["name"],
            "clients share nothing, so there is nothing to mix, to attack or to be robust about",
            "leave out topology, attack and aggregation.rule, or share something",
        )
    if made.topology is not None:
        made.topology.graph(data.clients)
    if isinstance(recipe.model, CustomModel):
        rehearsal.model(task, data.train, recipe.model.factory)
    if ":" in recipe.algorithm["name"]:
        rehearsal.algorithm(
            algorithm,
            task,
            data.train,
            recipe.algorithm["name"],
            clients=data.clients,
            horizon=recipe.stop.rounds,
            gossip=made.topology is not None,
        )
    work = LocalWork(epochs=t.epochs, steps=t.steps, batch_size=t.batch_size)
    return Federation(
        recipe=recipe,
        task=task,
        algorithm=algorithm,
        schedule=schedule,
        topology=made.topology,
        data=data,
        work=work,
    )


def resolved(recipe: Recipe) -> Recipe:
    """The recipe with the plug-ins' defaults written out."""
    made = parts(recipe)
    tables: dict[str, Any] = {
        "algorithm": describe(
            made.algorithm, "name", recipe.algorithm["name"], without=("reducer", "weights")
        ),
        "schedule": describe(made.schedule, "name", recipe.schedule["name"], without=_NOT_IN_RECIPES),
    }
    if weighs(made):
        tables["weights"] = describe(made.algorithm.weights, without=("frequencies",))
    if isinstance(made.algorithm.reducer, Collect):
        tables["aggregation"] = describe(made.algorithm.reducer.rule, "rule", recipe.aggregation["rule"])
    if made.topology is not None:
        tables["topology"] = describe(made.topology, "kind", made.topology.kind)
    return recipe.model_copy(update=tables)


def weighs(made: Parts) -> bool:
    """Whether the table of weights means anything: neither the algorithm nor a network has its own."""
    return type(made.algorithm).weigh is Algorithm.weigh and made.topology is None


def summary(kind: type) -> str:
    """The first sentence of a plug-in's documentation."""
    return (inspect.getdoc(kind) or "").split("\n\n")[0].replace("\n", " ")


def _check(recipe: Recipe, algorithm: Algorithm, schedule: Schedule, topology: Topology | None) -> None:
    name = recipe.algorithm["name"]
    algorithm.check_weights()
    if recipe.weights and type(algorithm).weigh is not Algorithm.weigh:
        problem = f"{name} weighs its clients itself"
        raise InputError("weights", sorted(recipe.weights), problem, "leave out the table")
    if topology is not None:
        if recipe.weights:
            raise InputError(
                "weights",
                sorted(recipe.weights),
                "peers mix by the matrix of their network",
                'leave out the table, or use topology.kind = "star"',
            )
        if not algorithm.peers:
            raise InputError(
                "topology.kind",
                topology.kind,
                f"{name} needs a server",
                'use topology.kind = "star", or fedavg, fedprox, fedbn or dfedsam',
            )
        if not algorithm.reducer.linear:
            raise InputError(
                "aggregation.rule",
                recipe.aggregation["rule"],
                "gossip mixes by weighted sums",
                'use aggregation.rule = "mean"',
            )
        if not schedule.synchronous:
            raise InputError(
                "schedule.name",
                recipe.schedule["name"],
                "peers mix in synchronous rounds",
                'use schedule.name = "rounds"',
            )
    elif isinstance(algorithm, DFedSAM):
        raise InputError(
            "topology.kind",
            "star",
            "DFedSAM has no server",
            'set topology.kind = "ring", or another gossip topology',
        )
    expected = schedule.updates_per_step
    if expected is not None and expected < algorithm.reducer.minimum:
        rule: RobustRule | None = getattr(algorithm.reducer, "rule", None)
        declared = {key: getattr(rule, key, None) or 0 for key in ("f", "nnm")}
        largest = max(declared, key=lambda key: declared[key])
        raise InputError(
            f"aggregation.{largest}",
            declared[largest],
            f"{recipe.aggregation['rule']} then needs {algorithm.reducer.minimum} updates in a step or more, "
            f"and the schedule brings {expected}",
            f"declare a smaller {largest}, or raise schedule.cohort, schedule.k or schedule.recall",
        )
    if expected is None and algorithm.reducer.minimum > 1:
        raise InputError(
            "schedule.recall",
            None,
            f"{recipe.aggregation['rule']} must know how many updates a step has",
            "set schedule.recall, or use rounds or buffered",
        )


def _check_target(target: float | None, task: Task) -> None:
    """A target that no run could reach is a misunderstanding."""
    if target is not None and task.classes and not 0 <= target <= 1:
        raise InputError("stop.target", target, "accuracy is a share of 1", "write 0.9 for 90 %")
    if target is not None and not task.classes and not target <= 0:
        raise InputError("stop.target", target, "it is minus the loss", "write -0.1 for a loss of 0.1")


def _as_written(error: InputError, recipe: Recipe) -> InputError:
    """The error with the value that the recipe has in that field, for an algorithm knows objects only."""
    section, _, key = error.field.partition(".")
    table = recipe.model_dump(mode="json").get(section)
    value = table.get(key, error.value) if isinstance(table, dict) else error.value
    return InputError(error.field, value, error.problem, error.remedy)


def _fit_rounds(schedule: Rounds, made: Parts, clients: int) -> Rounds:
    """Everybody in a gossip network; elsewhere no more than there are, and enough for the rule."""
    if made.topology is not None:
        return dataclasses.replace(schedule, cohort=clients)
    if schedule.cohort > clients:
        raise InputError(
            "schedule.cohort", schedule.cohort, f"there are {clients} clients", f"use {clients} or fewer"
        )
    return dataclasses.replace(schedule, minimum=max(schedule.minimum, made.algorithm.reducer.minimum))


def _weights(recipe: Recipe, kind: type[Algorithm]) -> Weights:
    """The algorithm's own weights, changed as the recipe says."""
    usual = describe(default_weights(kind), without=("frequencies",))
    return construct(Weights, {**usual, **recipe.weights}, section="weights", fixed={"frequencies": ()})


def _fit_weights(algorithm: Algorithm, schedule: Schedule, clients: int) -> Algorithm:
    """Frequencies computed from the times that the recipe tells."""
    weights = algorithm.weights
    if weights.frequency != "known" or weights.frequencies:
        return algorithm
    if len(weights.seconds) != clients:
        raise InputError(
            "weights.seconds",
            f"{len(weights.seconds)} numbers",
            f"there are {clients} clients",
            "give one number for each",
        )
    known = dataclasses.replace(weights, frequencies=frequencies(schedule, weights.seconds))
    return dataclasses.replace(algorithm, weights=known)


def _fit_periodic(schedule: Periodic, made: Parts, clients: int) -> Periodic:
    """Enough for the rule, whoever is lost."""
    minimum = max(schedule.minimum, made.algorithm.reducer.minimum)
    if minimum > clients:
        raise InputError(
            "partition.clients", clients, f"a step needs {minimum} updates", f"use {minimum} clients or more"
        )
    return dataclasses.replace(schedule, minimum=minimum)


def _has_layers(module: torch.nn.Module, partition: Partition) -> bool:
    """Whether an algorithm's own rules mean anything for a model (FedBN without BatchNorm is FedAvg)."""
    try:
        partition.roles(module)
    except InputError:
        return False
    return True


def _model(recipe: Recipe, train: Examples, largest: int | None) -> torch.nn.Module:
    outputs = len(train.classes) if train.classes is not None else train.y[0].numel()
    config = recipe.model
    if not isinstance(config, CustomModel):
        return models.build(config, sample=train.x[0], outputs=outputs, seed=recipe.seed, largest=largest)
    factory = import_object(config.factory, "model.factory")
    with ALONE, torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        try:
            made = factory(train.x[0], outputs, **config.arguments)
        except Exception as error:  # the user's own code
            problem = f"it fails with {type(error).__name__}: {error}"
            raise InputError("model.factory", config.factory, problem, "correct the factory") from error
    if not isinstance(made, torch.nn.Module):
        raise InputError(
            "model.factory", config.factory, f"it returned {type(made).__name__}", "return a torch.nn.Module"
        )
    return made


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # "meta" makes tensors, with nothing in them
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            "engine.device", name, "this machine has no such device", 'use engine.device = "cpu"'
        ) from error
    return device


def _placed(data: FederatedData, dtype: torch.dtype, device: torch.device) -> FederatedData:
    def place(examples: Examples) -> Examples:
        def move(t: torch.Tensor) -> torch.Tensor:
            return t.to(device=device, dtype=dtype if t.is_floating_point() else t.dtype)

        return dataclasses.replace(examples, x=move(examples.x), y=move(examples.y))

    return dataclasses.replace(data, train=place(data.train), test=place(data.test))


def imports(recipe: Recipe) -> list[tuple[str, str]]:
    """(field, ``package.module:name`` or ``file.py:name``) of every object that a recipe would import."""
    named = {
        "algorithm.name": recipe.algorithm.get("name"),
        "aggregation.rule": recipe.aggregation.get("rule"),
        "schedule.name": recipe.schedule.get("name"),
        "model.factory": recipe.model.factory if isinstance(recipe.model, CustomModel) else None,
        "attack.name": (recipe.attack or {}).get("name"),
    }
    return [(field, name) for field, name in named.items() if isinstance(name, str) and ":" in name]
