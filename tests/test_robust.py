"""Robust rules against ByzFL 0.0.11, by hand, and by what they must stand."""

from __future__ import annotations

import dataclasses
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hansa.core.errors import InputError
from hansa.core.reducer import Collect, RobustRule
from hansa.core.store import Round
from hansa.simulation.population import Population
from hansa.simulation.simulator import Simulator
from hansa.strategies.buffered import Buffered
from hansa.strategies.catalog import Federation, resolved
from hansa.strategies.favano import FAVANO
from hansa.strategies.fedasync import FedAsync
from hansa.strategies.fedavg import FedAvg
from hansa.strategies.gram import gram, nearest_neighbours
from hansa.strategies.periodic import Periodic
from hansa.strategies.robust import (
    CentredClipping,
    ColumnRule,
    GeometricMedian,
    GramRule,
    Krum,
    Meamed,
    Median,
    MultiKrum,
    TrimmedMean,
)

Rule = Callable[[Tensor], Tensor]


LINE = torch.tensor([[0.0], [1.0], [3.0], [7.0], [20.0]], dtype=torch.float64)


def updates(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(n, d)))


# ByzFL as oracle.


@pytest.fixture(scope="module")
def byzfl() -> Iterator[Any]:
    """The package without its benchmark, which wants torchvision and seaborn."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "byzfl.benchmark", types.ModuleType("byzfl.benchmark"))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            package = pytest.importorskip("byzfl")
        yield package


shapes = pytest.mark.parametrize(
    ("n", "f", "d"), [(5, 1, 1), (9, 2, 7), (10, 3, 40), (21, 9, 13), (4, 0, 3), (30, 8, 9_000)]
)
# ByzFL's Krum sums the distances to n − f vectors including the candidate itself, so to n − f − 1 others;
# the paper, and our default, to n − f − 2. Its clipping remembers its last verdict, so it is made anew.
PAIRS: dict[str, tuple[Callable[[int, int], RobustRule], Callable[[Any, int], Any]]] = {
    "krum": (lambda n, f: Krum(f=f, neighbours=n - f - 1), lambda byzfl, f: byzfl.Krum(f)),
    "multikrum": (lambda n, f: MultiKrum(f=f, neighbours=n - f - 1), lambda byzfl, f: byzfl.MultiKrum(f)),
    "median": (lambda n, f: Median(), lambda byzfl, f: byzfl.Median()),
    "trimmed_mean": (lambda n, f: TrimmedMean(f=f), lambda byzfl, f: byzfl.TrMean(f)),
    "meamed": (lambda n, f: Meamed(f=f), lambda byzfl, f: byzfl.Meamed(f)),
    "geometric_median": (
        lambda n, f: GeometricMedian(smoothing=0.1, iterations=3),
        lambda byzfl, f: byzfl.GeometricMedian(nu=0.1, T=3),
    ),
    "geometric_median_smooth": (
        lambda n, f: GeometricMedian(smoothing=2.5, iterations=7),
        lambda byzfl, f: byzfl.GeometricMedian(nu=2.5, T=7),
    ),
    "centred_clipping": (
        lambda n, f: CentredClipping(tau=1.5, iterations=4),
        lambda byzfl, f: byzfl.CenteredClipping(L=4, tau=1.5),
    ),
}
pairs = pytest.mark.parametrize("name", PAIRS)


@pairs
@shapes
def test_rules_are_byzfls(byzfl: Any, name: str, n: int, f: int, d: int) -> None:
    ours, theirs = PAIRS[name]
    for seed in range(5):
        x = updates(n, d, seed)
        verdict = theirs(byzfl, f)(x.numpy())
        np.testing.assert_allclose(ours(n, f)(x).numpy(), verdict, rtol=1e-9, atol=1e-12)


@pairs
@pytest.mark.parametrize(("n", "f", "d"), [(5, 1, 1), (9, 2, 7), (10, 3, 40), (21, 9, 13), (24, 5, 3_000)])
def test_rules_after_mixing_are_byzfls(byzfl: Any, name: str, n: int, f: int, d: int) -> None:
    ours, theirs = PAIRS[name]
    for seed in range(5):
        x = updates(n, d, seed)
        verdict = theirs(byzfl, f)(byzfl.NNM(f)(x.numpy()))
        mixed = dataclasses.replace(cast(GramRule | ColumnRule, ours(n, f)), nnm=f)
        np.testing.assert_allclose(mixed(x).numpy(), verdict, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["median", "trimmed_mean", "meamed"])
@pytest.mark.parametrize(("n", "f"), [(5, 2), (9, 1), (9, 4), (15, 3)])
def test_ties_within_a_column_are_byzfls(byzfl: Any, name: str, n: int, f: int) -> None:
    x = updates(n, 300).sign()  # many equals, and no two values equally far from the median on both sides
    ours, theirs = PAIRS[name]
    np.testing.assert_allclose(ours(n, f)(x).numpy(), theirs(byzfl, f)(x.numpy()), rtol=1e-12)


# By hand.


def test_krum_scores_by_hand() -> None:
    # On a line at 0, 1, 3, 7, 20 with f = 1 each score sums the squares to the 5 − 1 − 2 = 2 nearest.
    scores = torch.tensor([1 + 9, 1 + 4, 4 + 9, 16 + 36, 169 + 289], dtype=torch.float64)
    assert torch.allclose(Krum(f=1).scores(gram(LINE)), scores, rtol=1e-12)
    assert Krum(f=1)(LINE).tolist() == [1.0]
    assert MultiKrum(f=1, selected=3)(LINE).item() == pytest.approx((0 + 1 + 3) / 3, rel=1e-15)
    assert MultiKrum(f=1)(LINE).tolist() == [(0 + 1 + 3 + 7) / 4]  # n − f by default


def test_neighbours_are_mixed_by_hand() -> None:
    # Means of the 3 nearest of 0, 1, 3, 7, 20: three times {0, 1, 3}, then {1, 3, 7} and {3, 7, 20}.
    mixed = nearest_neighbours(gram(LINE), 2) @ LINE
    assert mixed[:, 0].tolist() == pytest.approx([4 / 3, 4 / 3, 4 / 3, 11 / 3, 10], rel=1e-15)
    assert Median(nnm=2)(LINE).item() == pytest.approx(4 / 3, rel=1e-15)
    assert Krum(f=1, nnm=2)(LINE).item() == pytest.approx(4 / 3, rel=1e-15)
    assert TrimmedMean(f=1, nnm=2)(LINE).item() == pytest.approx((4 / 3 + 4 / 3 + 11 / 3) / 3, rel=1e-15)


def test_meamed_by_hand() -> None:
    assert Meamed(f=1)(LINE).item() == (0 + 1 + 3 + 7) / 4  # the median is 3
    assert Meamed(f=2)(LINE).item() == (0 + 1 + 3) / 3
    assert Meamed(f=1)(torch.tensor([[0.0], [1.0], [2.0], [3.0], [4.0]])).item() == 1.5  # the lower of equals
    assert Meamed(f=1)(torch.tensor([[-9.0], [1.0], [2.0], [4.0]])).item() == pytest.approx(7 / 3)


def test_geometric_median_by_hand() -> None:
    exact = GeometricMedian(iterations=300)
    assert exact(LINE).item() == pytest.approx(3, abs=1e-3)  # on a line it is the median
    kite = torch.tensor([[2.0, 0.0], [-1.0, 0.0], [0.0, 5.0], [0.0, -1.0]], dtype=torch.float64)
    diagonals_meet = torch.tensor([7.0, -3.0], dtype=torch.float64)
    assert torch.allclose(exact(kite + diagonals_meet), diagonals_meet, atol=1e-6)
    # One step from 0: weights 1/1, 1/2, 1/4.
    step = GeometricMedian(iterations=1)(torch.tensor([[1.0, 0.0], [0.0, 2.0], [-4.0, 0.0]]))
    assert torch.allclose(step, torch.tensor([0.0, 1.0]) / 1.75)


def test_centred_clipping_by_hand() -> None:
    x = torch.tensor([[1.0], [2.0], [30.0]])
    assert CentredClipping(tau=3, iterations=1)(x).item() == pytest.approx((1 + 2 + 3) / 3)
    assert CentredClipping(tau=3, iterations=2)(x).item() == pytest.approx(2 + (-1 + 0 + 3) / 3)
    assert CentredClipping(tau=1e3, iterations=1)(x).item() == pytest.approx(11)  # nothing to clip: the mean


def test_krum_takes_the_first_of_equals() -> None:
    assert Krum(f=1)(torch.tensor([[9.0], [1.0], [1.0], [1.0], [1.0]])).tolist() == [1.0]
    same = torch.full((5, 3), 2.0)
    assert torch.equal(Krum(f=1)(same), same[0])


def test_median_and_trimmed_mean_by_hand() -> None:
    x = torch.tensor([[1.0, -9.0], [2.0, 5.0], [4.0, 6.0], [100.0, 7.0]])
    assert Median()(x).tolist() == [3.0, 5.5]
    assert TrimmedMean(f=1)(x).tolist() == [3.0, 5.5]
    assert TrimmedMean(f=0)(x).tolist() == [26.75, 2.25]
    assert Median()(x[:3]).tolist() == [2.0, 5.0]


# Invariances.

RULES: dict[str, GramRule | ColumnRule] = {
    "krum": Krum(f=2),
    "multikrum": MultiKrum(f=2),
    "median": Median(),
    "trimmed_mean": TrimmedMean(f=2),
    "meamed": Meamed(f=2),
    "geometric_median": GeometricMedian(iterations=30),
    "centred_clipping": CentredClipping(tau=3.0),
}
RULES |= {f"{name}-nnm": dataclasses.replace(rule, nnm=2) for name, rule in RULES.items()}
every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)


@every_rule
def test_order_of_clients_does_not_matter(rule: RobustRule) -> None:
    x = updates(9, 6)
    for seed in range(5):
        order = torch.from_numpy(np.random.default_rng(seed).permutation(9))
        assert torch.allclose(rule(x[order]), rule(x), rtol=1e-9, atol=1e-12)


@every_rule
def test_rules_tell_how_far_every_update_is_from_the_verdict(rule: GramRule | ColumnRule) -> None:
    x = updates(11, 70)
    x[4] += 30  # far away
    x[7, 3] = torch.nan
    verdict, told = rule.judge(x)
    assert torch.equal(verdict, rule(x))
    finite = torch.arange(11) != 7
    torch.testing.assert_close(
        told.distances[finite], (x[finite] - verdict).norm(dim=1), rtol=1e-6, atol=1e-6
    )
    assert told.distances[7] == torch.inf
    if isinstance(rule, GramRule):
        assert told.shares is not None
        assert told.shares[7] == 0
        torch.testing.assert_close(told.shares[finite] @ x[finite], verdict, rtol=1e-6, atol=1e-6)
    else:
        assert told.shares is None


@every_rule
def test_rules_move_with_their_updates(rule: RobustRule) -> None:
    x, shift, there = updates(9, 6), updates(1, 6, seed=1), rule
    if isinstance(rule, CentredClipping):  # to the end, where it does not matter that it starts from zero
        rule = dataclasses.replace(rule, iterations=3000)
        there = dataclasses.replace(rule, tau=3 * rule.tau)
    if isinstance(rule, GeometricMedian):
        rule = there = dataclasses.replace(rule, iterations=1000)
    assert torch.allclose(there(3 * x + 50 * shift), 3 * rule(x) + 50 * shift[0], rtol=1e-8)


@every_rule
def test_rules_mix_as_if_the_mixtures_were_stored(rule: GramRule | ColumnRule) -> None:
    x = updates(11, 70)
    nearest = torch.cdist(x, x).argsort(1)[:, : 11 - 3]
    stored = torch.stack([x[each].mean(0) for each in nearest])
    plain = dataclasses.replace(rule, nnm=None)
    assert torch.allclose(dataclasses.replace(rule, nnm=3)(x), plain(stored), rtol=1e-9)


@every_rule
def test_equal_updates_are_the_verdict(rule: RobustRule) -> None:
    assert torch.allclose(rule(torch.full((9, 4), 0.3)), torch.full((4,), 0.3))
    assert torch.equal(rule(torch.zeros(9, 4)), torch.zeros(4))


# What f Byzantine updates may do.

lies = st.sampled_from([0.0, 1.0, -5.0, 1e3, -1e6, 1e12, 1e25, -3e38, np.nan, np.inf, -np.inf])


@every_rule
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@settings(derandomize=True, deadline=None, database=None, max_examples=80)
@given(
    values=st.lists(st.lists(lies, min_size=5, max_size=5), min_size=2, max_size=2), seed=st.integers(0, 99)
)
def test_f_arbitrary_updates_cannot_leave_the_honest_range(
    rule: RobustRule, dtype: torch.dtype, values: list[list[float]], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    x = torch.from_numpy(rng.normal(size=(9, 5))).to(dtype)
    bad = rng.permutation(9)[:2]
    x[bad] = torch.tensor(values, dtype=dtype)
    honest = x[np.setdiff1d(np.arange(9), bad)]
    verdict = rule(x)
    assert verdict.isfinite().all()
    if isinstance(rule, Median | TrimmedMean | Meamed) and rule.nnm is None:
        assert (verdict >= honest.min(0).values - 1e-6).all()
        assert (verdict <= honest.max(0).values + 1e-6).all()
    else:  # a lie that is chosen lies no farther out than honest updates do
        assert (verdict - honest.mean(0)).norm() <= 3 * torch.cdist(honest, honest).max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("huge", [1e6, 1e15, 1e30])
def test_one_huge_lie_does_not_hide_another(dtype: torch.dtype, huge: float) -> None:
    x = updates(9, 20).to(dtype)
    x[0] = huge  # would drown all other distances in rounding, or overflow
    x[1] = x[2:].mean(0) + 100
    assert int(Krum(f=2).scores(gram(x)).argsort()[-2:].sum()) == 0 + 1
    assert (MultiKrum(f=2)(x) - x[2:].mean(0)).abs().max() < 1e-5
    assert (x[2:] == Krum(f=2)(x)).all(1).any()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_updates_that_are_not_finite_are_never_chosen(bad: float) -> None:
    x = updates(9, 4)
    x[[0, 5], 2] = bad
    rest = x[[1, 2, 3, 4, 6, 7, 8]]
    assert torch.allclose(MultiKrum(f=2)(x), rest.mean(0))
    assert (rest == Krum(f=2)(x)).all(1).any()


@pytest.mark.parametrize("neighbours", [4, 6, 50])
def test_more_neighbours_than_there_are_honest_ones_do_not_open_the_door(neighbours: int) -> None:
    """A round may bring fewer updates than were asked for: no score may hang on a liar for lack of others."""
    x = updates(7, 4)
    x[0] = np.nan
    assert (x[1:] == Krum(f=1, neighbours=neighbours)(x)).all(1).any()
    x[0] = 1e9
    assert (x[1:] == Krum(f=1, neighbours=neighbours)(x)).all(1).any()
    assert torch.allclose(MultiKrum(f=1, selected=7, neighbours=neighbours)(x), x[1:].mean(0))


@pytest.mark.parametrize("tau", [0.5, 2.0, 30.0])
def test_f_lies_move_one_clipping_by_no_more_than_their_share(tau: float) -> None:
    once, x = CentredClipping(tau=tau, iterations=1), updates(12, 30)
    silent = x.clone()
    silent[:3] = np.nan  # moves nothing
    for lie in (x[3], -1000 * x.mean(0), x.new_full((30,), 1e20)):
        x[:3] = lie
        assert (once(x) - once(silent)).norm() <= tau * 3 / 12 * (1 + 1e-9)


@pytest.mark.parametrize("f", [1, 3, 5])
def test_geometric_median_stands_almost_half(f: int) -> None:
    # The sum of distances is no larger at the minimum, R from the honest mean, than at that mean, to which
    # honest updates are no farther than r: (n − f)(R − 2r) − f R ≤ 0.
    x = updates(12, 30)
    honest = x[f:]
    radius = (honest - honest.mean(0)).norm(dim=1).max()
    for lie in (-10 * honest.mean(0), x.new_full((30,), 1e6), x.new_full((30,), 1e20)):
        x[:f] = lie
        verdict = GeometricMedian()(x)
        assert (verdict - honest.mean(0)).norm() <= 2 * (12 - f) / (12 - 2 * f) * radius


@every_rule
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_one_number_that_is_not_finite_spoils_nothing(rule: GramRule | ColumnRule, bad: float) -> None:
    x = updates(9, 4)
    x[[0, 5], 2] = bad
    verdict = rule(x)
    assert verdict.isfinite().all()
    assert (verdict - x[[1, 2, 3, 4, 6, 7, 8]].mean(0)).norm() <= 3


def test_the_fewest_updates_are_told() -> None:
    fewest = [rule.minimum for rule in RULES.values()]
    assert fewest == [7, 7, 1, 5, 5, 1, 1, 7, 7, 5, 5, 5, 5, 5]
    assert Krum(f=1, nnm=3).minimum == 7


@pytest.mark.parametrize(
    "make",
    [
        lambda: Krum(f=-1),
        lambda: TrimmedMean(f=-1),
        lambda: MultiKrum(f=1, selected=0),
        lambda: Krum(f=1, neighbours=0),
        lambda: Meamed(f=-1),
        lambda: Median(nnm=-1),
        lambda: GeometricMedian(smoothing=0.0),
        lambda: GeometricMedian(iterations=0),
        lambda: CentredClipping(tau=0.0),
        lambda: CentredClipping(tau=float("nan")),
        lambda: CentredClipping(tau=1.0, iterations=0),
    ],
)
def test_impossible_rules_are_refused(make: Callable[[], object]) -> None:
    with pytest.raises(InputError, match="aggregation"):
        make()


# In a run.

RECALLED = {"name": "periodic", "interval": 3.0, "recall": 5}


def test_a_step_that_lost_too_many_for_its_rule_waits(digits: Callable[..., Federation]) -> None:
    federation = digits(aggregation={"rule": "trimmed_mean", "f": 2}, schedule=RECALLED)
    folded: list[int] = []

    def count(done: Round) -> None:
        folded.append(sum(job.outcome == "folded" for job in done.participants))

    devices = Population(speeds="uniform", spread=4.0, dropout=0.5, recovery=2.0)
    ending = Simulator(federation, devices, on_round=count).run()
    assert min(folded) >= 5
    assert all(each.isfinite().all() for each in ending.params.values())


def test_more_updates_than_there_are_clients_are_refused(digits: Callable[..., Federation]) -> None:
    with pytest.raises(InputError, match=r"partition\.clients = 4"):
        digits(
            aggregation={"rule": "trimmed_mean", "f": 2},
            schedule=RECALLED,
            partition={"kind": "iid", "clients": 4},
        )


def test_mixing_counts_among_the_updates_that_a_rule_needs(digits: Callable[..., Federation]) -> None:
    with pytest.raises(InputError, match=r"^aggregation\.nnm = 3: .* 7 updates.*smaller nnm"):
        digits(aggregation={"rule": "median", "nnm": 3}, schedule={"name": "rounds", "cohort": 6})


@pytest.mark.parametrize(
    "aggregation",
    [
        {"rule": "meamed", "f": 1},
        {"rule": "geometric_median"},
        {"rule": "centred_clipping", "tau": 1.0},
        {"rule": "median", "nnm": 1},
        {"rule": "krum", "f": 1, "nnm": 1},
    ],
    ids=str,
)
def test_recipes_name_every_rule(aggregation: dict[str, Any], digits: Callable[..., Federation]) -> None:
    federation = digits(aggregation=aggregation, schedule={"name": "rounds", "cohort": 6})
    ending = Simulator(federation, Population()).run()
    start = federation.task.initial
    assert any(not torch.equal(ending.params[name], start[name]) for name in start)
    assert all(each.isfinite().all() for each in ending.params.values())
    assert resolved(federation.recipe).aggregation.items() >= aggregation.items()


@pytest.mark.parametrize(
    ("kind", "schedule"),
    [(FedAsync, Buffered(k=3, concurrency=3)), (FAVANO, Periodic(interval=2.0, recall=3))],
)
def test_clipping_leaves_a_model_alone_that_no_client_changes(
    kind: type[FedAvg], schedule: Any, quadratic: Callable[..., Federation]
) -> None:
    # They send models, at norm 50: clipped around zero, the server's would shrink in every step.
    algorithm = kind(reducer=Collect(rule=CentredClipping(tau=0.1)))
    goal = [[30.0, 40.0]] * 3
    federation = quadratic(algorithm, [1, 1, 1], goal, start=goal[0], schedule=schedule)
    assert Simulator(federation).run().params["w"].tolist() == goal[0]


def test_clipping_takes_running_statistics_for_changes_of_the_servers(
    digits: Callable[..., Federation],
) -> None:
    clipped = digits(aggregation={"rule": "centred_clipping", "tau": 1e-6}, stop={"rounds": 3})
    for name, start in clipped.task.initial.items():
        if name.endswith("running_var"):
            assert (start == 1).all()
            torch.testing.assert_close(Simulator(clipped).run().params[name], start, rtol=0, atol=1e-5)
