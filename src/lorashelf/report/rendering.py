"""The templates of reports and pages. Importing this module loads Jinja2."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

from ..export.model_card import markdown_text
from .heatmap import label
from .numbers import size

TEMPLATES = Path(__file__).parent / "templates"


def rendered(template: str, **values: Any) -> str:
    """Return a template filled with these values. In HTML, every value is escaped; in Markdown, what passes `text`."""
    return _environment().get_template(template).render(**values)


@cache
def _environment() -> Environment:
    made = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=select_autoescape(["html"], default=False),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.filters |= {"size": size, "percent": percent, "share": share, "cosine": cosine}
    made.filters |= {"moment": moment, "short": label, "text": markdown_text}
    return made


def percent(value: float) -> str:
    """Format a percentage.

    >>> percent(100.0), percent(16.666), percent(0.9876)
    ('100 %', '16.7 %', '0.99 %')
    """
    return f"{value:.0f} %" if value >= 99.95 else f"{value:.1f} %" if value >= 10 else f"{value:.2f} %"


def share(value: float | None) -> str:
    """Format a predicted quality; '–' for none."""
    return "–" if value is None else f"{value:.3f}"


def cosine(value: float, digits: int) -> str:
    """Format a cosine.

    >>> cosine(-0.1234, 2)
    '−0.12'
    """
    return f"{value:.{digits}f}".replace("-", "−")


def moment(time: str) -> str:
    """Format a time of the log.

    >>> moment("2026-11-29T03:34:20Z")
    '2026-11-29 03:34:20 UTC'
    """
    return time.replace("T", " ").replace("Z", " UTC")
