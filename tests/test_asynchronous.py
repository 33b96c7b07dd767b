"""Asynchronous schemes worked by hand: three clients, ``½ (w − b_i)²`` with b = 1, −1, 4, halving steps.

A step of client i from x changes w by (b_i − x)/2. Clients 0, 1, 2 take 1, 1.5 and 2.5 seconds for a job;
when each restarts at once they return in the order 0 (t = 1), 1 (1.5), 0 (2, sent version 1), 2 (2.5).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from replay import Replay, recorded

from hansa.core.algorithm import Algorithm, Report
from hansa.core.errors import InputError
from hansa.core.recipe import parse
from hansa.core.schedule import Schedule, Stopping
from hansa.core.store import Round
from hansa.core.task import LocalSGD, LocalWork
from hansa.core.weights import Weights
from hansa.simulation.population import Population
from hansa.simulation.simulator import Simulator
from hansa.strategies.anarchic import AFACD, AFACS
from hansa.strategies.backup import Backup, BackupProgress
from hansa.strategies.buffered import Buffered
from hansa.strategies.catalog import Federation, assemble, parts
from hansa.strategies.co2 import CO2
from hansa.strategies.favano import FAVANO
from hansa.strategies.fedasync import FedAsync
from hansa.strategies.fedavg import FedAvg
from hansa.strategies.fedbuff import FedBuff
from hansa.strategies.frequencies import frequencies
from hansa.strategies.luq import quantise
from hansa.strategies.periodic import Periodic
from hansa.strategies.rounds import Rounds

Quadratic = Callable[..., Federation]
ROUNDING = 1e-12
B = (1.0, -1.0, 4.0)
SECONDS = (1.0, 1.5, 2.5)


@dataclass(frozen=True, kw_only=True)
class Paced(Population):
    """Devices whose local steps take so many seconds."""

    seconds: tuple[float, ...]

    def slowness(self, seed: int, client: int) -> float:
        return self.seconds[client]


def arriving(k: int = 1, steps: int = 4) -> Buffered:
    return Buffered(stop=Stopping(rounds=steps), k=k, concurrency=3)


@pytest.fixture
def models(quadratic: Quadratic) -> Callable[..., list[float]]:
    """``models(algorithm, schedule, ...)``: w after every step, in the simulator and on a coordinator."""

    def run(
        algorithm: Algorithm,
        schedule: Schedule,
        *,
        seconds: Sequence[float] = SECONDS,
        again: bool = True,
        **more: Any,
    ) -> list[float]:
        federation = quadratic(
            algorithm, (1.0,) * 3, [[b] for b in B], local=LocalSGD(lr=0.5), schedule=schedule, **more
        )
        found: list[float] = []
        rounds: list[Round] = []

        def record(done: Round) -> None:
            rounds.append(done)
            found.append(float(simulator.hub.model()["w"]))

        simulator = Simulator(federation, Paced(seconds=tuple(seconds)), on_round=record)
        simulator.run()
        if again:
            replay = Replay(federation, recorded(rounds), rounds[-1].time)
            played = [float(each["w"]) for each in replay.models]
            np.testing.assert_allclose(played, found, rtol=ROUNDING, atol=1e-15)
        return found

    return run


Models = Callable[..., list[float]]


def uniform(**more: Any) -> Weights:
    return Weights(target="uniform", **more)


# FedAsync.


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        # Staleness 0, 1, 1, 3; the clients' models are ½, −½, (1 + x₁)/2 and 2.
        # s = 1/(1 + τ): α is ½, ¼, ¼, ⅛. x = ¼; ¼ − ¾/4; 1/16 + (5/8 − 1/16)/4; 13/64 + (2 − 13/64)/8.
        (uniform(staleness="polynomial", exponent=1.0), [1 / 4, 1 / 16, 13 / 64, 219 / 512]),
        # s = 1, always: x = ¼; ¼ − ⅜; −⅛ + (5/8 + 1/8)/2; ¼ + (2 − ¼)/2.
        (uniform(), [1 / 4, -1 / 8, 1 / 4, 9 / 8]),
        # s = 1 up to τ = 1, then 1/(1 + 2 (τ − 1)): only the last is discounted, to 1/5.
        (uniform(staleness="hinge", slope=2.0, after=1.0), [1 / 4, -1 / 8, 1 / 4, 1 / 4 + 0.1 * 7 / 4]),
    ],
)
def test_fedasync_by_hand(models: Models, weights: Weights, expected: list[float]) -> None:
    found = models(FedAsync(server_lr=0.5, mu=0.0, weights=weights), arriving())
    np.testing.assert_allclose(found, expected, rtol=ROUNDING)


def test_fedasync_that_replaces_the_model_is_fedbuff_of_one_in_a_lonely_federation(
    quadratic: Quadratic,
) -> None:
    """K = 1, s = 1, α = 1, η_g = 1: without staleness both put the client's model in the server's place."""
    made = [
        quadratic(
            algorithm,
            (1.0,),
            [[3.0]],
            local=LocalSGD(lr=0.3),
            schedule=Buffered(stop=Stopping(rounds=5), k=1, concurrency=1),
        )
        for algorithm in (FedAsync(server_lr=1.0, mu=0.0), FedBuff(), FedBuff(weights=uniform()))
    ]
    ends = [float(Simulator(each).run().params["w"]) for each in made]
    assert ends == pytest.approx([3 * (1 - 0.7**5)] * 3, rel=ROUNDING)


# FedBuff against the formulas of the authors' simulator and of the weighting theory.


def flsim(changes: Sequence[float], staleness: Sequence[int], exponent: float, server_lr: float) -> float:
    """FLSim's buffer: WEIGHTED_SUM, weights (1 + τ)^−e over their value at the average staleness of 1."""
    weights = [float(((1 + age) / 2) ** -exponent) for age in staleness]
    return server_lr * sum(w * change for w, change in zip(weights, changes, strict=True))


