"""Valid names of tasks and problem types: visible text on one line."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator

from .errors import TaskNameError

_BREAKS = ("Cc", "Cs", "Zl", "Zp")  # control characters, surrogates, line breaks
_UNSEEN = frozenset(
    [0x034F, 0x115F, 0x1160, 0x17B4, 0x17B5, 0x180B, 0x180C, 0x180D, 0x180F, 0x2800, 0x3164, 0xFFA0]
)  # fillers and the like that are not in category Cf
_VARIATIONS = frozenset([*range(0xFE00, 0xFE10), *range(0xE0100, 0xE01F0)])
_NON_JOINER, _JOINER, _KEYCAP = "\u200c", "\u200d", "\u20e3"
_INDIC = {
    "DEVANAGARI",
    "BENGALI",
    "GURMUKHI",
    "GUJARATI",
    "ORIYA",
    "TAMIL",
    "TELUGU",
    "KANNADA",
    "MALAYALAM",
    "SINHALA",
}
_JOINING = _INDIC | {"ARABIC", "SYRIAC", "MANDAIC", "NKO", "MONGOLIAN", "KHMER", "MYANMAR"}  # scripts with joiners


def task_name(name: str) -> str:
    """Return a task name in NFC. Raises TaskNameError for an empty name, a slash, '..', outer blanks, invisible
    characters, control characters, line breaks and more than 255 bytes.
    """
    if not isinstance(name, str):
        raise TaskNameError(f"task name {name!r} is not text", cure="give a plain name")
    normal = unicodedata.normalize("NFC", name)
    faults = list(_unprintable(normal))
    if "/" in normal or "\\" in normal:
        faults.append("has a slash")
    if ".." in normal or normal == ".":
        faults.append("has '..' or is '.'")
    if len(normal.encode(errors="surrogatepass")) > 255:
        faults.append("is longer than 255 bytes")
    if faults:
        what = f"task name {ascii(name) if _hidden(name) else repr(name)} {', '.join(faults)}"
        raise TaskNameError(what, cure="give a plain name: --task NAME, or NAME=ADAPTER")
    return normal


def problem_type(kind: str) -> str:
    """Return the type of a task. Raises TaskNameError if it is empty, has outer blanks or is not printable text."""
    faults = list(_unprintable(kind)) if isinstance(kind, str) else ["is not text"]
    if faults:
        what = f"problem type {kind!a} is not printable text: it {', '.join(faults)}"
        raise TaskNameError(what, cure="give a plain word: --type TYPE")
    return kind


def on_one_line(text: str) -> bool:
    """Return whether a text has no control characters, line breaks or surrogates."""
    return not any(unicodedata.category(c) in _BREAKS for c in text)


def _unprintable(text: str) -> Iterator[str]:
    if not text.strip():
        yield "is empty"
    elif text != text.strip():
        yield "begins or ends with a blank"
    if not on_one_line(text):
        yield "has a control character or a line break"
    if hidden := _hidden(text):
        yield f"has an invisible character ({', '.join(f'U+{ord(c):04X}' for c in hidden)})"


def _hidden(text: str) -> list[str]:
    """Return the invisible or direction-changing characters, by which two names that look alike could differ.

    Characters that change how their neighbours look do not count: a joiner between letters of a joining script or in
    an emoji; a variation selector after a symbol or a Chinese character.
    """
    padded = f" {text} "
    return [
        c
        for before, c, after in zip(padded, text, padded[2:], strict=False)
        if _unseen(c) and not _shapes(before, c, after)
    ]


def _unseen(c: str) -> bool:
    return unicodedata.category(c) == "Cf" or ord(c) in _UNSEEN or ord(c) in _VARIATIONS


def _shapes(before: str, c: str, after: str) -> bool:
    """Return whether an invisible character changes the look of its neighbours."""
    if c in (_NON_JOINER, _JOINER) and _script(before) in _JOINING and _script(after) in _JOINING:
        return True
    if c == _JOINER:  # several emoji joined into one
        return unicodedata.category(after) == "So" and (
            unicodedata.category(before) in ("So", "Sk") or _selects(before)
        )
    if _selects(c):
        symbol = not before.isascii() and unicodedata.category(before) in ("So", "Sm", "Po")
        return symbol or after == _KEYCAP or _script(before) == "CJK"
    return False


def _selects(c: str) -> bool:
    return ord(c) in _VARIATIONS


def _script(c: str) -> str:
    return unicodedata.name(c, "").partition(" ")[0]
