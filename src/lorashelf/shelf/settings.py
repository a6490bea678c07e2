"""shelf.toml: what a shelf may hold and how it decides. Written by `init`, edited by people and by `set`, checked on
every open.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from ..atomic import read_file
from ..errors import LorashelfError, NewerFormat, ShelfConfigError, UsageError
from ..formats.codecs import CODECS
from ..lora.adapter import WIDTHS, BaseId, base_faults
from ..lora.given import as_texts
from ..lora.quality import MOST_QUALITY
from ..lora.similarity import METRICS
from ..merging.merge_method import METHODS
from ..merging.spec import MergeSpec
from ..placement.policies import BYTES, COSINE, POLICIES, PlacementSpec

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FORMAT = 2
FILE = "shelf.toml"
LARGEST = 2**53 - 1  # the largest integer in canonical JSON


@dataclass(frozen=True, slots=True)
class Budget:
    """The budget: `slots` adapters, and optionally `bytes` for everything under the shelf, at rest."""

    slots: int | None
    """None with policy `bytes`, which counts bytes only."""
    bytes: int | None = None
    keep: int = 1
    """The most other states that undo and redo reach, and the commits for which a slot's path stays readable."""

    def document(self) -> dict[str, Any]:
        """Return the document in a manifest."""
        return {"slots": self.slots, "bytes": self.bytes, "keep": self.keep}


