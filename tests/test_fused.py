"""Folded and fused cohorts give what plain autograd gives, client by client, or step aside."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from hansa.core import trees
from hansa.core.algorithm import Job
from hansa.core.data import Examples, FederatedData, Shards
from hansa.core.models import (
    CharTransformerConfig,
    DigitsCNNConfig,
    LeafCNNConfig,
    LogisticConfig,
    MLPConfig,
    ModelConfig,
    ResNet18Config,
    build,
)
from hansa.core.recipe import EngineConfig, Recipe
from hansa.core.sums import BLOCK, Sums
from hansa.core.task import LocalSGD, LocalWork, Task
from hansa.simulation.cohort import Results, SequentialTrainer, Work
from hansa.simulation.fused import FusedTrainer, applies
from hansa.simulation.moving import Moving
from hansa.simulation.tiers import Measured, Mode, trainer
from hansa.strategies.catalog import Federation
from hansa.strategies.fedavg import FedAvg, LocalOnly
from hansa.strategies.fedprox import FedProx
from hansa.strategies.rounds import Rounds

IMAGE = torch.zeros(1, 8, 8)
MODELS: dict[str, tuple[ModelConfig, Tensor]] = {
    "logistic": (LogisticConfig(), IMAGE),
    "mlp": (MLPConfig(hidden=(128, 128)), torch.zeros(1, 16, 16)),  # wide: linear layers stay factors
    "mlp, layer norm": (MLPConfig(hidden=(20,), norm="layer"), IMAGE),
    "leaf cnn": (LeafCNNConfig(hidden=32), IMAGE),
    "resnet, group norm": (ResNet18Config(width=16, norm="group"), torch.zeros(3, 8, 8)),
    "transformer": (CharTransformerConfig(width=16, heads=2), torch.zeros(12, dtype=torch.int64)),
}
MIXING: dict[str, tuple[ModelConfig, Tensor]] = {
    "mlp, batch norm": (MLPConfig(hidden=(20,), norm="batch"), IMAGE),
    "digits cnn": (DigitsCNNConfig(channels=(4, 4, 8), hidden=(16, 8)), torch.zeros(1, 16, 16)),
}


class Padded(nn.Module):
    """An embedding whose padding row must not be trained."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(10, 8, padding_idx=0)
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.tokens(x))
        return out


class Noisy(nn.Module):
    """Draws random numbers without a dropout module."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(nn.functional.dropout(x.flatten(1), 0.5, self.training))
        return out


SIZES = [7, 30, 12, 25, 3, 8, 16, 2, 9, 20, 5]  # ragged: 1 to 4 batches of 8 in a pass


class Scaled(nn.Module):
    """Uses a parameter in an operation that no tier intercepts."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((64,), 0.5))
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(x.flatten(1) * self.scale)
        return out


class Spare(nn.Module):
    """Holds a layer that it does not use."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Linear(3, 2)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(x.flatten(1))
        return out


class Twice(nn.Module):
    """Uses one layer twice."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(64, 64)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(torch.tanh(self.inner(torch.tanh(self.inner(x.flatten(1))))))
        return out


class Mixing(nn.Module):
    """Subtracts the mean over the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(1)
        out: Tensor = self.head(flat - flat.mean(0))
        return out


class Settled(nn.Module):
    """Shares a layer that nobody trains."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(64, 16).requires_grad_(False)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(torch.tanh(self.body(x.flatten(1))))
        return out


class Watchful(Scaled):
    """Looks at its examples, which vmap does not allow."""

    def forward(self, x: Tensor) -> Tensor:
        assert x.isfinite().all()
        return super().forward(x)


