"""Recipes: what to run, as data.

A recipe is a TOML file or a Python function that returns a :class:`Recipe`. Unknown keys are errors with a
suggestion. Tables whose contents belong to a plug-in (``algorithm``, ``aggregation``, ``weights``,
``schedule``, ``topology``, ``population``, ``attack``) are checked by the room that holds the plug-in,
through :func:`build`.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib
import importlib.util
import re
import sys
import tomllib
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, cast, get_args, get_origin

import tomli_w
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    create_model,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo

from hansa.core.data import DataConfig, DigitsData, DirichletPartition, PartitionConfig
from hansa.core.errors import InputError
from hansa.core.models import MLPConfig, ModelConfig

Table = dict[str, Any]
_USER_MODULE = "hansa_user_"  # prefix of modules loaded from a user's file
_TAGS = {  # sections whose table names what it configures
    "data": "source",
    "partition": "kind",
    "model": "name",
    "algorithm": "name",
    "aggregation": "rule",
    "schedule": "name",
    "topology": "kind",
    "attack": "name",
}
T = TypeVar("T")


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class CustomModel(_Section):
    """A model of your own."""

    name: Literal["custom"] = "custom"
    factory: str = Field(
        description="file.py:function or package.module:function; called with (sample, outputs)"
    )
    arguments: Table = Field(default_factory=dict, description="further keyword arguments of the factory")


class TrainConfig(_Section):
    """What a client does in one job."""

    epochs: int | tuple[int, int] = Field(
        default=5, description="passes over the local data, or [low, high] drawn per job"
    )
    steps: int | None = Field(default=None, ge=1, description="mini-batches per job, instead of epochs")
    batch_size: int = Field(default=20, ge=1, description="examples per mini-batch, B")
    lr: float = Field(default=0.1, gt=0, description="step size of the clients, η_l")
    momentum: float = Field(default=0.0, ge=0, lt=1, description="heavy-ball momentum within a job")
    weight_decay: float = Field(default=0.0, ge=0, description="L2 coefficient added to the gradient")
    clip_norm: float | None = Field(default=None, gt=0, description="bound on the gradient's L2 norm")

    @field_validator("epochs")
    @classmethod
    def _in_order(cls, epochs: int | tuple[int, int]) -> int | tuple[int, int]:
        low, high = (epochs, epochs) if isinstance(epochs, int) else epochs
        if not 1 <= low <= high:
            raise ValueError("it must be 1 or more, and a pair [low, high]")
        return epochs


class StopConfig(_Section):
    """When the run ends: whichever comes first."""

    rounds: int = Field(default=40, ge=1, le=10**9, description="steps of the hub")
    time: float | None = Field(default=None, gt=0, description="virtual seconds")
    target: float | None = Field(
        default=None, description="headline accuracy, or minus the loss where there is none, at which to stop"
    )


class ParametersConfig(_Section):
    """Roles of the model's tensors, by ``type:GLOB`` or name glob; they go before the algorithm's own."""

    shared: tuple[str, ...] = Field(default=(), description="averaged, whatever the rules below say")
    local: tuple[str, ...] = Field(default=(), description="trained, and kept by each client")
    frozen: tuple[str, ...] = Field(default=(), description="never trained nor sent")


class EvaluationConfig(_Section):
    """What is measured, and when."""

    every: int = Field(
        default=1, ge=1, description="hub steps between two evaluations; the last is always evaluated"
    )
    clients: int | None = Field(
        default=None, ge=0, description="clients evaluated each time, drawn once; all by default"
    )
    deadline: float = Field(
        default=60.0,
        gt=0,
        description="seconds that agents have for an evaluation; a simulated one takes none",
    )


class EngineConfig(_Section):
    """Where the work is done."""

    mode: Literal["auto", "fused", "batched", "sequential"] = Field(
        default="auto", description="how a cohort is computed"
    )
    chunk: int | None = Field(default=None, ge=1, description="clients computed together")
    device: str = Field(default="cpu", description="torch device: cpu, cuda, cuda:1, mps")
    dtype: Literal["float32", "float64"] = Field(
        default="float32", description="floating-point type of the model"
    )
    convolutions: Literal["direct", "winograd"] = Field(
        default="direct",
        description='"winograd" is faster for 5x5 kernels in the fused tier, and rounds ten times as much',
    )
    threads: int | None = Field(default=None, ge=1, description="CPU threads; by default as many as pay")
    bank_memory: float = Field(
        default=4.0,
        ge=0,
        description="gigabytes that clients' private state may take before it goes to a memory-mapped file",
    )
    checkpoint_every: int = Field(default=10, ge=1, description="hub steps between two checkpoints")


class Recipe(_Section):
    """One run, whole. Every field has a default: the empty recipe federates scikit-learn's digits."""

    name: str = Field(
        default="digits",
        pattern=r"^[\w.-]+$",
        title="letters, digits, dots, hyphens and underscores",
        description="names the run directory; by default after the data: its file, or its source",
    )
    seed: int = Field(default=0, ge=0, lt=2**63, description="names every random draw of the run")
    data: DataConfig = DigitsData()
    partition: PartitionConfig = DirichletPartition(clients=20, alpha=0.3)
    model: Annotated[ModelConfig | CustomModel, Field(discriminator="name")] = MLPConfig()
    train: TrainConfig = TrainConfig()
    parameters: ParametersConfig = ParametersConfig()
    algorithm: Table = Field(default_factory=lambda: {"name": "fedavg"})
    aggregation: Table = Field(default_factory=lambda: {"rule": "mean"})
    weights: Table = Field(default_factory=dict)
    schedule: Table = Field(default_factory=lambda: {"name": "rounds"})
    topology: Table = Field(default_factory=lambda: {"kind": "star"})
    population: Table = Field(default_factory=dict)
    attack: Table | None = None
    stop: StopConfig = StopConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    engine: EngineConfig = EngineConfig()

    @model_validator(mode="before")
    @classmethod
    def _whole_tables(cls, raw: Any) -> Any:
        """Objects of Python recipes become tables; a table that names no kind adds to the default one."""
        if not isinstance(raw, dict):
            return raw
        whole = {k: _as_table(v, _TAGS.get(k)) if dataclasses.is_dataclass(v) else v for k, v in raw.items()}
        for section, tag in _TAGS.items():
            given = whole.get(section)
            if section != "attack" and isinstance(given, dict) and tag not in given:
                default = cls.model_fields[section].get_default(call_default_factory=True)
                default = default.model_dump() if isinstance(default, BaseModel) else default
                whole[section] = {**default, **given}
        return {"name": _named_after(whole.get("data")), **whole}

    def toml(self) -> str:
        """The recipe as a TOML file that makes it again."""
        return tomli_w.dumps(_without_none(self.model_dump(mode="json")))


