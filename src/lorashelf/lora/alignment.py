"""Aligning adapters of one base: checking that they fit together, and one spelling of their modules' names.

Every comparison and merge starts here. Two names are one module if a rule of `module_names` maps one to the other; if
two names may be one module and no rule decides, the adapters are refused: merged as two modules, both would be weaker.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Literal

from ..errors import BaseMismatch, Fault, NameMismatch, ShapeMismatch
from ..faults import Faults
from .adapter import Adapter, Factors, Modules, Shape, Stack, base_faults
from .module_names import age, canonical, cut, distinct, is_bare, split, without_prefix

FEW = 0.5  # of the smaller adapter's modules: fewer in common are worth a warning
_SIZES = "these adapters belong to bases of different sizes: keep them on separate shelves"
_NAMES = (
    "if these are one module, save one adapter again from the class and transformers version of the other;"
    " if not, keep the adapters on separate shelves"
)


def fitting(xs: Sequence[Adapter], names: Sequence[str] | None = None) -> list[Adapter]:
    """Return the adapters aligned. Raises BaseMismatch if their known base names differ, else as `aligned`."""
    names = names or [f"xs[{i}]" for i in range(len(xs))]
    cure = "if these are one model under two names: --assume-base (in Python: give them one `base`)"
    return aligned(xs, base_faults(zip(names, (x.base for x in xs), strict=True)), cure=cure)


def aligned(
    xs: Sequence[Adapter],
    bases: Sequence[str] = (),
    where: str | None = None,
    cure: str | None = None,
    *,
    spelling: Literal["latest", "first"] = "latest",
) -> list[Adapter]:
    """Return the adapters with one spelling of their modules' names: the latest in transformers, else the first's.

    Ranks and sets of modules may differ. Raises BaseMismatch if there are faults in `bases`, ShapeMismatch if a
    module has different din or dout in two adapters, NameMismatch if two names may be one module; the error lists all
    faults of the three kinds.
    """
    found, names = _renamed(xs, spelling == "latest")
    shapes = _shape_faults(found)
    if shapes or names:  # then no declaration of a base helps
        cure = _SIZES if shapes else _NAMES
    if bases or shapes or names:
        kind = BaseMismatch if bases else ShapeMismatch if shapes else NameMismatch
        raise kind([*bases, *shapes, *names], where=where, cure=cure)
    return found


def shared(xs: Sequence[Adapter]) -> dict[str, int]:
    """Return the number of `modules` common to all adapters, and that `of` the adapter with the fewest."""
    paths = [set(x.modules) for x in aligned(xs)]
    return {"modules": len(set.intersection(*paths)), "of": min(map(len, paths))}


def respelled(x: Adapter, modules: Collection[str]) -> Adapter:
    """Return the adapter with the names of a base's modules, as far as rules map them."""
    return _under(x, spelling(x, modules))


def spelling(x: Adapter, modules: Collection[str]) -> dict[str, str]:
    """Return the path of a module → its path in the base, for modules that rules rename."""
    ours, theirs = x.modules.keys() - set(modules), set(modules) - x.modules.keys()
    apart = _two_parts(x.modules) if ours else set()
    return _spelled(x.modules, {path for path in ours if cut(path)[0] not in apart}, theirs) if ours else {}


def _renamed(xs: Sequence[Adapter], latest: bool) -> tuple[list[Adapter], list[str]]:
    """Return the adapters with one spelling, and a fault for every pair of names that may be one module without a rule
    that decides.
    """
    if not xs or all(list(x.modules) == list(xs[0].modules) for x in xs[1:]):
        return list(xs), []
    found, known = [xs[0]], dict(xs[0].shapes)
    apart = _two_parts(known)
    faults: list[str] = []
    for x in xs[1:]:
        found.append(x)
        shapes = x.shapes
        apart |= _two_parts(shapes)
        ours, theirs = shapes.keys() - known.keys(), known.keys() - shapes.keys()
        if ours and theirs:
            mine, yours = ({p for p in paths if cut(p)[0] not in apart} for paths in (ours, theirs))
            names, back = _spelled(shapes, mine, yours), {}
            ahead = {p: q for p, q in names.items() if not latest or age(p) <= age(q)}
            if len(ahead) < len(names):
                back = {q: p for q, p in _spelled(known, yours, mine).items() if age(q) < age(p)}
            found = [*(_under(y, back) for y in found[:-1]), _under(x, ahead)]
            shapes, known = found[-1].shapes, {back.get(path, path): shape for path, shape in known.items()}
            ours, theirs = shapes.keys() - known.keys(), known.keys() - shapes.keys()
            faults += _undecided(found, {p: shapes[p] for p in ours}, {p: known[p] for p in theirs})
        known = {**shapes, **known}
    return found, faults


def _under(x: Adapter, names: Mapping[str, str]) -> Adapter:
    if names.keys().isdisjoint(x.modules):
        return x
    before = x.modules.before if isinstance(x.modules, Renamed) else {path: path for path in x.modules}
    original = x.modules.original if isinstance(x.modules, Renamed) else x.modules
    return replace(x, modules=Renamed(original, {names.get(path, path): own for path, own in before.items()}))


