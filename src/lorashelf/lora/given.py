"""Checks of sequences given to public functions: adapters or numbers become a list, other values a clear error."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeVar

from ..errors import UsageError
from .adapter import Adapter

T = TypeVar("T")


def as_adapters(given: Iterable[Adapter], name: str = "xs") -> list[Adapter]:
    """Return the adapters of any iterable as a list. Raises UsageError for a single adapter and for other items."""
    found = _listed(given, name, "adapters", (Adapter, str, bytes, Mapping))
    for place, x in enumerate(found):
        if not isinstance(x, Adapter):
            raise UsageError(f"{name}[{place}] is {_kind(x)}, not an Adapter", cure="read_adapter(path) reads one")
    return found


def as_adapter(given: Adapter) -> Adapter:
    """Return the adapter. Raises UsageError for anything else."""
    if not isinstance(given, Adapter):
        raise UsageError(f"adapter is {_kind(given)}, not an Adapter", cure="read_adapter(path) reads one")
    return given


def as_named(given: Mapping[str, Adapter]) -> Mapping[str, Adapter]:
    """Return adapters by task name. Raises UsageError."""
    if not isinstance(given, Mapping):
        raise UsageError(f"adapters is {_kind(given)}, not a mapping", cure='give {"task name": adapter, …}')
    as_adapters(given.values(), "adapters.values()")
    return given


def as_numbers(given: Iterable[float], name: str = "weights") -> list[float]:
    """Return the numbers of any iterable as a list. Raises UsageError for a single number and for other items."""
    found = _listed(given, name, "numbers", (int, float, str, bytes, Mapping))
    for place, x in enumerate(found):
        try:
            found[place] = float(x)
        except (TypeError, ValueError):
            raise UsageError(f"{name}[{place}] is {_kind(x)}, not a number", cure="give plain numbers") from None
    return found


def as_texts(given: Iterable[str], name: str) -> tuple[str, ...]:
    """Return the strings of any iterable except a string, which iterates over letters. Raises UsageError."""
    return tuple(_listed(given, name, "strings", (str, bytes, Mapping)))


def _listed(given: Iterable[T], name: str, noun: str, single: tuple[type, ...]) -> list[T]:
    if isinstance(given, single) or not isinstance(given, Iterable):
        raise UsageError(f"{name} is {_kind(given)}, not a list of {noun}", cure=f"give a list: [{noun[:-1]}, …]")
    return list(given)


def _kind(value: object) -> str:
    """Describe a value for a message: a string is quoted, for other values the type is named."""
    return f"the string {value!r}" if isinstance(value, str) else f"of type {type(value).__name__}"
