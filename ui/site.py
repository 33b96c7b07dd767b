"""What this process shows, and who may do what in it: told once, before the pages are served."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hansa.ui.gate import Gate
from hansa.ui.source import Source

if TYPE_CHECKING:
    from hansa.ui.form import Recipes

__all__ = ["Site", "configure", "site"]


@dataclass(frozen=True, kw_only=True)
class Site:
    """What is served.

    Attributes
    ----------
    source: what is looked at.
    gate: who may, where others could reach it; None for this machine alone.
    recipes: gives what a new run can be; without it, none can be started from a page.
    """

    source: Source
    gate: Gate | None = None
    recipes: Callable[[], Recipes] | None = None


_site: Site | None = None


def configure(site: Site) -> None:
    """Say what the pages of this process show."""
    global _site
    _site = site


def site() -> Site:
    """What the pages of this process show."""
    if _site is None:
        raise RuntimeError("the dashboard was started without a source; start it with `hansa ui`")
    return _site
