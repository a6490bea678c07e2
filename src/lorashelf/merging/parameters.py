"""Parameters of methods: declared by the annotations of a rule, checked at every use."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from ..errors import UsageError

Value = bool | int | float | str
"""What a parameter of a method may be given."""
RESERVED = frozenset({"xs", "weights", "method", "rank", "seed", "averages", "watch"})
"""Names of arguments of `merge`: a parameter of such a name could never be given."""
_KINDS: Mapping[type, str] = MappingProxyType(
    {bool: "true or false", int: "a whole number", float: "a finite number", str: "a string"}
)


@dataclass(frozen=True, slots=True)
class Within:
    """The closed range of a number, for an annotation: `Annotated[float, Within(0.0, 1.0)]`."""

    least: float = -math.inf
    most: float = math.inf

    def __contains__(self, value: float) -> bool:
        return self.least <= value <= self.most

    def __str__(self) -> str:
        return f"at least {self.least:g}" if self.most == math.inf else f"from {self.least:g} to {self.most:g}"


Fraction = Annotated[float, Within(0.0, 1.0)]
"""A share from 0 to 1."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of a method: name, type, default, and choices or range."""

    name: str
    kind: type
    default: Value
    choices: tuple[str, ...] = ()
    """Allowed strings; empty for any."""
    within: Within = Within()

    def fault(self, value: object) -> str | None:
        """Return what is wrong with a value, or None."""
        if self.choices:
            return None if value in self.choices else f"{self.name} is {value!r}; choose from {', '.join(self.choices)}"
        if not self._is_kind(value):
            return f"{self.name} is {value!r}, not {_KINDS[self.kind]}"
        if isinstance(value, int | float) and self.kind in (int, float) and value not in self.within:
            return f"{self.name} is {value!r}; it must be {self.within}"
        return None

    def _is_kind(self, value: object) -> bool:
        if self.kind is float:
            return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        return type(value) is self.kind


def parameters_of(
    rule: Callable[..., object], noun: str = "merge method", reserved: frozenset[str] = RESERVED
) -> Mapping[str, Parameter]:
    """Return the keyword-only parameters of a rule, by name.

    Each is annotated as bool, int, float, str or a Literal of strings, a number optionally with its range
    (`Annotated[float, Within(0, 1)]`), and has a default. Raises TypeError naming every other parameter, and every one
    with a `reserved` name: an argument of the rules' caller.
    """
    found: dict[str, Parameter] = {}
    faults: list[str] = []
    hints = _hints(rule, noun)
    for given in inspect.signature(rule).parameters.values():
        if given.kind is not given.KEYWORD_ONLY:
            continue
        described = list(_faults(given, hints.get(given.name), reserved))
        faults += [f"{given.name}: {fault}" for fault in described]
        if not described:
            found[given.name] = _parameter(given.name, hints[given.name], given.default)
            if fault := found[given.name].fault(given.default):
                faults.append(f"the default of {fault}")
    if faults:
        raise TypeError(f"{getattr(rule, '__name__', rule)} cannot be a {noun}: " + "; ".join(faults))
    return MappingProxyType(found)


def checked(owner: str, known: Mapping[str, Parameter], given: Mapping[str, Value], cure: str) -> dict[str, Value]:
    """Return the given parameters and the defaults of the others. Raises UsageError naming every unknown or bad one."""
    faults = [
        f"{owner} has no parameter {name!r} (it has: {', '.join(known) or 'none'})"
        for name in given
        if name not in known
    ]
    faults += [fault for name, value in given.items() if name in known and (fault := known[name].fault(value))]
    if faults:
        raise UsageError("; ".join(faults), cure=cure)
    return {**{name: parameter.default for name, parameter in known.items()}, **given}


def _hints(rule: Callable[..., object], noun: str) -> dict[str, Any]:
    """Return the annotations of keyword-only parameters; the others' may be for type checkers only."""
    spelled = inspect.get_annotations(rule)
    keywords = {p.name for p in inspect.signature(rule).parameters.values() if p.kind is p.KEYWORD_ONLY}
    alone = type(rule.__name__, (), {"__annotations__": {n: v for n, v in spelled.items() if n in keywords}})
    try:
        written_in = getattr(inspect.unwrap(rule), "__globals__", {})  # a decorator has the globals of its own module
        return get_type_hints(alone, globalns=written_in, include_extras=True)
    except NameError as error:
        raise TypeError(f"{rule.__name__} cannot be a {noun}: an annotation uses an undefined name: {error}") from error


def _faults(given: inspect.Parameter, hint: Any, reserved: frozenset[str]) -> Iterator[str]:
    if given.name in reserved:
        yield "the name is reserved for the caller"
    if given.default is given.empty:
        yield "there is no default"
    plain, *_ = get_args(hint) if get_origin(hint) is Annotated else (hint,)
    texts = get_origin(plain) is Literal and all(isinstance(choice, str) for choice in get_args(plain))
    if not texts and plain not in _KINDS:
        yield "annotate it as bool, int, float, str, a Literal of strings, or Annotated[float, Within(least, most)]"


def _parameter(name: str, hint: Any, default: Value) -> Parameter:
    plain, *extras = get_args(hint) if get_origin(hint) is Annotated else (hint,)
    within = next((extra for extra in extras if isinstance(extra, Within)), Within())
    if get_origin(plain) is Literal:
        return Parameter(name, str, default, get_args(plain))
    return Parameter(name, plain, default, within=within)
