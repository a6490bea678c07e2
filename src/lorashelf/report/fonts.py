"""Installed fonts for characters that matplotlib's own font lacks: names may be in any script."""

from __future__ import annotations

from collections.abc import Iterable

from matplotlib.font_manager import FontEntry, FontProperties, findfont, fontManager, get_font

OWN = "DejaVu Sans"  # comes with matplotlib
BOXES = "Last Resort"  # draws every character as a box


def families(text: Iterable[str]) -> tuple[list[str], list[str]]:
    """Return the font families that cover a text, matplotlib's own first, and the characters that no font has."""
    own = get_font(findfont(FontProperties(family=OWN)))
    chosen, missing = [OWN], {c for c in text if not own.get_char_index(ord(c))}
    others = [font for font in fontManager.ttflist if BOXES not in font.name] if missing else []
    drawn = {font.name: _drawn_by(font.fname, missing) for font in sorted(others, key=_plainness)}
    while missing and (best := max(drawn, key=lambda name: len(drawn[name] & missing), default="")):
        if not drawn[best] & missing:
            break
        chosen.append(best)
        missing -= drawn[best]
    return chosen, sorted(missing)


def _plainness(font: FontEntry) -> tuple[bool, bool, bool, str]:
    """Return a sort key, the plainest face last: a family's last face represents the family."""
    return "Sans" not in font.name, font.style == "normal", font.weight in (400, "normal", "regular"), font.name


def _drawn_by(path: str, characters: set[str]) -> set[str]:
    """Return the characters for which a font file has an outline; a font of coloured bitmaps has none."""
    try:
        font = get_font(path)
        return {c for c in characters if font.get_char_index(ord(c)) and font.load_char(ord(c)).width > 0}
    except (OSError, RuntimeError):
        return set()