def _named_after(data: Any) -> str:
    """A name for a run that has none."""
    table = data.model_dump() if isinstance(data, BaseModel) else data if isinstance(data, dict) else {}
    path, source = table.get("path"), table.get("source", DigitsData().source)
    first = path[0] if isinstance(path, list | tuple) and path else path
    return re.sub(r"[^\w.-]+", "-", Path(first).stem if isinstance(first, str) else str(source)) or "run"


def load(source: str | Path | None, overrides: Mapping[str, str] | None = None) -> Recipe:
    """The recipe of a TOML file, of ``file.py:function``, or the default one, with overrides by dotted key.

    An override is written as in TOML, but a bare word is text; an empty one takes the key out, so that
    its default holds.

    Raises
    ------
    InputError
        Naming the key, its value and the remedy.
    """
    raw: Table = {}
    where, _, function = str(source or "").rpartition(":")
    if function.endswith(".py") or where.endswith(".py"):
        made = import_object(str(source) if where else f"{source}:recipe", "recipe")()
        if not isinstance(made, Recipe):
            raise InputError(
                "recipe",
                str(source),
                f"it returned {type(made).__name__}",
                "return a hansa.core.recipe.Recipe",
            )
        raw = _without_none(made.model_dump(mode="json"))
    elif source is not None:
        raw = _read(Path(source))
    for key, text in (overrides or {}).items():
        override(raw, key, text)
    return parse(raw)


def _read(path: Path) -> Table:
    if not path.is_file():
        near = path.with_suffix(".toml")
        remedy = f"did you mean {str(near)!r}?" if near.is_file() else "run `hansa new NAME` to make one"
        raise InputError("recipe", str(path), "there is no such file", remedy)
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError("recipe", str(path), f"it is not TOML: {error}", "correct that line") from error
    except OSError as error:
        raise InputError(
            "recipe", str(path), f"it cannot be read ({error.strerror})", "see its permissions"
        ) from error


def parse(raw: Mapping[str, Any]) -> Recipe:
    """A recipe from plain data; :class:`InputError` names the first thing that is wrong."""
    try:
        made = Recipe.model_validate(dict(raw))
    except ValidationError as error:
        raise explain(error, Recipe) from error
    _refuse_truths(raw, made)
    return made


