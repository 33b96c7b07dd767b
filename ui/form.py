"""The form of a new run, made from the schema of recipes and checked as the command line checks them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import streamlit as st

from hansa.core import questions
from hansa.ui import parts
from hansa.ui.site import site

__all__ = ["Key", "Recipes", "Section", "new_run"]


class Key(Protocol):
    """One key of a table: its name, what it means, and its default."""

    @property
    def name(self) -> str:
        """As in the recipe."""
        ...

    @property
    def meaning(self) -> str:
        """For people."""
        ...


class Section(Protocol):
    """A table of a recipe: its keys, and their values in this recipe; ``tag`` names the kind of thing."""

    @property
    def name(self) -> str:
        """As in the recipe."""
        ...

    @property
    def tag(self) -> str | None:
        """The key that names the kind."""
        ...

    @property
    def meaning(self) -> str:
        """For people."""
        ...

    @property
    def keys(self) -> Sequence[Key]:
        """All but the tag."""
        ...

    @property
    def values(self) -> Mapping[str, Any]:
        """By key."""
        ...


class Recipes(Protocol):
    """What knows recipes, and all that can stand in them: the floor above."""

    def choices(self) -> Mapping[str, Sequence[str]]:
        """The kinds of thing by section."""
        ...

    def made(self, text: str, changes: Mapping[str, str]) -> str:
        """A recipe (TOML) with changes by dotted key, checked, and all its defaults written out.

        Raises
        ------
        InputError
            Naming the key, its value and the remedy.
        """
        ...

    def sections(self, text: str) -> Sequence[Section]:
        """The tables of a recipe that :meth:`made` made."""
        ...

    def inline(self, value: Any) -> str:
        """A value as TOML has it; nothing for one that is unset."""
        ...

    def differences(self, text: str) -> Sequence[tuple[str, str, str]]:
        """(key, value, default) where a recipe differs from the defaults of what it names."""
        ...


@st.dialog("New run", width="large", icon=":material/add:")
def new_run() -> None:
    """Ask for a recipe and start it."""
    given = site().recipes
    assert given is not None
    recipes = given()
    text = _base()
    if text is None:
        return
    changes: dict[str, str] = {}
    left, right = st.columns(2)
    changes["name"] = left.text_input(
        "Name", str(_at(text, "name", "")), placeholder="after the data", help="names the run directory"
    )
    seeds = right.text_input(
        "Seed", str(_at(text, "seed", 0)), help="one, or several as in `0 1 2`: a run each"
    )
    with parts.guarded():
        known = recipes.made(text, {})
        changes |= _tags(recipes, known)
        shown = recipes.made(text, _kinds(recipes, known, changes))
        changes |= _keys(recipes, shown)
    with parts.guarded():
        ready = [recipes.made(text, {**changes, "seed": seed}) for seed in seeds.replace(",", " ").split()]
        many = f"Start {len(ready)} runs" if len(ready) > 1 else "Start"
        if st.button(many, type="primary", icon=":material/play_arrow:", disabled=not ready):
            for each in ready:
                site().source.start(each)
            st.rerun()


def _base() -> str | None:
    """The recipe to begin with."""
    ended = [run for run in parts.run_list() if run.id and run.status != "unreadable"]
    names = {"": "the default recipe", "file": "a file of yours", **{run.id: run.id for run in ended[:100]}}
    base = st.selectbox("Begin with the recipe of", list(names), format_func=names.__getitem__)
    if base == "file":
        given = st.file_uploader("Recipe", type="toml")
        return None if given is None else given.getvalue().decode("utf-8", "replace")
    if not base:
        return ""
    with parts.guarded():
        return site().source.ask(questions.recipe, base)
    return None


def _at(text: str, key: str, default: Any) -> Any:
    import tomllib

    try:
        return tomllib.loads(text).get(key, default)
    except tomllib.TOMLDecodeError:
        return default


def _kinds(recipes: Recipes, known: str, changes: Mapping[str, str]) -> dict[str, str]:
    """The changes that a section's kind was changed by, and nothing of the kind before."""
    usual = {f"{s.name}.{s.tag}": s.values.get(s.tag) for s in recipes.sections(known) if s.tag}
    return {key: value for key, value in changes.items() if key in usual and usual[key] != value}


def _tags(recipes: Recipes, known: str) -> dict[str, str]:
    choices = recipes.choices()
    chosen = {}
    with st.container(horizontal=True):
        for section in recipes.sections(known):
            if section.tag is None or section.name not in choices or not section.values:
                continue
            kinds, now = list(choices[section.name]), section.values[section.tag]
            kinds = kinds if now in kinds else [now, *kinds]
            chosen[f"{section.name}.{section.tag}"] = st.selectbox(
                section.name.capitalize(),
                kinds,
                index=kinds.index(now),
                key=f"new {section.name} {now}",
                help=section.meaning or None,
                width=200,
            )
    return chosen


def _keys(recipes: Recipes, shown: str) -> dict[str, str]:
    """What differs from the recipe that is shown, by dotted key."""
    changes = {}
    for section in recipes.sections(shown):
        if not section.keys or not section.values:
            continue
        kind = section.values.get(section.tag, "") if section.tag else ""
        with st.expander(f"{section.name.capitalize()}{f' · {parts.plain(str(kind))}' if kind else ''}"):
            for i, (column, key) in enumerate(zip(_pairs(len(section.keys)), section.keys, strict=True)):
                value = section.values.get(key.name)
                name = f"new {section.name} {kind} {key.name} {i}"
                if isinstance(value, bool):
                    given = str(column.toggle(key.name, value, key=name, help=key.meaning or None)).lower()
                else:
                    given = column.text_input(
                        key.name,
                        "" if value is None else recipes.inline(value),
                        key=name,
                        help=key.meaning or None,
                        placeholder="unset",
                    )
                if given != ("" if value is None else recipes.inline(value)):
                    changes[f"{section.name}.{key.name}"] = given
    return changes


def _pairs(count: int) -> list[Any]:
    left, right = st.columns(2)
    return [(left, right)[i % 2] for i in range(count)]
