"""Where an agent works: federations stay assembled, data and models stay loaded between jobs."""

from __future__ import annotations

import math
import time
import tomllib
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, Literal

import structlog
import torch

from hansa.client.outbox import Entry, Outbox, entry
from hansa.client.policy import Policy
from hansa.client.watch import Watch, require_room
from hansa.core.algorithm import Job
from hansa.core.data import CsvData, FederatedData, Shards, load
from hansa.core.errors import DataError, DivergedError, RunError
from hansa.core.randomness import ALONE
from hansa.core.recipe import Recipe, parse
from hansa.core.trees import Tree, pick
from hansa.core.wire import federation_pb2 as pb
from hansa.core.wire.tensors import pack, unpack
from hansa.strategies.catalog import Federation, assemble
from hansa.strategies.evaluate import Tally, tally
from hansa.strategies.local import Data, Work, train

Precision = Literal["full", "bf16"]
_KEPT = 4  # assembled federations

_log = structlog.get_logger(__name__)


class Workshop:
    """Trains and evaluates, one job at a time.

    Parameters
    ----------
    data: the ``[data]`` table of what this agent holds; ``None`` takes the recipe's own data, of which each
        client has its part.
    device: instead of the recipe's.
    precision: ``"bf16"`` lets training passes compute in it where PyTorch's autocast does.
    """

    def __init__(
        self,
        outbox: Outbox,
        policy: Policy,
        *,
        data: Mapping[str, Any] | None,
        device: str | None,
        precision: Precision,
    ) -> None:
        self._outbox, self._policy, self._own, self._device = outbox, policy, data, device
        self._autocast = torch.bfloat16 if precision == "bf16" else None
        self._assembled: OrderedDict[tuple[str, int, int], Federation] = OrderedDict()

    def do(self, job: pb.Job, recipe: bytes, payload: bytes, halt: Callable[[int], bool]) -> Entry:
        """Train a job and put the result into the outbox.

        Raises
        ------
        Refused
            When the owner's policy forbids it.
        HansaError
            When it cannot be done.
        """
        f, tree, private = self._unpacked(job, recipe, payload)
        require_room(self._policy, f.task)
        work = Work(job.client, Job(job.number, job.phase, tree), private)
        began, watch = time.perf_counter(), Watch(self._policy, f.task.device)
        over = self._policy.within(lambda steps: halt(steps) or watch.over())
        made = train(Data(f, f.recipe.seed), work, halt=over)
        watch.require()
        over(made.steps)  # there is rest after the last step, too
        seconds = time.perf_counter() - began
        sound = all(bool(t.isfinite().all()) for t in made.update.values() if t.is_floating_point())
        if not (math.isfinite(made.loss) and sound):
            raise DivergedError(
                f"client {job.client}: training left the finite numbers; lower train.lr = "
                f"{f.recipe.train.lr:g} or set train.clip_norm"
            )
        update = pack(pick(made.update, (n for n in made.update if not job.some or n in set(job.keys))))
        shards = f.data.train_shards
        result = entry(
            update,
            lease=job.lease.hex(),
            run=job.run,
            client=job.client,
            number=job.number,
            examples=len(shards.of(job.client)),
            steps=made.steps,
            loss=made.loss if made.steps else None,
            seconds=seconds,
        )
        self._outbox.put(result, update, made.private)
        return result

    def evaluate(self, job: pb.Job, recipe: bytes, payload: bytes) -> Tally:
        """How the model that the client makes of the payload does on its held-out data.

        Raises
        ------
        Refused
            When the owner's policy forbids it.
        HansaError
            When it cannot be done.
        """
        f, tree, private = self._unpacked(job, recipe, payload)
        return tally(f, tree, private, job.client)

    def _unpacked(self, job: pb.Job, recipe: bytes, payload: bytes) -> tuple[Federation, Tree, Tree]:
        """The federation of a job, its payload, and what its client keeps."""
        with ALONE:
            f = self._federation(job, recipe)
            fresh = f.algorithm.private(f.task)
        undone = job.undone if job.HasField("undone") else None
        kept = self._outbox.private(job.run, job.client, fresh, undone=undone)
        trees = unpack(payload, job.tensors), kept
        tree, private = ({name: each.to(f.task.device) for name, each in part.items()} for part in trees)
        for name, here in f.task.initial.items():
            if name in tree and tree[name].shape != here.shape:
                raise DataError(
                    "data",
                    list(f.data.train.x.shape[1:]),
                    f"for such examples {name} is {list(here.shape)}, and this federation's is "
                    f"{list(tree[name].shape)}",
                    "give this site's examples the features of the others'",
                )
        return f, tree, private

    def _federation(self, job: pb.Job, text: bytes) -> Federation:
        key = (job.recipe.digest, job.clients, job.client if self._own is not None else -1)
        if key in self._assembled:
            self._assembled.move_to_end(key)
            return self._assembled[key]
        recipe = parse(tomllib.loads(text.decode()))
        self._policy.require(recipe, job.recipe.digest, job.clients)
        made = self._assemble(recipe, job.client, job.clients)
        made.task.autocast = self._autocast
        if job.client >= made.clients:
            raise RunError(f"client {job.client} of {made.clients}: there is no such client")
        self._assembled[key] = made
        while len(self._assembled) > _KEPT:
            self._assembled.popitem(last=False)
        return made

    def _assemble(self, recipe: Recipe, client: int, clients: int) -> Federation:
        raw = recipe.model_dump(mode="json", exclude_none=True)
        if self._device is not None:
            raw["engine"] |= {"device": self._device}
        if self._own is None:
            return assemble(parse(raw))
        named = {"class_names": recipe.data.class_names}
        if isinstance(recipe.data, CsvData) and self._own.get("source") == "csv":
            named["feature_names"] = recipe.data.feature_names
        own = parse(raw | {"data": {**self._own, **named}})
        try:
            train, test = load(own.data, own.seed)
        except DataError as error:  # it may quote the data, and what a job fails with is told to others
            _log.error("the data here does not suit a recipe", reason=str(error))
            why = f"{error.field}: the data here does not suit this recipe; this agent's log says why"
            raise RunError(why) from error
        held = FederatedData(
            train=train,
            test=test,
            train_shards=_all_of(client, clients, len(train)),
            test_shards=_all_of(client, clients, len(test)),
        )
        return assemble(own, held)


def _all_of(client: int, clients: int, examples: int) -> Shards:
    offsets = torch.zeros(clients + 1, dtype=torch.int64)
    offsets[client + 1 :] = examples
    return Shards(torch.arange(examples), offsets)
