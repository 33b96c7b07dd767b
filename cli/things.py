"""What can stand in a recipe: every plug-in by section, its source, its keys, what it combines with."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, get_args, get_origin

import torch
from pydantic import BaseModel
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from hansa.cli.keys import REQUIRED, keys_of, plain
from hansa.cli.toml import inline
from hansa.core import models
from hansa.core.algorithm import Algorithm
from hansa.core.data import DataConfig, PartitionConfig
from hansa.core.errors import InputError
from hansa.core.recipe import CustomModel, did_you_mean, parse
from hansa.core.task import Task
from hansa.simulation.catalog import ATTACKS
from hansa.strategies.catalog import ALGORITHMS, RULES, SCHEDULES, parts, summary
from hansa.strategies.topologies import Kind, Topology

SECTIONS = {
    "algorithm": ("name", "Algorithms"),
    "schedule": ("name", "Schedules"),
    "aggregation": ("rule", "Aggregation rules"),
    "topology": ("kind", "Topologies"),
    "attack": ("name", "Attacks"),
    "partition": ("kind", "Partitions"),
    "data": ("source", "Data sources"),
    "model": ("name", "Models"),
}


@dataclass(frozen=True, kw_only=True)
class Thing:
    """Something that a recipe can name: ``[section] tag = "name"``."""

    section: str
    name: str
    kind: type
    meaning: str

    @property
    def source(self) -> str:
        """The paper, where there is one."""
        return str(getattr(self.kind, "source", ""))

    def described(self) -> dict[str, Any]:
        """For machines."""
        keys = [
            {
                "key": key.name,
                "default": None if key.default is REQUIRED else key.default,
                "required": key.default is REQUIRED,
                "meaning": key.meaning,
            }
            for key in keys_of(self.kind)
            if key.name != SECTIONS[self.section][0]
        ]
        found: dict[str, Any] = {
            "section": self.section,
            "name": self.name,
            "meaning": self.meaning,
            "source": self.source,
            "keys": keys,
        }
        if issubclass(self.kind, Algorithm):
            found |= {"family": self.kind.family, "combines_with": combinations(self.name)}
        return found


def things() -> list[Thing]:
    """All there is, section by section."""
    unions = {"partition": PartitionConfig, "data": DataConfig, "model": models.ModelConfig | CustomModel}
    registries: dict[str, Mapping[str, type]] = {
        "algorithm": ALGORITHMS,
        "schedule": SCHEDULES,
        "aggregation": {"mean": _Mean, **RULES},
        "topology": {"star": _Star, **dict.fromkeys(get_args(Kind), Topology)},
        "attack": ATTACKS,
        **{
            section: {str(each.model_fields[SECTIONS[section][0]].default): each for each in _members(union)}
            for section, union in unions.items()
        },
    }
    return [
        Thing(section=section, name=name, kind=kind, meaning=_GRAPHS.get(name) or plain(summary(kind)))
        for section in SECTIONS
        for name, kind in registries[section].items()
    ]


def choices() -> dict[str, tuple[str, ...]]:
    """The names that may stand in each section."""
    listed = things()
    return {section: tuple(each.name for each in listed if each.section == section) for section in SECTIONS}


def find(name: str) -> list[Thing]:
    """The things of that name: a name may mean one in several sections.

    Raises
    ------
    InputError
        When there is none.
    """
    listed = things()
    found = [each for each in listed if each.name == name]
    if not found:
        known = sorted({each.name for each in listed})
        raise InputError("NAME", name, "there is no such thing", did_you_mean(name, known))
    return found


_GRAPHS = {  # all are one class
    "ring": "Every peer talks to the two beside it.",
    "torus": "A grid whose borders meet: every peer talks to four.",
    "exponential": "Every peer talks to those 1, 2, 4, … places away.",
    "regular": "A random graph in which every peer has the same number of neighbours.",
    "complete": "Every peer talks to every other.",
}


class _Mean:
    """Mean of the updates with the algorithm's weights, folded as they come."""


class _Star:
    """A server and its clients."""


def _members(union: Any) -> Iterable[type[BaseModel]]:
    if get_origin(union) is Annotated:
        return _members(get_args(union)[0])
    if isinstance(union, type):
        return [union]
    return [member for each in get_args(union) for member in _members(each)]


