"""shelf.toml: what a shelf may hold and how it decides. Written once by `init`, edited by people, checked on every
open.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from ..atomic import read_file
from ..errors import LorashelfError, NewerFormat, ShelfConfigError, UsageError
from ..lora.adapter import WIDTHS, BaseId, base_faults
from ..lora.given import as_texts
from ..merging import METHODS
from ..placement.policies import POLICIES

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FORMAT = 1
FILE = "shelf.toml"
LARGEST = 2**53 - 1  # what canonical JSON can hold


@dataclass(frozen=True, slots=True)
class Budget:
    """The room there is: `slots` adapters, and optionally `bytes` for everything under the shelf, at rest."""

    slots: int
    bytes: int | None = None
    keep: int = 1
    """How many other states undo and redo reach, and how many commits the path of a slot stays readable for."""

    def document(self) -> dict[str, Any]:
        """As in a manifest."""
        return {"slots": self.slots, "bytes": self.bytes, "keep": self.keep}


@dataclass(frozen=True, slots=True)
class Recipe:
    """How an arriving adapter is placed and merged."""

    policy: str = "kmerge++"
    threshold: float | str = "auto"
    """A similarity, or 'auto': the rule of `policy.auto_threshold` on the scores seen."""
    merge: str = "linear"
    parameters: Mapping[str, Any] = field(default_factory=dict)
    rank: int | None = None
    dtype: str | None = None
    seed: int = 0
    restore_norm: bool = False
    """Scale every merged slot to the mean norm of what it averages."""

    @property
    def later(self) -> Recipe:
        """The recipe of adds to slots that this one merged: itself, with `linear` in place of a method whose default
        weight is 1. Such a fold gives the newcomer as much weight as all before it and trims them anew each time.
        """
        averages = METHODS[self.merge].weights == "mean"
        return self if averages else replace(self, merge="linear", parameters={})

    def document(self) -> dict[str, Any]:
        """As in a manifest."""
        return {f.name: getattr(self, f.name) for f in fields(self)} | {"parameters": dict(self.parameters)}


@dataclass(frozen=True, slots=True)
class Settings:
    """All of shelf.toml."""

    budget: Budget
    recipe: Recipe = Recipe()
    base: str | None = None
    """A constraint: only adapters of this base (or of an alias) are accepted."""
    base_aliases: tuple[str, ...] = ()

    def agreed(
        self, stored: BaseId | None, offered: Mapping[str, BaseId], assume: bool = False
    ) -> tuple[BaseId | None, list[str]]:
        """The base of a shelf with these settings once adapters of the offered bases (task → base) are on it: the first
        known name; and a sentence for every one that contradicts it, undeclared, unless that is to be assumed.
        """
        base = stored if stored is not None and stored.name else BaseId(self.base or "")
        equal, faults = {self.base, *self.base_aliases}, []
        for task, other in offered.items():
            only_alias = base.name in self.base_aliases and not self.base
            if not base.name or (only_alias and other.name and other.name not in equal):
                base = other
            if other.name == base.name and base.revision is None:
                base = other
            declared = other.name != base.name and other.name in equal
            if other.contradicts(base) and not declared and not assume:
                faults.append(f"{task}: trained on {other}, expected is {base}")
        if faults and not self.base and not (stored and stored.name):  # then none of them is the right one
            faults = base_faults(offered.items())
        return base if base.name else None, faults

    def checked(self) -> Settings:
        """Itself, or UsageError naming every value that cannot be."""
        faults = [fault for _, fault in self.faults()]
        if faults:
            raise UsageError("; ".join(faults))
        return self

    def faults(self) -> list[tuple[str, str]]:
        """Every value that cannot be, as (key, sentence)."""
        return _faults(self)

    def changed(self, changes: Mapping[str, Any]) -> Settings:
        """The settings with other values, by the flat names that `new_settings` takes. Raises UsageError."""
        parts: dict[str, dict[str, Any]] = {"budget": {}, "recipe": {}, "": {}}
        for name, value in changes.items():
            if name not in SECTIONS:
                raise UsageError(f"there is no setting {name!r}", cure=f"the settings are {', '.join(SECTIONS)}")
            parts[SECTIONS[name]][name] = value
        budget, recipe = replace(self.budget, **parts["budget"]), replace(self.recipe, **parts["recipe"])
        return replace(self, budget=budget, recipe=recipe, **parts[""])


SECTIONS = {
    **{f.name: "budget" for f in fields(Budget)},
    **{f.name: "recipe" for f in fields(Recipe)},
    **dict.fromkeys(("base", "base_aliases"), ""),
}
"""Setting → the table of shelf.toml that holds it; "" for the top."""


def new_settings(slots: int, **options: Any) -> Settings:
    """Settings from flat options, as `init` and `cluster` take them; None means the default. Raises UsageError."""
    chosen = {name: value for name, value in options.items() if value is not None}
    budget = {name: chosen.pop(name) for name in ("bytes", "keep") if name in chosen}
    outer = {name: chosen.pop(name) for name in ("base", "base_aliases") if name in chosen}
    if "base_aliases" in outer:
        outer["base_aliases"] = as_texts(outer["base_aliases"], "base_aliases")
    return Settings(Budget(slots, **budget), Recipe(**chosen), **outer).checked()


def recorded(recipe: Mapping[str, Any], budget: Mapping[str, Any]) -> Settings:
    """The settings that a manifest recorded; it records neither base nor base_aliases. Raises UsageError."""
    return Settings(Budget(**budget), Recipe(**recipe)).checked()


def write_toml(settings: Settings) -> bytes:
    """The text of a new shelf.toml; what is left at its default stands there as a comment."""
    budget, recipe = settings.budget, settings.recipe
    lines = [
        "# What this shelf may hold, and how it decides. Edit it freely: changes hold for later adds.",
        f"format = {FORMAT}",
        _line("base", settings.base, "accept only adapters of this base model"),
        _line("base_aliases", list(settings.base_aliases) or None, "a list of other names of the same base"),
        "",
        "[budget]",
        f"slots = {budget.slots}",
        _line("bytes", budget.bytes, "room for everything under the shelf, at rest"),
        f"keep = {budget.keep}",
        "",
        "[recipe]",
        f'policy = "{recipe.policy}"',
        _line("threshold", recipe.threshold, ""),
        f'merge = "{recipe.merge}"',
        _line("rank", recipe.rank, "cap the rank stored; never pads"),
        _line("dtype", recipe.dtype, "f32, f16 or bf16; without it, as the adapter"),
        f"seed = {recipe.seed}",
        f"restore_norm = {str(recipe.restore_norm).lower()}",
    ]
    if recipe.parameters:
        lines += ["", "[recipe.parameters]"]
        lines += [f"{name} = {_toml(value)}" for name, value in sorted(recipe.parameters.items())]
    return ("\n".join(lines) + "\n").encode()


def edited_toml(text: str, changes: Mapping[str, Any]) -> bytes:
    """The text of a shelf.toml with other values; all else stays as it is, comments too. None takes a key out."""
    import tomlkit  # here: only `set` edits

    document = tomlkit.parse(text)
    for name, value in changes.items():
        section = SECTIONS[name]
        table = document.setdefault(section, tomlkit.table()) if section else document
        if value is None or value in ((), {}):
            table.pop(name, None)
        else:
            table[name] = list(value) if isinstance(value, tuple) else value
    return tomlkit.dumps(document).encode()


def read_toml(path: Path) -> Settings:
    """Read and check shelf.toml. Raises ShelfConfigError with every fault and its line, NewerFormat."""
    try:
        text = read_file(path).decode()
        document = tomllib.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise ShelfConfigError([f"cannot be read: {error}"], where=str(path), cure="mend the file") from error
    version = document.pop("format", None)
    if isinstance(version, int) and version > FORMAT:
        raise NewerFormat(
            f"format {version}; this lorashelf reads up to {FORMAT}", where=str(path), cure="upgrade lorashelf"
        )
    faults = [] if version == FORMAT else [("format", f"format is {version!r}, not {FORMAT}")]
    budget = _section(document, "budget", Budget, faults)
    recipe = _section(document, "recipe", Recipe, faults)
    base, aliases = document.pop("base", None), document.pop("base_aliases", [])
    faults += [(name, f"unknown key {name!r}") for name in document]
    if not isinstance(base, str | None):
        faults.append(("base", f"base is {base!r}, not a string"))
        base = None
    if not isinstance(aliases, list) or not all(isinstance(item, str) for item in aliases):
        faults.append(("base_aliases", f"base_aliases is {aliases!r}, not a list of strings"))
        aliases = []
    if "slots" not in budget:
        faults.append(("budget", "budget.slots is missing"))
    settings = Settings(Budget(**{"slots": 1, **budget}), Recipe(**recipe), base, tuple(aliases))
    faults += _faults(settings)
    if faults:
        raise config_error(path, text, faults)
    return settings


def config_error(path: Path, text: str, faults: list[tuple[str, str]]) -> ShelfConfigError:
    """The error for faults given as (key, sentence), each with the line of its key."""
    described = []
    for key, fault in faults:
        line = next(
            (i for i, row in enumerate(text.splitlines(), 1) if re.match(rf"\s*\[*{re.escape(key)}\b", row)), None
        )
        described.append(f"line {line}: {fault}" if line else fault)
    return ShelfConfigError(described, where=str(path), cure="edit these lines; docs/format.md lists every key")


def _section(document: dict[str, Any], name: str, noun: type, faults: list[tuple[str, str]]) -> dict[str, Any]:
    section = document.pop(name, {})
    if not isinstance(section, dict):
        faults.append((name, f"{name} is not a table"))
        return {}
    known = {f.name for f in fields(noun)}
    faults += [(key, f"unknown key {name}.{key}") for key in section if key not in known]
    return {key: value for key, value in section.items() if key in known}


def _faults(settings: Settings) -> list[tuple[str, str]]:
    budget, recipe = settings.budget, settings.recipe
    faults = [
        (name, f"{name} is {value!r}; it must be a whole number of at least {least}, below 2^53")
        for name, value, least, optional in [
            ("slots", budget.slots, 1, False),
            ("bytes", budget.bytes, 1, True),
            ("keep", budget.keep, 0, False),
            ("rank", recipe.rank, 1, True),
            ("seed", recipe.seed, 0, False),
        ]
        if not (optional and value is None) and not (type(value) is int and least <= value <= LARGEST)
    ]
    for name, value in (("dtype", recipe.dtype), ("policy", recipe.policy), ("merge", recipe.merge)):
        if not isinstance(value, str) and not (name == "dtype" and value is None):
            faults.append((name, f"{name} is {value!r}, not a name"))
    if isinstance(recipe.dtype, str) and recipe.dtype not in WIDTHS:
        faults.append(("dtype", f"dtype is {recipe.dtype!r}; choose from {', '.join(WIDTHS)}"))
    number = isinstance(recipe.threshold, int | float) and type(recipe.threshold) is not bool
    if recipe.threshold != "auto" and not (number and abs(recipe.threshold) <= 1):  # type: ignore[arg-type]
        faults.append(("threshold", f"threshold is {recipe.threshold!r}; a number from -1 to 1, or 'auto'"))
    if not isinstance(recipe.parameters, Mapping):
        faults.append(("parameters", f"parameters is {recipe.parameters!r}, not a table"))
    names = [*([] if settings.base is None else [settings.base]), *settings.base_aliases]
    if not all(isinstance(item, str) and item.isprintable() and item.strip() for item in names):
        faults.append(("base", f"base or base_aliases {names!r} hold a name that is empty or not printable text"))
    if not isinstance(recipe.restore_norm, bool):
        faults.append(("restore_norm", f"restore_norm is {recipe.restore_norm!r}; true or false"))
    for name, check in (
        ("policy", lambda: POLICIES[recipe.policy]),
        ("merge", lambda: METHODS[recipe.merge].checked(recipe.parameters)),
    ):
        try:
            if isinstance(getattr(recipe, name), str) and isinstance(recipe.parameters, Mapping):
                check()
        except LorashelfError as error:
            faults.append((name, f"{error.what} ({error.cure})"))
    if recipe.policy == "all" and recipe.merge != "linear":
        faults.append(("merge", "policy 'all' needs merge = \"linear\""))
    return faults


def _line(name: str, value: Any, comment: str) -> str:
    return f"# {name}: {comment}" if value is None else f"{name} = {_toml(value)}"


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    if isinstance(value, str):
        escaped = "".join(f"\\u{ord(c):04x}" if c < " " or c in '"\\\x7f' else c for c in value)
        return f'"{escaped}"'
    return repr(value)
