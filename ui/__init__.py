"""What people look at: figures in words, the pictures and the report of a run."""

from __future__ import annotations

import math

__all__ = ["duration", "is_share", "number", "percent", "score", "size"]

_SHARES = ("clients/mean", "clients/worst")


def duration(seconds: float) -> str:
    """Seconds as people say them: ``0.42 s``, ``7.5 s``, ``3 min 20 s``, ``2 h 05 min``, ``3 d 04 h``."""
    if seconds < 1:
        return f"{seconds:.2f} s" if seconds else "0 s"
    if seconds < 60:
        return f"{seconds:.1f} s" if round(seconds, 1) < 60 else "1 min 00 s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    hours = round(seconds / 3600)
    return f"{hours // 24} d {hours % 24:02d} h"


def size(count: float) -> str:
    """Bytes in decimal units and three digits: ``512 B``, ``8.12 MB``, ``1.20 GB``."""
    if count < 1000:
        return f"{count:.0f} B"
    for unit in ("kB", "MB", "GB", "TB"):
        count /= 1000
        if count < 999.5 or unit == "TB":
            break
    digits = 2 if count < 9.995 else 1 if count < 99.95 else 0
    return f"{count:.{digits}f} {unit}"


def percent(value: float | None) -> str:
    """``91.25 %``, or a dash."""
    return "–" if value is None or math.isnan(value) else f"{100 * value:.2f} %"


def number(value: float | None) -> str:
    """Three digits, or a dash."""
    return "–" if value is None or math.isnan(value) else f"{value:.3g}"


def is_share(metric: str) -> bool:
    """Whether a metric is a share between 0 and 1."""
    return "accuracy" in metric or metric in _SHARES


def score(value: float | None, metric: str) -> str:
    """A metric as people read it: a share as percent."""
    return percent(value) if is_share(metric) else number(value)
