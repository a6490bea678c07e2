"""What callers of the public functions give where several adapters or numbers are wanted: taken as a list, or refused
in words.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeVar

from ..errors import UsageError
from .adapter import Adapter

T = TypeVar("T")


def as_adapters(given: Iterable[Adapter], name: str = "xs") -> list[Adapter]:
    """The adapters of any iterable, a generator too. Raises UsageError for a single one, and for what is not one."""
    found = _listed(given, name, "adapters", (Adapter, str, bytes, Mapping))
    for place, x in enumerate(found):
        if not isinstance(x, Adapter):
            raise UsageError(f"{name}[{place}] is {_kind(x)}, not an Adapter", cure="read_adapter(path) reads one")
    return found


def as_adapter(given: Adapter) -> Adapter:
    """The adapter. Raises UsageError for anything else."""
    if not isinstance(given, Adapter):
        raise UsageError(f"adapter is {_kind(given)}, not an Adapter", cure="read_adapter(path) reads one")
    return given


def as_named(given: Mapping[str, Adapter]) -> Mapping[str, Adapter]:
    """Adapters by task name. Raises UsageError."""
    if not isinstance(given, Mapping):
        raise UsageError(f"adapters is {_kind(given)}, not a mapping", cure='give {"task name": adapter, …}')
    as_adapters(given.values(), "adapters.values()")
    return given


def as_numbers(given: Iterable[float], name: str = "weights") -> list[float]:
    """The numbers of any iterable. Raises UsageError for a single one, and for what is not one."""
    found = _listed(given, name, "numbers", (int, float, str, bytes, Mapping))
    for place, x in enumerate(found):
        try:
            found[place] = float(x)
        except (TypeError, ValueError):
            raise UsageError(f"{name}[{place}] is {_kind(x)}, not a number", cure="give plain numbers") from None
    return found


def as_texts(given: Iterable[str], name: str) -> tuple[str, ...]:
    """The strings of any iterable but a string, which is an iterable of letters. Raises UsageError."""
    return tuple(_listed(given, name, "strings", (str, bytes, Mapping)))


def _listed(given: Iterable[T], name: str, noun: str, single: tuple[type, ...]) -> list[T]:
    if isinstance(given, single) or not isinstance(given, Iterable):
        raise UsageError(f"{name} is {_kind(given)}, not a list of {noun}", cure=f"give a list: [{noun[:-1]}, …]")
    return list(given)


def _kind(value: object) -> str:
    """What a value is, for a message: text is quoted, of anything else the type is named."""
    return f"the string {value!r}" if isinstance(value, str) else f"of type {type(value).__name__}"
