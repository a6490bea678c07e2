"""The core values: the Factors of one module, an Adapter of many modules, the BaseId of its base model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from itertools import combinations
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from ..digest import canonical_json, digest
from ..errors import AdapterFormatError, ShapeMismatch
from .arrays import Array32, Float32, SideA, SideB, Vector

WIDTHS: Mapping[str, int] = MappingProxyType({"f32": 4, "f16": 2, "bf16": 2})
"""Storage dtype → bytes per value."""


def parameters(shapes: Mapping[str, Shape]) -> int:
    """Return the number of values of modules of these shapes, Σ r (dout + din)."""
    return sum(shape.rank * (shape.dout + shape.din) for shape in shapes.values())


def in_16_bits(parameters: int) -> int:
    """Return the bytes of this many values in half precision, of which rates are percentages."""
    return WIDTHS["f16"] * parameters


@cache
def numpy_dtype(dtype: str) -> np.dtype[Any]:
    """Return NumPy's little-endian dtype for a storage dtype."""
    if dtype != "bf16":
        return np.dtype(f"<f{WIDTHS[dtype]}")
    import ml_dtypes

    found: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
    return found


def wider(dtypes: list[str]) -> str:
    """Return the narrowest storage dtype that represents every value of the given ones; f16 with bf16 gives f32.

    >>> wider(["f16", "f16"]), wider(["f16", "bf16"]), wider(["bf16", "f32"])
    ('f16', 'f32', 'f32')
    """
    distinct = set(dtypes)
    return distinct.pop() if len(distinct) == 1 else "f32"


class Shape(NamedTuple):
    """The sizes of one adapted linear module: ΔW is (dout, din), of rank at most `rank`."""

    dout: int
    rank: int
    din: int


@dataclass(frozen=True, slots=True)
class Factors:
    """One adapted module: ΔW = scale · b @ a, with a (r, din) and b (dout, r) in float32."""

    a: SideA
    b: SideB
    scale: float = 1.0

    def __post_init__(self) -> None:
        """Raise ShapeMismatch unless a and b are matrices of one rank, AdapterFormatError for an infinite scale."""
        a, b = np.shape(self.a), np.shape(self.b)
        if len(a) != 2 or len(b) != 2 or a[0] != b[1] or 0 in (*a, *b):
            raise ShapeMismatch(
                [f"a of shape {a} and b of shape {b} are not (r, din) and (dout, r) with r of at least 1"]
            )
        if not math.isfinite(self.scale):
            raise AdapterFormatError([f"the scale is {self.scale!r}, not a finite number"])

    @property
    def shape(self) -> Shape:
        """(dout, r, din)."""
        return Shape(self.b.shape[0], self.a.shape[0], self.a.shape[1])

    def delta(self) -> Float32[Array32, "dout din"]:
        """Return the dense update ΔW = scale · b @ a, (dout, din) float32, for methods that need it and for tests."""
        return np.asarray(self.b @ self.a * np.float32(self.scale), np.float32)


@dataclass(frozen=True, slots=True)
class Stack:
    """n modules of one shape as arrays: a (n, r, din), b (n, dout, r) in float32, scales (n,)."""

    a: Float32[Array32, "n rank din"]
    b: Float32[Array32, "n dout rank"]
    scales: Vector

    @property
    def shape(self) -> Shape:
        """(dout, r, din) of each module."""
        return Shape(self.b.shape[1], self.a.shape[1], self.a.shape[2])

    def __len__(self) -> int:
        return len(self.scales)

    def __getitem__(self, i: int) -> Factors:
        return Factors(self.a[i], self.b[i], float(self.scales[i]))


@dataclass(frozen=True, slots=True)
class BaseId:
    """The base model of an adapter: PEFT's `base_model_name_or_path` and `revision`; "" is unknown."""

    name: str = ""
    revision: str | None = None

    def contradicts(self, other: BaseId) -> bool:
        """Return whether both are known and differ, by name or, if both have one, by revision."""
        if self.name and other.name and self.name != other.name:
            return True
        ours, theirs = self.revision or "main", other.revision or "main"
        stated = self.revision is not None and other.revision is not None
        return bool(self.name and other.name and stated and ours != theirs)

    def __str__(self) -> str:
        return (self.name or "(unknown base)") + (f"@{self.revision}" if self.revision else "")


