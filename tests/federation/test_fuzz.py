"""Thousands of mutated messages from a member: each has its precise refusal, and nobody else notices."""

from __future__ import annotations

import contextlib
import math
import random
import tomllib
from typing import Any

import pytest
import structlog
import torch
from floor import Floor, checked, end, play, small, submit
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load
from storm import Storm, honest, lied

from hansa.core.errors import HansaError
from hansa.core.recipe import parse
from hansa.core.wire import federation_pb2 as pb
from hansa.core.wire.tensors import Malformed, pack, require_alike, unpack
from hansa.server.leases import Lease, read_lease
from hansa.simulation.simulator import Simulator
from hansa.strategies.catalog import assemble

TREE = {"w": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([1, 2]), "s": torch.tensor(0.5)}
PACKED = pack(TREE)


@pytest.mark.usefixtures("no_pickle")
def test_a_storm_of_hostile_messages(floor: Floor) -> None:
    after = small(stop={"rounds": 3})
    storm = Storm(floor, random.Random(0))

    async def scene() -> str:
        async with floor.coordinator() as control:
            with structlog.testing.capture_logs() as said:
                async with honest(floor):
                    await storm.blow(800)
            assert not [each for each in said if each["log_level"] == "error" or "exc_info" in each]
            assert "BEGIN" not in str(said)
            run_so_far = await control.Stop(pb.RunName(id=storm.run))
            assert run_so_far.rounds > 0
            async with floor.agents(2):
                run = await submit(control, after)
                _, status = await end(control, run)
                assert status.status == "finished", status.reason
            return run

    run = play(scene())
    assert sum(storm.ends.values()) > 600
    assert {status for _, status in storm.ends} >= {"INVALID_ARGUMENT", "PERMISSION_DENIED", "OK"}
    storm.accepted()
    checked(floor, run)
    undisturbed = Simulator(assemble(after))
    undisturbed.run()
    for name, tensor in undisturbed.hub.model().items():
        torch.testing.assert_close(floor.model(run)[name], tensor, rtol=1e-5, atol=1e-5)


@settings(max_examples=500, deadline=None)
@given(st.randoms(use_true_random=False))
def test_files_that_lie_are_malformed_or_harmless(draw: Any) -> None:
    data = lied(draw, PACKED.data)
    try:
        tree = unpack(data, PACKED.tensors)
    except Malformed:
        return
    assert list(tree) == list(TREE)
    reference = load(data)
    assert all(torch.equal(tree[name], reference[name]) for name in TREE)
    assert all(tree[n].dtype == t.dtype and tree[n].shape == t.shape for n, t in TREE.items())
    assert all(bool(each.isfinite().all()) for each in tree.values())


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(
                [
                    torch.float64, torch.float32, torch.float16, torch.bfloat16,
                    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
                ]
            ),
            st.lists(st.integers(0, 4), max_size=3),
        ),
        max_size=6,
    )
)  # fmt: skip
def test_files_of_safetensors_are_read_as_safetensors_reads_them(kinds: list[Any]) -> None:
    tree = {f"{i}": torch.arange(math.prod(s)).reshape(s).to(dtype) for i, (dtype, s) in enumerate(kinds)}
    packed = pack(tree)
    found, reference = unpack(packed.data, packed.tensors), load(packed.data)
    assert list(found) == list(tree)
    for name, each in reference.items():
        assert found[name].dtype == each.dtype
        assert torch.equal(found[name], each)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_is_found_anywhere(dtype: torch.dtype, value: float) -> None:
    tree = {"w": torch.zeros(3, 5, dtype=dtype)}
    tree["w"][2, 4] = value
    packed = pack(tree)
    with pytest.raises(Malformed, match="tensor 'w' has numbers that are not finite"):
        unpack(packed.data, packed.tensors)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.builds(
            pb.TensorInfo,
            name=st.sampled_from(["w", "b", "s", ""]) | st.text(max_size=9),
            dtype=st.sampled_from(["F32", "I64", "F64", "", "\x00"]),
            shape=st.lists(st.integers(0, 2**64 - 1), max_size=3),
        ),
        max_size=5,
    )
)
def test_manifests_are_alike_or_refused(found: list[pb.TensorInfo]) -> None:
    wanted = {each.name: (each.dtype, list(each.shape)) for each in PACKED.tensors}
    alike = len(found) == 3 and {each.name: (each.dtype, list(each.shape)) for each in found} == wanted
    try:
        require_alike(found, PACKED.tensors)
    except Malformed:
        assert not alike
    else:
        assert alike


@settings(max_examples=500, deadline=None)
@given(
    st.binary(max_size=300) | st.text("0123456789|abc²", max_size=60).map(lambda s: s.encode() + b"0" * 16)
)
def test_leases_that_nobody_gave(lease: bytes) -> None:
    secret = b"s" * 32
    claim = read_lease(lease)
    assert claim is None or claim.signed(secret) != lease
    true = Lease("run", 3, 4).signed(secret)
    assert read_lease(true) == Lease("run", 3, 4)


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=200))
def test_recipes_that_are_none(text: str) -> None:
    with contextlib.suppress(tomllib.TOMLDecodeError, HansaError):
        assert parse(tomllib.loads(text)).seed >= 0