def _refuse_truths(given: object, made: object, field: str = "") -> None:
    """Refuse true and false where a number is wanted: pydantic makes 1 and 0 of them."""
    if isinstance(given, bool) and not isinstance(made, bool):
        raise InputError(field, given, "it must be a number", "correct it, or leave it out for the default")
    if isinstance(given, Mapping):
        for key, value in given.items():
            inside = made.get(key) if isinstance(made, Mapping) else getattr(made, str(key), None)
            _refuse_truths(value, inside, f"{field}.{key}".lstrip("."))
    elif isinstance(given, list | tuple) and isinstance(made, list | tuple):
        for i, (value, inside) in enumerate(zip(given, made, strict=False)):
            _refuse_truths(value, inside, f"{field}[{i}]")


def build(
    table: Mapping[str, Any],
    registry: Mapping[str, Callable[..., T]],
    *,
    section: str,
    tag: str,
    base: type[Any],
    fixed: Mapping[str, Any] | None = None,
) -> T:
    """Make the plug-in that ``table[tag]`` names, in ``registry`` or at ``file.py:Class``.

    ``fixed`` are constructor arguments that do not come from the recipe.
    """
    given = dict(table)
    name = given.pop(tag, None)
    field = f"{section}.{tag}"
    if not isinstance(name, str):
        raise InputError(field, name, "it names nothing", f"choose among {', '.join(registry)}")
    if name in registry:
        kind: Any = registry[name]
    elif ":" in name:
        kind = import_object(name, field)
        if not (isinstance(kind, type) and issubclass(kind, base)):
            raise InputError(field, name, f"it is no {base.__name__}", f"derive it from {base.__name__}")
    else:
        raise InputError(field, name, "there is no such thing", did_you_mean(name, registry))
    others = {other: _fields(each).keys() - (fixed or {}).keys() for other, each in registry.items()}
    made: T = construct(kind, given, section=section, fixed=fixed, name=name, homes=_homes(field, others))
    return made


def construct(
    kind: Callable[..., T],
    table: Mapping[str, Any],
    *,
    section: str,
    fixed: Mapping[str, Any] | None = None,
    name: str = "",
    homes: Mapping[str, str] | None = None,
) -> T:
    """Make a configuration dataclass from a table.

    ``name`` is what people call ``kind``, and ``homes`` says of keys that it lacks where they belong.
    """
    if not isinstance(table, Mapping):
        raise InputError(section, table, "it must be a table", f"give its keys, as under [{section}]")
    fixed = {key: value for key, value in (fixed or {}).items() if key in _fields(kind)}
    schema = _schema(kind, frozenset(fixed))
    try:
        values = schema.model_validate(dict(table))
    except ValidationError as error:
        raise explain(error, schema, section, name=name, homes=homes) from error
    _refuse_truths(table, values, section)
    made: T = cast(Any, kind)(**{key: getattr(values, key) for key in schema.model_fields}, **fixed)
    return made


def describe(made: object, tag: str = "", name: str = "", *, without: tuple[str, ...] = ()) -> Table:
    """The table from which :func:`build` (:func:`construct` without a tag) makes ``made`` again."""
    kind: Any = type(made)
    schema = _schema(kind, frozenset(without))
    values = {key: getattr(made, key) for key in schema.model_fields}
    dumped = schema.model_construct(**values).model_dump(mode="json")
    table: Table = _without_none({**({tag: name} if tag else {}), **dumped})
    return table


def import_object(path: str, field: str) -> Any:
    """The object at ``file.py:name`` or ``package.module:name``: code that the user points to, on purpose."""
    where, _, name = path.rpartition(":")
    if not where:
        raise InputError(field, path, "it names no module", "write file.py:NAME or package.module:NAME")
    try:
        if where.endswith(".py"):
            file = Path(where).expanduser().resolve()
            spec = importlib.util.spec_from_file_location(f"{_USER_MODULE}{file.stem}", file)
            if spec is None or spec.loader is None or not file.is_file():
                raise InputError(field, path, f"there is no file {where}", "correct the path")
            module = importlib.util.module_from_spec(spec)
            sys.modules[spec.name] = module  # dataclasses and type hints look their module up there
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(where)
    except InputError:
        raise
    except Exception as error:  # whatever the user's module does when it is run
        raise InputError(
            field, path, f"it cannot be imported ({type(error).__name__}: {error})", f"correct {where}"
        ) from error
    if not hasattr(module, name):
        raise InputError(field, path, f"{where} has no {name!r}", did_you_mean(name, dir(module)))
    return getattr(module, name)


