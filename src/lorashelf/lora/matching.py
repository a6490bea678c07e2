r"""Matching modules with the names and patterns of an adapter_config.json, as PEFT does, in time linear in both.

target_modules, exclude_modules   a pattern that matches the whole path, or names: a path or a suffix of it
rank_pattern, alpha_pattern       regular expressions, of which the first that matches "(.*\.)?(KEY)$" applies
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Generic, TypeVar

T = TypeVar("T")
BAD_PATTERN = (re.error, OverflowError, RecursionError)  # raised when compiling a hostile pattern
_ANY = "\0"  # any one character, in the fixed suffix of a key; no path contains it
_PLAIN = re.compile(r"[\w.-]*")


class Key:
    """One key of `rank_pattern` or `alpha_pattern`, with the fixed suffix of all paths that it matches."""

    def __init__(self, key: str) -> None:
        """Compile the key, unless it is plain text, for which the suffix is enough. Raises one of BAD_PATTERN."""
        self.ending, plain = _fixed_ending(key.removeprefix("^"))
        self._whole = key.startswith("^")
        self._rule = None if plain else re.compile(rf"(.*\.)?({key})$")

    def matches(self, path: str) -> bool:
        """Return whether PEFT applies the key to a path that ends with `ending` (peft.utils.other.get_pattern_key)."""
        if self._rule is not None:
            return self._rule.match(path) is not None
        before = len(path) - len(self.ending)
        return before == 0 or (before > 0 and not self._whole and path[before - 1] == ".")


class FirstMatch(Generic[T]):
    """PEFT's rule for `rank_pattern` and `alpha_pattern`: the value of the first key that matches a path.

    A key is a regular expression, and only keys with the path's fixed suffix are tried: many keys for one module each
    cost no more than a few.
    """

    def __init__(self, keys: Iterable[tuple[Key, T]]) -> None:
        self._keys = list(keys)
        self._by_ending: dict[
            tuple[int, ...], dict[str, list[int]]
        ] = {}  # lengths of the fixed runs → characters → places
        for place, (key, _) in enumerate(self._keys):
            runs = key.ending.split(_ANY)
            self._by_ending.setdefault(tuple(map(len, runs)), {}).setdefault("".join(runs), []).append(place)
        self._slices = {lengths: _slices(lengths) for lengths in self._by_ending}

    def of(self, path: str, default: T) -> T:
        """Return the value of the first key that matches the path, else the default."""
        places = sorted(self._candidates(path))
        return next((self._keys[place][1] for place in places if self._keys[place][0].matches(path)), default)

    def _candidates(self, path: str) -> Iterator[int]:
        for lengths, by_letters in self._by_ending.items():
            yield from by_letters.get("".join([path[part] for part in self._slices[lengths]]), ())


def _fixed_ending(key: str) -> tuple[str, bool]:
    """Return the suffix of every match of a regular expression, with _ANY for a dot (empty if unknown), and whether it
    is the whole expression.
    """
    if _PLAIN.fullmatch(key):
        return key.replace(".", _ANY), True
    if "|" in key or "(?" in key:  # alternatives; flags
        return "", False
    ending: list[str] = []
    plain = True
    for escaped, letter in re.findall(r"(\\?)(.)", key, re.DOTALL):
        if escaped and not letter.isalnum():
            ending.append(letter)
        elif escaped or letter in f"^$*+?{{}}[]()\\{_ANY}":
            ending.clear()
            plain = False
        else:
            ending.append(_ANY if letter == "." else letter)
    return "".join(ending), plain


def _slices(lengths: tuple[int, ...]) -> list[slice]:
    """Return where the fixed runs of a suffix are in a path, counted from its end, with one character between runs."""
    found, start = [], -(sum(lengths) + len(lengths) - 1)
    for length in lengths:
        if length:
            found.append(slice(start, start + length or None))
        start += length + 1
    return found


def targets(config: Mapping[str, Any]) -> Callable[[str], bool]:
    """Return a function from a path to whether PEFT adapts it (peft.tuners.tuners_utils.check_target_module_exists).

    Raises one of BAD_PATTERN, now or when the function is called.
    """
    excluded, wanted = config.get("exclude_modules"), config.get("target_modules")
    left_out = _named(excluded) if excluded else _never
    if wanted is None or wanted == "all-linear":
        return lambda path: not left_out(path)
    named = _named(wanted)
    if isinstance(wanted, str):
        return lambda path: not left_out(path) and named(path)
    whole, in_layers = frozenset(wanted), _layers(config)
    return lambda path: not left_out(path) and (path in whole or (named(path) and in_layers(path)))


def _never(path: str) -> bool:
    return False


def _named(names: str | Iterable[str]) -> Callable[[str], bool]:
    """Return a matcher of a pattern for whole paths, or of names: the path or a suffix."""
    if isinstance(names, str):
        rule = re.compile(names)
        return lambda path: rule.fullmatch(path) is not None
    known = frozenset(names)
    return lambda path: any(ending in known for ending in endings(path))


def endings(path: str) -> Iterator[str]:
    """Yield the path and what follows each of its dots.

    >>> list(endings("layers.0.q_proj"))
    ['layers.0.q_proj', '0.q_proj', 'q_proj']
    """
    yield path
    at = path.find(".")
    while at >= 0:
        yield path[at + 1 :]
        at = path.find(".", at + 1)


def _layers(config: Mapping[str, Any]) -> Callable[[str], bool]:
    """Return a matcher of paths in `layers_to_transform`, with the layer's number found by `layers_pattern`."""
    layers, patterns = config.get("layers_to_transform"), config.get("layers_pattern")
    if layers is None or layers == []:
        return lambda path: True
    patterns = [patterns] if isinstance(patterns, str) and patterns else patterns or []
    before = [rf"(?:^|.*?\.){pattern}" for pattern in patterns] or [r".*?\.[^.]*"]  # the first number is the layer's
    rules = [re.compile(rf"{rule}\.(?P<idx>\d+)\.") for rule in before]
    wanted = frozenset([layers] if isinstance(layers, int) else layers)

    def inside(path: str) -> bool:
        found = next((match for rule in rules if (match := rule.match(path))), None)
        return found is not None and int(found["idx"]) in wanted

    return inside
