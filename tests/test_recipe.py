"""Recipes: defaults, overrides, Python recipes, and errors in the words of whoever wrote the recipe."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

from hansa.core.errors import InputError
from hansa.core.recipe import Recipe, load, parse
from hansa.simulation.catalog import resolved
from hansa.simulation.population import Population
from hansa.strategies.catalog import ALGORITHMS, assemble, parts
from hansa.strategies.fedprox import FedProx
from hansa.strategies.robust import Krum
from hansa.strategies.topologies import Topology

ROOT = Path(__file__).resolve().parents[1]


def refusal(raw: dict[str, Any]) -> InputError:
    with pytest.raises(InputError) as caught:
        parts(parse(raw))
    return caught.value


# Section by section: what was written, the field that is blamed, and words of the sentence.
WRONG: list[tuple[dict[str, Any], str, str]] = [
    # keys
    ({"trian": {"lr": 0.1}}, "trian", "did you mean 'train'?"),
    ({"lr": 0.1}, "lr", "did you mean 'train.lr'?"),
    ({"clients": 5}, "clients", "did you mean 'partition.clients' or 'evaluation.clients'?"),
    ({"train": {"batchsize": 8}}, "train.batchsize", "did you mean 'batch_size'?"),
    ({"train": {"rate": 8}}, "train.rate", "choose among epochs, steps, batch_size"),
    ({"data": {"path": "x.csv"}}, "data.path", "leave it out, or set data.source = 'csv'"),
    ({"data": {"source": "csv", "pth": "x", "target": 0}}, "data.pth", "csv has no such key; did you mean"),
    ({"model": {"name": "logistic", "hidden": [5]}}, "model.hidden", "logistic has no such key"),
    ({"partition": {"kind": "iid", "alpha": 1}}, "partition.alpha", "or set partition.kind = 'dirichlet'"),
    ({"algorithm": {"name": "fedavg", "mu": 1}}, "algorithm.mu", "or set algorithm.name = 'fedprox'"),
    ({"schedule": {"k": 5}}, "schedule.k", "leave it out, or set schedule.name = 'buffered'"),
    ({"schedule": {"stop": 5}}, "schedule.stop", "choose among cohort, over_selection, deadline, minimum"),
    ({"aggregation": {"rule": "mean", "f": 1}}, "aggregation.f", "the mean has no such key"),
    ({"topology": {"degree": 3}}, "topology.degree", "a star has no such key"),
    ({"topology": {"kind": "ring", "name": "x"}}, "topology.name", "choose among kind, degree"),
    # names
    ({"algorithm": {"name": "fedadm"}}, "algorithm.name", "there is no such thing; did you mean 'fedadam'?"),
    ({"model": {"name": "mpl"}}, "model.name", "did you mean 'mlp'?"),
    ({"data": {"source": "zip"}}, "data.source", "choose among digits, idx, csv"),
    ({"aggregation": {"rule": "krumm"}}, "aggregation.rule", "did you mean 'krum'?"),
    ({"topology": {"kind": "rung"}}, "topology.kind", "did you mean 'ring'?"),
    ({"engine": {"mode": "fast"}}, "engine.mode", "there is no such choice; choose among auto"),
    ({"algorithm": {"name": 3}}, "algorithm.name", "it names nothing"),
    # types
    ({"train": {"lr": "fast"}}, "train.lr", "it must be a number"),
    ({"seed": 1.5}, "seed", "it must be a whole number"),
    ({"train": {"epochs": "many"}}, "train.epochs", "it must be a whole number or a list of 2 whole numbers"),
    ({"train": {"epochs": [1, 2, 3]}}, "train.epochs", "a whole number or a list of 2 whole numbers"),
    ({"parameters": {"shared": "a.*"}}, "parameters.shared", "it must be a list of texts"),
    ({"data": {"source": "csv", "path": "x", "target": 1.5}}, "data.target", "text or a whole number"),
    ({"train": 5}, "train", "it must be a table; give its keys, as under [train]"),
    ({"algorithm": "scaffold"}, "algorithm", "it must be a table; set algorithm.name"),
    ({"algorithm": {"name": "fedprox", "mu": "x"}}, "algorithm.mu", "it must be a number"),
    ({"algorithm": {"name": "selective", "budget": [1, "x"]}}, "algorithm.budget", "a list of whole numbers"),
    # values
    ({"train": {"lr": 0}}, "train.lr", "it must be more than 0"),
    ({"algorithm": {"name": "fednova", "server_lr": 0}}, "algorithm.server_lr", "it must be more than 0"),
    ({"partition": {"kind": "dirichlet", "alpha": 1e308}}, "partition.alpha", "it must be at most 1e+100"),
    ({"seed": 2**63}, "seed", "it must be less than 9.22337e+18"),
    ({"train": {"lr": float("nan")}}, "train.lr", "it must be finite"),
    ({"train": {"lr": True}}, "train.lr", "it must be a number"),
    ({"algorithm": {"name": "fedprox", "mu": True}}, "algorithm.mu", "it must be a number"),
    ({"train": {"epochs": [True, 2]}}, "train.epochs[0]", "it must be a number"),
    ({"seed": False}, "seed", "it must be a number"),
    ({"partition": {"clients": True}}, "partition.clients", "it must be a number"),
    ({"train": {"momentum": 1}}, "train.momentum", "it must be less than 1"),
    ({"stop": {"rounds": 0}}, "stop.rounds", "it must be at least 1"),
    ({"train": {"epochs": [3, 1]}}, "train.epochs", "a pair [low, high]"),
    ({"model": {"hidden": [8, 0]}}, "model.hidden[1]", "it must be at least 1"),
    ({"model": {"hidden": []}}, "model.hidden", "it must have at least 1 entry"),
    ({"model": {"name": "digits_cnn", "channels": [1, 2, 3, 4]}}, "model.channels", "at most 3 entries"),
    ({"name": "a b"}, "name", "letters, digits, dots, hyphens and underscores"),
    ({"data": {"source": "csv"}}, "data.path", "it is missing; give text or a list of texts"),
    ({"aggregation": {"rule": "krum"}}, "aggregation.f", "it is missing; give a whole number"),
    ({"schedule": {"cohort": 0}}, "schedule.cohort", "set it to 1 or more"),
    # combinations
    ({"aggregation": {"rule": "krum", "f": 4}}, "aggregation.f", "needs 11 updates"),
    ({"partition": {"kind": "dirichlet", "alpha": float("inf")}}, "partition.alpha", "it must be finite"),
    ({"engine": {"bank_memory": float("nan")}}, "engine.bank_memory", "it must be finite"),
    ({"topology": {"kind": "ring"}, "algorithm": {"name": "scaffold"}}, "topology.kind", "needs a server"),
    ({"algorithm": {"name": "dfedsam"}}, "topology.kind", "DFedSAM has no server"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("raw", "field", "words"), WRONG, ids=lambda value: value if isinstance(value, str) else ""
)
def test_what_is_wrong_is_told_in_the_users_words(raw: dict[str, Any], field: str, words: str) -> None:
    error = refusal(raw)
    assert error.field == field
    assert words in str(error)
    assert str(error).startswith(field)
    for jargon in ("Input should", "pydantic", "tuple", "dict", "NoneType", "None", "True", "False", "str'"):
        assert jargon not in str(error)


def test_values_are_shown_as_a_recipe_has_them() -> None:
    assert str(refusal({"train": {"lr": [True, 1]}})).startswith("train.lr = [true, 1]: ")
    assert str(refusal({"trian": {"lr": 0.1, "a": "b"}})).startswith("trian = { lr = 0.1, a = 'b' }: ")
    assert len(str(refusal({"train": {"lr": "x" * 1000}}))) < 200


def test_an_algorithm_that_refuses_names_what_the_recipe_says() -> None:
    with pytest.raises(InputError, match=r"^model\.name = 'logistic': FRAug augments"):
        assemble(parse({"algorithm": {"name": "fraug"}, "model": {"name": "logistic"}}))
    with pytest.raises(InputError, match=r"^schedule\.name = 'buffered': SCAFFOLD"):
        assemble(parse({"algorithm": {"name": "scaffold"}, "schedule": {"name": "buffered"}}))
    with pytest.raises(InputError, match=r"^aggregation\.rule = 'trimmed_mean': "):
        assemble(parse({"algorithm": {"name": "scaffold"}, "aggregation": {"rule": "trimmed_mean", "f": 1}}))


def test_batch_norm_is_not_given_batches_of_one() -> None:
    with pytest.raises(InputError, match=r"^train\.batch_size = 1: BatchNorm"):
        assemble(parse({"train": {"batch_size": 1}, "model": {"norm": "batch"}}))


def test_overrides_are_toml_or_bare_words() -> None:
    recipe = load(
        None,
        {
            "train.lr": "5e-2",
            "model.hidden": "[8, 4]",
            "algorithm.name": "fedprox",
            "algorithm.mu": "1",
            "partition": '{ kind = "iid", clients = 12 }',
            "data.test_fraction": "0.5",
        },
    )
    assert recipe.train.lr == 0.05
    assert recipe.model.model_dump()["hidden"] == (8, 4)
    assert recipe.algorithm == {"name": "fedprox", "mu": 1}
    assert recipe.partition.clients == 12
    assert recipe.data.test_fraction == 0.5


def test_an_override_into_a_value_is_refused() -> None:
    with pytest.raises(InputError, match=r"^seed\.x = '1': seed is a value and not a table"):
        load(None, {"seed": "3", "seed.x": "1"})


def test_an_empty_override_takes_a_key_out(tmp_path: Path) -> None:
    path = tmp_path / "study.toml"
    path.write_text(
        '[train]\nlr = 3.0\nsteps = 7\n\n[partition]\nkind = "dirichlet"\nalpha = 0.1\nclients = 15\n'
    )
    recipe = load(path, {"train.steps": "", "partition.kind": "iid", "partition.alpha": "", "stop.time": ""})
    assert (recipe.train.lr, recipe.train.steps, recipe.stop.time) == (3.0, None, None)
    assert recipe.partition.model_dump() == {"kind": "iid", "clients": 15}


def test_files_that_are_no_recipe(tmp_path: Path) -> None:
    (tmp_path / "study.toml").write_text("[train\n")
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")
    (tmp_path / "wrong.py").write_text("def recipe(:\n")
    (tmp_path / "number.py").write_text("def recipe():\n    return 3\n")
    for name, words in {
        "study.toml": "it is not TOML: .* line 1, column 7.*; correct that line",
        "study": "there is no such file; did you mean '.*study.toml'?",
        "absent.toml": "there is no such file; run `hansa new NAME`",
        "bytes.toml": "it is not TOML",
        "wrong.py": "it cannot be imported .SyntaxError: .*; correct .*wrong.py",
        "number.py": "it returned int; return a hansa.core.recipe.Recipe",
        "number.py:nothing": "has no 'nothing'; ",
        "absent.py": "there is no file",
    }.items():
        with pytest.raises(InputError, match=words):
            load(tmp_path / name)


def test_only_files_of_python_are_python(tmp_path: Path) -> None:
    path = tmp_path / "my.python.toml"
    path.write_text("seed = 7\n")
    assert load(path).seed == 7
    (tmp_path / "study.py").write_text(
        "from hansa.core.recipe import Recipe\ndef small():\n    return Recipe(seed=9)\nrecipe = small\n"
    )
    assert load(tmp_path / "study.py", {"train.lr": "0.5"}).train.lr == 0.5
    assert load(f"{tmp_path}/study.py:small").seed == 9


def test_objects_in_python_recipes_become_tables_that_make_them_again() -> None:
    recipe = Recipe.model_validate(
        {
            "algorithm": FedProx(mu=0.5),
            "aggregation": Krum(f=1),
            "population": Population(dropout=0.25),
        }
    )
    again = resolved(parse(tomllib.loads(resolved(recipe).toml())))
    made = parts(again)
    assert isinstance(made.algorithm, FedProx)
    assert made.algorithm.mu == 0.5
    assert again.aggregation["f"] == 1
    assert again.population["dropout"] == 0.25
    assert parts(Recipe.model_validate({"topology": Topology(kind="torus")})).topology == Topology(
        kind="torus"
    )


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_a_resolved_recipe_reads_back_as_itself(name: str) -> None:
    raw: dict[str, Any] = {"algorithm": {"name": name}, "attack": {"name": "sign_flip"}}
    if name == "dfedsam":
        raw["topology"] = {"kind": "ring"}
    if name == "selective":
        del raw["attack"]
    recipe = resolved(parse(raw))
    again = parse(tomllib.loads(recipe.toml()))
    assert again == recipe
    assert resolved(again) == recipe


def test_the_empty_recipe_is_the_default_one() -> None:
    assert parse({}) == load(None) == Recipe()


@pytest.mark.parametrize(
    ("data", "name"),
    [
        ({"source": "csv", "path": "/data/Ames housing.csv", "target": "price"}, "Ames-housing"),
        ({"source": "csv", "path": ["north.csv", "south.csv"], "target": -1}, "north"),
        ({"source": "npy", "x": "a.npy", "y": "b.npy"}, "npy"),
        ({"limit": 100}, "digits"),
    ],
)
def test_a_run_without_a_name_is_called_after_its_data(data: dict[str, Any], name: str) -> None:
    made = parse({"data": data})
    assert made.name == name
    assert parse(tomllib.loads(made.toml())) == made
    assert parse({"data": data, "name": "mine"}).name == "mine"
    assert Recipe(data=made.data).name == name