@pytest.mark.parametrize("exponent", [0.5, 1.0])
def test_fedbuff_is_flsim_with_the_server_step_that_its_sum_lacks(models: Models, exponent: float) -> None:
    """K = 2: {0, 1} fresh; then 0, which restarted before the step, and 2, both from version 0 (τ = 1)."""
    weights = uniform(staleness="polynomial", exponent=exponent)
    found = models(FedBuff(server_lr=0.8, weights=weights), arriving(k=2, steps=2))
    theirs = 0.8 / 2 * 2**-exponent  # η_g / K, without the normalisation
    first = flsim([0.5, -0.5], [0, 0], exponent, theirs)
    second = first + flsim([0.5, 2.0], [1, 1], exponent, theirs)
    np.testing.assert_allclose(found, [first, second], rtol=ROUNDING, atol=1e-15)


def test_unbiased_fedbuff_by_hand(models: Models) -> None:
    """d_i = p_i/f_i with f_i = 2 τ_i⁻¹/Σ τ_j⁻¹: 1/τ is 1, 2/3, 2/5, their sum 31/15."""
    schedule = arriving(k=2, steps=2)
    f = frequencies(schedule, SECONDS)
    assert f == pytest.approx([30 / 31, 20 / 31, 12 / 31], rel=ROUNDING)
    found = models(FedAvg(weights=uniform(frequency="known", frequencies=f)), schedule)
    d = [31 / 90, 31 / 60, 31 / 36]
    first = d[0] * 0.5 - d[1] * 0.5
    np.testing.assert_allclose(found, [first, first + d[0] * 0.5 + d[2] * 2.0], rtol=ROUNDING)


# Asynchronous FedAvg and FedFix.


def test_asynchronous_fedavg_by_hand(models: Models) -> None:
    """d_i = p_i τ_i Σ τ_j⁻¹."""
    schedule = arriving()
    f = frequencies(schedule, SECONDS)
    found = models(FedAvg(weights=uniform(frequency="known", frequencies=f)), schedule)
    d = [seconds * (31 / 15) / 3 for seconds in SECONDS]
    one = d[0] * 0.5
    two = one - d[1] * 0.5
    three = two + d[0] * (1 - one) / 2
    np.testing.assert_allclose(found, [one, two, three, three + d[2] * 2], rtol=ROUNDING)


