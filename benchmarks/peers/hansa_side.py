"""Hansa: a federation under the simulator, its engine in ``auto``; ``on_round`` ends a turn.

The simulator evaluates the last round of a run whatever the recipe says, so the run is one round longer than
the job and is left before it.
"""

from __future__ import annotations

import torch
from job import CLASSES, Job, Turns

from hansa.core.data import Examples, FederatedData, Shards
from hansa.core.models import LeafCNNConfig, LogisticConfig, MLPConfig, ResNet18Config, build
from hansa.core.recipe import parse
from hansa.core.schedule import Stopping
from hansa.core.store import Round
from hansa.core.task import LocalSGD, LocalWork, Task
from hansa.simulation.simulator import Simulator
from hansa.strategies.catalog import Federation
from hansa.strategies.fedavg import FedAvg
from hansa.strategies.rounds import Rounds

MODELS = {
    "logistic": LogisticConfig(),
    "mlp": MLPConfig(hidden=(200, 200)),
    "leaf_cnn": LeafCNNConfig(hidden=512),
    "resnet18": ResNet18Config(norm="group"),
}


def federation(job: Job) -> Federation:
    recipe = parse(
        {
            "seed": 0,
            "model": MODELS[job.model].model_dump(),
            "train": {"epochs": 1, "batch_size": job.batch, "lr": job.lr},
            "schedule": {"cohort": job.cohort},
            "stop": {"rounds": job.rounds + 1},
            "evaluation": {"every": job.rounds + 1, "clients": 0},
            "engine": {"threads": job.threads, "device": job.device, "convolutions": "winograd"},
        }
    )
    x, y, indices = torch.from_numpy(job.x), torch.from_numpy(job.y), torch.from_numpy(job.shards)
    module = build(MODELS[job.model], sample=x[0], outputs=CLASSES, seed=0)
    module.load_state_dict({name: torch.from_numpy(each) for name, each in job.start.items()})
    examples = Examples(x=x.to(job.device), y=y.to(job.device), classes=tuple(map(str, range(CLASSES))))
    shards = Shards(indices.flatten(), torch.arange(len(indices) + 1) * indices.shape[1])
    return Federation(
        recipe=recipe,
        task=Task(module, local=LocalSGD(lr=job.lr), classes=CLASSES, device=job.device),
        algorithm=FedAvg(),
        schedule=Rounds(cohort=job.cohort, stop=Stopping(rounds=job.rounds + 1)),
        topology=None,
        data=FederatedData(train=examples, test=examples, train_shards=shards, test_shards=shards),
        work=LocalWork(epochs=1, batch_size=job.batch),
    )


def main() -> None:
    job = Job.read()
    torch.set_num_threads(job.threads)
    cohorts = job.cohorts

    def on_round(done: Round) -> None:
        if job.device != "cpu":
            torch.cuda.synchronize()
        model = {name: each.cpu().numpy() for name, each in simulator.hub.model().items()}
        turns.end(model, engine=simulator.engine)
        if {each.client for each in done.participants} != set(cohorts[done.index - 1].tolist()):
            raise SystemExit(f"round {done.index}: the cohort is not the job's")
        if done.index == job.rounds:
            raise SystemExit(0)
        turns.begin()

    simulator = Simulator(federation(job), on_round=on_round)
    turns = Turns(job, "hansa", ("hansa", "torch"), torch_threads=torch.get_num_threads())
    turns.begin()
    simulator.run()


if __name__ == "__main__":
    main()