class Modules(Mapping[str, Factors]):
    """Module path → Factors, sorted by path; `shapes` and `scales` are known without reading a tensor."""

    squared_norms: Mapping[str, float] | None = None
    """Module path → ‖ΔW‖² once known: cached here by `kernels.squared_norms` and by a shelf that has stored it."""
    coded = False
    """Whether these are decoded from a code, which may leave out what a module has learnt."""

    @property
    def kept(self) -> float:
        """The share of ‖ΔW‖² that modules decoded from a code keep of what was coded; else 1."""
        return 1.0

    def __init__(self, factors: Mapping[str, Factors]) -> None:
        self._factors = dict(sorted(factors.items()))

    @property
    def shapes(self) -> Mapping[str, Shape]:
        """Module path → (dout, r, din)."""
        return {path: factors.shape for path, factors in self._factors.items()}

    @property
    def original_shapes(self) -> Mapping[str, Shape]:
        """Module path → the (dout, r, din) that was coded, of modules decoded from a code; else `shapes`."""
        return self.shapes

    @property
    def scales(self) -> Mapping[str, float]:
        """Module path → the factor s of ΔW = s B A."""
        return {path: factors.scale for path, factors in self._factors.items()}

    def stack(self, paths: Sequence[str]) -> Stack:
        """Return modules of one shape as arrays."""
        fs = [self[path] for path in paths]
        a, b = np.stack([f.a for f in fs], dtype=np.float32), np.stack([f.b for f in fs], dtype=np.float32)
        return Stack(a, b, np.array([f.scale for f in fs]))

    def __getitem__(self, path: str) -> Factors:
        return self._factors[path]

    def __contains__(self, path: object) -> bool:
        return path in self._factors

    def __iter__(self) -> Iterator[str]:
        return iter(self._factors)

    def __len__(self) -> int:
        return len(self._factors)


@dataclass(frozen=True, eq=False)
class Adapter:
    """A LoRA adapter: modules, base, storage dtype, and PEFT fields.

    `modules` may read lazily from an open file; its Factors are float32 whatever the storage dtype. `config` holds the
    fields of adapter_config.json that do not follow from the factors, unknown ones included. `notices` are sentences
    about further contents of the folder, which are not kept. Adapters with the same `digest` are the same.
    """

    modules: Modules
    base: BaseId = BaseId()
    dtype: str = "f32"
    config: Mapping[str, Any] = field(default_factory=dict)
    notices: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Raise AdapterFormatError, with all faults, for no modules, modules of another type and an unknown dtype."""
        faults = []
        if not isinstance(self.modules, Modules):
            faults.append(f"modules is a {type(self.modules).__name__}: give Modules({{path: Factors(a, b, scale)}})")
        elif not len(self.modules):
            faults.append("there are no modules")
        if self.dtype not in WIDTHS:
            faults.append(f"dtype is {self.dtype!r}; choose from {', '.join(WIDTHS)}")
        if faults:
            raise AdapterFormatError(faults)

    @property
    def shapes(self) -> Mapping[str, Shape]:
        """Module path → (dout, r, din), without reading a tensor."""
        return self.modules.shapes

    @property
    def rank(self) -> int:
        """The largest rank among the modules."""
        return max(shape.rank for shape in self.shapes.values())

    @property
    def parameters(self) -> int:
        """The number of values stored, Σ r (dout + din)."""
        return parameters(self.shapes)

    @cached_property
    def digest(self) -> str:
        """BLAKE2b-256 of every module's path, shape, scale and float32 values: independent of the storage dtype."""
        return digest(self._canonical_chunks())

    def _canonical_chunks(self) -> Iterator[bytes | memoryview]:
        for path, factors in self.modules.items():
            yield canonical_json([path, *factors.shape, factors.scale])
            yield np.ascontiguousarray(factors.a, dtype="<f4").data
            yield np.ascontiguousarray(factors.b, dtype="<f4").data

    def with_factors(self, factors: Mapping[str, Factors]) -> Adapter:
        """Return the same adapter with other factors for the same modules."""
        return replace(self, modules=Modules(factors))


def base_faults(offered: Iterable[tuple[str, BaseId]]) -> list[str]:
    """Return a sentence per base with its adapters if any of several (name, base) contradict each other; else none."""
    named: dict[BaseId, list[str]] = {}
    for name, base in offered:
        if base.name:
            named.setdefault(base, []).append(name)
    if not any(base.contradicts(other) for base, other in combinations(named, 2)):
        return []
    return [f"trained on {base}: {', '.join(names)}" for base, names in named.items()]