def explain(
    error: ValidationError,
    model: type[BaseModel],
    section: str = "",
    *,
    name: str = "",
    homes: Mapping[str, str] | None = None,
) -> InputError:
    """The first thing wrong, in the user's words; ``name`` and ``homes`` are those of :func:`construct`."""
    found = error.errors()
    # A misspelt key says more than the key that is missing for it.
    first = next((each for each in found if each["type"] == "extra_forbidden"), found[0])
    value, context = first.get("input"), first.get("ctx", {})
    place = _locate(model, first["loc"])
    field = ".".join(each for each in (section, place.field) if each) or "recipe"
    remedy = "correct it" if place.required else "correct it, or leave it out for the default"
    match first["type"]:
        case "extra_forbidden":
            return _unknown_key(place, field, value, name, homes)
        case "union_tag_invalid":
            tag = context["discriminator"].strip("'")
            known = [each.strip("' ") for each in context["expected_tags"].split(",")]
            return InputError(
                f"{field}.{tag}", value[tag], "there is no such thing", did_you_mean(str(value[tag]), known)
            )
        case "literal_error":
            known = [str(each) for each in get_args(place.annotation)]
            return InputError(field, value, "there is no such choice", did_you_mean(str(value), known))
        case "missing":
            return InputError(field, None, "it is missing", f"give {_wanted(place.annotation)}")
        case "model_type" | "model_attributes_type" | "dict_type":
            remedy = f"set {field}.{_TAGS[field]}" if field in _TAGS else f"give its keys, as under [{field}]"
            return InputError(field, value, "it must be a table", remedy)
        case "greater_than" | "greater_than_equal" | "less_than" | "less_than_equal":
            words = {"gt": "more than", "ge": "at least", "lt": "less than", "le": "at most"}
            problem = next(f"it must be {words[bound]} {limit:g}" for bound, limit in context.items())
        case "string_pattern_mismatch":
            problem = f"it must be {place.title or context['pattern']}"
        case "too_short" | "too_long" if place.whole:
            bound = context.get("min_length") or context["max_length"]
            few = "at least" if first["type"] == "too_short" else "at most"
            problem = f"it must have {few} {bound} {'entry' if bound == 1 else 'entries'}"
        case "value_error":
            value = None if isinstance(value, dict) else value
            problem = str(context["error"])
        case "finite_number":
            problem = "it must be finite"
        case _:
            problem = f"it must be {_wanted(place.annotation)}"
    return InputError(field, value, problem, remedy)


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where an error stands.

    ``field``: as the user writes it. ``annotation``: the type wanted there. ``owner``: the table that the key
    is in, and ``siblings`` those that could stand in its place. ``title``: what text it takes. ``required``:
    it has no default. ``whole``: the error is of the whole value, not of a try at one member of a union.
    """

    field: str
    annotation: Any
    owner: type[BaseModel]
    siblings: Sequence[type[BaseModel]]
    title: str | None
    required: bool
    whole: bool


def _locate(model: type[BaseModel], location: Sequence[str | int]) -> _Place:
    """Follow pydantic's path, in which tags and member types of unions stand like keys."""
    field, annotation, owner = "", cast(Any, model), model
    siblings: Sequence[type[BaseModel]] = ()
    known: FieldInfo | None = None
    whole = True
    for step in location:
        options = _models_in(annotation)
        if len(options) > 1:
            siblings, annotation = options, _tagged(options, step)
        elif options:
            owner = options[0]
            known = owner.model_fields.get(str(step))
            annotation = None if known is None else known.annotation
            field += f".{step}"
        elif isinstance(step, int) and whole:
            annotation = _element(annotation, step)
            field += f"[{step}]"
        else:
            whole = False
    title, required = (known.title, known.is_required()) if known else (None, False)
    return _Place(field.lstrip("."), annotation, owner, siblings, title, required, whole)


def _unknown_key(
    place: _Place, field: str, value: object, name: str, homes: Mapping[str, str] | None
) -> InputError:
    section, _, key = field.rpartition(".")
    known = list(place.owner.model_fields)
    if place.siblings:
        tag = _TAGS[section]
        name = str(place.owner.model_fields[tag].default)
        known.remove(tag)
        others = {str(each.model_fields[tag].default): each.model_fields.keys() for each in place.siblings}
        homes = _homes(f"{section}.{tag}", others)
    if not section:
        inside = [
            f"{each}.{key}"
            for each, kept in place.owner.model_fields.items()
            if any(key in option.model_fields for option in _models_in(kept.annotation))
        ]
        homes = {key: f"did you mean {_either(inside)}?"} if inside else {}
    problem = f"{name} has no such key" if name else "there is no such key"
    remedy = (homes or {}).get(key) or (did_you_mean(key, known) if known else "leave it out")
    return InputError(field, value, problem, remedy)


