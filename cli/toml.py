"""Recipes as text for people: TOML with comments."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomli_w

from hansa.cli.keys import REQUIRED, Section, sections
from hansa.core.recipe import Recipe, load
from hansa.simulation.catalog import resolved

_WIDTH = 26


def shown(recipe: Recipe) -> str:
    """A resolved recipe, with the default beside every value that differs from it."""
    recipe = resolved(recipe)
    usual = {each.name: each for each in sections(resolved(load(None)))}
    top = load(None)
    lines = [
        _line(name, getattr(recipe, name), _beside(getattr(recipe, name), getattr(top, name)))
        for name in ("name", "seed")
    ]
    for section in sections(recipe):
        if not section.values:
            continue
        lines += ["", f"[{section.name}]"]
        like = usual[section.name]
        if section.tag:
            tag = section.values[section.tag]
            lines.append(_line(section.tag, tag, _beside(tag, like.values.get(section.tag))))
        same = not section.tag or section.values[section.tag] == like.values.get(section.tag)
        for key in section.keys:
            value = section.values.get(key.name)
            default = like.values.get(key.name, key.default) if same else key.default
            if value is not None:
                lines.append(_line(key.name, value, _beside(value, _plain(default))))
            elif default is not None:
                lines.append(f"# {key.name} is unset; default {inline(default)}")
    return "\n".join(lines) + "\n"


def differences(recipe: Recipe) -> list[tuple[str, str, str]]:
    """(key, value, default) where a recipe differs from the default one, and things from their defaults."""
    recipe, top = resolved(recipe), load(None)
    usual = {each.name: each for each in sections(resolved(top))}
    found = [
        (name, inline(getattr(recipe, name)), inline(getattr(top, name)))
        for name in ("name", "seed")
        if getattr(recipe, name) != getattr(top, name)
    ]
    for section in sections(recipe):
        like = usual[section.name]
        kind = section.values.get(section.tag) if section.tag else None
        same = not section.tag or kind == like.values.get(section.tag)
        if section.tag and not same:
            found.append(
                (f"{section.name}.{section.tag}", inline(kind), inline(like.values.get(section.tag)))
            )
        for key in section.keys:
            value = section.values.get(key.name)
            default = like.values.get(key.name, key.default) if same else key.default
            if section.values and _plain(value) != _plain(default):
                told = "required" if default is REQUIRED else inline(default)
                found.append((f"{section.name}.{key.name}", inline(value), told))
    return found


def template(recipe: Recipe, path: Path, choices: Mapping[str, tuple[str, ...]]) -> str:
    """A commented recipe to begin with: what differs from the defaults stands open, the rest in comments.

    ``path`` is where it will stand; ``choices`` are the names that a section's kind can have.
    """
    recipe, command = resolved(recipe), f"#   hansa run {shlex.quote(str(path))}"
    lines = [
        "# A recipe: what to run, as data. Lines that are commented out show the defaults.",
        command,
        f"{command} -c train.lr=0.05 --seed 1",
        "#   hansa config show             every value of the default recipe",
        "#   hansa strategies              what can stand as algorithm, schedule, rule, …",
        "",
        _line("name", recipe.name, "names the run directory"),
        _line("seed", recipe.seed, "names every random draw of the run"),
    ]
    for section in sections(recipe):
        lines += ["", f"# {section.meaning}"] if section.meaning else [""]
        lines += _opened(section, choices.get(section.name, ()))
    return "\n".join(lines) + "\n"


def _opened(section: Section, choices: tuple[str, ...]) -> list[str]:
    if not section.values and section.name == "attack":
        return ["# [attack]", "# " + _line("name", choices[0], _also(choices[0], choices))]
    lines = [f"[{section.name}]"]
    if section.tag:
        tag = section.values[section.tag]
        lines.append(_line(section.tag, tag, _also(tag, choices)))
    for key in section.keys:
        value = section.values.get(key.name)
        if value is None:
            lines.append(_line(f"# {key.name}", None, f"{key.meaning} (unset)"))
        elif section.tag and _plain(key.default) == value:
            lines.append(_line(f"# {key.name}", value, key.meaning))
        else:
            lines.append(_line(key.name, value, key.meaning))
    return lines


def _also(tag: str, choices: tuple[str, ...]) -> str:
    others = [each for each in choices if each != tag]
    return f"or {', '.join(others)}" if others else ""


def _beside(value: Any, default: Any) -> str:
    """What to say beside a value: its default, if it is another."""
    if _plain(value) == _plain(default):
        return ""
    return "no default" if default is REQUIRED else f"default {inline(default)}"


def _line(name: str, value: Any, comment: str) -> str:
    text = f"{name} = {'' if value is None else inline(value)}"
    return f"{text:<{_WIDTH}}  # {comment}" if comment else text


def inline(value: Any) -> str:
    """A value on one line of TOML."""
    if value is None:
        return "unset"
    if isinstance(value, Mapping):
        inside = (f"{_name(key)} = {inline(each)}" for key, each in value.items() if each is not None)
        return f"{{ {', '.join(inside)} }}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(inline, value))}]"
    return tomli_w.dumps({"v": value}).removeprefix("v = ").rstrip("\n")


def _name(key: str) -> str:
    return key if re.fullmatch(r"[\w-]+", key, re.ASCII) else inline(key)


def _plain(value: Any) -> Any:
    return list(map(_plain, value)) if isinstance(value, list | tuple) else value


__all__ = ["differences", "inline", "shown", "template"]
