"""Recipes for the dashboard's form: the same schema, checks and words as those of the commands."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from typing import Any

from hansa.cli import things
from hansa.cli.keys import Section, keys_of, sections
from hansa.cli.toml import differences, inline
from hansa.core.errors import InputError
from hansa.core.recipe import override, parse
from hansa.simulation.catalog import resolved


class Recipes:
    """See :class:`hansa.ui.form.Recipes`."""

    def __init__(self) -> None:
        self._things = {(each.section, each.name): each for each in things.things()}

    def choices(self) -> Mapping[str, Sequence[str]]:
        """The kinds of thing by section."""
        return things.choices()

    def made(self, text: str, changes: Mapping[str, str]) -> str:
        """A recipe with changes by dotted key; where the kind of a thing changes, only its keys are kept."""
        try:
            raw = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise InputError("recipe", None, f"it is not TOML: {error}", "correct that line") from error
        for section, (tag, _) in things.SECTIONS.items():
            kind, table = changes.get(f"{section}.{tag}"), raw.get(section)
            if kind and isinstance(table, dict) and table.get(tag) != kind:
                thing = self._things.get((section, kind))
                known = {each.name for each in keys_of(thing.kind)} if thing else set()
                raw[section] = {key: value for key, value in table.items() if key in known - {tag}}
        for key, value in changes.items():
            override(raw, key, value)
        return resolved(parse(raw)).toml()

    def sections(self, text: str) -> Sequence[Section]:
        """The tables of a recipe."""
        return sections(resolved(parse(tomllib.loads(text))))

    def inline(self, value: Any) -> str:
        """A value as TOML has it."""
        return inline(value)

    def differences(self, text: str) -> Sequence[tuple[str, str, str]]:
        """(key, value, default) where a recipe differs."""
        return differences(parse(tomllib.loads(text)))
