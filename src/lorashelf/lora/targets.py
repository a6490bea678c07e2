"""The modules of a base that PEFT adapts: an adapter's `target_modules` and its companions.

They are kept, not replaced by the modules' paths: PEFT renames the keys of an adapter that was trained with another
version of transformers, but not its targets, so a name such as `q_proj` still finds its module where a path would not.
Merged adapters have the union: all names, or one pattern if names cannot express it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from .matching import BAD_PATTERN, endings
from .matching import targets as matching

TARGET_FIELDS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
Targets = dict[str, Any]
"""The fields TARGET_FIELDS of a config."""


def named(names: Iterable[str]) -> Targets:
    """Return targets that are names only: paths or suffixes."""
    return {**dict.fromkeys(TARGET_FIELDS), "target_modules": sorted(set(names))}


def targets_of(config: Mapping[str, Any], paths: Collection[str]) -> Targets:
    """Return a config's targets, as far as they match one of the modules, and the paths of unmatched modules."""
    found = {field: config.get(field) or None for field in TARGET_FIELDS}
    wanted = found["target_modules"]
    if wanted is None:
        return named(paths)
    if not isinstance(wanted, str):
        here = {ending for path in paths for ending in endings(path)}
        found["target_modules"] = sorted(here.intersection(wanted))
    return covering(found, paths)


def covering(found: Targets, paths: Collection[str]) -> Targets:
    """Return the targets extended by the paths that they do not match."""
    try:
        left = _left(found, paths)
        if left and found["target_modules"]:
            found = _union([found, named(left)])
            left = _left(found, paths)
    except BAD_PATTERN:
        return named(paths)
    return named(paths) if left else found


def _left(found: Targets, paths: Collection[str]) -> list[str]:
    matches = matching(found)
    return [path for path in paths if not matches(path)]


def joined(sources: Iterable[tuple[Mapping[str, Any], Collection[str]]]) -> Targets:
    """Return targets that match whatever those of any config match; each config comes with its adapter's modules."""
    distinct: list[Targets] = []
    everything: set[str] = set()
    for config, paths in sources:
        found = targets_of(config, paths)
        everything.update(paths)
        if found not in distinct:
            distinct.append(found)
    if len(distinct) == 1:
        return distinct[0]
    words = [named(path.rpartition(".")[2] for path in everything) if x == ALL_LINEAR else x for x in distinct]
    try:
        return covering(_union(words), everything)
    except BAD_PATTERN:
        return named(everything)


ALL_LINEAR = {**named(()), "target_modules": "all-linear"}


def _union(several: Iterable[Targets]) -> Targets:
    """Return names if all targets are names only, else one pattern."""
    several = list(several)
    if all(_names_only(each) for each in several):
        return named(_shortest({name for each in several for name in each["target_modules"]}))
    pattern, *others = map(_pattern, several)
    for other in others:
        if f"(?:{pattern})" in other:
            pattern = other
        elif other != pattern and f"(?:{other})" not in pattern:
            pattern = f"(?:{pattern})|(?:{other})"
    re.compile(pattern)
    return {**named(()), "target_modules": pattern}


def _names_only(found: Targets) -> bool:
    companions = (found[field] for field in TARGET_FIELDS if field != "target_modules")
    return isinstance(found["target_modules"], list) and not any(each is not None for each in companions)


def _shortest(names: set[str]) -> Iterator[str]:
    """Return the names without a proper suffix among them."""
    return (name for name in names if not any(ending in names for ending in list(endings(name))[1:]))


# as one pattern, as PEFT matches them (peft.tuners.tuners_utils.check_target_module_exists) ------------------------


def _pattern(found: Targets) -> str:
    """Return a regular expression that matches exactly the whole paths that the targets match. Raises re.error."""
    wanted, excluded, layers = found["target_modules"], found["exclude_modules"], found["layers_to_transform"]
    unless = rf"(?!(?:{_names(excluded)})\Z)" if excluded else ""
    if isinstance(wanted, str) or layers is None:
        return unless + _names(wanted)
    numbers = "|".join(map(str, [layers] if isinstance(layers, int) else layers))
    inside = _in_layers(found["layers_pattern"], numbers)
    return rf"{unless}(?:{_any(wanted)}|{inside}.*\.{_any(wanted)})"


def _names(names: str | Collection[str]) -> str:
    if not isinstance(names, str):
        return rf"(?:.*\.)?{_any(names)}"
    flags = re.match(r"\(\?([aimsux]+)\)", names)  # global flags are allowed only at the start of a pattern
    return f"(?{flags[1]}:{names[flags.end() :]})" if flags else names


def _any(names: Iterable[str]) -> str:
    return f"(?:{'|'.join(map(re.escape, sorted(names)))})"


def _in_layers(patterns: str | list[str] | None, numbers: str) -> str:
    """Return a lookahead: the first number in the path, or the first after one of `patterns`, is one of `numbers`."""
    if not patterns:
        return rf"(?=(?:(?!\.[^.]*\.\d+\.).)*\.[^.]*\.(?:{numbers})\.)"
    words = [patterns] if isinstance(patterns, str) else patterns
    found, before = [], ""
    for word in words:
        first = rf"(?:{word}\.|(?!{word}\.\d)(?:(?!\.{word}\.\d+\.).)*\.{word}\.)"
        found.append(rf"{before}{first}(?:{numbers})\.")
        before += rf"(?!(?:.*\.)?{word}\.\d+\.)"
    return f"(?={'|'.join(found)})"