@pytest.mark.parametrize("knowledge", ["known", "estimated"])
def test_fedfix_by_hand(models: Models, knowledge: str) -> None:
    """Δt = 1: d_i = ⌈τ_i/Δt⌉ p_i = 1/3, 2/3, 1. Ticks see {0}, {0, 1}, {0, 2}; who returned restarts there.

    Counted up to the step, the frequencies of these first returns are the same: 1, 1/2, 1/3.
    """
    schedule = Periodic(stop=Stopping(rounds=3), interval=1.0)
    f = frequencies(schedule, SECONDS) if knowledge == "known" else ()
    found = models(FedAvg(weights=uniform(frequency=knowledge, frequencies=f)), schedule)
    one = 1 / 3 * 0.5
    two = one + 1 / 3 * (1 - one) / 2 - 2 / 3 * 0.5
    three = two + 1 / 3 * (1 - two) / 2 + 1 * 2.0
    np.testing.assert_allclose(found, [one, two, three], rtol=ROUNDING)


def test_a_window_that_holds_everybody_is_synchronous_fedavg(models: Models) -> None:
    schedule = Periodic(stop=Stopping(rounds=4), interval=2.5)
    f = frequencies(schedule, SECONDS)
    assert f == (1.0, 1.0, 1.0)
    fixed = models(FedAvg(weights=Weights(frequency="known", frequencies=f)), schedule, examples=(1, 2, 3))
    plain = models(FedAvg(), Rounds(stop=Stopping(rounds=4), cohort=3), examples=(1, 2, 3))
    np.testing.assert_allclose(fixed, plain, rtol=ROUNDING)


# Anarchic federated averaging: client i does i + 1 steps, in the times above.

ANARCHIC: dict[str, Any] = {
    "examples": (1, 2, 3),
    "work": LocalWork(epochs=1, batch_size=1),
    "seconds": [seconds / steps for seconds, steps in zip(SECONDS, (1, 2, 3), strict=True)],
}


def test_afa_cd_by_hand(models: Models) -> None:
    """Means over steps of the way: (b − x)/2, 3/8 (b − x), 7/24 (b − x)."""
    found = models(AFACD(), arriving(), **ANARCHIC)
    np.testing.assert_allclose(found, [1 / 2, 1 / 8, 3 / 8, 3 / 8 + 7 / 6], rtol=ROUNDING)


def test_afa_cs_by_hand(models: Models) -> None:
    """Every step goes by a third of the sum of all latest: ½; then −⅜; then 5/12 for ½; then 7/6."""
    found = models(AFACS(), arriving(), **ANARCHIC)
    one = 1 / 6
    two = one + (1 / 2 - 3 / 8) / 3
    three = two + (5 / 12 - 3 / 8) / 3
    four = three + (5 / 12 - 3 / 8 + 7 / 6) / 3
    np.testing.assert_allclose(found, [one, two, three, four], rtol=ROUNDING)


def test_afa_cs_holds_the_mean_of_what_all_clients_said_last(quadratic: Quadratic) -> None:
    schedule = Buffered(stop=Stopping(rounds=30), k=2, concurrency=3)
    federation = quadratic(
        AFACS(server_lr=0.3), (1.0, 2.0, 0.5), [[b, -b] for b in B], local=LocalSGD(lr=0.2), schedule=schedule
    )
    simulator = Simulator(federation, Population(speeds="uniform", spread=6.0))
    simulator.run()
    # Every arrived update was folded, but those that wait in the buffer.
    waiting = {client for client, reports in simulator.hub._reports.items() if reports}
    assert len(waiting) <= 1
    said = torch.stack([simulator.private(client)["memory/w"] for client in range(3)])
    assert not waiting
    torch.testing.assert_close(simulator.hub.state.slots["memory"]["w"], said.mean(0))


@pytest.mark.parametrize(
    ("algorithm", "rates", "within"),
    [(AFACD(server_lr=0.04), (9.0, 1.0, 1.0), 0.1), (AFACS(server_lr=0.04), (1.0, 1.0, 1.0), 0.03)],
)
def test_nine_arrivals_to_one_bias_afa_cd_and_not_afa_cs(
    models: Models, algorithm: AFACD, rates: Sequence[float], within: float
) -> None:
    """Where it ends up: the mean of the minima weighted by arrivals, or the plain mean."""
    found = np.mean(models(algorithm, arriving(steps=1200), seconds=(1.0, 9.0, 9.0), again=False)[-500:])
    assert found == pytest.approx(np.array(rates) @ B / sum(rates), abs=within)


# FAVANO.