def combinations(name: str) -> dict[str, dict[str, str]]:
    """For every choice ``""``, or why an algorithm does not go with it; the run's own checks say so."""
    gossip = {"topology": {"kind": "ring"}}
    server = _refusal(name, {})
    base: dict[str, Any] = gossip if server else {}
    return {
        "topology": {"star": server, "gossip": _refusal(name, gossip)},
        "schedule": {each: _refusal(name, {**base, "schedule": {"name": each}}) for each in SCHEDULES},
        "aggregation": {
            "mean": _refusal(name, base),
            "robust": _refusal(name, {**base, "aggregation": {"rule": "median"}}),
        },
    }


def _refusal(algorithm: str, rest: Mapping[str, Any]) -> str:
    recipe = parse({"algorithm": {"name": algorithm}, "model": {"hidden": [2], "norm": "batch"}, **rest})
    try:
        made = parts(recipe)
        assert not isinstance(recipe.model, CustomModel)
        module = models.build(recipe.model, sample=torch.zeros(2), outputs=2, seed=0)
        made.algorithm.check(Task(module, classes=2, partition=made.algorithm.partition), made.schedule)
    except InputError as error:
        return error.problem
    return ""


def overview() -> RenderableType:
    """All there is, for people."""
    listed = things()
    shown: list[RenderableType] = []
    for section, (tag, heading) in SECTIONS.items():
        shown.append(Text.assemble((heading, "bold"), f"  [{section}] {tag} = …"))
        here = [each for each in listed if each.section == section]
        for family in dict.fromkeys(_family(each) for each in here):
            if family:
                shown.append(Text(f" {family}", style="italic"))
            table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
            table.add_column(min_width=max(len(each.name) for each in here) + 2, no_wrap=True, style="cyan")
            table.add_column()
            for each in here:
                if _family(each) == family:
                    beneath = "; ".join(filter(None, [each.source, _runs_under(each)]))
                    more = [f"\n{beneath}"] if beneath else []
                    table.add_row(f"  {each.name}", Text.assemble(each.meaning, *((m, "dim") for m in more)))
            shown.append(table)
        shown.append("")
    shown.append(Text("hansa strategies NAME tells the keys, their defaults and what it combines with."))
    return Group(*shown)


def _family(thing: Thing) -> str:
    return thing.kind.family if issubclass(thing.kind, Algorithm) else ""


def _runs_under(thing: Thing) -> str:
    """What an algorithm combines with, in short."""
    if not issubclass(thing.kind, Algorithm):
        return ""
    found = combinations(thing.name)
    allowed = [name for name, refusal in found["schedule"].items() if not refusal]
    allowed += [] if found["topology"]["gossip"] else ["gossip"]
    allowed += [] if found["aggregation"]["robust"] else ["robust rules"]
    return ", ".join(allowed)


def page(thing: Thing) -> RenderableType:
    """One thing, for people."""
    tag, heading = SECTIONS[thing.section]
    shown: list[RenderableType] = [
        Text.assemble(
            (thing.name, "bold cyan"), f"  {heading.lower().replace('ies', 'ys').removesuffix('s')}"
        ),
        Text(plain(_story(thing.kind))),
    ]
    if thing.source:
        shown.append(Text(f"Source: {thing.source}"))
    keys = [key for key in keys_of(thing.kind) if key.name != tag]
    lines = [f"[{thing.section}]", f"{tag} = {inline(thing.name)}"]
    table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0))
    for column in ("  key", "default", "meaning"):
        table.add_column(column, no_wrap=column != "meaning")
    for key in keys:
        default = "required" if key.default is REQUIRED else inline(key.default)
        table.add_row(Text(f"  {key.name}", style="cyan"), Text(default), Text(key.meaning))
    shown += [Text("\nIn a recipe:"), *(Text(f"  {line}") for line in lines)]
    if keys:
        shown += [Text("\nIts keys:"), table]
    if issubclass(thing.kind, Algorithm):
        shown.append(Text("\nCombines with:"))
        for section, found in combinations(thing.name).items():
            for name, refusal in found.items():
                mark = ("  no   ", "red") if refusal else ("  yes  ", "green")
                why = f": {refusal}" if refusal else ""
                shown.append(Text.assemble(mark, f"{section} {name}{why}"))
    return Group(*shown)


def _story(kind: type) -> str:
    """A class's documentation up to its fields."""
    return (inspect.getdoc(kind) or "").partition("\nAttributes\n")[0].strip()
