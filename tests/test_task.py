from __future__ import annotations

import copy
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hansa.core.errors import InputError
from hansa.core.models import DigitsCNNConfig, MLPConfig, build
from hansa.core.partition import Partition, Role, Rule
from hansa.core.task import Batch, LocalSGD, LocalWork, Task, classification, regression
from hansa.core.trees import Tree, row, stack

F64 = torch.float64
few = settings(derandomize=True, deadline=None, database=None, max_examples=60)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def rules(*each: tuple[str, Role]) -> Partition:
    return Partition(tuple(Rule(select, role) for select, role in each))


def mlp(norm: str = "batch") -> nn.Module:
    config = MLPConfig.model_validate({"hidden": (4, 3), "norm": norm})
    return build(config, sample=torch.zeros(5), outputs=3, seed=0)


def batch(size: int = 6, seed: int = 0) -> Batch:
    return {"x": randn(size, 5, seed=seed), "y": torch.arange(size) % 3}


# Objectives.


def test_classification_by_hand() -> None:
    logits = torch.tensor([[math.log(2.0), 0.0], [0.0, 0.0]])
    scores = classification(logits, torch.tensor([0, 1]))
    assert scores["loss"].tolist() == pytest.approx([math.log(1.5), math.log(2.0)])
    assert scores["accuracy"].tolist() == [1.0, 0.0]  # of equals the first is taken


def test_next_tokens_are_averaged_over_an_example() -> None:
    logits, targets = randn(4, 7, 3), torch.arange(28).view(4, 7) % 3
    scores = classification(logits, targets)
    for i in range(4):
        assert scores["loss"][i].item() == pytest.approx(F.cross_entropy(logits[i], targets[i]).item())
        hits = (logits[i].argmax(-1) == targets[i]).double().mean()
        assert scores["accuracy"][i].item() == pytest.approx(hits.item())


@pytest.mark.parametrize("shape", [(3,), (3, 1)])
def test_regression_by_hand(shape: tuple[int, ...]) -> None:
    found = regression(torch.tensor([1.0, 2.0, 5.0]).view(3, 1), torch.tensor([1.0, 0.0, 2.0]).view(shape))
    assert found["loss"].tolist() == [0.0, 4.0, 9.0]
    assert regression(torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 4.0]]))["loss"].tolist() == [5.0]


# The client's optimiser.


@few
@given(
    lr=st.floats(0.001, 1.0),
    momentum=st.sampled_from([0.0, 0.5, 0.9]),
    weight_decay=st.sampled_from([0.0, 0.01, 0.5]),
    seed=st.integers(0, 99),
)
def test_local_sgd_is_torch_sgd(lr: float, momentum: float, weight_decay: float, seed: int) -> None:
    ours: Tree = {"a": randn(3, 2, seed=seed), "b": randn(4, seed=seed + 1)}
    theirs: Tree = {name: nn.Parameter(each.clone()) for name, each in ours.items()}
    optimiser = torch.optim.SGD(theirs.values(), lr, momentum=momentum, weight_decay=weight_decay)
    local = LocalSGD(lr=lr, momentum=momentum, weight_decay=weight_decay)
    velocity = local.start(ours)
    for step in range(5):
        grads = {name: randn(*each.shape, seed=seed + 7 * step) for name, each in ours.items()}
        for name, each in theirs.items():
            each.grad = grads[name].clone()
        optimiser.step()
        ours, velocity = local.step(ours, grads, velocity)
    for name, each in ours.items():
        assert torch.allclose(each, theirs[name].detach(), rtol=1e-13, atol=1e-13)


def test_the_gradient_is_clipped_as_one_vector_before_decay() -> None:
    local = LocalSGD(lr=1.0, weight_decay=0.1, clip_norm=1.0)
    params, grads = (
        {"a": torch.tensor([10.0]), "b": torch.tensor([0.0])},
        {"a": torch.tensor([3.0]), "b": torch.tensor([4.0])},
    )
    moved, _ = local.step(params, grads, {})
    assert moved["a"].item() == pytest.approx(10.0 - (0.6 + 1.0))
    assert moved["b"].item() == pytest.approx(-0.8)
    short = {"a": torch.tensor([0.3]), "b": torch.tensor([0.4])}
    assert local.step(params, short, {})[0]["b"].item() == pytest.approx(-0.4)
    zero = {"a": torch.zeros(1), "b": torch.zeros(1)}
    assert local.step(params, zero, {})[0]["a"].item() == pytest.approx(9.0)


