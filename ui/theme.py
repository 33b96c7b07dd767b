"""Colours and type, light and dark, of the pages and of what is drawn in them.

The ten colours of categories: M. A. Petroff, "Accessible Color Sequences for Data Visualization",
arXiv:2107.02270, as in the report's pictures.
"""

from __future__ import annotations

from typing import Any

CATEGORIES = (
    "#3f90da",
    "#ffa90e",
    "#bd1f01",
    "#94a4a2",
    "#832db6",
    "#a96b59",
    "#e76300",
    "#b9ac70",
    "#717581",
    "#92dadd",
)
STATUS = {
    "running": "blue",
    "queued": "gray",
    "finished": "green",
    "interrupted": "orange",
    "failed": "red",
    "unreadable": "red",
}
"""Streamlit's names of the colours in which statuses are written."""

_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
_MONO = "ui-monospace, SFMono-Regular, Menlo, Consolas, monospace"

THEME: dict[str, Any] = {
    "theme.font": _FONT,
    "theme.codeFont": _MONO,
    "theme.baseRadius": "0.5rem",
    "theme.baseFontSize": 15,
    "theme.paddingTop": "1rem",
    "theme.headingFontSizes": ["1.75rem", "1.3rem", "1.1rem", "1rem", "0.9rem", "0.85rem"],
    "theme.metricValueFontSize": "1.5rem",
    "theme.chartCategoricalColors": list(CATEGORIES),
    "theme.light.primaryColor": "#0b6bcb",
    "theme.light.backgroundColor": "#ffffff",
    "theme.light.secondaryBackgroundColor": "#f4f6f8",
    "theme.light.textColor": "#1f2328",
    "theme.light.borderColor": "#d9dee4",
    "theme.dark.primaryColor": "#4c9ff0",
    "theme.dark.backgroundColor": "#0f1318",
    "theme.dark.secondaryBackgroundColor": "#181d24",
    "theme.dark.textColor": "#e6e9ed",
    "theme.dark.borderColor": "#2f3741",
}