def test_favano_by_hand(models: Models) -> None:
    """All three contacted every 2 seconds: they have done 2, 1 and 0 of at most 4 steps.

    α is 2, 1 and nothing: the first contributes half of its ¾ of the way, the second its ½, the third where
    it started; the server's own model is a fourth part.
    """
    work = LocalWork(steps=4, batch_size=1)
    for reweighting in ("deterministic", "stochastic"):
        schedule = Periodic(stop=Stopping(rounds=2), interval=2.0, recall=3)
        found = models(FAVANO(reweighting=reweighting), schedule, work=work)
        one = (0 + 3 / 8 - 1 / 2 + 0) / 4
        two = one + (3 / 8 * (1 - one) + 1 / 2 * (-1 - one)) / 4
        np.testing.assert_allclose(found, [one, two], rtol=ROUNDING)
    plain = models(
        FAVANO(reweighting="none"), Periodic(stop=Stopping(rounds=1), interval=2.0, recall=3), work=work
    )
    np.testing.assert_allclose(plain, [(0 + 3 / 4 - 1 / 2 + 0) / 4], rtol=ROUNDING)


@pytest.mark.parametrize(
    ("reweighting", "floor", "alphas"),
    [
        # Contacts that find 2, 0, 1 and 4 steps: means 2, 1, 1, 7/4.
        ("deterministic", 0.1, (2.0, 1.0, 1.0, 1.75)),
        # Shares of contacts with work 1, ½, ⅔, ¾ times the steps; of no steps, the floor of nothing.
        ("stochastic", 0.1, (2.0, 0.1, 2 / 3, 3.0)),
        ("stochastic", 1.0, (2.0, 1.0, 1.0, 3.0)),
        ("none", 0.1, (1.0, 1.0, 1.0, 1.0)),
    ],
)
def test_favano_counts_what_it_divides_by(
    quadratic: Quadratic, reweighting: Any, floor: float, alphas: Sequence[float]
) -> None:
    algorithm = FAVANO(reweighting=reweighting, floor=floor)
    schedule = Periodic(recall=1)
    task = quadratic(algorithm, (1.0,), [[1.0]], schedule=schedule).task
    private = algorithm.private(task)
    for steps, alpha in zip((2, 0, 1, 4), alphas, strict=True):
        carry = algorithm.begin(task, {"w": torch.tensor([5.0], dtype=task.dtype)}, private, "train")
        carry["work"]["steps"] = torch.tensor(float(steps), dtype=task.dtype)
        carry["params"] = {"w": torch.tensor([6.0], dtype=task.dtype)}
        update, private = algorithm.finish(task, carry, "train")
        assert float(update["w"]) == pytest.approx(5 + 1 / alpha, rel=ROUNDING)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_quantised_numbers_are_few_and_right_on_average(bits: int) -> None:
    draws = 4_000
    x = torch.tensor([3.0, -1.3, 0.7, 0.011, 0.0, -0.0002], dtype=torch.float64)
    normal = torch.randn(draws, len(x), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = torch.vmap(lambda n: quantise(x, n, bits))(normal)
    assert len(set(found.abs().flatten().tolist())) <= 2 ** (bits - 1)
    assert (found * x >= 0).all()
    deviation = found.std(0) / draws**0.5
    assert ((found.mean(0) - x).abs() <= 4 * deviation + 1e-15).all()
    assert (found[:, 0] == 3.0).all()


# CO2.


@pytest.mark.parametrize(
    ("algorithm", "expected"),
    [
        # The mean update at x is (4/3 − x)/2, and comes a round late: nothing, ⅔, ½·⅔ + ⅔, ½·1 + ⅓.
        (CO2(momentum=0.5, penalty=0.0), [0, 2 / 3, 5 / 3, 5 / 2]),
        (CO2(momentum=0.5, penalty=0.0, clip=0.75), [0, 2 / 3, 17 / 12, 17 / 12 + 3 / 8 + 1 / 3]),
        # Round 3: x has gone ⅔ since, as far as the update itself, so λ = 2: m = ⅓ + ⅓. Round 4: gone ⅔
        # again, and the update of x₂ = ⅔ is ⅓: λ = 3, m = ⅓ + 1/9.
        (CO2(momentum=0.5, penalty=1.0), [0, 2 / 3, 4 / 3, 4 / 3 + 4 / 9]),
    ],
)
def test_co2_by_hand(models: Models, algorithm: CO2, expected: list[float]) -> None:
    found = models(algorithm, Rounds(stop=Stopping(rounds=4), cohort=3))
    np.testing.assert_allclose(found, expected, rtol=ROUNDING, atol=1e-15)


def test_an_overlapped_round_takes_the_longer_of_computing_and_communicating(quadratic: Quadratic) -> None:
    def seconds(algorithm: Algorithm, latency: float) -> float:
        federation = quadratic(algorithm, (1.0,), [[1.0]], rounds=10, work=LocalWork(steps=4, batch_size=1))
        return Simulator(federation, Population(latency=latency)).run().time

    for latency in (0.5, 3.0):  # a trip each way, and four seconds of work
        assert seconds(FedAvg(), latency) == pytest.approx(10 * (4 + 2 * latency))
        assert seconds(CO2(), latency) == pytest.approx(10 * max(4, 2 * latency))


# Dynamic backup workers.


def learnt(**more: Any) -> BackupProgress:
    known: dict[str, Any] = {
        "times": ((1.0,), (2.0,), (9.0,)),
        "powers": (1.0,),
        "variances": (3.0,),
        "bends": ((1.0, 1.0),),
    }
    return BackupProgress(seed=0, **{**known, **more})


def test_backup_takes_the_largest_gain_per_second() -> None:
    """h = 1: gain(k) = 1 − ½ (1 + 3/k) = −1, −¼, 0 for the mean: none gains, so all are waited for."""
    schedule = Backup(cohort=3)
    assert schedule.choice(learnt()) == 3
    # Bend ½: gains 0, 3/8, ½; per second 0, 3/16, 1/18.
    assert schedule.choice(learnt(bends=((0.5, 1.0),))) == 2
    # Bend 0: gains 1, per second 1, ½, 1/9. A robust rule asks for two.
    assert schedule.choice(learnt(bends=((0.0, 1.0),))) == 1
    assert Backup(cohort=3, minimum=2).choice(learnt(bends=((0.0, 1.0),))) == 2
    # Steps k/3 as long: gains 1/3, 2/3, 1 less ¼ (k²/9)(1 + 3/k): 2/9, 7/18, ½; per second 2/9, 7/36, 1/18.
    assert Backup(cohort=3, proportional=True).choice(learnt(bends=((0.5, 1.0),))) == 1
    # Nothing is known of the third, who never came.
    assert schedule.choice(learnt(bends=((0.5, 1.0),), times=((1.0,), (2.0,)))) == 2
    assert schedule.choice(BackupProgress(seed=0)) == 3


def test_backup_by_hand(quadratic: Quadratic) -> None:
    """b = 8, 1, 9; 4, 4.1 and 6 seconds; h = ½. Two rounds of all, then two of them, then the first alone.

    Round 1 from 0: updates 4, ½, 9/2, their mean 3, V = 19/4, N = 9 − V/3 = 89/12; the loss was 73/3.
    Round 2 from 3: 5/2, −1, 3, mean 3/2, V = 19/4, N = 9/4 − V/3 = ⅔; the loss was 65/6. So the first step
    gained 27/2 where a plane gives N/h = 89/6: 4/3 short, at a cost of (N + V/3)/2 = 9/2, and L = 8/27.
    Round 3: N = 97/24 and V = 19/4 on average, gain(k) = 97/12 − 4/27 (97/24 + 19/4k) = 6.78, 7.13, 7.25, per
    second 1.695, 1.740, 1.208: k = 2. From 9/2: 7/4, −7/4, mean 0, V = 49/8, N = −V/2; the loss was 49/8. The
    second step gained 113/24 where a plane gives 4/3: −27/8 short at a cost of 9/8, and L = 0.
    Round 4: N > 0 on average and no bend: all k gain alike, so the first to come is the best per second.
    """
    rounds: list[Round] = []
    models: list[float] = []
    schedule = Backup(stop=Stopping(rounds=4), cohort=3, step_size=0.5)
    federation = quadratic(
        FedAvg(), (1.0,) * 3, [[8.0], [1.0], [9.0]], local=LocalSGD(lr=0.5), schedule=schedule
    )

    def record(done: Round) -> None:
        rounds.append(done)
        models.append(float(simulator.hub.model()["w"]))

    simulator = Simulator(federation, Paced(seconds=(4.0, 4.1, 6.0)), on_round=record)
    simulator.run()
    replay = Replay(federation, recorded(rounds), rounds[-1].time)
    for made, found, hub in (
        (rounds, models, simulator.hub),
        (replay.rounds, [float(each["w"]) for each in replay.models], replay.machine.hub),
    ):
        folded = [[p.client for p in done.participants if p.outcome == "folded"] for done in made]
        assert folded == [[0, 1, 2], [0, 1, 2], [0, 1], [0]]
        assert [done.time for done in made] == pytest.approx([6.0, 12.0, 16.1, 20.1])
        np.testing.assert_allclose(found, [3.0, 4.5, 4.5, 6.25], rtol=ROUNDING)
        learnt: Any = hub._progress
        np.testing.assert_allclose(learnt.powers[:3], [89 / 12, 2 / 3, -49 / 16], rtol=ROUNDING)
        np.testing.assert_allclose(learnt.variances[:3], [19 / 4, 19 / 4, 49 / 8], rtol=ROUNDING)
        np.testing.assert_allclose(learnt.bends[:2], [(4 / 3, 9 / 2), (-27 / 8, 9 / 8)], rtol=ROUNDING)


def test_backup_reads_times_and_smoothness_off_the_rounds(quadratic: Quadratic) -> None:
    """One client in two is 100 times slower and has the same minimum: after the first rounds nobody waits."""
    rounds: list[Round] = []
    schedule = Backup(stop=Stopping(rounds=12), cohort=4, window=4)
    federation = quadratic(FedAvg(), (1.0,) * 4, [[2.0]] * 4, local=LocalSGD(lr=0.1), schedule=schedule)
    simulator = Simulator(federation, Paced(seconds=(1.0, 1.0, 100.0, 100.0)), on_round=rounds.append)
    simulator.run()
    folded = [sum(each.outcome == "folded" for each in done.participants) for done in rounds]
    assert folded[0] == 4
    assert folded[-1] <= 2
    assert rounds[-1].time < 12 * 100 / 3


def test_backup_is_refused_with_two_phases_and_over_selection() -> None:
    with pytest.raises(InputError, match=r"schedule\.over_selection"):
        Backup(over_selection=1.3)
    with pytest.raises(InputError, match="several phases"):
        parts(parse({"algorithm": {"name": "selective"}, "schedule": {"name": "backup"}}))


# Weights.


def report(client: int = 0, staleness: int = 0, **more: Any) -> Report:
    return Report(client, 0, "train", more.pop("examples", 6), 1, staleness, 0.0, 1.0, **more)


def test_weights_are_share_times_freshness_over_frequency() -> None:
    weights = Weights(frequency="estimated", staleness="polynomial", exponent=1.0)
    assert weights.of(report(staleness=1, share=0.25, frequency=0.1)) == pytest.approx(1.25)
    assert Weights().of(report()) == 6.0
    assert uniform(max_staleness=2).of(report(staleness=2)) == 1.0
    assert uniform(max_staleness=2).of(report(staleness=3)) == 0.0
    # Relative weights: Σ n s/Σ n = (6 · 1 + 2 · ½)/8.
    mixed = Weights(staleness="polynomial", exponent=1.0)
    assert mixed.mass([report(), report(staleness=1, examples=2)]) == pytest.approx(7 / 8)


def test_a_step_of_updates_that_are_too_old_only_counts(models: Models) -> None:
    found = models(FedBuff(weights=uniform(max_staleness=1)), arriving())
    assert found[3] == found[2]  # client 2 missed three steps
    assert found[0] != found[1] != found[2]


def test_shares_by_examples_are_those_of_the_population(models: Models) -> None:
    """Estimated with all clients in every step, p_i = n_i/Σ n and f_i = 1: synchronous FedAvg."""
    rounds = Rounds(stop=Stopping(rounds=3), cohort=3)
    counted = models(FedAvg(weights=Weights(frequency="estimated")), rounds, examples=(1, 2, 3))
    np.testing.assert_allclose(counted, models(FedAvg(), rounds, examples=(1, 2, 3)), rtol=ROUNDING)


STEPS = 400


@pytest.mark.parametrize(
    ("schedule", "deviations"),  # 4 standard errors of a count where clients are drawn, else half a count
    [
        (Buffered(stop=Stopping(rounds=STEPS), k=3, concurrency=12), 0.1),
        (Buffered(stop=Stopping(rounds=STEPS), k=3, concurrency=5), 4.0),
        (Periodic(stop=Stopping(rounds=STEPS), interval=2.0), 0.1),
        (Periodic(stop=Stopping(rounds=STEPS), interval=2.0, recall=3), 4.0),
        (Rounds(stop=Stopping(rounds=STEPS), cohort=3), 4.0),
    ],
)
def test_known_frequencies_match_what_happens(
    quadratic: Quadratic, schedule: Schedule, deviations: float
) -> None:
    seconds = tuple(np.random.default_rng(3).uniform(1.0, 8.0, 12))
    federation = quadratic(FedAvg(server_lr=0.0), (1.0,) * 12, [[0.0]] * 12, schedule=schedule)
    counts = np.zeros(12)

    def count(done: Round) -> None:
        for each in done.participants:
            counts[each.client] += 1

    Simulator(federation, Paced(seconds=seconds), on_round=count).run()
    expected = np.array(frequencies(schedule, seconds)) * STEPS
    assert (np.abs(counts - expected) <= 1 + deviations * np.sqrt(expected)).all()


# Refusals.


@pytest.mark.parametrize(
    ("sections", "named"),
    [
        ({"algorithm": {"name": "fedasync", "server_lr": 1.2}}, "algorithm.server_lr"),
        ({"algorithm": {"name": "fedasync"}, "weights": {"frequency": "estimated"}}, "weights.frequency"),
        ({"weights": {"frequency": "known"}}, "weights.seconds"),
        ({"weights": {"seconds": [1.0]}}, "weights.seconds"),
        ({"weights": {"frequency": "known", "seconds": [1.0, 0.0]}}, "weights.seconds"),
        ({"weights": {"max_staleness": -1}}, "weights.max_staleness"),
        ({"weights": {"staleness": "linear"}}, "weights.staleness"),
        ({"weights": {"frequencies": [1.0]}}, "weights.frequencies"),
        ({"algorithm": {"name": "scaffold"}, "weights": {"target": "examples"}}, "weights"),
        ({"algorithm": {"name": "afa_cs"}, "weights": {"staleness": "hinge"}}, "weights"),
        ({"algorithm": {"name": "afa_cs"}, "aggregation": {"rule": "median"}}, "aggregation.rule"),
        ({"aggregation": {"rule": "median"}, "weights": {"frequency": "estimated"}}, "weights.frequency"),
        ({"aggregation": {"rule": "median"}, "weights": {"max_staleness": 3}}, "weights.max_staleness"),
        ({"topology": {"kind": "ring"}, "weights": {"target": "uniform"}}, "weights"),
        ({"algorithm": {"name": "favano"}, "schedule": {"name": "periodic"}}, "schedule.recall"),
        ({"algorithm": {"name": "favano"}, "schedule": {"name": "rounds"}}, "schedule.recall"),
        (
            {"algorithm": {"name": "favano"}, "schedule": {"name": "buffered", "deadline": 9.0}},
            "schedule.recall",
        ),
        ({"algorithm": {"name": "favano", "bits": 1}}, "algorithm.bits"),
        ({"algorithm": {"name": "favano", "floor": 0.0}}, "algorithm.floor"),
        ({"algorithm": {"name": "co2"}, "schedule": {"name": "buffered"}}, "schedule.name"),
        ({"algorithm": {"name": "afa_cs"}, "schedule": {"name": "rounds", "deadline": 3.0}}, "schedule.name"),
        ({"schedule": {"name": "buffered", "k": 9, "concurrency": 4}}, "schedule.concurrency"),
        ({"weights": {"frequency": "known", "seconds": [1.0]}}, "weights.seconds"),
        (
            {"schedule": {"name": "backup"}, "weights": {"frequency": "known", "seconds": [1.0] * 20}},
            "weights.frequency",
        ),
        (
            {
                "schedule": {"name": "buffered", "deadline": 9.0},
                "weights": {"frequency": "known", "seconds": [1.0] * 20},
            },
            "weights.frequency",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(sections: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError) as caught:
        assemble(parse(sections))
    assert caught.value.field.split("[")[0] == named