def _spelled(paths: Collection[str], ours: Collection[str], theirs: Collection[str]) -> dict[str, str]:
    """Map an adapter's own module paths `ours` to the same modules' paths among `theirs` by rules; other modules of a
    renamed part are renamed with it.
    """
    known = _unique((canonical(path), path) for path in theirs)
    bare = _unique((canonical(path), path) for path in theirs if is_bare(path))
    prefixed = _unique((canonical(rest), path) for path in theirs if (rest := without_prefix(path)))
    taken, names = {canonical(path) for path in paths if path not in ours}, {}
    for path in ours:
        name = canonical(path)
        match = known.get(name) or (prefixed.get(name) if is_bare(path) else None)
        if match is None and (rest := without_prefix(path)):
            match = bare.get(canonical(rest))
        if match and name not in taken:
            names[path] = match
    if len(set(names.values())) < len(names):  # two modules would become one: the rule is not for this base
        return {}
    heads = {}
    for path, name in names.items():
        (head, place), (other, theirs_place) = cut(path), cut(name)
        if place == theirs_place:
            heads[head] = other
    for path in ours:
        head, place = cut(path)
        if path not in names and head in heads:
            names[path] = heads[head] + place
    return names


def _two_parts(paths: Iterable[str]) -> set[str]:
    """Return the parts with the same canonical name as another part of the adapter: the base has both, so no rule maps
    one to the other.
    """
    heads: dict[tuple[str, ...], set[str]] = {}
    for path in paths:
        head, place = cut(path)
        if "." in place:  # a module in a layer; lm_head is outside the layers
            heads.setdefault(split(path)[0], set()).add(head)
    return set().union(*(several for several in heads.values() if len(several) > 1))


def _unique(named: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Return name → path, without names of several paths."""
    found: dict[str, list[str]] = {}
    for name, path in named:
        found.setdefault(name, []).append(path)
    return {name: paths[0] for name, paths in found.items() if len(paths) == 1}


def _undecided(xs: Sequence[Adapter], ours: Mapping[str, Shape], theirs: Mapping[str, Shape]) -> Iterator[str]:
    """Yield a fault for every two parts of a model in which the last adapter and the earlier ones have modules with the
    same place and shape, unless the parts are distinct or one adapter has both.
    """
    places: dict[tuple[str, tuple[int, int]], list[str]] = {}
    for path, shape in theirs.items():
        places.setdefault((split(path)[1], _sides(shape)), []).append(path)
    pairs: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for path, shape in ours.items():
        head, place = split(path)
        for other in places.get((place, _sides(shape)), ()):
            against = split(other)[0]
            alone = "." not in place and head and against  # a single word is a place only directly in the model
            if not alone and not distinct(head, against):
                pairs.setdefault((cut(path)[0], cut(other)[0]), []).append((path, other))
    beside = [{cut(path)[0] for path in x.modules} for x in xs] if pairs else []
    for heads, found in pairs.items():
        if not any({*heads} <= parts for parts in beside if len({*heads}) == 2):
            first, more = min(found), f", and {len(found) - 1} more like them" if len(found) > 1 else ""
            yield f"{first[0]} and {first[1]} may be one module{more}; no rule of transformers or PEFT decides"


def _sides(shape: Shape) -> tuple[int, int]:
    return shape.dout, shape.din


def _shape_faults(xs: Sequence[Adapter]) -> list[Fault]:
    expected: dict[str, Shape] = {}
    faults = Faults()
    for x in xs:
        for path, shape in x.shapes.items():
            other = expected.setdefault(path, shape)
            if _sides(shape) != _sides(other):
                faults.append(f"ΔW is {shape.dout}x{shape.din}, elsewhere {other.dout}x{other.din}", at=path)
    return faults.listed()


class Renamed(Modules):
    """The `original` modules under other names, still read lazily."""

    def __init__(self, original: Modules, before: Mapping[str, str]) -> None:
        self.original, self.before = original, dict(sorted(before.items()))
        """Name → original name."""
        self.squared_norms = original.squared_norms and {
            name: original.squared_norms[path] for name, path in self.before.items()
        }

    @property
    def shapes(self) -> Mapping[str, Shape]:
        """Module path → (dout, r, din)."""
        shapes = self.original.shapes
        return {name: shapes[path] for name, path in self.before.items()}

    @property
    def scales(self) -> Mapping[str, float]:
        """Module path → the factor s of ΔW = s B A."""
        scales = self.original.scales
        return {name: scales[path] for name, path in self.before.items()}

    def stack(self, paths: Sequence[str]) -> Stack:
        """Return modules of one shape as arrays."""
        return self.original.stack([self.before[path] for path in paths])

    def __getitem__(self, path: str) -> Factors:
        return self.original[self.before[path]]

    def __contains__(self, path: object) -> bool:
        return path in self.before

    def __iter__(self) -> Iterator[str]:
        return iter(self.before)

    def __len__(self) -> int:
        return len(self.before)