# The client's batches.


def test_an_epoch_sees_every_example_once_in_a_new_order() -> None:
    work = LocalWork(epochs=3, batch_size=4)
    made = work.batches(10, seed=0, client=1, number=0)
    assert [len(each) for each in made] == [4, 4, 2] * 3
    passes = [torch.cat(made[at : at + 3]) for at in (0, 3, 6)]
    assert all(sorted(each.tolist()) == list(range(10)) for each in passes)
    assert not torch.equal(passes[0], passes[1])


def test_steps_go_on_into_new_passes() -> None:
    made = LocalWork(steps=5, batch_size=4).batches(10, seed=0, client=0, number=0)
    assert [len(each) for each in made] == [4, 4, 2, 4, 4]
    assert sorted(torch.cat(made[:3]).tolist()) == list(range(10))
    assert len(LocalWork(steps=2, batch_size=50).batches(3, seed=0, client=0, number=0)) == 2


def test_batches_belong_to_seed_client_and_job() -> None:
    def drawn(seed: int = 0, client: int = 0, number: int = 0) -> list[list[int]]:
        return [
            each.tolist()
            for each in LocalWork(batch_size=7).batches(30, seed=seed, client=client, number=number)
        ]

    assert drawn() == drawn()
    assert len({str(each) for each in (drawn(), drawn(seed=1), drawn(client=1), drawn(number=1))}) == 4


def test_epochs_are_drawn_per_job_from_the_whole_range() -> None:
    work = LocalWork(epochs=(2, 4), batch_size=5)
    passes = [len(work.batches(5, seed=0, client=client, number=0)) for client in range(200)]
    counts = np.bincount(passes)[2:]
    assert set(passes) == {2, 3, 4}
    assert counts.min() > 40  # 67 ± 7 expected


def test_a_last_batch_of_one_joins_its_neighbour_where_statistics_need_two() -> None:
    work = LocalWork(batch_size=4)
    assert [len(each) for each in work.batches(9, seed=0, client=0, number=0, whole=2)] == [4, 5]
    assert [len(each) for each in work.batches(9, seed=0, client=0, number=0)] == [4, 4, 1]
    assert [len(each) for each in work.batches(1, seed=0, client=0, number=0, whole=2)] == [1]


@few
@given(
    examples=st.integers(1, 40),
    batch_size=st.integers(2, 12),
    epochs=st.one_of(st.integers(1, 3), st.sampled_from([(1, 1), (1, 4)])),
    steps=st.one_of(st.none(), st.integers(1, 9)),
    whole=st.integers(1, 2),
    client=st.integers(0, 5),
)
def test_batches_are_counted_without_making_them(
    examples: int, batch_size: int, epochs: int | tuple[int, int], steps: int | None, whole: int, client: int
) -> None:
    work = LocalWork(epochs=epochs, steps=steps, batch_size=batch_size)
    made = work.batches(examples, seed=3, client=client, number=2, whole=whole)
    assert work.count(examples, seed=3, client=client, number=2, whole=whole) == len(made)


# The task.


def test_a_task_is_a_copy() -> None:
    module = mlp()
    before = copy.deepcopy(module.state_dict())
    task = Task(module, dtype=F64)
    task.initial["head.weight"].zero_()
    task.gradient(task.initial, batch())
    assert all(torch.equal(each, module.state_dict()[name]) for name, each in before.items())
    assert module.head.weight.dtype == torch.float32  # type: ignore[union-attr]
    assert task.initial["head.weight"].dtype == F64


@pytest.mark.parametrize("norm", ["none", "batch", "layer"])
def test_gradients_loss_and_buffers_are_those_of_the_module(norm: str) -> None:
    task, module, data = Task(mlp(norm), dtype=F64), mlp(norm).double().train(), batch()
    grads, metrics, buffers = task.gradient(task.initial, data)
    loss = F.cross_entropy(module(data["x"]), data["y"])
    expected = dict(
        zip(dict(module.named_parameters()), torch.autograd.grad(loss, [*module.parameters()]), strict=True)
    )
    assert grads.keys() == expected.keys() == set(task.trainable)
    assert all(torch.allclose(grads[name], each, rtol=1e-12, atol=1e-15) for name, each in expected.items())
    assert metrics["loss"].item() == pytest.approx(loss.item(), rel=1e-14)
    assert buffers.keys() == dict(module.named_buffers()).keys()
    assert all(torch.equal(buffers[name], each) for name, each in module.named_buffers())