def _homes(field: str, keys: Mapping[str, Collection[str]]) -> dict[str, str]:
    """For every key of some plug-in, what to do about it where the plug-in is another."""
    owners: dict[str, list[str]] = {}
    for name, own in keys.items():
        for key in own:
            owners.setdefault(key, []).append(name)
    return {key: f"leave it out, or set {field} = {_either(names)}" for key, names in owners.items()}


def _either(names: Sequence[str]) -> str:
    *most, last = map(repr, names)
    return f"{', '.join(most)} or {last}" if most else last


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) in (typing.Union, types.UnionType, Annotated):
        return [found for each in get_args(annotation) for found in _models_in(each)]
    return []


def _tagged(options: Sequence[type[BaseModel]], tag: str | int) -> type[BaseModel] | None:
    for option in options:
        for field in option.model_fields.values():
            if get_origin(field.annotation) is Literal and tag in get_args(field.annotation):
                return option
    return None


def _element(annotation: Any, index: int) -> Any:
    """The type of one element of a list."""
    inside = [each for each in get_args(_bare(annotation)) if each is not Ellipsis]
    return inside[min(index, len(inside) - 1)] if inside else Any


def _bare(annotation: Any) -> Any:
    """A type without constraints and without ``None``."""
    if get_origin(annotation) is Annotated:
        return _bare(get_args(annotation)[0])
    if get_origin(annotation) in (typing.Union, types.UnionType):
        rest = [each for each in get_args(annotation) if each is not type(None)]
        return _bare(rest[0]) if len(rest) == 1 else typing.Union[tuple(rest)]  # noqa: UP007 - made here
    return annotation


_WORDS = {
    bool: ("true or false", "true or false"),
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    str: ("text", "texts"),
}


def _wanted(annotation: Any, plural: bool = False) -> str:
    """A type in the user's words."""
    annotation = _bare(annotation)
    if annotation in _WORDS:
        return _WORDS[annotation][plural]
    inside = [each for each in get_args(annotation) if each is not Ellipsis]
    match get_origin(annotation):
        case typing.Union | types.UnionType:
            return " or ".join(_wanted(each, plural) for each in inside)
        case typing.Literal:
            return _either([str(each) for each in inside])
        case origin if origin in (tuple, list):
            count = f"{len(inside)} " if origin is tuple and Ellipsis not in get_args(annotation) else ""
            return f"a list of {count}{_wanted(inside[0], plural=True)}"
    return "a table"


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """A remedy for a name that is not known: the nearest one, or all there are."""
    known = list(known)
    near = difflib.get_close_matches(given, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"choose among {', '.join(known)}"


def _fields(kind: Any) -> dict[str, Any]:
    return {each.name: each for each in dataclasses.fields(kind) if each.init}


@functools.cache
def _schema(kind: Callable[..., Any], without: frozenset[str]) -> type[BaseModel]:
    """A pydantic model of a configuration dataclass's fields."""
    hints = typing.get_type_hints(kind, include_extras=True)
    fields: dict[str, Any] = {}
    for name, each in _fields(kind).items():
        if name in without:
            continue
        if each.default_factory is not dataclasses.MISSING:
            fields[name] = (hints[name], Field(default_factory=each.default_factory))
        else:
            fields[name] = (hints[name], ... if each.default is dataclasses.MISSING else each.default)
    made: type[BaseModel] = create_model(kind.__name__, __config__=ConfigDict(extra="forbid"), **fields)
    return made


def _as_table(made: Any, tag: str | None) -> Table:
    kind = type(made)
    module = sys.modules[kind.__module__]
    where = module.__file__ if kind.__module__.startswith(_USER_MODULE) else kind.__module__
    return describe(
        made, tag or "", f"{where}:{kind.__qualname__}", without=("reducer", "weights", "stop", "phases")
    )


def override(raw: Table, key: str, text: str) -> None:
    """Change a value by its dotted key; ``text`` is as :func:`load` takes it."""
    *parents, last = key.split(".")
    table = raw
    for parent in parents:
        table = table.setdefault(parent, {})
        if not isinstance(table, dict):
            raise InputError(
                key, text, f"{parent} is a value and not a table", "see `hansa config show` for the keys"
            )
    if not text:
        table.pop(last, None)
        return
    try:
        table[last] = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        table[last] = text  # a bare word is a string


def _without_none(value: Any) -> Any:
    """TOML has no null: what is unset is left out."""
    if isinstance(value, dict):
        return {key: _without_none(each) for key, each in value.items() if each is not None}
    if isinstance(value, list):
        return [_without_none(each) for each in value]
    return value
