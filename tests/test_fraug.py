"""FRAug: one client's steps against the paper's three losses written with torch modules and autograd."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hansa.core.algorithm import Job, State
from hansa.core.errors import InputError
from hansa.core.hub import Order, Send
from hansa.core.task import Batch, Task
from hansa.core.trees import Tree, row, take_under
from hansa.simulation.cohort import Data, Work
from hansa.simulation.simulator import Simulator
from hansa.strategies.catalog import Federation
from hansa.strategies.fraug import FRAug

Build = Callable[..., Federation]

CLASSES, FEATURES, LATENT = 10, 6, 3  # of the digits and an MLP with six features


def federation_of(digits: Build, **sections: Any) -> tuple[Task, FRAug, Federation]:
    algorithm = {"name": "fraug", **sections.pop("algorithm", {})}
    made = digits(algorithm=algorithm, **sections)
    assert isinstance(made.algorithm, FRAug)
    return made.task, made.algorithm, made


def batch_of(federation: Federation, task: Task, number: int, size: int = 8) -> Batch:
    """Examples, and the noise that the algorithm asks for."""
    train, fraug = federation.data.train, federation.algorithm
    rows = slice(number * size, (number + 1) * size)
    draw = torch.Generator().manual_seed(number)
    shapes = fraug.noise(task, "train", size)
    noise = {name: torch.randn(shape, generator=draw, dtype=torch.float64) for name, shape in shapes.items()}
    return {"x": train.x[rows], "y": train.y[rows], **noise}


def job(
    fraug: FRAug, task: Task, batches: list[Batch], version: int = 0, horizon: int = 10
) -> tuple[Tree, Tree, Tree, Tree]:
    """One client's job from the initial state: (payload, update, private before, private after)."""
    state = fraug.init(task, clients=1, horizon=horizon)
    state = State(state.params, version=version, clients=1, horizon=horizon)
    payload, _ = fraug.issue(task, state, 0, "train")
    private = fraug.private(task)
    carry = fraug.begin(task, payload, private, "train")
    for batch in batches:
        carry, _ = fraug.step(task, carry, batch, "train")
    update, kept = fraug.finish(task, carry, "train")
    return payload, update, private, kept


def values_after(payload: Tree, update: Tree) -> Tree:
    """The client's shared tensors after its job: changes are added, running statistics stand."""
    return {n: u if "running" in n else payload[n] + u for n, u in update.items()}