@dataclass(frozen=True, slots=True)
class Settings:
    """All of shelf.toml."""

    budget: Budget
    placement: PlacementSpec = field(default_factory=PlacementSpec)
    merge: MergeSpec = field(default_factory=MergeSpec)
    base: str | None = None
    """A constraint: only adapters of this base (or of an alias) are accepted."""
    base_aliases: tuple[str, ...] = ()

    @property
    def recipe(self) -> dict[str, Any]:
        """How adapters are placed and merged, as in a manifest and in the table `recipe` of shelf.toml."""
        return {**self.placement.document(), **self.merge.document()}

    def agreed(
        self, stored: BaseId | None, offered: Mapping[str, BaseId], assume: bool = False
    ) -> tuple[BaseId | None, list[str]]:
        """Return the base of a shelf with these settings and adapters of the offered bases (task → base): the first
        known name; and a sentence per base that contradicts it, unless declared as an alias or assumed equal.
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
        if faults and not self.base and not (stored and stored.name):  # then no base is known to be right
            faults = base_faults(offered.items())
        return base if base.name else None, faults

    def checked(self) -> Settings:
        """Return the settings themselves. Raises UsageError naming every invalid value."""
        faults = self.faults()
        if faults:
            keys = ", ".join(dict.fromkeys(key for key, _ in faults))
            cure = f"change {keys}: docs/format.md lists every key"
            raise UsageError("; ".join(fault for _, fault in faults), cure=cure)
        return self

    def faults(self) -> list[tuple[str, str]]:
        """Return every invalid value, as (key, sentence)."""
        return _faults(self)

    def changed(self, changes: Mapping[str, Any]) -> Settings:
        """Return the settings with other values, by the flat names of `new_settings`. Raises UsageError."""
        parts: dict[str, dict[str, Any]] = {"budget": {}, "recipe": {}, "": {}}
        for name, value in changes.items():
            if name not in SECTIONS:
                raise UsageError(f"there is no setting {name!r}", cure=f"the settings are {', '.join(SECTIONS)}")
            parts[SECTIONS[name]][name] = value
        placement, merge = specs({**self.recipe, **parts["recipe"]})
        budget = replace(self.budget, **parts["budget"])
        return replace(self, budget=budget, placement=placement, merge=merge, **parts[""])


def specs(recipe: Mapping[str, Any]) -> tuple[PlacementSpec, MergeSpec]:
    """Return how adapters are placed and merged, from the keys of a recipe; missing keys have their defaults."""
    chosen = {name: recipe[name] for name in RECIPE if name in recipe}
    placement = {name: chosen.pop(name) for name in ("policy", "threshold", "floor", "similarity") if name in chosen}
    if "merge" in chosen:
        chosen["method"] = chosen.pop("merge")
    return PlacementSpec(**placement), MergeSpec(**chosen)


RECIPE = (*PlacementSpec().document(), *MergeSpec().document(), "encoding", "quality", "floor", "similarity")
SECTIONS = {
    **{f.name: "budget" for f in fields(Budget)},
    **dict.fromkeys(RECIPE, "recipe"),
    **dict.fromkeys(("base", "base_aliases"), ""),
}
"""Setting → the table of shelf.toml that holds it; "" for the top."""


def new_settings(slots: int | None, **options: Any) -> Settings:
    """Return settings from flat options, as of `init` and `cluster`; None means the default: without slots, but with
    bytes, policy `bytes` and encoding `coded` at the highest quality. Raises UsageError.
    """
    chosen = {name: value for name, value in options.items() if value is not None}
    if slots is None and "policy" not in chosen and "bytes" in chosen:
        chosen["policy"] = BYTES
    if chosen.get("policy") == BYTES:
        chosen = {"encoding": "coded", "quality": MOST_QUALITY, **chosen}
    budget = {name: chosen.pop(name) for name in ("bytes", "keep") if name in chosen}
    outer = {name: chosen.pop(name) for name in ("base", "base_aliases") if name in chosen}
    if "base_aliases" in outer:
        outer["base_aliases"] = as_texts(outer["base_aliases"], "base_aliases")
    if unknown := chosen.keys() - set(RECIPE):
        raise TypeError(f"new_settings has no option {', '.join(sorted(unknown))}")
    return Settings(Budget(slots, **budget), *specs(chosen), **outer).checked()


def recorded(recipe: Mapping[str, Any], budget: Mapping[str, Any]) -> Settings:
    """Return the settings recorded in a manifest, without base and base_aliases. Raises UsageError."""
    return Settings(Budget(**budget), *specs(recipe)).checked()


def write_toml(settings: Settings) -> bytes:
    """Return the text of a new shelf.toml; optional keys without a value become comments."""
    budget, placement, merge = settings.budget, settings.placement, settings.merge
    lines = [
        "# What this shelf may hold, and how it decides. Edit it freely: changes hold for later adds.",
        f"format = {FORMAT}",
        _line("base", settings.base, "accept only adapters of this base model"),
        _line("base_aliases", list(settings.base_aliases) or None, "a list of other names of the same base"),
        "",
        "[budget]",
        *([] if budget.slots is None else [f"slots = {budget.slots}"]),
        _line("bytes", budget.bytes, "room for everything under the shelf, at rest"),
        f"keep = {budget.keep}",
        "",
        "[recipe]",
        f'policy = "{placement.policy}"',
        _line("threshold", placement.threshold, ""),
        *([f"floor = {placement.floor}"] if placement.by_bytes else []),
        *([f'similarity = "{placement.similarity}"'] if placement.similarity != COSINE else []),
        f'merge = "{merge.method}"',
        _line("rank", merge.rank, "cap the rank stored; never pads"),
        _line("dtype", merge.dtype, "f32, f16 or bf16; without it, as the adapter"),
        f"seed = {merge.seed}",
        f"restore_norm = {str(merge.restore_norm).lower()}",
        *([f'encoding = "{merge.encoding}"', f"quality = {merge.quality}"] if merge.encoding != "peft" else []),
    ]
    if merge.parameters:
        lines += ["", "[recipe.parameters]"]
        lines += [f"{name} = {_toml(value)}" for name, value in sorted(merge.parameters.items())]
    return ("\n".join(lines) + "\n").encode()


def edited_toml(text: str, changes: Mapping[str, Any]) -> bytes:
    """Return the text of a shelf.toml with other values; the rest, with comments, is unchanged. None removes a key."""
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
    faults = [] if version in (1, FORMAT) else [("format", f"format is {version!r}, not {FORMAT}")]
    budget = _section(document, "budget", [f.name for f in fields(Budget)], faults)
    recipe = _section(document, "recipe", RECIPE, faults)
    base, aliases = document.pop("base", None), document.pop("base_aliases", [])
    faults += [(name, f"unknown key {name!r}") for name in document]
    if not isinstance(base, str | None):
        faults.append(("base", f"base is {base!r}, not a string"))
        base = None
    if not isinstance(aliases, list) or not all(isinstance(item, str) for item in aliases):
        faults.append(("base_aliases", f"base_aliases is {aliases!r}, not a list of strings"))
        aliases = []
    settings = Settings(Budget(**{"slots": None, **budget}), *specs(recipe), base, tuple(aliases))
    faults += _faults(settings)
    if faults:
        raise config_error(path, text, faults)
    return settings


def config_error(path: Path, text: str, faults: list[tuple[str, str]]) -> ShelfConfigError:
    """Return the error for faults given as (key, sentence), each with the line of its key."""
    described = []
    for key, fault in faults:
        line = next(
            (i for i, row in enumerate(text.splitlines(), 1) if re.match(rf"\s*\[*{re.escape(key)}\b", row)), None
        )
        described.append(f"line {line}: {fault}" if line else fault)
    return ShelfConfigError(described, where=str(path), cure="edit these lines; docs/format.md lists every key")


def _section(
    document: dict[str, Any], name: str, known: Sequence[str], faults: list[tuple[str, str]]
) -> dict[str, Any]:
    section = document.pop(name, {})
    if not isinstance(section, dict):
        faults.append((name, f"{name} is not a table"))
        return {}
    faults += [(key, f"unknown key {name}.{key}") for key in section if key not in known]
    return {key: value for key, value in section.items() if key in known}


def _storing_faults(merge: MergeSpec) -> Iterator[tuple[str, str]]:
    """Yield the invalid values of how merges are stored, as (key, sentence)."""
    if isinstance(merge.dtype, str) and merge.dtype not in WIDTHS:
        yield "dtype", f"dtype is {merge.dtype!r}; choose from {', '.join(WIDTHS)}"
    if not isinstance(merge.restore_norm, bool):
        yield "restore_norm", f"restore_norm is {merge.restore_norm!r}; true or false"
    elif merge.restore_norm and merge.encoding != "peft":
        yield "restore_norm", f"restore_norm is for encoding 'peft'; {merge.encoding!r} has its own scaling rule"
    if type(merge.quality) not in (int, float) or not 0 < merge.quality <= MOST_QUALITY:
        yield "quality", f"quality is {merge.quality!r}; a number above 0, at most {MOST_QUALITY}"


def _counting_faults(settings: Settings) -> Iterator[tuple[str, str]]:
    """Yield the invalid values of slots and bytes together with the policy, as (key, sentence)."""
    budget, placement, merge = settings.budget, settings.placement, settings.merge
    if type(placement.floor) not in (int, float) or not 0 <= placement.floor <= MOST_QUALITY:
        yield "floor", f"floor is {placement.floor!r}; a number from 0 to {MOST_QUALITY}"
    elif placement.by_bytes and type(merge.quality) in (int, float) and merge.quality < placement.floor:
        yield "floor", f"floor is {placement.floor}, above the quality {merge.quality} that adapters are coded with"
    if placement.by_bytes:
        if budget.slots is not None:
            yield "slots", "policy 'bytes' counts bytes, not slots: leave slots out, or choose another policy"
        if budget.bytes is None:
            yield "bytes", "policy 'bytes' needs a budget in bytes: --bytes SIZE"
        if merge.encoding != "coded":
            yield "encoding", "policy 'bytes' needs encoding 'coded': no other can be made coarser"
    elif budget.slots is None:
        instead = f"--slots K; or policy 'bytes', which needs none{'' if budget.bytes else ', with --bytes SIZE'}"
        yield "slots", f"policy {placement.policy!r} needs slots: {instead}"


def _is_threshold(value: Any) -> bool:
    return value == "auto" or (type(value) in (int, float) and abs(value) <= 1)


def _faults(settings: Settings) -> list[tuple[str, str]]:
    budget, placement, merge = settings.budget, settings.placement, settings.merge
    faults = [
        (name, f"{name} is {value!r}; it must be a whole number of at least {least}, below 2^53")
        for name, value, least, optional in [
            ("slots", budget.slots, 1, True),
            ("bytes", budget.bytes, 1, True),
            ("keep", budget.keep, 0, False),
            ("rank", merge.rank, 1, True),
            ("seed", merge.seed, 0, False),
        ]
        if not (optional and value is None) and not (type(value) is int and least <= value <= LARGEST)
    ]
    named = {"dtype": merge.dtype, "policy": placement.policy, "merge": merge.method, "encoding": merge.encoding}
    named["similarity"] = placement.similarity
    for name, value in named.items():
        if not isinstance(value, str) and not (name == "dtype" and value is None):
            faults.append((name, f"{name} is {value!r}, not a name"))
    faults += [*_storing_faults(merge), *_counting_faults(settings)]
    if not _is_threshold(placement.threshold):
        faults.append(("threshold", f"threshold is {placement.threshold!r}; a number from -1 to 1, or 'auto'"))
    if not isinstance(merge.parameters, Mapping):
        faults.append(("parameters", f"parameters is {merge.parameters!r}, not a table"))
    names = [*([] if settings.base is None else [settings.base]), *settings.base_aliases]
    if not all(isinstance(item, str) and item.isprintable() and item.strip() for item in names):
        faults.append(("base", f"base or base_aliases {names!r} hold a name that is empty or not printable text"))
    for name, check in (
        ("policy", lambda: POLICIES[placement.policy]),
        ("merge", lambda: METHODS[merge.method].checked(merge.parameters)),
        ("encoding", lambda: CODECS[merge.encoding]),
        ("similarity", lambda: METRICS[placement.similarity]),
    ):
        try:
            if isinstance(named[name], str) and isinstance(merge.parameters, Mapping):
                check()
        except LorashelfError as error:
            faults.append((name, f"{error.what} ({error.cure})"))
    if placement.policy == "all" and merge.method != "linear":
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
