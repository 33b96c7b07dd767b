"""Recipes of somebody who means harm: refused before they cost anything, and nobody else notices."""

from __future__ import annotations

import asyncio
import threading

import grpc
import pytest
from floor import Floor, named, play

from hansa.core.data import FederatedData
from hansa.core.recipe import Recipe
from hansa.core.wire import federation_pb2 as pb
from hansa.core.wire import version
from hansa.strategies.catalog import divided

HARMFUL = {
    "more rounds than a message can tell": (f"[stop]\nrounds = {2**32}", "stop.rounds"),
    "a seed that cannot be written": (f"seed = 0x{'f' * 5000}", "seed = 0xffff"),
    "a number that cannot be read": (f"seed = {'9' * 5000}", "it is not TOML"),
    "arrays within arrays": (f"x = {'[' * 5000}{']' * 5000}", "it is not TOML"),
    "tables within tables": (f"{'a.' * 3000}a = 1", "64 tables within one another"),
    "tables within tables, quoted": (f"""{'"a b" . ' * 2000}a = 1""", "64 tables within one another"),
    "a book": (f"# {'x' * (1 << 20)}", "more than 1048576 characters"),
    "a device that keeps nothing": ('[engine]\ndevice = "meta"', "engine.device"),
    "examples without end": (
        f'[data]\nsource = "synthetic_label_shift"\nexamples = {10**12}\n[partition]\nkind = "natural"',
        "data.examples: 6.4e+13 numbers would be made up here",
    ),
    "features without end": (
        '[data]\nsource = "synthetic_feature_shift"\nfeatures = 1000000\n[partition]\nkind = "natural"',
        "data.examples: 1e+12 numbers",
    ),
    "a model larger than any update": (
        "[model]\nhidden = [1000000, 1000000]",
        "model.name = 'mlp': it has 4e+12",
    ),
    "layers without end": (f"[model]\nhidden = [{'1,' * 2000}]", "model.hidden"),
}


@pytest.mark.parametrize("case", HARMFUL)
def test_what_would_take_the_coordinator_for_itself_is_refused(floor: Floor, case: str) -> None:
    recipe, problem = HARMFUL[case]

    async def scene() -> None:
        async with floor.coordinator() as control:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await control.Submit(pb.Submission(recipe=recipe))
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert problem in (caught.value.details() or "")
            assert not (await control.List(pb.ListRequest())).runs

    play(scene())


def test_numbers_in_a_row_are_no_tables(floor: Floor) -> None:
    seconds = ", ".join(["1.5"] * 100) + ", " + ",".join(["0.25"] * 100)
    weights = f'[weights]\nfrequency = "known"\nseconds = [{seconds}]'
    recipe = f'[data]\nlimit = 400\n[partition]\nkind = "iid"\nclients = 200\n{weights}'

    async def scene() -> None:
        async with floor.coordinator() as control:
            assert (await control.Submit(pb.Submission(recipe=recipe))).clients == 200

    play(scene())


def test_a_recipe_that_takes_long_holds_up_nobody_else(floor: Floor, monkeypatch: pytest.MonkeyPatch) -> None:
    proceed = threading.Event()

    def slow(recipe: Recipe) -> FederatedData:
        if recipe.name == "slow":
            assert proceed.wait(600)
        return divided(recipe)

    monkeypatch.setattr("hansa.server.office.divided", slow)

    async def scene() -> None:
        async with floor.coordinator() as control:
            ada = asyncio.ensure_future(
                control.Submit(pb.Submission(recipe='name = "slow"'), metadata=named("ada"))
            )
            bob = await control.Submit(pb.Submission(recipe='name = "quick"'), metadata=named("bob"))
            assert not ada.done()
            proceed.set()
            assert {bob.owner, (await ada).owner} == {"ada", "bob"}

    play(scene())


def test_what_an_agent_says_of_itself_moves_nobodys_terminal(floor: Floor) -> None:
    async def scene() -> None:
        async with floor.coordinator() as control, floor.channel("x") as channel:
            hello = pb.Hello(
                version=version(), seats=pb.Seats(clients=[0]), device="cpu\x1b[2J\nforged", torch="\0"
            )
            stream = channel.stream_stream(
                "/hansa.v1.Agents/Attend", pb.FromAgent.SerializeToString, pb.ToAgent.FromString
            )(metadata=named("mallory"))
            await stream.write(pb.FromAgent(hello=hello))
            await stream.read()
            (agent,) = [each async for each in control.Roster(pb.RosterRequest())]
            assert (agent.device, agent.torch) == ("cpu [2J forged", " ")
            stream.cancel()

    play(scene())