def test_a_gradient_leaves_its_arguments_alone() -> None:
    task, data = Task(mlp(), dtype=F64), batch()
    before = {name: each.clone() for name, each in task.initial.items()}
    first, second = task.gradient(task.initial, data), task.gradient(task.initial, data)
    assert all(torch.equal(each, before[name]) for name, each in task.initial.items())
    assert all(torch.equal(each, second[0][name]) for name, each in first[0].items())
    assert not any(each.requires_grad for part in first for each in part.values())


def test_many_training_calls_use_the_tensors_given_once_and_leave_the_module_as_it_was() -> None:
    task, data = Task(mlp(), dtype=F64), batch()
    doubled = {name: 2 * each for name, each in task.initial.items()}
    before, twice = (task.train_forward(params, data["x"])[0] for params in (task.initial, doubled))
    with task.training_calls(doubled) as model:
        for _ in range(2):
            torch.testing.assert_close(model(data["x"]), twice, rtol=0, atol=0)
        with pytest.raises(RuntimeError):
            model(data["x"][:, :1])
    torch.testing.assert_close(task.train_forward(task.initial, data["x"])[0], before, rtol=0, atol=0)


def test_scores_are_those_of_evaluation_mode() -> None:
    module, data = mlp().double(), batch()
    task = Task(mlp(), dtype=F64)
    module(data["x"])  # moves the statistics
    moved = {name: each.detach() for name, each in module.state_dict().items()}
    expected = classification(module.eval()(data["x"]), data["y"])
    found = task.scores(moved, data["x"], data["y"])
    assert torch.allclose(found["loss"], expected["loss"].detach(), rtol=1e-14)
    assert found["loss"].shape == found["accuracy"].shape == (6,)


def test_features_and_head_make_the_output() -> None:
    task, data = Task(mlp(), dtype=F64), batch()
    features = task.features(task.initial, data["x"])
    assert task.head == "head"
    assert features.shape == (6, 3)
    assert torch.allclose(
        task.classify(task.initial, features), task.forward(task.initial, data["x"]), rtol=1e-14
    )
    outputs, features, buffers = task.train_forward_with_features(task.initial, data["x"])
    assert torch.allclose(task.classify(task.initial, features), outputs, rtol=1e-14)
    assert int(buffers["extractor.norm1.num_batches_tracked"]) == 1


def test_the_head_is_the_last_linear_layer_behind_something() -> None:
    assert Task(nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))).head == "2"
    assert Task(nn.Sequential(nn.Flatten(), nn.Linear(5, 3))).head is None
    assert Task(nn.Conv2d(1, 1, 3)).head is None


# Roles.


def test_frozen_tensors_are_constants() -> None:
    task = Task(mlp(), partition=rules(("extractor.linear1.*", "frozen")), dtype=F64)
    assert task.frozen.keys() == {"extractor.linear1.weight", "extractor.linear1.bias"}
    assert not task.frozen.keys() & {*task.trainable, *task.shared, *task.local_names}
    params = {name: each for name, each in task.initial.items() if name not in task.frozen}
    grads, _, _ = task.gradient(params, batch())  # they need not be given
    assert grads.keys() == set(task.trainable)
    reference = Task(mlp(), dtype=F64)
    full, _, _ = reference.gradient(reference.initial, batch())
    assert all(torch.allclose(each, full[name], rtol=1e-12, atol=1e-15) for name, each in grads.items())


def test_layers_behind_a_frozen_one_train_for_many_steps() -> None:
    # Once the frozen layer's graph leaked into the running statistics behind it.
    task = Task(mlp(), partition=rules(("extractor.linear1.*", "frozen")), dtype=F64)
    params = {name: each for name, each in task.initial.items() if name not in task.frozen}
    for seed in range(3):
        _, _, buffers = task.gradient(params, batch(seed=seed))
        params = {**params, **buffers}
    assert not any(each.requires_grad for each in params.values())


def test_frozen_statistics_do_not_move_and_are_used() -> None:
    task = Task(mlp(), partition=rules(("*norm1.running*", "frozen"), ("*norm1.num*", "frozen")), dtype=F64)
    _, _, buffers = task.gradient(task.initial, batch())
    moved = {name for name, each in buffers.items() if not torch.equal(each, task.initial[name])}
    assert moved == {
        f"extractor.norm2.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")
    }
    assert task.mixes_examples()
    still = Task(
        mlp(), partition=rules(("*.running_*", "frozen"), ("*.num_batches_tracked", "frozen")), dtype=F64
    )
    assert not still.mixes_examples()
    expected = still.scores(still.initial, batch()["x"], batch()["y"])["loss"].mean()
    _, metrics, _ = still.gradient(still.initial, batch())
    assert metrics["loss"].item() == pytest.approx(expected.item(), rel=1e-14)