class Oracle:
    """The client of section 3 of arXiv 2205.14900, in plain modules."""

    def __init__(self, task: Task, fraug: FRAug, payload: Tree, private: Tree, ramp: float) -> None:
        self.a, self.r, self.sgd = fraug, ramp, task.local
        self.model = copy.deepcopy(task.module).requires_grad_(True)
        shared = {n: t for n, t in payload.items() if "/" not in n}
        own = {n: t for n, t in private.items() if "/" not in n}
        self.model.load_state_dict({**shared, **own})
        d, z, c = FEATURES, LATENT, CLASSES
        self.G = nn.Sequential(
            nn.Linear(z + c, d), nn.BatchNorm1d(d), nn.ReLU(), nn.Linear(d, d), nn.BatchNorm1d(d), nn.ReLU()
        ).double()
        self.T = nn.Sequential(
            nn.Linear(d + c, z), nn.BatchNorm1d(z), nn.ReLU(), nn.Linear(z, d), nn.BatchNorm1d(d)
        ).double()
        self.G.load_state_dict(take_under("generator", payload), strict=False)
        self.T.load_state_dict(take_under("transformer", private), strict=False)
        self.means, self.seen, self.steps = torch.zeros(c, d).double(), torch.zeros(c).double(), 0
        optimiser = torch.optim.SGD
        self.opt = optimiser(
            self.model.parameters(), self.sgd.lr, self.sgd.momentum, weight_decay=self.sgd.weight_decay
        )
        self.opt_g = optimiser(self.G.parameters(), fraug.generator_lr, self.sgd.momentum)
        self.opt_t = optimiser(self.T.parameters(), fraug.transformer_lr, self.sgd.momentum)

    def generate(self, z: Tensor, y: Tensor) -> Tensor:
        made: Tensor = self.G(torch.cat([z, F.one_hot(y, CLASSES).double()], 1))
        return made

    def transform(self, v: Tensor, base: Tensor, y: Tensor) -> Tensor:
        moved: Tensor = base + self.T(torch.cat([v, F.one_hot(y, CLASSES).double()], 1))
        return moved

    def head(self, f: Tensor) -> Tensor:
        out: Tensor = self.model.get_submodule("head")(f)
        return out

    def features(self, x: Tensor) -> Tensor:
        out: Tensor = self.model.get_submodule("extractor")(x)
        return out

    def labels(self, size: int) -> Tensor:
        return torch.tensor([(self.steps * size + k) % CLASSES for k in range(size)])

    def losses(self, b: Batch, known: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(CE(h(f), y), CE of synthetic embeddings on own labels, on balanced labels of known classes)."""
        y, r = b["y"], self.r
        f = self.features(b["x"])
        with torch.no_grad():
            for c in set(y.tolist()):  # prototypes
                self.means[c] = 0.7 * self.means[c] + 0.3 * f[y == c].mean(0)
                self.seen[c] = 1
            base = self.means[labels]
            f1 = self.transform(self.generate(b["z_own"], y), f, y)
            f2 = self.transform(self.generate(b["z_balanced"], labels), base, labels)
            if self.a.interpolate:
                f1, f2 = r * f1 + (1 - r) * f, r * f2 + (1 - r) * base
        known[:] = self.seen[labels] > 0
        return (
            F.cross_entropy(self.head(f), y),
            F.cross_entropy(self.head(f1), y),
            F.cross_entropy(self.head(f2)[known], labels[known]),
        )

    def generator_loss(self, b: Batch, labels: Tensor, known: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        """(CE(h(G(z, y')), y'), distance to this client's features)."""
        v = self.generate(b["z_g"], labels)
        pleased = F.cross_entropy(self.head(v)[known], labels[known])
        if self.a.generator_distance == "mmd":
            return pleased, mmd(v, real)
        return pleased, F.mse_loss(v[known], self.means[labels][known])

    def transformer_losses(
        self, b: Batch, labels: Tensor, known: Tensor, real: Tensor
    ) -> list[tuple[Tensor, Tensor]]:
        """(entropy of the head, distance to the base) of the two kinds of embeddings."""
        with torch.no_grad():
            self.G.eval()
            cases = [
                (self.generate(b["z_t_own"], b["y"]), real, b["y"], torch.ones(len(real), dtype=torch.bool)),
                (self.generate(b["z_t"], labels), self.means[labels], labels, known),
            ]
        made = []
        for v, base, y, mask in cases:
            moved = self.transform(v, base, y)
            p = self.head(moved)[mask].softmax(1)
            entropy = -(p * p.log()).sum(1).mean()
            mse = self.a.transformer_distance == "mse"
            made.append((entropy, F.mse_loss(moved[mask], base[mask]) if mse else mmd(moved, base)))
        return made

    def step(self, b: Batch) -> None:
        size = len(b["x"])
        labels, known = self.labels(size), torch.zeros(size, dtype=torch.bool)
        share = min(0.5, self.r)
        self.model.train()
        self.G.eval()
        self.T.eval()
        real_loss, own, balanced = self.losses(b, known, labels)
        self.descend(self.opt, (1 - share) * real_loss + share * (own + balanced) / 2)
        self.steps += 1

        self.model.eval()
        self.G.train()
        with torch.no_grad():
            real = self.features(b["x"])
        pleased, away = self.generator_loss(b, labels, known, real)
        self.descend(self.opt_g, pleased - self.a.generator_weight * away)

        self.T.train()
        cases = self.transformer_losses(b, labels, known, real)
        weight = self.a.transformer_weight
        self.descend(
            self.opt_t, sum((weight * near - entropy for entropy, near in cases), torch.zeros(())) / 2
        )

    @staticmethod
    def descend(optimiser: torch.optim.Optimizer, loss: Tensor) -> None:
        for group in optimiser.param_groups:
            gradients = torch.autograd.grad(loss, group["params"], retain_graph=True)
            for parameter, gradient in zip(group["params"], gradients, strict=True):
                parameter.grad = gradient
        optimiser.step()


def mmd(a: Tensor, b: Tensor) -> Tensor:
    """Squared MMD, kernel by kernel: Gaussians of widths ¼, ½, 1, 2, 4 times the mean squared distance."""
    both = torch.cat([a, b])
    squares = ((both[:, None] - both[None]) ** 2).sum(-1)
    n = len(both)
    width = squares.detach().sum() / (n * (n - 1))
    total = torch.zeros((), dtype=torch.float64)
    for factor in (0.25, 0.5, 1.0, 2.0, 4.0):
        kernel = torch.exp(-squares / (factor * width))
        total = total + kernel[: len(a), : len(a)].mean() + kernel[len(a) :, len(a) :].mean()
        total = total - kernel[: len(a), len(a) :].mean() - kernel[len(a) :, : len(a)].mean()
    return total


VARIANTS: dict[str, Mapping[str, Any]] = {
    "default": {},
    "mmd-mse-interpolated": {"generator_distance": "mmd", "transformer_distance": "mse", "interpolate": True},
    "weights": {
        "generator_weight": 0.3,
        "transformer_weight": 2.5,
        "generator_lr": 0.02,
        "transformer_lr": 0.3,
    },
    "early": {"gamma": 0.3},  # r = exp(−2.1) = 0.12 < ½
}


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("sgd", [{}, {"momentum": 0.5, "weight_decay": 0.01}])
def test_a_job_is_the_papers(digits: Build, name: str, sgd: dict[str, float]) -> None:
    task, fraug, federation = federation_of(digits, algorithm=VARIANTS[name], train=sgd)
    batches = [batch_of(federation, task, number) for number in range(3)]
    payload, update, private, kept = job(fraug, task, batches, version=3)
    ramp = math.exp(fraug.gamma * (3 - 10))
    assert payload["fraug/ramp"].item() == pytest.approx(ramp, rel=1e-12)
    oracle = Oracle(task, fraug, payload, private, ramp)
    for batch in batches:
        oracle.step(batch)

    after = {**values_after(payload, update), **kept}
    expected = {
        **oracle.model.state_dict(),
        **{f"generator/{n}": t for n, t in oracle.G.state_dict().items() if "num_batches" not in n},
        **{f"transformer/{n}": t for n, t in oracle.T.state_dict().items() if "num_batches" not in n},
        "prototype/means": oracle.means,
        "prototype/seen": oracle.seen,
        "fraug/steps": torch.tensor(3.0),
    }
    assert after.keys() == expected.keys()
    for tensor, each in expected.items():
        assert torch.allclose(after[tensor].double(), each.double(), rtol=1e-8, atol=1e-10), tensor


# Who is moved by which loss.


def first_job(digits: Build, **algorithm: Any) -> tuple[Tree, Tree]:
    task, fraug, federation = federation_of(digits, algorithm=algorithm)
    _, update, _, kept = job(fraug, task, [batch_of(federation, task, 0)])
    return update, kept


def test_the_extractor_learns_from_real_examples_only(digits: Build) -> None:
    """Its step is (1 − λ_t) times that of FedBN; the head's is not."""
    task, _, _ = federation_of(digits)
    late, _ = first_job(digits, gamma=0.0)  # r = 1, λ = ½
    never, _ = first_job(digits, gamma=1e6)  # r = 0
    for name in ("extractor.linear1.weight", "extractor.linear1.bias"):
        assert torch.allclose(late[name], never[name] / 2, rtol=1e-9, atol=1e-15)
        assert name in task.shared
    assert not torch.allclose(late["head.weight"], never["head.weight"] / 2, rtol=1e-2)


def test_without_its_ramp_the_model_is_fedbns(digits: Build) -> None:
    task, fraug, federation = federation_of(digits, algorithm={"gamma": 1e6})
    batches = [batch_of(federation, task, number) for number in range(3)]
    _, update, _, kept = job(fraug, task, batches)
    plain = digits(algorithm={"name": "fedbn"}).algorithm
    carry = plain.begin(task, plain.init(task, clients=1, horizon=1).params, plain.private(task), "train")
    for batch in batches:
        carry, _ = plain.step(task, carry, batch, "train")
    bare, private = plain.finish(task, carry, "train")
    assert all(torch.allclose(update[name], each, rtol=1e-10, atol=1e-14) for name, each in bare.items())
    assert all(torch.allclose(kept[name], each, rtol=1e-10, atol=1e-14) for name, each in private.items())


def moved(kept: Tree, network: str, start: Tree) -> bool:
    return any(
        not torch.equal(each, start[name])
        for name, each in kept.items()
        if name.startswith(network) and "running" not in name
    )


def test_each_loss_moves_its_own_network_only(digits: Build) -> None:
    task, fraug, _ = federation_of(digits)
    start = fraug.private(task)
    update, kept = first_job(digits)
    still_t, still_t_kept = first_job(digits, transformer_lr=0.0)
    still_g, still_g_kept = first_job(digits, generator_lr=0.0)
    model = [name for name in update if not name.startswith("generator")]
    generator = [name for name in update if name.startswith("generator")]
    assert moved(kept, "transformer", start)
    # Without T's steps: the model and G as before, T still.
    assert all(torch.equal(still_t[name], update[name]) for name in (*model, *generator))
    assert not moved(still_t_kept, "transformer", start)
    # Without G's steps: the model as before, G still, T moves all the same.
    assert all(torch.equal(still_g[name], update[name]) for name in model)
    assert all(not still_g[name].any() for name in generator if "running" not in name)
    assert moved(still_g_kept, "transformer", start)
    assert all(update[name].any() for name in generator if name.endswith("weight"))


def test_no_loss_moves_the_model_twice(digits: Build) -> None:
    """The forward passes of steps 2 and 3 leave the model's running statistics alone."""
    task, _, _ = federation_of(digits)
    _, kept = first_job(digits)
    count = kept["extractor.norm1.num_batches_tracked"] - task.initial["extractor.norm1.num_batches_tracked"]
    assert count == 1


# Directions, by finite changes.


def oracle_before(
    digits: Build, **algorithm: Any
) -> tuple[
    Oracle, Batch, Callable[[], tuple[Tensor, Tensor]], Callable[[], list[tuple[Tensor, Tensor]]], Tree, Tree
]:
    """An oracle whose model has made its first step, so that G's and T's losses can be read off at will."""
    task, fraug, federation = federation_of(digits, algorithm=algorithm)
    batch = batch_of(federation, task, 0)
    payload, update, private, kept = job(fraug, task, [batch])
    oracle = Oracle(task, fraug, payload, private, 1.0)
    known = torch.zeros(len(batch["x"]), dtype=torch.bool)
    labels = oracle.labels(len(batch["x"]))
    oracle.losses(batch, known, labels)
    oracle.model.load_state_dict(
        {n: t for n, t in {**values_after(payload, update), **kept}.items() if "/" not in n}
    )
    oracle.model.eval()
    with torch.no_grad():
        real = oracle.features(batch["x"])

    def generator() -> tuple[Tensor, Tensor]:
        return oracle.generator_loss(batch, labels, known, real)

    def transformer() -> list[tuple[Tensor, Tensor]]:
        return oracle.transformer_losses(batch, labels, known, real)

    return oracle, batch, generator, transformer, values_after(payload, update), kept


@pytest.mark.parametrize("distance", ["mse", "mmd"])
@pytest.mark.parametrize(("weight", "index", "sign"), [(0.0, 0, -1), (1e3, 1, +1)])
def test_the_generator_pleases_the_head_and_leaves_the_clients_features(
    digits: Build, distance: str, weight: float, index: int, sign: int
) -> None:
    """Without distance its cross-entropy falls; with almost nothing else the distance grows."""
    oracle, _, read, _, shared, _ = oracle_before(
        digits, generator_weight=weight, generator_lr=1e-2 / max(weight, 1.0), generator_distance=distance
    )
    oracle.G.train()
    before = read()[index].item()
    oracle.G.load_state_dict(take_under("generator", shared), strict=False)
    assert sign * (read()[index].item() - before) > 1e-6


@pytest.mark.parametrize("distance", ["mse", "mmd"])
@pytest.mark.parametrize(("weight", "index", "sign"), [(0.0, 0, +1), (1e3, 1, -1)])
def test_the_transformer_raises_entropy_and_stays_near_its_base(
    digits: Build, distance: str, weight: float, index: int, sign: int
) -> None:
    """Without distance the head's entropy grows; with almost nothing else the distance shrinks."""
    oracle, _, _, read, shared, kept = oracle_before(
        digits,
        transformer_weight=weight,
        transformer_lr=1e-2 / max(weight, 1.0),
        transformer_distance=distance,
    )
    oracle.G.load_state_dict(take_under("generator", shared), strict=False)
    oracle.T.train()
    before = sum(case[index].item() for case in read())
    oracle.T.load_state_dict(take_under("transformer", kept), strict=False)
    assert sign * (sum(case[index].item() for case in read()) - before) > 1e-6


# Prototypes.


def test_prototypes_by_hand(digits: Build) -> None:
    """Moving averages from zero with momentum 0.3; classes that did not come stay."""
    task, fraug, federation = federation_of(digits, train={"lr": 1e-9})  # features hardly move
    batches = [batch_of(federation, task, number) for number in (0, 1)]
    for each, classes in zip(batches, ((0, 1), (1, 2)), strict=True):
        each["y"] = torch.tensor(classes).repeat(4)
    _, _, _, kept = job(fraug, task, batches)
    model = copy.deepcopy(task.module).train()
    f = [model.get_submodule("extractor")(each["x"]) for each in batches]
    expected = torch.zeros(CLASSES, FEATURES, dtype=torch.float64)
    expected[0] = 0.3 * f[0][::2].mean(0)
    expected[1] = 0.7 * 0.3 * f[0][1::2].mean(0) + 0.3 * f[1][::2].mean(0)
    expected[2] = 0.3 * f[1][1::2].mean(0)
    assert torch.allclose(kept["prototype/means"], expected, rtol=1e-6, atol=1e-9)
    assert kept["prototype/seen"].tolist() == [1, 1, 1] + [0] * 7


def test_prototypes_are_carried_to_the_next_job(digits: Build) -> None:
    _, _, federation = federation_of(digits, stop={"rounds": 3}, schedule={"cohort": 6})
    simulator = Simulator(federation)
    simulator.run()
    for client in range(6):
        kept = simulator.private(client)
        held = federation.data.train.y[federation.data.train_shards.of(client)].tolist()
        assert set(kept["prototype/seen"].nonzero().flatten().tolist()) == set(held)
        batches = federation.work.count(len(held), seed=0, client=client, number=0)
        assert kept["fraug/steps"].item() == 3 * batches


def test_a_batch_of_one_is_not_augmented(digits: Build) -> None:
    """G and T normalise over the batch: they stand still, and the model makes FedBN's step."""
    plain = {"model": {"name": "mlp", "hidden": [6]}}  # no BatchNorm of its own
    task, fraug, federation = federation_of(digits, **plain)
    one = batch_of(federation, task, 0, size=1)
    payload, update, private, kept = job(fraug, task, [one])
    generator = {n: t for n, t in values_after(payload, update).items() if n.startswith("generator")}
    assert all(torch.equal(each, payload[name]) for name, each in generator.items())
    assert all(torch.equal(each, private[name]) for name, each in kept.items())
    grads, _, _ = task.gradient(task.initial, one)
    assert torch.allclose(update["head.bias"], -task.local.lr * grads["head.bias"], rtol=1e-9)


# The federation.


def test_only_the_model_and_the_generator_travel(digits: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    task, _, federation = federation_of(digits, stop={"rounds": 2})
    simulator = Simulator(federation)
    payloads: list[Tree] = []
    updates: list[Tree] = []
    on, fold = simulator.hub.on, simulator.hub.fold

    def listening_on(*arguments: Any) -> list[Order]:
        orders = on(*arguments)
        payloads.extend(each.job.payload for each in orders if isinstance(each, Send))
        return orders

    def listening_fold(reports: Any, stacked: Tree, present: Any) -> None:
        updates.extend(row(stacked, place) for place in range(len(reports)))
        fold(reports, stacked, present)

    monkeypatch.setattr(simulator.hub, "on", listening_on)
    monkeypatch.setattr(simulator.hub, "fold", listening_fold)
    simulator.run()
    parts = ("0.weight", "0.bias", "3.weight", "3.bias")
    norms = (f"{i}.{n}" for i in (1, 4) for n in ("weight", "bias", "running_mean", "running_var"))
    generator = {f"generator/{each}" for each in (*parts, *norms)}
    model = {"extractor.linear1.weight", "extractor.linear1.bias", "head.weight", "head.bias"}
    assert set(task.shared) == model
    assert all(each.keys() == model | generator | {"fraug/ramp"} for each in payloads)
    assert all(each.keys() == model | generator for each in updates)


def test_the_generator_is_one_and_has_moved_after_a_round(
    digits: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, fraug, federation = federation_of(digits, stop={"rounds": 1}, schedule={"cohort": 6})
    simulator = Simulator(federation)
    updates: dict[int, Tree] = {}
    fold = simulator.hub.fold

    def listening_fold(reports: Any, stacked: Tree, present: Any) -> None:
        updates.update({report.client: row(stacked, place) for place, report in enumerate(reports)})
        fold(reports, stacked, present)

    monkeypatch.setattr(simulator.hub, "fold", listening_fold)
    params = simulator.run().params
    start = fraug.init(task, clients=6, horizon=1).params
    sizes = federation.data.train_shards.sizes.double()
    shares = sizes / sizes.sum()
    for name, each in params.items():
        if name.startswith("generator"):
            mean = sum(
                (share * updates[client][name] for client, share in enumerate(shares)), torch.zeros(())
            )
            assert torch.allclose(
                each, mean if "running" in name else start[name] + mean, rtol=1e-9, atol=1e-12
            )
            # A bias before BatchNorm has no effect and stays.
            assert not torch.equal(each, start[name]) or name in ("generator/0.bias", "generator/3.bias")
    own = [simulator.private(client)["transformer/0.weight"] for client in range(6)]
    assert not torch.equal(own[0], own[1])


def test_noise_belongs_to_seed_client_job_and_step(digits: Build) -> None:
    _, _, federation = federation_of(digits)

    def drawn(seed: int = 0, client: int = 0, number: int = 0, step: int = 0) -> tuple[float, ...]:
        work = Work(client, Job(number, "train", {}), {})
        noise = Data(federation, seed).noise(work, step, 8)
        assert noise.keys() == {"z_own", "z_balanced", "z_g", "z_t_own", "z_t"}
        assert {each.shape for each in noise.values()} == {(8, LATENT)}
        return tuple(torch.cat(list(noise.values())).flatten().tolist())

    draws = [drawn(), drawn(seed=1), drawn(client=1), drawn(number=1), drawn(step=1)]
    assert drawn() == draws[0]
    assert len({*draws}) == 5
    assert len({number for each in draws for number in each}) == 5 * 5 * 8 * LATENT  # no two the same
    assert abs(sum(draws[0]) / len(draws[0])) < 0.35  # 120 standard normals: 3.8 standard errors


def test_all_start_from_the_seeds_networks(digits: Build) -> None:
    task, fraug, _ = federation_of(digits)
    other, _, _ = federation_of(digits, seed=1)

    def drawn(of: Task) -> Tensor:
        return fraug.init(of, clients=1, horizon=1).params["generator/0.weight"]

    state = torch.random.get_rng_state()
    assert torch.equal(drawn(task), drawn(task))
    assert not torch.equal(drawn(task), drawn(other))
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize(("version", "ramp"), [(0, math.exp(-0.02)), (5, math.exp(-0.01)), (10, 1.0)])
def test_the_ramp_rises_to_one_at_the_horizon(digits: Build, version: int, ramp: float) -> None:
    task, fraug, _ = federation_of(digits)
    payload, _ = fraug.issue(task, State({}, version=version, horizon=10), 0, "train")
    assert payload["fraug/ramp"].item() == pytest.approx(ramp, rel=1e-12)


@pytest.mark.parametrize(
    ("sections", "field"),
    [
        ({"model": {"name": "logistic"}}, "model.name"),
        ({"parameters": {"frozen": ["head.weight"]}}, "parameters.frozen"),
    ],
)
def test_models_without_a_trained_head_are_refused(
    digits: Build, sections: dict[str, Any], field: str
) -> None:
    with pytest.raises(InputError) as caught:
        federation_of(digits, **sections)
    assert caught.value.field == field