class OfSinglePrecision(nn.Module):
    """Knows no other type."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(x.float().flatten(1))
        return out


def federation(
    module: nn.Module,
    sample: Tensor,
    algorithm: FedAvg,
    weight_decay: float = 0.0,
    dtype: torch.dtype = torch.float64,
    convolutions: Literal["direct", "winograd"] = "direct",
) -> Federation:
    rng = torch.Generator().manual_seed(1)
    total = sum(SIZES)
    if sample.dtype == torch.int64:
        x = torch.randint(10, (total, *sample.shape), generator=rng)
        y = torch.randint(10, (total, *sample.shape), generator=rng)
    else:
        x = torch.randn(total, *sample.shape, generator=rng, dtype=torch.float64).to(dtype)
        y = torch.randint(10, (total,), generator=rng)
    examples = Examples(x=x, y=y, classes=tuple("0123456789"))
    shards = Shards(torch.arange(total), torch.tensor([0, *SIZES]).cumsum(0))
    local = LocalSGD(lr=0.1, weight_decay=weight_decay)
    return Federation(
        recipe=Recipe(engine=EngineConfig(convolutions=convolutions)),
        task=Task(module, local=local, partition=algorithm.partition, classes=10, dtype=dtype),
        algorithm=algorithm,
        schedule=Rounds(cohort=len(SIZES)),
        topology=None,
        data=FederatedData(train=examples, test=examples, train_shards=shards, test_shards=shards),
        work=LocalWork(epochs=2, batch_size=8),
    )


def works(f: Federation, *, alike: bool = True) -> list[Work]:
    """One job per client; cut short for one of them, from a model of its own for all unless ``alike``."""
    made: list[Work] = []
    for client in range(len(SIZES)):
        payload = trees.pick(f.task.initial, f.task.shared)
        if not alike:
            payload = {n: t * (1 + 0.1 * client) if t.is_floating_point() else t for n, t in payload.items()}
        elif made:
            payload = made[0].job.payload
        private = f.algorithm.private(f.task)
        made.append(Work(client, Job(0, "train", payload), private, steps=1 if client == 3 else None))
    return made


def assert_equal(found: list[Results], f: Federation, jobs: list[Work]) -> None:
    alone = list(SequentialTrainer(f, seed=0).train(jobs))
    updates = trees.concatenate([each.updates for each in found])
    privates = trees.concatenate([each.privates for each in found])
    assert [loss for each in found for loss in each.losses] == pytest.approx([a.losses[0] for a in alone])
    for k, reference in enumerate(alone):
        for tree, other in ((updates, reference.updates), (privates, reference.privates)):
            for name, each in other.items():  # float64: rounding grows to 1e-11 in the deepest net
                torch.testing.assert_close(tree[name][k], each[0], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("alike", [True, False])
@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
@pytest.mark.parametrize("name", MODELS)
def test_fused_training_equals_one_client_at_a_time(name: str, weight_decay: float, alike: bool) -> None:
    config, sample = MODELS[name]
    f = federation(build(config, sample=sample, outputs=10, seed=0), sample, FedAvg(), weight_decay)
    tier = FusedTrainer(f, seed=0, chunk=8, otherwise=SequentialTrainer(f, seed=0))
    jobs = works(f, alike=alike)
    found = list(tier.train(jobs))
    assert [len(each.works) for each in found] == [8, 3]  # the check passed: no fallback
    assert_equal(found, f, jobs)


def test_a_layer_without_use_decays_in_the_fused_tier_too() -> None:
    f = federation(Spare(), IMAGE, FedAvg(), weight_decay=0.01)
    tier = FusedTrainer(f, seed=0, chunk=16, otherwise=SequentialTrainer(f, seed=0))
    jobs = works(f)
    found = list(tier.train(jobs))
    assert tier.sound
    assert float(found[0].updates["spare.weight"].abs().max()) > 0
    assert_equal(found, f, jobs)


@pytest.mark.parametrize("alike", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_sums_over_blocks_are_sums_of_updates(name: str, alike: bool) -> None:
    config, sample = MODELS[name]
    f = federation(build(config, sample=sample, outputs=10, seed=0), sample, FedAvg())
    tier = FusedTrainer(f, seed=0, chunk=16, otherwise=SequentialTrainer(f, seed=0))
    (found,) = tier.train(works(f, alike=alike))
    assert isinstance(found.change, Moving)
    weights = torch.tensor(SIZES, dtype=torch.float64)
    sums = found.change.sums(weights)
    for name, each in found.updates.items():
        weighted = each * weights.view(-1, *[1] * (each.dim() - 1))
        expected = torch.stack([weighted[:BLOCK].sum(0), weighted[BLOCK:].sum(0)])
        torch.testing.assert_close(sums[name], expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("name", "convolutions"),
    [("logistic", "direct"), ("mlp", "direct"), ("leaf cnn", "direct"), ("leaf cnn", "winograd")],
)
def test_sums_do_not_depend_on_the_chunk_or_on_threads_to_the_last_bit(
    name: str, convolutions: Literal["direct", "winograd"], threads: int
) -> None:
    config, sample = MODELS[name]
    module = build(config, sample=sample, outputs=10, seed=0)
    weights = torch.tensor(SIZES, dtype=torch.float64)
    made = []
    for chunk in (8, 16):
        f = federation(module, sample, FedAvg(), dtype=torch.float32, convolutions=convolutions)
        tier = FusedTrainer(f, seed=0, chunk=chunk, otherwise=SequentialTrainer(f, seed=0))
        torch.set_num_threads(threads if chunk == 16 else 1)
        try:
            sums, at = [], 0
            for each in tier.train(works(f)):
                assert isinstance(each.change, Moving)
                sums.append(each.change.sums(weights[at : at + len(each.works)]))
                at += len(each.works)
        finally:
            torch.set_num_threads(1)
        made.append(trees.concatenate(sums))
    for key, sums_of_eight in made[0].items():
        assert torch.equal(sums_of_eight, made[1][key]), key


def test_what_nobody_trains_is_summed_and_stored_like_the_rest() -> None:
    f = federation(Settled(), IMAGE, FedAvg())
    jobs = works(f) * 3  # blocks enough to be added up in pairs of pairs
    (found,) = FusedTrainer(f, seed=0, chunk=40, otherwise=SequentialTrainer(f, seed=0)).train(jobs)
    assert isinstance(found.change, Moving)
    weights = torch.ones(len(jobs), dtype=torch.float64)
    whole = Sums().add_blocks(found.change.sums(weights), weights).total()
    for name, each in found.updates.items():
        torch.testing.assert_close(whole.sums[name], each.sum(0), rtol=1e-10, atol=1e-12)
    rows = {str(k): each for k, each in enumerate(found.updates["body.weight"])}
    assert not any(each.any() for each in load(save(rows)).values())


def test_private_models_are_fused_too() -> None:
    f = federation(build(MLPConfig(), sample=IMAGE, outputs=10, seed=0), IMAGE, LocalOnly())
    jobs = works(f)
    found = list(FusedTrainer(f, seed=0, chunk=16, otherwise=SequentialTrainer(f, seed=0)).train(jobs))
    assert len(found) == 1
    assert_equal(found, f, jobs)


@pytest.mark.parametrize("module", [Scaled(), Twice()], ids=["unknown operation", "layer used twice"])
def test_a_module_that_cannot_be_fused_is_still_right(module: nn.Module) -> None:
    f = federation(module, IMAGE, FedAvg())
    jobs = works(f)
    tier, _ = trainer(f, seed=0, mode="fused", chunk=16)
    assert_equal(list(tier.train(jobs)), f, jobs)


@pytest.mark.parametrize(
    ("module", "folds"),
    [(Scaled(), False), (Mixing(), False), (Twice(), True)],
    ids=["unknown operation", "mixes examples", "layer used twice"],
)
def test_folding_is_refused_exactly_where_it_is_wrong(module: nn.Module, folds: bool) -> None:
    f = federation(module, IMAGE, FedProx(mu=0.1))
    jobs = works(f)
    assert_equal(list(trainer(f, seed=0, mode="batched", chunk=16)[0].train(jobs)), f, jobs)
    assert f.task.foldable is folds


@pytest.mark.parametrize(
    "module",
    [Watchful(), nn.Sequential(nn.Flatten(), spectral_norm(nn.Linear(64, 10)))],
    ids=["looks at its examples", "spectral norm"],
)
def test_a_module_that_vmap_cannot_look_into_is_still_right(module: nn.Module) -> None:
    f = federation(module, IMAGE, FedProx(mu=0.1))
    jobs = works(f)
    assert_equal(list(trainer(f, seed=0, mode="batched", chunk=16)[0].train(jobs)), f, jobs)
    assert (f.task.foldable, f.task.mappable) == (False, False)


@pytest.mark.parametrize("name", [*MODELS, *MIXING])
def test_folded_gradients_equal_plain_ones(name: str) -> None:
    config, sample = {**MODELS, **MIXING}[name]
    f = federation(build(config, sample=sample, outputs=10, seed=0), sample, FedProx(mu=0.1))
    jobs = works(f, alike=False)
    assert_equal(list(trainer(f, seed=0, mode="batched", chunk=16)[0].train(jobs)), f, jobs)
    assert f.task.foldable


def test_rounding_over_a_kink_does_not_cost_the_tier() -> None:
    """In single precision a ReLU or a pooling flips now and then, and a gradient is off by a hundredth."""
    sample = torch.zeros(1, 28, 28)
    for seed in range(6):
        module = build(LeafCNNConfig(hidden=16), sample=sample, outputs=10, seed=seed)
        f = federation(module, sample, FedAvg(), dtype=torch.float32, convolutions="winograd")
        f = replace(f, work=LocalWork(batch_size=25))
        first, *others = [job for job in works(f) if SIZES[job.client] >= 20]
        for other in others:
            tier = FusedTrainer(f, seed=0, chunk=16, otherwise=SequentialTrainer(f, seed=0))
            list(tier.train([first, other]))
            assert tier.sound, (seed, other.client)


def test_a_module_that_knows_one_precision_is_checked_in_that() -> None:
    f = federation(OfSinglePrecision(), IMAGE, FedAvg(), dtype=torch.float32)
    tier = FusedTrainer(f, seed=0, chunk=16, otherwise=SequentialTrainer(f, seed=0))
    list(tier.train(works(f)))
    assert tier.sound
    list(trainer(f, seed=0, mode="batched", chunk=16)[0].train(works(f)))
    assert f.task.foldable


@pytest.mark.parametrize("mode", ["fused", "batched"])
def test_a_padding_row_stays_where_it_is(mode: Mode) -> None:
    tokens = torch.zeros(12, dtype=torch.int64)
    f = federation(Padded(), tokens, FedAvg())
    jobs = works(f)
    found = list(trainer(f, seed=0, mode=mode, chunk=16)[0].train(jobs))
    assert_equal(found, f, jobs)
    assert all(not each.updates["tokens.weight"][:, 0].any() for each in found)


def test_one_client_alone_is_checked_beside_another() -> None:
    """Of one client, a mean over the whole fold is a mean over its own batch."""
    f = federation(Mixing(), IMAGE, FedAvg())
    jobs = works(f)
    tier = FusedTrainer(f, seed=0, chunk=16, otherwise=SequentialTrainer(f, seed=0))
    assert_equal(list(tier.train(jobs[:1])), f, jobs[:1])
    assert tier.sound is False
    assert_equal(list(tier.train(jobs)), f, jobs)


def test_the_fastest_tier_is_measured_once_and_remembered() -> None:
    f = federation(build(MLPConfig(), sample=IMAGE, outputs=10, seed=3), IMAGE, FedAvg())
    jobs = works(f)
    first, _ = trainer(f, seed=0, mode="auto", chunk=None)
    assert isinstance(first, Measured)
    assert first.tier is None
    found = first.measure(jobs)
    first.settle(found, "measured")
    assert_equal(list(first.train(jobs)), f, jobs)
    again, _ = trainer(f, seed=0, mode="auto", chunk=None)
    assert isinstance(again, Measured)
    assert again.tier == found
    other = federation(build(MLPConfig(hidden=(7,)), sample=IMAGE, outputs=10, seed=3), IMAGE, FedAvg())
    unknown, _ = trainer(other, seed=0, mode="auto", chunk=None)
    assert isinstance(unknown, Measured)
    assert unknown.tier is None


def test_random_numbers_of_a_forward_pass_belong_to_the_job() -> None:
    f = federation(Noisy(), IMAGE, FedAvg())
    tier, _ = trainer(f, seed=0, mode="auto", chunk=None)
    assert tier.label == "sequential"
    first, again = (list(tier.train(works(f))) for _ in range(2))
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a.updates["head.weight"], b.updates["head.weight"])


def test_only_plain_sgd_is_fused() -> None:
    module = build(MLPConfig(), sample=IMAGE, outputs=10, seed=0)
    assert applies(Task(module), FedAvg())
    assert not applies(Task(module), FedProx())
    assert not applies(Task(module, local=LocalSGD(momentum=0.9)), FedAvg())
    assert not applies(Task(module, local=LocalSGD(clip_norm=1.0)), FedAvg())
    normed = build(MLPConfig(norm="batch"), sample=IMAGE, outputs=10, seed=0)
    assert not applies(Task(normed), FedAvg())