def test_parameters_that_need_no_gradient_are_shared_and_not_trained() -> None:
    module = mlp("none")
    module.head.bias.requires_grad_(False)  # type: ignore[union-attr]
    task = Task(module)
    assert "head.bias" in task.shared
    assert "head.bias" not in task.trainable


def test_an_embedding_that_rewrites_itself_is_refused() -> None:
    module = nn.Sequential(nn.Embedding(9, 4, max_norm=1.0), nn.Flatten(), nn.Linear(8, 2))
    with pytest.raises(InputError, match=r"model = '0': a lookup with max_norm.*leave max_norm out"):
        Task(module)


def test_a_task_with_nothing_to_train_is_refused() -> None:
    with pytest.raises(InputError, match=r"parameters\.frozen.*freeze less"):
        Task(mlp(), partition=rules(("*", "frozen")))


def test_a_task_knows_what_its_model_needs() -> None:
    assert Task(mlp()).mixes_examples()
    assert not Task(mlp("layer")).mixes_examples()
    assert not Task(mlp()).stochastic(torch.zeros(2, 5))
    assert Task(nn.Sequential(nn.Linear(5, 4), nn.Dropout(0.1))).stochastic(torch.zeros(2, 5))
    assert not Task(nn.Sequential(nn.Linear(5, 4), nn.Dropout(0.0))).stochastic(torch.zeros(2, 5))


# Many clients under vmap.


class Odd(nn.Module):
    """Parameters in operations that no shortcut knows: scaled, transposed, twice, on the wrong side."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.mix = nn.Parameter(torch.linspace(-1, 1, 25).view(5, 5))
        self.out = nn.Linear(5, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.scale * (x @ self.mix))
        x = x + F.linear(x, self.mix.t()) + torch.einsum("bi,ij->bj", x, self.mix)
        answer: Tensor = self.out(x)
        return answer


def tied() -> nn.Module:
    net = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5), nn.Linear(5, 3))
    net[2].weight = net[0].weight
    return net


MODULES: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: mlp("none"),
    "mlp-batch": mlp,
    "mlp-layer": lambda: mlp("layer"),
    "odd": Odd,
    "tied": tied,
    "cnn-batch": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 5)),
        nn.Conv1d(1, 4, 2),
        nn.BatchNorm1d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16, 3),
    ),
    "bilinear": lambda: nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), nn.PReLU(), nn.Linear(4, 3)),
}


@pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)
@pytest.mark.parametrize("shared_start", [False, True])
def test_clients_together_get_what_each_gets_alone(make: Callable[[], nn.Module], shared_start: bool) -> None:
    task = Task(make(), dtype=F64)
    trees = [
        {
            n: t + (0 if shared_start or not t.is_floating_point() else 0.1 * client)
            for n, t in task.initial.items()
        }
        for client in range(3)
    ]
    data = stack([batch(seed=client) for client in range(3)])
    axes = None if shared_start else 0
    together = torch.vmap(task.gradient, in_dims=(axes, 0))(trees[0] if shared_start else stack(trees), data)
    for client in range(3):
        alone = task.gradient(trees[client], row(data, client))
        for part, expected in zip(together, alone, strict=True):
            assert part.keys() == expected.keys()
            for name, each in expected.items():
                assert torch.allclose(part[name][client], each, rtol=1e-10, atol=1e-13), name


def test_images_together_get_what_each_gets_alone() -> None:
    config = DigitsCNNConfig(channels=(2, 2, 3), hidden=(6, 5))
    task = Task(build(config, sample=torch.zeros(1, 4, 4), outputs=3, seed=0), dtype=F64)
    trees = [{n: t * (1 + client) for n, t in task.initial.items()} for client in range(2)]
    data = {"x": randn(2, 4, 1, 4, 4), "y": torch.arange(8).view(2, 4) % 3}
    grads, metrics, buffers = torch.vmap(task.gradient)(stack(trees), data)
    for client in range(2):
        alone = task.gradient(trees[client], row(data, client))
        for part, expected in zip((grads, metrics, buffers), alone, strict=True):
            assert all(torch.allclose(part[n][client], e, rtol=1e-9, atol=1e-12) for n, e in expected.items())
